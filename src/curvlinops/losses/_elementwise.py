"""What losses that are sums over the output's entries have in common."""

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvlinops._hashed import Draws
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.losses._loss import Loss, root


class Elementwise(Loss):
    r"""A sum over entries, :math:`S(f) = \sum_i w_i \phi_i(f_i)`.

    Its Hessian is :math:`\mathrm{diag}(h)`, with :math:`h_i = w_i \phi_i''(f_i)`. A
    row is the output's last axis, or a single entry if there is only one. The mean
    divides by the number of entries.

    Unless a class brings the sampler of its likelihood, sampled gradients are
    :math:`\pm \sqrt{h_i}` with fair, independent signs: of all laws with mean zero and
    second moment :math:`h_i`, the one whose squares vary least.

    Parameters
    ----------
    output, target : Tensor
        Of one shape.
    weight : Tensor, optional
        The weights :math:`w`, broadcastable to that shape.

    Raises
    ------
    ValueError
        If the target's shape is not the output's, or weights do not broadcast to it.
    """

    def __init__(
        self, output: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(output, target)
        self.target = self._operand(target, "target")
        if target.shape != output.shape:
            raise ValueError(
                f"The target has shape {tuple(target.shape)}, but the model's output "
                f"{tuple(output.shape)}, and they are not broadcast: reshape one, e.g. "
                "target.reshape(output.shape) or output.squeeze(-1)."
            )
        self.weight = self._expanded(weight, "weight")
        self.count = output.numel()

    def _expanded(self, weight: Tensor | None, name: str) -> Tensor | None:
        if weight is None:
            return None
        try:
            return self._operand(weight, name).expand(self.output.shape)
        except RuntimeError as error:
            raise_if_out_of_memory(error)
            raise ValueError(
                f"The {name} of shape {tuple(weight.shape)} does not broadcast to the "
                f"output's shape {tuple(self.output.shape)}: reshape it."
            ) from None

    def _total(
        self, function: Callable[..., Tensor], output: Tensor, **options: Any
    ) -> Tensor:
        """Evaluate one of torch's functions ``(output, target)``, weighted, summed."""
        output = output.to(self._dtype)
        if self.weight is None:
            return function(output, self.target, reduction="sum", **options)
        values = function(output, self.target, reduction="none", **options)
        return (self.weight * values).sum()

    @property
    def _prediction(self) -> Tensor:
        """The output in the working precision, without its graph."""
        return self.output.detach().to(self._dtype)

    @abstractmethod
    def _second_derivative(self) -> Tensor:
        r"""Unweighted :math:`\phi_i''(f_i)`, broadcastable to the output."""

    def _curvature(self) -> Tensor:
        """Diagonal ``h`` of the Hessian, broadcastable to the output."""
        h = self._second_derivative()
        return h if self.weight is None else self.weight * h

    @cached_property
    def _diagonal(self) -> Tensor:
        return self._curvature().to(self.output.dtype)

    @cached_property
    def _root_diagonal(self) -> Tensor:
        return root(self._curvature()).to(self.output.dtype)

    def _hessian_mul(self, U: Tensor) -> Tensor:
        return self._diagonal * U

    def hessian_trace(self) -> Tensor:
        """Sum of the Hessian's diagonal."""
        return self._curvature().expand_as(self.output).sum()

    def _factor_mul(self, U: Tensor) -> Tensor:
        return self._root_diagonal * U

    _factor_transpose_mul = _factor_mul

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        shape = (num_samples, *self.output.shape)
        u = draws.uniform(shape, self._dtype, self.output.device)
        return root(self._curvature()) * torch.where(u < 0.5, -1.0, 1.0).to(u)


class PiecewiseLinear(Elementwise):
    r"""A sum over entries without second derivative, :math:`h_i = 0`.

    A Hessian has the model's curvature only, and a GGN is zero. No gradients are
    sampled: their second moment would be zero, too.
    """

    def _second_derivative(self) -> Tensor:
        return self.target.new_zeros(())

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        raise self._nothing_to_sample()
