"""How far two correct computations of one matrix may be apart."""

from math import sqrt
from typing import Any

import numpy as np
import torch


def tolerance(dtype: Any, size: int, exponent: float = 1.0) -> float:
    """Return the tolerated difference, relative to the largest entry.

    Parameters
    ----------
    dtype : torch.dtype or NumPy dtype
        The least precise floating point type of the computation.
    size : int
        How many summands an entry has. Their rounding errors add up like a random
        walk, hence the square root.
    exponent : float, optional
        The power of the machine epsilon. Central differences with the best step have
        an error of ``eps ** (2 / 3)``.

    Notes
    -----
    32 epsilons per summand leave room for the layers of a model. Half precision has
    none to spare, 128 epsilons of bfloat16 are one: there it is 2.
    """
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else _torch_dtype(dtype)
    eps = torch.finfo(torch_dtype).eps
    safety = 2 if eps > 1e-4 else 32
    return safety * sqrt(max(size, 1)) * eps**exponent


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def assert_close(
    actual: Any,
    expected: Any,
    dtype: Any = None,
    size: int | None = None,
    exponent: float = 1.0,
) -> None:
    """Assert equal shapes, and entries within the tolerance.

    By default, in the precision of ``actual`` and for as many summands as it has
    columns. What is compared may be tensors or arrays on any device.
    """
    size = max(actual.shape[-1:], default=1) if size is None else size
    actual_dtype = actual.dtype if dtype is None else dtype
    a, b = (torch.as_tensor(m).detach().cpu() for m in (actual, expected))
    common = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float64)
    a, b = a.to(common), b.to(common)
    assert a.shape == b.shape, f"Shapes {tuple(a.shape)} and {tuple(b.shape)} differ."
    if a.numel() == 0:
        return
    scale = b.abs().max().item()
    bound = tolerance(actual_dtype, size, exponent) * scale
    difference = (a - b).abs().max().item()
    assert difference <= bound, (
        f"The largest difference is {difference:.3e}, the largest entry {scale:.3e}: "
        f"more than the tolerated {bound:.3e}."
    )
