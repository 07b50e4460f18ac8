"""How much memory is free, and telling that it has run out from everything else."""

from __future__ import annotations

import os
import re

import torch

from curvlinops._counts import as_count
from curvlinops._interrupts import hidden_interrupt
from curvlinops._policy import POLICY

#: What torch says where it raises a mere `RuntimeError`: its allocators for a CPU and
#: for Apple's GPUs, CUDA with its libraries, and what maps files into memory.
_OUT_OF_MEMORY = re.compile(
    "(can't|cannot|unable to|failed to) allocate|not enough memory|out of memory"
    "|ALLOC_FAILED",
    re.IGNORECASE,
)
_CURE = (
    "Memory ran out in a part of the work that can be bounded: pass `max_memory=`, "
    '`cache="off"`, or smaller batches.'
)


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise an error again if its cause is that memory has run out.

    To be called first wherever an error means that something optional cannot be done,
    since lack of memory passes: it is no property of the model, its data, or an
    operation. Errors that were raised while handling another one have the cause of
    that one, unless they say ``from None``. An interrupt on top of which the error was
    raised is raised in its place.
    """
    if (interrupt := hidden_interrupt(error)) is not None:
        try:
            raise interrupt
        finally:
            del error, interrupt
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause))
        ):
            if _CURE not in getattr(error, "__notes__", ()):
                error.add_note(_CURE)
            try:
                raise error
            finally:  # or its traceback keeps it, and all that its frames hold
                del error, cause
        hidden = cause.__suppress_context__
        cause = cause.__cause__ or (None if hidden else cause.__context__)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return free + reserved - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as info:
            line = next(line for line in info if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        free = _installed_memory() // 4  # no such file outside of Linux: assume so
    return min(free, _control_group_limit())


def _installed_memory() -> int:
    """Return the bytes of main memory, or 4 GiB where Python cannot tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def _control_group_limit() -> int:
    """Return the bytes left of a container's memory limit, if it has one."""
    folder = "/sys/fs/cgroup/"
    try:
        with (
            open(folder + "memory.max") as limit,
            open(folder + "memory.current") as use,
        ):
            return max(int(limit.read()) - int(use.read()), 0)
    except (OSError, ValueError):  # no control group, or "max"
        return 1 << 62


def checked_cache(cache: str | int) -> str | int:
    """Return a setting of ``cache``, or raise."""
    number = as_count(cache)
    if number is not None and number >= 0:
        return number
    if isinstance(cache, str) and cache in ("auto", "off"):
        return cache
    raise ValueError(
        f'`cache` must be "auto", "off", or a number of bytes >= 0, got {cache!r}.'
    )


def budget_bytes(
    cache: str | int, device: torch.device, fraction: float = POLICY.cache_fraction
) -> int:
    """Return how many bytes of recordings a setting of ``cache`` allows.

    ``"auto"`` is a fraction of the memory that is free.
    """
    if isinstance(cache, int):
        return cache
    return int(fraction * free_memory(device)) if cache == "auto" else 0
