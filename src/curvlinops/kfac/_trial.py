"""Passes over the batches' layers, whose geometry is compared with one datum's.

There is no more than a guess at which axis of a layer's result counts data. So the
first datum is evaluated alone: the axis is the one that gets shorter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvlinops._data import cloned, cut, strided, tensors_in
from curvlinops._determinism import close
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._spaces import rounding
from curvlinops.kfac._handlers import HANDLERS
from curvlinops.kfac._layers import Batch, resolve
from curvlinops.kfac._recording import Recorder, Use
from curvlinops.kfac._refusal import refusal
from curvlinops.kfac._uses import KINDS, first_rows, lengths
from curvlinops.risk import EmpiricalRisk

_NO_AXIS = (
    "no axis of its result counts the data: expand its input, as in "
    "`positions.expand(len(X), -1)`"
)
_NOT_SORTED = "its rows are not sorted by data: keep the data on an axis of their own"


@dataclass
class Findings:
    """What was found out about the uses of parameters.

    Attributes
    ----------
    axes : list of (str, str, int or None)
        For every use its kind, the weight, and the axis of its result that counts data
        (``None`` if that is not known).
    reasons : dict of str to str
        The parameters whose layers are not understood after all.
    interleaved : bool
        Whether the output's rows are sorted by terms first, by data second.
    """

    axes: list[tuple[str, str, int | None]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False

    def apply(self, uses: list[Use]) -> None:
        """Tell a batch's uses, if they are the same, what was found out."""
        if _names(uses) == [(kind, weight) for kind, weight, _ in self.axes]:
            for use, (_, _, axis) in zip(uses, self.axes, strict=True):
                use.axis = axis


def _names(uses: list[Use]) -> list[tuple[str, str]]:
    return [(use.kind, use.weight) for use in uses]


def batches(
    risk: EmpiricalRisk, bias: str, unsupported: str, title: str, known: list[Findings]
) -> Generator[Batch]:
    """Yield every batch with its layers (within ``risk.session``).

    What is found out about them is appended to ``known``, unless there is something.
    """
    source: Any = risk._fresh_batches(title)
    with closing(source):
        yield from _batches(risk, source, bias, unsupported, known)


def _batches(
    risk: EmpiricalRisk,
    source: Iterator[Any],
    bias: str,
    unsupported: str,
    known: list[Findings],
) -> Iterator[Batch]:
    recorder = Recorder(risk.model.aliases, HANDLERS)
    shapes = {name: tuple(p.shape) for name, p in risk.model.aliases.items()}
    while True:
        recorder.clear()
        with recorder:
            batch = next(source, None)
        if batch is None:
            return
        size = risk._size_or_none(batch.X)
        size = len(batch.output) if size is None else size
        if size == 0:
            continue
        recorder.check_complete(batch.output)
        data = strided(tensors_in(batch.X))
        for use in recorder.uses:
            use.take_from(data)
        if not known and size > 1:
            known.append(found(risk, batch, recorder.uses, size))
        findings = known[0] if known else Findings()
        findings.apply(recorder.uses)
        seen = {**recorder.unknown, **dict.fromkeys(findings.reasons, "")}
        layers, unknown = resolve(recorder.uses, seen, shapes, size, bias)
        if unknown and unsupported != "diagonal":
            raise refusal(unknown, findings.reasons, recorder.functions)
        yield Batch(risk, batch, layers, list(unknown), size, findings.interleaved)


def found(
    risk: EmpiricalRisk, batch: Linearization, uses: list[Use], size: int
) -> Findings:
    """Compare a batch's uses of parameters with those in its first datum."""
    findings = Findings()
    recorder = Recorder(risk.model.aliases, HANDLERS)
    try:
        with risk.model.left_as_it_is(), recorder:
            alone = risk.model(cut(cloned(batch.X), size, 0, 1))
        recorder.check_complete(alone)
    except Exception as error:  # whatever a model raises on a single datum
        raise_if_out_of_memory(error)
        return findings
    f = batch.output.detach()
    if f.numel() != size * alone.numel() or _names(uses) != _names(recorder.uses):
        return findings
    tolerance = rounding(f.dtype, f.device, batch.convolves) ** 0.5
    order = _order(f, alone.detach(), size, tolerance)
    findings.interleaved = order == "terms first"
    for use, one in zip(uses, recorder.uses, strict=True):
        axis, reason = _axis(use, one, size, tolerance if order else None)
        findings.axes.append((use.kind, use.weight, axis))
        if reason:
            names = filter(None, (use.weight, use.bias))
            findings.reasons |= dict.fromkeys(names, reason)
    return findings


def _order(f: Tensor, alone: Tensor, size: int, tolerance: float) -> str | None:
    """Return how an output's rows are sorted, given the first datum's.

    ``None`` where this is not among them: data have parts in each other's outputs.
    """
    orders = [(f[: len(alone)], "data first"), (f[::size], "terms first")]
    if f.ndim > 1 and alone.shape[1] == 1:
        orders.append((f[:, :1], "terms first"))
    for rows, order in orders:
        if rows.shape == alone.shape and close(rows, alone, tolerance):
            return order
    return None


def _axis(
    use: Use, one: Use, size: int, tolerance: float | None
) -> tuple[int | None, str]:
    """Return the axis along which there are more data in one use than in another.

    Or why there is none. With a tolerance, blocks of rows are compared.
    """
    few, many = lengths(one), lengths(use)
    axes = [
        axis
        for axis in KINDS[use.kind].axes(use, size)
        if many == (*few[:axis], size * few[axis], *few[axis + 1 :])
    ]
    if not axes:
        return None, _NO_AXIS
    (axis,) = axes
    if few[axis] > 1 and tolerance is not None and use.input.ndim:
        block, whole = first_rows(one, few[axis]), first_rows(use, few[axis])
        same = block.shape == whole.shape and close(whole, block, tolerance)
        return axis, "" if same else _NOT_SORTED
    return axis, ""
