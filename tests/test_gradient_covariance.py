from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import references
from cases import Problem, find, mlp, problems, resplit
from curvlinops import EFLinearOperator, EmpiricalRisk, GGNLinearOperator
from tolerances import assert_close

#: One of every kind: architectures, token targets, options, losses without a formula.
CHOICE = (
    "mlp-tanh-mse",
    "mlp-tanh-ce",
    "mlp-1d-output",
    "conv1d",
    "causal-lm",
    "ce-ignore-weights-smoothing",
    "ce-tokens-options",
    "ce-tokens-ignored-batch",
    "bce-sum-weights",
    "callable",
    "loader",
)


def identity(A):
    return torch.eye(A.shape[1], dtype=A.torch_dtype)


@pytest.mark.parametrize("problem", problems("generic-loss"))
def test_unknown_losses_datum_by_datum(problem: Problem):
    built = problem.build()
    assert_close(
        EFLinearOperator(*built) @ identity(EFLinearOperator(*built)),
        references.empirical_fisher(*built),
        size=500,
    )


@pytest.mark.parametrize("name", CHOICE)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_against_dense(name: str, cache: str):
    built = find(name).build()
    E = EFLinearOperator(*built, cache=cache)
    dense = references.empirical_fisher(*built)
    for _ in range(2):
        assert_close(E @ identity(E), dense, size=500)
    v = torch.randn(E.shape[1], dtype=torch.float64)
    for _ in range(5):  # through recording and replay
        assert_close(E @ v, dense @ v, size=500)


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["ce-tokens-options", "generic-mean", "mse-sum"])
def test_split_of_the_data_does_not_matter(name: str, sizes: tuple[int, ...]):
    model, loss, params, data = find(name).build()
    E = EFLinearOperator(model, loss, params, resplit(data, sizes))
    dense = references.empirical_fisher(model, loss, params, data)
    assert_close(E.to_dense(), dense, size=500)


def coupled(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute a loss whose data do not separate."""
    return ((prediction - y) ** 2).mean() * (1 + prediction.sum() ** 2)


def test_coupled_data_are_evaluated_apart():
    model, _, params, data = find("mlp-tanh-mse").build()
    options = {"check_deterministic": False, "reduction": "mean"}
    E = EFLinearOperator(model, coupled, params, data, **options)
    total, count = 0, 0
    for X, y in data:
        for x, t in zip(X.split(1), y.split(1), strict=True):
            grads = torch.autograd.grad(coupled(model(x), t), list(params.values()))
            g = torch.cat([t.flatten() for t in grads])
            total, count = total + torch.outer(g, g), count + 1
    assert_close(E.to_dense(), total / count)


def in_two_axes(prediction: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(prediction, y)


def test_a_datum_of_an_unknown_loss_may_have_several_rows():
    model, X = nn.Linear(3, 2).double(), torch.randn(4, 5, 3).double()
    y = torch.randn(4, 5, 2).double()
    params = dict(model.named_parameters())
    dense = references.empirical_fisher(model, in_two_axes, params, [(X, y)])
    E = EFLinearOperator(model, in_two_axes, params, [(X, y)])
    assert_close(E.to_dense(), dense)
    flat = EFLinearOperator(  # the same with rows of all data along the first axis
        lambda p, X: torch.func.functional_call(model, p, (X,)).flatten(0, 1),
        in_two_axes,
        {n: p.detach() for n, p in params.items()},
        [(X, y.flatten(0, 1))],
    )
    assert_close(flat.to_dense(), dense)


def masked(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction, y, ignore_index=-1)


def num_valid(prediction: Tensor, y: Tensor) -> int:
    return int((y != -1).sum())


def test_number_of_terms_of_an_unknown_loss():
    """A mean over one term per datum, of which some have none."""
    model, X = mlp(3, 4, 3).double(), torch.randn(6, 3).double()
    y = torch.tensor([0, -1, 2, 1, -1, 0])
    data = [(X[:2], y[:2]), (X[2:], y[2:])]
    params = dict(model.named_parameters())
    E = EFLinearOperator(model, masked, params, data, num_terms_fn=num_valid)
    known = nn.CrossEntropyLoss(ignore_index=-1)
    assert_close(E.to_dense(), references.empirical_fisher(model, known, params, data))


def test_unknown_outputs_of_a_datum_are_an_error():
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)).double()
    data = [(torch.randn(4, 3).double(), torch.randn(8).double())]
    E = EFLinearOperator(
        model,
        in_two_axes,
        dict(model.named_parameters()),
        data,
        batch_size_fn=lambda X: 3,
        reduction="mean",
    )
    with pytest.raises(ValueError, match=r"3 data points.*batch_size_fn"):
        E @ torch.ones(8).double()


def test_no_loss_is_an_error():
    model = nn.Linear(2, 2)
    risk = EmpiricalRisk(model, None, "*", [(torch.ones(1, 2), None)])
    with pytest.raises(ValueError, match="needs a loss function"):
        EFLinearOperator(risk)


def test_scale_of_square_loss():
    """Residuals of variance 1/2 give the GGN."""
    torch.manual_seed(0)
    model, X = nn.Linear(2, 1).double(), torch.randn(40_000, 2).double()
    y = model(X).detach() + 0.5**0.5 * torch.randn(40_000, 1).double()
    problem = model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)]
    E, G = EFLinearOperator(*problem).to_dense(), GGNLinearOperator(*problem).to_dense()
    assert (E - G).norm() < 0.05 * G.norm()


def test_class_weights_enter_squared():
    model, X = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    y = torch.zeros(5, dtype=torch.int64)
    params, w = dict(model.named_parameters()), torch.tensor([3.0, 1.0]).double()
    plain = partial(F.cross_entropy, reduction="sum")
    weighted = partial(F.cross_entropy, weight=w, reduction="sum")
    one, three = (
        EFLinearOperator(model, loss, params, [(X, y)]).to_dense()
        for loss in (plain, weighted)
    )
    assert_close(three, 9 * one)
