"""Losses that are sums over the output's entries."""

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from curvlinops._memory import raise_if_out_of_memory
from curvlinops.losses._loss import Loss, root


class _Elementwise(Loss):
    r"""A sum over entries, with Hessian :math:`\mathrm{diag}(h)`."""

    def __init__(self, output: Tensor, target: Tensor) -> None:
        super().__init__(output, target)
        self.target = self._operand(target, "target")
        if target.shape != output.shape:
            raise ValueError(
                f"The target has shape {tuple(target.shape)}, but the model's output "
                f"{tuple(output.shape)}, and they are not broadcast: reshape one, e.g. "
                "target.reshape(output.shape) or output.squeeze(-1)."
            )
        self.count = output.numel()

    def _weight(self, weight: Tensor | None, name: str) -> Tensor | None:
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

    @abstractmethod
    def _second_derivative(self) -> Tensor:
        """Diagonal ``h`` of the Hessian, broadcastable to the output."""

    @cached_property
    def _diagonal(self) -> Tensor:
        return self._second_derivative().to(self.output.dtype)

    @cached_property
    def _root_diagonal(self) -> Tensor:
        return root(self._second_derivative()).to(self.output.dtype)

    def _hessian_mul(self, U: Tensor) -> Tensor:
        return self._diagonal * U

    def _factor_mul(self, U: Tensor) -> Tensor:
        return self._root_diagonal * U

    _factor_transpose_mul = _factor_mul


class MSE(_Elementwise):
    r"""Squared error :math:`S(f) = \sum_i w_i (f_i - y_i)^2`, Hessian :math:`2 w_i`.

    The likelihood is normal with variance :math:`1 / (2 w_i)`. The mean divides by the
    number of entries, or by :math:`\sum_i w_i` if there are weights.

    Parameters
    ----------
    output, target : Tensor
        Of one shape. A row is the last axis, or a single entry if there is only one.
    weight : Tensor, optional
        Broadcastable to that shape.

    Raises
    ------
    ValueError
        If the target's shape is not the output's, or weights do not broadcast to it.

    Examples
    --------
    >>> f, y, u = torch.tensor([[1.0, -2.0], [0.2, 1.0], [3.0, 4.0]])
    >>> from functools import partial
    >>> mse = partial(F.mse_loss, target=y, reduction="sum")
    >>> H = torch.autograd.functional.hessian(mse, f)
    >>> torch.allclose(MSE(f, y).hessian_mul(u), H @ u)
    True
    """

    def __init__(
        self, output: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(output, target)
        self.weight = self._weight(weight, "weight")
        if self.weight is not None:
            self.count = self.weight.sum()

    def _evaluate(self, output: Tensor) -> Tensor:
        output = output.to(self._dtype)
        if self.weight is None:
            return F.mse_loss(output, self.target, reduction="sum")
        return (self.weight * (output - self.target).square()).sum()

    def _second_derivative(self) -> Tensor:
        return 2 * (self.target.new_ones(()) if self.weight is None else self.weight)

    def _sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        shape = (num_samples, *self.output.shape)
        noise = self._draw(torch.randn, *shape, generator=generator)
        return root(self._second_derivative()) * noise


class BCEWithLogits(_Elementwise):
    r"""Binary cross-entropy of logits, with :math:`\sigma = 1 / (1 + e^{-f})`.

    .. math::
        S(f) = -\sum_i w_i \left[ \rho_i y_i \log \sigma_i
               + (1 - y_i) \log(1 - \sigma_i) \right] , \quad
        h_i = w_i \left( 1 + (\rho_i - 1) y_i \right) \sigma_i (1 - \sigma_i) .

    The likelihood is Bernoulli, its gradients scaled to the second moment :math:`h_i`.
    The mean divides by the number of entries, with and without weights.

    Parameters
    ----------
    output, target : Tensor
        Of one shape; targets are probabilities. A row is the last axis, or a single
        entry if there is only one.
    weight, pos_weight : Tensor, optional
        The weights :math:`w` and :math:`\rho`, broadcastable to that shape.

    Raises
    ------
    ValueError
        If the target's shape is not the output's, or weights do not broadcast to it.

    Examples
    --------
    >>> f, y, u = torch.tensor([[1.0, -2.0], [0.2, 1.0], [3.0, 4.0]])
    >>> rho = torch.tensor([5.0])
    >>> from functools import partial
    >>> bce = partial(F.binary_cross_entropy_with_logits, target=y, reduction="sum")
    >>> H = torch.autograd.functional.hessian(partial(bce, pos_weight=rho), f)
    >>> torch.allclose(BCEWithLogits(f, y, pos_weight=rho).hessian_mul(u), H @ u)
    True
    """

    def __init__(
        self,
        output: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(output, target)
        self.weight = self._weight(weight, "weight")
        self.pos_weight = self._weight(pos_weight, "pos_weight")

    def _evaluate(self, output: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            output.to(self._dtype),
            self.target,
            weight=self.weight,
            pos_weight=self.pos_weight,
            reduction="sum",
        )

    def _scale(self) -> Tensor:
        scale = self.target.new_ones(()) if self.weight is None else self.weight
        if self.pos_weight is None:
            return scale
        return scale * (1 + (self.pos_weight - 1) * self.target)

    def _second_derivative(self) -> Tensor:
        logits = self.output.detach().to(self._dtype)
        return self._scale() * logits.sigmoid() * (-logits).sigmoid()

    def _sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        sigma = self.output.detach().to(self._dtype).sigmoid()
        u = self._draw(torch.rand, num_samples, *sigma.shape, generator=generator)
        return root(self._scale()) * (sigma - (u < sigma).to(sigma))
