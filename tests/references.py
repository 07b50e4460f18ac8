"""Dense references in float64, by loops over plain reverse-mode differentiation.

They take the roads that ``curvlinops.examples.functorch`` does not take: a private copy
of the model instead of functional calls, a sum over batches divided by a count from a
table instead of the concatenated data, ``J^T H J`` instead of a linearised model, the
loss of one row after the other instead of unreduced losses. All functions take
``(model_func, loss_func, params, data)`` and return float64 whatever they are given.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, cat, float64, nn, stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlinops.examples.functorch import (
    _batch_size,
    _flatten,
    _kind,
    _map,
    _reduction,
    _with_reduction,
)


def convert(
    model_func: Any,
    loss_func: Any,
    params: Any,
    data: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> tuple[Any, Any, Any, list]:
    """Copy a problem to another floating point type or device.

    Parameters that are the model's own are those of its copy afterwards. What a plain
    callable closes over stays where it is.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    data = [_map(move, tuple(batch)) for batch in data]
    model_func, loss_func, params = deepcopy((model_func, loss_func, params))
    for module in (model_func, loss_func):
        if isinstance(module, nn.Module):
            module.to(device, dtype)
    if isinstance(loss_func, partial):
        loss_func = partial(loss_func.func, **_map(move, loss_func.keywords))
    if isinstance(params, dict):
        params = {n: p if _owns(model_func, p) else move(p) for n, p in params.items()}
    return model_func, loss_func, params, data


def _owns(model_func: Any, parameter: Tensor) -> bool:
    if not isinstance(model_func, nn.Module):
        return False
    return any(p is parameter for p in model_func.parameters())


class _Evaluated:
    """Model and batches in float64, with the graph of every prediction.

    Attributes: ``leaves`` (the parameters), ``predictions`` and ``targets`` (one per
    batch), ``loss_func``, ``sizes`` (data per batch), ``count`` (what the summed
    losses are divided by).
    """

    def __init__(self, model_func: Any, loss_func: Any, params: Any, data: Any):
        model_func, self.loss_func, params, data = convert(
            model_func, loss_func, params, data, dtype=float64
        )
        if isinstance(model_func, nn.Module):
            self.leaves = _write_into(model_func, params)
            self.predictions = [model_func(X) for X, _ in data]
        else:
            named = {n: p.detach().requires_grad_() for n, p in params.items()}
            self.leaves = list(named.values())
            self.predictions = [model_func(named, X) for X, _ in data]
        self.targets = [y for _, y in data]
        self.sizes = [_batch_size(X) for X, _ in data]
        self.kind = _kind(loss_func)
        self.count: Any = 1
        if _reduction(loss_func) != "sum":
            batches = zip(self.predictions, self.targets, self.sizes, strict=True)
            self.count = sum(self.count_terms(*batch) for batch in batches)

    def count_terms(self, f: Tensor, y: Any, size: int) -> Any:
        """Weight of a batch in a mean."""
        if self.kind is None:
            return size
        if self.kind is not nn.CrossEntropyLoss:
            return f.numel()
        if y.is_floating_point():
            return f.numel() // f.shape[1]
        options = getattr(self.loss_func, "keywords", None) or vars(self.loss_func)
        weight = options.get("weight", getattr(self.loss_func, "weight", None))
        kept = y[y != options.get("ignore_index", -100)]
        return kept.numel() if weight is None else weight[kept].sum()

    def summed_loss(self, f: Tensor, y: Any, size: int) -> Tensor:
        """Loss of a batch, to be divided by the count of all batches."""
        if self.kind is not None:
            return _with_reduction(self.loss_func, "sum")(f, y)
        weight = 1 if _reduction(self.loss_func) == "sum" else size
        return weight * self.loss_func(f, y)

    def batches(self) -> zip:
        return zip(self.predictions, self.targets, self.sizes, strict=True)

    def loss(self) -> Tensor:
        return sum(self.summed_loss(*batch) for batch in self.batches()) / self.count

    def rows(self, f: Tensor, y: Any, size: int) -> list[Tensor]:
        """Sum-reduced loss of each term of a batch."""
        if self.kind is None:
            pieces = [_map(lambda t, i=i: t[i : i + 1], (f, y)) for i in range(size)]
            return [self.loss_func(*piece) for piece in pieces]
        if self.kind is nn.CrossEntropyLoss:
            f = f.movedim(1, -1).reshape(-1, f.shape[1])
            y = y.movedim(1, -1).reshape_as(f) if y.is_floating_point() else y.flatten()
        elif f.ndim > 1:
            f, y = f.reshape(-1, f.shape[-1]), y.reshape(-1, y.shape[-1])
        loss = _with_reduction(self.loss_func, "sum")
        return [loss(f[i : i + 1], y[i : i + 1]) for i in range(len(f))]


def _write_into(model: nn.Module, params: Any) -> list[Tensor]:
    """Write the values of the parameters into the module."""
    if not isinstance(params, dict):
        return [p.requires_grad_() for p in params]
    leaves = []
    for name, value in params.items():
        leaf = model.get_parameter(name)
        if leaf is not value:
            leaf.data.copy_(value)
        leaves.append(leaf.requires_grad_())
    return leaves


def differentiate(
    outputs: Tensor, inputs: list[Tensor], create_graph: bool = False
) -> Tensor:
    """Compute the Jacobian of all entries of a tensor, one after the other."""
    rows = []
    for output in outputs.reshape(-1):
        if output.requires_grad:
            row = torch.autograd.grad(
                output,
                inputs,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        else:  # a derivative that is constant
            row = tuple(torch.zeros_like(leaf) for leaf in inputs)
        rows.append(_flatten(row))
    return stack(rows)


def _with_math_attention(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # the context includes the backward passes, which may recompute the forward pass
    return sdpa_kernel(SDPBackend.MATH)(function)


@_with_math_attention
def gradient(model_func: Any, loss_func: Any, params: Any, data: Any) -> Tensor:
    """Compute the gradient of the loss, of shape ``(P,)``."""
    risk = _Evaluated(model_func, loss_func, params, data)
    return differentiate(risk.loss(), risk.leaves)[0]


@_with_math_attention
def loss(model_func: Any, loss_func: Any, params: Any, data: Any) -> Tensor:
    """Compute the loss, a scalar."""
    return _Evaluated(model_func, loss_func, params, data).loss().detach()


@_with_math_attention
def hessian(model_func: Any, loss_func: Any, params: Any, data: Any) -> Tensor:
    """Compute the Hessian of the loss, of shape ``(P, P)``."""
    risk = _Evaluated(model_func, loss_func, params, data)
    [g] = differentiate(risk.loss(), risk.leaves, create_graph=True)
    return differentiate(g, risk.leaves)


@_with_math_attention
def ggn(model_func: Any, loss_func: Any, params: Any, data: Any) -> Tensor:
    """Compute the generalised Gauss-Newton matrix, of shape ``(P, P)``."""
    risk = _Evaluated(model_func, loss_func, params, data)
    total: Any = 0
    for f, y, size in risk.batches():
        z = f.detach().requires_grad_()
        [g] = differentiate(risk.summed_loss(z, y, size), [z], create_graph=True)
        J, H = differentiate(f, risk.leaves), differentiate(g, [z])
        total = total + J.T @ H @ J
    return total / risk.count


@_with_math_attention
def empirical_fisher(model_func: Any, loss_func: Any, params: Any, data: Any) -> Tensor:
    """Compute the empirical Fisher matrix, of shape ``(P, P)``."""
    risk = _Evaluated(model_func, loss_func, params, data)
    rows = [row for batch in risk.batches() for row in risk.rows(*batch)]
    J = differentiate(stack(rows), risk.leaves)
    return J.T @ J / risk.count


@_with_math_attention
def jacobian(model_func: Any, params: Any, data: Any) -> Tensor:
    """Compute the Jacobian of the predictions, of shape ``(N * C, P)``."""
    risk = _Evaluated(model_func, nn.MSELoss(), params, data)
    return cat([differentiate(f, risk.leaves) for f in risk.predictions])


def central_differences_hessian(
    model_func: Any, loss_func: Any, params: Any, data: Any
) -> Tensor:
    """Compute the Hessian from differences of the gradient, of shape ``(P, P)``.

    With the step ``eps ** (1 / 3)`` of central differences in float64.
    """
    problem = convert(model_func, loss_func, params, data, dtype=float64)
    model_func, loss_func, params, data = problem
    named = params
    if not isinstance(params, dict):
        names = {id(p): n for n, p in model_func.named_parameters()}
        named = {names[id(p)]: p for p in params}
    values = {n: p.detach().contiguous().clone() for n, p in named.items()}
    step = torch.finfo(float64).eps ** (1 / 3)
    columns = []
    for value in values.values():
        entries = value.view(-1)
        for i in range(len(entries)):
            at = entries[i].item()
            sides = []
            for shifted in (at + step, at - step):
                entries[i] = shifted
                sides.append(gradient(model_func, loss_func, values, data))
            entries[i] = at
            columns.append((sides[0] - sides[1]) / (2 * step))
    return stack(columns, dim=1)
