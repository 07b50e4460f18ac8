"""Many runs of one solver, side by side, sharing block products.

A Krylov solver takes one right-hand side and asks for one product at a time. Where a
block of products costs little more than a single one, several runs are kept in step:
each is halted when it asks for a product, and one block product answers all of them.
"""

from __future__ import annotations

import contextvars
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np

Result = TypeVar("Result")
#: ``multiply(name, v)`` gives the product with a vector of shape ``(N,)``.
Multiply = Callable[[str, np.ndarray], np.ndarray]
#: A product with a block of shape ``(N, K)``; with ``(N,)`` in :func:`solve_each`.
Products = Mapping[str, Callable[[np.ndarray], np.ndarray]]


def solve_each(
    solve: Callable[[int, Multiply], Result], products: Products, count: int
) -> list[Result]:
    """Run ``solve(j, multiply)`` for ``j < count``, one after another.

    Parameters
    ----------
    solve : callable
        ``solve(j, multiply)`` runs a solver on right-hand side ``j``; it gets its
        products from ``multiply(name, v)``.
    products : mapping
        The function behind each ``name``.
    count : int
        Number of runs.

    Returns
    -------
    list
        What the runs returned.
    """
    return [solve(j, lambda name, v: products[name](v)) for j in range(count)]


def solve_together(
    solve: Callable[[int, Multiply], Result],
    products: Products,
    count: int,
    block_size: int = 32,
) -> list[Result]:
    """Run ``solve(j, multiply)`` for ``j < count`` in step, with block products.

    Other parameters and the result are those of :func:`solve_each`, with which results
    agree up to the rounding of block products.

    Parameters
    ----------
    solve, products, count
        As in :func:`solve_each`; products get blocks of shape ``(N, K)``.
    block_size : int, optional
        How many runs are in progress at a time.

    Returns
    -------
    list
        What the runs returned.

    Notes
    -----
    Every run has a thread, but only one thread is awake at any moment, and products
    are computed in the caller's. Runs that ask for another product than most others
    wait, which brings all into step. The first exception in a run or a product, or an
    interrupt, ends all runs and is raised; no thread is left behind.
    """
    runs = [_Run(solve, j) for j in range(count)]
    fresh = deque(runs)
    active: list[_Run[Result]] = []
    try:
        while fresh or active:
            while fresh and len(active) < block_size:
                active.append(fresh.popleft())
                active[-1].resume(None)
            name, _ = Counter(run.wants for run in active).most_common(1)[0]
            if name is not None:
                group = [run for run in active if run.wants == name]
                block = np.stack([run.vector for run in group], axis=1)
                answers = products[name](block).T
                for run, answer in zip(group, answers, strict=True):
                    run.resume(np.ascontiguousarray(answer))
            active = [run for run in active if run.wants is not None]
        return [run.result for run in runs]
    finally:
        for run in runs:
            run.cancel()
        for run in runs:
            run.join()


class _Cancelled(BaseException):
    """Unwinds a solver whose result nobody waits for."""


class _Run(Generic[Result]):
    """One run of the solver, halted whenever it asks for a product.

    ``wants`` is the name of that product, and ``None`` once the run has ended.
    """

    result: Result
    vector: np.ndarray

    def __init__(self, solve: Callable[[int, Multiply], Result], j: int) -> None:
        self.wants: str | None = None
        self._solve, self._j = solve, j
        self._answers: SimpleQueue[np.ndarray | None] = SimpleQueue()
        self._halts: SimpleQueue[BaseException | None] = SimpleQueue()
        self._cancelled = False
        # A thread starts with an empty context, without the caller's `np.errstate`
        # (which NumPy 1 keeps by thread).
        self._errors = np.geterr()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), daemon=True
        )

    def resume(self, answer: np.ndarray | None) -> None:
        """Hand over a product; return when the run asks for the next one or ends."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(answer)
        if (error := self._halts.get()) is not None:
            raise error

    def cancel(self) -> None:
        """End the run at its next product, or where it waits for one."""
        self._cancelled = True
        self._answers.put(None)

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with np.errstate(**self._errors):
                self.result = self._solve(self._j, self._multiply)
        except BaseException as caught:
            error = caught
        self.wants = None
        self._halts.put(error)

    def _multiply(self, name: str, v: np.ndarray) -> np.ndarray:
        if not self._cancelled:
            self.wants, self.vector = name, v
            self._halts.put(None)
            answer = self._answers.get()
            if answer is not None and not self._cancelled:
                return answer
        raise _Cancelled
