"""What people do wrong, and what they are told: the cause, and the cure."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from numpy.linalg import LinAlgError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvlinops import (
    BlockDiagonalLinearOperator,
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    ScalarFunction,
    SubmatrixLinearOperator,
    TensorLinearOperator,
)
from curvlinops.estimators.spectrum import lanczos_approximate_spectrum
from curvlinops.estimators.trace import hutchinson_trace, hutchpp_trace, xtrace
from loss_cases import Hidden

# Where the mistakes are made: a small network on two batches


class Net(nn.Module):
    """Counts its evaluations, so that a test can tell what was done in vain."""

    calls = 0

    def __init__(self, *middle: nn.Module, outputs: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.middle = nn.Sequential(*middle)
        self.last = nn.Linear(4, outputs)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, X: Tensor) -> Any:
        type(self).calls += 1
        return self.last(self.middle(self.first(X).tanh())) * self.scale


def seeded(function: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(*args, **kwargs)

    return run


@seeded
def batches(*sizes: int, outputs: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(n, 3), torch.rand(n, outputs)) for n in sizes or (4, 3)]


def labelled(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(X, torch.arange(len(X)) % 2) for X, _ in batches(*sizes)]


@seeded
def make(cls: Callable = GGNLinearOperator, /, **changes: Any) -> Any:
    """Build an operator, with some of the arguments replaced."""
    model = changes.pop("model", None)
    model = Net() if model is None else model
    loss = changes.pop("loss", nn.MSELoss())
    params = changes.pop("params", None)
    if params is None:
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    elif callable(params):
        params = params(model)
    data = changes.pop("data", batches())
    data = data() if callable(data) and not isinstance(data, Dataset) else data
    if cls is JacobianLinearOperator:
        return cls(model, params, data, **changes)
    return cls(model, loss, params, data, **changes)


classify = partial(make, loss=nn.CrossEntropyLoss(), data=labelled)


def wrong(change: Callable[[Tensor, Tensor], Any]) -> list:
    """Return data whose second batch is wrong."""
    first, second = batches()
    return [first, change(*second)]


def loader(**options: Any) -> DataLoader:
    X, y = (torch.cat(side) for side in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(X, y), batch_size=2, **options)


class Augmented(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.ones(3) + torch.randn(3), torch.ones(2)


class Wrapped(nn.Module):
    """A network whose prediction passes through a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = Net()
        self.function = function

    def forward(self, X: Tensor) -> Any:
        return self.function(self.net(X))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Forgetful(torch.autograd.Function):
    """Its backward pass leaves the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.from_numpy(np.cos(x.detach().numpy()))


class NoGrad(Net):
    @torch.no_grad()
    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X)


class UnusedLinear(nn.Linear):
    """Has parameters, and passes on its input."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        return X


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.middle[1].weight = self.middle[0].weight


class Checkpointed(Net):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, X: Tensor) -> Tensor:
        h = self.first(X)
        return checkpoint(self.last, h, use_reentrant=self.use_reentrant)


def in_inference_mode(model: nn.Module) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {n: p.clone() for n, p in model.named_parameters()}


def ignoring_parameters() -> None:
    model = Net()
    params = dict(model.named_parameters())
    GGNLinearOperator(lambda params, X: model(X), nn.MSELoss(), params, batches())


class Ragged(nn.Linear):
    """Takes sums over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        return torch.stack([x.sum(0) for x in super().forward(X).tanh().unbind()])


def ragged() -> list[tuple[Tensor, Tensor]]:
    sequences = [torch.rand(n, 3) for n in (2, 4)]
    nested = partial(torch.nested.nested_tensor, layout=torch.jagged)
    return [(nested(sequences), torch.rand(2, 2)) for _ in range(2)]


def without_buffer() -> nn.Module:
    model = Net()
    model.scale = model.scale.to("meta")
    return model


def scalar(f: Callable) -> None:
    HessianLinearOperator(ScalarFunction(f, {"a": torch.ones(2)}))


def hard() -> TensorLinearOperator:
    """Return a definite matrix that takes more iterations than rows."""
    return TensorLinearOperator(torch.logspace(0, 14, 40).double().diag())


def after(change: Callable[..., Any], cls: Callable = GGNLinearOperator) -> Callable:
    """Return a function that changes something after construction and multiplies."""

    def run() -> None:
        model, data = Net(), batches()
        params = dict(model.named_parameters())
        A = make(cls, model=model, params=params, data=data)
        change(SimpleNamespace(model=model, params=params, data=data, A=A))
        A @ torch.ones(A.shape[1])

    return run


def multiply(x: Any, cls: Callable = GGNLinearOperator) -> Callable:
    return lambda: make(cls) @ (x() if callable(x) else x)


def resize(s: SimpleNamespace) -> None:
    s.params["last.bias"].data = torch.ones(3)


P = 3 * 4 + 4 + 4 * 2 + 2


def listed(*change: Any) -> list[Tensor]:
    shapes = {0: (4, 3), 1: (4,), 2: (2, 4), 3: (2,)} | dict(change)
    return [torch.ones(shape) for shape in shapes.values() if shape is not None]


def indefinite() -> TensorLinearOperator:
    return TensorLinearOperator(torch.diag(torch.tensor([1.0, -1.0, 2.0]).double()))


def definite() -> TensorLinearOperator:
    return TensorLinearOperator(torch.diag(torch.tensor([1.0, 3.0, 2.0]).double()))


@dataclass(frozen=True)
class Mistake:
    """A mistake.

    Attributes
    ----------
    name
        What it is.
    do
        Makes it.
    error
        Type of the exception or warning.
    cause, cure
        Regular expressions that the message matches.
    """

    name: str
    do: Callable[[], Any]
    error: Any
    cause: str
    cure: str


V, T, W = ValueError, TypeError, UserWarning

VECTORS = (
    ("too long", multiply(np.ones(P + 1)), V, rf"{P}.*\({P + 1},\)", "shape"),
    ("too short", multiply(np.ones(P - 1)), V, rf"{P}.*\({P - 1},\)", "shape"),
    ("too long tensor", multiply(torch.ones(P + 1)), V, rf"{P}.*\({P + 1},", "shape"),
    ("row vector", multiply(np.ones((1, P))), V, rf"{P}.*\(1, {P}\)", "shape"),
    ("3-d", multiply(np.ones((P, 1, 1))), V, rf"{P}.*\({P}, 1, 1\)", "shape"),
    ("3-d tensor", multiply(torch.ones(P, 2, 1)), V, rf"\({P}, 2, 1\)", "shape"),
    ("left, too long", lambda: np.ones(P + 2) @ make(), V, rf"{P + 2}", "shape"),
    (
        "other float",
        multiply(torch.ones(P).double()),
        T,
        "float32.*float64",
        r"x\.to\(",
    ),
    ("half", multiply(torch.ones(P).half()), T, "float32.*float16", r"x\.to\("),
    (
        "complex128",
        multiply(torch.ones(P) + 0j * torch.ones(P).double()),
        T,
        "float32.*complex128",
        r"x\.to\(",
    ),
    (
        "other device",
        multiply(torch.ones(P, device="meta")),
        V,
        "cpu.*meta",
        r"x\.to\(",
    ),
    ("object array", multiply(np.array([None] * P)), T, "object", "NumPy array"),
    ("string array", multiply(np.array(["1"] * P)), T, "<U1", "NumPy array"),
    ("sparse vector", multiply(scipy.sparse.eye_array(P)), T, "sparse", "toarray"),
    ("dict", multiply({"a": np.ones(P)}), T, "dict", "NumPy array"),
    ("None", multiply(None), T, "NoneType", "NumPy array"),
    (
        "in a graph",
        multiply(lambda: 2 * torch.ones(P, requires_grad=True)),
        W,
        "not differentiable",
        r"detach\(\)",
    ),
    ("list too short", multiply(listed((3, None))), V, "list of 4 tensors", "shapes"),
    (
        "list in wrong shapes",
        multiply(listed((0, (3, 4)))),
        V,
        r"\(3, 4\)",
        r"\(4, 3\)",
    ),
    (
        "list with a column missing",
        multiply(listed((0, (4, 3, 2)))),
        V,
        r"\(4, 3, 2\)",
        "several columns",
    ),
    (
        "list of other floats",
        multiply([t.double() for t in listed()]),
        T,
        "float32.*float64",
        r"x\.to\(",
    ),
    (
        "list of tensor and array",
        multiply([torch.ones(2), np.ones(3)]),
        T,
        "no array",
        "nothing but tensors",
    ),
    (
        "NaN to be solved",
        lambda: CGInverseLinearOperator(definite()) @ np.full(3, np.nan),
        V,
        "NaN",
        "Look at",
    ),
)

DATA = (
    ("no batches", lambda: make(data=[]), V, "empty", r"at least one batch"),
    (
        "empty loader",
        lambda: make(
            data=lambda: DataLoader(TensorDataset(torch.ones(0, 3), torch.ones(0, 2)))
        ),
        V,
        "empty",
        "batch",
    ),
    ("lone pair", lambda: make(data=batches()[0]), V, "pair", r"pass `\[\(X, y\)\]`"),
    (
        "lone pair as list",
        lambda: make(data=list(batches()[0])),
        V,
        "pair",
        r"pass `\[\(X, y\)\]`",
    ),
    ("lone tensor", lambda: make(data=torch.ones(4, 3)), T, "Tensor", r"iterable of"),
    (
        "no targets",
        lambda: make(data=[X for X, _ in batches()]),
        V,
        "batch 0 is a tensor",
        r"pair `\(X, y\)`",
    ),
    (
        "triples",
        lambda: make(data=[(X, y, y) for X, y in batches()]),
        V,
        "length 3",
        r"pair `\(X, y\)`",
    ),
    ("None", lambda: make(data=None), T, "data", "Pass"),
    ("number", lambda: make(data=3), T, "int", "iterable"),
    (
        "generator",
        lambda: make(data=(b for b in batches())),
        V,
        "one-shot.*generator",
        "Pass a list",
    ),
    (
        "zip",
        lambda: make(data=zip(*zip(*batches(), strict=True), strict=True)),
        V,
        "one-shot.*zip",
        "Pass a list",
    ),
    (
        "iterator of a loader",
        lambda: make(data=lambda: iter(loader())),
        V,
        "one-shot",
        "Pass a list",
    ),
    (
        "shuffled, last dropped",
        lambda: make(data=lambda: loader(shuffle=True, drop_last=True)),
        V,
        "differs between the passes.*drop_last",
        "shuffle=False",
    ),
    (
        "shuffled, order matters",
        lambda: make(JacobianLinearOperator, data=lambda: loader(shuffle=True)),
        V,
        "differ",
        "shuffle=False",
    ),
    (
        "shuffled, sampled",
        lambda: make(FisherMCLinearOperator, data=lambda: loader(shuffle=True)),
        V,
        "differ",
        "shuffle=False",
    ),
    (
        "augmented",
        lambda: make(data=lambda: DataLoader(Augmented())),
        V,
        "differs between the passes",
        "augmentation",
    ),
    (
        "NaN input",
        lambda: make(data=wrong(lambda X, y: (X * np.nan, y))),
        V,
        "not finite.*batch 1",
        "inputs",
    ),
    (
        "infinite input",
        lambda: make(data=wrong(lambda X, y: (X / 0, y))),
        V,
        "not finite.*batch 1",
        "inputs",
    ),
    (
        "NaN target",
        lambda: make(data=wrong(lambda X, y: (X, y * np.nan))),
        V,
        "batch 1 is not finite",
        "targets",
    ),
    (
        "float64 input",
        lambda: make(data=wrong(lambda X, y: (X.double(), y))),
        V,
        "batch 1.*float64.*float32",
        r"\.to\(|Convert",
    ),
    (
        "integer input",
        lambda: make(data=wrong(lambda X, y: (X.long(), y))),
        V,
        "batch 1.*int64.*float32",
        r"\.to\(|Convert",
    ),
    (
        "input of wrong width",
        lambda: make(data=wrong(lambda X, y: (X[:, :2], y))),
        V,
        "batch 1.*shape",
        "inputs",
    ),
    (
        "input as array",
        lambda: make(data=wrong(lambda X, y: (X.numpy(), y))),
        (T, V),
        "ndarray",
        "tensor",
    ),
    (
        "target as array",
        lambda: make(data=wrong(lambda X, y: (X, y.numpy()))),
        T,
        "ndarray",
        "tensor",
    ),
    (
        "target as number",
        lambda: make(data=wrong(lambda X, y: (X, 1.0))),
        T,
        "float",
        "tensor",
    ),
    (
        "more targets than inputs",
        lambda: make(data=wrong(lambda X, y: (X[:2], y))),
        V,
        r"\(3, 2\).*\(2, 2\)",
        "reshape",
    ),
    (
        "target broadcasts",
        lambda: make(model=Net(outputs=1), data=[(X, y[:, 0]) for X, y in batches()]),
        V,
        r"\(4,\).*\(4, 1\)",
        "reshape|squeeze",
    ),
    (
        "class too large",
        lambda: classify(data=[(X, y + 1) for X, y in labelled()]),
        V,
        "contains 2.*0..1",
        "labels",
    ),
    (
        "class negative",
        lambda: classify(data=[(X, y - 1) for X, y in labelled()]),
        V,
        "contains -1.*0..1",
        "labels",
    ),
    (
        "classes as floats",
        lambda: classify(data=[(X, y.float()) for X, y in labelled()]),
        V,
        "float32",
        "class indices",
    ),
    (
        "classes as column",
        lambda: classify(data=[(X, y[:, None]) for X, y in labelled()]),
        V,
        r"\(4, 1\)",
        "class indices",
    ),
    (
        "classes as bools",
        lambda: classify(data=[(X, y > 0) for X, y in labelled()]),
        V,
        "bool",
        "class indices",
    ),
    (
        "nothing but ignored",
        lambda: classify(data=[(X, y * 0 - 100) for X, y in labelled()]),
        V,
        "every one is `ignore_index`",
        "target",
    ),
    (
        "input without numbers",
        lambda: make(data=wrong(lambda X, y: (X.to("meta"), y))),
        V,
        "inputs of batch 1.*`meta`",
        "load or create",
    ),
    (
        "target without numbers",
        lambda: make(
            data=lambda: DataLoader(
                wrong(lambda X, y: (X, y.to("meta"))), batch_size=None
            )
        ),
        V,
        "targets of batch 1.*`meta`",
        "load or create",
    ),
    (
        "ragged input",
        lambda: make(model=Ragged(), data=ragged()) @ torch.ones(8),
        V,
        r"Batch [01] holds a nested \(jagged\)",
        "to_padded_tensor",
    ),
    (
        "ragged input, factored",
        lambda: make(KFACLinearOperator, model=Ragged(), data=ragged()) @ torch.ones(8),
        V,
        r"Batch [01] holds a nested \(jagged\)",
        "to_padded_tensor",
    ),
    (
        "ragged output",
        lambda: make(model=nn.Linear(3, 2), data=ragged()),
        T,
        "nested",
        "values|to_padded_tensor",
    ),
    ("wrong num_data", lambda: make(num_data=5), V, "`num_data` is 5.*7", "num_data"),
    (
        "wrong batch_size_fn",
        lambda: make(num_data=7, batch_size_fn=lambda X: 1),
        V,
        "7.*2",
        "num_data",
    ),
    ("batches emptied later", after(lambda s: s.data.clear()), V, "empty", "batch"),
    (
        "NaN written later",
        after(lambda s: s.data[1][0].fill_(np.nan)),
        V,
        "not finite.*batch 1",
        "inputs",
    ),
    ("batch spoilt later", after(lambda s: s.data.append(1)), V, "batch 2", "pair"),
    (
        "rows added later",
        after(lambda s: s.data.append(s.data[0]), JacobianLinearOperator),
        V,
        "14 entries",
        "Build a new operator",
    ),
)

MODELS = (
    (
        "dropout",
        lambda: make(model=Net(nn.Dropout(0.3))),
        V,
        r"Dropout 'middle\.0'.*train.*0\.3",
        r"model\.eval\(\)",
    ),
    (
        "batch norm",
        lambda: make(model=Net(nn.BatchNorm1d(4))),
        V,
        r"BatchNorm1d 'middle\.0'.*train",
        r"model\.eval\(\)",
    ),
    (
        "batch norm without statistics",
        lambda: make(model=Net(nn.BatchNorm1d(4, track_running_stats=False)).eval()),
        V,
        r"BatchNorm1d 'middle\.0'.*tracks no",
        "check_deterministic=False",
    ),
    (
        "dropout of a recurrent layer",
        lambda: make(model=Wrapped(nn.Sequential(nn.LSTM(2, 2, 2, dropout=0.5)))),
        V,
        "LSTM.*train",
        r"model\.eval\(\)",
    ),
    (
        "dropout of attention",
        lambda: make(model=Wrapped(nn.MultiheadAttention(2, 1, 0.1))),
        V,
        "MultiheadAttention.*train",
        r"model\.eval\(\)",
    ),
    (
        "random forward pass",
        lambda: make(model=Wrapped(lambda f: f + torch.randn_like(f))),
        V,
        "model is random",
        r"eval\(\)|randomness",
    ),
    (
        "tuple output",
        lambda: make(model=Wrapped(lambda f: (f, f))),
        T,
        "tuple.*batch 0",
        "returns the tensor",
    ),
    (
        "dict output",
        lambda: make(model=Wrapped(lambda f: {"logits": f})),
        T,
        "dict",
        "logits|returns the tensor",
    ),
    (
        "no output",
        lambda: make(model=Wrapped(lambda f: None)),
        T,
        "NoneType",
        "returns the tensor",
    ),
    (
        "integer output",
        lambda: make(model=Wrapped(lambda f: f.argmax(1))),
        T,
        "int64",
        "floating",
    ),
    (
        "complex output",
        lambda: make(model=Wrapped(lambda f: f + 1j)),
        T,
        "complex64",
        "view_as_real",
    ),
    (
        "NaN output",
        lambda: make(model=Wrapped(lambda f: (-f.abs()).log())),
        V,
        "not finite",
        "parameters",
    ),
    (
        "detached output",
        lambda: make(model=Wrapped(torch.Tensor.detach)),
        V,
        "does not depend",
        "detached",
    ),
    ("no_grad inside", lambda: make(model=NoGrad()), V, "does not depend", "no_grad"),
    (
        "half the model",
        lambda: make(model=Net().half()),
        V,
        "float32.*float16",
        r"\.to\(|Convert",
    ),
    (
        "mixed dtypes",
        lambda: make(params=lambda m: (m.last.double(), dict(m.named_parameters()))[1]),
        V,
        r"float32 \(.*float64 \(",
        r"model\.to\(",
    ),
    (
        "mixed devices",
        lambda: make(
            params=lambda m: (m.last.to("meta"), dict(m.named_parameters()))[1]
        ),
        V,
        r"cpu \(.*meta \(",
        r"model\.to\(",
    ),
    (
        "unused",
        lambda: make(model=nn.Sequential(Net(), UnusedLinear())),
        W,
        r"1\.weight.*1\.bias",
        "zero",
    ),
    (
        "foreign parameter",
        lambda: make(params=[nn.Parameter(torch.ones(2))]),
        V,
        "Entry 0.*not a parameter",
        "dict of names",
    ),
    (
        "foreign name",
        lambda: make(params={"fist.weight": torch.ones(4, 3)}),
        V,
        r"no parameter 'fist\.weight'",
        r"first\.weight",
    ),
    (
        "repeated",
        lambda: make(params=lambda m: [m.first.bias, m.last.bias, m.first.bias]),
        V,
        r"Entry 2.*repeats.*'first\.bias'",
        "once",
    ),
    (
        "tied twice",
        lambda: make(
            model=Tied(),
            params=lambda m: dict(m.named_parameters(remove_duplicate=False)),
        ),
        V,
        "tied",
        "pass it once",
    ),
    ("none at all", lambda: make(params={}), V, "empty", "named_parameters"),
    ("empty list", lambda: make(params=[]), V, "empty", "named_parameters"),
    (
        "state_dict",
        lambda: make(params=nn.Module.state_dict),
        V,
        "state_dict",
        "named_parameters",
    ),
    (
        "generator of parameters",
        lambda: make(params=nn.Module.parameters),
        T,
        "once",
        r"list\(model\.parameters",
    ),
    (
        "generator of names",
        lambda: make(params=nn.Module.named_parameters),
        T,
        "once",
        r"dict\(model\.named_parameters",
    ),
    (
        "list of pairs",
        lambda: make(params=lambda m: list(m.named_parameters())),
        V,
        "Entry 0",
        "dict",
    ),
    (
        "lone parameter",
        lambda: make(params=lambda m: m.first.weight),
        T,
        "Parameter",
        "list|dict",
    ),
    (
        "wrong shape",
        lambda: make(params={"first.weight": torch.ones(3, 4)}),
        V,
        r"\(4, 3\) in the model.*\(3, 4\)",
        "params",
    ),
    (
        "no tensor",
        lambda: make(params={"first.weight": np.ones((4, 3))}),
        T,
        r"first\.weight.*ndarray",
        "tensor",
    ),
    (
        "integers",
        lambda: make(params={"first.weight": torch.ones(4, 3).long()}),
        T,
        "int64",
        "floating",
    ),
    (
        "complex",
        lambda: make(params={"first.weight": torch.ones(4, 3) + 0j}),
        T,
        "complex64.*floating",
        "view_as_real",
    ),
    (
        "parameters without numbers",
        lambda: make(model=Net().to("meta")),
        V,
        r"'first\.weight' is on the `meta` device",
        "to_empty",
    ),
    (
        "a buffer without numbers",
        lambda: make(model=without_buffer()),
        V,
        "'scale' is on the `meta` device",
        "to_empty",
    ),
    (
        "NumPy inside",
        lambda: make(model=Wrapped(lambda f: torch.as_tensor(np.tanh(f)))),
        V,
        "batch 0.*NumPy.*no derivatives",
        "torch.exp",
    ),
    ("pattern", lambda: make(params="frist.*"), V, r"frist\.\*", r"first"),
    (
        "lazy",
        lambda: make(model=nn.Sequential(nn.LazyLinear(2))),
        V,
        "not initialised",
        "run the lazy module",
    ),
    (
        "inference tensors",
        lambda: make(params=in_inference_mode),
        V,
        "inference_mode",
        "clone",
    ),
    (
        "no model",
        lambda: GGNLinearOperator(3, nn.MSELoss(), {"a": torch.ones(1)}, batches()),
        T,
        "int",
        "module or a callable",
    ),
    (
        "list for a callable",
        lambda: (
            make(model=None, params=None)
            and GGNLinearOperator(
                lambda p, X: X, nn.MSELoss(), [torch.ones(1)], batches()
            )
        ),
        T,
        "plain callable",
        "dict of names",
    ),
    (
        "pattern for a callable",
        lambda: GGNLinearOperator(lambda p, X: X, nn.MSELoss(), "*", batches()),
        T,
        "plain callable",
        "dict of names",
    ),
    (
        "callable that ignores its parameters",
        ignoring_parameters,
        V,
        "directly instead of",
        "params",
    ),
    (
        "callable of one argument",
        lambda: GGNLinearOperator(
            lambda X: X, nn.MSELoss(), {"a": torch.ones(1)}, batches()
        ),
        T,
        "argument",
        r"params, X|\(params",
    ),
    (
        "function with one derivative",
        lambda: make(HessianLinearOperator, model=Wrapped(Once.apply)) @ torch.ones(P),
        (V, RuntimeError),
        "once_differentiable",
        "twice differentiable",
    ),
    (
        "function with one derivative, GGN",
        lambda: make(model=Wrapped(Once.apply)) @ torch.ones(P),
        (V, RuntimeError),
        "once_differentiable",
        "twice differentiable",
    ),
    (
        "reentrant checkpoint",
        lambda: make(model=Checkpointed(use_reentrant=True)) @ torch.ones(P),
        (V, RuntimeError),
        "reentrant",
        "use_reentrant=False",
    ),
    (
        "converted later",
        after(lambda s: s.model.double()),
        V,
        "float32.*float64",
        "Build a new operator",
    ),
    ("resized later", after(resize), V, "dim=26.*dim=27", "Build a new operator"),
    (
        "NaN written later",
        after(lambda s: s.params["first.bias"].data.fill_(np.nan)),
        V,
        "not finite",
        "parameters",
    ),
    ("cache misspelt", lambda: make(cache="on"), V, "'on'", '"auto", "off"'),
    ("cache negative", lambda: make(cache=-1), V, "-1", '"auto", "off"'),
    ("unknown option", lambda: make(cach="off"), T, "cach", "unexpected"),
)

LOSSES = (
    (
        "no reduction",
        lambda: make(loss=nn.MSELoss(reduction="none")),
        V,
        "'none'",
        "'mean' or 'sum'",
    ),
    (
        "function without reduction",
        lambda: make(loss=partial(F.mse_loss, reduction="none")),
        V,
        "'none'",
        "'mean' or 'sum'",
    ),
    ("class", lambda: make(loss=nn.MSELoss), T, "class", r"instance.*MSELoss\(\)"),
    ("string", lambda: make(loss="mse"), T, "'mse'.*not callable", "instance"),
    ("None", lambda: make(loss=None), (T, V), "loss", "Pass|needs"),
    (
        "legacy argument",
        lambda: make(loss=partial(F.mse_loss, size_average=False)),
        V,
        "size_average",
        "reduction='sum'",
    ),
    (
        "target bound",
        lambda: make(loss=partial(F.mse_loss, torch.ones(4, 2))),
        V,
        "positional",
        "by keyword",
    ),
    (
        "vector",
        lambda: make(loss=lambda f, y: (f - y).square().sum(1)),
        V,
        r"shape \(4,\)",
        r"\.mean\(\)",
    ),
    ("float", lambda: make(loss=lambda f, y: 3.0), V, "float", r"0-d tensor"),
    (
        "detached",
        lambda: make(loss=lambda f, y: (f.detach() - y).square().mean()),
        V,
        "does not depend on the model's output",
        "detach",
    ),
    (
        "item",
        lambda: make(loss=lambda f, y: torch.tensor((f - y).square().mean().item())),
        V,
        "does not depend on the model's output",
        "item",
    ),
    (
        "absolute value",
        lambda: make(loss=nn.L1Loss()),
        W,
        "piecewise linear.*zero",
        "HuberLoss",
    ),
    (
        "absolute value as function",
        lambda: make(loss=partial(F.l1_loss)),
        W,
        "piecewise linear.*zero",
        "huber_loss",
    ),
    (
        "absolute value in a partial",
        lambda: make(loss=partial(nn.L1Loss())),
        W,
        "piecewise linear.*zero",
        "HuberLoss",
    ),
    (
        "no width",
        lambda: make(loss=nn.SmoothL1Loss(beta=0.0)),
        W,
        "piecewise linear.*zero",
        "HuberLoss",
    ),
    (
        "log-probabilities",
        lambda: classify(loss=nn.NLLLoss()),
        W,
        "piecewise linear.*GGN",
        "logits.*CrossEntropyLoss",
    ),
    (
        "log-probabilities, factored",
        lambda: classify(KFACLinearOperator, loss=F.nll_loss, fisher_type="type-2"),
        W,
        "piecewise linear.*approximated",
        "logits.*CrossEntropyLoss",
    ),
    (
        "log-probabilities, between outputs",
        lambda: make(GramLinearOperator, loss=nn.KLDivLoss(reduction="batchmean")),
        W,
        "piecewise linear.*Gram",
        "logits.*CrossEntropyLoss",
    ),
    (
        "logits taken for probabilities",
        lambda: make(loss=nn.BCELoss()),
        V,
        "contains.*no probability",
        "BCEWithLogitsLoss",
    ),
    (
        "labels that are no probabilities",
        lambda: make(
            model=nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()),
            loss=nn.BCELoss(),
            data=[(torch.zeros(4, 3), torch.full((4, 2), -1.0))],
        ),
        V,
        r"target contains -1\.0.*no probability",
        "map labels to 0 and 1",
    ),
    (
        "labels without an axis",
        lambda: make(
            model=nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)),
            loss=nn.MultiLabelSoftMarginLoss(),
            data=[(torch.zeros(4, 3), torch.zeros(8))],
        ),
        V,
        r"\[N, C\].*shape \(8,\)",
        "unsqueeze",
    ),
    ("no delta", lambda: make(loss=nn.HuberLoss(delta=0.0)), V, "delta=0", "L1Loss"),
    (
        "negative beta",
        lambda: make(loss=nn.SmoothL1Loss(beta=-1.0)),
        V,
        "beta=-1",
        "not be negative",
    ),
    (
        "too few class weights",
        lambda: classify(loss=nn.CrossEntropyLoss(torch.ones(3))),
        V,
        r"\(3,\).*2",
        "one weight per class",
    ),
    (
        "pos_weight does not broadcast",
        lambda: make(loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))),
        V,
        r"pos_weight.*\(3,\).*\(4, 2\)",
        "reshape",
    ),
    (
        "smoothing above one",
        lambda: classify(loss=nn.CrossEntropyLoss(label_smoothing=2)),
        V,
        "label_smoothing=2",
        r"\[0, 1\]",
    ),
    (
        "unknown likelihood",
        lambda: make(FisherMCLinearOperator, loss=Hidden(F.huber_loss)) @ np.ones(P),
        (NotImplementedError, V),
        "likelihood",
        "sampler",
    ),
    (
        "negative weights, sampled",
        lambda: (
            classify(
                FisherMCLinearOperator,
                loss=nn.CrossEntropyLoss(torch.tensor([1.0, -1.0])),
            )
            @ np.ones(P)
        ),
        V,
        "negative",
        ">= 0",
    ),
    ("negative mc_samples", lambda: make(mc_samples=-1), V, "-1", "positive number"),
    (
        "fractional mc_samples",
        lambda: make(mc_samples=1.5),
        V,
        r"1\.5",
        "positive number",
    ),
    (
        "no mc_samples",
        lambda: make(FisherMCLinearOperator, mc_samples=0),
        V,
        "got 0",
        "GGNLinearOperator",
    ),
    (
        "num_terms_fn for a known loss",
        lambda: make(num_terms_fn=lambda f, y: 1),
        V,
        "num_terms_fn",
        "leave them out",
    ),
    (
        "loss and params swapped",
        lambda: GGNLinearOperator(
            Net(), dict(Net().named_parameters()), nn.MSELoss(), batches()
        ),
        T,
        "not callable",
        "instance",
    ),
    (
        "params and data swapped",
        lambda: GGNLinearOperator(
            Net(), nn.MSELoss(), batches(), dict(Net().named_parameters())
        ),
        (T, V),
        "param",
        "list|dict",
    ),
    (
        "a risk and more",
        lambda: GGNLinearOperator(make().risk, nn.MSELoss()),
        T,
        "already has",
        "loss",
    ),
    (
        "a risk and options",
        lambda: GGNLinearOperator(make().risk, cache="off"),
        T,
        "cache",
        "risk",
    ),
    (
        "a risk without loss",
        lambda: GGNLinearOperator(make(JacobianLinearOperator).risk),
        V,
        "without",
        "loss",
    ),
    ("only a model", lambda: GGNLinearOperator(Net()), T, "loss", "Pass"),
    (
        "scalar function of vectors",
        lambda: HessianLinearOperator(
            ScalarFunction(lambda p: p["a"], {"a": torch.ones(2)})
        ),
        T,
        r"shape \(2,\)",
        r"\.sum\(\)",
    ),
    *(
        (
            f"scalar function by NumPy, {name}",
            partial(scalar, f),
            T,
            "NumPy",
            "torch.exp.*np.exp",
        )
        for name, f in {
            "number": lambda p: np.float64(1.0),
            "array": lambda p: np.ones(()),
            "sum": lambda p: np.sum(p["a"]),
            "exponential": lambda p: torch.as_tensor(np.exp(p["a"])).sum(),
            "converted": lambda p: p["a"].numpy().sum(),
        }.items()
    ),
    (
        "scalar function without data has no GGN",
        lambda: (
            GGNLinearOperator(
                ScalarFunction(lambda p: p["a"].sum(), {"a": torch.ones(2)})
            )
            @ np.ones(2)
        ),
        NotImplementedError,
        "Gauss-Newton",
        "HessianLinearOperator",
    ),
)

ALGEBRA = (
    (
        "row out of range",
        lambda: SubmatrixLinearOperator(definite(), [3], [0]),
        IndexError,
        "row index 3",
        "-3 to 2",
    ),
    (
        "row twice",
        lambda: SubmatrixLinearOperator(definite(), [1, -2], [0]),
        V,
        "more than once",
        "distinct",
    ),
    (
        "fractional index",
        lambda: SubmatrixLinearOperator(definite(), [0.5], [0]),
        T,
        "float64",
        "integers",
    ),
    (
        "short mask",
        lambda: SubmatrixLinearOperator(definite(), [0], [True, False]),
        V,
        "3 entries, got 2",
        "mask",
    ),
    (
        "2-d indices",
        lambda: SubmatrixLinearOperator(definite(), [[0]], [0]),
        V,
        r"\(1, 1\)",
        "Pass a list",
    ),
    (
        "lone index",
        lambda: SubmatrixLinearOperator(definite(), 0, [0]),
        V,
        r"\(\)",
        "Pass a list",
    ),
    ("name of a block", lambda: make().block("frist.*"), V, r"frist\.\*", "first"),
    (
        "block of a Jacobian",
        lambda: make(JacobianLinearOperator).block("first.*"),
        T,
        "parameter",
        "Submatrix",
    ),
    ("no blocks", lambda: BlockDiagonalLinearOperator([]), V, "block", "at least one"),
    ("sum of shapes", lambda: make() + definite(), V, "shapes differ", "parameters"),
    (
        "sum of dtypes",
        lambda: definite() + TensorLinearOperator(torch.eye(3)),
        T,
        "float64.*float32",
        r"to_scipy\(dtype\)",
    ),
    ("product of shapes", lambda: make() @ definite(), V, "columns", "rows"),
    ("negative power", lambda: definite() ** -1, V, "-1", "CGInverse"),
    (
        "power of a rectangle",
        lambda: make(JacobianLinearOperator) ** 2,
        V,
        "square",
        "A.H @ A",
    ),
    (
        "inverse of a rectangle",
        lambda: CGInverseLinearOperator(make(JacobianLinearOperator)),
        V,
        "square",
        "lsmr",
    ),
    (
        "CG, indefinite",
        lambda: CGInverseLinearOperator(indefinite()) @ np.ones(3),
        LinAlgError,
        "not positive definite",
        "MINRES|damping",
    ),
    (
        "CG, no convergence",
        lambda: CGInverseLinearOperator(hard(), rtol=1e-14) @ np.ones(40),
        RuntimeWarning,
        "0 of 1 columns converged",
        "damping",
    ),
    (
        "CG, unknown argument",
        lambda: CGInverseLinearOperator(definite(), tol=1),
        T,
        "tol",
        "tolerance",
    ),
    (
        "CG, two spellings",
        lambda: CGInverseLinearOperator(definite(), rtol=1, tolerance=1),
        V,
        "two spellings",
        "Pass one",
    ),
    (
        "CG, tridiagonal matrices",
        lambda: CGInverseLinearOperator(definite(), n_tridiag=1),
        V,
        "tridiag",
        "eigsh",
    ),
    (
        "CG, negative tolerance",
        lambda: CGInverseLinearOperator(definite(), rtol=-1),
        V,
        "rtol",
        "non-negative",
    ),
    (
        "CG, no iterations",
        lambda: CGInverseLinearOperator(definite(), maxiter=0),
        V,
        "maxiter",
        "positive integer",
    ),
    (
        "CG, preconditioner",
        lambda: CGInverseLinearOperator(definite(), M=np.eye(2)),
        V,
        r"\(2, 2\)",
        "approximates the inverse",
    ),
    (
        "CG, initial guess",
        lambda: CGInverseLinearOperator(definite(), x0=np.ones(2)),
        V,
        r"\(2,\)|\(2, 1\)",
        r"\(3,\)",
    ),
    (
        "MINRES, unknown argument",
        lambda: MINRESInverseLinearOperator(definite(), atol=1),
        T,
        "atol",
        "rtol",
    ),
    (
        "LSMR, damping and guess",
        lambda: LSMRInverseLinearOperator(definite(), damp=1.0, x0=np.ones(3)),
        V,
        "x0",
        "either",
    ),
    (
        "Neumann, terms",
        lambda: NeumannInverseLinearOperator(definite(), num_terms=-1),
        V,
        "-1",
        "0, 1, 2",
    ),
    (
        "Neumann, scale",
        lambda: NeumannInverseLinearOperator(definite(), scale=0.0),
        V,
        r"0\.0",
        "positive scale",
    ),
    (
        "Neumann, diverges",
        lambda: NeumannInverseLinearOperator(definite(), scale=5.0) @ np.ones(3),
        LinAlgError,
        "term|diverge",
        "scale",
    ),
    (
        "singular diagonal",
        lambda: DiagonalLinearOperator(torch.zeros(2)).inverse(),
        LinAlgError,
        "singular",
        "damping",
    ),
    (
        "Gram without loss",
        lambda: make(GramLinearOperator, loss=None, weighted=True),
        V,
        "needs a loss",
        "weighted=False",
    ),
    (
        "trace of a rectangle",
        lambda: hutchinson_trace(make(JacobianLinearOperator), 2),
        V,
        "square",
        "shape",
    ),
    (
        "trace without products",
        lambda: hutchinson_trace(definite(), 0),
        V,
        "num_matvecs.*0",
        "positive integer",
    ),
    (
        "trace, fractional",
        lambda: hutchinson_trace(definite(), 1.5),
        T,
        r"1\.5",
        "positive integer",
    ),
    (
        "trace, distribution",
        lambda: hutchinson_trace(definite(), 2, "uniform"),
        V,
        "'uniform'",
        "rademacher",
    ),
    ("Hutch++, too few", lambda: hutchpp_trace(hard(), 2), V, "2.*3", "Ask for 3"),
    ("XTrace, too few", lambda: xtrace(hard(), 1), V, "1.*2 products", "Hutchinson"),
    (
        "spectrum, option",
        lambda: lanczos_approximate_spectrum(hard(), 5, kapa=3),
        T,
        "kapa",
        "options are|unexpected",
    ),
)


MISTAKES = [
    pytest.param(Mistake(*row), id=f"{subject}: {row[0]}")
    for subject, rows in (
        ("vector", VECTORS),
        ("data", DATA),
        ("model", MODELS),
        ("loss", LOSSES),
        ("algebra", ALGEBRA),
    )
    for row in rows
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: Mistake):
    Net.calls = 0
    kinds = mistake.error if isinstance(mistake.error, tuple) else (mistake.error,)
    warned = [kind for kind in kinds if issubclass(kind, Warning)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake.do()
        except kinds as error:
            messages = [str(error)]
        else:
            messages = (
                [
                    str(w.message)
                    for w in caught
                    if issubclass(w.category, tuple(warned))
                ]
                if warned
                else []
            )
    assert messages, f"Neither an error nor a warning (among {caught})."
    for expected in (mistake.cause, mistake.cure):
        assert any(re.search(expected, message, re.DOTALL) for message in messages), (
            f"{expected!r} is not in {messages}"
        )
    assert Net.calls <= 12  # nothing long was done in vain


def test_derivative_outside_of_the_graph_is_found_by_verification():
    A = make(
        HessianLinearOperator,
        model=Wrapped(Forgetful.apply).double(),
        data=[(X.double(), y.double()) for X, y in batches()],
    )
    assert not A.verify().ok
    A = make(
        HessianLinearOperator,
        model=Wrapped(torch.sin).double(),
        data=[(X.double(), y.double()) for X, y in batches()],
    )
    assert A.verify().ok


def test_there_are_enough():
    names = [row[0] for row in (*VECTORS, *DATA, *MODELS, *LOSSES, *ALGEBRA)]
    assert len(names) >= 60
