"""Inverses as operators, against dense solves."""

import pickle
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.linalg import LinAlgError, norm
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh, minres

from curvlinops import _krylov
from curvlinops.inverse import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from curvlinops.structured import (
    DiagonalLinearOperator,
    IdentityLinearOperator,
    OuterProductLinearOperator,
    TensorLinearOperator,
)
from tolerances import assert_close

N = 12
RNG = np.random.default_rng(0)
Q = np.linalg.qr(RNG.standard_normal((N, N)))[0]
#: Positive definite, indefinite, and not symmetric, with eigenvalues of size 1 to 6.
SPD = Q @ np.diag(np.linspace(1, 6, N)) @ Q.T
INDEFINITE = Q @ np.diag(np.linspace(1, 6, N) * (-1) ** np.arange(N)) @ Q.T
GENERAL = 3 * np.eye(N) + RNG.standard_normal((N, N)) / 3
#: Enough columns to be solved in step.
B = RNG.standard_normal((N, 9))

#: Every inverse, set to solve to working precision, with a matrix it is made for.
SOLVERS = {
    "CG": (CGInverseLinearOperator, SPD),
    "MINRES": (MINRESInverseLinearOperator, INDEFINITE),
    "LSMR": (
        partial(LSMRInverseLinearOperator, atol=1e-13, btol=1e-13, maxiter=200),
        GENERAL,
    ),
    "Neumann": (partial(NeumannInverseLinearOperator, scale=0.3, num_terms=150), SPD),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_krylov = pytest.mark.parametrize("solver", ["CG", "MINRES", "LSMR"])
each_symmetric = pytest.mark.parametrize("solver", ["CG", "MINRES"])


#: What statistics have for every column.
NAMES = "iterations", "residual_norms", "relative_residuals", "converged"


def tensor(A, dtype=torch.float64):
    return torch.as_tensor(A.copy()).to(dtype)


def symmetric(A):
    """Return a dense operator that knows to be self-adjoint."""

    class Symmetric(TensorLinearOperator):
        def _adjoint(self):
            return self

    return Symmetric(tensor(A))


class Counting(TensorLinearOperator):
    """A dense operator that remembers the widths of its blocks."""

    def __init__(self, A):
        super().__init__(A)
        self.widths = []

    def _apply(self, V):
        self.widths.append(V.shape[1])
        return super()._apply(V)


# -- every solver -------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("columns", [None, 1, 2, 9])
def test_solves_like_dense(solver, columns):
    make, A = SOLVERS[solver]
    b = B[:, 0] if columns is None else B[:, :columns]
    A_inv = make(TensorLinearOperator(tensor(A)))
    assert LinearOperator in type(A_inv).__bases__
    x = A_inv @ b
    assert isinstance(x, np.ndarray)
    np.testing.assert_allclose(x, np.linalg.solve(A, b), atol=1e-7)
    on_torch = A_inv @ tensor(b)
    assert isinstance(on_torch, torch.Tensor)
    np.testing.assert_allclose(on_torch, x, atol=1e-12)
    statistics = A_inv.statistics
    residuals = np.atleast_1d(norm(b - A @ x, axis=0))
    np.testing.assert_allclose(statistics.residual_norms, residuals, atol=1e-13)
    np.testing.assert_allclose(
        statistics.relative_residuals,
        statistics.residual_norms / np.atleast_1d(norm(b, axis=0)),
    )
    assert statistics.converged.all()
    assert statistics.solver == solver
    assert statistics.iterations.shape == (columns or 1,)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(solver, dtype):
    make, A = SOLVERS[solver]
    make = getattr(make, "func", make)
    options = {"Neumann": {"scale": 0.3}, "LSMR": {"maxiter": 200}}.get(solver, {})
    if (solver, dtype) == ("LSMR", torch.bfloat16):
        options |= {"atol": 1e-2, "btol": 1e-2}
    A_inv = make(TensorLinearOperator(tensor(A, dtype)), **options)
    X = A_inv @ tensor(B, dtype)
    assert X.dtype == dtype
    rtol = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    expected = np.linalg.solve(A, B)
    assert norm(X.double().numpy() - expected) < rtol * norm(expected)
    assert A_inv.dtype == np.float32
    assert (A_inv @ B[:, 0].astype(np.float32)).dtype == np.float32
    if dtype == torch.float32 or solver != "Neumann":
        assert A_inv.statistics.converged.all()


@each_solver
@pytest.mark.parametrize(
    "wrap", [np.asarray, scipy.sparse.csr_array, aslinearoperator, tensor]
)
def test_of_foreign_operator(solver, wrap):
    make, A = SOLVERS[solver]
    A_inv = make(wrap(A))
    expected = np.linalg.solve(A, B)
    np.testing.assert_allclose(A_inv @ B, expected, atol=1e-7)
    np.testing.assert_allclose(B.T @ A_inv, np.linalg.solve(A.T, B).T, atol=1e-7)


@each_solver
def test_of_damped_operator_and_composites(solver):
    make, matrix = SOLVERS[solver]
    A = TensorLinearOperator(tensor(matrix))
    damped = A + 0.1 * IdentityLinearOperator([(N,)], "cpu", torch.float64)
    A_inv = make(damped)
    expected = np.linalg.inv(matrix + 0.1 * np.eye(N))
    np.testing.assert_allclose(A_inv.to_dense(), expected, atol=1e-7)
    np.testing.assert_allclose((A_inv @ damped).to_dense(), np.eye(N), atol=1e-7)
    composite = 2.0 * A_inv + A
    np.testing.assert_allclose(composite @ B, (2 * expected + matrix) @ B, atol=1e-6)


@each_solver
def test_adjoint(solver):
    make, matrix = SOLVERS[solver]
    A_inv = make(TensorLinearOperator(tensor(matrix)))
    adjoint = A_inv.adjoint()
    assert type(adjoint) is type(A_inv)
    expected = np.linalg.inv(matrix).T
    np.testing.assert_allclose(adjoint.to_dense(), expected, atol=1e-7)
    np.testing.assert_allclose(A_inv.rmatmat(B), expected @ B, atol=1e-7)
    if matrix is not GENERAL:
        self_adjoint = make(symmetric(matrix))
        assert self_adjoint.adjoint() is self_adjoint


@each_solver
def test_pickles(solver):
    make, A = SOLVERS[solver]
    A_inv = make(TensorLinearOperator(tensor(A)))
    A_inv @ B
    twin = pickle.loads(pickle.dumps(A_inv))
    np.testing.assert_array_equal(twin @ B[:, 0], A_inv @ B[:, 0])
    assert "1 of 1 columns converged" in repr(twin.statistics)


@each_solver
def test_lists_of_tensors_keep_their_shapes(solver):
    make, _ = SOLVERS[solver]
    diagonal = [torch.linspace(1, 2, 4).double().reshape(2, 2), torch.ones(3).double()]
    A_inv = make(DiagonalLinearOperator(diagonal))
    x = A_inv @ [torch.ones(2, 2).double(), torch.ones(3).double()]
    assert [t.shape for t in x] == [(2, 2), (3,)]
    assert_close(x[0], 1 / diagonal[0], dtype=torch.float32)


@each_solver
def test_operand_stays_and_zero_gives_zero(solver):
    make, A = SOLVERS[solver]
    A_inv = make(A)
    b = B[:, 0].copy()
    A_inv @ b
    np.testing.assert_array_equal(b, B[:, 0])
    zero = np.zeros(N)
    x = A_inv @ zero
    assert not np.shares_memory(x, zero)
    assert (x == 0).all()
    assert A_inv.statistics.converged.all()
    assert (A_inv.statistics.relative_residuals == 0).all()


@each_solver
def test_no_statistics_before_the_first_product(solver):
    make, A = SOLVERS[solver]
    assert make(A).statistics is None


@each_solver
@pytest.mark.parametrize("columns", [3, 9, 70])
def test_statistics_cover_all_columns(solver, columns):
    """Of every kind of operand, one entry for each column, in their order."""
    make, A = SOLVERS[solver]
    A_inv = make(A)
    X = RNG.standard_normal((N, columns))
    X[:, 1::2] = 0  # every other column is solved at once

    def check(operand, size, solved):
        result = A_inv @ operand
        statistics = A_inv.statistics
        sizes = {getattr(statistics, name).shape for name in NAMES}
        assert sizes == {(size,)}
        assert np.array_equal(statistics.residual_norms == 0, solved)
        return result

    zero = np.arange(columns) % 2 == 1
    found = check(X, columns, zero)
    np.testing.assert_allclose(A @ found, X, atol=1e-7)
    check(tensor(X), columns, zero)
    check([tensor(X)], columns, zero)
    check(X + 1j, 2 * columns, np.concatenate([zero, np.zeros(columns, bool)]))


@each_solver
@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_statistics_of_the_whole_matrix(solver, block_size):
    """Also where it is solved for in blocks, against solves for single columns."""
    make, A = SOLVERS[solver]
    A_inv = make(A)
    np.testing.assert_allclose(A_inv.to_dense(block_size), np.linalg.inv(A), atol=1e-7)
    statistics = A_inv.statistics
    single = []
    for column in np.eye(N):
        A_inv @ column
        single.append(A_inv.statistics.iterations[0])
    assert statistics.iterations.tolist() == single
    assert all(getattr(statistics, name).shape == (N,) for name in NAMES)
    assert statistics.converged.all()
    assert f"{N} of {N} columns converged" in repr(statistics)
    assert A_inv.statistics.iterations.shape == (1,)


@each_solver
def test_statistics_after_an_interrupted_block(solver):
    make, A = SOLVERS[solver]
    calls = []

    class Interrupted(TensorLinearOperator):
        def _apply(self, V):
            calls.append(V)
            if len(calls) == 40:
                raise KeyboardInterrupt
            return super()._apply(V)

    A_inv = make(Interrupted(tensor(A)))
    with pytest.raises(KeyboardInterrupt):
        A_inv.to_dense(block_size=1)
    A_inv @ B[:, :2]
    assert A_inv.statistics.iterations.shape == (2,)


@each_solver
def test_statistics_are_frozen(solver):
    make, A = SOLVERS[solver]
    A_inv = make(A)
    A_inv @ B
    with pytest.raises(AttributeError):
        A_inv.statistics.solver = "other"
    assert repr(A_inv.statistics).startswith(f"<{solver}: 9 of 9 columns converged in")


@each_solver
def test_rectangular_operator_is_refused(solver):
    make, _ = SOLVERS[solver]
    with pytest.raises(ValueError, match=r"square.*scipy\.sparse\.linalg\.lsmr"):
        make(np.ones((3, 2)))


@each_solver
def test_nonfinite_operand(solver):
    make, A = SOLVERS[solver]
    with pytest.raises(ValueError, match="right-hand side with NaN"):
        make(A) @ np.full(N, np.nan)


@each_krylov
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_product_names_the_iteration(solver, bad):
    make, A = SOLVERS[solver]

    class Broken(Counting):
        def _apply(self, V):
            return super()._apply(V) * (bad if len(self.widths) > 4 else 1.0)

    with pytest.raises(ValueError, match=r"not finite in iteration \d"):
        make(Broken(tensor(A))) @ B[:, 0]


def test_nonfinite_product_names_the_right_hand_side():
    class Broken(TensorLinearOperator):
        def _apply(self, V):
            return super()._apply(V) * torch.where(V[0] == 7.0, torch.nan, 1.0)

    X = np.ones((N, 9))
    X[0, 3] = 7.0
    with pytest.raises(ValueError, match="in iteration 1") as caught:
        CGInverseLinearOperator(Broken(tensor(SPD))) @ X
    assert caught.value.__notes__ == ["This was right-hand side 3 of 9."]


# -- hyperparameters of Krylov solvers ----------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 5])
@pytest.mark.parametrize("columns", [1, 9])
def test_cg_at_a_callers_limit_is_scipys_iterate(limit, columns):
    A_inv = CGInverseLinearOperator(SPD, eps=0, max_iter=limit, max_tridiag_iter=limit)
    X = A_inv @ B[:, :columns]
    for x, b in zip(X.T, B.T, strict=False):
        expected, _ = cg(SPD, b, maxiter=limit, rtol=1e-10)
        np.testing.assert_allclose(x, expected, rtol=1e-10)
    assert (A_inv.statistics.iterations == limit).all()
    assert not A_inv.statistics.converged.any()


def test_minres_at_a_callers_limit_is_scipys_iterate():
    x = MINRESInverseLinearOperator(INDEFINITE, maxiter=4) @ B[:, 0]
    expected, _ = minres(INDEFINITE, B[:, 0], maxiter=4, rtol=1e-10)
    np.testing.assert_allclose(x, expected, rtol=1e-10)


def test_the_last_allowed_iteration_may_converge():
    A_inv = CGInverseLinearOperator(2 * np.eye(3), maxiter=1)
    A_inv @ np.ones(3)
    assert A_inv.statistics.converged.all()


@each_symmetric
@pytest.mark.parametrize(
    ("spelled", "scipys"),
    [
        ({"max_iter": 3}, {"maxiter": 3}),
        ({"tolerance": 1e-2}, {"rtol": 1e-2}),
        ({"initial_guess": B[:, 1]}, {"x0": B[:, 1]}),
        (
            {"preconditioner": np.diag(1 / np.diag(SPD))},
            {"M": np.diag(1 / SPD.diagonal())},
        ),
        ({"tolerance": None, "max_iter": None}, {}),
    ],
)
def test_spellings(solver, spelled, scipys):
    make, A = SOLVERS[solver]
    x, y = make(A, **spelled) @ B[:, 0], make(A, **scipys) @ B[:, 0]
    np.testing.assert_array_equal(x, y)


def test_tolerance_comes_before_stop_updating_after():
    iterations = []
    for options in (
        {"stop_updating_after": 0.3},
        {"tolerance": 1e-3},
        {"stop_updating_after": 0.3, "tolerance": 1e-3},
        {},
    ):
        A_inv = CGInverseLinearOperator(SPD, **options)
        A_inv @ B[:, 0]
        iterations += A_inv.statistics.iterations.tolist()
    early, late, both, default = iterations
    assert early < late == both < default


@pytest.mark.parametrize("solver", ["CG", "MINRES"])
@pytest.mark.parametrize("option", ["tolerance", "rtol"])
def test_zero_tolerance_does_not_divide_by_zero(solver, option):
    make, _ = SOLVERS[solver]
    A_inv = make(np.eye(3), **{option: 0})
    np.testing.assert_allclose(A_inv @ np.arange(3.0), np.arange(3.0))
    assert A_inv.statistics.converged.all()


def test_atol_stops_early():
    A_inv = CGInverseLinearOperator(SPD, atol=1e-2 * norm(B[:, 0]))
    A_inv @ B[:, 0]
    assert 1e-4 < A_inv.statistics.relative_residuals[0] <= 1e-2
    assert A_inv.statistics.converged.all()


@each_krylov
@pytest.mark.parametrize("convert", [np.asarray, tensor])
def test_warm_start(solver, convert):
    make, A = SOLVERS[solver]
    X = np.linalg.solve(A, B)
    cold, warm = make(A), make(A, x0=convert(X + 1e-6))
    cold @ B
    np.testing.assert_allclose(warm @ B, X, atol=1e-7)
    if solver == "CG":
        assert (warm.statistics.iterations < cold.statistics.iterations).all()
    one = make(A, x0=convert(X[:, 0]))
    one @ B[:, 0]
    assert one.statistics.iterations <= 1
    np.testing.assert_allclose(one @ B, X, atol=1e-7)


def test_warm_start_with_lists_of_tensors():
    A = DiagonalLinearOperator([torch.ones(2, 2), torch.full((3,), 2.0)])
    guess = [torch.ones(2, 2), torch.full((3,), 0.5)]
    A_inv = CGInverseLinearOperator(A, initial_guess=guess)
    A_inv @ torch.ones(7)
    assert A_inv.statistics.iterations == [0]


def test_block_of_guesses_must_fit():
    with pytest.raises(ValueError, match="has 2 columns, the right-hand side 9"):
        CGInverseLinearOperator(SPD, x0=B[:, :2]) @ B


@each_symmetric
def test_callback_sees_iterates_column_after_column(solver):
    make, A = SOLVERS[solver]
    seen, threads = [], set()

    def callback(x):
        seen.append(x.copy())
        threads.add(threading.get_ident())

    A_inv = make(A, callback=callback)
    X = A_inv @ B
    ends = np.cumsum(A_inv.statistics.iterations) - 1
    assert len(seen) == ends[-1] + 1
    np.testing.assert_array_equal(np.array([seen[i] for i in ends]).T, X)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("shift", [0.3, -0.3, torch.tensor(0.3)])
@pytest.mark.parametrize("x0", [None, B[:, 1]])
def test_minres_shift(shift, x0):
    A_inv = MINRESInverseLinearOperator(INDEFINITE, shift=shift, x0=x0)
    expected = np.linalg.solve(INDEFINITE - float(shift) * np.eye(N), B)
    np.testing.assert_allclose(A_inv @ B, expected, atol=1e-7)
    np.testing.assert_allclose(A_inv.T @ B, expected, atol=1e-7)
    assert A_inv.statistics.converged.all()


def test_minres_check_finds_an_asymmetric_operator():
    with pytest.raises(ValueError, match="non-symmetric"):
        MINRESInverseLinearOperator(GENERAL, check=True) @ B[:, 0]


def test_lsmr_damp():
    A_inv = LSMRInverseLinearOperator(GENERAL, damp=0.5, atol=1e-12, maxiter=99)
    expected = np.linalg.solve(GENERAL.T @ GENERAL + 0.25 * np.eye(N), GENERAL.T @ B)
    np.testing.assert_allclose(A_inv @ B, expected, atol=1e-7)
    assert A_inv.statistics.converged.all()
    assert (A_inv.statistics.relative_residuals > 1e-3).all()


@pytest.mark.parametrize("show", [True, False])
def test_show_prints_a_log(show, capsys):
    LSMRInverseLinearOperator(GENERAL, show=show, maxiter=99) @ B
    assert bool(capsys.readouterr().out) == show


@pytest.mark.parametrize(
    ("solver", "options", "error", "message"),
    [
        (
            "CG",
            {"max_iters": 3},
            TypeError,
            "no hyperparameter max_iters. It knows .*M,",
        ),
        ("CG", {"shift": 3}, TypeError, "It knows"),
        ("MINRES", {"atol": 3}, TypeError, "It knows"),
        ("LSMR", {"rtol": 3}, TypeError, "It knows atol, btol, conlim, damp, maxiter"),
        (
            "CG",
            {"tolerance": 1e-3, "rtol": 1e-3},
            ValueError,
            "'rtol' in two spellings",
        ),
        ("CG", {"max_iter": 3, "maxiter": 3}, ValueError, "'maxiter' in two spellings"),
        ("CG", {"rtol": -1.0}, ValueError, "non-negative number as 'rtol'"),
        ("CG", {"rtol": float("nan")}, ValueError, "non-negative number as 'rtol'"),
        ("CG", {"atol": "legacy"}, ValueError, "non-negative number as 'atol'"),
        ("CG", {"max_iter": 0}, ValueError, "positive integer"),
        ("MINRES", {"maxiter": 2.5}, ValueError, "positive integer"),
        ("MINRES", {"shift": "1"}, ValueError, "number as 'shift'"),
        ("CG", {"n_tridiag": 2}, ValueError, "n_tridiag=2.*eigsh"),
        ("CG", {"x0": np.ones(3)}, ValueError, r"shape \(12,\) or \(12, K\)"),
        ("LSMR", {"x0": np.ones(N), "damp": 1.0}, ValueError, "'damp' or 'x0'"),
        ("CG", {"M": np.eye(3)}, ValueError, r"got one of shape \(3, 3\)"),
        ("CG", {"M": np.ones(N)}, ValueError, "DiagonalLinearOperator"),
    ],
)
def test_mistakes_in_hyperparameters(solver, options, error, message):
    make, A = SOLVERS[solver]
    make = getattr(make, "func", make)
    with pytest.raises(error, match=message):
        make(A, **options)


def test_n_tridiag_zero_is_accepted():
    CGInverseLinearOperator(SPD, n_tridiag=0) @ B[:, 0]


# -- limits -------------------------------------------------------------------------


class IllConditioned(DiagonalLinearOperator):
    """A diagonal that no solver inverts within its default limit."""

    def __init__(self):
        super().__init__(torch.logspace(-12, 0, 6).double())


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (partial(CGInverseLinearOperator, rtol=1e-30), "'maxiter'"),
        (partial(LSMRInverseLinearOperator, atol=0, btol=0, conlim=0), "'maxiter'"),
        (partial(LSMRInverseLinearOperator, maxiter=99, atol=0, btol=0), "'conlim'"),
    ],
)
def test_default_limit_warns(make, limit):
    A = Q @ np.diag(np.logspace(-12, 0, N)) @ Q.T
    A_inv = make((A + A.T) / 2)
    with pytest.warns(RuntimeWarning, match=f"default {limit}. Pass a larger"):
        A_inv @ B[:, 0]
    assert not A_inv.statistics.converged.any()


def test_minres_default_limit_warns():
    A = DiagonalLinearOperator(torch.tensor([1.0, -1.0, 1e-9]).double())
    noisy = [1e-6]

    class Noisy(TensorLinearOperator):
        def _apply(self, V):
            noisy[0] *= -1
            return super()._apply(V) * (1 + noisy[0])

    A_inv = MINRESInverseLinearOperator(Noisy(A.to_dense()), rtol=1e-16)
    with pytest.warns(RuntimeWarning, match="MINRES"):
        A_inv @ np.ones(3)
    assert not A_inv.statistics.converged.any()


@pytest.mark.parametrize(
    "make",
    [
        partial(CGInverseLinearOperator, max_iter=2),
        partial(MINRESInverseLinearOperator, maxiter=2),
        partial(LSMRInverseLinearOperator, maxiter=2),
        partial(LSMRInverseLinearOperator, maxiter=99, conlim=2.0),
    ],
)
@pytest.mark.parametrize("columns", [1, 9])
def test_callers_limit_is_silent(make, columns):
    A_inv = make(SPD)
    A_inv @ B[:, :columns]
    assert not A_inv.statistics.converged.any()
    assert f"0 of {columns} columns converged" in repr(A_inv.statistics)


def test_warning_points_to_the_callers_line():
    with pytest.warns(RuntimeWarning) as caught:
        CGInverseLinearOperator(np.diag([1.0, 0.0])) @ np.ones(2)
    assert caught[0].filename == __file__


# -- negative curvature and singular operators --------------------------------------

DTYPES = [np.float64, np.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("diagonal", "b"),
    [
        ((1, -1), (1, 1)),  # p.Ap is exactly zero
        ((1, -1, 2), (1, 1, 1)),  # SciPy's cg reports success
        ((1, -1, 2), (1, 2, 3)),
        ((-1, -2), (1, 1)),
        ((1, 1e-2, -1e-2), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("columns", [1, 8])
def test_negative_curvature_is_an_error(dtype, diagonal, b, columns):
    A_inv = CGInverseLinearOperator(np.diag(diagonal).astype(dtype))
    with pytest.raises(
        LinAlgError,
        match=r"(?s)v\^T A v = -?\d.*times \|\|A\|\|.*A\.damped\(d\).*MINRESInverse",
    ):
        A_inv @ np.outer(b, np.ones(columns)).astype(dtype)


def test_scipys_cg_reports_success_on_an_indefinite_matrix():
    _, info = cg(np.diag([1.0, -1.0, 2.0]), np.ones(3))
    assert info == 0


def test_minres_takes_indefinite_and_consistent_singular_operators():
    A = np.diag([1.0, -1.0, 2.0, 0.0])
    A_inv = MINRESInverseLinearOperator(A)
    np.testing.assert_allclose(A_inv @ [1, 1, 1, 0], [1, -1, 0.5, 0], atol=1e-9)
    assert A_inv.statistics.converged.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(10))
def test_semidefinite_operator_is_not_called_indefinite(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(10, 60, generator=generator, dtype=torch.float64)
    A = OuterProductLinearOperator(torch.ones(10), J.T.float())
    if dtype == np.float64:
        A = OuterProductLinearOperator(torch.ones(10).double(), J.T)
    b = (A @ np.random.default_rng(seed).standard_normal((60, 9))).astype(dtype)
    x = CGInverseLinearOperator(A) @ b
    assert norm(A @ x - b) < 1e-4 * norm(b)
    # Beyond what rounding allows: it may stop, but not call A indefinite.
    CGInverseLinearOperator(A, rtol=0, maxiter=15) @ b
    null = torch.linalg.svd(J)[2][-1].numpy().astype(dtype)
    for v in null, null + b[:, 0] / norm(b[:, 0]):
        A_inv = CGInverseLinearOperator(A)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                A_inv @ v
                complaint = str(caught[0].message)
                assert not A_inv.statistics.converged.any()
            except LinAlgError as error:
                complaint = str(error)
        assert "dd damping" in complaint
        assert "definite" not in complaint


@each_symmetric
@pytest.mark.parametrize("b", [(0, 1), (1, 1)])
def test_inconsistent_system_warns(solver, b):
    make, _ = SOLVERS[solver]
    A_inv = make(np.diag([1.0, 0.0]))
    with pytest.warns(RuntimeWarning, match=r"no solution. Add damping"):
        A_inv @ np.array(b, float)
    assert not A_inv.statistics.converged.any()
    np.testing.assert_allclose(A_inv @ np.array([1.0, 0.0]), [1, 0])


def test_zero_operator_warns():
    with pytest.warns(RuntimeWarning, match="singular"):
        CGInverseLinearOperator(np.zeros((3, 3))) @ np.ones(3)


def test_lsmr_gives_the_pseudo_inverse_of_a_singular_operator():
    A_inv = LSMRInverseLinearOperator(np.diag([2.0, 0.0]))
    np.testing.assert_allclose(A_inv @ np.ones(2), [0.5, 0.0])
    assert A_inv.statistics.converged.all()
    np.testing.assert_allclose(A_inv.statistics.residual_norms, 1.0)


# -- preconditioners ----------------------------------------------------------------

INVERSE_DIAGONAL = 1 / np.linspace(1, 1000, N)
SPREAD = np.diag(1 / INVERSE_DIAGONAL) + SPD
WRAPS = {
    "ours": lambda M: TensorLinearOperator(tensor(M)),
    "diagonal": lambda M: DiagonalLinearOperator(tensor(M).diagonal()),
    "array": np.asarray,
    "tensor": tensor,
    "sparse": scipy.sparse.csr_array,
    "scipy": aslinearoperator,
    "callable": lambda M: lambda V: tensor(M).to(V.dtype) @ V,
    "callable that returns NumPy": lambda M: lambda V: M @ V.numpy(),
}


@each_symmetric
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("columns", [1, 9])
def test_preconditioner(solver, wrap, columns):
    make, _ = SOLVERS[solver]
    M = WRAPS[wrap](np.diag(INVERSE_DIAGONAL))
    plain, preconditioned = make(SPREAD), make(SPREAD, M=M)
    expected = np.linalg.solve(SPREAD, B[:, :columns])
    plain @ B[:, :columns]
    np.testing.assert_allclose(preconditioned @ B[:, :columns], expected, atol=1e-7)
    np.testing.assert_allclose(preconditioned.T @ B[:, :columns], expected, atol=1e-7)
    assert (preconditioned.statistics.iterations < plain.statistics.iterations).all()
    assert preconditioned.statistics.converged.all()


@pytest.mark.parametrize(
    "make", [CGInverseLinearOperator, NeumannInverseLinearOperator]
)
def test_preconditioner_of_another_dtype(make):
    A = TensorLinearOperator(tensor(SPREAD, torch.float32))
    x = make(A, preconditioner=np.diag(INVERSE_DIAGONAL) / 4) @ B.astype(np.float32)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, np.linalg.solve(SPREAD, B), atol=1e-3)


@each_symmetric
@pytest.mark.parametrize("sign", [-1.0, np.diag([1.0] * 6 + [-1.0] * 6)])
def test_indefinite_preconditioner_is_an_error(solver, sign):
    make, _ = SOLVERS[solver]
    with pytest.raises(LinAlgError, match=r"M is not positive .* preconditioner"):
        make(SPD, M=sign * np.eye(N)) @ np.repeat([1.0, 2.0], 6)


def test_callable_preconditioner_must_keep_the_shape():
    with pytest.raises(ValueError, match=r"\(12, 1\) into Tensor of shape \(12,\)"):
        CGInverseLinearOperator(SPD, preconditioner=lambda V: V[:, 0]) @ B[:, 0]


# -- several right-hand sides -------------------------------------------------------


def test_few_products_for_many_columns():
    A = Counting(tensor(SPD))
    A_inv = CGInverseLinearOperator(A)
    A_inv @ np.hstack([B] * 4)
    assert max(A.widths) == 36  # the residual; solves are in blocks of 32
    assert len(A.widths) < 3 * N
    single = Counting(tensor(SPD))
    CGInverseLinearOperator(single) @ B[:, 0]
    assert set(single.widths) == {1}


@pytest.mark.parametrize(("columns", "max_dim"), [(7, N), (8, N - 1)])
def test_solved_one_by_one_where_blocks_do_not_pay(columns, max_dim, monkeypatch):
    monkeypatch.setattr(_krylov, "TOGETHER_MAX_DIM", max_dim)
    A = Counting(tensor(SPD))
    CGInverseLinearOperator(A) @ B[:, :columns]
    assert A.widths[:-1] == [1] * (len(A.widths) - 1)
    assert A.widths[-1] == columns


@each_krylov
def test_columns_agree_with_single_solves(solver):
    make, A = SOLVERS[solver]
    A_inv, before = make(A), threading.active_count()
    X = np.stack([A_inv @ b for b in B.T], axis=1)
    np.testing.assert_allclose(A_inv @ B, X, rtol=1e-7, atol=1e-9)
    assert threading.active_count() == before


def test_no_thread_survives_an_interrupt():
    class Interrupted(Counting):
        def _apply(self, V):
            if len(self.widths) == 3:
                raise KeyboardInterrupt
            return super()._apply(V)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        CGInverseLinearOperator(Interrupted(tensor(SPD))) @ B
    assert threading.active_count() == before


# -- Neumann series -----------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 1, 2, 7])
@pytest.mark.parametrize("P", [None, np.linalg.inv(SPD) @ (GENERAL / 3)])
@pytest.mark.parametrize("wrap", [tensor, np.asarray])
def test_neumann_is_the_truncated_series(terms, P, wrap):
    scale, A = (0.2, GENERAL) if P is None else (0.5, SPD)
    matrix = np.eye(N) if P is None else P
    step = np.eye(N) - scale * matrix @ A
    powers = [np.linalg.matrix_power(step, k) for k in range(terms + 1)]
    expected = scale * sum(powers) @ matrix
    preconditioner = None if P is None else wrap(P)
    A_inv = NeumannInverseLinearOperator(
        wrap(A), terms, scale, preconditioner=preconditioner
    )
    np.testing.assert_allclose(A_inv @ np.eye(N), expected, atol=1e-12)
    np.testing.assert_allclose(A_inv.T @ np.eye(N), expected.T, atol=1e-12)
    assert (A_inv.statistics.iterations == terms).all()
    residuals = norm(np.eye(N) - A @ expected, axis=0)
    np.testing.assert_allclose(A_inv.statistics.residual_norms, residuals, atol=1e-12)


def test_neumann_counts_products():
    A = Counting(tensor(SPD))
    NeumannInverseLinearOperator(A, num_terms=10, scale=0.3) @ B
    assert A.widths == [9] * 11


def test_neumann_with_the_largest_eigenvalue():
    A = TensorLinearOperator(tensor(SPD))
    top = eigsh(A.to_scipy(), k=1, which="LM", return_eigenvectors=False)[0]
    A_inv = NeumannInverseLinearOperator(A, scale=1.0 / top, num_terms=200)
    np.testing.assert_allclose(A_inv @ B, np.linalg.solve(SPD, B), atol=1e-9)


def test_neumann_adjoint_needs_the_preconditioners():
    A_inv = NeumannInverseLinearOperator(SPD, preconditioner=lambda V: V / 6)
    np.testing.assert_allclose(A_inv @ B, np.linalg.solve(SPD, B), atol=1e-6)
    with pytest.raises(TypeError, match=r"adjoint .* not known. Pass an operator"):
        A_inv.adjoint()


@pytest.mark.parametrize("check_nan", [True, False])
def test_neumann_not_finite(check_nan):
    A = TensorLinearOperator(tensor(SPD))
    A_inv = NeumannInverseLinearOperator(A, 2000, check_nan=check_nan)
    with pytest.raises(LinAlgError, match=r"diverges: .* not finite.*1\.99"):
        A_inv @ B


@pytest.mark.parametrize("columns", [1, 9])
def test_neumann_with_a_growing_last_term(columns):
    A_inv = NeumannInverseLinearOperator(SPD, num_terms=20)
    with pytest.raises(
        LinAlgError, match=r"term 20 is .* as large as the first.*1\.99"
    ):
        A_inv @ B[:, :columns]
    with pytest.raises(LinAlgError, match="diverges"):
        NeumannInverseLinearOperator(np.diag([1.0, -0.1]), 50) @ np.ones(2)
    assert A_inv.statistics is None


def test_neumann_with_transient_growth():
    A = np.array([[1.0, -50.0], [0.0, 1.0]]) * 0.5
    x = NeumannInverseLinearOperator(A) @ np.ones(2)
    np.testing.assert_allclose(x, np.linalg.solve(A, np.ones(2)))


def test_neumann_of_a_null_vector_does_not_diverge():
    A_inv = NeumannInverseLinearOperator(np.diag([1.0, 0.0]), num_terms=3)
    np.testing.assert_allclose(A_inv @ np.array([1.0, 1.0]), [1.0, 4.0])
    assert not A_inv.statistics.converged.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_terms": -1}, "num_terms = 0, 1, 2"),
        ({"num_terms": 1.5}, "num_terms"),
        ({"num_terms": float("nan")}, "num_terms"),
        ({"scale": 0.0}, "positive scale"),
        ({"scale": -1.0}, "positive scale.*largest eigenvalue"),
        ({"scale": float("nan")}, "positive scale"),
        ({"scale": float("inf")}, "positive scale"),
        ({"scale": "auto"}, "positive scale"),
    ],
)
def test_mistakes_in_neumann(options, message):
    with pytest.raises(ValueError, match=message):
        NeumannInverseLinearOperator(SPD, **options)


def test_neumann_takes_numpy_and_torch_numbers():
    A_inv = NeumannInverseLinearOperator(SPD, np.int64(60), np.float32(0.25))
    expected = NeumannInverseLinearOperator(SPD, 60, torch.tensor(0.25)) @ B
    np.testing.assert_array_equal(A_inv @ B, expected)
