"""Time repeated products on a GPU: with tensors, arrays, and blocks of columns.

Run ``python benchmarks/gpu_products.py mlp gpt``. Prints milliseconds of wall time for
every matrix, beside a gradient; "look" is the look for changes before every product.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from problems import MATRICES, mean_gradient, problem

import curvlinops


def milliseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Return the mean time of one call, after three."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def main() -> None:
    """Print a line per problem and matrix."""
    torch.backends.cudnn.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in sys.argv[1:]:
        model, data = problem(name).build()
        model.cuda()
        data = [(X.cuda(), y.cuda()) for X, y in data]
        params = list(model.parameters())
        unit = milliseconds(lambda m=model, d=data, p=params: mean_gradient(m, d, p))
        print(f"{name}: gradient {unit:.3f}")
        for matrix, operator in MATRICES.items():
            loss = torch.nn.CrossEntropyLoss()
            A = getattr(curvlinops, operator)(
                model, loss, params, data, check_deterministic=False
            )
            V = torch.randn(A.shape[1], 16, device="cuda")
            v, x = V[:, 0].contiguous(), V[:, 0].cpu().numpy()
            for _ in range(problem(name).warmup):
                A @ v
            print(
                f"  {matrix}: tensor {milliseconds(lambda A=A, v=v: A @ v):.3f}, "
                f"array {milliseconds(lambda A=A, x=x: A @ x):.3f}, "
                f"16 columns {milliseconds(lambda A=A, V=V: A @ V, 5):.3f}, "
                f"look {milliseconds(A.risk._watch.state):.3f}"
            )


if __name__ == "__main__":
    main()
