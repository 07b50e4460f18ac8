"""Everything that users may hand to `@` and `*`, and what they are told otherwise."""

import array
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import aslinearoperator

from curvlinops import (
    DiagonalLinearOperator,
    EighDecomposedLinearOperator,
    KFACLinearOperator,
    KroneckerProductLinearOperator,
    TensorLinearOperator,
)
from curvlinops._operator import TorchOperator
from curvlinops._spaces import TensorSpace

SHAPES = [(2, 3), (2,)]
N = 8
D = np.random.default_rng(0).standard_normal((N, N))
D = D + D.T
x = np.arange(1.0, N + 1)


class Matrix(TorchOperator, scipy.sparse.linalg.LinearOperator):
    """A dense matrix, of vectors that are lists of two tensors."""

    def __init__(self, dtype=torch.float64):
        space = TensorSpace(SHAPES, dtype, "cpu")
        super().__init__(space, space)

    def _apply(self, V):
        return torch.from_numpy(D).to(V.dtype) @ V


A = Matrix()


class Arraylike:
    """As a column of a data frame."""

    def __array__(self, dtype=None, copy=None):
        return x


def packed():
    return np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(float)


def of_a_record():
    records = np.zeros(N, [("a", "i1"), ("b", float)])
    records["b"] = x
    return records["b"]


def read_only():
    view = x.view()
    view.flags.writeable = False
    return view


#: What is multiplied, and the same as NumPy array.
OPERANDS = {
    "list": (x.tolist(), x),
    "tuple": (tuple(x), x),
    "nested list": ([[v] for v in x], x[:, None]),
    "range": (range(N), np.arange(N)),
    "memoryview": (memoryview(x), x),
    "array": (array.array("d", x), x),
    "array-like": (Arraylike(), x),
    "read-only": (read_only(), x),
    "backwards": (x[::-1], x[::-1]),
    "strided": (np.repeat(x, 3)[::3], x),
    "of stride 0": (np.broadcast_to(2.0, N), np.full(N, 2.0)),
    "unaligned": (packed(), x),
    "masked nowhere": (np.ma.array(x), x),
    "of a record": (of_a_record(), x),
    "by columns": (np.asfortranarray(D), D),
    "no columns": (np.zeros((N, 0)), np.zeros((N, 0))),
    "big-endian": (x.astype(">f8"), x),
    "big-endian integers": (x.astype(">i2"), x),
    "half": (x.astype(np.float16), x),
    "long": (x.astype(np.longdouble), x),
    "complex": (1j * x, 1j * x),
    "single complex": ((1j * x).astype(np.complex64), 1j * x),
    "truth values": (x > 3, x > 3),
    "large integers": (np.full(N, 2**63, np.uint64), np.full(N, 2.0**63)),
    "tensor of integers": (torch.arange(N), np.arange(N)),
    "tensor of bytes": (torch.ones(N).byte(), np.ones(N)),
    "tensor of truth values": (torch.ones(N).bool(), np.ones(N)),
    "expanded tensor": (torch.ones(1).double().expand(N), np.ones(N)),
    "complex tensor": (torch.tensor(1j * x), 1j * x),
    "conjugated tensor": (torch.tensor(1j * x).conj(), -1j * x),
    "negated view": (torch.tensor(1j * x).conj().imag, -x),
    "strided tensor": (torch.arange(2.0 * N).double()[::2], np.arange(0, 2.0 * N, 2)),
}


@pytest.mark.parametrize("kind", OPERANDS)
def test_operands(kind):
    operand, same = OPERANDS[kind]
    for result, want in ((A @ operand, D @ same), (A.dot(operand), D @ same)):
        assert isinstance(result, torch.Tensor) == torch.is_tensor(operand)
        assert result.shape == want.shape
        assert np.allclose(np.asarray(result), want, rtol=1e-12)
    if np.ndim(same) == 1:
        assert np.allclose(np.asarray(operand @ A), same @ D, rtol=1e-12)


def test_matrices_of_numpy():
    with pytest.warns(PendingDeprecationWarning):
        column = np.matrix(x).T
        result = A @ column
    assert type(result) is np.ndarray and np.allclose(result, (D @ x)[:, None])


# -- numbers ---------------------------------------------------------------------------

NUMBERS = [2, 2.5, True, np.float32(2.5), np.int8(2), np.array(2.5), Fraction(5, 2)]
NUMBERS += [torch.tensor(2.5), torch.tensor(2), np.array(2), torch.tensor(True)]
COMPLEX = [2j, np.complex64(2j), np.array(2j), torch.tensor(2j)]


@pytest.mark.parametrize("c", [*NUMBERS, *COMPLEX], ids=repr)
def test_numbers_multiply_and_are_no_operands(c):
    for product in (c * A, A * c):
        assert np.allclose(product @ x, complex(c) * (D @ x))
    assert np.allclose((A / c) @ x, (D @ x) / complex(c))
    for multiply in (lambda: A @ c, lambda: c @ A):
        with pytest.raises(ValueError, match=r"number is no operand of `@`.*`c \* A`"):
            multiply()
    with pytest.raises(ValueError):  # as SciPy
        aslinearoperator(D) @ c


def test_numbers_that_are_too_large():
    for multiply in (lambda: A * 10**400, lambda: 10**400 * A, lambda: A / 10**400):
        with pytest.raises(ValueError, match=r"at most 1\.8e\+308 in size"):
            multiply()
    with pytest.raises(ValueError, match=r"at most 1\.8e\+308 in size"):
        A.damped(10**400)
    with pytest.raises(ValueError, match=r"no operand of `@`, got .{,60} A multiple"):
        A @ 10**400


def test_numbers_without_a_value():
    for c in (np.ma.masked, np.ma.array(2.0, mask=True)):
        with pytest.raises(TypeError, match=r"masked number has no value.*filled"):
            A * c
    with pytest.raises(ValueError, match="'meta' has no value"):
        A * torch.tensor(1.0, device="meta")


POWERS = {
    "plain": lambda: A,
    "diagonal": lambda: DiagonalLinearOperator([torch.rand(3)]),
    "dense": lambda: TensorLinearOperator(torch.eye(3)),
    "kronecker": lambda: KroneckerProductLinearOperator(torch.eye(2), torch.eye(3)),
    "eigh": lambda: EighDecomposedLinearOperator(torch.rand(3), torch.eye(3)),
    "kfac": lambda: kfac(),
    "blocks": lambda: kfac().frozen(),
}


def kfac():
    net = torch.nn.Linear(3, 2)
    data = [(torch.rand(4, 3), torch.rand(4, 2))]
    return KFACLinearOperator(
        net, torch.nn.MSELoss(), dict(net.named_parameters()), data
    )


@pytest.mark.parametrize("kind", POWERS)
@pytest.mark.parametrize("exponent", [np.nan, np.inf, -np.inf, np.array(np.nan)])
def test_exponents_that_are_not_finite(kind, exponent):
    with pytest.raises(ValueError, match=r"no power with the exponent -?(nan|inf)"):
        POWERS[kind]() ** exponent


@pytest.mark.parametrize("kind", POWERS)
@pytest.mark.parametrize("exponent", [2j, "2", None, [2]], ids=repr)
def test_exponents_that_are_no_numbers(kind, exponent):
    with pytest.raises(ValueError, match="has powers 0, 1, 2"):
        POWERS[kind]() ** exponent


def test_large_exponents():
    for exponent in (10**7, 10**30):
        with pytest.raises(
            ValueError, match=f"with the power {exponent} takes as many"
        ):
            A**exponent
    with pytest.raises(ValueError, match="at most"):
        A**10**400
    power = DiagonalLinearOperator([torch.tensor([1.0, 0.5])]) ** 10**7
    assert torch.equal(power.diagonal(), torch.tensor([1.0, 0.0]))
    assert np.allclose((A**3.0) @ x, D @ D @ D @ x)


# -- what is refused -------------------------------------------------------------------


def quantized():
    return torch.quantize_per_tensor(torch.rand(N), 0.1, 0, torch.quint8)


def nested():
    return torch.nested.nested_tensor([torch.rand(3), torch.rand(5)])


def masked():
    return np.ma.array(x, mask=x > 3)


REFUSED = {
    "masked": (masked, r"masked entries.*x\.filled\(0\)"),
    "list of masked": (lambda: [masked()], r"masked entries.*x\.filled\(0\)"),
    "sparse vector": (lambda: torch.tensor(x).to_sparse(), "a sparse one.*to_dense"),
    "sparse": (lambda: torch.eye(N).to_sparse(), "a sparse one.*to_dense"),
    "quantized": (quantized, r"a quantized one.*dequantize\(\)"),
    "nested": (nested, r"a nested one.*torch\.cat"),
    "packed": (lambda: torch.rand(N).to_mkldnn(), "an unusual one.*to_dense"),
    "bits": (lambda: torch.ones(N).byte().view(torch.bits8), "an unusual one"),
    "objects": (lambda: np.array([1, None] * 4), "NumPy reads as dtype object"),
    "integers as objects": (lambda: np.ones(N, object), "as dtype object"),
    "huge integers": (lambda: [10**400] * N, "as dtype object"),
    "text": (lambda: np.array(["1"] * N), "as dtype <U1"),
    "one text": (lambda: "1", "as dtype <U1"),
    "bytes": (lambda: x.tobytes(), r"as dtype \|S64"),
    "dates": (lambda: np.zeros(N, "M8[s]"), "as dtype datetime64"),
    "records": (lambda: np.zeros(N, [("a", float)]), "as dtype"),
    "ragged": (lambda: [[1], [2, 3]], "list that is no array"),
    "arrays of two shapes": (lambda: [np.ones((2, 3)), np.ones(2)], "nothing but tens"),
    "nothing": (lambda: None, "type NoneType"),
    "mapping": (lambda: {"a": torch.ones(N)}, "type dict"),
    "generator": (lambda: (v for v in x), "type generator"),
    "a class": (lambda: float, "type type"),
    "sparse matrix": (lambda: scipy.sparse.eye(N).tocsr(), r"csr.*\.toarray\(\)"),
    "single tensor": (lambda: torch.ones(N), r"float32\. Convert it with `x\.to"),
    "complex tensor": (
        lambda: torch.ones(N).to(torch.complex64),
        r"complex64\. Convert it with `x\.to\(torch\.complex128\)`",
    ),
    "eight bits": (lambda: torch.ones(N).to(torch.float8_e5m2), "float8_e5m2. Convert"),
    "mixed list": (
        lambda: [torch.ones(2, 3).double(), torch.ones(2)],
        r"float32\. Convert it with `x\.to",
    ),
    "list with a half": (
        lambda: [torch.ones(2, 3).half(), torch.ones(2).double()],
        r"float16\. Convert it with `x\.to",
    ),
    "list with complex": (
        lambda: [torch.ones(2, 3).to(torch.complex64), torch.ones(2).double()],
        r"complex64\. Convert it with `x\.to",
    ),
    "list of sparse": (
        lambda: [torch.ones(2, 3).double(), torch.ones(2).double().to_sparse()],
        "a sparse one.*to_dense",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    make, said = REFUSED[kind]
    for multiply in (lambda X: A @ X, A.dot, lambda X: A * X):
        with pytest.raises(TypeError, match=said):
            multiply(make())
    if kind != "mapping":
        with pytest.raises(TypeError, match=said):
            make() @ A


def test_lists_of_integers_and_the_operators_type():
    given = [torch.ones(2, 3).long(), torch.full((2,), 0.5).double()]
    flat = np.concatenate([np.ones(6), np.full(2, 0.5)])
    for result, want in ((A @ given, D @ flat), (given @ A, flat @ D)):
        assert [part.dtype for part in result] == [torch.float64] * 2
        assert np.allclose(torch.cat([p.flatten() for p in result]), want)
    given = [torch.ones(2, 3).to(torch.complex128), torch.ones(2).double()]
    assert torch.allclose((A @ given)[1].real, (A @ [t.real for t in given])[1])
    half = Matrix(torch.bfloat16)
    result = half @ [torch.ones(2, 3).bfloat16(), torch.ones(2)]  # as from NumPy
    assert np.allclose(torch.cat([p.flatten() for p in result]).float(), D.sum(1), 0.1)
    with pytest.raises(ValueError, match=r"operand on meta\. Move it"):
        A @ [torch.ones(2, 3, device="meta").double(), torch.ones(2).double()]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sums():
    S = torch.eye(N).double()
    for M in (
        S.to_sparse(),
        S.to_sparse_csr(),
        np.eye(N, dtype=">f8"),
        np.eye(N, dtype=int),
    ):
        assert np.allclose((A + M) @ x, D @ x + x)
    for M, said in (
        (np.ma.array(np.eye(N), mask=np.eye(N)), "masked entries"),
        (np.full((N, N), None), "dtype object"),
        (torch.quantize_per_tensor(torch.eye(N), 0.1, 0, torch.quint8), "quantized"),
        (torch.eye(N), "Convert it"),
    ):
        with pytest.raises(TypeError, match=said):
            A + M


def test_the_operand_in_a_graph_is_warned_of_where_it_is(recwarn):
    operand = 2 * torch.ones(N).double().requires_grad_()
    A @ operand
    assert [w.filename for w in recwarn] == [__file__]
