"""How often the 95 % band of spectral densities covers what it says, as a table.

Seven spectra, by the density of the exact eigenvalues through the kernels of each
result (``smoothed``), where that is above a thousandth of its maximum. Prints the mean
over these points and 64 seeds, for 1 to 30 runs, and the median width of the band
relative to the density.

Run: ``python benchmarks/density_coverage.py [--seeds 64] [SPECTRUM ...]``. Takes some
minutes.
"""

import argparse
from dataclasses import replace

import numpy as np
from scipy.sparse import diags_array

from curvlinops.estimators import LanczosApproximateSpectrumCached, SpectralDensity

RNG = np.random.default_rng(1)
BULK = 1e-3 * RNG.standard_normal(290)
SPECTRA = {
    "flat": np.linspace(0.5, 1.5, 300),
    "bulk and outliers": np.r_[BULK, np.geomspace(1, 50, 10)],
    "indefinite": np.r_[-np.linspace(0.01, 1, 150), np.linspace(0.01, 1, 150)],
    "clusters": np.repeat([1.0, 5.0], 100) + 0.01 * RNG.standard_normal(200),
    "dominating": np.r_[np.linspace(0.5, 1.5, 199), 1e6],
    "rank-deficient": np.r_[np.zeros(150), np.arange(1.0, 151) ** -1.5],
    "twelve decades": np.geomspace(1e-12, 1, 200),
}
REPEATS = (1, 3, 10, 30)


def densities(
    eigenvalues: np.ndarray, ncv: int, seed: int
) -> dict[tuple[str, int], SpectralDensity]:
    """Return the densities on both scales, by some and by all of the same runs."""
    # Rotated or not: start vectors on the sphere do not know.
    ends = (eigenvalues.min(), eigenvalues.max())
    cached = LanczosApproximateSpectrumCached(
        diags_array(eigenvalues), ncv, ends, rng=seed
    )
    linear = cached.approximate_spectrum(max(REPEATS), num_points=60)
    sizes = np.abs(eigenvalues)
    ends = (sizes.min(), sizes.max())
    log = linear.smooth(scale="log", boundaries=ends, kappa=1.04)
    return {
        (result.scale, count): replace(
            result, nodes=result.nodes[:count], weights=result.weights[:count]
        )
        for result in (linear, log)
        for count in REPEATS
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("spectra", nargs="*", default=list(SPECTRA))
    arguments = parser.parse_args()
    for name in arguments.spectra:
        eigenvalues = SPECTRA[name]
        for ncv in (20, 60):
            covered, widths = {}, {}
            for seed in range(arguments.seeds):
                for key, result in densities(eigenvalues, ncv, seed).items():
                    truth, (low, high) = result.smoothed(eigenvalues), result.band()
                    seen = truth > 1e-3 * truth.max()
                    inside = ((low <= truth) & (truth <= high))[seen].mean()
                    covered.setdefault(key, []).append(inside)
                    width = np.median((high - low)[seen] / truth[seen])
                    widths.setdefault(key, []).append(width)
            for scale in ("linear", "log"):
                shares = [np.mean(covered[scale, count]) for count in REPEATS]
                sizes = [np.median(widths[scale, count]) for count in REPEATS]
                print(
                    f"{name:18} {scale:6} ncv={ncv}"
                    + "".join(f"{share:6.0%}" for share in shares)
                    + "".join(f"{size:8.2g}" for size in sizes),
                    flush=True,
                )


if __name__ == "__main__":
    main()
