"""What is called in place of functions of torch while a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvlinops._draws import note_draws
from curvlinops._isolation import attend

#: Mark of a graph's node at which a hook changes, or may change, gradients.
HOOKED = "curvlinops: hook"


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``g v / |v|`` with norms over all dimensions but ``dim``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows, whose gradient is dense: a sparse one has no derivative itself."""
    options = (max_norm, norm_type, scale_grad_by_freq)
    return F.embedding(input, weight, padding_idx, *options)


def _rows(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return torch.embedding(weight, indices, padding_idx, scale_grad_by_freq)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return sums or means over bags of rows, as sums that can be differentiated."""
    weighted = per_sample_weights is not None
    known = mode == "sum" or (mode == "mean" and not weighted)
    if not known or max_norm is not None or scale_grad_by_freq:
        options = (max_norm, norm_type, scale_grad_by_freq, mode, False)
        others = (per_sample_weights, include_last_offset, padding_idx)
        return F.embedding_bag(input, weight, offsets, *options, *others)
    rows = F.embedding(input, weight, padding_idx)
    kept = torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        kept = (input != padding_idx % len(weight)).to(weight.dtype)
    factors = kept if per_sample_weights is None else kept * per_sample_weights
    rows = rows * factors.unsqueeze(-1)
    if offsets is None:
        sums, counts = rows.sum(1), kept.sum(1)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        places = torch.arange(len(input), device=input.device)
        bag = torch.searchsorted(starts.contiguous(), places, right=True) - 1
        sums = rows.new_zeros(len(starts), rows.shape[1]).index_add(0, bag, rows)
        counts = kept.new_zeros(len(starts)).index_add(0, bag, kept)
    return sums if mode == "sum" else sums / counts.clamp(min=1).unsqueeze(1)


def _register_hook(tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    """Register a hook, and leave a mark: nothing else tells that it is there."""
    if tensor.grad_fn is not None:
        marks: Any = tensor.grad_fn.metadata
        marks[HOOKED] = getattr(hook, "__qualname__", repr(hook))
    return tensor.register_hook(hook)


def _standardised(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """Return ``(x - mean) / sqrt(var + eps)``, in single precision at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=list(dims), correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(var + eps)).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = range(-len(tuple(normalized_shape)), 0)
    return _affine(_standardised(input, dims, eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    running = running_mean, running_var
    if not training:  # linear
        return F.batch_norm(input, *running, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.batch_norm(input.detach(), *running, training=True, momentum=momentum)
    x = _standardised(input, [d for d in range(input.ndim) if d != 1], eps)
    return _affine(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    running = running_mean, running_var
    if not use_input_stats:
        return F.instance_norm(input, *running, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), *running, momentum=momentum)
    x = _standardised(input, range(2, input.ndim), eps)
    return _affine(x.movedim(1, -1), weight, bias).movedim(-1, 1)


#: Functions of torch whose second derivative is wrong or missing, and what is called
#: instead. `torch._weight_norm`'s fused double backward is silently wrong on the CPU
#: (torch 2.13: `gradgradcheck` fails); sparse gradients, and bags of embeddings, have
#: none.
_ALWAYS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    torch.embedding: _rows,
    F.embedding_bag: _embedding_bag,
    Tensor.register_hook: _register_hook,
}
#: Functions whose third derivative is, so that theirs serve unless the model itself
#: differentiates (torch 2.13; 2.14 raises for `batch_norm`).
_IN_DERIVATIVES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
#: Names of the functions by which a model differentiates: in reverse mode (`torch.func`
#: calls the same), and in forward mode.
_DIFFERENTIATING = {"grad", "backward", "_make_dual"}


#: What computes attention.
_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}


def before_call(func: Any, args: Any, kwargs: Any) -> None:
    """Prepare for a function of torch that code of the user's is about to call."""
    note_draws(func, args, kwargs)
    if func in _ATTENTION:
        attend()


class Watched(TorchFunctionMode):
    """Prepares for what code of the user's calls, beside a model's: a loss, say."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before_call(func, args, kwargs)
        return func(*args, **kwargs)


class Substitutions(TorchFunctionMode):
    """Calls the differentiable equivalent of a function.

    Parameters
    ----------
    differentiates : bool
        Whether the model itself differentiates, as far as that is known.
    see : callable, optional
        Called as ``see(func, args, kwargs, result)`` after every call that is not
        being compiled.
    """

    def __init__(
        self, differentiates: bool, see: Callable[..., None] | None = None
    ) -> None:
        super().__init__()
        self._see = see
        self._table = _ALWAYS | _IN_DERIVATIVES if differentiates else _ALWAYS
        self._kept = self._differentiated = False

    @property
    def lacking(self) -> bool:
        """Whether the model does, and calls a function that had to be replaced."""
        return self._kept and self._differentiated

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._kept |= func in _IN_DERIVATIVES and func not in self._table
        self._differentiated |= getattr(func, "__name__", "") in _DIFFERENTIATING
        kwargs = kwargs or {}
        before_call(func, args, kwargs)
        result = self._table.get(func, func)(*args, **kwargs)
        if not torch.compiler.is_compiling() and self._see is not None:
            self._see(func, args, kwargs, result)
        return result
