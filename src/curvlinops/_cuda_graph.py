"""Operations on a GPU, launched as one: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from curvlinops._locks import new_lock
from curvlinops._memory import raise_if_out_of_memory


class _Pool:
    """Memory in which the graphs of one stream compute, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        #: Where they are captured.
        self.aside = torch.cuda.Stream(device)
        self.lock = new_lock()


_POOLS: WeakValueDictionary[torch.cuda.Stream, _Pool] = WeakValueDictionary()
_POOLS_LOCK = new_lock()


class CudaGraph:
    """A function without arguments whose operations are launched together.

    Parameters
    ----------
    function : callable
        Reads tensors on a GPU that stay where they are, and returns new ones.
    device : torch.device
        The GPU.

    Notes
    -----
    None of the operations may wait for the GPU, see :func:`may_wait`. All graphs of a
    stream share their memory: the results of one are overwritten by the next, hence are
    to be copied while :attr:`lock` is held. A graph is replayed on no other stream than
    that on which it was made, see :attr:`usable`.
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
                    self._graph.capture_end()
                except BaseException:
                    _clean_up(self._graph, self._pool, device)
                    raise
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


def _clean_up(graph: Any, pool: _Pool, device: torch.device) -> None:
    """Undo what a failed capture has left behind in torch.

    It goes on allocating from the pool, and its random generator believes that it is
    being captured: another capture, in another pool, ends that.
    """
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool.handle)
    pool.handle = torch.cuda.graph_pool_handle()
    with suppress(RuntimeError):
        nothing = torch.cuda.CUDAGraph()
        nothing.capture_begin(pool.handle, "thread_local")
        torch.empty(1, device=device).zero_()
        nothing.capture_end()


class CapturedProgram:
    """A product whose operations are launched together.

    Parameters
    ----------
    program : callable
        Maps a list of tensors to tensors, always by the same operations.
    vectors : sequence of Tensor
        Vectors on a GPU, of the shapes that the program multiplies.

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
    """Capture a program, or find out that it cannot be."""
    try:
        return CapturedProgram(program, vectors)
    except RuntimeError as error:  # an operation waits for the GPU all the same
        raise_if_out_of_memory(error)
        return None


def may_wait(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation may wait for the GPU, so that it cannot be captured.

    Since a capture that fails is hard to clean up after, it is not tried where results
    have sizes that depend on values, where a mask selects entries, in solvers, which
    look at their status, and with foreign operations.
    """
    if not isinstance(func, torch._ops.OpOverload):
        return getattr(func, "__module__", "").partition(".")[0] != "curvlinops"
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten" or not _SOLVERS.isdisjoint(name.split("_")):
        return True
    if "index" in name:
        return any(map(_is_mask, args))
    unsafe = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not unsafe.isdisjoint(func.tags)


#: Words in the names of operations that solve or factorise.
_SOLVERS = frozenset(
    [
        "linalg",
        "cholesky",
        "lu",
        "qr",
        "geqrf",
        "ormqr",
        "svd",
        "eig",
        "eigh",
        "solve",
        "lstsq",
        "inverse",
    ]
)


def _is_mask(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_mask, value))
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
