"""How a model is called with a batch, and what of its result is the prediction.

Most models take one argument and return a tensor. Those of some libraries take the
entries of a mapping as keywords, and return an object with the logits in it; their
batches are mappings that hold the labels, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops._memory import raise_if_out_of_memory

#: Names under which batches that are mappings hold their targets.
LABELS = ("labels", "label", "targets", "target", "y")

#: Three lines that make any such batch one that is understood.
_LINES = """
    pairs = [({k: b[k] for k in b if k != "labels"}, b["labels"]) for b in data]
    model = as_model(module)  # or as_model(module, output="loss"), with `data` as it is
    A = GGNLinearOperator(model, loss_func, params, pairs)"""


@dataclass(frozen=True)
class Reading:
    """How batches and a model's results are read.

    Parameters
    ----------
    output : str, int, callable, or None
        What of the model's result is the prediction: an attribute or a key, a position
        in a tuple, or a function of the result. ``None`` for a result that is a tensor,
        or has it in ``.logits``.
    class_axis : int, optional
        The prediction's axis of classes, which is moved to where torch has it: 1.
    with_labels : bool, optional
        Whether the model sees the labels of batches that are mappings.
    """

    output: str | int | Callable[[Any], Tensor] | None = None
    class_axis: int | None = None
    with_labels: bool = False

    def pair(self, item: Any, index: int, targets: bool = True) -> tuple[Any, Any]:
        """Return a batch as inputs and targets.

        Parameters
        ----------
        item : Any
            The batch, a pair or a mapping.
        index : int
            Its number.
        targets : bool, optional
            Whether there have to be targets.

        Raises
        ------
        ValueError
            If it is neither, or a mapping whose targets are not clear.
        """
        if isinstance(item, (list, tuple)) and len(item) == 2:
            return item[0], item[1]
        if not isinstance(item, Mapping):
            raise ValueError(
                f"Every batch must be a pair `(X, y)`, but batch {index} is "
                f"{_described(item)}. Is `data` a single pair? Then pass `[(X, y)]`."
            )
        names = [name for name in LABELS if name in item]
        if len(names) > 1 or (not names and targets and not self.with_labels):
            found = f"several of them, {names}" if names else "none of them"
            raise ValueError(
                f"Batch {index} is a mapping with the keys {[*item]}. Its targets are "
                f"looked for under one of the names {[*LABELS]}, but there are {found}."
                f" Say what inputs and targets are:{_LINES}"
            )
        y = item[names[0]] if names else None
        if self.with_labels or not names:
            return item, y
        return {key: item[key] for key in item if key != names[0]}, y

    def tensor(self, result: Any) -> Any:
        """Return the prediction in a model's result, or the result if there is none."""
        found = result
        if self.output is not None:
            found = self._taken(result)
        elif not isinstance(result, Tensor):
            logits = getattr(result, "logits", None)
            found = logits if isinstance(logits, Tensor) else result
        if self.class_axis is None or not isinstance(found, Tensor):
            return found
        if found.ndim < 2:
            return found
        if not -found.ndim <= self.class_axis < found.ndim:
            raise ValueError(
                f"The prediction of shape {tuple(found.shape)} has no axis "
                f"{self.class_axis}. Pass another `class_axis` to `as_model`, e.g. -1."
            )
        return found.movedim(self.class_axis, 1)

    def check_classes(
        self, axes: tuple[int, ...], shape: torch.Size, taken: bool
    ) -> None:
        """Raise if a first prediction's classes are not, or may not be, on axis 1.

        Parameters
        ----------
        axes : tuple of int
            Where they may be, by the labels' shape.
        shape : torch.Size
            The prediction's shape.
        taken : bool
            Whether it was taken from a larger result.

        Raises
        ------
        ClassesElsewhereError
            If they are on the last axis.
        ValueError
            If they may be on both. Of a tensor that a model returns, torch's rule says
            that it is the first of these.
        """
        if self.class_axis is not None or not axes or (1 in axes and not taken):
            return
        if 1 not in axes:
            raise ClassesElsewhereError(-1)
        if len(axes) > 1:
            raise ValueError(
                f"The logits of the first batch have shape {tuple(shape)}, and labels "
                "fit with classes on axis 1 as well as on the last axis. Say where they"
                " are: `as_model(model, class_axis=-1)`, or `class_axis=1`."
            )

    def _taken(self, result: Any) -> Any:
        """Return what the user has asked for."""
        output = self.output
        if isinstance(output, str):
            if isinstance(result, Mapping) and output in result:
                return result[output]
            if output == "logits" and isinstance(result, Tensor):
                return result
            value = getattr(result, output, None)
            if isinstance(value, Tensor):
                return value
            raise TypeError(
                f"The model's result has no tensor {output!r}: it is "
                f"{_described(result)}"
                + f"{_tensors_of(result)}. "
                + 'A `"loss"` is there only if the batch has labels. '
                * (output == "loss")
                + "Pass another `output` to `as_model`."
            )
        if isinstance(output, int):
            try:
                if not isinstance(result, Tensor):  # whose rows are no parts
                    return result[output]
            except (TypeError, LookupError):  # neither a sequence nor a mapping
                pass
            raise TypeError(
                f"The model's result has no place {output}: it is "
                f"{_described(result)}. Pass another `output` to `as_model`."
            )
        assert output is not None
        return output(result)


class ClassesElsewhereError(Exception):
    """A prediction's classes are on another axis than a loss looks for them."""

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.axis = axis


#: How models are read that nobody has said anything about.
PLAIN = Reading()


@dataclass(eq=False)
class Caller:
    """Calls a module with a batch's inputs, mappings by keyword where it wants that.

    Attributes
    ----------
    known : dict
        By the keys of mappings, whether they are keywords.
    """

    known: dict[frozenset[Any], bool] = field(default_factory=dict)

    def __call__(self, module: Any, X: Any) -> Any:
        """Call the module.

        Raises
        ------
        TypeError
            If it takes a mapping neither as its argument nor by keyword.
        """
        if not isinstance(X, Mapping):
            return module(X)
        keys = frozenset(X)
        by_keyword = self.known.get(keys)
        if by_keyword is None:
            by_keyword = _by_keyword(module, keys)
        if by_keyword or keys in self.known:
            self.known[keys] = bool(by_keyword)
            return module(**X) if by_keyword else module(X)
        try:
            result, self.known[keys] = module(X), False
        except Exception as error:  # whatever a model raises for such an argument
            raise_if_out_of_memory(error)
            if by_keyword is False:  # no keyword of it is among the keys
                error.add_note(
                    "The model's argument was the batch's mapping with the keys "
                    f"{sorted(map(str, keys))}. If it takes something else, say what:"
                    f"{_LINES}"
                )
                raise
            try:  # both may be meant
                result, self.known[keys] = module(**X), True
            except Exception as other:  # likewise
                raise_if_out_of_memory(other)
                raise TypeError(
                    f"The model fails with the batch's mapping as its argument "
                    f"({type(error).__name__}: {error}), and with its entries "
                    f"{sorted(map(str, keys))} as keywords ({type(other).__name__}: "
                    f"{other}). Choose the entries that it takes:{_LINES}"
                ) from error
        return result


def _by_keyword(module: Any, keys: frozenset[Any]) -> bool | None:
    """Say whether a module wants keywords, ``None`` if its signature leaves that open.

    It does if several of them are names of its arguments, or one argument without a
    name is none that it takes.
    """
    if not isinstance(module, nn.Module) or not all(isinstance(k, str) for k in keys):
        return False
    try:
        call = inspect.signature(module.forward)
    except (TypeError, ValueError):  # of a scripted module, say
        return None
    fits, alone = _binds(call, **dict.fromkeys(keys)), _binds(call, None)
    named = keys & call.parameters.keys()
    if fits and (not alone or len(named) > 1):
        return True
    return None if fits or named else False


def _binds(call: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        call.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def not_a_tensor(result: Any, index: int) -> TypeError:
    """Return what says that a model's result is no tensor, and how to get at one."""
    return TypeError(
        f"The model must return a tensor, or an object with one in `.logits`, got "
        f"{_described(result)} for batch {index}{_tensors_of(result)}. Pass "
        '`as_model(module, output="...")`, which says what to take (a name, a place in '
        "a tuple, or a function), or a module that returns the tensor."
    )


def _tensors_of(result: Any) -> str:
    """Name the tensors in a result, if it has any."""
    try:
        items = dict(result) if isinstance(result, Mapping) else vars(result)
    except TypeError:
        return ""
    names = [name for name, x in items.items() if torch.is_tensor(x)]
    return f" with the tensors {names}" if names else ""


def _described(value: Any) -> str:
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"of type {type(value).__name__}"
