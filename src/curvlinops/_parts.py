"""The data of a batch one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvlinops._agreement import agree, rows_agree
from curvlinops._data import cloned, cut, holds_objects, mapped, tensors_in
from curvlinops._determinism import close
from curvlinops._linearization import GraphFreedError, Linearization
from curvlinops._locks import load
from curvlinops._memory import raise_if_out_of_memory
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
    if holds_objects(batch.X):
        return [batch]
    try:
        parts = [_part(risk, batch, i, size) for i in range(size)]
        return parts if _composes(risk, batch, parts) else [batch]
    except GraphFreedError:
        raise
    except Exception as error:  # whatever the user's model or loss raises on a part
        raise_if_out_of_memory(error)
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
    eps = rounding(f.dtype, f.device, batch.convolves)
    pairs = [(torch.cat([part.output.detach() for part in parts]), f)]
    if risk.loss_function is not None:
        HU = [p.loss.hessian_mul(u) for p, u in zip(parts, us, strict=True)]
        pairs.append((torch.cat(HU), batch.loss.hessian_mul(U)))
    if not all(rows_agree(a, b, eps**0.5) for a, b in pairs):
        return False
    found = risk.space.split(f.new_zeros(risk.space.dim, dtype=risk.space.dtype))
    for part, u in zip(parts, us, strict=True):
        for row, g in zip(found, part.vjp(u), strict=True):
            row.add_(g)

    def pull_back(vectors: list[Tensor]) -> list[Tensor]:
        return batch.vjp(vectors[0])

    return agree(found, pull_back([U]), eps, 0.5, pull_back, [U])


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
        If it is not known which outputs belong to which datum, or the gradients of a
        loss that was taken for a sum, or a mean over data, do not make up the batch's.
    """
    f, size = batch.output.detach(), risk.batch_size(batch.X)
    if f.ndim == 0 or len(f) % size:
        raise ValueError(
            f"Batch {batch.index} has {size} data points, but an output of shape "
            f"{tuple(f.shape)}, whose first axis is no multiple of that: return "
            "the outputs datum by datum, or pass `batch_size_fn`."
        )
    assert risk.loss_function is not None
    gradients = [
        risk.loss_function(
            cut(f, size, i, i + 1, several=True),
            cut(batch.y, size, i, i + 1, several=True),
            risk.terms_per_datum,
        ).gradient()
        for i in range(size)
    ]
    G = torch.cat(gradients)
    if (reduction := risk.terms.reduction) is not None:
        tolerance = rounding(f.dtype, f.device, batch.convolves) ** 0.5
        if reduction.found and not close(G, batch.loss.gradient(), tolerance):
            wrong = (
                f"Of batch {batch.index}, the loss is not the {reduction.name} of its "
                "data's"
            )
            reduction = replace(reduction, found=False, wrong=wrong)
        if reduction.wrong:
            reduction.require("the empirical Fisher")
    return G


def jacobian_by_datum(
    risk: EmpiricalRisk, batch: Linearization, width: int
) -> Tensor | None:
    """Return a batch's Jacobian as a matrix, computed for all data apart.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk.
    batch : Linearization
        The batch.
    width : int
        Number of outputs of each datum that are differentiated at once.

    Returns
    -------
    Tensor or None
        Of shape ``[outputs, parameters]``, to be compared with the batch's own
        products: it is right only if no datum has a part in another's outputs.
        ``None`` if the model cannot be evaluated so.
    """
    f, size = batch.output_space, risk._size_or_none(batch.X)
    if not size or not f.shapes[0] or f.shapes[0][0] % size:
        return None
    if holds_objects(batch.X):
        return None
    inputs = cloned(batch.X)  # what leaves a batch alone may write into a datum
    leaves = [leaf.detach() for leaf in risk.model.leaves]
    basis = torch.eye(f.dim // size, dtype=f.dtype, device=f.device)
    chunk = width if width < len(basis) else None

    def has_axis(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == size

    def rows(*data: Tensor) -> Any:
        """Return one datum's rows, parameter by parameter."""
        one = iter(data)
        X = mapped(lambda t: next(one).unsqueeze(0) if has_axis(t) else t, inputs)
        pull_back = vjp(lambda *p: risk.model.at(X, p).reshape(-1), *leaves)[1]
        return vmap(pull_back, chunk_size=chunk)(basis)

    load("torch._dynamo")  # as `vjp` does
    try:
        with torch.no_grad(), risk.model.left_as_it_is():
            parts = vmap(rows)(*filter(has_axis, tensors_in(inputs)))
        return risk.space.join(parts, leading=2).reshape(f.dim, -1)
    except Exception as error:  # whatever a model or an operation raises there
        raise_if_out_of_memory(error)
        return None
