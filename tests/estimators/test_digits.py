"""The Hessian of a network trained on digits: estimators against dense algebra."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import curvlinops.estimators as est

sklearn_datasets = pytest.importorskip("sklearn.datasets")
curvlinops = pytest.importorskip("curvlinops")


@pytest.fixture(scope="module")
def problem():
    """Hessian (float32), GGN, and their eigenvalues."""
    torch.manual_seed(0)
    X, y = sklearn_datasets.load_digits(return_X_y=True)
    X, y = torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    arguments = model, loss, list(model.parameters()), [(X[:900], y[:900])]
    H = curvlinops.HessianLinearOperator(*arguments)
    G = curvlinops.GGNLinearOperator(*arguments)
    spectra = [torch.linalg.eigvalsh(A.to_dense().double()).numpy() for A in (H, G)]
    return H, G, *spectra


def test_top_eigenvalues(problem):
    H, _, exact, _ = problem
    for dtype in (None, np.float64):
        pairs = est.top_eigenpairs(H, 20, rng=0, dtype=dtype)
        assert np.allclose(pairs.values, exact[::-1][:20], rtol=1e-4)
        assert torch.is_tensor(pairs.values) and pairs.values.dtype == torch.float32


def test_traces(problem):
    H, _, exact, _ = problem
    for function, products in ((est.hutchpp_trace, 150), (est.xtrace, 150)):
        result = function(H, products, rng=0, return_estimate=True)
        assert abs(result.value - exact.sum()) < 4 * result.standard_error
        assert result.standard_error < 0.1 * exact.sum()


def test_nystrom_trace_in_single_precision(problem):
    _, G, _, exact = problem
    for products in (30, 200):
        result = est.xnystrace(G, products, rng=0, return_estimate=True)
        assert abs(result.value - exact.sum()) < 4 * result.error
        assert result.error < 0.1 * exact.sum()


def test_track(problem):
    H, G, hessian, ggn = problem
    table = est.track([H, G], ["eigenvalues", "trace", "squared_fro"], k=2, rng=0)
    for row, exact in enumerate((hessian, ggn)):
        top = [table["eigenvalue_0"][row], table["eigenvalue_1"][row]]
        assert np.allclose(top, exact[:-3:-1], rtol=1e-4)
        for name, value in (("trace", exact.sum()), ("squared_fro", (exact**2).sum())):
            assert abs(table[name][row] - value) < 4 * table[f"{name}_error"][row]


def test_effective_dimension(problem):
    _, G, _, exact = problem
    damping = 1e-2
    result = est.effective_dimension(
        G, damping, ncv=60, num_repeats=20, rng=0, return_estimate=True
    )
    truth = (exact / (exact + damping)).sum()
    assert abs(result.value - truth) < 4 * result.standard_error
    assert result.standard_error < 0.1 * truth


@pytest.mark.parametrize("deflate", [0, 5])
def test_density(problem, deflate):
    H, _, exact, _ = problem
    result = est.lanczos_approximate_spectrum(
        H, 60, num_repeats=10, deflate=deflate, rng=0
    )
    nodes = np.r_[result.nodes.ravel(), result.spikes]
    weights = np.r_[
        result.weights.ravel() / len(result.nodes),
        np.full(deflate, 1 / len(exact)),
    ]
    distance = wasserstein_distance(nodes, exact, weights)
    assert distance < 2e-3 * (exact.max() - exact.min())
