"""What preconditioners save conjugate gradients on damped GGNs, and what they cost.

    python benchmarks/kfac_preconditioner.py [--problems cnn mlp ...] [--epochs 20]

Networks are trained on scikit-learn's images of digits; then SciPy's ``cg`` solves
``(G + damping I) x = gradient`` to ``rtol=1e-6`` in float64. All inverses are damped
exactly. Prints one table with a row for each network (its number of parameters, and the
loss) and damping, and in each cell

    iterations / products with G in total / CPU time relative to no preconditioner.

Both totals contain the set-up: that of Nystrom counts as many products as its rank,
those of the others count their CPU time in products. All products are plain ones, as
they are where neither a recording nor the matrix itself is kept. Takes a few minutes on
one thread.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import date
from itertools import pairwise
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from products import machine
from scipy.sparse.linalg import cg
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    NystromPreconditionerLinearOperator,
)

RANK = 50
SKETCH = f"Nystrom({RANK})"


def perceptron(*widths: int) -> nn.Module:
    """Return a perceptron on the pixels."""
    layers: list[nn.Module] = []
    for pair in pairwise(widths):
        layers += [nn.Linear(*pair), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Return two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


class Transformer(nn.Module):
    """One encoder layer on the eight rows of an image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(torch.zeros(8, width))
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, 10)

    def forward(self, X: Tensor) -> Tensor:
        """Return logits."""
        rows = self.embedding(X.unflatten(1, (8, 8))) + self.positions
        return self.head(self.layer(rows).mean(1))


class Task(NamedTuple):
    """A network, the number of images, and the dampings."""

    make: Callable[[], nn.Module]
    images: int
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3)


TASKS = {
    "cnn": Task(convolutions, 300),
    "mlp": Task(lambda: perceptron(64, 48, 32, 10), 300),
    "transformer": Task(Transformer, 300),
    "softmax": Task(lambda: perceptron(64, 10), 1797, (1e-1, 1e-3, 1e-5)),
    "narrow mlp": Task(lambda: perceptron(64, 8, 10), 1797, (1e-1, 1e-3, 1e-5)),
}


def trained(task: Task, epochs: int) -> EmpiricalRisk:
    """Train a network; return its risk."""
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X / 16)[: task.images], torch.from_numpy(y)[: task.images]
    model, loss = task.make().double(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = list(zip(X.split(100), y.split(100), strict=True))
    for batch, target in batches * epochs:
        optimizer.zero_grad()
        loss(model(batch), target).backward()
        optimizer.step()
    return EmpiricalRisk(model, loss, list(model.parameters()), [(X, y)])


def factored(cls: Any) -> Callable[[GGNLinearOperator], Any]:
    """Return what computes exact Kronecker factors."""

    def compute(G: GGNLinearOperator) -> Any:
        options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
        K = cls(G.risk, **options)
        K.compute_kronecker_factors()
        return lambda damping: K.inverse(damping, **exact)

    # That of EKFAC is exact anyway.
    exact = {} if cls is EKFACLinearOperator else {"use_exact_damping": True}
    return compute


def diagonal(G: GGNLinearOperator) -> Any:
    """Compute the diagonal."""
    D = GGNDiagonalLinearOperator(G.risk)
    D @ np.ones(D.shape[1])
    return D.inverse


def nystrom(G: GGNLinearOperator) -> Any:
    """Prepare a sketch, which is made for each damping."""
    return lambda damping: NystromPreconditionerLinearOperator(G, RANK, damping, rng=0)


#: Names of preconditioners, and what computes all that does not depend on a damping.
METHODS: dict[str, Callable[[GGNLinearOperator], Any]] = {
    "none": lambda G: lambda damping: None,
    "KFAC": factored(KFACLinearOperator),
    "EKFAC": factored(EKFACLinearOperator),
    "KFOC": factored(KFOCLinearOperator),
    "diagonal": diagonal,
    SKETCH: nystrom,
}


#: Of the table's columns: network, damping, and one for each method.
WIDTHS = 24, 7, *[17] * len(METHODS)


def seconds(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return a result, and the CPU time that it took."""
    start = process_time()
    result = function(*args)
    return result, process_time() - start


def rows(name: str, epochs: int) -> Iterator[list[str]]:
    """Yield the cells of a network's rows."""
    risk = trained(TASKS[name], epochs)
    G = GGNLinearOperator(risk)
    G.fix_route("plain")
    gradient, loss = risk.gradient_and_loss()
    b = torch.cat([g.flatten() for g in gradient]).numpy()
    product = min(seconds(G.dot, b)[1] for _ in range(10))
    made = {title: seconds(make, G) for title, make in METHODS.items()}
    eye = IdentityLinearOperator(G.in_shapes, G.device, G.torch_dtype)
    first = f"{name} ({G.shape[0]}, {float(loss):.1g})"
    for damping in TASKS[name].dampings:
        cells, plain = [first, f"{damping:.0e}"], 0.0
        for title, (invert, prepared) in made.items():
            M, inverted = seconds(invert, damping)
            iterations, solved = seconds(solve, G + damping * eye, b, M)
            setup = prepared + inverted
            products = iterations + (RANK if title == SKETCH else setup / product)
            plain = plain or solved
            ratio = (setup + solved) / plain
            cells.append(f"{iterations} / {products:.0f} / {ratio:.2g}")
        yield cells


def solve(A: Any, b: np.ndarray, M: Any) -> int:
    """Return the number of iterations of SciPy's solver."""
    steps: list[Any] = []
    x, info = cg(A, b, M=M, rtol=1e-6, maxiter=20_000, callback=steps.append)
    assert info == 0
    assert np.linalg.norm(A @ x - b) <= 1e-5 * np.linalg.norm(b)
    return len(steps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, {machine()['cpu']}, torch {torch.__version__}, one thread")
    print(*("=" * width for width in WIDTHS), sep="  ")
    show(["network", "damping", *METHODS])
    print(*("=" * width for width in WIDTHS), sep="  ")
    for name in args.problems:
        for cells in rows(name, args.epochs):
            show(cells)
    print(*("=" * width for width in WIDTHS), sep="  ")


def show(cells: list[str]) -> None:
    """Print one row of the table."""
    print("  ".join(map(str.ljust, cells, WIDTHS)).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
