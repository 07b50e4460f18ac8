"""What is said where derivatives of a finite loss are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_CAUSES = (
    "Some operation has no derivative there, as a square root or a norm at zero, a "
    "power of zero, or `torch.where` with a branch that is not finite; or numbers "
    "overflow. Shift it away from there, e.g. `(x + 1e-12).sqrt()`, or look at that "
    "batch's inputs"
)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether there is neither NaN nor infinity in some tensors."""
    if bool(torch.stack(torch._foreach_norm([*tensors])).isfinite().all()):
        return True
    # Norms of large numbers overflow.
    return all(bool(t.isfinite().all()) for t in tensors)


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name the tensors that are not finite, and how many of their entries."""
    found = []
    for name, tensor in tensors.items():
        number = int((~tensor.isfinite()).sum())
        if number:
            entries = f"{number} of {tensor.numel()} entries"
            found.append(f"{name!r} ({entries})")
    return ", ".join(found)


def gradient_failure(
    gradients: Mapping[str, Tensor], index: int | None, has_loss: bool
) -> ValueError:
    """Return what is said of a first derivative that is not finite."""
    what = "gradient" if has_loss else "Jacobian"
    where = "" if index is None else f", first on batch {index},"
    value = "model's output and the loss are" if has_loss else "model's output is"
    return ValueError(
        f"The {what} is not finite (NaN or infinity) in the rows of "
        f"{not_finite(gradients)}{where} although the {value}. {_CAUSES}. To go on all "
        "the same, pass `check_deterministic=False`."
    )


def warn_about_product(
    products: Mapping[str, Tensor], index: int, first: bool, by_loss: bool
) -> None:
    """Warn that a matrix is not finite.

    Parameters
    ----------
    products : mapping of str to Tensor
        A product with it, by parameters.
    index : int
        The batch's number.
    first : bool
        Whether the gradient is not finite, either.
    by_loss : bool
        Whether it is the loss's second derivative by the output.
    """
    what = (
        "first derivatives by the parameters are not finite"
        if first
        else "the second derivative of the loss by the model's output is not finite"
        if by_loss
        else "outputs, loss and gradient are finite, but second derivatives are not"
    )
    warnings.warn(
        "Products with this matrix are not finite (NaN or infinity) in the rows of "
        f"{not_finite(products)}: on batch {index}, {what}. {_CAUSES}.",
        RuntimeWarning,
        stacklevel=2,
    )


def named(names: Iterable[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors by names, or by their place if these are others."""
    names = [*names]
    if len(names) != len(tensors):
        names = [f"output {i}" for i in range(len(tensors))]
    return dict(zip(names, tensors, strict=True))
