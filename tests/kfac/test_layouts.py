"""Whose the rows of layers and outputs are, however models sort, pack, or pick them."""

import warnings

import pytest
import torch
from layouts import CASES
from test_geometry import block_of, exact_blocks
from test_ladder import blocks_only
from torch import nn

from curvlinops import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from tolerances import assert_close

LOSS = nn.CrossEntropyLoss(reduction="sum")
NAMES = list(CASES)


def reference(case, params, batch, empirical):
    """Differentiate every row of the output on its own, and put the matrix together."""
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    X, y = batch
    f = case.model(leaves, X)
    wanted, rows = list(leaves.values()), []
    for entry in f.flatten():
        options = {"retain_graph": True, "materialize_grads": True}
        grads = torch.autograd.grad(entry, wanted, **options)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows).unflatten(0, f.shape)
    p = f.detach().softmax(-1)
    if empirical:
        G = torch.einsum("rc,rcd->rd", p - torch.eye(p.shape[1])[y], J)
        return G.T @ G
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("rcd,rce,ref->df", J, H, J)


def arrangements(case, data):
    """Return batches: together, in another order, of unequal sizes, and one by one."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    ways = [[data], [[data[i] for i in order]], [data[:-1], data[-1:]]]
    ways.append([[datum] for datum in data])
    return [
        [case.batch(part) for part in parts]
        for parts in ways
        if min(map(len, parts)) >= case.least
    ]


def options_of(case, **options):
    size = {} if case.size is None else {"batch_size_fn": case.size}
    return {**options, **size, "check_deterministic": False}


@pytest.fixture(params=NAMES)
def case(request):
    """A case, where a warning says that rows are sent back one by one."""
    case = CASES[request.param]
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", "It was not found which rows")
        yield case


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("bias", ["joint", "alone"])
def test_blocks_are_exact(case, fisher_type, bias):
    """Rows give every datum's gradient, in whatever order data are."""
    params, data = case.build()
    for batches in arrangements(case, data)[:3]:
        problem = case.model, LOSS, params, batches
        size = {} if case.size is None else {"batch_size_fn": case.size}
        risk, blocks = exact_blocks(problem, fisher_type, bias, **size)
        empirical = fisher_type == "empirical"
        expected = sum(reference(case, params, batch, empirical) for batch in batches)
        assert sum(map(len, blocks)) == len(params)
        for names, block in blocks.items():
            assert_close(block, block_of(expected, risk.space, names), size=1000)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_batches_make_no_difference(case, fisher_type, approx):
    """How data are put into batches, and in which order."""
    if approx == "reduce" and not (case.reduces and not case.warns):
        return
    params, data = case.build()
    options = options_of(case, fisher_type=fisher_type, kfac_approx=approx)
    first, *others = [
        KFACLinearOperator(case.model, LOSS, params, batches, **options).to_dense()
        for batches in arrangements(case, data)
    ]
    for other in others:
        assert_close(other, first, size=1000)


def test_corrections_are_those_of_the_matrix(case):
    """EKFAC has its trace; KFOC's products are as near in every arrangement."""
    params, data = case.build()
    options, distances = options_of(case, fisher_type="type-2"), []
    for batches in arrangements(case, data):
        arguments = case.model, LOSS, params, batches
        expected = sum(reference(case, params, b, empirical=False) for b in batches)
        E = EKFACLinearOperator(*arguments, **options)
        assert_close(E.trace(), expected.trace(), size=1000)
        K = KFOCLinearOperator(*arguments, **options, max_iter=40)
        distances.append((blocks_only(expected, K) - K.to_dense()).norm())
    largest = float(max(distances))
    assert largest - float(min(distances)) <= 1e-3 * largest + 1e-10
