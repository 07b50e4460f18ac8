"""Seeded test vectors: column ``j`` is a pure function of a seed and ``j``.

Every source of randomness is first reduced to one integer. Vectors are drawn by
counter-based streams on the CPU, so they do not depend on the device, on how many are
drawn at once, or on the order of drawing, and a computation that stopped can go on at
any column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from curvlinops._counts import as_count, count

#: What is accepted wherever randomness enters.
Rng: TypeAlias = "int | np.integer | np.random.Generator | torch.Generator | None"


def _rademacher(stream: np.random.Generator, dim: int, dtype: np.dtype) -> np.ndarray:
    bits = np.frombuffer(stream.bytes(-(-dim // 8)), dtype=np.uint8)
    signs = np.unpackbits(bits, count=dim).astype(dtype)
    signs *= 2
    signs -= 1
    return signs


def _normal(stream: np.random.Generator, dim: int, dtype: np.dtype) -> np.ndarray:
    return stream.standard_normal(dim, dtype)


def _sphere(stream: np.random.Generator, dim: int, dtype: np.dtype) -> np.ndarray:
    vector = _normal(stream, dim, dtype)
    vector *= np.sqrt(dim) / np.linalg.norm(vector)
    return vector


#: Distributions of test vectors, all with zero mean and identity covariance.
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, np.dtype], np.ndarray]] = {
    "rademacher": _rademacher,
    "normal": _normal,
    "sphere": _sphere,
}


def as_seed(rng: Rng = None) -> int:
    """Reduce a source of randomness to one integer.

    Parameters
    ----------
    rng : int, numpy.random.Generator, torch.Generator, or None
        A non-negative integer is returned as it is. A generator is asked for one
        number, hence advances. ``None`` asks torch's global generator, so that
        ``torch.manual_seed`` makes a script reproducible.

    Returns
    -------
    int
        Seed between 0 and 2**63 - 1.

    Raises
    ------
    TypeError
        If ``rng`` is none of these.
    ValueError
        If it is a negative integer, or one above 2**63 - 1.
    """
    bound = 2**63 - 1
    if rng is None or isinstance(rng, torch.Generator):
        device = None if rng is None else rng.device
        return int(torch.randint(bound, (), generator=rng, device=device))
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(bound))
    if (seed := as_count(rng)) is None:
        raise TypeError(
            "rng is an int, a numpy.random.Generator, a torch.Generator, or None for "
            f"torch's global generator; got {type(rng).__name__}."
        )
    if not 0 <= seed <= bound:
        raise ValueError(f"A seed lies between 0 and 2**63 - 1, got {seed}.")
    return seed


class Probes:
    """An endless sequence of random vectors, indexed like a matrix's columns.

    Parameters
    ----------
    dim : int
        Length of a vector.
    distribution : str
        ``"rademacher"`` (entries ±1), ``"normal"`` (standard normal entries), or
        ``"sphere"`` (uniform on the sphere of radius ``sqrt(dim)``).
    seed : int
        Of the sequence, see :func:`as_seed`.
    dtype : torch.dtype
        Of the vectors. They are real; a complex dtype has zero imaginary parts.
    device : torch.device or str
        On which they are returned. The numbers do not depend on it.

    Raises
    ------
    ValueError
        If the distribution is none of those above.

    Examples
    --------
    >>> probes = Probes(3, "rademacher", seed=0)
    >>> probes.block(0, 2).shape
    torch.Size([3, 2])
    >>> bool((probes.block(0, 9)[:, 4:6] == probes.block(4, 6)).all())
    True
    """

    def __init__(
        self,
        dim: int,
        distribution: str,
        seed: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution is one of {', '.join(map(repr, DISTRIBUTIONS))}; "
                f"got {distribution!r}."
            )
        self.dim = dim
        self.distribution = distribution
        self.seed = seed
        self.dtype = dtype
        self.device = device
        double = dtype in (torch.float64, torch.complex128)
        self._draw_dtype = np.dtype(np.float64 if double else np.float32)

    def block(self, start: int, stop: int) -> Tensor:
        """Return vectors ``start, ..., stop - 1`` as columns of a matrix.

        Returns
        -------
        Tensor
            Of shape ``(dim, stop - start)``; every column is contiguous.
        """
        draw = DISTRIBUTIONS[self.distribution]
        rows = np.empty((stop - start, self.dim), self._draw_dtype)
        for row, j in zip(rows, range(start, stop), strict=True):
            stream = np.random.Generator(
                np.random.Philox(key=self.seed, counter=[0, 0, 0, j])
            )
            row[:] = draw(stream, self.dim, self._draw_dtype)
        return torch.from_numpy(rows).to(self.device, self.dtype).T


def random_vector(
    dim: int,
    distribution: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    rng: Rng = None,
) -> Tensor:
    """Draw one random vector with zero mean and identity covariance.

    Parameters
    ----------
    dim : int
        Its length.
    distribution : str
        ``"rademacher"``, ``"normal"``, or ``"sphere"``, see :class:`Probes`.
    device : torch.device or str, optional
        On which it is returned.
    dtype : torch.dtype, optional
        Its floating-point type.
    rng : int, numpy.random.Generator, torch.Generator, or None, optional
        Source of randomness; ``None`` is torch's global generator.

    Returns
    -------
    Tensor
        Of shape ``(dim,)``.

    Examples
    --------
    >>> vector = random_vector(5, "sphere", rng=0)
    >>> round(float(vector @ vector), 12)
    5.0
    """
    return Probes(count("dim", dim), distribution, as_seed(rng), dtype, device).block(
        0, 1
    )[:, 0]
