"""The contract of every operator, on a small dense one written for the purpose."""

import copy
import operator as op
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import (
    LinearOperator,
    aslinearoperator,
    cg,
    eigsh,
    expm_multiply,
    gmres,
    lobpcg,
    lsmr,
    lsqr,
    minres,
    onenormest,
    svds,
)
from torch import Tensor

from curvlinops._composites import Foreign
from curvlinops._operator import TorchOperator
from curvlinops._spaces import TensorSpace
from curvlinops.structured import as_operator
from tolerances import assert_close

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IN_SHAPES, OUT_SHAPES = ((2, 3), (), (2,)), ((3,), (1, 2))
N, M = 9, 5


class Dense(TorchOperator, LinearOperator):
    """What somebody writes who adds an operator: two hooks."""

    def __init__(self, matrix: Tensor, in_shapes: Any = None, out_shapes: Any = None):
        in_shapes = in_shapes or [matrix.shape[1:]]
        out_shapes = out_shapes or [matrix.shape[:1]]
        super().__init__(
            TensorSpace(in_shapes, matrix.dtype, matrix.device),
            TensorSpace(out_shapes, matrix.dtype, matrix.device),
        )
        self.matrix = matrix
        self.seen: list[Tensor] = []

    def _apply(self, V: Tensor) -> Tensor:
        self.seen.append(V)
        return self.matrix @ V

    def _adjoint(self) -> "Dense":
        return Dense(self.matrix.T, self.out_shapes, self.in_shapes)


class Symmetric(TorchOperator, LinearOperator):
    """A self-adjoint operator needs one hook."""

    def __init__(self, matrix: Tensor):
        space = TensorSpace.flat(len(matrix), matrix.dtype, matrix.device)
        super().__init__(space, space)
        self.matrix = matrix

    def _apply(self, V: Tensor) -> Tensor:
        return self.matrix @ V


def matrix(rows: int = M, columns: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def definite(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    D = matrix(n, n)
    return (D @ D.T / n + torch.eye(n, dtype=torch.float64)).to(dtype)


#: Every kind of number that NumPy has, native or not.
NUMERIC = [*np.typecodes["AllInteger"], *"?efdgFDG", ">f8", ">f4", ">i4", ">c16"]


def dense(dtype: torch.dtype = torch.float64) -> Dense:
    return Dense(matrix().to(dtype), IN_SHAPES, OUT_SHAPES)


def operands(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Torch's side


@pytest.mark.parametrize("dtype", FLOATS)
def test_attributes(dtype: torch.dtype):
    A = dense(dtype)
    assert A.shape == (M, N)
    numpy_dtype = np.float64 if dtype is torch.float64 else np.float32
    assert A.dtype == numpy_dtype and isinstance(A.dtype, np.dtype)
    assert A.torch_dtype is dtype and A.device == torch.device("cpu")
    assert A.in_shapes == IN_SHAPES and A.out_shapes == OUT_SHAPES
    assert repr(A) == f"<5x9 Dense with dtype={dtype}, device=cpu>"


def test_construction_does_not_warn_and_calls_no_product():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A = dense()
    assert not A.seen


def test_hook_gets_a_block_in_the_dtype_of_the_operator():
    A = dense(torch.float32)
    A @ np.ones(N)
    A @ torch.ones(N, 2)
    A @ [torch.ones(shape) for shape in IN_SHAPES]
    A @ np.ones((N, 3), dtype=complex)
    assert [V.shape for V in A.seen] == [(N, 1), (N, 2), (N, 1), (N, 6)]
    assert all(V.dtype is torch.float32 for V in A.seen)


def test_hook_that_is_missing_is_named():
    class Nothing(TorchOperator, LinearOperator):
        pass

    s = TensorSpace.flat(2, torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="Nothing"):
        Nothing(s, s) @ np.ones(2)


# Operands


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(N,), (N, 0), (N, 1), (N, 4)])
def test_containers(dtype: torch.dtype, shape: tuple[int, ...]):
    A, D = dense(dtype), matrix().to(dtype).double()
    x = operands(*shape).to(dtype)
    expected = D @ x.double()

    y = A @ x
    assert torch.is_tensor(y) and y.dtype is dtype and y.shape == (M, *shape[1:])
    assert_close(y, expected, dtype, N)

    array = x.to(torch.float64 if dtype is torch.float64 else torch.float32).numpy()
    y = A @ array
    assert isinstance(y, np.ndarray)
    assert y.dtype == A.dtype and y.shape == expected.shape
    assert_close(y, expected, dtype, N)

    pieces = [
        p.reshape((*s, *shape[1:]))
        for p, s in zip(x.split([6, 1, 2]), IN_SHAPES, strict=True)
    ]
    for container in (list, tuple):
        first, second = A @ container(pieces)
        assert first.shape == (3, *shape[1:]) and second.shape == (1, 2, *shape[1:])
        joined = torch.cat([first, second.reshape(2, *shape[1:])])
        assert_close(joined, expected, dtype, N)


@pytest.mark.parametrize(
    "name",
    NUMERIC,
)
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_numeric_types(name: str, dtype: torch.dtype):
    A, D = dense(dtype), matrix().to(dtype).double().numpy()
    values = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
    x = (values * 3).astype(name)
    if x.dtype.kind == "c":
        x = x + 2j * values[::-1].astype(name)
    for operand in (x, np.stack([x, x[::-1]], axis=1)):
        before = operand.copy()
        y = A @ operand
        assert np.array_equal(before, operand)
        wide = operand.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
        assert y.dtype == np.result_type(A.dtype, operand.dtype)
        assert y.dtype.isnative
        for part in (np.real, np.imag):
            real, expected = np.array(part(y), float), np.array(part(D @ wide))
            assert_close(real, expected, dtype, N)


def layouts() -> list:
    x = operands(N, 4).numpy()
    padded = np.zeros((2 * N, 8))
    padded[::2, ::2] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    column = x[:, :1].copy()
    cases = {
        "fortran": np.asfortranarray(x),
        "strided": padded[::2, ::2],
        "reversed-rows": x[::-1].copy()[::-1],
        "reversed-columns": x[:, ::-1],
        "read-only": read_only,
        "transposed": np.ascontiguousarray(x.T).T,
        "broadcast": np.broadcast_to(column, (N, 4)),
        "broadcast-vector": np.broadcast_to(np.float64(2), (N,)),
        "reversed-vector": x[::-1, 0],
        "unaligned": np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:]
        .view(np.float64)
        .reshape(N, 4),
        "matrix": np.matrix(x),
        "masked-none": np.ma.array(x),
        "memmap-like": x.view(np.ndarray)[:, :2],
        "list": x.tolist(),
        "list-vector": x[:, 0].tolist(),
        "tuple": tuple(x[:, 0]),
        "range": range(N),
    }
    return [pytest.param(value, id=name) for name, value in cases.items()]


@pytest.mark.parametrize("x", layouts())
def test_layouts(x: Any):
    D = matrix().numpy()
    for dtype in (torch.float64, torch.float32):
        A = dense(dtype)
        before = np.array(x)
        y = A @ x
        assert isinstance(y, np.ndarray)
        assert_close(np.asarray(y), D @ before, dtype, N)
        assert y.shape == (M, *before.shape[1:])
        assert np.array_equal(before, np.array(x))
        if isinstance(x, np.ndarray):
            y[...] = 0  # the result is the caller's
            assert np.array_equal(before, np.array(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat(2, 2)[:N, ::2][:, :2],
        lambda x: x[:, :1].expand(N, 3),
        lambda x: x.requires_grad_(),
        lambda x: torch.nn.Parameter(x),
        lambda x: x.int(),
        lambda x: x > 0,
        lambda x: x.to(torch.complex128),
        lambda x: torch.complex(x, 2 * x),
        lambda x: torch.complex(x, 2 * x).conj(),
        lambda x: torch.complex(x, 2 * x).imag,
    ],
    ids=[
        *("transposed", "strided", "expanded", "grad", "parameter", "int", "bool"),
        *("complex", "complex-both", "conjugate", "negative-view"),
    ],
)
def test_tensors_of_every_kind(change: Callable):
    A, D = dense(), matrix()
    x = change(operands(N, 4))
    before, version = x.detach().clone(), x._version
    for operand in (x, x[:, 0].detach()):
        y = A @ operand
        wide = torch.promote_types(operand.dtype, torch.float64)
        assert not y.requires_grad and y.dtype is wide
        assert_close(y, D.to(wide) @ operand.to(wide), torch.float64, N)
    assert torch.equal(before, x.detach()) and x._version == version


def test_operand_made_under_inference_mode():
    with torch.inference_mode():
        x = operands(N, 2)
        y = dense() @ x
    assert_close(dense() @ x, matrix() @ x)
    assert_close(y.clone(), matrix() @ x)


def test_operand_in_a_graph_warns_that_the_product_is_not():
    x = operands(N).requires_grad_()
    with pytest.warns(UserWarning, match=r"not differentiable.*detach"):
        dense() @ (2 * x)


@pytest.mark.parametrize("method", ["matvec", "matmat", "dot", "__matmul__", "__mul__"])
@pytest.mark.parametrize("convert", [Tensor.numpy, Tensor.clone])
def test_methods(method: str, convert: Callable):
    A, D = dense(), matrix()
    for x in (operands(N), operands(N, 1), operands(N, 3)):
        fits = x.ndim == 1 or x.shape[1] == 1 if method == "matvec" else True
        fits = fits and not (method == "matmat" and x.ndim == 1)
        if fits:
            y = getattr(A, method)(convert(x))
            assert_close(y, D @ x)
        else:
            with pytest.raises(ValueError, match=r"Dimension mismatch.*\(9"):
                getattr(A, method)(convert(x))


@pytest.mark.parametrize("convert", [Tensor.numpy, Tensor.clone])
def test_adjoint_products(convert: Callable):
    A, D = dense(), matrix()
    u, U = operands(M), operands(M, 3)
    for B in (A.H, A.T, A.adjoint(), A.transpose()):
        assert B.shape == (N, M) and B.in_shapes == OUT_SHAPES
        assert_close(B @ convert(U), D.T @ U)
    assert_close(A.rmatvec(convert(u)), D.T @ u)
    assert_close(A.rmatvec(convert(U[:, :1])), D.T @ U[:, :1])
    assert_close(A.rmatmat(convert(U)), D.T @ U)
    assert_close(A.H.H @ convert(operands(N)), D @ operands(N))


def test_adjoint_of_complex_operands_is_not_conjugated():
    A, D = dense(), matrix().numpy()
    u = operands(M).numpy() + 1j * operands(M, seed=2).numpy()
    assert_close(A.H @ u, D.T @ u)
    assert_close(u @ A, u @ D)


@pytest.mark.parametrize("convert", [Tensor.numpy, Tensor.clone, Tensor.tolist])
def test_left_products(convert: Callable):
    A, D = dense(), matrix()
    u, U = operands(M), operands(3, M)
    for x in (u, U, U[:1], U[:0]):
        if convert is Tensor.tolist and len(x) == 0:
            continue
        for y in (convert(x) @ A, A.rdot(convert(x))):
            assert y.shape == (*x.shape[:-1], N)
            assert_close(torch.as_tensor(y), x @ D)
    tensor_result = u @ A
    assert torch.is_tensor(tensor_result)
    assert isinstance(u.numpy() @ A, np.ndarray)


def test_left_product_with_a_list_of_tensors():
    A, D = dense(), matrix()
    u = operands(M)
    pieces = [u[:3], u[3:].reshape(1, 2)]
    result = A.rdot(pieces)
    assert [t.shape for t in result] == list(IN_SHAPES)
    assert_close(torch.cat([t.flatten() for t in result]), u @ D)
    for a, b in zip(pieces @ A, result, strict=True):
        assert torch.equal(a, b)


def test_left_product_multiplies_integers_and_other_dtypes():
    A, D = dense(torch.float32), matrix().float().double().numpy()
    y = np.arange(M) @ A
    assert y.dtype == np.float64
    assert_close(y, np.arange(M) @ D, np.float32, M)
    y = np.ones((2, M), np.float32) @ A
    assert y.dtype == np.float32 and y.shape == (2, N)


# Results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_are_fresh_memory(dtype: torch.dtype):
    class Identity(Symmetric):
        def _apply(self, V: Tensor) -> Tensor:
            return V.clone()

    A = Identity(torch.eye(N, dtype=dtype))
    x = operands(N, 2).to(dtype)
    array = x.numpy().copy()
    for B in (A, 1 * A, A + A, A @ A, A**0, A**2, A.to_scipy(np.float64), -A):
        first, second = B @ array, B @ array
        assert not np.shares_memory(first, second)
        assert not np.shares_memory(first, array)
        x_ = x.to(B.torch_dtype)
        results = [B @ x_, B @ x_, B.H @ x_]
        places = {t.untyped_storage().data_ptr() for t in (*results, x_)}
        assert len(places) == 4
        results[0].zero_()
        first[:] = 0
        assert_close(second, results[1])


def test_results_of_threads_do_not_share_memory():
    A, D = dense(), matrix()
    results: list = []

    def work(seed: int) -> None:
        for i in range(50):
            x = operands(N, 1 + i % 3, seed=seed + i)
            results.append((A @ x.numpy(), D @ x))

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    for actual, expected in results:
        assert_close(actual, expected)


# Composites


SCALARS = (
    2,
    -0.5,
    True,
    np.float64(2.5),
    np.float32(0.5),
    np.int16(3),
    np.longdouble(2),
    np.array(2.0),
    torch.tensor(2.0),
    torch.tensor(3),
    torch.tensor(0.5, dtype=torch.float16),
)


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("c", SCALARS, ids=lambda c: f"{type(c).__name__}-{c}")
def test_scalars(c: Any, dtype: torch.dtype):
    A, D = dense(dtype), matrix().to(dtype).double()
    x = operands(N, 2).to(dtype)
    for B, factor in ((c * A, float(c)), (A * c, float(c)), (A / c, 1 / float(c))):
        assert isinstance(B, TorchOperator) and B.shape == (M, N)
        assert B.torch_dtype is dtype and B.dtype == A.dtype
        assert_close(B @ x, factor * D @ x.double(), dtype, N)
        assert (B @ x.float().numpy()).dtype == A.dtype


def test_complex_scalars_give_scipys_composite():
    A, D = dense(), matrix().numpy()
    x = operands(N, 2).numpy()
    for B in (2j * A, A * 2j, np.complex64(2j) * A, A * np.complex128(2j)):
        assert isinstance(B, LinearOperator) and B.dtype.kind == "c"
        assert_close(B @ x, 2j * D @ x, torch.complex128, N)
    assert_close((A / 2j) @ x, -0.5j * D @ x, torch.complex128, N)


def composites() -> dict[str, tuple[Callable, Callable]]:
    return {
        "sum": (lambda A, B: A + B, lambda D, E: D + E),
        "difference": (lambda A, B: A - B, lambda D, E: D - E),
        "negative": (lambda A, B: -A, lambda D, E: -D),
        "product": (lambda A, B: A @ B.H, lambda D, E: D @ E.T),
        "product-star": (lambda A, B: A * B.H, lambda D, E: D @ E.T),
        "dot": (lambda A, B: A.dot(B.H), lambda D, E: D @ E.T),
        "power": (lambda A, B: (A.H @ B) ** 3, lambda D, E: (D.T @ E).matrix_power(3)),
        "power-0": (lambda A, B: (A.H @ A) ** 0, lambda D, E: torch.eye(N).double()),
        "nested": (
            lambda A, B: 2 * (A - 0.5 * B).H @ (-(B / 4)) + (A.H @ A) ** 2,
            lambda D, E: -0.5 * (D - 0.5 * E).T @ E + (D.T @ D) @ (D.T @ D),
        ),
        "adjoint-of-nested": (
            lambda A, B: (3 * A.H @ (A + B)).H,
            lambda D, E: 3 * (D + E).T @ D,
        ),
        "transpose-of-sum": (lambda A, B: (A + 2 * B).T, lambda D, E: (D + 2 * E).T),
        "adjoint-of-power": (
            lambda A, B: ((A.H @ B) ** 2).H,
            lambda D, E: (D.T @ E @ D.T @ E).T,
        ),
    }


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("name", composites())
def test_composites(name: str, dtype: torch.dtype):
    make, expect = composites()[name]
    E = matrix(seed=3)
    A, B = dense(dtype), Dense(E.to(dtype), IN_SHAPES, OUT_SHAPES)
    C = make(A, B)
    D = expect(matrix().to(dtype).double(), E.to(dtype).double())
    assert isinstance(C, TorchOperator) and isinstance(C, LinearOperator)
    assert LinearOperator in type(C).__bases__
    assert C.shape == tuple(D.shape)
    assert C.torch_dtype is dtype and C.dtype == A.dtype
    X = operands(C.shape[1], 3).to(dtype)
    expected, size = D @ X.double(), 20 * N
    assert_close(C @ X, expected, dtype, size)
    assert_close(
        C.H @ operands(C.shape[0]).to(dtype),
        D.T @ operands(C.shape[0]).to(dtype).double(),
        dtype,
        size,
    )
    result = C @ X.float().numpy()
    assert isinstance(result, np.ndarray) and result.dtype == C.dtype
    pieces = TensorSpace(C.in_shapes, dtype, "cpu").unpack(X)
    listed = C @ pieces
    assert [t.shape for t in listed] == [(*s, 3) for s in C.out_shapes]
    assert_close(C.to_dense(), D, dtype, size)
    assert repr(C).startswith(f"<{C.shape[0]}x{C.shape[1]} ")
    assert_close(pickle.loads(pickle.dumps(C)) @ X, expected, dtype, size)
    assert_close(copy.deepcopy(C) @ X, expected, dtype, size)


def test_composites_of_self_adjoint_operators_are_their_own_adjoints():
    A, B = Symmetric(definite()), Symmetric(2 * definite())
    for C in (A + B, A - B, 2 * A, -A, A / 3, A**2, A.to_scipy(np.float32)):
        assert C.H is C and C.T is C and C.adjoint() is C
    assert (A @ B).H is not A @ B


def test_composites_do_not_multiply_when_built():
    A = dense()
    _ = (2 * A - A / 3 + A).H @ A
    assert not A.seen


@pytest.mark.parametrize("kind", ["aslinearoperator", "sparse", "plain"])
def test_foreign_operators_in_both_orders(kind: str):
    F = matrix(seed=5).numpy()
    make = {
        "aslinearoperator": aslinearoperator,
        "sparse": lambda a: aslinearoperator(scipy.sparse.csr_array(a)),
        "plain": lambda a: LinearOperator(
            a.shape,
            matvec=lambda x: a @ x,
            rmatvec=lambda x: a.T @ x,
            dtype=a.dtype,
        ),
    }[kind]
    A, D, B = dense(), matrix().numpy(), make(F)
    x, X = operands(N).numpy(), operands(N, 3).numpy()
    u = operands(M).numpy()
    for C, E in (
        (A + B, D + F),
        (B + A, D + F),
        (A - B, D - F),
        (B - A, F - D),
        (A @ make(F.T), D @ F.T),
        (make(F.T) @ A, F.T @ D),
        (2 * (A + B) @ make(F.T), 2 * (D + F) @ F.T),
        (make(F.T) * A, F.T @ D),
    ):
        assert isinstance(C, LinearOperator) and C.shape == E.shape
        n, m = E.shape[1], E.shape[0]
        assert_close(C @ X[:n] if n <= N else C, E @ X[:n])
        assert_close(C @ x[:n], E @ x[:n])
        if m == M and kind != "sparse":
            assert_close(C.H @ u, E.T @ u)


def test_foreign_operators_can_be_adopted():
    F = matrix(seed=5)
    for given in (
        F.numpy(),
        F,
        scipy.sparse.csr_array(F.numpy()),
        aslinearoperator(F.numpy()),
    ):
        B = as_operator(given)
        assert isinstance(B, TorchOperator) and B.shape == (M, N)
        assert_close((dense() + B) @ operands(N, 2), (matrix() + F) @ operands(N, 2))
        assert_close(B.H @ operands(M), F.T @ operands(M))
    A = dense()
    assert as_operator(A) is A
    assert Foreign(aslinearoperator(F.float().numpy())).torch_dtype is torch.float32
    with pytest.raises(TypeError, match="Complex"):
        as_operator(F.numpy() + 1j)


@pytest.mark.parametrize(
    ("combine", "exception", "message"),
    [
        (lambda A: A + A.H, ValueError, r"5x9.*9x5.*shapes"),
        (lambda A: A - A.H, ValueError, r"5x9.*9x5.*shapes"),
        (lambda A: A @ A, ValueError, r"5x9.*5x9.*columns"),
        (lambda A: A**2, ValueError, r"square.*5x9"),
        (lambda A: (A @ A.H) ** -1, ValueError, r"-1.*CGInverse"),
        (lambda A: (A @ A.H) ** 0.5, ValueError, r"powers 0, 1, 2.*0\.5"),
        (lambda A: (A @ A.H) ** "2", (TypeError, ValueError), r"powers 0, 1, 2.*'2'"),
        (lambda A: A + dense(torch.float32), TypeError, r"64.*32.*to_scipy\(dtype\)"),
        (lambda A: A @ dense(torch.float32).H, TypeError, r"64.*32.*to_scipy\(dtype\)"),
        (lambda A: A + 1, (TypeError, ValueError), r".+"),
        (lambda A: A / 0, ZeroDivisionError, r".+"),
        (lambda A: A / "2", (TypeError, ValueError), r".+"),
        (lambda A: A.to_scipy(np.int64), TypeError, r"float32 or float64.*int64"),
        (lambda A: A.to_scipy("F"), TypeError, r"float32 or float64.*'F'"),
    ],
)
def test_what_cannot_be_combined(combine: Callable, exception: Any, message: str):
    with pytest.raises(exception, match=message):
        combine(dense())


def test_cast_composes_with_operators_of_its_new_dtype():
    A, B = dense(), dense(torch.float32)
    C = A + B.to_scipy(np.float64)
    assert C.dtype == np.float64
    X = operands(N, 2)
    assert_close(C @ X, 2 * matrix() @ X, torch.float32, N)


# Errors


@pytest.mark.parametrize(
    ("x", "exception", "message"),
    [
        (np.ones(N + 1), ValueError, r"9.*\(10,\)"),
        (np.ones((N + 1, 2)), ValueError, r"9.*\(10, 2\)"),
        (np.ones((1, N)), ValueError, r"9.*\(1, 9\)"),
        (np.ones((N, 2, 2)), ValueError, r"9.*\(9, 2, 2\)"),
        (np.ones(0), ValueError, r"9.*\(0,\)"),
        (torch.ones(N + 1).double(), ValueError, r"9.*\(10,\)"),
        (torch.ones(N, 1, 1).double(), ValueError, r"9.*\(9, 1, 1\)"),
        (torch.ones(N), TypeError, r"float64.*float32.*x\.to\(.*to_scipy"),
        (torch.ones(N).half(), TypeError, r"float64.*float16.*x\.to\("),
        (torch.ones(N).to(torch.complex64), TypeError, r"float64.*x\.to\("),
        (torch.ones(N, device="meta").double(), ValueError, r"cpu.*meta.*x\.to\("),
        (np.array(["a"] * N), TypeError, r"multiplies numbers.*<U1"),
        (np.array([None] * N), TypeError, r"multiplies numbers.*object"),
        (None, TypeError, r"multiplies numbers.*NoneType"),
        (scipy.sparse.eye_array(N), TypeError, r"sparse.*toarray"),
        ([], ValueError, r"9.*\(0,\)"),
        ([torch.ones(2, 3).double()], ValueError, r"\(2, 3\).*got the shapes"),
        ([torch.ones(2, 3), torch.ones(()), torch.ones(2)], TypeError, r"64.*32"),
        ([torch.ones(2).double(), np.ones(3)], TypeError, r"no array.*but tensors"),
        ([[1.0], [2.0, 3.0]], TypeError, r"no array.*inhomogeneous"),
    ],
    ids=lambda value: None,
)
def test_wrong_operands(x: Any, exception: Any, message: str):
    A = dense()
    with pytest.raises(exception, match=message):
        A @ x
    assert not A.seen  # before any work


def test_wrong_left_operands():
    A = dense()
    for x in (np.ones(N), np.ones((2, N)), torch.ones(N).double(), np.ones((M, 2))):
        with pytest.raises(ValueError, match=r"5.*got \("):
            x @ A
    assert not A.seen


# Conversions


def test_to_scipy_is_the_operator_itself():
    for dtype in FLOATS:
        A = dense(dtype)
        assert A.to_scipy() is A
        half = dtype in (torch.float16, torch.bfloat16)
        # tensors of the same name in NumPy are not those of the operator then
        assert (A.to_scipy(A.dtype) is A) is not half
        assert A.to_scipy(A.dtype).torch_dtype is (torch.float32 if half else dtype)


@pytest.mark.parametrize("target", [np.float32, np.float64, "float64", np.dtype("f4")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_cast(dtype: torch.dtype, target: Any):
    A, D = dense(dtype), matrix().to(dtype).double()
    B = A.to_scipy(target)
    assert B.dtype == np.dtype(target) and B.shape == A.shape
    x = operands(N, 2).to(dtype)
    y = B @ x.double().numpy().astype(target)
    assert y.dtype == np.dtype(target)
    low = dtype if dtype is not torch.float64 else B.torch_dtype
    assert_close(y, D @ x.double(), low, N)
    y = B @ x.to(B.torch_dtype)
    assert y.dtype is B.torch_dtype
    assert_close(B.H @ np.ones(M, target), D.sum(0), low, N)
    assert_close((2 * B).H @ np.ones(M, target), 2 * D.sum(0), low, N)


def test_single_columns_with_negative_strides():
    A = dense(torch.float64)
    x = np.random.default_rng(0).standard_normal((A.shape[1], 1))
    for operand in (x[:, ::-1], x[::-1], x[::-1, ::-1]):
        np.testing.assert_allclose(A @ operand, matrix().numpy() @ operand)


@pytest.mark.parametrize("block_size", [1, 2, 4, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_to_dense(dtype: torch.dtype, block_size: int):
    result = dense(dtype).to_dense(block_size)
    assert torch.equal(result, matrix().to(dtype))
    assert torch.equal(dense(dtype).H.to_dense(block_size), matrix().to(dtype).T)


def test_pickle_and_copy():
    A = dense()
    for B in (pickle.loads(pickle.dumps(A)), copy.copy(A), copy.deepcopy(A)):
        assert type(B) is Dense and B.in_shapes == IN_SHAPES
        assert_close(B @ operands(N), matrix() @ operands(N))
        assert_close(B @ operands(N).numpy(), matrix() @ operands(N))


def test_copy_after_a_product_shares_no_buffer():
    A = dense()
    A @ np.ones(N, np.float32)
    B = copy.deepcopy(A)
    x = operands(N).numpy().astype(np.float32)
    assert_close(B @ x, A @ x)


def test_aslinearoperator_returns_it():
    A = dense()
    assert aslinearoperator(A) is A
    assert isinstance(A, LinearOperator) and LinearOperator in Dense.__bases__


def test_functions_of_the_operator_module():
    A, D = dense(), matrix()
    x = operands(N)
    assert_close(op.matmul(A, x), D @ x)
    assert_close(op.add(A, A) @ x, 2 * D @ x)
    assert_close(op.neg(A) @ x, -D @ x)
    assert_close(op.sub(A, A) @ x, 0 * D @ x)
    assert_close(A(x), D @ x)


# SciPy on it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_solves_with_it(dtype: torch.dtype):
    D = definite(dtype=dtype).double().numpy()
    A = Symmetric(torch.from_numpy(D).to(dtype))
    b = operands(N).numpy().astype(A.dtype)
    expected = np.linalg.solve(D, b.astype(float))
    rtol = 30 * np.finfo(A.dtype).eps
    for solver in (cg, minres, gmres):
        x, info = solver(A, b, rtol=rtol)
        assert info == 0
        np.testing.assert_allclose(x, expected, rtol=0, atol=3e3 * rtol)
    for solver in (lsmr, lsqr):
        x = solver(A, b.astype(float), atol=1e-12, btol=1e-12)[0]
        np.testing.assert_allclose(x, expected, rtol=0, atol=3e3 * rtol + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_decomposes_it(dtype: torch.dtype):
    D = definite(dtype=dtype).double().numpy()
    A = Symmetric(torch.from_numpy(D).to(dtype))
    evals = np.linalg.eigvalsh(D)
    bound = 1e3 * np.finfo(A.dtype).eps * evals[-1]
    v0 = np.ones(N, A.dtype)
    top = eigsh(A, k=3, v0=v0, return_eigenvectors=False)
    assert top.dtype == A.dtype
    np.testing.assert_allclose(np.sort(top), evals[-3:], rtol=0, atol=bound)
    X = operands(N, 1).numpy().astype(A.dtype)
    found, _ = lobpcg(A, X, maxiter=100, tol=1e-5)
    np.testing.assert_allclose(found, evals[-1:], rtol=1e-4)
    R = dense(dtype)
    top = svds(R, k=2, v0=np.ones(M, A.dtype), return_singular_vectors=False)
    expected = np.linalg.svd(matrix().to(dtype).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sort(top)[::-1], expected[:2], rtol=0, atol=bound * 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_exponentiates_it(dtype: torch.dtype):
    D = definite(dtype=dtype).double().numpy()
    A = Symmetric(torch.from_numpy(D).to(dtype))
    b = operands(N, 2).numpy()
    evals, Q = np.linalg.eigh(D)
    expected = Q * np.exp(-evals) @ Q.T @ b
    actual = expm_multiply(-A, b, traceA=-float(np.trace(D)))
    bound = 1e3 * np.finfo(A.dtype).eps * np.abs(b).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    norm = np.abs(D).sum(0).max()
    assert norm / 3 <= onenormest(A) <= norm * (1 + 1e-5)
    assert norm / 3 <= onenormest(2 * A - A) <= norm * (1 + 1e-5)
