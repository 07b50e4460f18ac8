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
from curvlinops._model import Model
from curvlinops._spaces import TensorSpace, rounding

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


class RefusedError(Exception):
    """Rows of single data cannot be computed, or are not those of a batch."""


class RowsByDatum:
    r"""The products :math:`J_n^\top U_n` of every datum, computed alone.

    Parameters
    ----------
    model : Model
        The model.
    X : Any
        Inputs.
    size : int
        Their number of data.
    U : Tensor
        The vectors, of shape ``[size, vectors, outputs]``.
    space : TensorSpace
        Space of the parameters.
    width : int, optional
        Number of vectors of each datum that go back at once.

    Notes
    -----
    They are to be compared with products of whole batches: they are right only if no
    datum has a part in another's outputs.
    """

    def __init__(
        self,
        model: Model,
        X: Any,
        size: int,
        U: Tensor,
        space: TensorSpace,
        width: int | None = None,
    ) -> None:
        if holds_objects(X):
            raise RefusedError
        self._model, self._size, self._U, self._space = model, size, U, space
        self._X = cloned(X)  # what leaves a batch alone may write into a datum
        self._leaves = [leaf.detach() for leaf in model.leaves]
        self._width = width if width and width < U.shape[1] else None

    def __call__(self, part: slice) -> Tensor:
        """Return those of some data, ``[data, vectors, parameters]``.

        Raises
        ------
        RefusedError
            If the model cannot be evaluated so.
        """
        load("torch._dynamo")  # as `vjp` does
        try:
            data = [t[part] for t in filter(self._has_axis, tensors_in(self._X))]
            with torch.no_grad(), self._model.left_as_it_is():
                rows = vmap(self._rows)(self._U[part], *data)
            return self._space.join(rows, leading=2)
        except Exception as error:  # whatever a model or an operation raises there
            raise_if_out_of_memory(error)
            raise RefusedError from error

    def _has_axis(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == self._size

    def _rows(self, U: Tensor, *data: Tensor) -> Any:
        """Return one datum's rows, parameter by parameter."""
        one = iter(data)

        def datum(tensor: Tensor) -> Tensor:
            return next(one).unsqueeze(0) if self._has_axis(tensor) else tensor

        X = mapped(datum, self._X)
        model, leaves = self._model, self._leaves
        pull_back = vjp(lambda *p: model.at(X, p).reshape(-1), *leaves)[1]
        return vmap(pull_back, chunk_size=self._width)(U)


def units(batch: Linearization, size: int) -> Tensor:
    """Return all unit vectors for each of so many data."""
    f = batch.output_space
    identity = torch.eye(f.dim // size, dtype=f.dtype, device=f.device)
    return identity.expand(size, -1, -1)


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
        Of shape ``[outputs, parameters]``, see :class:`RowsByDatum`. ``None`` if the
        model cannot be evaluated so.
    """
    f, size = batch.output_space, risk._size_or_none(batch.X)
    if not size or not f.shapes[0] or f.shapes[0][0] % size:
        return None
    try:
        U, space = units(batch, size), risk.space
        rows = RowsByDatum(risk.model, batch.X, size, U, space, width)
        return rows(slice(None)).reshape(f.dim, -1)
    except RefusedError:
        return None
