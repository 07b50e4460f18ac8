r"""Compare KFAC and EKFAC with the package ``curvlinops-for-pytorch``, entry by entry.

    python benchmarks/kfac_agreement.py --other PYTHON

``PYTHON`` is an interpreter that has that package (3.0.1). Each process computes the
same matrices on the cases where that package is right, in float64; the largest
difference, relative to the largest entry, must stay below 1e-8. Left out:

* class weights, ignored targets, and several terms per datum under ``reduce``, where
  that package is wrong;
* EKFAC of convolutions under ``reduce``: its eigenvalues are here the second moments of
  the gradients themselves, not of their approximation by mean inputs;
* the heuristic damping of a bias that is a block of its own: there it is that of the
  weight's output factor, :math:`\sqrt\delta / \pi`. The heuristic (arXiv:1503.05671,
  section 6.3, where biases are columns of weights) splits a damping of :math:`B
  \otimes A + \delta I` between two factors. A block of one factor needs no splitting:
  here it is :math:`(B + \delta I)^{-1}`, which is exact.

Sampled matrices use other random numbers; tests compare them with exact ones.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import warnings

import torch
from torch import nn

TOLERANCE = 1e-8
#: A power of two: that package rounds the damping to single precision.
DAMPING = 0.125


def mlp():
    """Return a perceptron and its inputs."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
    return nn.Sequential(*model, nn.Linear(4, 3)), torch.rand(7, 5)


def convolutions(stride, padding, dilation):
    """Return a convolutional network and its inputs."""
    layers = [nn.Conv2d(2, 3, 3, stride, padding, dilation), nn.Tanh()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers, nn.Conv2d(3, 3, 2), *head), torch.rand(7, 2, 9, 8)


MODELS = {
    "mlp": mlp,
    "conv": lambda: convolutions(1, 0, 1),
    "conv padded": lambda: convolutions(1, 1, 1),
    "conv strided": lambda: convolutions(2, 1, 1),
    "conv dilated": lambda: convolutions(1, 0, 2),
}
LOSSES = {
    "mse": (nn.MSELoss, lambda: torch.rand(7, 3).double()),
    "ce": (nn.CrossEntropyLoss, lambda: torch.randint(3, (7,))),
    "bce": (nn.BCEWithLogitsLoss, lambda: torch.rand(7, 3).round().double()),
}
FISHERS = "type-2", "empirical", "forward-only"


def cases():
    """Yield names, operator classes, their arguments, and keyword arguments."""
    for model_name, (loss_name, (loss, targets)), reduction in itertools.product(
        MODELS, LOSSES.items(), ("mean", "sum")
    ):
        torch.manual_seed(0)
        model, X = MODELS[model_name]()
        model, X, y = model.double(), X.double(), targets()
        data = [(X[:4], y[:4]), (X[4:], y[4:])]
        problem = model, loss(reduction=reduction), list(model.parameters()), data
        for cls, fisher, approx, separate in itertools.product(
            ("KFAC", "EKFAC"), FISHERS, ("expand", "reduce"), (True, False)
        ):
            if cls == "EKFAC" and (reduction, fisher) in (
                ("sum", "type-2"),
                ("sum", "empirical"),
                ("mean", "forward-only"),
                ("sum", "forward-only"),
            ):
                continue
            if cls == "EKFAC" and approx == "reduce" and model_name != "mlp":
                continue
            options = {
                "fisher_type": fisher,
                "kfac_approx": approx,
                "separate_weight_and_bias": separate,
            }
            bias = "separate" if separate else "joint"
            name = model_name, loss_name, reduction, cls, fisher, approx, bias
            yield " / ".join(name), f"{cls}LinearOperator", problem, options


def dense(A):
    """Return a matrix, whichever package it is from."""
    return torch.as_tensor(A @ torch.eye(A.shape[1]).double()).detach()


def compute():
    """Return every matrix and number by name."""
    import curvlinops

    results = {}
    for name, cls, problem, options in cases():
        A = getattr(curvlinops, cls)(*problem, **options)
        try:
            results[name] = dense(A)
        except Exception as error:  # the other package's; the case is skipped
            print(f"skipped {name}: {type(error).__name__}", flush=True)
            continue
        if not cls.startswith("KFAC") or "mlp / ce / mean" not in name:
            continue
        for scalar in ("trace", "det", "frobenius_norm"):
            value = getattr(A, scalar)
            value = value() if callable(value) else value
            results[f"{name} / {scalar}"] = value.detach().reshape(1)
        for label, extra in {
            "factors": {},
            "exact": {"use_exact_damping": True},
        }.items():
            inverse = curvlinops.KFACInverseLinearOperator(A, damping=DAMPING, **extra)
            results[f"{name} / inverse {label}"] = dense(inverse)
        if "joint" in name:
            heuristic = {"damping": DAMPING, "use_heuristic_damping": True}
            inverse = curvlinops.KFACInverseLinearOperator(A, **heuristic)
            results[f"{name} / inverse heuristic"] = dense(inverse)
    return results


def main():
    """Compute here and there, and compare."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", help="interpreter with curvlinops-for-pytorch")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        torch.save(compute(), args.write)
        return 0
    ours = compute()
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        command = [args.other, __file__, "--write", file.name]
        # PYTHONPATH may lead to this package
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run(command, check=True, env=environment)
        theirs = torch.load(file.name)
    differences = {}
    for name, b in theirs.items():
        a = ours[name]
        differences[name] = float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
    bad = {name: d for name, d in differences.items() if not d <= TOLERANCE}
    for name, d in sorted(bad.items()):
        print(f"{d:.2e}  {name}")
    print(
        f"{len(differences) - len(bad)} of {len(differences)} agree to {TOLERANCE:g}; "
        f"the largest difference of these is "
        f"{max((d for d in differences.values() if d <= TOLERANCE), default=0):.1e}"
    )
    return len(bad) > 0


if __name__ == "__main__":
    sys.exit(main())
