"""Traces of functions, and functions times vectors, against dense linear algebra."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm, fractional_matrix_power, sqrtm
from spectra import GUISES, Counting, symmetric

import curvlinops.estimators as est

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
    allowed = 4 * result.standard_error + 2 * result.truncation_error
    assert abs(result.value - exact) < allowed
    assert result.num_samples == 60 and result.truncation_error < 0.05 * exact


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
    with pytest.raises(ValueError, match="dimension"):
        est.logdet(A, ncv=N + 1)
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
    assert error <= 2 * result.truncation_error + 1e-10
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


def test_products_before_the_runs_are_counted():
    B = Counting(A)
    result = est.schatten_norm(B, 1, ncv=10, rng=0, return_estimate=True)
    assert B.count == result.num_products
