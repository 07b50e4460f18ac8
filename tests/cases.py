"""Problems and operators as data: what the tests run on.

A problem is tiny (at most some 250 parameters, 6 data in batches of 3, 2 and 1) and in
float64 unless tagged otherwise.

====================  ==================================================================
tag                   why a test may select or skip the problem
====================  ==================================================================
``attention``         scaled dot products, fused unless somebody intervenes
``callable``          the model is no module; what it closes over can't be moved
``checkpoint``        the forward pass runs again inside the backward pass
``classification``    cross-entropy: there is a class axis
``bce``, ``mse``      the other losses with a closed form
``convolution``       weights are shared over positions
``dict-input``        the input is a mapping
``embedding``         the input are integers
``functional-loss``   the loss is a function, or a ``partial`` of one
``generic-loss``      nothing is known about the loss but its value
``half``              bfloat16 or float16
``heavy``             a dense matrix takes half a second
``flat``              the loss has no second derivative, of which operators warn
``float32``           single precision
``kink``              not differentiable everywhere; central differences may step over
``linear``            the prediction is linear in the parameters
``list-params``       the parameters are given as a list, not as a dict
``loader``            the data are a ``DataLoader``
``no-func``           the transforms of ``torch.func`` refuse the model
``no-samples``        the loss cannot draw targets from its likelihood
``norm``              a normalisation layer
``options``           the loss has weights, smoothing, ignored or soft targets
``perturbed``         the parameters are not those of the module
``ragged``            the batches can't be concatenated
``recurrent``         weights are shared over time
``splittable``        ``resplit`` applies
``subset``            some parameters of the model are not among the given ones
``sum``               the loss is not a mean
``tied``              one parameter is used in several places
``tokens``            several terms per datum
``tuple-input``       the input is a tuple
====================  ==================================================================
"""

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, rand, randint, randn, tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import references
from curvlinops import (
    BlockDiagonalLinearOperator,
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    OuterProductLinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops._data import mapped, moved
from curvlinops.examples.functorch import _batch_size, _concatenate, _map
from curvlinops.losses import as_loss_function

SIZES = (3, 2, 1)
N = sum(SIZES)

Built = tuple[Any, Any, Any, Any]


@dataclass(frozen=True)
class Problem:
    """A model, loss, parameters and data.

    Attributes
    ----------
    name
        What the test report calls it.
    build
        Returns ``(model_func, loss_func, params, data)``: fresh objects with the same
        values every time, without a trace in the global random state.
    tags
        Why a test may select or skip it, see the table above.
    """

    name: str
    build: Callable[[], Built]
    tags: frozenset[str]

    def __repr__(self) -> str:
        return f"Problem({self.name!r})"


PROBLEMS: list[Problem] = []


class Uncopied:
    """What a module is evaluated in place for, since there can be no copy of it."""

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError("there is only one")


#: Tests of such modules, or of others that have no copy.
IN_PLACE = pytest.mark.filterwarnings("ignore:.*is evaluated in place, since")


def problems(*tags: str, without: Iterable[str] = ()) -> list:
    """Select the problems with all of some tags and none of others, for parametrize."""
    wanted, unwanted = set(tags), set(without)
    unknown = (wanted | unwanted) - set().union(*(p.tags for p in PROBLEMS))
    assert not unknown, f"No problem has the tags {sorted(unknown)}."
    return [
        pytest.param(problem, id=problem.name, marks=marks(problem))
        for problem in PROBLEMS
        if wanted <= problem.tags and not unwanted & problem.tags
    ]


def marks(problem: Problem) -> list[pytest.MarkDecorator]:
    """Return the marks of tests that build any operator on a problem."""
    flat = pytest.mark.filterwarnings("ignore:The loss is piecewise linear")
    return [flat] if "flat" in problem.tags else []


def find(name: str) -> Problem:
    """Return the problem of some name."""
    return next(problem for problem in PROBLEMS if problem.name == name)


def resplit(data: Iterable, sizes: Sequence[int]) -> list:
    """Return the same data in batches of other sizes.

    Targets with several rows per datum are split in proportion.
    """
    inputs, targets = zip(*data, strict=True)
    joined = _concatenate(inputs, targets, [_batch_size(X) for X in inputs])
    assert joined is not None, "These batches can't be concatenated."
    total = _batch_size(joined[0])
    assert sum(sizes) == total, f"The sizes {sizes} don't add up to {total}."
    batches, start = [], 0
    for size in sizes:
        stop = start + size

        def cut(leaf: Any, start: int = start, stop: int = stop) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) % total:
                return leaf
            rows = len(leaf) // total
            return leaf[start * rows : stop * rows]

        batches.append(_map(cut, joined))
        start = stop
    return batches


# How problems are put together


def problem(name: str, *tags: str) -> Callable:
    """Register a function that builds a problem under a fixed seed."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        def seeded() -> Built:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(crc32(name.encode()))
                return build()

        splittable = set() if {"ragged"} & set(tags) else {"splittable"}
        PROBLEMS.append(Problem(name, seeded, frozenset(tags) | splittable))
        return build

    return register


def on_device(built: Built, device: str) -> Built:
    """Move a problem, except for what a plain callable closes over."""
    model, loss_func, params, data = built
    if isinstance(model, nn.Module):
        model.to(device)
    # those of the module have been moved in place
    params = mapped(lambda p: p if p.device.type == device else p.to(device), params)
    if isinstance(loss_func, nn.Module):
        loss_func.to(device)
    elif isinstance(loss_func, partial):
        options = moved(loss_func.keywords, torch.device(device))
        loss_func = partial(loss_func.func, *loss_func.args, **options)
    # what is no list stays on the CPU: the operators move it
    data = moved(data, torch.device(device)) if type(data) is list else data
    return model, loss_func, params, data


def split(X: Any, y: Any, sizes: Sequence[int] = SIZES) -> list:
    """Cut data into batches."""
    return resplit([(X, y)], sizes)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def outputs(model: nn.Module, X: Any) -> Tensor:
    """Evaluate the model, for the shape of the prediction."""
    with torch.no_grad():
        return model(X)


def regression(
    name: str,
    model: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    *tags: str,
    loss: Callable[[], Any] = nn.MSELoss,
    targets: Callable[[Tensor], Tensor] = torch.randn_like,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Register a module with targets in the shape of its prediction."""

    def build() -> Built:
        net = model().to(dtype).eval()
        X = _map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs())
        loss_func = loss()
        if isinstance(loss_func, nn.Module):
            loss_func = loss_func.to(dtype)
        y = targets(outputs(net, X))
        return net, loss_func, trained(net), split(X, y)

    kind = {"mse"} if loss is nn.MSELoss else set()
    problem(name, *kind, *tags)(build)


def classification(
    name: str,
    model: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    *tags: str,
    loss: Callable[[], Any] = nn.CrossEntropyLoss,
    targets: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Register a module with class indices as targets, along axis 1."""
    regression(
        name,
        model,
        inputs,
        "classification",
        *tags,
        loss=loss,
        targets=labels if targets is None else targets,
        dtype=dtype,
    )


def labels(prediction: Tensor) -> Tensor:
    """Draw class indices."""
    C = prediction.shape[1]
    return randint(C, (len(prediction), *prediction.shape[2:]))


def probabilities(prediction: Tensor) -> Tensor:
    """Draw class probabilities."""
    return torch.randn_like(prediction).softmax(1)


def binary(prediction: Tensor) -> Tensor:
    """Draw zeros and ones."""
    return torch.randn_like(prediction).gt(0).to(prediction.dtype)


def ignoring(*where: int) -> Callable[[Tensor], Tensor]:
    """Draw class indices, some of which a loss ignores."""

    def targets(prediction: Tensor) -> Tensor:
        y = labels(prediction)
        y.view(-1)[list(where)] = -100
        return y

    return targets


class Lambda(nn.Module):
    """A module around others, with a function for its forward pass."""

    def __init__(self, forward: Callable, *modules: nn.Module, **parameters: Tensor):
        super().__init__()
        self._forward = forward
        self.inner = nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, X: Any) -> Tensor:
        return self._forward(self, X)


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def head(*layers: nn.Module, features: int, outputs: int = 2) -> nn.Sequential:
    """Put a smooth activation and a linear layer behind others."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, outputs))


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: randn(N, *shape)


def ids(vocabulary: int, length: int) -> Callable[[], Tensor]:
    return lambda: randint(vocabulary, (N, length))


def small() -> nn.Sequential:
    return mlp(3, 4, 3)


# Multi-layer perceptrons and ways to give parameters

regression("linear", lambda: nn.Linear(4, 3), rows(4), "linear")
regression("mlp-tanh-mse", lambda: mlp(4, 5, 4, 3), rows(4))
classification("mlp-tanh-ce", lambda: mlp(4, 5, 4, 3), rows(4))
classification(
    "mlp-relu-ce", lambda: mlp(4, 6, 5, 3, activation=nn.ReLU), rows(4), "kink"
)
regression("mlp-no-bias", lambda: nn.Linear(4, 3, bias=False), rows(4), "linear")
regression("mlp-1d-output", lambda: nn.Sequential(mlp(4, 5, 1), nn.Flatten(0)), rows(4))
regression("mlp-float32", lambda: mlp(4, 5, 3), rows(4), "float32", dtype=torch.float32)
classification(
    "conv-float32",
    lambda: head(nn.Conv2d(2, 3, 3), features=27, outputs=3),
    rows(2, 5, 5),
    "float32",
    "convolution",
    dtype=torch.float32,
)
regression("mlp-bfloat16", small, rows(3), "half", dtype=torch.bfloat16)
classification("mlp-float16-ce", small, rows(3), "half", dtype=torch.float16)


@problem("mlp-subset-params", "subset", "classification")
def _() -> Built:
    model = mlp(4, 5, 4, 3).double()
    model[0].bias.requires_grad_(False)
    params = {n: model.get_parameter(n) for n in ("4.bias", "0.weight")}
    X = rows(4)().double()
    return model, nn.CrossEntropyLoss(), params, split(X, randint(3, (N,)))


@problem("mlp-unused-param", "mse")
def _() -> Built:
    unused = nn.Linear(2, 2)
    model = Lambda(lambda self, X: self.inner[0](X), small(), unused).double()
    X, y = rows(3)().double(), rows(3)().double()
    return model, nn.MSELoss(), trained(model), split(X, y)


@problem("mlp-perturbed-params", "perturbed", "classification")
def _() -> Built:
    model = mlp(4, 5, 3).double()
    params = {n: p + 0.3 * torch.randn_like(p) for n, p in trained(model).items()}
    params = {n: p.detach() for n, p in params.items()}
    X = rows(4)().double()
    return model, nn.CrossEntropyLoss(), params, split(X, randint(3, (N,)))


@problem("mlp-list-params", "list-params", "mse")
def _() -> Built:
    model = mlp(4, 5, 3).double()
    X, y = rows(4)().double(), rows(3)().double()
    return model, nn.MSELoss(), list(model.parameters()), split(X, y)


@problem("mlp-reversed-params", "list-params", "classification")
def _() -> Built:
    model = mlp(4, 5, 3).double()
    X = rows(4)().double()
    params = list(model.parameters())[::-1]
    return model, nn.CrossEntropyLoss(), params, split(X, randint(3, (N,)))


@problem("mlp-transposed-param", "perturbed", "mse")
def _() -> Built:
    model = mlp(4, 5, 3).double()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    params["0.weight"] = randn(4, 5).double().T  # not contiguous
    X, y = rows(4)().double(), rows(3)().double()
    return model, nn.MSELoss(), params, split(X, y)


@problem("callable", "callable", "mse")
def _() -> Built:
    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return (X @ params["A"]).tanh() @ params["B"].exp() + params["c"]

    params = {"A": randn(4, 5), "B": 0.3 * randn(5, 3), "c": randn(3)}
    params = {n: p.double() for n, p in params.items()}
    X, y = rows(4)().double(), rows(3)().double()
    return model, nn.MSELoss(), params, split(X, y)


@problem("callable-module", "callable", "classification", "perturbed")
def _() -> Built:
    net = mlp(4, 5, 3).double()

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return 2 * torch.func.functional_call(net, params, (X,))

    params = {n: p.detach() + 0.1 for n, p in net.named_parameters()}
    X = rows(4)().double()
    return model, nn.CrossEntropyLoss(), params, split(X, randint(3, (N,)))


# Unusual forward passes

regression(
    "scalar-param",
    lambda: Lambda(
        lambda self, X: (self.scale * self.inner[0](X)).sin() + self.shift,
        nn.Linear(4, 3),
        scale=tensor(1.3),
        shift=tensor(0.2),
    ),
    rows(4),
)
regression(
    "module-twice",
    lambda: Lambda(
        lambda self, X: self.inner[1](self.inner[0](self.inner[0](X).tanh()).tanh()),
        nn.Linear(4, 4),
        nn.Linear(4, 2),
    ),
    rows(4),
    "tied",
)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


classification("tied-weights", _tied, rows(4), "tied")


def _checkpointed() -> nn.Module:
    def forward(self: nn.Module, X: Tensor) -> Tensor:
        return self.inner[1](checkpoint(self.inner[0], X, use_reentrant=False))

    return Lambda(forward, mlp(4, 5, 5), nn.Linear(5, 3))


classification("checkpoint", _checkpointed, rows(4), "checkpoint", "no-func")


@problem("checkpoint-perturbed", "checkpoint", "no-func", "perturbed", "mse")
def _() -> Built:
    model = _checkpointed().double()
    params = {n: p.detach() + 0.3 for n, p in model.named_parameters()}
    X, y = rows(4)().double(), rows(3)().double()
    return model, nn.MSELoss(), params, split(X, y)


class XSinX(torch.autograd.Function):
    """A function whose backward pass is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.sin() + x * x.cos())


class XCosX(torch.autograd.Function):
    """The same in the style that function transforms ask for."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.cos() - x * x.sin())


def _wrapped(function: Callable, *modules: nn.Module) -> Callable[[], nn.Module]:
    def forward(self: nn.Module, X: Tensor) -> Tensor:
        return self.inner[1](function(self.inner[0](X)))

    return lambda: Lambda(forward, nn.Linear(4, 5), nn.Linear(5, 3))


def _modify_in_place(h: Tensor) -> Tensor:
    h = h.clone()
    h.mul_(2.0).add_(0.5).tanh_()
    return h.mul(3.0).sub_(h)


def _assign_to_index(h: Tensor) -> Tensor:
    result = torch.zeros_like(h)
    result[:, :2] = h[:, :2].sin()
    result[:, 2:] = h[:, 2:] * h[:, :1]
    return result


def _branch_on_item(h: Tensor) -> Tensor:
    # the same branch for all batches: the risk must not depend on the split
    return h.tanh() if h.abs().sum().item() > 0.0 else h.sin()


regression("custom-function", _wrapped(XSinX.apply), rows(4), "no-func")
regression("custom-function-context", _wrapped(XCosX.apply), rows(4))
classification("in-place", _wrapped(_modify_in_place), rows(4))
regression("index-assignment", _wrapped(_assign_to_index), rows(4))
classification("item-branch", _wrapped(_branch_on_item), rows(4))


def _symmetric() -> nn.Module:
    class Symmetric(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return W.triu() + W.triu(1).T

    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


regression("parametrized", _symmetric, rows(4))


# Convolutions and pooling


def _convolution(name: str, layer: Callable, shape: tuple[int, ...], features: int):
    classification(
        name,
        lambda: head(layer(), features=features, outputs=3),
        rows(*shape),
        "convolution",
    )


_convolution("conv2d", lambda: nn.Conv2d(2, 3, 3), (2, 4, 4), 12)
_convolution("conv2d-stride", lambda: nn.Conv2d(2, 2, 3, stride=2), (2, 5, 5), 8)
_convolution("conv2d-padding", lambda: nn.Conv2d(1, 2, 3, padding=1), (1, 4, 3), 24)
_convolution("conv2d-groups", lambda: nn.Conv2d(4, 4, 2, groups=2), (4, 3, 3), 16)
_convolution("conv2d-dilation", lambda: nn.Conv2d(1, 2, 2, dilation=2), (1, 4, 5), 12)
_convolution("conv2d-same", lambda: nn.Conv2d(1, 2, 3, padding="same"), (1, 3, 3), 18)
_convolution(
    "conv2d-circular",
    lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
    (1, 3, 3),
    18,
)
_convolution(
    "conv2d-mixed",
    lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), (1, 2), 2, bias=False),
    (2, 4, 4),
    16,
)
_convolution("conv1d", lambda: nn.Conv1d(3, 2, 3, padding=1), (3, 5), 10)
_convolution("conv3d", lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3), 16)
_convolution(
    "conv2d-transposed",
    lambda: nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1),
    (2, 2, 2),
    50,
)


def _pooling(name: str, layer: Callable, features: int, *tags: str) -> None:
    regression(
        name,
        lambda: head(nn.Conv2d(1, 2, 2), layer(), features=features),
        rows(1, 5, 5),
        "convolution",
        *tags,
    )


_pooling("max-pool", lambda: nn.MaxPool2d(2), 8, "kink")
_pooling("avg-pool", lambda: nn.AvgPool2d(2, padding=1), 18)
_pooling("adaptive-pool", lambda: nn.AdaptiveAvgPool2d((3, 1)), 6)


# Recurrent layers and attention


def _recurrent(name: str, layer: Callable) -> None:
    def forward(self: nn.Module, X: Tensor) -> Tensor:
        states, _ = self.inner[0](X)
        return self.inner[1](states)[:, -1]

    regression(
        name,
        lambda: Lambda(forward, layer(), nn.Linear(3, 2)),
        rows(4, 2),
        "recurrent",
    )


_recurrent("rnn", lambda: nn.RNN(2, 3, batch_first=True))
_recurrent("gru", lambda: nn.GRU(2, 3, batch_first=True))
_recurrent("lstm", lambda: nn.LSTM(2, 3, batch_first=True))


class Block(nn.Module):
    """Pre-norm attention with one head, and a residual."""

    def __init__(self, width: int, is_causal: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.is_causal = is_causal

    def forward(self, X: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(X)).unsqueeze(1).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return X + self.out(h.squeeze(1))


class CausalLM(nn.Module):
    """A language model whose embedding is also its head; classes are on axis 1."""

    def __init__(self, vocabulary: int, width: int, flat: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = Block(width, is_causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.flat = flat

    def forward(self, X: Tensor) -> Tensor:
        logits = self.head(self.norm(self.block(self.embedding(X))))
        return logits.flatten(0, 1) if self.flat else logits.movedim(-1, 1)


def _mean_over_time(*layers: nn.Module, width: int) -> nn.Module:
    def forward(self: nn.Module, X: Tensor) -> Tensor:
        return self.inner[1](self.inner[0](X).mean(1))

    return Lambda(forward, nn.Sequential(*layers), nn.Linear(width, 3))


def _self_attention(need_weights: bool) -> Callable[[], nn.Module]:
    def forward(self: nn.Module, X: Tensor) -> Tensor:
        attended, _ = self.inner[0](X, X, X, need_weights=need_weights)
        return self.inner[1](attended.flatten(1))

    return lambda: Lambda(
        forward, nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(12, 2)
    )


classification(
    "transformer-encoder",
    lambda: _mean_over_time(
        nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), width=4
    ),
    rows(3, 4),
    "attention",
    "norm",
    "kink",
    "heavy",
)
regression("multihead-attention", _self_attention(True), rows(3, 4), "attention")
regression("multihead-attention-sdpa", _self_attention(False), rows(3, 4), "attention")
classification(
    "attention-block",
    lambda: _mean_over_time(Block(4), nn.LayerNorm(4), width=4),
    rows(3, 4),
    "attention",
    "norm",
)
for _name, _flat in (("causal-lm", False), ("causal-lm-flat", True)):
    classification(
        _name,
        partial(CausalLM, 7, 4, flat=_flat),
        ids(7, 4),
        "attention",
        "norm",
        "embedding",
        "tied",
        "tokens",
        "options",
        "heavy",
        targets=ignoring(0, 5, 6, 20),
    )


@problem(
    "causal-lm-ragged",
    *("attention", "norm", "embedding", "tied", "tokens", "options"),
    *("classification", "ragged", "heavy"),
)
def _() -> Built:
    model = CausalLM(7, 4).double()
    data = []
    for size, length in zip(SIZES, (4, 2, 5), strict=True):
        y = randint(7, (size, length))
        y[:, 0] = -100
        data.append((randint(7, (size, length)), y))
    loss = nn.CrossEntropyLoss(weight=rand(7).double() + 0.5, label_smoothing=0.1)
    return model, loss, trained(model), data


def _ragged_rows() -> tuple[nn.Module, list]:
    layer = nn.Linear(3, 2).double()
    model = Lambda(lambda self, X: self.inner[0](X.tanh()).sin(), layer)
    lengths = zip(SIZES, (2, 4, 3), strict=True)
    shapes = [(size, length) for size, length in lengths]
    data = [(randn(*s, 3).double(), randn(*s, 2).double()) for s in shapes]
    return model, data


@problem("mse-ragged", "mse", "tokens", "ragged")
def _() -> Built:
    model, data = _ragged_rows()
    return model, nn.MSELoss(), trained(model), data


@problem("mse-sum-ragged", "mse", "sum", "tokens", "ragged")
def _() -> Built:
    model, data = _ragged_rows()
    return model, nn.MSELoss(reduction="sum"), trained(model), data


class UnknownLoss(nn.HuberLoss):
    """Nobody knows what a subclass computes."""

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        return super().forward(prediction, y)


@problem("generic-ragged", "generic-loss", "sum", "ragged")
def _() -> Built:
    model, data = _ragged_rows()
    return model, UnknownLoss(reduction="sum", delta=0.5), trained(model), data


# Normalisation and embeddings


def _normalised(name: str, layer: Callable, shape: tuple[int, ...], features: int):
    def model() -> nn.Module:
        norm = layer()
        for n, p in norm.named_parameters():
            nn.init.normal_(p, mean=float(n == "weight"), std=0.3)
        for buffer in norm.buffers():
            if buffer.is_floating_point():
                nn.init.uniform_(buffer, 0.5, 1.5)
        mix = nn.Linear(shape[-1], shape[-1])
        return head(mix, norm, features=features)

    regression(name, model, rows(*shape), "norm")


_normalised("layer-norm", lambda: nn.LayerNorm(4), (4,), 4)
_normalised("layer-norm-2d", lambda: nn.LayerNorm((2, 3)), (2, 3), 6)
_normalised("group-norm", lambda: nn.GroupNorm(2, 4), (4, 3), 12)
_normalised("instance-norm", lambda: nn.InstanceNorm1d(3, affine=True), (3, 4), 12)
_normalised("batch-norm-1d", lambda: nn.BatchNorm1d(4), (4,), 4)
_normalised("batch-norm-2d", lambda: nn.BatchNorm2d(2), (2, 3, 3), 18)
_normalised("rms-norm", lambda: nn.RMSNorm(4), (4,), 4)


@problem("embedding-padding", "embedding", "classification")
def _() -> Built:
    model = head(nn.Embedding(6, 3, padding_idx=0), features=12, outputs=3).double()
    X = randint(6, (N, 4))
    X[:, -1] = 0
    return model, nn.CrossEntropyLoss(), trained(model), split(X, randint(3, (N,)))


# Data


class Encoding(UserDict):
    """A mapping with attributes, as tokenizers return them."""

    def __init__(self, data: dict, encodings: Any = None):
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, key: str) -> Any:
        if key == "data" or key not in self.data:
            raise AttributeError(key)
        return self.data[key]

    def to(self, *args: Any, **kwargs: Any) -> "Encoding":
        moved = {name: value.to(*args, **kwargs) for name, value in self.items()}
        return Encoding(moved, self.encodings)


def _read_mapping(self: nn.Module, X: Any) -> Tensor:
    return self.inner[1](self.inner[0](X["x"]).tanh() * X["gate"])


def _read_tuple(self: nn.Module, X: Any) -> Tensor:
    x, gate = X
    return self.inner[1](self.inner[0](x).tanh() * gate)


def _read_encoding(self: nn.Module, X: Any) -> Tensor:
    mask = X.attention_mask.unsqueeze(-1)
    h = self.inner[0](X["input_ids"]) * mask
    return self.inner[1]((h.sum(1) / mask.sum(1)).tanh())


def _gated(forward: Callable) -> Callable[[], nn.Module]:
    return lambda: Lambda(forward, nn.Linear(4, 5), nn.Linear(5, 3))


def _encoding() -> Encoding:
    mask = torch.ones(N, 4)
    mask[::2, 2:] = 0
    return Encoding({"input_ids": randint(6, (N, 4)), "attention_mask": mask})


classification(
    "dict-input",
    _gated(_read_mapping),
    lambda: {"x": randn(N, 4), "gate": rand(N, 5)},
    "dict-input",
)
classification(
    "userdict-input",
    _gated(_read_mapping),
    lambda: UserDict(x=randn(N, 4), gate=rand(N, 5)),
    "dict-input",
)
classification(
    "encoding-input",
    lambda: Lambda(_read_encoding, nn.Embedding(6, 4), nn.Linear(4, 3)),
    _encoding,
    "dict-input",
    "embedding",
)
regression(
    "tuple-input", _gated(_read_tuple), lambda: (randn(N, 4), rand(N, 5)), "tuple-input"
)


@problem("loader", "loader", "classification")
def _() -> Built:
    model = mlp(4, 5, 3).double()
    dataset = TensorDataset(rows(4)().double(), randint(3, (N,)))
    # without a generator, every pass draws from the global random state
    loader = DataLoader(dataset, batch_size=4, generator=torch.Generator())
    return model, nn.CrossEntropyLoss(), trained(model), loader


@problem("single-batch", "mse")
def _() -> Built:
    model = mlp(4, 5, 3).double()
    X, y = rows(4)().double(), rows(3)().double()
    return model, nn.MSELoss(), trained(model), [(X, y)]


# Losses and their options


def _per_token(width: int, classes: int, class_axis: int) -> Callable[[], nn.Module]:
    def forward(self: nn.Module, X: Tensor) -> Tensor:
        return self.inner[0](X).movedim(-1, class_axis)

    return lambda: Lambda(forward, mlp(width, 4, classes))


def _class_weights() -> Tensor:
    return tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def _weighted(loss: Callable, *names: str, **options: Any) -> Callable[[], Any]:
    """Return a thunk for a loss with weights per class under the given names."""
    return lambda: loss(**{name: _class_weights() for name in names}, **options)


_CE = nn.CrossEntropyLoss
_ce, _bce = partial(_weighted, _CE), partial(_weighted, nn.BCEWithLogitsLoss)

for _name, _loss, _targets, *_tags in (
    ("ce-weights", _ce("weight"), labels, "options"),
    ("ce-smoothing", _ce(label_smoothing=0.2), labels, "options"),
    (
        "ce-weights-smoothing",
        _ce("weight", label_smoothing=0.2),
        labels,
        "options",
    ),
    ("ce-soft", _CE, probabilities, "options"),
    (
        "ce-soft-weights-smoothing",
        _ce("weight", label_smoothing=0.2),
        probabilities,
        "options",
    ),
    ("ce-ignore-index", _CE, ignoring(1, 4), "options"),
    (
        "ce-ignore-weights-smoothing",
        _ce("weight", label_smoothing=0.2),
        ignoring(0, 3),
        "options",
    ),
    ("ce-ignored-class", _ce(ignore_index=1), labels, "options"),
    ("ce-ignored-batch", _CE, ignoring(3, 4), "options"),
    ("ce-sum", _ce(reduction="sum"), labels, "sum"),
    (
        "ce-sum-weights-smoothing",
        _ce("weight", label_smoothing=0.2, reduction="sum"),
        ignoring(2),
        "sum",
        "options",
    ),
    ("ce-functional", lambda: F.cross_entropy, labels, "functional-loss"),
    (
        "ce-partial",
        _weighted(
            partial(partial, F.cross_entropy),
            "weight",
            label_smoothing=0.1,
            ignore_index=2,
        ),
        labels,
        "functional-loss",
        "options",
    ),
):
    classification(_name, small, rows(3), *_tags, loss=_loss, targets=_targets)

for _name, _loss, _targets, *_tags in (
    ("ce-tokens", _CE, labels),
    (
        "ce-tokens-options",
        _ce("weight", label_smoothing=0.1),
        ignoring(0, 7, 9),
        "options",
    ),
    ("ce-tokens-soft", _ce("weight"), probabilities, "options"),
    # with two tokens per datum, the last two make up the last batch
    ("ce-tokens-ignored-batch", _CE, ignoring(10, 11), "options"),
):
    classification(
        _name,
        _per_token(3, 3, class_axis=1),
        rows(2, 3),
        "tokens",
        *_tags,
        loss=_loss,
        targets=_targets,
    )

for _name, _loss, _targets, *_tags in (
    ("bce", nn.BCEWithLogitsLoss, binary),
    ("bce-soft", nn.BCEWithLogitsLoss, torch.rand_like, "options"),
    ("bce-weight", _bce("weight"), binary, "options"),
    ("bce-pos-weight", _bce("pos_weight"), binary, "options"),
    ("bce-sum", _bce(reduction="sum"), binary, "sum"),
    (
        "bce-sum-weights",
        _bce("weight", "pos_weight", reduction="sum"),
        torch.rand_like,
        "sum",
        "options",
    ),
    (
        "bce-functional",
        lambda: F.binary_cross_entropy_with_logits,
        binary,
        "functional-loss",
    ),
    (
        "bce-partial",
        _weighted(partial(partial, F.binary_cross_entropy_with_logits), "pos_weight"),
        torch.rand_like,
        "functional-loss",
        "options",
    ),
):
    regression(_name, small, rows(3), "bce", *_tags, loss=_loss, targets=_targets)

regression(
    "bce-1d-output",
    lambda: nn.Sequential(mlp(3, 4, 1), nn.Flatten(0)),
    rows(3),
    "bce",
    loss=nn.BCEWithLogitsLoss,
    targets=binary,
)
regression(
    "bce-tokens",
    _per_token(3, 3, class_axis=-1),
    rows(2, 3),
    "bce",
    "tokens",
    "options",
    loss=_bce("weight"),
    targets=binary,
)

for _name, _loss, *_tags in (
    ("mse-sum", lambda: nn.MSELoss(reduction="sum"), "sum"),
    ("mse-functional", lambda: F.mse_loss, "functional-loss"),
    (
        "mse-partial-sum",
        lambda: partial(F.mse_loss, reduction="sum"),
        "functional-loss",
        "sum",
    ),
):
    regression(_name, small, rows(3), "mse", *_tags, loss=_loss)
regression("mse-tokens", _per_token(3, 2, class_axis=-1), rows(2, 3), "tokens")


def _log_cosh(reduction: str) -> Callable[[], Callable]:
    def make() -> Callable:
        def loss(prediction: Tensor, y: Tensor) -> Tensor:
            values = (prediction - y).cosh().log()
            return values.sum() if reduction == "sum" else values.mean()

        loss.reduction = reduction  # type: ignore[attr-defined]
        return loss

    return make


regression("generic-huber", small, rows(3), "generic-loss", loss=UnknownLoss)
regression(
    "generic-huber-sum",
    small,
    rows(3),
    "generic-loss",
    "sum",
    loss=lambda: UnknownLoss(reduction="sum", delta=0.5),
)
regression(
    "generic-lambda",
    small,
    rows(3),
    "generic-loss",
    loss=lambda: lambda prediction, y: (prediction - y).pow(4).mean(),
)
regression("generic-mean", small, rows(3), "generic-loss", loss=_log_cosh("mean"))
regression("generic-sum", small, rows(3), "generic-loss", "sum", loss=_log_cosh("sum"))
regression(
    "nll",  # linear in the prediction: its GGN is zero
    lambda: nn.Sequential(mlp(3, 4, 3), nn.LogSoftmax(1)),
    rows(3),
    "classification",
    "no-samples",
    "flat",
    loss=nn.NLLLoss,
    targets=labels,
)
regression(
    "kl",
    lambda: nn.Sequential(_per_token(3, 3, class_axis=-1)(), nn.LogSoftmax(-1)),
    rows(2, 3),
    "tokens",
    "no-samples",
    "flat",
    loss=lambda: nn.KLDivLoss(log_target=True, reduction="sum"),
    targets=lambda f: torch.randn_like(f).log_softmax(-1),
)
for _name, _model, _loss, _targets in (
    ("huber", small, lambda: nn.HuberLoss(delta=0.7), torch.randn_like),
    (
        "poisson",
        small,
        lambda: nn.PoissonNLLLoss(full=True),
        lambda f: randint(0, 4, f.shape).to(f),
    ),
    (
        "probabilities",
        lambda: nn.Sequential(mlp(3, 4, 3), nn.Sigmoid()),
        _weighted(nn.BCELoss, "weight"),
        torch.rand_like,
    ),
    ("labels", small, _weighted(nn.MultiLabelSoftMarginLoss, "weight"), binary),
):
    regression(_name, _model, rows(3), loss=_loss, targets=_targets)


# Registry of operators


@dataclass(frozen=True)
class Operator:
    """An operator, and the matrix it stands for.

    Attributes
    ----------
    name
        What the test report calls it.
    build
        Maps ``(model_func, loss_func, params, data, **options)`` to the operator.
    dense
        Maps the first four to the matrix in float64, by another road.
    tags
        Why a law may select or skip it, see below.
    without
        Tags of the problems for which there is no such matrix.
    names
        Problems on which it is checked; ``None`` for all of those.
    exponent
        Power of the machine epsilon that its error is proportional to.
    passes
        Passes over the data that a product takes if nothing is kept; ``None`` if this
        depends on the numbers.
    unchecked_passes
        Those at construction if the check is switched off.
    expectation
        Like ``dense``, what a sampled matrix is in expectation.

    ================  ==================================================================
    tag               meaning
    ================  ==================================================================
    ``bounded``       exists for matrices of norm below ten only
    ``core``          its ways of computing a product are those of the others
    ``datafree``      has no model
    ``derived``       made of other operators, or without a model
    ``indefinite``    self-adjoint, but may have negative eigenvalues
    ``iterative``     a product is a solution, which is linear up to a tolerance
    ``ordered``       its rows or columns are data, in the order in which they come
    ``rectangular``   not self-adjoint
    ``sampled``       random, with a seed; a function of the split and of the order
    ``stored``        holds its entries once they are computed, cache or not
    ================  ==================================================================
    """

    name: str
    build: Callable[..., Any]
    dense: Callable[..., Tensor]
    tags: frozenset[str]
    without: frozenset[str]
    names: frozenset[str] | None
    exponent: float
    passes: int | None
    unchecked_passes: int
    expectation: Callable[..., Tensor]

    def __repr__(self) -> str:
        return f"Operator({self.name!r})"

    def exists_for(self, problem: Problem) -> bool:
        """Whether the problem has such a matrix."""
        chosen = self.names is None or problem.name in self.names
        return chosen and not self.without & problem.tags


OPERATORS: list[Operator] = []


def operator(
    name: str,
    build: Callable[..., Any],
    dense: Callable[..., Tensor],
    *tags: str,
    without: Iterable[str] = (),
    names: Iterable[str] | None = None,
    exponent: float = 1.0,
    passes: int | None = 1,
    unchecked_passes: int = 0,
    expectation: Callable[..., Tensor] = references.ggn,
) -> None:
    """Register an operator."""
    OPERATORS.append(
        Operator(
            name,
            build,
            dense,
            frozenset(tags),
            frozenset(without),
            None if names is None else frozenset(names),
            exponent,
            passes,
            unchecked_passes,
            expectation,
        )
    )


SAMPLES = {"mc_samples": 3, "seed": 7}


def _sampled_fisher(*built: Any, mc_samples: int, seed: int) -> Tensor:
    """Compute the matrix of the samples that the losses draw."""
    total: Any = 0
    risk = references._Evaluated(*built)
    first_row = 0
    for f, loss, J in _linearized(risk, *built):
        loss.first_row, first_row = first_row, first_row + len(f)
        G = loss.sample_gradients(mc_samples, seed).double()
        if f.ndim == 1:  # every entry is a term of its own
            G, J = G.unsqueeze(-1), J.unsqueeze(1)
        elif risk.kind is nn.CrossEntropyLoss:
            G, J = G.movedim(2, -1), J.movedim(1, -2)
        rows = torch.einsum("s...c,...cp->s...p", G, J).flatten(0, -2)
        total = total + rows.T @ rows / mc_samples
    return total / risk.count


def _weighted_gram(*built: Any) -> Tensor:
    """Compute the Gram matrix of the Jacobian's rows, mixed by factors of the loss."""
    risk = references._Evaluated(*built)
    rows = []
    for f, loss, J in _linearized(risk, *built):
        eye = torch.eye(f.numel(), dtype=f.dtype).reshape(-1, *f.shape)
        R = loss.factor_mul(eye).flatten(1).double()  # a row per column of the factor
        rows.append(R @ J.flatten(0, -2))
    return torch.cat(rows) @ torch.cat(rows).T / risk.count


def _linearized(risk: Any, *built: Any) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """Yield prediction, loss, and Jacobian ``[*prediction.shape, P]`` of batches.

    The loss gets the prediction in the precision of the problem.
    """
    _, _, params, _ = built
    dtype = next(iter(params.values() if isinstance(params, dict) else params)).dtype
    for f, y, _ in risk.batches():
        loss = as_loss_function(risk.loss_func)(f.detach().to(dtype), y)
        yield f, loss, references.differentiate(f, risk.leaves).reshape(*f.shape, -1)


def _values(params: Any) -> list[Tensor]:
    return list(params.values() if isinstance(params, dict) else params)


def _flat(*built: Any) -> Tensor:
    """Return the parameters as one vector in float64."""
    return torch.cat([p.detach().flatten() for p in _values(built[2])]).double()


def _outer(*built: Any) -> Tensor:
    return (flat := _flat(*built)).outer(torch.arange(-2.0, 5.0).to(flat))


def _plus_identity(A: Any) -> Any:
    """Return a positive definite operator."""
    return A + IdentityLinearOperator(A.in_shapes, A.device, A.torch_dtype)


def _damped_inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix + torch.eye(len(matrix), dtype=matrix.dtype))


def _first_and_last(make: Callable) -> Callable:
    """Choose rows of the first and columns of the last parameter by name."""

    def build(*built: Any, **options: Any) -> Any:
        A = make(*built, **options)
        names = list(A.risk.params)
        return A.block(names[0], names[-1])

    return build


def _corner(matrix: Tensor, *built: Any) -> Tensor:
    values = _values(built[2])
    return matrix[: values[0].numel(), -values[-1].numel() :]


def _remainder(*built: Any, **options: Any) -> Any:
    risk = EmpiricalRisk(*built, **options)
    return HessianLinearOperator(risk) - GGNLinearOperator(risk)


# Matrices of a model

operator("hessian", HessianLinearOperator, references.hessian, "core", "indefinite")
operator("ggn", GGNLinearOperator, references.ggn, "core")
operator("ef", EFLinearOperator, references.empirical_fisher)
operator(
    "fisher-mc",
    partial(FisherMCLinearOperator, **SAMPLES),
    partial(_sampled_fisher, **SAMPLES),
    "sampled",
    without=["generic-loss", "no-samples"],
)
operator(
    "ggn-mc",
    partial(GGNLinearOperator, **SAMPLES),
    partial(_sampled_fisher, **SAMPLES),
    *("derived", "sampled"),
    without=["generic-loss", "no-samples"],
)
operator(
    "ggn-diagonal",
    GGNDiagonalLinearOperator,
    lambda *built: references.ggn(*built).diagonal().diag(),
    *("indefinite", "stored"),
)
operator(
    "ggn-diagonal-mc",
    partial(GGNDiagonalLinearOperator, **SAMPLES),
    lambda *built: _sampled_fisher(*built, **SAMPLES).diagonal().diag(),
    *("derived", "sampled", "stored"),
    without=["generic-loss", "no-samples"],
    expectation=lambda *built: references.ggn(*built).diagonal().diag(),
)
operator(
    "jacobian",
    lambda model, _, *rest, **options: JacobianLinearOperator(model, *rest, **options),
    lambda model, _, *rest: references.jacobian(model, *rest),
    *("rectangular", "ordered"),
    unchecked_passes=1,
)
operator(
    "jacobian-transposed",
    lambda model, _, *rest, **options: TransposedJacobianLinearOperator(
        model, *rest, **options
    ),
    lambda model, _, *rest: references.jacobian(model, *rest).T,
    *("derived", "rectangular", "ordered"),
    unchecked_passes=1,
)
operator(
    "tangent-kernel",
    partial(GramLinearOperator, weighted=False),
    lambda model, _, *rest: (J := references.jacobian(model, *rest)) @ J.T,
    *("derived", "ordered"),
    passes=2,
    unchecked_passes=1,
)
operator(
    "gram",
    GramLinearOperator,
    _weighted_gram,
    "ordered",
    without=["generic-loss"],
    passes=2,
    unchecked_passes=1,
)

# Kronecker-factored

#: Every kind of layer, of sharing, of loss, and of giving parameters. No factor has a
#: degenerate eigenvalue whose eigenspace matters: eigenbases would not be unique.
FACTORED = (
    "mlp-tanh-mse",
    "mlp-bfloat16",
    "mlp-subset-params",
    "mlp-perturbed-params",
    "mlp-reversed-params",
    "tied-weights",
    "conv-float32",
    "conv2d-mixed",
    "batch-norm-1d",
    "loader",
    "ce-tokens-options",
    "ce-ignored-batch",
    "bce-sum-weights",
    "generic-huber",
)


def _kronecker(
    name: str,
    cls: type,
    options: dict[str, Any],
    reference: dict[str, Any],
    *tags: str,
    **about: Any,
) -> None:
    """Register a Kronecker-factored operator."""
    operator(
        name,
        partial(cls, **options),
        partial(references.kronecker, **reference),
        *("stored", *tags),
        names=FACTORED,
        **about,
    )


_JOINT = {"separate_weight_and_bias": False}
_kronecker("kfac", KFACLinearOperator, {"fisher_type": "type-2"}, {})
_kronecker(
    "kfac-reduce",
    KFACLinearOperator,
    {"fisher_type": "type-2", "kfac_approx": "reduce", **_JOINT},
    {"reduced": True, "joint": True},
)
_kronecker(
    "kfac-mc",
    KFACLinearOperator,
    {"fisher_type": "mc", **_JOINT, **SAMPLES},
    {"fisher": "mc", "joint": True, **SAMPLES},
    "sampled",
    without=["generic-loss", "no-samples"],
    expectation=partial(references.kronecker, joint=True),
)
_kronecker(
    "kfac-empirical",
    KFACLinearOperator,
    {"fisher_type": "empirical"},
    {"fisher": "empirical"},
)
_kronecker(
    "kfac-forward-only",
    KFACLinearOperator,
    {"fisher_type": "forward-only", **_JOINT},
    {"fisher": "forward-only", "joint": True},
)
_kronecker(
    "ekfac",
    EKFACLinearOperator,
    {"fisher_type": "type-2"},
    {"method": "ekfac"},
    exponent=0.9,
    passes=2,
)
_kronecker(
    "ekfac-empirical",
    EKFACLinearOperator,
    {"fisher_type": "empirical", **_JOINT},
    {"method": "ekfac", "fisher": "empirical", "joint": True},
    exponent=0.9,
    passes=2,
)
_kronecker(
    "kfoc",
    KFOCLinearOperator,
    {"fisher_type": "type-2", "max_iter": 100, "tolerance": 1e-12},
    {"method": "kfoc"},
    exponent=0.5,
    passes=None,
)
operator(
    "kfac-inverse",
    lambda *built, **options: KFACInverseLinearOperator(
        KFACLinearOperator(*built, fisher_type="type-2", **options), damping=0.3
    ),
    partial(references.kronecker, damping=0.3),
    *("derived", "stored"),
    names=FACTORED,
)
operator(
    "kfac-inverse-exact",
    lambda *built, **options: KFACInverseLinearOperator(
        KFACLinearOperator(*built, fisher_type="type-2", **options),
        damping=0.3,
        use_exact_damping=True,
    ),
    lambda *built: torch.linalg.inv(
        (K := references.kronecker(*built)) + 0.3 * torch.eye(len(K)).to(K)
    ),
    *("derived", "stored"),
    names=FACTORED,
)

# Derived from those: whatever holds for every model holds for them, too

operator(
    "remainder",
    _remainder,
    lambda *built: references.hessian(*built) - references.ggn(*built),
    *("derived", "indefinite"),
    without=["linear"],  # it is zero there
)
operator(
    "damped",
    lambda *built, **options: HessianLinearOperator(*built, **options).damped(0.5),
    lambda *built: (H := references.hessian(*built)) + 0.5 * torch.eye(len(H)).to(H),
    *("derived", "indefinite"),
)
operator(
    "ggn-diagonal-composite",
    lambda *built, **options: (
        (D := GGNDiagonalLinearOperator(*built, **options)) @ D.damped(0.5)
    ),
    lambda *built: (d := references.ggn(*built).diagonal()).mul(d + 0.5).diag(),
    *("derived", "indefinite", "stored"),
    passes=None,
)
operator(
    "kfac-multiple",
    lambda *built, **options: (
        2.0 * KFACLinearOperator(*built, fisher_type="type-2", **options)
    ),
    lambda *built: 2.0 * references.kronecker(*built),
    *("derived", "stored"),
    names=FACTORED,
)
operator(
    "block",
    _first_and_last(HessianLinearOperator),
    lambda *built: _corner(references.hessian(*built), *built),
    *("derived", "rectangular"),
)
operator(
    "block-diagonal",
    lambda *built, **options: BlockDiagonalLinearOperator(
        GGNLinearOperator(*built, **options).blocks().values()
    ),
    lambda *built: (
        references.ggn(*built)
        * torch.block_diag(
            *(torch.ones(p.numel(), p.numel()) for p in _values(built[2]))
        )
    ),
    "derived",
)
operator(
    "submatrix",
    lambda *built, **options: SubmatrixLinearOperator(
        HessianLinearOperator(*built, **options), [5, 0, -1], slice(None, None, 2)
    ),
    lambda *built: references.hessian(*built)[[5, 0, -1], ::2],
    *("derived", "rectangular"),
)
operator(
    "cg",
    lambda *built, **options: CGInverseLinearOperator(
        _plus_identity(GGNLinearOperator(*built, **options)), rtol=1e-12, maxiter=300
    ),
    lambda *built: _damped_inverse(references.ggn(*built)),
    *("derived", "iterative"),
    without=["half", "float32"],
    exponent=0.7,
)
operator(
    "minres",
    lambda *built, **options: MINRESInverseLinearOperator(
        _plus_identity(GGNLinearOperator(*built, **options)), rtol=1e-12, maxiter=300
    ),
    lambda *built: _damped_inverse(references.ggn(*built)),
    *("derived", "iterative"),
    without=["half", "float32"],
    exponent=0.5,
)
operator(
    "lsmr",
    lambda *built, **options: LSMRInverseLinearOperator(
        _plus_identity(GGNLinearOperator(*built, **options)),
        atol=1e-12,
        btol=1e-12,
        maxiter=500,
    ),
    lambda *built: _damped_inverse(references.ggn(*built)),
    *("derived", "iterative"),
    without=["half", "float32"],
    exponent=0.5,
)
operator(
    "neumann",
    lambda *built, **options: NeumannInverseLinearOperator(
        _plus_identity(GGNLinearOperator(*built, **options)), num_terms=120, scale=0.2
    ),
    lambda *built: _damped_inverse(references.ggn(*built)),
    *("derived", "iterative", "bounded"),
    without=["half", "float32"],
    exponent=0.5,
)

# No model at all; the numbers are those of the parameters

operator(
    "identity",
    lambda *built, **_: IdentityLinearOperator(
        [p.shape for p in _values(built[2])],
        _values(built[2])[0].device,
        _values(built[2])[0].dtype,
    ),
    lambda *built: torch.eye(len(_flat(*built)), dtype=torch.float64),
    *("derived", "datafree"),
)
operator(
    "diagonal",
    lambda *built, **_: DiagonalLinearOperator(_values(built[2])),
    lambda *built: _flat(*built).diag(),
    *("derived", "datafree", "indefinite"),
)
operator(
    "identity-multiple",
    lambda *built, **_: (
        -1.5
        * IdentityLinearOperator(
            [p.shape for p in _values(built[2])],
            _values(built[2])[0].device,
            _values(built[2])[0].dtype,
        )
    ),
    lambda *built: -1.5 * torch.eye(len(_flat(*built)), dtype=torch.float64),
    *("derived", "datafree", "indefinite"),
)
operator(
    "tensor",
    lambda *built, **_: TensorLinearOperator(_outer(*built).to(_values(built[2])[0])),
    lambda *built: _outer(*built),
    *("derived", "datafree", "rectangular"),
)
operator(
    "outer-product",
    lambda *built, **_: OuterProductLinearOperator(
        torch.tensor([-2.0]).to(_values(built[2])[0]),
        _flat(*built).unsqueeze(1).to(_values(built[2])[0].dtype),
    ),
    lambda *built: -2 * _flat(*built).outer(_flat(*built)),
    *("derived", "datafree", "indefinite"),
)
