"""The user's model as a function of its input, with parameters of our own.

Differentiating needs leaves that require gradients. The user's tensors are never
touched for that: the leaves here are *aliases*, tensors of our own that share the
user's storage, placed in a private copy of the module.
"""

from __future__ import annotations

import difflib
import inspect
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from curvlinops._compiled import plain_name
from curvlinops._copies import UncopiedError, private_copy, warn_about_threads
from curvlinops._data import cloned
from curvlinops._draws import drawn, draws_outside_torch
from curvlinops._failures import refuse_meta
from curvlinops._hooks import hooks_of
from curvlinops._interrupts import FORWARD_MODE, isolated, leave_forward_mode
from curvlinops._isolation import (
    Changes,
    Owner,
    lock_of,
    without_autocast,
)
from curvlinops._reading import PLAIN, Caller, Reading
from curvlinops._spaces import NUMPY_DTYPES, TensorSpace
from curvlinops._substitutes import Substitutions

T = TypeVar("T")

Parameters = Mapping[str, Tensor] | Iterable[nn.Parameter] | str


def named_parameters(  # noqa: C901
    model_func: Callable[..., Any], params: Parameters
) -> dict[str, Tensor]:
    """Return the parameters as a dict after checking that they are the model's.

    Parameters
    ----------
    model_func : nn.Module or callable
        The model.
    params : dict of str to Tensor, list of nn.Parameter, or str
        What the user passed; a string is a name of, or a pattern for, parameters of a
        module.

    Returns
    -------
    dict of str to Tensor
        The same tensors by name, in the same order.

    Raises
    ------
    TypeError
        If the container is neither, an entry is no tensor, or no real floating type.
    ValueError
        If there are none, or one is foreign, repeated, uninitialised, of the wrong
        shape, or differs in dtype or device from the others.
    """
    known: dict[str, Tensor] = {}
    _require_two_arguments(model_func)
    is_module = isinstance(model_func, nn.Module)
    if isinstance(model_func, nn.Module):
        known.update(model_func.named_parameters(remove_duplicate=False))
    if isinstance(params, Mapping):
        named = _in_spelling_of(known, params)
    elif isinstance(params, str):
        if not is_module:
            raise TypeError(
                f"`params` is the pattern {params!r}, but a model given as a plain "
                "callable has no named parameters: pass a dict of names to tensors."
            )
        names = matching_names(params, known)
        # The first name of every tensor, which may have several.
        unique = {id(known[name]): name for name in reversed(names)}
        named = {n: known[n] for n in names if unique[id(known[n])] == n}
    elif isinstance(params, Iterator):
        raise TypeError(
            "`params` is an iterator, which can be read only once. Pass the list "
            "`list(model.parameters())` or the dict `dict(model.named_parameters())`."
        )
    elif isinstance(params, (list, tuple)):
        if not is_module:
            raise TypeError(
                "A list of parameters has no names, which a model given as a plain "
                "callable needs: pass a dict of names to tensors."
            )
        named = _names_of(params, known)
    else:
        raise TypeError(
            "`params` must be a dict of names to tensors or a list of the model's "
            f"parameters, got {type(params).__name__}."
        )
    if not named:
        raise ValueError(
            "`params` is empty: there is nothing to differentiate by. Pass e.g. "
            "`dict(model.named_parameters())`."
        )
    for name, tensor in named.items():
        _check_parameter(name, tensor, known if is_module else None, model_func)
    if not any(tensor.numel() for tensor in named.values()):
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        raise ValueError(
            f"No parameter in `params` has an entry, their shapes are {shapes}: there "
            "is nothing to differentiate by. Add parameters that have."
        )
    _check_alike(named, lambda t: t.dtype, "dtypes", "`model.to(torch.float32)`")
    _check_alike(named, lambda t: t.device, "devices", "`model.to(device)`")
    _check_distinct(named, known)
    others = model_func.named_buffers() if isinstance(model_func, nn.Module) else ()
    refuse_meta([*named.items(), *known.items(), *others])
    return named


def _require_two_arguments(model_func: Callable[..., Any]) -> None:
    """Raise if a plain callable cannot be called as ``model_func(params, X)``."""
    if isinstance(model_func, nn.Module):
        return
    try:
        call = inspect.signature(model_func)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        call.bind({}, None)
    except TypeError as error:
        raise TypeError(
            "A model that is no module is called as `model(params, X)`, but that does "
            f"not fit its signature {call}: {error}. Pass the module, or e.g. "
            "`lambda params, X: torch.func.functional_call(module, params, (X,))`."
        ) from None


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that are equal to a pattern, or else match it, in order.

    Raises
    ------
    ValueError
        If there are none; the message lists close ones.
    """
    names = list(names)
    if pattern in names:
        return [pattern]
    plain = plain_name(pattern)
    found = [name for name in names if fnmatchcase(name, pattern)]
    found = found or [name for name in names if fnmatchcase(plain_name(name), plain)]
    if not found:
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        raise ValueError(
            f"No parameter matches {pattern!r}; "
            + (f"close names: {close}." if close else f"there are {names[:8]}.")
        )
    return found


def _in_spelling_of(
    known: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return parameters with names as the module has them.

    Whether or not a module is compiled, `torch.compile` leaves a trace in the names.
    """
    spelt = {plain_name(name): name for name in known} if known else {}
    return {
        name if name in known else spelt.get(plain_name(str(name)), name): tensor
        for name, tensor in params.items()
    }


def _names_of(params: Iterable[Any], known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Find the names of a module's parameters by identity."""
    names = {id(tensor): name for name, tensor in reversed(known.items())}
    named: dict[str, Tensor] = {}
    for i, tensor in enumerate(params):
        name = names.get(id(tensor))
        if name is None:
            raise ValueError(
                f"Entry {i} of `params` is not a parameter of the model. To evaluate "
                "the model at other values, pass a dict of names to tensors."
            )
        if name in named:
            raise ValueError(
                f"Entry {i} of `params` repeats the parameter {name!r}: pass it once."
            )
        named[name] = tensor
    return named


def _check_parameter(
    name: Any,
    tensor: Any,
    known: dict[str, Tensor] | None,
    model_func: Callable[..., Any],
) -> None:
    if not torch.is_tensor(tensor):
        raise TypeError(
            f"Parameter {name!r} must be a tensor, got {type(tensor).__name__}."
        )
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"Parameter {name!r} is not initialised: run the lazy module once first."
        )
    if tensor.dtype not in NUMPY_DTYPES:
        raise TypeError(
            f"Parameter {name!r} has dtype {tensor.dtype}; derivatives need a real "
            "floating-point type."
            + " Keep real and imaginary part of it, `torch.view_as_real(p)`, as the "
            "parameter, and use `torch.view_as_complex` of that in the model."
            * tensor.is_complex()
        )
    if tensor.is_inference():
        raise ValueError(
            f"Parameter {name!r} was made under `torch.inference_mode()` and cannot "
            "be differentiated: pass a clone made outside of it."
        )
    if known is None:
        return
    if name not in known:
        buffers = dict(model_func.named_buffers())  # type: ignore[attr-defined]
        close = difflib.get_close_matches(str(name), known, n=3)
        raise ValueError(
            f"The model has no parameter {name!r}"
            + (
                ": that is a buffer. Did you pass `model.state_dict()`? Pass "
                "`dict(model.named_parameters())`."
                if name in buffers
                else f"; close names: {close}."
                if close
                else f"; its parameters are {list(known)[:8]}."
            )
        )
    if tensor.shape != known[name].shape:
        raise ValueError(
            f"Parameter {name!r} has shape {tuple(known[name].shape)} in the model, "
            f"but {tuple(tensor.shape)} in `params`."
        )


def _check_alike(
    named: dict[str, Tensor], key: Callable[[Tensor], Any], what: str, cure: str
) -> None:
    found = {key(tensor): name for name, tensor in named.items()}
    if len(found) > 1:
        listing = ", ".join(f"{value} ({name!r})" for value, name in found.items())
        raise ValueError(
            f"The parameters have several {what}: {listing}. Convert the model with "
            f"{cure}, or pass the parameters of one kind only."
        )


def _check_distinct(named: dict[str, Tensor], known: dict[str, Tensor]) -> None:
    seen: dict[int, str] = {}
    for name, tensor in named.items():
        owner = id(known.get(name, tensor))
        if owner in seen:
            raise ValueError(
                f"{seen[owner]!r} and {name!r} are the same (tied) parameter: pass it "
                "once."
            )
        seen[owner] = name


class Model:
    """A model whose chosen parameters are leaves that alias the user's tensors.

    Parameters
    ----------
    model_func : nn.Module or callable
        A module, or a function ``(params_dict, X) -> prediction``.
    params : dict of str to Tensor
        The tensors to differentiate by, as :func:`named_parameters` returns them.
    reading : Reading, optional
        What of its result is the prediction.

    Notes
    -----
    A module is deep-copied with its parameters replaced by aliases: parameters share
    storage with the user's, buffers are copies, and nothing of the user's is changed
    whatever happens. A module that cannot be copied, or whose copy still reaches the
    user's own tensors (a function that holds on to another module, say), is evaluated
    in place with its tensors swapped for the duration of a product, under one lock
    per module.
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
        params: dict[str, Tensor],
        reading: Reading = PLAIN,
    ) -> None:
        self.params, self.reading = params, reading
        self._call = Caller()
        self._entered = _Entered()
        #: Whether the prediction was only a part of the model's last result.
        self.takes_apart = False
        #: Whether products that are not finite are warned about.
        self.warns = True
        self._model_func = model_func
        self._module = model_func if isinstance(model_func, nn.Module) else None
        self._lock = nullcontext() if self._module is None else lock_of(self._module)
        # What is made under `torch.inference_mode()` cannot be differentiated.
        with torch.inference_mode(False), self.exclusive():
            self._start(model_func)

    def _start(self, model_func: Callable[..., Any]) -> None:
        """Create the aliases, and the private copy if there can be one."""
        params = self.params
        self.aliases = {n: nn.Parameter(p.detach()) for n, p in params.items()}
        self.leaves = list(self.aliases.values())
        #: The user's own tensors by name, listed now: later, others may be swapped in.
        self.users = [(p, n) for n, p in params.items()]
        if self._module is not None:
            named = self._module.named_parameters(remove_duplicate=False)
            self.users += [(p, n) for n, p in named if n in params]
        first = self.leaves[0]
        self.space = TensorSpace(
            (p.shape for p in self.leaves), first.dtype, first.device, params
        )
        self._function: Callable[[Any], Any]
        self._held: nn.Module | None = None
        #: Whether graphs serve: by kind, or by kind and batch.
        self.checked_graphs: dict[Hashable, bool] = {}
        #: Whether forward mode has not failed yet. In scripts, it is blind.
        self.forward_mode = self._module is None or not any(
            isinstance(m, torch.jit.ScriptModule) for m in self._module.modules()
        )
        #: Whether there is attention, or may be: there, too, scripts are blind.
        self.attends = self.draws_unseen = not self.forward_mode
        if self._module is None:
            aliases = self.aliases
            self._function = lambda X: model_func(dict(aliases), X)
        else:
            try:
                self._function = private_copy(self._module, self.aliases)
            except UncopiedError as error:
                warn_about_threads(self._module, *error.args)
                self.evaluate_in_place()
        #: Whether there are convolutions, which round differently on a GPU.
        self.convolves = self._module is None or any(
            isinstance(part, nn.modules.conv._ConvNd) for part in self._module.modules()
        )
        #: Whether evaluating all data apart may do and has not failed yet.
        self.by_datum = self.forward_mode and self.keeps_to_itself()
        #: Whether graphs may be freed, since nothing has been seen to keep parts.
        self.may_free = self.keeps_to_itself()

    def behave_like(self, other: Model) -> None:
        """Take over what has been found out about the same module."""
        self.checked_graphs = dict(other.checked_graphs)
        self._call = other._call
        self.forward_mode &= other.forward_mode
        self.by_datum &= other.by_datum
        self.may_free &= other.may_free
        if other._held is not None:
            self.evaluate_in_place()

    def shifted(self, tensors: Sequence[Tensor]) -> Model:
        """Return the same model at other values of its parameters."""
        other = self.anew(dict(zip(self.params, tensors, strict=True)))
        other.behave_like(self)
        return other

    def anew(self, params: dict[str, Tensor] | None = None) -> Model:
        """Return the same model, of which nothing has been found out yet."""
        return Model(self._model_func, params or self.params, self.reading)

    def keeps_to_itself(self) -> bool:
        """Whether evaluations reach nothing of the user's, as hooks may do."""
        if self._module is None or self._held is not None:
            return False
        return not hooks_of(self._module.modules())

    def exclusive(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread swaps the module's tensors."""
        return self._lock

    def evaluate_in_place(self) -> bool:
        """Give up the private copy; return whether that was possible."""
        if self._module is None or self._held is not None:
            return False
        self._held = self._function = self._module
        self.by_datum = self.may_free = False
        return True

    def __call__(self, X: Any, see: Callable[..., None] | None = None) -> Any:
        """Evaluate the model (within :meth:`run`).

        Once more if it turns out to differentiate by itself and uses functions whose
        third derivatives are wrong. A function ``see`` is told of all that is called.
        """
        known = self.checked_graphs
        if self.draws_unseen:
            drawn()
        spare = X if "kernels" in known else cloned(X)
        kernels = Substitutions(not known.get("kernels", True), see)
        outside = draws_outside_torch(known)
        with outside, self._entered.mode, kernels as substitutions:
            output = self._evaluated(X)
        if not substitutions.lacking:
            known.setdefault("kernels", True)
            return output
        known["kernels"] = False
        with self._entered.mode, Substitutions(differentiates=True):
            return self._evaluated(spare)

    def _evaluated(self, X: Any) -> Any:
        """Return the prediction, or what the model returns instead of one."""
        result = self._call(self._function, X)
        prediction = self.reading.tensor(result)
        self.takes_apart = prediction is not result
        return prediction

    @contextmanager
    def evaluated_in(self, mode: Any) -> Iterator[None]:
        """Enter a mode of torch for evaluations of the model, and for nothing else."""
        self._entered.mode = mode
        try:
            yield
        finally:
            del self._entered.mode

    def at(self, X: Any, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate with other tensors in place of the leaves that functions meet."""
        with _Replaced(dict(zip(map(id, self.leaves), tensors, strict=True))):
            return self(X)

    @contextmanager
    def left_as_it_is(self) -> Iterator[None]:
        """Take back what evaluations write into attributes of the private copy."""
        copied: Any = self._function
        parts = [*copied.modules()] if self.by_datum else []
        kept = [vars(part) for part in parts] + [part._buffers for part in parts]
        before = [(attributes, dict(attributes)) for attributes in kept]
        try:
            yield
        finally:
            for attributes, old in before:
                attributes.update(old)
                for name in attributes.keys() - old.keys():
                    del attributes[name]

    @isolated(evaluates=True)
    def run(self, body: Callable[[], T]) -> T:
        """Return ``body()``, run where the model may be evaluated and differentiated.

        Gradients are on, autocast and inference mode are off, attention takes its
        twice differentiable form, and a module that is evaluated in place holds the
        aliases (also while graphs are differentiated: activation checkpointing
        evaluates the model again there).
        """
        device = self.space.device.type
        recurs = device == "cuda" and self._has_recurrence()
        held = self._held
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            without_autocast(device),
            nullcontext() if held is None else lock_of(held),
        ):
            owner = Owner()
            changes = Changes(owner)
            try:
                changes.make(held, self.aliases, self.attends, recurs)
                return body()
            finally:
                self.attends |= changes.attends
                try:
                    changes.undo()
                finally:  # an interrupt may have come in between
                    changes.undo()

    def _has_recurrence(self) -> bool:
        return self._module is not None and any(
            isinstance(m, nn.RNNBase) for m in self._module.modules()
        )

    def directional(
        self, X: Any, tangents: Sequence[Tensor], reached: set[int], wait: bool = False
    ) -> Tensor:
        """Return the output's derivative along ``tangents`` (within :meth:`run`).

        In forward mode, without an autograd graph. This ignores what reverse mode
        treats as constant (the rows of ``padding_idx``, what a model computes under
        `torch.no_grad()`), so the result must be checked against the latter.

        Parameters
        ----------
        X : Any
            The input.
        tangents : sequence of Tensor
            The direction, in parameter shapes.
        reached : set of int
            The ``id`` of every leaf that the output depends on.
        wait : bool, optional
            Whether to wait for other threads that use forward mode.

        Returns
        -------
        Tensor
            The derivative.

        Raises
        ------
        ForwardModeBusyError
            If forward mode is in use: torch has one for the whole process, so that
            other threads cannot enter it meanwhile, either.
        RuntimeError
            If an operation has no derivative in forward mode, or a parameter is used
            where it cannot be perturbed (in compiled code, say).
        """
        if FORWARD_MODE._is_owned():  # type: ignore[attr-defined]
            raise ForwardModeBusyError
        try:
            if not FORWARD_MODE.acquire(blocking=wait):
                raise ForwardModeBusyError
            if forward_ad._current_level >= 0:
                raise ForwardModeBusyError(
                    "This product needs torch's forward mode, which is in use already: "
                    "multiply outside of `torch.autograd.forward_ad.dual_level()`."
                )
            _load_forward_mode()
            perturbed = _Perturbed(
                dict(zip(map(id, self.leaves), tangents, strict=True))
            )
            try:
                with torch.no_grad(), forward_ad.dual_level():
                    with perturbed:
                        output = self(X)
                    value, tangent = forward_ad.unpack_dual(output)
            except BaseException:
                leave_forward_mode()
                raise
            if not reached <= perturbed.met:
                raise RuntimeError("Some parameters are used out of sight.")
            return torch.zeros_like(value) if tangent is None else tangent
        finally:  # an interrupt may have come right after the lock was taken
            if FORWARD_MODE._is_owned():  # type: ignore[attr-defined]
                FORWARD_MODE.release()

    def foreign_leaves(self, output: Tensor) -> list[str]:
        """Name the user's own parameters that an output's graph reaches."""
        own = {id(p): n for p, n in self.users}
        return sorted(
            {own[id(leaf)] for leaf in graph_leaves(output) if id(leaf) in own}
        )

    def uses_frozen(self, X: Any) -> bool:
        """Whether an evaluation uses a parameter of the user's that has no gradient.

        These leave no trace in an output's graph.
        """
        frozen = [p for p, _ in self.users if not p.requires_grad]
        if not frozen:
            return False
        # Without a graph, this evaluation is none that a recorder of uses notes.
        with _Watch(frozen) as watch, torch.no_grad():
            self(X)
        return bool(watch.met)

    def used_without_gradient(self, X: Any) -> list[str]:
        """Name the parameters that an evaluation uses where gradients are off.

        The output's graph does not lead to these.
        """
        with _Watch(self.leaves) as watch:
            self(X)
        return [n for n, p in self.aliases.items() if id(p) in watch.met_without]


class _Entered(threading.local):
    """What a thread's evaluations enter, see :meth:`Model.evaluated_in`."""

    mode: Any = nullcontext()


class _Watch(TorchFunctionMode):
    """Notes which of some tensors functions of torch are called with, by ``id``.

    Attributes
    ----------
    met, met_without : set of int
        All of them, and those that are met where gradients are off.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._ids = set(map(id, tensors))
        self.met: set[int] = set()
        self.met_without: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        if found := self._ids.intersection(map(id, leaves)):
            self.met |= found
            if not torch.is_grad_enabled():
                self.met_without |= found
        return func(*args, **(kwargs or {}))


class ForwardModeBusyError(RuntimeError):
    """Forward mode is in use elsewhere."""


@cache
def _load_forward_mode() -> None:
    """Let torch load what it loads at the first use of forward mode."""
    with warnings.catch_warnings():
        # torch warns that its own code uses this: by a `DeprecationWarning` up to 2.13,
        # then by a `FutureWarning`. As an error, it would leave forward mode half set
        # up. The user's own calls warn as they would.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script\w*` is deprecated")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class _Replaced(TorchFunctionMode):
    """Calls functions with other tensors in place of some.

    Parameters
    ----------
    instead : dict of int to Tensor
        The other tensors by the ``id`` of those whose place they take.
    """

    def __init__(self, instead: dict[int, Tensor]) -> None:
        super().__init__()
        self._instead = instead
        #: The ``id`` of every tensor that was used.
        self.met: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args = map(self._replaced, args)
        kwargs = {key: self._replaced(value) for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if (other := self._instead.get(id(value))) is None:
                return value
            self.met.add(id(value))
            return self._made(value, other)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        return value

    def _made(self, value: Tensor, other: Tensor) -> Tensor:
        return other


class _Perturbed(_Replaced):
    """Calls functions with dual tensors in place of some, within a dual level.

    Parameters
    ----------
    instead : dict of int to Tensor
        Tangents by the ``id`` of their tensor.

    Notes
    -----
    A dual tensor is made for each use: torch copies the tangent to memory laid out as
    the tensor's is, and all copies together would take as much as the parameters.
    """

    def _made(self, value: Tensor, other: Tensor) -> Tensor:
        return forward_ad.make_dual(value, other)


def graph_leaves(output: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that an output's autograd graph ends in."""
    for node in graph_nodes(output):
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf


def graph_nodes(*outputs: Tensor, until: Tensor | None = None) -> Iterator[Any]:
    """Yield every node of the autograd graph behind some tensors once.

    Without those that are found only behind ``until``.
    """
    seen: set[Any] = {None, None if until is None else until.grad_fn}
    stack: list[Any] = [t.grad_fn for t in outputs if t.grad_fn not in seen]
    seen.update(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)
