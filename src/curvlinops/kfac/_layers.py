"""From the uses of parameters in a batch to layers, and what is sent back to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, vmap

from curvlinops._backward import grad
from curvlinops._order import ranks
from curvlinops._parts import data_gradients
from curvlinops.kfac._recording import Use
from curvlinops.kfac._uses import KINDS, Layout, pixels
from curvlinops.losses import Loss
from curvlinops.risk import EmpiricalRisk

#: How many vectors are worth a vectorised backward pass.
LEAST_TOGETHER = 4


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
        """Return the rows ``[G, K, N, R, m]`` of gradients ``[K, *shape]``."""

        def rows(g: Tensor) -> Tensor:
            return KINDS[use.kind].outputs(use, g, N)

        return rows(g[0]).unsqueeze(1) if len(g) == 1 else vmap(rows, out_dims=1)(g)


#: Gradients ``[K, *shape]`` by a layer's results, by ``id`` of the use.
Gradients: TypeAlias = dict[int, Tensor]
Receiver: TypeAlias = Callable[[Layer, Gradients], None]


@dataclass
class Batch:
    """One batch's layers, and what is needed to send gradients to them."""

    risk: EmpiricalRisk
    linearization: Any
    layers: list[Layer]
    diagonal: list[str]
    #: The number of data that layers' rows are sorted by: all are taken for one where
    #: it is not known which rows are which datum's.
    size: int
    #: The datum of every row of the output; ``None`` if that is not known.
    owners: Tensor | None
    #: Whether these are its data, rather than groups of terms that do not meet.
    sure: bool

    @property
    def loss(self) -> Loss:
        """The batch's loss as a function of the output."""
        return self.linearization.loss

    @cached_property
    def uses(self) -> list[tuple[Layer, Use]]:
        """All uses, with their layers."""
        return [(layer, use) for layer in self.layers for use, _ in layer.uses]

    @cached_property
    def _last(self) -> set[int]:
        """The ``id`` of every use behind which, going backward, there is no other."""
        inner = _nodes_before(
            self.linearization.output, [use.edge.node for _, use in self.uses]
        )
        return {id(use) for _, use in self.uses if use.edge.node not in inner}

    def send(self, u: Tensor, keep: bool, receive: Receiver) -> None:
        """Pull an output-space vector back to the layers' results only.

        No gradient by a parameter is computed. ``receive(layer, gradients)`` is called
        during the backward pass, as soon as a layer's are known, so that few are alive
        at a time.
        """
        if not self.uses:
            return
        waiting: dict[str, Gradients] = {layer.name: {} for layer in self.layers}

        def arrive(layer: Layer, use: Use, gradient: Tensor | None) -> None:
            g = u.new_zeros(use.shape) if gradient is None else gradient
            mine = waiting[layer.name]
            mine[id(use)] = g.unsqueeze(0)
            if len(mine) == len(layer.uses):
                del waiting[layer.name]
                receive(layer, mine)

        def on_the_way(layer: Layer, use: Use, gradients: Any) -> None:
            arrive(layer, use, gradients[use.edge.output_nr])

        last = [pair for pair in self.uses if id(pair[1]) in self._last]
        handles: list[Any] = []
        try:
            for layer, use in self.uses:
                if id(use) not in self._last:
                    hook = partial(on_the_way, layer, use)
                    handles.append(use.edge.node.register_prehook(hook))
            # a scalar: with a vector, torch imports its symbolic shapes (36 MB)
            total = (self.linearization.output * u).sum()
            if not keep:
                self._forget_output()
            grads = grad(
                total,
                [use.edge for _, use in last],
                retain_graph=keep,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        for (layer, use), g in zip(last, grads, strict=True):
            arrive(layer, use, g)

    def send_together(self, U: Tensor) -> dict[int, Tensor]:
        """Pull vectors ``[K, *shape]`` back in one vectorised backward pass.

        The graph is kept. Returns gradients ``[K, *shape]`` by ``id`` of the use.

        Raises
        ------
        RuntimeError
            If an operation of the model is not vectorised.
        """
        if not self.uses:
            return {}
        grads: tuple[Tensor | None, ...] = grad(
            self.linearization.output,
            [use.edge for _, use in self.uses],
            U,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        return {
            id(use): U.new_zeros(len(U), *use.shape) if g is None else g
            for (_, use), g in zip(self.uses, grads, strict=True)
        }

    def _forget_output(self) -> None:
        for name in ("output", "loss"):  # computed when asked for
            vars(self.linearization).pop(name, None)

    def release(self) -> None:
        """Drop the autograd graph; nothing can be sent back any more."""
        self._forget_output()
        self.linearization = None
        self.__dict__.pop("_last", None)
        for _, use in self.uses:
            use.edge = None


def _nodes_before(output: Tensor, wanted: Iterable[Any]) -> set[Any]:
    """Return the nodes of an output's graph with another, wanted, node behind them."""
    wanted = set(wanted)
    before: dict[Any, bool] = {}
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack[-1]
        behind = [n for n, _ in node.next_functions if n is not None]
        if todo := [n for n in behind if n not in before]:
            stack += todo
            continue
        before[node] = any(n in wanted or before[n] for n in behind)
        stack.pop()
    return {node for node, is_before in before.items() if is_before}


def resolve(
    uses: list[Use],
    unknown: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
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
        layer = _layer(name, its, bias_name, shapes, bias == "joint")
        if layer is None or name in unknown or bias_name in unknown:
            for each in filter(None, (name, bias_name)):
                unknown.setdefault(each, its[0].kind)
        else:
            layers.append(layer)
    return layers, unknown


def _as_shift(use: Use, bias: str) -> Use:
    """Return the addition of a bias as a use of its own."""
    trailing = len(use.options.get("kernel", ()))
    place = use.place
    if isinstance(place, Tensor):
        place = place.repeat_interleave(pixels(use))
    size = torch.Size([use.shape[-1 - trailing], *[1] * trailing])
    one = use.input.new_ones(())
    options = {"size": size, "part": use.options.get("slot")}
    return replace(
        use,
        kind="elementwise",
        weight=bias,
        bias=None,
        input=one,
        options=options,
        place=place,
    )


def _layer(
    name: str,
    uses: list[Use],
    bias: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    joint: bool,
) -> Layer | None:
    """Return a weight's layer, or ``None`` if its uses do not fit together."""
    elementwise = uses[0].kind == "elementwise"
    if any((use.kind == "elementwise") != elementwise for use in uses):
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
    if prod(shapes[bias]) != G * m:  # it is broadcast
        return None
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
        Number and seed of the samples.
    """

    fisher_type: str
    mc_samples: int
    seed: int

    def vectors(self, batch: Batch, width: int = 1) -> Iterator[tuple[Tensor, bool]]:
        """Yield vectors ``[K, *shape]`` of a batch, and whether there are more.

        There are ``K = width`` of them, or one at a time if only few are left.
        """
        vectors = self._vectors(batch)
        current = list(islice(vectors, width))
        while current:
            following = list(islice(vectors, width))
            if len(current) >= LEAST_TOGETHER:
                yield torch.stack(current), bool(following)
            else:
                for i, u in enumerate(current, start=1):
                    yield u.unsqueeze(0), i < len(current) or bool(following)
            current = following

    def _vectors(self, batch: Batch) -> Iterator[Tensor]:
        if self.fisher_type == "forward-only":
            return
        loss = batch.loss
        if self.fisher_type == "mc":
            samples = loss.sample_gradients(self.mc_samples, self.seed)
            vectors: Iterable[Tensor] = samples / self.mc_samples**0.5
            if batch.owners is not None:
                yield from vectors
                return
        elif self.fisher_type == "empirical" and loss.opaque:
            _check_data_first(batch)
            yield data_gradients(batch.risk, batch.linearization)
            return
        elif self.fisher_type == "empirical":
            vectors = [loss.gradient()]
        else:
            vectors = _factor_columns(loss)
        for vector in vectors:
            for mask in _term_masks(batch):
                yield vector if mask is None else vector * mask


def _term_masks(batch: Batch) -> Iterator[Tensor | None]:
    """Yield masks that select the ``t``-th term of every datum.

    Where it is not known which rows are terms of the same datum, they select one row.
    """
    loss, owners = batch.loss, batch.owners
    if owners is None:
        term = torch.arange(loss.num_rows, device=loss.output.device)
    else:
        term = ranks(owners)
    T = int(term.max()) + 1 if len(term) else 1
    yield from (of_rows(loss, term == t) for t in range(T)) if T > 1 else (None,)


def _check_data_first(batch: Batch) -> None:
    """Raise unless rows of the output are known to be sorted datum by datum."""
    owners = batch.owners
    if owners is None or bool((owners.diff() < 0).any()):
        raise ValueError(
            "The rows of the model's output are not known to be sorted datum by datum, "
            "and of a loss that is not known in closed form the gradient of each datum "
            "is wanted. Return the outputs datum by datum, or register a `Loss`."
        )


def of_rows(loss: Loss, values: Tensor) -> Tensor:
    """Shape values of every row to be multiplied with a loss's output."""
    values = values.reshape(loss.row_shape)
    return values if loss.class_axis is None else values.unsqueeze(loss.class_axis)


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
