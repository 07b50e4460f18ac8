"""Which parameters a model's outputs depend on, and what else they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from curvlinops._data import cloned
from curvlinops._linearization import Linearization
from curvlinops._model import Model, graph_leaves
from curvlinops._once import told_before


class CopyLeaksError(Exception):
    """The private copy of a module reaches tensors outside of it."""


class Reach:
    """Parameters that the outputs of a pass over the data depend on.

    Parameters
    ----------
    model_func : callable
        The user's model.
    params : dict of str to Tensor
        The parameters.
    """

    def __init__(
        self, model_func: Callable[..., Any], params: dict[str, Tensor]
    ) -> None:
        self._model_func, self._params = model_func, params
        #: Names of parameters reached so far; `None` once nobody asks any more.
        self.names: set[str] | None = set()
        self._without_gradient: list[str] = []

    def check(self, model: Model, batch: Linearization) -> None:
        """Raise if the output of a first batch depends on other tensors than it should.

        Raises
        ------
        CopyLeaksError
            If a private copy of the module is at fault.
        ValueError
            If the user's model is.
        """
        leaked = model.foreign_leaves(batch.output)
        reached = _names(model, batch.reached)
        copied = isinstance(self._model_func, nn.Module) and model._held is None
        if copied and model.uses_frozen(cloned(batch.X)):
            raise CopyLeaksError
        if not leaked and len(reached) == len(self._params):
            return
        self._without_gradient = self._used_without_gradient(model, batch)
        # Parameters that do not require gradients leave no trace when they leak.
        if copied and (leaked or self._names_in_place(model, batch) - reached):
            raise CopyLeaksError
        if not leaked and reached:
            return
        if leaked:
            raise ValueError(
                f"The model uses {leaked} directly instead of through its `params` "
                "argument or a module's attribute, so these cannot be replaced."
            )
        raise ValueError(
            "The model's output does not depend on any of the parameters in `params` "
            "(are they detached, or is the model run under `torch.no_grad()`?)."
            + self._hint(self._params)
        )

    def note(self, model: Model, batch: Linearization) -> None:
        """Take down which parameters a batch's output depends on."""
        if self.names is not None:
            self.names |= _names(model, batch.reached)

    def warn_about_unused(self) -> None:
        """Warn once about parameters that no batch's output depends on.

        Once for all operators of a model.
        """
        if self.names is None:
            return
        unused = [name for name in self._params if name not in self.names]
        self.say_no_more()
        if unused and not told_before(self._model_func, (Reach, *unused)):
            warnings.warn(
                f"The model's output does not depend on {unused} for this data: the "
                f"corresponding rows and columns are zero.{self._hint(unused)}",
                stacklevel=2,
            )

    def say_no_more(self) -> None:
        """Leave the warning to somebody else."""
        self.names = None

    def _names_in_place(self, model: Model, batch: Linearization) -> set[str]:
        """Return the parameters that a batch's output depends on, without a copy."""
        model = model.anew()
        model.evaluate_in_place()
        output = model.run(lambda: model(cloned(batch.X)))
        return _names(model, set(map(id, graph_leaves(output))))

    def _used_without_gradient(self, model: Model, batch: Linearization) -> list[str]:
        """Return the parameters that the model uses where gradients are off."""
        model = model.anew()  # whose uses nobody records
        return model.run(lambda: model.used_without_gradient(cloned(batch.X)))

    def _hint(self, unused: Iterable[str]) -> str:
        """Say which unused parameters are used where gradients are off."""
        hidden = [name for name in unused if name in self._without_gradient]
        if not hidden:
            return ""
        return f" The model uses {hidden} where gradients are off (`torch.no_grad()`)."


def _names(model: Model, reached: set[int]) -> set[str]:
    return {name for name, p in model.aliases.items() if id(p) in reached}
