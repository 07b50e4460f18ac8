"""Straight-line programs of tensor operations: from recorded calls to Python code.

A program is linear in its vectors. Before it is compiled, calls without use are
dropped. In the code for single vectors, sums with a matrix product become one
operation, and elementwise operations write into operands that nobody needs any more,
since fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, lru_cache, partial
from itertools import count
from math import inf
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from curvlinops._cuda_graph import may_wait

aten = torch.ops.aten


class Memory:
    """Where a tensor of a program and all views of it lie."""

    def __init__(self, owned: bool) -> None:
        #: Whether one of the program's calls created it.
        self.owned = owned


class Slot:
    """A tensor of the recorded product that depends on the vectors."""

    def __init__(self, number: int, tensor: Tensor, memory: Memory) -> None:
        self.number, self.memory = number, memory
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.dense = tensor.layout is torch.strided and tensor.is_contiguous()

    def transpose(self, number: int, dense: bool) -> Slot:
        """Return a matrix's transpose, which lies in the same memory."""
        new = copy(self)
        new.number, new.shape, new.dense = number, self.shape[::-1], dense
        return new

    def __repr__(self) -> str:
        return f"t{self.number}"


class Call:
    """One recorded operation; tensors that depend on the vectors are slots."""

    def __init__(
        self, func: Any, args: Any, kwargs: Any, outputs: list[Any], is_sequence: bool
    ) -> None:
        self.func, self.args, self.kwargs, self.outputs = func, args, kwargs, outputs
        self.is_sequence = is_sequence
        schema = getattr(func, "_schema", None)
        self.mutates = schema is None or schema.is_mutable
        #: The slots that the call reads.
        self.slots = [
            value
            for value in (*leaves(args), *leaves([*kwargs.values()]))
            if isinstance(value, Slot)
        ]


class Program:
    """Code of a product.

    Parameters
    ----------
    inputs : list of Slot
        The vectors.
    calls : list of Call
        The recorded calls, in order.
    outputs : list
        The product: slots, and constants.
    """

    def __init__(
        self, inputs: list[Slot], calls: list[Call], outputs: list[Any]
    ) -> None:
        calls = with_transposed_sums(calls)
        calls, outputs = without_pairs_of_transpositions(calls, outputs)
        calls = without_expansions(calls)
        self.inputs, self.outputs = inputs, outputs
        #: The calls that contribute.
        self.calls = without_dead_calls(calls, outputs)
        #: Number of tensor operations that a product with several vectors runs.
        self.num_calls = len(self.calls)
        #: Whether a CUDA graph can do all of it.
        self.capturable = not any(
            may_wait(call.func, (*call.args, *call.kwargs.values()))
            for call in self.calls
        )
        thrifty = reusing_memory(self.calls, outputs)
        #: The tensors that it holds, and the code.
        self.constants, self._run = compiled(inputs, thrifty, outputs)

    @cached_property
    def _run_several(self) -> Callable[..., tuple[Tensor, ...]]:
        # Without writing in place, which needs layouts that vectorised tensors lack.
        return torch.func.vmap(compiled(self.inputs, self.calls, self.outputs)[1])

    def __call__(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Multiply vectors in parameter shapes."""
        with torch.no_grad():
            return self._run(*vectors)

    def vectorised(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Multiply vectors with a leading dimension, one per index of it."""
        with torch.no_grad():
            return self._run_several(*vectors)


def leaves(value: Any) -> list[Any]:
    """Return the leaves of nested lists and tuples, which is all that calls have."""
    if not isinstance(value, (list, tuple)):
        return [value]
    found: list[Any] = []
    for part in value:
        if isinstance(part, (list, tuple)):
            found += leaves(part)
        else:
            found.append(part)
    return found


def replaced(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of a kind in nested lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(part, kind, function) for part in value])
    return value


def with_transposed_sums(calls: list[Call]) -> list[Call]:
    """Transpose sums of matrices, not the matrices: that makes for pairs to drop."""
    before: dict[Any, Slot] = {}
    known = [out.number for call in calls for out in call.outputs if out is not None]
    numbers = count(max(known, default=0) + 1)
    result = []
    for call in calls:
        if call.func is aten.add.Tensor and not call.kwargs:
            pair = [before[a] for a in call.args if isinstance(a, Slot) and a in before]
            if len(pair) == 2 and pair[0].shape == pair[1].shape:
                (out,) = call.outputs
                total = out.transpose(next(numbers), all(a.dense for a in pair))
                result.append(Call(call.func, tuple(pair), {}, [total], False))
                call = Call(aten.t.default, (total,), {}, [out], False)
        if call.func is aten.t.default and len(call.args[0].shape) == 2:
            (matrix,), (out,) = call.args, call.outputs
            before[out] = matrix
        result.append(call)
    return result


def without_pairs_of_transpositions(
    calls: list[Call], outputs: list[Any]
) -> tuple[list[Call], list[Any]]:
    """Drop calls that transpose a transposed matrix, a quarter of all."""
    before: dict[Slot, Slot] = {}
    same: dict[Slot, Slot] = {}

    def current(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([current(part) for part in value])
        return same.get(value, value) if isinstance(value, Slot) else value

    kept = []
    for call in calls:
        if not same.keys().isdisjoint(call.slots):
            options = {key: current(value) for key, value in call.kwargs.items()}
            rest = call.outputs, call.is_sequence
            call = Call(call.func, current(call.args), options, *rest)
        if call.func is aten.t.default:
            (matrix,), (out,) = call.args, call.outputs
            if matrix in before:
                same[out] = before[matrix]
                continue
            before[out] = matrix
        kept.append(call)
    return kept, current(outputs)


#: Elementwise operations of two tensors.
_BROADCASTING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}


def without_expansions(calls: list[Call]) -> list[Call]:
    """Pass to operations that broadcast what has been expanded for them, as it was."""
    origin: dict[Any, Slot] = {}
    result = []
    for call in calls:
        if call.func is aten.expand.default or call.func in _VIEWS:
            source, (out,) = call.args[0], call.outputs
            source = origin.get(source, source)
            if isinstance(source, Slot) and _expands(source, call.func, out):
                origin[out] = source
        elif call.func in _BROADCASTING and not call.kwargs:
            a, b = call.args
            (out,) = call.outputs
            if b in origin and getattr(a, "shape", None) == out.shape:
                b = origin[b]
            elif a in origin and getattr(b, "shape", None) == out.shape:
                a = origin[a]
            call = Call(call.func, (a, b), {}, [out], False)
        result.append(call)
    return result


def _expands(source: Slot, func: Any, out: Slot) -> bool:
    """Whether broadcasting gives what an expansion, or a view, does."""
    if not source.shape:  # types are promoted differently then
        return False
    return func is aten.expand.default or out.shape == (
        *(1,) * (len(out.shape) - len(source.shape)),
        *source.shape,
    )


def without_dead_calls(calls: list[Call], outputs: list[Any]) -> list[Call]:
    """Drop calls that neither write nor contribute to the outputs."""
    used = {o for o in outputs if isinstance(o, Slot)}
    alive: list[Call] = []
    for call in reversed(calls):
        if not call.mutates and used.isdisjoint(call.outputs):
            continue
        used.update(call.slots)
        alive.append(call)
    for call in alive:
        if call.func is aten.convolution_backward.default:
            # (input, weight, bias) are computed as the last argument asks.
            wanted = [o in used for o in call.outputs]
            mask = [a and b for a, b in zip(call.args[-1], wanted, strict=True)]
            call.args = (*call.args[:-1], mask)
    return alive[::-1]


# -- less memory ---------------------------------------------------------------------

_VIEWS = {aten.view.default, aten._unsafe_view.default}


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if total.ndim == 2:
        return total.addmm_(a, b)
    total.view(a.shape[0], b.shape[1]).addmm_(a, b)
    return total


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    total.view(*a.shape[:2], b.shape[2]).baddbmm_(a, b)
    return total


#: Matrix products, and what adds one to a tensor in place.
_PRODUCTS = {aten.mm.default: _add_mm, aten.bmm.default: _add_bmm}

#: Elementwise operations, what does the same in place, and whether operands commute.
_IN_PLACE = {
    aten.add.Tensor: (aten.add_.Tensor, True),
    aten.sub.Tensor: (aten.sub_.Tensor, False),
    aten.mul.Tensor: (aten.mul_.Tensor, True),
    aten.mul.Scalar: (aten.mul_.Scalar, False),
    aten.div.Tensor: (aten.div_.Tensor, False),
    aten.div.Scalar: (aten.div_.Scalar, False),
    aten.neg.default: (aten.neg_.default, False),
    aten.masked_fill.Scalar: (aten.masked_fill_.Scalar, False),
}


def reusing_memory(calls: list[Call], outputs: list[Any]) -> list[Call]:
    """Return equivalent calls that write into memory that is not needed any more."""
    calls = _with_fused_sums(calls, outputs)
    last = _last_uses(calls, outputs)
    instead: dict[Memory, Memory] = {}  # of what is written in place

    def memory(slot: Slot) -> Memory:
        found = slot.memory
        while found in instead:
            found = instead[found]
        return found

    result = []
    for i, call in enumerate(calls):
        thrifty = call
        func, swaps = _IN_PLACE.get(call.func, (None, False))
        orders = [call.args, call.args[::-1]]
        for args in orders[: 1 + (swaps and not call.kwargs)] if func else []:
            target, out = args[0], call.outputs[0]
            if (
                isinstance(target, Slot)
                and _may_become(target, out)
                and last[memory(target)] <= i
                and [memory(s) for s in call.slots].count(memory(target)) == 1
            ):
                thrifty = Call(func, args, call.kwargs, [out], False)
                break
        if thrifty is not call or call.func in _PRODUCTS.values():
            place, out = memory(thrifty.args[0]), thrifty.outputs[0]
            instead[out.memory], last[place] = place, last[out.memory]
        result.append(thrifty)
    return result


def _may_become(target: Slot, out: Slot) -> bool:
    """Whether a result may take an operand's place, once that is not needed."""
    alike = target.shape == out.shape and target.dtype == out.dtype
    return alike and target.dense and target.memory.owned and out.memory.owned


def _last_uses(calls: list[Call], outputs: list[Any]) -> dict[Memory, float]:
    """Return the number of the last call that uses each memory."""
    last: dict[Memory, float] = {}
    for i, call in enumerate(calls):
        slots = [slot for slot in (*call.slots, *call.outputs) if slot is not None]
        last.update({slot.memory: i for slot in slots})
    last.update({o.memory: inf for o in outputs if isinstance(o, Slot)})
    return last


def _with_fused_sums(calls: list[Call], outputs: list[Any]) -> list[Call]:
    """Replace sums of an unneeded tensor and a matrix product by one call."""
    made = {out: i for i, call in enumerate(calls) for out in call.outputs if out}
    reads = Counter(slot for call in calls for slot in call.slots)
    reads.update(o for o in outputs if isinstance(o, Slot))
    last = _last_uses(calls, outputs)
    written = [(i, s.memory) for i, c in enumerate(calls) if c.mutates for s in c.slots]

    def product_behind(slot: Any) -> list[int]:
        """Return the calls that make a slot, if those are a product and views of it."""
        chain: list[int] = []
        while isinstance(slot, Slot) and reads[slot] == 1 and slot in made:
            chain.append(made[slot])
            if (call := calls[chain[-1]]).func in _PRODUCTS:
                return chain
            if call.func not in _VIEWS:
                break
            slot = call.args[0]
        return []

    fused: dict[int, Call | None] = {}
    for i, call in enumerate(calls):
        if call.func is not aten.add.Tensor or call.kwargs:
            continue
        for total, product in (call.args, call.args[::-1]):
            chain = [] if total is product else product_behind(product)
            if not chain or not isinstance(total, Slot):
                continue
            start, out = calls[chain[-1]], call.outputs[0]
            factors = {slot.memory for slot in start.slots}
            if (
                _may_become(total, out)
                and product.shape == out.shape
                and last[total.memory] <= i
                and total.memory not in factors
                and not any(chain[-1] < j < i and m in factors for j, m in written)
            ):
                fused.update(dict.fromkeys(chain))
                func = _PRODUCTS[start.func]
                fused[i] = Call(func, (total, *start.args), {}, [out], False)
                written.append((i, total.memory))
                break
    merged = [fused.get(i, call) for i, call in enumerate(calls)]
    return [call for call in merged if call is not None]


#: What does the same with less overhead. (A view of the recorded layout may be none of
#: a vectorised one.)
_PYTHON: dict[Any, Callable[..., Any]] = {
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.expand.default: Tensor.expand,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.sum.dim_IntList: torch.sum,
    aten.neg.default: torch.neg,
    aten.neg_.default: Tensor.neg_,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.sub.Tensor: torch.sub,
    aten.sub_.Tensor: Tensor.sub_,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.mul.Scalar: torch.mul,
    aten.mul_.Scalar: Tensor.mul_,
    aten.div.Tensor: torch.div,
    aten.div_.Tensor: Tensor.div_,
    aten.div.Scalar: torch.div,
    aten.div_.Scalar: Tensor.div_,
}


# -- code ----------------------------------------------------------------------------


def compiled(
    inputs: list[Slot], calls: list[Call], outputs: list[Any]
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Write and compile straight-line code; return the tensors it holds, and it."""
    constants: dict[str, Any] = {}
    name = partial(_name, constants)
    last_use = {slot: i for i, call in enumerate(calls) for slot in call.slots}
    kept = {o for o in outputs if isinstance(o, Slot)}
    lines = []
    for i, call in enumerate(calls):
        arguments = [name(a) for a in call.args]
        arguments += [f"{key}={name(a)}" for key, a in call.kwargs.items()]
        targets = ["_" if o is None else repr(o) for o in call.outputs]
        left = ", ".join(targets) + ("," if call.is_sequence else "")
        assign = f"{left} = " if targets else ""
        func = _PYTHON.get(call.func, call.func)
        lines.append(f"{assign}{name(func)}({', '.join(arguments)})")
        seen = dict.fromkeys(s for s in (*call.slots, *call.outputs) if s is not None)
        done = [s for s in seen if last_use.get(s, -1) <= i and s not in kept]
        if done:
            lines.append("del " + ", ".join(map(repr, done)))
    returned = "".join(f"{name(o)}, " for o in outputs)
    source = f"def run({', '.join(map(repr, inputs))}):\n    " + "\n    ".join(
        [*lines, f"return ({returned})"]
    )
    namespace: dict[str, Any] = {}
    exec(_code(source), constants, namespace)
    tensors = [t for t in leaves([*constants.values()]) if isinstance(t, Tensor)]
    return tensors, namespace["run"]


@lru_cache(maxsize=32)
def _code(source: str) -> CodeType:
    """Compile code, which is the same for all batches that are alike."""
    return compile(source, "<recorded product>", "exec")


def _name(constants: dict[str, Any], value: Any) -> str:
    """Return an expression for a value, which is put among the constants if needed."""
    if isinstance(value, Slot):
        return repr(value)
    if isinstance(value, (list, tuple)) and any(
        isinstance(leaf, Slot) for leaf in leaves(value)
    ):
        return "[" + ", ".join(_name(constants, part) for part in value) + "]"
    if isinstance(value, (bool, int)) or value is None:
        return repr(value)
    if isinstance(value, torch._ops.OpOverload):
        value = value._op  # what it calls
    constants[f"c{len(constants)}"] = value
    return f"c{len(constants) - 1}"
