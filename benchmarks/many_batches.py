"""First product of very many tiny batches, beside a loop with plain autograd.

Run ``python benchmarks/many_batches.py [NUMBER]``. The data are 20 000 batches (or
another number of them) of two data each, the model is an MLP 5-6-3, the matrix its GGN,
on one thread. Both sides alternate in one process; process CPU time, the least of
several. Ours are the first product with a new operator, once where batches are put
together and once where that is not allowed (``cache=`` is given), and the second one.
Exits with status 1 if the first product takes more than 1.5 times the loop's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import process_time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlinops import GGNLinearOperator

NUMBER, REPEATS, LIMIT = 20_000, 3, 1.5

Data = list[tuple[Tensor, Tensor]]


def problem(number: int) -> tuple[nn.Module, Data]:
    """Return the model and its batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, [(torch.rand(2, 5), torch.randint(3, (2,))) for _ in range(number)]


def plain_product(model: nn.Module, data: Data, v: Tensor) -> Tensor:
    """Multiply by the GGN batch by batch: five calls of autograd each."""
    params = list(model.parameters())
    vectors, total = [], [torch.zeros_like(p) for p in params]
    for p, part in zip(params, v.split([p.numel() for p in params]), strict=True):
        vectors.append(part.view_as(p))
    for X, y in data:
        f = model(X)
        u = torch.zeros_like(f, requires_grad=True)
        JTu = torch.autograd.grad(f, params, u, create_graph=True)
        (Jv,) = torch.autograd.grad(JTu, u, vectors)
        leaf = f.detach().requires_grad_()
        loss = cross_entropy(leaf, y, reduction="sum")
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (HJv,) = torch.autograd.grad(g, leaf, Jv)
        products = torch.autograd.grad(f, params, HJv)
        for row, product in zip(total, products, strict=True):
            row += product
    return torch.cat([t.flatten() for t in total]) / sum(len(X) for X, _ in data)


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the CPU time of a call, and its result."""
    start = process_time()
    result = work()
    return process_time() - start, result


def main() -> int:
    """Print the table; return the exit status."""
    torch.set_num_threads(1)
    number = int(sys.argv[1]) if len(sys.argv) > 1 else NUMBER
    model, data = problem(number)
    args = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    v = torch.rand(sum(p.numel() for p in model.parameters()))
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        spent, expected = seconds(lambda: plain_product(model, data, v))
        times.setdefault("autograd", []).append(spent)
        for name, cache in (("put together", "auto"), ("one by one", 10**9)):
            G = GGNLinearOperator(*args, check_deterministic=False, cache=cache)
            for which in ("first", "second"):
                spent, product = seconds(lambda G=G: G @ v)
                times.setdefault(f"{name}, {which}", []).append(spent)
                assert torch.allclose(product, expected, atol=1e-5)
    unit = min(times["autograd"])
    print(f"{number} batches{'':<14} {'s':>8} {'ratio':>6}")
    for name, spents in times.items():
        print(f"{name:<26} {min(spents):>8.2f} {min(spents) / unit:>6.2f}")
    missed = min(times["put together, first"]) > LIMIT * unit
    print("missed" if missed else "reached")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
