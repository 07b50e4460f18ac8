import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import references
from cases import find, mlp
from curvlinops import EmpiricalRisk, GGNLinearOperator, GramLinearOperator
from tolerances import assert_close

CHOICE = (
    "mlp-tanh-mse",
    "mlp-1d-output",
    "conv1d",
    "causal-lm",
    "ce-ignore-weights-smoothing",
    "ce-tokens-options",
    "ce-tokens-ignored-batch",
    "bce-sum-weights",
    "mse-ragged",
    "callable",
    "loader",
)


@pytest.mark.parametrize("name", CHOICE)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_has_the_spectrum_of_the_ggn(name: str, cache: str):
    built = find(name).build()
    K = GramLinearOperator(*built, cache=cache)
    expected = torch.linalg.eigvalsh(references.ggn(*built))
    actual = torch.linalg.eigvalsh(K.to_dense())
    count = min(len(actual), len(expected))
    assert_close(actual[-count:], expected[-count:], size=1000)
    rest = torch.cat([actual[:-count], expected[:-count]])
    assert rest.numel() == 0 or rest.abs().max() < 1e-10 * expected[-1]


@pytest.mark.parametrize("name", ["mlp-tanh-mse", "causal-lm", "mse-ragged"])
def test_tangent_kernel(name: str):
    model, loss, params, data = find(name).build()
    J = references.jacobian(model, params, data)
    for K in (
        GramLinearOperator(model, None, params, data),
        GramLinearOperator(model, loss, params, data, weighted=False),
    ):
        v = torch.randn(K.shape[0]).double()
        assert K.shape == (len(J), len(J)) and K.H is K
        for _ in range(5):  # through recording and replay
            assert_close(K @ v, J @ (J.T @ v), size=1000)
        assert_close(K.to_dense(), J @ J.T, size=1000)


def test_large_spectrum_from_a_small_problem():
    torch.manual_seed(0)
    model, data = mlp(4, 50, 2).double(), []
    for n in (3, 1):
        data.append((torch.randn(n, 4).double(), torch.randint(2, (n,))))
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), "*", data)
    K, G = GramLinearOperator(risk), GGNLinearOperator(risk)
    assert K.shape == (8, 8) and G.shape == (352, 352)
    values, vectors = eigsh(K, k=2)
    assert np.allclose(values, eigsh(G, k=2, return_eigenvectors=False))
    # an eigenvector of the GGN from one of the Gram matrix
    u = torch.from_numpy(vectors[:, -1])
    f = torch.cat([model(X) for X, _ in data]).detach()
    p = f.softmax(1)
    Ru = p.sqrt() * (u.view(4, 2) - p.sqrt() * (p.sqrt() * u.view(4, 2)).sum(1, True))
    v = references.jacobian(model, list(model.parameters()), data).T @ Ru.flatten()
    assert_close(G @ v, values[-1] * v, size=1000)


def test_no_known_factor_is_an_error():
    problem = find("generic-huber").build()
    K = GramLinearOperator(*problem)
    with pytest.raises(NotImplementedError, match="no known factor"):
        K @ np.ones(K.shape[0])
    assert GramLinearOperator(*problem, weighted=False).to_dense().any()


def test_wrong_arguments():
    X, y = torch.randn(6, 3), torch.randn(6, 2)
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="needs a loss function"):
        GramLinearOperator(model, None, "*", [(X, y)], weighted=True)
    loader = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match="Gram matrix depends on which data"):
        GramLinearOperator(model, F.mse_loss, "*", loader)
