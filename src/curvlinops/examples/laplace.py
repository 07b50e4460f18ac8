r"""Laplace's approximation with Kronecker factors, and the linearised predictive.

Run it as ``python -m curvlinops.examples.laplace``.

*Question.* A network trained on two measures of 150 iris flowers is as sure far away
from all flowers as between them. How sure may it be?

*Formula.* With a Gaussian prior of precision :math:`\delta`, Laplace's approximation of
the posterior is :math:`\mathcal{N}(\theta^*, \Sigma)` around the trained parameters,
with :math:`\Sigma^{-1} = A = G + \delta I` and the GGN :math:`G` of the summed loss.
The network, linearised in its parameters, then has Gaussian outputs

.. math::

    f(x) \sim \mathcal{N}(f_{\theta^*}(x), \, J(x) A^{-1} J(x)^\top)

and the data a probability given :math:`\delta`, by which to choose it:

.. math::

    \log p(\mathcal{D} \mid \delta) \approx -L(\theta^*) - \frac{\delta}{2}
    \|\theta^*\|^2 + \frac{P}{2} \log \delta - \frac{1}{2} \log \det A .

*Call.* ``J = JacobianLinearOperator(model, params, [(X, None)])``, then
``J @ (CGInverseLinearOperator(G.damped(d)) @ J.T)`` for the whole GGN, and
``KFACLinearOperator(...).damped(d)`` for Kronecker factors, whose ``inverse()`` and
``logdet()`` are in closed form. The determinant of the whole GGN is estimated by
``logdet(G, damping=d)``, with its error.

*What is seen.* The maps show the probability of the likeliest class. The network itself
is certain but for thin lines between the classes; with the posteriors of the GGN and of
Kronecker factors it gives up certainty where there are no data, with that of the
diagonal less so. The second figure shows the evidence of the three, by :math:`\delta`:
that of Kronecker factors is below the GGN's, that of the diagonal far below.

References: D. MacKay, "The evidence framework applied to classification networks",
Neural Computation 4 (1992), doi:10.1162/neco.1992.4.5.720. H. Ritter, A. Botev,
D. Barber, "A scalable Laplace approximation for neural networks", ICLR (2018).
A. Immer, M. Korzepa, M. Bauer, "Improving predictions of Bayesian neural nets via local
linearization", arXiv:2008.08400.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops import (
    CGInverseLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    logdet,
)
from curvlinops.examples._page import Array, Page, Stop, command, relative_error
from curvlinops.examples.functorch import functorch_ggn, functorch_jacobian

CLASSES = 3
#: Of the prior; the same one that trains the network as weight decay.
PRECISION = 0.1


class Problem(NamedTuple):
    """A trained network and its data, with the prior's precision."""

    model: nn.Module
    params: dict[str, Tensor]
    X: Tensor
    y: Tensor
    precision: float

    @property
    def risk(self) -> EmpiricalRisk:
        """The summed loss, in batches."""
        loss = nn.CrossEntropyLoss(reduction="sum")
        data = list(zip(self.X.split(60), self.y.split(60), strict=True))
        return EmpiricalRisk(self.model, loss, self.params, data)


def train_on_flowers(precision: float, seed: int) -> Problem:
    """Minimise the summed loss plus ``precision / 2`` times the squared parameters."""
    from sklearn.datasets import load_iris

    measures, labels = load_iris(return_X_y=True)
    petals = measures[:, 2:]
    X = torch.from_numpy((petals - petals.mean(0)) / petals.std(0))
    y = torch.from_numpy(labels)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    X, y = X[order], y[order]
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=500, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(X), y, reduction="sum")
        penalty = sum(p.square().sum() for p in model.parameters())
        objective = loss + precision / 2 * penalty
        objective.backward()
        return objective

    optimiser.step(closure)
    closure()
    steepness = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if steepness > 1e-2:
        raise Stop(f"The training stopped at a gradient of norm {steepness:.1e}.")
    return Problem(model, dict(model.named_parameters()), X, y, precision)


def covariances(columns: Array, solved: Array) -> Array:
    """Return ``J(x) A^-1 J(x)^T`` for every ``x``, of shape ``(number of x, C, C)``.

    The columns are those of ``J^T``; ``solved`` is their product with the inverse.
    """
    left, right = (A.T.reshape(-1, CLASSES, len(A)) for A in (columns, solved))
    return np.einsum("ncp,ndp->ncd", left, right)


def predictive(outputs: Array, covariance: Array | None) -> Array:
    """Return class probabilities, with MacKay's factor for the logits' variance."""
    if covariance is not None:
        variance = np.einsum("ncc->nc", covariance)
        outputs = outputs / np.sqrt(1 + np.pi / 8 * variance)
    return torch.from_numpy(outputs).softmax(1).numpy()


def body(page: Page) -> None:
    """Train, approximate the posterior in three ways, compare with dense, draw."""
    problem = train_on_flowers(PRECISION, page.seed)
    risk = problem.risk
    matrices = {
        "GGN": GGNLinearOperator(risk),
        "KFAC": KFACLinearOperator(risk, fisher_type="type-2"),
        "diagonal": GGNDiagonalLinearOperator(risk),
    }
    dense = dense_matrices(problem, matrices)
    check_covariances(page, problem, matrices, dense)
    deltas = np.logspace(-3, 1, 5 if page.quick else 17)
    evidence = evidences(page, problem, matrices, deltas, dense)
    draw(page, problem, matrices, deltas, evidence)


def dense_matrices(problem: Problem, matrices: dict[str, Any]) -> dict[str, Array]:
    """Return the GGN and its diagonal by another road, and KFAC built from factors."""
    loss = nn.CrossEntropyLoss(reduction="sum")
    data = [(problem.X, problem.y)]
    ggn = functorch_ggn(problem.model, loss, problem.params, data).numpy()
    kfac = matrices["KFAC"].to_dense().numpy()
    return {"GGN": ggn, "KFAC": kfac, "diagonal": np.diag(np.diag(ggn))}


def posterior(name: str, A: Any, delta: float) -> Any:
    """Return the inverse of ``A + delta I``, by solves or in closed form."""
    if name == "GGN":
        return CGInverseLinearOperator(A.damped(delta))
    return A.damped(delta).inverse()


def check_covariances(
    page: Page, problem: Problem, matrices: dict[str, Any], dense: dict[str, Array]
) -> None:
    """Compare the covariances of the outputs at some points with dense algebra."""
    random = np.random.default_rng(page.seed)
    points = torch.from_numpy(2 * random.standard_normal((10 if page.quick else 50, 2)))
    data = [(points, None)]
    J = JacobianLinearOperator(problem.model, problem.params, data)
    columns = J.T.to_dense().numpy()
    rows = functorch_jacobian(problem.model, problem.params, data).numpy()
    for name, matrix in dense.items():
        A_inv = posterior(name, matrices[name], problem.precision)
        found = covariances(columns, A_inv @ columns)
        damped = matrix + problem.precision * np.eye(len(matrix))
        truth = covariances(rows.T, np.linalg.solve(damped, rows.T))
        error = relative_error(found, truth)
        page.check(f"{name}, covariances of outputs vs dense", error, 1e-7)


def evidences(
    page: Page,
    problem: Problem,
    matrices: dict[str, Any],
    deltas: Array,
    dense: dict[str, Array],
) -> dict[str, Array]:
    """Return the log evidence of every approximation, by the prior's precision."""
    theta = problem.risk.parameters_vector(numpy=True)
    known = -float(problem.risk.loss()) - deltas / 2 * (theta @ theta)
    known += len(theta) / 2 * np.log(deltas)
    found: dict[str, list[float]] = {name: [] for name in matrices}
    worst = dict.fromkeys(matrices, 0.0)
    for delta in deltas:
        for name, A in matrices.items():
            damped = dense[name] + delta * np.eye(len(theta))
            truth = np.linalg.slogdet(damped)[1]
            if name == "GGN":
                estimate = logdet(A, delta, rng=page.seed, return_estimate=True)
                value, unit = float(estimate.value), float(estimate.error)
            else:
                value, unit = float(A.damped(delta).logdet()), 0.0
            unit += 1e-9 * abs(truth)
            worst[name] = max(worst[name], abs(value - truth) / unit)
            found[name].append(value)
    page.check("GGN, log det vs dense in its standard errors", worst["GGN"], 4.5)
    for name in ("KFAC", "diagonal"):
        page.check(f"{name}, log det vs dense in 1e-9 of it", worst[name], 1)
    evidence = {name: known - np.array(values) / 2 for name, values in found.items()}
    print(f"{'log evidence':<14}{'best precision':>14}{'there':>9}{'at 0.1':>9}")
    used = int(np.argmin(np.abs(deltas - PRECISION)))
    for name, values in evidence.items():
        best = int(np.argmax(values))
        row = f"{deltas[best]:>14.3g}{values[best]:>9.2f}{values[used]:>9.2f}"
        print(f"{name:<14}{row}")
    return evidence


def draw(
    page: Page,
    problem: Problem,
    matrices: dict[str, Any],
    deltas: Array,
    evidence: dict[str, Array],
) -> None:
    """Draw maps of certainty, and the evidence."""
    side = np.linspace(-4, 4, 25 if page.quick else 70)
    grid = torch.from_numpy(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
    J = JacobianLinearOperator(problem.model, problem.params, [(grid, None)])
    columns = J.T.to_dense().numpy()
    outputs = problem.model(grid).detach().numpy()
    maps: dict[str, Any] = {"network alone": None}
    for name, A in matrices.items():
        # Thousands of right-hand sides and 99 parameters: here, rather one inverse
        A_inv = posterior(name, A, problem.precision).to_dense().numpy()
        maps[f"{name} posterior"] = covariances(columns, A_inv @ columns)
    with page.figure("certainty", 12.5, 3.4, ncols=4, sharey=True) as axes:
        for ax, (name, covariance) in zip(axes, maps.items(), strict=True):
            certainty = predictive(outputs, covariance).max(1).reshape(2 * [len(side)])
            image = ax.contourf(side, side, certainty, np.linspace(1 / 3, 1, 21))
            for kind, marker in enumerate("os^"):
                flowers = problem.X[problem.y == kind]
                style = {"color": "white", "edgecolors": "black", "linewidths": 0.5}
                ax.scatter(*flowers.T, s=14, marker=marker, **style)
            ax.set(title=name, xlabel="petal length, standardised", aspect="equal")
        axes[0].set_ylabel("petal width, standardised")
        label, ticks = "largest class probability", np.arange(0.4, 1.01, 0.1)
        axes[0].figure.colorbar(image, ax=axes, label=label, ticks=ticks)
    with page.figure("evidence", 5, 3.6) as ax:
        for name, line in {"GGN": "-", "KFAC": "--", "diagonal": ":"}.items():
            ax.semilogx(deltas, evidence[name], line, label=name)
        ax.axvline(problem.precision, color="black", linewidth=0.6)
        ax.set(xlabel=r"precision $\delta$ of the prior", ylabel="log evidence")
        ax.grid(alpha=0.3)
        ax.legend()


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
