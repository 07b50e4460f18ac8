"""Named tensors as one flat vector, and the border between NumPy and torch.

Everything that changes the container of a vector happens in this file: once on the
way in, once on the way out. Inside the package a vector is a flat tensor and a block
of ``K`` vectors a tensor of shape ``(dim, K)``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from itertools import pairwise
from math import isfinite, prod
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops._memory import raise_if_out_of_memory

#: NumPy's name for every torch dtype an operator can compute in. NumPy has no
#: bfloat16 and SciPy no float16 solvers: half precision is reported as float32.
NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.float32),
}


class TensorSpace:
    """The space of lists of tensors with given shapes, laid out as flat vectors.

    A list ``(t_1, ..., t_n)`` corresponds to the concatenation of the tensors
    flattened in row-major order, of length ``dim = sum_i prod(shapes[i])``.

    Parameters
    ----------
    shapes : iterable of sequences of int
        Shape of every tensor.
    dtype : torch.dtype
        Floating-point type that vectors of this space have on the torch side.
    device : torch.device or str
        Device on which they live.
    names : iterable of str, optional
        One name per tensor; ``"0", "1", ...`` if absent.

    Raises
    ------
    TypeError
        If ``dtype`` is not a real floating-point type.
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device | str,
        names: Iterable[str] | None = None,
    ) -> None:
        if dtype not in NUMPY_DTYPES:
            raise TypeError(
                f"Operators compute in real floating-point types, got {dtype}. "
                "Convert the tensors first, e.g. with `.to(torch.float32)`."
            )
        self.shapes = tuple(torch.Size(map(index, shape)) for shape in shapes)
        self.dtype = dtype
        # `torch.empty` turns "cuda" into "cuda:0", the device that tensors report.
        self.device = torch.empty(0, device=device).device
        self.names = (
            tuple(str(i) for i in range(len(self.shapes)))
            if names is None
            else tuple(names)
        )
        self.sizes = tuple(prod(shape) for shape in self.shapes)
        self.dim = sum(self.sizes)
        self.staging = Staging()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the space is, not its buffers."""
        return TensorSpace, (self.shapes, self.dtype, self.device, self.names)

    @classmethod
    def flat(
        cls, dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> TensorSpace:
        """Return the space of plain vectors of length ``dim``."""
        return cls([(dim,)], dtype, device)

    def with_dtype(self, dtype: torch.dtype) -> TensorSpace:
        """Return the same space with another floating-point type."""
        return TensorSpace(self.shapes, dtype, self.device, self.names)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy dtype that vectors of this space have on the NumPy side."""
        return NUMPY_DTYPES[self.dtype]

    def slices(self) -> list[slice]:
        """Return the range of flat indices that each tensor takes up."""
        bounds = np.cumsum([0, *self.sizes]).tolist()
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of shape ``[*leading, *shape]`` of a ``[*leading, dim]``."""
        leading = flat.shape[:-1]

        def shaped(part: Tensor, shape: torch.Size) -> Tensor:
            if len(shape) < 2:
                return part if shape else part[..., 0]
            # Faster than a `torch.Size`, or a tuple, as the only argument.
            return part.reshape(*leading, *shape)

        parts = flat.split_with_sizes(self.sizes, -1)
        return list(map(shaped, parts, self.shapes))

    def join(self, tensors: Sequence[Tensor], leading: int = 0) -> Tensor:
        """Concatenate ``[*leading, *shape]`` tensors to a ``[*leading, dim]``."""
        flat = [
            t if t.ndim == leading + 1 else t.reshape((*t.shape[:leading], -1))
            for t in tensors
        ]
        return torch.cat(flat, dim=-1)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Turn a list of ``[*shape]`` or ``[*shape, K]`` into ``(dim,)``/``(dim, K)``.

        Raises
        ------
        ValueError
            If number or shapes of the tensors are not those of this space.
        """
        if not tensors:
            raise ValueError("Got an empty list of tensors as operand.")
        tensors = self._alike(tensors)
        extra = tensors[0].ndim - len(self.shapes[0]) if self.shapes else -1
        columns = tensors[0].shape[-1:] if extra == 1 else torch.Size()
        expected = [(*shape, *columns) for shape in self.shapes]
        given = [tuple(t.shape) for t in tensors]
        if given != expected:
            raise ValueError(
                f"Expected a list of {len(self.shapes)} tensors of the shapes "
                f"{[tuple(s) for s in self.shapes]} (with one more trailing dimension "
                f"for several columns), got the shapes {given}."
            )
        return torch.cat(
            [
                t.detach().reshape((size, *columns))
                for t, size in zip(tensors, self.sizes, strict=True)
            ]
        )

    def pack_rows(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Turn a list of ``[K, *shape]`` into ``(K, dim)``.

        Returns
        -------
        Tensor or None
            ``None`` if all tensors have as many dimensions as their shapes: one vector.

        Raises
        ------
        ValueError
            If number or shapes of the tensors are not those of this space.
        """
        tensors = self._alike(tensors)
        if [t.ndim for t in tensors] == [len(shape) for shape in self.shapes]:
            return None
        K = len(tensors[0]) if tensors[0].ndim else 0
        given = [tuple(t.shape) for t in tensors]
        if given != [(K, *shape) for shape in self.shapes]:
            raise ValueError(
                f"Expected a list of {len(self.shapes)} tensors of the shapes "
                f"{[tuple(s) for s in self.shapes]} (with one more leading dimension "
                f"for several rows), got the shapes {given}."
            )
        return torch.cat(
            [
                t.detach().reshape(K, size)
                for t, size in zip(tensors, self.sizes, strict=True)
            ],
            dim=1,
        )

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """Turn ``(dim,)`` or ``(dim, K)`` into a list of ``[*shape]``/``[*shape, K]``.

        Inverse of :meth:`pack`.
        """
        return [
            part.reshape((*shape, *flat.shape[1:]))
            for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)
        ]

    def adopt(self, tensor: Tensor) -> Tensor:
        """Return a user's real tensor in the dtype and on the device of this space.

        Integers are converted, and single precision to half, which is what NumPy
        operands have there. Any other floating-point type, or another device (except
        the CPU, whose tensors are moved), is an error, since converting it silently
        would hide a mistake or lose digits.

        Raises
        ------
        TypeError
            If the tensor has another floating-point type.
        ValueError
            If it lives on a device other than the CPU and :attr:`device`.
        """
        if tensor.is_floating_point():
            self.require_dtype(tensor.dtype)
        if tensor.device != self.device and tensor.device.type != "cpu":
            raise ValueError(
                f"The operator lives on {self.device}, the operand on {tensor.device}."
                f" Move it with `x.to({str(self.device)!r})`."
            )
        return tensor.detach().to(self.device, self.dtype)

    def require_dtype(self, dtype: torch.dtype) -> None:
        """Raise unless operands may have a floating-point type, real or complex.

        Raises
        ------
        TypeError
            If it is another one than that of this space, and of NumPy's vectors.
        """
        allowed = self.dtype, NUMPY_TORCH[self.dtype]
        if dtype.to_real() not in allowed:
            its = self.dtype.to_complex() if dtype.is_complex else self.dtype
            raise TypeError(
                f"The operator computes in {self.dtype}, the operand is a tensor of "
                f"{dtype}. Convert it with `x.to({its})`, or convert the operator with "
                "`A.to_scipy(dtype)`."
            )

    def _alike(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return a list's tensors, of one dtype and device, if each is an operand.

        Raises
        ------
        TypeError, ValueError
            As by :meth:`adopt`, or if one holds no numbers, or not one for each entry.
        """
        first, *others = map(dense_tensor, tensors)
        if all(t.dtype is first.dtype and t.device == first.device for t in others):
            return tensors
        for t in tensors:
            if t.is_complex():
                self.require_dtype(t.dtype)
        return [t.to(self.device) if t.is_complex() else self.adopt(t) for t in tensors]

    def __eq__(self, other: object) -> bool:
        """Whether shapes, dtype and device agree (names may differ)."""
        return (
            isinstance(other, TensorSpace)
            and self.shapes == other.shapes
            and self.dtype == other.dtype
            and self.device == other.device
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return dimension, dtype, device."""
        return f"TensorSpace(dim={self.dim}, {self.dtype}, device={self.device})"


def numeric_array(x: Any) -> np.ndarray:
    """Return an array-like as a NumPy array of numbers.

    Raises
    ------
    TypeError
        If it holds anything else than numbers.
    """
    array = x if type(x) is np.ndarray else _as_array(x)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"An operator multiplies numbers, got an operand of type "
            f"{type(x).__name__} that NumPy reads as dtype {array.dtype}. Pass a NumPy "
            f"array, a tensor, or a list of tensors; a sparse matrix with `.toarray()`."
        )
    return array


def _as_array(x: Any) -> np.ndarray:
    """Convert, unless that would lose what `x` says."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts) and any(
        map(np.ma.is_masked, parts)
    ):
        raise TypeError(
            "An array with masked entries has no product with an operator: it does not "
            "say what they are. Pass `x.filled(0)`, or what else they are to be."
        )
    try:
        return np.asarray(x)
    except ValueError as error:  # ragged, or tensors beside something else
        raise TypeError(
            f"An operator multiplies numbers, got an operand of type "
            f"{type(x).__name__} that is no array ({error}). Pass a NumPy array, a "
            "tensor, or a list of nothing but tensors."
        ) from None


#: Types of tensors whose entries are numbers.
_NUMBERS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.complex128, torch.complex64, torch.complex32),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}


def dense_tensor(x: Tensor) -> Tensor:
    """Return a tensor that has a number in memory for each of its entries, or raise.

    Raises
    ------
    TypeError
        If it is sparse, quantized, nested, or holds no numbers.
    """
    if x.layout is torch.strided and x.dtype in _NUMBERS and not x.is_nested:
        return x
    kind, cure = "an unusual", "convert it to a dense one of numbers"
    if x.is_quantized:
        kind, cure = "a quantized", "call `x.dequantize()`"
    elif x.is_nested:
        kind, cure = "a nested", "join its parts, with `torch.cat(x.unbind())`"
    elif x.layout is not torch.strided:
        kind = "a sparse" if "sparse" in str(x.layout) else kind
        cure = "call `x.to_dense()`"
    raise TypeError(
        f"An operator multiplies dense tensors of numbers, got {kind} one "
        f"({x.dtype}, {x.layout}): {cure}."
    )


def rounding(dtype: torch.dtype, device: torch.device, convolves: bool) -> float:
    """Return the relative rounding error of matrix products, maybe of convolutions.

    On a GPU, torch may round the factors of single-precision products to TF32's ten
    bits; for convolutions that is its default.
    """
    if device.type == "cuda" and dtype is torch.float32 and _uses_tf32(convolves):
        return 2.0**-10
    return torch.finfo(dtype).eps


def _uses_tf32(convolves: bool) -> bool:
    try:
        products = torch.backends.cuda.matmul.allow_tf32
        return products or (convolves and torch.backends.cudnn.allow_tf32)
    except RuntimeError as error:  # set by newer names, which the old cannot tell
        raise_if_out_of_memory(error)
        return True


class Staging(threading.local):
    """One kept buffer per thread, through which NumPy operands are converted.

    Fresh memory costs more than the conversion: a float64 vector of length 1e7 takes
    33 ms to a fresh float32 array, 5.5 ms to a kept one. On the way to a GPU, torch
    keeps the buffers.
    """

    def __init__(self) -> None:
        self._free: Tensor | None = None

    def convert(
        self, array: np.ndarray, space: TensorSpace
    ) -> AbstractContextManager[Tensor]:
        """Lend a real NumPy array as a tensor of a space's dtype and device.

        Shares the array's memory if possible (CPU, matching dtype, writeable, strides
        that torch has, too). Otherwise the tensor may be valid only within the context.
        """
        if space.device.type == "cuda":
            return nullcontext(_to_gpu(array, space))
        shareable = (
            array.dtype == space.numpy_dtype
            and array.flags.writeable
            and all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
        )
        if shareable:
            return nullcontext(_in_dtype(torch.from_numpy(array), space.dtype))
        return self._lend(array, space)

    @contextmanager
    def _lend(self, array: np.ndarray, space: TensorSpace) -> Iterator[Tensor]:
        """Lend the kept buffer, with the array's numbers in it."""
        buffer, self._free = self._free, None  # ours alone, also if we are re-entered
        if buffer is None or buffer.numel() < array.size:
            buffer = torch.empty(array.size, dtype=NUMPY_TORCH[space.dtype])
        try:
            view = buffer[: array.size].view(array.shape)
            np.copyto(view.numpy(), array, casting="unsafe")
            yield view.to(space.device, space.dtype)
        finally:
            # Buffers of blocks are not kept: they are large, and rarely dominate.
            self._free = buffer if array.shape[-1] == 1 else None


def to_torch(array: np.ndarray, space: TensorSpace) -> Tensor:
    """Return a real NumPy array as a tensor, shared or in memory of its own."""
    with Staging().convert(array, space) as tensor:
        return tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array, sharing memory on the CPU."""
    tensor = _in_dtype(tensor.detach(), NUMPY_TORCH[tensor.dtype])
    if tensor.is_cpu:
        return tensor.numpy()
    if not tensor.is_cuda or tensor.ndim == 0:
        return tensor.cpu().numpy()
    if tensor.ndim == 2 and not tensor.is_contiguous():
        return _from_gpu(tensor.T.contiguous()).T
    return _from_gpu(tensor.contiguous())


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert if necessary; `Tensor.to` takes its time also to find that it is not."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


#: Bytes that cross the border of a GPU at a time: while some do, the CPU copies others.
_PIECE = 1 << 20


def _pieces(rows: int, nbytes: int) -> Iterator[slice]:
    """Cut the first axis of what takes some bytes into pieces."""
    step = max(rows * _PIECE // max(nbytes, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _to_gpu(array: np.ndarray, space: TensorSpace) -> Tensor:
    """Copy an array to a GPU piece by piece, through page-locked memory.

    Torch lends that memory, and does not lend it again before its copy has ended.
    """
    dtype = NUMPY_TORCH[space.dtype]
    result = torch.empty(array.shape, dtype=dtype, device=space.device)
    for rows in _pieces(len(array), result.nbytes):
        part = array[rows]
        staged = torch.empty(part.shape, dtype=dtype, pin_memory=True)
        np.copyto(staged.numpy(), part, casting="unsafe")
        result[rows].copy_(staged, non_blocking=True)
    return result.to(space.dtype)


def _from_gpu(tensor: Tensor) -> np.ndarray:
    """Copy a contiguous tensor from a GPU, likewise."""
    result = np.empty(tensor.shape, NUMPY_DTYPES[tensor.dtype])
    stream = torch.cuda.current_stream(tensor.device)
    before: tuple[Any, ...] = ()
    for rows in _pieces(len(tensor), tensor.nbytes):
        part = tensor[rows]
        staged = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        staged.copy_(part, non_blocking=True)
        arrived = stream.record_event()
        _finish(*before)
        before = arrived, staged, result[rows]
    _finish(*before)
    return result


def _finish(*copy: Any) -> None:
    """Take what has been copied from a GPU out of page-locked memory."""
    if copy:
        arrived, staged, target = copy
        arrived.synchronize()
        np.copyto(target, staged.numpy())


#: The torch dtype in which a tensor crosses to NumPy.
NUMPY_TORCH = {
    torch_dtype: torch.float64 if numpy_dtype == np.float64 else torch.float32
    for torch_dtype, numpy_dtype in NUMPY_DTYPES.items()
}


def scalar(value: Any) -> Any:
    """Return what a 0-d array or tensor holds, anything else as it is.

    Raises
    ------
    TypeError
        If it is masked.
    ValueError
        If it is a tensor without a value.
    """
    if not isinstance(value, (Tensor, np.ndarray)) or value.ndim:
        return value
    if np.ma.is_masked(value):
        raise TypeError("A masked number has no value: pass `x.filled(0)`, or another.")
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError("A tensor on the device 'meta' has no value: pass a number.")
    return value.item()


def real_scalar(value: Any) -> float | None:
    """Return a real Python, NumPy or 0-d torch number as float, else ``None``.

    Raises
    ------
    TypeError, ValueError
        As by :func:`scalar`; if a whole number is too large for a float.
    """
    value = scalar(value)
    if not isinstance(value, _REAL):
        return None
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"Numbers are at most {np.finfo(float).max:.2g} in size, got one of about "
            f"{int(value).bit_length()} bits."
        ) from None


_REAL = (bool, int, float, np.integer, np.floating, np.bool_, Fraction)


def real_exponent(value: Any) -> float | None:
    """Return an exponent as float, ``None`` if it is no real number.

    Raises
    ------
    ValueError
        If it is not finite.
    """
    exponent = real_scalar(value)
    if exponent is not None and not isfinite(exponent):
        raise ValueError(f"An operator has no power with the exponent {exponent}.")
    return exponent
