"""Matrices with known spectra, in the guises that estimators accept."""

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with given eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    return basis * np.asarray(eigenvalues) @ basis.T


class Counting(LinearOperator):
    """A plain SciPy operator that counts its products, and can break at one."""

    def __init__(self, matrix, break_at=None, error=None):
        super().__init__(matrix.dtype, matrix.shape)
        self.matrix, self.count = matrix, 0
        self.break_at, self.error = break_at, error

    def _matmat(self, X):
        self.count += X.shape[1]
        if self.break_at is not None and self.count >= self.break_at:
            if self.error is not None:
                raise self.error
            return np.full_like(X, np.nan)
        return self.matrix @ X

    def _adjoint(self):
        return Counting(self.matrix.conj().T)


class TorchSide:
    """What an operator of the package shows to an estimator, and nothing else."""

    def __init__(self, matrix):
        self.matrix, self.shape = matrix, tuple(matrix.shape)
        self.torch_dtype, self.device = matrix.dtype, matrix.device
        self.dtype = np.dtype(np.float32)

    def __matmul__(self, x):
        assert x.dtype == self.torch_dtype
        return self.matrix @ x

    def adjoint(self):
        return TorchSide(self.matrix.mT)


#: From a NumPy matrix to the same matrix in another guise.
GUISES = {
    "array": np.asarray,
    "sparse": csr_array,
    "scipy": aslinearoperator,
    "tensor": torch.from_numpy,
    "torch side": lambda matrix: TorchSide(torch.from_numpy(matrix)),
}
