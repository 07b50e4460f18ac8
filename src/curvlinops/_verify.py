r"""Does an operator multiply by the matrix it claims? Checks on the user's own problem.

The references here take another road than the operators: the model is evaluated at
shifted parameters, the user's loss function on the concatenated outputs of all data,
and derivatives are central differences of these and plain gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from curvlinops._by_forms import product_by_forms
from curvlinops._data import cut, tensors_in
from curvlinops._interrupts import isolated
from curvlinops._loss_state import unchanged
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._plain import Outputs, Plain, SkippedError
from curvlinops._random import Probes, Rng, as_seed
from curvlinops._spaces import rounding

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk

#: A check's two sides; they should be equal.
Sides: TypeAlias = tuple[Tensor, Tensor]

#: Largest tolerance: a check that allows more would show nothing.
MAX_TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """One row of a report.

    Attributes
    ----------
    name : str
        What was checked.
    error : float
        Norm of the difference over the norm of what was expected; NaN if the check was
        not made, or raised.
    tolerance : float
        Largest error that passes.
    note : str
        Why it was not made or did not pass, if that is known.
    passed : bool
        Whether it passed. A check that does not apply has.
    """

    name: str
    error: float
    tolerance: float
    note: str
    passed: bool


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`verify`.

    Attributes
    ----------
    operator : str
        The operator's name and shape.
    checks : tuple of Check
        All checks.
    """

    operator: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        """Return one line per check."""
        lines = [self.operator]
        for c in self.checks:
            skipped = c.passed and math.isnan(c.error)
            mark = "skip" if skipped else "ok" if c.passed else "FAIL"
            numbers = "" if skipped else f"  {c.error:.1e} (allowed {c.tolerance:.1e})"
            note = f"  {c.note}" if c.note else ""
            lines.append(f"  {mark:4}  {c.name:34}{numbers}{note}")
        return "\n".join(lines)


@isolated()
def verify(A: Any, rng: Rng = 0) -> Report:
    r"""Check an operator on its own model, loss and data.

    Parameters
    ----------
    A : RiskOperator
        An operator that is built from an empirical risk.
    rng : int, numpy.random.Generator, torch.Generator, or None, optional
        Source of the random directions :math:`u, v, w`.

    Returns
    -------
    Report
        One row per check. Nothing is raised; a check that raises has failed.

    Notes
    -----
    * *adjoint*: :math:`\langle A u, w \rangle = \langle u, A^\top w \rangle`. For a
      self-adjoint operator this is its symmetry.
    * *linearity*: :math:`A (2 u - 3 v) = 2 A u - 3 A v`.
    * *freshness*: :math:`A u` equals the product of an operator of the same kind that
      has recorded nothing. It fails if a recording is stale, after changes that cannot
      be seen; ``A.refresh()`` is the cure.
    * *batch split*: :math:`A u` is the same when every batch is cut in two. It fails
      if the model or loss treats the data of a batch jointly. Sampled operators draw
      other samples then, and skip it; so do EKFAC and KFOC, whose eigenvectors and
      iterations rounding may turn.
    * *loss of outputs*: the loss depends on the parameters through the model's output
      only. It fails for a weight decay in the loss, or a second call of the model.
    * *terms of the loss*: a loss that is not known in closed form is the sum or the
      mean over data that it is taken for, in every batch.
    * *finite differences*: :math:`A u` equals a product from central differences of
      gradients and outputs, with the user's loss on the concatenated outputs. Of an
      operator of your own, its forms are evaluated, batch by batch. For a
      diagonal three entries are compared. Parameters on which, to autograd, no output
      depends are not moved. The step is :math:`\epsilon^{1/3}` of the parameters' norm,
      with :math:`\epsilon` the machine epsilon. What the result changes when the step
      is doubled counts as tolerance, too (kinks), and if that is more than half of
      :data:`MAX_TOLERANCE` the check is skipped. So it is for a loss that is not known
      in closed form, if it is a mean over batches that do not fit together, or for its
      empirical Fisher; and in half precision.

    Errors are relative, in the Euclidean norm. The tolerance is :math:`32 \sqrt{n}
    \epsilon` for :math:`n` the larger dimension, at most :data:`MAX_TOLERANCE`, and
    :math:`\epsilon^{2/3}` in place of :math:`\epsilon` for finite differences.

    Cost: up to six products with the operator, two with its twins, and up to 15
    evaluations of the model on all data (27 for a diagonal); memory for the outputs of
    all data and one batch's graph. Parameters, data, recordings and random states stay
    as they are.
    """
    N, M = A.shape[1], A.shape[0]
    seed = as_seed(rng)
    u, v = Probes(N, "normal", seed, A.torch_dtype, A.device).block(0, 2).unbind(1)
    w = Probes(M, "normal", seed + 1, A.torch_dtype, A.device).block(0, 1)[:, 0]
    plain, product = Plain(A.risk), cache(lambda: A @ u)

    def adjoint() -> Sides:
        Au = product()
        scale = Au.double().norm() * w.double().norm() / math.sqrt(M)
        left = _dot(Au, w)
        return _above(left, scale), _above(_dot(u, A.adjoint() @ w), scale)

    def linearity() -> Sides:
        return A @ (2 * u - 3 * v), 2 * product() - 3 * (A @ v)

    def freshness() -> Sides:
        return product(), _twin(A, cache="off") @ u

    def batch_split() -> Sides:
        if _samples(A):
            raise SkippedError("the samples depend on the batches")
        if reason := A._depends_on_batches():
            raise SkippedError(reason)
        halves = _Halves(A.risk)
        halves.check()
        return product(), _twin(A, data=halves, cache="off") @ u

    def loss_of_outputs() -> Sides:
        plain.check_loss()
        return u, u

    def terms_of_the_loss() -> Sides:
        plain.check_terms()
        return u, u

    def finite_differences(scale: float) -> Sides:
        parameters = A.risk.space.names
        x = plain.restricted(u) if A._in_space.names == parameters else u
        y = plain.restricted(w) if A._out_space.names == parameters else w
        return _reference(A)(A, plain, scale, x, y)

    size = max(A.shape)
    exact = _tolerance(A, size, 1.0)
    with unchanged(A.risk.loss_func):
        rows = [
            _row("adjoint", adjoint, exact),
            _row("linearity", linearity, exact),
            _row("freshness", freshness, exact),
            _row("batch split", batch_split, exact),
            _row("loss of outputs", loss_of_outputs, exact),
            _row("terms of the loss", terms_of_the_loss, exact),
            _converged(finite_differences, _tolerance(A, size, 2 / 3)),
        ]
    return Report(f"{type(A).__name__} of shape {M} x {N}", tuple(rows))


def _tolerance(A: Any, size: int, exponent: float) -> float:
    eps = rounding(A.torch_dtype, A.device, A.risk.model.convolves)
    return min(32 * math.sqrt(size) * eps**exponent, MAX_TOLERANCE)


def _row(name: str, sides: Callable[[], Sides], tolerance: float) -> Check:
    """Compare two sides; whatever goes wrong is a note."""
    try:
        error = _distance(*sides())
    except SkippedError as reason:
        return Check(name, math.nan, tolerance, str(reason), True)
    except Exception as error_:  # a report, not an exception, is what was asked for
        raise_if_out_of_memory(error_)
        note = f"{type(error_).__name__}: {error_}"
        return Check(name, math.nan, tolerance, note, False)
    return Check(name, error, tolerance, "", error <= tolerance)


def _converged(sides: Callable[[float], Sides], tolerance: float) -> Check:
    """Compare with finite differences that two step widths agree on."""
    spread = 0.0

    def both() -> Sides:
        nonlocal spread
        if tolerance >= MAX_TOLERANCE:
            raise SkippedError("finite differences are too coarse in this precision")
        actual, expected = sides(1.0)
        spread = _distance(sides(2.0)[1], expected)
        if spread > MAX_TOLERANCE / 2:
            raise SkippedError(
                f"finite differences do not converge (they change by {spread:.1e}): "
                "does the model have kinks?"
            )
        return actual, expected

    check = _row("finite differences", both, tolerance)
    if math.isnan(check.error):
        return check
    tolerance = tolerance + 2 * spread
    passed = check.error <= tolerance
    return Check(check.name, check.error, tolerance, check.note, passed)


def _distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    scale = float(expected.norm())
    error = float((actual - expected).norm())
    return error / scale if scale else error


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.double(), b.double())


def _above(value: Tensor, scale: Tensor) -> Tensor:
    """Attach the scale that a scalar is compared on, so that it may vanish."""
    return torch.stack([value, scale])


def _twin(A: Any, **changes: Any) -> Any:
    """Return the operator on the same problem without its recordings."""
    return A._of(A.risk.twin(progressbar=False, **changes))


def _samples(A: Any) -> int:
    """Return the number of Monte-Carlo samples per term, 0 for an exact operator."""
    return getattr(getattr(A, "middle", None), "mc_samples", 0)


class _Halves:
    """Data whose every batch is cut in two."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        self.risk = risk

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield the halves of one batch after the other."""
        for X, y in self.risk.pairs():
            size = self.risk.batch_size(X)
            for start, stop in ((0, size // 2), (size // 2, size)):
                if start < stop:
                    yield (
                        cut(X, size, start, stop),
                        cut(y, size, start, stop, several=True),
                    )

    def check(self) -> None:
        """Raise if a batch cannot be cut, or none needs to."""
        sizes = []
        try:
            for X, _ in self.risk.pairs():
                sizes.append(self.risk.batch_size(X))
                if not any(t.ndim and len(t) == sizes[-1] for t in tensors_in(X)):
                    raise SkippedError("no input has the data along its first axis")
        except ValueError as error:
            raise SkippedError("the number of data in a batch is not known") from error
        if max(sizes) < 2:
            raise SkippedError("every batch is a single datum")


def _flat(outputs: Iterable[Tensor]) -> Tensor:
    return torch.cat([f.reshape(-1) for f in outputs])


# -- what every matrix is compared with ---------------------------------------------

#: Maps the operator, plain evaluation, a factor of the step width, and random vectors
#: of the operator's input and output to the two sides of a comparison.
Reference: TypeAlias = "Callable[[Any, Plain, float, Tensor, Tensor], Sides]"


def _hessian(A: Any, plain: Plain, scale: float, u: Tensor, _: Tensor) -> Sides:
    h = plain.step(u, scale)

    def gradient(shift: Tensor) -> Tensor:
        return plain.pull_back(plain.loss_gradient(plain.outputs(shift)), shift)

    return A @ u, (gradient(h * u) - gradient(-h * u)) / (2 * h)


def _ggn(A: Any, plain: Plain, scale: float, u: Tensor, _: Tensor) -> Sides:
    Ju = plain.push_forward(u, scale)
    if _samples(A):
        return A @ u, plain.pull_back(_sampled_outer_mul(A, plain, Ju))
    sizes = [float(_flat(fs).norm()) for fs in (plain.here, Ju)]
    root = torch.finfo(plain.dtype).eps ** (1 / 3)
    h = scale * root * (1 + sizes[0]) / max(sizes[1], 1e-30)
    ahead, behind = (
        plain.loss_gradient([f + t * d for f, d in zip(plain.here, Ju, strict=True)])
        for t in (h, -h)
    )
    HJu = [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
    return A @ u, plain.pull_back(HJu)


def _sampled_outer_mul(A: Any, plain: Plain, U: Outputs) -> Outputs:
    """Multiply by the mean of the samples' outer products."""
    share, results = plain.share_of_a_term, []
    for loss, u in zip(plain.losses(), U, strict=True):
        G = loss.sample_gradients(_samples(A), A.middle.seed)
        products = torch.stack([loss.outer_mul(g, u) for g in G])
        results.append(share * products.mean(0))
    return results


def _empirical(A: Any, plain: Plain, scale: float, u: Tensor, _: Tensor) -> Sides:
    losses = plain.losses()
    if losses[0].opaque:
        raise SkippedError("the loss is not known in closed form")
    Ju, G = plain.push_forward(u, scale), plain.loss_gradient(plain.here)
    share = plain.share_of_a_term  # once in G, not twice
    batches = zip(losses, G, Ju, strict=True)
    return A @ u, plain.pull_back([p.outer_mul(g, d) / share for p, g, d in batches])


def _diagonal(A: Any, plain: Plain, scale: float, u: Tensor, w: Tensor) -> Sides:
    diagonal = plain.restricted(A @ torch.ones_like(u))
    places = {int(v.abs().argmax()) for v in (diagonal, u, w)}
    sides = []
    for i in places:
        unit = torch.zeros_like(u)
        unit[i] = 1.0
        sides.append([side[i] for side in _ggn(A, plain, scale, unit, w)])
    actual, expected = zip(*sides, strict=True)
    return torch.stack(actual), torch.stack(expected)


def _jacobian(A: Any, plain: Plain, scale: float, u: Tensor, _: Tensor) -> Sides:
    return A @ u, _flat(plain.push_forward(u, scale))


def _transposed(A: Any, plain: Plain, _scale: float, u: Tensor, _: Tensor) -> Sides:
    return A @ u, plain.pull_back(plain.split(u))


def _gram(A: Any, plain: Plain, scale: float, u: Tensor, _: Tensor) -> Sides:
    U = plain.split(u)
    if not A.weighted:
        JJTu = plain.push_forward(plain.pull_back(U), scale)
        return A @ u, _flat(JJTu)
    losses, share = plain.losses(), plain.share_of_a_term
    RU = [loss.factor_mul(part) for loss, part in zip(losses, U, strict=True)]
    JJTRU = plain.push_forward(plain.pull_back(RU), scale)
    batches = zip(losses, JJTRU, strict=True)
    return A @ u, share * _flat(p.factor_transpose_mul(part) for p, part in batches)


#: By the operator's class; subclasses share the entry of their nearest base.
REFERENCES: dict[str, Reference] = {
    "HessianLinearOperator": _hessian,
    "GGNLinearOperator": _ggn,
    "FisherMCLinearOperator": _ggn,
    "EFLinearOperator": _empirical,
    "GGNDiagonalLinearOperator": _diagonal,
    "JacobianLinearOperator": _jacobian,
    "TransposedJacobianLinearOperator": _transposed,
    "GramLinearOperator": _gram,
}


def _forms(A: Any, plain: Plain, scale: float, u: Tensor, _: Tensor) -> Sides:
    return A @ u, product_by_forms(A.forms, plain, scale, u)


def _reference(A: Any) -> Reference:
    for base in type(A).__mro__:
        if base.__name__ in REFERENCES:
            return REFERENCES[base.__name__]
    if A.forms and all(form.linear for form in A.forms):
        return _forms
    raise SkippedError(f"there is no reference for {type(A).__name__}")
