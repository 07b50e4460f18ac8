"""Model and loss of a risk, evaluated as its user would, at shifted parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from curvlinops._backward import grad
from curvlinops._data import cloned, moved
from curvlinops._draws import preserved_rng
from curvlinops._loss_leaves import check_loss_leaves
from curvlinops._model import Model
from curvlinops._random import Probes
from curvlinops.losses import Loss, LossFunction, unwrapped

Outputs: TypeAlias = list[Tensor]


class SkippedError(Exception):
    """A check does not apply; the message says why."""


class Plain:
    """Model and loss of a risk, evaluated as the user would.

    Vectors of output space are lists with one tensor per batch.
    """

    def __init__(self, risk: Any, pairs: Any = None, first_row: int = 0) -> None:
        self.risk, self._pairs, self._first_row = risk, pairs, first_row
        self.dtype, self.device = risk.space.dtype, risk.space.device
        self.theta = [p.detach() for p in risk.params.values()]

    def step(self, u: Tensor, scale: float) -> float:
        """Return the step width of central differences along a direction."""
        norm = math.sqrt(sum(float(p.double().square().sum()) for p in self.theta))
        root = torch.finfo(self.dtype).eps ** (1 / 3)
        return scale * root * (1 + norm) / max(float(u.double().norm()), 1e-30)

    def _run(self, shift: Tensor | None, body: Callable[[Model], Any]) -> Any:
        """Return ``body(model)`` for the model at shifted parameters."""
        risk = self.risk
        theta = self.theta
        if shift is not None:
            shifts = risk.space.split(shift)
            theta = [p + s for p, s in zip(theta, shifts, strict=True)]
        params = dict(zip(risk.params, theta, strict=True))
        model = risk.model.anew(params)
        if risk.model._held is not None:
            model.evaluate_in_place()
        with preserved_rng(self.device):
            return model.run(lambda: body(model))

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Yield inputs and targets on the model's device."""
        for X, y in self._pairs or self.risk.pairs():
            yield cloned(moved(X, self.device)), moved(y, self.device)

    def by_batch(self) -> Iterator[Plain]:
        """Yield the same for the data of each batch alone."""
        for pair, first_row in zip(self.batches(), self._first_rows, strict=True):
            yield Plain(self.risk, [pair], first_row)

    @cached_property
    def _first_rows(self) -> list[int]:
        """Numbers of the batches' first rows among the outputs of all data."""
        sizes = (len(f) if f.ndim else 1 for f in self.here)
        return [*accumulate(sizes, initial=self._first_row)][:-1]

    def outputs(self, shift: Tensor | None = None) -> Outputs:
        """Evaluate the model on all data."""
        return self._run(
            shift, lambda model: [model(X).detach() for X, _ in self.batches()]
        )

    @cached_property
    def targets(self) -> list[Any]:
        """Targets of all batches."""
        return [y for _, y in self.batches()]

    @cached_property
    def here(self) -> Outputs:
        """Outputs at the parameters as they are."""
        return self.outputs()

    def check_loss(self) -> None:
        """Raise if the loss depends on parameters other than through outputs."""
        if (loss_func := self.risk.loss_func) is None:
            return

        def body(model: Model) -> None:
            for X, y in self.batches():
                check_loss_leaves(model, loss_func, model(X), y)

        self._run(None, body)

    def check_terms(self) -> None:
        """Raise if the loss is not the sum or mean that it is taken for."""
        risk = self.risk
        if (evidence := risk.terms.evidence()) is None:
            return
        sizes = [risk._size_or_none(X) for X, _ in risk.pairs()]
        for batch in zip(self.here, self.targets, sizes, strict=True):
            evidence.add(*batch)
        risk.terms.confirm(evidence)

    def losses(self) -> list[Loss]:
        """Return the loss of every batch, as the package knows it."""
        if self.risk.loss_function is None:
            raise SkippedError("there is no loss function")
        losses = list(map(self.risk.loss_function, self.here, self.targets))
        for loss, first_row in zip(losses, self._first_rows, strict=True):
            loss.first_row = first_row
        return losses

    def pull_back(self, U: Outputs, shift: Tensor | None = None) -> Tensor:
        """Multiply by the transposed Jacobian."""

        def body(model: Model) -> Tensor:
            total = torch.zeros(self.risk.space.dim, dtype=self.dtype).to(self.device)
            for (X, _), u in zip(self.batches(), U, strict=True):
                if not (f := model(X)).requires_grad:
                    continue
                grads = grad(f, model.leaves, u, materialize_grads=True)
                total += self.risk.space.join(grads)
            return total

        return self._run(shift, body)

    def restricted(self, u: Tensor) -> Tensor:
        """Set entries to zero that derivatives of the outputs do not see.

        Autograd's derivative by the padding row of an embedding is zero, although
        outputs change with it.
        """
        return u.where(self._seen, 0.0) if self._seen.any() else u

    @cached_property
    def _seen(self) -> Tensor:
        random = Probes(sum(f.numel() for f in self.here), "normal", 0, self.dtype)
        vector = random.block(0, 1)[:, 0].to(self.device)
        return self.pull_back(self.split(vector)) != 0

    def push_forward(self, u: Tensor, scale: float) -> Outputs:
        """Multiply by the Jacobian, by differences of outputs."""
        h = self.step(u, scale)
        sides = zip(self.outputs(h * u), self.outputs(-h * u), strict=True)
        return [(a - b) / (2 * h) for a, b in sides]

    def loss(self, outputs: Outputs) -> Tensor:
        """Evaluate the user's loss, on the concatenated outputs if they fit."""
        loss_func = self.risk.loss_func
        pairs = list(zip(outputs, self.targets, strict=True))
        if len(pairs) == 1:
            return _value(loss_func, *pairs[0])
        if self._fit_together:
            return _value(loss_func, torch.cat(outputs), torch.cat(self.targets))
        if not self.is_mean:
            return torch.stack([_value(loss_func, *pair) for pair in pairs]).sum()
        summed = _summing(loss_func)
        share = self.share_of_a_term
        return share * torch.stack([_value(summed, *pair) for pair in pairs]).sum()

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over its terms."""
        return (
            self.risk.loss_function is not None
            and self.risk.loss_function.reduction == "mean"
        )

    @cached_property
    def share_of_a_term(self) -> float:
        """The mean-reduced loss over the sum-reduced one, of all data."""
        if not self.is_mean:
            return 1.0
        losses = self.losses()
        if losses[0].opaque:
            raise SkippedError("the loss is not known in closed form")
        loss_func, total = self.risk.loss_func, 0.0
        for loss, y in zip(losses, self.targets, strict=True):
            # the loss of probabilities, which all outputs may be
            probe = torch.linspace(-1, 2, loss.output.numel()).sigmoid()
            probe = probe.to(loss.output).view_as(loss.output)
            ratio = _value(_summing(loss_func), probe, y) / _value(loss_func, probe, y)
            # 0 / 0 where all is ignored, or a loss is zero everywhere
            total += float(loss.count if ratio.isnan() else ratio)
        return 1 / total

    @cached_property
    def _fit_together(self) -> bool:
        """Whether outputs and targets of all batches can be concatenated."""
        f, y = self.here, self.targets
        if not all(torch.is_tensor(t) and t.ndim for t in [*f, *y]):
            return False
        one_shape = all(len({t.shape[1:] for t in side}) == 1 for side in (f, y))
        return one_shape and self.losses()[0].class_axis != -f[0].ndim

    def loss_gradient(self, outputs: Outputs) -> Outputs:
        """Differentiate the loss of all data by the outputs."""
        self.losses()
        with torch.enable_grad():
            leaves = [f.detach().requires_grad_() for f in outputs]
            value = self.loss(leaves)
            grads = torch.autograd.grad(value, leaves, materialize_grads=True)
        return list(grads)

    def split(self, u: Tensor) -> Outputs:
        """Cut a flat vector of output space into batches."""
        parts = u.split([f.numel() for f in self.here])
        return [part.view_as(f) for part, f in zip(parts, self.here, strict=True)]


def _value(loss_func: Any, f: Tensor, y: Any) -> Tensor:
    value = loss_func(f, y)
    if not isinstance(value, Loss):
        return value
    return value.value() / (1 if loss_func.reduction == "sum" else value.count)


def _summing(loss_func: Any) -> Any:
    """Return the same loss with another reduction."""
    loss_func = unwrapped(loss_func)
    if isinstance(loss_func, LossFunction):
        return replace(loss_func, reduction="sum")
    if not isinstance(loss_func, nn.Module):
        return partial(loss_func, reduction="sum")
    loss_func = copy.copy(loss_func)
    loss_func.reduction = "sum"
    return loss_func
