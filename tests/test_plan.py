"""Predicted memory against tracked memory, and products within a bound."""

import copy
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops._plan import SLICES, Data, Probe, loops_of
from curvlinops._policy import Policy
from curvlinops._tracker import Tracker
from references import ggn, hessian
from tolerances import assert_close

#: Products after which routes have settled.
SETTLED = 14


class Attention(nn.Module):
    """One transformer layer on tokens, with logits of shape ``[N, C, T]``."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x))).movedim(-1, 1)


def problem(name, sizes):
    """Return a model, its loss, its parameters, and batches of given sizes."""
    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 70))
        model = nn.Sequential(*model, nn.Tanh(), nn.Linear(70, 5))
        loss = nn.MSELoss()
        data = [(torch.randn(n, 40), torch.randn(n, 5)) for n in sizes]
    elif name == "cnn":
        model = nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3, stride=2), nn.Sigmoid(), nn.Flatten()),
            nn.Linear(12 * 16, 5),
        )
        weight = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0])
        loss = nn.CrossEntropyLoss(weight=weight, ignore_index=2)
        data = [(torch.randn(n, 2, 10, 10), torch.randint(5, (n,))) for n in sizes]
    else:
        model, loss = Attention(), nn.CrossEntropyLoss(ignore_index=0)
        shapes = [(n, 12) for n in sizes]
        data = [(torch.randint(11, s), torch.randint(11, s)) for s in shapes]
    model, loss = model.double().eval(), loss.double()
    data = [(X.double() if X.is_floating_point() else X, y) for X, y in data]
    data = [(X, y.double() if y.is_floating_point() else y) for X, y in data]
    return model, loss, dict(model.named_parameters()), data


def tracked(A, X, number=SETTLED):
    """Return the most bytes alive in products, operand and result included."""
    with Tracker() as tracker:
        for _ in range(number):
            A @ X
    return tracker.peak + X.numel() * X.element_size()


def cure(error):
    """Return the bound that a refusal asks for."""
    message = str(getattr(error, "value", error))
    return int(re.search(r"Pass `max_memory=(\d+)`", message)[1])


def enough(run):
    """Return the bound that refusals ask for: some of the outputs, then of products."""
    limit, refusals = 1, 0
    while True:
        try:
            run(limit)
        except MemoryError as error:
            refusals += 1
            assert limit < cure(error)
            assert refusals < 3
            limit = cure(error)
        else:
            return limit


def held(A):
    return A.status().held if A.forms else 0


MATRICES = {
    "ggn": GGNLinearOperator,
    "hessian": HessianLinearOperator,
    "ef": EFLinearOperator,
    "mc": lambda *args, **kwargs: FisherMCLinearOperator(*args, mc_samples=2, **kwargs),
    "diagonal": GGNDiagonalLinearOperator,
    "gram": GramLinearOperator,
    "jacobian": lambda model, _, *args, **kwargs: JacobianLinearOperator(
        model, *args, **kwargs
    ),
    "transposed": lambda model, _, *args, **kwargs: TransposedJacobianLinearOperator(
        model, *args, **kwargs
    ),
}


# -- predictions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "columns"),
    [("ggn", 1), ("hessian", 1), ("ef", 1), ("mc", 1), ("ggn", 6)],
)
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_predicted_bytes_are_those_of_products(name, matrix, columns):
    never_dense = Policy(dense_dim=0)  # a test of its own
    A = MATRICES[matrix](*problem(name, [48, 48, 20]), policy=never_dense)
    plan, X = A.plan(columns), torch.randn(A.shape[1], columns).double()
    peak = tracked(A, X, 60)  # sensitivities come late
    assert plan.held == pytest.approx(held(A), rel=1e-3)
    assert 0.85 * peak <= plan.peak <= 1.15 * peak
    recordings = A.risk._recordings
    assert [b.held for b in plan.batches] == pytest.approx(
        [recordings[i].nbytes for i in range(3)], rel=1e-3
    )
    assert tuple(b.form for b in plan.batches) == A.status().batches
    assert {b.form for b in plan.batches} <= {"recording", "sensitivities"}
    assert all(b.settled(key) for b in recordings.values() for key in b._routes)


@pytest.mark.parametrize("matrix", ["gram", "jacobian", "transposed", "diagonal"])
def test_predicted_bytes_of_other_matrices(matrix):
    A = MATRICES[matrix](*problem("mlp", [32, 20]))
    plan, X = A.plan(), torch.randn(A.shape[1], 1).double()
    peak = tracked(A, X)
    assert 0.85 * peak <= plan.peak <= 1.15 * peak


def test_batches_that_do_not_fit_into_the_cache_are_recomputed():
    arguments = problem("cnn", [40, 40, 40])
    whole = HessianLinearOperator(*arguments).plan()
    budget = whole.held * 3 // 4
    A = HessianLinearOperator(*arguments, cache=budget)
    plan, X = A.plan(), torch.randn(A.shape[1], 1).double()
    peak = tracked(A, X)
    kept = [form != "recomputed" for form in A.status().batches]
    assert [b.kept == 1 for b in plan.batches] == kept
    assert [b.route == "recomputed" for b in plan.batches] == [not k for k in kept]
    assert 0 < plan.held == held(A) <= budget == plan.budget
    assert 0.97 * peak <= plan.peak <= 1.3 * peak
    off = HessianLinearOperator(*arguments, cache="off")
    plan = off.plan()
    assert plan.held == held(off) == 0
    assert plan.peak == pytest.approx(tracked(off, X), rel=0.1)


def test_small_matrices_are_predicted():
    arguments = problem("mlp", [30])
    arguments[2].pop("0.weight")
    model, loss, _, data = arguments
    params = {n: p for n, p in model.named_parameters() if n.startswith("4")}
    A = HessianLinearOperator(model, loss, params, data)
    plan = A.plan()
    x = torch.randn(A.shape[1], 1).double()
    products = 0
    while not A.status().matrix:
        A @ x
        products += 1
    assert products == plan.dense_after + 1
    assert str(plan.dense_after) in str(plan)
    assert plan.held == pytest.approx(held(A), rel=0.01)
    G = GGNLinearOperator(model, loss, params, [(data[0][0][:2], data[0][1][:2])])
    plan = G.plan()
    tracked(G, x, plan.dense_after + 1)
    assert G.risk._dense.jacobians
    assert G.status().matrix
    assert plan.batches[0].form == "Jacobian"
    assert plan.held == pytest.approx(held(G), rel=0.01)


@pytest.mark.parametrize("sizes", [[2], [30, 20]])
def test_factors_of_small_matrices_are_predicted(sizes):
    model, loss, _, data = problem("mlp", sizes)
    params = {n: p for n, p in model.named_parameters() if n.startswith("4")}
    G = GGNLinearOperator(model, loss, params, data)
    plan = G.plan()
    x = torch.randn(G.shape[1], 1).double()
    peak = tracked(G, x, plan.dense_after + 1)
    (factors,) = G.risk._dense.matrices.values()
    assert len(factors) == (2 if len(sizes) == 1 else 1)
    assert plan.held == pytest.approx(held(G), rel=0.01)
    assert peak <= plan.peak <= 2 * peak


def test_batches_that_are_joined_are_predicted():
    model, loss, _, data = problem("mlp", [6, 5, 4, 6])
    params = {n: p for n, p in model.named_parameters() if n.startswith("4")}
    A = HessianLinearOperator(model, loss, params, data)
    rng, recordings = torch.get_rng_state(), dict(A.risk._recordings)
    plan = A.plan()
    assert torch.equal(rng, torch.get_rng_state())
    assert recordings == A.risk._recordings
    assert not A.risk._joined
    assert "multiplied as one" in str(plan)
    x = torch.randn(A.shape[1], 1).double()
    tracked(A, x)
    [product], _ = loops_of(A, 1)
    assert A.risk._joined_batch(product.key) is not None
    assert plan.joined + sum(b.held for b in plan.batches) == held(A)
    tracked(A, x, plan.dense_after - SETTLED)
    assert not A.status().matrix
    before = held(A)
    peak = before + tracked(A, x, 1)
    assert peak <= plan.peak <= 1.6 * peak
    assert A.status().matrix
    assert plan.held == held(A)
    for options in ({"cache": "off"}, {"cache": 1 << 30}, {"max_memory": 1 << 30}):
        other = HessianLinearOperator(model, loss, params, data, **options).plan()
        assert other.joined == 0


def test_graphs_that_nobody_keeps_are_freed_on_the_way():
    peaks = []
    for frees in (True, False):
        A = HessianLinearOperator(*problem("mlp", [300]), cache="off")
        assert A.risk.model.may_free
        A.risk.model.may_free = frees
        x = torch.randn(A.shape[1], 1).double()
        peaks.append(tracked(A, x, 2))
    assert peaks[0] < 0.9 * peaks[1]


def test_plan_as_table():
    A = GGNLinearOperator(*problem("mlp", [12, 8]), cache="off")
    assert re.fullmatch(
        r"batch +data +kept +peak +route\n"
        r" +0    12   0 B +[\d.e+]+ kB  recomputed\n"
        r" +1     8   0 B +[\d.e+]+ kB  recomputed\n"
        r" +all +0 B +[\d.e+]+ kB\n"
        r'Nothing is kept, since `cache` is "off"\.',
        str(A.plan()),
    )


def test_plan_changes_nothing():
    arguments = problem("cnn", [24, 10])
    model = arguments[0]
    state = copy.deepcopy(model.state_dict())
    loader = DataLoader(list(zip(*arguments[3][0], strict=True)), batch_size=8)
    A = HessianLinearOperator(*arguments[:3], loader)
    x = torch.randn(A.shape[1]).double()
    before = A @ x
    rng, recordings = torch.get_rng_state(), dict(A.risk._recordings)
    A.plan(3)
    assert torch.equal(rng, torch.get_rng_state())
    assert recordings == A.risk._recordings
    assert torch.equal(A @ x, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_plan_runs_the_model_on_few_data_only():
    sizes = []

    class Noting(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    model = Noting(30, 20)
    data = [(torch.randn(n, 30), torch.randn(n, 20)) for n in (50, 40)]
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, nn.MSELoss(), params, data, check_deterministic=False)
    A.plan()
    assert set(sizes) <= set(SLICES[0])


def test_plan_without_slices_measures_a_whole_batch():
    model, loss, params, data = problem("mlp", [24, 12])

    def whole_batches_only(params, X):
        if len(X) < 12:
            raise RuntimeError
        return torch.func.functional_call(model, params, (X,))

    A = GGNLinearOperator(whole_batches_only, loss, params, data)
    plan, x = A.plan(), torch.randn(A.shape[1], 1).double()
    peak = tracked(A, x)
    assert 0.9 * peak <= plan.peak <= 1.5 * peak


def test_plan_refuses_what_it_cannot_tell():
    arguments = problem("mlp", [8])
    K = KFACLinearOperator(*arguments)
    for operator in (K, K.inverse(0.1), K.inverse(0.1) ** -0.5):
        with pytest.raises(TypeError, match="run over the data"):
            operator.plan()
    with pytest.raises(ValueError, match="columns"):
        GGNLinearOperator(*arguments).plan(0)


# -- bounds --------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", list(MATRICES))
@pytest.mark.parametrize(
    ("name", "columns"), [("mlp", 5), ("cnn", 1), ("attention", 1)]
)
def test_bounded_products_are_the_same(name, matrix, columns):
    if (name, matrix) == ("attention", "diagonal"):
        pytest.skip("slow, and no other way through the code than for the others")
    sizes = [3, 2] if matrix == "diagonal" else [9, 5]
    make, arguments = MATRICES[matrix], problem(name, sizes)
    A = make(*arguments)
    X = torch.randn(A.shape[1], columns).double()
    expected = A @ X

    def run(limit):
        B = make(*arguments, check_deterministic=False, max_memory=limit)
        B @ X
        B.plan(columns)

    needed = enough(run)
    peak = A.plan(columns).peak
    for limit in {needed, max(needed, (2 * needed + peak) // 3)}:
        B = make(*arguments, check_deterministic=False, max_memory=limit)
        plan = B.plan(columns)
        assert plan.peak <= limit == plan.max_memory
        assert_close(B @ X, expected, size=1e4)
        assert tracked(B, X, 3) <= limit
        assert B.shape == A.shape
        assert [*B.in_shapes, *B.out_shapes] == [*A.in_shapes, *A.out_shapes]


@pytest.mark.parametrize("matrix", ["ggn", "hessian", "ef"])
@pytest.mark.parametrize("columns", [1, 6, 20])
def test_what_fits_is_found_within_the_bound(matrix, columns):
    model, loss, params, _ = problem("mlp", [1])
    data = [(torch.randn(8, 40).double(), torch.randn(8, 5).double())]
    make = partial(MATRICES[matrix], model, loss, params, data)
    X = torch.randn(make().shape[1], columns).double()
    with pytest.raises(MemoryError) as caught:
        make(check_deterministic=False, max_memory=X.nbytes) @ X
    needed = cure(caught)
    for limit in (needed, needed * 5 // 4, 2 * needed):
        with Tracker() as tracker:
            make(check_deterministic=False, max_memory=limit) @ X
        assert tracker.peak + X.nbytes <= limit


@pytest.mark.parametrize(
    ("size", "cause"), [(2, "even with one datum"), (12, "compared with whole batches")]
)
def test_refusal_says_what_would_do(size, cause):
    arguments = problem("cnn", [size])
    A = GGNLinearOperator(*arguments, check_deterministic=False, max_memory=10_000)
    x = torch.randn(A.shape[1]).double()
    for refused in (lambda: A @ x, A.plan):
        with pytest.raises(MemoryError, match="max_memory") as caught:
            refused()
    needed = cure(caught)
    B = GGNLinearOperator(*arguments, check_deterministic=False, max_memory=needed)
    assert_close(B @ x, GGNLinearOperator(*arguments) @ x, size=1e4)
    assert B.plan().batches[0].parts > 1
    C = GGNLinearOperator(
        *arguments, check_deterministic=False, max_memory=needed * 9 // 10
    )
    with pytest.raises(MemoryError, match=cause):
        C @ x
    with pytest.raises(MemoryError, match="gradient and loss with 1 column"):
        GGNLinearOperator(*arguments, max_memory=10_000)


def test_gradient_and_check_are_bounded():
    arguments = problem("attention", [24, 11])
    gradient, value = EmpiricalRisk(*arguments).gradient_and_loss()
    with pytest.raises(MemoryError) as caught:
        EmpiricalRisk(*arguments, max_memory=1)
    limit = 2 * cure(caught)
    risk = EmpiricalRisk(*arguments, max_memory=limit)
    with Tracker() as tracker:
        bounded, bounded_value = risk.gradient_and_loss()
    assert risk._num_batches > 2
    assert tracker.peak <= limit
    assert_close(bounded_value, value, size=1e4)
    for a, b in zip(bounded, gradient, strict=True):
        assert_close(a, b, size=1e4)


@pytest.mark.parametrize("matrix", ["ggn", "gram"])
@pytest.mark.parametrize("size", [1, 6])
def test_what_fits_is_found_near_the_bound_where_activations_are_large(matrix, size):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)),
        *(nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    ).double()
    params = dict(model.named_parameters())
    data = [(torch.rand(size, 1, 24, 24).double(), torch.randint(3, (size,)))]
    make = partial(MATRICES[matrix], model, nn.CrossEntropyLoss(), params, data)
    x = torch.randn(make().shape[1]).double()
    needed = enough(lambda limit: make(check_deterministic=False, max_memory=limit) @ x)
    for limit in (needed, needed * 5 // 4, 2 * needed):
        with Tracker() as tracker:
            A = make(check_deterministic=False, max_memory=limit)
            product = A @ x
        # Three data are copied, and what is noticed late is an activation of these.
        assert tracker.peak + x.nbytes <= limit + 3 * (1 + 4) * 24 * 24 * 8
        assert A.plan().peak <= limit
        assert_close(product, make() @ x, size=1e4)


class Bag(nn.Module):
    """The mean of the tokens' vectors: most of a product is as long as the text."""

    def __init__(self, tokens):
        super().__init__()
        self.embedding, self.head = nn.Embedding(tokens, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize(("tokens", "length", "columns"), [(30, 100, 6), (300, 8, 1)])
def test_embeddings_of_tokens_are_bounded(tokens, length, columns):
    torch.manual_seed(0)
    model, loss = Bag(tokens).double(), nn.CrossEntropyLoss()
    data = [
        (torch.randint(tokens, (n, length)), torch.randint(3, (n,))) for n in (20, 7)
    ]
    make = partial(GGNLinearOperator, model, loss, dict(model.named_parameters()), data)
    X = torch.randn(make().shape[1], columns).double()
    needed = enough(lambda limit: make(check_deterministic=False, max_memory=limit) @ X)
    expected = make() @ X
    for limit in (needed, needed * 9 // 8):
        with Tracker() as tracker:
            A = make(check_deterministic=False, max_memory=limit)
            products = [A @ X for _ in range(3)]
        assert tracker.peak + X.nbytes <= limit
        for product in products:
            assert_close(product, expected, size=1e4)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_the_check_is_within_the_bound(name):
    arguments = problem(name, [24, 11])
    needed = enough(lambda limit: EmpiricalRisk(*arguments, max_memory=limit))
    for limit in (needed, 2 * needed):
        with Tracker() as tracker:
            EmpiricalRisk(*arguments, max_memory=limit)
        assert 0 < tracker.peak <= limit


def test_plans_before_anything_is_evaluated_on_whole_batches():
    """Without the check: neither the risk, nor the operator, nor the plan does it."""
    model, loss, params, data = problem("cnn", [200])
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    make = partial(EmpiricalRisk, model, loss, params, data, check_deterministic=False)
    A = GGNLinearOperator(make())
    assert not seen
    peak = A.plan().peak
    assert seen and max(seen) <= 3
    A.plan(columns=4)
    bounded = GGNLinearOperator(make(max_memory=peak))
    assert bounded.plan().peak <= peak
    assert max(seen) <= 3


def test_loops_in_turn_fit_together():
    arguments = problem("mlp", [9, 5])
    plain = GramLinearOperator(*arguments)
    X = torch.randn(plain.shape[1], 5).double()
    limit = plain.plan(5).peak
    with Tracker() as tracker:
        A = GramLinearOperator(*arguments, check_deterministic=False, max_memory=limit)
        for _ in range(3):
            product = A @ X
    assert tracker.peak + X.nbytes <= limit
    assert A.plan(5).peak <= limit
    assert_close(product, plain @ X, size=1e4)


def test_trying_out_counts_what_other_products_keep():
    arguments = problem("mlp", [9, 5])
    peak = HessianLinearOperator(*arguments).plan(5).peak
    with Tracker() as tracker:
        risk = EmpiricalRisk(*arguments, check_deterministic=False, max_memory=peak)
        for operator in (GGNLinearOperator, HessianLinearOperator):
            for columns in (1, 5):
                A = operator(risk)
                X = torch.randn(A.shape[1], columns).double()
                for _ in range(3):
                    A @ X
    assert tracker.peak <= peak


def test_small_matrices_of_other_products_make_room():
    torch.manual_seed(0)
    model, loss = nn.Linear(8, 5).double(), nn.MSELoss()
    data = [(torch.randn(6, 8).double(), torch.randn(6, 5).double())]
    params = dict(model.named_parameters())
    peak = HessianLinearOperator(model, loss, params, data).plan(45).peak
    risk = EmpiricalRisk(model, loss, params, data, max_memory=peak)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    x = torch.randn(45).double()
    for _ in range(300):
        G @ x
    assert G.status().matrix
    with Tracker() as tracker:
        dense = H @ torch.eye(45).double()
    assert tracker.peak + 2 * dense.nbytes <= peak
    assert not G.status().matrix and not H.status().matrix


def test_batches_that_other_tensors_tie_to_their_size_are_not_cut():
    class Outputs(nn.Linear):
        def forward(self, X):
            return super().forward(X["x"]) * X["scale"]

    model, data = Outputs(4, 6), []
    for _ in range(2):
        X = {"x": torch.randn(6, 4), "scale": torch.rand(6)}  # one per output
        data.append((X, torch.randint(6, (6,))))
    arguments = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    with pytest.raises(MemoryError, match="cannot be cut, since model or loss fail"):
        GGNLinearOperator(*arguments, max_memory=100)


def limited(model, loss, params, data, **options):
    """Return an operator whose products do not fit by far, and a vector."""
    free = {"check_deterministic": False, "cache": "off", **options}
    peak = HessianLinearOperator(model, loss, params, data, **free).plan().peak
    bounded = {"check_deterministic": False, "max_memory": peak // 2, **options}
    A = HessianLinearOperator(model, loss, params, data, **bounded)
    return A, torch.randn(A.shape[1]).double()


def test_what_couples_data_is_not_cut():
    model, loss, params, data = problem("cnn", [32])
    A, x = limited(model.train(), loss, params, data)
    with pytest.raises(MemoryError, match="batch normalisation"):
        A @ x


def test_what_may_couple_data_is_not_cut():
    model, _, params, data = problem("cnn", [32])
    arguments = model, lambda f, y: F.cross_entropy(f, y), params, data
    A, x = limited(*arguments)
    with pytest.raises(MemoryError, match="num_terms_fn"):
        A @ x
    A, x = limited(*arguments, num_terms_fn=lambda f, y: len(y))
    assert A.plan().batches[0].parts > 1
    assert_close(A @ x, HessianLinearOperator(*arguments) @ x, size=1e4)


def test_batches_of_unknown_size_are_not_cut():
    model, loss, params, data = problem("cnn", [32])

    def unwrapped(params, X):
        return torch.func.functional_call(model, params, (X["x"],))

    def unknown(X):
        raise ValueError

    data = [({"x": X}, y) for X, y in data]
    A, x = limited(unwrapped, loss, params, data, batch_size_fn=unknown)
    with pytest.raises(MemoryError, match="batch_size_fn"):
        A @ x
    A, x = limited(unwrapped, loss, params, data)
    assert_close(
        A @ x, HessianLinearOperator(unwrapped, loss, params, data) @ x, size=1e4
    )


def test_a_bound_is_kept_in_pickles_and_checked():
    arguments = problem("mlp", [16])
    A = GGNLinearOperator(*arguments, max_memory=10**7)
    for other in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
        assert other.risk.max_memory == 10**7
    for wrong in (0, -1, 1.5, "1", True):
        with pytest.raises(ValueError, match="max_memory"):
            GGNLinearOperator(*arguments, max_memory=wrong)


def test_one_risk_serves_several_bounded_matrices():
    arguments = problem("cnn", [32, 20])
    peaks = [c(*arguments).plan().peak for c in (GGNLinearOperator,)]
    risk = EmpiricalRisk(*arguments, max_memory=peaks[0] // 2)
    operators = [c(risk) for c in (GGNLinearOperator, HessianLinearOperator)]
    X = torch.randn(operators[0].shape[1], 1).double()
    for A in operators + operators:
        expected = type(A)(*arguments) @ X
        assert tracked(A, X) <= risk.max_memory
        assert_close(A @ X, expected, size=1e4)
    with torch.no_grad():
        arguments[2]["0.weight"].mul_(0.5)
    for A in operators:
        assert_close(A @ X, type(A)(*arguments) @ X, size=1e4)


def test_loaders_are_cut_too():
    model, loss, params, data = problem("cnn", [40])
    loader = DataLoader(list(zip(*data[0], strict=True)), batch_size=20)
    A, x = limited(model, loss, params, loader)
    assert {b.parts for b in A.plan().batches} != {1}
    assert_close(A @ x, HessianLinearOperator(model, loss, params, data) @ x, size=1e4)


class Initialised(nn.Module):
    """Subtracts the mean of the first data that it sees."""

    def __init__(self):
        super().__init__()
        self.mean = None

    def forward(self, X):
        if self.mean is None:
            self.mean = X.detach().mean(0)
        return X - self.mean


@pytest.mark.parametrize("bounded", [True, False])
def test_what_a_model_keeps_is_not_that_of_tries(bounded):
    X, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 2).double(), torch.randn(8).double()

    def product(**options):
        model = nn.Sequential(Initialised(), linear)
        A = GGNLinearOperator(
            *(model, nn.MSELoss(), list(model.parameters()), [(X, y)]),
            check_deterministic=False,
            **options,
        )
        if not (bounded or options):
            A.plan()
        return A @ x

    inputs = X - X.mean(0)
    J = torch.cat([torch.kron(torch.eye(2).double(), inputs), torch.zeros(16, 2)], 1)
    J = J.double()
    J[:8, 6], J[8:, 7] = 1, 1
    expected = J.T @ (J @ x) * 2 / y.numel()
    assert_close(product(max_memory=10**8) if bounded else product(), expected)


@pytest.mark.parametrize("empty", [True, False])
def test_first_data_without_targets(empty):
    model, loss = nn.Linear(3, 4).double(), nn.CrossEntropyLoss(ignore_index=0)
    X, y = torch.randn(64, 3).double(), torch.randint(1, 4, (64,))
    y[:3] = 0
    first = (X[:0], y[:0]) if empty else (X[:3], y[:3])
    arguments = model, loss, list(model.parameters())
    x = torch.randn(16).double()
    for data in ([first, (X, y)], [(X, y)]):
        A = GGNLinearOperator(*arguments, data)
        assert A.plan().peak > 0
        bounded = GGNLinearOperator(*arguments, data, max_memory=10**6)
        assert_close(bounded @ x, A @ x)


def test_columns_of_a_diagonal_count():
    arguments = problem("mlp", [3])
    A = GGNDiagonalLinearOperator(*arguments)
    X = torch.randn(A.shape[1], 200).double()
    A @ X
    assert tracked(A, X, 2) <= A.plan(200).peak
    bounded = GGNDiagonalLinearOperator(*arguments, max_memory=X.nbytes)
    for refused in (lambda: bounded @ X, lambda: bounded.plan(200)):
        with pytest.raises(MemoryError, match="with 200 columns") as caught:
            refused()
    limit = cure(caught)
    bounded = GGNDiagonalLinearOperator(*arguments, max_memory=limit)
    assert tracked(bounded, X, 2) <= limit


def test_numbers_of_numpy():
    arguments = problem("mlp", [3])
    A = GGNLinearOperator(*arguments, max_memory=np.int64(10**8))
    assert A.risk.max_memory == 10**8
    assert A.plan(np.int64(2)) == A.plan(2)
    with pytest.raises(ValueError, match="number of bytes"):
        GGNLinearOperator(*arguments, max_memory=True)
    with pytest.raises(ValueError, match="`columns` must be a positive whole number"):
        A.plan(True)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_bound_does_not_depend_on_values(value):
    model, loss, params, data = problem("mlp", [8])
    make = partial(GGNLinearOperator, model, loss, params, data)
    x = torch.randn(make().shape[1]).double()
    with pytest.raises(MemoryError) as caught:
        make(check_deterministic=False, max_memory=1) @ x
    A = make(check_deterministic=False, max_memory=cure(caught))
    result = A @ torch.full_like(x, value)
    assert torch.equal(result.isfinite(), x * value == 0)


# -- data that are coupled, tables, and models that write ------------------------------


class Coupled(nn.Module):
    """A network whose hidden units pass through a function of all data."""

    def __init__(self, couple):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)
        self.register_buffer("strength", torch.tensor(1.0))
        self.couple = couple

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + self.strength * (self.couple(h, x) - h))


def group_mean(h, x):
    same = ((2 * x[:, :1]).round() == (2 * x[:, 0]).round()).to(h)
    return same @ h / same.sum(1, keepdim=True)


COUPLINGS = {
    "mean": lambda h, x: h - h.mean(0) if len(x) > 2 else h,
    "normalised": lambda h, x: (h - h.mean(0)) / (h.var(0, correction=0) + 1).sqrt(),
    "group": group_mean,
    "neighbours": lambda h, x: h[
        torch.cdist(x, x).topk(min(3, len(x)), largest=False).indices
    ].mean(1),
    "position": lambda h, x: h * (1 + torch.arange(len(x)).unsqueeze(1) / 100),
    "sum so far": lambda h, x: h.cumsum(0) / 10,
    "sorted": lambda h, x: h.sort(0).values,
    "order": lambda h, x: h[x[:, 0].argsort()],
    "maximum": lambda h, x: h / h.max(0).values,
    "branch": lambda h, x: 2 * h if x.max() > 8 else h,
    "length": lambda h, x: 2 * h if len(x) > 50 else h,
    "gradient": lambda h, x: h - (h - h.detach()).mean(0),
}


def coupled_data(*sizes):
    """Return batches whose first two data do not tell that data are coupled."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for n in sizes:
        X = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        X[:2, 0], X[-1, 1] = torch.tensor([7.0, -7.0]), 9.0
        data.append((X, torch.randint(3, (n,), generator=generator)))
    return data


def whole(A):
    """Return the bytes of a product with whole batches that keeps nothing."""
    (products, K), data = loops_of(A, 1), Data.of(A.risk)
    load = max(data.loads)
    footprint = Probe(A.risk, data, products, K).footprint(load, 1)
    return footprint.peak(load) + footprint.total + footprint.spare


def bounded(matrix, model, data, fraction=0.95, **options):
    """Return an operator whose products do not fit as they are, and a vector."""
    loss = options.pop("loss", nn.CrossEntropyLoss())
    arguments = model.double(), loss, list(model.parameters()), data
    make = partial(MATRICES[matrix], *arguments, check_deterministic=False, **options)
    A = make(max_memory=int(fraction * whole(make())))
    return A, torch.linspace(1, 2, A.shape[1]).double()


@pytest.mark.parametrize("name", list(COUPLINGS))
def test_coupled_data_of_any_kind_are_not_cut(name):
    A, x = bounded("ggn", Coupled(COUPLINGS[name]), coupled_data(60))
    for _ in range(2):
        match = "cannot be cut|compared with whole batches"
        with pytest.raises(MemoryError, match=match) as caught:
            A @ x
    if name == "group":
        assert "batch 0 do not give what they give together" in str(caught.value)
        assert "smaller batches" in str(caught.value)
        A.risk.max_memory = cure(caught)
        A.risk.refresh()
        arguments = A.risk.model_func, A.risk.loss_func, A.risk.params, A.risk.data
        assert_close(A @ x, ggn(*arguments) @ x, size=1e4)


@pytest.mark.parametrize("matrix", list(MATRICES))
def test_no_matrix_of_coupled_data_is_cut(matrix):
    with pytest.raises(MemoryError, match="cannot be cut"):
        A, x = bounded(matrix, Coupled(group_mean), coupled_data(40))
        A @ x


def test_coupled_data_are_found_in_every_batch_and_parameter():
    def late(h, x):
        return group_mean(h, x) if x.max() > 100 else h

    data = coupled_data(40, 40, 30)
    data[1][0][:, 5] = 101.0
    A, x = bounded("hessian", Coupled(late), data)
    with pytest.raises(MemoryError, match="batch 1 do not give"):
        A @ x
    model = Coupled(group_mean)
    nn.init.zeros_(model.last.weight)  # outputs do not tell
    A, x = bounded("ggn", model, coupled_data(40))
    with pytest.raises(MemoryError, match="batch 0 do not give"):
        A @ x


def test_coupled_data_are_found_after_a_change():
    model = Coupled(group_mean)
    model.strength.zero_()
    A, x = bounded("ggn", model, coupled_data(40))
    arguments = model, A.risk.loss_func, A.risk.params, A.risk.data
    assert_close(A @ x, ggn(*arguments) @ x, size=1e4)
    assert A.risk._num_batches > 1
    model.strength.fill_(1)
    with pytest.raises(MemoryError, match="batch 0 do not give"):
        A @ x
    model.strength.zero_()
    assert_close(A @ x, ggn(*arguments) @ x, size=1e4)


def test_batches_of_which_no_evaluation_fits_are_not_cut():
    """What a model does with long batches only would not be seen."""
    A, x = bounded("ggn", Coupled(COUPLINGS["length"]), coupled_data(60), 0.25)
    for refused in (lambda: A @ x, A.plan):
        with pytest.raises(MemoryError, match="compared with whole batches") as caught:
            refused()
    A.risk.max_memory = cure(caught)
    A.risk.refresh()
    with pytest.raises(MemoryError, match="batch 0") as caught:
        A @ x
    A.risk.max_memory = cure(caught)
    A.risk.refresh()
    arguments = A.risk.model_func, A.risk.loss_func, A.risk.params, A.risk.data
    assert_close(A @ x, ggn(*arguments) @ x, size=1e4)


@pytest.mark.parametrize("name", ["group", "length", "branch"])
def test_zeros_hide_no_coupling(name):
    model, data = Coupled(COUPLINGS[name]), coupled_data(80)
    nn.init.zeros_(model.last.weight)
    data[0][0][:60, 0] = -3 * torch.arange(60)  # the first part is made of loners
    A, x = bounded("ggn", model, data)
    with pytest.raises(MemoryError, match="batch 0"):
        A @ x


def test_what_a_model_notes_about_the_first_data_is_not_cut():
    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = None

        def forward(self, h):
            if self.mean is None:
                self.mean = h.detach().mean(0)
            return h - self.mean

    torch.manual_seed(0)
    model = nn.Sequential(Noting(), nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    A, x = bounded("ggn", model, coupled_data(40))
    with pytest.raises(MemoryError, match="batch 0 do not give"):
        A @ x


def test_losses_that_couple_data_a_little_are_not_cut():
    def loss(f, y):
        return F.cross_entropy(f, y) + 1e-9 * (f[:-2] * f[2:]).sum()

    options = {"loss": loss, "num_terms_fn": lambda f, y: len(y)}
    model = Coupled(lambda h, x: h)
    A, x = bounded("hessian", model, coupled_data(40), **options)
    with pytest.raises(MemoryError, match="batch 0 do not give"):
        A @ x


def test_plans_refuse_what_products_refuse():
    A, _ = bounded("ggn", Coupled(group_mean), coupled_data(40))
    with pytest.raises(MemoryError, match="batch 0 do not give"):
        A.plan()


class WithTable(nn.Module):
    """Looks data up in a table that comes with them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, X):
        rows = X["table"][X["x"][:, 0].abs().long()] + X["table"].mean(0)
        return self.last(torch.tanh(self.first(X["x"] + rows)))


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("sizes", "lengths", "fits"),
    [
        ((40, 30), (30, 30), True),
        ((30, 40), (30, 30), True),
        ((30, 30), (30, 30), False),
        ((40, 30), (40, 30), False),
    ],
)
def test_tables_as_long_as_a_batch_are_not_cut(matrix, sizes, lengths, fits):
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).double()
    data = [
        ({"x": X, "table": table[:n]}, y)
        for (X, y), n in zip(coupled_data(*sizes), lengths, strict=True)
    ]
    A, x = bounded(matrix, WithTable(), data)
    if not fits:
        with pytest.raises(MemoryError, match="cannot be cut"):
            A @ x
        return
    reference = {"ggn": ggn, "hessian": hessian}[matrix]
    arguments = A.risk.model_func, A.risk.loss_func, A.risk.params, data
    for _ in range(3):
        assert_close(A @ x, reference(*arguments) @ x, size=1e4)
    assert A.risk._num_batches > 2


def write_where_large(x):
    if x.max() > 8:
        x.clamp_(max=8)


def write_where_few(x):
    if len(x) < 4:
        x.mul_(1)
        x[x > 8] = 9


@pytest.mark.parametrize("matrix", ["ggn", "jacobian", "diagonal", "gram"])
@pytest.mark.parametrize(
    "write", [write_where_large, write_where_few, lambda x: x.relu_()]
)
def test_models_write_into_no_data_of_the_user(matrix, write):
    class Writing(nn.Linear):
        def forward(self, x):
            write(x)
            return super().forward(x).sin()

    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(9, 9), nn.Tanh())]
    model = nn.Sequential(Writing(6, 9), *layers, nn.Linear(9, 3))
    data = coupled_data(40)
    before = data[0][0].clone()
    A, x = bounded(matrix, model, data, 0.8)
    for _ in range(4):
        product = A @ x
    assert A.risk._num_batches > 1
    assert torch.equal(data[0][0], before)
    same = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    plain = MATRICES[matrix](*same, cache="off", check_deterministic=False)
    assert_close(product, plain @ x, size=1e4)


def test_models_that_differentiate_by_their_inputs_are_cut():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh())

        def forward(self, x):
            x = x.detach().requires_grad_()
            [slope] = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return slope[:, :3]

    A, x = bounded("ggn", Slope(), coupled_data(40), 0.5)
    arguments = A.risk.model_func, A.risk.loss_func, A.risk.params, A.risk.data
    assert_close(A @ x, ggn(*arguments) @ x, size=1e4)
    assert A.risk._num_batches > 1
