r"""Whether a Hessian is the derivative of the gradient, by central differences.

Where the gradient is not the derivative of the loss (straight-through estimators,
reversed gradients), a Hessian is what autograd makes of it, and differences tell
nothing: parameters for which that is so are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from curvlinops._adjoint import positive_like
from curvlinops._agreement import random_like

Vectors: TypeAlias = Sequence[Tensor]
#: Maps values of the parameters, and whether the gradient is wanted, to outputs and
#: gradient.
Evaluate: TypeAlias = Callable[[Vectors, bool], tuple[Tensor, Vectors]]


def misfits(
    evaluate: Evaluate,
    multiply: Callable[[list[Tensor]], Vectors],
    theta: Vectors,
    gradient: Vectors,
    pull: Callable[[Tensor], Vectors],
    eps: float,
) -> list[int]:
    r"""Return the places of parameters in whose rows :math:`H v` is wrong.

    Parameters
    ----------
    evaluate : callable
        Evaluates outputs, and the gradient of the loss, elsewhere.
    multiply : callable
        The product :math:`v \mapsto H v` in question.
    theta, gradient : sequence of Tensor
        The parameters, and the gradient there.
    pull : callable
        The product :math:`w \mapsto J^\top w` with the outputs' Jacobian.
    eps : float
        Relative rounding error.

    Notes
    -----
    One random direction :math:`v` is tried, of the size of the parameters. The step is
    :math:`\epsilon^{1/4}` of it, and a row wrong if it is off by more than
    :math:`\epsilon^{1/4}` of its size and by more than what the difference changes
    with a quarter of the step (kinks nearby), than what differences to both sides
    differ by (kinks at :math:`\theta` itself: ties, zeros), or than rounding may do.

    Cost: two gradients and a product if all is well; otherwise up to six gradients, two
    products, and four evaluations for every parameter.
    """
    at = _Around(evaluate, theta, eps)
    V = _direction(theta)
    if not _wrong_rows(at, multiply, V, gradient, eps, careful=False):
        return []
    fair = _follows(at, V, pull, eps)
    V = [v if ok else torch.zeros_like(v) for v, ok in zip(V, fair, strict=True)]
    rows = _wrong_rows(at, multiply, V, gradient, eps, careful=True)
    return [i for i in rows if fair[i]]


class _Around:
    """Outputs and gradient in the neighbourhood of the parameters."""

    def __init__(self, evaluate: Evaluate, theta: Vectors, eps: float) -> None:
        self._evaluate, self._theta = evaluate, theta
        self.step = eps**0.25

    def outputs(self, V: Vectors, h: float) -> Tensor:
        """Evaluate a step of width ``h`` ahead."""
        return self._evaluate(self._moved(V, h), False)[0].detach().double()

    def slopes(
        self, V: Vectors, h: float, gradient: Vectors
    ) -> list[tuple[Tensor, float]]:
        """Return differences of the gradient, and how far its two sides differ."""
        ahead, behind = (self._evaluate(self._moved(V, s), True)[1] for s in (h, -h))
        return [
            ((a - b) / (2 * h), _norm((a - g) / h - (g - b) / h))
            for a, b, g in zip(ahead, behind, gradient, strict=True)
        ]

    def _moved(self, V: Vectors, h: float) -> list[Tensor]:
        return [t + h * v for t, v in zip(self._theta, V, strict=True)]


def _follows(
    at: _Around, V: list[Tensor], pull: Callable[[Tensor], Vectors], eps: float
) -> list[bool]:
    r"""Tell for which parameters the Jacobian is the derivative of the outputs.

    By :math:`w^\top (f(\theta + h v) - f(\theta - h v)) = 2 h \, v^\top (J^\top w)`
    with vectors :math:`v` for one parameter after the other, and a :math:`w` that
    makes up for outputs of different size. Parameters for which rounding hides it are
    like the others: it is, unless it is not for one of these.
    """

    def ends(V: list[Tensor]) -> tuple[Tensor, Tensor]:
        return at.outputs(V, at.step), at.outputs(V, -at.step)

    ahead, behind = ends(V)
    sizes = (ahead - behind).abs()
    sizes = sizes.square().mean(0).sqrt() if sizes.ndim else sizes
    least = float(sizes[sizes > 0].min()) if bool((sizes > 0).any()) else 1.0
    w = positive_like(ahead) / sizes.clamp(min=least)
    gradient = pull(w.to(V[0].dtype))

    def right(i: int, v: Tensor) -> bool | None:
        sides = ends([v if j == i else torch.zeros_like(o) for j, o in enumerate(V)])
        change = (w * (sides[0] - sides[1])).sum()
        slope, products = float(change) / (2 * at.step), v * gradient[i]
        noise = 8 * eps * _norm((w * sides[0])[sides[0] != sides[1]]) / at.step
        expected, size = float(products.sum(dtype=torch.float64)), _norm(products)
        if max(abs(slope), size) <= 10 * noise:
            return None
        size = max(abs(expected), size)
        return abs(slope - expected) <= eps ** (1 / 3) * size + noise

    told = []
    for i, pair in enumerate(zip(V, random_like(V, seed=20260104), strict=True)):
        # Two vectors: in one, a part may vanish by chance.
        both = [right(i, v) for v in (pair[0], pair[0] * pair[1])]
        told.append(False if False in both else both[0])
    others = False not in told
    return [others if known is None else known for known in told]


def _direction(theta: Vectors) -> list[Tensor]:
    """Return a random direction of the size of the parameters."""
    sizes = [
        float(t.double().square().mean().sqrt()) if t.numel() else 0 for t in theta
    ]
    least = 1e-2 * (max(sizes, default=0.0) or 1.0)
    return [
        (t.abs() + 1e-2 * size + (0 if size else least)) * r
        for size, r, t in zip(sizes, random_like(list(theta)), theta, strict=True)
    ]


def _wrong_rows(
    at: _Around,
    multiply: Callable[[list[Tensor]], Vectors],
    V: list[Tensor],
    gradient: Vectors,
    eps: float,
    careful: bool,
) -> list[int]:
    """Return where a product is no difference, or where two widths agree on that."""
    found, expected = multiply(V), at.slopes(V, at.step, gradient)
    # Rounding has more effect with a narrower step, also in unknown lower precision.
    other = at.slopes(V, at.step / 4, gradient) if careful else expected
    rows = []
    for i, (p, (d, _), (e, bend), g) in enumerate(
        zip(found, expected, other, gradient, strict=True)
    ):
        allowed = eps**0.25 * max(_norm(p), _norm(d)) + 32 * eps**0.75 * _norm(g)
        if careful:
            allowed += 4 * _norm(d - e) + bend
        if _norm(p - d) > allowed:
            rows.append(i)
    return rows


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor).double())
