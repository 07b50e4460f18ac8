"""Kronecker-factored operators and their inverses after something has changed."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from numpy.linalg import LinAlgError
from test_passes import Counted
from torch import nn

import references
from cases import find
from curvlinops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.kfac import load
from tolerances import assert_close

METHODS = {
    "kfac": (KFACLinearOperator, {}),
    "ekfac": (EKFACLinearOperator, {}),
    "kfoc": (KFOCLinearOperator, {"max_iter": 100, "tolerance": 1e-12}),
}
EXACT = {"fisher_type": "type-2", "check_deterministic": False}


def problem():
    return find("mlp-tanh-mse").build()


def build(method, *built, **options):
    cls, its = METHODS[method]
    return cls(*built, **{**EXACT, **its, **options})


def change(model):
    """Change parameters in place, as an optimiser does."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.1)


def step(model):
    """Change parameters behind autograd's back."""
    model[0].weight.data.view(-1).numpy()[:3] += 1.0


def inputs(data):
    data[0][0].mul_(2.0)


def targets(data):
    data[0][1].numpy().fill(3.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inverse_first", [True, False])
def test_everything_follows(method, inverse_first):
    """Compared with factors from their definitions, and dense algebra."""
    built = model, _, _, data = problem()
    A = build(method, *built)
    exact = {} if method == "ekfac" else {"use_exact_damping": True}
    inverse = A.inverse(0.1, **exact)
    lazy = KFACInverseLinearOperator(A, 0.1, **exact)
    root, square = inverse**-0.5, (A + A) ** 2
    again, block = root.inverse(1.0), A.block("2.*")
    V = torch.rand(A.shape[1], 2).double()
    parts = A._in_space.unpack(V[:, 0])

    def check():
        K = references.kronecker(*built, method=method)
        one = torch.eye(len(K), dtype=K.dtype)
        damped = K + 0.1 * one
        evals, Q = torch.linalg.eigh(damped)
        dense_root = Q * evals.sqrt() @ Q.T
        pairs = [
            (again @ V, torch.linalg.inv(dense_root + one) @ V),
            (root @ V, dense_root @ V),
            (inverse @ V, torch.linalg.inv(damped) @ V),
            (lazy.diagonal(), torch.linalg.inv(damped).diagonal()),
            (inverse.logdet(), -torch.logdet(damped)),
            (square @ V, 4 * K @ (K @ V)),
            (block.to_dense(), K[25:49, 25:49]),
            (A._in_space.pack(A @ parts), K @ V[:, 0]),
            (A @ V.numpy(), K @ V),
            (A.trace(), K.trace()),
            (A.diagonal(), K.diagonal()),
            (A.eigenvalues(), torch.linalg.eigvalsh(K)),
        ]
        for mine, expected in pairs if inverse_first else pairs[::-1]:
            assert_close(mine, expected, size=1000, exponent=0.5)

    check()
    for alter in (change, step):
        alter(model)
        check()
    for alter in (inputs, targets):
        alter(data)
        check()


def test_inverses_raise_at_once_and_later():
    model, loss, params, data = problem()
    K = build("kfac", model, loss, params, data)
    with pytest.raises(LinAlgError, match=r"block of '0.weight'.*larger `damping`"):
        K.inverse(-1.0)
    inverse = K.inverse(0.0)
    for X, _ in data:
        X.zero_()
    with pytest.raises(LinAlgError, match=r"block of '0.weight'.*larger `damping`"):
        inverse @ np.ones(K.shape[1])
    for X, _ in data:
        X.copy_(torch.rand_like(X))
    dense = torch.linalg.inv(references.kronecker(model, loss, params, data))
    assert_close(inverse.to_dense(), dense, exponent=0.5)


# The factors of one state are computed once


def counting():
    model, loss, _, data = problem()
    model = Counted(model)
    risk = EmpiricalRisk(
        model, loss, list(model.parameters()), data, check_deterministic=False
    )
    risk.gradient_and_loss()  # looks at the model, too
    model.calls.clear()
    return model, risk, len(data) + 4  # data of batches of three and two, alone


def test_computed_once_for_all_who_ask():
    model, risk, passes = counting()
    A, B = KFACLinearOperator(risk), KFACLinearOperator(risk)
    inverses = [A.inverse(0.1), B.inverse(0.2), KFACInverseLinearOperator(A, 0.3)]
    for _ in range(2):
        for operator in (*inverses, B, A):
            operator @ torch.ones(A.shape[1]).double()
        assert A.representation is B.representation
        assert len(model.calls) == passes
        model.calls.clear()
        change(model.inner)
    A.compute_kronecker_factors()
    assert len(model.calls) == passes
    assert A.representation is B.representation
    A.refresh()
    B.trace()
    assert len(model.calls) == 2 * passes


def test_other_settings_share_nothing():
    _, risk, _ = counting()
    options = (
        {"seed": 1},
        {"seed": 2},
        {"fisher_type": "type-2"},
        {"fisher_type": "empirical"},
        {"mc_samples": 2},
        {"separate_weight_and_bias": False},
    )
    operators = [KFACLinearOperator(risk, **each) for each in options]
    operators += [EKFACLinearOperator(risk), KFOCLinearOperator(risk)]
    operators += [KFOCLinearOperator(risk, max_iter=1), KFACLinearOperator(risk)]
    matrices = {id(A.representation): A.to_dense() for A in operators}
    assert len(matrices) == len(operators)
    for A in operators:
        assert torch.equal(A.to_dense(), matrices[id(A.representation)])


class ScaledKFAC(KFACLinearOperator):
    """A user's operator, whose factors depend on more than KFAC's."""

    scale = 1.0

    def _estimate(self, title):
        return [
            (layout, block._with([self.scale * block.factors[0], *block.factors[1:]]))
            for layout, block in super()._estimate(title)
        ]


def test_operators_of_users_have_factors_of_their_own():
    _, risk, _ = counting()
    K = KFACLinearOperator(risk, **EXACT)
    twice, thrice = ScaledKFAC(risk, **EXACT), ScaledKFAC(risk, **EXACT)
    twice.scale, thrice.scale = 2.0, 3.0
    for _ in range(2):
        assert_close(thrice.trace(), 3 * K.trace())
        assert_close(twice.trace(), 2 * K.trace())
        assert twice.representation is twice.representation
        change(risk.model_func.inner)


def test_computed_once_for_several_threads():
    model, risk, passes = counting()
    operators = [KFACLinearOperator(risk) for _ in range(2)]
    operators += [KFACInverseLinearOperator(K, 0.1) for K in operators]
    start, results = threading.Barrier(8), []

    def ask(A):
        start.wait()
        results.append(A.representation)

    for _ in range(2):
        threads = [threading.Thread(target=ask, args=(A,)) for A in operators * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(set(map(id, results))) == 3  # the factors, and two inverses
        assert len(model.calls) == passes
        model.calls.clear()
        results.clear()
        change(model.inner)


def test_draws_keep_their_seed():
    built = model, _, _, _ = problem()
    K = KFACLinearOperator(*built, mc_samples=2, seed=3, check_deterministic=False)
    state = copy.deepcopy(model.state_dict())
    before, _ = K.to_dense(), change(model)
    reference = references.kronecker(*built, fisher="mc", mc_samples=2, seed=3)
    assert_close(K.to_dense(), reference, size=1000)
    model.load_state_dict(state)
    assert torch.equal(K.to_dense(), before)


@pytest.mark.parametrize("method", METHODS)
def test_former_matrices_are_freed(method, tmp_path):
    built = model, _, _, _ = problem()
    risk = EmpiricalRisk(*built, check_deterministic=False)
    A, other = build(method, risk), KFACLinearOperator(risk)
    inverse, path = A.inverse(0.1), tmp_path / "factors.npz"
    other.save(path)
    other.load(path)
    known = [weakref.ref(each.representation) for each in (A, inverse, other)]
    change(model)
    inverse.trace()
    gc.collect()
    assert [its() is None for its in known] == [True, True, False]
    other.trace()  # not used since, and has now nothing of its own
    gc.collect()
    assert known[2]() is None


@pytest.mark.parametrize("method", ["kfac", "kfoc"])
def test_factors_of_inverses_follow(method):
    built = model, _, _, _ = problem()
    inverse = build(method, *built).inverse(0.1)
    for _ in range(2):
        factors = build(method, *built).inverse(0.1).frozen().factors()
        assert inverse.factors().keys() == factors.keys()
        for name, pair in inverse.factors().items():
            for mine, its in zip(pair, factors[name], strict=True):
                assert_close(mine, its, size=1000, exponent=0.5)
        change(model)


# What does not follow, and says so


@pytest.mark.parametrize("method", METHODS)
def test_frozen_copied_pickled_and_in_a_file(method, tmp_path):
    built = model, _, _, _ = problem()
    A = build(method, *built)
    inverse, V = A.inverse(0.1), torch.rand(A.shape[1], 2).double()
    for operator in (A, inverse):
        frozen, expected = operator.frozen(), operator @ V
        path = tmp_path / "blocks.npz"
        frozen.save(path)
        change(model)
        assert not torch.allclose(operator @ V, expected)
        for same in (
            frozen,
            copy.copy(frozen),
            copy.deepcopy(frozen),
            pickle.loads(pickle.dumps(frozen)),
            load(path),
        ):
            assert not hasattr(same, "risk")
            assert torch.equal(same @ V, expected)
    damped = A.frozen().inverse(0.1)
    assert_close(damped @ V, inverse @ V)
    assert_close(A.frozen().logdet(), A.logdet())


def test_a_frozen_matrix_does_not_look_at_anything(monkeypatch):
    K = build("kfac", *problem())
    frozen, inverse = K.frozen(), K.inverse(0.1).frozen()
    monkeypatch.setattr(EmpiricalRisk, "_refresh_if_changed", None)
    for operator in (frozen, inverse):
        operator @ np.ones(K.shape[1])
        operator.trace()


def test_loaded_factors_count_until_something_changes(tmp_path):
    built = model, _, _, _ = problem()
    path = tmp_path / "factors.npz"
    build("kfac", *built).frozen().save(path)
    risk = EmpiricalRisk(*built, check_deterministic=False)
    A, B = (KFACLinearOperator(risk, fisher_type="type-2") for _ in range(2))
    change(model)

    def warned():
        return pytest.warns(UserWarning, match="with other values of the parameters")

    with warned():
        A.load(path)
    loaded = load(path).to_dense()
    for same in (A, copy.copy(A), copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(same.to_dense(), loaded)
    fresh = references.kronecker(*built)
    assert_close(B.to_dense(), fresh, size=1000)
    assert not A.verify().ok  # these belong to other parameters
    step(model)
    fresh = references.kronecker(*built)
    for same in (A, copy.copy(A), pickle.loads(pickle.dumps(A))):
        assert_close(same.to_dense(), fresh, size=1000)
    with warned():
        A.load(path)
    A.refresh()
    assert_close(A.to_dense(), fresh, size=1000)
    with warned():
        A.load(path)
    A.compute_kronecker_factors()
    assert_close(A.to_dense(), fresh, size=1000)


@pytest.mark.parametrize("method", METHODS)
def test_copies_follow_their_own_parameters(method):
    A = build(method, *problem())
    inverse = A.inverse(0.1)
    before = A.to_dense(), inverse.to_dense()
    for pair in (
        copy.deepcopy((A, inverse)),
        pickle.loads(pickle.dumps((A, inverse))),
    ):
        for mine, its in zip(pair, before, strict=True):
            assert torch.equal(mine.to_dense(), its)
        other, its_inverse = pair
        risk = other.risk
        change(risk.model_func)
        its = risk.model_func, risk.loss_func, risk.params, risk.data
        expected = references.kronecker(*its, method=method)
        assert_close(other.to_dense(), expected, size=1000, exponent=0.5)
        assert_close(its_inverse.to_dense(), other.inverse(0.1).to_dense())
        assert torch.equal(A.to_dense(), before[0])


# Checks


class Tempered(nn.Module):
    """A model with an attribute that nobody sees change."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.temperature = inner, 1.0

    def forward(self, X):
        return self.inner(X) / self.temperature


@pytest.mark.parametrize("method", METHODS)
def test_verify_finds_factors_that_are_not_fresh(method):
    model, loss, _, data = problem()
    model = Tempered(model)
    options = {"max_iter": 3} if method == "kfoc" else {}
    A = build(method, model, loss, list(model.parameters()), data, **options)
    inverse = A.inverse(0.1)
    operators = A, inverse, inverse**-0.5

    def passed(name):
        reports = [operator.verify() for operator in operators]
        return [c.passed for r in reports for c in r.checks if c.name == name]

    assert all(operator.verify().ok for operator in operators)
    change(model)
    assert passed("freshness") == [True] * 3
    model.temperature = 2.0
    assert passed("freshness") == [False] * 3
    A.refresh()
    assert passed("freshness") == [True] * 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.parametrize("name", ["conv2d-circular", "conv-float32", "tied-weights"])
def test_right_operators_pass(method, fisher_type, name):
    A = METHODS[method][0](*find(name).build(), fisher_type=fisher_type)
    for operator in (A, A.inverse(0.1)):
        report = operator.verify()
        assert report.ok, report


def test_verify_finds_data_that_are_coupled():
    def centred(params, X):
        h = X @ params["W"]
        return (h - h.mean(0)).tanh() @ params["V"]

    X, y = torch.rand(6, 3).double(), torch.rand(6, 2).double()
    params = {"W": torch.rand(3, 2).double(), "V": torch.rand(2, 2).double()}
    problem = centred, nn.MSELoss(), params, [(X, y)]
    with pytest.raises(ValueError, match="does the model couple data"):
        KFACLinearOperator(*problem, **EXACT).trace()
    K = KFACLinearOperator(*problem, **EXACT, unsupported="diagonal")
    [check] = [c for c in K.verify().checks if c.name == "batch split"]
    assert not check.passed
    assert not np.isnan(check.error)


def test_sums_with_operators_of_the_risk_follow():
    built = model, _, _, _ = problem()
    risk = EmpiricalRisk(*built, check_deterministic=False)
    A = GGNLinearOperator(risk) - KFACLinearOperator(risk, fisher_type="type-2")
    for _ in range(2):
        expected = references.ggn(*built) - references.kronecker(*built)
        assert_close(A.to_dense(), expected, size=1000)
        change(model)
