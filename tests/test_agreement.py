"""What is wrong about a small part of a product does not hide behind the rest."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)
from curvlinops._agreement import agree, balanced
from tolerances import assert_close

EPS = torch.finfo(torch.float32).eps
OPERATORS = [GGNLinearOperator, HessianLinearOperator, EFLinearOperator]


def scaled(vectors):
    """A linear function of two vectors, whose second product is small."""
    return [3 * vectors[0], 1e-6 * vectors[1]]


def agrees(found, multiply=scaled, exponent=0.75):
    vectors = [torch.linspace(1, 2, 5), torch.linspace(-1, 3, 7)]
    expected = multiply(vectors)
    return agree(found(expected), expected, EPS, exponent, multiply, vectors)


# -- the comparison -----------------------------------------------------------------


def test_equal_products_agree():
    assert agrees(lambda p: [part.clone() for part in p])
    assert agrees(lambda p: [part * (1 + 2 * EPS) for part in p])


def test_errors_in_large_and_in_small_tensors_are_seen():
    assert not agrees(lambda p: [p[0] * 1.001, p[1]])
    assert not agrees(lambda p: [p[0], p[1] * 1.001])
    assert not agrees(lambda p: [p[0], torch.zeros_like(p[1])])
    assert agrees(lambda p: [p[0], p[1] * 1.0001], exponent=0.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_agrees_with_nothing(value):
    assert not agrees(lambda p: [p[0], p[1] + value])
    assert not agrees(lambda p: [p[0] + value, p[1]])


def test_rounding_errors_need_not_agree():
    weights = torch.linspace(0.1, 1.1, 1000)

    def cancels(vectors):
        large = weights.outer(vectors[1])
        return [3 * vectors[0], large.sum(0) - large.cumsum(0)[-1]]

    noise = 1e-4  # of sums of 1000, in single precision
    assert agrees(lambda p: [p[0], p[1] + noise / 10], cancels)
    assert not agrees(lambda p: [p[0], p[1] + 1000 * noise], cancels)


def test_rounding_errors_may_be_small_by_chance():
    def cancels(vectors):
        return [3 * vectors[0], 1e-8 * vectors[1][:1]]

    assert agrees(lambda p: [p[0], -p[1]], cancels)  # below those of the first


def test_rounding_errors_that_are_not_finite_allow_nothing():
    def overflows(vectors):
        large = 4e37 * vectors[0]  # finite sums, unless the vectors are larger
        return [3 * vectors[0], (large.sum() - large.sum()) + 1e-5 * vectors[1]]

    assert not agrees(lambda p: [p[0], p[1] * 1.1], overflows)


def test_empty_tensors_agree():
    assert agrees(
        lambda p: [part.clone() for part in p],
        lambda vectors: [vectors[0], vectors[1][:0]],
    )


def test_balanced_vectors_have_products_of_one_size():
    scales = torch.tensor([2.0, 1e-3, 0.0])
    vectors = [torch.ones(4), torch.ones(3), torch.ones(2)]
    products = [s * v for s, v in zip(scales, vectors, strict=True)]
    first, second, third = balanced(vectors, products)
    assert torch.equal(first, vectors[0])
    assert_close(second, vectors[1] * 2e3, size=1)
    assert torch.equal(third, vectors[2])


# -- routes that would be wrong for parameters of small weight -------------------------


class Sum(nn.Module):
    """A network, and a second one with a small share in the output."""

    def __init__(self, second):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.second, self.head = second, nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x) + 1e-6 * self.second(self.head, x)


def coupling(head, x):
    return head(x - x.mean(0))


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return torch.from_numpy(np.cos(x.detach().numpy()) * g.detach().numpy())

    @staticmethod
    def backward(ctx, h):
        g, x = ctx.saved_tensors
        return h * torch.cos(x), -h * g * torch.sin(x)


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return _Derivative.apply(g, x)


def outside_of_torch(head, x):
    return _Sine.apply(head(x))


def assert_small_part_is_right(operator, model, loss, data, name="head.weight"):
    """Compare many products with those in double precision that keep nothing."""
    exact = copy.deepcopy(model).double()
    wide = [(X.double(), y.double() if y.is_floating_point() else y) for X, y in data]
    plain = operator(exact, loss, dict(exact.named_parameters()), wide, cache="off")
    A = operator(model, loss, dict(model.named_parameters()), data)
    rows = A.risk.space.slices()[A.risk.space.names.index(name)]
    generator = torch.Generator().manual_seed(0)
    for number in range(14):
        v = torch.randn(A.shape[1], generator=generator)
        if number % 2:  # an operand of the small part alone
            v = torch.zeros_like(v).index_copy_(0, torch.arange(len(v))[rows], v[rows])
        expected = (plain @ v.double())[rows]
        assert_close((A @ v)[rows].double(), expected, dtype=torch.float32, size=1e4)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("second", [coupling, outside_of_torch])
@pytest.mark.parametrize("sizes", [[32], [6, 7, 8]])
def test_parameters_of_small_weight_have_right_products(operator, second, sizes):
    torch.manual_seed(0)
    model = Sum(second)
    data = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]
    assert_small_part_is_right(operator, model, nn.CrossEntropyLoss(), data)


def test_batches_whose_coupling_is_hidden_by_an_outlier_are_not_joined():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return self.first(x) + self.head(1e-3 * (x - x.mean(0)).clamp(-1e3, 1e3))

    torch.manual_seed(0)
    X = torch.randn(8, 4)
    X[0] *= 1e5
    data = [(X, torch.randn(8, 3)), (torch.randn(7, 4), torch.randn(7, 3))]
    assert_small_part_is_right(HessianLinearOperator, Centred(), nn.MSELoss(), data)


@pytest.mark.parametrize("operator", OPERATORS)
def test_batches_with_a_weak_coupling_are_not_cut(operator):
    torch.manual_seed(0)
    model = Sum(coupling).double()
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,)))]
    args = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    with pytest.raises(MemoryError, match="two data together"):
        operator(*args, check_deterministic=False, max_memory=10) @ np.ones(66)
