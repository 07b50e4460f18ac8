"""Sensitivities that are kept: the same numbers, half of the matrix products."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import references
from cases import SAMPLES, Problem, _sampled_fisher, problems
from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)
from curvlinops._plan import loops_of
from curvlinops._policy import Policy
from tolerances import assert_close

#: Fold after two products, and have neither Jacobians nor matrices instead.
SOON = Policy(record_late=2, fold_late=0, dense_dim=0)
#: Fold whether it pays or not.
ALWAYS = replace(SOON, entry_cost=-1)


def is_folded(A) -> bool:
    """Whether all batches are multiplied by their sensitivities."""
    return set(A.status().batches) == {"sensitivities"}


def folded(A) -> list:
    """Return what was folded, batch by batch."""
    [product], _ = loops_of(A, 1)
    return [b._folded.get(product.key) for b in A.risk._recordings.values()]


def dtype_of(params) -> torch.dtype:
    return next(iter(params.values() if isinstance(params, dict) else params)).dtype


def network(*layers: nn.Module, n: int = 12, shape=(6,)) -> tuple:
    torch.manual_seed(0)
    net = nn.Sequential(*layers).double()
    data = [
        (torch.rand(m, *shape).double(), torch.randint(3, (m,))) for m in (n, n // 2)
    ]
    return net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data


def perceptron(width: int = 40, n: int = 12) -> tuple:
    torch.manual_seed(1)
    layers = [nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU()]
    return network(*layers, nn.Linear(width, 3), n=n)


@pytest.mark.parametrize(
    ("operator", "dense"),
    [
        (GGNLinearOperator, references.ggn),
        (EFLinearOperator, references.empirical_fisher),
        (
            lambda *built, **options: FisherMCLinearOperator(
                *built, **SAMPLES, **options
            ),
            lambda *built: _sampled_fisher(*built, **SAMPLES),
        ),
    ],
    ids=["ggn", "ef", "mc"],
)
@pytest.mark.parametrize("problem", problems(without=["heavy", "no-samples", "half"]))
@pytest.mark.filterwarnings("ignore:The model's output does not depend on")
def test_every_problem_keeps_its_numbers(problem: Problem, operator, dense):
    if "generic-loss" in problem.tags and dense not in (
        references.ggn,
        references.empirical_fisher,
    ):
        pytest.skip("no samples")
    built = problem.build()
    A = operator(*built, check_deterministic=False, policy=ALWAYS)
    reference, dtype = dense(*problem.build()), dtype_of(built[2])
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(A.shape[1], 3, generator=generator, dtype=torch.float64)
    expected = reference @ V
    for _ in range(6):
        result = A @ V[:, 0].to(dtype)
        assert_close(result, expected[:, 0], dtype, size=4 * len(V))
    assert_close(A @ V.to(dtype), expected, dtype, size=4 * len(V))


@pytest.mark.parametrize(
    "make",
    [
        perceptron,
        lambda: network(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4).eval(), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)),
            shape=(1, 6, 6),
        ),
        lambda: network(
            nn.Linear(6, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 3)
        ),
    ],
    ids=["perceptron", "convolutions", "layer-norm"],
)
def test_data_apart_are_folded(make):
    built = make()
    A, plain = (
        GGNLinearOperator(*built, policy=ALWAYS),
        GGNLinearOperator(*built, cache="off", policy=ALWAYS),
    )
    E = EFLinearOperator(*built, policy=ALWAYS)
    for _ in range(6):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        assert_close(A @ v, plain @ v, size=4 * len(v))
        E @ v
    assert is_folded(A)
    assert is_folded(E)


def test_a_folded_product_takes_two_matrix_products_per_layer():
    net, loss, params, data = perceptron(width=200, n=30)
    data = data[:1]
    A = EFLinearOperator(net, loss, params, data, policy=SOON)
    v = torch.randn(A.shape[1], dtype=torch.float64)

    n, weights = len(data[0][0]), sum(p.numel() for p in params.values() if p.ndim == 2)
    inner = weights - params["0.weight"].numel()
    # The counter's hooks are a change of the model, after which all is recorded anew.
    with FlopCounterMode(display=False) as counter:

        def count() -> int:
            before = counter.get_total_flops()
            A @ v
            return counter.get_total_flops() - before

        for _ in range(6):
            A @ v
        assert is_folded(A)
        assert count() == 2 * n * 2 * weights
        A.risk.plain += 1
        assert count() >= 2 * n * (2 * weights + 2 * inner)


def test_it_is_not_done_where_it_does_not_pay():
    for make in (
        lambda: perceptron(width=4),
        lambda: network(nn.Flatten(), nn.Linear(6, 3)),
    ):
        A = GGNLinearOperator(*make(), policy=SOON)
        for _ in range(6):
            A @ torch.ones(A.shape[1], dtype=torch.float64)
        assert A.status().batches == ("recording", "recording")


class Coupled(nn.Module):
    """Subtracts the mean over the batch, a little of it at least."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, h):
        return h - self.share * h.mean(0)


@pytest.mark.parametrize("share", [1.0, 1e-4])
def test_coupled_data_are_not_folded_where_that_matters(share: float):
    layers = nn.Linear(6, 20), nn.Tanh(), Coupled(share), nn.Linear(20, 20), nn.Tanh()
    built = network(*layers, nn.Linear(20, 3))
    A = GGNLinearOperator(*built, check_deterministic=False, policy=ALWAYS)
    plain = GGNLinearOperator(
        *built, check_deterministic=False, cache="off", policy=ALWAYS
    )
    for _ in range(6):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        assert_close(A @ v, plain @ v, size=4 * len(v))
    for batch, (pulled, _) in zip(A.risk._recordings.values(), folded(A), strict=True):
        n = len(batch.X)
        # what comes back to the last two layers and leaves them, but no further
        shapes = [tuple(t.shape) for t in pulled.held]
        assert shapes == [(n, 3, 3), (n, 3, 20), (n, 3, 20)]


def test_train_mode_normalisation_is_right():
    built = network(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3))
    A = GGNLinearOperator(*built, check_deterministic=False, policy=ALWAYS)
    plain = GGNLinearOperator(
        *built, check_deterministic=False, cache="off", policy=ALWAYS
    )
    for _ in range(6):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        assert_close(A @ v, plain @ v, size=4 * len(v))


def test_changes_are_seen():
    net, *rest = perceptron()
    A, plain = (
        GGNLinearOperator(net, *rest, cache=c, policy=ALWAYS) for c in ("auto", "off")
    )
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(3):
        for _ in range(6):
            assert_close(A @ v, plain @ v, size=4 * len(v))
        assert is_folded(A)
        net[0].weight.data.mul_(1.5)


def test_blocks_of_columns_are_folded():
    A, plain = (
        GGNLinearOperator(*perceptron(), cache=c, policy=ALWAYS)
        for c in ("auto", "off")
    )
    for K in (4, 4, 2, 5, 1):
        V = torch.randn(A.shape[1], K, dtype=torch.float64)
        assert_close(A @ V, plain @ V, size=4 * len(V))
    assert is_folded(A)


def test_few_samples_need_few_sensitivities():
    A = FisherMCLinearOperator(*perceptron(), mc_samples=2, policy=ALWAYS)
    plain = FisherMCLinearOperator(
        *perceptron(), mc_samples=2, cache="off", policy=ALWAYS
    )
    for _ in range(6):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        assert_close(A @ v, plain @ v, size=4 * len(v))
    assert {p.u.shape[1] for p, _ in folded(A)} == {2}


def test_sensitivities_count_and_must_fit():
    A = GGNLinearOperator(*perceptron(), policy=ALWAYS)
    v = torch.ones(A.shape[1], dtype=torch.float64)
    for _ in range(8):
        A @ v
    for batch, (pulled, _) in zip(A.risk._recordings.values(), folded(A), strict=True):
        assert batch.nbytes >= sum(t.nbytes for t in pulled.held) > 0
    needed = A.status().held
    tight = GGNLinearOperator(*perceptron(), cache=needed // 2, policy=ALWAYS)
    for _ in range(8):
        assert_close(tight @ v, A @ v, size=4 * len(v))
    assert not is_folded(tight)
    bounded = GGNLinearOperator(*perceptron(), max_memory=1 << 30, policy=ALWAYS)
    for _ in range(8):
        bounded @ v
    assert "sensitivities" not in bounded.status().batches


def test_a_fixed_route_is_not_folded():
    A = GGNLinearOperator(*perceptron(), policy=ALWAYS)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    A.fix_route("plain")
    first = [A @ v for _ in range(2)][1]
    A.free_route()
    for _ in range(6):
        A @ v
    A.fix_route("plain")
    assert torch.equal(A @ v, first)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad]
)
def test_folding_needs_no_mode_and_leaves_other_matrices_alone(mode):
    args = perceptron()
    risk = EmpiricalRisk(*args, policy=ALWAYS)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    plain = HessianLinearOperator(*args, cache="off", policy=ALWAYS)
    v = torch.randn(G.shape[1], dtype=torch.float64)
    expected = plain @ v
    for _ in range(12):
        with mode():
            G @ v
        assert_close(H @ v, expected, size=16 * len(v))
    assert is_folded(G)


def test_folding_leaves_the_random_state_alone():
    class Noisy(nn.Module):
        def forward(self, h):
            return h + 0 * torch.rand(h.shape)

    args = network(nn.Linear(6, 20), nn.Tanh(), Noisy(), nn.Linear(20, 3))
    for operator in (GGNLinearOperator, EFLinearOperator):
        A = operator(*args, policy=ALWAYS)
        v = torch.ones(A.shape[1], dtype=torch.float64)
        for _ in range(12):
            before = torch.get_rng_state()
            A @ v
            assert torch.equal(torch.get_rng_state(), before)


def test_a_tight_budget_keeps_what_it_kept():
    def kept(A) -> list[int]:
        v = torch.ones(A.shape[1], dtype=torch.float64)
        counts = []
        for _ in range(12):
            A @ v
            counts.append(sum(b != "recomputed" for b in A.status().batches))
        return counts

    free = EFLinearOperator(*perceptron(n=200), policy=ALWAYS)
    kept(free)
    most = free.status().held
    never = replace(ALWAYS, max_rank=0)
    unfolded = EFLinearOperator(*perceptron(n=200), policy=never)
    kept(unfolded)
    least = unfolded.status().held
    for budget in torch.linspace(1.6 * least, 1.6 * max(most, least), 8).tolist():
        counts = kept(
            EFLinearOperator(*perceptron(n=200), cache=int(budget), policy=ALWAYS)
        )
        # no batch is given up for sensitivities, which come with the third product
        assert counts[1:] == sorted(counts[1:])


def test_waiting_for_it_costs_no_evaluations():
    later = replace(SOON, fold_late=3)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 15)).double()
    shaped = nn.Sequential(net, nn.Unflatten(1, (3, 5)))
    X, y = torch.rand(8, 6).double(), torch.randint(3, (8, 5))
    calls: list[int] = []
    shaped.register_forward_pre_hook(lambda *_: calls.append(1))
    A = EFLinearOperator(
        shaped, nn.CrossEntropyLoss(), list(net.parameters()), [(X, y)], policy=later
    )
    v = torch.ones(A.shape[1], dtype=torch.float64)
    late = []
    for _ in range(30):
        before = len(calls)
        A @ v
        late.append(len(calls) - before)
    assert sum(late[4:]) <= 4  # when it is looked at, and not in between


def test_threads_may_fold_together():
    A, plain = (
        GGNLinearOperator(*perceptron(), cache=c, policy=ALWAYS)
        for c in ("auto", "off")
    )
    v = torch.randn(A.shape[1], dtype=torch.float64)
    expected = plain @ v
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(12):
                assert_close(A @ v, expected, size=4 * len(v))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
