"""Products to follow leading eigenpairs: LOBPCG against ARPACK, from a warm start.

Three spectra of N = 1000, perturbed by a symmetric matrix of a hundredth of the leading
eigenvalue; both start from the eigenvectors before. Prints the range over the spectra
and 2, 3 and 4 pairs of the products spent, and the largest error of an eigenvalue
relative to the leading one. ``top_eigenpairs(method="auto")`` chooses by this table.

Run: ``python benchmarks/warm_starts.py``. Takes half a minute.
"""

import warnings

import numpy as np

from curvlinops import top_eigenpairs

N = 1000
RNG = np.random.default_rng(0)
SPECTRA = {
    "outliers": np.r_[np.linspace(-0.5, 1, N - 5), 3, 4, 6, 8, 10],
    "power law": 10.0 / np.arange(1, N + 1) ** 1.5,
    "bulk": RNG.standard_normal(N),
}


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore", UserWarning)  # those that did not converge
    basis = np.linalg.qr(RNG.standard_normal((N, N)))[0]
    noise = RNG.standard_normal((N, N))
    noise = (noise + noise.T) / np.linalg.norm(noise + noise.T, 2)
    print(f"{'tol':8}{'method':8}{'start':8}{'products':>12}{'error':>10}")
    for tol in (1e-3, 1e-4, 1e-6):
        for method in ("lobpcg", "arpack"):
            for warm in (True, False):
                products, errors = [], []
                for eigenvalues in SPECTRA.values():
                    before = basis * eigenvalues @ basis.T
                    now = before + 0.01 * np.abs(eigenvalues).max() * noise
                    exact = np.linalg.eigvalsh(now)[::-1]
                    for k in (2, 3, 4):
                        old = top_eigenpairs(before, k, rng=0) if warm else None
                        pairs = top_eigenpairs(
                            now, k, start=old, tol=tol, method=method, rng=0
                        )
                        products.append(pairs.num_products)
                        found = pairs.numpy()
                        error = np.abs(found - exact[: len(found)]).max() / exact[0]
                        errors.append(error if pairs.converged else np.inf)
                spent = f"{min(products)} to {max(products)}"
                start = "warm" if warm else "random"
                print(f"{tol:<8.0e}{method:8}{start:8}{spent:>12}{max(errors):10.0e}")


if __name__ == "__main__":
    main()
