"""Kronecker products and eigendecomposed matrices against dense ones."""

from functools import reduce

import numpy as np
import pytest
import torch
from numpy.linalg import LinAlgError

from curvlinops import EighDecomposedLinearOperator, KroneckerProductLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator as HandedOn
from tolerances import assert_close

torch.manual_seed(0)
RECTANGULAR = [(2, 3), (4, 1), (3, 2)]


def matrices(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def psd(*sizes):
    squares = matrices(*((n, n) for n in sizes))
    return [m @ m.T / len(m) + 0.1 * eye(len(m)) for m in squares]


def kron(factors):
    return reduce(torch.kron, [f.diag() if f.ndim == 1 else f for f in factors])


SQUARE = {
    "one": psd(4),
    "two": psd(3, 4),
    "three": psd(2, 3, 2),
    "diagonal": [psd(3)[0], torch.tensor([0.5, 2.0, 1.0]).double()],
}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_dense(number):
    factors = matrices(*RECTANGULAR[:number])
    K = KroneckerProductLinearOperator(*factors)
    assert_close(K.to_dense(), kron(factors))
    assert_close(K.T.to_dense(), kron(factors).T)
    assert K.in_shapes == (torch.Size(f.shape[1] for f in factors),)


def test_containers():
    factors = matrices((2, 3), (4, 5))
    K = KroneckerProductLinearOperator(*factors)
    x = np.arange(15.0)
    assert_close(K @ x, kron(factors).numpy() @ x)
    [product] = K @ [torch.from_numpy(x).reshape(3, 5)]
    assert_close(product, (kron(factors) @ torch.from_numpy(x)).reshape(2, 4))


def test_groups():
    A, B = matrices((3, 2, 4), (3, 5, 2))
    K = KroneckerProductLinearOperator(A, B, grouped=True)
    dense = torch.block_diag(*map(torch.kron, A, B))
    assert_close(K.to_dense(), dense)
    assert_close(K.T.to_dense(), dense.T)
    A, B = (m @ m.mT for m in matrices((3, 2, 2), (3, 3, 3)))
    K = KroneckerProductLinearOperator(A, B, grouped=True)
    dense = torch.block_diag(*map(torch.kron, A, B))
    assert_close(K.trace(), dense.trace())
    assert_close(K.logdet(), dense.logdet(), size=1000)
    assert_close(K.frobenius_norm(), dense.norm())
    assert_close(K.diagonal(), dense.diagonal())
    inverse = torch.linalg.inv(dense + 0.5 * eye(18))
    assert_close(K.inverse(0.5, use_exact_damping=True).to_dense(), inverse)


@pytest.mark.parametrize("factors", SQUARE.values(), ids=SQUARE)
def test_scalars(factors):
    K, dense = KroneckerProductLinearOperator(*factors), kron(factors)
    for A in (K, K.eigh()):
        assert_close(A.to_dense(), dense)
        assert_close(A.trace(), dense.trace(), size=100)
        assert_close(A.det(), dense.det(), size=1000)
        assert_close(A.logdet(), dense.logdet(), size=1000)
        assert_close(A.frobenius_norm(), dense.norm(), size=100)
        assert_close(A.diagonal(), dense.diagonal(), size=100)
        assert_close(A.eigenvalues(), torch.linalg.eigvalsh(dense), size=100)


@pytest.mark.parametrize("factors", SQUARE.values(), ids=SQUARE)
def test_inverse_and_powers(factors):
    K, dense = KroneckerProductLinearOperator(*factors), kron(factors)
    identity = eye(len(dense))
    dense_factors = [f.diag() if f.ndim == 1 else f for f in factors]
    damped = kron([f + 0.3 * eye(len(f)) for f in dense_factors])
    assert_close(K.inverse(0.3).to_dense(), torch.linalg.inv(damped), size=1000)
    exact = K.inverse(0.3, use_exact_damping=True).to_dense()
    assert_close(exact, torch.linalg.inv(dense + 0.3 * identity), size=1000)
    several = tuple(0.1 * (i + 1) for i in range(len(factors)))
    damped = kron(
        [f + d * eye(len(f)) for f, d in zip(dense_factors, several, strict=True)]
    )
    assert_close(K.inverse(several).to_dense(), torch.linalg.inv(damped), size=1000)
    for A in (K, K.eigh()):
        root = A**-0.5
        assert_close((root @ root @ A).to_dense(), identity, size=10_000)
        assert_close((A**2).to_dense(), dense @ dense, size=100)
        assert_close((A**0.5 @ A**0.5).to_dense(), dense, size=1000)


def test_heuristic_damping():
    B, A = factors = psd(3, 4)
    pi = ((A.trace() / 4) / (B.trace() / 3)).sqrt()
    left = torch.linalg.inv(B + 0.2**0.5 / pi * eye(3))
    right = torch.linalg.inv(A + 0.2**0.5 * pi * eye(4))
    K = KroneckerProductLinearOperator(*factors)
    inverse = K.inverse(0.2, use_heuristic_damping=True).to_dense()
    assert_close(inverse, torch.kron(left, right), size=100)
    floor = K.inverse(0.0, use_heuristic_damping=True, min_damping=10.0).to_dense()
    damped = torch.kron(B + 10 * eye(3), A + 10 * eye(4))
    assert_close(floor, torch.linalg.inv(damped), size=100)


def test_decompositions_are_retried_in_double_precision():
    # positive definite, but not after rounding errors of single precision
    Q = torch.linalg.qr(matrices((6, 6))[0]).Q
    spectrum = torch.logspace(0, -7.3, 6).double()
    factor = ((Q * spectrum) @ Q.T).float()
    K = KroneckerProductLinearOperator(factor, name="the block of 'w'")
    lowest = torch.linalg.eigvalsh(factor.double())[0].abs().item()
    damping = 2 * lowest + 1e-9
    inverse = K.inverse(damping)
    assert torch.isfinite(inverse.to_dense()).all()
    with pytest.raises(LinAlgError, match=r"block of 'w'.*larger `damping`"):
        K.inverse(-0.5)


def test_decomposition_that_fails_first(monkeypatch):
    eigh, calls = torch.linalg.eigh, []

    def failing(matrix, **options):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    K = KroneckerProductLinearOperator(psd(3)[0].float())
    assert_close(K.eigh().to_dense(), K.to_dense())
    assert calls == [torch.float32, torch.float64]


def test_eigendecomposed():
    assert HandedOn is EighDecomposedLinearOperator
    [matrix] = psd(5)
    A = EighDecomposedLinearOperator(*torch.linalg.eigh(matrix))
    assert_close(A.to_dense(), matrix)
    assert_close(A.diagonal(), matrix.diagonal())
    assert_close(
        A.inverse(0.1).to_dense(), torch.linalg.inv(matrix + 0.1 * eye(5)), size=100
    )
    assert A.adjoint() is A


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KroneckerProductLinearOperator(), ValueError, "at least one factor"),
        (lambda: KroneckerProductLinearOperator(np.eye(2)), TypeError, "from tensors"),
        (
            lambda: KroneckerProductLinearOperator(torch.ones(2, 2, 2)),
            ValueError,
            "length if `grouped`",
        ),
        (
            lambda: KroneckerProductLinearOperator(torch.ones(2, 3)).trace(),
            ValueError,
            "square factors have a trace",
        ),
        (
            lambda: KroneckerProductLinearOperator(*psd(2, 2)).inverse(
                0.1, use_exact_damping=True, use_heuristic_damping=True
            ),
            ValueError,
            "Exact damping",
        ),
        (
            lambda: KroneckerProductLinearOperator(*psd(2, 2)).inverse((0.1,)),
            ValueError,
            "1 dampings for 2",
        ),
        (
            lambda: KroneckerProductLinearOperator(
                torch.full((2, 2), torch.nan)
            ).eigh(),
            LinAlgError,
            "not finite",
        ),
        (
            lambda: KroneckerProductLinearOperator(torch.zeros(2, 2)) ** -0.5,
            LinAlgError,
            "no power -0.5",
        ),
        (
            lambda: KroneckerProductLinearOperator(torch.zeros(2)).inverse(),
            LinAlgError,
            "inverse of a factor",
        ),
        (
            lambda: EighDecomposedLinearOperator(torch.ones(3), eye(2)),
            ValueError,
            "3 eigenvalues",
        ),
        (
            lambda: EighDecomposedLinearOperator(torch.ones(2), eye(2)),
            TypeError,
            "bring both together",
        ),
        (
            lambda: EighDecomposedLinearOperator(
                torch.zeros(2).double(), eye(2)
            ).inverse(),
            LinAlgError,
            "singular: 2",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("damping", [float("nan"), float("inf"), "1", [0.1, 0.2]])
@pytest.mark.parametrize("exact", [False, True])
def test_dampings_that_are_no_numbers(damping, exact):
    A = KroneckerProductLinearOperator(*(torch.eye(n).double() for n in (2, 3)))
    with pytest.raises(ValueError, match="must be a finite number"):
        A.inverse(damping, use_exact_damping=exact)
    with pytest.raises(ValueError, match="must be a finite number"):
        A.eigh().inverse(damping)
    with pytest.raises(ValueError, match="from zero"):
        A.inverse(-0.1, use_heuristic_damping=True)
