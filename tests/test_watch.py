"""What changes between two products is seen: views, names, hooks, objects, caches."""

import copy
import datetime
import enum
import io
import logging
import operator
import pathlib
import pickle
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import (
    register_parametrization,
    remove_parametrizations,
)
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvlinops._data import cut, joined, leaves_in, mapped, moved, tensors_in
from curvlinops._watch import Watch

LOSS = nn.MSELoss(reduction="sum")


def ggn_now(output: Callable[[], Tensor], leaves: list[Tensor]) -> Tensor:
    """Return the GGN of the summed squares of errors, by one gradient per output."""
    f = output()
    rows = [
        torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        for entry in f.reshape(-1)
    ]
    J = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                    for g, p in zip(row, leaves, strict=True)
                ]
            )
            for row in rows
        ]
    )
    return 2 * J.T @ J


class Problem:
    """An operator that is used a few times, and its matrix by another road."""

    def __init__(self, model: nn.Module, data: list, **options: Any) -> None:
        self.model, self.data = model, data
        self.params = dict(model.named_parameters())
        self.A = GGNLinearOperator(model, LOSS, self.params, data, **options)
        self.check(3)

    def wanted(self) -> Tensor:
        def output() -> Tensor:
            return torch.cat([self.model(X).reshape(-1) for X, _ in self.data])

        return ggn_now(output, list(self.params.values()))

    def check(self, times: int = 1) -> None:
        wanted = self.wanted()
        v = torch.linspace(-1, 2, len(wanted), dtype=torch.float64)
        for _ in range(times):
            torch.testing.assert_close(self.A @ v, wanted @ v)

    def refuses(self, *words: str) -> None:
        v = torch.ones(self.A.shape[1], dtype=torch.float64)
        for _ in range(2):
            with pytest.raises(ValueError, match="Build a new operator") as error:
                self.A @ v
            assert all(word in str(error.value) for word in words)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def pairs() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 4).double(), torch.randn(n, 2).double()) for n in (4, 4, 1)]


# -- views of the same memory ---------------------------------------------------------

VIEWS = {
    "transposed": lambda t: t.T,
    "expanded": lambda t: t[:1].expand_as(t),
    "expanded the other way": lambda t: t[:, :1].expand_as(t),
    "negated": torch._neg_view,
    "rotated": lambda t: t.as_strided(t.shape, (1, 4)),
    "shifted": lambda t: t.as_strided(t.shape, (4, 1), 1),
}


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("B", torch.randn(5, 4).double()[:4])

    def forward(self, X: Tensor) -> Tensor:
        return self.net(X @ self.B)


@pytest.mark.parametrize("place", ["parameter", "buffer", "data"])
@pytest.mark.parametrize("view", VIEWS)
def test_other_views_of_the_same_memory_are_seen(view: str, place: str):
    model = WithBuffer()
    model.net[0].weight.data = torch.randn(5, 4).double()[:4]
    data = [(torch.randn(5, 4).double()[:4], y) for _, y in pairs()[:2]]
    problem = Problem(model, data)
    tensors = {
        "parameter": model.net[0].weight,
        "buffer": model.B,
        "data": data[1][0],
    }
    t = tensors[place]
    t.data = VIEWS[view](t.data)
    problem.check(2)


def test_conjugation_is_seen():
    class Complex(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            z = torch.complex(super().forward(X), X.sum(1, keepdim=True))
            return torch.view_as_real(z * self.c).flatten(1)

    model = Complex(4, 2).double()
    model.register_buffer("c", torch.randn(2, dtype=torch.complex128))
    problem = Problem(model, [(X, torch.zeros(len(X), 4).double()) for X, _ in pairs()])
    model.c.data = model.c.data.conj()
    problem.check(2)


class Scaled(nn.Linear):
    def forward(self, X: dict) -> Tensor:
        return super().forward(X["x"] * torch.as_tensor(X["a"].copy()).double().sin())


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
@pytest.mark.parametrize("attribute", ["shape", "strides", "dtype"])
def test_arrays_that_are_read_otherwise_are_seen(attribute: str):
    a = np.arange(16, dtype=np.int64).reshape(4, 4)
    data = [({"x": X, "a": a}, y) for X, y in pairs()[:1]]
    problem = Problem(Scaled(4, 2).double(), data)
    if attribute == "strides":
        a.strides = a.strides[::-1]
    elif attribute == "dtype":
        a.dtype = np.float64
        a[:] = a  # tiny numbers; only how memory is read has changed
    else:
        data[0][0]["a"] = a[:1]
        problem.check()
        data[0][0]["a"].shape = (4,)
    problem.check(2)


# -- names, types, and what is beside tensors -----------------------------------------


class Dict(nn.Linear):
    """Uses what there is, by its name, its place, and its type."""

    def forward(self, X: Any) -> Tensor:
        h = 0
        for place, (key, value) in enumerate(X["features"].items()):
            h = h + (place + len(key)) * (value if place else value.sin())
        factors = X.get("factors", [[1.0]])
        h = h * (len(factors) + sum(sum(f) * (i + 1) for i, f in enumerate(factors)))
        h = h.cos() if isinstance(factors, tuple) else h
        return super().forward(h * (2 if X["n"] is True else 3) / X["n"])


def _rename(X: dict) -> None:
    X["features"]["other"] = X["features"].pop("x")


def _reorder(X: dict) -> None:
    X["features"]["x"] = X["features"].pop("x")


def _add_key(X: dict) -> None:
    X["features"]["z"] = X["features"]["x"]


def _cut_otherwise(X: dict) -> None:
    X["factors"] = [[2.0], [3.0, 4.0]]  # as before, but for the lengths


def _other_type(X: dict) -> None:
    X["factors"] = tuple(X["factors"])


def _true(X: dict) -> None:
    X["n"] = True


@pytest.mark.parametrize(
    "change", [_rename, _reorder, _add_key, _cut_otherwise, _other_type, _true]
)
def test_names_order_lengths_and_types_are_seen(change: Callable):
    features = {"x": pairs()[0][0], "yy": pairs()[1][0]}
    X = {"features": features, "factors": [[2.0, 3.0], [4.0]], "n": 1}
    problem = Problem(Dict(4, 2).double(), [(X, pairs()[0][1])])
    change(X)
    problem.check(2)


def _nest_otherwise(X: list) -> None:
    X[:] = [[X[0]], X[1][0], X[2], X[3]]


def _exchange(X: list) -> None:
    X[2:] = [X[3], X[2]]


class Nest(nn.Linear):
    """Uses what there is by its place in lists within lists."""

    def forward(self, X: list) -> Tensor:
        h = 0
        for place, x in enumerate(X):
            h = h + (place + 1) * (torch.as_tensor(x[0]) if type(x) is list else x**2)
        return super().forward(h)


@pytest.mark.parametrize("change", [_nest_otherwise, _exchange])
def test_places_in_nests_are_seen(change: Callable):
    a, b, c = pairs()[0][0], pairs()[1][0], pairs()[0][0] + 1
    problem = Problem(Nest(4, 2).double(), [([a, [b], c, 2.0], pairs()[0][1])])
    change(problem.data[0][0])
    problem.check(2)


class Either(nn.Linear):
    def forward(self, X: Any) -> Tensor:
        return super().forward(X["x"] if isinstance(X, dict) else X)


def test_the_order_of_batches_of_several_kinds_is_seen():
    (a, y), (b, z), _ = pairs()
    model, data = Either(4, 2).double(), [({"x": a}, y), (b, z)]
    J = JacobianLinearOperator(model, dict(model.named_parameters()), data)
    before = J.to_dense()
    data.reverse()
    torch.testing.assert_close(J.to_dense(), before.roll(8, 0))


def test_values_that_do_not_change_are_no_change():
    data = [({"x": X, "n": float("nan"), "z": 0.0, "c": b"1"}, y) for X, y in pairs()]
    watch = Watch(net(), LOSS, {}, data)
    before = watch.state()
    data[0][0]["n"] = float("nan")
    assert watch.state() == before
    data[0][0]["z"] = -0.0
    assert watch.state() != before


def test_scripted_modules_are_looked_at():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script")
        model = torch.jit.script(nn.Sequential(nn.Linear(4, 2), nn.Tanh())).double()
    watch = Watch(model, LOSS, dict(model.named_parameters()), pairs())
    before = watch.state()
    assert watch.state() == before
    next(model.parameters()).data.mul_(2)
    assert watch.state() != before


def test_renamed_tensors_of_a_module_are_seen():
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)
            self.register_buffer("one", torch.ones(()))

        def forward(self, X: Tensor) -> Tensor:
            return self.a(X * (3 if hasattr(self, "one") else 5))

    model = Renamed().double()
    problem = Problem(model, pairs())
    model._buffers["two"] = model._buffers.pop("one")
    problem.check(2)
    model.__class__ = type("Other", (Renamed,), {"forward": lambda s, X: s.a(2 * X)})
    problem.check(2)


# -- hooks ----------------------------------------------------------------------------


def _forward(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.sin() if isinstance(module, nn.Linear) else None


def _pre(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0].cos(),) if isinstance(module, nn.Linear) else None


ADD_HOOK = {
    "forward": lambda m: m[0].register_forward_hook(_forward),
    "forward, by keyword": lambda m: m[0].register_forward_hook(
        lambda module, args, kwargs, output: output**2, with_kwargs=True
    ),
    "before": lambda m: m[2].register_forward_pre_hook(_pre),
    "of all": lambda m: nn.modules.module.register_module_forward_hook(_forward),
    "before all": lambda m: nn.modules.module.register_module_forward_pre_hook(_pre),
}


@pytest.mark.parametrize("kind", ADD_HOOK)
def test_hooks_that_come_and_go_are_seen(kind: str):
    model = net()
    problem = Problem(model, pairs())
    handle = ADD_HOOK[kind](model)
    try:
        problem.check(3)
    finally:
        handle.remove()
    problem.check(3)


def _either(module: nn.Module, inputs: Any, *others: Any) -> Any:
    if len(others) == 2:
        return others[1].cos()
    return others[0].sin() if others else (inputs[0].tanh(),)


MOVE_HOOK = {
    "to another module": lambda m: m[2].register_forward_hook(_either),
    "before": lambda m: m[0].register_forward_pre_hook(_either),
    "by keyword": lambda m: m[0].register_forward_hook(_either, with_kwargs=True),
    "to all": lambda _: nn.modules.module.register_module_forward_hook(_either),
}


@pytest.mark.parametrize("kind", MOVE_HOOK)
def test_hooks_that_are_registered_elsewhere_are_seen(kind: str):
    model = net()
    handle = model[0].register_forward_hook(_either)
    problem = Problem(model, pairs())
    handle.remove()
    handle = MOVE_HOOK[kind](model)
    try:
        problem.check(3)
    finally:
        handle.remove()
    problem.check(3)


def test_a_module_whose_forward_is_wrapped_is_seen():
    model = net()
    problem = Problem(model, pairs())
    old = model[1].forward
    model[1].forward = lambda X: old(X).sin()
    problem.check(3)
    del model[1].forward
    problem.check(3)


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.BatchNorm1d(2)])
def test_modes_that_are_random_are_refused_later_on(part: nn.Module):
    model = nn.Sequential(net(), part).double().eval()
    problem = Problem(model, pairs())
    model.train()
    v = torch.ones(problem.A.shape[1], dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(ValueError, match="in train mode"):
            problem.A @ v
    model.eval()
    problem.check(2)


def test_modes_that_are_random_may_be_meant():
    model = nn.Sequential(net(), nn.BatchNorm1d(2)).double().eval()
    problem = Problem(model, pairs()[:1], check_deterministic=False)
    model.train()
    problem.check(2)


def test_hooks_that_reach_a_parameter_of_the_user_are_found():
    model = net()
    problem = Problem(model, pairs())
    model[2].register_forward_hook(lambda m, _, output: output * model[0].bias.sum())
    problem.check(3)


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m[0].register_full_backward_hook(lambda *_: None),
        lambda m: m[0].register_full_backward_pre_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    ],
)
def test_backward_hooks_are_looked_at(register: Callable):
    model = net()
    watch = Watch(model, LOSS, dict(model.named_parameters()), pairs())
    before = watch.state()
    handle = register(model)
    try:
        assert watch.state() != before
    finally:
        handle.remove()
    assert watch.state() == before


# -- objects --------------------------------------------------------------------------


@dataclass
class Data:
    x: Tensor
    weight: float = 1.0
    extra: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    weight: float = 1.0
    extra: Any = field(default=None, compare=False)


class Slots:
    __slots__ = ("__private", "extra", "weight", "x")

    def __init__(self, x: Tensor, weight: float = 1.0, extra: Any = None) -> None:
        self.x, self.weight, self.extra, self.__private = x, weight, extra, x


class Plain(Slots):
    """Attributes in slots and others."""

    def __init__(self, x: Tensor, weight: float = 1.0, extra: Any = None) -> None:
        super().__init__(x, weight, extra)
        self.others = {"parent": self}


class Named(NamedTuple):
    x: Tensor
    weight: float = 1.0
    extra: Any = None


class Attributes(dict):
    """Items that are attributes, too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class User(UserDict):
    """As tokenizers return them."""

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("data", ()):
            return self.data[name]
        raise AttributeError(name)


KINDS = {
    "dataclass": Data,
    "frozen dataclass": Frozen,
    "slots": Slots,
    "object": Plain,
    "named tuple": Named,
    "namespace": SimpleNamespace,
    "dictionary of attributes": Attributes,
    "user's dictionary": lambda **items: User(items),
    "nested": lambda **items: Data(extra=None, x=items["x"], weight=items["weight"]),
}


class Reads(nn.Linear):
    """Reads tensors, arrays and numbers from an object."""

    def forward(self, d: Any) -> Tensor:
        h = d.x * d.weight
        if d.extra is not None:
            tensors, array = d.extra
            h = h + tensors[0].x.sin() + float(array[0])
        return super().forward(h).tanh()


def build(kind: str, **options: Any) -> Problem:
    data = []
    for X, y in pairs():
        extra = [deque([Data(X.cos())]), np.array([0.5, 1.0])]
        data.append((KINDS[kind](x=X, weight=1.0, extra=extra), y))
    return Problem(Reads(4, 2).double(), data, **options)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nested"])
def test_changes_inside_of_objects_are_seen(kind: str):
    problem = build(kind)
    d = problem.data[0][0]
    d.x.mul_(2.0)
    problem.check(2)
    d.x.data.add_(1.0)
    problem.check(2)
    d.extra[0][0].x.numpy()[0] = 3.0
    problem.check(2)
    d.extra[1][0] = 2.0
    problem.check(2)
    d.extra[0][0].x = d.x
    problem.check(2)
    if kind not in ("frozen dataclass", "named tuple", "user's dictionary"):
        d.weight = 3.0
        problem.check(2)
        d.x = d.x.flip(0)
        problem.check(2)


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nested"])
def test_objects_are_left_as_they_are(kind: str, cache: str):
    class Writes(Reads):
        def forward(self, d: Any) -> Tensor:
            d.x.mul_(2.0)
            d.extra[0][0].x.add_(1.0)
            output = super().forward(d)
            d.extra[0][0].x = output
            d.extra[0].append(d.x)
            return output

    data, before, again = (build(kind).data for _ in range(3))
    model = Writes(4, 2).double()
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, LOSS, params, data, cache=cache)
    wanted = ggn_now(
        lambda: torch.cat([model(d) for d, _ in again]),
        list(params.values()),
    )
    for _ in range(3):
        torch.testing.assert_close(A.to_dense(), wanted)
    for (d, _), (old, _) in zip(data, before, strict=True):
        assert torch.equal(d.x, old.x) and len(d.extra[0]) == 1
        assert torch.equal(d.extra[0][0].x, old.extra[0][0].x)


def test_notes_that_a_model_takes_in_an_object_are_not_the_users():
    class Notes(Reads):
        def forward(self, d: Any) -> Tensor:
            d.seen = getattr(d, "seen", 0) + 1
            return super().forward(d) * d.seen

    data = build("object").data
    model = Notes(4, 2).double()
    A = GGNLinearOperator(model, LOSS, dict(model.named_parameters()), data)
    first = A.to_dense()
    for _ in range(3):
        torch.testing.assert_close(A.to_dense(), first)
    assert not hasattr(data[0][0], "seen")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nested"])
def test_objects_are_mapped_with_their_kind(kind: str):
    x = torch.ones(3)
    old = KINDS[kind](x=x, weight=2.0, extra=None)
    assert mapped(lambda t: t, old) is old
    new = mapped(lambda t: t + 1, old)
    assert type(new) is type(old) and new.weight == 2.0
    assert torch.equal(new.x, x + 1) and old.x is x
    for place, device in enumerate([torch.device("meta"), torch.device("cpu")]):
        assert (moved(old, device) is old) == bool(place)
        assert moved(old, device).x.device == device


def test_containers_are_mapped_with_their_kind():
    x = torch.ones(3)
    array = np.empty(2, dtype=object)
    array[0], array[1] = x, [x, x]
    containers = [
        OrderedDict(x=x),
        defaultdict(list, {"x": x}),
        deque([x], maxlen=2),
        {1: (x, {"y": [x]})},
        torch.return_types.max((x, x)),
        array,
    ]
    for old in containers:
        new = mapped(torch.neg, old)
        assert type(new) is type(old)
        assert [*map(torch.equal, tensors_in(new), [-t for t in tensors_in(old)])]
        assert all(t is x for t in tensors_in(old)) and tensors_in(old)
    assert mapped(torch.neg, containers[1]).default_factory is list
    assert mapped(torch.neg, containers[2]).maxlen == 2
    assert torch.equal(mapped(torch.neg, MappingProxyType({"x": x}))["x"], -x)


class Moving:
    """Moves itself, some of it in place."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.host, self.moves = x, x, 0

    def to(self, device: torch.device) -> "Moving":
        self.x, self.moves = self.x.to(device), self.moves + 1
        return self


def test_objects_that_move_themselves_do_so_as_copies():
    old = Moving(torch.ones(3))
    (new,) = moved([old], torch.device("meta"))
    assert new.x.device.type == "meta" and new.moves == 1
    assert new.host is old.host
    assert old.x.device.type == "cpu" and old.moves == 0
    assert moved(old, torch.device("cpu")) is old


def test_packed_sequences():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.RNN(2, 3), nn.Linear(3, 2)

        def forward(self, X: Any) -> Tensor:
            return self.last(self.rnn(X)[1][0])

    torch.manual_seed(0)
    data = []
    for lengths in ((4, 2, 1), (3, 3)):
        packed = pack_sequence([torch.randn(n, 2).double() for n in lengths])
        data.append((packed, torch.randn(len(lengths), 2).double()))
    problem = Problem(Recurrent().double(), data)
    data[0][0].data.mul_(2.0)
    problem.check(2)
    assert moved(data[0][0], torch.device("meta")).data.device.type == "meta"


class Graphs:
    """Several graphs in one."""

    def __init__(self, x: Tensor, graph: Tensor, number: int) -> None:
        self.x, self.graph, self.number = x, graph, number


class Pooled(nn.Linear):
    def forward(self, d: Graphs) -> Tensor:
        out = super().forward(d.x).tanh()
        return out.new_zeros(d.number, out.shape[1]).index_add(0, d.graph, out)


def graphs() -> list[tuple[Graphs, Tensor]]:
    torch.manual_seed(0)
    found = []
    for sizes in ((1, 1, 1), (2, 1), (3, 2, 1)):
        graph = torch.repeat_interleave(torch.tensor(sizes))
        x = torch.randn(len(graph), 4).double()
        y = torch.randn(len(sizes), 2).double()
        found.append((Graphs(x, graph, len(sizes)), y))
    return found


def test_objects_are_neither_cut_nor_joined():
    # In the first batch there are as many nodes as graphs.
    (first, _), (second, _), _ = graphs()
    assert cut(first, 3, 0, 1) is first
    with pytest.raises(ValueError, match="objects"):
        joined([first, second], [3, 2])
    problem = Problem(Pooled(4, 2).double(), graphs(), batch_size_fn=lambda d: d.number)
    problem.check(20)
    H = HessianLinearOperator(problem.A.risk)
    v = torch.ones(H.shape[1], dtype=torch.float64)
    first_product = H @ v
    for _ in range(20):
        torch.testing.assert_close(H @ v, first_product)


def test_size_of_an_object_is_the_users_to_say():
    model = Pooled(4, 2).double()
    risk = EmpiricalRisk(model, LOSS, dict(model.named_parameters()), graphs())
    with pytest.raises(ValueError, match="batch_size_fn"):
        risk.batch_size(graphs()[0][0])


def test_a_loader_of_objects_repeats():
    model = Pooled(4, 2).double()
    loader = DataLoader(graphs(), batch_size=None)
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, LOSS, params, loader)
    assert A.risk._repeats
    wanted = ggn_now(
        lambda: torch.cat([model(d) for d, _ in graphs()]), list(params.values())
    )
    for _ in range(3):
        torch.testing.assert_close(A.to_dense(), wanted)


class Colour(enum.Enum):
    RED = 1


def test_plain_values_are_not_refused():
    values = [
        *(None, True, 1, 1.0, 1j, "a", b"a", bytearray(b"a"), ..., range(3), slice(3)),
        *(np.float32(1), np.zeros(3), np.array(["a", None], dtype=object)),
        *(np.zeros(2, dtype=[("a", "f4")]), np.array(["2020"], dtype="datetime64")),
        *(torch.Size([3]), torch.float32, torch.device("cpu"), torch.strided),
        *(torch.Generator(), np.random.default_rng(0), torch.sparse_coo),
        *(
            Colour.RED,
            operator.itemgetter(1),
            datetime.datetime(2020, 1, 1),
            datetime.timedelta(1),
        ),
        *(torch.finfo(torch.float32), torch.iinfo(torch.int8), torch.qint8),
        *(pathlib.Path("a"), len, torch.sin, lambda: None, int, np, object()),
        *({1, 2}, frozenset({"a"}), deque([1]), memoryview(b"abc"), nn.Linear(2, 2)),
        *(SimpleNamespace(a=1), Data(torch.ones(2)), (), {}, [], [[]]),
    ]
    watch = Watch(net(), LOSS, {}, [({"x": torch.ones(2), "v": values}, None)])
    before = watch.state()
    assert watch.state() == before
    values[7].extend(b"b")
    assert watch.state() != before
    before = watch.state()
    values[12][1] = 3
    assert watch.state() != before
    before = watch.state()
    next(v for v in values if isinstance(v, deque)).append(2)
    assert watch.state() != before
    before = watch.state()
    next(v for v in values if isinstance(v, nn.Linear)).weight.data.add_(1)
    assert watch.state() != before


def test_jagged_tensors_are_seen():
    jagged = torch.nested.nested_tensor(
        [torch.ones(2, 4), torch.ones(1, 4)], layout=torch.jagged
    )
    watch = Watch(net(), LOSS, {}, [({"x": torch.ones(2), "j": jagged}, None)])
    before = watch.state()
    assert watch.state() == before
    jagged.values().data[2, 3] = 0
    assert watch.state() != before
    before = watch.state()
    jagged.offsets().data[1] = 1
    assert watch.state() != before


def test_masks_of_arrays_are_seen():
    array = np.ma.masked_array(np.arange(3.0), [False, True, False])
    watch = Watch(net(), LOSS, {}, [({"x": torch.ones(2), "a": array}, None)])
    before = watch.state()
    array.mask[0] = True
    assert watch.state() != before


@pytest.mark.parametrize("value", [iter([1]), zip(), (i for i in "a")])
def test_what_cannot_be_looked_at_is_named(value: Any):
    model = net()
    data = [(Data(pairs()[0][0], extra=[value]), pairs()[0][1])]
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"builtins.{kind}.*cannot be looked at"):
        EmpiricalRisk(model, LOSS, dict(model.named_parameters()), data)


class Noting(nn.Linear):
    def forward(self, X: dict) -> Tensor:
        X["notes"].count += 1
        X["list"].append(1)
        X["array"] *= 2
        factor = X["notes"].count + len(X["list"]) + float(X["array"][0])
        return super().forward(X["x"]) * factor


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_what_holds_no_tensors_is_left_as_it_is(cache: str):
    X = {"x": pairs()[0][0], "notes": SimpleNamespace(count=0), "list": []}
    X["array"] = np.ones(3)
    data = [(X, pairs()[0][1])]
    model = Noting(4, 2).double()
    A = GGNLinearOperator(
        model, LOSS, dict(model.named_parameters()), data, cache=cache
    )
    first = A.to_dense()
    J = torch.cat([X["x"], torch.ones(4, 1).double()], 1) * 4
    torch.testing.assert_close(first[:4, :4], 2 * (J.T @ J)[:4, :4])
    for _ in range(3):
        torch.testing.assert_close(A.to_dense(), first)
    assert X["notes"].count == 0 and X["list"] == [] and X["array"].sum() == 3


class Uncopied:
    """Cannot be copied as it wants to be."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("not this one")


def test_objects_that_refuse_to_be_copied():
    old = Uncopied(torch.ones(2))
    new = mapped(torch.neg, old)
    assert type(new) is Uncopied and torch.equal(new.x, -old.x)

    class Bound(np.ndarray):
        __reduce_ex__ = Uncopied.__reduce_ex__

    stays = {"x": old.x, "file": io.StringIO(), "bound": np.zeros(2).view(Bound)}
    assert mapped(torch.neg, stays, anew=True)["file"] is stays["file"]


def test_what_is_met_again_is_walked_once():
    class Node:
        pass

    nodes = [Node() for _ in range(30)]
    for node in nodes:
        node.neighbours = [other for other in nodes if other is not node]
        node.x = torch.ones(2)
        node.log = logging.getLogger("a.b")
    assert len(tensors_in(nodes)) == 30
    new = mapped(torch.neg, nodes)
    assert torch.equal(new[1].x, -nodes[1].x)
    one = [torch.ones(2)]
    new = mapped(torch.neg, {"a": one, "b": (one, one)})
    assert new["a"] is new["b"][0] is new["b"][1]
    watch = Watch(net(), LOSS, {}, [({"x": torch.ones(2), "n": nodes}, None)])
    before = watch.state()
    nodes[3].x.data.add_(1)
    assert watch.state() != before


def test_attributes_of_a_users_dictionary_are_seen():
    X = User(x=pairs()[0][0], weight=1.0, extra=None)
    X.scale = 2.0
    X._private = iter([1])
    watch = Watch(net(), LOSS, {}, [(X, None)])
    before = watch.state()
    X.scale = 3.0
    assert watch.state() != before
    new = mapped(torch.neg, X)
    assert new.scale == 3.0 and torch.equal(new.x, -X["x"])


def test_circles_end():
    d = Data(torch.ones(2))
    d.extra = [d, {"d": d}]
    assert tensors_in(d)[0] is d.x
    assert len(leaves_in(d)) < 20
    assert torch.equal(mapped(torch.neg, d).x, -d.x)


# -- parameters that are replaced -----------------------------------------------------


class Square(nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return W.square()


def _prune(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def _new_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _new_module(model: nn.Module) -> None:
    model[0] = nn.Linear(4, 4).double()


def _assign(model: nn.Module) -> None:
    state = {n: p.detach().clone() for n, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _parametrize(model: nn.Module) -> None:
    register_parametrization(model[0], "weight", Square())


def _tie(model: nn.Module) -> None:
    model[0].weight = model[3].weight


def _delete(model: nn.Module) -> None:
    del model[0].weight
    model[0].weight = torch.zeros(4, 4).double()


def _shorten(model: nn.Module) -> None:
    del model[0]


REPLACED = [
    *(_prune, _new_parameter, _new_module, _assign, _parametrize, _tie, _delete),
    _shorten,
]


def four() -> nn.Module:
    first, tanh, last = net()
    return nn.Sequential(first, tanh, nn.Identity(), nn.Linear(4, 4).double(), last)


@pytest.mark.parametrize("change", REPLACED)
def test_parameters_that_are_replaced_are_named(change: Callable):
    model = four()
    problem = Problem(model, pairs())
    twin = problem.A.risk
    change(model)
    problem.refuses("weight")
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(ValueError, match="Build a new operator"):
            copied(twin)
    if change is _parametrize:  # such a module cannot be pickled
        return
    with pytest.raises(ValueError, match="Build a new operator"):
        pickle.loads(pickle.dumps(twin))


def test_a_pruned_model_after_its_masks_are_removed():
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    problem = Problem(model, pairs())
    prune.remove(model[0], "weight")
    problem.refuses("'0.weight_orig'", "['0.weight'")
    Problem(model, pairs()).check(2)


def test_a_parametrization_that_is_removed():
    model = net()
    register_parametrization(model[0], "weight", Square())
    problem = Problem(model, pairs())
    remove_parametrizations(model[0], "weight")
    problem.refuses("0.parametrizations.weight.original")


def test_other_parameters_than_those_given_may_come_and_go():
    model = four()
    params = {"3.weight": model[3].weight}
    A = GGNLinearOperator(model, LOSS, params, pairs())

    def check() -> None:
        def output() -> Tensor:
            return torch.cat([model(X) for X, _ in pairs()])

        for _ in range(3):
            wanted = ggn_now(output, [model[3].weight])
            torch.testing.assert_close(A.to_dense(), wanted)

    check()
    for change in (_new_parameter, _prune):
        change(model)
        check()
    prune.remove(model[0], "weight")
    check()
    model[1] = nn.Softplus()
    check()


def test_a_module_whose_parameters_are_given_as_copies_may_replace_them():
    model = net()
    params = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    A = GGNLinearOperator(model, LOSS, params, pairs())

    def check() -> None:
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}

        def output() -> Tensor:
            return torch.cat(
                [torch.func.functional_call(model, leaves, (X,)) for X, _ in pairs()]
            )

        wanted = ggn_now(output, list(leaves.values()))
        for _ in range(3):
            torch.testing.assert_close(A.to_dense(), wanted)

    check()
    for change in (_new_parameter, _new_module, _assign):
        change(model)
        check()
    model[1] = nn.Softplus()
    check()
    _prune(model)
    with pytest.raises(ValueError, match=r"'0.weight'.*Build a new operator"):
        A @ torch.ones(A.shape[1], dtype=torch.float64)
