"""Spectral density of a network with 10 million parameters: time and memory.

A perceptron 784-2048-2048-2048-10 (10 020 874 parameters) on 512 synthetic images in
two batches, GGN or Hessian. Prints seconds, products, and the peak of resident memory
above that before the call, with the stated bound: the basis of ``ncv`` Krylov vectors
(if it fits into 2 GiB; otherwise none is kept), the 20 vectors of ``eigsh``, and 10
more; and what the operator itself keeps for its batches (its ``cache`` budget).

Run: ``python benchmarks/density_large.py [--ncv 40] [--cache off]``.
"""

import argparse
import resource
import time
from itertools import pairwise

import torch
from torch import nn

import curvlinops
from curvlinops.estimators import lanczos_approximate_spectrum


def peak() -> float:
    """Return the peak of resident memory so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ncv", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--operator", default="GGNLinearOperator")
    parser.add_argument("--cache", default="off")
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    widths = [784, 2048, 2048, 2048, 10]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    y = torch.randint(10, (512,))
    X = torch.randn(10, 784)[y] + torch.randn(512, 784)
    data = [*zip(X.split(256), y.split(256), strict=True)]
    A = getattr(curvlinops, arguments.operator)(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        data,
        cache=arguments.cache,
        check_deterministic=False,
    )
    A @ torch.ones(A.shape[1])
    before, start = peak(), time.perf_counter()
    result = lanczos_approximate_spectrum(
        A,
        arguments.ncv,
        num_repeats=arguments.repeats,
        rng=0,
        progressbar=True,
        checkpoint=arguments.checkpoint,
    )
    grid, density = result
    seconds = time.perf_counter() - start
    vector = A.shape[1] * 4 / 2**20
    basis = arguments.ncv * vector
    bound = max(basis if basis <= 2048 else 0, 20 * vector) + 10 * vector
    products = result.provenance["num_products"]
    print(
        f"{A!r}\n{products} products in {seconds:.0f} s ({seconds / products:.2f} s "
        f"each), {torch.get_num_threads()} threads\nmemory {peak() - before:.0f} MiB, "
        f"stated bound {bound:.0f} MiB (one vector: {vector:.0f} MiB)\neigenvalues "
        f"{result.boundaries[0]:.3e} to {result.boundaries[1]:.3e}, mass "
        f"{torch.trapezoid(density, grid):.4f}"
    )


if __name__ == "__main__":
    main()
