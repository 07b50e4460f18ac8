"""Compute the matrices of the tests' problems with whichever package there is.

Run by ``agreement.py``, one process per package; prints nothing, writes a file with
``torch.save``. Problems come from ``tests/cases.py``, in float64.

The other package (3.0.1) wants parameters as a list of those of a module. There,
values that are not the module's are written into it, and a function of parameters and
inputs becomes a module. Both packages are told how to read the batch size of inputs
that are mappings or tuples. The check for determinism is off, all else as by default.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
MATRICES = {
    "Hessian": "HessianLinearOperator",
    "GGN": "GGNLinearOperator",
    "GGN diagonal": "GGNDiagonalLinearOperator",
    "EF": "EFLinearOperator",
    "Jacobian": "JacobianLinearOperator",
    "transposed Jacobian": "TransposedJacobianLinearOperator",
}
#: Matrices that are random, and how many samples one has.
SAMPLED = {
    "GGN, 50 samples": ("GGNLinearOperator", 50),
    "FisherMC, 1 sample": ("FisherMCLinearOperator", 1),
}
SAMPLED_PROBLEMS = (
    "linear",
    "mlp-tanh-ce",
    "mse-sum",
    "mse-tokens",
    "ce-sum",
    "ce-tokens",
    "ce-weights",
    "ce-ignore-index",
    "bce",
    "bce-sum",
    "bce-pos-weight",
)
#: Apart, so that generators seeded with ``seed + 1`` and so on have nothing in common.
SEEDS = range(0, 100_000, 1000)


def import_cases(is_other: bool) -> Any:
    """Import the problems. They need this repository's package; the other replaces it.

    Nothing of it is left importable then, and the problems need no more than their own
    functions and torch.
    """
    if find_spec("pytest") is None:  # only tests call what needs it
        sys.modules["pytest"] = ModuleType("pytest")
    paths = [str(ROOT / "tests"), str(ROOT / "src")]
    sys.path[:0] = paths
    import cases

    if is_other:
        sys.path.remove(paths[1])
        for name in list(sys.modules):
            if name.partition(".")[0] == "curvlinops":
                del sys.modules[name]
        import curvlinops

        assert ROOT not in Path(curvlinops.__file__).parents, "This is no other one."
    return cases


def build(cases: Any, problem: Any, join: bool = False) -> tuple[Any, Any, Any, Any]:
    """Build a problem in float64, if wanted with all data in one batch."""
    built = problem.build()
    if {"half", "float32"} & problem.tags:
        built = cases.references.convert(*built, dtype=torch.float64)
    model, loss, params, data = built
    return model, loss, params, cases.resplit(data, (cases.N,)) if join else data


class Held(nn.Module):
    """A function of parameters and inputs as a module that holds the parameters."""

    def __init__(self, function: Callable, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.function, self.names = function, list(params)
        values = [nn.Parameter(p.detach().clone()) for p in params.values()]
        self.values = nn.ParameterList(values)

    def forward(self, X: Any) -> Tensor:
        """Evaluate the function."""
        return self.function(dict(zip(self.names, self.values, strict=True)), X)


def with_listed_parameters(model: Any, loss: Any, params: Any, data: Any) -> tuple:
    """Turn a dict of parameters into a list of the module's own."""
    if not isinstance(params, dict):
        return model, loss, params, data
    if not isinstance(model, nn.Module):
        model = Held(model, params)
        return model, loss, list(model.values), data
    listed = [model.get_parameter(name) for name in params]
    for own, value in zip(listed, params.values(), strict=True):
        if own is not value:
            own.data = value.detach().clone()
    return model, loss, listed, data


def first_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    message = re.sub(r" at 0x\w+", "", str(error))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Computer:
    """The matrices of one package."""

    def __init__(self, is_other: bool) -> None:
        self.cases = import_cases(is_other)
        import curvlinops

        self.is_other, self.package = is_other, curvlinops

    def versions(self) -> dict[str, str]:
        """Return what computes."""
        names = {"torch": "torch"}
        if self.is_other:
            names["curvlinops"] = metadata.packages_distributions()["curvlinops"][0]
        return {key: f"{n} {metadata.version(n)}" for key, n in names.items()}

    def samples_ggn(self) -> bool:
        """Tell whether the GGN takes a number of samples."""
        return "mc_samples" in signature(self.package.GGNLinearOperator).parameters

    def substitutes(self) -> list[str]:
        """Tell what is compared in place of what the package lacks."""
        notes = []
        if not hasattr(self.package, MATRICES["GGN diagonal"]):
            notes.append("The other diagonal of the GGN is that of a GGN operator.")
        if not self.samples_ggn():
            notes.append("The other sampled GGN is FisherMC.")
        return notes

    def operator(self, cls: str, problem: Any, join: bool = False, **options: Any):
        """Build an operator."""
        built = build(self.cases, problem, join)
        if self.is_other:
            built = with_listed_parameters(*built)
        model, loss, params, data = built
        losses = () if "Jacobian" in cls else (loss,)
        options["check_deterministic"] = False
        if {"dict-input", "tuple-input"} & problem.tags:
            options["batch_size_fn"] = self.cases._batch_size
        return getattr(self.package, cls)(model, *losses, params, data, **options)

    def matrix(self, name: str, problem: Any, join: bool) -> dict[str, Any]:
        """Compute a matrix, or tell how that failed.

        The diagonal of the GGN may be no operator of its own.
        """
        cls = MATRICES[name]
        try:
            if name == "GGN diagonal" and not hasattr(self.package, cls):
                A = self.operator(MATRICES["GGN"], problem, join)
                return {"matrix": dense(A).diag().diag()}
            return {"matrix": dense(self.operator(cls, problem, join))}
        except Exception as error:
            return {"raised": first_line(error)}

    def samples(self, name: str, problem: Any) -> dict[str, Any]:
        """Compute a sampled matrix under many seeds, as seen by a few vectors."""
        cls, mc_samples = SAMPLED[name]
        if cls == "GGNLinearOperator" and not self.samples_ggn():
            cls = "FisherMCLinearOperator"
        forms = []
        try:
            for seed in SEEDS:
                A = self.operator(cls, problem, mc_samples=mc_samples, seed=seed)
                V = probes(A.shape[1])
                forms.append(V.T @ (A @ V).detach())
        except Exception as error:
            return {"raised": first_line(error)}
        return {"forms": torch.stack(forms)}


def dense(A: Any) -> Tensor:
    """Return the matrix of an operator."""
    return (A @ torch.eye(A.shape[1], dtype=torch.float64)).detach()


def probes(dimension: int) -> Tensor:
    """Return the vectors, of shape ``(dimension, 8)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(dimension, 8, generator=generator, dtype=torch.float64)


def jobs(arguments: argparse.Namespace, cases: Any) -> Iterator[tuple[str, Any]]:
    """Yield names of matrices and problems."""
    if arguments.only:
        for job in arguments.only:
            problem, _, matrix = job.partition(":")
            yield matrix, cases.find(problem)
        return
    for problem in cases.PROBLEMS:
        for matrix in MATRICES:
            yield matrix, problem


def main() -> None:
    """Compute and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", type=Path)
    add("--is-other", action="store_true", help="the package is not this repository's")
    add("--join", action="store_true", help="put all data into one batch")
    add("--only", nargs="+", metavar="PROBLEM:MATRIX", help="leave out samples too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    computer = Computer(arguments.is_other)
    results: dict[str, Any] = {
        "versions": computer.versions(),
        "substitutes": computer.substitutes(),
    }
    for matrix, problem in jobs(arguments, computer.cases):
        results[problem.name, matrix] = computer.matrix(matrix, problem, arguments.join)
    for name in () if arguments.only else SAMPLED_PROBLEMS:
        problem = computer.cases.find(name)
        for matrix in SAMPLED:
            results[name, matrix] = computer.samples(matrix, problem)
    torch.save(results, arguments.file)


if __name__ == "__main__":
    main()
