"""What scripts do, as they are: bars, half precision, rows of lists, counts."""

import io
import re
from contextlib import redirect_stderr
from functools import partial

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

import curvlinops
from cases import find
from curvlinops import (
    CGInverseLinearOperator,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    NystromPreconditionerLinearOperator,
    SubmatrixLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops._counts import as_count
from curvlinops.sampling import random_vector
from curvlinops.structured import IdentityLinearOperator, TensorLinearOperator
from tolerances import assert_close


@pytest.fixture
def built():
    return find("mlp-tanh-ce").build()


# Progress bars


@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "block"])
@pytest.mark.parametrize(
    "cls",
    [
        HessianLinearOperator,
        GGNLinearOperator,
        EFLinearOperator,
        FisherMCLinearOperator,
        JacobianLinearOperator,
        TransposedJacobianLinearOperator,
    ],
)
def test_every_product_shows_one_bar(built, cls, columns):
    model, _, params, data = built
    jacobian = "Jacobian" in cls.__name__
    parts = (model, params, data) if jacobian else built
    with redirect_stderr(io.StringIO()):
        A = cls(*parts, progressbar=True)
    x = np.ones((A.shape[1], *columns))
    bar = rf"{cls.__name__}\._matmat \(on cpu\): 100%.*{len(data)}/{len(data)}"
    for _ in range(150):
        with redirect_stderr(io.StringIO()) as shown:
            A @ x
        lines = re.split(r"[\r\n]+", shown.getvalue())
        assert sum("100%" in line for line in lines) == 1
        assert any(re.search(bar, line) for line in lines)
    # The last ones were products with a matrix:
    assert jacobian or A.status().matrix


def test_no_bars_unless_asked_for(built, capsys):
    A = GGNLinearOperator(*built)
    for _ in range(100):
        A @ np.ones(A.shape[1])
    assert A.status().matrix and capsys.readouterr().err == ""


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_single_precision_operands_of_half_precision_models(dtype):
    matrix = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    A = TensorLinearOperator(matrix)
    for shape in ((3,), (3, 2), (3, 0)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        y, twin = A @ x, A @ x.numpy()
        assert y.dtype is torch.float32 and y.shape == twin.shape
        assert torch.equal(y, torch.from_numpy(twin))
        assert (A @ x.to(dtype)).dtype is dtype
        [listed] = A @ [x]
        assert torch.equal(listed, y)
    u = torch.ones(2, 4)
    assert torch.equal(u @ A, torch.from_numpy(u.numpy() @ A))
    assert torch.equal((2 * A).H @ u.T, torch.from_numpy((2 * A).H @ u.T.numpy()))
    assert torch.equal(A @ torch.ones(3, dtype=torch.complex64), A @ torch.ones(3) + 0j)
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    for wrong in (torch.ones(3).double(), torch.ones(3, dtype=other)):
        with pytest.raises(TypeError, match=rf"{dtype}.*{wrong.dtype}"):
            A @ wrong


def test_single_precision_operand_of_a_half_precision_ggn():
    A = GGNLinearOperator(*find("mlp-bfloat16").build())
    x = torch.linspace(-1, 1, A.shape[1])
    assert (A @ x).dtype is torch.float32
    assert torch.equal(A @ x, torch.from_numpy(A @ x.numpy()))


# Lists of tensors from the left


def test_rows_come_first_in_lists_from_the_left(built):
    H, K = HessianLinearOperator(*built), KFACLinearOperator(*built)
    J = JacobianLinearOperator(built[0], built[2], built[3])
    for A in (H, K, J, J.H, 2 * H):
        dense = A.to_dense()
        for number in (0, 1, 3):
            rows = torch.randn(number, A.shape[0], dtype=torch.float64)
            result = A._out_space.split(rows) @ A
            shapes = [(number, *shape) for shape in A.in_shapes]
            assert [t.shape for t in result] == shapes
            joined = torch.cat([t.reshape(number, s.numel()) for t, s in zip(
                result, A.in_shapes, strict=True)], dim=1)  # fmt: skip
            assert_close(joined, rows @ dense, size=100)
        one = A._out_space.split(rows[0]) @ A
        assert [t.shape for t in one] == [*A.in_shapes]
        flat = torch.cat([t.flatten() for t in one])
        assert_close(flat, rows[0] @ dense, size=100)


def test_the_number_of_dimensions_tells_rows_from_a_vector():
    # three rows of two entries, or a vector of shape (3, 2)
    A = IdentityLinearOperator([(2,)], "cpu", torch.float32)
    B = IdentityLinearOperator([(3, 2)], "cpu", torch.float32)
    t = torch.arange(6.0).reshape(3, 2)
    for operator in (A, B):
        [result] = [t] @ operator
        assert torch.equal(result, t)
    with pytest.raises(ValueError, match=r"\(2,\).*leading dimension.*\(3, 3\)"):
        [torch.ones(3, 3)] @ A
    two = IdentityLinearOperator([(2,), (2,)], "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"leading dimension.*\(2,\), \(3, 2\)"):
        [torch.ones(2), torch.ones(3, 2)] @ two


# Paths


def test_ekfac_is_where_scripts_look_for_it():
    from curvlinops.ekfac import EKFACLinearOperator

    assert EKFACLinearOperator is curvlinops.EKFACLinearOperator


# Counts

COUNTS = [np.int64, np.uint32, partial(np.array, dtype=np.int32), torch.tensor]


MATRIX = np.diag([1.0, 2.0, 3.0, 4.0])

#: Everything that takes a count, as a function of a problem and of what turns a Python
#: number into a count.
TAKE_COUNTS = {
    "num_data": lambda built, c: HessianLinearOperator(*built, num_data=c(6)).shape,
    "num_per_example_loss_terms": lambda built, c: EFLinearOperator(
        *built, num_per_example_loss_terms=c(3)
    ).to_dense(),
    "cache": lambda built, c: GGNLinearOperator(*built, cache=c(3)).to_dense(),
    "max_memory": lambda built, c: GGNLinearOperator(
        *built, max_memory=c(30_000_000)
    ).to_dense(),
    "mc_samples": lambda built, c: FisherMCLinearOperator(
        *built, mc_samples=c(3), seed=c(7)
    ).to_dense(),
    "diagonal": lambda built, c: GGNDiagonalLinearOperator(
        *built, mc_samples=c(3), seed=c(7)
    ).diagonal(),
    "kfac": lambda built, c: KFACLinearOperator(
        *built, mc_samples=c(3), seed=c(7), max_factor=c(300)
    ).to_dense(),
    "kfoc": lambda built, c: KFOCLinearOperator(
        *built, fisher_type="type-2", max_iter=c(3)
    ).to_dense(),
    "columns": lambda built, c: GGNLinearOperator(*built).plan(columns=c(3)).peak,
    "block_size": lambda built, c: GGNLinearOperator(*built).to_dense(c(3)),
    "maxiter": lambda _, c: CGInverseLinearOperator(MATRIX, max_iter=c(3)).to_dense(),
    "num_terms": lambda _, c: NeumannInverseLinearOperator(
        MATRIX, num_terms=c(3), scale=0.3
    ).to_dense(),
    "rank": lambda _, c: NystromPreconditionerLinearOperator(
        MATRIX, rank=c(3), rng=c(7)
    ).to_dense(),
    "power": lambda _, c: (TensorLinearOperator(torch.eye(2)) ** c(3)).to_dense(),
    "shapes": lambda _, c: (
        IdentityLinearOperator([(c(3), c(2))], "cpu", torch.float32).shape
    ),
    "indices": lambda _, c: SubmatrixLinearOperator(
        MATRIX, [c(3)], [c(3), c(0)]
    ).to_dense(),
    "vector": lambda _, c: random_vector(c(3), "normal", rng=c(7)),
}


@pytest.mark.parametrize("convert", COUNTS, ids=["int64", "uint32", "array", "tensor"])
@pytest.mark.parametrize("name", TAKE_COUNTS)
def test_counts_are_whatever_has_an_index(built, name, convert):
    take = TAKE_COUNTS[name]
    actual, expected = take(built, convert), take(built, int)
    assert type(actual) is type(expected)
    assert bool(torch.as_tensor(actual == expected).all())


@pytest.mark.parametrize(
    "value", [1.0, True, np.float64(2), np.True_, torch.tensor(True), "1", None,
              torch.tensor(1.0), np.array([1]), torch.tensor([1])],
)  # fmt: skip
def test_what_does_not_count(value):
    assert as_count(value) is None
    with pytest.raises(ValueError, match=r"num_terms = 0, 1, 2"):
        NeumannInverseLinearOperator(MATRIX, num_terms=value)
    if value is not None:
        with pytest.raises(ValueError, match="'maxiter'"):
            CGInverseLinearOperator(MATRIX, maxiter=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda *p: KFOCLinearOperator(*p, max_iter=0), "`max_iter` must be a posit"),
        (lambda *p: EFLinearOperator(*p, num_per_example_loss_terms=-1),
         "`num_per_example_loss_terms` must be a whole number from 0 on, got -1"),
        (lambda *p: FisherMCLinearOperator(*p, seed=0.5),
         "`seed` must be a whole number, got 0.5"),
        (lambda *p: KFACLinearOperator(*p, max_factor=2.0), "`max_factor` must be"),
        (lambda *p: GGNLinearOperator(*p, cache=1e6), "number of bytes"),
    ],
)  # fmt: skip
def test_counts_that_are_none_are_named(built, make, message):
    with pytest.raises(ValueError, match=message):
        make(*built)


def test_seeds_may_be_negative(built):
    one, two = (FisherMCLinearOperator(*built, seed=-3).to_dense() for _ in range(2))
    assert torch.equal(one, two)


# Preconditioners

SPD = np.diag([1.0, 5.0, 20.0]) + 0.5
APPROXIMATE = np.diag(1 / np.diag(SPD))

PRECONDITIONERS = {
    "function": lambda P: lambda V: torch.from_numpy(P).to(V) @ V,
    "function of arrays": lambda P: lambda V: P @ V.numpy(),
    "method of ours": lambda P: TensorLinearOperator(torch.from_numpy(P)).__matmul__,
    "matvec of ours": lambda P: TensorLinearOperator(torch.from_numpy(P)).matvec,
    "method of SciPy's": lambda P: aslinearoperator(P).__matmul__,
    "matvec of SciPy's": lambda P: aslinearoperator(P).matvec,
    "method of a sparse matrix": lambda P: scipy.sparse.csr_array(P).__matmul__,
    "method of an array": lambda P: P.__matmul__,
    "dot of an array": lambda P: P.dot,
    "method of a tensor": lambda P: torch.from_numpy(P).__matmul__,
    "method of a solver": lambda P: CGInverseLinearOperator(np.linalg.inv(P)).dot,
    "method of a linear layer": lambda P: _layer(P).transposed,
}


class _Layer(nn.Linear):
    def transposed(self, V):
        return self(V.T.to(self.weight)).T


def _layer(P):
    layer = _Layer(len(P), len(P), bias=False).double()
    layer.weight.data = torch.from_numpy(P.copy())
    return layer


@pytest.mark.parametrize(
    "make", [CGInverseLinearOperator, NeumannInverseLinearOperator]
)
def test_functions_that_are_no_preconditioners(make):
    for function, error, message in (
        (lambda V: None, ValueError, r"shape \(3, 1\) into NoneType of shape \(\)"),
        (lambda V: V[:2], ValueError, r"into Tensor of shape \(2, 1\)"),
        (lambda V: 1j * V, TypeError, r"into torch.complex.*must be real"),
    ):
        with pytest.raises(error, match=message):
            make(SPD, preconditioner=function) @ np.ones(3)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize(
    "make",
    [
        CGInverseLinearOperator,
        MINRESInverseLinearOperator,
        partial(NeumannInverseLinearOperator, num_terms=200),
    ],
    ids=["cg", "minres", "neumann"],
)
def test_preconditioners_may_be_functions(make, name):
    A_inv = make(SPD, preconditioner=PRECONDITIONERS[name](APPROXIMATE))
    B = np.arange(6.0).reshape(3, 2)
    expected = np.linalg.solve(SPD, B)
    for b, x in ((B[:, 0], expected[:, 0]), (B, expected)):
        np.testing.assert_allclose(A_inv @ b, x, rtol=1e-8, atol=1e-9)
        tensor = A_inv @ torch.from_numpy(b)
        np.testing.assert_allclose(tensor.numpy(), x, rtol=1e-8, atol=1e-9)
    if name.startswith(("method of ours", "method of SciPy", "dot", "method of an")):
        np.testing.assert_allclose(B.T @ A_inv, expected.T, rtol=1e-8, atol=1e-9)
    assert isinstance(A_inv, LinearOperator)
