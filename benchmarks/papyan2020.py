"""Two synthetic spectra and their approximations, against exact eigenvalues.

Modelled on the synthetic experiments of Papyan, "Traces of class/cross-class structure
pervade deep learning spectra", JMLR 21 (2020), on approximating the spectrum and the
log-spectrum. Sizes and numbers below are this file's:

* linear: ``Y = X + Z Z^T / 2000`` with ``X = diag(5, 4, 3, 0, ..., 0)`` and a
  ``2000 x 2000`` standard normal ``Z``: a Marchenko-Pastur bulk and three outliers;
* logarithmic: ``Y = Z Z^T / 1000`` with a ``500 x 1000`` matrix ``Z`` of Pareto numbers
  of index 1: eigenvalues over many orders of magnitude.

Both are run with 10 repeats and the default widths of kernels. Prints how far the
density is from that of the exact eigenvalues seen through the same kernels, in L1, and
the same for its standard error: the noise. ``--plot`` draws both.

Run: ``python benchmarks/papyan2020.py [--plot FILE]``. Takes half a minute.
"""

import argparse

import numpy as np
from scipy.integrate import trapezoid

from curvlinops.estimators import (
    SpectralDensity,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from curvlinops.plots import plot_spectral_density


def matrices() -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices of the linear and of the logarithmic experiment."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((2000, 2000))
    linear = Z @ Z.T / 2000
    linear[range(3), range(3)] += [5, 4, 3]
    Z = rng.pareto(1.0, (500, 1000)) + 1
    return linear, Z @ Z.T / 1000


def compare() -> dict[str, tuple[SpectralDensity, np.ndarray, np.ndarray]]:
    """Return densities, exact densities, and eigenvalues of both experiments."""
    linear, logarithmic = matrices()
    results = {
        "linear": lanczos_approximate_spectrum(linear, 128, num_repeats=10, rng=0),
        "log": lanczos_approximate_log_spectrum(
            logarithmic, 256, num_repeats=10, rng=0
        ),
    }
    found = {}
    for name, Y in zip(results, (linear, logarithmic), strict=True):
        eigenvalues = np.linalg.eigvalsh(Y)
        found[name] = results[name], results[name].smoothed(eigenvalues), eigenvalues
    return found


def main() -> None:
    """Print distances, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE")
    file = parser.parse_args().plot
    found = compare()
    for name, (result, reference, eigenvalues) in found.items():
        grid = result.grid
        distance = trapezoid(abs(result.density - reference), grid)
        noise = trapezoid(result.standard_error, grid)
        low, high = result.band()
        covered = np.average(
            (low <= reference) & (reference <= high), weights=reference
        )
        print(
            f"{name:7} eigenvalues {eigenvalues[0]:.2e} to {eigenvalues[-1]:.2e}, "
            f"L1 distance {distance:.4f}, standard error {noise:.4f}, "
            f"inside the 95 % band {covered:.0%}"
        )
        assert distance < 3 * noise
    if file:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(1, 2, figsize=(10, 4))
        for ax, (result, reference, _) in zip(axes, found.values(), strict=True):
            unit = result.grid * np.log(10) if result.scale == "log" else 1.0
            ax.plot(result.grid, unit * reference, color="black", label="exact")
            plot_spectral_density(result, ax, label="approximate", width=result.width)
        plt.savefig(file, bbox_inches="tight")


if __name__ == "__main__":
    main()
