"""Losses of class scores: one row holds the scores of all classes."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from curvlinops._hashed import Draws
from curvlinops.losses._elementwise import PiecewiseLinear
from curvlinops.losses._loss import Loss, describe, is_tensor, root

#: What has curvature where log-probabilities have none.
LOGITS = (
    "the logits as the model's output (without log_softmax) with nn.CrossEntropyLoss()"
)


def fitting_axes(output: Tensor, target: Any) -> tuple[int, ...]:
    """Return those of a first and a last axis of classes that fit class indices."""
    if output.ndim < 3 or not is_tensor(target) or target.is_floating_point():
        return ()
    shapes = {a: output.shape[:a] + output.shape[a + 1 :] for a in (1, output.ndim - 1)}
    return tuple(axis for axis, shape in shapes.items() if target.shape == shape)


class _OfClasses(Loss):
    """A loss of class scores."""

    @classmethod
    def class_axes(cls, output: Tensor, target: Any) -> tuple[int, ...]:
        return fitting_axes(output, target)


class CrossEntropy(_OfClasses):
    r"""Cross-entropy of logits, with class indices or class probabilities as targets.

    With :math:`p_t = \mathrm{softmax}(f_t)`, class weights :math:`w`, smoothing
    :math:`\varepsilon`, one-hot :math:`y_t` for indices,

    .. math::
        S(f) = -\sum_{t, c} q_{tc} \log p_{tc} , \quad
        \nabla_{f_t}^2 S = s_t \left( \mathrm{diag}(p_t) - p_t p_t^\top \right) , \quad
        s_t = \sum_c q_{tc} .

    For probabilities :math:`q_{tc} = w_c ((1 - \varepsilon) y_{tc} + \varepsilon / C)`.
    For indices it is the same, and 0 in rows with an ignored target. With
    :math:`r = \sqrt{p_t}` the factor is
    :math:`R_t = \sqrt{s_t} \, \mathrm{diag}(r) (I - r r^\top)`. The likelihood is
    categorical, its gradients scaled by :math:`\sqrt{s_t}`. The mean divides by the sum
    of ``weight[target]`` over targets that are not ignored (indices), or by the number
    of rows (probabilities).

    Parameters
    ----------
    output : Tensor
        Logits ``[N, C]``, ``[N, C, d1, ...]``, or ``[C]``.
    target : Tensor
        Class indices (integers, the output's shape without its class axis), or class
        probabilities (floating point, the output's shape).
    weight : Tensor, optional
        Class weights of shape ``[C]``.
    ignore_index : int, optional
        The class index that marks rows without a term.
    label_smoothing : float, optional
        From 0 to 1.

    Raises
    ------
    ValueError
        If shape, dtype or values of an argument have no meaning.

    References
    ----------
    Martens, "New Insights and Perspectives on the Natural Gradient Method",
    arXiv:1412.1193, for the likelihoods; Szegedy et al., "Rethinking the Inception
    Architecture for Computer Vision", arXiv:1512.00567, for label smoothing.

    Examples
    --------
    >>> f, u, w = torch.tensor([[1.0, -2, 0], [2.0, 3, 5], [1.0, 2, 3]])
    >>> options = {"target": torch.tensor(2), "weight": w, "label_smoothing": 0.1}
    >>> from functools import partial
    >>> ce = partial(F.cross_entropy, reduction="sum", **options)
    >>> H = torch.autograd.functional.hessian(ce, f)
    >>> torch.allclose(CrossEntropy(f, **options).hessian_mul(u), H @ u, atol=1e-5)
    True
    """

    def __init__(
        self,
        output: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(output, target)
        if output.ndim == 0:
            raise ValueError(
                "Cross-entropy needs logits [N, C], [N, C, d1, ...] or [C], but the "
                "model's output is 0-d: return one logit per class."
            )
        C = output.shape[self.class_axis]
        self.weight = self._operand(output.new_ones(C), "weight")
        if weight is not None:
            self.weight = self._operand(weight, "weight")
            if weight.shape != (C,):
                raise ValueError(
                    f"The weight has shape {tuple(weight.shape)}, but there are {C} "
                    f"classes in the output of shape {tuple(output.shape)}: pass one "
                    "weight per class."
                )
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1].")

        self.target = self._operand(target, "target")
        self._soft = target.shape == output.shape and target.is_floating_point()
        if self._soft:
            if ignore_index >= 0:
                raise ValueError(
                    f"ignore_index={ignore_index} has no meaning for class "
                    "probabilities: leave it out."
                )
            self.count = self.num_rows
            return
        discrete = not target.is_floating_point() and target.dtype != torch.bool
        if target.shape != self.row_shape or not discrete:
            raise ValueError(
                f"The target is {describe(target)}. For logits of shape "
                f"{tuple(output.shape)}, with {C} classes on axis "
                f"{output.ndim + self.class_axis}, pass class indices (integers) of "
                f"shape {self.row_shape}, or class probabilities (floating point) of "
                "the logits' shape."
                + " If the classes are on the last axis, pass `as_model(model, "
                "class_axis=-1)`."
                * (discrete and output.ndim - 1 in fitting_axes(output, target))
            )
        self.target = target.detach().to(output.device, torch.int64)
        self._valid = self.target != ignore_index
        wrong = self._valid & ((self.target < 0) | (self.target >= C))
        if wrong.any():
            raise ValueError(
                f"The target contains {self.target[wrong][0].item()}, neither a class "
                f"in 0..{C - 1} nor ignore_index={ignore_index}: check the labels, or "
                "the number of the model's outputs."
            )
        labels = self.target.where(self._valid, 0)
        self._target_weight = self.weight[labels] * self._valid if C else self._valid
        self.count = self._target_weight.sum()

    @property
    def class_axis(self) -> int:
        """Axis 1 of batched logits, the only one of ``[C]``; as negative index."""
        return -max(self.output.ndim - 1, 1)

    @cached_property
    def _scale(self) -> Tensor:
        """The rows' scales ``s``, with a class axis of length 1."""
        eps = self.label_smoothing
        if self._soft:
            weight = self.weight.reshape(-1, *[1] * (-self.class_axis - 1))
            y = self.target
            return self._row_sum(weight * ((1 - eps) * y + eps / len(weight)))
        s = (1 - eps) * self._target_weight + eps * self.weight.mean() * self._valid
        return s.unsqueeze(self.class_axis)

    @cached_property
    def _softmax(self) -> Tensor:
        return self.output.detach().softmax(self.class_axis, dtype=self._dtype)

    @cached_property
    def _hessian(self) -> tuple[Tensor, Tensor]:
        dtype = self.output.dtype
        return self._softmax.to(dtype), self._scale.to(dtype)

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        dtype = self.output.dtype
        return self._softmax.sqrt().to(dtype), root(self._scale).to(dtype)

    def _evaluate(self, output: Tensor) -> Tensor:
        return F.cross_entropy(
            output.to(self._dtype),
            self.target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def _hessian_mul(self, U: Tensor) -> Tensor:
        p, s = self._hessian
        return s * p * (U - self._row_sum(p * U))

    def hessian_trace(self) -> Tensor:
        r"""Sum of :math:`s_t p_{tc} (1 - p_{tc})`.

        With :math:`1 - \sum_c p_{tc}^2` nothing is left where a class is certain.
        """
        p = self._softmax
        return (self._scale * self._row_sum(p * (1 - p))).sum()

    def _factor_mul(self, U: Tensor) -> Tensor:
        r, root_s = self._factor
        return root_s * r * (U - r * self._row_sum(r * U))

    def _factor_transpose_mul(self, U: Tensor) -> Tensor:
        r, root_s = self._factor
        V = root_s * r * U
        return V - r * self._row_sum(r * V)

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        p, axis = self._softmax, self.class_axis
        cdf = p.movedim(axis, -1).cumsum(-1).contiguous()
        shape = (num_samples, *self.row_shape)
        u = draws.uniform(shape, self._dtype, self.output.device)
        u = u.movedim(0, -1) * cdf[..., -1:]
        labels = torch.searchsorted(cdf, u.contiguous(), right=True)
        labels = labels.clamp(max=cdf.shape[-1] - 1)  # u may be rounded up to the total
        labels = labels.movedim(-1, 0).unsqueeze(axis)
        minus_one = -torch.ones_like(labels, dtype=p.dtype)
        residual = p.expand(num_samples, *p.shape).scatter_add(axis, labels, minus_one)
        return root(self._scale) * residual


class NegativeLogLikelihood(_OfClasses):
    r"""Negative log-likelihood of class indices.

    .. math::

        S(f) = -\sum_t w_{y_t} f_{t y_t}, \qquad
        \frac{\partial^2 S}{\partial f_t^2} = 0

    The output holds log-probabilities, and the loss is linear in them: a GGN is zero, a
    Hessian has the model's curvature only. For the Fisher matrix of a classifier take
    the logits as output and cross-entropy as loss.

    Parameters
    ----------
    output, target, weight, ignore_index
        As for :class:`CrossEntropy`, with class indices.

    Raises
    ------
    ValueError
        If the target does not fit, or holds class probabilities.
    NotImplementedError
        For samples: the likelihood's parameters are not in the output.

    Examples
    --------
    >>> f, y = torch.zeros(2, 3), torch.tensor([2, -100])
    >>> loss = NegativeLogLikelihood(f, y, weight=torch.tensor([1.0, 1.0, 5.0]))
    >>> loss.count, loss.gradient()[0]
    (tensor(5.), tensor([ 0.,  0., -5.]))
    """

    def __init__(
        self,
        output: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(output, target)
        labels = CrossEntropy(output, target, weight=weight, ignore_index=ignore_index)
        if labels.target.is_floating_point():
            raise ValueError(
                "The negative log-likelihood needs class indices (integers) as target, "
                f"got {describe(target)}. For class probabilities use cross-entropy."
            )
        self.target, self.weight, self.count = (
            labels.target,
            labels.weight,
            labels.count,
        )
        self.ignore_index, self._axis = ignore_index, labels.class_axis

    @property
    def class_axis(self) -> int:
        """Axis 1 of batched log-probabilities, the only one of ``[C]``."""
        return self._axis

    @classmethod
    def smooth_alternative(cls, **options: Any) -> str:
        return LOGITS

    def _evaluate(self, output: Tensor) -> Tensor:
        return F.nll_loss(
            output.to(self._dtype),
            self.target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction="sum",
        )

    def _hessian_mul(self, U: Tensor) -> Tensor:
        return torch.zeros_like(U)

    _factor_mul = _factor_transpose_mul = _hessian_mul

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        raise self._nothing_to_sample()


class KLDiv(PiecewiseLinear):
    r"""Kullback-Leibler divergence of predicted log-probabilities from the targets.

    .. math::
        S(f) = \sum_i y_i (\log y_i - f_i) \,, \quad h_i = 0 .

    The output holds log-probabilities, and the loss is linear in them: a GGN is zero, a
    Hessian has the model's curvature only. For the Fisher matrix of a classifier take
    the logits as output and cross-entropy with class probabilities as loss; the two
    differ by a constant.

    Parameters
    ----------
    output, target : Tensor
        Of one shape. A row is the last axis, or a single entry if there is only one.
    log_target : bool, optional
        Whether targets are given as :math:`\log y_i`.
    batchmean : bool, optional
        Whether the mean divides by the length of the output's first axis, not by the
        number of entries. Torch's reduction of that name sets it.

    Raises
    ------
    ValueError
        If the target's shape is not the output's.
    NotImplementedError
        For samples: the likelihood's parameters are not in the output.

    Examples
    --------
    >>> f, y = torch.tensor([[[-0.2, -1.7]], [[0.3, 0.7]]])
    >>> loss = KLDiv(f, y, batchmean=True)
    >>> loss.count, loss.gradient()
    (1, tensor([[-0.3000, -0.7000]]))
    """

    means: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"batchmean": {"batchmean": True}}
    )

    def __init__(
        self,
        output: Tensor,
        target: Tensor,
        *,
        log_target: bool = False,
        batchmean: bool = False,
    ) -> None:
        super().__init__(output, target)
        self.log_target = log_target
        if batchmean:
            self.count = output.shape[0] if output.ndim else 1

    @classmethod
    def smooth_alternative(cls, **options: Any) -> str:
        return LOGITS

    def _evaluate(self, output: Tensor) -> Tensor:
        return self._total(F.kl_div, output, log_target=self.log_target)
