"""Which functions use which parameter, with what input: seen in one forward pass.

A :class:`Recorder` watches every call of a torch function. It recognises parameters by
identity, so modules, plain callables and tied weights look alike to it, and nothing is
attached to the user's model. A function that takes parameters has a *handler*, which
calls it, or an equivalent, and notes the :class:`Use`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlinops._data import arguments_in
from curvlinops._order import Order


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
    sums : Tensor or None
        Of a scale or a shift, a combination of the entries of each of its rows.
    place : Order or Tensor or None
        How the result's rows are sorted by data, or the datum of each, -1 for rows that
        no output depends on; if that was found out.
    """

    kind: str
    weight: str
    bias: str | None
    input: Any
    edge: Any
    shape: torch.Size
    options: dict[str, Any] = field(default_factory=dict)
    sums: Tensor | None = None
    place: Order | Tensor | None = None

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
    functions : dict of str to str
        Parameters of which something is computed without any data, such as a weight
        that is not the parameter itself, and the name of the function.
    form : int
        Differs, for all that is known, where calls, shapes or Python's numbers do.
    selects, compares, reads : bool
        Whether some function picks or sorts entries by the content of a tensor, or
        compares it, which may become a matrix that does so; or makes Python's numbers
        of it.
    shapes : list of torch.Size
        Those of the strided tensors that functions were given, in order.
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
        self.functions: dict[str, str] = {}
        #: By ``id``, what is computed of parameters and numbers alone.
        self._made: dict[int, Tensor] = {}
        self.form, self.selects, self.compares, self.reads = 0, False, False, False
        self.shapes: list[torch.Size] = []
        self._transposed: dict[int, tuple[Tensor, str]] = {}
        #: By the nodes of uses, those of their operands; those of the present call's.
        self._operands: dict[Any, set[Any]] = {}
        self._given: set[Any] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and note it if parameters are among its arguments."""
        kwargs = kwargs or {}
        self._look(func, args, kwargs)
        tensors = [*arguments_in((args, *kwargs.values()))]
        self.shapes += [t.shape for t in tensors if t.layout is torch.strided]
        touched = [t for t in tensors if self.owner(t)]
        if not (touched or self._made) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        handler = self._handlers.get(func) if touched else None
        result, before = NotImplemented, len(self.uses)
        if handler is not None and _fits(handler, args, kwargs):
            self._given = _nodes(t for t in tensors if not self.owner(t))
            result = handler(self, func, *args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            if any(t.requires_grad for t in arguments_in([result])):
                for tensor in touched:
                    self.unknown.setdefault(str(self.owner(tensor)), _name_of(func))
        if func is not Tensor.expand:  # whose result has an axis for data
            made = [t for t in arguments_in([result]) if t.requires_grad]
            made = [t for t in made if not self.owner(t)]
            alone = all(self.owner(t) or id(t) in self._made for t in tensors)
            changes = [use.kind for use in self.uses[before:]] == ["elementwise"]
            if made and (alone or (changes and touched[0].shape == made[0].shape)):
                self._made |= {id(t): t for t in made}
                for tensor in touched:
                    self.functions.setdefault(str(self.owner(tensor)), _name_of(func))
        return result

    def _look(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what the order of rows may depend on."""
        name = getattr(func, "__name__", "").rstrip("_")
        self.form = hash((self.form, func, _form_of(args), _form_of(kwargs)))
        self.reads |= name in _READING
        self.compares |= name.lstrip("_") in _COMPARING
        by_tensor = name in _SELECTING_BY and any(
            map(torch.is_tensor, arguments_in(args[1:]))
        )
        self.selects |= by_tensor or name in _SELECTING

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
        **options: Any,
    ) -> Tensor:
        """Note a use with input ``x`` and result ``y``; return the result."""
        name, added = self.owner(weight), self.name(bias)
        assert name is not None
        edge = get_gradient_edge(y)
        use = Use(kind, name, added, x.detach(), edge, y.shape, options)
        if "size" in options and kind == "elementwise":
            rows = rows_without(y.detach(), options["size"])
            weights = torch.arange(1, rows.shape[-1] + 1, device=y.device).cos()
            use.sums = rows @ weights.to(rows.dtype)
        self.uses.append(use)
        self._operands[edge.node] = self._given | _nodes([x])
        self._given |= {edge.node}  # a handler may go on with this result
        return y

    def check_complete(self, output: Tensor) -> None:
        """Note as unknown what leads from the output to a parameter beside the uses.

        Uses that the output does not depend on are forgotten.

        Of a use, the graph is followed to what its function was given, not to its
        parameters: those that are reached nevertheless have a share in the output that
        no use accounts for. So it is with custom autograd functions, which are no torch
        functions, with derivatives by the input that a model takes, which multiply by
        its weights once more, and with views of a result that are changed in place,
        where the result is no longer where it was in the graph.
        """
        stack = [(node, "the output") for node in _nodes([output])]
        seen: set[Any] = set()
        while stack:
            node, user = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            name = self.name(getattr(node, "variable", None))
            if name is not None:
                self.unknown.setdefault(name, user)
            inner = [n for n, _ in node.next_functions]
            if len(inner) > 1 or isinstance(node, BackwardCFunction):
                user = node.name()  # not that of a view or a transpose in between
            behind = self._operands.get(node, inner)
            stack += [(n, user) for n in behind if n is not None]
        self.uses = [use for use in self.uses if use.edge.node in seen]
        self._operands, self._given, self._made = {}, set(), {}


def _name_of(func: Any) -> str:
    return getattr(func, "__name__", repr(func))


def rows_without(x: Tensor, size: Sequence[int]) -> Tensor:
    """Put the axes along which a parameter of a size is broadcast in front.

    The others are flattened, and the last.
    """
    missing = x.ndim - len(size)
    kept = [missing + i for i, length in enumerate(size) if length != 1]
    if not kept:
        return x.unsqueeze(-1)
    return x.movedim(kept, tuple(range(-len(kept), 0))).flatten(-len(kept))


#: Methods of tensors that tell Python about their content.
_READING = {
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("__bool", "__int", "__index", "__float", "__array", "__contains"),
}
_COMPARING = {
    *("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal"),
    *("less_equal", "not_equal", "isin", "isclose", "sign", "heaviside"),
}
#: Functions whose result's entries come from places that a tensor's content tells, ...
_SELECTING = {
    *("index_select", "gather", "take", "take_along_dim", "masked_select", "nonzero"),
    *("argwhere", "sort", "argsort", "topk", "msort", "argmax", "argmin", "bincount"),
    *("scatter", "scatter_add", "scatter_reduce", "masked_scatter", "put", "bucketize"),
    *("index_add", "index_copy", "index_put", "index_reduce", "searchsorted"),
    *("_pack_padded_sequence", "segment_reduce", "nested_tensor", "one_hot"),
}
#: ... and those that do so if they are given another tensor.
_SELECTING_BY = {"__getitem", "__setitem", "repeat_interleave", "tensor_split"}


def _form_of(value: Any) -> Any:
    """Return what is to be the same in two calls whose rows are sorted alike."""
    if isinstance(value, Tensor):
        strided = value.layout is torch.strided
        return value.shape if strided else (value.layout, str(value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(map(_form_of, value))
    if isinstance(value, dict):
        return tuple((key, _form_of(v)) for key, v in value.items())
    if isinstance(value, slice):
        return tuple(map(_form_of, (value.start, value.stop, value.step)))
    return value if isinstance(value, (int, str, type(None))) else type(value)


def _nodes(tensors: Iterable[Tensor]) -> set[Any]:
    """Return where the gradients by tensors are in the graph, if they have any."""
    return {get_gradient_edge(t).node for t in tensors if t.requires_grad}


def _fits(handler: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a handler takes such arguments, and sees tensors as they are."""
    try:
        signature(handler).bind(None, None, *args, **kwargs)
    except TypeError:  # unusual keywords
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(map(wrapped, arguments_in((args, *kwargs.values()))))
