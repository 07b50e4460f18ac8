"""Backward passes that leave torch's compiler alone.

With a vector, ``torch.autograd.grad`` compares shapes by torch's symbolic shapes, and
the first such call of a process imports them, with SymPy: some 480 modules, which take
thirty times as long as a product with a small model, and 36 MB. Here the same engine
runs after a plain comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, _vmap_internals
from torch.autograd import graph
from torch.autograd.graph import GradientEdge
from torch.overrides import has_torch_function


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *,
    allow_unused: bool = False,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """Multiply vectors by a transposed derivative, as :func:`torch.autograd.grad`.

    Parameters
    ----------
    outputs, inputs, grad_outputs : Tensor, GradientEdge, or sequence of these
        What is differentiated, by what, and the vectors, as for torch.
    retain_graph, create_graph, allow_unused, is_grads_batched, materialize_grads : \
bool, optional
        As for torch.

    Returns
    -------
    tuple of Tensor or None
        One for every input.

    Raises
    ------
    RuntimeError
        Whatever :func:`torch.autograd.grad` raises, which is called for everything that
        is not plain: modes and subclasses that want to see the call, and vectors that
        are missing or do not fit.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> grad(x**2, x, torch.tensor([1.0, 0.0, 2.0]))
    (tensor([ 2.,  0., 12.]),)
    """
    outs, ins, vectors = map(_sequence, (outputs, inputs, grad_outputs))
    batched = repeat(is_grads_batched)
    if (
        len(outs) != len(vectors)
        or not ins
        or has_torch_function([t for t in outs + ins if isinstance(t, Tensor)])
        or not all(map(_fits, outs, batched, vectors))
    ):
        return torch.autograd.grad(
            outs,
            ins,
            grad_outputs,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=allow_unused or materialize_grads,
            is_grads_batched=is_grads_batched,
            materialize_grads=materialize_grads,
        )

    def run(vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return graph._engine_run_backward(
            outs,
            tuple(vectors),
            create_graph if retain_graph is None else retain_graph,
            create_graph,
            ins,
            allow_unused or materialize_grads,
            accumulate_grad=False,
        )

    if is_grads_batched:
        run = _vmap_internals._vmap(run, 0, 0, allow_none_pass_through=True)
    found = run(vectors)
    if not materialize_grads:
        return tuple(found)
    pairs = zip(found, ins, strict=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in pairs)


def _sequence(value: Any) -> tuple[Any, ...]:
    """Return one or several tensors or edges, or none, as a tuple."""
    if value is None:
        return ()
    is_one = isinstance(value, Tensor | GradientEdge)
    return (value,) if is_one else tuple(value)


def _fits(output: Any, batched: bool, vector: Tensor | None) -> bool:
    """Whether a vector has the shape and the type of an output."""
    if isinstance(output, GradientEdge):
        output = output.node._input_metadata[output.output_nr]
    elif output.is_nested:
        return False
    if vector is None or vector.dtype is not output.dtype:
        return False
    return list(vector.shape[batched:]) == list(output.shape)
