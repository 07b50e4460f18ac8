"""A report from its settings: the order in which everything is computed."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from curvlinops import __version__
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.report._blocks import baseline, blocks, overlaps
from curvlinops.report._budget import (
    Level,
    fit,
    level_of,
    predicted,
    seconds_per_product,
)
from curvlinops.report._checkpoint import Stages
from curvlinops.report._contents import Counts, Problem, Provenance, Report
from curvlinops.report._matrices import KINDS
from curvlinops.report._measure import Task, measure
from curvlinops.report._mistakes import MistakeError, one_line
from curvlinops.report._problem import (
    EMBEDDED,
    build,
    data_digest,
    describe,
    with_random_parameters,
)
from curvlinops.report._settings import Settings
from curvlinops.report._verdicts import verdicts
from curvlinops.risk import EmpiricalRisk

#: Entries of eigenvectors that are kept in files.
VECTOR_ENTRIES = 2**24

VERSIONS = {
    "python": platform.python_version(),
    "curvlinops": __version__,
    "numpy": np.__version__,
    "scipy": scipy.__version__,
    "torch": str(torch.__version__),
}


@dataclass(frozen=True)
class Timing:
    """Counts, and the seconds of a product with each matrix that led to them.

    Attributes
    ----------
    counts : Counts
        How much is computed.
    seconds : tuple of float
        Empty if the counts were given.
    """

    counts: Counts
    seconds: tuple[float, ...] = ()


class Job:
    """One run of some settings.

    Parameters
    ----------
    settings : Settings
        What to compute.
    command : str, optional
        For the provenance.
    checkpoint : Path, optional
        Folder that keeps what is finished.
    progress : callable, optional
        Gets the name of every stage before it starts.

    Attributes
    ----------
    risk : EmpiricalRisk
        The problem.
    matrices : dict
        From names to operators.
    timing : Timing
        How much is computed.
    """

    def __init__(
        self,
        settings: Settings,
        command: str = "",
        checkpoint: Path | None = None,
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.settings, self._command = settings, command
        self._started = datetime.now(UTC)
        choice = settings.choice
        with _noted() as self._notes:
            self.risk = build(choice)
        digest, size, batches = data_digest(self.risk.data)
        self._data = digest
        name, rate = choice.problem, settings.learning_rate
        self.problem: Problem = describe(self.risk, name, rate, (size, batches))
        self.matrices = {
            key: _built(key, self.risk, choice.seed) for key in settings.matrices
        }
        first = next(iter(self.matrices.values()))
        self._parameters = first.parameters_fingerprint()
        identity = {
            **settings.identity(),
            "parameters": self._parameters,
            "data": digest,
            "versions": VERSIONS,
        }
        self._stages = Stages(checkpoint, identity, progress)
        self.timing = self._timed()

    def _timed(self) -> Timing:
        """Return the counts: those given, those of the checkpoint, or new ones."""
        settings, sizes = self.settings, self.problem.parameters
        if settings.counts is not None:
            return Timing(settings.counts)

        def compute(_: Path | None) -> tuple[Timing, int]:
            times = [seconds_per_product(A) for A in self.matrices.values()]
            level = level_of(settings.budget)
            if settings.top is not None:
                wanted = replace(level.counts, top=settings.top)
                level = Level(level.minutes, wanted)
            return Timing(fit(level, sizes, times), tuple(times)), 0

        found = self._stages.run("counts", Timing, compute)
        if found is None:
            raise MistakeError(self._stages.done[-1].failure)
        return found

    def prediction(self) -> str:
        """Say how much will be computed, and how long that takes."""
        counts, seconds = self.timing.counts, self.timing.seconds
        sizes = self.problem.parameters
        names = list(self.matrices)
        number, total = predicted(counts, sizes, seconds or [0.0] * len(names))
        how = f"at most {number} products"
        if seconds:
            each = ", ".join(
                f"{name} {1e3 * s:.2g} ms"
                for name, s in zip(names, seconds, strict=True)
            )
            how += f" ({each} each), {ceil(total)} s or less"
        return (
            f"Plan      {how}: {counts.ncv} Lanczos steps in {counts.repeats} runs, "
            f"{counts.probes} probes, {counts.top} eigenpairs"
        )

    def resolved(self) -> Settings:
        """Return the settings with the counts, as a replay needs them."""
        return replace(self.settings, counts=self.timing.counts)

    def report(self) -> Report:
        """Compute everything."""
        settings, stages, counts = self.settings, self._stages, self.timing.counts
        task = Task(counts, settings.choice.seed, settings.damping, settings.parts)
        matrices = tuple(
            measure(A, name, KINDS[name].semidefinite, task, stages)
            for name, A in self.matrices.items()
        )
        name, A = next(iter(self.matrices.items()))
        wanted = "density" in settings.parts
        parts = start = None
        if wanted and counts.max_blocks and len(self.risk.params) > 1:
            parts = blocks(A, name, task, stages)
        if wanted and counts.baseline:
            start = self._baseline(name, task)
        compared = overlaps(matrices)
        matrices = tuple(_without_large_vectors(m) for m in matrices)
        notes = [*self._notes, *(note for s in stages.done for note in s.notes)]
        report = Report(
            self._provenance(),
            self.problem,
            counts,
            matrices,
            compared,
            parts,
            start,
            (),
            tuple(dict.fromkeys(notes)),
        )
        return replace(report, verdicts=verdicts(report))

    def _baseline(self, name: str, task: Task) -> Any:
        seed = self.settings.choice.seed
        try:
            with _noted():
                risk = with_random_parameters(self.risk, seed + 1)
                loss = float(risk.loss())
                A = _built(name, risk, seed)
        except (MistakeError, ValueError, RuntimeError) as error:
            raise_if_out_of_memory(error)
            self._notes.append(
                f"No baseline with random parameters: {one_line(error)}."
            )
            return None
        return baseline(A, name, loss, task, self._stages)

    def _provenance(self) -> Provenance:
        space, done = self.risk.space, self._stages.done
        device = str(space.device)
        if space.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(space.device)})"
        return Provenance(
            self._command,
            self._started.isoformat(timespec="seconds").replace("+00:00", "Z"),
            VERSIONS,
            f"{platform.system()} {platform.machine()}",
            device,
            str(space.dtype).removeprefix("torch."),
            self.settings.choice.seed,
            self._parameters,
            self._data,
            sum(stage.products for stage in done),
            sum(stage.seconds for stage in done),
        )


def _built(name: str, risk: EmpiricalRisk, seed: int) -> Any:
    """Build a matrix whose products do not depend on what was multiplied before.

    Hence a run that goes on after a kill, without the products before, a run without
    a checkpoint, and a replay, which times no products, have the same bits. What
    products do not do then is to keep recordings for later ones.
    """
    try:
        A = KINDS[name].build(risk, seed)
    except (ValueError, TypeError, RuntimeError) as error:
        raise_if_out_of_memory(error)
        raise MistakeError(f"--matrix {name}: {one_line(error)}") from error
    A.fix_route()
    return A


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect warnings as lines."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    notes += dict.fromkeys(" ".join(str(w.message).split()) for w in caught)


def _without_large_vectors(m: Any) -> Any:
    for end in ("top", "bottom"):
        found = getattr(m, end)
        if found is not None and found.vectors.size > VECTOR_ENTRIES:
            found = replace(found, vectors=found.vectors[:, :0])
            m = replace(m, **{end: found})
    return m


@contextmanager
def threads(settings: Settings) -> Iterator[None]:
    """Compute the embedded problem in one thread: more are slower at its size."""
    before = torch.get_num_threads()
    if settings.choice.problem == EMBEDDED:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
