"""Cost of a repeated product in gradients: 20 products on one batch of an MLP.

Run ``python benchmarks/repeated_products.py``. The MLP is 784-512-512-10 with a batch
of 512, on one thread. Gradient, GGN and Hessian alternate in one process; process CPU
time, medians of the products after the recordings have been made. Exits with status 1
if a product costs more than its limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
from problems import mean_gradient, problem
from tasks import vector
from torch import nn
from tqdm import trange

from curvlinops import GGNLinearOperator, HessianLinearOperator

PRODUCTS = 20
WARMUP = 5
LIMITS = {"GGN": 1.4, "Hessian": 1.8}


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    start = process_time()
    work()
    return process_time() - start


def main() -> int:
    """Print the table; return the exit status."""
    torch.set_num_threads(1)
    model, data = problem("mlp").build()
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    G = GGNLinearOperator(model, loss, params, data)
    H = HessianLinearOperator(model, loss, params, data)
    x = vector(G.shape[1])
    works: dict[str, Callable[[], object]] = {
        "gradient": lambda: mean_gradient(model, data, params),
        "GGN": lambda: G @ x,
        "Hessian": lambda: H @ x,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in trange(PRODUCTS + WARMUP, desc="products"):
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(seconds(works[name]))
    unit = median(times["gradient"][WARMUP:])
    missed = False
    print(f"{'':<9} {'ms':>8} {'gradients':>10} {'limit':>6} {'first':>6}")
    for name, spent in times.items():
        ratio = median(spent[WARMUP:]) / unit
        limit = LIMITS.get(name, 1.0)
        missed |= ratio > limit
        print(
            f"{name:<9} {1e3 * ratio * unit:>8.2f} {ratio:>10.2f} {limit:>6.2f} "
            f"{spent[0] / unit:>6.2f}"
        )
    print("missed" if missed else "reached")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
