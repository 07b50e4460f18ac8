"""A risk's loss, and what is known of what it does with its terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from curvlinops._reduction import Evidence, Reduction
from curvlinops._watch import Watch
from curvlinops.losses import Loss, LossFunction, as_loss_function


class Terms:
    """The loss of a risk, taken for what it has been found to be.

    Parameters
    ----------
    loss_func, options, data
        As a risk has them.
    reduction : Reduction, optional
        What has been found before.

    Attributes
    ----------
    loss : LossFunction or None
        The loss, with options as they are.
    reduction : Reduction or None
        What it is taken for; ``None`` if that need not be found, or has not been yet.
    flat : bool or None
        Whether an opaque loss has no second derivative in any of the data; ``None`` if
        nobody has looked.
    """

    loss: LossFunction | None

    def __init__(
        self,
        loss_func: Any,
        options: Mapping[str, Any],
        data: Any,
        reduction: Reduction | None = None,
    ) -> None:
        self._loss_func, self._options, self._data = loss_func, options, data
        self.flat: bool | None = None
        self.restore(reduction)
        self._seen = None if reduction is None else self._state()

    def restore(self, reduction: Reduction | None) -> None:
        """Take the loss for what it was found to be, or for nothing known."""
        self.reduction = reduction
        self.read()

    def read(self) -> None:
        """Read the options of the user's loss."""
        self.loss = self._as_given()
        if self.reduction is not None and self.loss is not None:
            self.loss = self.loss.reduced_by(self.reduction.name)

    @property
    def unknown(self) -> bool:
        """Whether it is to be found what the loss does."""
        return self.reduction is None and self.evidence() is not None

    @property
    def known(self) -> Reduction | None:
        """What was found, unless loss or data have changed since."""
        return self.reduction if self._seen == self._state() else None

    def evidence(self) -> Evidence | None:
        """Return what collects evidence, if the loss has to be looked at."""
        function = None if self.loss is None else self.loss.undetermined
        return None if function is None else Evidence(function)

    @contextmanager
    def supposed(self) -> Iterator[None]:
        """Take an unknown loss for a mean, as long as evidence is collected."""
        unknown = self.unknown
        try:
            if unknown:
                self.reduction = Reduction("mean")
            yield
        except BaseException:
            if unknown:
                self.restore(None)
            raise

    def conclude(self, evidence: Evidence | None) -> None:
        """Take the loss for what it was seen to be, or raise if it is nothing known."""
        if evidence is not None:
            found = self._taken_for(evidence)
            found.announce()
            self.restore(found)
            self._seen = self._state()

    def confirm(self, evidence: Evidence) -> None:
        """Raise if the loss was seen to be something else than it is taken for."""
        found = self._taken_for(evidence)
        if found.wrong:
            found.announce()
        assert self.loss is not None
        if found.found and found.name != (used := self.loss.reduction):
            raise ValueError(f"The loss is a {found.name}, but is taken for a {used}.")

    def require(self, what: str) -> None:
        """Raise, or warn once, if it is not known what one batch's loss averages over.

        Parameters
        ----------
        what : str
            What that is needed for.
        """
        if self.reduction is not None:
            self.reduction.require(what)
            self.reduction = replace(self.reduction, doubt="")

    def look_for_curvature(self, loss: Loss) -> None:
        """Look whether a batch's loss has a second derivative, if none before had."""
        if loss.opaque and self.flat is not False:
            self.flat = loss.is_flat

    def warn_if_flat(self, matrix: str, stacklevel: int) -> None:
        """Warn if a matrix of the loss's second derivatives is known to be zero."""
        if self.loss is not None:
            self.loss.warn_if_flat(matrix, stacklevel + 1, bool(self.flat))

    def _taken_for(self, evidence: Evidence) -> Reduction:
        """Return what the loss is, from what was seen, and what user and loss say."""
        loss = self._as_given()
        declared = None if loss is None or loss.assumed else loss.reduction
        return evidence.conclude(self._options["reduction"], declared)

    def _as_given(self) -> LossFunction | None:
        if self._loss_func is None:
            return None
        return as_loss_function(self._loss_func, **self._options)

    def _state(self) -> Any:
        """Return what differs whenever the loss may do something else."""
        if self.evidence() is None:
            return None
        return Watch(None, self._loss_func, {}, self._data).state()
