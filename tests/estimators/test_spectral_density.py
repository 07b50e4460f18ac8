"""Spectral densities against exact spectra: distance, mass, bands, ghosts, results."""

import gc
import pickle
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm, wasserstein_distance
from spectra import GUISES, Counting, symmetric

import curvlinops.estimators as est
from curvlinops.estimators import spectrum as runs
from curvlinops.estimators.lanczos import Rule, lanczos
from curvlinops.estimators.smoothing import node_spacing
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
BULK = 1e-3 * RNG.standard_normal(290)
#: Spectra that are hard to smooth, and the scale and steps at which they are.
HARD = {
    "flat": (np.linspace(0.5, 1.5, 300), "linear", 60),
    "bulk and outliers": (np.r_[BULK, np.geomspace(1, 50, 10)], "linear", 20),
    "indefinite": (np.r_[-np.linspace(0.01, 1, 60), np.linspace(0, 1, 60)], "abs", 20),
    "dominating": (np.r_[np.linspace(0.5, 1.5, 199), 1e6], "linear", 20),
    "rank-deficient": (np.r_[np.zeros(150), np.arange(1.0, 151) ** -1.5], "log", 20),
    "twelve decades": (np.geomspace(1e-12, 1, 200), "log", 20),
}


def first(result, count, start=0):
    """Return the density of some of a result's runs."""
    part = slice(start, start + count)
    return replace(result, nodes=result.nodes[part], weights=result.weights[part])


def coverage(result, exact):
    """Return how much of the band holds the spectrum, seen through the same kernels."""
    truth, (low, high) = result.smoothed(exact), result.band()
    inside = (low <= truth * (1 + 1e-9)) & (truth <= high * (1 + 1e-9))
    return inside[truth > 1e-3 * truth.max()].mean()


def hard_density(name, num_repeats, seed):
    """Return a density of one of the hard spectra at its scale."""
    exact, scale, ncv = HARD[name]
    sizes = exact if scale == "linear" else abs(exact)
    runs = est.LanczosApproximateSpectrumCached(
        np.diag(exact), ncv, (exact.min(), exact.max()), rng=seed
    )
    result = runs.approximate_spectrum(num_repeats, 60)
    kappa = 1.04 if scale == "log" else 3.0
    return result.smooth(
        scale=scale, boundaries=(sizes.min(), sizes.max()), kappa=kappa
    )


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("bases", [1, 0])
def test_distance_to_the_exact_spectrum(name, bases, monkeypatch):
    if not bases:  # fit into memory: the recurrence alone
        monkeypatch.setattr(runs, "block_size", lambda run, ncv: 0)
    exact = SPECTRA[name]
    result = SPECTRUM(
        symmetric(exact),
        60,
        num_repeats=8,
        rng=0,
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
    arrays = [grid, density, result.standard_error, *result.band(), result.samples]
    arrays += [result.nodes, result.weights, result.spikes, result.smoothed([1.0])]
    for array in arrays:
        assert torch.is_tensor(array) == (guise in ("tensor", "torch side"))
        assert array.dtype == grid.dtype
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
    settings = {"boundaries": (-1.0, 1.0), "margin": 4.0, "kappa": 1e6}
    grid, density = SPECTRUM(A, 2, 4001, **settings, min_width=0)
    right = grid > 0
    spread = np.average((grid[right] - 1) ** 2, weights=density[right]) ** 0.5
    assert np.isclose(spread, 9 * 2 / 1 / np.sqrt(8 * np.log(1e6)), rtol=0.3)


@pytest.mark.parametrize("min_width", [0, 0.4])
@pytest.mark.parametrize("function", [SPECTRUM, LOG_SPECTRUM])
def test_published_kernel_and_least_width(function, min_width):
    A = np.diag(np.linspace(3.0, 8.0, 40))
    grid, density = result = function(
        A, 10, 4001, 2, 3.0, margin=0.2, rng=0, min_width=min_width
    )
    log = result.scale == "log"
    points = np.log(grid) if log else grid
    nodes = np.log(result.nodes + result.epsilon) if log else result.nodes
    width = (points[-1] - points[0]) / 9 / np.sqrt(8 * np.log(3.0))
    kernels = norm.pdf(points, nodes[:, :, None], max(width, min_width))
    # Kernels at the ends of the grid are cut off and scaled up, that is all.
    ends = norm.cdf(points[[0, -1]], nodes[:, :, None], max(width, min_width))
    direct = kernels / np.diff(ends)
    direct = (direct * result.weights[:, :, None]).sum(1).mean(0)
    direct = direct / grid if log else direct
    assert np.allclose(density[1:-1], direct[1:-1], rtol=1e-3)


def test_spacing_is_the_distance_of_nodes_that_have_not_converged():
    nodes = np.cos(np.pi * (np.arange(40) + 0.5) / 40)  # Gauss-Chebyshev
    x, spacing = node_spacing(nodes, np.full(40, 1 / 40))
    inner = slice(8, 32)
    assert np.allclose(spacing[inner], np.gradient(x)[inner], rtol=0.05)
    exact = np.r_[np.linspace(-1, 1, 200), 20.0, 50.0]
    result = SPECTRUM(symmetric(exact), 30, num_repeats=2, rng=0)
    assert (result.spacing([20.0, 50.0]) < 1e-9).all()
    assert 0.06 < result.spacing(0.0) < 0.18
    assert (result.smooth(min_width=0).spacing(exact) == 0).all()
    small = SPECTRUM(np.diag(np.arange(1.0, 13)), 12, rng=0)
    assert (small.spacing([1.0, 6.5]) == 0).all()  # nodes are the eigenvalues


def test_spacing_by_the_eigenvectors_of_the_tridiagonal_matrix():
    rng = np.random.default_rng(0)
    off = rng.uniform(0.5, 1, 7)
    T = np.diag(rng.standard_normal(8)) + np.diag(off, 1) + np.diag(off, -1)
    nodes, vectors = np.linalg.eigh(T)
    last = vectors[-1] ** 2
    expected = np.zeros(8)
    for j in range(8):
        others = np.arange(8) != j
        sums = (last[others] / last[j] / (nodes[j] - nodes[others]) ** 2).sum()
        neighbours = [nodes[k] for k in (j - 1, j + 1) if 0 <= k < 8]
        gap = max(abs(nodes[j] - neighbour) for neighbour in neighbours)
        expected[j] = min(np.pi / np.sqrt(3 * sums), gap)
    raised = [max(expected - abs(nodes - node) / 4) for node in nodes]
    assert np.allclose(node_spacing(nodes, vectors[0] ** 2)[1], raised)


def test_kernel_on_the_logarithmic_scale():
    """Smoothed by the spacing, folded at zero, smoothed in the logarithm."""
    eigenvalue = 2e-3
    result = hard_density("twelve decades", 2, seed=0)
    result = result.smooth(margin=2.0, num_points=300)
    spacing = result.spacing(eigenvalue)
    assert spacing > eigenvalue
    normal = np.linspace(-6, 6, 40001)
    centers = np.log(abs(eigenvalue + spacing * normal) + result.epsilon)
    ends = np.log(result.boundaries[1] + result.epsilon) - np.log(result.epsilon)
    width = 5 * ends / 19 / np.sqrt(8 * np.log(1.04))
    points = np.log(result.grid[50:-50:10])
    kernels = norm.pdf(points[:, None], centers, width)
    direct = trapezoid(kernels * norm.pdf(normal), normal) / result.grid[50:-50:10]
    found = 200 * result.smoothed([eigenvalue])[50:-50:10]
    assert np.allclose(found, direct, rtol=0.02)


def test_absolute_values_are_folded():
    result = hard_density("indefinite", 2, seed=0)
    wide = {"min_width": 0.4, "margin": 0.0, "num_points": 2001}
    absolute = result.smooth(boundaries=(0.0, 3.0), **wide)
    signed = result.smooth(scale="linear", boundaries=(-3.0, 3.0), **wide)
    folded = signed.density[1000:] + signed.density[1000::-1]
    inner = slice(1, 1000)
    half = absolute.density[2:2000:2]  # its grid is twice as fine
    assert np.allclose(half, folded[inner], rtol=1e-3)


def test_many_views_of_the_same_runs():
    A = Counting(symmetric(SPECTRA["indefinite"]))
    cached = est.LanczosApproximateSpectrumCached(A, 20, rng=0)
    before = cached.approximate_spectrum(num_repeats=2, min_width=0)
    count = A.count
    assert count == cached.num_products == before.provenance["num_products"]
    narrow = cached.approximate_spectrum(num_repeats=2, kappa=30.0, min_width=0)
    absolute = cached.approximate_abs_spectrum(num_repeats=2)
    assert A.count == count and narrow.density.max() > before.density.max()
    assert np.array_equal(narrow.density, before.smooth(kappa=30.0).density)
    assert absolute.grid[0] >= 0
    assert np.isclose(trapezoid(absolute.density, absolute.grid), 1)
    more = cached.approximate_spectrum(num_repeats=3)
    assert A.count == count + 20
    assert np.array_equal(more.nodes[:2], before.nodes)
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


@pytest.mark.parametrize("name", SPECTRA)
def test_deflation_beside_clusters(name):
    """Small remainders of a step must not lead back to what was taken out."""
    result = SPECTRUM(symmetric(SPECTRA[name]), 100, num_repeats=4, deflate=2, rng=0)
    exact = SPECTRA[name][np.argsort(-np.abs(SPECTRA[name]))]
    assert np.allclose(np.abs(result.spikes), np.abs(exact[:2]))
    distance = wasserstein_distance(
        result.nodes.ravel(), exact[2:], result.weights.ravel()
    )
    assert distance < 0.03 * np.ptp(exact)


def test_no_ghosts_in_float32():
    """With orthogonality kept, an eigenvalue found is found once, also in 200 steps."""
    exact = np.r_[np.linspace(0, 1, 500), [5.0, 8.0, 20.0]]
    A = torch.from_numpy(symmetric(exact)).float()
    start = torch.randn(len(exact), 1, generator=torch.Generator().manual_seed(0))
    ghosts = {}
    for keep in (True, False):
        found = lanczos(A.__matmul__, start, 200, keep)
        rule = Rule.gauss(found.alpha[0], found.beta[0])
        assert np.isclose(rule.weights.sum(), 1)
        ghosts[keep] = (rule.nodes > 3).sum() - 3
        if keep:
            basis = found.basis[0].double()
            assert (basis @ basis.T - torch.eye(200)).abs().max() < 1e-3
    assert ghosts[True] == 0 < ghosts[False]


def test_invariant_subspaces_end_the_recurrence():
    result = SPECTRUM(np.eye(30), 10, num_repeats=2, rng=0)
    assert np.isclose(trapezoid(result.density, result.grid), 1)
    start = torch.zeros(6, 1, dtype=torch.float64)
    start[:2] = 1.0
    found = lanczos(torch.diag(torch.arange(6.0).double()).__matmul__, start, 5)
    rule = Rule.gauss(found.alpha[0], found.beta[0])
    assert np.allclose(rule.nodes, [0, 1])


def test_bands_are_calibrated():
    """95 % bands cover the smoothed spectrum in 90-99 % of 200 experiments."""
    exact = SPECTRA["indefinite"][:100]
    runs = est.LanczosApproximateSpectrumCached(symmetric(exact), 8, (-4, 4), rng=0)
    everything = runs.approximate_spectrum(1000, num_points=40, kappa=1.1)
    covered = [coverage(first(everything, 5, i), exact) for i in range(0, 1000, 5)]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_mean_of_many_runs_is_the_smoothed_spectrum():
    exact = SPECTRA["two outliers"]
    runs = est.LanczosApproximateSpectrumCached(symmetric(exact), 30, rng=0)
    result = runs.approximate_spectrum(100, num_points=80)
    error = abs(result.density - result.smoothed(exact))
    seen = result.density > 1e-3 * result.density.max()
    assert (error[seen] < 5 * result.standard_error[seen]).all()
    spread = result.samples.std(0, ddof=1) / 10
    ratio = spread[seen] / result.standard_error[seen]
    assert 0.7 < np.median(ratio) < 1.3


@pytest.mark.parametrize("num_repeats", [1, 4])
@pytest.mark.parametrize("share", [1, 5, 48])
def test_band_is_exact_for_eigenvalues_far_from_others(share, num_repeats):
    """Also for one run, where nearly all eigenvalues are, and for single ones."""
    rng, dim = np.random.default_rng(share), 50
    covered = []
    for _ in range(600):
        squares = rng.standard_normal((num_repeats, dim)) ** 2
        part = squares[:, :share].sum(1) / squares.sum(1)
        result = est.SpectralDensity(
            nodes=np.tile([0.0, 1.0], (num_repeats, 1)),
            weights=np.stack([part, 1 - part], 1),
            boundaries=(0.0, 1.0),
            dim=dim,
            num_points=11,
            min_width=0.03,
            kappa=1e30,
        )
        low, high = result.band()
        truth = result.smoothed(np.r_[np.zeros(share), np.ones(dim - share)])
        covered.append(low[0] <= truth[0] <= high[0])
    assert 0.92 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("name", HARD)
def test_more_runs_do_not_leave_the_truth_behind(name):
    exact = HARD[name][0]
    results = [hard_density(name, 40, seed) for seed in range(3)]
    assert np.mean([coverage(result, exact) for result in results]) > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("num_repeats", [1, 3, 30])
@pytest.mark.parametrize("name", HARD)
def test_coverage_of_the_band(name, num_repeats):
    results = (hard_density(name, num_repeats, seed) for seed in range(64))
    assert np.mean([coverage(result, HARD[name][0]) for result in results]) >= 0.90


@pytest.mark.slow
def test_coverage_without_outliers():
    """Spikes have no part in the start vectors, nor in the band."""
    exact, _, ncv = HARD["bulk and outliers"]
    covered = [
        coverage(
            SPECTRUM(np.diag(exact), ncv, 60, 3, deflate=10, rng=seed), np.sort(BULK)
        )
        for seed in range(64)
    ]
    assert np.mean(covered) >= 0.90


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_of_the_band(level):
    result = hard_density("flat", 1, seed=0)
    with pytest.raises(ValueError, match="level is between 0 and 1"):
        result.band(level)


def test_adaptive():
    A = symmetric(SPECTRA["indefinite"])
    result = SPECTRUM(A, 20, num_repeats=200, until=0.02, rng=0)
    assert 8 <= len(result.nodes) < 200
    with pytest.warns(UserWarning, match="above until"):
        SPECTRUM(A, 20, num_repeats=9, until=1e-6, rng=0)


def test_save_load(tmp_path):
    A = torch.from_numpy(symmetric(SPECTRA["two outliers"]))
    for function in (SPECTRUM, LOG_SPECTRUM):
        result = function(A, 20, num_repeats=3, deflate=1, rng=5)
        path = tmp_path / "density.npz"
        result.smooth(min_width=0.25).save(path)
        assert est.SpectralDensity.load(path).min_width == 0.25
        result.save(path)
        again = est.SpectralDensity.load(path)
        assert np.array_equal(again.grid, result.grid.numpy())
        assert np.array_equal(again.density, result.density.numpy())
        assert np.array_equal(again.band()[1], result.band()[1].numpy())
        assert again.min_width == "spacing" and len(again.spikes) == 1
        assert again.provenance == result.provenance
        assert again.provenance["seed"] == 5 and again.provenance["class"] == "Tensor"
        assert {"shape", "dtype", "fingerprint", "versions"} <= again.provenance.keys()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"ncv": 0}, "positive integer"),
        ({"kappa": 1.0}, "kappa is above 1"),
        ({"num_points": 1}, "num_points"),
        ({"num_repeats": 0}, "num_repeats"),
        ({"margin": -0.1}, "margin"),
        ({"min_width": -0.1}, "min_width is 'spacing' or a number"),
        ({"min_width": "wide"}, "min_width is 'spacing' or a number"),
        ({"boundaries": (1.0, 0.0)}, "low < high"),
        ({"boundaries": (1.0,)}, "pair"),
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
    reflection = est.LanczosApproximateSpectrumCached(np.diag([1.0, -1.0] * 9), 5)
    result = reflection.approximate_abs_spectrum(num_points=101)
    assert np.isclose(trapezoid(result.density, result.grid), 1)
    assert result.boundaries[0] < 1 < result.boundaries[1]
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


def test_precision_of_what_is_kept():
    """What is shown in float32 is smoothed in float64, again and again."""
    A = torch.from_numpy(symmetric(SPECTRA["two outliers"])).float()
    result = SPECTRUM(A, 40, num_repeats=2, rng=0)
    assert result.nodes.dtype == result.density.dtype == torch.float32
    again = result.smooth(kappa=1.1).smooth(kappa=3.0)
    assert torch.equal(again.density, result.density)
    assert torch.equal(again.band()[0], result.band()[0])


def test_repeated_nodes_count_once(monkeypatch):
    """Where no basis fits into memory nodes repeat, up to rounding."""
    nodes, weights = np.array([0.0, 1.0, 3.0, 4.0, 6.0]), np.full(5, 0.2)
    once = node_spacing(nodes, weights)
    nodes = np.r_[nodes, 3.0, 3 + 1e-15]
    twice = node_spacing(nodes, np.r_[weights[:2], 0.1, weights[3:], 0.05, 0.05])
    assert np.allclose(once, twice)
    x, spacing = node_spacing(np.full(3, 2.0), np.full(3, 1 / 3))
    assert x == [2.0] and spacing == [0.0]
    exact = np.r_[np.linspace(0, 1, 300), [5.0, 8.0, 20.0]]
    A = torch.from_numpy(symmetric(exact)).float()
    monkeypatch.setattr(runs, "block_size", lambda run, ncv: 0)
    result = SPECTRUM(A, 120, 200, 3, rng=0)
    assert (result.spacing([5.0, 8.0, 20.0]) < 1e-3).all()
    assert coverage(replace(result, convert=np.asarray), exact) > 0.85
