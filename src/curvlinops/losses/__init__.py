r"""Everything the package knows about loss functions, one class per loss.

A :class:`Loss` is one batch's loss as a function of the model's output ``f``, the
**sum** :math:`S(f) = \sum_t \ell(f_t, y_t)` over its terms, whatever the reduction of
the user's loss. A term is one row of the output: the entries along the class axis at
one position. What a ``mean`` divides by is kept aside as ``count``, so the loss of the
concatenated batches is :math:`\sum_b S_b / \sum_b D_b`.

:func:`as_loss_function` turns what users hold into a :class:`LossFunction`, which
builds the :class:`Loss` of every batch.

Adding a loss takes one call of :func:`register` and a subclass of :class:`Loss`: its
constructor takes options as keyword-only arguments and sets ``count``, and its hooks
``_evaluate``, ``_hessian_mul``, ``_factor_mul``, ``_factor_transpose_mul`` and
``_sample_gradients`` compute what the public methods promise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from inspect import signature
from math import prod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Number: TypeAlias = Tensor | int | float
#: On a CPU, up to so many classes of at least so many numbers are added as slices: a
#: short axis is summed up to six times more slowly.
FEW_CLASSES, MANY_NUMBERS = 8, 1 << 16


class Loss(ABC):
    r"""One batch's loss, summed over its terms, as a function of the model's output.

    All tensors have the output's shape, dtype and device; ``U`` may have leading axes,
    ``[*leading, *output.shape]``, and is never written to. What does not depend on
    ``U`` is computed at first use and kept.

    Parameters
    ----------
    output : Tensor
        The model's output; only :meth:`value` uses its autograd graph, if any. Half
        precision is computed in float32 inside; the loss is then float32.
    target : Any
        The batch's targets.

    Attributes
    ----------
    count : Tensor or int or float
        What a ``mean`` over this batch divides the sum by; may be 0.
    opaque : bool
        Whether the number of terms and the likelihood must come from the user.
    """

    opaque: ClassVar[bool] = False
    count: Number
    #: Of a part of a batch: its first datum, the one after its last, and their number.
    share: tuple[int, int, int] | None = None

    def __init__(self, output: Tensor, target: Any) -> None:
        if not _is_tensor(output) or not output.is_floating_point():
            raise TypeError(
                f"The model's output is {_describe(output)}, but a loss needs a real "
                "floating-point tensor: let the model return one."
            )
        self.output = output
        self.target = target
        # work in the output's precision, but at least in float32
        self._dtype = torch.promote_types(output.dtype, torch.float32)

    @property
    def class_axis(self) -> int | None:
        """Negative index of the output's class axis; None if each entry is a row."""
        return -1 if self.output.ndim > 1 else None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The output's shape without its class axis."""
        shape = list(self.output.shape)
        if self.class_axis is not None:
            del shape[self.class_axis]
        return tuple(shape)

    @property
    def num_rows(self) -> int:
        """Number of terms, ignored ones included."""
        return prod(self.row_shape)

    def value(self) -> Tensor:
        """Sum-reduced loss, a 0-d tensor, differentiable through the output."""
        return self._evaluate(self.output)

    def gradient(self) -> Tensor:
        r"""Gradient :math:`\nabla_f S`, detached."""
        return self._differentiate(create_graph=False)[1]

    def hessian_mul(self, U: Tensor) -> Tensor:
        r"""Multiply every vector by the Hessian, :math:`\nabla_f^2 S \, u`."""
        return self._hessian_mul(self._checked(U))

    def factor_mul(self, U: Tensor) -> Tensor:
        r"""Multiply by a factor :math:`R` with :math:`R R^\top = \nabla_f^2 S`.

        The factor is square and acts within rows.

        Raises
        ------
        ValueError
            If weights are negative: there is no real factor then.
        """
        return self._factor_mul(self._checked(U))

    def factor_transpose_mul(self, U: Tensor) -> Tensor:
        r"""Multiply by :math:`R^\top`, see :meth:`factor_mul`."""
        return self._factor_transpose_mul(self._checked(U))

    def hessian_pair(self, U: Tensor) -> tuple[Tensor, Tensor]:
        r"""Multiply by two matrices with :math:`A B^\top = \nabla_f^2 S`.

        Both are the factor where there is one, else the identity and the Hessian.
        """
        try:
            FU = self.factor_mul(U)
        except (NotImplementedError, ValueError):
            return U, self.hessian_mul(U)
        return FU, FU

    def sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        r"""Gradients for targets drawn from the likelihood that the loss stands for.

        They are independent over rows and samples, have mean zero, and the Hessian as
        second moment in each row, :math:`\mathbb{E}[g_r g_r^\top] = \nabla_{f_r}^2 S`.

        Parameters
        ----------
        num_samples : int
            Number of samples.
        generator : Generator
            A CPU generator: numbers are drawn there and moved, so that every device
            sees the same ones.

        Returns
        -------
        Tensor
            Of shape ``[num_samples, *output.shape]``.
        """
        samples = self._sample_gradients(num_samples, generator)
        if samples.shape != (num_samples, *self.output.shape):
            raise ValueError(
                f"The sampler returned shape {tuple(samples.shape)} instead of "
                f"(num_samples, *output.shape) = {(num_samples, *self.output.shape)}."
            )
        return samples.detach().to(self.output)

    def outer_mul(self, G: Tensor, U: Tensor) -> Tensor:
        r"""Multiply by the rows' outer products, :math:`g_r \langle g_r, u_r \rangle`.

        ``G`` has the output's shape.
        """
        GU = G * self._checked(U)
        return G * (GU if self.class_axis is None else self._row_sum(GU))

    @abstractmethod
    def _evaluate(self, output: Tensor) -> Tensor:
        """Sum-reduced loss at ``output``, differentiable."""

    @abstractmethod
    def _hessian_mul(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _factor_mul(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _factor_transpose_mul(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _sample_gradients(self, num_samples: int, generator: Generator) -> Tensor: ...

    def _checked(self, U: Tensor) -> Tensor:
        if U.shape[U.ndim - self.output.ndim :] != self.output.shape:
            raise ValueError(
                f"The vectors have shape {tuple(U.shape)}, but must end in the "
                f"output's shape {tuple(self.output.shape)}: reshape them."
            )
        return U

    def _row_sum(self, U: Tensor) -> Tensor:
        axis = self.class_axis
        assert axis is not None
        if U.is_cuda or U.shape[axis] > FEW_CLASSES or U.numel() < MANY_NUMBERS:
            return U.sum(axis, keepdim=True)
        first, *others = U.split(1, axis)
        return sum(others, first)

    def _differentiate(self, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Return a detached copy of the output, and the loss's gradient there."""
        leaf = self.output.detach().requires_grad_()
        with torch.enable_grad():
            value = self._evaluate(leaf)
            if not value.requires_grad:
                raise ValueError(
                    "The loss does not depend on the model's output through autograd. "
                    "Compute it without .detach(), .item(), .numpy() or no_grad()."
                )
            (gradient,) = torch.autograd.grad(
                value, leaf, create_graph=create_graph, materialize_grads=True
            )
        return leaf, gradient

    def _operand(self, value: Tensor, name: str) -> Tensor:
        """Bring a target or weight to the output's device and the working precision."""
        if not _is_tensor(value) or value.is_complex():
            raise TypeError(f"The {name} is {_describe(value)}: pass a real tensor.")
        return value.detach().to(self.output.device, self._dtype)

    def _draw(
        self, draw: Callable[..., Tensor], *shape: int, generator: Generator
    ) -> Tensor:
        options = {"generator": generator, "dtype": self._dtype, "device": "cpu"}
        if self.share is None:
            return draw(*shape, **options).to(self.output.device)
        # A part gets what it would get in the batch.
        start, stop, size = self.share
        samples, length, *rest = shape
        rows = length // (stop - start)
        numbers = draw(samples, rows * size, *rest, **options)
        return numbers[:, rows * start : rows * stop].to(self.output.device)


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
        except RuntimeError:
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
        return _root(self._second_derivative()).to(self.output.dtype)

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
        return _root(self._second_derivative()) * noise


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
        return _root(self._scale()) * (sigma - (u < sigma).to(sigma))


class CrossEntropy(Loss):
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
                f"The target is {_describe(target)}. For logits of shape "
                f"{tuple(output.shape)}, with {C} classes on axis "
                f"{output.ndim + self.class_axis}, pass class indices (integers) of "
                f"shape {self.row_shape}, or class probabilities (floating point) of "
                "the logits' shape."
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
        return self._softmax.sqrt().to(dtype), _root(self._scale).to(dtype)

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

    def _factor_mul(self, U: Tensor) -> Tensor:
        r, root_s = self._factor
        return root_s * r * (U - r * self._row_sum(r * U))

    def _factor_transpose_mul(self, U: Tensor) -> Tensor:
        r, root_s = self._factor
        V = root_s * r * U
        return V - r * self._row_sum(r * V)

    def _sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        p, axis = self._softmax, self.class_axis
        cdf = p.movedim(axis, -1).cumsum(-1).contiguous()
        u = self._draw(torch.rand, num_samples, *self.row_shape, generator=generator)
        u = u.movedim(0, -1) * cdf[..., -1:]
        labels = torch.searchsorted(cdf, u.contiguous(), right=True)
        labels = labels.clamp(max=cdf.shape[-1] - 1)  # u may be rounded up to the total
        labels = labels.movedim(-1, 0).unsqueeze(axis)
        minus_one = -torch.ones_like(labels, dtype=p.dtype)
        residual = p.expand(num_samples, *p.shape).scatter_add(axis, labels, minus_one)
        return _root(self._scale) * residual


class NegativeLogLikelihood(Loss):
    r"""Negative log-likelihood of class indices.

    .. math::

        S(f) = -\sum_t w_{y_t} f_{t y_t}, \qquad
        \frac{\partial^2 S}{\partial f_t^2} = 0

    The output holds log-probabilities, and the loss is linear in them: its Hessian is
    zero, and so is a GGN. All curvature is the model's. For the Fisher matrix of a
    classifier take the logits as output and cross-entropy as loss.

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
                f"got {_describe(target)}. For class probabilities use cross-entropy."
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

    def _sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        raise NotImplementedError(
            "Samples of a negative log-likelihood need its logits: let the model "
            "return them (without log_softmax), and use nn.CrossEntropyLoss()."
        )


class Generic(Loss):
    r"""Any callable ``function(output, target)`` with a 0-d result, through autograd.

    :math:`S(f) = D \, \ell(f, y)` if :math:`\ell` is a mean over :math:`D` terms, and
    :math:`\ell(f, y)` if it is a sum. Multiplying by the Hessian is one backward pass
    through the gradient's graph, which is recorded once. The Hessian may be indefinite
    or couple rows, so it has no factor here.

    Parameters
    ----------
    output : Tensor
        The model's output. A row is the last axis, or a single entry if there is one.
    target : Any
        Passed on to ``function`` as it is.
    function : Callable
        The loss. It must not modify its arguments.
    reduction : str
        ``"mean"`` or ``"sum"``: what ``function`` does with its terms.
    num_terms : Tensor or int or float
        The number of terms ``D``.
    sampler : Callable, optional
        ``sampler(output, target, num_samples, generator)`` with the result of
        :meth:`Loss.sample_gradients`.

    Raises
    ------
    ValueError
        If ``function`` returns anything but a 0-d tensor.
    NotImplementedError
        For a factor, and for samples without ``sampler``.

    Examples
    --------
    >>> f, y, u = torch.tensor([[0.5, 2.0], [0.0, 0.0], [1.0, 1.0]])
    >>> loss = Generic(f, y, function=F.huber_loss, reduction="mean", num_terms=2)
    >>> H = 2 * torch.autograd.functional.hessian(partial(F.huber_loss, target=y), f)
    >>> torch.allclose(loss.hessian_mul(u), H @ u)
    True
    """

    opaque = True

    def __init__(
        self,
        output: Tensor,
        target: Any,
        *,
        function: Callable[..., Tensor],
        reduction: str,
        num_terms: Number,
        sampler: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(output, target)
        _check_reduction(reduction)
        self.function = function
        self.reduction = reduction
        self.count = num_terms
        self.sampler = sampler

    def _evaluate(self, output: Tensor) -> Tensor:
        if self.reduction == "mean" and not self.count:
            return (0 * output).sum()  # no terms, where a mean is NaN
        value = self.function(output, self.target)
        if not _is_tensor(value) or value.ndim:
            raise ValueError(
                f"The loss function returned {_describe(value)}, not a 0-d tensor: use "
                ".mean() for reduction 'mean', or .sum() for reduction 'sum'."
            )
        return value * self.count if self.reduction == "mean" else value

    @cached_property
    def _recording(self) -> tuple[Tensor, Tensor]:
        return self._differentiate(create_graph=True)

    def _hessian_mul(self, U: Tensor) -> Tensor:
        leaf, gradient = self._recording
        if not gradient.requires_grad or not U.numel():  # linear loss, or nothing to do
            return torch.zeros_like(U)
        options = {"retain_graph": True, "materialize_grads": True}
        backward = partial(torch.autograd.grad, gradient, leaf, **options)
        if U.ndim == leaf.ndim:
            return backward(U)[0]
        vectors = U.reshape(-1, *leaf.shape)
        try:
            (products,) = backward(vectors, is_grads_batched=True)
        except RuntimeError:  # an operation that cannot be batched
            products = torch.stack([backward(v)[0] for v in vectors])
        return products.reshape(U.shape)

    def _factor_mul(self, U: Tensor) -> Tensor:
        raise NotImplementedError(
            "The Hessian of a general loss function has no known factor: use "
            "hessian_mul, a loss the package knows, or register a Loss subclass."
        )

    _factor_transpose_mul = _factor_mul

    def _sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        if self.sampler is None:
            raise NotImplementedError(
                "The likelihood behind a general loss function is unknown: pass "
                "sampler(output, target, num_samples, generator), use a loss the "
                "package knows, or register a Loss subclass."
            )
        output = self.output.detach()
        return self.sampler(output, self.target, num_samples, generator)


@dataclass(frozen=True, eq=False)
class LossFunction:
    """A loss class, its options and a reduction: what builds the loss of every batch.

    Parameters
    ----------
    loss : type of Loss
        Called as ``loss(output, target, **options)``.
    reduction : str
        ``"mean"`` or ``"sum"`` over the terms of all data.
    options : Mapping, optional
        Keyword arguments of ``loss``.
    num_terms_fn : Callable, optional
        ``num_terms_fn(output, target)``, the number of terms of an opaque loss.

    Examples
    --------
    >>> LossFunction(MSE, "sum")(torch.ones(2), torch.zeros(2)).value()
    tensor(2.)
    """

    loss: type[Loss]
    reduction: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_terms_fn: Callable[..., Number] | None = None

    def __post_init__(self) -> None:
        """Refuse reductions that are not a scalar."""
        _check_reduction(self.reduction)

    @property
    def smooth_alternative(self) -> str | None:
        """What to use instead, if this loss is known to have no curvature."""
        function = self.options.get("function")
        function = function.func if isinstance(function, partial) else function
        pairs = _PIECEWISE_LINEAR.items()
        return next((v for k, v in pairs if k in (function, type(function))), None)

    def __call__(
        self, output: Tensor, target: Any, num_terms: Number | None = None
    ) -> Loss:
        """Build the loss of one batch.

        ``num_terms`` serves an opaque loss without ``num_terms_fn``; by default it is
        the length of the output's first axis.
        """
        if not self.loss.opaque:
            return self.loss(output, target, **self.options)
        if self.num_terms_fn is not None:
            num_terms = self.num_terms_fn(output, target)
        elif num_terms is None:
            num_terms = output.shape[0] if output.ndim else 1
        return self.loss(output, target, **{**self.options, "num_terms": num_terms})


# Functions, and classes of callables with options as attributes
_KNOWN: dict[Callable[..., Any], type[Loss]] = {
    nn.MSELoss: MSE,
    F.mse_loss: MSE,
    nn.BCEWithLogitsLoss: BCEWithLogits,
    F.binary_cross_entropy_with_logits: BCEWithLogits,
    nn.CrossEntropyLoss: CrossEntropy,
    F.cross_entropy: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    F.nll_loss: NegativeLogLikelihood,
}

# Their second derivative is zero wherever it exists
_PIECEWISE_LINEAR: dict[Callable[..., Any], str] = {
    nn.L1Loss: "nn.SmoothL1Loss() or nn.HuberLoss()",
    F.l1_loss: "F.smooth_l1_loss or F.huber_loss",
}


def register(key: Callable[..., Any], loss: type[Loss]) -> None:
    """Let :func:`as_loss_function` turn ``key`` into ``loss``.

    Parameters
    ----------
    key : Callable
        A function ``key(output, target, **options)``, or a class whose instances have
        ``reduction`` and their options as attributes. Instances of its subclasses do
        not count, since they may compute something else.
    loss : type of Loss
        The class that holds all that is known about this loss. Its keyword-only
        arguments are the options, under the names they have in ``key``.

    Examples
    --------
    >>> def squared_error(output, target, reduction="mean"):
    ...     return F.mse_loss(output, target, reduction=reduction)
    >>> register(squared_error, MSE)
    >>> as_loss_function(squared_error).loss.__name__
    'MSE'
    """
    _KNOWN[key] = loss


def as_loss_function(
    loss_func: Any,
    num_terms_fn: Callable[..., Number] | None = None,
    sampler: Callable[..., Tensor] | None = None,
) -> LossFunction:
    """Turn what users hold into a :class:`LossFunction`, without modifying it.

    Parameters
    ----------
    loss_func : Callable or LossFunction
        A loss module, a loss function, or a ``functools.partial`` of one that binds
        options by keyword. Those in :func:`register`'s table are computed in closed
        form, others as :class:`Generic`. The reduction is the one that is bound, or an
        attribute ``reduction``, or ``"mean"``. The ``"batchmean"`` of
        :class:`torch.nn.KLDivLoss` is a mean over the output's first axis.
    num_terms_fn, sampler : Callable, optional
        For :class:`Generic` losses only, see :class:`LossFunction` and
        :class:`Generic`. By default a batch has as many terms as data.

    Raises
    ------
    TypeError
        If ``loss_func`` is a class or not callable.
    ValueError
        If the reduction is neither ``"mean"`` nor ``"sum"``, or something is given that
        the loss does not take.

    Examples
    --------
    >>> loss_func = as_loss_function(nn.CrossEntropyLoss(reduction="sum"))
    >>> loss_func.loss.__name__, loss_func.reduction
    ('CrossEntropy', 'sum')
    """
    bound = isinstance(loss_func, partial)
    function = loss_func.func if bound else loss_func
    options = dict(loss_func.keywords) if bound else {}
    if isinstance(function, type) or not callable(function):
        problem = "a class" if isinstance(function, type) else "not callable"
        raise TypeError(
            f"The loss {function!r} is {problem}: pass an instance such as "
            "nn.MSELoss(), or a function of (output, target)."
        )
    if legacy := sorted({"size_average", "reduce"} & options.keys()):
        raise ValueError(
            f"The loss is bound to the legacy arguments {legacy}: bind "
            "reduction='mean' or reduction='sum', or wrap it in a function."
        )
    reduction = options.pop("reduction", getattr(function, "reduction", "mean"))
    known = function if isinstance(function, LossFunction) and not bound else None
    instance = not bound and type(function) in _KNOWN
    key = type(function) if instance else function
    # by identity, since callables may be unhashable
    if loss := next((loss for k, loss in _KNOWN.items() if k is key), None):
        names = _option_names(loss)
        if instance:
            options = {n: getattr(function, n) for n in names if hasattr(function, n)}
        unknown = sorted(options.keys() - set(names))
        if unknown or (bound and loss_func.args):
            raise ValueError(
                f"The loss is bound to {unknown or 'positional arguments'}: bind only "
                f"options, by keyword: {', '.join((*names, 'reduction'))}."
            )
        known = LossFunction(loss, reduction, options)
    if known is None:
        if reduction == "batchmean":  # of nn.KLDivLoss: over the output's first axis
            reduction, num_terms_fn = "mean", num_terms_fn or _length
        options = {"function": loss_func, "reduction": reduction, "sampler": sampler}
        return LossFunction(Generic, reduction, options, num_terms_fn)
    if num_terms_fn is not None or sampler is not None:
        raise ValueError(
            "num_terms_fn and sampler are for losses that the package does not know, "
            "but this one brings its own: leave them out."
        )
    return known


@cache
def _option_names(loss: type[Loss]) -> tuple[str, ...]:
    parameters = signature(loss).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _length(output: Tensor, _: Any) -> int:
    return output.shape[0] if output.ndim else 1


def _check_reduction(reduction: Any) -> None:
    if reduction in ("mean", "sum"):
        return
    cause = "it combines terms in a way that is not known here"
    if reduction == "none":
        cause = "it gives one value per term, while curvature needs a scalar"
    raise ValueError(
        f"The loss has reduction={reduction!r}, so {cause}: use 'mean' or 'sum'."
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


def _root(scale: Tensor) -> Tensor:
    if (scale < 0).any():
        raise ValueError(
            "The loss has terms of negative curvature, so its Hessian has no real "
            "factor and no likelihood. Use weights >= 0, and targets in [0, 1] if they "
            "are probabilities."
        )
    return scale.sqrt()
