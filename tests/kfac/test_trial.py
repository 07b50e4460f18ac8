"""Which axis of a layer's result counts data, and what only looks like a layer."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from curvlinops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from tolerances import assert_close

FAMILY = (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator)


def trace(cls, *arguments, **options):
    options.setdefault("fisher_type", "type-2")
    return cls(*arguments, **options).trace()


def exact_trace(*arguments, **options):
    return GGNLinearOperator(*arguments, **options).to_dense().trace()


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0).double().eval()


@pytest.mark.parametrize(("N", "T"), [(2, 4), (2, 2), (5, 5), (6, 3), (2, 3), (3, 6)])
@pytest.mark.parametrize(
    "name", ["norm1.weight", "norm2.bias", "linear1.weight", "self_attn.out_proj.bias"]
)
def test_time_comes_first(N, T, name):
    """EKFAC has the trace of the GGN, also if there are as many steps as data."""
    layer = encoder()

    def model(params, X):
        return functional_call(layer, params, (X.transpose(0, 1),)).transpose(0, 1)

    X = torch.randn(N, T, 4).double()
    arguments = model, nn.MSELoss(), {name: layer.get_parameter(name)}, [(X, X * 0)]
    assert_close(trace(EKFACLinearOperator, *arguments), exact_trace(*arguments))


@pytest.mark.parametrize(("N", "T"), [(2, 2), (2, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("data_first", [True, False])
def test_terms_of_a_datum_are_sent_apart(N, T, data_first):
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def model(params, X):
        h = F.linear(X, params["W"]).tanh()
        out = last(h + h.cumsum(1))
        return (out if data_first else out.transpose(0, 1)).flatten(0, 1)

    data = [(torch.randn(N, T, 3).double(), torch.randint(3, (N * T,)))]
    arguments = model, nn.CrossEntropyLoss(), {"W": first.weight}, data
    assert_close(trace(EKFACLinearOperator, *arguments), exact_trace(*arguments))


def test_rows_in_blocks_beside_an_axis_as_long():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()

    def model(params, X):
        h = F.linear(X.flatten(0, 1), params["W"]).tanh()
        return h.reshape(len(X), -1, 4).mean(1)

    data = [(torch.randn(2, 3, 2, 3).double(), torch.zeros(2, 4).double())]
    arguments = model, nn.MSELoss(), {"W": layer.weight}, data
    assert_close(trace(EKFACLinearOperator, *arguments), exact_trace(*arguments))


def positions(expanded):
    head = nn.Linear(3, 2).double()

    def model(params, X):
        ids = torch.arange(X.shape[1])
        ids = ids.expand(len(X), -1) if expanded else ids
        h = X.unsqueeze(-1) + F.embedding(ids, params["place"])
        return head(h.tanh().cumsum(1)).transpose(1, 2)

    return model


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize(("N", "T"), [(2, 4), (4, 4), (6, 4)])
def test_without_an_axis_for_data(cls, N, T):
    torch.manual_seed(0)
    place = {"place": torch.randn(T, 3).double()}
    data = [(torch.randn(N, T).double(), torch.randint(2, (N, T)))]
    arguments = positions(expanded=False), nn.CrossEntropyLoss(), place, data
    with pytest.raises(ValueError, match=r"'place' \(no axis of its result counts"):
        trace(cls, *arguments)
    diagonal = cls(*arguments, fisher_type="type-2", unsupported="diagonal")
    dense = GGNLinearOperator(*arguments).to_dense()
    assert_close(diagonal.to_dense(), dense.diagonal().diag())
    arguments = positions(expanded=True), *arguments[1:]
    assert_close(trace(EKFACLinearOperator, *arguments), exact_trace(*arguments))


@pytest.mark.parametrize(
    ("model", "shape", "data_shape"),
    [
        (lambda p, X: (p["p"] @ X).relu_(), (4, 3), (1, 3, 1)),
        (
            lambda p, X: F.conv1d(X[0], p["p"]).relu_().unsqueeze(0),
            (4, 3, 2),
            (1, 3, 6),
        ),
    ],
)
@pytest.mark.parametrize("cls", FAMILY)
def test_views_that_are_changed_in_place(cls, model, shape, data_shape):
    torch.manual_seed(0)
    params, X = {"p": torch.randn(shape).double()}, torch.randn(data_shape).double()
    data = [(X, torch.zeros_like(model(params, X)))]
    with pytest.raises(ValueError, match="No Kronecker-factored form"):
        trace(cls, model, nn.MSELoss(), params, data)
    diagonal = cls(
        *(model, nn.MSELoss(), params, data),
        fisher_type="type-2",
        unsupported="diagonal",
    )
    dense = GGNLinearOperator(model, nn.MSELoss(), params, data).to_dense()
    assert_close(diagonal.to_dense(), dense.diagonal().diag())


def test_a_shift_of_a_view_in_place():
    def model(params, X):
        h = X * 1
        view = h[:, :2]
        view += params["b"]
        return h.tanh()

    X = torch.randn(5, 3).double()
    with pytest.raises(ValueError, match="'b' in `torch::autograd::CopySlices`"):
        trace(
            *(KFACLinearOperator, model, nn.MSELoss()),
            *({"b": torch.randn(2).double()}, [(X, X * 0)]),
        )


@pytest.mark.parametrize("reverse", [False, True])
def test_batches_that_use_a_parameter_differently(reverse):
    def model(params, X):
        return F.linear(X, params["W"] if len(X) == 1 else params["W"] * 1.0)

    X = torch.randn(5, 3).double()
    data = [(X[:1], X[:1, :2]), (X[1:], X[1:, :2])]
    data = data[::-1] if reverse else data
    params = {"W": torch.ones(2, 3).double()}
    with pytest.raises(ValueError, match=r"use \['W'\] in different ways"):
        trace(
            *(KFACLinearOperator, model, nn.MSELoss(), params, data),
            unsupported="diagonal",
        )


@pytest.mark.parametrize(
    "model",
    [
        lambda p, X: torch.matmul(X, other=p["W"]),
        lambda p, X: torch.mm(input=X, mat2=p["W"]),
        lambda p, X: F.linear(X, p["W"].transpose(dim0=0, dim1=1)),
        lambda p, X: F.linear(X, weight=torch.transpose(p["W"], dim0=0, dim1=1)),
    ],
)
def test_arguments_by_name(model):
    X = torch.randn(5, 3).double()
    arguments = nn.MSELoss(), {"W": torch.randn(3, 3).double()}, [(X, X)]
    expected = GGNLinearOperator(lambda p, X: X @ p["W"], *arguments).to_dense()
    E = EKFACLinearOperator(model, *arguments, fisher_type="type-2")
    assert_close(E.to_dense(), expected)


@pytest.mark.parametrize(
    "model",
    [
        lambda p, X: torch.vmap(lambda x: p["W"] @ x)(X),
        lambda p, X: torch.baddbmm(X[:, None] * 0, X[:, None], p["W"][None], beta=1)[
            :, 0
        ],
    ],
)
def test_calls_that_are_not_understood_are_named(model):
    X = torch.randn(1, 3).double()
    arguments = model, nn.MSELoss(), {"W": torch.randn(3, 3).double()}, [(X, X)]
    with pytest.raises(ValueError, match="'W' in `"):
        trace(KFACLinearOperator, *arguments)
    result = trace(KFACLinearOperator, *arguments, unsupported="diagonal")
    assert_close(result, exact_trace(*arguments))


def test_a_broadcast_bias_and_an_empty_batch():
    X, W = torch.randn(5, 3).double(), torch.randn(3, 3).double()
    params = {"W": W, "b": torch.randn(1).double()}
    with pytest.raises(ValueError, match="'b' in `linear`"):
        trace(
            *(KFACLinearOperator, lambda p, X: F.linear(X, p["W"], p["b"])),
            *(nn.MSELoss(), params, [(X, X)]),
        )
    arguments = lambda p, X: F.linear(X, p["W"]), nn.MSELoss(), {"W": W}
    whole = trace(KFACLinearOperator, *arguments, [(X, X)])
    for data in ([(X, X), (X[:0], X[:0])], [(X[:0], X[:0]), (X, X)]):
        assert_close(trace(KFACLinearOperator, *arguments, data), whole)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("N", [1, 5])
@pytest.mark.parametrize(
    "model", [lambda p, X: X.sum(1) * p["s"], lambda p, X: X.sum(1) + p["s"]]
)
def test_outputs_of_one_axis(model, N, shape):
    X, y = torch.randn(N, 3).double(), torch.randn(N).double()
    arguments = model, nn.MSELoss(), {"s": torch.randn(shape).double()}, [(X, y)]
    assert_close(trace(KFACLinearOperator, *arguments), exact_trace(*arguments))


@pytest.mark.parametrize(
    "model", [lambda p, X: p["W"] @ X[0], lambda p, X: X[0] @ p["W"]]
)
def test_a_single_vector(model):
    X, y = torch.randn(1, 3).double(), torch.randn(3).double()
    arguments = model, nn.MSELoss(), {"W": torch.randn(3, 3).double()}, [(X, y)]
    options = {"batch_size_fn": lambda X: 1}
    result = trace(EKFACLinearOperator, *arguments, **options)
    assert_close(result, exact_trace(*arguments))
