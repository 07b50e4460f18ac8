"""Whether a loss that is not known is a sum or a mean is found, not believed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from curvlinops._reduction import Evidence

Data = list[tuple[Any, Any]]
DOUBLE = torch.float64
#: Checks all batches, or the first two before the first product.
EVERYWHERE = pytest.mark.parametrize("checked", [True, False])


def build(outputs: int = 3, dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs)
    return nn.Sequential(*layers).to(dtype)


def rows(*sizes: int) -> Data:
    """Draw inputs and class indices."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 2, dtype=DOUBLE, generator=generator),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def sequences(*shapes: tuple[int, int, int]) -> Data:
    """Draw sequences of inputs and class indices, the last of which are padded."""
    data = []
    for n, length, padded in shapes:
        ((X, y),) = rows(n * length)
        X, y = X.unflatten(0, (n, length)), y.unflatten(0, (n, length))
        y[:, length - padded :] = -100
        data.append((X, y))
    return data


def hessian(model: nn.Module, total: Callable[[nn.Module], Tensor]) -> Tensor:
    """Differentiate a function of a module's parameters twice."""
    params = list(model.parameters())
    grads = torch.autograd.grad(total(model), params, create_graph=True)
    lines = [
        torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        for grad in grads
        for g in grad.flatten()
    ]
    return torch.stack([torch.cat([x.flatten() for x in line]) for line in lines])


def by_token(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), y.flatten(), **options)


def all_tokens(data: Data, model: nn.Module, **options: Any) -> Tensor:
    """Evaluate the loss of all tokens, one after the other."""
    f = torch.cat([model(X).flatten(0, 1) for X, _ in data])
    return F.cross_entropy(f, torch.cat([y.flatten() for _, y in data]), **options)


def together(loss: Callable[..., Tensor], data: Data, model: nn.Module) -> Tensor:
    """Evaluate a loss on all data at once."""
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    return loss(model(X), y)


def squared(f: Tensor, y: Tensor) -> Tensor:
    return (f - F.one_hot(y, 3)).square()


SUM = partial(F.cross_entropy, reduction="sum")
ROWS = rows(2, 5)
SAME, SUMMED = sequences((2, 3, 0), (3, 3, 0)), sequences((2, 3, 1), (3, 4, 2))
PADDED = sequences((2, 4, 2), (3, 4, 2))
#: The loss, the data, what is found, and the loss of all data.
FOUND: dict[str, tuple[Callable, Data, str, Callable]] = {
    "sum": (lambda f, y: SUM(f, y), ROWS, "sum", partial(together, SUM, ROWS)),
    "fraction": (
        lambda f, y: SUM(f, y) / 10,
        ROWS,
        "sum",
        lambda model: together(SUM, ROWS, model) / 10,
    ),
    "mean": (
        lambda f, y: F.cross_entropy(f, y),
        ROWS,
        "mean",
        partial(together, F.cross_entropy, ROWS),
    ),
    "entries": (
        lambda f, y: squared(f, y).mean(),
        ROWS,
        "mean",
        partial(together, lambda f, y: squared(f, y).mean(), ROWS),
    ),
    "single precision": (
        lambda f, y: SUM(f.float(), y),
        ROWS,
        "sum",
        partial(together, SUM, ROWS),
    ),
    "large constant": (
        lambda f, y: SUM(f, y) + 1e8 * len(f),
        ROWS,
        "sum",
        partial(together, SUM, ROWS),
    ),
    "one by one": (
        lambda f, y: SUM(f, y),
        rows(*[1] * 4),
        "sum",
        partial(together, SUM, rows(*[1] * 4)),
    ),
    "tokens": (by_token, SAME, "mean", partial(all_tokens, SAME)),
    "padded alike": (by_token, PADDED, "mean", partial(all_tokens, PADDED)),
    "sum of tokens of any number": (
        partial(lambda f, y: by_token(f, y, reduction="sum")),
        SUMMED,
        "sum",
        partial(all_tokens, SUMMED, reduction="sum"),
    ),
}


@EVERYWHERE
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, checked: bool):
    loss, data, found, total = FOUND[name]
    model = build()
    H = HessianLinearOperator(model, loss, "*", data, check_deterministic=checked)
    expected = hessian(model, total)
    error = (H.to_dense() - expected).norm() / expected.norm()
    assert error < (1e-5 if name == "single precision" else 1e-10)
    assert H.risk.loss_function.reduction == found
    assert H.verify().ok or name == "single precision"


def test_the_attribute_does_not_count_where_the_loss_says_otherwise():
    class Lies:
        def __init__(self, reduction: str) -> None:
            self.reduction = reduction

        def __call__(self, f: Tensor, y: Tensor) -> Tensor:
            return SUM(f, y)

    model = build()
    expected = hessian(model, partial(together, SUM, ROWS))
    for attribute in ("mean", "sum"):
        H = HessianLinearOperator(model, Lies(attribute), "*", ROWS)
        assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batches_that_differ_between_passes(reduction: str):
    """The passes of the check weigh their batches as products do."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, reduction=reduction)

    (data,) = rows(7)
    loader = DataLoader(TensorDataset(*data), batch_size=3, shuffle=True)
    H = HessianLinearOperator(build(), loss, "*", loader)
    expected = hessian(build(), partial(together, loss, [data]))
    with pytest.warns(UserWarning, match="shuffle=True"):
        found = H.to_dense()
    assert torch.allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_divergence_that_is_zero_everywhere(reduction: str):
    """Value and gradient are zero, or rounding errors of it, in all batches."""
    for dtype in (torch.float64, torch.float32):
        model = build(dtype=dtype)
        data = [(X.to(dtype), model(X.to(dtype)).detach()) for X, _ in ROWS]

        def loss(f: Tensor, y: Tensor) -> Tensor:
            p, q = f.log_softmax(1), y.log_softmax(1)
            values = F.kl_div(p, q, log_target=True, reduction="none")
            return values.sum() if reduction == "sum" else values.sum(1).mean()

        H = HessianLinearOperator(model, loss, "*", data)
        expected = hessian(model, partial(together, loss, data))
        error = (H.to_dense() - expected).norm() / expected.norm()
        assert error < (1e-10 if dtype == torch.float64 else 1e-4)
        assert H.risk.loss_function.reduction == reduction


@pytest.mark.parametrize("head", ["zero", "saturated", "exact"])
def test_outputs_at_which_losses_say_little(head: str):
    """Equal values for all data, and gradients that are rounding errors."""
    model = build()
    scale = {"zero": 0.0, "saturated": 1e3, "exact": 1.0}[head]
    for p in model[2].parameters():
        p.data *= scale
    data = [(X, model(X).argmax(1)) for X, _ in ROWS]
    loss: Callable = lambda f, y: F.cross_entropy(f, y)  # noqa: E731
    if head == "exact":
        data = [(X, model(X).detach()) for X, _ in ROWS]
        loss = lambda f, y: (f - y).square().mean()  # noqa: E731
    assert EmpiricalRisk(model, loss, "*", data).loss_function.reduction == "mean"
    if head != "exact":
        data[1][1][3] = -100
        with pytest.raises(ValueError, match="num_terms_fn"):
            EmpiricalRisk(model, loss, "*", data)


def ignoring(data: Data, *places: int) -> Data:
    """Ignore some targets of the last batch."""
    *others, (X, y) = data
    y = y.clone()
    y[[*places]] = -100
    return [*others, (X, y)]


def weighted(f: Tensor, y: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 3.0, 0.5])
    return F.cross_entropy(f, y, weight=weight.to(f.dtype))


def weighted_in_single(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, weight=torch.tensor([1.0, 3.0, 0.5]))


def balanced(f: Tensor, y: Tensor) -> Tensor:
    return torch.stack(
        [F.cross_entropy(f[y == k], y[y == k]) for k in set(y.tolist())]
    ).mean()


CONTRADICTED: dict[str, tuple[Callable, Data, Callable | None]] = {
    "weights": (weighted, ROWS, None),
    "balanced": (balanced, ROWS, None),
    "root": (lambda f, y: squared(f, y).mean().sqrt(), ROWS, None),
    "ignored": (lambda f, y: F.cross_entropy(f, y), ignoring(ROWS, 2), None),
    "ignored half": (lambda f, y: F.cross_entropy(f, y), ignoring(ROWS, 0, 1), None),
    "second batch padded": (
        by_token,
        sequences((2, 4, 0), (3, 4, 2)),
        lambda f, y: (y != -100).sum(),
    ),
    "lengths": (by_token, sequences((2, 3, 0), (3, 5, 0)), lambda f, y: y.numel()),
    "lengths, one after the other": (
        lambda f, y: F.cross_entropy(f, y.flatten()),
        sequences((2, 3, 0), (3, 5, 0)),
        lambda f, y: y.numel(),
    ),
}


class Flat(nn.Module):
    """Returns all tokens one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, X: Tensor) -> Tensor:
        return self.net(X).flatten(0, 1)


@EVERYWHERE
@pytest.mark.parametrize("name", CONTRADICTED)
def test_contradicted(name: str, checked: bool):
    loss, data, num_terms = CONTRADICTED[name]
    model = Flat() if "after" in name else build()
    options = {"check_deterministic": checked}
    with pytest.raises(ValueError, match="num_terms_fn"):
        HessianLinearOperator(model, loss, "*", data, **options).to_dense()
    if num_terms is not None:
        H = HessianLinearOperator(
            model, loss, "*", data, num_terms_fn=num_terms, **options
        )

        def total(model: nn.Module) -> Tensor:
            f = torch.cat([model(X).reshape(-1, 3) for X, _ in data])
            return F.cross_entropy(f, torch.cat([y.flatten() for _, y in data]))

        assert torch.allclose(H.to_dense(), hessian(model, total), rtol=1e-10)


def test_products_of_one_operator_go_on_to_raise():
    model = build()
    H = HessianLinearOperator(model, weighted, "*", ROWS, check_deterministic=False)
    for _ in range(3):
        with pytest.raises(ValueError, match="num_terms_fn"):
            H @ torch.ones(H.shape[1], dtype=DOUBLE)


def test_weights_that_fit_outputs_in_single_precision_only():
    model = build(dtype=torch.float32)
    data = [(X.float(), y) for X, y in ROWS]
    with pytest.raises(ValueError, match="num_terms_fn"):
        GGNLinearOperator(model, weighted_in_single, "*", data)
    even = partial(F.cross_entropy, weight=torch.ones(3))
    risk = EmpiricalRisk(model, lambda f, y: even(f, y), "*", data)
    assert risk.loss_function.reduction == "mean" and risk.terms.reduction.found


@EVERYWHERE
def test_one_batch_needs_no_number_of_terms_but_for_some_matrices(checked: bool):
    model, data = build(), ignoring(rows(5), 2)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    arguments: Any = model, loss, "*", data
    options = {"check_deterministic": checked}
    H = HessianLinearOperator(*arguments, **options)
    expected = hessian(model, partial(together, F.cross_entropy, data))
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)
    for make in (
        EFLinearOperator,
        FisherMCLinearOperator,
        partial(KFACLinearOperator, fisher_type="empirical"),
    ):
        with pytest.raises(ValueError, match="num_terms_fn"):
            make(*arguments, **options)


def test_empirical_fisher_of_data_with_unequal_numbers_of_terms():
    """Both halves have as many tokens, but not all data."""
    data = sequences((4, 4, 0))
    data[0][1][::2, 1:] = -100
    risk = EmpiricalRisk(build(), by_token, "*", data)
    assert risk.terms.reduction.found
    with pytest.raises(ValueError, match="num_terms_fn"):
        EFLinearOperator(risk).to_dense()


def in_batch_negatives(f: Tensor, y: Tensor) -> Tensor:
    scores = F.normalize(f, dim=1) @ F.normalize(y, dim=1).T
    return F.cross_entropy(scores, torch.arange(len(f)))


def pairs(*sizes: int) -> Data:
    weight = torch.tensor([[1.0, -0.5, 0.2], [0.3, 1.0, -1.0]], dtype=DOUBLE)
    return [(X, X.exp() @ weight) for X, _ in rows(*sizes)]


@EVERYWHERE
def test_in_batch_negatives(checked: bool):
    """Batches weigh by their data, as they did; somebody has to say so."""
    model, data = build(), pairs(3, 5)
    expected = sum(
        len(X) / 8 * hessian(model, partial(together, in_batch_negatives, [(X, y)]))
        for X, y in data
    )
    arguments: Any = model, in_batch_negatives, "*", data
    with pytest.warns(UserWarning, match="num_terms_fn") as warned:
        H = HessianLinearOperator(*arguments, check_deterministic=checked)
        assert torch.allclose(H.to_dense(), expected, rtol=1e-10)
    assert len(warned) == 1
    H = HessianLinearOperator(*arguments, reduction="mean", check_deterministic=checked)
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)
    H = HessianLinearOperator(*arguments, reduction="sum", check_deterministic=checked)
    total = sum(
        hessian(model, partial(together, in_batch_negatives, [batch])) for batch in data
    )
    assert torch.allclose(H.to_dense(), total, rtol=1e-10)
    HessianLinearOperator(model, in_batch_negatives, "*", data[:1])  # without a word


@EVERYWHERE
def test_losses_whose_derivatives_are_rounding_errors(checked: bool):
    """All targets have one direction, so that all scores of a datum are alike."""
    data = [(X, torch.ones(len(X), 3, dtype=DOUBLE)) for X, _ in rows(2, 5)]
    arguments: Any = build(), in_batch_negatives, "*", data
    with pytest.warns(UserWarning, match="derivative by the outputs is zero"):
        H = HessianLinearOperator(*arguments, check_deterministic=checked)
        assert H.to_dense().abs().max() < 1e-12


@EVERYWHERE
def test_matrices_of_one_risk_warn_once(checked: bool):
    arguments: Any = build(), in_batch_negatives, "*", pairs(4)
    risk = EmpiricalRisk(*arguments, check_deterministic=checked)
    HessianLinearOperator(risk).to_dense()
    with pytest.warns(UserWarning, match="num_terms_fn") as warned:
        for make in (EFLinearOperator, FisherMCLinearOperator, EFLinearOperator):
            make(risk)
    assert len(warned) == 1


def test_copies_of_a_risk_whose_data_have_changed_look_again():
    data = rows(3, 4)
    arguments: Any = build(), lambda f, y: F.cross_entropy(f, y), "*", data
    risk = EmpiricalRisk(*arguments)
    data[1][1][2] = -100
    for again in (copy.copy(risk), copy.deepcopy(risk)):
        with pytest.raises(ValueError, match="num_terms_fn"):
            HessianLinearOperator(again).to_dense()


def test_an_attribute_decides_what_cannot_be_found():
    class Declared(nn.Module):
        reduction = "sum"

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return in_batch_negatives(f, y)

    model, data = build(), pairs(3, 5)
    H = HessianLinearOperator(model, Declared(), "*", data)
    total = sum(
        hessian(model, partial(together, in_batch_negatives, [batch])) for batch in data
    )
    assert torch.allclose(H.to_dense(), total, rtol=1e-10)


class OwnLoss(nn.Module):
    """Returns its loss, the mean over all tokens that are not padded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return by_token(self.net(batch["X"]), batch["y"])


def test_a_loss_that_is_the_models_output():
    model, data = OwnLoss(), sequences((2, 4, 0), (3, 4, 2))
    batches = [({"X": X, "y": y}, y) for X, y in data]
    loss: Callable = lambda f, y: f  # noqa: E731
    with pytest.warns(UserWarning, match="num_terms_fn") as warned:
        HessianLinearOperator(model, loss, "*", batches)
    assert len(warned) == 1
    H = HessianLinearOperator(
        model, loss, "*", batches, num_terms_fn=lambda f, y: (y != -100).sum()
    )
    expected = hessian(model, lambda model: all_tokens(data, model.net))
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


def label_by_label(f: Tensor, y: list[str]) -> Tensor:
    return sum(SUM(row[None], torch.tensor([int(s)])) for row, s in zip(f, y))  # noqa: B905


def test_targets_that_cannot_be_cut():
    data = [(X, [str(int(label)) for label in y]) for X, y in ROWS]
    with pytest.warns(UserWarning, match="of a batch twice"):
        EmpiricalRisk(build(), label_by_label, "*", data)
    H = HessianLinearOperator(build(), label_by_label, "*", data, reduction="sum")
    expected = hessian(build(), partial(together, SUM, ROWS))
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


@EVERYWHERE
@pytest.mark.parametrize("kind", ["list", "array", "number", "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_single_data_with_targets_that_cannot_be_put_together(
    reduction: str, kind: str, checked: bool
):
    """Of a batch twice, they give what they should."""

    def loss(f: Tensor, y: Any) -> Tensor:
        gaps = f - torch.as_tensor(y, dtype=f.dtype)
        return gaps.square().sum() if reduction == "sum" else gaps.square().mean()

    X = torch.cat([X for X, _ in rows(3)])
    y = torch.tensor([[0.5], [1.5], [-0.5]], dtype=DOUBLE)
    make = {
        "list": Tensor.tolist,
        "array": Tensor.numpy,
        "number": float,
        "tensor": Tensor.squeeze,
    }[kind]
    data = [(x[None], make(t)) for x, t in zip(X, y, strict=True)]
    arguments: Any = build(), loss, "*", data
    expected = hessian(build(), lambda model: loss(model(X), y))
    warned: Any = pytest.warns(UserWarning, match="cannot be put together")
    with nullcontext() if reduction == "sum" else warned:
        H = HessianLinearOperator(*arguments, check_deterministic=checked)
        assert torch.allclose(H.to_dense(), expected, rtol=1e-10)
    H = HessianLinearOperator(
        *arguments, reduction=reduction, check_deterministic=checked
    )
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


def test_targets_with_constants():
    def loss(f: Tensor, y: dict[str, Any]) -> Tensor:
        scale = y["scale"] * y["scales"][0]
        return scale * F.cross_entropy(f, y["labels"])

    constants = {"scale": 2, "scales": torch.tensor([3.0, 1.0, 1.0])}
    data = [(X, {"labels": y, **constants}) for X, y in ROWS]
    H = HessianLinearOperator(build(), loss, "*", data)
    expected = 6 * hessian(build(), partial(together, F.cross_entropy, ROWS))
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


@EVERYWHERE
@pytest.mark.parametrize("size", [1, 2, 4])
def test_targets_with_constants_as_long_as_a_batch(size: int, checked: bool):
    prototypes = torch.randn(4, 3, dtype=DOUBLE)

    def loss(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        labels, prototypes = y
        return F.cross_entropy(f @ prototypes.T, labels)

    data = [(X, (y, prototypes.clone())) for X, y in rows(size, size, size)]
    H = HessianLinearOperator(build(), loss, "*", data, check_deterministic=checked)
    X, y = (torch.cat(part) for part in zip(*rows(size, size, size), strict=True))
    expected = hessian(build(), lambda model: loss(model(X), (y, prototypes)))
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


def test_no_targets():
    def loss(f: Tensor, _: None) -> Tensor:
        return f.square().sum()

    data = [(X, None) for X, _ in ROWS]
    assert EmpiricalRisk(build(), loss, "*", data).loss_function.reduction == "sum"


def test_random_losses_are_not_taken_for_wrong_ones():
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f + torch.randn_like(f), y)

    state = torch.get_rng_state()
    A = HessianLinearOperator(
        build(), loss, "*", ROWS, check_deterministic=False, reduction="mean"
    )
    A @ torch.ones(A.shape[1], dtype=DOUBLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_user_says_has_to_be_right():
    arguments: Any = build(), lambda f, y: SUM(f, y), "*", ROWS
    with pytest.raises(ValueError, match=r"`reduction='mean'` says.*it is a sum"):
        EmpiricalRisk(*arguments, reduction="mean")
    EmpiricalRisk(*arguments, reduction="sum")
    with pytest.raises(ValueError, match="reduction='total'"):
        EmpiricalRisk(*arguments, reduction="total")
    with pytest.raises(ValueError, match="brings its own"):
        EmpiricalRisk(build(), nn.CrossEntropyLoss(), "*", ROWS, reduction="mean")


def test_the_user_may_say_that_sequences_of_any_length_weigh_the_same():
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f.mT, y, reduction="none").mean(1).mean()

    data, model = sequences((2, 3, 0), (3, 5, 0)), build()
    with pytest.raises(ValueError, match=r"put together.*num_terms_fn"):
        EmpiricalRisk(model, loss, "*", data)
    H = HessianLinearOperator(model, loss, "*", data, reduction="mean")
    expected = hessian(
        model, lambda m: sum(len(X) / 5 * loss(m(X), y) for X, y in data)
    )
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


#: Lengths of what a loss was evaluated on. Of a local list, it would be taken back.
SEEN: list[int] = []


def noting(f: Tensor, y: Tensor) -> Tensor:
    SEEN.append(len(f))
    return F.cross_entropy(f, y)


def test_known_losses_and_those_with_a_number_of_terms_are_not_evaluated():
    SEEN.clear()
    EmpiricalRisk(build(), noting, "*", ROWS, num_terms_fn=lambda f, y: len(f))
    assert set(SEEN) == {2, 5}
    risk = EmpiricalRisk(build(), nn.MSELoss(), "*", pairs(2, 3))
    assert risk.terms.reduction is None


def test_the_model_is_evaluated_no_more_often():
    model, calls = build(), []

    def counting(params: dict[str, Tensor], X: Tensor) -> Tensor:
        calls.append(len(X))
        return functional_call(model, params, (X,))

    params, data = dict(model.named_parameters()), rows(2, 3, 4)
    HessianLinearOperator(counting, lambda f, y: SUM(f, y), params, data)
    assert calls == [2, 3, 4, 2, 3, 4]
    calls.clear()
    H = HessianLinearOperator(
        counting, lambda f, y: SUM(f, y), params, data, check_deterministic=False
    )
    assert calls == []
    H @ torch.ones(H.shape[1], dtype=DOUBLE)
    assert calls == [2, 3, 2, 3, 4]
    H @ torch.ones(H.shape[1], dtype=DOUBLE)
    model[0].weight.data += 1  # says nothing about the loss
    calls.clear()
    H @ torch.ones(H.shape[1], dtype=DOUBLE)
    assert calls == [2, 3, 4]


def test_changes_of_data_and_loss_are_looked_at():
    model, data = build(), rows(3, 4)
    state = {"reduction": "mean"}

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, reduction=state["reduction"])

    H = HessianLinearOperator(model, loss, "*", data)
    assert H.risk.loss_function.reduction == "mean"
    data[1][1][2] = -100
    for _ in range(2):
        with pytest.raises(ValueError, match="num_terms_fn"):
            H.to_dense()
    state["reduction"] = "sum"
    H.refresh()
    expected = hessian(model, partial(together, SUM, data))
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


def test_beyond_the_first_two_batches_verify_finds_it():
    data = ignoring(rows(2, 3, 4), 1)
    H = HessianLinearOperator(
        build(),
        lambda f, y: F.cross_entropy(f, y),
        "*",
        data,
        check_deterministic=False,
    )
    report = H.verify()
    (check,) = [c for c in report.checks if c.name == "terms of the loss"]
    assert not check.passed and "num_terms_fn" in check.note


def summed(f: Tensor, y: Tensor) -> Tensor:
    return SUM(f, y)


def test_copies_keep_what_was_found():
    H = HessianLinearOperator(build(), summed, "*", ROWS)
    expected = hessian(build(), partial(together, SUM, ROWS))
    for again in (copy.copy(H), copy.deepcopy(H), pickle.loads(pickle.dumps(H))):
        assert again.risk.loss_function.reduction == "sum"
        assert torch.allclose(again.to_dense(), expected, rtol=1e-10)


def test_large_outputs_keep_their_precision(monkeypatch):
    seen = set()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        seen.add(f.dtype)
        return SUM(f, y)

    monkeypatch.setattr("curvlinops._reduction.LARGE", 5)
    evidence = Evidence(loss)
    for size in (2, 3):
        evidence.add(torch.randn(size, 3), torch.arange(size), size)
    assert evidence.conclude(None, None).name == "sum"
    assert seen == {torch.float32}


def test_lack_of_memory_is_raised():
    """Not taken for something about the loss."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        if len(f) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return SUM(f, y)

    evidence = Evidence(loss)
    with pytest.raises(torch.OutOfMemoryError):
        evidence.add(torch.randn(2, 3), torch.arange(2), 2)
