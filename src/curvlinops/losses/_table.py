"""From what users hold to losses: the table of those that are known."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops.losses._binary import (
    BCE,
    BCEWithLogits,
    HingeEmbedding,
    MultiLabelSoftMargin,
    SoftMargin,
)
from curvlinops.losses._categorical import (
    LOGITS,
    CrossEntropy,
    KLDiv,
    NegativeLogLikelihood,
)
from curvlinops.losses._generic import Generic
from curvlinops.losses._loss import Loss, Number, check_reduction
from curvlinops.losses._regression import L1, MSE, Huber, PoissonNLL, SmoothL1


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
    assumed : bool, optional
        Whether nobody has said what the reduction is.

    Examples
    --------
    >>> import torch
    >>> LossFunction(MSE, "sum")(torch.ones(2), torch.zeros(2)).value()
    tensor(2.)
    """

    loss: type[Loss]
    reduction: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_terms_fn: Callable[..., Number] | None = None
    assumed: bool = False

    def __post_init__(self) -> None:
        """Refuse reductions that are not a scalar."""
        check_reduction(self.reduction)

    @property
    def title(self) -> str:
        """What tells this loss from others, in other processes, too.

        Functions count by their names, tensors by a checksum.
        """
        defaults = {name: p.default for name, p in _options_of(self.loss).items()}
        options = {**defaults, **self.options, "reduction": self.reduction}
        told = {name: _told(value) for name, value in sorted(options.items())}
        return f"{self.loss.__name__}({', '.join(f'{k}={v}' for k, v in told.items())})"

    @property
    def smooth_alternative(self) -> str | None:
        """What to use instead, if this loss is known to have no curvature."""
        return self.loss.smooth_alternative(**self.options)

    def warn_if_flat(self, matrix: str, stacklevel: int, seen: bool = False) -> None:
        """Warn that a matrix made of this loss's second derivatives is zero.

        Parameters
        ----------
        matrix : str
            Which one.
        stacklevel : int
            As of `warnings.warn`.
        seen : bool, optional
            Whether an opaque loss has been seen to be flat in all data.
        """
        instead = self.smooth_alternative
        if instead is None and seen:
            instead = f"a loss that is curved there (of log-probabilities: {LOGITS})"
        if instead is not None:
            warnings.warn(
                "The loss is piecewise linear in the model's output: its second "
                f"derivative is zero, and so is {matrix}. For curvature use {instead}, "
                "or the empirical Fisher (`EFLinearOperator`, or "
                '`fisher_type="empirical"` of KFAC).',
                stacklevel=stacklevel + 1,
            )

    def class_axes(self, output: Tensor, target: Any) -> tuple[int, ...]:
        """Return the axes of an output on which classes may be."""
        return self.loss.class_axes(output, target)

    @property
    def undetermined(self) -> Callable[..., Tensor] | None:
        """The user's function, if it alone decides what is done with the terms."""
        if not self.loss.opaque or self.num_terms_fn is not None:
            return None
        return self.options.get("function")

    def reduced_by(self, reduction: str) -> "LossFunction":
        """Return the same function, taken for a mean or a sum."""
        options = {**self.options, "reduction": reduction}
        return replace(self, reduction=reduction, options=options)

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
    nn.HuberLoss: Huber,
    F.huber_loss: Huber,
    nn.SmoothL1Loss: SmoothL1,
    F.smooth_l1_loss: SmoothL1,
    nn.L1Loss: L1,
    F.l1_loss: L1,
    nn.PoissonNLLLoss: PoissonNLL,
    F.poisson_nll_loss: PoissonNLL,
    nn.BCEWithLogitsLoss: BCEWithLogits,
    F.binary_cross_entropy_with_logits: BCEWithLogits,
    nn.BCELoss: BCE,
    F.binary_cross_entropy: BCE,
    nn.SoftMarginLoss: SoftMargin,
    F.soft_margin_loss: SoftMargin,
    nn.MultiLabelSoftMarginLoss: MultiLabelSoftMargin,
    F.multilabel_soft_margin_loss: MultiLabelSoftMargin,
    nn.HingeEmbeddingLoss: HingeEmbedding,
    F.hinge_embedding_loss: HingeEmbedding,
    nn.CrossEntropyLoss: CrossEntropy,
    F.cross_entropy: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    F.nll_loss: NegativeLogLikelihood,
    nn.KLDivLoss: KLDiv,
    F.kl_div: KLDiv,
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
    reduction: str | None = None,
) -> LossFunction:
    """Turn what users hold into a :class:`LossFunction`, without modifying it.

    Parameters
    ----------
    loss_func : Callable or LossFunction
        A loss module, a loss function, or a ``functools.partial`` of one that binds
        options by keyword. Those in :func:`register`'s table are computed in closed
        form, others as :class:`Generic`. The reduction is the one that is bound, or an
        attribute ``reduction``, or ``"mean"``; a risk looks whether that of a
        :class:`Generic` loss is right. The ``"batchmean"`` of
        :class:`torch.nn.KLDivLoss` is a mean over the output's first axis.
    num_terms_fn, sampler : Callable, optional
        For :class:`Generic` losses only, see :class:`LossFunction` and
        :class:`Generic`. By default a batch has as many terms as data.
    reduction : str, optional
        For :class:`Generic` losses only: what the reduction is, if the loss does not
        say so itself.

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
    loss_func = unwrapped(loss_func)
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
    declared = options.pop("reduction", getattr(function, "reduction", None))
    told, reduction = reduction, reduction or declared or "mean"
    known = function if isinstance(function, LossFunction) and not bound else None
    instance = not bound and type(function) in _KNOWN
    key = type(function) if instance else function
    # by identity, since callables may be unhashable
    if loss := next((loss for k, loss in _KNOWN.items() if k is key), None):
        names = tuple(_options_of(loss))
        if instance:
            options = {n: getattr(function, n) for n in names if hasattr(function, n)}
        unknown = sorted(options.keys() - set(names))
        if unknown or (bound and loss_func.args):
            raise ValueError(
                f"The loss is bound to {unknown or 'positional arguments'}: bind only "
                f"options, by keyword: {', '.join((*names, 'reduction'))}."
            )
        if reduction in loss.means:
            reduction, options = "mean", {**options, **loss.means[reduction]}
        known = LossFunction(loss, reduction, options)
    if known is None:
        if reduction == "batchmean":  # of nn.KLDivLoss: over the output's first axis
            reduction, num_terms_fn = "mean", num_terms_fn or _length
        options = {"function": loss_func, "reduction": reduction, "sampler": sampler}
        assumed = told is None and declared is None
        return LossFunction(Generic, reduction, options, num_terms_fn, assumed)
    if any(option is not None for option in (num_terms_fn, sampler, told)):
        raise ValueError(
            "num_terms_fn, sampler and reduction are for losses that the package does "
            "not know, but this one brings its own: leave them out."
        )
    return known


def unwrapped(loss_func: Any) -> Any:
    """Return what a ``functools.partial`` that binds nothing stands for."""
    while isinstance(loss_func, partial) and not (loss_func.args or loss_func.keywords):
        loss_func = loss_func.func
    return loss_func


@cache
def _options_of(loss: type[Loss]) -> Mapping[str, Parameter]:
    parameters = signature(loss).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _told(option: Any) -> str:
    """Return an option of a loss as text, the same in every process."""
    if isinstance(option, Tensor):
        values = option.detach().cpu().double().contiguous().numpy()
        digest = sha256(values.tobytes()).hexdigest()
        return f"tensor{[*values.shape]}:{digest[:16]}"
    if isinstance(option, partial):
        bound = [*map(_told, option.args)]
        bound += [f"{k}={_told(v)}" for k, v in sorted(option.keywords.items())]
        return f"partial({', '.join([_told(option.func), *bound])})"
    if callable(option):
        return str(getattr(option, "__qualname__", type(option).__qualname__))
    return str(option)


def _length(output: Tensor, _: Any) -> int:
    return output.shape[0] if output.ndim else 1
