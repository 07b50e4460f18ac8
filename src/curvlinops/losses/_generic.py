"""Any other loss, through autograd."""

import re
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from curvlinops._backward import grad
from curvlinops._differences import Vectors, misfits
from curvlinops._foreign import foreign_parts, not_differentiable
from curvlinops._hashed import Draws
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._spaces import rounding
from curvlinops._substitutes import Watched
from curvlinops.losses._loss import (
    Loss,
    Number,
    check_reduction,
    check_samples,
    describe,
    is_tensor,
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
        :meth:`Loss.sample_gradients`. Called row by row of the output's first axis, if
        targets are a tensor that can be cut so.

    Raises
    ------
    ValueError
        If ``function`` returns anything but a 0-d tensor.
    NotImplementedError
        For a factor, and for samples without ``sampler``.

    Examples
    --------
    >>> f, y, u = torch.tensor([[0.5, 2.0], [0.0, 0.0], [1.0, 1.0]])
    >>> from torch.nn import functional as F
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
        check_reduction(reduction)
        self.function = function
        self.reduction = reduction
        self.count = num_terms
        self.sampler = sampler

    def _evaluate(self, output: Tensor) -> Tensor:
        if self.reduction == "mean" and not self.count:
            return (0 * output).sum()  # no terms, where a mean is NaN
        with Watched():
            value = self.function(output, self.target)
        if not is_tensor(value) or value.ndim:
            raise ValueError(
                f"The loss function returned {describe(value)}, not a 0-d tensor: use "
                ".mean() for reduction 'mean', or .sum() for reduction 'sum'."
            )
        return value * self.count if self.reduction == "mean" else value

    @property
    def is_flat(self) -> bool:
        """Whether the Hessian is zero here, times a vector without a pattern.

        Not if a function of the user's may have lost it.
        """
        leaf = self.output.detach().requires_grad_()
        try:
            with torch.enable_grad():
                if foreign_parts(self._evaluate(leaf)):
                    return False
            leaf, gradient = self._differentiate(create_graph=True)
            if not gradient.requires_grad:
                return True
            u = torch.arange(1, leaf.numel() + 1, dtype=leaf.dtype, device=leaf.device)
            u = u.sin().view_as(leaf)
            (product,) = grad(gradient, leaf, u, materialize_grads=True)
        except Exception as error:  # whatever a loss raises for an output without graph
            raise_if_out_of_memory(error)
            return False
        return not bool(product.any())

    @cached_property
    def _recording(self) -> tuple[Tensor, Tensor]:
        leaf, gradient = self._differentiate(create_graph=True)
        if names := foreign_parts(self._evaluate(leaf)):
            self._compare_with_differences(leaf, gradient, names)
        return leaf, gradient

    def _compare_with_differences(
        self, leaf: Tensor, gradient: Tensor, names: list[str]
    ) -> None:
        """Raise if the gradient's graph lacks a part of the Hessian."""

        def evaluate(tensors: Vectors, _: bool) -> tuple[Tensor, Vectors]:
            (f,) = (t.requires_grad_() for t in tensors)
            value = self._evaluate(f)
            return value, torch.autograd.grad(value, f)

        def multiply(V: list[Tensor]) -> Vectors:
            if not gradient.requires_grad:
                return [torch.zeros_like(v) for v in V]
            return grad(gradient, leaf, V, retain_graph=True, materialize_grads=True)

        eps = rounding(leaf.dtype, leaf.device, convolves=False)
        g = gradient.detach()
        if misfits(evaluate, multiply, [leaf.detach()], [g], lambda w: [w * g], eps):
            raise not_differentiable(
                names,
                "The loss's Hessian is not the derivative of its gradient by the "
                "model's output, by central differences.",
            )

    def _hessian_mul(self, U: Tensor) -> Tensor:
        leaf, gradient = self._recording
        if not gradient.requires_grad or not U.numel():  # linear loss, or nothing to do
            return torch.zeros_like(U)
        options = {"retain_graph": True, "materialize_grads": True}
        backward = partial(_second_derivative, gradient, leaf, **options)
        if U.ndim == leaf.ndim:
            return backward(U)[0]
        vectors = U.reshape(-1, *leaf.shape)
        try:
            (products,) = backward(vectors, is_grads_batched=True)
        except RuntimeError as error:  # an operation that cannot be batched
            raise_if_out_of_memory(error)
            products = torch.stack([backward(v)[0] for v in vectors])
        return products.reshape(U.shape)

    def _factor_mul(self, U: Tensor) -> Tensor:
        raise NotImplementedError(
            "The Hessian of a general loss function has no known factor: use "
            "hessian_mul, a loss the package knows, or register a Loss subclass."
        )

    _factor_transpose_mul = _factor_mul

    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        if self.sampler is None:
            raise NotImplementedError(
                "The likelihood behind a general loss function is unknown: pass "
                "sampler(output, target, num_samples, generator), use a loss the "
                "package knows, or register a Loss subclass."
            )
        f, y = self.output.detach(), self.target
        size = len(f) if f.ndim else 0
        if not is_tensor(y) or y.ndim == 0 or not size or len(y) % size:
            return self.sampler(f, y, num_samples, draws.generator())
        parts, rows = [], zip(f.split(1), y.split(len(y) // size), strict=True)
        for i, (row, target) in enumerate(rows):  # each with numbers of its own
            samples = self.sampler(row, target, num_samples, draws.generator(i))
            check_samples(samples, num_samples, row)
            parts.append(samples)
        return torch.cat(parts, 1)


def _second_derivative(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Differentiate a gradient, and say what is wrong if it cannot be."""
    try:
        return grad(*args, **kwargs)
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        found = _MISSING.search(str(error))
        if found is None:
            raise
        raise RuntimeError(
            f"The loss has no second derivative, which Hessians and GGNs need: torch "
            f"has none for `{found[1]}` ({error}). Compute it from operations that can "
            "be differentiated twice (`torch.logsumexp`, say), or use the empirical "
            'Fisher (`EFLinearOperator`, or `fisher_type="empirical"` of KFAC), which '
            "needs the gradients of the data's losses only."
        ) from error


#: How torch says that it cannot differentiate the backward pass of an operation.
_MISSING = re.compile(r"derivative for .*?(\w+?)(?:_backward)?\W*is not implemented")
