"""Operators whose matrix has a visible structure."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh, lsmr, svds

from curvlinops import blockdiagonal, diag, submatrix
from curvlinops.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    IdentityLinearOperator,
    OuterProductLinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
)
from tolerances import assert_close

DTYPES = [torch.float64, torch.float32]


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def identity(dtype):
    return IdentityLinearOperator([(2, 2), (3,)], "cpu", dtype), torch.eye(
        7, dtype=dtype
    )


def diagonal(dtype):
    entries = [randn(2, 3, dtype=dtype), randn(4, dtype=dtype)]
    return DiagonalLinearOperator(entries), torch.cat(
        [t.flatten() for t in entries]
    ).diag()


def dense(dtype):
    A = randn(4, 6, dtype=dtype)
    return TensorLinearOperator(A), A


def outer_product(dtype):
    c, A = randn(3, dtype=dtype), randn(5, 3, dtype=dtype, seed=1)
    return OuterProductLinearOperator(c, A), A @ c.diag() @ A.T


def block_diagonal(dtype):
    A, B = randn(2, 3, dtype=dtype), diagonal(dtype)
    blocks = [TensorLinearOperator(A), B[0], A.T]
    return BlockDiagonalLinearOperator(blocks), torch.block_diag(A, B[1], A.T)


def symmetric_blocks(dtype):
    blocks, matrices = zip(diagonal(dtype), outer_product(dtype), strict=True)
    return BlockDiagonalLinearOperator(blocks), torch.block_diag(*matrices)


def submatrix_of_dense(dtype):
    A = randn(5, 6, dtype=dtype)
    return SubmatrixLinearOperator(A, [3, 0, -1], range(1, 5)), A[[3, 0, 4], 1:5]


def principal_submatrix(dtype):
    A, matrix = outer_product(dtype)
    return SubmatrixLinearOperator(A, [4, 1], [4, 1]), matrix[[4, 1]][:, [4, 1]]


BUILDERS = [
    identity,
    diagonal,
    dense,
    outer_product,
    block_diagonal,
    symmetric_blocks,
    submatrix_of_dense,
    principal_submatrix,
]
each_operator = pytest.mark.parametrize("build", BUILDERS, ids=lambda b: b.__name__)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_dense_matrix(build, dtype):
    A, matrix = build(dtype)
    assert LinearOperator in type(A).__bases__
    assert A.shape == matrix.shape
    assert A.torch_dtype == dtype
    X, Y = randn(A.shape[1], 3, dtype=dtype), randn(A.shape[0], 3, dtype=dtype, seed=1)
    assert_close(A.to_dense(), matrix, size=9)
    assert_close(A @ X, matrix @ X, size=9)
    assert_close(A @ X.numpy(), matrix @ X, size=9)
    assert_close(A.T @ Y, matrix.T @ Y, size=9)
    assert_close(A.T.T @ X, matrix @ X, size=9)
    assert_close((A.T @ A + 2.0 * (A.T @ A)) @ X, 3 * matrix.T @ matrix @ X, size=99)
    as_lists = A @ A._in_space.unpack(X)
    assert [tuple(t.shape[:-1]) for t in as_lists] == [tuple(s) for s in A.out_shapes]
    assert_close(torch.cat([t.reshape(-1, 3) for t in as_lists]), matrix @ X, size=9)


@each_operator
def test_operand_and_result_share_no_memory(build):
    A, _ = build(torch.float64)
    X = np.ones((A.shape[1], 2))
    result = A @ X
    assert not np.shares_memory(result, X)
    result[:] = 7.0
    assert (X == 1.0).all()
    assert not (A @ X == 7.0).all()


@each_operator
def test_pickles_and_copies(build):
    A, matrix = build(torch.float64)
    for twin in pickle.loads(pickle.dumps(A)), copy.copy(A), copy.deepcopy(A):
        assert_close(twin.to_dense(), matrix, size=9)


@pytest.mark.parametrize(
    "build", [identity, diagonal, outer_product, symmetric_blocks, principal_submatrix]
)
def test_self_adjoint(build):
    A, _ = build(torch.float64)
    assert A.adjoint() is A


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scipy_solvers(dtype):
    D = DiagonalLinearOperator(torch.arange(1.0, 13.0).to(dtype))
    b = np.ones(12, D.dtype)
    x, info = cg(D, b)
    assert info == 0
    np.testing.assert_allclose(x, 1 / np.arange(1, 13), rtol=1e-4)
    np.testing.assert_allclose(eigsh(D, k=1, return_eigenvectors=False), 12, rtol=1e-5)
    A = randn(12, 9, dtype=dtype)
    block = BlockDiagonalLinearOperator([A])
    top = torch.linalg.svdvals(A)[0]
    np.testing.assert_allclose(svds(block, k=1)[1], top, rtol=1e-4)
    solution = torch.linalg.lstsq(A.double(), torch.ones(12, 1).double()).solution
    np.testing.assert_allclose(
        lsmr(block, np.ones(12), maxiter=99)[0], solution[:, 0], rtol=1e-3, atol=1e-4
    )


def test_hand_on_modules():
    assert diag.DiagonalLinearOperator is DiagonalLinearOperator
    assert blockdiagonal.BlockDiagonalLinearOperator is BlockDiagonalLinearOperator
    assert submatrix.SubmatrixLinearOperator is SubmatrixLinearOperator


# -- diagonal -----------------------------------------------------------------------


def test_diagonal_inverse():
    entries = [torch.tensor([[1.0, 2.0]]), torch.tensor([4.0])]
    D = DiagonalLinearOperator(entries)
    inverse = D.inverse(damping=1.0)
    assert inverse.in_shapes == D.in_shapes
    assert_close(inverse.diagonal(), torch.tensor([1 / 2, 1 / 3, 1 / 5]))
    assert_close((D.inverse() @ D).to_dense(), torch.eye(3))


def test_diagonal_copies_its_entries():
    entries = torch.ones(3, requires_grad=True)
    D = DiagonalLinearOperator(entries)
    entries.data.fill_(5.0)
    D.diagonal().fill_(5.0)
    assert (D @ np.ones(3) == 1.0).all()


def test_singular_diagonal_has_no_inverse():
    with pytest.raises(LinAlgError, match="1 of its entries are zero"):
        DiagonalLinearOperator(torch.tensor([1.0, 0.0])).inverse()


# -- dense --------------------------------------------------------------------------


def test_dense_operator_sees_later_values():
    A = torch.eye(2)
    operator = TensorLinearOperator(A)
    adjoint = operator.adjoint()
    A[0, 1] = 3.0
    assert (operator.to_dense() == A).all()
    assert (adjoint.to_dense() == A.T).all()


def test_dense_operator_of_a_parameter_has_no_graph():
    A = torch.nn.Parameter(torch.eye(2))
    assert not (TensorLinearOperator(A) @ torch.ones(2)).requires_grad


# -- submatrix ----------------------------------------------------------------------

FULL = randn(4, 5)


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        ([2, 0], [4, 1]),
        ([3], range(4, 0, -2)),
        (np.array([1, 2]), torch.tensor([0, 3])),
        (np.array([1, 2], dtype=np.uint8), [-1, -5]),
        (slice(None, None, -1), slice(1, 4)),
        ([True, False, True, False], torch.tensor([True, False, False, True, True])),
        ([], [1]),
        ([0], []),
        (np.zeros(4, bool), slice(0)),
    ],
)
def test_submatrix_indices(rows, cols):
    A = SubmatrixLinearOperator(FULL, rows, cols)
    rows, cols = (
        i if isinstance(i, slice) or len(i) else np.zeros(0, int) for i in (rows, cols)
    )
    expected = FULL.numpy()[np.arange(4)[rows]][:, np.arange(5)[cols]].copy()
    assert A.shape == expected.shape
    assert_close(A.to_dense(), expected)
    assert_close(A.T.to_dense(), expected.T)


def test_set_submatrix_changes_shape():
    A = SubmatrixLinearOperator(FULL, [0], [0])
    adjoint = A.adjoint()
    A.set_submatrix(slice(None), [1, 2])
    assert A.shape == (4, 2)
    assert adjoint.shape == (1, 1)
    assert_close(A @ np.eye(2), FULL[:, 1:3])
    assert_close(A.T @ np.eye(4), FULL[:, 1:3].T)


def test_failed_set_submatrix_leaves_the_old_one():
    A = SubmatrixLinearOperator(FULL, [0], [0])
    with pytest.raises(IndexError):
        A.set_submatrix([1], [7])
    assert_close(A.to_dense(), FULL[:1, :1])


@pytest.mark.parametrize(
    "wrap",
    [np.asarray, scipy.sparse.csr_array, aslinearoperator],
    ids=["array", "sparse", "operator"],
)
def test_submatrix_of_foreign_operator(wrap):
    A = SubmatrixLinearOperator(wrap(FULL.numpy()), [1, 0], [2, 3, 4])
    assert_close(A.to_dense(), FULL[[1, 0], 2:])
    assert_close(A.T.to_dense(), FULL[[1, 0], 2:].T)


def test_submatrix_multiplies_once():
    class Counting(TensorLinearOperator):
        calls = 0

        def _apply(self, V):
            self.calls += 1
            return super()._apply(V)

    A = Counting(FULL)
    SubmatrixLinearOperator(A, [0], [1, 2]) @ np.ones((2, 5))
    assert A.calls == 1


# -- mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: IdentityLinearOperator([(2,)], "cpu", torch.int64),
            TypeError,
            "real floating-point",
        ),
        (lambda: DiagonalLinearOperator([]), ValueError, "at least one"),
        (lambda: DiagonalLinearOperator([np.ones(2)]), TypeError, "torch.as_tensor"),
        (
            lambda: DiagonalLinearOperator([torch.ones(1), torch.ones(1).double()]),
            TypeError,
            "float32 on cpu, torch.float64 on cpu.*dtype=",
        ),
        (
            lambda: DiagonalLinearOperator(
                [torch.ones(1), torch.ones(1, device="meta")]
            ),
            TypeError,
            "on cpu, .* on meta",
        ),
        (lambda: TensorLinearOperator(torch.ones(3)), ValueError, r"\(M, N\).*\(3,\)"),
        (lambda: TensorLinearOperator(np.eye(3)), TypeError, "got ndarray"),
        (
            lambda: TensorLinearOperator(torch.eye(2).int()),
            TypeError,
            "real floating-point",
        ),
        (
            lambda: OuterProductLinearOperator(torch.ones(2), torch.ones(2, 3)),
            ValueError,
            r"\(2,\) and \(2, 3\). Pass `A.T`",
        ),
        (
            lambda: OuterProductLinearOperator(
                torch.ones(2).double(), torch.ones(3, 2)
            ),
            TypeError,
            "one dtype",
        ),
        (lambda: BlockDiagonalLinearOperator([]), ValueError, "at least one"),
        (
            lambda: BlockDiagonalLinearOperator([torch.eye(2), torch.eye(2).double()]),
            TypeError,
            "Cannot put on one diagonal",
        ),
        (lambda: SubmatrixLinearOperator(FULL, [4], [0]), IndexError, "-4 to 3"),
        (lambda: SubmatrixLinearOperator(FULL, [0], [-6]), IndexError, "column index"),
        (lambda: SubmatrixLinearOperator(FULL, [1, -3], [0]), ValueError, "once"),
        (lambda: SubmatrixLinearOperator(FULL, 1, [0]), ValueError, r"`\[3\]`"),
        (lambda: SubmatrixLinearOperator(FULL, [[1]], [0]), ValueError, "1-d row"),
        (lambda: SubmatrixLinearOperator(FULL, [1.0], [0]), TypeError, "integers"),
        (lambda: SubmatrixLinearOperator(FULL, [True], [0]), ValueError, "4 entries"),
    ],
)
def test_mistakes(build, error, message):
    with pytest.raises(error, match=message):
        build()
