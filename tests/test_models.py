"""The user's model, loss and data: left as found, never stale, whatever happens."""

import copy
import random
import signal
import subprocess
import sys
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import references
from cases import IN_PLACE, OPERATORS, Operator, Uncopied, find
from curvlinops import (
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from curvlinops._isolation import Changes, Owner, _attention, _Switches
from curvlinops._linearization import GraphFreedError
from curvlinops._model import Model
from curvlinops._reach import CopyLeaksError
from tolerances import assert_close

pytestmark = IN_PLACE
SIZES = (3, 2, 1)
PAIR = (GGNLinearOperator, HessianLinearOperator)
DENSE = {
    GGNLinearOperator: references.ggn,
    HessianLinearOperator: references.hessian,
}


# A model with everything that can be disturbed


def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 0.1


class Everything(nn.Module):
    """Parameters, frozen ones, buffers, hooks, modes, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(4, 3)
        self.register_buffer("shift", torch.linspace(0, 1, 4))
        self.frozen.requires_grad_(False)
        self.first.register_forward_hook(hook)
        self.scale = 1.0
        self.extend()

    def extend(self) -> None:
        """Add what a subclass is about."""

    def forward(self, X: Tensor) -> Tensor:
        h = self.norm(self.first(X)).tanh()
        h = self.dropout(self.frozen(h).sin() + self.shift)
        self.seen = h.shape  # as some models do
        h = h * 2 if self.training else h
        return self.scale * self.last(h)


class WithLock(Everything):
    """Cannot be deep-copied: it is evaluated in place."""

    def extend(self) -> None:
        self.lock = Uncopied()


class WithClosure(Everything):
    """Its copy still reaches the original: it is evaluated in place."""

    def extend(self) -> None:
        last = self.last
        self.apply_last = lambda h: last(h)

    def forward(self, X: Tensor) -> Tensor:
        h = self.norm(self.first(X)).tanh()
        h = self.dropout(self.frozen(h).sin() + self.shift)
        h = h * 2 if self.training else h
        return self.scale * self.apply_last(h)


class WithCheckpoint(Everything):
    """Runs parts of the forward pass again in the backward pass."""

    def forward(self, X: Tensor) -> Tensor:
        h = self.norm(self.first(X)).tanh()
        h = self.dropout(self.frozen(h).sin() + self.shift)
        h = h * 2 if self.training else h
        return self.scale * checkpoint(self.last, h, use_reentrant=False)


class WithCheckpointInPlace(WithCheckpoint, WithLock):
    """Both at once: what is evaluated again is swapped, too."""


MODELS = (Everything, WithLock, WithClosure, WithCheckpoint, WithCheckpointInPlace)


def build(kind: type[nn.Module] = Everything, dtype: torch.dtype = torch.float64):
    """Return a problem that is disturbed easily."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().to(dtype)
        for p in model.norm.parameters():
            nn.init.uniform_(p, 0.5, 1.5)
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 1.5)
        model.eval()
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, i) if i % 2 else None
        data = [(torch.randn(n, 3, dtype=dtype), torch.randint(3, (n,))) for n in SIZES]
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss_func = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=dtype))
    return model, loss_func, params, data


def vectors(A: Any, K: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(A.shape[1])
    V = torch.randn(A.shape[1], K, generator=generator, dtype=torch.float64)
    return V.to(A.torch_dtype)


def twin(model: nn.Module) -> nn.Module:
    """Return a model of the plain kind with the same state."""
    with torch.random.fork_rng(devices=[]):
        plain = Everything().to(next(model.parameters()).dtype)
    plain.load_state_dict(model.state_dict())
    for copied, original in zip(plain.modules(), model.modules(), strict=True):
        copied.training = original.training
    plain.scale = model.scale
    return plain


def dense_now(dense: Callable, built: Any) -> Tensor:
    """Compute the reference at the present state of a problem."""
    model, loss_func, params, data = built
    if isinstance(model, Everything):
        model = twin(model)
        params = {n: p.detach().clone() for n, p in params.items()}
    return dense(model, loss_func, params, list(data))


class Snapshot:
    """Everything of the user's that a product could disturb."""

    def __init__(self, model: nn.Module, loss_func: Any, params: Any, data: Any):
        self.built = model, loss_func, params, data
        self.before = self.look()

    def look(self) -> list:
        """List what is there; tensors by identity, place, and content."""
        model, loss_func, params, data = self.built
        state: list = [list(params), *map(self.tensor, params.values())]
        for X, y in data:
            state += [self.tensor(X), self.tensor(y)]
        for module in (*model.modules(), loss_func):
            own = {k: v for k, v in vars(module).items() if k != "seen"}
            state += [
                module.training,
                {k: id(v) for k, v in own.items() if not isinstance(v, dict)},
                {k: list(v) for k, v in own.items() if isinstance(v, dict)},
                [(n, self.tensor(b)) for n, b in module.named_buffers(recurse=False)],
                [
                    (n, self.tensor(p), id(p.grad), self.tensor(p.grad))
                    for n, p in module.named_parameters(recurse=False)
                ],
            ]
        numpy_state = np.random.get_state()  # noqa: NPY002 -- the user's may be this
        state += [
            torch.get_rng_state().tolist(),
            [*numpy_state[:1], numpy_state[1].tolist(), *numpy_state[2:]],
            random.getstate(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.get_default_dtype(),
        ]
        return state

    @staticmethod
    def tensor(t: Tensor | None) -> tuple | None:
        if t is None:
            return None
        flags = (t.requires_grad, t.is_leaf, len(t._backward_hooks or ()))
        return id(t), t.data_ptr(), t._version, *flags, t.tolist()

    def assert_unchanged(self) -> None:
        for before, now in zip(self.before, self.look(), strict=True):
            assert before == now


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cls", PAIR)
def test_nothing_is_left_changed(cls: type, kind: type[nn.Module], cache: str):
    built = build(kind)
    before = Snapshot(*built)
    A = cls(*built, cache=cache)
    before.assert_unchanged()
    expected = dense_now(DENSE[cls], built)
    for _ in range(3):
        assert_close(A.to_dense(), expected)
        before.assert_unchanged()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_no_operator_leaves_anything_changed(operator: Operator):
    built = build()
    before = Snapshot(*built)
    A = operator.build(*built)
    assert_fresh(A, operator.dense, built, operator.exponent)
    A.H @ vectors(A.H)
    before.assert_unchanged()


def test_random_states_survive_a_loader_that_draws():
    model, loss_func, params, data = build()
    dataset = TensorDataset(*(torch.cat(side) for side in zip(*data, strict=True)))
    for shuffle in (False, True):
        before = Snapshot(model, loss_func, params, data)
        loader = DataLoader(dataset, batch_size=2, shuffle=shuffle)
        A = GGNLinearOperator(model, loss_func, params, loader, cache="off")
        A @ vectors(A)
        before.assert_unchanged()


# Interrupts


class Trip:
    """Raises at the n-th call once it is armed, in copies, too."""

    def __init__(self) -> None:
        self.left = -1

    def __deepcopy__(self, memo: dict) -> "Trip":
        return self

    def arm(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Tripping(torch.autograd.Function):
    """The identity, which may be interrupted in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip()
        return Tripping.apply(grad, ctx.trip), None


def interruptible(kind: type[nn.Module], where: str) -> tuple[type[nn.Module], Trip]:
    """Return a kind of model that is interrupted in one of its passes."""
    trip = Trip()

    class Interrupted(kind):
        def extend(self) -> None:
            super().extend()
            self.trip = trip

        def forward(self, X: Tensor) -> Tensor:
            if where == "forward":
                self.trip()
                return super().forward(X)
            return Tripping.apply(super().forward(X), self.trip)

    return Interrupted, trip


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cls", PAIR)
def test_interrupt_leaves_nothing_changed(cls: type, kind: type[nn.Module], where: str):
    kind, trip = interruptible(kind, where)
    built = build(kind)
    before = Snapshot(*built)
    A = cls(*built, cache="off")
    expected = dense_now(DENSE[cls], built)
    for calls in range(1, 6):
        trip.arm(calls)
        with pytest.raises(KeyboardInterrupt):
            while trip.left > 0:
                A @ vectors(A)
        before.assert_unchanged()
    assert_close(A.to_dense(), expected)
    before.assert_unchanged()


@pytest.mark.parametrize("kind", MODELS)
def test_interrupt_at_construction_leaves_nothing_changed(kind: type[nn.Module]):
    kind, trip = interruptible(kind, "forward")
    built = build(kind)
    before = Snapshot(*built)
    for calls in (1, 2, 5):
        trip.arm(calls)
        with pytest.raises(KeyboardInterrupt):
            GGNLinearOperator(*built)
        before.assert_unchanged()


@pytest.mark.parametrize("kind", MODELS)
def test_interrupted_recording_is_not_used(kind: type[nn.Module]):
    kind, trip = interruptible(kind, "backward")
    built = build(kind)
    A = HessianLinearOperator(*built)
    expected = dense_now(references.hessian, built)
    for calls in (1, 2, 4):
        trip.arm(calls)
        with pytest.raises(KeyboardInterrupt):
            while trip.left > 0:
                A @ vectors(A)
    trip.arm(-1)
    assert_close(A.to_dense(), expected)


class Signal:
    """Sends an interrupt when it is negated.

    Unlike a call, this is no place where Python looks for signals.
    """

    __neg__ = interrupt_main


def interrupt(function: Callable[[], None], position: int, body: Callable) -> bool:
    """Call a function, with an interrupt that is sent before one of its instructions.

    It arrives at the next place where Python looks for signals. Instructions of
    ``body`` do not count. Returns whether there are that many.
    """
    count, interrupt_now = 0, Signal()

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code is body.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == position:
                sys.settrace(None)  # or else Python would look here
                -interrupt_now  # noqa: B018
        return trace

    before = sys.gettrace()
    # Shells let what runs in the background ignore interrupts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            try:
                sys.settrace(trace)
                function()
            finally:
                sys.settrace(before)
    finally:
        signal.signal(signal.SIGINT, handler)
    return count >= position


@pytest.mark.parametrize("kind", [Everything, WithLock])
def test_interrupt_anywhere_leaves_nothing_changed(kind: type[nn.Module]):
    """At all places of the code that prepares a product, and cleans up after it."""
    built = build(kind)
    before = Snapshot(*built)
    model = Model(built[0], built[2])
    model.attends = True
    started = 0

    def body() -> None:
        nonlocal started
        started += 1
        assert not torch.backends.cuda.flash_sdp_enabled()
        same = built[0].first.weight is built[2]["first.weight"]
        assert same == (kind is Everything)

    position = 0
    while interrupt(lambda: model.run(body), position + 1, body):
        position += 1
        before.assert_unchanged()
    assert 20 < started < position  # there are some before and some behind

    with ThreadPoolExecutor(1) as pool:  # no lock is held any more
        pool.submit(model.run, body).result(timeout=10)
    before.assert_unchanged()


def test_changes_are_undone_when_their_owner_is_gone():
    """As after a second interrupt, which strikes while the first is handled."""
    model, *rest = build(WithLock)
    params = rest[1]
    before = Snapshot(model, *rest)
    owner = Owner()
    changes = Changes(owner)
    changes.make(model, {n: nn.Parameter(p.detach()) for n, p in params.items()})
    assert model.first.weight is not params["first.weight"]
    assert not torch.backends.cuda.flash_sdp_enabled()
    del owner
    before.assert_unchanged()
    changes.undo()
    before.assert_unchanged()


def test_users_that_are_gone_do_not_keep_attention_as_it_is():
    before = torch.backends.cuda.flash_sdp_enabled()
    attention = _Switches(_attention)
    attention.add(1, lambda: None)  # a weak reference to what is gone
    assert torch.backends.cuda.flash_sdp_enabled() == before
    attention.add(2, object)
    assert not torch.backends.cuda.flash_sdp_enabled()
    attention.remove(2)
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_failing_forward_leaves_nothing_changed():
    class Failing(WithLock):
        def forward(self, X: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    built = build(Failing)
    before = Snapshot(*built)
    with pytest.raises((RuntimeError, ValueError), match="out of order"):
        GGNLinearOperator(*built)
    before.assert_unchanged()


# Models that cannot be copied


@pytest.mark.parametrize("kind", [WithLock, WithClosure, WithCheckpointInPlace])
@pytest.mark.parametrize("cls", PAIR)
def test_model_in_place_takes_the_given_parameters(cls: type, kind: type[nn.Module]):
    model, loss_func, params, data = build(kind)
    perturbed = {n: p.detach() + 0.3 for n, p in params.items()}
    built = model, loss_func, perturbed, data
    before = Snapshot(*built)
    A = cls(*built)
    for _ in range(2):
        assert_close(A.to_dense(), dense_now(DENSE[cls], built))
    before.assert_unchanged()


def test_closure_over_frozen_parameters_is_noticed():
    """A frozen parameter leaves no trace in the graph that tells whose it is."""
    frozen = nn.Linear(4, 4).double().requires_grad_(False)
    head = nn.Linear(4, 3).double()

    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = frozen, head
            self.function = lambda X: frozen(X).tanh()

        def forward(self, X: Tensor) -> Tensor:
            return self.head(self.function(X))

    model = Closure()
    X, y = torch.rand(5, 4).double(), torch.rand(5, 3).double()
    built = model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)]
    plain = nn.Sequential(copy.deepcopy(frozen), nn.Tanh(), copy.deepcopy(head))
    plain.requires_grad_(True)
    expected = references.ggn(
        plain, nn.MSELoss(), dict(plain.named_parameters()), built[3]
    )
    assert_close(GGNLinearOperator(*built).to_dense(), expected)
    assert not frozen.weight.requires_grad


def test_closure_over_another_model_is_explained():
    model, loss_func, params, data = build()
    with pytest.raises(ValueError, match=r"directly instead of through its `params`"):
        GGNLinearOperator(lambda params, X: model(X), loss_func, params, data)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", [nn.Sequential, WithLock])
def test_parameters_used_without_gradient_are_named(kind: type[nn.Module]):
    class Checkpointed(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            self.options = options
            if kind is WithLock:
                self.lock = Uncopied()

        def forward(self, X: Tensor) -> Tensor:
            h = checkpoint(self.parts[0], X, **self.options)
            with nullcontext() if self.options["use_reentrant"] else torch.no_grad():
                h = h + self.parts[1](X).tanh()
            return self.parts[2](h)

    X = torch.rand(4, 3)
    for reentrant in (True, False):
        net = Checkpointed(use_reentrant=reentrant)
        model = Model(net, dict(net.named_parameters()))
        found = model.run(lambda model=model: model.used_without_gradient(X))
        part = f"parts.{0 if reentrant else 1}"
        assert found == [f"{part}.weight", f"{part}.bias"]


def test_parameters_without_entries_are_refused():
    empty, full = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.full = empty, full

        def forward(self, X: Tensor) -> Tensor:
            return X * self.full + self.empty.sum()

    data = [(torch.ones(4, 2), torch.zeros(4, 2))]
    with pytest.raises(ValueError, match=r"\{'empty': \(0, 3\)\}: .*Add parameters"):
        GGNLinearOperator(Both(), nn.MSELoss(), [empty], data)
    A = GGNLinearOperator(Both(), nn.MSELoss(), [empty, full], data)
    assert_close(A.to_dense(), torch.eye(2))


# Threads


@contextmanager
def eager_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("cache", ["auto", "off", 8_000])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cls", PAIR)
def test_threads_share_an_operator(cls: type, kind: type[nn.Module], cache: Any):
    built = build(kind)
    before = Snapshot(*built)
    expected = dense_now(DENSE[cls], built)
    A = cls(*built, cache=cache)
    _multiply_in_threads(A, expected)
    before.assert_unchanged()


@pytest.mark.parametrize("kind", MODELS)
def test_threads_start_with_an_operator_nobody_used(kind: type[nn.Module]):
    built = build(kind)
    expected = dense_now(references.ggn, built)
    for _ in range(5):
        A = GGNLinearOperator(*built, check_deterministic=False)
        _multiply_in_threads(A, expected, products=1)


def _multiply_in_threads(A: Any, expected: Tensor, products: int = 6) -> None:
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        barrier.wait()
        for k in range(products):
            V = torch.randn(
                A.shape[1], 1 + k % 3, generator=generator, dtype=torch.float64
            )
            assert_close(A @ V, expected @ V)
            assert_close(A @ V[:, 0].numpy(), expected @ V[:, 0])

    with eager_switching(), ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(work, i) for i in range(4)]:
            result.result()


def test_threads_with_operators_of_one_model_in_place():
    built = build(WithLock)
    model, loss_func, params, data = built
    moved = {n: p.detach() + 0.2 for n, p in params.items()}
    problems = [built, (model, loss_func, moved, data)]
    expected = [dense_now(references.hessian, problem) for problem in problems]
    operators = [HessianLinearOperator(*problem, cache="off") for problem in problems]

    def work(i: int) -> None:
        A, dense = operators[i % 2], expected[i % 2]
        for _ in range(5):
            V = vectors(A)
            assert_close(A @ V, dense @ V)

    with eager_switching(), ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(work, i) for i in range(4)]:
            result.result()


def test_threads_leave_the_random_state_as_found():
    model, loss_func, params, data = build()
    dataset = TensorDataset(*(torch.cat(side) for side in zip(*data, strict=True)))
    loader = DataLoader(dataset, batch_size=1)  # draws from the global state
    A = GGNLinearOperator(model, loss_func, params, loader, cache="off")
    expected = dense_now(references.ggn, (model, loss_func, params, data))
    for _ in range(5):
        state = torch.get_rng_state()
        _multiply_in_threads(A, expected, products=2)
        assert torch.equal(state, torch.get_rng_state())


# Freshness


def _optimiser_step(model: nn.Module, params: dict, data: list) -> None:
    optimiser = torch.optim.SGD(params.values(), lr=0.1)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimiser.step()


def _load_state(model: nn.Module, params: dict, data: list) -> None:
    state = {n: t * 1.1 for n, t in model.state_dict().items()}
    model.load_state_dict(
        {n: t.long() if "batches" in n else t for n, t in state.items()}
    )


def _in_place(model: nn.Module, params: dict, data: list) -> None:
    with torch.no_grad():
        params["first.weight"].mul_(1.1)


def _data_in_place(model: nn.Module, params: dict, data: list) -> None:
    params["last.bias"].data.add_(0.4)


def _new_data(model: nn.Module, params: dict, data: list) -> None:
    params["last.weight"].data = params["last.weight"].data * 1.3


def _numpy(model: nn.Module, params: dict, data: list) -> None:
    params["first.bias"].detach().numpy()[:] += 0.2


def _swap_values(model: nn.Module, params: dict, data: list) -> None:
    # the same entries in another order
    with torch.no_grad():
        params["first.bias"].copy_(params["first.bias"].flip(0))


def _frozen(model: nn.Module, params: dict, data: list) -> None:
    model.frozen.weight.data.mul_(0.5)


def _inputs(model: nn.Module, params: dict, data: list) -> None:
    data[1][0].mul_(2)


def _inputs_by_numpy(model: nn.Module, params: dict, data: list) -> None:
    data[0][0].numpy()[0] *= -1


def _targets(model: nn.Module, params: dict, data: list) -> None:
    data[0][1].copy_((data[0][1] + 1) % 3)


def _targets_by_numpy(model: nn.Module, params: dict, data: list) -> None:
    y = data[0][1].numpy()
    y[:] = (y + 1) % 3


def _other_batch(model: nn.Module, params: dict, data: list) -> None:
    data[2] = (data[2][0] + 1, (data[2][1] + 1) % 3)


def _buffer(model: nn.Module, params: dict, data: list) -> None:
    model.norm.running_mean.add_(0.5)


def _other_buffer(model: nn.Module, params: dict, data: list) -> None:
    model.norm.running_var = model.norm.running_var * 2


def _mode(model: nn.Module, params: dict, data: list) -> None:
    model.training = not model.training


CHANGES = (
    _in_place,
    _data_in_place,
    _new_data,
    _numpy,
    _swap_values,
    _load_state,
    _optimiser_step,
    _frozen,
    _inputs,
    _inputs_by_numpy,
    _targets,
    _targets_by_numpy,
    _other_batch,
    _buffer,
    _other_buffer,
    _mode,
)


def assert_fresh(A: Any, dense: Callable, built: Any, exponent: float = 1.0) -> None:
    V = vectors(A)
    assert_close(A @ V, dense_now(dense, built) @ V, exponent=exponent)


def check_freshness(operator: Operator, changes: tuple) -> None:
    built = model, _, params, data = build()
    A = operator.build(*built)
    for change in changes:
        for _ in range(2):  # what is kept is used
            assert_fresh(A, operator.dense, built, operator.exponent)
        change(model, params, data)
    assert_fresh(A, operator.dense, built, operator.exponent)


@pytest.mark.parametrize(
    "operator",
    [o for o in OPERATORS if "datafree" not in o.tags],
    ids=lambda o: o.name,
)
def test_numbers_are_fresh(operator: Operator):
    check_freshness(operator, CHANGES[::4])


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator",
    [o for o in OPERATORS if "derived" not in o.tags],
    ids=lambda o: o.name,
)
def test_numbers_are_fresh_after_every_change(operator: Operator):
    check_freshness(operator, CHANGES)
    check_freshness(operator, CHANGES[::-1])


@pytest.mark.parametrize("kind", MODELS)
def test_numbers_are_fresh_for_every_kind(kind: type[nn.Module]):
    built = model, _, params, data = build(kind)
    A = GGNLinearOperator(*built)
    for change in CHANGES[::2]:
        assert_fresh(A, references.ggn, built)
        change(model, params, data)
        assert_fresh(A, references.ggn, built)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_small_change_beside_large_data_is_seen(scale: float):
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].weight.data.div_(scale)
    data = [(scale * torch.rand(20, 30), torch.rand(20, 2)) for _ in range(4)]
    params = dict(model.named_parameters())
    built = model, nn.MSELoss(), params, data
    A = GGNLinearOperator(*built)
    for _ in range(3):
        before = A @ vectors(A)
        model[0].weight.data[3] *= 1.5  # neither pointer nor version tell
        fresh = references.ggn(*built).float() @ vectors(A)
        assert (before - fresh).norm() > 1e-3 * fresh.norm()
        assert (A @ vectors(A) - fresh).norm() < 1e-4 * fresh.norm()


@pytest.mark.parametrize("cls", PAIR)
def test_change_of_the_loss_is_seen(cls: type):
    built = _, loss_func, _, _ = build()
    A = cls(*built)
    assert_fresh(A, DENSE[cls], built)
    loss_func.weight.mul_(torch.tensor([1.0, 3.0, 0.5]))
    assert_fresh(A, DENSE[cls], built)
    loss_func.weight.numpy()[0] = 4.0
    assert_fresh(A, DENSE[cls], built)


@pytest.mark.parametrize("cls", PAIR)
def test_refresh_sees_attributes(cls: type):
    built = model, loss_func, _, _ = build()
    A = cls(*built)
    assert_fresh(A, DENSE[cls], built)
    model.scale = 1.7
    A.refresh()
    assert_fresh(A, DENSE[cls], built)
    loss_func.label_smoothing = 0.2
    A.refresh()
    assert_fresh(A, DENSE[cls], built)
    loss_func.weight = loss_func.weight + 1
    A.refresh()
    assert_fresh(A, DENSE[cls], built)


@pytest.mark.parametrize("cls", PAIR)
def test_refresh_sees_the_data_behind_a_loader(cls: type):
    model, loss_func, params, data = build()
    X, y = (torch.cat(side) for side in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    A = cls(model, loss_func, params, loader)
    built = model, loss_func, params, [(X, y)]
    assert_fresh(A, DENSE[cls], built)
    X.mul_(0.5)
    A.refresh()
    assert_fresh(A, DENSE[cls], built)


def test_batches_added_and_removed_are_seen():
    built = _, _, _, data = build()
    A = HessianLinearOperator(*built)
    assert_fresh(A, references.hessian, built)
    data.append((data[0][0] * 2, data[0][1]))
    assert_fresh(A, references.hessian, built)
    del data[1]
    assert_fresh(A, references.hessian, built)


def test_operators_of_one_risk_are_fresh():
    built = model, _, params, data = build()
    risk = EmpiricalRisk(*built)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    for change in CHANGES[::2]:
        assert_fresh(G, references.ggn, built)
        change(model, params, data)
        assert_fresh(H, references.hessian, built)


def test_given_values_count_when_the_module_changes():
    model, loss_func, params, data = build()
    copied = {n: p.detach().clone() for n, p in params.items()}
    A = GGNLinearOperator(model, loss_func, copied, data)
    expected = A.to_dense()
    with torch.no_grad():
        for p in params.values():
            p.mul_(3.0)
    assert_close(A.to_dense(), expected)
    copied["last.bias"].add_(1.0)
    assert_fresh(A, references.ggn, (model, loss_func, copied, data))


# Where the user stands


@pytest.mark.parametrize(
    "context",
    [
        nullcontext,
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.random.fork_rng(devices=[]),
    ],
    ids=["none", "no_grad", "inference_mode", "enable_grad", "autocast", "fork_rng"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_works_in_every_context(context: Callable, kind: type[nn.Module]):
    built = build(kind)
    expected = dense_now(references.hessian, built)
    with context():
        A = HessianLinearOperator(*built)
        inside = A @ vectors(A)
        columns = A @ torch.eye(A.shape[1]).double()
    assert not inside.requires_grad
    assert_close(columns, expected)
    outside = A @ vectors(A)
    assert_close(inside, outside)


def test_results_made_under_inference_mode_are_ordinary():
    built = build()
    A = GGNLinearOperator(*built)
    with torch.inference_mode():
        y = A @ vectors(A)
        x = torch.ones(A.shape[1], dtype=torch.float64)
    assert_close(A @ x, A @ torch.ones(A.shape[1], dtype=torch.float64))
    assert_close(A @ y, A @ y.clone())


def test_default_dtype_does_not_matter():
    built = build(dtype=torch.float32)
    expected = dense_now(references.hessian, built)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        A = HessianLinearOperator(*built)
        assert_close(A.to_dense(), expected)
        assert A.torch_dtype is torch.float32
    finally:
        torch.set_default_dtype(default)


def test_parameters_may_be_frozen():
    built = build()
    expected = dense_now(references.ggn, built)
    built[0].requires_grad_(False)
    A = GGNLinearOperator(*built)
    assert_close(A.to_dense(), expected)
    assert not any(p.requires_grad for p in built[0].parameters())


# Models that write


class Writing(nn.Module):
    """Writes into its input, by one road or another."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.write = write

    def forward(self, X: Tensor) -> Tensor:
        self.write(X)
        return self.layer(X).tanh()


def _scale_in_place(X: Tensor) -> None:
    X.mul_(2)


def _scale_view(X: Tensor) -> None:
    X[:, :2].mul_(2)


def _scale_last_batch(X: Tensor) -> None:
    if len(X) == 1:
        X.mul_(2)


def _scale_data(X: Tensor) -> None:
    X.data.mul_(2)


def _scale_numpy(X: Tensor) -> None:
    X.detach().numpy()[:] *= 2


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize(
    "write",
    [_scale_in_place, _scale_view, _scale_last_batch, _scale_data, _scale_numpy],
)
def test_model_may_write_into_its_input(write: Callable, cache: str):
    model = Writing(write).double()
    X = [torch.rand(n, 3).double() for n in SIZES]
    data = [(x, torch.rand(len(x), 2).double()) for x in X]
    before = copy.deepcopy(data)
    params = dict(model.named_parameters())
    A = HessianLinearOperator(model, nn.MSELoss(), params, data, cache=cache)
    expected = references.hessian(model, nn.MSELoss(), params, copy.deepcopy(data))
    for _ in range(3):
        assert_close(A.to_dense(), expected)
    for (a, b), (c, d) in zip(data, before, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_model_may_write_into_a_dictionary():
    class Popping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, X: dict) -> Tensor:
            return self.layer(X.pop("x")).tanh()

    model = Popping().double()
    data = [({"x": torch.rand(4, 3).double()}, torch.rand(4, 2).double())]
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, nn.MSELoss(), params, data, cache="off")
    first = A.to_dense()
    assert_close(A.to_dense(), first)
    assert list(data[0][0]) == ["x"]


def test_loss_may_not_write_into_the_output_unseen():
    def loss_func(f: Tensor, y: Tensor) -> Tensor:
        return f.clone().sub_(y).square().sum()

    loss_func.reduction = "sum"
    model, _, params, data = build()
    data = [(X, F.one_hot(y, 3).double()) for X, y in data]
    H = HessianLinearOperator(model, loss_func, params, data)
    built = model, nn.MSELoss(reduction="sum"), params, data
    assert_close(H.to_dense(), dense_now(references.hessian, built))


# Models that keep parts of their graphs


class Normalised(nn.Module):
    """May compute its weight once, and keep it, with its graph, for later."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3))
        self.keeps, self.kept = keeps, []

    def forward(self, X: Tensor) -> Tensor:
        return self.at(self.weight, X)

    def at(self, weight: Tensor, X: Tensor) -> Tensor:
        if not (self.keeps and self.kept):
            self.kept = [weight.exp() / weight.exp().sum()]
        return (X @ self.kept[0].T).tanh()


@pytest.mark.parametrize("operator", PAIR)
@pytest.mark.parametrize("as_function", [False, True])
def test_graphs_that_a_model_keeps_are_not_freed(operator: type, as_function: bool):
    torch.manual_seed(0)
    model = Normalised(keeps=True).double()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in SIZES]
    params = dict(model.named_parameters())
    simple = Normalised(keeps=False).double()
    simple.load_state_dict(model.state_dict())
    its = dict(simple.named_parameters())
    reference = DENSE[operator](simple, nn.MSELoss(), its, data)

    def function(params: dict, X: Tensor) -> Tensor:
        return model.at(params["weight"], X)

    func = function if as_function else model
    options = {"cache": "off", "check_deterministic": False}
    A = operator(func, nn.MSELoss(), params, data, **options)
    for _ in range(3):
        assert_close(A @ torch.eye(6).double(), reference)
        v = torch.randn(6).double()
        assert_close(A @ v, reference @ v)
    assert not A.risk.model.may_free
    assert all(A.risk._columns._vectorises.values())
    assert bool(model.kept) == as_function


def keeping(**options: Any) -> tuple[HessianLinearOperator, HessianLinearOperator]:
    """Return an operator of a model that keeps graphs, and one that never frees any."""
    torch.manual_seed(0)
    model = Normalised(keeps=True).double()
    data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
    args = model, nn.MSELoss(), dict(model.named_parameters()), data
    options["check_deterministic"] = False
    A = HessianLinearOperator(*args, cache="off", **options)
    return A, HessianLinearOperator(*args, check_deterministic=False)


def test_threads_recover_from_freed_graphs_together():
    A, kept = keeping()
    v = torch.rand(6).double()
    expected = kept @ v
    for _ in range(20):
        A, _ = keeping()
        with ThreadPoolExecutor(3) as pool:
            for result in pool.map(lambda _, A=A: A @ v, range(9)):
                assert_close(result, expected)


def test_bounds_are_kept_when_a_private_copy_is_replaced():
    A, kept = keeping(max_memory=1 << 20)
    v = torch.rand(6).double()
    for _ in range(3):
        assert_close(A @ v, kept @ v)
        fits = dict(A.risk._fits)
        A.risk._replace_copy(A.risk.model)
        assert A.risk._fits == fits != {}


def test_bounded_products_in_threads_do_not_wait_for_each_other():
    model, loss_func, params, data = build()
    risk = EmpiricalRisk(model, loss_func, params, data, max_memory=1 << 20)
    operators = [GGNLinearOperator(risk), HessianLinearOperator(risk)]
    expected = [cls(*build(), cache="off").to_dense() for cls in PAIR]

    def multiply(number: int) -> None:
        A, dense = operators[number % 2], expected[number % 2]
        for K in (1, 2, 3):
            V = vectors(A, K)
            assert_close(A @ V, dense @ V)

    pool = ThreadPoolExecutor(3)
    try:
        for done in [pool.submit(multiply, number) for number in range(6)]:
            done.result(timeout=60)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Train mode


def test_statistics_of_the_batch_are_used_on_copied_buffers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
            self.last = nn.Linear(4, 2)

        def forward(self, X: Tensor) -> Tensor:
            return self.last(self.norm(self.first(X)).tanh())

    model = Model().double().train()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (4, 3)]
    params = dict(model.named_parameters())
    built = model, nn.MSELoss(), params, data
    before = Snapshot(*built)
    A = HessianLinearOperator(*built, check_deterministic=False)
    expected = references.hessian(*built)
    for _ in range(3):
        assert_close(A.to_dense(), expected)
    before.assert_unchanged()


def test_unused_parameter_is_named_once():
    problem = find("mlp-unused-param")
    built = problem.build()
    with pytest.warns(UserWarning, match=r"inner\.1\.weight.*zero") as caught:
        A = GGNLinearOperator(*built)
        A.to_dense()
        A @ vectors(A)
        for twin in (copy.deepcopy(A), copy.copy(A)):
            twin @ vectors(A)
        for cls in (HessianLinearOperator, KFACLinearOperator):  # of the same model
            B = cls(*built)
            B @ vectors(B)
        A.refresh()
        A @ vectors(A)
    assert len(caught) == 1


# Loaders


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("cls", PAIR)
def test_loader(cls: type, shuffle: bool):
    model, loss_func, params, data = build()
    X, y = (torch.cat(side) for side in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=shuffle)
    expected = dense_now(DENSE[cls], (model, loss_func, params, data))
    A = cls(model, loss_func, params, loader)
    said = pytest.warns(UserWarning, match="shuffle=True") if shuffle else nullcontext()
    with said:
        A @ vectors(A)
    for _ in range(3):
        assert_close(A.to_dense(), expected)
    # only batches that repeat are kept
    kept = {form for form in A.status().batches if form != "recomputed"}
    assert bool(kept) is not shuffle


def test_loader_without_check_is_read_in_every_product():
    model, loss_func, params, data = build()
    dataset = TensorDataset(*(torch.cat(side) for side in zip(*data, strict=True)))
    loader = DataLoader(dataset, batch_size=4)
    A = GGNLinearOperator(model, loss_func, params, loader, check_deterministic=False)
    expected = dense_now(references.ggn, (model, loss_func, params, data))
    for _ in range(3):
        assert_close(A.to_dense(), expected)
    assert set(A.status().batches) == {"recomputed"}


def test_samples_need_a_fixed_order():
    model, loss_func, params, data = build()
    dataset = TensorDataset(*(torch.cat(side) for side in zip(*data, strict=True)))
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=r"shuffle=False"):
            FisherMCLinearOperator(model, loss_func, params, loader)


# Memory


@pytest.mark.parametrize("cls", PAIR)
def test_recordings_stay_within_the_budget(cls: type):
    built = build()
    whole = cls(*built)
    whole @ vectors(whole)
    assert whole.status().batches == ("graph",) * len(SIZES)
    sizes = [b.nbytes for b in whole.risk._recordings.values()]
    expected = dense_now(DENSE[cls], built)
    for budget in (0, 1, max(sizes), sum(sizes) - 1, 10 * sum(sizes)):
        A = cls(*built, cache=budget)
        for _ in range(2):
            assert_close(A.to_dense(), expected)
            assert A.status().held <= budget
        complete = "recomputed" not in A.status().batches
        assert complete == (budget > sum(sizes))


@pytest.mark.parametrize("cls", PAIR)
def test_nothing_is_kept_without_a_cache(cls: type):
    A = cls(*build(), cache="off")
    A @ vectors(A)
    assert A.status().batches == ("recomputed",) * len(SIZES)
    assert A.status().held == 0


def test_first_batches_stay():
    calls: list[int] = []
    built = build()
    whole = GGNLinearOperator(*built)
    whole @ vectors(whole)
    [first, *_] = [b.nbytes for b in whole.risk._recordings.values()]
    built[0].register_forward_pre_hook(lambda *_: calls.append(1))
    # more than the graphs of the first batch take up, less than those of two
    A = GGNLinearOperator(*built, cache=int(1.5 * first))
    rest = [True] * (len(SIZES) - 1)
    A @ vectors(A)
    for _ in range(3):
        calls.clear()
        A @ vectors(A)
        assert [b == "recomputed" for b in A.status().batches] == [False, *rest]
        assert len(calls) == len(SIZES) - 1


def test_changes_before_the_first_product_are_seen():
    """What is changed between construction and the first product counts, too."""

    def halve_statistics(net: nn.Module) -> None:
        net[1].running_var.mul_(0.5)

    def replace_values(net: nn.Module) -> None:
        net[0].weight.data = 2 * net[0].weight.data

    torch.manual_seed(0)
    data = [(torch.rand(5, 3).double(), torch.randint(2, (5,)))]
    for change in (halve_statistics, replace_values, nn.Module.train):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        net = net.double().eval()
        args = net, nn.CrossEntropyLoss(), list(net.parameters()), data
        A = GGNLinearOperator(*args, check_deterministic=False)
        change(net)
        fresh = GGNLinearOperator(*args, check_deterministic=False)
        assert_close(A.to_dense(), fresh.to_dense(), size=4 * A.shape[0])


def test_a_freed_graph_and_a_copy_that_leaks_are_recovered_from_in_turn():
    risk = GGNLinearOperator(*find("mlp-tanh-ce").build()).risk
    errors = [GraphFreedError("freed"), CopyLeaksError()]

    def run():
        if errors:
            raise errors.pop(0)
        return "done"

    assert risk.session(run) == "done"
    # In place, graphs are kept: one that is freed now is the user's affair.
    errors += [GraphFreedError("a second time")]
    with pytest.raises(RuntimeError, match="a second time"):
        risk.session(run)


def test_forward_mode_loads_without_a_warning_and_hides_none():
    code = """
import torch, warnings
from curvlinops import GGNLinearOperator
net = torch.nn.Linear(3, 2)
data = [(torch.rand(4, 3), torch.rand(4, 2))]
warnings.simplefilter("error")
G = GGNLinearOperator(net, torch.nn.MSELoss(), list(net.parameters()), data)
G @ torch.ones(8)
assert G.risk.model.forward_mode
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    torch.jit.script(net)
    warnings.warn("`torch.jit.script` is deprecated, said by somebody else")
    assert len(seen) >= 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)
