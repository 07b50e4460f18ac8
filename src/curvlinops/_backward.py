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


def backward(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    vectors: Sequence[Tensor | None],
    *,
    retain_graph: bool,
    create_graph: bool = False,
    is_grads_batched: bool = False,
) -> list[Tensor | None]:
    r"""Multiply vectors by the transposed derivative of ``outputs`` by ``inputs``.

    Parameters
    ----------
    outputs, inputs : sequence of Tensor or GradientEdge
        What is differentiated, and by what.
    vectors : sequence of Tensor or None
        One in the shape of every output, ``[K, *shape]`` if ``is_grads_batched``;
        ``None`` for one, if the output is a scalar.
    retain_graph, create_graph, is_grads_batched : bool, optional
        As in :func:`torch.autograd.grad`.

    Returns
    -------
    list of Tensor or None
        One for every input, ``None`` where no output depends on it.

    Raises
    ------
    RuntimeError
        Whatever :func:`torch.autograd.grad` raises, which is called for everything that
        is not plain: modes and subclasses that want to see the call, and vectors that
        do not fit.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> v = torch.tensor([1.0, 0.0, 2.0])
    >>> backward([x**2], [x], [v], retain_graph=False)
    [tensor([ 2.,  0., 12.])]
    """
    seen = [t for t in (*outputs, *inputs) if isinstance(t, Tensor)]
    batched = repeat(is_grads_batched)
    if has_torch_function(seen) or not all(map(_fits, outputs, batched, vectors)):
        return list(
            torch.autograd.grad(
                outputs,
                inputs,
                vectors,
                retain_graph=retain_graph,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=is_grads_batched,
            )
        )

    def run(vectors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return graph._engine_run_backward(
            tuple(outputs),
            tuple(vectors),
            retain_graph,
            create_graph,
            tuple(inputs),
            True,
            accumulate_grad=False,
        )

    if not is_grads_batched:
        return list(run(vectors))
    run_batch = _vmap_internals._vmap(run, 0, 0, allow_none_pass_through=True)
    return list(run_batch(tuple(vectors)))


def _fits(output: Any, batched: bool, vector: Tensor | None) -> bool:
    """Whether a vector has the shape and the type of an output."""
    if isinstance(output, GradientEdge):
        output = output.node._input_metadata[output.output_nr]
    elif output.is_nested:
        return False
    if vector is None or vector.dtype is not output.dtype:
        return False
    return list(vector.shape[batched:]) == list(output.shape)
