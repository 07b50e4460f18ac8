"""Record one product as a list of tensor operations, and replay only what it needs.

A product with a batch's matrix is linear in its vectors and always runs the same
operations. :func:`record` watches one of them below autograd, keeps the calls whose
inputs depend on the vectors, and turns them into straight-line code in which
everything else is a constant that has been computed already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
)

from curvlinops._agreement import balanced, random_like, same_operations_agree
from curvlinops._cuda_graph import CapturedProgram, captured
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._policy import POLICY
from curvlinops._program import Call, Memory, Program, Slot, leaves, replaced
from curvlinops._spaces import rounding

T = TypeVar("T")

Product = Callable[[list[Tensor]], Sequence[Tensor]]


class Unrecordable(Exception):
    """A product does something that cannot be replayed safely."""


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


def recording() -> bool:
    """Whether this thread is recording a product."""
    return isinstance(_get_current_dispatch_mode(), _Recorder)


class Route:
    """How one batch's product is computed: plainly at first, then by replay.

    After ``record_after`` products, one with random vectors is recorded. The recording
    is trusted if it gives the plain product with the user's vectors: work that went
    unseen, hence was taken for constant, would not fit them.
    """

    def __init__(
        self, record_after: int = POLICY.record_early, convolves: bool = True
    ) -> None:
        self._record_after, self._convolves = record_after, convolves
        #: The recording, once there is a trusted one, ...
        self.program: Program | None = None
        #: ... and the same as CUDA graphs, by the number of columns.
        self.captured: dict[int, CapturedProgram] = {}
        self._widths: set[int] = set()
        self._refused = False
        self._vectorises: bool | None = None
        self._products = 0

    @property
    def settled(self) -> bool:
        """Whether no more recordings are tried."""
        return self.trusted or self._refused

    @property
    def held(self) -> list[Tensor]:
        """The tensors that recordings keep."""
        return self.program.constants if self.program else []

    @property
    def graph_bytes(self) -> int:
        """Bytes that CUDA graphs take beside them."""
        return sum(graph.nbytes for graph in list(self.captured.values()))

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
        if (program := self.captured.get(1) or self.program) is not None:
            return program(vectors)
        plain = product(vectors)
        self._products += 1
        if self._products > self._record_after and not self._refused:
            self._record(product, vectors, plain)
        return plain

    def _record(
        self, product: Product, vectors: list[Tensor], plain: Sequence[Tensor]
    ) -> None:
        program = _verified(product, vectors, plain, self._convolves)
        if program is not None:
            self._capture(program, program, vectors, plain)
        # Never taken back, as other threads may rely on it.
        self.program = program or self.program
        self._refused = program is None

    def _capture(
        self,
        program: Program,
        run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        vectors: Sequence[Tensor],
        plain: Sequence[Tensor],
        width: int = 1,
    ) -> None:
        """Keep a CUDA graph of what a program does with so many columns."""
        if program.capturable and all(v.is_cuda for v in vectors):
            graph, eps = captured(run, vectors), _eps(vectors, self._convolves)
            if graph is not None and same_operations_agree(
                graph(vectors), plain, eps, 0.75, run, [*vectors]
            ):
                self.captured[width] = graph

    def _multiply_several(
        self, product: Product, vectors: list[Tensor]
    ) -> Sequence[Tensor]:
        width = len(vectors[0])
        if (graph := self.captured.get(width)) is not None and width > 1:
            return graph(vectors)
        if not (self.trusted or self._refused):
            first = [v[0] for v in vectors]
            self._record(product, first, product(first))
        if (program := self.program) is None:
            return product(vectors)
        if self._vectorises is None:
            self._vectorises = _vectorises(program, vectors, self._convolves)
        if self._vectorises:
            results = program.vectorised(vectors)
            if width in self._widths:  # asked for again
                self._capture(program, program.vectorised, vectors, results, width)
            self._widths.add(width)
            return results
        single = self.captured.get(1) or program
        columns = [single([v[k] for v in vectors]) for k in range(width)]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]


def _vectorises(program: Program, vectors: list[Tensor], convolves: bool) -> bool:
    """Whether a program with several vectors gives what it gives with each."""
    pair = random_like([v[:1].expand(2, *v.shape[1:]) for v in vectors])
    eps = _eps(vectors, convolves)
    try:
        several = program.vectorised(pair)
    except RuntimeError as error:  # an operation cannot be vectorised
        raise_if_out_of_memory(error)
        return False
    return all(
        same_operations_agree(
            [p[k] for p in several], program(column), eps, 0.5, program, column
        )
        for k, column in enumerate([v[k] for v in pair] for k in range(2))
    )


def _eps(vectors: Sequence[Tensor], convolves: bool) -> float:
    return rounding(vectors[0].dtype, vectors[0].device, convolves)


def _verified(
    product: Product, vectors: list[Tensor], plain: Sequence[Tensor], convolves: bool
) -> Program | None:
    """Record a product with random vectors; return it if it gives ``plain``.

    And if no part of it was taken for constant, which it would give with zeros, too.
    """
    others, eps = random_like(vectors), _eps(vectors, convolves)
    if [v.shape for v in vectors] == [p.shape for p in plain]:
        others = balanced(others, plain)
    try:
        recorded, program = record(product, others)
        same = same_operations_agree(
            program(others), recorded, eps, 0.75, product, others
        )
        same = same and same_operations_agree(
            program(vectors), plain, eps, 0.75, product, vectors
        )
        zeros = [*map(torch.zeros_like, vectors)]
        same = same and not any(bool(p.any()) for p in program(zeros))
        return program if same else None
    except Exception as error:  # whatever an operation raises when watched or replayed
        raise_if_out_of_memory(error)
        return None


def with_memory(values: Any) -> Any:
    """Put zeros in place of forward mode's zeros, which have no memory.

    Below a dispatch mode, torch's operations would go there all the same, and crash.
    """
    if not any(isinstance(t, Tensor) and t._is_zerotensor() for t in leaves(values)):
        return values

    def filled(t: Tensor) -> Tensor:
        zero = t._is_zerotensor()
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if zero else t

    return replaced(values, Tensor, filled)


class Watcher(TorchDispatchMode):
    """Sees every tensor operation of a thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Wrapping this mode for torch.compile would import it all: a second.
        return False


class _ByTensor(Generic[T]):
    """Values by tensor, which are dropped with it.

    Like torch's `WeakTensorKeyDictionary`, whose keys are objects of their own with
    comparisons in Python, in a fifth of the time.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Tensor], T]] = {}

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        # No Python code when a tensor goes: an interrupt in there would be lost.
        gone = partial(self._entries.pop, id(tensor))
        self._entries[id(tensor)] = ref(tensor, gone), value

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def get(self, tensor: Tensor) -> T | None:
        """Return a tensor's value."""
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def pop(self, tensor: Tensor) -> T | None:
        """Return a tensor's value and drop it."""
        entry = self._entries.pop(id(tensor), None)
        return None if entry is None else entry[1]


class _Recorder(Watcher):
    """Watches a product at the level of ATen operations."""

    def __init__(self, vectors: list[Tensor]) -> None:
        super().__init__()
        self._slots: _ByTensor[Slot] = _ByTensor()
        # How the constants that can be made again were made.
        self._created: _ByTensor[tuple[Any, Any, Any]] = _ByTensor()
        # Tensors that calls wrote into, held so that no storage address is reused.
        self._written: dict[int, Tensor] = {}
        self._calls: list[Call] = []
        self._count = 0
        self._inputs = [self._new_slot(v, Memory(owned=False)) for v in vectors]

    def _new_slot(self, tensor: Tensor, memory: Memory) -> Slot:
        slot = Slot(self._count, tensor, memory)
        self._count += 1
        self._slots[tensor] = slot
        return slot

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args = with_memory(args)
        kwargs = {key: with_memory(value) for key, value in (kwargs or {}).items()}
        values = leaves(args) + leaves([*kwargs.values()])
        tensors = [t for t in values if isinstance(t, Tensor)]
        if not any(t in self._slots for t in tensors):
            return self._constant(func, args, kwargs, tensors)
        if func in _ALIASES:
            result = func(*args, **kwargs)
            self._slots[result] = self._reference(args[0])
            return result
        if func._schema.is_mutable:
            self._adopt_targets(func, args, kwargs)
        slots = replaced(args, Tensor, self._reference)
        options = {k: replaced(v, Tensor, self._reference) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        is_sequence = isinstance(result, (tuple, list))
        results = result if is_sequence else [result]
        memories = {_storage(t): self._memory_of(t) for t in tensors}
        outputs = [self._output(t, memories) for t in results]
        self._calls.append(Call(func, slots, options, outputs, is_sequence))
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
                self._created.pop(tensor)
        elif isinstance(result, Tensor) and (not tensors or func in _FACTORIES):
            self._created[result] = (func, args, kwargs)
        return result

    def _output(self, value: Any, memories: dict[int, Memory]) -> Slot | None:
        """Return the slot of a call's result, which may be a view of others."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise Unrecordable("reads numbers from a tensor that depends on the vector")
        if (slot := self._slots.get(value)) is not None:
            return slot
        memory = memories.setdefault(_storage(value), Memory(owned=True))
        return self._new_slot(value, memory)

    def _memory_of(self, tensor: Tensor) -> Memory:
        slot = self._slots.get(tensor)
        return Memory(owned=False) if slot is None else slot.memory

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
            for target in leaves(given.get(argument.name)):
                if not isinstance(target, Tensor):
                    continue
                if target not in self._slots:
                    self._adopt(target)
                self._written[target.untyped_storage().data_ptr()] = target

    def _adopt(self, target: Tensor) -> None:
        """Move a constant's creation into the program."""
        made = self._created.pop(target)
        if made is None:
            raise Unrecordable("writes into a tensor from outside the product")
        func, args, kwargs = made
        slot = self._new_slot(target, Memory(owned=False))
        self._calls.append(Call(func, args, kwargs, [slot], False))

    def compile(self, results: list[Any]) -> Program:
        """Turn the recorded calls into a function."""
        if not all(isinstance(t, Tensor) for t in results):
            raise Unrecordable("returns something else than tensors")
        outputs = [self._reference(t) for t in results]
        return Program(self._inputs, self._calls, outputs)


def _storage(tensor: Tensor) -> int:
    """Return a number that only tensors that share memory have in common."""
    if tensor.layout is not torch.strided:
        return -id(tensor)
    return tensor.untyped_storage()._cdata


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
