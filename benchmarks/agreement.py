r"""Compare all products with the package ``curvlinops-for-pytorch``, entry by entry.

    python benchmarks/agreement.py --other PYTHON [--output DIR] [--rst]

``PYTHON`` is an interpreter that has that package (3.0.1), with the same torch. Each
package computes, in a process of its own, the dense matrices of every problem of
``tests/cases.py`` in float64 (``agreement_worker.py`` says how). Meanwhile this process
computes them by central differences:

=========== ============================================================================
Jacobian    differences of the predictions
GGN         :math:`J^\top H J` with that Jacobian and differences of the gradient that
            torch's loss on the concatenated data has in the predictions
EF          differences of the value of every term of the loss
Hessian     differences of the gradient, itself compared with differences of the loss
=========== ============================================================================

No operator and, but for the Hessian, no derivative of a model enters. Differences and
errors are largest entries relative to the largest entry. Matrices agree if they differ
by less than 1e-10; a matrix is right if its error is below what central differences in
float64 can tell (``tests/tolerances.py``). Sampled matrices agree with each other and
with the GGN in expectation: z-scores of quadratic forms, over 100 seeds, stay below 5.

Fails where this package raises, where differences contradict it, or where it differs
from the other one and that is right as well. Writes ``agreement.json`` and, if told to,
``agreement.rst``, which is what it prints.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from agreement_worker import (
    MATRICES,
    SAMPLED,
    SAMPLED_PROBLEMS,
    build,
    import_cases,
    probes,
)
from torch import Tensor, nn

TOLERANCE = 1e-10
LARGEST_Z = 5.0
STEP = torch.finfo(torch.float64).eps ** (1 / 3)
#: Outcomes, and which of them make the comparison fail.
AGREE, OTHER_RAISES, OTHER_WRONG = "agree", "other raises", "other wrong"
CONVENTION = "convention"
FAILURES = OURS_WRONG, OURS_RAISES, UNRESOLVED = (
    "OURS IS WRONG",
    "OURS RAISES",
    "BOTH ARE RIGHT BUT DIFFER",
)

WHO = "ours", "other"

Row = dict[str, Any]


# Central differences


def central_differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the Jacobian of a function of a vector, column by column."""
    columns = []
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = STEP
        columns.append((function(at + step) - function(at - step)) / (2 * STEP))
    return torch.stack(columns, dim=-1)


def release_constants(model: Any, params: Any) -> Tensor:
    """Make variables of parameters that torch's gradient treats as constants.

    Those are the embeddings of padding. Returns which they were.
    """
    values = list(params.values() if isinstance(params, dict) else params)
    masks = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in values}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            masks[id(module.weight)][padding] = True
            module.padding_idx = None
    return torch.cat([masks[id(p)].flatten() for p in values])


def evidence(references: Any, built: tuple) -> dict[str, Tensor]:
    """Compute all matrices of a problem by central differences."""
    from curvlinops.examples.functorch import (
        _counts,
        _FlatProblem,
        _reduction,
        _risk,
        _terms,
    )

    model, loss_func, params, data = built
    problem = _FlatProblem(model, params, data, None)
    with torch.no_grad():
        predictions = problem.predict(problem.theta)
        J = central_differences(problem.outputs, problem.theta)

    def loss_gradient(flat: Tensor) -> Tensor:
        flat = flat.clone().requires_grad_()
        parts = flat.split([f.numel() for f in predictions])
        shaped = [z.view_as(f) for z, f in zip(parts, predictions, strict=True)]
        [gradient] = torch.autograd.grad(_risk(loss_func, shaped, problem), flat)
        return gradient

    def terms(theta: Tensor) -> Tensor:
        batches = problem.predict(theta), problem.targets, problem.sizes
        return torch.cat(
            [_terms(loss_func, *batch) for batch in zip(*batches, strict=True)]
        )

    H = central_differences(
        loss_gradient, torch.cat([f.flatten() for f in predictions])
    )
    with torch.no_grad():
        G = central_differences(terms, problem.theta)
        gradient = central_differences(
            lambda theta: problem.loss(loss_func, theta).reshape(1), problem.theta
        )
        is_sum = _reduction(loss_func) == "sum"
        count = 1 if is_sum else sum(_counts(loss_func, predictions, problem))
    ggn = J.T @ H @ J
    return {
        "Hessian": references.central_differences_hessian(*built),
        "GGN": ggn,
        "GGN diagonal": ggn.diag().diag(),
        "EF": G.T @ G / count,
        "Jacobian": J,
        "transposed Jacobian": J.T,
        "gradient": gradient.flatten(),
    }


def without(matrices: dict[str, Tensor], constant: Tensor) -> dict[str, Tensor]:
    """Set derivatives by constants to zero."""
    kept = (~constant).double()
    sides = {"Jacobian": (1, kept), "transposed Jacobian": (kept[:, None], 1)}
    return {
        name: M * kept if M.ndim == 1 else left * M * right
        for name, M in matrices.items()
        for left, right in [sides.get(name, (kept[:, None], kept))]
    }


# Comparison


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest entry of the second."""
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    difference = (a - b).abs().max().item()
    return difference and difference / max(b.abs().max().item(), 1e-300)


def asymmetry(name: str, A: Tensor) -> float | None:
    """Return how far a square matrix is from its transpose."""
    return None if "Jacobian" in name else relative(A.T, A)


def compare(
    ours: Row, theirs: Row, name: str, expected: Tensor, free: Tensor, bound: float
) -> Row:
    """Compare a matrix of both packages, and each with central differences.

    ``free`` are the differences if nothing counts as constant.
    """
    row: Row = {"bound": bound}
    for key, reply in {"ours": ours, "other": theirs}.items():
        if "raised" in reply:
            row[key] = {"raised": reply["raised"]}
            continue
        A = reply["matrix"]
        row[key] = {"error": relative(A, expected), "asymmetry": asymmetry(name, A)}
        if not torch.equal(free, expected):
            row[key]["error if nothing is constant"] = relative(A, free)
    if "raised" in ours:
        return {**row, "outcome": OURS_RAISES}
    if not row["ours"]["error"] <= bound:
        row["outcome"] = OURS_WRONG  # overrides all outcomes below
    if "raised" in theirs:
        return {"outcome": OTHER_RAISES, **row}
    row["difference"] = relative(theirs["matrix"], ours["matrix"])
    if row["difference"] <= TOLERANCE:
        return {"outcome": AGREE, **row}
    if row["other"]["error"] <= bound:
        return {"outcome": UNRESOLVED, **row}
    if row["other"].get("error if nothing is constant", bound) < bound:
        return {"outcome": CONVENTION, **row}
    return {"outcome": OTHER_WRONG, **row}


def compare_samples(ours: Row, theirs: Row, expected: Tensor) -> Row:
    """Compare the means of a sampled matrix with each other and with the GGN."""
    if "raised" in ours:
        return {"ours": ours, "other": {}, "outcome": OURS_RAISES}
    V = probes(len(expected))
    upper = torch.triu_indices(V.shape[1], V.shape[1]).unbind()
    exact = (V.T @ expected @ V)[upper]
    means, errors, row = [], [], {}
    for key, reply in {"ours": ours, "other": theirs}.items():
        if "raised" in reply:
            row[key] = reply
            continue
        forms = reply["forms"][:, *upper]
        means.append(forms.mean(0))
        errors.append(forms.std(0) / len(forms) ** 0.5)
        z = (means[-1] - exact) / errors[-1]
        row[key] = {
            "z": z.abs().max().item(),
            "ratio": (means[-1].sum() / exact.sum()).item(),
            "standard error": (errors[-1].norm() / exact.norm()).item(),
        }
    if not row["ours"]["z"] <= LARGEST_Z:
        return {"outcome": OURS_WRONG, **row}
    if "raised" in theirs:
        return {"outcome": OTHER_RAISES, **row}
    z = (means[0] - means[1]) / torch.hypot(*errors)
    row["z"] = z.abs().max().item()
    if not row["other"]["z"] <= LARGEST_Z:
        return {"outcome": OTHER_WRONG, **row}
    return {"outcome": AGREE if row["z"] <= LARGEST_Z else UNRESOLVED, **row}


# Report


def table(head: Sequence[str], rows: list[Sequence[str]]) -> str:
    """Lay out a table."""
    if not rows:
        return "None.\n"
    columns = zip(head, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    rule = "  ".join("=" * width for width in widths)

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(width) for c, width in zip(cells, widths, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([rule, line(head), rule, *map(line, rows), rule, ""])


def number(value: float | None) -> str:
    """Format an error."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def title(text: str, mark: str = "-") -> str:
    """Underline."""
    return f"{text}\n{mark * len(text)}\n"


def summary(rows: list[Row]) -> str:
    """Count outcomes by matrix."""
    lines = []
    for name in MATRICES:
        mine = [row for row in rows if row["matrix"] == name]
        counts = Counter(row["outcome"] for row in mine)
        agreeing = [r["difference"] for r in mine if r["outcome"] == AGREE]
        right = [row["ours"].get("error", float("inf")) for row in mine]
        bad = sum(counts[outcome] for outcome in FAILURES)
        lines.append(
            [
                name,
                str(len(mine)),
                str(counts[AGREE]),
                number(max(agreeing, default=None)),
                str(counts[OTHER_WRONG]),
                str(counts[CONVENTION]),
                str(counts[OTHER_RAISES]),
                str(bad),
                number(max(right, default=None)),
            ]
        )
    head = "matrix", "problems", "agree", "to", "other wrong", "convention"
    return table([*head, "other raises", "failures", "our largest error"], lines)


def differing(rows: list[Row]) -> str:
    """List where packages differ, with the evidence."""
    lines = []
    for row in rows:
        if row["outcome"] in (AGREE, OTHER_RAISES):
            continue
        ours, other = row["ours"], row["other"]
        lines.append(
            [
                row["problem"],
                row["matrix"],
                number(row.get("difference")),
                number(ours.get("error")),
                number(other.get("error")),
                number(ours.get("asymmetry")),
                number(other.get("asymmetry")),
                number(row.get("difference in one batch")),
                row["outcome"],
            ]
        )
    head = "problem", "matrix", "difference", "error of ours", "of the other"
    more = "asymmetry of ours", "of the other", "difference in one batch", "outcome"
    return table([*head, *more], lines)


def raising(rows: list[Row]) -> str:
    """List where the other package raises, with the evidence for ours."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["outcome"] == OTHER_RAISES:
            key = row["problem"], row["other"]["raised"]
            groups.setdefault(key, []).append(row)
    lines = [
        [
            problem,
            ", ".join(row["matrix"] for row in group),
            number(max(row["ours"]["error"] for row in group)),
            message if len(message) <= 100 else message[:97] + "...",
        ]
        for (problem, message), group in groups.items()
    ]
    return table(["problem", "matrices", "error of ours", "the other raises"], lines)


def sampled(rows: list[Row]) -> str:
    """List sampled matrices."""
    lines = []
    for row in rows:
        lines.append(
            [
                row["problem"],
                row["matrix"],
                *(
                    f"{row[who][key]:.3g}" if key in row[who] else "raises"
                    for who in WHO
                    for key in ("ratio", "standard error", "z")
                ),
                f"{row['z']:.3g}" if "z" in row else "-",
                row["outcome"],
            ]
        )
    head = ["problem", "matrix", "ours / GGN", "standard error", "z"]
    more = ["other / GGN", "standard error", "z", "z between", "outcome"]
    return table([*head, *more], lines)


def convention(rows: list[Row]) -> str:
    """Tell what would be right if torch's constants were variables."""
    key = "error if nothing is constant"
    lines = [
        [
            row["problem"],
            row["matrix"],
            *(number(row[who].get(k)) for k in ("error", key) for who in WHO),
        ]
        for row in rows
        if key in row["ours"]
    ]
    head = "problem", "matrix", "error of ours", "of the other"
    return table([*head, "ours if variable", "other if variable"], lines)


def report(result: Row) -> str:
    """Write what was found."""
    rows, samples = result["matrices"], result["sampled"]
    other = result["versions"]["curvlinops"]
    agree = sum(row["outcome"] == AGREE for row in rows)
    compared = sum("difference" in row for row in rows)
    raises = sum(row["outcome"] == OTHER_RAISES for row in rows)
    expected = sum(row["outcome"] == AGREE for row in samples)
    parts = [
        title(f"Agreement with {other}", "="),
        f"Matrices of the problems in ``tests/cases.py``, float64, "
        f"{result['versions']['torch']}. Both packages have {compared} of "
        f"{len(rows)}; {agree} agree to {TOLERANCE:g}, and the other package raises on "
        f"{raises} more. Of {len(samples)} sampled ones, {expected} agree in "
        "expectation. Errors are against central differences, all figures relative to "
        "the largest entry. ``benchmarks/agreement.py`` says how they are computed. "
        + " ".join(result["substitutes"])
        + "\n",
        summary(rows),
        f"The gradient that is differenced for the Hessian differs by at most "
        f"{number(max(result['gradients'].values()))} from differences of the loss.\n",
        title("Where they differ"),
        differing(rows),
        "In one batch: the difference when the other package is given all data in a "
        "single batch instead. Where that is small, its matrix depends on how data are "
        "split.\n",
        "A convention: torch's gradient treats an embedding's row ``padding_idx`` as a "
        "constant, and so do we; in the errors above it is one. Here are those of all "
        "matrices either way; a package that follows either convention has small "
        "errors under it throughout.\n",
        convention(rows),
        title("Where the other package raises"),
        raising(rows),
        title("Sampled matrices, in expectation"),
        "Means over seeds, relative to the GGN by central differences; z is the "
        f"largest among quadratic forms, and significant above {LARGEST_Z:g}.\n",
        sampled(samples),
    ]
    return "\n".join(parts)


# Processes


def start(python: str, file: Path, *options: str) -> subprocess.Popen:
    """Start a package's process."""
    script = Path(__file__).with_name("agreement_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "--is-other" in options:  # that path may lead to this package
        environment.pop("PYTHONPATH", None)
    return subprocess.Popen([python, str(script), str(file), *options], env=environment)


def finish(process: subprocess.Popen, file: Path) -> dict[Any, Any]:
    """Wait for a package's results."""
    if process.wait() != 0:
        raise RuntimeError(f"{process.args} failed.")
    return torch.load(file)


def difference_everything(cases: Any) -> tuple[dict, dict, dict[str, float]]:
    """Compute all matrices by differences: with constants, without, and gradients."""
    expected, free, gradients = {}, {}, {}
    for problem in cases.PROBLEMS:
        built = build(cases, problem)
        constant = release_constants(built[0], built[2])
        free[problem.name] = evidence(cases.references, built)
        expected[problem.name] = without(free[problem.name], constant)
        gradient = cases.references.gradient(*build(cases, problem))
        gradients[problem.name] = relative(
            gradient, expected[problem.name].pop("gradient")
        )
    return expected, free, gradients


def compare_everything(other: str) -> Row:
    """Compute here and there, and compare."""
    cases = import_cases(is_other=False)
    from tolerances import tolerance

    with tempfile.TemporaryDirectory() as folder:
        files = {who: Path(folder, f"{who}.pt") for who in WHO}
        workers = [
            start(sys.executable, files["ours"]),
            start(other, files["other"], "--is-other"),
        ]
        try:
            expected, free, gradients = difference_everything(cases)
            ours, theirs = map(finish, workers, files.values())
        finally:
            for worker in workers:
                worker.kill()
        rows = []
        for name, matrices in expected.items():
            for matrix in MATRICES:
                reply = ours[name, matrix], theirs[name, matrix]
                exact = matrices[matrix], free[name][matrix]
                size = len(matrices["GGN"])
                bound = tolerance(torch.float64, size, exponent=2 / 3)
                row = compare(*reply, matrix, *exact, bound)
                rows.append({"problem": name, "matrix": matrix, **row})
        again = [
            row
            for row in rows
            if row["outcome"] not in (AGREE, OTHER_RAISES, OURS_RAISES)
            and "splittable" in cases.find(row["problem"]).tags
        ]
        if again:
            only = [f"{row['problem']}:{row['matrix']}" for row in again]
            options = "--is-other", "--join", "--only", *only
            joined = finish(start(other, files["other"], *options), files["other"])
            for row in again:
                key = row["problem"], row["matrix"]
                if "matrix" in joined[key]:
                    row["difference in one batch"] = relative(
                        joined[key]["matrix"], ours[key]["matrix"]
                    )
    samples = []
    for name, matrix in itertools.product(SAMPLED_PROBLEMS, SAMPLED):
        reply = ours[name, matrix], theirs[name, matrix]
        row = compare_samples(*reply, expected[name]["GGN"])
        samples.append({"problem": name, "matrix": matrix, **row})
    return {
        "versions": theirs["versions"],
        "substitutes": theirs["substitutes"],
        "tolerance": TOLERANCE,
        "gradients": gradients,
        "matrices": rows,
        "sampled": samples,
    }


def main() -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--other", required=True, help="interpreter with curvlinops-for-pytorch")
    add("--output", type=Path, default=Path("."), metavar="DIR")
    add("--rst", action="store_true", help="write agreement.rst next to this script")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = compare_everything(arguments.other)
    text = report(result)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "agreement.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.rst:
        Path(__file__).with_suffix(".rst").write_text(text)
    print(text)
    rows = result["matrices"] + result["sampled"]
    bad = [row for row in rows if row["outcome"] in FAILURES]
    for row in bad:
        print(f"FAILED: {row['problem']}, {row['matrix']}: {row['outcome']}")
    for name, error in result["gradients"].items():
        if not error <= 1e-7:
            bad.append(name)
            print(f"FAILED: {name}: the gradient is off by {error:.1e}")
    print(f"{time.perf_counter() - started:.0f} seconds")
    return len(bad) > 0


if __name__ == "__main__":
    sys.exit(main())
