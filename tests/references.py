"""Dense references in float64, by loops over plain reverse-mode differentiation.

They take the roads that ``curvlinops.examples.functorch`` does not take: a private copy
of the model instead of functional calls, a sum over batches divided by a count from a
table instead of the concatenated data, ``J^T H J`` instead of a linearised model, the
loss of one row after the other instead of unreduced losses. All functions take
``(model_func, loss_func, params, data)`` and return float64 whatever they are given.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial, reduce
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, cat, float64, nn, stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

from curvlinops.examples.functorch import (
    _batch_size,
    _flatten,
    _kind,
    _map,
    _reduction,
    _with_reduction,
)
from curvlinops.losses import as_loss_function


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
        if self.kind is nn.MultiLabelSoftMarginLoss:
            return f.numel() // f.shape[-1]
        if self.kind not in (nn.CrossEntropyLoss, nn.NLLLoss):
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
        if self.kind in (nn.CrossEntropyLoss, nn.NLLLoss):
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


# Kronecker factors, from the definitions: what layers see, and how outputs depend on it


class _Layered(_Evaluated):
    """The same, with the uses of every linear layer, convolution and normalisation."""

    def __init__(self, *built: Any):
        self.uses: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {}
        handle = register_module_forward_hook(self._note)
        try:
            super().__init__(*built)
        finally:
            handle.remove()
        self.place = {id(leaf): i for i, leaf in enumerate(self.leaves)}
        values = built[2].values() if isinstance(built[2], dict) else built[2]
        self.dtype = next(iter(values)).dtype

    def _note(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                use = module, inputs[0], output
                self.uses.setdefault(id(parameter), []).append(use)

    def middle(self, fisher: str, mc_samples: int = 1, seed: int = 0) -> list[Tensor]:
        """Return the matrix between the Jacobians of every batch.

        It is block-diagonal over data. Losses draw samples at predictions in the
        precision of the problem.
        """
        matrices = []
        make_loss = as_loss_function(self.loss_func)
        first_row = 0
        for f, y, size in self.batches():
            z = f.detach().requires_grad_()
            if fisher == "type-2":
                summed = self.summed_loss(z, y, size)
                [g] = differentiate(summed, [z], create_graph=True)
                matrices.append(differentiate(g, [z]))
            elif fisher == "empirical":
                g = differentiate(stack(self.rows(z, y, size)), [z])
                matrices.append(g.T @ g)
            else:
                loss = make_loss(f.detach().to(self.dtype), y)
                loss.first_row = first_row
                samples = loss.sample_gradients(mc_samples, seed).double()
                first_row += len(f)
                u = samples.reshape(mc_samples, size, -1)
                blocks = torch.einsum("sna,snb->nab", u, u) / mc_samples
                matrices.append(torch.block_diag(*blocks))
        return matrices

    def layers(self) -> Iterator[tuple[int, int | None, list[list]]]:
        """Yield places of weight and bias, and the uses in every batch."""
        for key, uses in self.uses.items():
            modules = [module for module, _, _ in uses]
            if key not in self.place or not isinstance(modules[0], LAYERS):
                continue
            if key != id(modules[0].weight):
                continue
            biases = {id(module.bias) for module in modules}
            bias = self.place.get(biases.pop()) if len(biases) == 1 else None
            per = len(uses) // len(self.predictions)
            chunks = [uses[i : i + per] for i in range(0, len(uses), per)]
            yield self.place[key], bias, chunks


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _inputs(module: Any, x: Tensor, N: int) -> Tensor:
    """Return what the rows of a weight are multiplied by, ``[G, N, R, n]``."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, N, -1, x.shape[-1])
    _, *inner = module.weight.shape
    G, n = module.groups, prod(inner)
    # a kernel that is one for a single entry of the patch, and zero for the others
    unit = torch.eye(n, dtype=x.dtype).reshape(n, *inner).repeat(G, *[1] * len(inner))
    patches = module._conv_forward(x, unit, None)
    return patches.reshape(N, G, n, -1).permute(1, 0, 3, 2)


def _outputs(module: Any, J: Tensor, N: int) -> Tensor:
    """Sort derivatives ``[K, *output.shape]`` likewise, ``[K, G, N, R, m]``."""
    if isinstance(module, nn.Linear):
        return J.reshape(len(J), 1, N, -1, J.shape[-1])
    G = module.groups
    return J.reshape(len(J), N, G, J.shape[2] // G, -1).permute(0, 2, 1, 4, 3)


def _covariances(
    risk: _Layered,
    uses: list[list],
    middle: list[Tensor] | None,
    reduced: bool,
    joint: bool,
) -> tuple[Tensor, Tensor]:
    """Return a layer's ``A`` and ``B``, of shape ``[G, n, n]`` and ``[G, m, m]``."""
    A: Any = 0
    B: Any = 0
    count = 0
    for i, (its, f, N) in enumerate(
        zip(uses, risk.predictions, risk.sizes, strict=True)
    ):
        a = cat([_inputs(module, x, N).detach() for module, x, _ in its], dim=2)
        a = cat([a, torch.ones_like(a[..., :1])], dim=-1) if joint else a
        a = a.mean(2, keepdim=True) if reduced else a
        A = A + torch.einsum("gnra,gnrb->gab", a, a)
        count += a.shape[1] * a.shape[2]
        if middle is None:
            continue
        parts = []
        for module, _, s in its:
            J = differentiate(f, [s]).reshape(f.numel(), *s.shape)
            parts.append(_outputs(module, J, N))
        b = cat(parts, dim=3)
        b = b.sum(3, keepdim=True) if reduced else b
        B = B + torch.einsum("kgnra,kl,lgnrb->gab", b, middle[i], b)
    if middle is not None:
        return A / count, B / risk.count
    module, _, _ = uses[0][0]
    m = len(module.weight) // len(A)
    return A / count, torch.eye(m, dtype=A.dtype).expand(len(A), m, m)


def _white_noise(risk: _Layered, leaf: Tensor) -> Tensor:
    """Block of a parameter that scales or shifts, for independent unit gradients."""
    J = cat([differentiate(y, [leaf]) for _, _, y in risk.uses[id(leaf)]])
    return (leaf.numel() * J.square().mean(0)).diag()  # an entry is in a part of them


def _damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=float64))


def _in_eigenbasis(factors: list[Tensor], F: Tensor) -> Tensor:
    """Keep the diagonal of the exact block in the eigenbasis of the factors."""
    Q = reduce(torch.kron, [torch.linalg.eigh(C)[1] for C in factors])
    return Q @ (Q.T @ F @ Q).diagonal().diag() @ Q.T


def _nearest(factors: list[Tensor], F: Tensor) -> Tensor:
    """Take the leading singular triple of the rearranged exact block."""
    m = len(factors[0])
    n = len(F) // m
    squares = F.reshape(m, n, m, n).transpose(1, 2).reshape(m * m, n * n)
    U, s, Vh = torch.linalg.svd(squares, full_matrices=False)
    return torch.kron(s[0] * U[:, 0].reshape(m, m), Vh[0].reshape(n, n))


@_with_math_attention
def _kron(left: Tensor, right: Tensor) -> Tensor:
    # some versions of torch refuse strides that are not the usual ones
    return torch.kron(left.contiguous(), right.contiguous())


def kronecker(
    *built: Any,
    method: str = "kfac",
    fisher: str = "type-2",
    reduced: bool = False,
    joint: bool = False,
    damping: float | None = None,
    **samples: int,
) -> Tensor:
    """Compute a Kronecker-factored matrix of layers, of shape ``(P, P)``.

    Parameters
    ----------
    method : str
        ``"kfac"``, ``"ekfac"`` or ``"kfoc"``.
    fisher, reduced, joint, **samples
        As ``fisher_type``, ``kfac_approx``, ``separate_weight_and_bias``, and
        ``mc_samples`` and ``seed`` of the operators.
    damping
        Added to KFAC's factors, which are inverted then.

    Notes
    -----
    Parameters that scale or shift, and biases that belong to no single weight, have
    their exact block. EKFAC's basis is not unique if an eigenvalue of a factor is
    degenerate. EKFAC itself still is if the exact block is zero on that eigenspace, or
    acts on it as a multiple of the identity; not so for circular convolutions.
    """
    risk = _Layered(*built)
    free = fisher == "forward-only"
    middle = None if free else risk.middle(fisher, **samples)
    stops = accumulate(leaf.numel() for leaf in risk.leaves)
    index = [
        torch.arange(stop - leaf.numel(), stop)
        for leaf, stop in zip(risk.leaves, stops, strict=True)
    ]
    P = sum(map(len, index))
    F = torch.zeros(P, P, dtype=float64)
    for f, M in zip(risk.predictions, middle or (), strict=not free):
        J = differentiate(f, risk.leaves)
        F += J.T @ M @ J / risk.count

    blocks: list[tuple[Tensor, list[Tensor]]] = []  # places of rows, and factors
    others = dict(enumerate(index))
    for weight, bias, uses in risk.layers():
        if method == "kfoc" and not joint:
            bias = None
        with_bias = joint and bias is not None
        As, Bs = _covariances(risk, uses, middle, reduced, with_bias)
        places = others.pop(weight).reshape(len(As), Bs.shape[1], -1)
        if bias is not None:
            column = others.pop(bias).reshape(*places.shape[:2], 1)
            if joint:
                places = cat([places, column], dim=2)
            else:
                blocks += [(c, [B]) for c, B in zip(column, Bs, strict=True)]
        blocks += [(p, [B, A]) for p, A, B in zip(places, As, Bs, strict=True)]
    for i, place in others.items():
        exact = _white_noise(risk, risk.leaves[i]) if free else F[place[:, None], place]
        blocks.append((place, [exact]))

    result = torch.zeros_like(F)
    for place, factors in blocks:
        place = place.flatten()
        rows = place[:, None]
        if method == "ekfac" and not free:
            result[rows, place] = _in_eigenbasis(factors, F[rows, place])
        elif method == "kfoc" and not free:
            result[rows, place] = _nearest(factors, F[rows, place])
        elif damping is not None:
            inverses = [_damped_inverse(factor, damping) for factor in factors]
            result[rows, place] = reduce(_kron, inverses)
        else:
            result[rows, place] = reduce(_kron, factors)
    return result
