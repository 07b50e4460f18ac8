"""Dense matrices, beside eight lines of ``torch.func``.

Run ``python benchmarks/dense_matrices.py [SUBSTRING]``. The models are MLPs and CNNs of
several shapes, the loss is cross-entropy, on one thread. Both sides alternate in one
process; wall time, the least of several, with a new operator in every turn. Ours are
``to_dense()`` of the GGN and of the Jacobian, a second call, and a product with a block
of columns; the other side is ``vmap(jacrev)`` over all data and one product of large
matrices. Exits with status 1 if a matrix takes more than 1.5 times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from curvlinops import GGNLinearOperator, JacobianLinearOperator

REPEATS, LIMIT, COLUMNS = 3, 1.5, 128

Data = list[tuple[Tensor, Tensor]]


def mlp(*widths: int) -> nn.Sequential:
    """Return a perceptron."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, width: int, outputs: int, *middle: int) -> nn.Sequential:
    """Return two convolutions with a linear layer."""
    (c,) = middle
    first = nn.Conv2d(channels, c, 3, stride=2), nn.ReLU()
    second = nn.Conv2d(c, 2 * c, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8 * c, outputs))


#: Name, model, shape of a datum, number of data, number of batches.
PROBLEMS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    ("mlp 20-30-10", lambda: mlp(20, 30, 10), (20,), 1000, 4),
    ("mlp 64-16-16-5", lambda: mlp(64, 16, 16, 5), (64,), 600, 3),
    ("mlp 10-24-2", lambda: mlp(10, 24, 2), (10,), 4000, 8),
    ("cnn 1x16, 10 classes", lambda: cnn(1, 16, 10, 6), (1, 16, 16), 1000, 4),
    ("cnn 3x12, 4 classes", lambda: cnn(3, 12, 4, 8), (3, 12, 12), 500, 2),
    ("cnn 1x28, 2 classes", lambda: cnn(1, 28, 2, 4), (1, 28, 28), 250, 5),
]


def jacobian(model: nn.Module, X: Tensor) -> Tensor:
    """Return the Jacobian of all outputs, ``[data * classes, P]``."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x.unsqueeze(0),)).squeeze(0)

    J = vmap(jacrev(f), (None, 0))(params, X)
    return torch.cat([j.flatten(2) for j in J.values()], 2).flatten(0, 1)


def ggn(model: nn.Module, X: Tensor) -> Tensor:
    """Return the GGN of the mean cross-entropy."""
    J, p = jacobian(model, X), model(X).detach().softmax(1)
    M = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    MJ = torch.bmm(M, J.view(len(X), -1, J.shape[1])).flatten(0, 1)
    return J.T @ MJ / len(X)


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the time of a call, and its result."""
    start = perf_counter()
    result = work()
    return perf_counter() - start, result


def measured(model: nn.Module, data: Data) -> dict[str, float]:
    """Return the least times of everything."""
    X = torch.cat([x for x, _ in data])
    params = dict(model.named_parameters())
    V = torch.rand(sum(p.numel() for p in params.values()), COLUMNS)
    times: dict[str, float] = {}

    def note(name: str, work: Callable[[], Tensor]) -> Tensor:
        spent, result = seconds(work)
        times[name] = min(times.get(name, spent), spent)
        return result

    for _ in range(REPEATS):
        G = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        J = JacobianLinearOperator(model, params, data)
        wide = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        expected = note("ggn, torch.func", lambda: ggn(model, X))
        found = note("ggn", G.to_dense)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
        note("ggn again", G.to_dense)
        rows = note("jacobian, torch.func", lambda: jacobian(model, X))
        assert torch.allclose(note("jacobian", J.to_dense), rows, atol=1e-4)
        note("jacobian again", J.to_dense)
        product = note(f"ggn @ {COLUMNS} columns", lambda wide=wide: wide @ V)
        assert torch.allclose(product, expected @ V, atol=1e-3 * float(product.max()))
    return times


def main() -> int:
    """Print the table; return the exit status."""
    torch.set_num_threads(1)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    missed = False
    for name, build, shape, number, batches in PROBLEMS:
        if wanted not in name:
            continue
        torch.manual_seed(0)
        model, X = build(), torch.rand(number, *shape)
        y = torch.randint(2, (number,))
        data = list(zip(X.chunk(batches), y.chunk(batches), strict=True))
        P = sum(p.numel() for p in model.parameters())
        print(f"{name}: P = {P}, {number} data in {batches} batches")
        times = measured(model, data)
        for what, spent in times.items():
            unit = times[f"{what.split()[0].rstrip(',')}, torch.func"]
            print(f"  {what:<22} {1e3 * spent:>9.1f} ms {spent / unit:>7.2f}")
        for what in ("ggn", "jacobian"):
            missed |= times[what] > LIMIT * times[f"{what}, torch.func"]
    print("missed" if missed else "reached")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
