"""Comparison of arrays that says where they differ."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, bfloat16

__all__ = ["allclose_report"]


def allclose_report(
    a: Tensor | ArrayLike,
    b: Tensor | ArrayLike,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> bool:
    r"""Compare two arrays entry by entry and print the entries that differ.

    Entries are close if :math:`|a - b| \le \text{atol} + \text{rtol} \, |b|`.
    Equal infinities are close, NaN is close to nothing. Nothing is printed if all
    entries are close.

    Parameters
    ----------
    a, b : Tensor or array_like
        What is compared, of one shape; ``b`` is the reference that scales the
        relative tolerance. Tensors may live on any device.
    rtol, atol : float, optional
        Relative and absolute tolerance.

    Returns
    -------
    bool
        Whether all entries are close.

    Raises
    ------
    ValueError
        If the shapes of ``a`` and ``b`` differ.

    Notes
    -----
    The difference is taken in the promoted precision of both operands, at least
    float64, so that unsigned integers don't wrap and float16 doesn't overflow.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.utils import allclose_report
    >>> allclose_report(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    True
    >>> allclose_report(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    at index [1]: 3.00000e+00 ≠ 2.00000e+00, ratio: 1.50000e+00
    Abs max: 3.00000e+00 vs. 2.00000e+00.
    Abs min: 1.00000e+00 vs. 1.00000e+00.
    Non-close entries: 1 / 2.
    rtol = 1e-05, atol = 1e-08.
    False
    """
    x, y = _to_numpy(a), _to_numpy(b)
    if x.shape != y.shape:
        raise ValueError(
            f"The arrays to compare have shapes {x.shape} and {y.shape}. Reshape or "
            "broadcast one of them first."
        )
    dtype = np.result_type(x, y, np.float64)
    x, y = x.astype(dtype, copy=False), y.astype(dtype, copy=False)
    differs = ~np.isclose(x, y, rtol=rtol, atol=atol)
    count = np.count_nonzero(differs)
    if count == 0:
        return True

    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = x[differs] / y[differs]
    entries = zip(
        np.argwhere(differs).tolist(), x[differs], y[differs], ratios, strict=True
    )
    lines = [
        f"at index {i}: {p:.5e} ≠ {q:.5e}, ratio: {r:.5e}" for i, p, q, r in entries
    ]
    x_abs, y_abs = np.abs(x), np.abs(y)
    lines += [
        f"Abs max: {x_abs.max():.5e} vs. {y_abs.max():.5e}.",
        f"Abs min: {x_abs.min():.5e} vs. {y_abs.min():.5e}.",
        f"Non-close entries: {count} / {x.size}.",
        f"rtol = {rtol}, atol = {atol}.",
    ]
    print("\n".join(lines))
    return False


def _to_numpy(a: Tensor | ArrayLike) -> NDArray[Any]:
    """Return the values of a tensor or array-like on the host."""
    if not isinstance(a, Tensor):
        return np.asarray(a)
    a = a.detach().cpu().resolve_conj().resolve_neg()
    # NumPy has no bfloat16; float32 represents its values exactly
    return (a.float() if a.dtype == bfloat16 else a).numpy()
