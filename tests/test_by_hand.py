"""What everybody writes by hand: identities, sums with matrices, NumPy's functions."""

import operator

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from cases import find
from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    TensorLinearOperator,
)
from curvlinops._operator import TorchOperator
from tolerances import assert_close


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_of(A):
    """Return the matrix in float64, column by column, by products alone."""
    columns = [A @ e for e in torch.eye(A.shape[1], dtype=A.torch_dtype)]
    return torch.stack(columns, dim=1).double()


def test_the_identity_of_another_operator():
    built = find("conv-float32").build()
    G = GGNLinearOperator(*built)
    identity = IdentityLinearOperator.like(G)
    assert identity.in_shapes == G.in_shapes and identity.torch_dtype == torch.float32
    assert IdentityLinearOperator.like(np.eye(3)).shape == (3, 3)
    assert IdentityLinearOperator.like(aslinearoperator(np.eye(3))).shape == (3, 3)
    J = JacobianLinearOperator(built[0], built[2], built[3])
    with pytest.raises(ValueError, match=r"Only a square .*Jacobian"):
        IdentityLinearOperator.like(J)


@pytest.mark.parametrize("name", ["mlp-tanh-ce", "conv-float32", "mlp-bfloat16"])
def test_sums_with_matrices(name):
    A = HessianLinearOperator(*find(name).build())
    N, D = A.shape[0], dense_of(A)
    M = randn(N, N)
    X = randn(N, 2).to(A.torch_dtype)
    array = M.numpy().astype(A.dtype)
    matrices = [array, M.numpy(), M.to(A.torch_dtype), np.asfortranarray(array)[::1]]
    for given in matrices:
        sums = {
            operator.add: [(A + given, D + M), (given + A, D + M)],
            operator.sub: [(A - given, D - M), (given - A, M - D)],
        }
        for B, expected in (pair for pairs in sums.values() for pair in pairs):
            assert isinstance(B, TorchOperator) and B.torch_dtype == A.torch_dtype
            assert_close(B @ X, expected @ X.double(), size=1000)
            assert_close(B @ X.double().numpy().astype(A.dtype), expected @ X.double(),
                         A.torch_dtype, size=1000)  # fmt: skip
            assert_close(B.H @ X, expected.T @ X.double(), size=1000)
    for sparse in (scipy.sparse.csr_array(array), scipy.sparse.coo_matrix(array)):
        for B in (A + sparse, sparse + A, sparse - (-1 * A), A - (-1 * sparse)):
            assert isinstance(B, LinearOperator)
            y = B @ X.double().numpy().astype(A.dtype)
            assert_close(y, (D + M) @ X.double(), A.torch_dtype, size=1000)
    if A.torch_dtype is torch.float64:
        assert isinstance(A + scipy.sparse.csr_array(array), TorchOperator)
        B = A + 1j * array
        assert isinstance(B, LinearOperator) and B.dtype.kind == "c"
        assert_close(B @ np.ones(N), (D + 1j * M).sum(1))


@pytest.mark.parametrize("number", [0.1, 1, np.float32(0.25), np.array(2.0),
                                    torch.tensor(0.5), 1j])  # fmt: skip
def test_numbers_name_the_cure(number):
    A = HessianLinearOperator(*find("mlp-tanh-ce").build())
    for add in (lambda: A + number, lambda: number + A):
        with pytest.raises(TypeError, match=r"`A\.damped\(.*\)`"):
            add()
    with pytest.raises(TypeError, match=r"`A\.damped\(-0\.1\)`"):
        A - 0.1
    with pytest.raises(TypeError, match="a real number"):
        A.damped(1j)
    with pytest.raises(TypeError, match="a real number"):
        A.inverse("0.1")
    for wrong in (np.nan, torch.tensor(torch.inf)):
        with pytest.raises(ValueError, match=r"`delta` must be finite"):
            A.damped(wrong)
        with pytest.raises(ValueError, match=r"`damping` must be finite"):
            A.inverse(wrong)


def test_matrices_that_do_not_fit():
    A = TensorLinearOperator(randn(3, 4))
    for wrong in (np.ones((4, 3)), torch.ones(4, 3).double(), np.ones((1, 4)),
                  scipy.sparse.csr_array((4, 3))):  # fmt: skip
        for add in (lambda M=wrong: A + M, lambda M=wrong: M + A):
            with pytest.raises(ValueError, match=r"of shape \(.*3x4"):
                add()
    for nothing in (np.ones(4), [1.0], "1", None, np.ones((1, 3, 4))):
        with pytest.raises(TypeError, match="operand"):
            A + nothing
    with pytest.raises(TypeError, match=r"float64.*float32"):
        A + torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"complex128, the operator real.*`M\.real`"):
        A + torch.ones(3, 4, dtype=torch.complex128)
    with pytest.raises(TypeError, match="multiplies numbers"):
        A + np.full((3, 4), "a")


def test_sums_with_operators_from_elsewhere_are_scipys():
    A, M = TensorLinearOperator(randn(3, 3)), randn(3, 3, seed=1).numpy()
    for B in (A + aslinearoperator(M), aslinearoperator(M) + A):
        assert not isinstance(B, TorchOperator)
        assert_close(B @ np.ones(3), (dense_of(A).numpy() + M).sum(1))


# NumPy's functions


def test_dot_and_matmul_of_numpy_are_products():
    A, D = TensorLinearOperator(randn(3, 4)), randn(3, 4).numpy()
    x, X, u = randn(4).numpy(), randn(4, 2).numpy(), randn(3).numpy()
    assert_close(np.dot(A, x), D @ x)
    assert_close(np.dot(A, X), D @ X)
    assert_close(np.dot(u, A), u @ D)
    assert_close(np.dot(A, b=list(x)), D @ x)
    assert torch.is_tensor(np.dot(A, torch.from_numpy(x)))
    assert_close(np.dot(A, A.H) @ u, D @ D.T @ u)
    assert_close(np.dot(2.0, A) @ x, 2 * D @ x)
    assert_close(np.dot(A, np.float64(3)) @ x, 3 * D @ x)
    assert_close(np.dot(aslinearoperator(D.T), A) @ x, D.T @ D @ x)
    if hasattr(np.linalg, "matmul"):
        assert_close(np.linalg.matmul(A, x), D @ x)
        assert_close(np.linalg.matmul(u, A), u @ D)
    with pytest.raises(TypeError, match=r"leave out `out`.*A @ x"):
        np.dot(A, x, out=np.empty(3))
    with pytest.raises(TypeError, match="does not support ufuncs"):
        np.matmul(A, x)  # loudly: no such function, but a universal one
    with pytest.raises(ValueError, match="Dimension mismatch"):
        np.dot(A, np.ones(3))


class Plain(LinearOperator):
    """An operator of SciPy's: what functions of NumPy did before."""

    def __init__(self):
        super().__init__(np.dtype(float), (3, 3))

    def _matvec(self, x):
        return 2 * x


def outcome(function, A):
    """Return what a function makes of an operator: type, dtype and shape, or error."""
    try:
        result = function(A)
    except Exception as error:
        return type(error)
    return type(result), getattr(result, "dtype", None), getattr(result, "shape", None)


@pytest.mark.parametrize(
    "function",
    [
        np.asarray,
        np.array,
        np.linalg.norm,
        lambda A: np.allclose(A, A),
        np.shape,
        np.ndim,
        np.size,
        np.iscomplexobj,
        np.isscalar,
        np.sum,
        np.trace,
        np.diag,
        np.transpose,
        np.copy,
        np.atleast_2d,
        np.zeros_like,
        np.result_type,
        np.linalg.eigvalsh,
        lambda A: np.array_equal(A, A),
        lambda A: np.concatenate([A, A]),
        lambda A: np.vdot(A, np.ones(3)),
        lambda A: np.inner(A, np.ones(3)),
        lambda A: np.tensordot(A, np.ones(3), 1),
        lambda A: np.einsum("ij,j->i", A, np.ones(3)),
        lambda A: np.add(A, 1.0),
    ],
)
def test_other_functions_of_numpy_are_as_they_were(function):
    ours = TensorLinearOperator(2 * torch.eye(3).double())
    assert outcome(function, ours) == outcome(function, Plain())


def test_arrays_of_other_kinds_decide_for_themselves():
    class Other:
        def __array_function__(self, func, types, args, kwargs):
            return "theirs"

    A = TensorLinearOperator(torch.eye(2))
    assert np.allclose(A, Other()) == "theirs"
