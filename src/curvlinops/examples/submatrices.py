r"""Blocks, layers and single entries of a matrix that is never stored.

Run it as ``python -m curvlinops.examples.submatrices``.

*Question.* Methods that treat layers one by one, from layer-wise learning rates to
Kronecker factors, take the Hessian for block-diagonal. How much do they miss, and what
does a layer's spectrum say about the whole?

*Formula.* For a symmetric :math:`H` with blocks :math:`H_{ij}`, Cauchy's interlacing
bounds the spectrum of a block by that of the matrix, and the smallest eigenvalue that a
block may have without the rest being looked at is that of its Schur complement:

.. math::

    \lambda_{\min}(H) \le \lambda(H_{ii}) \le \lambda_{\max}(H) , \qquad
    S_i = H_{ii} - H_{ir} H_{rr}^{-1} H_{ri} , \qquad
    (S_i)^{-1} = (H^{-1})_{ii} .

*Call.* ``H.block("2.*")`` is a layer, ``H.block("0.*", "2.*")`` its coupling with
another, ``H.blocks()`` all of them; ``SubmatrixLinearOperator(H, rows, columns)`` takes
indices. These are operators again: ``eigsh(H.block("2.*"))`` works, and so does the
Schur complement, written as its formula.

*What is seen.* The map shows the Frobenius norms of all blocks: couplings hold a
fifth of the squared norm of the whole. Almost all of the sharpness is in the first
layer, and the whole exceeds it by a few per cent. If all other parameters are trained
again along with the last layer, its curvature shrinks: the eigenvalues of the Schur
complement lie below those of the block.

References: R. Horn, C. Johnson, "Matrix analysis", Cambridge (2012), theorem 4.3.28,
doi:10.1017/CBO9781139020411. Y. Zhang et al., "Why transformers need Adam: a Hessian
perspective", arXiv:2402.16788.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import numpy as np
from scipy.sparse.linalg import eigsh
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    SubmatrixLinearOperator,
    hutchinson_squared_fro,
)
from curvlinops.examples._digits import trained_digits
from curvlinops.examples._page import Array, Page, command, relative_error
from curvlinops.examples.functorch import functorch_ggn

DAMPING = 1e-2


def places(sizes: dict[str, int]) -> dict[str, slice]:
    """Return where every parameter's entries are in a vector."""
    ends = np.cumsum(list(sizes.values())).tolist()
    starts = [0, *ends[:-1]]
    return dict(zip(sizes, map(slice, starts, ends), strict=True))


def body(page: Page) -> None:
    """Take the matrix apart, compare every part with the dense one's, draw."""
    digits = trained_digits(4 if page.quick else 12, 60, page.seed, batch_size=200)
    data = digits.data[: 1 if page.quick else 3]
    problem = digits.model, nn.CrossEntropyLoss(), digits.params, data
    G = GGNLinearOperator(EmpiricalRisk(*problem))
    dense = functorch_ggn(*problem).numpy()
    where = places({name: p.numel() for name, p in digits.params.items()})
    names = list(where)
    random = np.random.default_rng(page.seed)

    # Blocks and couplings, by products and from the dense matrix
    norms, worst, errors = np.zeros((len(names), len(names))), 0.0, []
    for (i, row), (j, column) in product(enumerate(names), repeat=2):
        block = G.block(row, column)
        truth = dense[where[row], where[column]]
        v = random.standard_normal(block.shape[1])
        worst = max(worst, relative_error(block @ v, truth @ v))
        norms[i, j] = np.linalg.norm(truth)
        if i == j:
            few = min(100, block.shape[0])
            options: dict[str, Any] = {"rng": page.seed, "return_estimate": True}
            squared = hutchinson_squared_fro(block, few, **options)
            truth = norms[i, j] ** 2
            unit = float(squared.error) + 1e-9 * truth
            errors.append(abs(float(squared.value) - truth) / unit)
    page.check("blocks and couplings, products vs dense", worst, 1e-10)
    page.check("squared norms of blocks vs dense, in their errors", max(errors), 4.5)
    coupled = 1 - np.sum(np.diag(norms) ** 2) / np.sum(norms**2)
    print(f"share of the squared norm that lies between parameters: {coupled:.1%}")

    # Layers: a pattern takes weight and bias together
    layers = {"first layer": "0.*", "last layer": "2.*"}
    whole = eigsh(G, 5, which="LA", return_eigenvectors=False, v0=np.ones(len(dense)))
    tops = {"whole": np.sort(whole)[::-1]}
    for name, pattern in layers.items():
        block = G.block(pattern)
        start = np.ones(block.shape[0])
        found = eigsh(block, 5, which="LA", return_eigenvectors=False, v0=start)
        tops[name] = np.sort(found)[::-1]
    for name, values in tops.items():
        print(f"{name:<12}" + "".join(f"{value:9.4f}" for value in values))
    truth = np.linalg.eigvalsh(dense)[::-1][:5]
    error = relative_error(tops["whole"], truth)
    page.check("eigenvalues of the whole, vs dense", error, 1e-10)
    for name in layers:
        page.check(f"{name}, top over that of the whole", tops[name][0] / truth[0], 1)

    # The last layer, if all others follow
    matrices = schur_complement(page, G, dense, where)
    eigenvalues = {k: np.linalg.eigvalsh(A)[::-1] for k, A in matrices.items()}
    rise = np.max(eigenvalues["Schur complement"] - eigenvalues["block"])
    page.check("Schur complement above the block", rise, 1e-9)

    # Single entries
    rows, columns = np.split(random.permutation(len(dense))[:25], [20])
    picked = SubmatrixLinearOperator(G, rows.tolist(), columns.tolist())
    error = relative_error(picked.to_dense(), dense[np.ix_(rows, columns)])
    page.check("20 rows and 5 columns, vs dense", error, 1e-10)
    draw(page, norms, names, tops, eigenvalues)


def schur_complement(
    page: Page, G: GGNLinearOperator, dense: Array, where: dict[str, slice]
) -> dict[str, Array]:
    """Return that of the damped last layer, by operators, and the layer's block."""
    last, first = G.block("2.*"), G.block("0.*")
    coupling = G.block("2.*", "0.*")
    S = last.damped(DAMPING) - coupling @ first.damped(DAMPING).inverse() @ coupling.T
    found = S.to_dense().numpy()
    start = where["2.weight"].start
    inverse = np.linalg.inv(dense + DAMPING * np.eye(len(dense)))
    truth = np.linalg.inv(inverse[start:, start:])
    page.check("Schur complement, vs dense inverse", relative_error(found, truth), 1e-7)
    block = dense[start:, start:] + DAMPING * np.eye(len(truth))
    return {"block": block, "Schur complement": found}


def draw(
    page: Page,
    norms: Array,
    names: list[str],
    tops: dict[str, Array],
    eigenvalues: dict[str, Any],
) -> None:
    """Draw norms of blocks, eigenvalues of layers, and of the Schur complement."""
    with page.figure("blocks", 12, 3.6, ncols=3) as (left, middle, right):
        image = left.imshow(np.log10(norms))
        left.set_xticks(range(len(names)), names, rotation=30)
        left.set_yticks(range(len(names)), names)
        left.set_title(r"$\log_{10}$ of the blocks' Frobenius norms", fontsize=10)
        left.figure.colorbar(image, ax=left, shrink=0.85)
        for (name, values), marker in zip(tops.items(), "os^", strict=True):
            middle.plot(range(1, 6), values, f"{marker}-", label=name)
        middle.set(xlabel="rank", ylabel="eigenvalue", title="largest eigenvalues")
        for (name, values), style in zip(eigenvalues.items(), ("-", "--"), strict=True):
            right.semilogy(range(1, 1 + len(values)), values, style, label=name)
        right.set(xlabel="rank", title="last layer, damped")
        for ax in (middle, right):
            ax.grid(alpha=0.3)
            ax.legend()


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
