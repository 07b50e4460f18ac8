"""Losses that keep state: refused, or left as they are."""

import copy
import sys
from collections import Counter, OrderedDict, deque
from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn

import references
from curvlinops import GGNLinearOperator, HessianLinearOperator
from tolerances import assert_close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Centred(nn.Module):
    """Subtracts a running mean of the outputs."""

    def __init__(self, registered=True):
        super().__init__()
        centre = torch.zeros(2, dtype=torch.float64)
        if registered:
            self.register_buffer("centre", centre)
        else:
            self.centre = centre

    def forward(self, f, y):
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(0.1 * f.mean(0))
        return (f - self.centre - y).square().square().mean()


class Queue:
    """Compares with the outputs of earlier batches."""

    def __init__(self):
        self.queue, self.calls = deque(maxlen=3), 0

    def __call__(self, f, y):
        self.calls += 1
        past = sum(self.queue) if self.queue else 0.0
        self.queue.append(f.detach().mean(0))
        return (f - y - past).square().square().mean()


class Counting(nn.Module):
    """Keeps the last value, which nothing depends on."""

    def __init__(self):
        super().__init__()
        self.calls, self.last, self.values = 0, None, []

    def forward(self, f, y):
        value = (f - y).square().square().mean()
        self.calls, self.last = self.calls + 1, value.detach()
        self.values.append(float(value.detach()))
        return value


def problem():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 3)]
    return net, dict(net.named_parameters()), data


@pytest.mark.parametrize("operator", [GGNLinearOperator, HessianLinearOperator])
def test_a_loss_that_changes_its_buffers_is_refused(operator):
    net, params, data = problem()
    loss = Centred()
    with pytest.raises(ValueError, match=r"buffers \['centre'\].*eval"):
        operator(net, loss, params, data)
    assert not loss.centre.any()
    A = operator(net, loss.eval(), params, data)
    dense = references.ggn if operator is GGNLinearOperator else references.hessian
    assert_close(A.to_dense(), dense(net, loss, params, data), size=100)


@pytest.mark.parametrize("make", [lambda: Centred(registered=False), Queue])
def test_a_loss_that_depends_on_its_history_is_refused(make):
    net, params, data = problem()
    loss = make()
    before = copy.deepcopy(vars(loss))
    with pytest.raises(ValueError, match=r"attributes \['.(centre|queue)"):
        GGNLinearOperator(net, loss, params, data)
    assert repr(vars(loss)) == repr(before)


def test_without_the_check_state_is_left_as_it_is():
    net, params, data = problem()
    for loss in (Centred(), Queue()):
        before = repr(getattr(loss, "centre", None)), repr(getattr(loss, "queue", None))
        H = HessianLinearOperator(
            net, loss, params, data, check_deterministic=False, reduction="mean"
        )
        first = H @ torch.ones(8).double()
        assert_close(H @ torch.ones(8).double(), first, size=100)
        H.risk.gradient_and_loss()
        H.verify()
        after = repr(getattr(loss, "centre", None)), repr(getattr(loss, "queue", None))
        assert after == before


def test_what_a_loss_only_notes_is_no_matter():
    net, params, data = problem()
    loss = Counting()
    G = GGNLinearOperator(net, loss, params, data)
    assert_close(G.to_dense(), references.ggn(net, Counting(), params, data), size=100)
    assert (loss.calls, loss.last, loss.values) == (0, None, [])


class Noting(nn.Module):
    """Counts its calls in a buffer, and has a buffer that is not used yet."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("unused", torch.tensor([float("nan"), 1.0]))
        self.values, self.sizes = OrderedDict(), Counter()

    def forward(self, f, y):
        self.calls += 1
        self.values[int(self.calls)] = f.detach()
        self.sizes[len(f)] += 1
        return (f - y).square().square().mean()


def test_counters_and_buffers_without_a_number_are_no_matter():
    net, params, data = problem()
    loss = Noting()
    G = GGNLinearOperator(net, loss, params, data)
    assert_close(G.to_dense(), references.ggn(net, Noting(), params, data), size=100)
    assert (int(loss.calls), loss.values, loss.sizes) == (0, {}, Counter())
    assert loss.unused.isnan().tolist() == [True, False]


class Annealed(nn.Module):
    """Weights its value by the number of calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, f, y):
        self.calls += 1
        return self.calls * (f - y).square().square().mean()


def test_a_counter_that_matters_is_found():
    net, params, data = problem()
    with pytest.raises(ValueError, match=r"changes its attributes \['.calls"):
        GGNLinearOperator(net, Annealed(), params, data)


def test_what_a_loss_closes_over_is_left_as_it_is():
    net, params, data = problem()
    inner, queue = Centred(), [torch.zeros(2).double()]
    loss = partial(lambda f, y, scale: scale * inner(f, y), scale=2.0)
    with pytest.raises(ValueError, match=r"buffers \['centre'\]"):
        GGNLinearOperator(net, loss, params, data)
    assert not inner.centre.any()

    def with_queue(f, y):
        past = sum(queue)
        queue.append(f.detach().mean(0))
        return (f - y - past).square().square().mean()

    with pytest.raises(ValueError, match=r"attributes \['.queue"):
        GGNLinearOperator(net, with_queue, params, data)
    assert len(queue) == 1


def test_a_buffer_of_another_size_is_put_back():
    net, params, data = problem()
    buffer = torch.zeros(0, 2).double()

    def growing(f, y):
        buffer.data = torch.cat([buffer, f.detach()])
        return (f - y).square().square().mean()

    GGNLinearOperator(net, growing, params, data) @ torch.ones(8).double()
    assert buffer.shape == (0, 2)


def test_threads_may_share_a_loss_that_keeps_something():
    class Lazy(nn.Module):
        def forward(self, f, y):
            if not hasattr(self, "mask"):
                self.mask = torch.ones_like(f[:1])
            return ((f - y) * self.mask).square().square().mean()

    net, params, data = problem()
    loss, errors = Lazy(), []

    def work():
        try:
            G = GGNLinearOperator(
                net, loss, params, data, cache="off", check_deterministic=False
            )
            for _ in range(30):
                G @ torch.ones(8).double()
        except Exception as error:  # whatever it is
            errors.append(error)

    threads = [Thread(target=work) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert "mask" not in vars(loss)
