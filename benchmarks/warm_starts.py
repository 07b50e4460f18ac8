"""Products to find and to follow leading eigenpairs, beside SciPy's ``eigsh``.

Three spectra of N = 1000, perturbed by a symmetric matrix of a hundredth of the leading
eigenvalue; the warm start are the eigenvectors before. Prints the range over the
spectra and 2, 3 and 4 pairs of the products spent, certificates included, and the
largest error of an eigenvalue relative to the leading one.

Run: ``python benchmarks/warm_starts.py``. Takes half a minute.
"""

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from curvlinops import top_eigenpairs

N = 1000
RNG = np.random.default_rng(0)
SPECTRA = {
    "outliers": np.r_[np.linspace(-0.5, 1, N - 5), 3, 4, 6, 8, 10],
    "power law": 10.0 / np.arange(1, N + 1) ** 1.5,
    "bulk": RNG.standard_normal(N),
}


def arpack(A: np.ndarray, k: int, tol: float, start: np.ndarray | None) -> tuple:
    """Return eigenvalues and products of ``eigsh``, from the sum of start vectors."""
    count = 0

    def product(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return A @ x

    v0 = None if start is None else start.sum(1)
    operator = LinearOperator(A.shape, product, dtype=A.dtype)
    values = eigsh(operator, k, which="LA", tol=tol, v0=v0, return_eigenvectors=False)
    return values[::-1], count


def main() -> None:
    """Print the table."""
    basis = np.linalg.qr(RNG.standard_normal((N, N)))[0]
    noise = RNG.standard_normal((N, N))
    noise = (noise + noise.T) / np.linalg.norm(noise + noise.T, 2)
    print(f"{'tol':8}{'solver':16}{'start':8}{'products':>12}{'error':>10}")
    for tol in (1e-3, 1e-6, np.finfo(float).eps ** (2 / 3)):
        for solver in ("top_eigenpairs", "eigsh"):
            for warm in (True, False):
                products, errors = [], []
                for eigenvalues in SPECTRA.values():
                    before = basis * eigenvalues @ basis.T
                    now = before + 0.01 * np.abs(eigenvalues).max() * noise
                    exact = np.linalg.eigvalsh(now)[::-1]
                    for k in (2, 3, 4):
                        old = top_eigenpairs(before, k, rng=0).vectors if warm else None
                        if solver == "eigsh":
                            values, count = arpack(now, k, tol, old)
                        else:
                            pairs = top_eigenpairs(now, k, start=old, tol=tol, rng=0)
                            assert pairs.converged
                            values, count = pairs.values, pairs.num_products
                        products.append(count)
                        errors.append(np.abs(values - exact[:k]).max() / exact[0])
                spent = f"{min(products)} to {max(products)}"
                start = "warm" if warm else "random"
                print(f"{tol:<8.0e}{solver:16}{start:8}{spent:>12}{max(errors):10.0e}")


if __name__ == "__main__":
    main()
