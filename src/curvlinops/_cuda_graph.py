"""Operations on a GPU, launched as one: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class _Pool:
    """Memory in which the graphs of one stream compute, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        #: Where they are captured.
        self.aside = torch.cuda.Stream(device)
        self.lock = RLock()


_POOLS: WeakValueDictionary[torch.cuda.Stream, _Pool] = WeakValueDictionary()
_POOLS_LOCK = RLock()


class CudaGraph:
    """A function without arguments whose operations are launched together.

    Parameters
    ----------
    function : callable
        Reads tensors on a GPU that stay where they are, and returns new ones.
    device : torch.device
        The GPU.

    Raises
    ------
    RuntimeError
        If an operation cannot be captured, since it waits for the GPU, say.

    Notes
    -----
    All graphs of a stream share their memory: the results of one are overwritten by
    the next, hence are to be copied while :attr:`lock` is held. A graph is replayed on
    no other stream than that on which it was made, see :attr:`usable`.
    """

    def __init__(
        self, function: Callable[[], Sequence[Tensor]], device: torch.device
    ) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        with _POOLS_LOCK:
            self._pool = _POOLS.get(self._stream) or _Pool(device)
            _POOLS[self._stream] = self._pool
        #: Held by whoever launches a graph of this stream and copies its results.
        self.lock = self._pool.lock
        aside = self._pool.aside
        with self.lock, torch.no_grad():
            aside.wait_stream(self._stream)
            with torch.cuda.stream(aside):
                function()  # libraries set themselves up
                before = torch.cuda.memory_reserved(device)
                self._graph = torch.cuda.CUDAGraph()
                # Not `torch.cuda.graph`, which collects all of Python's garbage.
                self._graph.capture_begin(self._pool.handle, "thread_local")
                try:
                    #: What the function returned, written by every launch.
                    self.results = list(function())
                finally:
                    self._graph.capture_end()
            self._stream.wait_stream(aside)
            #: Bytes that had to be taken from the GPU for it.
            self.nbytes = max(torch.cuda.memory_reserved(device) - before, 0)

    @property
    def usable(self) -> bool:
        """Whether the thread's current stream is the graph's."""
        return torch.cuda.current_stream(self._device) == self._stream

    def launch(self) -> None:
        """Write the results, with the lock held."""
        self._graph.replay()


class CapturedProgram:
    """A product whose operations are launched together.

    Parameters
    ----------
    program : callable
        Maps a list of tensors to tensors, always by the same operations.
    vectors : sequence of Tensor
        Vectors on a GPU, of the shapes that the program multiplies.

    Raises
    ------
    RuntimeError
        If an operation cannot be captured.

    Notes
    -----
    The operands are copied to where the captured operations read them, and the results
    from where they are written: nobody else holds what a product returns. On another
    stream than that of the capture, the program is run as it is.
    """

    def __init__(
        self,
        program: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        vectors: Sequence[Tensor],
    ) -> None:
        self._program = program
        self._inputs = [v.clone() for v in vectors]
        device = vectors[0].device
        self._graph = CudaGraph(lambda: program(self._inputs), device)
        self._sizes = [t.numel() for t in self._graph.results]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, those of the program apart."""
        return self._graph.nbytes + sum(t.nbytes for t in self._inputs)

    def __call__(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply vectors in parameter shapes."""
        graph = self._graph
        if not graph.usable:
            return self._program(vectors)
        written = graph.results
        fresh = written[0].new_empty(sum(self._sizes)).split(self._sizes)
        results = [f.view(t.shape) for f, t in zip(fresh, written, strict=True)]
        with graph.lock, torch.no_grad():
            torch._foreach_copy_(self._inputs, list(vectors))
            graph.launch()
            torch._foreach_copy_(results, written)
        return results


def captured(
    program: Callable[[Sequence[Tensor]], Sequence[Tensor]], vectors: Sequence[Tensor]
) -> CapturedProgram | None:
    """Capture a program, if its vectors are on a GPU and it can be captured."""
    if not all(v.is_cuda for v in vectors):
        return None
    try:
        return CapturedProgram(program, vectors)
    except RuntimeError:
        return None
