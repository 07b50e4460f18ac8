"""Record one product as a list of tensor operations, and replay only what it needs.

A product with a batch's matrix is linear in its vectors and always runs the same
operations. :func:`record` watches one of them below autograd, keeps the calls whose
inputs depend on the vectors, and turns them into straight-line code in which
everything else is a constant that has been computed already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

Product = Callable[[list[Tensor]], Sequence[Tensor]]


class Unrecordable(Exception):
    """A product does something that cannot be replayed safely."""


class Program:
    """Straight-line code of a product.

    Parameters
    ----------
    run : callable
        Maps vectors to the product's tensors.
    constants : list of Tensor
        The tensors it holds.
    num_calls : int
        Number of tensor operations it runs.
    """

    def __init__(
        self,
        run: Callable[..., tuple[Tensor, ...]],
        constants: list[Tensor],
        num_calls: int,
    ) -> None:
        self._run, self.constants, self.num_calls = run, constants, num_calls

    def __call__(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Multiply vectors in parameter shapes."""
        with torch.no_grad():
            return self._run(*vectors)

    def vectorised(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Multiply vectors with a leading dimension, one per index of it."""
        with torch.no_grad():
            return torch.func.vmap(self._run)(*vectors)


def record(product: Product, vectors: list[Tensor]) -> tuple[list[Tensor], Program]:
    """Run a product and record it.

    Parameters
    ----------
    product : callable
        Linear function of its vectors, run as it is.
    vectors : list of Tensor
        The vectors to run it with.

    Returns
    -------
    list of Tensor, Program
        The product, and the code to replay it with other vectors.

    Raises
    ------
    Unrecordable
        If the product writes into a tensor that it did not create, or returns
        something else than tensors.

    Notes
    -----
    Tensors are held weakly while recording, so that peak memory is that of the
    product and of the constants found. Calls whose result nobody uses are dropped,
    unless they write into a tensor; of the results of a convolution's backward pass,
    only the used ones are asked for.
    """
    # Fresh tensors, so that nothing else can share their storage.
    vectors = [v.clone() for v in vectors]
    with _Recorder(vectors) as recorder:
        results = list(product(vectors))
    return results, recorder.compile(results)


#: Plain products of a batch before one is recorded.
RECORD_AFTER = 1


class Route:
    """How one batch's product is computed: plainly at first, then by replay.

    After the first :data:`RECORD_AFTER` products, one with random vectors is recorded.
    The recording is trusted if it gives the plain product with the user's vectors:
    work that went unseen, hence was taken for constant, would not fit them.
    """

    def __init__(self) -> None:
        #: The recording, once there is a trusted one.
        self.program: Program | None = None
        self._refused = False
        self._vectorises: bool | None = None
        self._products = 0

    @property
    def trusted(self) -> bool:
        """Whether products are replayed."""
        return self.program is not None

    def multiply(
        self, product: Product, vectors: list[Tensor], several: bool
    ) -> Sequence[Tensor]:
        """Return the product with vectors, which have a leading axis if ``several``."""
        if several:
            return self._multiply_several(product, vectors)
        if (program := self.program) is not None:
            return program(vectors)
        plain = product(vectors)
        self._products += 1
        if self._products > RECORD_AFTER and not self._refused:
            program = _verified(product, vectors, plain)
            # Never taken back, as other threads may rely on it.
            self.program = program or self.program
            self._refused = program is None
        return plain

    def _multiply_several(
        self, product: Product, vectors: list[Tensor]
    ) -> Sequence[Tensor]:
        for column in range(2):
            if not (self.trusted or self._refused):
                self.multiply(product, [v[column] for v in vectors], False)
        if (program := self.program) is None:
            return product(vectors)
        if self._vectorises is None:
            self._vectorises = _vectorises(program, vectors)
        if self._vectorises:
            return program.vectorised(vectors)
        columns = [program([v[k] for v in vectors]) for k in range(len(vectors[0]))]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]


def _vectorises(program: Program, vectors: list[Tensor]) -> bool:
    """Whether a program with several vectors gives what it gives with each."""
    try:
        several = program.vectorised(vectors)
    except RuntimeError:  # an operation cannot be vectorised
        return False
    return _close([p[0] for p in several], program([v[0] for v in vectors]), 0.5)


def _verified(
    product: Product, vectors: list[Tensor], plain: Sequence[Tensor]
) -> Program | None:
    """Record a product with random vectors; return it if it gives ``plain``."""
    generator = torch.Generator(vectors[0].device).manual_seed(20260101)
    others = [
        torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
        for v in vectors
    ]
    try:
        _, program = record(product, others)
        return program if _close(program(vectors), plain, 0.75) else None
    except Exception:  # whatever an operation raises when watched or replayed
        return None


def _close(a: Sequence[Tensor], b: Sequence[Tensor], exponent: float) -> bool:
    """Whether two products agree up to ``eps ** exponent`` of the largest entry."""
    scale = max(float(t.abs().max()) for t in b if t.numel())
    gap = max(
        float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()
    )
    return gap <= torch.finfo(b[0].dtype).eps ** exponent * scale


class _Slot:
    """A tensor of the recorded product that depends on the vectors."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"t{self.number}"


class _Call:
    """One recorded operation; tensors that depend on the vectors are slots."""

    def __init__(
        self, func: Any, args: Any, kwargs: Any, outputs: list[Any], is_sequence: bool
    ) -> None:
        self.func, self.args, self.kwargs, self.outputs = func, args, kwargs, outputs
        self.is_sequence = is_sequence
        self.mutates = func._schema.is_mutable

    def slots(self) -> list[_Slot]:
        """Return the slots that the call reads."""
        flat, _ = tree_flatten((self.args, self.kwargs))
        return [value for value in flat if isinstance(value, _Slot)]


class _Recorder(TorchDispatchMode):
    """Watches a product at the level of ATen operations."""

    def __init__(self, vectors: list[Tensor]) -> None:
        super().__init__()
        self._slots = WeakTensorKeyDictionary()
        # How the constants that can be made again were made.
        self._created = WeakTensorKeyDictionary()
        # Tensors that calls wrote into, held so that no storage address is reused.
        self._written: dict[int, Tensor] = {}
        self._calls: list[_Call] = []
        self._count = 0
        self._inputs = [self._new_slot(v) for v in vectors]

    def _new_slot(self, tensor: Tensor) -> _Slot:
        slot = _Slot(self._count)
        self._count += 1
        self._slots[tensor] = slot
        return slot

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Wrapping this mode for torch.compile would import it all: a second.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        if not any(t in self._slots for t in tensors):
            return self._constant(func, args, kwargs, tensors)
        if func in _ALIASES:
            result = func(*args, **kwargs)
            self._slots[result] = self._slots[args[0]]
            return result
        if func._schema.is_mutable:
            self._adopt_targets(func, args, kwargs)
        slots = tree_map_only(Tensor, self._reference, args)
        options = tree_map_only(Tensor, self._reference, kwargs)
        result = func(*args, **kwargs)
        is_sequence = isinstance(result, (tuple, list))
        outputs = [self._output(t) for t in (result if is_sequence else [result])]
        self._calls.append(_Call(func, slots, options, outputs, is_sequence))
        return result

    def _constant(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> Any:
        """Run a call that depends on no vector."""
        if self._written:
            for tensor in tensors:
                self._require_unwritten(tensor)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            # Cannot be made again by the call that made it.
            for tensor in tensors:
                self._created.pop(tensor, None)
        elif isinstance(result, Tensor) and (not tensors or func in _FACTORIES):
            self._created[result] = (func, args, kwargs)
        return result

    def _output(self, value: Any) -> _Slot | None:
        """Return the slot of a call's result."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise Unrecordable("reads numbers from a tensor that depends on the vector")
        return self._slots.get(value) or self._new_slot(value)

    def _reference(self, tensor: Tensor) -> Any:
        slot = self._slots.get(tensor)
        if slot is None:
            self._require_unwritten(tensor)
        return tensor if slot is None else slot

    def _require_unwritten(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return  # no other tensor is a view of it
        if tensor.untyped_storage().data_ptr() in self._written:
            raise Unrecordable("reads a view of a tensor that has been written to")

    def _adopt_targets(self, func: Any, args: Any, kwargs: Any) -> None:
        """Make what a call writes into part of the program, if it is not yet."""
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            flat, _ = tree_flatten(given.get(argument.name))
            for target in flat:
                if not isinstance(target, Tensor):
                    continue
                if target not in self._slots:
                    self._adopt(target)
                self._written[target.untyped_storage().data_ptr()] = target

    def _adopt(self, target: Tensor) -> None:
        """Move a constant's creation into the program."""
        made = self._created.pop(target, None)
        if made is None:
            raise Unrecordable("writes into a tensor from outside the product")
        func, args, kwargs = made
        self._calls.append(_Call(func, args, kwargs, [self._new_slot(target)], False))

    def compile(self, results: list[Any]) -> Program:
        """Turn the recorded calls into a function."""
        if not all(isinstance(t, Tensor) for t in results):
            raise Unrecordable("returns something else than tensors")
        outputs = [self._reference(t) for t in results]
        calls = _without_dead_calls(self._calls, outputs)
        return _compiled(self._inputs, calls, outputs)


#: Operations whose result is their argument, as far as values go.
_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}

#: Operations that make a tensor from nothing but the shape of another.
_FACTORIES = {
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.ones_like.default,
}


def _without_dead_calls(calls: list[_Call], outputs: list[Any]) -> list[_Call]:
    """Drop calls that neither write nor contribute to the outputs."""
    used = {o.number for o in outputs if isinstance(o, _Slot)}
    alive: list[_Call] = []
    for call in reversed(calls):
        numbers = [o.number for o in call.outputs if o is not None]
        if not call.mutates and not used.intersection(numbers):
            continue
        used.update(slot.number for slot in call.slots())
        alive.append(call)
    for call in alive:
        if call.func is torch.ops.aten.convolution_backward.default:
            # (input, weight, bias) are computed as the last argument asks.
            wanted = [o is not None and o.number in used for o in call.outputs]
            mask = [a and b for a, b in zip(call.args[-1], wanted, strict=True)]
            call.args = (*call.args[:-1], mask)
    return alive[::-1]


def _compiled(inputs: list[_Slot], calls: list[_Call], outputs: list[Any]) -> Program:
    """Write and compile the straight-line code of a program."""
    constants: dict[str, Any] = {}

    def name(value: Any) -> str:
        if isinstance(value, _Slot):
            return repr(value)
        if isinstance(value, (list, tuple)) and _has_slot(value):
            return "[" + ", ".join(map(name, value)) + "]"
        if isinstance(value, (bool, int)) or value is None:
            return repr(value)
        constants[f"c{len(constants)}"] = value
        return f"c{len(constants) - 1}"

    last_use = {slot.number: i for i, c in enumerate(calls) for slot in c.slots()}
    kept = {o.number for o in outputs if isinstance(o, _Slot)}
    lines = []
    for i, call in enumerate(calls):
        arguments = [name(a) for a in call.args]
        arguments += [f"{key}={name(a)}" for key, a in call.kwargs.items()]
        targets = [f"t{o.number}" if o is not None else "_" for o in call.outputs]
        left = ", ".join(targets) + ("," if call.is_sequence else "")
        assign = f"{left} = " if targets else ""
        # A view of the recorded layout may be none of a vectorised one.
        func = torch.reshape if call.func is torch.ops.aten.view.default else call.func
        lines.append(f"{assign}{name(func)}({', '.join(arguments)})")
        seen = {s.number for s in call.slots()} | {
            o.number for o in call.outputs if o is not None
        }
        done = sorted(n for n in seen if last_use.get(n, -1) <= i and n not in kept)
        if done:
            lines.append("del " + ", ".join(f"t{n}" for n in done))
    returned = "".join(f"{name(o)}, " for o in outputs)
    source = f"def run({', '.join(map(repr, inputs))}):\n    " + "\n    ".join(
        [*lines, f"return ({returned})"]
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, "<recorded product>", "exec"), constants, namespace)
    flat, _ = tree_flatten(list(constants.values()))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    return Program(namespace["run"], tensors, len(calls))


def _has_slot(value: Any) -> bool:
    flat, _ = tree_flatten(value)
    return any(isinstance(v, _Slot) for v in flat)
