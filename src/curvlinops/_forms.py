r"""What is multiplied: one linear map per batch, and how those of the batches combine.

An operator of a risk is its spaces and its forms, applied one after the other:

.. math:: v \mapsto \frac{1}{\sum_b D_b} \sum_b f_b(v)

for a form :math:`f` from parameters to parameters, such as the GGN's
:math:`f_b(v) = J_b^\top M_b J_b v`. What the batches give is stacked instead if it
belongs to their outputs, and what they are given is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from curvlinops._identity import Identity, key_of

Vectors = list[Tensor]
#: Maps a batch's `Linearization` and vectors to vectors.
Body = Callable[[Any, Vectors], Sequence[Tensor]]


class Side(Enum):
    """A space that vectors belong to: of parameters, or of all batches' outputs."""

    PARAMETERS = "parameters"
    OUTPUTS = "outputs"


@dataclass(frozen=True)
class Form:
    r"""One linear map per batch, and how those of the batches combine.

    Parameters
    ----------
    body : callable
        Maps a batch, a :class:`~curvlinops._linearization.Linearization`, and vectors
        to vectors: lists of tensors in parameter shapes, or with a single tensor in the
        batch's output shape. For several vectors at once they have one more, leading,
        dimension.
    cols : Side, optional
        Space of the vectors. Those of outputs are cut: every batch gets its own part.
    rows : Side, optional
        Space of the products. The batches' parts are stacked if it is that of outputs,
        else they are added.
    mean : bool, optional
        Whether to divide by :math:`\sum_b D_b`, what a mean loss divides by.
    linear : bool, optional
        Whether the body is a linear function of its vectors. Others are never recorded.

    Raises
    ------
    TypeError
        If both sides are outputs.

    Notes
    -----
    A form is recorded, and its matrix kept if it is small, under what its body does,
    see :func:`~curvlinops._identity.identity_of`: products are shared with bodies that
    do the same, and with no others. A body that captures what may change unseen (a
    tensor, a module) is not recorded: slow, not wrong.

    Examples
    --------
    >>> import torch
    >>> from scipy.sparse.linalg import LinearOperator
    >>> from curvlinops import EmpiricalRisk, GGNLinearOperator
    >>> from curvlinops.risk_operator import Form, RiskOperator
    >>> class JTJ(RiskOperator, LinearOperator):
    ...     forms = (Form(lambda b, v: b.vjp(b.jvp(v)), mean=False),)
    >>> net, data = torch.nn.Linear(3, 2), [(torch.rand(4, 3), torch.rand(4, 2))]
    >>> risk = EmpiricalRisk(net, torch.nn.MSELoss(reduction="sum"), "weight", data)
    >>> v = torch.ones(6)
    >>> bool(torch.allclose(2 * (JTJ(risk) @ v), GGNLinearOperator(risk) @ v))
    True
    """

    body: Body
    cols: Side = Side.PARAMETERS
    rows: Side = Side.PARAMETERS
    mean: bool = True
    linear: bool = True
    #: The matrix :math:`M` if the body is :math:`J^\top M J`.
    middle: Middle | None = field(init=False, repr=False, compare=False)
    #: Whether it maps parameters to parameters.
    is_square: bool = field(init=False, repr=False, compare=False)
    _name: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.cols is self.rows is Side.OUTPUTS:
            raise TypeError(
                "A form maps parameters to parameters, to outputs, or from outputs; "
                "compose two forms, from outputs to parameters and back."
            )
        middle = self.body.middle if isinstance(self.body, Congruence) else None
        object.__setattr__(self, "middle", middle)
        object.__setattr__(self, "is_square", self.cols is self.rows)
        kind = "map" if middle is None else "congruence"
        name = (kind, self.cols.value, self.rows.value, self.mean)
        object.__setattr__(self, "_name", name)

    @property
    def may_join(self) -> bool:
        """Whether batches may be multiplied as one, where that pays."""
        return self.is_square and self.middle is None

    def key(self, risk: Any) -> Identity | None:
        """Return the name under which products are recorded; ``None`` if not at all."""
        if not self.linear:
            return None
        made_of = self.body if self.middle is None else self.middle
        return key_of(made_of, risk, self._name)


class Middle:
    r"""A matrix :math:`M` between :math:`J^\top` and :math:`J`, of every batch."""

    def __call__(self, batch: Any, U: Tensor) -> Tensor:
        """Multiply a batch's output-space vectors ``[*leading, *output.shape]``."""
        raise NotImplementedError

    def columns(self, batch: Any) -> Tensor | None:
        r"""Return ``[rank, *output.shape]`` with :math:`M = \sum_r b_r b_r^\top`.

        For every datum by itself. ``None`` if no fewer than outputs per datum will do.
        """
        return None

    def rank(self, batch: Any) -> int:
        """Return the number of columns, or of outputs per datum."""
        columns, shape = self.columns(batch), batch.output_space.shapes[0]
        return shape[1:].numel() if columns is None else len(columns)


@dataclass(frozen=True)
class Congruence:
    r"""The product with :math:`J^\top M J` as a function of a batch and vectors."""

    middle: Middle

    def __call__(self, batch: Any, V: Vectors) -> Vectors:
        """Multiply."""
        product: Vectors = batch.congruence(self.middle, V)
        return product


def congruence(middle: Middle) -> Form:
    r"""Return the form :math:`\frac{1}{\sum_b D_b} \sum_b J_b^\top M_b J_b`."""
    return Form(Congruence(middle))
