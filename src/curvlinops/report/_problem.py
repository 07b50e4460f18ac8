"""From ``file.py:function`` to an empirical risk."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops._adapter import AsModel
from curvlinops._data import mapped, tensors_in
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._model import matching_names
from curvlinops.report._contents import Problem
from curvlinops.report._mistakes import MistakeError, one_line, where
from curvlinops.risk import EmpiricalRisk

#: Name of the embedded problem, its hidden units, and the epochs of its training.
EMBEDDED, HIDDEN, EPOCHS = "digits", 12, 60

#: Methods by which torch's layers initialise their parameters.
RESETS = ("reset_parameters", "_reset_parameters")

WANTED = (
    "It returns (model, loss, data), (model, loss, params, data), or an EmpiricalRisk"
)


@dataclass(frozen=True)
class Choice:
    """What is to be looked at, as the command line says it.

    Attributes
    ----------
    problem : str
        ``path/to/file.py:function``, ``package.module:function``, or ``"digits"``.
    params : str or None
        Pattern of parameters' names.
    weights : str or None
        File with a state dict.
    device, dtype : str or None
        Where model and data go, and in which precision.
    max_memory : int or None
        Bytes that a product may allocate.
    seed : int
        Of the embedded problem's parameters (its data are the same for all), and of
        random parameters.
    """

    problem: str = EMBEDDED
    params: str | None = None
    weights: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_memory: int | None = None
    seed: int = 0


class Converted:
    """Data whose floating-point tensors are converted when they are read."""

    def __init__(self, data: Iterable[Any], dtype: torch.dtype) -> None:
        self._data, self._dtype = data, dtype

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""

        def convert(x: Tensor) -> Tensor:
            return x.to(self._dtype) if x.is_floating_point() else x

        for batch in self._data:
            yield mapped(convert, batch)


def build(choice: Choice) -> EmpiricalRisk:
    """Return the risk of a choice.

    Parameters
    ----------
    choice : Choice
        What is to be looked at.

    Raises
    ------
    MistakeError
        If it cannot be: the message is one line.
    """
    embedded = choice.problem == EMBEDDED
    found: Any = _embedded(choice.seed) if embedded else _call(choice.problem)
    if isinstance(found, EmpiricalRisk):
        return _adapted(found, choice)
    if not isinstance(found, tuple | list) or len(found) not in (3, 4):
        size = f" of {len(found)}" if isinstance(found, tuple | list) else ""
        raise MistakeError(
            f"{choice.problem} returned {_article(type(found).__name__)}{size}. "
            f"{WANTED}."
        )
    model, loss, *given, data = found
    params = given[0] if given else None
    _load_weights(model, choice.weights)
    model, loss, params, data = _moved(model, loss, params, data, choice)
    params = _chosen(model, params, choice)
    with _explained(choice.problem):
        return EmpiricalRisk(model, loss, params, data, max_memory=choice.max_memory)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise what the package has to say about a user's problem as a mistake."""
    try:
        yield
    except MistakeError:
        raise
    except MemoryError as error:
        raise MistakeError(f"{what}: {one_line(error)}") from error
    except Exception as error:
        raise_if_out_of_memory(error)
        raise MistakeError(f"{what}: {one_line(error)}") from error


def _embedded(seed: int) -> tuple[Any, Any, Any]:
    try:
        from curvlinops.examples._digits import trained_digits

        digits = trained_digits(HIDDEN, EPOCHS, seed, split=0)
    except ImportError as error:
        raise MistakeError(
            "The embedded problem needs scikit-learn: run `pip install scikit-learn` "
            "(the extra `examples` of curvlinops-scipy), or give a PROBLEM."
        ) from error
    return digits.model, nn.CrossEntropyLoss(), digits.data


# -- the user's function ------------------------------------------------------------


def _call(spec: str) -> Any:
    """Find a user's function, and return what it returns."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise MistakeError(
            f"PROBLEM is path/to/file.py:function or package.module:function, got "
            f"{spec!r}."
        )
    module = _file(place) if place.endswith(".py") else _module(place)
    function = module
    for part in name.split("."):
        if not hasattr(function, part):
            raise MistakeError(f"{place} has no {name!r}.")
        function = getattr(function, part)
    if isinstance(function, EmpiricalRisk):
        return function
    if not callable(function):
        raise MistakeError(f"{spec} is no function. {WANTED}.")
    try:
        return function()
    except Exception as error:
        raise_if_out_of_memory(error)
        line = where(error, str(getattr(module, "__file__", "")))
        raise MistakeError(f"{spec} raised {one_line(error)}{line}.") from error


def _file(place: str) -> Any:
    path = Path(place).resolve()
    if not path.is_file():
        raise MistakeError(f"There is no file {place}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # as classes defined there want for pickles
    sys.path.insert(0, str(path.parent))  # as `python file.py` does
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise_if_out_of_memory(error)
        if before is not None:
            sys.modules[path.stem] = before
        line = where(error, str(path))
        raise MistakeError(f"{place} raised {one_line(error)}{line}.") from error
    return module


def _module(place: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise_if_out_of_memory(error)
        if isinstance(error, ModuleNotFoundError) and place.startswith(
            error.name or " "
        ):
            raise MistakeError(f"There is no module {place}.") from error
        raise MistakeError(f"{place} raised {one_line(error)}.") from error


# -- what the options change ----------------------------------------------------------


def module_of(model: Any) -> nn.Module | None:
    """Return the module behind a model, if it is one."""
    model = model.module if isinstance(model, AsModel) else model
    return model if isinstance(model, nn.Module) else None


def _load_weights(model: Any, path: str | None) -> None:
    if path is None:
        return
    module = module_of(model)
    if module is None:
        raise MistakeError("--weights needs a model that is a torch.nn.Module.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MistakeError(f"There is no file {path}.") from error
    except Exception as error:
        raise_if_out_of_memory(error)
        raise MistakeError(
            f"{path} is no file of weights, as `torch.save(model.state_dict(), path)` "
            f"writes it ({type(error).__name__})."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise_if_out_of_memory(error)
        raise MistakeError(
            f"{path} does not fit the model: {one_line(error)}"
        ) from error


def _moved(
    model: Any, loss: Any, params: Any, data: Any, choice: Choice
) -> tuple[Any, Any, Any, Any]:
    """Return model, loss, parameters and data, where and as precise as wanted."""
    if choice.device is None and choice.dtype is None:
        return model, loss, params, data
    dtype = None if choice.dtype is None else getattr(torch, choice.dtype)
    target: dict[str, Any] = {"device": choice.device, "dtype": dtype}
    try:
        for module in (module_of(model), module_of(loss)):
            if module is not None:
                module.to(**target)
        if module_of(model) is None and isinstance(params, dict):
            params = {name: x.detach().to(**target) for name, x in params.items()}
    except (RuntimeError, AssertionError) as error:
        raise_if_out_of_memory(error)
        reason = str(error).splitlines()[0]
        raise MistakeError(
            f"--device {choice.device} cannot be used here: {reason}"
        ) from error
    if dtype is not None:
        data = (
            [*Converted(data, dtype)]
            if isinstance(data, tuple | list)
            else Converted(data, dtype)
        )
    return model, loss, params, data


def _chosen(model: Any, params: Any, choice: Choice) -> Any:
    if choice.params is None:
        if params is not None:
            return params
        module = module_of(model)
        if module is None:
            raise MistakeError(
                f"{choice.problem}: a model that is no torch.nn.Module needs params: "
                "return (model, loss, params, data)."
            )
        return {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not isinstance(params, dict):
        module = module_of(model)
        if module is None:
            raise MistakeError("--params needs parameters with names: return a dict.")
        params = dict(module.named_parameters())
    with _explained("--params"):
        return {name: params[name] for name in matching_names(choice.params, params)}


def _adapted(risk: EmpiricalRisk, choice: Choice) -> EmpiricalRisk:
    """Return a user's own risk, which only takes other weights."""
    given = {
        "--params": choice.params,
        "--device": choice.device,
        "--dtype": choice.dtype,
        "--max-memory": choice.max_memory,
    }
    if late := [name for name, value in given.items() if value is not None]:
        raise MistakeError(
            f"{choice.problem} returned an EmpiricalRisk, which exists already: set "
            f"what {', '.join(late)} would change in the function itself."
        )
    if choice.weights is not None:
        module = module_of(risk.model_func)
        own = {} if module is None else dict(module.named_parameters())
        if not all(risk.params[name] is own.get(name) for name in risk.params):
            raise MistakeError(
                "--weights needs a risk with the parameters of a torch.nn.Module."
            )
        _load_weights(module, choice.weights)
    return risk


# -- what there is to say about a risk ------------------------------------------------


def with_random_parameters(risk: EmpiricalRisk, seed: int) -> EmpiricalRisk:
    """Return the risk of a copy of the model whose layers are initialised anew.

    Parameters
    ----------
    risk : EmpiricalRisk
        Of the model as it is, which stays so.
    seed : int
        Of the random parameters.

    Raises
    ------
    MistakeError
        If not all parameters belong to layers with ``reset_parameters``.
    """
    module = module_of(risk.model_func)
    if module is None:
        raise MistakeError("the model is no torch.nn.Module")
    module = copy.deepcopy(module)
    known = dict(module.named_parameters())
    fresh: set[int] = set()
    devices = [risk.space.device] if risk.space.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for layer in module.modules():
            for name in RESETS:
                if callable(reset := getattr(layer, name, None)):
                    reset()
                    fresh.update(id(p) for p in layer.parameters(recurse=False))
    for name in risk.params:
        if name not in known or id(known[name]) not in fresh:
            raise MistakeError(f"the layer of {name!r} has no `reset_parameters`")
    params = {name: known[name] for name in risk.params}
    return risk.twin(model_func=module, params=params)


def data_digest(data: Iterable[Any]) -> tuple[str, int, int]:
    """Return a digest of the data, and the numbers of data and batches.

    Parameters
    ----------
    data : iterable
        Batches.

    Returns
    -------
    str
        SHA-256 of the sum of the digests of all data, so that neither their order nor
        the batches they come in count.
    int
        Number of data; a batch whose tensors differ in length is one.
    int
        Number of batches.
    """
    total = size = batches = 0
    for batch in data:
        tensors = [x.detach().cpu().contiguous() for x in tensors_in(batch)]
        heads = [f"{x.dtype} {tuple(x.shape[1:])}".encode() for x in tensors]
        lengths = {len(x) if x.ndim else -1 for x in tensors}
        (length,) = lengths if len(lengths) == 1 else (-1,)
        rows = range(length) if length > 0 else [slice(None)]
        bits = [x.reshape(len(x) if length > 0 else 1, -1) for x in tensors]
        parts = [x.view(torch.uint8).numpy() if x.numel() else None for x in bits]
        for i in rows:
            one = hashlib.sha256()
            for head, part in zip(heads, parts, strict=True):
                one.update(head)
                if part is not None:
                    one.update(part[i].tobytes())
            total += int.from_bytes(one.digest(), "big")
            size += 1
        batches += 1
    digest = hashlib.sha256((total % 2**256).to_bytes(32, "big"))
    return digest.hexdigest(), size, batches


def describe(
    risk: EmpiricalRisk, name: str, learning_rate: float | None, counts: tuple[int, int]
) -> Problem:
    """Return what a report says about its problem.

    Parameters
    ----------
    risk : EmpiricalRisk
        The problem.
    name : str
        As on the command line.
    learning_rate : float or None
        As on the command line.
    counts : tuple of int
        Numbers of data and of batches.
    """
    gradient, loss = risk.gradient_and_loss()
    norm = float(sum(float(g.double().norm()) ** 2 for g in gradient) ** 0.5)
    sizes = {key: p.numel() for key, p in risk.params.items()}
    data, batches = counts
    return Problem(
        name,
        _name(risk.model_func),
        _name(risk.loss_func),
        sizes,
        batches,
        data,
        float(loss),
        norm,
        learning_rate,
    )


def _name(x: Callable[..., Any] | None) -> str:
    return str(getattr(x, "__name__", type(x).__name__))
