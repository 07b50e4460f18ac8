"""Trace, diagonal, norm estimators: unbiased, calibrated, exact where they should."""

import warnings

import numpy as np
import pytest
import torch
from spectra import GUISES, Counting, TorchSide, symmetric

import curvlinops.estimators as est

N = 60
RNG = np.random.default_rng(0)
DECAYING = symmetric(1 / np.arange(1, N + 1))
MATRICES = {
    "psd": DECAYING,
    "indefinite": symmetric(np.linspace(-1, 2, N), 1),
    "nonsymmetric": DECAYING + 0.05 * RNG.standard_normal((N, N)),
    "complex": 0.1 * (RNG.standard_normal((N, N)) + 1j * RNG.standard_normal((N, N))),
}
TRACES = {
    "hutchinson": est.hutchinson_trace,
    "hutch++": est.hutchpp_trace,
    "xtrace": est.xtrace,
    "xnystrace": est.xnystrace,
}
DIAGONALS = {"hutchinson": est.hutchinson_diag, "xdiag": est.xdiag}
#: Estimators and the multiple that their number of products must be of.
ALL = {
    est.hutchinson_trace: 1,
    est.hutchpp_trace: 3,
    est.xtrace: 2,
    est.xnystrace: 1,
    est.hutchinson_diag: 1,
    est.xdiag: 2,
    est.hutchinson_squared_fro: 1,
}

#: Estimators and what they estimate.
EXACT = {
    **dict.fromkeys(TRACES.values(), np.trace),
    **dict.fromkeys(DIAGONALS.values(), np.diag),
    est.hutchinson_squared_fro: lambda A: np.linalg.norm(A) ** 2,
    est.stable_rank: lambda A: (np.linalg.norm(A) / np.linalg.norm(A, 2)) ** 2,
}


CASES = [
    (name, kind, distribution)
    for name in TRACES
    for kind in MATRICES
    for distribution in ("rademacher", "normal")
    if kind == "psd" or (name != "xnystrace" and distribution == "rademacher")
]


@pytest.mark.parametrize(("name", "kind", "distribution"), CASES)
def test_trace_is_unbiased_and_calibrated(name, kind, distribution):
    A, exact = MATRICES[kind], np.trace(MATRICES[kind])
    estimates = [
        TRACES[name](A, 24, distribution, rng=seed, return_estimate=True)
        for seed in range(200)
    ]
    values = np.array([e.value for e in estimates])
    z = abs(values.mean() - exact) / (values.std() / np.sqrt(len(values)))
    assert z < 4
    half = [abs(e.confidence_interval()[1] - e.value) for e in estimates]
    most = 1.0 if kind == "complex" else 0.995  # a disc covers more than an interval
    assert 0.90 <= np.mean(abs(values - exact) <= half) <= most
    error = np.sqrt(np.mean([abs(e.standard_error) ** 2 for e in estimates]))
    assert 0.8 < error / values.std() < 1.25
    assert {e.num_products for e in estimates} == {24}


@pytest.mark.parametrize("name", DIAGONALS)
@pytest.mark.parametrize("kind", MATRICES)
def test_diagonal_is_unbiased_and_calibrated(name, kind):
    A = MATRICES[kind]
    exact = np.diag(A)
    estimates = [
        DIAGONALS[name](A, 24, rng=seed, return_estimate=True) for seed in range(200)
    ]
    values = np.array([e.value for e in estimates])
    z = abs(values.mean(0) - exact) / (values.std(0) / np.sqrt(len(values)))
    assert z.max() < 5 and np.sqrt((z**2).mean()) < 1.5
    half = [abs(e.confidence_interval()[1] - e.value) for e in estimates]
    most = 1.0 if kind == "complex" else 0.995
    assert 0.90 <= np.mean(abs(values - exact) <= half) <= most


def test_frobenius_is_unbiased():
    A = MATRICES["complex"][:40]
    values = [est.hutchinson_squared_fro(A, 10, rng=seed) for seed in range(200)]
    exact = np.linalg.norm(A) ** 2
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(200)


@pytest.mark.parametrize("estimator", [*TRACES.values(), *DIAGONALS.values()])
def test_exact_for_low_rank(estimator):
    if estimator in (est.hutchinson_trace, est.hutchinson_diag):
        pytest.skip("knows nothing of rank")
    A = symmetric(np.r_[np.full(5, 3.0), np.zeros(N - 5)])
    exact = np.diag(A) if estimator is est.xdiag else np.trace(A)
    for options in ({}, {"until": 1e-9}):
        value = estimator(A, 24, rng=0, **options)
        assert np.allclose(value, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["hutch++", "xtrace", "xnystrace", "xdiag"])
@pytest.mark.parametrize("dtype", [np.float64, np.complex64])
def test_sketches_may_grow_where_nothing_is_left(name, dtype):
    A = np.diag(np.r_[np.arange(1.0, 9), np.zeros(92)]).astype(dtype)  # exact zeros
    function = {**TRACES, "xdiag": est.xdiag}[name]
    exact = EXACT[function](A)
    for seed in range(20):
        result = function(A, 99, rng=seed, until=1e-5, return_estimate=True)
        assert np.allclose(result.value, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ALL)
def test_every_guise_gives_the_same(estimator):
    values = {
        name: estimator(guise(DECAYING), 12, rng=3) for name, guise in GUISES.items()
    }
    for name, value in values.items():
        assert torch.is_tensor(value) == (name in ("tensor", "torch side")), name
        assert np.allclose(np.asarray(value), values["array"], rtol=1e-12), name
        assert value.dtype in (torch.float64, np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    A = TorchSide(torch.from_numpy(DECAYING).to(dtype))
    value = est.xtrace(A, 24, rng=0)
    assert value.dtype == torch.float32
    assert abs(value - est.xtrace(DECAYING, 24, rng=0)) < 0.2


def test_integers_are_not_truncated():
    A = np.arange(1, 101).reshape(10, 10)
    assert est.hutchinson_trace(np.diag(np.diag(A)), 3, rng=0) == np.trace(A)


@pytest.mark.parametrize("estimator", ALL)
def test_same_seed_same_number_whatever_the_blocks(estimator):
    def value(**options):
        return np.asarray(estimator(DECAYING, 12, **options))

    torch.manual_seed(1)
    first = value()
    torch.manual_seed(1)
    assert (value() == first).all()
    assert (value(rng=4) == value(rng=4)).all()
    assert not np.allclose(value(rng=4), value(rng=5), rtol=1e-14, atol=0)
    assert np.allclose(value(rng=4), value(rng=4, block_size=5))
    rngs = [np.random.default_rng(8), torch.Generator().manual_seed(8)]
    assert all(np.isfinite(value(rng=rng)).all() for rng in rngs)


@pytest.mark.parametrize("estimator", ALL)
def test_products_are_counted(estimator):
    A = Counting(DECAYING)
    A._adjoint = lambda: A
    result = estimator(A, 12, rng=0, return_estimate=True)
    assert A.count == result.num_products == 12
    again = estimator(A, 12, rng=result.seed)
    assert np.array_equal(np.asarray(again), result.numpy())
    assert np.array_equal(np.asarray(result), result.numpy())


@pytest.mark.parametrize("estimator", ALL)
def test_adaptive(estimator):
    A = symmetric(1 / np.arange(1, 401))
    result = estimator(A, 360, rng=0, until=0.2, return_estimate=True)
    norm = np.linalg.norm
    assert norm(result.standard_error) <= 0.2 * norm(result.value)
    assert result.converged and 8 <= result.num_products < 360


@pytest.mark.parametrize("estimator", ALL)
def test_limit_before_the_error(estimator):
    with pytest.warns(UserWarning, match="above until"):
        low = 0.5 if estimator is est.xnystrace else -1
        result = estimator(
            symmetric(np.linspace(low, 1.1, 200)),
            24,
            rng=0,
            until=1e-9,
            return_estimate=True,
        )
    assert not result.converged and result.num_products <= 24


@pytest.mark.parametrize(("estimator", "multiple"), ALL.items())
def test_rules_of_the_number_of_products(estimator, multiple):
    if multiple > 1:
        with pytest.raises(ValueError, match=f"one sample takes {multiple} products"):
            estimator(DECAYING, multiple - 1)
    with pytest.raises(ValueError, match="positive integer"):
        estimator(DECAYING, 0)
    with pytest.raises(TypeError, match="positive integer"):
        estimator(DECAYING, 6.0)


def test_other_rules():
    with pytest.raises(ValueError, match="'rademacher', 'normal', 'sphere'; got 'foo'"):
        est.hutchinson_trace(DECAYING, 3, distribution="foo")
    with pytest.raises(ValueError, match="square"):
        est.hutchinson_trace(DECAYING[:5], 3)
    with pytest.raises(ValueError, match="until"):
        est.hutchinson_trace(DECAYING, 3, until=-1.0)
    with pytest.raises(TypeError, match="has no argument 'sed'"):
        est.hutchinson_trace(DECAYING, 3, sed=1)
    with pytest.raises(ValueError, match="positive semi-definite"):
        est.xnystrace(-DECAYING, 12, rng=0)


def test_nonfinite_product_is_named():
    with pytest.raises(ValueError, match=r"Product 7 with Counting.*NaN"):
        est.hutchinson_trace(Counting(DECAYING, break_at=7), 12, block_size=1)


def test_norms():
    rng = np.random.default_rng(0)
    for A in (rng.standard_normal((40, 70)), symmetric(np.linspace(-3, 1, 50))):
        exact = np.linalg.norm(A, 2)
        result = est.spectral_norm(A, rng=0, return_estimate=True)
        assert np.isclose(result.value, exact, rtol=1e-4) and result.num_products > 0
        condition = est.condition_number(A, rng=0, tol=1e-8)
        assert np.isclose(condition, np.linalg.cond(A), rtol=1e-3)
        rank = est.stable_rank(A, 35, rng=0, return_estimate=True)
        stable = (np.linalg.norm(A) / exact) ** 2
        assert abs(rank.value - stable) < 4 * rank.standard_error + 1e-3
    assert est.condition_number(np.diag([1.0, 1.0, 0.0])) == np.inf
    assert torch.is_tensor(est.spectral_norm(torch.eye(30)))


def test_progress_bar(capsys):
    est.hutchinson_trace(DECAYING, 12, progressbar=True)
    err = capsys.readouterr().err
    assert "hutchinson_trace MatrixLinearOperator on cpu" in err and "12/12" in err


def test_condition_number_of_badly_conditioned_matrices():
    for low in (1e-3, 1e-6, 1e-10):
        A = Counting(symmetric(np.geomspace(low, 1, N)))
        found = est.condition_number(A, rng=0, return_estimate=True)
        assert np.isclose(found.value, 1 / low, rtol=1e-3)
        assert found.num_products == A.count <= N + 2
    for singular in (np.r_[np.zeros(20), np.linspace(1, 2, 40)], np.r_[0, np.ones(9)]):
        assert est.condition_number(symmetric(singular), rng=0) == np.inf
    assert np.isclose(est.condition_number(3 * np.eye(50)), 1)


def test_products_of_norms_are_counted():
    for function in (est.spectral_norm, lambda A, **o: est.stable_rank(A, 20, **o)):
        A = Counting(DECAYING)
        assert function(A, rng=0, return_estimate=True).num_products == A.count
    A = Counting(DECAYING)
    for wrong in ({"num_matvecs": 0}, {"distribution": "foo"}, {"tol": -1.0}):
        with pytest.raises(ValueError):
            est.stable_rank(A, **({"num_matvecs": 9} | wrong))
    assert A.count == 0


def test_errors_of_the_matrix_name_the_product():
    A = Counting(DECAYING, break_at=7, error=RuntimeError("no"))
    with pytest.raises(RuntimeError, match="no") as caught:
        est.hutchinson_trace(A, 12, block_size=1)
    assert caught.value.__notes__ == ["This was product 7."]


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("products", [N, N + 7])
def test_as_many_products_as_columns_are_exact(estimator, products):
    kinds = ["psd"] if estimator is est.xnystrace else MATRICES
    for A in map(MATRICES.get, kinds):
        counted = Counting(A)
        result = estimator(counted, products, return_estimate=True)
        tol = 1e-3 if estimator is est.stable_rank else 1e-13
        assert np.allclose(result.value, EXACT[estimator](A), rtol=tol, atol=0)
        assert result.converged and np.all(result.standard_error == 0)
        if estimator is not est.stable_rank:  # whose spectral norm takes some
            assert counted.count == result.num_products == N and result.seed is None
            assert np.all(result.error == 0)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("estimator", EXACT)
def test_exact_in_few_dimensions(estimator, size):
    A = symmetric(np.arange(1.0, size + 1))
    value = estimator(torch.from_numpy(A), 30)
    tol = 1e-3 if estimator is est.stable_rank else 1e-13
    assert np.allclose(value, EXACT[estimator](A), rtol=tol)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_exact_frobenius_norm_of_rectangles(shape):
    A = Counting(np.random.default_rng(0).standard_normal(shape))
    result = est.hutchinson_squared_fro(A, 80, return_estimate=True)
    assert np.isclose(result.value, np.linalg.norm(A.matrix) ** 2, rtol=1e-13)
    assert A.count == shape[1] and result.error == 0


@pytest.mark.parametrize("estimator", ALL)
def test_until_samples_where_that_suffices_and_multiplies_out_where_not(estimator):
    A = Counting(symmetric(1 / np.arange(1, 201)))
    A._adjoint = lambda: A
    exact = EXACT[estimator](A.matrix)
    for until, limit in ((0.5, 400), (1e-9, 400), (1e-9, 260), (0.5, 200)):
        A.count = 0
        result = estimator(A, limit, rng=0, until=until, return_estimate=True)
        assert A.count == result.num_products <= limit and result.converged
        if result.seed is None:  # nothing is random
            assert np.allclose(result.value, exact, rtol=1e-12) and A.count >= 200
        else:
            assert until == 0.5 and limit == 400 and 0 < A.count < 200


@pytest.mark.parametrize("block_size", [1, 3, 5])
def test_where_until_stops_does_not_depend_on_small_blocks(block_size):
    A = symmetric(1 / np.arange(1, 401))
    options = {"rng": 1, "until": 0.1, "return_estimate": True}
    whole = est.hutchinson_trace(A, 399, **options)
    blocks = est.hutchinson_trace(A, 399, block_size=block_size, **options)
    assert whole.num_samples == blocks.num_samples >= 16
    assert np.isclose(whole.value, blocks.value, rtol=1e-12)


@pytest.mark.parametrize("until", [None, 1e-9])
def test_exact_evaluation_goes_on_after_an_interruption(tmp_path, until):
    A = symmetric(1 / np.arange(1, 101))
    options = {"checkpoint": tmp_path / "c", "block_size": 4, "until": until, "rng": 0}
    limit = 150 if until else 100
    with pytest.raises(ValueError, match="NaN"):
        est.hutchinson_trace(Counting(A, break_at=91), limit, **options)
    rest = Counting(A)
    options["return_estimate"] = True
    result = est.hutchinson_trace(rest, limit, **options)
    del options["checkpoint"]
    whole = est.hutchinson_trace(A, limit, **options)
    assert result.value == whole.value and whole.num_products == limit
    assert result.num_products == limit + 1  # and one for the fingerprint
    assert rest.count < limit - 80


@pytest.mark.parametrize(("estimator", "multiple"), ALL.items())
def test_other_numbers_of_products_are_rounded_down(estimator, multiple):
    below = estimator(DECAYING, 9 * multiple, rng=0, return_estimate=True)
    for extra in range(multiple):
        A = Counting(DECAYING)
        A._adjoint = lambda A=A: A
        result = estimator(A, 9 * multiple + extra, rng=0, return_estimate=True)
        assert A.count == result.num_products == below.num_products == 9 * multiple
        assert np.allclose(result.value, below.value, rtol=1e-12)


@pytest.mark.parametrize("estimator", ALL)
def test_few_samples_have_no_error_and_are_not_converged(estimator):
    multiple = ALL[estimator]
    for samples in (1, 2, 3, 7, 8):
        for options in ({}, {"until": 1e3}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # until is not reached
                result = estimator(
                    DECAYING, multiple * samples, rng=0, return_estimate=True, **options
                )
            assert result.converged == (samples >= 8)
            assert np.isnan(result.standard_error).any() == (samples < 3)


@pytest.mark.parametrize(("size", "products"), [(3, 2), (5, 4), (10, 6), (10, 9)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nystrom_is_unbiased_where_sign_vectors_repeat(size, products, dtype):
    A = symmetric(np.geomspace(1e-2, 1, size)).astype(dtype)
    values = [float(est.xnystrace(A, products, rng=seed)) for seed in range(400)]
    assert abs(np.mean(values) - np.trace(A)) < 4 * np.std(values) / 20
    assert np.std(values) < np.trace(A)


def test_nystrom_of_matrices_at_the_border():
    zero = est.xnystrace(np.zeros((N, N)), 30, rng=0, return_estimate=True)
    assert zero.value == 0 and zero.error == 0
    rng = np.random.default_rng(0)
    skew = rng.standard_normal((N, N))
    skew -= skew.T
    for scale in (1e-3, 1.0):
        with pytest.raises(ValueError, match=r"is not Hermitian\. Use xtrace"):
            est.xnystrace(DECAYING + scale * skew, 20, rng=0)
    with pytest.raises(ValueError, match="negative quadratic forms"):
        est.xnystrace(symmetric(np.linspace(-1, 0.5, N)), 20, rng=0)
    G = rng.standard_normal((N, 5)) + 1j * rng.standard_normal((N, 5))
    value = est.xnystrace(G @ G.conj().T, 20, rng=0)  # complex, of rank 5
    assert value.dtype == np.float64 and np.isclose(value, np.linalg.norm(G) ** 2)


@pytest.mark.parametrize("name", ["xtrace", "xnystrace"])
def test_until_does_not_stop_where_the_rank_is_all_but_exhausted(name):
    A = symmetric(np.r_[np.arange(1.0, 9), np.zeros(92)])
    values = [TRACES[name](A, 99, rng=seed, until=0.02) for seed in range(100)]
    assert np.allclose(values, 36, rtol=0.03)


def test_traces_of_complex_hermitian_matrices():
    rng = np.random.default_rng(0)
    G = rng.standard_normal((N, N)) + 1j * rng.standard_normal((N, N))
    A = G @ G.conj().T
    for name, function in TRACES.items():
        result = function(A, 48, rng=0, return_estimate=True)
        assert abs(result.value.imag) < 1e-12 * result.value.real
        assert abs(result.value.real - np.trace(A).real) < 4 * result.error, name


def test_track_of_small_zero_and_complex_matrices():
    names = ["eigenvalues", "trace", "hutchinson_trace", "squared_fro"]
    D = np.diag([1.0, 2.0, 4.0])
    table = est.track([D, 2 * D], names, rng=0)
    assert np.allclose(table["trace"], [7, 14]) and (table["trace_error"] == 0).all()
    assert np.allclose(table["squared_fro"], [21, 84])
    assert np.allclose(table["eigenvalue_0"], [4, 8])
    assert "eigenvalue_3" not in table.columns and np.isclose(table["overlap"][1], 1)
    zero = est.track([torch.zeros(N, N)], names, k=2)
    assert all(np.isnan(c).all() or (c == 0).all() for c in zero.columns.values())

    upper = torch.triu(torch.ones(80, 80, dtype=torch.complex128), 1)
    hermitian = torch.eye(80, dtype=torch.complex128) + 1j * (upper - upper.mT)
    table = est.track([hermitian, 2 * hermitian], names[1:], rng=0)
    assert table["trace"].dtype == np.float64 and np.allclose(
        table["trace"], [80, 160], atol=4 * table["trace_error"].max()
    )
    exact = torch.linalg.matrix_norm(hermitian).item() ** 2
    assert abs(table["squared_fro"][0] - exact) < 4 * table["squared_fro_error"][0]
    table = est.track([hermitian * (1 + 1j)], ["trace"], num_matvecs=80)
    assert np.allclose(table["trace"], 80 + 80j)


def test_track_takes_functions_of_every_kind():
    functions = {
        "number": lambda A: 3,
        "tensor": lambda A: torch.tensor(2.0),
        "complex": lambda A: 1 + 2j,
        "logdet": lambda A: est.logdet(A, rng=0, return_estimate=True),
    }
    table = est.track([np.diag(np.linspace(1, 2, 20))], functions)
    assert table["number"] == 3 and table["tensor"] == 2 and table["complex"] == 1 + 2j
    exact = np.log(np.linspace(1, 2, 20)).sum()
    assert abs(table["logdet"] - exact) <= 4 * table["logdet_error"] + 1e-9
