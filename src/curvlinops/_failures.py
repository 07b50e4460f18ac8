"""What is said where a model fails on a batch, or data have no numbers to work on."""

from __future__ import annotations

from collections.abc import Iterable
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from curvlinops._data import tensors_in
from curvlinops._spaces import TensorSpace

_NUMPY = (
    "NumPy's numbers carry no derivatives: compute with torch, e.g. `torch.exp` in "
    "place of `np.exp`, without `.item()`, `.numpy()` or `.detach()`"
)


def require_numbers(item: tuple[Any, Any], index: int) -> None:
    """Raise if a batch holds tensors without numbers, or ones that cannot be read.

    Raises
    ------
    ValueError
        For tensors on the ``meta`` device, and nested ones in torch's old layout.
    """
    for what, side in zip(("inputs", "targets"), item, strict=True):
        for t in tensors_in(side):
            if t.is_meta:
                raise ValueError(
                    f"The {what} of batch {index} have a tensor on the `meta` device, "
                    "which has a shape but no numbers: load or create the data on a "
                    "device that stores them, e.g. `torch.rand(shape, device='cpu')`."
                )
            if t.is_nested and t.layout is torch.strided:
                raise nested_failure(index)


def holds_nested(values: Any) -> bool:
    """Whether there are nested tensors in a nest."""
    return any(t.is_nested for t in tensors_in(values))


def nested_failure(index: int) -> ValueError:
    """Return what is said of nested tensors."""
    return ValueError(
        f"Batch {index} holds a nested (jagged) tensor, of which torch lacks many "
        "second derivatives: pass `X.to_padded_tensor(0.0)` with a mask of what is "
        "padded, or `X.values()` with `X.offsets()`."
    )


def refuse_meta(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if a parameter or buffer of a model has no numbers."""
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                f"The model's {name!r} is on the `meta` device, which has a shape but "
                'no numbers: call `model.to_empty(device="cpu")`, and load or '
                "initialise the model then."
            )


def model_failure(
    error: BaseException, X: Any, index: int, space: TensorSpace
) -> Exception:
    """Return what explains why a model failed on a batch."""
    tensors = tensors_in(X)
    if meets_numpy(error):
        return ValueError(
            f"The model failed on batch {index}, since it hands a tensor that is "
            f"differentiated to NumPy ({error}). {_NUMPY}."
        )
    if isinstance(error, TypeError):
        return TypeError(
            f"The model failed on batch {index}, whose inputs are no tensors but "
            f"{type(X).__name__}: {error}. Convert them with `torch.as_tensor`."
        )
    dtypes = sorted({str(t.dtype) for t in tensors})
    differ = str(space.dtype) not in dtypes
    return ValueError(
        f"The model failed on batch {index} (inputs of type {', '.join(dtypes)}"
        f" on {space.device}, parameters of {space.dtype}): {error}"
        + differ
        * f". Convert the inputs with `X.to({space.dtype})`, or "
        "the model, if it does not expect these."
    )


def function_failure(error: BaseException) -> Exception | None:
    """Return what explains why a scalar function failed, if that is known."""
    if not meets_numpy(error):
        return None
    return TypeError(
        f"The scalar function hands a tensor to NumPy ({error}). {_NUMPY}."
    )


def no_scalar(value: Any) -> TypeError:
    """Return what is said of a scalar function that returns something else."""
    kind = type(value)
    from_numpy = kind.__module__.partition(".")[0] == "numpy"
    return TypeError(
        "A scalar function must return a 0-d tensor, got "
        + (
            f"NumPy's {kind.__name__}. {_NUMPY}."
            if from_numpy
            else f"{kind.__name__}. Compute it with torch, without `.item()`."
        )
    )


def meets_numpy(error: BaseException) -> bool:
    """Whether an error was raised since NumPy was given a tensor."""
    if "call numpy() on" in str(error):
        return True
    frames = (frame.f_globals for frame, _ in walk_tb(error.__traceback__))
    return any(str(f.get("__name__")).partition(".")[0] == "numpy" for f in frames)
