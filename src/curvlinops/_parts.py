"""The data of a batch one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlinops._data import cut
from curvlinops._determinism import close
from curvlinops._linearization import Linearization
from curvlinops._spaces import rounding

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk


def one_by_one(risk: EmpiricalRisk, batch: Linearization) -> list[Linearization]:
    """Linearise a batch's data one by one, if model and loss treat them apart.

    Returns
    -------
    list of Linearization
        One per datum. Or the batch alone, where its input cannot be cut, or where
        outputs, Jacobian or loss Hessian of the parts are not those of the batch
        (the latter two are compared in a random direction).
    """
    f = batch.output
    size = risk._size_or_none(batch.X)
    if not size or size == 1 or f.ndim == 0 or len(f) % size:
        return [batch]
    try:
        parts = [_part(risk, batch, i, size) for i in range(size)]
        return parts if _composes(risk, batch, parts) else [batch]
    except Exception:  # whatever the user's model or loss raises on a part
        return [batch]


def _part(
    risk: EmpiricalRisk, batch: Linearization, i: int, size: int
) -> Linearization:
    X, y = cut(batch.X, size, i, i + 1), cut(batch.y, size, i, i + 1, several=True)
    make_loss = risk._loss_maker(X)
    return Linearization(risk.model, X, y, make_loss, batch.index)


def _composes(
    risk: EmpiricalRisk, batch: Linearization, parts: list[Linearization]
) -> bool:
    """Whether parts together have the derivatives of their batch."""
    f = batch.output.detach()
    generator = torch.Generator().manual_seed(batch.index)
    U = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
    us = U.split(len(U) // len(parts))
    gradient = risk.space.join(batch.vjp(U))
    total = torch.zeros_like(gradient)
    for part, u in zip(parts, us, strict=True):
        for row, g in zip(risk.space.split(total), part.vjp(u), strict=True):
            row.add_(g)
    outputs = torch.cat([part.output.detach() for part in parts])
    pairs = [(outputs, f), (total, gradient)]
    if risk.loss is not None:
        HU = [p.loss.hessian_mul(u) for p, u in zip(parts, us, strict=True)]
        pairs.append((torch.cat(HU), batch.loss.hessian_mul(U)))
    tolerance = rounding(f.dtype, f.device) ** 0.5
    return all(a.shape == b.shape and close(a, b, tolerance) for a, b in pairs)


def data_gradients(risk: EmpiricalRisk, batch: Linearization) -> Tensor:
    """Return the gradients of the loss of every datum alone, by the outputs.

    For losses that are not known in closed form, hence may couple data.

    Returns
    -------
    Tensor
        Of the output's shape.

    Raises
    ------
    ValueError
        If it is not known which outputs belong to which datum.
    """
    f, size = batch.output.detach(), risk.batch_size(batch.X)
    if f.ndim == 0 or len(f) % size:
        raise ValueError(
            f"Batch {batch.index} has {size} data points, but an output of shape "
            f"{tuple(f.shape)}, whose first axis is no multiple of that: return "
            "the outputs datum by datum, or pass `batch_size_fn`."
        )
    assert risk.loss is not None
    gradients = [
        risk.loss(
            cut(f, size, i, i + 1, several=True),
            cut(batch.y, size, i, i + 1, several=True),
            risk.terms_per_datum,
        ).gradient()
        for i in range(size)
    ]
    return torch.cat(gradients)
