"""Parameters that a loss depends on by itself, not through the model's output."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from curvlinops._hidden import HiddenUses
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._model import Model, graph_leaves
from curvlinops._substitutes import Substitutions, before_call
from curvlinops.losses import Loss


def check_loss_leaves(
    model: Model, loss_func: Callable[..., Any], output: Tensor, target: Any
) -> None:
    """Raise if a loss depends on parameters other than through the model's output.

    Parameters
    ----------
    model : Model
        The model with the parameters to differentiate by.
    loss_func : callable
        The user's loss.
    output : Tensor
        The model's output, with its graph.
    target : Any
        The batch's targets.

    Raises
    ------
    ValueError
        If so. Derivatives here go through the output, and would lack a term.

    Notes
    -----
    Costs one evaluation of the loss.
    """
    if names := parameters_in_loss(model, loss_func, output, target):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(
            f"The loss depends on the parameters {names[:4]}{more} by itself, not only "
            "through the model's output (a weight decay or another penalty, a second "
            "call of the model, or targets with a graph), and derivatives would lack "
            "that term. Let the model return the term as a part of its output; or "
            "leave it out and add its matrix, for the decay `wd / 2 * |p|^2` with "
            "`A + wd * IdentityLinearOperator(A.in_shapes, A.device, A.torch_dtype)`; "
            "or take the Hessian of a `ScalarFunction` of the parameters. What is "
            "meant to be constant must be detached."
        )


def parameters_in_loss(
    model: Model, loss_func: Callable[..., Any], output: Tensor, target: Any
) -> list[str]:
    """Name the parameters that a loss depends on other than through the output.

    These are where its graph ends if the output is a constant: in memory of a given
    parameter, or of the module's own of the same name. What the loss detaches, and its
    own weights, are no such places. Or an autograd function, such as reentrant
    activation checkpointing, uses them out of sight.
    """
    # One output of its own memory, which the loss may write to; and, for a loss that
    # differentiates the output by something else, the one with the model's graph.
    constant = output.detach().requires_grad_().clone()
    through: set[int] = set()
    roots = {id(_root(p)) for p, _ in model.users if not _leaves_traces(p)}
    for f in (constant, output):
        mode, uses = _Differentiable(roots), HiddenUses(model)
        watched = Substitutions(False, uses.see)
        try:
            with (
                warnings.catch_warnings(),
                mode if roots else nullcontext(),
                watched,
            ):
                warnings.simplefilter("ignore")  # what is evaluated anyway warns, too
                value = loss_func(f, target)
                value = value.value() if isinstance(value, Loss) else value
        except Exception as error:  # whatever a user's loss raises for such an output
            raise_if_out_of_memory(error)
            through = set(map(id, graph_leaves(output)))
            continue
        if not isinstance(value, Tensor):
            return []
        leaves = [t for t in graph_leaves(value) if id(t) not in through] + mode.hidden
        named = [*model.users, *((p, name) for name, p in model.aliases.items())]
        names = {n for p, n in named if any(_overlap(t, p) for t in leaves)}
        return sorted(names.union(uses.found))
    return []


#: Attributes that are functions of a tensor; others say what kind of tensor it is.
_FUNCTIONS = [
    getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
]
#: What asks or says something of a tensor itself, not of what it holds.
_OF_ITSELF = [torch.autograd.grad, Tensor.requires_grad_]
#: What refuses tensors that require gradients.
_TO_NUMPY = [Tensor.numpy, Tensor.__array__, Tensor.__dlpack__]


class _Differentiable(TorchFunctionMode):
    """Calls functions with leaves of graphs in place of tensors that are none.

    Parameters
    ----------
    roots : set of int
        The ``id`` of the tensors that are replaced, with their views.

    Attributes
    ----------
    hidden : list of Tensor
        Those that are met in the forward pass of an `autograd.Function`, which builds
        no graph.
    """

    def __init__(self, roots: set[int]) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self._roots = roots
        #: Whether nobody but such a function has turned gradients off.
        self._asked_for = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before_call(func, args, kwargs)
        self._asked_for |= torch.is_grad_enabled()
        if func is torch._C._set_grad_enabled:
            self._asked_for = bool([*args, *kwargs.values()][0])
        if func in _OF_ITSELF or _is_question(func):
            return func(*args, **kwargs)
        change = torch.detach if func in _TO_NUMPY else self._replaced
        args, kwargs = tree_map_only(Tensor, change, (args, kwargs))
        return func(*args, **kwargs)

    def _replaced(self, tensor: Tensor) -> Tensor:
        plain = _unwrapped(tensor)
        if _leaves_traces(plain) or id(_root(plain)) not in self._roots:
            return tensor
        if not torch.is_grad_enabled():
            if self._asked_for and not torch.is_inference_mode_enabled():
                self.hidden.append(plain)
            return tensor
        with temporarily_clear_interpreter_stack():
            leaf = plain.detach().requires_grad_()
            if plain is tensor:
                return leaf
            zero = (leaf - leaf.detach()).sum()
        return tensor + zero


def _is_question(function: Any) -> bool:
    """Whether a function asks what kind of tensor its argument is."""
    return getattr(function, "__name__", "") == "__get__" and function not in _FUNCTIONS


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor that transformations of `torch.func` have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _leaves_traces(tensor: Tensor) -> bool:
    """Whether graphs end in a tensor, or cannot."""
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return (tensor.requires_grad and tensor.is_leaf) or not differentiable


def _root(tensor: Tensor) -> Tensor:
    """Return what a tensor is a view of; one that was detached is a view of none."""
    return tensor if tensor._base is None else tensor._base


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if a is b:
        return True
    dense = a.layout is b.layout is torch.strided and a.numel() and b.numel()
    if not dense or a.device != b.device:
        return False
    (start_a, stop_a), (start_b, stop_b) = _range(a), _range(b)
    return start_a < stop_b and start_b < stop_a


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's memory, and the one after the last."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    entries = 1 + sum((n - 1) * step for n, step in pairs)
    start = tensor.data_ptr()
    return start, start + entries * tensor.element_size()
