r"""Quantisation and pruning of a network's layers, by the curvature of each layer.

Run it as ``python -m curvlinops.examples.quantisation``.

*Question.* A network's weights are to be stored with two bits each, or most of them are
to be zero. Which values should they get, so that the network still reads digits?

*Formula.* A layer :math:`z = W x` that gets weights :math:`W + \Delta` errs by

.. math::

    \mathbb{E} \|\Delta x\|^2 = \mathrm{tr}\, \Delta A \Delta^\top , \qquad
    A = \mathbb{E}[x x^\top]

so every row of :math:`W` has the curvature :math:`A`, the second moment of the layer's
inputs. If weight :math:`q` of a row is moved by :math:`\epsilon`, the others do best to
follow by :math:`\epsilon A^{-1} e_q / [A^{-1}]_{qq}`, at the cost :math:`\epsilon^2 /
[A^{-1}]_{qq}`. Its *saliency* is this cost of setting it to zero: the optimal brain
surgeon prunes the least salient weight, and repeats. GPTQ rounds one column after the
other to the grid; those that are not yet rounded follow. With the Cholesky factor
:math:`A^{-1} = U^\top U`, row :math:`q` of :math:`U` says by how much.

*Call.* ``KFACLinearOperator(..., fisher_type="forward-only").factors()`` has
:math:`A` as the input factor of every layer, from one pass forward over the data, none
backward.

*What is seen.* The factors are the second moments, computed by hand; what following
saves agrees with constrained minima. With two bits per weight, the network reads nearly
as well as before if columns follow, and worse if weights are rounded to the nearest
level. Four of five weights may be zero if the least salient ones are chosen and the
others follow; without the smallest ones, it misreads more than half of the digits.

References: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: accurate
post-training quantization for generative pre-trained transformers", arXiv:2210.17323.
B. Hassibi, D. Stork, "Second order derivatives for network pruning: optimal brain
surgeon", NIPS (1992). E. Frantar, D. Alistarh, "Optimal brain compression",
arXiv:2208.11580.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops import KFACLinearOperator
from curvlinops.examples._digits import Digits, accuracy, trained_digits
from curvlinops.examples._page import Array, Page, command, relative_error

#: Of the mean of the diagonal, added to it: some pixels are always zero.
DAMPING = 0.01
BITS = (2, 3, 4, 5)
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8)

#: From a layer's weights and curvature to other weights.
Change = Callable[[Array, Array], Array]


def curvatures(digits: Digits) -> dict[str, Array]:
    """Return the damped input factor of every layer, by its name."""
    K = KFACLinearOperator(
        *(digits.model, nn.CrossEntropyLoss(), digits.params, digits.data),
        fisher_type="forward-only",
    )
    found = {}
    for name, factors in K.factors().items():
        A = factors.input.numpy()
        found[name] = A + DAMPING * np.diag(A).mean() * np.eye(len(A))
    return found


def grid(W: Array, bits: int) -> Callable[[Array], Array]:
    """Return what rounds columns to as many levels between each row's ends."""
    low, high = W.min(1), W.max(1)
    width = (high - low) / (2**bits - 1)

    def rounded(columns: Array) -> Array:
        steps = np.round((columns.T - low) / width).clip(0, 2**bits - 1)
        return np.asarray((low + steps * width).T)

    return rounded


def nearest(bits: int) -> Change:
    """Round every weight to the nearest level."""
    return lambda W, A: grid(W, bits)(W)


def gptq(bits: int) -> Change:
    """Round column by column; those to come follow."""

    def change(W: Array, A: Array) -> Array:
        U = np.linalg.cholesky(np.linalg.inv(A)).T
        W, rounded = W.copy(), grid(W, bits)
        for q in range(W.shape[1]):
            error = W[:, q] - rounded(W[:, q : q + 1])[:, 0]
            W[:, q:] -= np.outer(error / U[q, q], U[q, q:])
        return W

    return change


def smallest(sparsity: float) -> Change:
    """Set the smallest weights of the layer to zero."""

    def change(W: Array, A: Array) -> Array:
        return np.where(abs(W) > np.quantile(abs(W), sparsity), W, 0.0)

    return change


def saliencies(w: Any, inverse: Any, kept: Any) -> Any:
    """Return what it costs to set each weight of a row to zero; infinite if it is."""
    cost = np.full(len(w), np.inf)
    cost[kept] = w[kept] ** 2 / np.diag(inverse)[kept]
    return cost


def surgeon(sparsity: float) -> Change:
    """Set the least salient weight of every row to zero, and again; others follow."""

    def prune(w: Array, A: Array) -> Array:
        w, inverse, kept = w.copy(), np.linalg.inv(A), np.full(len(w), True)
        for _ in range(round(sparsity * len(w))):
            q = int(saliencies(w, inverse, kept).argmin())
            column = inverse[:, q] / inverse[q, q]
            w -= w[q] * column
            inverse -= np.outer(column, inverse[q])
            kept[q] = False
            w[~kept] = 0.0
        return w

    return lambda W, A: np.stack([prune(w, A) for w in W])


def changed(digits: Digits, A: dict[str, Array], change: Change) -> tuple[float, float]:
    """Return accuracy on test digits, and the layers' errors, with other weights."""
    old = {name: w.detach().clone() for name, w in digits.params.items()}
    error = 0.0
    try:
        for name, curvature in A.items():
            weight = digits.params[f"{name}.weight"]
            W = weight.detach().numpy().copy()
            new = change(W, curvature)
            error += float(np.einsum("ij,jk,ik->", new - W, curvature, new - W))
            with torch.no_grad():
                weight.copy_(torch.from_numpy(new))
        return accuracy(digits.model, digits.test_data), error
    finally:
        with torch.no_grad():
            for name, w in digits.params.items():
                w.copy_(old[name])


def inputs(digits: Digits) -> dict[str, Tensor]:
    """Return the inputs of both layers, by evaluating the first by hand."""
    X = torch.cat([X for X, _ in digits.data])
    W, b = digits.params["0.weight"], digits.params["0.bias"]
    with torch.no_grad():
        return {"0": X, "2": torch.tanh(X @ W.T + b)}


def check_formulas(page: Page, digits: Digits, A: dict[str, Array]) -> None:
    """Compare factors with moments, and saliencies with constrained minima."""
    for name, X in inputs(digits).items():
        moment = (X.T @ X / len(X)).numpy()
        damped = moment + DAMPING * np.diag(moment).mean() * np.eye(len(moment))
        page.check(
            f"layer {name}: curvature, vs its inputs' second moment",
            relative_error(A[name], damped),
            1e-12,
        )
    curvature = A["2"]
    w = digits.params["2.weight"].detach().numpy()[0]
    inverse, everything = np.linalg.inv(curvature), np.full(len(w), True)
    found = saliencies(w, inverse, everything)
    truth = []
    for q in range(len(w)):  # minimise over all other weights
        others = np.arange(len(w)) != q
        step = np.zeros(len(w))
        step[q] = -w[q]
        right = -curvature[others, q] * step[q]
        step[others] = np.linalg.solve(curvature[np.ix_(others, others)], right)
        truth.append(step @ curvature @ step)
    page.check("saliencies, vs constrained minima", relative_error(found, truth), 1e-10)
    once = surgeon(1 / len(w))(w[None], curvature)[0]
    cost = float((once - w) @ curvature @ (once - w))
    page.check(
        "cost of the first cut, vs its saliency", abs(cost / found.min() - 1), 1e-9
    )


def body(page: Page) -> None:
    """Train, change the weights, compare, draw."""
    hidden, epochs = (16, 15) if page.quick else (48, 60)
    digits = trained_digits(hidden, epochs, page.seed)
    A = curvatures(digits)
    before = accuracy(digits.model, digits.test_data)
    print(f"Network 64-{hidden}-10, reads {before:.1%} of the test digits.\n")
    check_formulas(page, digits, A)
    curves: dict[str, list[tuple[float, float, float]]] = {}
    settings: list[tuple[str, Callable[[Any], Change], tuple[Any, ...]]] = [
        ("rounded to the nearest", nearest, BITS),
        ("GPTQ", gptq, BITS),
        ("smallest are zero", smallest, SPARSITIES),
        ("surgeon", surgeon, SPARSITIES),
    ]
    print(f"{'weights':<24}bits/sparsity  accuracy  error of the layers")
    for name, change, values in settings:
        curves[name] = []
        for value in values:
            found, error = changed(digits, A, change(value))
            curves[name].append((value, found, error))
            print(f"{name:<24}{value:>13}{found:>10.1%}{error:>21.2e}")
    for best, plain in (
        ("GPTQ", "rounded to the nearest"),
        ("surgeon", "smallest are zero"),
    ):
        errors = (np.array(curves[key])[:, 2] for key in (best, plain))
        ratio = next(errors) / next(errors)
        page.check(
            f"{best}: largest error over that without following", ratio.max(), 0.9
        )
    draw(page, curves, before)


def draw(
    page: Page, curves: dict[str, list[tuple[float, float, float]]], before: float
) -> None:
    """Draw accuracy by bits and by sparsity, and the errors of the layers."""
    styles = {"rounded to the nearest": "o--", "GPTQ": "o-"}
    styles |= {"smallest are zero": "s--", "surgeon": "s-"}
    with page.figure("quantisation", 9.5, 3.6, ncols=2) as axes:
        for ax, names in zip(axes, (BITS, SPARSITIES), strict=True):
            for name, style in styles.items():
                points = np.array(curves[name])
                if len(points) == len(names) and points[0, 0] == names[0]:
                    ax.plot(points[:, 0], points[:, 1], style, label=name)
            ax.axhline(before, color="black", linewidth=0.6)
            ax.set_ylabel("accuracy on test digits")
            ax.grid(alpha=0.3)
            ax.legend()
        axes[0].set(xlabel="bits per weight", xticks=BITS)
        axes[1].set_xlabel("share of weights that are zero")


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
