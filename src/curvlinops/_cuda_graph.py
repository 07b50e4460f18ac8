"""Programs on a GPU, launched as one: CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from curvlinops._program import Program


class CapturedProgram:
    """A program whose operations are launched together, from memory of its own.

    Parameters
    ----------
    program : Program
        The program.
    vectors : list of Tensor
        Vectors on a GPU, of the shapes that the program multiplies.

    Raises
    ------
    RuntimeError
        If an operation cannot be captured, since it waits for the GPU, say.

    Notes
    -----
    The operands are copied to where the captured operations read them, and the results
    from where they are written: nobody else holds what a product returns. On another
    stream than that of the capture, the program is run as it is.
    """

    def __init__(self, program: Program, vectors: Sequence[Tensor]) -> None:
        self._program = program
        self._lock = Lock()
        self._stream = torch.cuda.current_stream(vectors[0].device)
        self._inputs = [v.clone() for v in vectors]
        aside = torch.cuda.Stream(vectors[0].device)
        aside.wait_stream(self._stream)
        with torch.cuda.stream(aside):
            program(self._inputs)  # libraries set themselves up
        self._stream.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = program(self._inputs)
        #: The tensors that it holds, those of the program apart.
        self.held = [*self._inputs, *self._outputs]

    def __call__(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply vectors in parameter shapes."""
        if torch.cuda.current_stream(vectors[0].device) != self._stream:
            return self._program(vectors)
        with self._lock, torch.no_grad():
            for kept, vector in zip(self._inputs, vectors, strict=True):
                kept.copy_(vector)
            self._graph.replay()
            return [output.clone() for output in self._outputs]


def captured(program: Program, vectors: Sequence[Tensor]) -> CapturedProgram | None:
    """Capture a program, if its vectors are on a GPU and it can be captured."""
    if not all(v.is_cuda for v in vectors):
        return None
    try:
        return CapturedProgram(program, vectors)
    except RuntimeError:
        return None
