r"""What an operator's forms give with differences in place of derivatives.

A form is evaluated as it stands, on batches whose :math:`J v` is a central difference
of the model's outputs, whose :math:`J^\top u` is a plain gradient, and whose Hessians,
of the loss by the parameters and by the outputs, are differences of gradients of the
user's loss. So a matrix that nobody has written down otherwise can be checked, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops._forms import Form, Middle, Side, Vectors
from curvlinops._plain import Plain
from curvlinops._spaces import TensorSpace


class BatchByDifferences:
    """One batch as the bodies of forms see it.

    Parameters
    ----------
    plain : Plain
        Evaluates model and loss of this batch alone at shifted parameters.
    index : int
        Position of the batch in the data.
    scale : float
        Factor of the step widths.
    """

    def __init__(self, plain: Plain, index: int, scale: float) -> None:
        self.index, self._plain, self._scale = index, plain, scale
        [(self.X, self.y)], [f] = plain.batches(), plain.here
        self.output, self.output_space = f, TensorSpace([f.shape], f.dtype, f.device)

    @property
    def loss(self) -> Any:
        """The batch's loss, with the differences of its gradients as Hessian."""
        return _LossByDifferences(self._plain, self._scale)

    @property
    def count(self) -> Any:
        """Number of terms that a mean over this batch's loss divides by."""
        return self.loss.count

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``; nothing is kept."""
        return compute()

    def jvp(self, V: Vectors) -> Tensor:
        """Multiply by the Jacobian, by a difference of outputs."""
        space = self._plain.risk.space
        [Jv] = self._plain.push_forward(space.join(V), self._scale)
        product: Tensor = Jv
        return product

    def vjp(self, U: Tensor) -> Vectors:
        """Multiply by the Jacobian's transpose, by a plain gradient."""
        return self._split(self._plain.pull_back([U.view_as(self.output)]))

    def congruence(self, middle: Middle, V: Vectors) -> Vectors:
        r"""Multiply by :math:`J^\top M J`."""
        return self.vjp(middle(self, self.jvp(V)))

    def gradient(self) -> Vectors:
        """Return the gradient of the summed loss."""
        return self._split(_gradient(self._plain))

    def hvp(self, V: Vectors) -> Vectors:
        """Multiply by the Hessian of the summed loss, by a difference of gradients."""
        plain = self._plain
        v = plain.risk.space.join(V)
        h = plain.step(v, self._scale)
        ahead, behind = (_gradient(plain, shift) for shift in (h * v, -h * v))
        return self._split((ahead - behind) / (2 * h))

    def _split(self, vector: Tensor) -> Vectors:
        parts: Vectors = list(self._plain.risk.space.split(vector))
        return parts


class _LossByDifferences:
    """A loss whose Hessian is the difference of the gradients of the user's own."""

    def __init__(self, plain: Plain, scale: float) -> None:
        self._plain, self._scale = plain, scale
        [self._known] = plain.losses()

    def __getattr__(self, name: str) -> Any:
        """Return what else the loss has, as the package knows it."""
        return getattr(self._known, name)

    def hessian_mul(self, U: Tensor) -> Tensor:
        """Multiply by the Hessian of the summed loss by the outputs."""
        plain, [f] = self._plain, self._plain.here
        root = torch.finfo(plain.dtype).eps ** (1 / 3)
        sizes = float(f.double().norm()), float(U.double().norm())
        h = self._scale * root * (1 + sizes[0]) / max(sizes[1], 1e-30)
        [ahead], [behind] = (plain.loss_gradient([f + t * U]) for t in (h, -h))
        product: Tensor = (ahead - behind) / (2 * h * plain.share_of_a_term)
        return product


def _gradient(plain: Plain, shift: Tensor | None = None) -> Tensor:
    """Return the gradient of a batch's summed loss at shifted parameters."""
    outputs = plain.here if shift is None else plain.outputs(shift)
    mean: Tensor = plain.pull_back(plain.loss_gradient(outputs), shift)
    return mean / plain.share_of_a_term


def product_by_forms(
    forms: Sequence[Form], plain: Plain, scale: float, u: Tensor
) -> Tensor:
    """Multiply a vector by forms, one after the other, with differences.

    Parameters
    ----------
    forms : sequence of Form
        The forms, with linear bodies.
    plain : Plain
        Evaluates model and loss on all data.
    scale : float
        Factor of the step widths.
    u : Tensor
        Of the length of the first form's space.
    """
    space = plain.risk.space
    for form in forms:
        parts = plain.split(u) if form.cols is Side.OUTPUTS else None
        stacked: list[Tensor] = []
        total = u.new_zeros(space.dim)
        for index, one in enumerate(plain.by_batch()):
            batch = BatchByDifferences(one, index, scale)
            vectors = list(space.split(u)) if parts is None else [parts[index]]
            products = form.body(batch, vectors)
            if form.rows is Side.OUTPUTS:
                stacked += [f.reshape(-1) for f in products]
            else:
                total += space.join(products)
        u = torch.cat(stacked) if stacked else total
        u = u * plain.share_of_a_term if form.mean else u
    return u
