"""Whether two ways to multiply give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Multiply = Callable[[list[Tensor]], Sequence[Tensor]]


#: How often rounding errors are looked for in tensors that have shown none.
_TRIES = 4


def random_like(tensors: Sequence[Tensor], seed: int = 20260101) -> list[Tensor]:
    """Return random vectors, the same in every run."""
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
        for t in tensors
    ]


def balanced(vectors: list[Tensor], products: Sequence[Tensor]) -> list[Tensor]:
    """Scale vectors so that none hides behind others in products with them.

    Parameters
    ----------
    vectors : list of Tensor
        Vectors for a symmetric matrix.
    products : sequence of Tensor
        Products of it, whose sizes tell those of its blocks.
    """
    sizes = largest_entries(products)
    top = max(sizes, default=0.0)
    least = top * torch.finfo(vectors[0].dtype).eps ** 0.5
    return [
        v * (top / max(size, least)) if 0 < size < top < torch.inf else v
        for v, size in zip(vectors, sizes, strict=True)
    ]


def agree(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    eps: float,
    exponent: float,
    multiply: Multiply,
    vectors: list[Tensor],
) -> bool:
    r"""Whether products agree, tensor by tensor.

    Parameters
    ----------
    found : sequence of Tensor
        The product in question.
    expected : sequence of Tensor
        The product to compare it with.
    eps, exponent, multiply, vectors
        As in :func:`within`.
    """
    gaps = [_largest(a - b) for a, b in zip(found, expected, strict=True)]
    sizes = largest_entries(expected)
    return within(_numbers(gaps), sizes, eps, exponent, multiply, vectors)


def within(
    gaps: list[float],
    sizes: list[float],
    eps: float,
    exponent: float,
    multiply: Multiply,
    vectors: list[Tensor],
) -> bool:
    r"""Whether the gaps between two products are rounding errors, tensor by tensor.

    A gap may be ``eps ** exponent`` times the tensor's largest entry: what is wrong
    about a small tensor must not hide behind large ones. A tensor that consists of
    nothing but rounding errors (the part of a bias that a normalisation takes back,
    say) may have a gap of ``eps ** (exponent - 1)`` times its entries in
    :math:`A (v + w) - A v - A w`, or any below the rounding errors of the largest
    tensor; but none above ``eps ** exponent`` of that one's largest entry.

    Parameters
    ----------
    gaps, sizes : list of float
        Largest entries of the differences, and of the products.
    eps, exponent : float
        Relative rounding error, and the power of it that is tolerated.
    multiply : callable
        Linear function that gives the product to compare with, for three evaluations
        more where the first criterion fails, or a few times three.
    vectors : list of Tensor
        Its argument.
    """
    tolerance, top = eps**exponent, max(sizes, default=0.0)
    pairs = zip(gaps, sizes, strict=True)
    far = [i for i, (gap, size) in enumerate(pairs) if not gap <= tolerance * size]
    if not far:
        return True
    if not all(gap <= tolerance * top for gap in gaps):
        return False
    far = [i for i in far if max(gaps[i], sizes[i]) > eps * top]
    for seed in range(_TRIES):
        if not far:
            break
        errors = _rounding_errors(multiply, vectors, seed)
        far = [i for i in far if not gaps[i] <= tolerance / eps * errors[i]]
    return not far


def largest_entries(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest absolute value in each of some tensors."""
    return _numbers([*map(_largest, tensors)])


def _rounding_errors(
    multiply: Multiply, vectors: list[Tensor], seed: int
) -> list[float]:
    r"""Return the largest entries of :math:`A (v + w) - A v - A w` with a random w."""
    factors = random_like(vectors, seed)
    others = [v * (w + 1.5) for v, w in zip(vectors, factors, strict=True)]
    errors = [p.clone() for p in multiply([*map(torch.add, vectors, others)])]
    for part in (vectors, others):
        for error, p in zip(errors, multiply(part), strict=True):
            error.sub_(p)
    return largest_entries(errors)


def _largest(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return tensor.new_zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(tensor, torch.inf).double()


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack([*scalars]).tolist() if scalars else []
    return numbers
