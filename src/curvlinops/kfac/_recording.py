"""Which functions use which parameter, with what input: seen in one forward pass.

A :class:`Recorder` watches every call of a torch function. It recognises parameters by
identity, so modules, plain callables and tied weights look alike to it, and nothing is
attached to the user's model. A function that takes parameters has a *handler*, which
calls it, or an equivalent, and notes the :class:`Use`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlinops._model import graph_nodes


@dataclass
class Use:
    """One call of a function with a parameter.

    Attributes
    ----------
    kind : str
        What the function does, a key of :data:`curvlinops.kfac._uses.KINDS`.
    weight : str
        The parameter's name.
    bias : str or None
        Name of a parameter that is added to each row of the function's result.
    input : Tensor or None
        What the weight is multiplied with. ``None`` once it was looked at.
    edge : GradientEdge or None
        Where in the autograd graph the gradient by the function's result is. It stays
        there if the result is changed in place later. ``None`` once the graph is gone.
    shape : torch.Size
        The result's shape.
    options : dict
        What else the geometry depends on.
    axis : int or None
        The axis of the result that counts data, if that was found out.
    counted : tuple of str
        The parameters that an autograd graph of the result leads to because of it.
    """

    kind: str
    weight: str
    bias: str | None
    input: Any
    edge: Any
    shape: torch.Size
    options: dict[str, Any] = field(default_factory=dict)
    axis: int | None = None
    counted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Remember the version of the input's content."""
        self._version = self.input._version

    def take_from(self, data: Iterable[Tensor]) -> None:
        """Take the input from the data, if it is a copy of some: it can be freed."""
        x = self.input
        for t in data:
            if (
                (t.dtype, t.layout, t.numel()) == (x.dtype, x.layout, x.numel())
                and t.is_contiguous()
                and t.data_ptr() != x.data_ptr()
                and x._version == self._version
                and torch.equal(t.view(x.shape), x)
            ):
                self.input = t.detach().view(x.shape)
                self._version = self.input._version
                return

    def checked_input(self) -> Tensor:
        """Return the input, unless it was overwritten in place since."""
        assert self.input is not None
        if self.input._version == self._version:
            return self.input
        raise ValueError(
            f"The input of the layer with parameter {self.weight!r} is overwritten in "
            "place after its use: replace the in-place operation by a plain one."
        )


class Recorder(TorchFunctionMode):
    """Notes the uses of parameters while it is active.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        The parameters to watch for.
    handlers : mapping of functions to callables
        A handler is called as ``handler(recorder, func, *args, **kwargs)`` in place of
        a function that is given a parameter. It returns the function's result, or
        ``NotImplemented`` if it does not understand the call.

    Attributes
    ----------
    uses : list of Use
        What was understood, in order.
    unknown : dict of str to str
        Parameters that were used in another way, and the name of the function.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        handlers: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__()
        self._handlers = handlers
        self._names = {id(p): name for name, p in parameters.items()}
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.uses: list[Use] = []
        self.unknown: dict[str, str] = {}
        self._transposed: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and note it if parameters are among its arguments."""
        kwargs = kwargs or {}
        touched = [t for t in _tensors((args, *kwargs.values())) if self.owner(t)]
        if not touched or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        handler = self._handlers.get(func)
        if handler is not None and _fits(handler, args, kwargs):
            result = handler(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if any(t.requires_grad for t in _tensors([result])):
            for tensor in touched:
                self.unknown.setdefault(
                    str(self.owner(tensor)), getattr(func, "__name__", repr(func))
                )
        return result

    def name(self, tensor: Any) -> str | None:
        """Return the name of a parameter, ``None`` for anything else."""
        return self._names.get(id(tensor)) if torch.is_tensor(tensor) else None

    def owner(self, tensor: Any) -> str | None:
        """Return the name of a parameter or of one that is transposed."""
        known = self._transposed.get(id(tensor))
        return self.name(tensor) if known is None else known[1]

    def transpose(self, weight: Tensor) -> Tensor:
        """Return a weight's transpose, whose uses are the weight's."""
        result, name = weight.T, self.name(weight)
        assert name is not None
        self._transposed[id(result)] = result, name
        return result

    def note(
        self,
        kind: str,
        weight: Tensor,
        x: Tensor,
        y: Tensor,
        bias: Any = None,
        *,
        counted: bool = True,
        **options: Any,
    ) -> Tensor:
        """Note a use with input ``x`` and result ``y``; return the result."""
        name, added = self.owner(weight), self.name(bias)
        assert name is not None
        names = [] if id(weight) in self._transposed else [name]
        names += [] if added is None else [added]
        use = Use(kind, name, added, x.detach(), get_gradient_edge(y), y.shape, options)
        use.counted = tuple(names) if counted else ()
        self.uses.append(use)
        return y

    def check_complete(self, output: Tensor) -> None:
        """Note as unknown what the graph says reaches a parameter, but was not seen.

        Custom autograd functions, for example, are no torch functions. And a view of a
        result that is changed in place is no longer where it was in the graph.
        """
        reached: Counter[str] = Counter()
        users: dict[str, str] = {}
        nodes = set()
        for node in graph_nodes(output):
            nodes.add(node)
            for following, _ in node.next_functions:
                name = self.name(getattr(following, "variable", None))
                if name is not None:
                    reached[name] += 1
                    users[name] = node.name()
        transposed = self._transposed.values()
        seen = Counter(name for W, name in transposed if W.grad_fn in nodes)
        for use in self.uses:
            if use.edge.node in nodes:
                seen.update(use.counted)
            elif use.weight not in use.counted:  # a part of a weight, or its transpose
                seen[use.weight] -= 1
        for name, count in reached.items():
            if count > seen[name]:
                self.unknown.setdefault(name, users[name])


def _fits(handler: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a handler takes such arguments, and sees tensors as they are."""
    try:
        signature(handler).bind(None, None, *args, **kwargs)
    except TypeError:  # unusual keywords
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(map(wrapped, _tensors((args, *kwargs.values()))))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
