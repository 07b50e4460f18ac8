"""A ladder of exactness: what each approximation equals, and which is nearer."""

from copy import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_geometry import OTHERS, block_of
from torch import nn

import references
from cases import find, problems, resplit
from curvlinops import (
    EKFACLinearOperator,
    FisherMCLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from tolerances import assert_close

FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator
quiet = {"check_deterministic": False}


def problem_with(model, loss, X, y, sizes=None):
    data = [(X, y)] if sizes is None else resplit([(X, y)], sizes)
    return model.double(), loss, dict(model.named_parameters()), data


def blocks_only(matrix, A):
    """Zero a matrix outside of an operator's blocks."""
    mask = torch.zeros_like(matrix)
    slices = dict(zip(A._in_space.names, A._in_space.slices(), strict=True))
    for layout in A.representation.layouts:
        for first in layout.names:
            for second in layout.names:
                mask[slices[first], slices[second]] = 1
    return matrix * mask


def linear_net(*widths, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*pair, bias=bias) for pair in pairwise(widths)))


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("separate", [True, False])
def test_one_datum(cls, separate):
    model, X = linear_net(4, 3, 5), torch.randn(1, 4).double()
    model = nn.Sequential(model[0], nn.Tanh(), model[1])
    problem = problem_with(model, nn.CrossEntropyLoss(), X, torch.tensor([1]))
    A = cls(*problem, fisher_type="type-2", separate_weight_and_bias=separate)
    expected = blocks_only(references.ggn(*problem), A)
    assert_close(A.to_dense(), expected, size=10_000)


#: Losses with a diagonal Hessian, and targets for a prediction of five entries.
DIAGONAL = {
    "huber": (nn.HuberLoss(delta=0.4), torch.tensor([[9.0, 0, 0.1, 0, -9]])),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.4), torch.tensor([[9.0, 0, 0.1, 0, -9]])),
    "poisson": (nn.PoissonNLLLoss(), torch.tensor([[0, 1, 4, 2, 0]])),
    "rates": (
        partial(F.poisson_nll_loss, log_input=False),
        torch.tensor([[0, 1, 4, 2, 1]]),
    ),
    "probabilities": (nn.BCELoss(), torch.tensor([[0.2, 1, 0, 0.5, 1]])),
    "margin": (nn.SoftMarginLoss(), torch.tensor([[-1, 1, -1, 1, 1]])),
    "labels": (nn.MultiLabelSoftMarginLoss(), torch.tensor([[0, 1, 0, 1, 1]])),
}


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", DIAGONAL)
def test_one_datum_of_other_losses(name, cls, reduction):
    """Its blocks are exact, whatever is sent back."""
    loss, y = DIAGONAL[name]
    if isinstance(loss, nn.Module):
        loss = copy(loss)
        loss.reduction = reduction
    else:
        loss = partial(loss, reduction=reduction)
    model, X = linear_net(4, 3, 5), torch.randn(1, 4).double()
    top = [nn.Sigmoid()] if name in ("probabilities", "rates") else []
    model = nn.Sequential(model[0], nn.Tanh(), model[1], *top)
    problem = problem_with(model, loss, X, y.double())
    A = cls(*problem, fisher_type="type-2")
    expected = blocks_only(references.ggn(*problem), A)
    assert expected.any()
    assert_close(A.to_dense(), expected, size=10_000)
    E = cls(*problem, fisher_type="empirical")
    expected = blocks_only(references.empirical_fisher(*problem), E)
    assert_close(E.to_dense(), expected, size=10_000)
    samples = {"mc_samples": 3, "seed": 7}
    M = cls(*problem, fisher_type="mc", **samples)
    expected = blocks_only(FisherMCLinearOperator(*problem, **samples).to_dense(), M)
    assert expected.any()
    assert_close(M.to_dense(), expected, size=10_000)


@pytest.mark.parametrize("name", DIAGONAL)
def test_many_samples_of_other_losses(name):
    loss, y = DIAGONAL[name]
    model, X = linear_net(4, 5), torch.randn(1, 4).double()
    top = [nn.Sigmoid()] if name in ("probabilities", "rates") else []
    problem = problem_with(nn.Sequential(model, *top), loss, X, y.double())
    expected, n = references.ggn(*problem), 2000
    sampled = FisherMCLinearOperator(*problem, mc_samples=n).to_dense()
    # five deviations of the mean of products, all entries of which may be off
    assert (sampled - expected).norm() <= 5 * (5 / n) ** 0.5 * expected.norm()


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_deep_linear_net(cls, approx, reduction):
    X, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    loss = nn.MSELoss(reduction=reduction)
    problem = problem_with(linear_net(4, 3, 5, 2), loss, X, y, [1, 3, 2])
    options = {} if cls is KFOCLinearOperator else {"kfac_approx": approx}
    A = cls(*problem, fisher_type="type-2", separate_weight_and_bias=False, **options)
    expected = blocks_only(references.ggn(*problem), A)
    assert_close(A.to_dense(), expected, size=10_000)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("cls", FAMILY[:2])
def test_settings_agree_without_sharing(cls, approx):
    problem = find("mlp-tanh-ce").build()
    expand = cls(*problem, fisher_type="type-2").to_dense()
    other = cls(*problem, fisher_type="type-2", kfac_approx=approx).to_dense()
    assert_close(other, expand)


def test_reduce_is_exact_for_equal_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Flatten())
    X = torch.randn(1, 1, 3).double().expand(1, 5, 3)
    problem = problem_with(model, nn.MSELoss(), X, torch.randn(1, 20).double())
    A = KFACLinearOperator(*problem, fisher_type="type-2", kfac_approx="reduce")
    # one datum, but several outputs: gradients differ between them, inputs do not
    assert_close(A.to_dense(), references.ggn(*problem), size=1000)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("separate", [True, False])
def test_convolution_is_linear_on_patches(groups, separate):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 2, groups=groups).double()
    X, y = torch.randn(3, 2, 3, 3).double(), torch.randn(3, 4, 2, 2).double()
    options = {"fisher_type": "empirical", "separate_weight_and_bias": separate}
    A = KFACLinearOperator(*problem_with(conv, nn.MSELoss(), X, y), **options)
    patches = torch.nn.functional.unfold(X, 2).transpose(1, 2)
    rows = 2 // groups * 4
    for g in range(groups):
        part = slice(4 // groups * g, 4 // groups * (g + 1))
        lin = nn.Linear(rows, 4 // groups).double()
        lin.weight.data = conv.weight.data[part].flatten(1)
        lin.bias.data = conv.bias.data[part]
        its = patches[..., rows * g : rows * (g + 1)].reshape(12, rows)
        # every entry of a convolution's output is a term of its own here
        target = y[:, part].movedim(1, -1).reshape(12, -1)
        loss = nn.MSELoss(reduction="sum")
        L = KFACLinearOperator(*problem_with(lin, loss, its, target), **options)
        factor, other = A.factors()[""], L.factors()[""]
        a, b = (f if groups == 1 else f[g] for f in factor)
        assert_close(a, other.input)
        assert_close(b.diagonal() * y.numel(), other.output.diagonal(), size=100)


SHARED = problems(without=["half", "float32", "heavy", "checkpoint"])


@pytest.mark.parametrize(
    "problem", [p for p in SHARED if p.values[0].name not in OTHERS]
)
def test_nearness(problem):
    problem = problem.build()
    expected = references.ggn(*problem)
    distances, products = {}, {}
    for cls in FAMILY:
        A = cls(*problem, fisher_type="type-2", **quiet)
        expected_blocks = blocks_only(expected, A)
        products[cls] = A.to_dense()
        distances[cls] = (products[cls] - expected_blocks).norm()
    slack = 1e-9 * expected.norm()
    assert distances[EKFACLinearOperator] <= distances[KFACLinearOperator] + slack
    assert distances[KFOCLinearOperator] <= distances[KFACLinearOperator] + slack
    eigenvalues = torch.linalg.eigvalsh(products[KFOCLinearOperator])
    assert eigenvalues.min() >= -1e-12 * expected.abs().max() - 1e-300


@pytest.mark.parametrize("name", ["mlp-tanh-ce", "conv2d", "attention-block"])
def test_kfoc_is_nearest(name):
    """The distance is that of the leading singular triple of the rearranged block."""
    problem = find(name).build()
    A = KFOCLinearOperator(
        *problem, fisher_type="type-2", max_iter=200, tolerance=1e-14
    )
    dense, expected = A.to_dense(), references.ggn(*problem)
    for layout in A.representation.layouts:
        G, m, n = layout.size
        if n == 1 or G > 1:
            continue
        F = block_of(expected, A._in_space, layout.names)
        K = block_of(dense, A._in_space, layout.names)
        rearranged = F.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
        singular = torch.linalg.svdvals(rearranged)
        least = singular[1:].norm()
        assert (F - K).norm() <= least * (1 + 1e-6) + 1e-10 * F.norm()


@pytest.mark.parametrize("cls", FAMILY[:2])
@pytest.mark.parametrize("name", ["mlp-tanh-ce", "ce-tokens-options", "conv1d"])
def test_monte_carlo_in_expectation(cls, name):
    """KFAC's diagonal and the sums of EKFAC's eigenvalues, by a z-test."""
    problem = find(name).build()

    def measured(A):
        if cls is KFACLinearOperator:
            return A.diagonal()
        return torch.stack([A.block_of(name).trace() for name in A.risk.params])

    expected = measured(cls(*problem, fisher_type="type-2", **quiet))
    draws = torch.stack(
        [measured(cls(*problem, seed=seed, **quiet)) for seed in range(200)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - expected) / error.clamp(min=1e-12 * expected.abs().max())
    assert z.abs().max() < 5
    assert z.abs().mean() < 1.6


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize(
    "name", ["ce-weights", "ce-tokens-options", "bce-sum", "conv1d"]
)
def test_batch_split(cls, fisher_type, name):
    model, loss, params, data = find(name).build()
    whole = cls(model, loss, params, data, fisher_type=fisher_type).to_dense()
    for sizes in ([6], [2, 4]):
        parts = resplit(data, sizes)
        other = cls(model, loss, params, parts, fisher_type=fisher_type).to_dense()
        assert_close(other, whole, size=100_000)


def test_forward_only():
    problem = find("mlp-tanh-ce").build()
    A = KFACLinearOperator(*problem, fisher_type="forward-only")
    X = torch.cat([X for X, _ in problem[3]])
    factors = A.factors()["0"]
    assert_close(factors.input, X.T @ X / len(X))
    assert_close(factors.output, torch.ones(5))


def test_tied_embedding_and_head():
    """Counts and gradients exchange their roles; their scales cancel."""
    problem = find("causal-lm").build()
    A = KFACLinearOperator(*problem, fisher_type="type-2")
    block = A.block_of("embedding.weight")
    assert block.in_shapes == (torch.Size([1, 4, 7]),)
    assert torch.linalg.eigvalsh(block.to_dense()).min() > -1e-12
    model, loss, params, data = problem
    twice = KFACLinearOperator(
        model, loss, params, [*data, *data], fisher_type="type-2"
    )
    assert_close(
        twice.block_of("embedding.weight").to_dense(), block.to_dense(), size=100
    )
