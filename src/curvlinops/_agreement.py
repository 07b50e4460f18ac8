"""Whether two ways to multiply give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Multiply = Callable[[list[Tensor]], Sequence[Tensor]]


#: How often rounding errors are looked for at entries that have shown none.
_TRIES = 6


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
    sizes: Sequence[Tensor] | None = None,
    largest: float | None = None,
) -> bool:
    r"""Whether products agree, entry by entry.

    A gap may be ``eps ** exponent`` times the entry, or what it is in products with
    other vectors; or ``eps ** (exponent - 1)`` times the entry's rounding errors, as
    they show in :math:`A (v + w) - A v - A w`. What is wrong about small entries cannot
    hide behind large ones, whatever units outputs, features or parameters have, and
    what consists of nothing but rounding errors (the part of a bias that a
    normalisation takes back, say) need not be the same. But no gap may be above
    ``eps ** exponent`` times the largest entry.

    Parameters
    ----------
    found : sequence of Tensor
        The product in question.
    expected : sequence of Tensor
        The product :math:`A v` to compare it with.
    eps, exponent : float
        Relative rounding error, and the power of it that is tolerated.
    multiply : callable
        Multiplies by :math:`A`. Called twice where the first criterion fails, and twice
        more as long as the second one does.
    vectors : list of Tensor
        The vector :math:`v`.
    sizes : sequence of Tensor, optional
        What gaps are compared with in place of the entries, where more is known.
    largest : float, optional
        What no gap may come near, by default the largest entry of ``expected``.
    """
    tolerance = eps**exponent
    near = [  # tensor by tensor, which keeps nothing large
        ((a - b).abs() <= tolerance * (sizes[i] if sizes else b.abs())).all()
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
    ]
    if bool(torch.stack(near).all()):
        return True
    gaps = [(a - b).abs() for a, b in zip(found, expected, strict=True)]
    top = max(largest_entries(expected), default=0.0) if largest is None else largest
    if not all(gap <= tolerance * top for gap in largest_entries(gaps)):
        return False
    allowed = [tolerance * size for size in sizes or map(torch.abs, expected)]
    for seed in range(_TRIES):
        factors = random_like(vectors, seed)
        others = [v * (w + 1.5) for v, w in zip(vectors, factors, strict=True)]
        second = [p.clone() for p in multiply(others)]
        total = multiply([*map(torch.add, vectors, others)])
        allowed = [
            torch.maximum(most, tolerance * _size(q)).maximum(
                tolerance / eps * _size(s - p - q)
            )
            for most, p, q, s in zip(allowed, expected, second, total, strict=True)
        ]
        near = [(gap <= most).all() for gap, most in zip(gaps, allowed, strict=True)]
        if bool(torch.stack(near).all()):
            return True
    return False


def same_operations_agree(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    eps: float,
    exponent: float,
    multiply: Multiply,
    vectors: list[Tensor],
) -> bool:
    """Whether products agree that are made of the same operations on the same data.

    As :func:`agree`, at less cost: entries are compared with the largest of a tensor.
    """
    sizes = [*map(largest_entry, expected)]
    return agree(found, expected, eps, exponent, multiply, vectors, sizes)


def matrices_agree(
    found: Multiply,
    expected: Multiply,
    like: list[Tensor],
    eps: float,
    exponent: float,
    size: Callable[[Tensor], Tensor] = torch.abs,
) -> bool:
    """Whether two symmetric matrices agree, each block compared in its own scale.

    They are multiplied with a random vector whose parts are :func:`balanced`. Blocks
    whose part of the product is small all the same, or may be nothing but rounding
    errors of others, are compared once more with a vector that is zero elsewhere; in
    the end, each by itself.

    Parameters
    ----------
    found, expected : callable
        Multiply by the matrix in question, and by the one to compare it with. The
        first is called more often.
    like : list of Tensor
        Tensors of the blocks' shapes.
    eps, exponent : float
        As in :func:`agree`.
    size : callable, optional
        What gaps in a tensor are compared with; by default its entries.
    """
    largest: float | None = None
    todo = [[*range(len(like))]]
    while todo:
        blocks = todo.pop()
        vectors = [torch.zeros_like(t) for t in like]
        for i in blocks:
            vectors[i] = random_like([like[i]], i)[0]
        vectors = balanced(vectors, found(vectors))
        product = [p.clone() for p in expected(vectors)]
        other = [p.clone() for p in found(vectors)]
        sizes = largest_entries(other)
        largest = max(sizes) if largest is None else largest
        units = [*map(size, other)]
        if not agree(product, other, eps, exponent, found, vectors, units, largest):
            return False
        gaps = largest_entries([*map(torch.sub, product, other)])
        least = eps**0.5 * max(sizes[i] for i in blocks)
        rest = [
            i for i in blocks if sizes[i] < least or gaps[i] > eps**exponent * sizes[i]
        ]
        if len(rest) == len(blocks):
            todo += [[i] for i in rest] if len(rest) > 1 else []
        elif rest:
            todo.append(rest)
    return True


def rows_agree(
    found: Tensor, expected: Tensor, tolerance: float, units: Tensor | None = None
) -> bool:
    """Whether outputs of the same data agree, each in its own scale.

    That is the largest entry of the datum or that of the output over all data,
    whichever is less, so that neither large outputs nor large data hide others. Or
    units are given, where there are more data than these.
    """
    if found.shape != expected.shape:
        return False
    if expected.numel() == 0:
        return True
    rows = expected.reshape(len(expected), -1)
    gaps = (found - expected).abs().reshape(rows.shape)
    units = in_units(rows) if units is None else units.reshape(rows.shape)
    return bool((gaps <= tolerance * units).all())


def in_units(tensor: Tensor) -> Tensor:
    """Return the largest entry of each entry's row, or of its column if that is less.

    Rows and columns may have units of their own.
    """
    if tensor.ndim < 2 or tensor.numel() == 0:
        return tensor.abs()
    rows = tensor.abs().reshape(len(tensor), -1)
    return torch.minimum(rows.amax(0), rows.amax(1, keepdim=True)).view_as(tensor)


def largest_entries(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest absolute value in each of some tensors."""
    scalars = [largest_entry(t).double() for t in tensors]
    numbers: list[float] = torch.stack(scalars).tolist()
    return numbers


def largest_entry(tensor: Tensor) -> Tensor:
    """Return the largest absolute value in a tensor."""
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    return torch.linalg.vector_norm(tensor, torch.inf)


def _size(tensor: Tensor) -> Tensor:
    """Return absolute values; those that are not finite excuse nothing."""
    return tensor.abs().nan_to_num(0.0, 0.0, 0.0)
