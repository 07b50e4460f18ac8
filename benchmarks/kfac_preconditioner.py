"""Iterations of conjugate gradients that a preconditioner saves on damped GGNs.

    python benchmarks/kfac_preconditioner.py [--widths 64 8 10] [--widths ...]

Perceptrons are trained on scikit-learn's images of digits, whose pixels have variances
over many orders of magnitude; then ``(G + damping I) x = gradient`` is solved to
``rtol=1e-6``. A product with a preconditioner costs far less than one with ``G``, so
iterations are what counts. Nystrom's set-up takes as many products with ``G`` as its
rank. The widths that run by default are all that were tried. With many more parameters
than data (the last ones) ``G`` has low rank, conjugate gradients converge fast without
help, and a block-diagonal preconditioner costs iterations instead; a sketch of ``G``
still saves them.
"""

import argparse
import sys
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse.linalg import cg
from sklearn.datasets import load_digits
from torch import nn

from curvlinops import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    NystromPreconditionerLinearOperator,
)

DAMPINGS = 1e-1, 1e-3, 1e-5, 1e-7
RANK = 100
WIDTHS = [64, 8, 10], [64, 48, 32, 10]


def trained(widths):
    """Return a trained perceptron and its data."""
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X / 16), torch.from_numpy(y)
    layers = []
    for pair in pairwise(widths):
        layers += [nn.Linear(*pair), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model, [(X, y)]


def iterations(A, b, M):
    """Count the iterations of SciPy's solver."""
    count = []
    _, info = cg(A, b, M=M, rtol=1e-6, maxiter=10_000, callback=count.append)
    return len(count) if info == 0 else float("nan")


def compare(widths):
    """Print a table of iterations."""
    model, data = trained(widths)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    G = GGNLinearOperator(risk)
    I = IdentityLinearOperator(G.in_shapes, G.device, G.torch_dtype)  # noqa: E741
    gradient, loss = risk.gradient_and_loss()
    b = torch.cat([g.flatten() for g in gradient]).numpy()
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K, E = KFACLinearOperator(risk, **options), EKFACLinearOperator(risk, **options)
    print(f"widths {widths}: loss {float(loss):.4f}, {G.shape[0]} parameters")
    print(f"{'damping':>8} {'none':>6} {'KFAC':>6} {'EKFAC':>6} Nystrom({RANK})")
    for damping in DAMPINGS:
        A = G + damping * I
        sketched = NystromPreconditionerLinearOperator(G, RANK, damping, rng=0)
        row = [
            iterations(A, b, M)
            for M in (
                None,
                K.inverse(damping, use_exact_damping=True),
                E.inverse(damping),
                sketched,
            )
        ]
        print("{:8.0e} {:6} {:6} {:6} {:6}".format(damping, *row), flush=True)
        if damping == DAMPINGS[0]:
            M = E.inverse(damping)
            solved = CGInverseLinearOperator(A, preconditioner=M, tolerance=1e-8) @ b
            assert np.linalg.norm(A @ solved - b) < 1e-6 * np.linalg.norm(b)


def main():
    """Print a table for every perceptron."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", action="append")
    for widths in parser.parse_args().widths or WIDTHS:
        compare(widths)


if __name__ == "__main__":
    sys.exit(main())
