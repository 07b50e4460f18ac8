"""Spectral densities against exact spectra: distance, mass, bands, ghosts, results."""

import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import wasserstein_distance
from spectra import GUISES, Counting, symmetric

import curvlinops.estimators as est
from curvlinops.estimators.lanczos import gauss_rules, lanczos
from curvlinops.papyan2020traces import spectrum

N = 300
RNG = np.random.default_rng(0)
#: The five spectra of benchmarks/density_wasserstein.py, smaller.
SPECTRA = {
    "clustered": np.repeat([1.0, 2.0, 5.0], N // 3) + 0.01 * RNG.standard_normal(N),
    "heavy-tailed": RNG.pareto(2.5, N),
    "two outliers": np.r_[np.sqrt(RNG.uniform(0, 1, N - 2)), 20.0, 35.0],
    "indefinite": RNG.standard_normal(N),
    "rank-deficient": np.r_[np.zeros(2 * N // 3), RNG.uniform(1, 3, N // 3)],
}
SPECTRUM = est.lanczos_approximate_spectrum
LOG_SPECTRUM = est.lanczos_approximate_log_spectrum


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("reorthogonalization", ["full", "selective", "none"])
def test_distance_to_the_exact_spectrum(name, reorthogonalization):
    exact = SPECTRA[name]
    result = SPECTRUM(
        symmetric(exact),
        60,
        num_repeats=8,
        rng=0,
        reorthogonalization=reorthogonalization,
    )
    distance = wasserstein_distance(result.nodes.ravel(), exact, result.weights.ravel())
    assert distance < 0.03 * (exact.max() - exact.min())


@pytest.mark.parametrize("kappa", [1.04, 3.0, 100.0])
@pytest.mark.parametrize("ncv", [2, 10, 80])
def test_integrates_to_one(kappa, ncv):
    A = symmetric(SPECTRA["indefinite"])
    for function in (SPECTRUM, LOG_SPECTRUM):
        grid, density = function(A, ncv, 300, 2, kappa, rng=0)
        assert grid.shape == density.shape == (300,) and (density >= 0).all()
        assert np.isclose(trapezoid(density, grid), 1.0, atol=1e-6)


@pytest.mark.parametrize("guise", GUISES)
def test_lives_where_the_matrix_lives(guise):
    A = symmetric(SPECTRA["indefinite"])
    reference = SPECTRUM(A, 10, rng=0, boundaries=(-4.0, 4.0))
    result = SPECTRUM(GUISES[guise](A), 10, rng=0, boundaries=(-4.0, 4.0))
    grid, density = result
    assert torch.is_tensor(grid) == (guise in ("tensor", "torch side"))
    assert np.allclose(np.asarray(density), reference.density, atol=1e-8)
    assert np.array_equal(np.asarray(result), result.numpy())


def test_known_grids():
    A = np.diag([1.0, 2, 3, 5, 6, 10])
    grid, _ = SPECTRUM(A, 5, 1000)
    assert np.allclose(grid[[0, -1]], [0.55, 10.45])
    grid, _ = SPECTRUM(A, 5, boundaries=(0.0, 20.0), margin=0.0)
    assert np.allclose(grid[[0, -1]], [0, 20])
    grid, _ = SPECTRUM(A, 5, boundaries=(None, 20.0))
    assert np.allclose(grid[[0, -1]], [0.05, 20.95])
    grid, _ = LOG_SPECTRUM(A, 5)
    assert np.allclose(np.log(grid[[0, -1]]), [-0.1151, 2.4177], atol=1e-3)
    grid, _ = LOG_SPECTRUM(A, 5, margin=0.0, epsilon=1.0)
    assert np.allclose(grid[[0, -1]], [2, 11])
    grid, _ = LOG_SPECTRUM(A, 5, boundaries=(2.0, 7.0), margin=0.0, epsilon=1.0)
    assert np.allclose(grid[[0, -1]], [3, 8])


def test_width_of_the_kernel():
    A = np.diag(np.repeat([-1.0, 1.0], 30))
    result = SPECTRUM(A, 2, 4001, boundaries=(-1.0, 1.0), margin=4.0, kappa=1e6)
    grid, density = result
    right = grid > 0
    spread = np.average((grid[right] - 1) ** 2, weights=density[right]) ** 0.5
    assert np.isclose(spread, 9 * 2 / 1 / np.sqrt(8 * np.log(1e6)), rtol=0.3)


def test_many_views_of_the_same_runs():
    A = Counting(symmetric(SPECTRA["indefinite"]))
    cached = est.LanczosApproximateSpectrumCached(A, 20, rng=0)
    first = cached.approximate_spectrum(num_repeats=2)
    count = A.count
    assert count == cached.num_products == first.provenance["num_products"]
    narrow = cached.approximate_spectrum(num_repeats=2, kappa=30.0)
    absolute = cached.approximate_abs_spectrum(num_repeats=2)
    assert A.count == count and narrow.density.max() > first.density.max()
    assert np.array_equal(narrow.density, first.smooth(kappa=30.0).density)
    assert absolute.grid[0] > -0.5
    assert np.isclose(trapezoid(absolute.density, absolute.grid), 1)
    more = cached.approximate_spectrum(num_repeats=3)
    assert A.count == count + 20
    assert np.array_equal(more.nodes[:2], first.nodes)
    direct = SPECTRUM(A, 20, num_repeats=3, rng=0)
    assert np.allclose(direct.density, more.density)
    log = est.LanczosApproximateLogSpectrumCached(A, 20, rng=0)
    assert np.allclose(
        log.approximate_log_spectrum(3).density,
        LOG_SPECTRUM(A, 20, num_repeats=3, rng=0).density,
    )
    assert spectrum.lanczos_approximate_spectrum is SPECTRUM


def test_outliers_keep_their_exact_mass():
    exact = SPECTRA["two outliers"]
    result = SPECTRUM(symmetric(exact), 40, num_repeats=4, deflate=2, rng=0)
    assert np.allclose(result.spikes, [35, 20])
    assert result.boundaries[1] < 1.1
    assert np.isclose(trapezoid(result.density, result.grid), 1 - 2 / N)
    distance = wasserstein_distance(
        result.nodes.ravel(), exact[:-2], result.weights.ravel()
    )
    assert distance < 0.02


def test_no_ghosts_in_float32():
    """With orthogonality kept, an eigenvalue found is found once, also in 200 steps."""
    exact = np.r_[np.linspace(0, 1, 500), [5.0, 8.0, 20.0]]
    A = torch.from_numpy(symmetric(exact)).float()
    start = torch.randn(len(exact), 1, generator=torch.Generator().manual_seed(0))
    ghosts = {}
    for choice in ("full", "selective", "none"):
        found = lanczos(A.__matmul__, start, 200, choice)
        nodes, weights = gauss_rules(found.alpha, found.beta)
        assert np.isclose(weights.sum(), 1)
        ghosts[choice] = (nodes > 3).sum() - 3
        if choice != "none":
            basis = found.basis[0].double()
            assert (basis @ basis.T - torch.eye(200)).abs().max() < 1e-3
    assert ghosts["full"] == ghosts["selective"] == 0 < ghosts["none"]


def test_invariant_subspaces_end_the_recurrence():
    result = SPECTRUM(np.eye(30), 10, num_repeats=2, rng=0)
    assert np.isclose(trapezoid(result.density, result.grid), 1)
    start = torch.zeros(6, 1, dtype=torch.float64)
    start[:2] = 1.0
    found = lanczos(torch.diag(torch.arange(6.0).double()).__matmul__, start, 5)
    nodes, weights = gauss_rules(found.alpha, found.beta)
    seen = weights[0] > 1e-12
    assert np.allclose(sorted(nodes[0][seen]), [0, 1])


def test_bands_are_calibrated():
    """95 % bands cover the mean of many runs in 90-99 % of 200 experiments."""
    A = symmetric(SPECTRA["indefinite"][:100])
    runs = est.LanczosApproximateSpectrumCached(A, 8, (-4, 4), rng=0)
    everything = runs.approximate_spectrum(1000, num_points=40, kappa=1.1)
    truth = everything.samples.mean(0)
    covered = []
    for part in np.split(np.arange(1000), 200):
        result = everything.smooth()
        object.__setattr__(result, "nodes", everything.nodes[part])
        object.__setattr__(result, "weights", everything.weights[part])
        low, high = result.band()
        inner = truth > 0.02
        covered.append(((low <= truth) & (truth <= high))[inner].mean())
    assert 0.90 <= np.mean(covered) <= 0.99


def test_adaptive():
    A = symmetric(SPECTRA["indefinite"])
    result = SPECTRUM(A, 20, num_repeats=200, until=0.02, rng=0)
    assert 8 <= len(result.nodes) < 200
    with pytest.warns(UserWarning, match="above until"):
        SPECTRUM(A, 20, num_repeats=9, until=1e-6, rng=0)


def test_save_load_plot(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    A = torch.from_numpy(symmetric(SPECTRA["two outliers"]))
    for function in (SPECTRUM, LOG_SPECTRUM):
        result = function(A, 20, num_repeats=3, deflate=1, rng=5)
        result.save(tmp_path / "density.npz")
        again = est.SpectralDensity.load(tmp_path / "density.npz")
        assert np.array_equal(again.grid, result.grid.numpy())
        assert np.array_equal(again.density, result.density.numpy())
        assert again.provenance == result.provenance
        assert again.provenance["seed"] == 5 and again.provenance["class"] == "Tensor"
        assert {"shape", "dtype", "fingerprint", "versions"} <= again.provenance.keys()
        figure = figures.Figure()
        assert again.plot(figure.add_subplot()).lines


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"ncv": N + 1}, "dimension"),
        ({"ncv": 0}, "positive integer"),
        ({"kappa": 1.0}, "kappa is above 1"),
        ({"num_points": 1}, "num_points"),
        ({"num_repeats": 0}, "num_repeats"),
        ({"margin": -0.1}, "margin"),
        ({"boundaries": (1.0, 0.0)}, "low < high"),
        ({"boundaries": (1.0,)}, "pair"),
        ({"reorthogonalization": "some"}, "'auto', 'full', 'selective', 'none'"),
        ({"deflate": -1}, "deflate"),
        ({"deflate": N}, "deflate"),
    ],
)
def test_rules(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        SPECTRUM(symmetric(SPECTRA["indefinite"]), **({"ncv": 4} | arguments))


def test_nonfinite_product_is_named():
    A = Counting(symmetric(SPECTRA["indefinite"]), break_at=5)
    with pytest.raises(ValueError, match="Product 5 "):
        SPECTRUM(A, 20)


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": 1.0},
        {"num_points": 1},
        {"margin": -1.0},
        {"boundaries": (1.0, 0.0)},
        {"boundaries": (np.nan, 1.0)},
        {"boundaries": 3.0},
        {"boundaries_tol": -1.0},
        {"num_repeats": 0},
    ],
)
def test_rules_come_before_work(settings):
    A = Counting(symmetric(SPECTRA["indefinite"]))
    for function in (SPECTRUM, LOG_SPECTRUM):
        with pytest.raises(ValueError):
            function(A, 5, **settings)
    with pytest.raises(ValueError, match="boundaries of"):
        LOG_SPECTRUM(A, 5, boundaries=(-1.0, 1.0))
    with pytest.raises(ValueError, match="epsilon is above 0"):
        LOG_SPECTRUM(A, 5, epsilon=0.0)
    assert A.count == 0


def test_hermitian_is_needed():
    A = symmetric(SPECTRA["indefinite"])
    for wrong in (A + np.triu(A), np.random.default_rng(0).standard_normal((N, N))):
        with pytest.raises(ValueError, match="needs a Hermitian matrix"):
            SPECTRUM(wrong, 10, rng=0)


def test_few_different_eigenvalues():
    """Steps past an invariant subspace count for nothing, at zero neither."""
    A = np.diag(np.repeat([-1.0, 2.0], [15, 30]))
    runs = est.LanczosApproximateSpectrumCached(A, 10, rng=0)
    assert np.allclose(runs.approximate_abs_spectrum().boundaries, (1, 2))
    assert np.allclose(LOG_SPECTRUM(A, 10, rng=0).boundaries, (1, 2))
    for function in (SPECTRUM, LOG_SPECTRUM):
        result = function(np.zeros((30, 30)), 10, rng=0)
        assert np.isclose(trapezoid(result.density, result.grid), 1)


def test_numbers_of_numpy_and_torch_as_settings(tmp_path):
    A = symmetric(SPECTRA["two outliers"])
    result = SPECTRUM(
        A,
        np.int64(10),
        boundaries=(torch.tensor(0.0), np.float32(36)),
        deflate=np.int64(1),
        num_repeats=np.int64(2),
        rng=np.int64(3),
        checkpoint=tmp_path / "journal",
    )
    result.save(tmp_path / "density.npz")
    again = est.SpectralDensity.load(tmp_path / "density.npz")
    assert again.provenance["ncv"] == 10 and again.boundaries == (0, 36)


def test_result_lets_the_matrix_go():
    A = Counting(symmetric(SPECTRA["indefinite"]))
    result, alive = SPECTRUM(A, 10, rng=0), weakref.ref(A)
    del A
    gc.collect()
    assert alive() is None
    again = pickle.loads(pickle.dumps(result))
    assert np.array_equal(again.density, result.density)
