r"""Jacobians of batches whose data are treated apart, half of the work done before.

Going back from the output :math:`f_i` of datum :math:`i`, a tensor inside the model
receives :math:`s_i = \sum_c u_{ic} t_{ic}` if no other datum contributes, with
*sensitivities* :math:`t_{ic}` that do not depend on the vector :math:`u`. Where they
are kept, the products of a layer with its weights are never computed again, only those
that give the parameters' gradients, :math:`J^\top u = Q(s(u))` with a linear :math:`Q`.
Its transpose is :math:`J v = s^\top(Q^\top v)`: two matrix products per linear map in
place of four.

Nothing is assumed about a model. A recorded product is evaluated with weights on the
data, and a tensor whose rows come out weighted counts as local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops._policy import Policy
from curvlinops._program import Call, Program, Slot, replaced
from curvlinops._spaces import rounding

aten = torch.ops.aten
Values = dict[Slot, Tensor]


class Folded(NamedTuple):
    r"""A matrix :math:`J B` of a batch, with its columns' sensitivities kept.

    Attributes
    ----------
    u : Tensor
        A dummy vector ``[n, rank]``, one entry per datum and column of :math:`B`.
    pulled : list of Tensor or None
        The graph of :math:`B^\top J^\top` applied to it, in parameter shapes.
    pull : callable
        The same without a graph, of any such vector.
    held : list of Tensor
        What it keeps.
    """

    u: Tensor
    pulled: list[Tensor | None]
    pull: Callable[[Tensor], list[Tensor]]
    held: list[Tensor]


def fold(
    program: Program, columns: Tensor, room: float, convolves: bool, policy: Policy
) -> Folded | None:
    r"""Fold a recorded :math:`u \mapsto J^\top u`, if that pays.

    Parameters
    ----------
    program : Program
        The recorded product.
    columns : Tensor
        The matrix :math:`B`, of shape ``[rank, *output.shape]``: for every datum, the
        vectors of output space that are used.
    room : float
        Bytes that the sensitivities may take.
    convolves : bool
        Whether there are convolutions.
    policy : Policy
        How many sensitivities there may be, and what reading one costs.

    Returns
    -------
    Folded or None
        ``None`` if the batch couples data in a way that matters, if reading
        sensitivities would cost more than it saves, or does not fit.

    Notes
    -----
    Costs two recorded products and one more per column.
    """
    calls = [part for call in program.calls for part in _single(_detached(call))]
    [source], outputs = program.inputs, program.outputs
    rank, n = columns.shape[:2]
    if rank > policy.max_rank or any(call.mutates for call in calls):
        return None
    above, below, cut = _cut(calls, source, outputs, columns, convolves)
    entries = rank * sum(s.shape.numel() for s in cut)
    saved = sum(map(_work, above))
    pays = saved > policy.entry_cost * entries
    if not pays or entries * columns.element_size() > room:
        return None
    kept = [columns.new_empty(n, rank, *slot.shape[1:]) for slot in cut]
    for i, column in enumerate(columns):
        rows = _evaluated(above, {source: column}, cut)
        for slot, sensitivities in zip(cut, kept, strict=True):
            sensitivities[:, i] = rows[slot]

    def pull(u: Tensor) -> list[Tensor]:
        values = {s: _combined(u, t) for s, t in zip(cut, kept, strict=True)}
        found = _evaluated(below, values, [s for s in outputs if isinstance(s, Slot)])
        return [found[o] if isinstance(o, Slot) else o.detach() for o in outputs]

    u = columns.new_zeros(n, rank).requires_grad_()
    with torch.enable_grad():
        pulled: list[Tensor | None] = [*pull(u)]
    return Folded(u, pulled, pull, kept)


def _combined(u: Tensor, sensitivities: Tensor) -> Tensor:
    """Return the sums of sensitivities ``[n, rank, *rest]`` over the columns."""
    n, rank, *rest = sensitivities.shape
    if rank == 1:
        return u.view(n, *[1] * len(rest)) * sensitivities[:, 0]
    return torch.bmm(u.unsqueeze(1), sensitivities.flatten(2)).view(n, *rest)


def _detached(call: Call) -> Call:
    """Return a call whose constants bring no autograd graph along."""
    args = replaced(call.args, Tensor, Tensor.detach)
    kwargs = {k: replaced(v, Tensor, Tensor.detach) for k, v in call.kwargs.items()}
    return Call(call.func, args, kwargs, call.outputs, call.is_sequence)


def _single(call: Call) -> list[Call]:
    """Return calls with one result each, of which only that is asked for."""
    wanted = [i for i, out in enumerate(call.outputs) if out is not None]
    if len(wanted) < 2:
        return [call]
    parts = []
    for i in wanted:
        outputs = [out if j == i else None for j, out in enumerate(call.outputs)]
        # By torch's convention, a mask of the wanted results comes last.
        mask, args = call.args[-1], call.args
        if isinstance(mask, (list, tuple)) and [*map(type, mask)] == [bool] * len(mask):
            args = (*args[:-1], [j == i for j in range(len(mask))])
        parts.append(Call(call.func, args, call.kwargs, outputs, call.is_sequence))
    return parts


def _cut(
    calls: list[Call],
    source: Slot,
    outputs: list[Any],
    columns: Tensor,
    convolves: bool,
) -> tuple[list[Call], list[Call], list[Slot]]:
    """Return the calls above and below a cut through local tensors, and these.

    Below is what makes something else of local tensors, and what makes a local tensor
    of those at the cut without a matrix product.
    """
    local = _local_slots(calls, source, columns, convolves)
    known, above = {source}, []
    for call in calls:
        made = {slot for slot in call.outputs if slot is not None}
        if made and made <= local and known.issuperset(call.slots):
            known |= made
            above.append(call)
    within = set(map(id, above))
    rest = [call for call in calls if id(call) not in within]
    wanted = {slot for call in rest for slot in call.slots}
    wanted |= {out for out in outputs if isinstance(out, Slot)}
    cut = [source] if source in wanted else []
    derived, remade = set(cut), set()
    for call in above:
        [out] = (slot for slot in call.outputs if slot is not None)
        if _work(call) == 0 and derived.issuperset(call.slots):
            derived.add(out)
            remade.add(id(call))
        elif out in wanted:
            derived.add(out)
            cut.append(out)
    below = [c for c in calls if id(c) not in within or id(c) in remade]
    return above, below, cut


def _local_slots(
    calls: list[Call], source: Slot, columns: Tensor, convolves: bool
) -> set[Slot]:
    """Return the tensors whose rows scale with the weights of the data."""
    n = columns.shape[1]
    generator = torch.Generator().manual_seed(20260101)
    weights = torch.rand(n, generator=generator, dtype=torch.float64).add(0.5)
    mixture = torch.randn(len(columns), generator=generator, dtype=torch.float64)
    weights = weights.to(columns)
    u = torch.tensordot(mixture.to(columns), columns, dims=1)
    candidates = [source, *(out for call in calls for out in call.outputs if out)]
    candidates = [slot for slot in candidates if slot.shape[:1] == (n,)]
    plain = _evaluated(calls, {source: u}, candidates)
    scaled = _evaluated(calls, {source: _by_row(weights, u)}, candidates)
    tolerance = rounding(columns.dtype, columns.device, convolves) ** 0.75
    return {
        slot
        for slot, rows in plain.items()
        if rows.is_floating_point()
        and _close(scaled[slot], _by_row(weights, rows), tolerance)
    }


def _by_row(weights: Tensor, tensor: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (tensor.ndim - 1)) * tensor


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.numel() == 0 or bool((a - b).abs().max() <= tolerance * b.abs().max())


def _evaluated(calls: Sequence[Call], values: Values, wanted: Sequence[Slot]) -> Values:
    """Run the calls that wanted values need, with some values given."""
    needed, useful = set(wanted), []
    for call in reversed(calls):
        if not needed.isdisjoint(call.outputs):
            needed.update(call.slots)
            useful.append(call)
    calls = useful[::-1]
    values, result = dict(values), {s: values[s] for s in wanted if s in values}
    last = {slot: i for i, call in enumerate(calls) for slot in call.slots}
    keep = set(wanted)

    for i, call in enumerate(calls):
        args = replaced(call.args, Slot, values.__getitem__)
        kwargs = {k: replaced(v, Slot, values.get) for k, v in call.kwargs.items()}
        made = call.func(*args, **kwargs)
        for slot, value in zip(
            call.outputs, made if call.is_sequence else [made], strict=True
        ):
            if slot is not None:
                values[slot] = value
                if slot in keep:
                    result[slot] = value
        for slot in call.slots:
            if last[slot] == i:
                values.pop(slot, None)
    return result


def _work(call: Call) -> int:
    """Return the floating-point operations of a matrix product or convolution."""
    shapes = [getattr(a, "shape", None) for a in call.args]
    out = call.outputs[0].shape.numel() if call.outputs and call.outputs[0] else 0
    if call.func in (aten.mm.default, aten.bmm.default) and shapes[0] is not None:
        return 2 * out * shapes[0][-1]
    if call.func is aten.convolution_backward.default:  # of (gradient, input, weight)
        gradient, _, weight = shapes[:3]
        if gradient is not None and weight is not None:
            return 2 * gradient.numel() * weight[1:].numel()
    return 0
