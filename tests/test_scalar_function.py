import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    ScalarFunction,
)
from tolerances import assert_close


def energy(params: dict[str, Tensor]) -> Tensor:
    a, b = params["a"], params["b"]
    return (a.tanh() @ b).exp().sum() + a.pow(3).mean() * b.sum()


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(2, 3).double(), "b": torch.randn(3).double()}


def flat_gradient(params: dict[str, Tensor], f=energy) -> Tensor:
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    grads = torch.autograd.grad(f(leaves), list(leaves.values()))
    return torch.cat([g.flatten() for g in grads])


def dense_hessian(params: dict[str, Tensor], f=energy) -> Tensor:
    shapes = [p.shape for p in params.values()]
    sizes = [p.numel() for p in params.values()]

    def flat(theta: Tensor) -> Tensor:
        parts = [t.view(s) for t, s in zip(theta.split(sizes), shapes, strict=True)]
        return f(dict(zip(params, parts, strict=True)))

    theta = torch.cat([p.flatten() for p in params.values()])
    return torch.autograd.functional.hessian(flat, theta)


def test_hessian():
    params = tensors()
    H, dense = (
        HessianLinearOperator(ScalarFunction(energy, params)),
        dense_hessian(params),
    )
    assert H.shape == (9, 9) and H.in_shapes == ((2, 3), (3,))
    v = torch.randn(9).double()
    for _ in range(5):  # through recording and replay
        assert_close(H @ v, dense @ v)
    assert_close(H.to_dense(), dense)
    [lowest] = eigsh(H, k=1, which="SA", return_eigenvectors=False)
    assert np.isclose(lowest, np.linalg.eigvalsh(dense.numpy())[0])
    assert_close(H.block("b").to_dense(), dense[6:, 6:])


def test_gradient_and_value():
    params = tensors()
    grads, value = ScalarFunction(energy, params).gradient_and_loss()
    assert [g.shape for g in grads] == [(2, 3), (3,)]
    assert_close(torch.cat([g.flatten() for g in grads]), flat_gradient(params))
    assert_close(value, energy(params))


def test_jacobian_and_empirical_fisher_are_those_of_the_gradient():
    params = tensors()
    f, g = ScalarFunction(energy, params), flat_gradient(params)
    J = JacobianLinearOperator(f)
    assert J.shape == (1, 9) and J.out_shapes == ((),)
    assert_close(J.to_dense(), g.unsqueeze(0))
    assert_close(J.H.to_dense(), g.unsqueeze(1))
    assert_close(EFLinearOperator(f).to_dense(), torch.outer(g, g))
    assert_close(GramLinearOperator(f, weighted=False).to_dense(), (g @ g).view(1, 1))


@pytest.mark.parametrize(
    "build",
    [
        GGNLinearOperator,
        GGNDiagonalLinearOperator,
        GramLinearOperator,
        FisherMCLinearOperator,
    ],
)
def test_there_is_no_ggn(build):
    A = build(ScalarFunction(energy, tensors()))
    with pytest.raises(NotImplementedError, match="has no loss apart from a model"):
        A @ torch.ones(A.shape[1]).double()


def test_follows_parameters_and_leaves_them_alone():
    params = tensors()
    before = {n: p.clone() for n, p in params.items()}
    H = HessianLinearOperator(ScalarFunction(energy, params))
    H.to_dense()
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    assert not any(p.requires_grad or p.grad is not None for p in params.values())
    params["b"].mul_(2)
    assert_close(H.to_dense(), dense_hessian(params))


def test_linear_function():
    f = ScalarFunction(lambda p: p["b"], {"b": torch.tensor(2.0)})
    assert f.gradient_and_loss() == ([torch.tensor(1.0)], torch.tensor(2.0))
    assert not HessianLinearOperator(f).to_dense().any()


def residual(params: dict[str, Tensor]) -> Tensor:
    """Compute a physics-informed loss: u'' = -u at some points."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.linspace(0, 1, 5).double().unsqueeze(1).requires_grad_()
    u = torch.func.functional_call(net, params, (x,))
    [du] = torch.autograd.grad(u.sum(), x, create_graph=True)
    [ddu] = torch.autograd.grad(du.sum(), x, create_graph=True)
    return (ddu + u).square().mean()


def test_derivatives_inside():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    H = HessianLinearOperator(ScalarFunction(residual, params))
    assert_close(H.to_dense(), dense_hessian(params, residual), size=500)


def test_pickles_and_copies():
    f = ScalarFunction(energy, tensors())
    H = HessianLinearOperator(f)
    expected = H.to_dense()
    for twin in (pickle.loads(pickle.dumps(H)), copy.copy(H), copy.deepcopy(H)):
        assert isinstance(twin.risk, ScalarFunction)
        assert_close(twin.to_dense(), expected)
    local = HessianLinearOperator(ScalarFunction(lambda p: energy(p), tensors()))
    with pytest.raises(pickle.PicklingError, match="model_func"):
        pickle.dumps(local)


def test_verifies():
    report = HessianLinearOperator(ScalarFunction(energy, tensors())).verify()
    assert report.ok, report


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda p: p["a"], TypeError, r"0-d tensor, got one of shape \(2, 3\).*sum"),
        (lambda p: p["b"].sum().item(), TypeError, "0-d tensor, got float.*item"),
        (lambda p: p["b"].sum().detach(), ValueError, "does not depend"),
        (lambda p: p["b"].sum() * float("nan"), ValueError, "not finite"),
        (lambda p: energy(p) * torch.rand(()), ValueError, "random"),
        ("f", TypeError, "callable.*got str"),
    ],
)
def test_wrong_functions(f, error, message):
    with pytest.raises(error, match=message):
        ScalarFunction(f, tensors())


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [([torch.ones(2)], TypeError, "dict"), ({}, ValueError, "empty"),
     (torch.ones(2), TypeError, "dict"), ("b", TypeError, "dict")],
)  # fmt: skip
def test_wrong_parameters(params, error, message):
    with pytest.raises(error, match=message):
        ScalarFunction(energy, params)


def test_other_arguments_beside_it():
    with pytest.raises(TypeError, match="already has"):
        HessianLinearOperator(ScalarFunction(energy, tensors()), None, tensors())
    assert issubclass(ScalarFunction, EmpiricalRisk)
