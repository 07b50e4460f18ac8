"""Losses with their options and the data of one batch, as a table.

A name starts with that of the loss, see ``KINDS``. Shapes have one, two and three axes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops.losses import (
    BCE,
    L1,
    MSE,
    BCEWithLogits,
    CrossEntropy,
    Generic,
    HingeEmbedding,
    Huber,
    KLDiv,
    Loss,
    LossFunction,
    MultiLabelSoftMargin,
    NegativeLogLikelihood,
    PoissonNLL,
    SmoothL1,
    SoftMargin,
    as_loss_function,
)

bce_with_logits = F.binary_cross_entropy_with_logits

#: What a loss is known as, by the first part of a case's name.
KINDS: dict[str, type[Loss]] = {
    "mse": MSE,
    "bce": BCEWithLogits,
    "ce": CrossEntropy,
    "huber": Huber,
    "smooth": SmoothL1,
    "l1": L1,
    "poisson": PoissonNLL,
    "probabilities": BCE,
    "margin": SoftMargin,
    "labels": MultiLabelSoftMargin,
    "hinge": HingeEmbedding,
    "nll": NegativeLogLikelihood,
    "kl": KLDiv,
    "generic": Generic,
}


@dataclass
class Hidden:
    """One of torch's losses, of which only the values are known."""

    function: Callable[..., Tensor]

    def __call__(self, output: Tensor, target: Tensor, **options: Any) -> Tensor:
        return self.function(output, target, **options)


def quartic(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Couple all entries of a datum, and average over data."""
    per_datum = (output - target).flatten(1).square().sum(1).square()
    return per_datum.mean() if reduction == "mean" else per_datum.sum()


class Cubic(torch.autograd.Function):
    """Twice differentiable, but cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Square.apply(x) * 3 * g


class Square(torch.autograd.Function):
    """As above."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * g.numpy())


def cubic(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    values = Cubic.apply(output - target)
    return values.mean(1).mean() if reduction == "mean" else values.mean(1).sum()


def total(output: Tensor, target: Any, reduction: str = "mean") -> Tensor:
    """Is linear, and its gradient has no graph."""
    return output.mean() if reduction == "mean" else output.sum()


def num_entries(output: Tensor, target: Any) -> int:
    return output.numel()


@dataclass(eq=False)
class Case:
    """A torch loss with options and the data of one batch.

    ``mean`` is torch's name of the mean. ``extreme`` data have derivatives that half
    precision cannot hold.
    """

    function: Callable[..., Tensor]
    output: Tensor
    target: Any
    options: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    class_axis: int | None = None
    num_terms_fn: Any = None
    mean: str = "mean"
    extreme: bool = False

    def torch(self, output: Tensor, reduction: str, target: Any = None) -> Tensor:
        target = self.target if target is None else target
        with warnings.catch_warnings():  # of a divergence: what its mean divides by
            warnings.filterwarnings("ignore", "reduction: 'mean' divides")
            return self.bound(reduction)(output, target)

    def bound(self, reduction: str) -> Callable[..., Tensor]:
        reduction = self.mean if reduction == "mean" else reduction
        return partial(self.function, reduction=reduction, **self.options)

    def loss_function(self, reduction: str = "mean") -> LossFunction:
        return as_loss_function(self.bound(reduction), self.num_terms_fn)

    def loss(self, reduction: str = "mean") -> Loss:
        return self.loss_function(reduction)(self.output, self.target)

    def hessian(self) -> Tensor:
        """Compute it by a reverse pass through a reverse pass, from torch's loss."""
        evaluate = partial(self.torch, reduction="sum")
        H = torch.autograd.functional.hessian(evaluate, self.output)
        return H.reshape(self.output.numel(), self.output.numel())

    def row_of_entry(self) -> Tensor:
        """Number the rows, at every entry of the flattened output."""
        rows = torch.arange(torch.Size(self.rows).numel()).reshape(self.rows)
        if self.class_axis is not None:
            rows = rows.unsqueeze(self.class_axis)
        return rows.expand(self.output.shape).flatten()


def _cases() -> dict[str, Case]:
    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    uniform = partial(torch.rand, generator=g, dtype=torch.float64)
    indices = partial(torch.randint, 0, 3, generator=g)
    some_ignored = torch.tensor([2, -100, 0, 1])
    grid = indices((2, 2, 2))
    grid[0, 1] = -100
    w = torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)
    soft, soft_grid = normal(4, 3).softmax(1), normal(2, 3, 2).softmax(1)

    def doubles(*values):
        return torch.tensor(values, dtype=torch.float64)

    def signs(shape):
        return 2.0 * torch.randint(0, 2, shape, generator=g) - 1

    def counts(shape):
        return torch.randint(0, 5, shape, generator=g).to(torch.float64)

    def log_probabilities(shape):
        return normal(shape).log_softmax(-1)

    def ce(shape, target, function=F.cross_entropy, **options):
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        axis = -max(len(shape) - 1, 1)
        output = normal(shape)
        output = output.log_softmax(axis) if function is F.nll_loss else output
        return Case(function, output, target, options, rows, axis)

    def at(function, output, target, mean="mean", extreme=False, **options):
        """Take the data as they are."""
        shape = output.shape
        rows, axis = (shape[:-1], -1) if len(shape) > 1 else (shape, None)
        extra = {"mean": mean, "extreme": extreme}
        return Case(function, output, target, options, rows, axis, **extra)

    def entries(function, *shape, output=normal, target=normal, **options):
        return at(function, output(shape), target(shape), **options)

    def by_entry(function, *shape, **options):
        case = entries(Hidden(function), *shape, **options)
        case.num_terms_fn = num_entries
        return case

    bce = partial(entries, bce_with_logits, target=uniform)
    poisson = partial(entries, F.poisson_nll_loss, target=counts)
    rates = partial(poisson, output=uniform, log_input=False)
    probabilities = partial(
        entries, F.binary_cross_entropy, output=uniform, target=uniform
    )
    margin = partial(entries, F.soft_margin_loss, target=signs)
    labels = partial(entries, F.multilabel_soft_margin_loss, target=uniform)
    hinge = partial(entries, F.hinge_embedding_loss, target=signs)
    nll = partial(ce, function=F.nll_loss)
    kl = partial(entries, F.kl_div, output=log_probabilities, target=uniform)
    kinks = doubles(-2, -0.5, 0, 0.5, 2, 0.25)
    return {
        "mse-0d": entries(F.mse_loss),
        "mse-1d": entries(F.mse_loss, 4),
        "mse-2d": entries(F.mse_loss, 4, 3),
        "mse-3d": entries(F.mse_loss, 2, 3, 2),
        "mse-weight": entries(F.mse_loss, 4, 3, weight=uniform(4, 3)),
        "huber-0d": entries(F.huber_loss),
        "huber-1d": entries(F.huber_loss, 4),
        "huber-2d": entries(F.huber_loss, 4, 3),
        "huber-3d": entries(F.huber_loss, 2, 3, 2),
        "huber-delta": entries(F.huber_loss, 4, 3, delta=0.4),
        "huber-weight": entries(F.huber_loss, 4, 3, weight=uniform(4, 3)),
        "huber-kinks": at(F.huber_loss, kinks, 0 * kinks, delta=0.5),
        "huber-far": at(F.huber_loss, 1e3 + kinks.view(2, 3), kinks.view(2, 3)),
        "smooth-l1-0d": entries(F.smooth_l1_loss),
        "smooth-l1-1d": entries(F.smooth_l1_loss, 4),
        "smooth-l1-2d": entries(F.smooth_l1_loss, 4, 3),
        "smooth-l1-3d": entries(F.smooth_l1_loss, 2, 3, 2, beta=2.5),
        "smooth-l1-beta": entries(F.smooth_l1_loss, 4, 3, beta=0.4),
        "smooth-l1-kinks": at(F.smooth_l1_loss, kinks, 0 * kinks, beta=0.5),
        "smooth-l1-no-beta": entries(F.smooth_l1_loss, 4, 3, beta=0.0),
        "l1-1d": entries(F.l1_loss, 4),
        "l1-2d": entries(F.l1_loss, 4, 3),
        "l1-3d": entries(F.l1_loss, 2, 3, 2),
        "l1-weight": entries(F.l1_loss, 4, 3, weight=uniform(4, 3)),
        "l1-kinks": at(F.l1_loss, kinks, 0 * kinks),
        "poisson-0d": poisson(),
        "poisson-1d": poisson(5),
        "poisson-2d": poisson(4, 3),
        "poisson-integers": poisson(4, 3, target=indices),
        "poisson-3d": poisson(2, 3, 2, full=True),
        "poisson-rates-1d": rates(5),
        "poisson-rates-2d": rates(4, 3, full=True),
        "poisson-rates-3d": rates(2, 3, 2, eps=0.1),
        "poisson-rates-small": at(
            F.poisson_nll_loss,
            doubles(0, 1e-9, 1e-8, 0, 1e-3),
            doubles(0, 0, 3, 1, 2),
            log_input=False,
            extreme=True,
        ),
        "poisson-logarithms-small": at(
            F.poisson_nll_loss, doubles(-800, -50, -1e-9, 5), doubles(0, 1, 0, 200)
        ),
        "bce-1d": bce(5),
        "bce-2d": bce(4, 3),
        "bce-weight": bce(4, 3, weight=uniform(4, 1)),
        "bce-pos-weight": bce(4, 3, pos_weight=w),
        "bce-pos-weight-1d": bce(5, pos_weight=w[2:]),
        "bce-pos-weight-3d": bce(2, 3, 2, pos_weight=uniform(3, 1) * 4),
        "bce-both": bce(4, 3, weight=uniform(3), pos_weight=w),
        "bce-zero-pos-weight": bce(4, 3, pos_weight=0 * w),
        "probabilities-0d": probabilities(),
        "probabilities-1d": probabilities(5),
        "probabilities-2d": probabilities(4, 3),
        "probabilities-3d": probabilities(2, 3, 2),
        "probabilities-weight": probabilities(4, 3, weight=w),
        "probabilities-weight-2d": probabilities(4, 3, weight=uniform(4, 1)),
        "probabilities-hard": probabilities(
            4, 3, target=lambda s: (uniform(s) < 0.5).to(torch.float64)
        ),
        "probabilities-met": at(
            F.binary_cross_entropy, doubles(0, 1, 0.5, 1), doubles(0, 1, 0.5, 1)
        ),
        "probabilities-clamped": at(
            F.binary_cross_entropy,
            doubles(0, 0, 1, 1, 1e-50, 1e-13, 0.3),
            doubles(1, 0.5, 0, 0.5, 1, 1, 1),
            extreme=True,
        ),
        "margin-0d": margin(),
        "margin-1d": margin(5),
        "margin-2d": margin(4, 3),
        "margin-3d": margin(2, 3, 2),
        "margin-soft": margin(4, 3, target=normal),
        "margin-sure": at(F.soft_margin_loss, doubles(-700, 0, 800), doubles(1, 1, 1)),
        "labels-2d": labels(4, 3),
        "labels-3d": labels(2, 3, 2),
        "labels-weight": labels(4, 3, weight=w),
        "labels-weight-2d": labels(4, 3, weight=uniform(4, 1)),
        "labels-one": labels(4, 1),
        "hinge-1d": hinge(5),
        "hinge-2d": hinge(4, 3, margin=0.3),
        "hinge-3d": hinge(2, 3, 2),
        "hinge-kinks": at(F.hinge_embedding_loss, doubles(1, 1, 0), doubles(1, -1, -1)),
        "ce": ce((4, 3), indices((4,))),
        "ce-uint8": ce((4, 3), indices((4,)).to(torch.uint8)),
        "ce-weight": ce((4, 3), indices((4,)), weight=w),
        "ce-ignore": ce((4, 3), some_ignored),
        "ce-ignore-class": ce((4, 3), indices((4,)), ignore_index=1, weight=w),
        "ce-smooth": ce((4, 3), indices((4,)), label_smoothing=0.3),
        "ce-all-smooth": ce((4, 3), indices((4,)), label_smoothing=1.0),
        "ce-everything": ce((4, 3), some_ignored, weight=w, label_smoothing=0.3),
        "ce-all-ignored": ce((2, 3), torch.full((2,), -100), label_smoothing=0.1),
        "ce-one-class": ce((2, 1), torch.zeros(2, dtype=torch.int64)),
        "ce-tokens": ce((2, 3, 2), indices((2, 2)), label_smoothing=0.3),
        "ce-images": ce((2, 3, 2, 2), grid, weight=w, label_smoothing=0.3),
        "ce-unbatched": ce((3,), torch.tensor(2), weight=w),
        "ce-unbatched-ignored": ce((3,), torch.tensor(-100), weight=w),
        "ce-soft": ce((4, 3), soft),
        "ce-soft-unnormalised": ce((4, 3), uniform(4, 3)),
        "ce-soft-weight": ce((4, 3), soft, weight=w),
        "ce-soft-everything": ce((4, 3), soft, weight=w, label_smoothing=0.3),
        "ce-soft-tokens": ce((2, 3, 2), soft_grid, weight=w, label_smoothing=0.3),
        "ce-soft-unbatched": ce((3,), soft[0], weight=w, label_smoothing=0.3),
        "nll": nll((4, 3), indices((4,))),
        "nll-everything": nll((4, 3), some_ignored, weight=w),
        "nll-ignore-class": nll((4, 3), indices((4,)), ignore_index=1),
        "nll-tokens": nll((2, 3, 2), indices((2, 2)), weight=w),
        "nll-unbatched": nll((3,), torch.tensor(2), weight=w),
        "kl-1d": kl(5),
        "kl-2d": kl(4, 3),
        "kl-3d": kl(2, 3, 2, mean="batchmean"),
        "kl-0d-batchmean": kl(output=normal, mean="batchmean"),
        "kl-1d-batchmean": kl(5, mean="batchmean"),
        "kl-batchmean": kl(4, 3, mean="batchmean"),
        "kl-logarithms": kl(4, 3, target=log_probabilities, log_target=True),
        "kl-batchmean-logarithms": kl(
            4, 3, target=log_probabilities, log_target=True, mean="batchmean"
        ),
        "kl-zeros": at(
            F.kl_div, doubles(-0.1, -2, -50), doubles(0, 1, 0.2), mean="batchmean"
        ),
        "generic-huber": by_entry(F.huber_loss, 4, 3, delta=0.7),
        "generic-huber-1d": by_entry(F.huber_loss, 4),
        "generic-l1": by_entry(F.l1_loss, 4, 3),
        "generic-poisson": by_entry(F.poisson_nll_loss, 4, 3),
        "generic-linear": by_entry(total, 4, 3),
        "generic-quartic": entries(quartic, 4, 3),
        "generic-quartic-3d": entries(quartic, 2, 3, 2),
        "generic-cubic": entries(cubic, 4, 3),
    }


CASES = _cases()
