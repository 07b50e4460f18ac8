r"""Sampled Fisher matrices converge to the Fisher matrix, the empirical one does not.

Run it as ``python -m curvlinops.examples.monte_carlo_fisher``.

*Question.* Three matrices are called Fisher. Which of them is one, and how many samples
does the one by sampling need?

*Formula.* The Fisher matrix averages over labels that the *model* draws,

.. math::

    F = \frac{1}{N} \sum_n \mathbb{E}_{\hat y \sim p_\theta(\cdot \mid x_n)}
    \left[ g_n(\hat y) g_n(\hat y)^\top \right] , \qquad
    g_n(y) = \nabla_\theta \left( -\log p_\theta(y \mid x_n) \right) ,

and equals the generalised Gauss-Newton matrix for cross-entropy. With :math:`M` labels
drawn per datum the mean is unbiased, and as draws are independent, its squared error is
known exactly:

.. math::

    \mathbb{E} \| F_M - F \|_F^2 = \frac{1}{M N^2} \sum_n \left(
    \mathbb{E} \| g_n \|^4 - \| F_n \|_F^2 \right) .

With the *data's* labels instead of the model's it is the empirical Fisher matrix.

*Call.* ``FisherMCLinearOperator(model, loss, params, data, mc_samples=M, seed=s)``,
``GGNLinearOperator(...)``, ``EFLinearOperator(...)``.

*What is seen.* The errors of sampled matrices lie on the line that the formula
predicts, which falls with :math:`1 / \sqrt{M}`. The empirical matrix is off by about
half of the Fisher matrix, before training and after, and no sampling would help.

References: J. Martens, "New insights and perspectives on the natural gradient method",
arXiv:1412.1193. F. Kunstner, L. Balles, P. Hennig, "Limitations of the empirical Fisher
approximation", arXiv:1905.12558.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
)
from curvlinops.examples._digits import Digits, trained_digits
from curvlinops.examples._page import Array, Page, command, relative_error
from curvlinops.examples.functorch import functorch_ggn, functorch_jacobian


def scores(digits: Digits) -> tuple[Array, Array]:
    """Return gradients for all labels, of shape ``(N, C, P)``, and probabilities."""
    J = functorch_jacobian(digits.model, digits.params, digits.data).numpy()
    X = torch.cat([X for X, _ in digits.data])
    p = digits.model(X).detach().softmax(1).numpy()
    J = J.reshape(*p.shape, -1)
    mean = np.einsum("nc,ncp->np", p, J)
    return mean[:, None] - J, p


def expected_squared_error(digits: Digits) -> float:
    """Return the squared error of one sample per datum, by the formula."""
    g, p = scores(digits)
    inner = np.einsum("ncp,ndp->ncd", g, g, optimize=True)
    fourth = np.einsum("nc,nc->", p, np.einsum("ncc->nc", inner) ** 2)
    squared_norms = np.einsum("nc,nd,ncd->", p, p, inner**2)
    return float(fourth - squared_norms) / len(p) ** 2


def body(page: Page) -> None:
    """Sample, compare with the formula and with dense matrices, draw."""
    samples = [1, 4, 16, 64] if page.quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    repeats, hidden, size = (3, 3, 100) if page.quick else (8, 6, 300)
    errors: dict[str, Array] = {}
    lines: dict[str, Array] = {}
    empirical: dict[str, float] = {}
    for name, epochs in {"untrained": 0, "trained": 100}.items():
        trained = trained_digits(hidden, epochs, page.seed, batch_size=size)
        digits = trained._replace(data=trained.data[:1])
        loss = nn.CrossEntropyLoss()
        problem = digits.model, loss, digits.params, digits.data
        risk = EmpiricalRisk(*problem)
        F = functorch_ggn(*problem).numpy()
        scale = float(np.linalg.norm(F))
        found = [
            [
                FisherMCLinearOperator(
                    risk, mc_samples=M, seed=page.seed + repeat
                ).to_dense()
                for repeat in range(repeats)
            ]
            for M in samples
        ]
        squared = [[np.linalg.norm(A.numpy() - F) ** 2 for A in row] for row in found]
        errors[name] = np.sqrt(squared) / scale
        expected = expected_squared_error(digits)
        lines[name] = np.sqrt(expected / np.array(samples)) / scale
        ratio = np.mean(squared * np.array(samples)[:, None]) / expected
        page.check(f"{name}, squared errors vs formula", abs(ratio - 1), 0.3)
        slope = np.polyfit(np.log(samples), np.log(np.mean(squared, 1)) / 2, 1)[0]
        page.check(f"{name}, slope vs -1/2", abs(slope + 0.5), 0.1)
        G = GGNLinearOperator(risk).to_dense()
        page.check(f"{name}, GGN vs dense Fisher", relative_error(G, F), 1e-10)
        g, p = scores(digits)
        fisher = np.einsum("nc,ncp,ncq->pq", p / len(p), g, g, optimize=True)
        error = relative_error(fisher, F)
        page.check(f"{name}, Fisher by its formula vs GGN", error, 1e-10)
        empirical[name] = relative_error(EFLinearOperator(risk).to_dense(), F)
        print(f"{name}: empirical Fisher matrix, error {empirical[name]:.2f}")
        print("  samples" + "".join(f"{M:>8}" for M in samples))
        print("  error  " + "".join(f"{e:>8.3f}" for e in errors[name].mean(1)))
        print("  formula" + "".join(f"{e:>8.3f}" for e in lines[name]))
    draw(page, samples, errors, lines, empirical)


def draw(
    page: Page,
    samples: list[int],
    errors: dict[str, Array],
    lines: dict[str, Array],
    empirical: dict[str, float],
) -> None:
    """Draw errors by samples."""
    with page.figure("convergence", 9.5, 3.7, ncols=2, sharey=True) as axes:
        for ax, (name, found) in zip(axes, errors.items(), strict=True):
            for column in found.T:
                (dots,) = ax.loglog(samples, column, "C0.", alpha=0.6)
            dots.set_label("sampled, one dot per seed")
            ax.loglog(samples, lines[name], "k-", linewidth=1, label="formula")
            ax.axhline(empirical[name], color="C1", linestyle="--", label="empirical")
            ax.set(xlabel="samples per datum", title=f"{name} network")
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("distance from the Fisher matrix")
        axes[0].legend()


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
