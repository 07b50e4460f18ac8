"""Weights that torch caches: evaluations meet none of the user's, and leave none."""

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import cached, register_parametrization
from torch.utils.checkpoint import checkpoint

from cases import IN_PLACE, Uncopied
from curvlinops import GGNLinearOperator, HessianLinearOperator

pytestmark = IN_PLACE

LOSS = nn.MSELoss(reduction="sum")


class Standardised(nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return (W - W.mean(1, keepdim=True)) / (W.var(1, keepdim=True) + 0.1).sqrt()


class Net(nn.Module):
    """Uses its parametrized weight several times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        register_parametrization(self.first, "weight", Standardised())
        self.double()

    def body(self, X: Tensor) -> Tensor:
        for _ in range(2):
            X = self.first(X).tanh()
        return X

    def forward(self, X: Tensor) -> Tensor:
        return self.last(self.body(X))


class InPlace(Net):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Uncopied()


class Caching(Net):
    """Enters the context itself."""

    def forward(self, X: Tensor) -> Tensor:
        with cached():
            return super().forward(X)


class Checkpointed(Net):
    def forward(self, X: Tensor) -> Tensor:
        return self.last(checkpoint(self.body, X, use_reentrant=False))


class CheckpointedInPlace(Checkpointed, InPlace):
    pass


KINDS = [Net, InPlace, Caching, Checkpointed, CheckpointedInPlace]


def build(kind: type[nn.Module]) -> tuple[Any, dict[str, Tensor], list]:
    model = kind()
    data = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (4, 2)]
    return model, dict(model.named_parameters()), data


def functional(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, X: torch.func.functional_call(model, params, (X,))


def dense(model: nn.Module, params: dict[str, Tensor], data: list, cls: type) -> Tensor:
    """Return the matrix by reverse-mode differentiation of the user's own module."""
    leaves = list(params.values())

    def rows(outputs: Tensor, graph: bool = False) -> list[Tensor]:
        found = []
        for entry in outputs.reshape(-1):
            grads = torch.autograd.grad(
                entry, leaves, create_graph=graph, retain_graph=True, allow_unused=True
            )
            found.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for g, p in zip(grads, leaves, strict=True)
                    ]
                )
            )
        return found

    if cls is GGNLinearOperator:
        J = torch.stack(rows(torch.cat([model(X) for X, _ in data])))
        return 2 * J.T @ J
    loss = sum(LOSS(model(X), y) for X, y in data)
    (gradient,) = rows(loss, graph=True)
    return torch.stack(rows(gradient))


@pytest.mark.parametrize("cls", [GGNLinearOperator, HessianLinearOperator])
@pytest.mark.parametrize("form", ["module", "callable"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_the_users_cache_are_not_used(kind: type, form: str, cls: type):
    model, params, data = build(kind)
    wanted = dense(model, params, data, cls)
    given = model if form == "module" else functional(model)
    values = {n: p.detach() for n, p in params.items()} if form != "module" else params
    used, fresh = (cls(given, LOSS, values, data) for _ in range(2))
    torch.testing.assert_close(used.to_dense(), wanted)
    with cached():
        weight = model.first.weight
        for A in (used, fresh, cls(given, LOSS, values, data)):
            for _ in range(3):
                torch.testing.assert_close(A.to_dense(), wanted)
        if kind is not Caching:  # its own context empties the cache
            assert model.first.weight is weight
    assert model.first.weight is not weight
    for A in (used, fresh):
        A.refresh()
        torch.testing.assert_close(A.to_dense(), wanted)
    assert int(parametrize._cache_enabled) == 0 and not parametrize._cache


def test_changes_inside_of_the_context_are_followed():
    model, params, data = build(Net)
    A = GGNLinearOperator(model, LOSS, params, data)
    with cached():
        model(data[0][0])
        params["first.parametrizations.weight.original"].data.mul_(torch.rand(3, 3))
        A.to_dense()
        found = A.to_dense()
    torch.testing.assert_close(found, dense(model, params, data, GGNLinearOperator))


def test_nothing_of_ours_is_left_in_the_cache():
    model, params, data = build(Net)
    A = GGNLinearOperator(model, LOSS, params, data)
    with cached():
        A.refresh()
        A.to_dense()
        assert not parametrize._cache
        model.first.weight.sum().backward()
    original = params["first.parametrizations.weight.original"]
    assert original.grad is not None


def test_the_users_context_still_caches():
    model = Net()
    with cached(), cached():
        assert model.first.weight is model.first.weight
    assert model.first.weight is not model.first.weight
    assert not parametrize._cache_enabled


def test_the_models_own_context_still_caches():
    count = 0

    class Counts(Standardised):
        def forward(self, W: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return super().forward(W)

    model = Caching()
    model.first = nn.Linear(3, 3).double()
    register_parametrization(model.first, "weight", Counts())
    params, data = dict(model.named_parameters()), build(Net)[2]
    A = GGNLinearOperator(model, LOSS, params, data, check_deterministic=False)
    count = 0
    A.risk.model.run(lambda: A.risk.model(data[0][0]))
    assert count == 1


def test_a_thread_may_cache_while_another_multiplies():
    model, params, data = build(InPlace)
    wanted = dense(model, params, data, GGNLinearOperator)
    inside, done = threading.Event(), threading.Event()
    weights = []

    class Waits(InPlace):
        def forward(self, X: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                return super().forward(X)
            inside.set()
            done.wait(10)
            return super().forward(X)

    model.__class__ = Waits
    other = Net()  # the user's in another thread

    def user() -> None:
        inside.wait(10)
        with cached():
            weights.extend([other.first.weight, other.first.weight])
            done.set()

    thread = threading.Thread(target=user)
    thread.start()
    A = GGNLinearOperator(model, LOSS, params, data, check_deterministic=False)
    found = A.to_dense()
    thread.join(10)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(*weights)
    assert int(parametrize._cache_enabled) == 0
    with cached():
        assert other.first.weight is other.first.weight


def test_a_context_entered_while_another_thread_multiplies():
    model, params, data = build(InPlace)
    wanted = dense(model, params, data, GGNLinearOperator)
    A = GGNLinearOperator(model, LOSS, params, data, cache="off")
    inside, done = threading.Event(), threading.Event()

    class Waits(Net):
        def forward(self, X: Tensor) -> Tensor:
            inside.set()
            done.wait(10)
            return super().forward(X)

    def multiply() -> None:
        other = Waits()
        given = dict(other.named_parameters())
        GGNLinearOperator(
            other, LOSS, given, data, check_deterministic=False
        ).to_dense()

    thread = threading.Thread(target=multiply)
    thread.start()
    inside.wait(10)
    with cached():  # counted as if a model entered it
        done.set()
        thread.join(20)
        for _ in range(2):
            model(data[0][0])  # the user's weight is in the cache
            torch.testing.assert_close(A.to_dense(), wanted)
    with cached():
        model(data[0][0])
        torch.testing.assert_close(A.to_dense(), wanted)


class Multiplies(Net):
    """Multiplies by a matrix of another model, inside of the context."""

    def forward(self, X: Tensor) -> Tensor:
        with cached():
            OTHER["model"](X)
            OTHER["found"].append(OTHER["A"].to_dense())
            return super().forward(X)


OTHER: dict[str, Any] = {}


def test_an_evaluation_within_another_uses_none_of_its_weights():
    model, params, data = build(InPlace)
    A = GGNLinearOperator(model, LOSS, params, data, cache="off")
    OTHER.update(model=model, A=A, found=[])
    outer = Multiplies()
    given = dict(outer.named_parameters())
    found = GGNLinearOperator(outer, LOSS, given, data).to_dense()
    wanted = dense(model, params, data, GGNLinearOperator)
    assert OTHER["found"]
    for other in OTHER["found"]:
        torch.testing.assert_close(other, wanted)
    torch.testing.assert_close(found, wanted)


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def test_weights_that_hooks_compute_stay_the_users():
    torch.manual_seed(0)
    model = nn.Sequential(_old_weight_norm(nn.Linear(3, 2)), nn.Tanh()).double()
    model.lock = Uncopied()  # it cannot be copied
    _, _, data = build(Net)
    params = dict(model.named_parameters())
    model(data[0][0])
    weight = model[0].weight
    A = GGNLinearOperator(model, LOSS, params, data)
    wanted = dense(model, params, data, GGNLinearOperator)
    model[0].weight = weight
    torch.testing.assert_close(A.to_dense(), wanted)
    assert model[0].weight is weight


@pytest.mark.parametrize("inside", [nullcontext, cached])
@pytest.mark.parametrize(
    "reparametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        _old_weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_weights_that_torch_computes(reparametrize: Callable, inside: Callable):
    torch.manual_seed(0)
    layer = reparametrize(nn.Linear(3, 3).double())
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2).double()).eval()
    _, _, data = build(Net)
    params = dict(model.named_parameters())
    wanted = dense(model, params, data, GGNLinearOperator)
    A = GGNLinearOperator(model, LOSS, params, data)
    with inside():
        model(data[0][0])
        for _ in range(3):
            torch.testing.assert_close(A.to_dense(), wanted)
    next(iter(params.values())).data.mul_(torch.linspace(0.5, 2, 3).double())
    wanted = dense(model, params, data, GGNLinearOperator)
    for _ in range(2):
        torch.testing.assert_close(A.to_dense(), wanted)
