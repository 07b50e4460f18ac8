r"""The Hessian as Adam sees it: eigenvalues in Adam's own metric.

Run it as ``python -m curvlinops.examples.preconditioned_spectrum``.

*Question.* Gradient descent is stable where the Hessian's largest eigenvalue stays
below :math:`2 / \eta`. Adam trains well at sharpnesses far above that. Which eigenvalue
does it have to heed?

*Formula.* Adam divides by :math:`P = \operatorname{diag}(\sqrt{\hat v} + \epsilon)`,
with :math:`\hat v` the running mean of squared gradients. It is gradient descent with
momentum :math:`\beta_1` in another metric, so what counts are the eigenvalues of

.. math::

    H x = \lambda P x ,

and momentum in Adam's form is stable on a quadratic as long as

.. math::

    \lambda_1 \le \frac{2 (1 + \beta_1)}{(1 - \beta_1) \, \eta}
    = \frac{38}{\eta} \quad \text{for } \beta_1 = 0.9 .

*Call.* ``scipy.sparse.linalg.eigsh(H, k=1, M=P, Minv=P_inv)``: the Hessian as an
operator, and two :class:`~curvlinops.DiagonalLinearOperator`.

*What is seen.* The largest eigenvalue of the Hessian alone, far from any threshold,
keeps growing. The one in Adam's metric rises to :math:`38 / \eta` and stays there. The
second figure shows the leading eigenvalues of both kinds after training: in Adam's
metric, more than one of them has come near the threshold.

Reference: J. Cohen, B. Ghorbani, S. Krishnan et al., "Adaptive gradient methods at the
edge of stability", arXiv:2207.14484.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from torch import nn

from curvlinops import DiagonalLinearOperator, EmpiricalRisk, HessianLinearOperator
from curvlinops.examples._digits import load_digits_batches, make_network
from curvlinops.examples._page import Array, Page, command
from curvlinops.examples.functorch import functorch_hessian

LEARNING_RATE, BETAS, EPSILON = 1e-2, (0.9, 0.999), 1e-7
THRESHOLD = 2 * (1 + BETAS[0]) / (1 - BETAS[0]) / LEARNING_RATE
K = 30


class Run:
    """Full-batch Adam on the square loss."""

    def __init__(self, size: int, seed: int) -> None:
        X, y = load_digits_batches(size, seed)[0][0]
        self.X = X - X.mean(0)
        self.Y = nn.functional.one_hot(y, 10).to(X.dtype)
        self.model, self.loss = make_network(16, seed), nn.MSELoss()
        self.params = dict(self.model.named_parameters())
        self.problem = self.model, self.loss, self.params, [(self.X, self.Y)]
        self.H = HessianLinearOperator(EmpiricalRisk(*self.problem))
        self.adam = torch.optim.Adam(
            self.model.parameters(), LEARNING_RATE, BETAS, EPSILON
        )
        self.losses = list[float]()

    def train(self, steps: int) -> None:
        """Take some steps."""
        for _ in range(steps):
            self.adam.zero_grad()
            loss = self.loss(self.model(self.X), self.Y)
            loss.backward()
            self.adam.step()
            self.losses.append(loss.item())

    def metric(self) -> DiagonalLinearOperator:
        """Return the matrix that Adam divides by, bias corrected."""
        unbiased = 1 - BETAS[1] ** len(self.losses)
        states = [self.adam.state[p] for p in self.model.parameters()]
        roots = [(state["exp_avg_sq"] / unbiased).sqrt() for state in states]
        return DiagonalLinearOperator([root + EPSILON for root in roots])

    def eigenvalues(self, k: int, v0: Array, P: DiagonalLinearOperator | None) -> Array:
        """Return the largest eigenvalues, those in the metric if there is one."""
        metric = {} if P is None else {"M": P, "Minv": P.inverse()}
        options = {"which": "LA", "v0": v0, "return_eigenvectors": False}
        return np.sort(eigsh(self.H, k, **options, **metric))[::-1]


def body(page: Page) -> None:
    """Train with Adam, follow both eigenvalues, compare with dense, draw."""
    steps, every, size = (700, 50, 100) if page.quick else (2500, 50, 200)
    run = Run(size, page.seed)
    v0 = np.random.default_rng(page.seed).standard_normal(run.H.shape[0])
    when = list(range(every, steps + 1, every))
    raw, seen = [], []
    for _ in when:
        run.train(every)
        raw.append(run.eigenvalues(1, v0, None)[0])
        seen.append(run.eigenvalues(1, v0, run.metric())[0])

    P = run.metric()
    dense = functorch_hessian(*run.problem).numpy()
    spectra = {
        "Hessian": (run.eigenvalues(K, v0, None), np.linalg.eigvalsh(dense)),
        "in Adam's metric": (
            run.eigenvalues(K, v0, P),
            eigh(dense, P.to_dense().numpy(), eigvals_only=True),
        ),
    }
    for name, (found, every_one) in spectra.items():
        truth = every_one[::-1][:K]
        worst = float(np.max(np.abs(found / truth - 1)))
        page.check(f"{name}, {K} largest eigenvalues vs dense", worst, 1e-8)

    late = np.array(seen[-len(seen) // 4 :])
    print(f"loss {run.losses[0]:.4f} -> {run.losses[-1]:.2e} in {steps} steps")
    print(f"38 / lr = {THRESHOLD:.0f}, and 2 / lr = {2 / LEARNING_RATE:.0f}")
    print(f"largest eigenvalue, Hessian: {raw[0]:.3f} -> {raw[-1]:.3f}")
    print(f"largest eigenvalue, in Adam's metric: {seen[0]:.0f} -> {seen[-1]:.0f}")
    page.check("late eigenvalue vs 38 / lr", abs(late.mean() / THRESHOLD - 1), 0.15)
    draw(page, when, np.array(raw), np.array(seen), spectra)


def draw(
    page: Page,
    when: list[int],
    raw: Array,
    seen: Array,
    spectra: dict[str, tuple[Array, Array]],
) -> None:
    """Draw both eigenvalues through training, and the leading ones at the end."""
    with page.figure("eigenvalues", 9.5, 3.5, ncols=2) as (left, right):
        left.plot(when, seen, label="in Adam's metric")
        left.axhline(THRESHOLD, color="black", linestyle="--", label=r"$38 / \eta$")
        left.set_ylabel(r"largest eigenvalue of $H x = \lambda P x$")
        right.plot(when, raw, color="C1", label="Hessian alone")
        right.set_ylabel(r"largest eigenvalue of $H x = \lambda x$")
        for ax in (left, right):
            ax.set_xlabel("steps of Adam")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.legend(loc="lower right")
    with page.figure("spectra", 5, 3.5) as ax:
        for (name, (found, _)), marker in zip(spectra.items(), "os", strict=True):
            ranks = np.arange(1, len(found) + 1)
            ax.plot(ranks, found / found[0], marker, markersize=4, label=name)
        ax.set(xlabel="rank", ylabel="eigenvalue over the largest one", ylim=(0, 1.05))
        ax.grid(alpha=0.3)
        ax.legend()


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
