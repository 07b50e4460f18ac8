r"""Which training digits speak for a test digit, and which against it.

Run it as ``python -m curvlinops.examples.influence``.

*Question.* How would the loss on one test digit change if one of the training digits
had not been there? Training again without it answers that for one of them.

*Formula.* Let :math:`\theta^*` minimise
:math:`F(\theta) = \sum_n \ell_n(\theta) + \frac{\lambda}{2} \|\theta\|^2`. To first
order, leaving datum :math:`n` out changes the loss on the test datum by

.. math::

    \Delta_n = g_\text{test}^\top A^{-1} g_n , \qquad A = \nabla^2 F = H + \lambda I

with the gradients :math:`g` at :math:`\theta^*`. For cross-entropy :math:`g_n =
J_n^\top (p_n - y_n)`, with the outputs' Jacobian :math:`J_n`, predicted probabilities
:math:`p_n` and the one-hot label :math:`y_n`. So *one* solve and *one* product give all
of them: :math:`r = A^{-1} g_\text{test}`, then :math:`(p_n - y_n)^\top (J r)_n`.

*Call.* ``r = CGInverseLinearOperator(H.damped(lam), preconditioner=M) @ g_test``, then
``JacobianLinearOperator(...) @ r``.

*What is seen.* For softmax regression, training again is exact and cheap: a few steps
of Newton's method, here with formulas of NumPy. The predictions are in its order, and
near where little changes; a large change is larger than the first order says. The table
has the products that conjugate gradients take with several preconditioners, and what
the sketch of Nyström's costs. Kronecker factors save iterations and cost no products;
the sketch saves more than it costs; the diagonal costs iterations. The images are the
training digits without which the test digit would be read better, and those without
which it would be read worse.

References: P. W. Koh, P. Liang, "Understanding black-box predictions via influence
functions", arXiv:1703.04730. R. D. Cook, S. Weisberg, "Residuals and influence in
regression", Chapman and Hall (1982).
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import cg
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    NystromPreconditionerLinearOperator,
)
from curvlinops.examples._digits import load_digits_batches
from curvlinops.examples._page import Array, Counted, Page, command, relative_error

#: The weight decay of the summed loss, and the rank of Nyström's sketch.
DECAY, RANK = 1.0, 30
RTOL = 1e-10
CLASSES = 10


class Softmax(NamedTuple):
    """Softmax regression by formulas: what is to be compared with, without torch."""

    X: Array
    Y: Array

    def probabilities(self, theta: Array) -> Array:
        """Return the predicted class probabilities, of shape ``(N, C)``."""
        logits = self.X @ theta.reshape(CLASSES, -1).T
        logits -= logits.max(1, keepdims=True)
        odds = np.exp(logits)
        return odds / odds.sum(1, keepdims=True)

    def loss(self, theta: Array) -> float:
        """Return the summed cross-entropy."""
        return float(-np.log((self.probabilities(theta) * self.Y).sum(1)).sum())

    def gradient(self, theta: Array) -> Array:
        """Return the gradient of the summed loss with its penalty."""
        residual = self.probabilities(theta) - self.Y
        return (residual.T @ self.X).reshape(-1) + DECAY * theta

    def hessian(self, theta: Array) -> Array:
        """Return its second derivatives, of shape ``(P, P)``."""
        p, D = self.probabilities(theta), self.X.shape[1]
        H = np.zeros((CLASSES, D, CLASSES, D))
        for i in range(CLASSES):
            for j in range(CLASSES):
                weight = p[:, i] * ((i == j) - p[:, j])
                H[i, :, j] = self.X.T @ (weight[:, None] * self.X)
        return H.reshape(CLASSES * D, -1) + DECAY * np.eye(CLASSES * D)

    def minimise(self, theta: Array, steps: int = 100) -> Array:
        """Return the minimum, by Newton's method with halved steps where need be."""

        def objective(x: Array) -> float:
            return self.loss(x) + DECAY / 2 * float(x @ x)

        for _ in range(steps):
            gradient = self.gradient(theta)
            if np.linalg.norm(gradient) < 1e-9:
                break
            step, scale = np.linalg.solve(self.hessian(theta), gradient), 1.0
            while objective(theta - scale * step) > objective(theta) and scale > 1e-8:
                scale /= 2
            theta = theta - scale * step
        return theta

    def without(self, index: int) -> Softmax:
        """Return the same with one datum less."""
        return Softmax(np.delete(self.X, index, 0), np.delete(self.Y, index, 0))


def load(size: int | None, seed: int) -> tuple[Softmax, Softmax]:
    """Return training and test digits; a pixel that is always one is the bias."""
    parts = []
    for batches in load_digits_batches(10_000, seed):
        X, y = (part.numpy() for part in batches[0])
        X = np.hstack([X, np.ones((len(X), 1))])
        parts.append(Softmax(X[:size], np.eye(CLASSES)[y[:size]]))
    return parts[0], parts[1]


def as_risk(model: nn.Module, digits: Softmax, batch_size: int = 500) -> EmpiricalRisk:
    """Return the summed cross-entropy in mini-batches."""
    X, y = torch.from_numpy(digits.X), torch.from_numpy(digits.Y.argmax(1))
    data = list(zip(X.split(batch_size), y.split(batch_size), strict=True))
    loss = nn.CrossEntropyLoss(reduction="sum")
    return EmpiricalRisk(model, loss, dict(model.named_parameters()), data)


def compare_preconditioners(
    page: Page, risk: EmpiricalRisk, b: Array, solution: Array
) -> tuple[Array, dict[str, list[float]]]:
    """Solve with several preconditioners; return the solution, and all residuals."""
    H = HessianLinearOperator(risk)
    sketched = Counted(H)
    preconditioners: dict[str, Any] = {
        "none": None,
        "diagonal of the GGN": GGNDiagonalLinearOperator(risk).damped(DECAY).inverse(),
        f"Nyström, rank {RANK}": NystromPreconditionerLinearOperator(
            sketched, RANK, DECAY, rng=page.seed
        ),
        "KFAC": KFACLinearOperator(risk, fisher_type="type-2").damped(DECAY).inverse(),
    }
    print(f"{'preconditioner':<22}products: sketch  solve  error vs dense")
    curves: dict[str, list[float]] = {}
    for name, M in preconditioners.items():
        A = Counted(H.damped(DECAY))
        errors = [1.0]

        def note(x: Array, errors: list[float] = errors) -> None:
            errors.append(relative_error(x, solution))

        x, _ = cg(A, b, rtol=RTOL, maxiter=5000, M=M, callback=note)
        sketch = sketched.products if name.startswith("Nyström") else 0
        error = relative_error(x, solution)
        print(f"{name:<22}{sketch:>16}{A.products:>7}{error:>16.1e}")
        page.check(f"solve with {name}, vs dense", error, 1e-4)
        curves[name] = [float("nan")] * sketch + errors
    return x, curves


def body(page: Page) -> None:
    """Train, predict influences, train again without some digits, compare, draw."""
    train, test = load(200 if page.quick else None, page.seed)
    theta = train.minimise(np.zeros(CLASSES * train.X.shape[1]))
    model = nn.Linear(train.X.shape[1], CLASSES, bias=False).double()
    risk = as_risk(model, train)
    risk.set_parameters(theta)
    one = int(np.argmax(-np.log((test.probabilities(theta) * test.Y).sum(1))))
    digit = Softmax(test.X[one : one + 1], test.Y[one : one + 1])
    guess = digit.probabilities(theta)[0]
    label = int(digit.Y.argmax())
    print(f"A {label} of the test digits is taken for a {guess.argmax()},")
    print(f"its own probability is {guess[label]:.4f}.\n")

    # One solve and one product for all training digits
    g = as_risk(model, digit).gradient_vector(numpy=True)
    solution = np.linalg.solve(train.hessian(theta), g)
    r, curves = compare_preconditioners(page, risk, g, solution)
    J = JacobianLinearOperator(risk)
    residual = train.probabilities(theta) - train.Y
    influence = np.einsum("nc,nc->n", residual, (J @ r).reshape(residual.shape))
    truth = np.einsum("nc,nc->n", residual, train.X @ solution.reshape(CLASSES, -1).T)
    page.check("influences, vs dense", relative_error(influence, truth), 1e-6)

    # Training again without those that matter most, and without some others
    order = np.argsort(influence)
    few = 3 if page.quick else 8
    ends = np.r_[order[:few], order[-few:]]
    random = np.random.default_rng(page.seed)
    others = random.choice(order[few:-few], few, replace=False)
    chosen = np.r_[ends, others]
    before = digit.loss(theta)
    again = [train.without(n).minimise(theta) for n in chosen]
    changes = np.array([digit.loss(x) for x in again]) - before
    correlation = float(np.corrcoef(influence[chosen], changes)[0, 1])
    print(f"\nTrained again {len(chosen)} times, without one of {len(train.X)} digits:")
    print(f"correlation of predicted and true changes of the loss {correlation:.4f}")
    page.check("one minus that correlation", 1 - correlation, 0.05)
    draw(page, train, digit, influence, chosen, changes, curves)


def draw(
    page: Page,
    train: Softmax,
    digit: Softmax,
    influence: Array,
    chosen: Array,
    changes: Array,
    curves: dict[str, list[float]],
) -> None:
    """Draw prediction against truth, the solves, and the digits."""
    with page.figure("influence", 9.5, 3.8, ncols=2) as (left, right):
        left.plot(influence[chosen], changes, "o", markersize=5)
        left.axline((0, 0), slope=1, color="black", linewidth=0.6)
        left.set_xlabel("predicted change of the test loss")
        left.set_ylabel("change after training again")
        left.grid(alpha=0.3)
        styles = iter(("-", ":", "-.", "--"))
        for name, errors in curves.items():
            style = next(styles)
            right.semilogy(errors, style, label=name)
        right.set_xlabel("products with the Hessian, those of the sketch first")
        right.set_ylabel("error of the solution, against dense")
        right.grid(alpha=0.3)
        right.legend()
    order = np.argsort(influence)
    with page.figure("digits", 8.5, 3.6, nrows=2, ncols=6) as axes:
        rows = {"without: loss falls": order, "without: loss rises": order[::-1]}
        for row, (text, best) in zip(axes, rows.items(), strict=True):
            shown = [(digit, 0, "the test digit")]
            shown += [(train, n, f"{influence[n]:+.3f}") for n in best[:5]]
            for ax, (source, n, note) in zip(row, shown, strict=True):
                ax.imshow(source.X[n, :-1].reshape(8, 8), cmap="gray_r")
                ax.set(xticks=[], yticks=[])
                ax.set_title(f"{source.Y[n].argmax()}: {note}", fontsize=9)
            row[1].set_ylabel(text, fontsize=7)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
