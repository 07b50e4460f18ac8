"""Losses of real numbers and counts."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from curvlinops._hashed import Draws
from curvlinops.losses._elementwise import Elementwise, PiecewiseLinear
from curvlinops.losses._loss import root


class MSE(Elementwise):
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
    >>> import torch
    >>> from functools import partial
    >>> f, y, u = torch.tensor([[1.0, -2.0], [0.2, 1.0], [3.0, 4.0]])
    >>> mse = partial(F.mse_loss, target=y, reduction="sum")
    >>> H = torch.autograd.functional.hessian(mse, f)
    >>> torch.allclose(MSE(f, y).hessian_mul(u), H @ u)
    True
    """

    def __init__(
        self, output: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(output, target, weight=weight)
        if self.weight is not None:
            self.count = self.weight.sum()

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.mse_loss, output)

    def _second_derivative(self) -> Tensor:
        return self.target.new_full((), 2.0)

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        shape = (num_samples, *self.output.shape)
        noise = draws.normal(shape, self._dtype, self.output.device)
        return root(self._curvature()) * noise


class Huber(Elementwise):
    r"""Huber's loss: squares near the target, absolute values far from it.

    .. math::
        S(f) = \sum_i w_i \begin{cases}
            (f_i - y_i)^2 / 2 & |f_i - y_i| \leq \delta \\
            \delta \, (|f_i - y_i| - \delta / 2) & \text{else}
        \end{cases} \,, \qquad
        h_i = w_i \left[ |f_i - y_i| < \delta \right] .

    Where :math:`h_i` jumps, it is 0, as for autograd. The second moment of sampled
    gradients is :math:`h_i` at the targets of the data, not its mean over targets.
    The mean divides by the number of entries, with and without weights.

    Parameters
    ----------
    output, target : Tensor
        Of one shape. A row is the last axis, or a single entry if there is only one.
    delta : float, optional
        Width :math:`\delta > 0` of the quadratic part.
    weight : Tensor, optional
        Broadcastable to the output's shape.

    Raises
    ------
    ValueError
        If the target's shape is not the output's, weights do not broadcast to it, or
        ``delta`` is not positive.

    References
    ----------
    Huber, "Robust Estimation of a Location Parameter", doi:10.1214/aoms/1177703732.

    Examples
    --------
    >>> import torch
    >>> f, y, u = torch.tensor([[0.5, 3.0], [0.0, 0.0], [7.0, 8.0]])
    >>> Huber(f, y, delta=2.0).hessian_mul(u)
    tensor([7., 0.])
    """

    def __init__(
        self,
        output: Tensor,
        target: Tensor,
        *,
        delta: float = 1.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__(output, target, weight=weight)
        if not delta > 0:
            raise ValueError(
                f"delta={delta} must be positive: for absolute values use nn.L1Loss."
            )
        self.delta = delta

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.huber_loss, output, delta=self.delta)

    def _second_derivative(self) -> Tensor:
        return ((self._prediction - self.target).abs() < self.delta).to(self._dtype)


class SmoothL1(Elementwise):
    r"""Huber's loss divided by its width :math:`\beta`.

    .. math::
        S(f) = \sum_i \begin{cases}
            (f_i - y_i)^2 / (2 \beta) & |f_i - y_i| < \beta \\
            |f_i - y_i| - \beta / 2 & \text{else}
        \end{cases} \,, \qquad
        h_i = \left[ |f_i - y_i| < \beta \right] / \beta .

    Without width it is :class:`L1`. The second moment of sampled gradients is
    :math:`h_i` at the targets of the data, not its mean over targets.

    Parameters
    ----------
    output, target : Tensor
        Of one shape. A row is the last axis, or a single entry if there is only one.
    beta : float, optional
        Width :math:`\beta \geq 0` of the quadratic part.

    Raises
    ------
    ValueError
        If the target's shape is not the output's, or ``beta`` is negative.

    Examples
    --------
    >>> import torch
    >>> f, y, u = torch.tensor([[0.2, 3.0], [0.0, 0.0], [7.0, 8.0]])
    >>> SmoothL1(f, y, beta=0.5).hessian_mul(u)
    tensor([14.,  0.])
    """

    def __init__(self, output: Tensor, target: Tensor, *, beta: float = 1.0) -> None:
        super().__init__(output, target)
        if not beta >= 0:
            raise ValueError(f"beta={beta} must not be negative.")
        self.beta = beta

    @classmethod
    def smooth_alternative(cls, *, beta: float = 1.0, **options: Any) -> str | None:
        return None if beta else L1.smooth_alternative()

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.smooth_l1_loss, output, beta=self.beta)

    def _second_derivative(self) -> Tensor:
        if not self.beta:
            return self.target.new_zeros(())
        near = (self._prediction - self.target).abs() < self.beta
        return near.to(self._dtype) / self.beta

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        if not self.beta:
            raise self._nothing_to_sample(beta=0)
        return super()._sample_gradients(num_samples, draws)


class L1(PiecewiseLinear):
    r"""Absolute error :math:`S(f) = \sum_i w_i |f_i - y_i|`, with Hessian 0.

    It is piecewise linear: a GGN is zero, a Hessian has the model's curvature only. The
    mean divides by the number of entries, or by :math:`\sum_i w_i` if there are
    weights.

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
    NotImplementedError
        For samples: gradients of second moment zero are zero.

    Examples
    --------
    >>> import torch
    >>> f, y, u = torch.tensor([[0.5, 3.0], [1.0, 1.0], [7.0, 8.0]])
    >>> L1(f, y).gradient(), L1(f, y).hessian_mul(u)
    (tensor([-1.,  1.]), tensor([0., 0.]))
    """

    def __init__(
        self, output: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(output, target, weight=weight)
        if self.weight is not None:
            self.count = self.weight.sum()

    @classmethod
    def smooth_alternative(cls, **options: Any) -> str:
        return "nn.SmoothL1Loss or nn.HuberLoss (F.smooth_l1_loss or F.huber_loss)"

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.l1_loss, output)


class PoissonNLL(Elementwise):
    r"""Negative log-likelihood of counts, for the logarithm of their rate, or the rate.

    .. math::
        S(f) = \sum_i e^{f_i} - y_i f_i \,, \quad h_i = e^{f_i}
        \qquad \text{or} \qquad
        S(f) = \sum_i f_i - y_i \log(f_i + \varepsilon) \,, \quad
        h_i = \frac{y_i}{(f_i + \varepsilon)^2} .

    For the logarithm, the Hessian is the Fisher information. For the rate it is that
    only in expectation: it depends on the targets, and so do sampled gradients.

    Parameters
    ----------
    output, target : Tensor
        Of one shape. A row is the last axis, or a single entry if there is only one.
    log_input : bool, optional
        Whether the output is the logarithm of the rate.
    full : bool, optional
        Whether to add Stirling's approximation of :math:`\log y_i!`, a constant.
    eps : float, optional
        What keeps the logarithm of a rate finite.

    Raises
    ------
    ValueError
        If the target's shape is not the output's; for a factor, if targets are
        negative and the output is a rate.

    Examples
    --------
    >>> import torch
    >>> f, y, u = torch.tensor([[0.0, 1.0], [2.0, 1.0], [7.0, 8.0]])
    >>> torch.allclose(PoissonNLL(f, y).hessian_mul(u), f.exp() * u)
    True
    """

    def __init__(
        self,
        output: Tensor,
        target: Tensor,
        *,
        log_input: bool = True,
        full: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(output, target)
        self.log_input, self.full, self.eps = log_input, full, eps

    def _evaluate(self, output: Tensor) -> Tensor:
        options = {"log_input": self.log_input, "full": self.full, "eps": self.eps}
        return self._total(F.poisson_nll_loss, output, **options)

    def _second_derivative(self) -> Tensor:
        if self.log_input:
            return self._prediction.exp()
        return self.target / (self._prediction + self.eps).square()
