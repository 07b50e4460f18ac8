"""A risk as functions of one vector: its value, its gradient, its parameters."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from torch import nn
from torch.utils.data import DataLoader

import references
from cases import find
from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    ScalarFunction,
)
from curvlinops.jacobian import JacobianLinearOperator
from tolerances import assert_close

NAMES = ("mlp-tanh-ce", "mlp-perturbed-params", "conv-float32", "mlp-bfloat16",
         "ce-ignored-batch", "ce-tokens-options", "mlp-list-params", "callable",
         "generic-huber")  # fmt: skip


def flat(params):
    values = params.values() if isinstance(params, dict) else params
    return torch.cat([p.detach().flatten() for p in values])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_value_and_gradient(name, cache):
    built = find(name).build()
    risk = EmpiricalRisk(*built, cache=cache)
    dtype = risk.space.dtype
    for _ in range(2):
        value, gradient = risk.loss(), risk.gradient_vector()
        assert value.shape == () and value.dtype == gradient.dtype == dtype
        assert not value.requires_grad and not gradient.requires_grad
        assert_close(value, references.loss(*built), size=100)
        assert_close(gradient, references.gradient(*built), size=100)
        array = risk.gradient_vector(numpy=True)
        assert isinstance(array, np.ndarray) and array.dtype == risk.space.numpy_dtype
        assert np.array_equal(array, gradient.double().numpy().astype(array.dtype))
    vector = risk.parameters_vector()
    assert torch.equal(vector, flat(built[2]))
    array = risk.parameters_vector(numpy=True)
    assert np.array_equal(array, vector.double().numpy().astype(array.dtype))
    vector.zero_()  # is the caller's
    array[:] = 0
    assert torch.equal(risk.parameters_vector(), flat(built[2]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container", ["array", "tensor", "double", "strided"])
def test_parameters_are_written_in_place(name, container):
    built, other = find(name).build(), find(name).build()
    risk = EmpiricalRisk(*built)
    H = HessianLinearOperator(risk)
    x = torch.linspace(-0.5, 0.7, risk.space.dim, dtype=torch.float64)
    before = x.clone()
    H @ np.ones(len(x))
    values = list(risk.params.values())
    given = {
        "array": x.numpy(),
        "tensor": x.to(risk.space.dtype),
        "double": x.clone().requires_grad_(),
        "strided": np.stack([x.numpy(), x.numpy()], axis=1)[:, 0],
    }[container]
    assert risk.set_parameters(given) is None
    assert list(map(id, values)) == list(map(id, risk.params.values()))
    assert torch.equal(x, before)
    moved = x.to(risk.space.dtype)
    assert torch.equal(flat(built[2]), moved)
    params = other[2].values() if isinstance(other[2], dict) else other[2]
    with torch.no_grad():
        for p, part in zip(params, risk.space.split(moved), strict=True):
            p.copy_(part)
    assert_close(risk.loss(), references.loss(*other), size=100)
    assert_close(risk.gradient_vector(), references.gradient(*other), size=100)
    assert_close(H @ torch.ones_like(moved), references.hessian(*other).sum(1), size=99)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones(3), ValueError, r"shape \(\d+,\), got one of shape \(3,\)"),
        (np.ones((2, 2)), ValueError, r"got one of shape \(2, 2\)"),
        (np.ones(3, complex), TypeError, "real numbers"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "real numbers"),
        (["a"], TypeError, "multiplies numbers"),
    ],
)
def test_vectors_that_do_not_fit(x, error, message):
    risk = EmpiricalRisk(*find("mlp-tanh-ce").build())
    before = risk.parameters_vector()
    with pytest.raises(error, match=message):
        risk.set_parameters(x)
    assert torch.equal(risk.parameters_vector(), before)


def test_values_of_a_scalar_function():
    x = torch.tensor([1.0, -2.0]).double()
    f = ScalarFunction(lambda p: (p["x"] ** 3).sum(), {"x": x})
    for scale in (1.0, 2.0):
        f.set_parameters(np.array([1.0, -2.0]) * scale)
        assert_close(f.loss(), (x**3).sum())
        assert_close(f.gradient_vector(), 3 * x**2)


@pytest.mark.parametrize("options", [{"cache": "off"}, {"max_memory": 10**8}], ids=str)
def test_values_of_shuffled_and_of_bounded_data(options):
    model, loss, params, data = find("mlp-tanh-ce").build()
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    pairs = list(zip(X, y, strict=True))
    loader = DataLoader(pairs, batch_size=2, shuffle=True)
    risk = EmpiricalRisk(model, loss, params, loader, **options)
    for _ in range(2):
        assert_close(risk.loss(), references.loss(model, loss, params, data), size=100)
        gradient = references.gradient(model, loss, params, data)
        assert_close(risk.gradient_vector(), gradient, size=100)


def test_a_risk_without_loss_has_no_value():
    model, _, params, data = find("mlp-tanh-ce").build()
    risk = JacobianLinearOperator(model, params, data).risk
    for ask in (risk.loss, risk.gradient_vector):
        with pytest.raises(ValueError, match="without a loss function"):
            ask()
    assert len(risk.parameters_vector()) == risk.space.dim


def test_a_list_of_tensors_is_no_vector():
    risk = EmpiricalRisk(*find("mlp-tanh-ce").build())
    before = risk.parameters_vector()
    with pytest.raises(TypeError, match=r"one vector.*torch\.cat\("):
        risk.set_parameters([p.detach() for p in risk.params.values()])
    risk.set_parameters([*(2 * before)])  # of numbers
    assert torch.equal(risk.parameters_vector(), 2 * before)


def test_a_loss_that_overflows_is_infinite():
    net = nn.Linear(1, 1, bias=False)
    risk = EmpiricalRisk(
        net, nn.MSELoss(), "*", [(torch.ones(2, 1), torch.zeros(2, 1))]
    )
    risk.set_parameters(np.array([1e30]))
    assert float(risk.loss()) == np.inf


# SciPy's minimisers


def separable():
    """Return a convex problem: logistic regression with a penalty, in float64."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = (X @ torch.tensor([1.0, -2.0, 0.5]).double() > 0.1).long()
    net = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return net, nn.CrossEntropyLoss(label_smoothing=0.2), X, y


@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg"])
def test_minimisers_take_an_operator_as_hessian(method):
    net, loss, X, y = separable()
    data = [(X[:20], y[:20]), (X[20:], y[20:])]
    risk = EmpiricalRisk(net, loss, "*", data)

    def value(x):
        risk.set_parameters(x)
        return float(risk.loss())

    def gradient(x):
        risk.set_parameters(x)
        return risk.gradient_vector(numpy=True)

    made = []

    def hessian(x):
        """Return the matrix at x, whatever the parameters are later."""
        values = risk.space.split(torch.from_numpy(x.copy()))
        params = dict(zip(risk.params, values, strict=True))
        made.append(GGNLinearOperator(net, loss, params, data))
        return made[-1]

    x0 = np.full(risk.space.dim, 0.1)
    found = minimize(
        value, x0, jac=gradient, hess=hessian, method=method, options={"gtol": 1e-6}
    )
    dense = minimize(
        value,
        x0,
        jac=gradient,
        hess=lambda x: hessian(x).to_dense().numpy(),
        method=method,
        options={"gtol": 1e-6},
    )
    assert found.success and dense.success and made
    assert_allclose(found.fun, dense.fun, rtol=1e-9)
    assert np.linalg.norm(gradient(found.x)) < 1e-6
    # classes enter by their difference only, so the minimiser is not unique
    W, V = (x[:6].reshape(2, 3) for x in (found.x, dense.x))
    assert_allclose(W[1] - W[0], V[1] - V[0], atol=1e-5)
