"""Whether model, loss and data give the same risk in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlinops._checksum import Checksum
from curvlinops._data import tensors_in
from curvlinops._finite import all_finite, gradient_failure
from curvlinops._linearization import Linearization
from curvlinops._loss_leaves import check_loss_leaves
from curvlinops._loss_state import unchanged
from curvlinops._reduction import Evidence
from curvlinops._shuffling import why_passes_differ
from curvlinops._spaces import rounding

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk


@dataclass(frozen=True)
class Fingerprint:
    """What a pass over the data saw, to compare two passes."""

    batches: tuple[tuple[float, ...], ...]
    size: int | None
    loss: Tensor
    gradient: Tensor


def look(risk: EmpiricalRisk, batches: Iterable[Linearization]) -> Fingerprint:
    """Evaluate loss and gradient in one pass."""
    space = risk.space
    gradient = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
    value = torch.zeros((), dtype=space.dtype, device=space.device)
    marks: list[tuple[float, ...]] = []
    sizes: list[int | None] = []
    count: Any = 0
    for batch in batches:
        marks.append(Checksum(tensors_in((batch.X, batch.y)))())
        sizes.append(risk._size_or_none(batch.X))
        if risk.loss_function is None:
            value += batch.output.detach().sum()
            grads = batch.vjp(torch.ones_like(batch.output))
        else:
            value += _checked_loss(batch)
            count = count + batch.count
            grads = batch.gradient()
        for row, grad in zip(space.split(gradient), grads, strict=True):
            row.add_(grad)
        del batch, grads  # before the next one is evaluated
    denominator = risk._denominator(count)
    return Fingerprint(
        tuple(marks),
        None if None in sizes else sum(filter(None, sizes)),
        value / denominator,
        gradient.div_(denominator),
    )


def passes_agree(risk: EmpiricalRisk, num_data: int | None) -> bool:
    """Compare two passes, run one after the other on one random stream.

    Returns
    -------
    bool
        Whether the batches were the same, too.

    Raises
    ------
    ValueError
        If loss or gradient differ, or the gradient is not finite though the loss is, a
        module's mode makes them random or dependent on
        the batches, the loss changes its own buffers, depends on parameters by itself,
        or is neither a sum nor a mean over data.
    """
    check_modes(risk.model_func)

    def run() -> tuple[Fingerprint, Fingerprint, Evidence | None, list[str]]:
        evidence = risk.terms.evidence()
        with unchanged(risk.loss_func) as changed:
            batches = risk._fresh_batches("check 1/2")
            first = look(risk, _examined(risk, batches, evidence))
            second = look(risk, risk._fresh_batches("check 2/2"))
            return first, second, evidence, changed()

    first, second, evidence, state = risk.session(run)
    _check_state(state)
    _check_finite(risk, first.gradient)
    if first.size is not None and num_data not in (None, first.size):
        raise ValueError(
            f"`num_data` is {num_data}, but the data has {first.size} points."
        )
    space, convolves = risk.space, risk.model.convolves
    tolerance = rounding(space.dtype, space.device, convolves) ** 0.5
    same = close(first.loss, second.loss, tolerance) and close(
        first.gradient, second.gradient, tolerance
    )
    same_batches = first.batches == second.batches
    if not same:
        raise ValueError(
            "Two passes over the same data gave different losses or gradients "
            f"({float(first.loss):.6e} and {float(second.loss):.6e}): "
            + (
                f"the loss changes its attributes {state} whenever it is evaluated. "
                "Keep them as they are while curvature is computed."
                if same_batches and state
                else "the model is random although the data repeats. Call "
                "`model.eval()`, or remove its randomness."
                if same_batches
                else why_passes_differ(risk.data)
            )
            + " To go on all the same, pass `check_deterministic=False`."
        )
    risk.terms.conclude(evidence)
    return same_batches


def find_terms(risk: EmpiricalRisk) -> None:
    """Look at the first two batches for what the loss does with its terms.

    Costs two evaluations of the model, where nothing was checked, or since loss or
    data have changed.
    """

    def run() -> Evidence | None:
        if (evidence := risk.terms.evidence()) is not None:
            for batch in islice(risk._fresh_batches("terms"), 2):
                evidence.add(batch.output, batch.y, risk._size_or_none(batch.X))
                del batch  # before the next one is evaluated
        return evidence

    with risk.terms.supposed():
        risk.terms.conclude(risk.session(run))


def _examined(
    risk: EmpiricalRisk, batches: Iterable[Linearization], evidence: Evidence | None
) -> Iterator[Linearization]:
    """Yield batches, and look at the loss of each.

    What the first one says counts until all have been looked at.
    """
    for batch in batches:
        if evidence is not None:
            evidence.add(batch.output, batch.y, risk._size_or_none(batch.X))
            if batch.place == 0:
                risk.terms.conclude(evidence)
                batch.make_loss = risk._loss_maker(batch.X)
        yield batch
        if risk.loss_function is not None:
            risk.terms.look_for_curvature(batch.loss)
        if risk.loss_func is not None:
            check_loss_leaves(risk.model, risk.loss_func, batch.output, batch.y)
        del batch  # before the next one is evaluated


def _checked_loss(batch: Linearization) -> Tensor:
    value = batch.loss.value().detach()
    if not torch.isfinite(value):
        raise ValueError(
            f"The loss of batch {batch.index} is not finite ({float(value)}). Look at "
            "that batch's inputs and targets."
        )
    return value


def _check_finite(risk: EmpiricalRisk, gradient: Tensor) -> None:
    """Raise if a gradient is not finite, and name the first batch with such a one."""
    if gradient.isfinite().all():
        return

    def culprit() -> int | None:
        for batch in risk._fresh_batches("check"):
            ones = torch.ones_like(batch.output)
            grads = batch.vjp(ones) if risk.loss_function is None else batch.gradient()
            if not all_finite(grads):
                return batch.index
        return None

    rows = dict(zip(risk.params, risk.space.split(gradient), strict=True))
    raise gradient_failure(rows, risk.session(culprit), risk.loss_function is not None)


def _check_state(changed: list[str]) -> None:
    """Raise if evaluating the loss changes its buffers."""
    if buffers := [name for name in changed if not name.startswith(".")]:
        raise ValueError(
            f"The loss changes its buffers {buffers} whenever it is evaluated (running "
            "statistics?), so it is no function of the parameters. Call "
            "`loss_func.eval()`, or fix them; or pass `check_deterministic=False` to "
            "use them as they are before each product."
        )


def check_modes(model_func: Callable[..., Any]) -> None:
    """Raise if a module's mode makes results random or dependent on batches."""
    if not isinstance(model_func, nn.Module):
        return
    for name, part in model_func.named_modules():
        kind = type(part).__name__
        label = f"{kind} {name!r}" if name else kind
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (
            part.training or part.running_mean is None
        ):
            raise ValueError(
                f"{label} normalises with the statistics of the batch (it is in train "
                "mode, or tracks no running statistics), so the loss is not a sum over "
                "data points and depends on how the data is split. Call "
                "`model.eval()`; or pass `check_deterministic=False` to use each "
                "batch's statistics."
            )
        drops = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
        if part.training and isinstance(part, drops):
            probability = getattr(part, "p", getattr(part, "dropout", 0.0))
            if not probability:
                continue
            raise ValueError(
                f"{label} is in train mode and drops units at random (p = "
                f"{probability}). Call `model.eval()`; or pass "
                "`check_deterministic=False` to go on all the same."
            )


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = torch.maximum(a.abs().max(), b.abs().max())
    return bool((a - b).abs().max() <= tolerance * scale)
