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
from curvlinops._agreement import agree, balanced, matrices_agree, rows_agree
from references import empirical_fisher, ggn, hessian
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


def test_what_is_below_rounding_errors_of_others_is_compared():
    def scales(vectors):
        return [1e12 * vectors[0], torch.tensor([1e-8, 1.0, 1.0]) * vectors[1][:3]]

    assert agrees(lambda p: [p[0], p[1] * (1 + 2 * EPS)], scales)
    assert not agrees(lambda p: [p[0], -p[1]], scales)
    ones = torch.ones(3)
    ones[0] = 1.001
    assert not agrees(lambda p: [p[0], p[1] * ones], scales)


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


class Blocks:
    """A symmetric matrix of blocks, as a function of a list of vectors."""

    def __init__(self, matrix, sizes, noise=None):
        self.matrix, self.sizes, self.noise = matrix, sizes, noise

    def __call__(self, vectors):
        v = torch.cat(vectors)
        product = self.matrix @ v
        if self.noise is not None:  # what sums of large numbers leave over
            product = product + ((self.noise @ v + 1e8) - 1e8 - self.noise @ v)
        return product.split(self.sizes)


def block_diagonal(*scales, coupling=0.0):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 3, generator=generator) for _ in scales]
    matrix = torch.block_diag(
        *(s * (p + p.T) for s, p in zip(scales, parts, strict=True))
    )
    matrix[:3, 3:6] += coupling
    matrix[3:6, :3] += coupling
    return matrix.double()


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (3, 3), (6, 6)])
@pytest.mark.parametrize("scales", [(1, 1, 1), (1, 1e6, 1e12), (1e20, 1, 1e-20)])
def test_matrices_are_compared_in_the_scale_of_each_block(scales, place):
    matrix, like = block_diagonal(*scales), [torch.empty(3).double()] * 3
    eps = torch.finfo(torch.float64).eps
    wrong = matrix.clone()
    i, j = place
    error = 1e-6 * (scales[i // 3] * scales[j // 3]) ** 0.5
    wrong[i, j] += error
    wrong[j, i] = wrong[i, j]
    right = Blocks(matrix, [3, 3, 3])
    assert matrices_agree(right, Blocks(matrix.clone(), [3, 3, 3]), like, eps, 0.75)
    assert not matrices_agree(Blocks(wrong, [3, 3, 3]), right, like, eps, 0.75)


def test_rounding_errors_of_other_blocks_are_no_excuse():
    eps, like = torch.finfo(torch.float64).eps, [torch.empty(3).double()] * 3
    matrix = block_diagonal(1e-4, 1e-4, 1e9)
    noise = torch.zeros(9, 9).double()
    noise[:3, 6:] = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    wrong = matrix.clone()
    wrong[0, 0] *= 1.01
    right = Blocks(matrix, [3, 3, 3], noise)
    assert matrices_agree(right, right, like, eps, 0.75)
    assert not matrices_agree(Blocks(wrong, [3, 3, 3], noise), right, like, eps, 0.75)


def test_outputs_are_compared_in_the_scale_of_each_and_of_each_datum():
    large = torch.tensor([1.0, 1e10, 1.0])
    for outputs in (large.expand(3, 3), large.unsqueeze(1).expand(3, 3)):
        for i, j in ((0, 0), (0, 1), (1, 0), (2, 2)):
            wrong = outputs.clone()
            wrong[i, j] *= 1.01
            assert not rows_agree(wrong, outputs, 1e-4)
            assert rows_agree(wrong, outputs, 0.1)
    assert rows_agree(torch.ones(3), torch.ones(3), 0.0)
    assert rows_agree(torch.ones(0, 2), torch.ones(0, 2), 0.0)
    assert not rows_agree(torch.ones(3, 1), torch.ones(3), 1.0)
    assert not rows_agree(torch.full((3, 1), torch.nan), torch.ones(3, 1), 1.0)


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


# -- models that couple data, in parts whose units are small -------------------------


class Units(nn.Module):
    """Subtracts a mean over the batch, beside something in other units."""

    def __init__(self, kind, ratio):
        super().__init__()
        self.kind, self.ratio = kind, ratio
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 1)
        self.t = nn.Linear(8 if kind == "features" else 4, 1)
        for p in {"zero": self.b, "raw": self.t}.get(kind, nn.Module()).parameters():
            nn.init.zeros_(p)
        if kind == "dead":
            nn.init.constant_(self.a.bias[:3], -100)

    def forward(self, x):
        h = (torch.relu if self.kind == "dead" else torch.tanh)(self.a(x))
        h = self.b(h - h.mean(0))
        if self.kind == "raw":
            return h + self.t(self.ratio * x)
        if self.kind == "features":
            x = torch.cat([self.ratio * x, x - x.mean(0)], 1)
            return torch.cat([h, self.t(x)], 1)
        return torch.cat([h, self.ratio * self.t(x)], 1)


REFERENCES = {
    GGNLinearOperator: ggn,
    HessianLinearOperator: hessian,
    EFLinearOperator: empirical_fisher,
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", ["heads", "zero", "dead", "raw", "features"])
@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [(torch.float32, 1e4), (torch.float32, 1e8), (torch.float64, 1e12)],
)
@pytest.mark.parametrize("sizes", [[14], [6, 5, 7]])
def test_coupled_data_are_seen_in_every_unit(operator, kind, dtype, ratio, sizes):
    torch.manual_seed(0)
    model = Units(kind, ratio).to(dtype)
    data = [
        (
            torch.randn(n, 4, dtype=dtype),
            torch.randn(n, 1 + (kind != "raw"), dtype=dtype),
        )
        for n in sizes
    ]
    args = model, nn.MSELoss(), dict(model.named_parameters()), data
    expected, A = REFERENCES[operator](*args), operator(*args)
    for rows in A.risk.space.slices() * 3:
        block = expected[rows, rows]
        v = torch.zeros(A.shape[1], dtype=dtype)
        v[rows] = torch.linspace(1, 2, len(block), dtype=dtype)
        size = (block.abs() @ v[rows].double()).max()
        error = ((A @ v)[rows].double() - block @ v[rows].double()).abs().max()
        assert error <= 3e4 * torch.finfo(dtype).eps * size
