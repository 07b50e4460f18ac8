"""Cost per column of a block product against products one by one, by problem size.

Run ``python benchmarks/block_columns.py [MATRIX ...]`` with ``ggn``, ``hessian``,
``ef``. Multi-layer perceptrons of growing width and batch; for each, blocks are
multiplied at once in chunks of 4, 16 and 64 columns and one by one, in turns within
one process (CPU time, one thread, best of three). The bytes are what ``_columns.py``
compares with ``Policy.column_bytes``: recordings and parameters times the columns of a
chunk. The last lines say where single products take over.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from time import process_time
from typing import Any

import numpy as np
import torch
from problems import MATRICES, multilayer
from torch import nn
from tqdm import tqdm

import curvlinops
from curvlinops._policy import Policy

SIZES = (
    ((8, 24, 24, 4), 64),
    ((32, 64, 64, 10), 64),
    ((64, 128, 10), 128),
    ((64, 128, 128, 10), 256),
    ((256, 128, 128, 10), 256),
    ((256, 256, 256, 10), 256),
    ((784, 256, 256, 10), 512),
    ((784, 512, 512, 10), 512),
)
CHUNKS = (1, 4, 16, 64)


def seconds_per_column(A: Any, X: np.ndarray, chunk: int) -> float:
    """Multiply a block in chunks of so many columns."""
    columns = A.risk._columns
    columns.policy = replace(columns.policy, columns=chunk, column_bytes=1 << 40)
    start = process_time()
    A @ X
    return (process_time() - start) / X.shape[1]


def main(matrices: list[str]) -> None:
    """Print a table per matrix."""
    torch.set_num_threads(1)
    policy = Policy(dense_dim=0)  # no materialised matrices
    for matrix in matrices:
        crossings = []
        heads = "".join(f"{f'x{c}':>8}{'KiB':>9}" for c in CHUNKS[1:])
        print(f"{matrix}\n{'problem':<22}{'P':>8}{'1 (ms)':>9}{heads}")
        for widths, batch in tqdm(SIZES, desc=matrix):
            model, data = multilayer(widths, batch, 1, nn.ReLU)
            A = getattr(curvlinops, MATRICES[matrix])(
                model,
                nn.CrossEntropyLoss(),
                list(model.parameters()),
                data,
                policy=policy,
            )
            P = A.shape[1]
            rng = np.random.default_rng(0)
            X = rng.standard_normal((P, max(CHUNKS)), dtype=np.float32)
            for _ in range(6):
                A @ X[:, 0]
            best = dict.fromkeys(CHUNKS, float("inf"))
            for _ in range(3):
                for chunk in CHUNKS:
                    columns = X[:, : max(chunk, 16)]
                    spent = seconds_per_column(A, columns, chunk)
                    best[chunk] = min(best[chunk], spent)
            (recording,) = A.risk._recordings.values()
            per_column = recording.nbytes + P * X.itemsize
            row = f"{'-'.join(map(str, widths)):<16}{batch:>6}{P:>8}"
            row += f"{1e3 * best[1]:>9.3f}"
            for chunk in CHUNKS[1:]:
                gain = best[1] / best[chunk]
                row += f"{gain:>7.2f}x{per_column * chunk / 1024:>9.0f}"
                crossings.append((per_column * chunk, per_column, gain))
            print(row)
        won = [(total, each) for total, each, gain in crossings if gain >= 1.0]
        lost = [(total, each) for total, each, gain in crossings if gain < 1.0]
        for i, what in enumerate(("chunk", "column")):
            high = max((w[i] for w in won), default=0) / 1024
            low = min((n[i] for n in lost), default=float("inf")) / 1024
            print(f"largest winning {what}: {high:.0f} KiB; smallest losing: {low:.0f}")
        print(f"in use: {policy.column_bytes / 1024:.0f} KiB per chunk\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["ggn", "hessian"])
