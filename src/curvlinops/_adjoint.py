r"""Whether two products are with a matrix and its transpose, parameter by parameter.

For all vectors :math:`v, w` it is :math:`w^\top (J v) = v^\top (J^\top w)`. An autograd
graph that lacks a part of :math:`J` breaks this, whatever the part is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum, hypot, inf, isfinite

import torch
from torch import Tensor

from curvlinops._agreement import random_like

Vectors = Sequence[Tensor]

#: Digits that a part of a product must have kept for anything to be said about it.
_LEAST_DIGITS = 1e-2
#: Outputs are alike if they differ in size by less than this.
_ALIKE = 1 / 16


def positive_like(tensor: Tensor, seed: int = 20260102) -> Tensor:
    r"""Return random numbers between 1/32 and 1/16, the same in every run.

    They serve as :math:`w`. None is zero, where a linear function :math:`u \mapsto
    J^\top u` has a derivative as everywhere else, but torch's formula may have none.
    """
    generator = torch.Generator(tensor.device).manual_seed(seed)
    numbers = torch.rand(
        tensor.shape, generator=generator, dtype=torch.float32, device=tensor.device
    )
    return ((1 + numbers) / 32).to(tensor.dtype)


def gap(Jv: Tensor, w: Tensor, V: Vectors, JTw: Vectors, eps: float) -> float:
    r"""Return how far :math:`w^\top (J v)` is from :math:`v^\top (J^\top w)`.

    Relative to their size; 0 if rounding explains it. Rounding errors are taken to be
    independent among the summed products. Infinity if anything is not finite.
    """
    return _gap(Jv, w, V, JTw, eps**0.75)[0]


def _gap(
    Jv: Tensor, w: Tensor, V: Vectors, JTw: Vectors, allowed: float
) -> tuple[float, float]:
    """Return the relative gap, 0 if it is allowed, and the size of both sides."""
    products = [Jv * w, *torch._foreach_mul([*V], [*JTw])]
    sums = torch.stack([p.sum(dtype=torch.float64) for p in products])
    norms = torch.stack(torch._foreach_norm(products)).double()
    (left, *rights), (one, *others) = torch.stack([sums, norms]).tolist()
    size = abs(left) + one + hypot(*others)
    difference = abs(left - fsum(rights))
    if not (isfinite(size) and isfinite(difference)):
        return inf, size
    return (difference / size if difference > allowed * size else 0.0), size


def lost(
    push: Callable[[list[Tensor]], Tensor],
    pull: Callable[[Tensor], Vectors],
    w: Tensor,
    JTw: Vectors,
    eps: float,
) -> float:
    r"""Return which share of a Jacobian a product with it lacks, 0 if none.

    Parameters
    ----------
    push : callable
        The product in question, :math:`v \mapsto J v`.
    pull : callable
        The product :math:`u \mapsto J^\top u`, which is believed.
    w : Tensor
        A vector without a pattern.
    JTw : sequence of Tensor
        Its product.
    eps : float
        Relative rounding error.

    Notes
    -----
    Every parameter gets a random vector of such a size that all have an equal part in
    the sum: none hides behind others. Where outputs differ in size, it is all done once
    more with a :math:`w` that makes up for it.

    Cost: one product, and a few more, also with the transpose, where parameters or
    outputs differ much in size.
    """
    Jv, share = _compared(push, pull, w, JTw, eps)
    sizes = Jv.double().square().mean(0).sqrt() if Jv.ndim else Jv.abs()
    top = float(sizes.max()) if sizes.numel() else 0.0
    if share or not 0 < top < inf or bool((sizes > _ALIKE * top).all()):
        return share
    least = sizes[sizes > eps * top].min()
    w = w * (top / sizes.clamp(min=least)).to(w.dtype)
    return _compared(push, pull, w, pull(w), eps)[1]


def _compared(
    push: Callable[[list[Tensor]], Tensor],
    pull: Callable[[Tensor], Vectors],
    w: Tensor,
    JTw: Vectors,
    eps: float,
) -> tuple[Tensor, float]:
    r"""Return a product, and which share of all parameters' parts it lacks.

    Parameters whose part of :math:`J^\top w` is far smaller than the largest are
    looked at apart, and left out if they consist of rounding errors, as
    :math:`J^\top (w + x) - J^\top w - J^\top x` shows.
    """
    sizes = _norms(JTw)
    top, draws = max(sizes, default=0.0), random_like(list(JTw))

    def drawn(chosen: list[bool]) -> list[Tensor]:
        return [
            r * min(top / size, eps**-2) if use and size else r * use
            for r, size, use in zip(draws, sizes, chosen, strict=True)
        ]

    large = [not 0 < size < eps**0.5 * top for size in sizes]
    V = drawn(large)
    Jv = push(V)
    found = gap(Jv, w, V, JTw, eps)
    if found == inf or (not found and all(large)):
        return Jv, found
    x = positive_like(w, seed=20260103)
    parts = zip(pull(w + x), JTw, pull(x), strict=True)
    errors = _norms([a - b - c for a, b, c in parts])
    most = _LEAST_DIGITS * eps**0.25
    chosen = [
        error <= most * size and (found > 0 or not was_large)
        for error, size, was_large in zip(errors, sizes, large, strict=True)
    ]
    if not any(chosen):
        return Jv, 0.0
    V = drawn(chosen)
    rest, size = _gap(push(V), w, V, JTw, eps**0.75)
    rounding = hypot(*(n * e for n, e in zip(_norms(V), errors, strict=True)))
    return Jv, rest if rest * size > eps**-0.25 * rounding else 0.0


def _norms(tensors: Vectors) -> list[float]:
    norms: list[float] = torch.stack(torch._foreach_norm([*tensors])).tolist()
    return norms
