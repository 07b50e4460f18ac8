r"""One network from two that know different digits, weighted by their curvature.

Run it as ``python -m curvlinops.examples.model_merging``.

*Question.* A network was trained briefly on all digits; one copy went on with the
digits 0 to 4, another with 5 to 9. Without any data, can the two be merged into one
that reads all ten?

*Formula.* Around its own weights :math:`\theta_i`, each network's loss is about
:math:`\frac12 (\theta - \theta_i)^\top F_i (\theta - \theta_i)`, with its Fisher
matrix :math:`F_i`. The sum, with a pull :math:`\delta` towards both, is least at

.. math::

    \theta = \Big( \sum_i F_i + \delta I \Big)^{-1}
    \sum_i ( F_i + \delta I ) \, \theta_i

A large :math:`\delta` gives the plain average of the weights.

*Call.* ``CGInverseLinearOperator((F_1 + F_2).damped(2 * delta)) @ b`` for any matrices:
the diagonal of the GGN (where the inverse is in closed form), Kronecker factors, or the
GGN itself, which is the Fisher matrix of the cross-entropy. Each network's operator is
built on its own digits; only the sum is solved with.

*What is seen.* The solves agree with dense ones, and the diagonal with a weighted mean
of every single weight. Either network has forgotten the other's digits; merged ones
read both. With Kronecker factors and with the GGN, the loss is well below that of the
plain average. The diagonal, which does not know that weights act together, gains less,
and may lose.

References: M. Matena, C. Raffel, "Merging models with Fisher-weighted averaging",
arXiv:2111.09832. N. Daheim et al., "Model merging by uncertainty-based gradient
matching", arXiv:2310.12808.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from curvlinops import (
    CGInverseLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
)
from curvlinops.examples._digits import (
    Batches,
    accuracy,
    load_digits_batches,
    make_network,
    no_bar,
    train,
)
from curvlinops.examples._page import Array, Page, command, relative_error
from curvlinops.examples.natural_gradient import dense_ggn

#: Of the pull towards both networks, for every matrix the same.
DAMPING = 1e-4
AVERAGE = "average"


class Expert(NamedTuple):
    """A network that went on with some digits, its weights, and their loss."""

    model: nn.Sequential
    theta: Array
    risk: EmpiricalRisk
    data: Batches


def only(batches: Batches, low: int, high: int) -> Batches:
    """Return the digits from ``low`` to ``high`` in every batch."""
    chosen = [(y >= low) & (y <= high) for _, y in batches]
    return [(X[c], y[c]) for (X, y), c in zip(batches, chosen, strict=True)]


def specialise(base: nn.Sequential, data: Batches, epochs: int) -> Expert:
    """Train a copy of a network with some digits."""
    model = deepcopy(base)
    train(model, data, epochs)
    params = dict(model.named_parameters())
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), params, data)
    return Expert(model, risk.parameters_vector(numpy=True), risk, data)


#: From a loss to a matrix: ever nearer to the Fisher matrix.
MATRICES: dict[str, Callable[[EmpiricalRisk], Any]] = {
    "diagonal": GGNDiagonalLinearOperator,
    "KFAC": lambda risk: KFACLinearOperator(risk, fisher_type="type-2"),
    "GGN": GGNLinearOperator,
}


def merge(experts: list[Expert], matrices: list[Any], damping: float) -> Array:
    """Return the weights at which the sum of the quadratic functions is least."""
    b = sum(F.damped(damping) @ e.theta for F, e in zip(matrices, experts, strict=True))
    A = (matrices[0] + matrices[1]).damped(len(experts) * damping)
    solution: Array = CGInverseLinearOperator(A, rtol=1e-12, atol=0.0) @ b
    return solution


def check_solves(page: Page, experts: list[Expert]) -> None:
    """Compare every solve with a dense one, and the diagonal with a weighted mean."""
    ggns = [dense_ggn(e.model, e.data, no_bar) for e in experts]
    others = {"GGN": ggns, "diagonal": [np.diag(np.diag(G)) for G in ggns]}
    for name, build in MATRICES.items():
        matrices = [build(e.risk) for e in experts]
        dense = others.get(name) or [F.to_dense().numpy() for F in matrices]
        damped = [D + DAMPING * np.eye(len(D)) for D in dense]
        b = sum(D @ e.theta for D, e in zip(damped, experts, strict=True))
        truth = np.linalg.solve(np.sum(damped, axis=0), b)
        found = merge(experts, matrices, DAMPING)
        page.check(f"{name}: merged, vs dense", relative_error(found, truth), 1e-7)
        if name == "diagonal":
            weights = [np.diag(D) for D in damped]
            thetas = [e.theta for e in experts]
            mean = np.average(thetas, axis=0, weights=weights)
            error = relative_error(found, mean)
            page.check("diagonal: merged, vs weighted mean", error, 1e-10)


class Quality(NamedTuple):
    """Loss and accuracy on test digits: of all, of 0 to 4, of 5 to 9."""

    loss: float
    every: float
    low: float
    high: float


def quality(model: nn.Sequential, test: Batches) -> Quality:
    """Return how well a network reads the test digits."""
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(test[0][0]), test[0][1])
    parts = (test, only(test, 0, 4), only(test, 5, 9))
    return Quality(float(loss), *(accuracy(model, part) for part in parts))


def body(page: Page) -> None:
    """Train, merge in several ways, compare, draw."""
    hidden, epochs = (8, 20) if page.quick else (24, 40)
    data, test = load_digits_batches(500, page.seed)
    base = make_network(hidden, page.seed)
    train(base, data, 10)
    halves = [only(data, 0, 4), only(data, 5, 9)]
    experts = [specialise(base, half, epochs) for half in halves]
    check_solves(page, experts)

    table = {"before": quality(base, test)}
    table |= {
        f"trained with {name}": quality(e.model, test)
        for name, e in zip(("0-4", "5-9"), experts, strict=True)
    }
    merged = {AVERAGE: np.mean([e.theta for e in experts], axis=0)}
    for name, build in MATRICES.items():
        matrices = [build(e.risk) for e in experts]
        merged[name] = merge(experts, matrices, DAMPING)
    model = deepcopy(base)
    for name, theta in merged.items():
        params = list(model.parameters())
        torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), params)
        table[name] = quality(model, test)

    print(f"Network 64-{hidden}-10, {len(merged[AVERAGE])} parameters\n")
    print(f"{'weights':<20}test loss  all digits    0-4     5-9")
    for name, q in table.items():
        shares = f"{q.every:>11.1%}{q.low:>8.1%}{q.high:>8.1%}"
        print(f"{name:<20}{q.loss:9.3f}{shares}")
    single = max(table["trained with 0-4"].every, table["trained with 5-9"].every)
    page.check("best of two, over merged by GGN", single / table["GGN"].every, 0.9)
    ratio = table["GGN"].loss / table[AVERAGE].loss
    page.check("loss merged by GGN, over that of the average", ratio, 0.95)
    draw(page, table)


def draw(page: Page, table: dict[str, Quality]) -> None:
    """Draw losses, and accuracies on either half of the digits."""
    names, places = list(table), np.arange(len(table))
    with page.figure("merging", 9.5, 3.6, ncols=2, sharey=True) as (left, right):
        left.barh(places, [q.loss for q in table.values()])
        left.set(xlabel="loss on test digits", yticks=places, yticklabels=names)
        left.invert_yaxis()
        right.barh(places - 0.2, [q.low for q in table.values()], 0.4, label="0 to 4")
        right.barh(places + 0.2, [q.high for q in table.values()], 0.4, label="5 to 9")
        right.set_xlabel("accuracy on test digits")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
