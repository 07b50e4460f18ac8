"""Parts of autograd graphs whose derivatives are not torch's own.

Whether a derivative can itself be differentiated is up to whoever wrote it.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from curvlinops._model import graph_nodes
from curvlinops._substitutes import HOOKED

_CURE = (
    "Write its backward pass with operations of torch on the tensors it is given and "
    "on `ctx.saved_tensors`, without `.detach()`, `.data`, `no_grad()`, `.numpy()` or "
    "other libraries, so that it can be differentiated once more"
)


def foreign_parts(*outputs: Tensor) -> list[str]:
    """Name the functions and hooks of a user's in the graphs of some tensors."""
    names = set()
    for node in graph_nodes(*outputs):
        if isinstance(node, BackwardCFunction):
            function = getattr(node, "_forward_cls", type(node))
            names.add(f"the autograd function {function.__qualname__!r}")
        elif type(node).__name__ == "CppFunction":  # of an extension in C++
            names.add(f"the autograd function {node.name()!r}")
        elif hook := node.metadata.get(HOOKED):
            names.add(f"the hook {hook!r} on a tensor")
    return sorted(names)


def not_differentiable(names: list[str], what: str, cure: str = "") -> RuntimeError:
    """Return the error that names what has no right second derivative.

    Parameters
    ----------
    names : list of str
        What :func:`foreign_parts` has found.
    what : str
        What came out wrong, and how that was seen.
    cure : str, optional
        What else would do.
    """
    culprits = " or ".join(names) if names else "some operation of the model"
    return RuntimeError(
        f"{what} The derivative of the backward pass of {culprits} is wrong or "
        f"missing. {_CURE}{cure}."
    )
