"""Losses of yes or no, entry by entry."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from curvlinops._hashed import Draws
from curvlinops.losses._elementwise import Elementwise, PiecewiseLinear
from curvlinops.losses._loss import root


class _Logistic(Elementwise):
    """Binary cross-entropy of logits, without saying what a mean divides by."""

    pos_weight: Tensor | None = None

    def _evaluate(self, output: Tensor) -> Tensor:
        function = F.binary_cross_entropy_with_logits
        return self._total(function, output, pos_weight=self.pos_weight)

    def _scale(self) -> Tensor:
        if self.pos_weight is None:
            return self.target.new_ones(())
        return 1 + (self.pos_weight - 1) * self.target

    def _second_derivative(self) -> Tensor:
        logits = self._prediction
        return self._scale() * logits.sigmoid() * (-logits).sigmoid()

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        sigma, scale = self._prediction.sigmoid(), self._scale()
        shape = (num_samples, *sigma.shape)
        u = draws.uniform(shape, self._dtype, self.output.device)
        scale = scale if self.weight is None else self.weight * scale
        return root(scale) * (sigma - (u < sigma).to(sigma))


class BCEWithLogits(_Logistic):
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
    >>> import torch
    >>> from functools import partial
    >>> f, y, u = torch.tensor([[1.0, -2.0], [0.2, 1.0], [3.0, 4.0]])
    >>> rho = torch.tensor([5.0])
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
        super().__init__(output, target, weight=weight)
        self.pos_weight = self._expanded(pos_weight, "pos_weight")


class MultiLabelSoftMargin(_Logistic):
    r"""Binary cross-entropy of logits, averaged over the labels of every row.

    .. math::
        S(f) = -\frac{1}{C} \sum_{t, c} w_{tc} \left[ y_{tc} \log \sigma_{tc}
               + (1 - y_{tc}) \log(1 - \sigma_{tc}) \right] , \quad
        h_{tc} = \frac{w_{tc}}{C} \sigma_{tc} (1 - \sigma_{tc}) .

    The likelihood is Bernoulli, its gradients scaled to the second moment :math:`h`.
    The mean divides by the number of rows.

    Parameters
    ----------
    output, target : Tensor
        Of one shape, ``[N, C]`` or with more axes before ``C``, the number of labels.
    weight : Tensor, optional
        The weights :math:`w`, broadcastable to that shape.

    Raises
    ------
    ValueError
        If there are less than two axes, the target's shape is not the output's, or
        weights do not broadcast to it.

    Examples
    --------
    >>> import torch
    >>> f, y, u = torch.tensor([[[1.0, -2.0]], [[0.0, 1.0]], [[3.0, 4.0]]])
    >>> half_of_bce = BCEWithLogits(f, y).hessian_mul(u) / 2
    >>> torch.allclose(MultiLabelSoftMargin(f, y).hessian_mul(u), half_of_bce)
    True
    """

    def __init__(
        self, output: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(output, target, weight=weight)
        if output.ndim < 2:
            raise ValueError(
                "Averages over labels need an output of shape [N, C], but the model's "
                f"has shape {tuple(output.shape)}, which does not tell data from "
                "labels: add the axis that is missing with unsqueeze."
            )
        w = self.target.new_ones(()) if self.weight is None else self.weight
        self.weight = w / output.shape[-1]
        self.count = self.num_rows


class BCE(Elementwise):
    r"""Binary cross-entropy of probabilities.

    .. math::
        S(f) = -\sum_i w_i \left[ y_i \log f_i + (1 - y_i) \log(1 - f_i) \right] , \quad
        h_i = w_i \, \frac{y_i (1 - f_i)^2 + (1 - y_i) f_i^2}
                          {\left( f_i (1 - f_i) \right)^2} .

    As for autograd, logarithms are at least -100, and :math:`10^{-12}` is added to both
    factors of the denominator: at :math:`f_i = y_i` of 0 or 1 derivatives are 0 there.
    The curvature depends on the targets, and so do sampled gradients: they are those of
    the Bernoulli likelihood only in expectation. The mean divides by the number of
    entries, with and without weights. Logits and :class:`BCEWithLogits` lose fewer
    digits.

    Parameters
    ----------
    output, target : Tensor
        Probabilities, of one shape. A row is the last axis, or a single entry if there
        is only one.
    weight : Tensor, optional
        Broadcastable to that shape.

    Raises
    ------
    ValueError
        If the output or the target has entries that are no probabilities, the target's
        shape is not the output's, or weights do not broadcast to it.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> f, y, u = torch.tensor([[0.1, 0.8], [0.2, 1.0], [3.0, 4.0]])
    >>> bce = partial(F.binary_cross_entropy, target=y, reduction="sum")
    >>> H = torch.autograd.functional.hessian(bce, f)
    >>> torch.allclose(BCE(f, y).hessian_mul(u), H @ u)
    True
    """

    def __init__(
        self, output: Tensor, target: Tensor, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(output, target, weight=weight)
        for what, values, cure in (
            (
                "model's output",
                output.detach(),
                "end the model with a sigmoid, or use nn.BCEWithLogitsLoss() for "
                "logits",
            ),
            ("target", self.target, "map labels to 0 and 1"),
        ):
            wrong = ~((values >= 0) & (values <= 1))
            if wrong.any():
                raise ValueError(
                    f"The {what} contains {values[wrong][0].item()}, which is no "
                    f"probability: {cure}."
                )

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.binary_cross_entropy, output)

    def _second_derivative(self) -> Tensor:
        f, y, eps = self._prediction, self.target, 1e-12
        squares = y * (1 - f).square() + (1 - y) * f.square()
        return squares / ((f + eps) * (1 - f + eps)).square()


class SoftMargin(Elementwise):
    r"""Logistic loss of scores, for targets -1 and 1.

    .. math::
        S(f) = \sum_i \log \left( 1 + e^{-y_i f_i} \right) \,, \quad
        h_i = y_i^2 \, \sigma(y_i f_i) \, \sigma(-y_i f_i) \,, \quad
        \sigma(z) = \frac{1}{1 + e^{-z}} .

    Computed such that no exponential overflows. For targets -1 and 1, :math:`h_i` is
    the Fisher information of the Bernoulli likelihood.

    Parameters
    ----------
    output, target : Tensor
        Of one shape. A row is the last axis, or a single entry if there is only one.

    Raises
    ------
    ValueError
        If the target's shape is not the output's.

    Examples
    --------
    >>> import torch
    >>> f, y, u = torch.tensor([[1.0, -2.0], [-1.0, 1.0], [3.0, 4.0]])
    >>> logistic = BCEWithLogits(f, (1 + y) / 2)
    >>> torch.allclose(SoftMargin(f, y).hessian_mul(u), logistic.hessian_mul(u))
    True
    """

    def __init__(self, output: Tensor, target: Tensor) -> None:
        super().__init__(output, target)

    def _evaluate(self, output: Tensor) -> Tensor:
        return -F.logsigmoid(self.target * output.to(self._dtype)).sum()

    def _second_derivative(self) -> Tensor:
        z = self.target * self._prediction
        return self.target.square() * z.sigmoid() * (-z).sigmoid()


class HingeEmbedding(PiecewiseLinear):
    r"""Distances of what is alike, and what distances of the unlike lack to a margin.

    .. math::
        S(f) = \sum_{y_i = 1} f_i + \sum_{y_i = -1} \max(0, m - f_i) \,, \quad h_i = 0 .

    It is piecewise linear: a GGN is zero, a Hessian has the model's curvature only. The
    mean divides by the number of entries.

    Parameters
    ----------
    output, target : Tensor
        Of one shape; targets are -1 or 1. A row is the last axis, or a single entry if
        there is only one.
    margin : float, optional
        The margin :math:`m`.

    Raises
    ------
    ValueError
        If the target's shape is not the output's.
    NotImplementedError
        For samples: gradients of second moment zero are zero.

    Examples
    --------
    >>> import torch
    >>> f, y = torch.tensor([[3.0, 0.5, 2.0], [1.0, -1.0, -1.0]])
    >>> HingeEmbedding(f, y).gradient()
    tensor([ 1., -1.,  0.])
    """

    def __init__(self, output: Tensor, target: Tensor, *, margin: float = 1.0) -> None:
        super().__init__(output, target)
        self.margin = margin

    @classmethod
    def smooth_alternative(cls, **options: Any) -> str:
        return "squares of the same terms, in a function of your own"

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.hinge_embedding_loss, output, margin=self.margin)
