"""Rows of inputs and gradients give every layer's exact block, on every kind of layer.

From the rows that Kronecker factors are made of, every datum's gradient is put
together, and from these the dense block. It is compared with the block of a reference
that knows nothing of layers.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import references
from cases import Lambda, find, problems, split
from curvlinops import EmpiricalRisk
from curvlinops.kfac._corrections import gradients, parts_of
from curvlinops.kfac._estimation import Estimation, Settings, Visitor
from curvlinops.kfac._layers import Fisher
from tolerances import assert_close

#: What has no Kronecker-factored form, or parameters without any use.
OTHERS = ["mlp-unused-param", "callable", "parametrized", "rnn", "gru", "lstm"]
KNOWN = [
    p for p in problems(without=["half", "float32"]) if p.values[0].name not in OTHERS
]


def exact_blocks(problem, fisher_type="type-2", bias="alone", **options):
    """Return the risk, and dense blocks by the names of their parameters."""
    risk = EmpiricalRisk(*problem, check_deterministic=False, **options)
    settings = Settings(Fisher(fisher_type, 1, 0), False, bias, "raise", 1000)
    estimation = Estimation(risk, settings, "test")
    totals = {}

    class Exact(Visitor):
        def add(self, batch, layer, grads):
            parts = parts_of(layer)
            dtype = grads[id(parts[0].uses[0])].dtype
            rows = [part.rows(layer, grads, batch.size, dtype) for part in parts]
            for M in gradients(rows, layer.layout.size):
                tensors = layer.layout.scatter(M.transpose(0, 1))
                flat = torch.cat([t.reshape(len(t), -1) for t in tensors], dim=1)
                names = layer.layout.names
                totals[names] = totals.get(names, 0) + flat.T @ flat

    estimation.sweep(Exact())
    return risk, {names: t / estimation.denominator for names, t in totals.items()}


def block_of(matrix, space, names):
    index = torch.arange(space.dim)
    slices = dict(zip(space.names, space.slices(), strict=True))
    chosen = torch.cat([index[slices[name]] for name in names])
    return matrix[chosen][:, chosen]


def check(problem, reference=references.ggn, **options):
    risk, blocks = exact_blocks(problem, **options)
    expected = reference(*problem)
    scale = expected.abs().max()
    for names, block in blocks.items():
        difference = block - block_of(expected, risk.space, names)
        assert difference.abs().max() <= 1e-10 * scale, names
    return risk, blocks


@pytest.mark.parametrize("problem", KNOWN)
def test_blocks_are_exact(problem):
    with_bias = "joint" if len(problem.name) % 2 else "alone"
    risk, blocks = check(problem.build(), bias=with_bias)
    covered = [name for names in blocks for name in names]
    assert len(covered) == len(set(covered))
    assert len(covered) == len(risk.params)


@pytest.mark.parametrize("name", ["mlp-tanh-ce", "ce-tokens-options", "conv1d", "bce"])
def test_empirical_blocks_are_exact(name):
    problem = find(name).build()
    check(problem, references.empirical_fisher, fisher_type="empirical")


def layer_problem(forward, shape, outputs, **parameters):
    """Return a problem around one function of a module's parameters."""
    torch.manual_seed(0)
    parameters = {n: torch.randn(s) for n, s in parameters.items()}
    model = Lambda(forward, nn.Linear(outputs, 2), **parameters).double()
    X = torch.randn(6, *shape).double()
    return (
        model,
        nn.MSELoss(),
        dict(model.named_parameters()),
        split(X, X.new_ones(6, 2)),
    )


def _through(function):
    def forward(self, X):
        h = function(self, X).tanh()
        return self.inner[0](h.flatten(1))

    return forward


FUNCTIONS = {
    "addmm": (lambda s, X: torch.addmm(s.b, X, s.W), (3,), 4, {"W": (3, 4), "b": (4,)}),
    "matmul": (lambda s, X: X @ s.W, (2, 3), 8, {"W": (3, 4)}),
    "matmul-T": (lambda s, X: X @ s.W.T + s.b, (3,), 4, {"W": (4, 3), "b": (4,)}),
    "left": (lambda s, X: s.W @ X, (3, 2), 8, {"W": (4, 3)}),
    "left-transposed": (lambda s, X: s.W.t() @ X, (3, 2), 8, {"W": (3, 4)}),
    "linear-flipped": (lambda s, X: F.linear(X, s.W.mT), (3,), 4, {"W": (3, 4)}),
    "positions": (lambda s, X: X + s.p, (2, 3), 6, {"p": (2, 3)}),
    "token": (
        lambda s, X: torch.cat([s.t.expand(len(X), -1, -1), X], 1),
        *((2, 3), 9, {"t": (1, 1, 3)}),
    ),
    "scale": (lambda s, X: s.a * X * 2.0 - s.b, (3,), 3, {"a": (3,), "b": (1,)}),
    "gain": (lambda s, X: (X * s.a).add_(s.b), (2, 3), 6, {"a": (2, 1), "b": ()}),
    "twice": (
        lambda s, X: (X @ s.W).tanh() @ s.W + F.linear(X, s.W.T),
        *((3,), 3, {"W": (3, 3)}),
    ),
    "bias-of-two": (
        lambda s, X: F.linear(F.linear(X, s.V, s.b).tanh(), s.W, s.b),
        *((3,), 3, {"V": (3, 3), "W": (3, 3), "b": (3,)}),
    ),
    "in-place": (lambda s, X: F.linear(X, s.W).relu_().add(1), (3,), 4, {"W": (4, 3)}),
    "conv-bias-only": (
        lambda s, X: F.conv2d(X, torch.ones(2, 1, 2, 2).double(), s.b),
        *((1, 3, 3), 8, {"b": (2,)}),
    ),
    "images-per-datum": (
        lambda s, X: F.conv1d(X.flatten(0, 1), s.W).reshape(len(X), -1),
        *((2, 1, 4), 12, {"W": (2, 1, 2)}),
    ),
    "data-second": (
        lambda s, X: F.linear(X.transpose(0, 1), s.W).transpose(0, 1),
        *((5, 3), 10, {"W": (2, 3)}),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, shape, outputs, parameters = FUNCTIONS[name]
    problem = layer_problem(_through(function), shape, outputs, **parameters)
    _, blocks = check(problem)
    assert {n for names in blocks for n in names} >= set(parameters)


def _attend(cross, **options):
    attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, X):
        Y = X[:, :2].flip(-1) if cross else X
        if not options.get("batch_first"):
            X, Y = X.transpose(0, 1), Y.transpose(0, 1)
        Z = Y[..., : options["kdim"]] if "kdim" in options else Y
        h, _ = self.inner[1](X, Z, Z)
        h = h if options.get("batch_first") else h.transpose(0, 1)
        return self.inner[0](h.flatten(1))

    return Lambda(forward, nn.Linear(12, 2), attention)


@pytest.mark.parametrize(
    ("cross", "options"),
    [
        (False, {"batch_first": True}),
        (False, {}),
        (True, {"batch_first": True}),
        (True, {"bias": False}),
        (True, {"batch_first": True, "bias": False, "kdim": 3, "vdim": 3}),
    ],
)
def test_attention(cross, options):
    torch.manual_seed(0)
    model = _attend(cross, **options).double()
    X = torch.randn(6, 3, 4).double()
    params = dict(model.named_parameters())
    _, blocks = check((model, nn.MSELoss(), params, split(X, X.new_ones(6, 2))))
    assert sum(map(len, blocks)) == len(params)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"groups": 2, "dilation": 2},
        {"padding": 2, "stride": 3},
    ],
)
def test_transposed_convolutions(dims, options):
    torch.manual_seed(0)
    layer = getattr(nn, f"ConvTranspose{dims}d")(2, 4, 3, **options)
    X = torch.randn(6, 2, *[3] * dims).double()
    model = Lambda(lambda s, x: s.inner[0](x).tanh().flatten(1)[:, :3], layer).double()
    problem = model, nn.MSELoss(), dict(model.named_parameters())
    check((*problem, split(X, X.new_ones(6, 3))))


def test_references_differ_between_layers():
    """The comparison above can fail."""
    risk, blocks = exact_blocks(find("mlp-tanh-mse").build())
    expected = references.ggn(*find("mlp-tanh-mse").build())
    with pytest.raises(AssertionError):
        assert_close(blocks["0.weight",], block_of(expected, risk.space, ["2.weight"]))
