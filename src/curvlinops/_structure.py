"""Whether a module still has the parameters that an operator was built for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from curvlinops._model import named_parameters

_CURE = "Build a new operator with the parameters that the model has now."


def own_names(
    model_func: Callable[..., Any], params: dict[str, Tensor]
) -> frozenset[str]:
    """Return the names of those tensors that are the module's own parameters."""
    return frozenset(
        n for n, p in _parameters(model_func).items() if params.get(n) is p
    )


def require_same_parameters(
    model_func: Callable[..., Any], params: dict[str, Tensor], own: frozenset[str]
) -> None:
    """Raise if a module has lost or replaced parameters that matter.

    Others may come and go, and so may those in whose place copies were given: there,
    only name and shape count.

    Parameters
    ----------
    model_func : callable
        The user's model.
    params : dict of str to Tensor
        The tensors that were given.
    own : frozenset of str
        The names of those that were the module's own parameters then.

    Raises
    ------
    ValueError
        Which names the parameter and the cure.
    """
    known = _parameters(model_func)
    for name in params:
        if name in own and known.get(name, params[name]) is not params[name]:
            raise ValueError(
                f"The model's parameter {name!r} is another tensor now than when this "
                "operator was built: after `load_state_dict(..., assign=True)`, say, "
                "or because it was registered anew, tied, or moved with its module. "
                f"Products would be those of the old tensor. {_CURE}"
            )
    try:
        named_parameters(model_func, params)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The model has changed since this operator was built. {error} {_CURE}"
        ) from error


def _parameters(model_func: Callable[..., Any]) -> dict[str, Tensor]:
    if not isinstance(model_func, nn.Module):
        return {}
    return dict(model_func.named_parameters(remove_duplicate=False))
