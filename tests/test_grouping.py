"""Very many tiny batches: nothing grows faster than their number, and few are made."""

import sys

import pytest
import torch
from torch import nn

import references
from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
)
from curvlinops._grouping import LEAST_BATCHES
from tolerances import assert_close

NUMBER = LEAST_BATCHES + 40


def model(*before):
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*before, *layers).double()


def batches(number=NUMBER, sizes=(1, 2, 1)):
    generator = torch.Generator().manual_seed(1)
    data = []
    for i in range(number):
        n = sizes[i % len(sizes)]
        X = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        data.append((X, torch.randint(3, (n,), generator=generator)))
    return data


def problem(net=None, data=None, loss=None):
    net = net or model()
    loss = loss or nn.CrossEntropyLoss()
    return net, loss, dict(net.named_parameters()), data or batches()


def groups(A):
    return A.risk._grouping.groups


def calls(work):
    """Count the calls of functions, Python's and C's, that some work takes."""
    count = 0

    def see(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


# -- how work grows ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cache": 10**9}], ids=["grouped", "single"])
@pytest.mark.parametrize(
    "operator", [GGNLinearOperator, HessianLinearOperator, EFLinearOperator]
)
def test_calls_of_every_product_are_linear_in_the_number_of_batches(operator, options):
    numbers = []
    for number in (300, 600):
        args = problem(data=batches(number, sizes=(2,)))
        A = operator(*args, check_deterministic=False, **options)
        v = torch.ones(A.shape[1], dtype=torch.float64)
        numbers.append([calls(lambda A=A, v=v: A @ v) for _ in range(4)])
        assert (groups(A) is not None) == (not options)
    small, large = numbers
    for few, many in zip(small, large, strict=True):
        assert many < 2.15 * few + 5000  # four times as many if it were quadratic


def test_few_calls_remain_for_every_batch_of_a_first_product():
    def first(number):
        args = problem(data=batches(number, sizes=(2,)))
        A = GGNLinearOperator(*args, check_deterministic=False)
        v = torch.ones(A.shape[1], dtype=torch.float64)
        return calls(lambda: A @ v)

    one_by_one = GGNLinearOperator(*problem(), check_deterministic=False, cache=10**9)
    v = torch.ones(one_by_one.shape[1], dtype=torch.float64)
    alone = calls(lambda: one_by_one @ v) / NUMBER
    assert (first(2048) - first(1024)) / 1024 < 0.4 * alone


# -- the same matrices --------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "reference"),
    [
        (GGNLinearOperator, references.ggn),
        (HessianLinearOperator, references.hessian),
        (EFLinearOperator, references.empirical_fisher),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grouped_matrices_are_those_of_all_data(operator, reference, reduction):
    weight = torch.tensor([0.5, 1.0, 2.0]).double()
    loss = nn.CrossEntropyLoss(weight=weight, ignore_index=1, reduction=reduction)
    args = problem(loss=loss)
    A, dense = operator(*args), reference(*args)
    assert_close(A @ torch.eye(len(dense)).double(), dense, size=4096)
    assert groups(A) is not None
    assert len(groups(A).sizes) == 2
    assert len(A.status().batches) == 2


def test_rows_of_a_jacobian_stay_in_the_datas_order():
    net, _, params, data = problem()
    J = JacobianLinearOperator(net, params, data)
    assert groups(J) is not None
    assert J.out_shapes == (torch.Size([sum(len(X) for X, _ in data), 3]),)
    assert_close(J.to_dense(), references.jacobian(net, params, data), size=256)


def test_shapes_of_outputs_are_those_of_the_batches():
    args = problem()
    A = GGNLinearOperator(*args)
    A @ torch.ones(A.shape[1]).double()
    expected = [torch.Size([len(X), 3]) for X, _ in args[3]]
    assert list(A.risk.output_shapes) == expected


def test_kronecker_factors_are_those_of_few_batches():
    net, loss, params, data = problem()
    X, y = (torch.cat(side) for side in zip(*data, strict=True))
    for fisher_type in ("type-2", "empirical"):
        A, B = (
            KFACLinearOperator(net, loss, params, d, fisher_type=fisher_type)
            for d in (data, [(X, y)])
        )
        assert_close(A.to_dense(), B.to_dense(), size=4096)
    assert groups(A) is not None


def test_a_new_value_of_a_parameter_is_seen():
    args = problem()
    A = GGNLinearOperator(*args)
    A @ torch.ones(A.shape[1]).double()
    with torch.no_grad():
        args[0][0].weight.mul_(1.5)
    dense = references.ggn(*args)
    assert_close(A @ torch.eye(len(dense)).double(), dense, size=4096)
    assert groups(A) is not None


def test_the_users_data_and_states_are_left_alone():
    net, loss, params, data = problem()
    copies = [(X.clone(), y.clone()) for X, y in data]
    before = torch.get_rng_state()
    A = GGNLinearOperator(net, loss, params, data)
    A @ torch.ones(A.shape[1]).double()
    assert groups(A) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in net.parameters())
    for (X, y), (X0, y0) in zip(data, copies, strict=True):
        assert torch.equal(X, X0)
        assert torch.equal(y, y0)


# -- batches that stay apart ----------------------------------------------------------


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class HiddenByZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.factor * x.mean(0)


class HiddenTwice(nn.Module):
    """Neither outputs nor first derivatives show that batches are coupled."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + (self.factor - 1) ** 2 * x.mean(0)


class Noted(nn.Module):
    def forward(self, x):
        if len(x) > 8:
            raise ValueError("too many")
        return x


@pytest.mark.parametrize("kind", [Centred, HiddenByZero, HiddenTwice, Noted])
def test_models_that_see_their_batches_get_those_of_the_user(kind):
    net = model(kind())
    args = problem(net)
    for A, dense in (
        (GGNLinearOperator(*args), references.ggn(*args)),
        (HessianLinearOperator(*args), references.hessian(*args)),
    ):
        assert_close(A @ torch.eye(len(dense)).double(), dense, size=4096)
        assert groups(A) is None


def test_hooks_see_the_batches_of_the_user():
    net, seen = model(), set()
    net[0].register_forward_pre_hook(lambda _, x: seen.add(len(x[0])))
    A = GGNLinearOperator(*problem(net))
    A @ torch.ones(A.shape[1]).double()
    assert groups(A) is None
    assert seen == {1, 2}


@pytest.mark.parametrize(
    "options",
    [{"max_memory": 10**8}, {"cache": 10**8}, {"cache": "off"}, {"progressbar": True}],
)
def test_who_asks_for_something_gets_single_batches(options):
    args = problem()
    A = GGNLinearOperator(*args, **options)
    v = torch.ones(A.shape[1]).double()
    assert_close(A @ v, references.ggn(*args) @ v, size=4096)
    assert groups(A) is None


def test_few_batches_and_losses_of_the_users_stay_apart():
    def loss(output, target):
        return nn.functional.cross_entropy(output, target, reduction="sum")

    few = GGNLinearOperator(*problem(data=batches(LEAST_BATCHES - 1)))
    own = GGNLinearOperator(*problem(loss=loss))
    for A in (few, own):
        A @ torch.ones(A.shape[1]).double()
        assert groups(A) is None


def test_an_error_names_the_batch_that_it_is_about():
    data = batches()
    data[200] = data[200][0], torch.full_like(data[200][1], 7)
    with pytest.raises(ValueError, match="neither a class"):
        GGNLinearOperator(*problem(data=data))
