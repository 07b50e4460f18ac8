r"""What a loss does with its terms, found by evaluating it on outputs.

A loss :math:`\ell` of data that consist of parts with :math:`n_1, n_2, \dots` of
:math:`n` data satisfies

.. math::

    \nabla \ell = (\nabla \ell_1, \nabla \ell_2, \dots)
    \quad \text{or} \quad
    \nabla \ell = \left( \tfrac{n_1}{n} \nabla \ell_1, \tfrac{n_2}{n} \nabla \ell_2,
    \dots \right)

if it is a sum, or a mean over data. The gradients are those by the outputs, so that
they are compared row by row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops._backward import grad
from curvlinops._data import (
    cut,
    holds_objects,
    joined,
    leaves_in,
    mapped,
    tensors_in,
)
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._objects import content_of, described
from curvlinops._substitutes import Watched

#: Outputs of more entries keep their precision: what is evaluated here in float64 would
#: take several times as much memory as their gradient.
LARGE = 1 << 22
#: Rounding error of what is evaluated here; losses may compute in single precision.
EPS = torch.finfo(torch.float32).eps

#: What speaks against a sum or a mean.
_DOUBTS = {"neither", "unknown"}

_CURE = (
    "Pass `num_terms_fn`, which maps (prediction, y) to the number of terms that the "
    "loss of a batch averages over, e.g. `lambda f, y: (y != -100).sum()`"
)


@dataclass(frozen=True)
class Reduction:
    """What a loss is taken for.

    Attributes
    ----------
    name : str
        ``"mean"`` or ``"sum"``.
    found : bool
        Whether the loss was seen to be that.
    wrong : str
        How it is neither; empty if nothing says so.
    doubt : str
        Why nobody knows; empty if the loss or the user says what it is.
    several : bool
        Whether there was more than one batch.
    """

    name: str
    found: bool = False
    wrong: str = ""
    doubt: str = ""
    several: bool = False

    def announce(self) -> None:
        """Raise, or warn, if batches are not known to be weighted as they should be."""
        if self.several:
            self._announce("several batches")

    def require(self, what: str) -> None:
        """Raise, or warn, for a matrix that needs the number of terms of one batch."""
        if self.wrong or not self.several:  # else there was a warning
            self._announce(what)

    def _announce(self, what: str) -> None:
        if self.wrong:
            raise ValueError(
                f"{self.wrong}. Class weights, ignored or padded targets, and "
                "sequences of different lengths have that effect, and the number of "
                f"terms is needed for {what}. {_CURE}."
            )
        if self.doubt:
            warnings.warn(
                f"It is not known whether the loss is a sum or a mean: {self.doubt}. "
                "Each batch is weighted by its number of data, which is right for a "
                f"mean over data. {_CURE}; or say what the loss is with "
                '`reduction="mean"` or `reduction="sum"`.',
                stacklevel=2,
            )


@dataclass(frozen=True)
class Batch:
    """Outputs and targets of ``size`` data.

    Tensors among the targets at places that are ``fixed`` are no data, whatever their
    length.
    """

    output: Tensor
    target: Any
    size: int
    fixed: frozenset[int] = frozenset()

    @property
    def datum(self) -> tuple[int, ...]:
        """Shape of the outputs of one datum."""
        return len(self.output) // self.size, *self.output.shape[1:]

    def to(self, dtype: torch.dtype, scale: float = 1.0) -> Batch:
        """Convert floating-point numbers, and divide outputs by a scale."""
        f, y = self.output, self.target
        if f.dtype != dtype:
            f = f.to(dtype)
            y = mapped(lambda t: t.to(dtype) if t.is_floating_point() else t, y)
        return replace(self, output=f if scale == 1.0 else f / scale, target=y)

    def halves(self) -> list[Batch]:
        """Cut the data in two, if there are two."""
        ends = [0, self.size // 2, self.size] if self.size > 1 else []
        return [
            self.with_tensors(
                cut(self.tensors(), self.size, start, stop, several=True), stop - start
            )
            for start, stop in pairwise(ends)
        ]

    def tensors(self) -> list[Tensor]:
        """Return outputs and targets that have an axis for data, or might.

        Raises
        ------
        ValueError
            If it is not known which do.
        """
        if holds_objects(self.target):
            raise ValueError("which tensors of objects have data is not known")
        targets = enumerate(tensors_in(self.target))
        return [self.output, *(t for place, t in targets if place not in self.fixed)]

    def with_tensors(self, tensors: Iterable[Tensor], size: int) -> Batch:
        """Return other data, whose :meth:`tensors` are given."""
        output, *others = tensors
        given, places = iter(others), count()
        target = mapped(
            lambda t: t if next(places) in self.fixed else next(given), self.target
        )
        return replace(self, output=output, target=target, size=size)

    def alike(self, other: Batch) -> frozenset[int]:
        """Return places of targets that are tensors of the same entries in another."""
        pairs = zip(tensors_in(self.target), tensors_in(other.target), strict=False)
        return frozenset(i for i, (a, b) in enumerate(pairs) if torch.equal(a, b))


def put_together(batches: Iterable[Batch]) -> Batch:
    """Return one batch of all data.

    Raises
    ------
    ValueError
        If they differ in shape, or in something else than their data.
    """
    batches = list(batches)
    others = [
        [
            content_of(x) or described(x)
            for x in leaves_in(batch.target)
            if not torch.is_tensor(x)
        ]
        for batch in batches
    ]
    if any(other != others[0] for other in others):
        raise ValueError("they differ in more than tensors with an axis for data")
    sizes = [batch.size for batch in batches]
    try:
        together = joined([b.tensors() for b in batches], sizes, several=True)
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        raise ValueError(str(error)) from error
    return batches[0].with_tensors(together, sum(sizes))


class Evaluated(NamedTuple):
    """A loss, and its gradient by the outputs or more."""

    value: Tensor
    gradient: Tensor


class Evidence:
    """Finds what a loss does with its terms, from one batch after the other.

    Parameters
    ----------
    function : callable
        The user's loss.

    Notes
    -----
    Evaluates the loss and its gradient eight times per batch, on outputs that are at
    hand: of the batch, of the batch twice, of its halves, and of the first batch and
    this one together. Where that gradient is zero (a divergence from what the model is
    now), so as good as nothing beside curvature, the same is done with the derivative
    of loss and gradient along a fixed vector, for outputs of at most one. Where two
    batches leave doubts, it is done once more with targets that are equal in both taken
    for constants. The first batch's outputs and targets are kept.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._first: Batch | None = None
        self._batches = 0
        #: What was seen, with a reason: that the loss is a "sum", or a "mean", or
        #: "neither", that batches stay "apart", or their targets "uncut", or that
        #: something is "unknown".
        self._seen: dict[str, str] = {}

    def add(self, output: Tensor, target: Any, size: int | None) -> None:
        """Look at a batch of ``size`` data, or as many as its output has rows."""
        self._batches += 1
        rows = output.shape[0] if output.ndim else 1
        size = rows if size is None else size
        if size == 0:
            return
        if output.ndim == 0 or rows == 0 or rows % size:
            reason = "the first axis of the model's output is not that of the data"
            self._seen.setdefault("unknown", reason)
            return
        batch, first = Batch(output.detach(), target, size), self._first
        if first is None:
            self._first = batch
            self._seen = {**self._looked_at(batch), **self._seen}
            return
        batch = replace(batch, fixed=first.fixed)
        seen = {**self._looked_at(batch, first), **self._seen}
        if self._batches == 2 and _DOUBTS & seen.keys():
            # Some targets may be constants, though they are as long as a batch.
            first, batch = (
                replace(b, fixed=first.alike(batch)) for b in (first, batch)
            )
            if first.fixed:
                again = {**self._looked_at(batch, first), **self._looked_at(first)}
                if not _DOUBTS & again.keys():
                    self._first, seen = first, again
        self._seen = seen

    def conclude(self, told: str | None, declared: str | None) -> Reduction:
        """Return what the loss is taken for.

        Parameters
        ----------
        told : str, optional
            What the user says that it is.
        declared : str, optional
            What the loss itself says, by an attribute.

        Raises
        ------
        ValueError
            If the loss was seen not to be what the user says.
        """
        seen, several = self._seen, self._batches > 1
        assumed = Reduction(told or declared or "mean", several=several)
        wrong = seen.get("neither", "")
        if {"sum", "mean"} <= seen.keys():
            wrong = wrong or "it is a sum for one batch, and a mean for another"
        if wrong:
            wrong = f"The loss is neither a sum nor a mean over data: {wrong}"
            return replace(assumed, wrong=wrong)
        if "unknown" in seen or not {"sum", "mean"} & seen.keys():
            doubt = seen.get("unknown", "its derivative by the outputs is zero")
            return replace(assumed, doubt="" if told or declared else doubt)
        (name,) = {"sum", "mean"} & seen.keys()
        if told not in (None, name):
            raise ValueError(
                f"`reduction={told!r}` says that the loss is a {told}, but it is a "
                f"{name}: of a batch twice, it is "
                f"{'twice that' if name == 'sum' else 'that'} of the batch. "
                "`reduction` says what the loss does, and changes nothing about it."
            )
        if name == "mean" and {"apart", "uncut"} & seen.keys():
            assumed = replace(assumed, name=name)
            if told or ("apart" not in seen and declared == name):
                return assumed
            doubt = f"batches cannot be put together ({seen.get('uncut')})"
            wrong = seen.get("apart", "")
            return replace(assumed, wrong=wrong, doubt="" if wrong else doubt)
        return replace(assumed, name=name, found=True)

    def _looked_at(self, batch: Batch, *others: Batch) -> dict[str, str]:
        """Return what is seen of one batch, alone and together with others."""
        try:
            return self._look(batch, *others)
        except Exception as error:  # whatever a user's loss raises for such data
            raise_if_out_of_memory(error)
            return {
                "unknown": "it fails if batches are cut or put together "
                f"({type(error).__name__}: {str(error)[:200]})"
            }

    def _look(self, batch: Batch, *others: Batch) -> dict[str, str]:
        """Return what is seen, or nothing where derivatives are zero."""
        batch = self._converted(batch)
        known = [*(b.to(batch.output.dtype) for b in others), batch]
        scale = max(1.0, *(float(b.output.abs().max()) for b in known))
        bounded = [b.to(b.output.dtype, scale) for b in known]
        noise = self._noise(bounded[-1])
        seen = self._compare(known, noise, curvature=False)
        seen = seen or self._compare(bounded, noise, curvature=True)
        if "neither" in seen:
            once, again = (self._evaluate(batch, curvature=False) for _ in range(2))
            if "sum" not in _kinds(once, [again], [1.0], noise):
                return {"unknown": "it is random"}
        return seen

    def _noise(self, batch: Batch) -> float:
        """Return what gradients may be from rounding errors only."""
        try:
            value, usual = self._evaluate(batch, curvature=True)
        except Exception as error:  # of a loss that takes no other outputs
            raise_if_out_of_memory(error)
            return 0.0
        share = torch.finfo(value.dtype).eps * value.abs() / usual.numel()
        sizes = torch.stack([share, EPS * usual.abs().max()])
        return 4 * float(sizes.nan_to_num(0.0, 0.0).max())

    def _converted(self, batch: Batch) -> Batch:
        """Return a batch in the best precision the loss takes."""
        own = batch.output.dtype
        single = torch.promote_types(own, torch.float32)
        best = torch.float64 if batch.output.numel() <= LARGE else single
        for dtype in dict.fromkeys([best, single]):
            try:
                self._evaluate(converted := batch.to(dtype), curvature=False)
            except Exception as error:  # of weights in another precision, say
                raise_if_out_of_memory(error)
                continue
            return converted
        return batch

    def _compare(
        self, batches: list[Batch], noise: float, curvature: bool
    ) -> dict[str, str]:
        """Compare the last of some batches with itself twice, its halves, and all."""
        batch = batches[-1]
        own = self._evaluate(batch, curvature)
        size = own.gradient.abs().max()
        if not size.isfinite() or size <= 100 * noise:
            return {}
        twice = self._evaluate(put_together([batch, batch]), curvature)
        kinds = _kinds(twice, [own, own], [0.5, 0.5], noise)
        if len(kinds) != 1:
            return {"unknown": "of a batch twice, it is not the same, nor twice that"}
        (kind,) = kinds
        seen = {kind: ""}
        if halves := batch.halves():
            parts = [self._evaluate(half, curvature) for half in halves]
            shares = [half.size / batch.size for half in halves]
            if kind not in _kinds(own, parts, shares, noise):
                seen["neither"] = f"of a batch, it is not the {kind} of its halves'"
        if len(batches) > 1:
            try:
                together = put_together(batches)
            except ValueError as error:
                if batches[0].datum == batch.datum:  # but targets are no tensors, say
                    return {**seen, "uncut": f"{error}"}
                reason = (
                    f"The loss is a {kind} of each batch, but their weights are not "
                    f"known, since they cannot be put together ({error}). Pass "
                    '`reduction="mean"` if all data weigh the same'
                )
                return {**seen, "apart": reason}
            whole = self._evaluate(together, curvature)
            parts = [self._evaluate(batches[0], curvature), own]
            shares = [b.size / together.size for b in batches]
            if kind not in _kinds(whole, parts, shares, noise):
                reason = f"of two batches together, it is not the {kind} of theirs"
                seen["neither"] = reason
        return seen

    def _evaluate(self, batch: Batch, curvature: bool) -> Evaluated:
        r"""Return a loss with its gradient, and :math:`\nabla^2 \ell \, u` added."""
        f = batch.output.detach().requires_grad_()
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is evaluated anyway warns, too
            with Watched():
                value = self._function(f, batch.target)
            (gradient,) = torch.autograd.grad(
                value, f, create_graph=curvature, materialize_grads=True
            )
            along: Tensor | float = 0.0
            if curvature and gradient.requires_grad:
                row = torch.arange(1, f[0].numel() + 1, device=f.device, dtype=f.dtype)
                u = row.sin().reshape(f.shape[1:]).expand_as(f)  # all rows alike
                try:
                    (along,) = grad(gradient, f, u, materialize_grads=True)
                except RuntimeError as error:  # of what has no second derivative
                    raise_if_out_of_memory(error)
        return Evaluated(value.detach(), gradient.detach() + along)


def _kinds(
    whole: Evaluated, parts: list[Evaluated], shares: list[float], noise: float
) -> set[str]:
    """Return what a whole may be of its parts: their sum, their mean, both, neither."""
    kinds = set()
    rows = whole.gradient.split([len(part.gradient) for part in parts])
    values = torch.stack([part.value for part in parts])
    for kind, factors in ("sum", [1.0] * len(parts)), ("mean", shares):
        terms = values * values.new_tensor(factors)
        bound = _rounding(terms.abs().sum()) + noise * whole.gradient.numel()
        equal = bool((whole.value - terms.sum()).abs() <= bound)
        for row, part, factor in zip(rows, parts, factors, strict=True):
            expected = factor * part.gradient
            bound = _rounding(expected.abs().max()) + noise
            equal = equal and bool((row - expected).abs().max() <= bound)
        if equal:
            kinds.add(kind)
    return kinds


def _rounding(size: Tensor) -> Tensor:
    """Return how much numbers up to some size may differ from rounding."""
    return max(EPS, torch.finfo(size.dtype).eps) ** 0.75 * size
