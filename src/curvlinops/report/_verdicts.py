"""Rules that say whether the numbers can be trusted, and what they mean.

Every rule maps a report to verdicts, one per matrix (or one for the problem), each with
the number that was compared and the bound that it was compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isnan

import numpy as np

from curvlinops.report._contents import Matrix, Number, Report, Verdict
from curvlinops.report._table import rounded

Found = Iterator[Verdict]
Rule = Callable[[Report], Found]

#: An asymmetry so many times the noise of products is a warning; a hundred times that
#: is a failure.
SYMMETRY = 30.0
#: Residuals relative to the largest magnitude, and how far they may be off at most.
RESIDUAL, LARGE_RESIDUAL = 1e-4, 0.05
#: Half the width of a 95 % interval, relative to the value, up to which a number is
#: one, and up to which it says anything.
WIDTH = 0.25
#: Negative mass of a matrix that has none but for rounding.
NO_MASS = 1e-3
#: Sharpness over ``2 / learning rate``: gradient descent is at the edge of stability
#: from here, and diverges from there, as far as a quadratic model goes.
EDGE, BEYOND = 0.95, 1.25
#: Confidence level of the intervals that must cover a dense matrix's numbers.
TRUTH = 0.9999


def judged(number: float, bound: float, limit: float) -> str:
    """Return ``PASS`` up to a bound, ``WARN`` up to a limit, else ``FAIL``, as NaN."""
    if number <= bound:
        return "PASS"
    return "WARN" if number <= limit else "FAIL"


def _title(name: str) -> str:
    """Return what a number is called in a sentence."""
    return {"top": "top eigenvalue"}.get(name, name.replace("frobenius", "Frobenius"))


def computed(report: Report) -> Found:
    """Everything that was asked for could be computed."""
    for m in report.matrices:
        text = "; ".join(m.failures) or "Everything asked for was computed."
        count = len(m.failures)
        yield Verdict("failed stages", m.name, judged(count, 0, 0), count, 0, text)


def symmetry(report: Report) -> Found:
    """Products are as symmetric as they are exact."""
    for m in report.matrices:
        if m.symmetry is None:
            continue
        ratio = m.symmetry.error / m.symmetry.noise
        status = judged(ratio, SYMMETRY, 100 * SYMMETRY)
        text = (
            f"Asymmetry {m.symmetry.error:.1e} over the noise of a product, "
            f"{m.symmetry.noise:.1e}."
        )
        if status != "PASS":
            text += " Eigenvalues and densities of it mean nothing: see `verify`."
        yield Verdict("symmetry", m.name, status, ratio, SYMMETRY, text)


def residuals(report: Report) -> Found:
    """Ritz values are eigenvalues: residuals are small against the largest."""
    for m in report.matrices:
        ends = [end for end in (m.top, m.bottom) if end is not None]
        if not ends:
            continue
        scale = max(abs(end.values[0]) for end in ends) or 1.0
        worst = max(max(end.residuals) for end in ends) / scale
        status = judged(worst, RESIDUAL, LARGE_RESIDUAL)
        text = "Largest residual over the largest magnitude of an eigenvalue."
        if status != "PASS":
            text += " Allow more products: a larger --budget, or a smaller --top."
        yield Verdict("Ritz residuals", m.name, status, worst, RESIDUAL, text)


def convergence(report: Report) -> Found:
    """Solves and Krylov spaces have converged."""
    for m in report.matrices:
        names = [name for name, number in m.numbers() if not number.converged]
        for name, end in (("largest", m.top), ("smallest", m.bottom)):
            if end is not None and not end.converged:
                names.append(f"{name} eigenvalues")
        count = len(names)
        text = "All solves and Krylov spaces have converged."
        if names:
            text = f"Not converged: {', '.join(names)}."
            text += " Their errors say by how much; a larger --budget goes on."
        # what is far off is found by the residuals and by the widths
        yield Verdict("not converged", m.name, judged(count, 0, np.inf), count, 0, text)


def widths(report: Report) -> Found:
    """Error bars are narrow enough for the numbers they belong to."""
    for m in report.matrices:
        wide: list[tuple[float, str]] = []
        for name, number in m.numbers():
            if name != "negative mass" and not _hidden(m, name, number):
                width = number.half_width() / abs(number.value) if number.value else 0.0
                wide.append((np.inf if isnan(width) else width, name))
        if not wide:
            continue
        worst, name = max(wide)
        status = judged(worst, WIDTH, 1.0)
        text = f"Half the 95 % interval over the value, at worst of the {_title(name)}."
        if status != "PASS":
            text += " More probes or runs narrow it: a larger --budget."
        yield Verdict("error bars", m.name, status, worst, WIDTH, text)


def _hidden(m: Matrix, name: str, number: Number) -> bool:
    """Whether a trace of both signs is zero for all that its norm tells."""
    if name != "trace" or m.semidefinite or m.frobenius_norm is None:
        return False
    return abs(number.value) < m.frobenius_norm.value


def negative_mass(report: Report) -> Found:
    """Negative eigenvalues, where there should be none, or at a minimum."""
    for m in report.matrices:
        if m.negative_mass is None:
            continue
        low = max(m.negative_mass.interval()[0], 0.0)
        status = judged(low, NO_MASS, -1.0 if m.semidefinite else np.inf)
        text = (
            f"Share of eigenvalues below {-m.negative_threshold:.1e} that is sure, of "
            f"{rounded(m.negative_mass)}."
        )
        if status == "WARN":
            text += " The parameters are at no minimum of the loss."
        if status == "FAIL":
            text += " The matrix has none for a loss that is convex in the output."
        yield Verdict("negative mass", m.name, status, low, NO_MASS, text)


def sharpness(report: Report) -> Found:
    """Keep the largest eigenvalue below 2 / learning rate, if one was given."""
    rate = report.problem.learning_rate
    if rate is None:
        return
    for m in report.matrices:
        if m.top is None:
            continue
        ratio = m.top.values[0] * rate / 2
        status = judged(ratio, EDGE, BEYOND)
        text = f"Largest eigenvalue over 2 / {rate:g} = {2 / rate:.4g}."
        if status == "WARN":
            text += " Gradient descent is at the edge of stability."
        if status == "FAIL":
            text += " Gradient descent without momentum leaves this place."
        yield Verdict("sharpness", m.name, status, ratio, EDGE, text)


def dead_parameters(report: Report) -> Found:
    """Every parameter has a part in the matrix."""
    m = report.matrices[0]
    if m.dead is None:
        return
    share = m.dead.count / m.size
    status = "FAIL" if m.dead.names else judged(share, 0.0, 1.0)
    text = f"Share of parameters whose rows are zero: {m.dead.count} of {m.size}."
    if m.dead.names:
        text += f" Nothing reaches {', '.join(m.dead.names)}."
    elif m.dead.count:
        text += " Inputs that are always zero, or units that never fire, do that."
    yield Verdict("dead parameters", m.name, status, share, 0.0, text)


def verified(report: Report) -> Found:
    """``A.verify()`` finds that the matrix is what it claims to be."""
    for m in report.matrices:
        if not m.checks:
            continue
        wrong = [check for check in m.checks if not check.passed]
        rows = [f"{c.name} {c.error:.1e} (allowed {c.tolerance:.1e})" for c in wrong]
        text = "All checks of `verify` passed."
        if rows:
            text = f"Checks that failed: {'; '.join(rows)}."
        count = len(wrong)
        yield Verdict("failed checks", m.name, judged(count, 0, 0), count, 0, text)


def truth(report: Report) -> Found:
    """Error bars cover the numbers of the dense matrix, where that is known."""
    for m in report.matrices:
        if m.dense is None:
            continue
        exact = dense_numbers(m)
        found = [*m.numbers()]
        if m.top is not None:
            found.append(("top", Number(m.top.values[0], m.top.residuals[0])))
        worst, name = 0.0, "number"
        for key, number in found:
            value, rounding = exact[key]
            allowed = number.half_width(TRUTH) + rounding
            ratio = abs(number.value - value) / allowed
            if not ratio <= worst:
                worst, name = ratio, key
        status = judged(worst, 1.0, 1.0)
        text = (
            f"Distance from the dense matrix's {_title(name)} over half the "
            f"{TRUTH:.2%} interval, the largest."
        )
        yield Verdict("dense matrix", m.name, status, worst, 1.0, text)


def dense_numbers(m: Matrix) -> dict[str, tuple[float, float]]:
    """Return what a dense matrix's numbers are, and what its rounding does to them.

    Parameters
    ----------
    m : Matrix
        With its dense matrix, which is kept in single precision.

    Returns
    -------
    dict
        By the names of :meth:`Matrix.numbers`, and ``"top"``.
    """
    assert m.dense is not None
    dense = (m.dense.astype(np.float64) + m.dense.T.astype(np.float64)) / 2
    values = np.linalg.eigvalsh(dense)
    norm, size = float(np.linalg.norm(dense)), m.size
    rounding = 1e-6 * norm
    sizes = np.abs(values)
    threshold = -m.negative_threshold
    unsure = np.abs(values - threshold) <= rounding
    return {
        "top": (float(values[-1]), rounding),
        "trace": (float(values.sum()), rounding * size**0.5),
        "frobenius norm": (norm, rounding),
        "effective dimension": (
            float((sizes / (sizes + m.damping)).sum()),
            rounding * size**0.5 / m.damping,
        ),
        "negative mass": (
            float((values < threshold).mean()),
            float(unsure.mean()) + 1e-12,
        ),
    }


RULES: tuple[Rule, ...] = (
    computed,
    symmetry,
    residuals,
    convergence,
    widths,
    truth,
    negative_mass,
    sharpness,
    dead_parameters,
    verified,
)


def verdicts(report: Report) -> tuple[Verdict, ...]:
    """Return what all rules say about a report, in the order of :data:`RULES`."""
    return tuple(verdict for rule in RULES for verdict in rule(report))


def worst(report: Report) -> str:
    """Return the worst status of a report's verdicts."""
    found = {verdict.status for verdict in report.verdicts}
    return next((s for s in ("FAIL", "WARN") if s in found), "PASS")
