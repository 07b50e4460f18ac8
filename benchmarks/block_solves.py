"""Time of solves for several right-hand sides: one after another, or in step.

Run ``python benchmarks/block_solves.py [K]``. Both ways run SciPy's CG for a fixed
number of iterations on ``K`` columns (default: 16); in step, all columns share block
products. The gain in the last column is what ``TOGETHER_MIN_COLUMNS`` and
``TOGETHER_MAX_DIM`` of ``curvlinops._krylov`` are chosen by. Times are processor times
of one process that alternates; the fastest of three counts.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from time import process_time

import torch
from torch import nn

from curvlinops import CGInverseLinearOperator, _krylov
from curvlinops._operator import TorchOperator
from curvlinops.structured import IdentityLinearOperator, TensorLinearOperator

ITERATIONS = 10


class Costly(TensorLinearOperator):
    """A dense operator with a fixed cost per product, like that of a small model."""

    seconds = 0.0

    def _apply(self, V: torch.Tensor) -> torch.Tensor:
        """Wait, then multiply."""
        end = process_time() + self.seconds
        while process_time() < end:
            pass
        return super()._apply(V)


def problems() -> Iterator[tuple[str, TorchOperator]]:
    """Yield the positive definite operators that are inverted."""
    torch.manual_seed(0)
    for dim in 50, 500, 5_000:
        Q = torch.randn(dim, dim)
        for seconds in (0.0, 2e-4, 2e-3) if dim == 50 else (0.0,):
            A = Costly(Q @ Q.T / dim + torch.eye(dim))
            A.seconds = seconds
            yield f"dense + {1e3 * seconds:.1f} ms", A
    yield from damped_ggns()


def damped_ggns() -> Iterator[tuple[str, TorchOperator]]:
    """Yield the damped GGN of a tiny, a small, and a larger network."""
    from curvlinops import GGNLinearOperator

    for widths, batch in (
        ((8, 24, 24, 4), 64),
        ((64, 128, 10), 128),
        ((784, 64, 10), 512),
        ((784, 512, 512, 10), 512),
    ):
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
        X, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
        params = dict(model.named_parameters())
        G = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)])
        shapes = [p.shape for p in params.values()]
        damping = 1e-2 * IdentityLinearOperator(shapes, "cpu", torch.float32)
        yield f"GGN {'-'.join(map(str, widths))}", G + damping


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    start = process_time()
    work()
    return process_time() - start


def main(K: int) -> None:
    """Print the table."""
    _krylov.TOGETHER_MIN_COLUMNS = 2
    print(f"K = {K} columns, {ITERATIONS} CG iterations, milliseconds per column")
    print(f"{'operator':<22} {'N':>7} {'each':>9} {'in step':>9} {'gain':>6}")
    for name, A in problems():
        N = A.shape[0]
        A_inv = CGInverseLinearOperator(A, max_iter=ITERATIONS, tolerance=0)
        B = torch.randn(N, K)
        best = {0: float("inf"), N: float("inf")}
        for _ in range(3):
            for limit in best:
                _krylov.TOGETHER_MAX_DIM = limit
                best[limit] = min(best[limit], seconds(lambda A=A_inv, B=B: A @ B))
        each, together = (1e3 * t / K for t in best.values())
        print(
            f"{name:<22} {N:>7} {each:>9.2f} {together:>9.2f} {each / together:>6.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
