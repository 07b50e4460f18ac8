"""Traces of functions, and functions times vectors, against dense linear algebra."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm, fractional_matrix_power, sqrtm
from spectra import GUISES, Counting, symmetric

import curvlinops.estimators as est
from curvlinops._random import Probes
from curvlinops.estimators import norm

N = 120
EIGENVALUES = np.r_[np.linspace(0.5, 3, N - 3), 10.0, 20.0, 40.0]
A = symmetric(EIGENVALUES)
INDEFINITE = np.r_[np.linspace(-3, -1, 20), np.linspace(1, 5, N - 20)]
RECTANGULAR = np.random.default_rng(0).standard_normal((90, N))

QUANTITIES = {
    "logdet": (lambda **o: est.logdet(A, **o), np.log(EIGENVALUES).sum()),
    "damped logdet": (
        lambda **o: est.logdet(symmetric(INDEFINITE), 4.0, **o),
        np.log(INDEFINITE + 4).sum(),
    ),
    "effective dimension": (
        lambda **o: est.effective_dimension(A, 1.0, **o),
        (EIGENVALUES / (EIGENVALUES + 1)).sum(),
    ),
    "negative": (
        lambda **o: est.eigenvalue_count(symmetric(INDEFINITE), upper=0, **o),
        20,
    ),
    "inside": (lambda **o: est.eigenvalue_count(A, 9.0, 30.0, **o), 2),
    "nuclear": (
        lambda **o: est.schatten_norm(symmetric(INDEFINITE), 1, **o),
        np.abs(INDEFINITE).sum(),
    ),
    "schatten 4": (
        lambda **o: est.schatten_norm(A, 4, **o),
        np.linalg.norm(EIGENVALUES, 4),
    ),
    "nuclear, rectangular": (
        lambda **o: est.schatten_norm(RECTANGULAR, 1, **o),
        np.linalg.norm(RECTANGULAR, "nuc"),
    ),
    "any": (
        lambda **o: est.trace_of_function(A, np.exp, **o),
        np.exp(EIGENVALUES).sum(),
    ),
}


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_against_dense(name, distribution):
    estimate, exact = QUANTITIES[name]
    if "any" not in name and distribution == "normal":
        pytest.skip("one is enough")
    kind = {"distribution": distribution} if name == "any" else {}
    result = estimate(ncv=40, num_repeats=60, rng=0, return_estimate=True, **kind)
    allowed = 4 * result.standard_error + 2 * result.krylov_error
    assert abs(result.value - exact) < allowed
    assert result.num_samples == 60 and result.krylov_error < 0.05 * exact


def test_unbiased_and_calibrated():
    exact = np.log(EIGENVALUES).sum()
    results = [
        est.logdet(A, ncv=25, num_repeats=8, rng=seed, return_estimate=True)
        for seed in range(200)
    ]
    values = np.array([float(r) for r in results])
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(200)
    inside = [
        low <= exact <= high for low, high in (r.confidence_interval() for r in results)
    ]
    assert 0.90 <= np.mean(inside) <= 0.99


def test_adaptive_and_guises():
    for name, guise in GUISES.items():
        value = est.logdet(guise(A), ncv=20, num_repeats=4, rng=0)
        assert torch.is_tensor(value) == (name in ("tensor", "torch side"))
    result = est.logdet(A, ncv=20, num_repeats=500, until=0.01, return_estimate=True)
    assert result.standard_error < 0.01 * result.value and result.num_samples < 500


def test_rules():
    with pytest.raises(ValueError, match="not finite at -"):
        est.logdet(symmetric(INDEFINITE), rng=0)
    with pytest.raises(ValueError, match="damping is above 0"):
        est.effective_dimension(A, 0.0)
    with pytest.raises(ValueError, match="lower < upper"):
        est.eigenvalue_count(A, 1.0, 1.0)
    with pytest.raises(ValueError, match="p is above 0"):
        est.schatten_norm(A, -1)
    with pytest.raises(ValueError, match="elementwise"):
        est.trace_of_function(A, np.sum)
    with pytest.raises(ValueError, match="level is a probability"):
        est.logdet(A, rng=0, return_estimate=True).confidence_interval(2.0)
    with pytest.raises(ValueError, match="v has shape"):
        est.apply_function(A, np.exp, np.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        est.apply_function(symmetric(INDEFINITE), np.sqrt, np.ones(N))


FUNCTIONS = {
    "sqrt": (np.sqrt, sqrtm),
    "inverse sqrt": (lambda x: x**-0.5, lambda M: fractional_matrix_power(M, -0.5)),
    "exp": (lambda x: np.exp(-x), lambda M: expm(-M)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("guise", GUISES)
def test_function_times_vector(name, guise):
    function, dense = FUNCTIONS[name]
    v = np.random.default_rng(1).standard_normal(N)
    exact = dense(A) @ v
    result = est.apply_function(GUISES[guise](A), function, v, 30, return_estimate=True)
    error = np.linalg.norm(result.numpy() - exact)
    assert error <= 2 * result.krylov_error + 1e-10
    assert error < 1e-3 * np.linalg.norm(exact)
    short = est.apply_function(A, function, v, 100, tol=1e-3, return_estimate=True)
    assert short.num_products < 100 and short.converged
    assert np.linalg.norm(short.numpy() - exact) < 5e-3 * np.linalg.norm(exact)


def test_function_times_special_vectors():
    assert not est.apply_function(A, np.exp, np.zeros(N)).any()
    e = np.linalg.eigh(A)[1][:, 0]
    assert np.allclose(est.apply_function(A, np.sqrt, 2 * e, 5), 2 * np.sqrt(0.5) * e)


def test_few_different_eigenvalues():
    """A Krylov space that ends early adds no eigenvalue at zero."""
    assert np.isclose(est.logdet(2 * np.eye(30), ncv=10, rng=0), 30 * np.log(2))
    B = np.diag(np.repeat([1.0, 4.0], [15, 20]))
    trace = est.trace_of_function(B, lambda x: x**-0.5, ncv=10, rng=0)
    assert np.isclose(trace, 15 + 20 / 2, rtol=0.2)


BOUNDED = {
    "effective dimension": (
        lambda M, **o: est.effective_dimension(M, 1e-5, **o),
        lambda x: x / (x + 1e-5),
    ),
    "logdet": (lambda M, **o: est.logdet(M, 1e-4, **o), lambda x: np.log(x + 1e-4)),
    "count": (lambda M, **o: est.eigenvalue_count(M, 0.01, 0.3, **o), None),
}


@pytest.mark.filterwarnings("ignore:.*too shallow")
@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("ncv", [4, 15])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_brackets_enclose_the_forms_of_the_same_vectors(name, ncv, dtype):
    """Of every run alone: one sample has a Krylov error and no other."""
    estimate, function = BOUNDED[name]
    eigenvalues = np.geomspace(1e-6, 1, 200)
    Q = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 200)))[0]
    M = (Q * eigenvalues @ Q.T).astype(dtype)
    M = (M + M.T) / 2
    values = function(eigenvalues) if function else (eigenvalues >= 0.01) * 1.0
    values = values if function else values * (eigenvalues < 0.3)
    slack = (1e-9 if dtype == np.float64 else 3e-4) * np.abs(values).sum()
    for seed in range(5):
        v = Probes(200, "rademacher", seed).block(0, 1).numpy()[:, 0]
        exact = values @ (Q.T @ v) ** 2
        found = estimate(M, ncv=ncv, num_repeats=1, rng=seed, return_estimate=True)
        assert np.isnan(found.standard_error) and not found.converged
        assert abs(found.value - exact) <= found.krylov_error + slack
        assert found.krylov_error > 0


def test_until_deepens_and_then_is_exact():
    eigenvalues = np.geomspace(1e-8, 1, 400)
    M = symmetric(eigenvalues)
    exact = (eigenvalues / (eigenvalues + 1e-7)).sum()
    options = {"num_repeats": 200, "rng": 0, "return_estimate": True}
    loose = est.effective_dimension(M, 0.01, 10, until=0.1, **options)
    truth = (eigenvalues / (eigenvalues + 0.01)).sum()
    assert loose.converged and loose.num_samples >= 8 and loose.num_products < 400
    assert abs(loose.value - truth) < 0.2 * truth
    assert loose.krylov_error < 0.1 * loose.value
    tight = est.effective_dimension(M, 1e-7, 10, until=1e-4, **options)
    assert np.isclose(tight.value, exact) and tight.error < 1e-6 and tight.seed is None
    assert tight.converged and tight.num_products <= 800


@pytest.mark.parametrize("diagonal", [False, True])
def test_false_precision_is_not_converged(diagonal):
    """On a diagonal matrix signs have no sampling error: all of it is Krylov's."""
    eigenvalues = np.geomspace(1e-12, 1, 200)
    M = np.diag(eigenvalues) if diagonal else symmetric(eigenvalues)
    with pytest.warns(UserWarning, match="logdet: The Krylov spaces are too shallow"):
        result = est.logdet(M, rng=0, return_estimate=True)
    exact = np.log(eigenvalues).sum()
    assert not result.converged and result.krylov_error > 10
    assert abs(result.value - exact) < 10 * result.error
    assert "not converged" in repr(result)


def test_counts_are_intervals():
    g = np.random.default_rng(1)
    bulk = np.r_[1e-4 * g.standard_normal(300), np.geomspace(1, 20, 10)]
    M, exact = symmetric(bulk), (bulk < 0).sum()
    with pytest.warns(UserWarning, match=r"eigenvalue_count.* Have ncv=\d+ steps"):
        result = est.eigenvalue_count(M, upper=0.0, rng=0, return_estimate=True)
    low, high = result.confidence_interval()
    assert not result.converged and low <= exact <= high
    result = est.eigenvalue_count(
        M, upper=0.0, until=0.05, num_repeats=50, rng=0, return_estimate=True
    )
    assert result.converged and result.value == exact and result.krylov_error == 0
    clear = est.eigenvalue_count(M, lower=0.5, rng=0, return_estimate=True)
    assert clear.converged and abs(clear.value - 10) < 4 * clear.error


def test_discontinuous_functions_say_how_far_they_are():
    """Nodes hop over the step: half the steps may give the same by chance."""
    eigenvalues = np.linspace(-1, 1, 300)
    M, options = symmetric(eigenvalues), {"until": 0.1, "return_estimate": True}
    covered = 0
    for seed in range(20):
        result = est.trace_of_function(
            M, lambda x: (x > 0.05) * 1.0, 20, 20, rng=seed, **options
        )
        low, high = result.confidence_interval()
        covered += result.converged and low <= (eigenvalues > 0.05).sum() <= high
    assert covered >= 18


def test_ends_on_an_eigenvalue_are_not_certain():
    """Within rounding of an end, nobody knows on which side an eigenvalue lies."""
    M = symmetric(np.r_[np.zeros(30), np.arange(1.0, 11)])
    with pytest.warns(UserWarning, match="too shallow"):
        result = est.eigenvalue_count(M, upper=0.0, ncv=20, rng=0, return_estimate=True)
    low, high = result.confidence_interval()
    assert low <= 0 and high >= 30 and not result.converged


def test_small_matrices_are_exact():
    D = symmetric(np.arange(1.0, 11))
    for function, exact in (
        (lambda **o: est.logdet(D, **o), np.log(np.arange(1.0, 11)).sum()),
        (
            lambda **o: est.effective_dimension(D, 1.0, **o),
            (np.arange(1, 11) / np.arange(2, 12)).sum(),
        ),
        (lambda **o: est.eigenvalue_count(D, upper=3.5, **o), 3),
        (lambda **o: est.schatten_norm(D, 1, **o), 55),
        (
            lambda **o: est.schatten_norm(RECTANGULAR[:, :7], 1, **o),
            np.linalg.norm(RECTANGULAR[:, :7], "nuc"),
        ),
        (
            lambda **o: est.trace_of_function(D, np.exp, **o),
            np.exp(np.arange(1, 11)).sum(),
        ),
    ):
        result = function(return_estimate=True)
        assert (
            np.isclose(result.value, exact) and result.error == 0 and result.converged
        )
        assert result.num_products <= 12 and result.seed is None


@pytest.mark.parametrize("shape", [(200, 60), (60, 200), (60, 60)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_singular_values_are_not_squared(shape, dtype):
    g = np.random.default_rng(0)
    U, s, V = np.linalg.svd(g.standard_normal(shape), full_matrices=False)
    wide = ((U * np.geomspace(1, 1e-4, len(s))) @ V).astype(dtype)
    condition = est.condition_number(wide, rng=0, return_estimate=True)
    assert np.isclose(condition.value, 1e4, rtol=1e-2)
    assert condition.num_products <= 2 * min(shape) + 3
    assert np.isclose(est.spectral_norm(wide, rng=0), 1, rtol=1e-4)
    low_rank = (U[:, :5] * s[:5] @ V[:5]).astype(dtype)
    assert est.condition_number(low_rank, rng=0) == np.inf
    norm = est.schatten_norm(low_rank, 0.5, num_repeats=40, rng=0, return_estimate=True)
    low, high = norm.confidence_interval(0.999)
    assert low <= np.sqrt(s[:5]).sum() ** 2 <= high


def test_ends_beside_heavier_neighbours():
    """Residuals are small before one eigenvalue beside a thousand others is seen."""
    many = np.repeat([1.0, 2.0], 1000)
    for seed in range(5):
        upper, lower = np.diag(np.r_[many, 2.005]), np.diag(np.r_[many, 0.995])
        assert np.isclose(est.spectral_norm(upper, rng=seed), 2.005, rtol=1e-4)
        condition = est.condition_number(lower, rng=seed)
        assert np.isclose(condition, 2 / 0.995, rtol=1e-4)


def test_norms_of_indefinite_and_zero_matrices():
    eigenvalues = np.r_[-np.geomspace(1e-6, 5, 40), np.geomspace(1e-5, 1, 60)]
    counted = Counting(symmetric(eigenvalues))
    result = est.condition_number(counted, rng=0, return_estimate=True)
    assert np.isclose(result.value, 5e6, rtol=1e-4) and counted.count <= 100
    assert np.isclose(est.spectral_norm(counted, rng=0), 5)
    zero = np.zeros((60, 60))
    assert est.spectral_norm(zero, rng=0) == 0 == est.schatten_norm(zero, 1, rng=0)
    assert est.condition_number(zero, rng=0) == np.inf


def test_norms_that_do_not_fit_into_memory_say_so(monkeypatch):
    """A second look at the last step finds nothing changed: it is no convergence."""
    monkeypatch.setattr(norm, "block_size", lambda *_: 18)
    moved = np.diag(np.r_[np.linspace(0, 1, 300), 1.5])
    for norm_of in (est.condition_number, est.spectral_norm):
        with pytest.raises(RuntimeError, match=r"did not converge.* 2 GiB"):
            norm_of(moved + 1e-3 * np.eye(301), tol=1e-6, rng=0)


def test_complex_functions_and_vectors():
    values, Q = np.linalg.eigh(A)
    found = est.trace_of_function(A, lambda x: np.exp(1j * x), ncv=N, rng=0)
    assert np.isclose(found, np.exp(1j * values).sum())
    found = est.trace_of_function(
        A, lambda x: np.exp(1j * x), 40, 100, rng=0, return_estimate=True
    )
    assert abs(found.value - np.exp(1j * values).sum()) < 4 * found.error
    v = np.random.default_rng(0).standard_normal((N, 2)) @ [1, 1j]
    for function in (np.sqrt, lambda x: np.exp(1j * x)):
        for M in (A, torch.from_numpy(A), A + 0j):
            result = np.asarray(est.apply_function(M, function, v, 60))
            assert np.allclose(result, Q @ (function(values) * (Q.T @ v)))
    real = est.apply_function(torch.from_numpy(A).float(), np.sqrt, v.real, 30)
    assert real.dtype == torch.float32


HARD = {
    "sign": (
        np.r_[
            1e-3 * np.random.default_rng(1).standard_normal(290),
            np.geomspace(1, 50, 10),
        ],
        np.sign,
    ),
    "exp": (
        np.r_[
            1e-3 * np.random.default_rng(1).standard_normal(290),
            np.geomspace(1, 50, 10),
        ],
        lambda x: np.exp(-100 * x),
    ),
    "root": (np.geomspace(1e-12, 1, 200), lambda x: np.sqrt(np.abs(x))),
    "step": (np.linspace(-1, 1, 200), lambda x: (x > 0.3) * 1.0),
    "inverse": (np.geomspace(1e-4, 1, 200), lambda x: 1 / x),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_functions_stop_only_when_they_are_there(name, tol):
    eigenvalues, function = HARD[name]
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(3).standard_normal((n, n)))[0]
    M = Q * eigenvalues @ Q.T
    for seed in range(3):
        v = np.random.default_rng(seed).standard_normal(n)
        exact = Q @ (function(eigenvalues) * (Q.T @ v))
        found = est.apply_function(
            (M + M.T) / 2, function, v, n, tol=tol, return_estimate=True
        )
        error = np.linalg.norm(found.value - exact)
        assert found.converged and error <= tol * np.linalg.norm(exact)
        assert error <= found.krylov_error + 1e-6 * np.linalg.norm(exact)


def test_products_before_the_runs_are_counted():
    B = Counting(A)
    result = est.schatten_norm(B, 1, ncv=10, rng=0, return_estimate=True)
    assert B.count == result.num_products


@pytest.mark.parametrize(
    "estimate",
    [
        lambda A, c: est.trace_of_function(A, np.log, c(50), c(20), rng=0),
        lambda A, c: est.apply_function(A, np.log, np.ones(len(A)), c(200)),
        lambda A, c: est.schatten_norm(A, c(1), c(200), c(20), rng=0),
    ],
    ids=["trace", "apply", "norm"],
)
def test_counts_of_few_bits_do_not_overflow(estimate):
    A = np.diag(1 + np.arange(400) / 100)
    np.testing.assert_allclose(estimate(A, np.uint8), estimate(A, int))
    np.testing.assert_allclose(estimate(A, torch.tensor), estimate(A, int))
