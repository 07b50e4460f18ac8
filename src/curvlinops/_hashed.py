r"""Random numbers that belong to data: functions of what they are for.

Every number is a hash of a seed, the number of a row in the data, the number of a
sample, and the place of an entry in the row, in operations on integers. So it does not
depend on how the data are cut into batches, on the order of drawing, or on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, prod
from typing import Any

import torch
from torch import Generator, Tensor

#: Multipliers and shifts of the mixing function, David Stafford's 13th variant of
#: MurmurHash3's, as SplitMix64 has them; and SplitMix64's increment, odd and near
#: :math:`2^{64}` over the golden ratio. As signed integers.
_FACTORS = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_SHIFTS = 30, 27, 31
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def _signed(x: int) -> int:
    """Return the last 64 bits of an integer as a signed number."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if integers had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(x: Tensor) -> Tensor:
    """Map 64-bit integers to others, such that each bit depends on every bit.

    References
    ----------
    G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
    doi:10.1145/2660193.2660195.
    """
    x = (x ^ _shifted(x, _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ _shifted(x, _SHIFTS[1])) * _FACTORS[1]
    return x ^ _shifted(x, _SHIFTS[2])


@dataclass(frozen=True)
class Draws:
    r"""The random numbers of some rows.

    Parameters
    ----------
    seed : int
        Seed, of which 64 bits count.
    first : int, optional
        Number of the first row in the data.

    Notes
    -----
    A row's state is :math:`h(h(s) + (i + 1) \gamma)`, an entry's the same of that, and
    a sample's the same again, with the mixing function :math:`h` and the increment
    :math:`\gamma` of SplitMix64: each level is a stream of that generator, which starts
    at a random place of its own.

    Examples
    --------
    >>> whole = Draws(seed=1).uniform((2, 5, 3))
    >>> whole.shape
    torch.Size([2, 5, 3])
    >>> part = Draws(seed=1, first=3).uniform((2, 2, 3))
    >>> torch.equal(whole[:, 3:], part)
    True
    """

    seed: int
    first: int = 0

    def bits(
        self, shape: tuple[int, ...], device: Any = "cpu", stream: int = 0
    ) -> Tensor:
        """Return 64 random bits for every entry of ``[samples, rows, *rest]``."""
        samples, rows, *rest = (*shape, 1)[: max(len(shape), 2)]
        entries = prod(rest)

        def levels(start: int, number: int) -> Tensor:
            numbers = torch.arange(start + 1, start + number + 1, device=device)
            return numbers * _STEP

        seed = torch.tensor(_signed(self.seed + (stream + 1) * _STEP), device=device)
        state = mixed(mixed(seed) + levels(self.first, rows)).unsqueeze(-1)
        state = mixed(state + levels(0, entries)).flatten()
        state = mixed(state + levels(0, samples).unsqueeze(-1))
        return state.reshape(shape)

    def uniform(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
        device: Any = "cpu",
        stream: int = 0,
    ) -> Tensor:
        """Return numbers from 0 up to below 1, ``[samples, rows, *rest]``.

        Multiples of :math:`2^{-53}` in double precision, of :math:`2^{-24}` else.
        """
        digits = 53 if dtype is torch.float64 else 24
        numbers = _shifted(self.bits(shape, device, stream), 64 - digits)
        return numbers.to(dtype) * 2.0**-digits

    def normal(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
        device: Any = "cpu",
    ) -> Tensor:
        """Return standard normal numbers, ``[samples, rows, *rest]``.

        References
        ----------
        G. Box, M. Muller, "A note on the generation of random normal deviates",
        doi:10.1214/aoms/1177706645.
        """
        radius, angle = (self.uniform(shape, torch.float64, device, k) for k in (0, 1))
        radius = (-2 * torch.log1p(-radius)).sqrt_()
        return (radius * torch.cos(2 * pi * angle)).to(dtype)

    def generator(self, row: int = 0) -> Generator:
        """Return a generator for a row, for what draws by itself."""
        state = Draws(self.seed, self.first + row).bits((1, 1))
        return torch.Generator().manual_seed(int(_shifted(state, 1)))
