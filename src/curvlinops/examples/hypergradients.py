r"""How validation losses depend on weight decay, through one block solve.

Run it as ``python -m curvlinops.examples.hypergradients``.

*Question.* Softmax regression reads scikit-learn's digits; every row of pixels has a
weight decay of its own, :math:`e^{\alpha_r}`. Which of them should be larger, which
smaller, for the digits of which class? Training again with each one changed answers
that, at the price of a training per number.

*Formula.* Let :math:`\theta^*(\alpha)` minimise :math:`F(\theta, \alpha) = L(\theta) +
\frac12 \sum_r e^{\alpha_r} \|\theta_r\|^2`. By the implicit function theorem, the
validation loss :math:`V_c` of class :math:`c` has the derivatives

.. math::

    \frac{\partial V_c}{\partial \alpha_r} = - \nabla V_c^\top A^{-1}
    \frac{\partial^2 F}{\partial \theta \, \partial \alpha_r} , \qquad
    A = \nabla^2_\theta F , \qquad
    \frac{\partial^2 F}{\partial \theta \, \partial \alpha_r} = e^{\alpha_r} \theta_r

with the entries of other rows zero. The ten gradients are the columns of *one* system.

*Call.* ``A = HessianLinearOperator(ScalarFunction(F, params))``: the penalty is no loss
of a prediction, hence a scalar function. ``CGInverseLinearOperator(A) @ V`` solves for
all columns at once, with block products. The same operator takes Newton's steps.

*What is seen.* The solve agrees with the dense one, and the derivatives with
differences of minima. A few steps of gradient descent on the sum of the ten lower the
loss on digits that were not trained on.

References: Y. Bengio, "Gradient-based optimization of hyperparameters", Neural
Computation 12 (2000), doi:10.1162/089976600300015187. F. Pedregosa, "Hyperparameter
optimization with approximate gradient", arXiv:1602.02355.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from curvlinops import (
    CGInverseLinearOperator,
    HessianLinearOperator,
    ScalarFunction,
)
from curvlinops.examples._digits import load_digits_batches
from curvlinops.examples._page import Array, Page, Stop, command, relative_error

ROWS, CLASSES = 8, 10
#: Logarithm of the weight decay at the beginning, for the mean loss.
START = -8.0


class Digits(NamedTuple):
    """Images as ``(N, 8, 8)``, and labels."""

    X: Tensor
    y: Tensor


def losses(params: dict[str, Tensor], digits: Digits) -> Tensor:
    """Return the cross-entropy of every digit."""
    logits = torch.einsum("nrp,crp->nc", digits.X, params["weight"]) + params["bias"]
    return cross_entropy(logits, digits.y, reduction="none")


class Training:
    """Training with some weight decays, and its matrix.

    Attributes
    ----------
    params : dict of str to Tensor
        The minimum, once :meth:`minimise` has been called.
    function : ScalarFunction
        The loss with its penalty.
    A : HessianLinearOperator
        Its second derivatives, always at ``params``.
    """

    def __init__(
        self, digits: Digits, alpha: Array, start: Array | None = None
    ) -> None:
        decay = torch.from_numpy(alpha).exp()

        def F(params: dict[str, Tensor]) -> Tensor:
            rows = params["weight"].square().sum((0, 2))
            penalty = decay @ rows + np.exp(START) * params["bias"].square().sum()
            return losses(params, digits).mean() + penalty / 2

        shapes = {"weight": (CLASSES, ROWS, 8), "bias": (CLASSES,)}
        self.params = {n: torch.zeros(s).double() for n, s in shapes.items()}
        self.objective, self._decay = F, decay
        self.function = ScalarFunction(F, self.params)
        self.A = HessianLinearOperator(self.function)
        if start is not None:
            self.function.set_parameters(start)

    def solve(self, B: Array) -> Array:
        """Return the solution for all right-hand sides, the columns, at once."""
        solution: Array = CGInverseLinearOperator(self.A, rtol=1e-11, atol=0.0) @ B
        return solution

    def minimise(self, steps: int = 50) -> Array:
        """Return the minimum, by Newton's method with halved steps where need be."""
        f = self.function
        for _ in range(steps):
            theta, before = f.parameters_vector(numpy=True), float(f.loss())
            gradient = f.gradient_vector(numpy=True)
            if np.linalg.norm(gradient) < 1e-10:
                return theta
            step, scale = self.solve(gradient), 1.0
            f.set_parameters(theta - step)
            while float(f.loss()) > before and scale > 1e-6:
                scale /= 2
                f.set_parameters(theta - scale * step)
        raise Stop(f"Newton's method has not converged in {steps} steps.")

    def mixed(self) -> Array:
        """Return the derivatives of the gradient by the decays, of shape ``(P, R)``."""
        weight = self.params["weight"]
        columns = torch.zeros(ROWS, *weight.shape, dtype=weight.dtype)
        for r, decay in enumerate(self._decay):
            columns[r, :, r] = decay * weight[:, r]
        bias = torch.zeros(ROWS, CLASSES, dtype=weight.dtype)
        return torch.cat([columns.flatten(1), bias], 1).numpy().T

    def by_class(self, digits: Digits) -> tuple[Array, Array]:
        """Return the parts of every class in the mean loss, and their gradients."""
        params = {n: p.clone().requires_grad_() for n, p in self.params.items()}
        each = losses(params, digits) / len(digits.y)
        values = [each[digits.y == c].sum() for c in range(CLASSES)]
        gradients = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        value, list(params.values()), retain_graph=True
                    )
                ]
            )
            for value in values
        ]
        return (
            torch.stack(values).detach().numpy(),
            torch.stack(gradients, dim=1).numpy(),
        )


def hypergradients(training: Training, validation: Digits) -> tuple[Array, Array]:
    """Return the validation losses, and their derivatives, of shape ``(C, R)``."""
    values, V = training.by_class(validation)
    return values, -training.solve(V).T @ training.mixed()


def load(page: Page) -> tuple[Digits, Digits]:
    """Return digits to train with and to validate with."""
    parts = []
    for batches in load_digits_batches(10_000, page.seed):
        X, y = batches[0]
        size = 100 if page.quick else 400
        parts.append(Digits(X[:size].view(-1, ROWS, 8), y[:size]))
    return parts[0], parts[1]


def check_derivatives(
    page: Page,
    train: Digits,
    validation: Digits,
    alpha: Array,
    theta: Array,
    found: Array,
) -> None:
    """Compare with minima at decays that are a little smaller and larger."""
    h, rows = 1e-3, range(0, ROWS, 4 if page.quick else 1)
    differences = []
    for r in rows:
        ends = []
        for sign in (-1, 1):
            shifted = alpha.copy()
            shifted[r] += sign * h
            training = Training(train, shifted, theta)
            training.minimise()
            ends.append(training.by_class(validation)[0])
        differences.append((ends[1] - ends[0]) / (2 * h))
    error = relative_error(found[:, list(rows)], np.stack(differences, axis=1))
    page.check("derivatives, vs differences of minima", error, 1e-5)


def check_solve(page: Page, training: Training, validation: Digits) -> None:
    """Compare with a dense solve, of a matrix that autograd makes another way."""
    theta = training.function.parameters_vector()
    shapes = [p.shape for p in training.params.values()]
    sizes = [p.numel() for p in training.params.values()]

    def flat(x: Tensor) -> Tensor:
        parts = [p.view(s) for p, s in zip(x.split(sizes), shapes, strict=True)]
        return training.objective(dict(zip(training.params, parts, strict=True)))

    dense = torch.func.jacrev(torch.func.grad(flat))(theta)
    _, V = training.by_class(validation)
    truth = torch.linalg.solve(dense, torch.from_numpy(V)).numpy()
    page.check("block solve, vs dense", relative_error(training.solve(V), truth), 1e-7)


def body(page: Page) -> None:
    """Differentiate, compare, descend, draw."""
    train, validation = load(page)
    alpha = np.full(ROWS, START)
    training = Training(train, alpha)
    theta = training.minimise()
    values, first = hypergradients(training, validation)
    D = first
    print(f"{len(train.y)} digits to train with, {len(validation.y)} to validate with,")
    print(f"{len(theta)} parameters, {ROWS} weight decays exp(alpha)\n")
    check_solve(page, training, validation)
    check_derivatives(page, train, validation, alpha, theta, D)

    print("step  loss, training  validation  largest derivative")
    curve = [values.sum()]
    for step in range(2 if page.quick else 10):
        slope = D.sum(0)
        loss = float(losses(training.params, train).mean())
        print(f"{step:4}{loss:16.4f}{curve[-1]:12.4f}{abs(slope).max():20.1e}")
        alpha = alpha - slope / abs(slope).max() / (1 + step / 2)
        training = Training(train, alpha, theta)
        theta = training.minimise()
        new, D = hypergradients(training, validation)
        curve.append(new.sum())
    page.check("loss of validation after over before", curve[-1] / curve[0], 0.999)
    draw(page, first, np.array(curve), alpha)


def draw(page: Page, D: Array, curve: Array, alpha: Array) -> None:
    """Draw the derivatives, the descent, and the decays at its end."""
    with page.figure("hypergradients", 10, 3.4, ncols=3) as (left, middle, right):
        most = abs(D).max()
        image = left.imshow(D, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
        left.set(xlabel="row of pixels", ylabel="class", yticks=range(CLASSES))
        left.set_title("derivative of the class's loss", fontsize=9)
        left.figure.colorbar(image, ax=left)
        middle.plot(curve, "o-", markersize=4)
        middle.set(xlabel="step of the descent", ylabel="validation loss")
        middle.set_xticks(range(0, len(curve), 2))
        right.plot(range(ROWS), np.full(ROWS, START), "k--", label="before")
        right.plot(range(ROWS), alpha, "o", label="after")
        right.legend()
        right.set(xlabel="row of pixels", ylabel="log of the weight decay")


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
