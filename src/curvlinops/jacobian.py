"""The Jacobian of the model's outputs on all data, and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._forms import Form, Side
from curvlinops._linearization import Linearization
from curvlinops._model import Parameters
from curvlinops._spaces import TensorSpace
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk


def output_space(risk: EmpiricalRisk) -> TensorSpace:
    """Return the space of the model's outputs on all data, in the data's order.

    Its vectors are one tensor, the concatenated outputs, if those of all batches have
    the same shape behind the first axis; else one tensor per batch.
    """
    shapes: Iterable[torch.Size] = risk.output_shapes
    if len({shape[1:] for shape in shapes}) == 1 and all(shapes):
        first = sum(shape[0] for shape in shapes)
        shapes = [torch.Size([first, *risk.output_shapes[0][1:]])]
    return TensorSpace(shapes, risk.space.dtype, risk.space.device)


def push_forward(batch: Linearization, v: list[Tensor]) -> list[Tensor]:
    """Return the product of a batch's Jacobian."""
    return [batch.jvp(v)]


def pull_back(batch: Linearization, u: list[Tensor]) -> list[Tensor]:
    """Return the product of its transpose."""
    return batch.vjp(u[0])


#: Products with the Jacobian, and with its transpose.
PUSH_FORWARD = Form(push_forward, rows=Side.OUTPUTS, mean=False)
PULL_BACK = Form(pull_back, cols=Side.OUTPUTS, mean=False)


class _OfOutputs(RiskOperator):
    """Matrix of one form, which has outputs on one side."""

    def __init__(
        self,
        model_func: Callable[..., Any] | EmpiricalRisk,
        params: Parameters | None = None,
        data: Iterable[Any] | None = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        **options: Any,
    ) -> None:
        risk = as_risk(
            model_func,
            None,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            **options,
        )
        risk.require_fixed_order("A Jacobian")
        side = "in_space" if self.forms[0].cols is Side.OUTPUTS else "out_space"
        super().__init__(risk, **{side: output_space(risk)})


class JacobianLinearOperator(_OfOutputs, LinearOperator):
    r"""Jacobian of the model's outputs on all data by its parameters.

    .. math::

        J = \begin{pmatrix}
            \partial f_\theta(x_1) / \partial \theta \\ \vdots \\
            \partial f_\theta(x_N) / \partial \theta
        \end{pmatrix} \in \mathbb{R}^{M \times P}

    with :math:`M` the number of entries of all outputs: :math:`N C` for :math:`C`
    outputs per datum. Rows come datum by datum, in the order of the data; within a
    datum in the order of the flattened output.

    Parameters
    ----------
    model_func, params, data, progressbar, check_deterministic, num_data, \
batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first three. Targets in the data are not looked at. The data's batches must
        come in the same order in every pass.

    Raises
    ------
    ValueError
        If the batches are known to differ between passes, or their outputs change
        their number later.

    Notes
    -----
    Scale: of the outputs, per unit of the parameters; neither loss nor its reduction
    enters. The adjoint is :class:`TransposedJacobianLinearOperator`. Lists of tensors
    have the shape of the concatenated outputs (one per batch if they do not fit
    together).

    Cost: per batch, the first product builds two graphs (one forward and one backward
    pass) and runs one backward pass through the second; later products only do the
    latter, as long as the recordings fit into memory. One pass over the data, however
    many columns. Without ``check_deterministic``, one forward pass counts the outputs
    at construction.

    References
    ----------
    J. Townsend, "A new trick for calculating Jacobian vector products", 2017: a
    product with the Jacobian as two reverse-mode passes.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import JacobianLinearOperator
    >>> from curvlinops.examples.functorch import functorch_jacobian
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double()
    >>> data = [(torch.rand(n, 3).double(), None) for n in (4, 1)]
    >>> params = dict(net.named_parameters())
    >>> J = JacobianLinearOperator(net, params, data)
    >>> bool(torch.allclose(J.to_dense(), functorch_jacobian(net, params, data)))
    True
    """

    forms = (PUSH_FORWARD,)

    def _whole(self) -> Tensor | None:
        return self._whole_jacobian(self.shape[0])

    def _adjoint(self) -> TransposedJacobianLinearOperator:
        return TransposedJacobianLinearOperator(self.risk)


class TransposedJacobianLinearOperator(_OfOutputs, LinearOperator):
    r"""Transpose of the Jacobian of the model's outputs on all data.

    .. math:: J^\top \in \mathbb{R}^{P \times M}

    with columns in the order of the rows of :class:`JacobianLinearOperator`, its
    adjoint.

    Parameters
    ----------
    model_func, params, data, progressbar, check_deterministic, num_data, \
batch_size_fn, **options
        As for :class:`JacobianLinearOperator`.

    Raises
    ------
    ValueError
        As for :class:`JacobianLinearOperator`.

    Notes
    -----
    Cost: one forward pass per batch when it is recorded, and one backward pass per
    product; half of :math:`J`'s.

    Examples
    --------
    The product with a vector of ones is the gradient of the sum of all outputs:

    >>> import torch
    >>> from curvlinops import TransposedJacobianLinearOperator
    >>> net, X = torch.nn.Linear(3, 2), torch.rand(4, 3)
    >>> JT = TransposedJacobianLinearOperator(net, "weight", [(X, None)])
    >>> (gradient,) = torch.autograd.grad(net(X).sum(), [net.weight])
    >>> bool(torch.allclose(JT @ torch.ones(8), gradient.flatten()))
    True
    """

    forms = (PULL_BACK,)

    def _whole(self) -> Tensor | None:
        J = self._whole_jacobian(self.shape[1])
        return None if J is None else J.T

    def _adjoint(self) -> JacobianLinearOperator:
        return JacobianLinearOperator(self.risk)
