"""The sharpness, every few steps of a training loop, whoever runs the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from curvlinops._operand import to_numpy
from curvlinops._random import Rng
from curvlinops.estimators._base import require_positive_int
from curvlinops.estimators.tracking import EIGENVALUES, Follower, Quantities, Track

#: Where Lightning's callbacks are, which its trainer wants to be of a class of its own.
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


class TrainingCallback:
    """What :func:`training_callback` returns: call it after every step.

    Attributes
    ----------
    track : Track
        The table up to now, one row per measurement.
    """

    def __init__(self, matrix: Any, every: int, follower: Follower) -> None:
        self._matrix, self._every, self._follower = matrix, every, follower
        self._step = 0

    @property
    def track(self) -> Track:
        """The table up to now, see :class:`~curvlinops.estimators.Track`."""
        return self._follower.track

    def __call__(self, step: int | None = None, **columns: float) -> bool:
        """Count a step, and measure if it is one to measure.

        Parameters
        ----------
        step : int, optional
            Its number; default: one more than the last one's, from 1 on.
        **columns : float
            Further columns of the table, such as ``loss=``, ``learning_rate=``.

        Returns
        -------
        bool
            Whether a row was added.
        """
        before, self._step = self._step, self._step + 1 if step is None else int(step)
        again = bool(self._follower.rows) and self._step == before
        if self._step % self._every or again:
            return False
        A = self._matrix if hasattr(self._matrix, "shape") else self._matrix()
        with _evaluating(A), torch.enable_grad():
            known = {n: float(to_numpy(value)) for n, value in columns.items()}
            self._follower.measure(A, self._step, **known)
        return True

    def on_train_batch_end(
        self, trainer: Any, module: Any = None, outputs: Any = None, *_: Any, **__: Any
    ) -> None:
        """Count a step of a Lightning trainer."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        known = _learning_rate(next(iter(getattr(trainer, "optimizers", ())), None))
        known |= {} if loss is None else {"loss": loss}
        if trainer.global_step:  # none while gradients accumulate for the first
            self(trainer.global_step, **known)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> Any:
        """Count a step of a HuggingFace trainer."""
        self(state.global_step, **_learning_rate(parts.get("optimizer")))
        return control

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Answer the trainers' other hooks, by nothing."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


def _learning_rate(optimizer: Any) -> dict[str, float]:
    groups = getattr(optimizer, "param_groups", None)
    return {"learning_rate": float(groups[0]["lr"])} if groups else {}


@contextmanager
def _evaluating(A: Any) -> Iterator[None]:
    """Put the models behind a matrix in ``eval`` mode, each module back afterwards."""
    modes = {module: module.training for module in _modules(A)}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _modules(A: Any) -> Iterator[nn.Module]:
    model = getattr(getattr(A, "risk", None), "model_func", None)
    if isinstance(model, nn.Module):
        yield from model.modules()
    for part in getattr(A, "args", ()):
        yield from _modules(part)


def training_callback(
    A: Any,
    every: int = 100,
    quantities: Quantities = EIGENVALUES,
    *,
    k: int = 1,
    which: str = "LA",
    num_matvecs: int = 60,
    rng: Rng = None,
) -> TrainingCallback:
    r"""Follow the sharpness, or other quantities, from inside a training loop.

    Parameters
    ----------
    A : LinearOperator, or callable
        An operator of the model that is trained, which follows its parameters; or a
        function without arguments that builds one at each measurement, as for trainers
        that move the model to another device.
    every : int, optional
        Measure at the steps that are multiples of this.
    quantities, k, which, num_matvecs, rng : optional
        What to measure, see :func:`track`. By default the largest eigenvalue; each
        search begins with the eigenvectors of the one before.

    Returns
    -------
    TrainingCallback
        Call it after each step of a loop of your own; or pass it to Lightning's
        ``Trainer(callbacks=[...])`` (imported before) or HuggingFace's
        ``Trainer(callbacks=[...])``, which count the steps. The learning rate, and
        Lightning's loss, become columns. ``.track`` is the table up to now, for
        :func:`curvlinops.plots.plot_tracking`.

    Raises
    ------
    ValueError
        If ``every`` is no positive number, or a quantity is unknown.

    Notes
    -----
    The model is in ``eval`` mode during measurements: with dropout or batch statistics,
    products are no linear function of the vector. Some 30 products each, with warm
    starts fewer; each is that of all data of ``A``, so give it a part of the training
    data where that is enough.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import HessianLinearOperator, training_callback
    >>> net, loss = torch.nn.Linear(4, 1), torch.nn.MSELoss()
    >>> X, y = torch.rand(20, 4), torch.rand(20, 1)
    >>> H = HessianLinearOperator(net, loss, dict(net.named_parameters()), [(X, y)])
    >>> callback = training_callback(H, every=5, rng=0)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     value = loss(net(X), y)
    ...     value.backward()
    ...     optimizer.step()
    ...     _ = callback(loss=value)
    >>> callback.track["step"].tolist()
    [5, 10]
    >>> bool(callback.track["eigenvalue_0"][1] < 2 / 0.1)  # a stable learning rate
    True
    """
    modules = [sys.modules[name] for name in LIGHTNING if name in sys.modules]
    bases = (TrainingCallback, *dict.fromkeys(module.Callback for module in modules))
    kind = type("TrainingCallback", bases, {}) if modules else TrainingCallback
    follower = Follower(quantities, k, which, num_matvecs, rng)
    return kind(A, require_positive_int("every", every), follower)
