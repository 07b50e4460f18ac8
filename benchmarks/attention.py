"""What attention's math form costs: gradients in it and in torch's fused form.

Products evaluate ``scaled_dot_product_attention`` in its math form, the only one that
has second derivatives and forward mode. Run ``python benchmarks/attention.py``. Prints,
for a block of causal self-attention, by sequence length: the CPU time (one thread) of a
gradient and the memory that it takes, in either form, each in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

FORMS = {"math": SDPBackend.MATH, "fused": SDPBackend.FLASH_ATTENTION}
BATCH, WIDTH, HEADS = 4, 256, 8


class Block(torch.nn.Module):
    """Causal self-attention and a perceptron, as in a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.output = torch.nn.Linear(WIDTH, WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, T, C)`` to the same."""
        B, T, C = x.shape
        parts = self.inputs(x).view(B, T, 3, HEADS, C // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def measure(form: str, length: int, repeats: int) -> tuple[float, float]:
    """Return CPU seconds of a gradient, and the growth of memory in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block, x = Block(), torch.randn(BATCH, length, WIDTH)
    parameters = list(block.parameters())

    def gradient(x: torch.Tensor) -> None:
        with sdpa_kernel(FORMS[form]):
            torch.autograd.grad(block(x).square().mean(), parameters)

    gradient(x[:, :8])  # what libraries load
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradient(x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    times = []
    for _ in range(repeats):
        start = time.process_time()
        gradient(x)
        times.append(time.process_time() - start)
    return median(times), grown / 1024


def main() -> None:
    """Run every form and length in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        form, length = arguments.one
        print(json.dumps(measure(form, int(length), arguments.repeats)))
        return
    # The C library is told to return freed memory at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    print("length  seconds, math  fused  ratio  MiB, math  fused  ratio")
    for length in arguments.lengths:
        found = {}
        for form in FORMS:
            command = [sys.executable, __file__, "--one", form, str(length)]
            command += ["--repeats", str(arguments.repeats)]
            run = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, check=True
            )
            found[form] = json.loads(run.stdout)
        (t, m), (s, n) = found["math"], found["fused"]
        print(
            f"{length:6}  {t:13.3f}  {s:5.3f}  {t / s:5.2f}"
            f"  {m:9.0f}  {n:5.0f}  {m / n:5.2f}"
        )


if __name__ == "__main__":
    main()
