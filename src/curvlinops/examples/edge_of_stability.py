r"""Sharpness at the edge of stability, and the spectrum on the way there.

Run it as ``python -m curvlinops.examples.edge_of_stability``.

*Question.* Gradient descent with step size :math:`\eta` on a quadratic diverges as soon
as the largest eigenvalue :math:`\lambda_1` of its Hessian exceeds :math:`2 / \eta`.
What does a network do, whose Hessian changes as it learns?

*Formula.* Along an eigenvector of a quadratic, a step multiplies the distance from the
minimum by :math:`1 - \eta \lambda`; it grows where :math:`\lambda > 2 / \eta`.

*Call.* An operator is always that of the present parameters, so one Hessian is followed
through training, each search warm-started with the eigenvector of the one before::

    def training():
        for step in range(steps):
            if step % every == 0:
                yield H
            ...  # a step of gradient descent

    table = track(training(), k=1, steps=range(0, steps, every))

*What is seen.* With a small step size the sharpness grows and stays below
:math:`2 / \eta`, the loss falls in every step. With one that is so large that the
growing sharpness reaches :math:`2 / \eta`, nothing diverges: the loss begins to
oscillate, the sharpness turns back and hovers just above. The densities show what
training has done: negative eigenvalues are gone, a few large ones have grown, and the
bulk is where it was, at zero.

Reference: J. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on
neural networks typically occurs at the edge of stability", arXiv:2103.00065.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    HessianLinearOperator,
    SpectralDensity,
    Track,
    lanczos_approximate_spectrum,
    top_eigenpairs,
    track,
)
from curvlinops.examples._digits import load_digits_batches, make_network
from curvlinops.examples._page import Array, Page, command
from curvlinops.examples.functorch import functorch_hessian
from curvlinops.plots import plot_spectral_density, plot_tracking

#: The small step size, and the one that is too large for the sharpness it leads to.
STABLE, EDGE = 1.0, 4.0


class Run:
    """Full-batch gradient descent on the square loss, seen through its Hessian."""

    def __init__(self, lr: float, size: int, seed: int) -> None:
        digits, _ = load_digits_batches(size, seed)
        X, y = digits[0]
        self.data = [(X - X.mean(0), nn.functional.one_hot(y, 10).to(X.dtype))]
        self.model, self.loss = make_network(16, seed), nn.MSELoss()
        self.params = dict(self.model.named_parameters())
        self.lr, self.losses = lr, list[float]()
        risk = EmpiricalRisk(self.model, self.loss, self.params, self.data)
        self.H = HessianLinearOperator(risk)

    def training(self, steps: int, every: int) -> Iterator[HessianLinearOperator]:
        """Train, and give the Hessian again and again."""
        (X, Y), params = self.data[0], list(self.params.values())
        for step in range(steps + 1):
            if step % every == 0:
                yield self.H
            loss = self.loss(self.model(X), Y)
            gradients = torch.autograd.grad(loss, params)
            self.losses.append(loss.item())
            with torch.no_grad():
                for p, gradient in zip(params, gradients, strict=True):
                    p.sub_(self.lr * gradient)

    def dense(self) -> Array:
        """Return the eigenvalues of the Hessian that is built row by row."""
        problem = self.model, self.loss, self.params, self.data
        return torch.linalg.eigvalsh(functorch_hessian(*problem)).numpy()


class Watch:
    """Densities, and dense eigenvalues to compare with, at some steps of a run."""

    def __init__(self, run: Run, when: list[int], seed: int) -> None:
        self.run, self.when, self.seed = run, when, seed
        self.densities: dict[int, SpectralDensity] = {}
        self.spectra: dict[int, Array] = {}

    def operators(self, steps: int, every: int) -> Iterator[HessianLinearOperator]:
        """Train, look, and hand on the Hessian."""
        for index, H in enumerate(self.run.training(steps, every)):
            step = index * every
            if step in self.when:
                self.densities[step] = lanczos_approximate_spectrum(
                    H, 60, num_repeats=4, rng=self.seed
                )
                self.spectra[step] = self.run.dense()
            yield H


def outside(density: SpectralDensity, eigenvalues: Array) -> float:
    """Return the share of the grid where the dense spectrum leaves the 95 % band."""
    low, high = (np.asarray(end) for end in density.band())
    truth = np.asarray(density.smoothed(eigenvalues))
    return float(np.mean((truth < low) | (truth > high)))


def report(page: Page, name: str, run: Run, table: Track) -> None:
    """Print what a run did, and check it."""
    sharpness, limit = table["eigenvalue_0"], 2 / run.lr
    late = sharpness[-(len(sharpness) // 3) :]
    rises = int(np.sum(np.diff(run.losses) > 0))
    print(f"{name}: lr = {run.lr:g}, 2 / lr = {limit:g}")
    print(f"  sharpness {sharpness[0]:.3f} at first, at most {sharpness.max():.3f},")
    print(f"  in the last third {late.mean():.3f} +- {late.std():.3f}")
    print(f"  loss {run.losses[0]:.4f} at first, {run.losses[-1]:.4f} at last,")
    print(f"  {rises} of {len(run.losses) - 1} steps upwards")
    if name == "stable":
        page.check("stable, largest sharpness / (2 / lr)", sharpness.max() / limit, 1)
        page.check("stable, steps upwards", rises, 0)
    else:
        distance = abs(late.mean() / limit - 1)
        page.check("edge, late sharpness vs 2 / lr", distance, 0.2)
        page.check("edge, one over the steps upwards", 1 / max(rises, 1), 0.1)
    truth = float(run.dense()[-1])
    again = float(top_eigenpairs(run.H, 1, rng=page.seed).values[0])
    page.check(f"{name}, sharpness at last vs dense", abs(again / truth - 1), 1e-10)


def body(page: Page) -> None:
    """Train twice, compare with dense eigenvalues and with 2 / lr, draw."""
    steps, every, size = (600, 25, 100) if page.quick else (2000, 20, 200)
    when = [0, steps]
    runs = {"stable": Run(STABLE, size, page.seed), "edge": Run(EDGE, size, page.seed)}
    spectra: dict[int, Array] = {}
    tables: dict[str, Track] = {}
    seen: dict[int, SpectralDensity] = {}
    for name, run in runs.items():
        watch = Watch(run, when if name == "edge" else [], page.seed)
        operators = watch.operators(steps, every)
        rows = range(0, steps + 1, every)
        tables[name] = track(operators, k=1, steps=rows, rng=page.seed)
        seen |= watch.densities
        spectra |= watch.spectra
        report(page, name, run, tables[name])
    for step in when:
        share = outside(seen[step], spectra[step])
        page.check(f"density at step {step}, share outside of its band", share, 0.25)
    draw(page, runs, tables, seen)


def draw(
    page: Page,
    runs: dict[str, Run],
    tables: dict[str, Track],
    seen: dict[int, SpectralDensity],
) -> None:
    """Draw sharpness and loss of both runs, and the densities."""
    with page.figure("sharpness", 9.5, 3.7, ncols=2) as axes:
        for ax, (name, run) in zip(axes, runs.items(), strict=True):
            losses = range(len(run.losses)), run.losses
            plot_tracking(tables[name], ax, lr=run.lr, loss=losses)
            ax.set_title(f"{name}: step size {run.lr:g}", pad=26)
    with page.figure("density", 5.5, 3.5) as ax:
        labelled = {f"step {step}": density for step, density in seen.items()}
        plot_spectral_density(labelled, ax)
        ax.set_title(f"spectrum of the Hessian, step size {EDGE:g}")


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
