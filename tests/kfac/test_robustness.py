"""What rounding, threads, large factors and half precision must not break."""

import threading
import warnings

import numpy as np
import pytest
import torch
from numpy.linalg import LinAlgError
from torch import nn

from cases import Lambda
from curvlinops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.kfac import load
from tolerances import assert_close

EXACT = {"fisher_type": "type-2", "check_deterministic": False}


def classification(model, width=20, classes=5):
    torch.manual_seed(0)
    data = [
        (torch.randn(16, width).double(), torch.randint(classes, (16,)))
        for _ in range(2)
    ]
    return EmpiricalRisk(
        model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    )


def scaled(dtype=torch.float64):
    """Return a model with a parameter that has no Kronecker-factored form."""
    return Lambda(
        lambda self, X: self.inner[0](X) * self.c.exp(),
        nn.Linear(20, 5),
        c=torch.ones(5),
    ).to(dtype)


def test_corrections_far_below_the_largest_eigenvalue():
    torch.manual_seed(0)
    X = torch.randn(512, 4)
    X[:, 0] = 2000 + 5 * X[:, 0]
    model = nn.Linear(4, 1, bias=False)
    E = EKFACLinearOperator(
        model,
        nn.MSELoss(),
        list(model.parameters()),
        [(X, torch.zeros(512, 1))],
        **EXACT,
    )
    expected = 2 * X.double().square().mean(0)
    assert torch.allclose(E.diagonal().double(), expected, rtol=0.2)
    assert E.logdet().isfinite()
    assert E.inverse(0.0).to_dense().isfinite().all()


@pytest.mark.parametrize("cls", [KFACLinearOperator, KFOCLinearOperator])
def test_no_deadlock_between_threads(cls):
    for _ in range(3):
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double()
        risk = classification(model)
        risk.cache = "off"
        G, K = GGNLinearOperator(risk), cls(risk)
        v = torch.ones(G.shape[1], dtype=torch.float64)

        def multiply(G=G, v=v):
            for _ in range(5):
                G @ v

        threads = [
            threading.Thread(target=run, daemon=True)
            for run in (K.trace, multiply, K.compute_kronecker_factors, K.refresh)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


def test_nearest_product_with_a_wide_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    data = [(torch.randint(30, (12, 2)), torch.randint(3, (12,)))]
    problem = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    with pytest.warns(UserWarning, match=r"'0.weight', with one row per token"):
        K = KFOCLinearOperator(*problem, max_factor=10, tolerance=1e-14, **EXACT)
        narrow = K.block_of("0.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = KFOCLinearOperator(*problem, max_factor=30, **EXACT)
        assert full.factors()["0"].input.shape == (30, 30)
    B, A = (f[0] for f in narrow.factors)
    assert A.shape == (30,)
    assert B.shape == (4, 4)
    G = GGNLinearOperator(*problem).to_dense()[:120, :120].reshape(30, 4, 30, 4)
    # stationary: each factor is the best one for the other
    best = torch.einsum("iaib,ab->i", G, B) / B.square().sum()
    assert torch.allclose(A, best, rtol=1e-5, atol=1e-9)
    best = torch.einsum("iaib,i->ab", G, A) / A.square().sum()
    assert torch.allclose(B, best, rtol=1e-5, atol=1e-9)


def test_wide_factor_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten()).double()
    data = [(torch.randn(3, 2, 4, 4).double(), torch.randn(3, 12).double())]
    problem = model, nn.MSELoss(), list(model.parameters()), data
    with pytest.warns(UserWarning, match="only its diagonal"):
        K = KFOCLinearOperator(*problem, max_factor=10, tolerance=1e-14, **EXACT)
        B, A = (f[0] for f in K.block_of("0.weight").factors)
    G = GGNLinearOperator(*problem).to_dense().reshape(3, 18, 3, 18)
    best = torch.einsum("aibi,ab->i", G, B) / B.square().sum()
    assert torch.allclose(A, best, rtol=1e-5)


def test_singular_matrix_has_positive_powers():
    torch.manual_seed(0)
    model = nn.Linear(6, 2, bias=False).double()
    data = [(torch.randn(3, 6).double(), torch.randn(3, 2).double())]
    problem = model, nn.MSELoss(), list(model.parameters()), data
    for cls in (KFACLinearOperator, EKFACLinearOperator):
        K = cls(*problem, **EXACT)
        root = K**0.5
        assert_close((root @ root).to_dense(), K.to_dense(), size=10_000)
        assert K.logdet() == -torch.inf
        with pytest.raises(LinAlgError, match=r"no power -0\.5"):
            K**-0.5
    with pytest.raises(LinAlgError, match="singular"):
        K.inverse(0.0)


@pytest.mark.filterwarnings("ignore:The model.s output does not depend")
def test_diagonal_blocks_of_half_precision(tmp_path):
    torch.manual_seed(0)
    X, y = torch.randn(400, 20), torch.arange(400) % 5
    state = scaled().state_dict()
    diagonals = []
    for dtype in (torch.float64, torch.bfloat16):
        model = scaled(dtype)
        model.load_state_dict(state)
        unused = nn.Parameter(torch.ones(2, dtype=dtype))
        params = {**dict(model.named_parameters())}
        model.register_parameter("unused", unused)
        params["unused"] = unused
        K = KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            params,
            [(X.to(dtype), y)],
            unsupported="diagonal",
            fisher_type="empirical",
        )
        diagonals.append(K.block_of("c").diagonal().double())
        K.save(tmp_path / "factors.npz")
        assert torch.equal(load(tmp_path / "factors.npz").diagonal(), K.diagonal())
    exact, half = diagonals
    assert (half - exact).norm() < 0.03 * exact.norm()


def test_lists_of_other_things():
    K = KFACLinearOperator(classification(nn.Linear(20, 5).double()))
    for operator in (K, K.inverse(0.1), K.representation):
        with pytest.raises((TypeError, ValueError)):
            operator @ [np.ones((1, 3))]


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_head_that_is_used_later(cls):
    """The order in which batches show how a tied weight is used does not matter."""
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4).double()

    def forward(self, X):
        h = self.inner[0](X["ids"])
        head = self.inner[0].weight if X["head"] else torch.eye(7, 4).double()
        return nn.functional.linear(h.mean(1).tanh(), head)

    model = Lambda(forward, embedding)
    data = [
        ({"ids": torch.randint(7, (3, 2)), "head": head}, torch.randint(7, (3,)))
        for head in (False, True)
    ]
    first, second = (
        cls(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            batches,
            batch_size_fn=lambda X: len(X["ids"]),
            **EXACT,
        ).to_dense()
        for batches in (data, data[::-1])
    )
    assert_close(first, second, size=10_000)


def test_recording_goes_on_while_an_exception_is_held():
    risk = classification(scaled())
    G = GGNLinearOperator(risk)
    v = torch.ones(G.shape[1], dtype=torch.float64)
    G @ v
    recordings, full = risk._recordings, risk._ledger.full
    with pytest.raises(ValueError, match="No Kronecker-factored form") as held:
        KFACLinearOperator(risk).trace()
    assert risk._recordings is recordings
    assert risk._ledger.full is full
    assert held.value is not None


def test_dampings_that_do_not_fit():
    risk = classification(nn.Linear(20, 5).double())
    K = KFACLinearOperator(risk)
    with pytest.raises(ValueError, match="Got 3 dampings"):
        K.inverse((1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="Got 3 dampings"):
        K.inverse({"weight": 0.1, "bias": (1.0, 2.0, 3.0)})
    bias = K.inverse((5.0, 0.3)).block_of("bias")
    assert_close(bias.to_dense(), K.block_of("bias").inverse(0.3).to_dense())
    joint = KFACLinearOperator(risk, separate_weight_and_bias=False)
    with pytest.raises(ValueError, match="several values"):
        joint.inverse({"weight": 0.1, "bias": 0.2})
    joint.inverse({"weight": 0.1, "bias": 0.1})


def test_decompositions_are_not_retried_if_not_wanted(monkeypatch):
    K = KFACLinearOperator(classification(nn.Linear(20, 5).float().double()))
    operator = K.block_of("weight")
    operator.factors = [f.float() for f in operator.factors]
    calls = []

    def failing(matrix, **options):
        calls.append(matrix.dtype)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    for retry in (False, True):
        calls.clear()
        with pytest.raises(LinAlgError):
            operator.inverse(0.1, use_exact_damping=True, retry_double_precision=retry)
        assert len(calls) == 1 + retry


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
def test_inputs_as_unit_vectors_that_are_too_large(cls, monkeypatch):
    monkeypatch.setattr("curvlinops.kfac._uses.MOST_UNIT_BYTES", 1000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    data = [(torch.randint(30, (4, 2)), torch.randint(2, (4,)))]
    arguments = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    with pytest.raises(MemoryError, match=r"embedding '0.weight', 8 unit"):
        cls(*arguments, **EXACT).trace()
    assert KFACLinearOperator(*arguments, **EXACT).trace() > 0


def test_positions_under_autocast():
    """Inputs and gradients of a layer have different types there."""
    torch.manual_seed(0)
    X, y = torch.randn(4, 6, 8), torch.randn(4, 2)
    params = {"W": torch.randn(8, 5), "V": torch.randn(5, 2)}

    def model(p, X):
        return ((X @ p["W"]).tanh() @ p["V"]).mean(1).float()

    def rounded(p, X):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(p, X)

    found, expected = (
        EKFACLinearOperator(f, nn.MSELoss(), params, [(X, y)], **EXACT).trace()
        for f in (rounded, model)
    )
    assert abs(found - expected) <= 0.03 * expected
