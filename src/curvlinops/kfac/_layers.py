"""From the uses of parameters in a batch to layers, and what is sent back to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlinops._linearization import Linearization
from curvlinops._parts import data_gradients
from curvlinops.kfac._handlers import HANDLERS
from curvlinops.kfac._recording import Recorder, Use
from curvlinops.kfac._uses import KINDS, Layout, applies_elementwise
from curvlinops.losses import Loss
from curvlinops.risk import EmpiricalRisk


@dataclass
class Layer:
    """A weight (and its bias) with all its uses in one batch.

    Attributes
    ----------
    layout : Layout
        How its parameters are matrices; includes the bias if it is treated jointly.
    uses : list of (Use, bool)
        Its uses, and whether inputs and outputs exchange their roles there (a tied
        weight that is an embedding in one place and a matrix in another).
    bias : Layout or None
        Layout of a bias that is a block of its own.
    elementwise : bool
        Whether the parameter scales or shifts.
    """

    layout: Layout
    uses: list[tuple[Use, bool]]
    bias: Layout | None = None
    elementwise: bool = False

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.layout.names[0]

    @property
    def joint(self) -> bool:
        """Whether the last column is a bias."""
        return len(self.layout.names) == 2

    def inputs(self, use: Use, N: int) -> Tensor:
        """Return the rows ``[G, N, R, n]``, with ones for a joint bias."""
        a = KINDS[use.kind].inputs(use, N)
        return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1) if self.joint else a

    def outputs(self, use: Use, g: Tensor, N: int) -> Tensor:
        """Return the rows ``[G, N, R, m]``."""
        return KINDS[use.kind].outputs(use, g, N)


@dataclass
class Batch:
    """One batch's layers, and what is needed to send gradients to them."""

    risk: EmpiricalRisk
    linearization: Linearization
    layers: list[Layer]
    diagonal: list[str]
    size: int

    @property
    def loss(self) -> Loss:
        """The batch's loss as a function of the output."""
        return self.linearization.loss

    def back(self, U: Tensor, keep: bool) -> dict[int, Tensor]:
        """Pull an output-space vector back to the layers' results only.

        No gradient by a parameter is computed. Returns tensors by ``id`` of the use.
        """
        uses = [use for layer in self.layers for use, _ in layer.uses]
        if not uses:
            return {}
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            self.linearization.output,
            [use.edge for use in uses],
            U,
            retain_graph=keep,
            allow_unused=True,
        )
        return {
            id(use): U.new_zeros(use.shape) if g is None else g
            for use, g in zip(uses, grads, strict=True)
        }


def batches(
    risk: EmpiricalRisk, bias: str, unsupported: str, title: str
) -> Iterator[Batch]:
    """Yield every batch with its layers (within ``risk.session``)."""
    recorder = Recorder(risk.model.aliases, HANDLERS)
    source = risk._fresh_batches(title)
    while True:
        recorder.clear()
        with recorder:
            batch = next(source, None)
        if batch is None:
            return
        recorder.check_complete(batch.output)
        size = risk._size_or_none(batch.X) or len(batch.output)
        shapes = {name: tuple(p.shape) for name, p in risk.model.aliases.items()}
        layers, unknown = resolve(recorder.uses, recorder.unknown, shapes, size, bias)
        if unknown and unsupported != "diagonal":
            listing = "; ".join(f"{n!r} in `{use}`" for n, use in unknown.items())
            raise ValueError(
                f"No Kronecker-factored form is known for the use of {listing}. Leave "
                "these parameters out of `params`, or approximate their blocks by the "
                "diagonal of the matrix with `unsupported='diagonal'`."
            )
        yield Batch(risk, batch, layers, list(unknown), size)


def resolve(
    uses: list[Use],
    unknown: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    N: int,
    bias: str,
) -> tuple[list[Layer], dict[str, str]]:
    """Sort uses into layers; return also which parameters are not understood.

    A bias that belongs to one weight is treated as ``bias`` says: ``"joint"`` with it,
    ``"separate"`` as a block with the weight's output factor, ``"alone"`` like a shift.
    """
    unknown = dict(unknown)
    by_weight: dict[str, list[Use]] = defaultdict(list)
    partners: dict[str, set[str]] = defaultdict(set)
    for use in uses:
        by_weight[use.weight].append(use)
        if use.bias is not None:
            partners[use.bias].add(use.weight)
    paired = {}
    for added, weights in partners.items():
        (weight, *others) = weights
        one = not others and added not in by_weight and bias != "alone"
        if one and all(use.bias == added for use in by_weight[weight]):
            paired[weight] = added
            continue
        by_weight[added] += [_as_shift(u, added) for u in uses if u.bias == added]
    layers = []
    for name, its in by_weight.items():
        bias_name = paired.get(name)
        layer = _layer(name, its, bias_name, shapes, N, bias == "joint")
        if layer is None or name in unknown or bias_name in unknown:
            for each in filter(None, (name, bias_name)):
                unknown.setdefault(each, its[0].kind)
        else:
            layers.append(layer)
    return layers, unknown


def _as_shift(use: Use, bias: str) -> Use:
    """Return the addition of a bias as a use of its own."""
    trailing = len(use.options.get("kernel", ()))
    size = torch.Size([use.shape[-1 - trailing], *[1] * trailing])
    one = use.input.new_ones(())
    options = {"size": size, "part": use.options.get("slot")}
    return replace(
        use, kind="elementwise", weight=bias, bias=None, input=one, options=options
    )


def _layer(
    name: str,
    uses: list[Use],
    bias: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    N: int,
    joint: bool,
) -> Layer | None:
    """Return a weight's layer, or ``None`` if its uses do not fit together."""
    elementwise = uses[0].kind == "elementwise"
    if any((use.kind == "elementwise") != elementwise for use in uses):
        return None
    if elementwise and not all(applies_elementwise(use, N) for use in uses):
        return None
    shape = shapes[name]
    view, order, (G, m, n) = KINDS[uses[0].kind].layout(shape, uses[0])
    placed = []
    for use in uses:
        _, its_order, size = KINDS[use.kind].layout(shape, use)
        if size == (G, m, n) and its_order == order:
            placed.append((use, False))
        elif size == (G, n, m) == (1, n, m) and bias is None:
            placed.append((use, True))
        else:
            return None
    layout = Layout((name,), (shape,), view, order, (G, m, n))
    if bias is None:
        return Layer(layout, placed, elementwise=elementwise)
    column = Layout((bias,), (shapes[bias],), (G, m, 1), (0, 1, 2), (G, m, 1))
    if not joint:
        return Layer(layout, placed, bias=column)
    both = Layout((name, bias), (shape, shapes[bias]), view, order, (G, m, n + 1))
    return Layer(both, placed)


# -- what is sent back -----------------------------------------------------------------


@dataclass(frozen=True)
class Fisher:
    r"""Vectors :math:`u` with :math:`\sum u u^\top` the matrix between the Jacobians.

    Parameters
    ----------
    fisher_type : str
        ``"type-2"``: columns of a factor of the loss's Hessian, one pass per class and
        per term of a datum; ``"mc"``: sampled gradients, one pass per sample;
        ``"empirical"``: gradients, one pass per term of a datum.
    mc_samples, seed : int
        Number and seed of the samples; batch ``i`` uses ``seed + i``.
    """

    fisher_type: str
    mc_samples: int
    seed: int

    def vectors(self, batch: Batch) -> Iterator[tuple[Tensor, bool]]:
        """Yield the vectors of a batch, and whether there are more."""
        vectors = self._vectors(batch)
        current = next(vectors, None)
        while current is not None:
            following = next(vectors, None)
            yield current, following is not None
            current = following

    def _vectors(self, batch: Batch) -> Iterator[Tensor]:
        loss = batch.loss
        if self.fisher_type == "mc":
            seed = self.seed + batch.linearization.index
            generator = torch.Generator().manual_seed(seed)
            samples = loss.sample_gradients(self.mc_samples, generator)
            yield from samples / self.mc_samples**0.5
            return
        if self.fisher_type == "empirical" and loss.opaque:
            yield data_gradients(batch.risk, batch.linearization)
            return
        masks = _term_masks(loss, batch.size)
        if self.fisher_type == "empirical":
            gradient = loss.gradient()
            yield from (gradient if mask is None else gradient * mask for mask in masks)
            return
        for column in _factor_columns(loss):
            for mask in masks:
                yield column if mask is None else column * mask


def _term_masks(loss: Loss, N: int) -> list[Tensor | None]:
    """Return masks that select the ``t``-th term of every datum."""
    T = loss.num_rows // N if loss.num_rows % N == 0 else loss.num_rows
    if T <= 1:
        return [None]
    index = torch.arange(loss.num_rows, device=loss.output.device) % T
    index = index.reshape(loss.row_shape)
    if loss.class_axis is not None:
        index = index.unsqueeze(loss.class_axis)
    return [index == t for t in range(T)]


def _factor_columns(loss: Loss) -> Iterator[Tensor]:
    r"""Yield the columns of every row's factor ``R`` with ``R R^T`` its Hessian."""
    f, axis = loss.output.detach(), loss.class_axis
    if axis is None:
        units = [torch.ones_like(f)]
    else:
        eye = torch.eye(f.shape[axis], dtype=f.dtype, device=f.device)
        tail = [1] * (-axis - 1)
        units = [e.reshape(-1, *tail).expand_as(f) for e in eye]
    if not loss.opaque:
        yield from (loss.factor_mul(unit) for unit in units)
        return
    columns = torch.stack([loss.hessian_mul(unit) for unit in units])
    # [C, *row_shape, C]
    H = columns.unsqueeze(-1) if axis is None else columns.movedim(axis, -1)
    H = H.movedim(0, -1)
    _check_rows(loss, H)
    evals, Q = torch.linalg.eigh((H + H.mT) / 2)
    if bool((evals < -1e-3 * evals.abs().amax().clamp(min=1e-30)).any()):
        raise ValueError(
            "The loss is not convex in the model's output, so its Hessian has no "
            "factor. Use `fisher_type='empirical'`, or a loss that is convex."
        )
    factor = Q * evals.clamp(min=0).sqrt().unsqueeze(-2)
    for column in factor.unbind(-1):
        yield column[..., 0] if axis is None else column.movedim(-1, axis)


def _check_rows(loss: Loss, H: Tensor) -> None:
    """Raise unless a loss's Hessian acts within rows, as given by their blocks."""
    f, axis = loss.output, loss.class_axis
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
    rows = u.unsqueeze(-1) if axis is None else u.movedim(axis, -1)
    product = (H @ rows.unsqueeze(-1))[..., 0]
    product = product[..., 0] if axis is None else product.movedim(-1, axis)
    difference = (product - loss.hessian_mul(u)).abs().max()
    if difference > torch.finfo(f.dtype).eps ** 0.5 * product.abs().max():
        raise ValueError(
            "The loss couples entries of the model's output that are not in one row "
            "(its last axis), so its Hessian has no factor here. Use "
            "`fisher_type='empirical'`, or register a `Loss` with a factor."
        )
