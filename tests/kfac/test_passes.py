"""How gradients are sent back, what is kept between passes, and what is left out."""

import copy
import unittest.mock

import pytest
import torch
from test_geometry import KNOWN, block_of
from torch import nn

import references
from cases import find, split
from curvlinops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.kfac import _corrections, _estimation
from tolerances import assert_close

FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator
EXACT = {"fisher_type": "type-2", "check_deterministic": False}
NAMES = ["mlp-tanh-ce", "ce-tokens-options", "conv2d", "attention-block", "causal-lm"]


class Counted(nn.Module):
    """A model that counts its forward passes, also as a copy."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def __deepcopy__(self, memo):
        new = Counted(memo.setdefault(id(self.inner), self.inner))
        new.inner = copy.deepcopy(self.inner, memo)
        new.calls = self.calls
        return new

    def forward(self, X):
        self.calls.append(len(X))
        return self.inner(X)


def counted(cache, cls):
    model, loss, _, data = find("mlp-tanh-ce").build()
    model = Counted(model)
    risk = EmpiricalRisk(
        model,
        loss,
        list(model.parameters()),
        data,
        cache=cache,
        check_deterministic=False,
    )
    options = {"max_iter": 3, "tolerance": 0} if cls is KFOCLinearOperator else {}
    A = cls(risk, fisher_type="type-2", **options)
    A.compute_kronecker_factors()  # looks at the model, too
    model.calls.clear()
    A.compute_kronecker_factors()
    dense = A.to_dense()
    # data of batches of three and two are evaluated alone
    return dense, (len(model.calls) - 4) / len(data)


@pytest.mark.parametrize(
    ("cls", "passes"), [(EKFACLinearOperator, 2), (KFOCLinearOperator, 7)]
)
def test_passes_over_the_data(cls, passes):
    """One, if inputs and gradients may be kept; the matrix is the same."""
    kept, few = counted("auto", cls)
    computed, many = counted("off", cls)
    assert (few, many) == (1, passes)
    assert_close(kept, computed)
    small, many = counted(1000, cls)
    assert many == passes
    assert_close(small, computed)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("name", NAMES)
def test_vectors_sent_together_or_alone(name, cls, fisher_type, monkeypatch):
    problem = find(name).build()
    options = {"fisher_type": fisher_type, "check_deterministic": False}
    together = cls(*problem, **options).to_dense()
    monkeypatch.setattr(_estimation, "TOGETHER_BYTES", 0)
    assert_close(cls(*problem, **options).to_dense(), together, size=100_000)


def test_sent_together_at_all(monkeypatch):
    problem = find("mlp-tanh-ce").build()
    expected = KFACLinearOperator(*problem, **EXACT).to_dense()
    sent = []
    original = _estimation.Batch.send_together

    def send_together(self, U):
        sent.append(len(U))
        return original(self, U)

    monkeypatch.setattr(_estimation, "MAX_TOGETHER", 100)
    monkeypatch.setattr("curvlinops.kfac._layers.LEAST_TOGETHER", 2)
    monkeypatch.setattr(_estimation.Batch, "send_together", send_together)
    assert_close(KFACLinearOperator(*problem, **EXACT).to_dense(), expected)
    assert sent
    assert min(sent) > 1


class Sine(torch.autograd.Function):
    """A function that is not vectorised."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(g.numpy() * 0 + x.cos().numpy())


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_model_that_cannot_be_vectorised():
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 5).double()
    X, y = torch.rand(6, 3).double(), torch.rand(6, 5).double()
    results = []
    for function in (torch.sin, Sine.apply):
        model = nn.Sequential(first, Applied(function), last)
        params, data = list(model.parameters()), split(X, y)
        K = KFACLinearOperator(model, nn.MSELoss(), params, data, **EXACT)
        results.append(K.to_dense())
    assert_close(results[1], results[0])


@pytest.mark.parametrize("cls", FAMILY[:2])
@pytest.mark.parametrize("chosen", [[0], [2], [4], [0, 4]])
def test_some_of_the_layers(cls, chosen):
    """Gradients arrive on the way to other layers, or at the end of it."""
    model, loss, _, data = find("mlp-tanh-ce").build()
    params = {
        name: p
        for name, p in model.named_parameters()
        if int(name.partition(".")[0]) in chosen
    }
    whole = cls(model, loss, dict(model.named_parameters()), data, **EXACT)
    part = cls(model, loss, params, data, **EXACT)
    for name in params:
        assert_close(
            part.block_of(name).to_dense(), whole.block_of(name).to_dense(), size=1000
        )


def test_frozen_layer_in_front():
    """A parameter that requires a gradient, but is not asked for, lies behind."""
    model, loss, _, data = find("mlp-tanh-ce").build()
    front = nn.Linear(4, 4).double()
    whole = nn.Sequential(front, model)
    data = [(X, y) for X, y in data]
    last = list(model.parameters())
    assert data[0][0].shape[1] == 4
    part = KFACLinearOperator(whole, loss, last, data, **EXACT)
    shifted = [(front(X).detach(), y) for X, y in data]
    alone = KFACLinearOperator(model, loss, last, shifted, **EXACT)
    assert_close(part.to_dense(), alone.to_dense())


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("separate", [True, False])
def test_corrections_where_factors_vanish(approx, rank, separate):
    """The diagonal in the eigenbasis, also for eigenvalues that are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[0].bias.data[:2] = -100  # units that are off for all data
    X = torch.randn(6, rank).double() @ torch.randn(rank, 4).double()
    data = split(X, torch.randint(3, (6,)))
    problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
    E = EKFACLinearOperator(*problem, **EXACT, **options)
    expected = references.ggn(*problem)
    for layout, block in zip(
        E.representation.layouts, E.representation.blocks, strict=True
    ):
        F = block_of(expected, E._in_space, layout.names)
        if len(layout.names) == 2:  # a joint bias is the last column
            _, m, n = layout.size
            order = torch.arange(m * n).reshape(m, n)
            index = torch.empty(m, n, dtype=torch.long)
            index[:, :-1] = torch.arange(m * (n - 1)).reshape(m, n - 1)
            index[:, -1] = torch.arange(m) + m * (n - 1)
            F = F[index.flatten()][:, index.flatten()]
            assert order.numel() == len(F)
        Q = block.Q.to_dense()
        assert_close(block.evals, (Q.T @ F @ Q).diagonal(), size=10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_corrections_with_few_rows(dtype, separate, batches):
    """With fewer data than inputs and outputs, some directions have nothing in them."""
    torch.manual_seed(0)
    state = nn.Linear(20, 12).state_dict()
    X, y = torch.randn(6, 20), torch.randint(12, (6,))

    def block(dtype):
        model = nn.Linear(20, 12, dtype=dtype)
        model.load_state_dict(state)
        E = EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(X[i::batches].to(dtype), y[i::batches]) for i in range(batches)],
            fisher_type="empirical",
            separate_weight_and_bias=separate,
        )
        return E.block_of("weight")

    evals = block(dtype).evals.reshape(12, -1)
    assert (evals[:-6] == 0).all()
    assert (evals[:, :-6] == 0).all()
    assert (evals[-6:, -6:] > 0).all()
    actual, exact = block(dtype).to_dense(), block(torch.float64).to_dense()
    assert (actual - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("problem", KNOWN)
@pytest.mark.parametrize("separate", [True, False])
def test_rotating_gradients_or_their_rows_is_the_same(problem, separate, monkeypatch):
    args = problem.build()
    results = []
    for by_matrix in (True, False):
        monkeypatch.setattr(
            _corrections.Basis,
            "rotates_matrices",
            lambda *_, by_matrix=by_matrix: by_matrix,
        )
        E = EKFACLinearOperator(
            *args,
            fisher_type="type-2",
            separate_weight_and_bias=separate,
            check_deterministic=False,
        )
        results.append(E.to_dense())
    assert_close(*results, size=10_000)


def test_gradients_of_large_images_are_rotated_as_matrices():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    X, y = torch.rand(4, 3, 8, 8), torch.randint(3, (4,))
    E = EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)]
    )
    with unittest.mock.patch.object(
        _corrections.Moments, "_add_matrices", autospec=True
    ) as spy:
        E.compute_kronecker_factors()
        E @ torch.rand(E.shape[1])
    assert [basis.layer.name for _, basis, _ in (c.args for c in spy.mock_calls)] == [
        "0.weight"
    ]


def test_rows_that_are_lost_in_rounding():
    """A factor does not show how many directions a small datum is spread over."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2, bias=False)
    Q = torch.linalg.qr(torch.randn(8, 8))[0]
    X, tiny = torch.stack([2 * Q[0], 3 * Q[1], 1e-5 * Q[2]]), 1e-5
    data = [(X, torch.randn(3, 2))]
    problem = model, nn.MSELoss(reduction="sum"), list(model.parameters()), data
    E = EKFACLinearOperator(*problem, **EXACT)
    evals = E.block_of("weight").evals.reshape(2, 8)
    lowest = evals[:, :6].sum(1)
    assert torch.allclose(lowest, torch.full((2,), 2 * tiny**2), 0.1, 0.0)


def test_inputs_are_no_copies_of_the_data(monkeypatch):
    """A view of a large data set counts as the batch that it shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    X, y = torch.rand(100_000, 2, 3), torch.randint(3, (100_000,))
    data = [(X[i : i + 4], y[i : i + 4]) for i in (0, 4)]
    kept = []
    original = _estimation._show

    def show(visitor, batch, seen):
        kept.append(batch.layers[0].uses[0][0].input)
        original(visitor, batch, seen)

    monkeypatch.setattr(_estimation, "_show", show)
    monkeypatch.setattr(_estimation, "KEPT_BYTES", 4000)
    for check in (False, True):
        E = EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            data,
            check_deterministic=check,
        )
        kept.clear()
        E.trace()
        assert [t.data_ptr() for t in kept] == [x.data_ptr() for x, _ in data]


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(
    "name", ["mlp-tanh-ce", "conv2d", "causal-lm", "attention-block"]
)
def test_lists_are_multiplied_as_they_are(name, cls, separate):
    A = cls(*find(name).build(), separate_weight_and_bias=separate, **EXACT)
    space = A._in_space
    torch.manual_seed(0)
    x = torch.rand(A.shape[1]).to(space.dtype)
    parts = [p.clone() for p in space.unpack(x)]
    for operator in (A, A.inverse(0.1)):
        results = operator @ parts
        assert [r.shape for r in results] == list(space.shapes)
        expected = operator @ x
        assert_close(torch.cat([r.flatten() for r in results]), expected, size=1000)
        dense = operator.to_dense()
        assert_close(expected, dense @ x, size=10_000)
        flipped = [p.T.contiguous().T if p.ndim == 2 else p for p in parts]
        for mine, its in zip(operator @ flipped, results, strict=True):
            assert_close(mine, its, size=100)
    assert_close(torch.cat([p.flatten() for p in parts]), x)
    with pytest.raises(ValueError, match="Expected a list"):
        A @ parts[:-1]
    with pytest.raises(TypeError, match="computes in"):
        A @ [p.float() for p in parts]
