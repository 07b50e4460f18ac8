"""1-Wasserstein distance of spectral densities from exact spectra, as a table.

Five spectra of N = 1000 eigenvalues, scaled by their range. The distance is that of the
Gauss rules (nodes and weights, before smoothing) of R = 10 runs from the exact
eigenvalues. A sampling error of order ``1 / sqrt(N R)`` = 1e-2 times the spread remains
for any number of steps.

Run: ``python benchmarks/density_wasserstein.py``. Takes half a minute.
"""

import numpy as np
from scipy.stats import wasserstein_distance

from curvlinops.estimators import lanczos_approximate_spectrum

N, REPEATS = 1000, 10
RNG = np.random.default_rng(0)
SPECTRA = {
    "clustered": np.repeat([1, 2, 4, 8], N // 4) + 0.01 * RNG.standard_normal(N),
    "heavy-tailed": RNG.pareto(2.5, N),
    "two outliers": np.r_[np.sqrt(RNG.uniform(0, 1, N - 2)), 20.0, 35.0],
    "indefinite": RNG.standard_normal(N),
    "rank-deficient": np.r_[np.zeros(2 * N // 3), RNG.uniform(1, 3, N - 2 * N // 3)],
}
STEPS = (10, 30, 100)


def distance(eigenvalues: np.ndarray, ncv: int, **settings) -> float:
    """Return the distance relative to the range of the spectrum."""
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((N, N)))[0]
    A = basis * eigenvalues @ basis.T
    result = lanczos_approximate_spectrum(
        A, ncv, num_repeats=REPEATS, rng=0, **settings
    )
    nodes = np.r_[result.nodes.ravel(), result.spikes]
    weights = np.r_[
        result.weights.ravel() / REPEATS, np.full(len(result.spikes), 1 / N)
    ]
    return wasserstein_distance(nodes, eigenvalues, weights) / np.ptp(eigenvalues)


def main() -> None:
    """Print the table."""
    print(f"{'':16}" + "".join(f"{f'ncv={ncv}':>10}" for ncv in STEPS), end="")
    print(f"{'deflate=2':>10}   (at ncv=100)")
    for name, eigenvalues in SPECTRA.items():
        row = [distance(eigenvalues, ncv) for ncv in STEPS]
        row.append(distance(eigenvalues, 100, deflate=2))
        print(f"{name:16}" + "".join(f"{d:10.1e}" for d in row))
        assert max(row[1:]) < 0.02


if __name__ == "__main__":
    main()
