r"""Dense curvature matrices, by another road than the linear operators.

The operators multiply with vectors, batch by batch, and add up sum-reduced losses.
The functions here build the whole matrix with the function transforms of
:mod:`torch.func`, from the loss function as it is, evaluated once on the concatenated
data. Use them to verify an operator on a problem with at most a few thousand
parameters.

The parameters are treated as one vector :math:`\theta` of length :math:`P`: the given
tensors in their given order, each flattened row by row.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat, equal, linspace, nn, stack
from torch.backends import cudnn
from torch.func import functional_call, grad, grad_and_value, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "functorch_empirical_fisher",
    "functorch_ggn",
    "functorch_gradient_and_loss",
    "functorch_hessian",
    "functorch_jacobian",
]

Model = nn.Module | Callable[[dict[str, Tensor], Any], Tensor]
Loss = Callable[..., Tensor]
Params = Mapping[str, Tensor] | Sequence[Tensor]
Data = Iterable[tuple[Any, Any]]


def functorch_hessian(
    model_func: Model,
    loss_func: Loss,
    params: Params,
    data: Data,
    input_key: Any = None,
) -> Tensor:
    r"""Compute the Hessian of the loss on the concatenated data.

    .. math::
        \mathbf{H} = \nabla_\theta^2 \, \mathcal{L}(\theta) \,,
        \qquad
        \mathcal{L}(\theta) = \ell(f_\theta(\mathbf{X}), \mathbf{y})

    Parameters
    ----------
    model_func : nn.Module or callable
        The model :math:`f`: a module, called with ``X``, or a function that maps
        ``(params_dict, X)`` to a prediction.
    loss_func : callable
        The loss :math:`\ell`: maps a prediction and ``y`` to a scalar. Its
        ``reduction`` is ``"mean"`` unless it says otherwise.
    params : dict of str to Tensor, or sequence of Parameter
        Where :math:`\theta` is; a sequence holds parameters of the module. Parameters
        of the module that are not named are constants.
    data : iterable of (X, y)
        The mini-batches. ``X`` is a tensor or a mapping or tuple of tensors, moved to
        the device of the parameters.
    input_key : optional
        The entry of ``X`` whose first axis is the batch size. Default: the first
        tensor in ``X``.

    Returns
    -------
    Tensor
        The matrix, of shape ``(P, P)``.

    Notes
    -----
    Batches whose inputs can't be concatenated, such as sequences of several lengths,
    are evaluated one by one. Their sums are added, and divided by their added counts
    if the loss is a mean.

    Reverse mode through reverse mode, ``jacrev(grad(...))``, one row after the other:
    :math:`P` backward passes. Two nested ``jacrev`` (and :func:`torch.func.hessian`)
    are wrong for models with layer normalisation.

    :mod:`torch.func` raises on activation checkpointing and on autograd functions
    without ``setup_context``. A module in training mode that uses batch statistics
    sees the statistics of the concatenated data.

    Examples
    --------
    The Hessian of a linear least squares problem doesn't depend on the targets:

    >>> from torch import allclose, nn, rand
    >>> from curvlinops.examples.functorch import functorch_hessian
    >>> model, X1, X2 = nn.Linear(3, 1, bias=False), rand(5, 3), rand(2, 3)
    >>> data = [(X1, rand(5, 1)), (X2, rand(2, 1))]
    >>> H = functorch_hessian(model, nn.MSELoss(), list(model.parameters()), data)
    >>> allclose(H, 2 / 7 * (X1.T @ X1 + X2.T @ X2))
    True
    """
    problem = _FlatProblem(model_func, params, data, input_key)
    return _rows(grad(partial(problem.loss, loss_func)), problem.theta)


def functorch_ggn(
    model_func: Model,
    loss_func: Loss,
    params: Params,
    data: Data,
    input_key: Any = None,
) -> Tensor:
    r"""Compute the generalised Gauss-Newton matrix on the concatenated data.

    It is the Hessian of the loss of the linearised model,

    .. math::
        \mathbf{G} = \nabla_\delta^2 \,
        \ell\left(f_\theta(\mathbf{X}) + \mathbf{J} \delta, \mathbf{y}\right)
        \big|_{\delta = \mathbf{0}}
        \qquad \text{with} \quad
        \mathbf{J} = \mathrm{J}_\theta f_\theta(\mathbf{X}) \,.

    Parameters
    ----------
    model_func, loss_func, params, data, input_key
        See :func:`functorch_hessian`.

    Returns
    -------
    Tensor
        The matrix, of shape ``(P, P)``.

    Notes
    -----
    One backward pass through the model per entry of the prediction, and :math:`P`
    through the linearised model. The whole Jacobian is held in memory.

    References
    ----------
    .. [1] Martens, J. (2020). New insights and perspectives on the natural gradient
       method. JMLR 21. arXiv:1412.1193.

    Examples
    --------
    The GGN and the Hessian of a linear model agree:

    >>> from torch import allclose, nn, rand, tensor
    >>> from curvlinops.examples.functorch import functorch_ggn, functorch_hessian
    >>> model, data = nn.Linear(3, 2), [(rand(2, 3), tensor([0, 1]))]
    >>> problem = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    >>> allclose(functorch_ggn(*problem), functorch_hessian(*problem), atol=1e-6)
    True
    """
    problem = _FlatProblem(model_func, params, data, input_key)
    predictions = problem.predict(problem.theta)
    f, J = _flatten(predictions), _rows(problem.outputs, problem.theta)

    def linearised_loss(delta: Tensor) -> Tensor:
        parts = (f + J @ delta).split([p.numel() for p in predictions])
        linearised = [z.view_as(p) for z, p in zip(parts, predictions, strict=True)]
        return _risk(loss_func, linearised, problem)

    return _rows(grad(linearised_loss), problem.theta.new_zeros(J.shape[1]))


def functorch_gradient_and_loss(
    model_func: Model,
    loss_func: Loss,
    params: Params,
    data: Data,
    input_key: Any = None,
) -> tuple[list[Tensor], Tensor]:
    r"""Compute the gradient and value of the loss on the concatenated data.

    .. math::
        \nabla_\theta \, \ell(f_\theta(\mathbf{X}), \mathbf{y})
        \qquad \text{and} \qquad
        \ell(f_\theta(\mathbf{X}), \mathbf{y})

    Parameters
    ----------
    model_func, loss_func, params, data, input_key
        See :func:`functorch_hessian`.

    Returns
    -------
    gradient : list of Tensor
        The gradient, in the shapes and order of the parameters.
    loss : Tensor
        The loss, a scalar.

    Examples
    --------
    >>> from torch import allclose, nn, rand
    >>> from curvlinops.examples.functorch import functorch_gradient_and_loss
    >>> model, X, y = nn.Linear(3, 1, bias=False), rand(5, 3), rand(5, 1)
    >>> gradient, loss = functorch_gradient_and_loss(
    ...     model, nn.MSELoss(), list(model.parameters()), [(X, y)]
    ... )
    >>> residual = (model(X) - y).detach()
    >>> allclose(gradient[0], 2 / 5 * residual.T @ X), allclose(loss, residual.var(
    ...     correction=0) + residual.mean() ** 2)
    (True, True)
    """
    problem = _FlatProblem(model_func, params, data, input_key)
    gradient, loss = grad_and_value(partial(problem.loss, loss_func))(problem.theta)
    return list(problem.unflatten(gradient).values()), loss


def functorch_empirical_fisher(
    model_func: Model,
    loss_func: Loss,
    params: Params,
    data: Data,
    input_key: Any = None,
) -> Tensor:
    r"""Compute the empirical Fisher matrix on the concatenated data.

    .. math::
        \mathbf{E} = c \sum_t \mathbf{g}_t \mathbf{g}_t^\top \,,
        \qquad
        \mathbf{g}_t = \nabla_\theta \, \ell_t(\theta)

    where :math:`\ell_t` is the sum-reduced loss of one term and :math:`c` the ratio of
    the mean-reduced to the sum-reduced loss (:math:`1` for a loss that sums).

    Parameters
    ----------
    model_func, loss_func, params, data, input_key
        See :func:`functorch_hessian`.

    Returns
    -------
    Tensor
        The matrix, of shape ``(P, P)``.

    Notes
    -----
    For cross-entropy and the negative log-likelihood, a term is one target. For torch's
    other losses of a prediction and a target it is one row of the prediction along its
    last axis, or one entry of a prediction with a single axis. Any other loss is
    evaluated per datum, and :math:`c` is one over the number of data if it is a mean.
    One backward pass per term.

    Examples
    --------
    For a single term, it is the outer product of the gradient:

    >>> from torch import allclose, nn, rand, tensor
    >>> from curvlinops.examples.functorch import functorch_empirical_fisher
    >>> from curvlinops.examples.functorch import functorch_gradient_and_loss
    >>> model, data = nn.Linear(3, 2, bias=False), [(rand(1, 3), tensor([1]))]
    >>> problem = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    >>> g = functorch_gradient_and_loss(*problem)[0][0].flatten()
    >>> allclose(functorch_empirical_fisher(*problem), g.outer(g))
    True
    """
    problem = _FlatProblem(model_func, params, data, input_key)

    def losses(theta: Tensor) -> Tensor:
        batches = zip(
            problem.predict(theta), problem.targets, problem.sizes, strict=True
        )
        return cat([_terms(loss_func, f, y, size) for f, y, size in batches])

    J = _rows(losses, problem.theta)
    if _reduction(loss_func) == "sum":
        return J.T @ J
    predictions = problem.predict(problem.theta)
    return J.T @ J / sum(_counts(loss_func, predictions, problem))


def functorch_jacobian(
    model_func: Model,
    params: Params,
    data: Data,
    input_key: Any = None,
) -> Tensor:
    r"""Compute the Jacobian of the model's predictions on the concatenated data.

    .. math::
        \mathbf{J} = \mathrm{J}_\theta f_\theta(\mathbf{X})

    Parameters
    ----------
    model_func, params, data, input_key
        See :func:`functorch_hessian`.

    Returns
    -------
    Tensor
        The matrix, of shape ``(N * C, P)`` for :math:`N` data with a prediction of
        :math:`C` entries each. The predictions are flattened datum by datum.

    Examples
    --------
    >>> from torch import equal, nn, rand
    >>> from curvlinops.examples.functorch import functorch_jacobian
    >>> model, X = nn.Linear(3, 1, bias=False), rand(5, 3)
    >>> equal(functorch_jacobian(model, list(model.parameters()), [(X, None)]), X)
    True
    """
    problem = _FlatProblem(model_func, params, data, input_key)
    return _rows(problem.outputs, problem.theta)


class _FlatProblem:
    """Model and concatenated data, as functions of one flat parameter vector.

    Attributes
    ----------
    theta : Tensor
        The parameters, of shape ``(P,)``.
    inputs, targets : list
        One entry in total, or one per batch if the batches can't be concatenated.
    sizes : list of int
        The number of data in each of these.
    """

    def __init__(self, model: Model, params: Params, data: Data, input_key: Any):
        self._model = model
        self._params = _named(model, params)
        self.theta = _flatten([p.detach() for p in self._params.values()])
        device = self.theta.device
        batches = [
            _map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, b)
            for b in map(tuple, data)
        ]
        self.sizes = [_batch_size(X, input_key) for X, _ in batches]
        self.inputs, self.targets = [X for X, _ in batches], [y for _, y in batches]
        joined = _concatenate(self.inputs, self.targets, self.sizes)
        if joined is not None:
            X, y = joined
            self.inputs, self.targets, self.sizes = [X], [y], [sum(self.sizes)]

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector into named tensors in the shapes of the parameters."""
        parts = theta.split([p.numel() for p in self._params.values()])
        return {
            name: part.view(p.shape).to(p.dtype)
            for (name, p), part in zip(self._params.items(), parts, strict=True)
        }

    def predict(self, theta: Tensor) -> list[Tensor]:
        """Evaluate the model on the inputs.

        Neither fused attention nor cuDNN's recurrent layers can be differentiated
        twice, hence both are switched off.
        """
        params = self.unflatten(theta)
        with sdpa_kernel(SDPBackend.MATH), cudnn.flags(enabled=False):
            if isinstance(self._model, nn.Module):
                return [functional_call(self._model, params, (X,)) for X in self.inputs]
            return [self._model(params, X) for X in self.inputs]

    def outputs(self, theta: Tensor) -> Tensor:
        """Evaluate the model on the inputs and flatten, datum by datum."""
        return _flatten(self.predict(theta))

    def loss(self, loss_func: Loss, theta: Tensor) -> Tensor:
        """Evaluate the loss of all data."""
        return _risk(loss_func, self.predict(theta), self)


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate the entries of all tensors, each row by row."""
    return cat([t.reshape(-1) for t in tensors])


def _rows(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Compute the Jacobian of a vector-valued function, row by row.

    Without vectorisation over rows: it has no rule for some operations, and warns.
    """
    return jacrev(function, chunk_size=1)(theta)


def _named(model: Model, params: Params) -> dict[str, Tensor]:
    """Give every parameter its name."""
    if isinstance(params, Mapping):
        return dict(params)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The model is a {type(model).__name__}, not a module, and its parameters "
            f"a {type(params).__name__}. Pass them as a dict from name to tensor."
        )
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [i for i, p in enumerate(params) if id(p) not in names]
    if missing:
        raise ValueError(
            f"The entries {missing} of params are not parameters of the module. Pass "
            "a dict from name to tensor to use other values."
        )
    return {names[id(p)]: p for p in params}


# Data


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply a function to the leaves of mappings, tuples and lists of one structure."""
    first = trees[0]
    if isinstance(first, Mapping):
        items = {key: _map(function, *(t[key] for t in trees)) for key in first}
        if not isinstance(first, MutableMapping):
            return type(first)(items)  # type: ignore[call-arg]
        result = copy(first)  # some mappings carry more than their items
        result.update(items)
        return result
    if isinstance(first, (tuple, list)):
        parts = [_map(function, *leaves) for leaves in zip(*trees, strict=True)]
        is_namedtuple = hasattr(first, "_fields")
        return type(first)(*parts) if is_namedtuple else type(first)(parts)
    return function(*trees)


def _batch_size(X: Any, input_key: Any = None) -> int:
    """Read the batch size off the first tensor, or the one with the given key."""
    if input_key is not None and not isinstance(X, Tensor):
        X = X[input_key]
    sizes: list[int] = []
    _map(lambda leaf: sizes.append(len(leaf)) if isinstance(leaf, Tensor) else None, X)
    return sizes[0]


def _concatenate(
    inputs: Sequence[Any], targets: Sequence[Any], sizes: Sequence[int]
) -> tuple[Any, Any] | None:
    """Join batches along their first axis.

    Tensors of the input whose first axis is not the batch, like an attention mask, and
    everything that is not a tensor must be the same in all batches. Targets may have
    several rows per datum.

    Returns
    -------
    tuple or None
        All inputs and all targets; None if the batches don't fit together.
    """
    fits = True

    def join(is_batched: Callable[..., bool], *leaves: Any) -> Any:
        nonlocal fits
        tensors = all(isinstance(leaf, Tensor) for leaf in leaves)
        if tensors and is_batched(*leaves):
            if len({leaf.shape[1:] for leaf in leaves}) == 1:
                return cat(leaves)
            fits = False
        elif tensors:
            fits &= all(equal(leaf, leaves[0]) for leaf in leaves)
        else:
            fits &= all(leaf == leaves[0] for leaf in leaves)
        return leaves[0]

    def has_batch_axis(*leaves: Tensor) -> bool:
        pairs = zip(leaves, sizes, strict=True)
        return all(leaf.ndim > 0 and len(leaf) == size for leaf, size in pairs)

    def has_axis(*leaves: Tensor) -> bool:
        return all(leaf.ndim > 0 for leaf in leaves)

    X = _map(partial(join, has_batch_axis), *inputs)
    y = _map(partial(join, has_axis), *targets)
    return (X, y) if fits else None


# Losses

_KNOWN_LOSSES = (
    (nn.MSELoss, F.mse_loss),
    (nn.HuberLoss, F.huber_loss),
    (nn.SmoothL1Loss, F.smooth_l1_loss),
    (nn.L1Loss, F.l1_loss),
    (nn.PoissonNLLLoss, F.poisson_nll_loss),
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
    (nn.BCELoss, F.binary_cross_entropy),
    (nn.SoftMarginLoss, F.soft_margin_loss),
    (nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss),
    (nn.HingeEmbeddingLoss, F.hinge_embedding_loss),
    (nn.CrossEntropyLoss, F.cross_entropy),
    (nn.NLLLoss, F.nll_loss),
    (nn.KLDivLoss, F.kl_div),
)
#: Those whose values are not one per entry of the prediction, but one per term.
_BY_TERM = nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiLabelSoftMarginLoss


def _kind(loss_func: Loss) -> type[nn.Module] | None:
    """Return the module class of a loss with known terms, in either of its forms."""
    while isinstance(loss_func, partial):
        loss_func = loss_func.func
    forward = getattr(type(loss_func), "forward", None)
    for module, function in _KNOWN_LOSSES:
        if loss_func is function or forward is module.forward:
            return module
    return None


def _reduction(loss_func: Loss) -> str:
    """Return whether the loss is a sum; everything else is some mean."""
    keywords = loss_func.keywords if isinstance(loss_func, partial) else {}
    reduction = getattr(loss_func, "reduction", keywords.get("reduction", "mean"))
    return "sum" if reduction == "sum" else "mean"


def _with_reduction(loss_func: Loss, reduction: str) -> Loss:
    """Return a loss with known terms under another reduction."""
    if not isinstance(loss_func, nn.Module):
        return partial(loss_func, reduction=reduction)
    loss_func = copy(loss_func)
    loss_func.reduction = reduction  # type: ignore[assignment]
    return loss_func


def _risk(
    loss_func: Loss, predictions: Sequence[Tensor], problem: _FlatProblem
) -> Tensor:
    """Evaluate the loss of all data, given their predictions."""
    pairs = list(zip(predictions, problem.targets, strict=True))
    if len(pairs) == 1 or _reduction(loss_func) == "sum":
        return stack([loss_func(f, y) for f, y in pairs]).sum()
    counts = _counts(loss_func, predictions, problem)
    if _kind(loss_func) is None:
        sums = [n * loss_func(f, y) for n, (f, y) in zip(counts, pairs, strict=True)]
    else:
        sums = [_with_reduction(loss_func, "sum")(f, y) for f, y in pairs]
    return stack(sums).sum() / sum(counts)


def _counts(
    loss_func: Loss, predictions: Sequence[Tensor], problem: _FlatProblem
) -> list[Any]:
    """Return by how much a mean divides the sum, for each entry of the predictions.

    The loss is asked for both on arbitrary predictions. Zero divided by zero means that
    nothing is counted. A loss without known terms counts data.
    """
    if _kind(loss_func) is None:
        return list(problem.sizes)
    total, counts = _with_reduction(loss_func, "sum"), []
    for f, y in zip(predictions, problem.targets, strict=True):
        probe = linspace(-1, 2, f.numel(), dtype=f.dtype, device=f.device).sigmoid()
        probe = probe.view(f.shape)
        counts.append((total(probe, y) / loss_func(probe, y)).nan_to_num(0.0))
    return counts


def _terms(loss_func: Loss, prediction: Tensor, y: Any, size: int) -> Tensor:
    """Evaluate the sum-reduced loss of each term, of shape ``(number of terms,)``."""
    kind = _kind(loss_func)
    if kind is None:
        data = [
            _map(lambda leaf, i=i: leaf.chunk(size)[i], (prediction, y))
            for i in range(size)
        ]
        return stack([loss_func(f, target) for f, target in data])
    entries = _with_reduction(loss_func, "none")(prediction, y)
    if kind not in _BY_TERM and entries.ndim > 1:
        entries = entries.sum(-1)
    return entries.reshape(-1)
