"""Matrices with a structure keep it under algebra, and have closed forms."""

import copy
import pickle

import numpy as np
import pytest
import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator

import references
from cases import find
from curvlinops import (
    BlockDiagonalLinearOperator,
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    EighDecomposedLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    KroneckerProductLinearOperator,
    NystromPreconditionerLinearOperator,
    OuterProductLinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
)
from curvlinops._composites import Damped
from curvlinops.kfac import BlockwiseLinearOperator
from tolerances import assert_close

DTYPES = [torch.float64, torch.float32]


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def spd(n, dtype=torch.float64, seed=0):
    A = randn(n, n, seed=seed)
    return (A @ A.T / n + 0.2 * torch.eye(n, dtype=torch.float64)).to(dtype)


def eye(n, dtype=torch.float64):
    return torch.eye(n, dtype=dtype)


def diagonal(dtype=torch.float64, seed=0):
    entries = [
        randn(2, 3, dtype=dtype, seed=seed),
        randn(4, dtype=dtype, seed=seed + 9),
    ]
    return DiagonalLinearOperator(entries)


def eighd(n=4, dtype=torch.float64, seed=0):
    evals, Q = torch.linalg.eigh(spd(n, seed=seed))
    return EighDecomposedLinearOperator(evals.to(dtype), Q.to(dtype))


def kronecker(dtype=torch.float64):
    return KroneckerProductLinearOperator(spd(2, dtype), spd(3, dtype, 1))


def dense_of(A):
    """Return the matrix in float64, column by column, by products alone."""
    columns = [A @ e for e in torch.eye(A.shape[1], dtype=A.torch_dtype)]
    return torch.stack(columns, dim=1).double()


# Every operator with a structure

#: Well-conditioned, square; some not symmetric.
SQUARE = {
    "identity": lambda d: IdentityLinearOperator([(2, 2), (1,)], "cpu", d),
    "multiple of the identity": lambda d: 3 * IdentityLinearOperator([(5,)], "cpu", d),
    "diagonal": diagonal,
    "tensor": lambda d: TensorLinearOperator(randn(5, 5, dtype=d) + 3 * eye(5, d)),
    "outer products": lambda d: OuterProductLinearOperator(
        randn(6, dtype=d).abs() + 0.5, randn(4, 6, dtype=d, seed=1)
    ),
    "kronecker": kronecker,
    "grouped kronecker": lambda d: KroneckerProductLinearOperator(
        torch.stack([spd(2, d), spd(2, d, 1)]),
        torch.stack([spd(3, d, 2), spd(3, d, 3)]),
        grouped=True,
    ),
    "kronecker with a diagonal": lambda d: KroneckerProductLinearOperator(
        spd(2, d), randn(3, dtype=d).abs() + 0.5
    ),
    "eigendecomposed": lambda d: eighd(dtype=d),
    "decomposed kronecker": lambda d: kronecker(d).eigh(),
    "nyström": lambda d: NystromPreconditionerLinearOperator(
        TensorLinearOperator(spd(6, d)), rank=3, damping=0.1, rng=0
    ),
    "block diagonal of arrays": lambda d: BlockDiagonalLinearOperator(
        [spd(2, d).numpy(), spd(3, d).numpy()]
    ),
    "block diagonal": lambda d: BlockDiagonalLinearOperator(
        [diagonal(d), eighd(dtype=d), randn(3, 3, dtype=d) + 3 * eye(3, d)]
    ),
    "submatrix of a tensor": lambda d: SubmatrixLinearOperator(
        randn(6, 6, dtype=d) + 4 * eye(6, d), [0, 2, 1], [0, 1, 2]
    ),
    "submatrix of a diagonal": lambda d: SubmatrixLinearOperator(
        diagonal(d), [4, 0, 2], [4, 0, 2]
    ),
    "multiple of a tensor": lambda d: -2.5 * TensorLinearOperator(spd(5, d)),
    "damped tensor": lambda d: TensorLinearOperator(spd(5, d)).damped(0.7),
    "damped kronecker": lambda d: kronecker(d).damped(0.7),
    "multiple of a damped kronecker": lambda d: kronecker(d).damped(0.7) / 3,
    "damped multiple of a tensor": lambda d: (
        2 * TensorLinearOperator(spd(5, d))
        + 0.3 * IdentityLinearOperator([(5,)], "cpu", d)
    ),
    "nothing plus the identity": lambda d: (0 * eighd(5, d)).damped(1),
}  # fmt: skip
each_square = pytest.mark.parametrize("make", SQUARE.values(), ids=SQUARE)


@each_square
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_closed_forms(make, dtype):
    A = make(dtype)
    D = dense_of(A)
    assert_close(A.trace(), D.trace(), size=100)
    assert_close(A.diagonal(), D.diagonal(), size=100)
    assert_close(A.frobenius_norm(), D.norm(), size=1000)
    assert_close(A.det(), D.det(), size=10_000)
    sign, logarithm = torch.linalg.slogdet(D)
    expected = logarithm if sign > 0 else logarithm * torch.nan
    # relative errors of the determinant are absolute ones of its logarithm
    assert torch.allclose(
        A.logdet().double(), expected, atol=1e3 * torch.finfo(dtype).eps, equal_nan=True
    )
    for number in (A.trace(), A.det(), A.logdet(), A.frobenius_norm()):
        assert number.shape == () and number.dtype == dtype
    A.diagonal().zero_()  # is the caller's
    assert_close(dense_of(A), D, dtype)


@each_square
@pytest.mark.parametrize("delta", [0.3, 1.7])
def test_inverse_of_the_damped(make, delta):
    A = make(torch.float64)
    D, identity = dense_of(A), eye(A.shape[0])
    expected = torch.linalg.inv(D + delta * identity)
    B = A.damped(delta)
    assert_close(dense_of(B), D + delta * identity)
    inverses = [B.inverse(), A.damped(delta / 3).inverse(2 * delta / 3)]
    if not isinstance(A, KroneckerProductLinearOperator):  # which damps factors
        inverses.append(A.inverse(delta))
    for inverse in inverses:
        assert isinstance(inverse, LinearOperator)
        assert_close(dense_of(inverse), expected, size=10_000)
        assert inverse.in_shapes == A.out_shapes or len(A.in_shapes) == 1
    assert_close(B.det(), (D + delta * identity).det(), size=10_000)
    assert_close(B.trace(), (D + delta * identity).trace(), size=1000)
    assert_close(B.frobenius_norm(), (D + delta * identity).norm(), size=1000)
    assert_close(B.diagonal(), (D + delta * identity).diagonal(), size=1000)


@each_square
def test_multiples(make):
    A = make(torch.float64)
    D = dense_of(A)
    for c in (2.0, -0.5, 0.0):
        for B in (c * A, A * c):
            assert_close(dense_of(B), c * D)
            assert_close(B.trace(), c * D.trace(), size=100)
            assert_close(B.frobenius_norm(), (c * D).norm(), size=1000)
            assert_close(B.det(), (c * D).det(), size=10_000)
            shifted = c * D + 2.5 * eye(len(D))
            assert_close(B.damped(2.5).det(), shifted.det(), size=10_000)
        if c:
            inverse = (c * A).damped(0.0).inverse()
            assert_close(dense_of(inverse), torch.linalg.inv(c * D), size=10_000)
            assert_close(dense_of(A / c), D / c)
    assert_close(dense_of(-A), -D)
    for twin in (pickle.loads(pickle.dumps(3 * A)), copy.deepcopy(3 * A)):
        assert_close(dense_of(twin), 3 * D)


@each_square
def test_low_precision_has_closed_forms_where_torch_has(make):
    A = make(torch.bfloat16) if make is SQUARE["tensor"] else make(torch.float32)
    assert torch.isfinite(A.damped(0.5).inverse() @ torch.ones(A.shape[1])).all()
    assert torch.isfinite(A.trace())


# Diagonal operators are closed

IDENTITY = IdentityLinearOperator([(2, 3), (4,)], "cpu", torch.float64)
CLOSED = {
    "sum": lambda A, B: A + B,
    "difference": lambda A, B: A - B,
    "product": lambda A, B: A @ B,
    "star": lambda A, B: A * B,
    "multiple": lambda A, B: 2.5 * A,
    "multiple from the right": lambda A, B: A * np.float32(0.5),
    "quotient": lambda A, B: A / 4,
    "negative": lambda A, B: -B,
    "square": lambda A, B: A**2,
    "zeroth power": lambda A, B: A**0,
    "damped": lambda A, B: A.damped(0.3),
    "nested": lambda A, B: 2 * (A - 0.5 * B) @ A + B**3 - 1e-3 * IDENTITY,
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("first", ["diagonal", "identity"])
@pytest.mark.parametrize("second", ["diagonal", "identity"])
def test_diagonal_operators_are_closed(name, first, second):
    operands = {"diagonal": diagonal(seed=1), "identity": IDENTITY}
    A, B = operands[first], operands[second]
    C = CLOSED[name](A, B)
    D, E = dense_of(A), dense_of(B)
    expected = {
        "star": lambda: D @ E,
        "square": lambda: D @ D,
        "zeroth power": lambda: eye(10),
        "damped": lambda: D + 0.3 * eye(10),
        "nested": lambda: 2 * (D - 0.5 * E) @ D + E @ E @ E - 1e-3 * eye(10),
    }.get(name, lambda: CLOSED[name](D, E))()
    assert isinstance(C, DiagonalLinearOperator)
    assert C.in_shapes == A.in_shapes and C.torch_dtype is torch.float64
    assert_close(C.diagonal(), expected.diagonal())
    assert_close(dense_of(C), expected)
    assert C.adjoint() is C


def test_powers_of_diagonal_operators():
    d = randn(5).abs() + 0.1
    D = DiagonalLinearOperator(d)
    for p in (-1, -0.5, 0.5, 2.5, np.int64(3), torch.tensor(2)):
        assert isinstance(D**p, DiagonalLinearOperator)
        assert_close((D**p).diagonal(), d ** float(p))
    half = (4 * IdentityLinearOperator([(3,)], "cpu", torch.float32)) ** -0.5
    assert torch.equal(half.diagonal(), torch.full((3,), 0.5))
    for entry in (0.0, -1.0):
        with pytest.raises(LinAlgError, match=r"no power -0.5"):
            DiagonalLinearOperator(torch.tensor([1.0, entry])) ** -0.5
    with pytest.raises(ValueError, match="powers 0, 1, 2"):
        D ** "2"


def test_multiples_of_the_identity_take_no_memory():
    big = IdentityLinearOperator([(10**6, 10**6)], "cpu", torch.float32)
    A = (2 * big - 0.5 * big) @ (3 * big)
    assert A._identity_multiple() == 4.5
    assert (A.inverse() ** 2)._identity_multiple() == pytest.approx(4.5**-2)


def test_constants_are_not_rounded_to_the_operators_precision():
    identity = IdentityLinearOperator([(2,)], "cpu", torch.bfloat16)
    assert (1e-3 * identity)._identity_multiple() == 1e-3


def test_diagonals_do_not_change_with_each_other():
    D = diagonal()
    for B in (D + 0 * IDENTITY, 1 * D, D @ IDENTITY, D**1):
        before = D.diagonal()
        B._entries().zero_()
        assert torch.equal(D.diagonal(), before)


def test_the_diagonal_of_a_ggn_closes_and_follows():
    built = find("mlp-tanh-ce").build()
    D = GGNDiagonalLinearOperator(*built)
    identity = IdentityLinearOperator.like(D)
    composites = {
        "damped": (D + 1e-3 * identity, lambda d: d + 1e-3),
        "from the left": (1e-3 * identity + D, lambda d: d + 1e-3),
        "method": (D.damped(1e-3), lambda d: d + 1e-3),
        "nested": (2 * D @ D - D / 4, lambda d: 2 * d * d - d / 4),
        "power": (D.damped(1.0) ** -0.5, lambda d: (d + 1.0) ** -0.5),
    }
    x = torch.linspace(-1, 1, D.shape[1]).double()
    for _ in range(2):
        d = references.ggn(*built).diagonal()
        for name, (A, expect) in composites.items():
            expected = expect(d)
            assert_close(A.diagonal(), expected, size=1000)
            assert_close(A @ x, expected * x, size=1000)
            assert_close(A.trace(), expected.sum(), size=1000)
            assert A.adjoint() is A
            twin = pickle.loads(pickle.dumps(A))
            assert_close(twin @ x, expected * x, size=1000)
            if name != "nested":  # which may be near zero
                inverse = A.inverse()
                assert isinstance(inverse, DiagonalLinearOperator)
                assert_close(inverse.diagonal(), 1 / expected, size=1000)
                assert_close(A.logdet(), expected.log().sum(), size=1000)
        with torch.no_grad():  # they are those of the new parameters then
            for p in D.risk.params.values():
                p.mul_(1.5)


# Others keep their kind under multiples and inverses


@pytest.mark.parametrize(
    ("make", "cls"),
    [
        (kronecker, KroneckerProductLinearOperator),
        (lambda: kronecker().inverse(0.1), KroneckerProductLinearOperator),
        (lambda: kronecker().eigh(), EighDecomposedLinearOperator),
        (eighd, EighDecomposedLinearOperator),
        (lambda: eighd().damped(0.2), EighDecomposedLinearOperator),
        (lambda: eighd().inverse(0.2), EighDecomposedLinearOperator),
        (
            lambda: BlockDiagonalLinearOperator([eighd(), kronecker()]),
            BlockDiagonalLinearOperator,
        ),
        (
            lambda: BlockDiagonalLinearOperator([eighd(), kronecker()]).inverse(0.1),
            BlockDiagonalLinearOperator,
        ),
    ],
)
def test_kinds_stay(make, cls):
    A = make()
    D = dense_of(A)
    assert isinstance(A, cls)
    for c in (3.0, np.float32(0.5), torch.tensor(-2.0)):
        for B in (c * A, A * c):
            assert isinstance(B, cls)
            assert_close(dense_of(B), float(c) * D)
    assert isinstance(A / 2, cls) and isinstance(-A, cls)


def test_multiples_keep_what_kroneckers_and_eigenvalues_know():
    K = kronecker()
    twice = 2 * K.eigh()
    again = KroneckerProductLinearOperator(*twice.factors_decomposed(), grouped=True)
    assert_close(again.to_dense(), 2 * K.to_dense())
    negative = (-3 * K).inverse()
    assert isinstance(negative, KroneckerProductLinearOperator)
    assert_close(dense_of(negative), torch.linalg.inv(-3 * dense_of(K)))
    factors = torch.arange(1.0, 3)[None], spd(2).float()[None]
    diagonal = -1 * KroneckerProductLinearOperator(*factors, grouped=True)
    assert_close(diagonal.inverse().to_dense(), torch.linalg.inv(diagonal.to_dense()))
    named = 2 * KroneckerProductLinearOperator(spd(2), name="w", symmetric=True)
    assert named.name == "w" and named.symmetric
    singular = KroneckerProductLinearOperator(torch.ones(2, 2).double(), spd(3))
    assert (3 * singular.eigh()).logdet() == -torch.inf
    assert (3 * singular).logdet() == -torch.inf


FISHER = {"fisher_type": "type-2"}
FAMILY = {
    "kfac": (KFACLinearOperator, FISHER, {}),
    "kfac joint": (
        KFACLinearOperator,
        {**FISHER, "separate_weight_and_bias": False},
        {"joint": True},
    ),
    "ekfac": (EKFACLinearOperator, FISHER, {"method": "ekfac"}),
    "kfoc": (
        KFOCLinearOperator,
        {**FISHER, "max_iter": 100, "tolerance": 1e-13},
        {"method": "kfoc"},
    ),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("delta", [0.01, 0.7])
@pytest.mark.parametrize("frozen", [False, True])
def test_damped_kronecker_factors(name, delta, frozen):
    cls, options, about = FAMILY[name]
    built = find("mlp-tanh-mse").build()
    K = cls(*built, **options)
    dense = references.kronecker(*built, **about)
    dense = dense_of(K) if name == "kfoc" else dense  # an iteration's result
    A = K.frozen() if frozen else K
    damped = dense + delta * eye(len(dense))
    inverse = torch.linalg.inv(damped)
    B = A.damped(delta)
    assert_close(dense_of(B), damped, size=1000)
    assert_close(dense_of(B.inverse()), inverse, size=10_000, exponent=0.9)
    assert_close(B.logdet(), damped.logdet(), size=10_000)
    assert_close(B.trace(), damped.trace(), size=1000)
    assert_close(B.diagonal(), damped.diagonal(), size=1000)
    assert_close(B.inverse().logdet(), -damped.logdet(), size=10_000)
    identity = IdentityLinearOperator.like(A)
    assert_close(dense_of((A + delta * identity).inverse()), inverse, size=10_000,
                 exponent=0.9)  # fmt: skip
    twice = (2 * A).damped(delta)
    assert isinstance(2 * A, type(A.frozen() if not frozen else A) if frozen else
                      type(2 * K))  # fmt: skip
    expected = 2 * dense + delta * eye(len(dense))
    assert_close(dense_of(twice), expected, size=1000)
    assert_close(
        dense_of(twice.inverse()), torch.linalg.inv(expected), size=10_000, exponent=0.9
    )


def test_multiples_of_kronecker_factored_operators_follow():
    built = find("mlp-tanh-mse").build()
    K = KFACLinearOperator(*built, **FISHER)
    twice, inverse, damped = 2 * K, (2 * K).inverse(0.3), K.damped(0.3).inverse()
    assert isinstance(inverse, KFACInverseLinearOperator)
    assert isinstance(damped, KFACInverseLinearOperator)
    assert isinstance((2 * K).frozen(), BlockwiseLinearOperator)
    for _ in range(2):
        dense = references.kronecker(*built)
        assert_close(dense_of(twice), 2 * dense, size=1000)
        assert_close(twice.trace(), 2 * dense.trace(), size=1000)
        expected = torch.linalg.inv(dense + 0.3 * eye(len(dense)))
        assert_close(dense_of(damped), expected, size=10_000)
        with torch.no_grad():
            for p in K.risk.params.values():
                p.mul_(1.5)


def test_which_matrix_a_determinant_is_of():
    built = find("mlp-tanh-mse").build()
    K = KFACLinearOperator(*built, **FISHER)
    factors = -torch.logdet(references.kronecker(*built, damping=0.3).inverse())
    exact = -torch.logdet(references.kronecker(*built) + 0.3 * eye(K.shape[0]))
    assert abs(factors - exact) > 1
    assert_close(K.inverse(0.3).logdet(), factors, size=10_000)
    assert_close(K.inverse(0.3, use_exact_damping=True).logdet(), exact, size=10_000)
    assert_close(-K.damped(0.3).logdet(), exact, size=10_000)


# Operators that are only known by products


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_other_damped_matrices_are_solved_with(delta):
    built = find("mlp-tanh-ce").build()
    for cls, reference in (
        (HessianLinearOperator, references.hessian),
        (GGNLinearOperator, references.ggn),
    ):
        A, dense = cls(*built), reference(*built)
        expected = torch.linalg.inv(dense + delta * eye(len(dense)))
        B = A.damped(delta)
        assert isinstance(B, Damped) and B.adjoint() is B
        assert_close(dense_of(B), dense + delta * eye(len(dense)), size=1000)
        for inverse in (B.inverse(rtol=1e-12), A.inverse(delta, rtol=1e-12)):
            assert_close(inverse.to_dense(), expected, size=1000, exponent=0.7)
    assert_close(CGInverseLinearOperator(B).to_dense(), expected, exponent=0.6)
    A = TensorLinearOperator(randn(4, 4)) @ TensorLinearOperator(randn(4, 4, seed=1))
    dense = dense_of(A)
    inverse = A.damped(5.0).inverse(atol=1e-14, btol=1e-14, maxiter=200)
    expected = torch.linalg.inv(dense + 5 * eye(4))
    assert_close(inverse.to_dense(), expected, size=1000, exponent=0.7)
    K = KroneckerProductLinearOperator(randn(2, 2) + 3 * eye(2), spd(2))
    expected = torch.linalg.inv(dense_of(K) + eye(4))
    inverse = K.damped(1.0).inverse(atol=1e-14, btol=1e-14, maxiter=200)
    assert_close(inverse.to_dense(), expected, size=1000, exponent=0.7)
    with pytest.raises(LinAlgError, match="no determinant"):
        K.damped(1.0).logdet()


def test_blocks_without_closed_inverse_are_solved_with():
    built = find("mlp-tanh-ce").build()
    G = GGNLinearOperator(*built)
    B = BlockDiagonalLinearOperator(G.blocks().values())
    inverse = B.damped(0.5).inverse(rtol=1e-12)
    expected = torch.linalg.inv(dense_of(B) + 0.5 * eye(B.shape[0]))
    assert isinstance(inverse, BlockDiagonalLinearOperator)
    assert_close(inverse.to_dense(), expected, size=1000, exponent=0.7)


def test_sums_know_what_follows_from_the_parts():
    A, B = (
        TensorLinearOperator(randn(4, 4)),
        OuterProductLinearOperator(randn(3), randn(4, 3, seed=1)),
    )
    D = dense_of(A) + dense_of(B)
    assert_close((A + B).trace(), D.trace())
    assert_close((A + B).diagonal(), D.diagonal())
    cast = TensorLinearOperator(randn(4, 4, dtype=torch.float32)).to_scipy(np.float64)
    D = dense_of(cast)
    for name in ("trace", "diagonal", "frobenius_norm", "det"):
        value = getattr(cast, name)()
        assert value.dtype == torch.float64
    assert_close(cast.trace(), D.trace(), torch.float32)
    assert_close(cast.det(), D.det(), torch.float32, 100)


def test_principal_blocks_know_their_diagonal():
    built = find("mlp-tanh-ce").build()
    names = [*built[2]][1:]
    D = GGNDiagonalLinearOperator(*built)
    dense = references.ggn(*built).diagonal()
    places = torch.arange(len(dense))[built[2][next(iter(built[2]))].numel() :]
    for A in (D.block(names), SubmatrixLinearOperator(D, places, places)):
        assert_close(A.diagonal(), dense[places], size=1000)
        assert_close(A.trace(), dense[places].sum(), size=1000)


METHODS = {
    "trace": "hutchinson_trace",
    "diagonal": "xdiag",
    "frobenius_norm": "hutchinson_squared_fro",
    "det": r"logdet\(A\)",
    "logdet": r"logdet\(A\)",
}


@pytest.mark.parametrize("method", METHODS)
def test_one_error_where_there_is_no_closed_form(method):
    built = find("mlp-tanh-ce").build()
    G = GGNLinearOperator(*built)
    block = G.block([*built[2]][:1])
    for A in (G, 2 * G, G.damped(0.1), block, BlockDiagonalLinearOperator([G]),
              SubmatrixLinearOperator(G, [0], [0])):  # fmt: skip
        # a part's trace needs the diagonal of the whole
        part = A is block or isinstance(A, SubmatrixLinearOperator)
        cure = "xdiag" if part and method == "trace" else METHODS[method]
        with pytest.raises(LinAlgError, match=rf"in closed form.*{cure}"):
            getattr(A, method)()


@pytest.mark.parametrize("method", ["trace", "diagonal", "det", "logdet", "inverse"])
def test_one_error_where_a_matrix_is_not_square(method):
    built = find("mlp-tanh-ce").build()
    tall = randn(4, 3)
    for A in (JacobianLinearOperator(built[0], built[2], built[3]),
              TensorLinearOperator(tall), 2 * TensorLinearOperator(tall),
              BlockDiagonalLinearOperator([tall, tall.T]),
              SubmatrixLinearOperator(spd(4), [0, 1], [0]),
              KroneckerProductLinearOperator(tall, tall.T)):  # fmt: skip
        with pytest.raises(LinAlgError, match=r"Only (a )?square"):
            getattr(A, method)()
    with pytest.raises(LinAlgError, match="Only a square"):
        TensorLinearOperator(tall).damped(1.0)
    assert_close(TensorLinearOperator(tall).frobenius_norm(), tall.norm())
    assert_close(BlockDiagonalLinearOperator([tall, tall.T]).frobenius_norm(),
                 2**0.5 * tall.norm())  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorLinearOperator(torch.zeros(2, 2)),
        lambda: 2 * TensorLinearOperator(torch.zeros(2, 2)),
        lambda: OuterProductLinearOperator(torch.ones(1), torch.ones(3, 1)),
        lambda: OuterProductLinearOperator(torch.zeros(2), torch.eye(2)),
        lambda: DiagonalLinearOperator(torch.zeros(2)),
        lambda: 0 * IdentityLinearOperator([(2,)], "cpu", torch.float32),
        lambda: BlockDiagonalLinearOperator([torch.zeros(2, 2)]),
    ],
)
def test_singular_matrices_have_no_inverse(make):
    A = make()
    with pytest.raises(LinAlgError, match="is singular"):
        A.inverse()
    assert A.det() == 0 and A.logdet() == -torch.inf
