import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsmr, svds
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import references
from cases import Problem, find, mlp, problems
from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops.examples.functorch import functorch_jacobian
from tolerances import assert_close

CHOICE = (
    "mlp-tanh-mse",
    "mlp-1d-output",
    "conv1d",
    "causal-lm",
    "lstm",
    "mse-tokens",
    "mlp-perturbed-params",
    "callable",
    "loader",
    "mlp-transposed-param",
)


def jacobian(problem, cls=JacobianLinearOperator, **options):
    model, _, params, data = problem
    return cls(model, params, data, **options)


def dense(problem):
    model, _, params, data = problem
    return references.jacobian(model, params, data)


@pytest.mark.parametrize("name", CHOICE)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_against_dense(name: str, cache: str):
    problem = find(name).build()
    J, expected = jacobian(problem, cache=cache), dense(problem)
    JT = jacobian(problem, TransposedJacobianLinearOperator, cache=cache)
    assert J.shape == expected.shape == JT.shape[::-1]
    V, U = torch.randn(J.shape[1], 4).double(), torch.randn(J.shape[0], 4).double()
    for _ in range(5):  # through recording and replay
        assert_close(J @ V[:, 0], expected @ V[:, 0], size=500)
        assert_close(JT @ U[:, 0], expected.T @ U[:, 0], size=500)
        assert_close(J @ V, expected @ V, size=500)
        assert_close(JT @ U, expected.T @ U, size=500)


def test_against_torch_func():
    model, _, params, data = find("mlp-tanh-ce").build()
    J = JacobianLinearOperator(model, params, data)
    assert_close(J.to_dense(), functorch_jacobian(model, params, data))


def test_each_is_the_adjoint_of_the_other():
    J = jacobian(find("mlp-tanh-mse").build())
    assert type(J.H) is TransposedJacobianLinearOperator
    assert type(J.T.T) is JacobianLinearOperator
    assert J.H.risk is J.risk
    v, u = np.random.default_rng(0).standard_normal((2, sum(J.shape)))
    v, u = v[: J.shape[1]], u[: J.shape[0]]
    assert np.isclose((J @ v) @ u, v @ (J.H @ u))
    assert np.allclose(u @ J, J.T @ u)


def test_lists_of_tensors():
    problem = find("mse-tokens").build()
    J = jacobian(problem)
    model, _, params, data = problem
    shape = torch.Size([6, *model(data[0][0]).shape[1:]])
    assert J.out_shapes == (shape,) and J.H.in_shapes == (shape,)
    v = [torch.randn_like(p) for p in params.values()]
    [Jv] = J @ v
    flat = torch.cat([t.detach().flatten() for t in v])
    assert_close(Jv.flatten(), dense(problem) @ flat, size=100)
    U = [torch.randn(*shape, 2).double()]
    pulled = J.H @ U
    assert [t.shape for t in pulled] == [(*p.shape, 2) for p in params.values()]


@pytest.mark.parametrize("problem", problems("ragged"))
def test_outputs_of_several_shapes(problem: Problem):
    built = problem.build()
    J = jacobian(built)
    assert_close(J.to_dense(), dense(built), size=500)
    assert_close(J.H.to_dense(), dense(built).T, size=500)


def test_scalar_outputs():
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    data = [(torch.randn(1, 3), None), (torch.randn(1, 3), None)]
    J = JacobianLinearOperator(
        lambda p, X: torch.func.functional_call(model, p, (X,)).sum(),
        {n: p.detach() for n, p in model.named_parameters()},
        data,
    )
    assert J.shape == (2, 4) and J.out_shapes == (torch.Size(), torch.Size())
    expected = torch.cat([torch.cat([X, torch.ones(1, 1)], 1) for X, _ in data])
    assert_close(J.to_dense(), expected)
    assert [t.shape for t in J @ [torch.ones(1, 3), torch.ones(1)]] == [(), ()]


def counting(model: nn.Module, calls: list) -> nn.Module:
    model.register_forward_hook(lambda *_: calls.append(None))
    return model


def test_sizes_cost_no_pass_beyond_the_check():
    calls: list = []
    model = counting(mlp(3, 4, 2), calls)
    data = [(torch.randn(n, 3), None) for n in (2, 3)]
    J = JacobianLinearOperator(model, "*", data)
    assert J.shape == (10, 26)
    checked = len(calls)
    assert checked == 4
    J.H, J.T  # noqa: B018
    assert len(calls) == checked
    calls.clear()
    K = JacobianLinearOperator(model, "*", data, check_deterministic=False)
    assert K.shape == (10, 26) and len(calls) == 2
    K @ torch.ones(26)
    K.H @ torch.ones(10)
    assert len(calls) == 2  # the counting pass is recorded


def test_shares_recordings_with_matrices_of_the_same_risk():
    calls: list = []
    model, loss, params, data = find("mlp-tanh-ce").build()
    counting(model, calls)
    risk = EmpiricalRisk(model, loss, params, data)
    calls.clear()
    J, G = JacobianLinearOperator(risk), GGNLinearOperator(risk)
    v = torch.randn(J.shape[1]).double()
    J @ v, G @ v, J.H @ (J @ v)
    assert len(calls) == len(data)


def test_follows_parameters():
    model = mlp(3, 4, 2).double()
    data = [(torch.randn(4, 3).double(), None)]
    J = JacobianLinearOperator(model, "*", data)
    before = J.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.allclose(J.to_dense(), before)
    assert_close(
        J.to_dense(), references.jacobian(model, list(model.parameters()), data)
    )


def test_shuffled_data_is_refused():
    X, y = torch.randn(6, 3), torch.randn(6, 2)
    loader = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
    for cls in (JacobianLinearOperator, TransposedJacobianLinearOperator):
        with pytest.raises(ValueError, match="Jacobian depends on which data"):
            cls(nn.Linear(3, 2), "*", loader)


def test_outputs_that_change_their_number():
    model = nn.Linear(3, 2).double()
    data = [(torch.randn(n, 3).double(), None) for n in (4, 2)]
    J = JacobianLinearOperator(model, "*", data)
    JT = J.H
    for other in ([(torch.randn(5, 3).double(), None)], [*data, data[0]]):
        data[:] = other
        with pytest.raises(ValueError, match=r"had 12 entries.*new operator"):
            J @ torch.ones(8).double()
        with pytest.raises(ValueError, match=r"had 12 entries.*new operator"):
            JT @ torch.ones(12).double()


def test_scipy_takes_it():
    problem = find("mlp-tanh-mse").build()
    J, expected = jacobian(problem), dense(problem).numpy()
    b = np.random.default_rng(0).standard_normal(J.shape[0])
    solution = lsmr(J, b, damp=0.1, atol=1e-12, btol=1e-12, maxiter=500)[0]
    damped = expected.T @ expected + 0.01 * np.eye(J.shape[1])
    assert np.allclose(solution, np.linalg.solve(damped, expected.T @ b))
    v0 = np.ones(min(J.shape))
    top = svds(J, k=2, v0=v0, return_singular_vectors=False)
    assert np.allclose(np.sort(top), np.linalg.svd(expected)[1][[1, 0]])


def test_half_precision():
    model = mlp(3, 4, 2).bfloat16()
    data = [(torch.randn(4, 3).bfloat16(), None)]
    J = JacobianLinearOperator(model, "*", data)
    assert J.dtype == np.float32 and J.torch_dtype == torch.bfloat16
    expected = references.jacobian(model, list(model.parameters()), data)
    assert_close(J.to_dense(), expected, size=50)
    assert_close(J.H.to_dense(), expected.T, torch.bfloat16, size=50)


def test_output_in_another_precision():
    """A model may return float32 from bfloat16 parameters."""
    model = nn.Linear(3, 2).bfloat16()
    data = [(torch.randn(4, 3).bfloat16(), None)]
    J = JacobianLinearOperator(
        lambda p, X: torch.func.functional_call(model, p, (X,)).float(),
        {n: p.detach() for n, p in model.named_parameters()},
        data,
    )
    assert (J @ torch.ones(8).bfloat16()).dtype == torch.bfloat16
    assert_close(J.H.to_dense(), J.to_dense().T)
