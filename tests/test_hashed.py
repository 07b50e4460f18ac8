"""Random numbers of data: what they depend on, and how random they are."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import references
from cases import resplit
from curvlinops import (
    FisherMCLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
)
from curvlinops._hashed import Draws, mixed
from tolerances import assert_close

MASK = (1 << 64) - 1


def splitmix(state):
    """Return SplitMix64's next number, in Python's integers."""
    x = (state + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def unsigned(x):
    return [int(i) & MASK for i in x.flatten()]


# -- what they are ------------------------------------------------------------------


def test_mixing_is_that_of_splitmix():
    """The first three numbers of the reference implementation for seed 1234567."""
    step = 0x9E3779B97F4A7C15
    states = [(1234567 + k * step) & MASK for k in (1, 2, 3)]
    x = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert unsigned(mixed(x)) == expected
    assert splitmix(1234567) == expected[0]


@pytest.mark.parametrize("seed", [0, 5, 2**31 - 1, 2**63 - 1])
def test_every_number_is_a_hash_of_its_place(seed):
    step = 0x9E3779B97F4A7C15

    def expected(sample, row, entry):
        x = splitmix(seed)
        for k in (row, entry, sample):
            x = splitmix((x + k * step) & MASK)
        return x

    bits = Draws(seed, first=7).bits((2, 3, 2, 2))
    places = np.ndindex(2, 3, 4)
    assert unsigned(bits) == [expected(m, 7 + n, e) for m, n, e in places]


def test_rows_do_not_depend_on_others_samples_or_shape():
    whole = Draws(3).uniform((4, 10, 6))
    assert torch.equal(Draws(3, first=4).uniform((4, 3, 6)), whole[:, 4:7])
    assert torch.equal(Draws(3).uniform((2, 10, 6)), whole[:2])
    assert torch.equal(Draws(3).uniform((4, 10, 2, 3)).flatten(2), whole)
    assert not torch.equal(Draws(4).uniform((4, 10, 6)), whole)
    assert Draws(3).uniform((0, 10, 6)).shape == (0, 10, 6)
    assert Draws(3).normal((5,)).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_of_the_type_asked_for(dtype):
    u, z = Draws(1).uniform((9, 1000), dtype), Draws(1).normal((9, 1000), dtype)
    assert u.dtype == z.dtype == dtype
    assert bool(((u >= 0) & (u < 1)).all())
    assert bool(z.isfinite().all())
    assert len(u.unique()) > 8900


# -- how random they are --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape", [(1, 1, 40000), (1, 40000, 1), (40000, 1, 1), (20, 50, 40)]
)
def test_uniform_numbers_pass_tests_of_their_distribution(seed, shape):
    u = Draws(seed).uniform(shape).flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((u * 256).astype(int))).pvalue > 1e-3
    low = np.bincount((u * 2**32 % 256).astype(int), minlength=256)
    assert stats.chisquare(low).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_normal_numbers_pass_tests_of_their_distribution(seed):
    z = Draws(seed).normal((20, 50, 40)).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(z)) < 0.1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("axis", range(3))
def test_neighbours_along_every_axis_are_independent(seed, axis):
    """A chi-square test of pairs in 16 by 16 cells."""
    u = Draws(seed).uniform((34, 34, 34)).movedim(axis, 0)
    for lag in (1, 2):
        first, second = (u[:-lag] * 16).long(), (u[lag:] * 16).long()
        counts = torch.bincount((16 * first + second).flatten(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_seeds_that_follow_each_other_are_independent():
    u = torch.stack([Draws(seed).uniform((1, 500, 4)).flatten() for seed in range(50)])
    correlations = torch.corrcoef(u)[~torch.eye(50, dtype=bool)]
    assert abs(float(correlations.mean())) < 5e-3
    assert float(correlations.abs().max()) < 5 / 2000**0.5


def test_bits_change_by_half_when_one_bit_of_the_input_does():
    x = Draws(0).bits((1, 2000)).flatten()
    for bit in range(0, 63, 7):
        changed = mixed(x) ^ mixed(x ^ (1 << bit))
        ones = sum(bin(i).count("1") for i in unsigned(changed)) / (64 * len(x))
        assert abs(ones - 0.5) < 0.01


# -- matrices -------------------------------------------------------------------------


def problem(loss, sizes=(4, 1, 7)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    X, n = torch.rand(sum(sizes), 3).double(), sum(sizes)
    targets = {
        nn.CrossEntropyLoss: torch.randint(4, (n,)),
        nn.MSELoss: torch.rand(n, 4).double(),
        nn.BCEWithLogitsLoss: torch.rand(n, 4).double(),
        nn.HuberLoss: torch.rand(n, 4).double(),
    }
    data = list(zip(X.split(sizes), targets[loss].split(sizes), strict=True))
    return net, loss(), dict(net.named_parameters()), data


LOSSES = [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "operator", [FisherMCLinearOperator, GGNLinearOperator, KFACLinearOperator]
)
def test_a_seed_gives_one_matrix_for_every_split(loss, operator, samples):
    net, loss_func, params, data = problem(loss)

    def matrix(sizes, seed=1):
        batches = resplit(data, sizes)
        options = {"mc_samples": samples, "seed": seed}
        if operator is KFACLinearOperator:
            options["fisher_type"] = "mc"
        return operator(net, loss_func, params, batches, **options).to_dense()

    expected = matrix((12,))
    for sizes in ((4, 1, 7), (1,) * 12, (6, 6)):
        assert_close(matrix(sizes), expected, size=4096)
    assert float((matrix((12,), seed=2) - expected).norm() / expected.norm()) > 1e-3


@pytest.mark.parametrize("loss", LOSSES[:3])
def test_sampled_matrices_converge_to_the_exact_one(loss):
    args = problem(loss)
    exact = references.ggn(*args)
    errors = [
        float((FisherMCLinearOperator(*args, mc_samples=m).to_dense() - exact).norm())
        / float(exact.norm())
        for m in (100, 10000)
    ]
    assert errors[1] < 0.25 * errors[0]  # a tenth, in expectation
    assert errors[1] < 0.05


def test_samplers_of_users_are_called_row_by_row():
    net, _, params, data = problem(nn.MSELoss)
    rows = []

    def sampler(output, target, num_samples, generator):
        rows.append(len(output))
        shape = num_samples, *output.shape
        return torch.randn(shape, generator=generator, dtype=output.dtype)

    def loss(output, target):
        return (output - target).square().sum() / 2

    def matrix(sizes):
        options = {"reduction": "sum", "sampler": sampler, "mc_samples": 2}
        batches = resplit(data, sizes)
        return FisherMCLinearOperator(net, loss, params, batches, **options).to_dense()

    assert_close(matrix((4, 1, 7)), matrix((12,)), size=4096)
    assert set(rows) == {1}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same():
    for draws in (Draws(1), Draws(2, first=10)):
        bits = draws.bits((3, 40, 5), "cuda")
        assert torch.equal(bits.cpu(), draws.bits((3, 40, 5)))
        z = draws.normal((3, 40, 5), device="cuda")
        assert_close(z.cpu(), draws.normal((3, 40, 5)), size=16)
