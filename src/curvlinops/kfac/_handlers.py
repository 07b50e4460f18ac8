"""What is understood: functions of torch, and the uses of parameters they make."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops.kfac._recording import Recorder


def _rows(
    recorder: Recorder,
    kind: str,
    x: Tensor,
    W: Tensor,
    b: Any,
    call: Callable[..., Tensor],
    **o: Any,
) -> Any:
    """Note a function of a weight, and of a bias that is added along axis 1 or -1."""
    if recorder.owner(x):
        return NotImplemented
    if recorder.owner(W):
        return recorder.note(kind, W, x, call(b), b, **o)
    return _shift(recorder, torch.add, call(None), b, len(o.get("kernel", ())))


def _linear(
    recorder: Recorder, _: Any, input: Tensor, weight: Tensor, bias: Any = None
) -> Any:
    if weight.ndim != 2:
        return NotImplemented
    flipped = id(weight) in recorder._transposed
    kind = "linear-transposed" if flipped else "linear"
    return _rows(
        recorder, kind, input, weight, bias, lambda b: F.linear(input, weight, b)
    )


def _convolution(kind: str, *names: str) -> Callable[..., Any]:
    """Handle ``func(input, weight, bias, *names)``."""

    def handler(
        recorder: Recorder,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        if recorder.owner(weight) and not recorder.name(weight):
            return NotImplemented
        return _rows(
            recorder,
            kind,
            input,
            weight,
            bias,
            lambda b: func(input, weight, b, **options),
            kernel=weight.shape[2:],
            **options,
        )

    return handler


def _embedding(
    recorder: Recorder, func: Any, input: Tensor, weight: Tensor, *args: Any, **kw: Any
) -> Any:
    bound = signature(F.embedding).bind(input, weight, *args, **kw).arguments
    unusual = ("max_norm", "scale_grad_by_freq", "sparse")
    if recorder.name(weight) is None or any(bound.get(name) for name in unusual):
        return NotImplemented
    V = len(weight)
    padding = bound.get("padding_idx")
    padding = padding if padding is None else padding % V
    y = func(input, weight, *args, **kw)
    options: dict[str, Any] = {"size": V, "padding": padding, "dtype": weight.dtype}
    return recorder.note("embedding", weight, input, y, **options)


def _two(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let a handler of two operands see those given by name, too."""

    def by_place(recorder: Recorder, func: Any, *args: Any, **kwargs: Any) -> Any:
        names = [n for n in ("input", "self", "other", "mat2") if n in kwargs]
        operands = [*args, *(kwargs.pop(name) for name in names)]
        if kwargs or len(operands) != 2:
            return NotImplemented
        return handler(recorder, func, *operands)

    return by_place


def _transpose(
    recorder: Recorder, _: Any, tensor: Tensor, *args: Any, **kwargs: Any
) -> Any:
    args += tuple(kwargs.values())
    if not recorder.name(tensor) or tensor.ndim != 2:
        return NotImplemented
    if args and set(args) not in ({0, 1}, {-1, -2}):
        return NotImplemented
    return recorder.transpose(tensor)


def _matmul(recorder: Recorder, func: Any, a: Tensor, b: Tensor) -> Any:
    """Note ``x @ W``, ``x @ W.T``, ``W @ x`` and ``W.T @ x``."""
    left = recorder.owner(a) is not None
    W, x = (a, b) if left else (b, a)
    if W.ndim != 2 or recorder.owner(x):
        return NotImplemented
    flipped = id(W) in recorder._transposed
    # A matrix's rows are its outputs in `W @ x` and `x @ W.T`.
    kind = "linear" if left != flipped else "linear-transposed"
    return recorder.note(kind, W, x, func(a, b), columns=left and x.ndim > 1)


def _addmm(
    recorder: Recorder, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **kw: Any
) -> Any:
    """Note ``b + x @ W``, the form of HuggingFace's ``Conv1D``."""
    if recorder.owner(mat1) or any(v != 1 for v in kw.values()):
        return NotImplemented
    if recorder.owner(mat2) is None or (recorder.owner(input) and input.ndim != 1):
        return NotImplemented
    flipped = id(mat2) in recorder._transposed
    kind = "linear" if flipped else "linear-transposed"
    return recorder.note(kind, mat2, mat1, func(input, mat1, mat2), input)


def _scale(recorder: Recorder, func: Any, x: Any, p: Tensor, trailing: int = 0) -> Any:
    """Note ``x * p``, with ``p`` broadcast to ``x`` after some trailing axes."""
    size = torch.Size([*p.shape, *[1] * trailing])
    y = func(x, p.reshape(size) if trailing else p)
    x = torch.as_tensor(x, dtype=p.dtype, device=p.device)
    return recorder.note("elementwise", p, x, y, size=size)


def _shift(
    recorder: Recorder, func: Any, x: Any, p: Tensor, trailing: int = 0, sign: int = 1
) -> Any:
    """Note ``x + p``, broadcast likewise."""
    size = torch.Size([*p.shape, *[1] * trailing])
    y = func(x, p.reshape(size) if trailing else p)
    return recorder.note("elementwise", p, p.new_full((), sign), y, size=size)


def _binary(note: Callable[..., Any], swapped_sign: int = 1) -> Callable[..., Any]:
    """Handle ``func(a, b)`` with a parameter as one of two operands."""

    def handler(recorder: Recorder, func: Any, a: Any, b: Any) -> Any:
        if recorder.owner(a) and recorder.owner(b):
            return NotImplemented
        if recorder.name(b):
            extra = {"sign": swapped_sign} if note is _shift else {}
            return note(recorder, func, a, b, **extra)
        if recorder.name(a):
            return note(recorder, lambda x, p: func(p, x), b, a)
        return NotImplemented

    return _two(handler)


def _expand(
    recorder: Recorder, func: Any, p: Tensor, *sizes: Any, **kwargs: Any
) -> Any:
    if not recorder.name(p):
        return NotImplemented
    return _shift(recorder, lambda _, p: func(p, *sizes, **kwargs), None, p)


def _norm(*names: str, channels: bool = True) -> Callable[..., Any]:
    """Write a normalisation ``func(input, *names)`` with its affine part apart."""

    def handler(
        recorder: Recorder, func: Any, input: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        affine = [(torch.mul, _scale, options.pop("weight", None))]
        affine += [(torch.add, _shift, options.pop("bias", None))]
        if any(recorder.owner(p) and not recorder.name(p) for _, _, p in affine):
            return NotImplemented
        y = func(input, **options)
        trailing = input.ndim - 2 if channels else 0
        for op, note, p in affine:
            if recorder.name(p):
                y = note(recorder, op, y, p, trailing)
            elif p is not None:
                y = op(y, p.reshape(*p.shape, *[1] * trailing))
        return y

    return handler


def _attention(recorder: Recorder, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Project outside of ``F.multi_head_attention_forward``, which then projects by I.

    Inside of it torch functions are not dispatched.
    """
    bound = signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    inputs = [bound[n] for n in ("query", "key", "value")]
    packed, b = bound["in_proj_weight"], bound["in_proj_bias"]
    biases = [None] * 3 if b is None else b.chunk(3)
    if bound.get("use_separate_proj_weight"):
        weights = [bound[f"{n}_proj_weight"] for n in "qkv"]
        projected = [
            _project(recorder, *pair) for pair in zip(inputs, weights, strict=True)
        ]
        if b is not None:
            projected = [
                _shift_part(recorder, y, c, b, i)
                for i, (y, c) in enumerate(zip(projected, biases, strict=True))
            ]
    elif inputs[0] is inputs[1] is inputs[2]:
        projected = list(_project(recorder, inputs[0], packed, b).chunk(3, dim=-1))
    else:
        parts = zip(inputs, packed.chunk(3), biases, strict=True)
        projected = [
            _project_part(recorder, *part, packed, b, i) for i, part in enumerate(parts)
        ]
    eye = torch.eye(bound["embed_dim_to_check"]).to(projected[0])
    out, out_bias = bound["out_proj_weight"], bound["out_proj_bias"]
    bound |= dict(zip(("query", "key", "value"), projected, strict=True))
    bound |= {f"{n}_proj_weight": eye for n in "qkv"} | {"out_proj_weight": eye}
    bound |= {"in_proj_weight": None, "in_proj_bias": None, "out_proj_bias": None}
    attended, scores = func(**{**bound, "use_separate_proj_weight": True})
    return _project(recorder, attended, out, out_bias), scores


def _swapped(x: Tensor) -> Tensor:
    """Exchange the first two axes of ``[length, batch, features]``, if there are."""
    return x.transpose(0, 1) if x.ndim == 3 else x


def _project(recorder: Recorder, x: Tensor, W: Tensor, b: Any = None) -> Tensor:
    """Multiply ``[length, batch, features]`` by a weight."""
    x = _swapped(x)
    tracked = recorder.name(W) or recorder.name(b)
    y = _linear(recorder, None, x, W, b) if tracked else F.linear(x, W, b)
    return _swapped(y)


def _project_part(
    recorder: Recorder, x: Tensor, W: Tensor, c: Any, whole: Tensor, b: Any, i: int
) -> Tensor:
    """Multiply by the ``i``-th third of a weight."""
    x = _swapped(x)
    if recorder.name(whole):
        y = F.linear(x, W, c)
        recorder.note("linear", whole, x, y, b, slot=(i, 3))
        return _swapped(y)
    y = _swapped(F.linear(x, W))
    return y if b is None else _shift_part(recorder, y, c, b, i)


def _shift_part(recorder: Recorder, y: Tensor, c: Tensor, b: Tensor, i: int) -> Tensor:
    """Add the ``i``-th third of a bias."""
    y = _swapped(y) + c
    if recorder.name(b):
        options = {"part": (i, 3), "size": c.shape}
        one = b.new_ones(())
        recorder.note("elementwise", b, one, y, **options)
    return _swapped(y)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    F.layer_norm: _norm("normalized_shape", "weight", "bias", "eps", channels=False),
    F.rms_norm: _norm("normalized_shape", "weight", "eps", channels=False),
    F.group_norm: _norm("num_groups", "weight", "bias", "eps"),
    F.batch_norm: _norm(
        *("running_mean", "running_var", "weight", "bias", "training", "momentum"),
        "eps",
    ),
    F.instance_norm: _norm(
        *("running_mean", "running_var", "weight", "bias", "use_input_stats"),
        *("momentum", "eps"),
    ),
    torch.addmm: _addmm,
    Tensor.expand: _expand,
}
for _d in (1, 2, 3):
    HANDLERS[getattr(F, f"conv{_d}d")] = _convolution(
        "convolution", "stride", "padding", "dilation", "groups"
    )
    HANDLERS[getattr(F, f"conv_transpose{_d}d")] = _convolution(
        *("transposed-convolution", "stride", "padding", "output_padding"),
        *("groups", "dilation"),
    )
for _functions, _handler in (
    ((Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t), _transpose),  # type: ignore[attr-defined]
    ((Tensor.transpose, torch.transpose, Tensor.swapaxes), _transpose),
    (
        (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__),
        _two(_matmul),
    ),
    ((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _binary(_scale)),
    ((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _binary(_shift)),
    ((torch.sub, Tensor.sub, Tensor.__sub__), _binary(_shift, swapped_sign=-1)),
    ((Tensor.add_, Tensor.__iadd__), _binary(_shift)),
):
    HANDLERS |= dict.fromkeys(_functions, _handler)
