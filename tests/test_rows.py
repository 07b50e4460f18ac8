"""Dense matrices made of the Jacobians of single data."""

import pytest
import torch
from torch import nn

import references
from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
    _rows,
)
from curvlinops._parts import RowsByDatum
from tolerances import assert_close

N = 24


def mlp(*first):
    return nn.Sequential(*first, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def cnn():
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(12, 3)).double()


def problem(build=mlp, loss=None, sizes=(10, 1, 13)):
    torch.manual_seed(0)
    net = build()
    X = torch.randn(N, *((1, 6, 6) if build is cnn else (6,))).double()
    y = torch.randint(3, (N,))
    data = list(zip(X.split(sizes), y.split(sizes), strict=True))
    return net, loss or nn.CrossEntropyLoss(), dict(net.named_parameters()), data


def kept(A):
    return A.risk._rows.matrices


@pytest.fixture
def pulls(monkeypatch):
    """Count how often rows are computed."""
    found, call = [], RowsByDatum.__call__

    def counted(self, part):
        rows = call(self, part)
        found.append(tuple(rows.shape))
        return rows

    monkeypatch.setattr(RowsByDatum, "__call__", counted)
    return found


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """Let rows cost nothing, as they nearly do for models that are not tiny."""
    for name in ("OPERATION", "ENTRY"):
        monkeypatch.setattr(_rows, name, 0)
    monkeypatch.setattr(_rows, "OVERHEAD", 0)
    monkeypatch.setattr(_rows.MatrixOfRows, "multiplies", 0)
    monkeypatch.setattr(_rows.ProductOfRows, "multiplies", 0)


MATRICES = {
    "ggn": (GGNLinearOperator, references.ggn),
    "ef": (EFLinearOperator, references.empirical_fisher),
}


# -- right ----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("sizes", [(N,), (10, 1, 13), (1,) * N])
def test_dense_matrices_are_those_of_all_data(build, name, sizes, pulls):
    args = problem(build, sizes=sizes)
    operator, reference = MATRICES[name]
    A, dense = operator(*args), reference(*args)
    assert_close(A.to_dense(), dense, size=4096)
    assert pulls
    assert len(kept(A)) == 1
    V = torch.randn(len(dense), 9).double()
    B = operator(*args)
    assert_close(B @ V, dense @ V, size=4096)


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("sizes", [(N,), (10, 1, 13)])
def test_jacobians_and_their_transposes(build, sizes, pulls):
    net, _, params, data = problem(build, sizes=sizes)
    dense = references.jacobian(net, params, data)
    risk = EmpiricalRisk(net, nn.CrossEntropyLoss(), params, data)
    J = JacobianLinearOperator(risk)
    assert_close(J.to_dense(), dense, size=4096)
    number = len(pulls)
    assert number > 0
    assert_close(J.T.to_dense(), dense.T, size=4096)
    G = GGNLinearOperator(risk).to_dense()
    expected = references.ggn(net, nn.CrossEntropyLoss(), params, data)
    assert_close(G, expected, size=4096)
    assert len(pulls) == number  # the Jacobian was known
    JT = TransposedJacobianLinearOperator(net, params, data).to_dense()
    assert_close(JT, dense.T, size=4096)


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_sampled_matrices_are_those_of_single_products(samples, pulls):
    args = problem()
    A, B = (FisherMCLinearOperator(*args, mc_samples=samples) for _ in range(2))
    B.fix_route("plain")
    assert_close(A.to_dense(), B.to_dense(), size=4096)
    assert {shape[1] for shape in pulls} == {min(samples, 3)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_with_options_and_of_users(reduction):
    weight = torch.tensor([0.3, 1.0, 2.0]).double()
    options = {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1}

    def own(output, target):
        return nn.functional.cross_entropy(output, target, reduction=reduction)

    own.reduction = reduction
    for loss in (nn.CrossEntropyLoss(reduction=reduction, **options), own):
        args = problem(loss=loss)
        for operator, reference in MATRICES.values():
            assert_close(operator(*args).to_dense(), reference(*args), size=4096)


def test_chunks_give_the_same(monkeypatch, pulls):
    args = problem(cnn)
    expected = references.ggn(*args)
    monkeypatch.setattr(_rows, "CHUNK_BYTES", 6 * 8 * expected.shape[0])
    A = GGNLinearOperator(*args)
    assert_close(A.to_dense(), expected, size=4096)
    assert len(pulls) >= N  # each datum has three vectors, and graphs besides


# -- kept ------------------------------------------------------------------------------


def test_a_second_call_computes_nothing_and_belongs_to_the_caller(pulls):
    args = problem()
    A = GGNLinearOperator(*args)
    first = A.to_dense()
    number, calls = len(pulls), []
    args[0][1].forward = lambda x: calls.append(1) or torch.tanh(x)
    first.zero_()
    del args[0][1].forward
    assert_close(A.to_dense(), references.ggn(*args), size=4096)
    V = torch.eye(len(first)).double()[:, :10]
    assert torch.equal(A @ V, A.to_dense()[:, :10])
    assert len(pulls) == number
    assert not calls
    assert A.status().matrix
    assert A.status().held >= first.nbytes


def test_other_parameters_are_seen():
    args = problem()
    A = GGNLinearOperator(*args)
    A.to_dense()
    with torch.no_grad():
        args[0][0].weight.mul_(2)
    assert_close(A.to_dense(), references.ggn(*args), size=4096)


def test_without_a_budget_nothing_is_kept(pulls):
    args = problem()
    A = GGNLinearOperator(*args, cache="off")
    for _ in range(2):
        assert_close(A.to_dense(), references.ggn(*args), size=4096)
    assert not kept(A)
    assert pulls


def test_the_users_model_and_states_are_left_alone():
    args = problem(cnn)
    before = torch.get_rng_state(), [p.clone() for p in args[0].parameters()]
    A = GGNLinearOperator(*args)
    A.to_dense()
    assert torch.equal(torch.get_rng_state(), before[0])
    for p, q in zip(args[0].parameters(), before[1], strict=True):
        assert p.grad is None
        assert torch.equal(p, q)


# -- refused ---------------------------------------------------------------------------


class Centred(nn.Module):
    def forward(self, x):
        return x - 0.1 * x.mean(0)


class AsksForNumbers(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 1e9 else x


@pytest.mark.parametrize("kind", [Centred, AsksForNumbers])
def test_models_that_cannot_be_taken_apart_are_multiplied_plainly(kind):
    args = problem(lambda: mlp(kind()))
    A = GGNLinearOperator(*args)
    for _ in range(2):
        assert_close(A.to_dense(), references.ggn(*args), size=4096)
    assert not kept(A)
    assert not A.risk.model.by_datum  # it is not tried again


class Scattered:
    reduction = "sum"

    def __call__(self, output, target):
        return ((output - output.mean(0)) ** 2).sum() + (output - target).square().sum()


@pytest.mark.parametrize("jacobian_first", [False, True])
def test_losses_that_couple_data_are_multiplied_plainly(jacobian_first):
    net, _, params, data = problem(sizes=(N,))
    data = [(X, torch.randn(len(X), 3).double()) for X, _ in data]
    loss = Scattered()
    risk = EmpiricalRisk(net, loss, params, data)
    if jacobian_first:
        JacobianLinearOperator(risk).to_dense()
        assert risk._rows.matrices
    G = GGNLinearOperator(risk)
    assert_close(G.to_dense(), references.ggn(net, loss, params, data), size=4096)


class Typed(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.parametrize("jacobian_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_outputs_of_another_type_than_parameters(dtype, jacobian_first):
    net, loss, _, data = problem()
    data = [(X.float(), y) for X, y in data]
    net = nn.Sequential(net.float(), Typed(dtype))
    params = dict(net.named_parameters())
    risk = EmpiricalRisk(net, loss, params, data)
    if jacobian_first:
        JacobianLinearOperator(risk).to_dense()
    G, B = GGNLinearOperator(risk), GGNLinearOperator(net, loss, params, data)
    B.fix_route("plain")
    wide = dtype is torch.float64
    dense = B.to_dense()
    assert_close(G.to_dense(), dense, size=4096)
    D = GGNDiagonalLinearOperator(risk).diagonal()
    tolerance = 1e-5 if wide else 16 * torch.finfo(dtype).eps
    assert float((D - dense.diag()).norm() / dense.diag().norm()) < tolerance
    assert bool(kept(G)) == wide


@pytest.mark.parametrize("row", [0, N - 1])
def test_one_wrong_row_is_noticed(monkeypatch, row):
    args, call = problem(sizes=(N,)), RowsByDatum.__call__

    def wrong(self, part):
        rows = call(self, part)
        rows[row, 1] *= 1 + 1e-6
        return rows

    monkeypatch.setattr(RowsByDatum, "__call__", wrong)
    A = GGNLinearOperator(*args)
    assert_close(A.to_dense(), references.ggn(*args), size=4096)
    assert not kept(A)


def test_bounds_and_fixed_routes_are_heeded(pulls):
    args = problem()
    bounded = GGNLinearOperator(*args, max_memory=10**8)
    fixed = GGNLinearOperator(*args)
    fixed.fix_route("plain")
    for A in (bounded, fixed):
        assert_close(A.to_dense(), references.ggn(*args), size=4096)
        assert not kept(A)
    assert not pulls


def test_costs_are_counted(monkeypatch, pulls):
    monkeypatch.undo()
    torch.manual_seed(0)

    def to_dense(outputs, number):
        net = nn.Linear(30, outputs)
        data = [(torch.rand(number, 30), torch.randint(outputs, (number,)))]
        args = net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data
        A = GGNLinearOperator(*args)
        A.to_dense()
        return bool(kept(A))

    assert to_dense(4, 500)
    assert not to_dense(60, 500)  # sixty passes, and matrices that are as tall
    assert not to_dense(1, 4)


def test_few_columns_and_many_outputs_are_left_to_products(monkeypatch, pulls):
    args = problem()
    A = GGNLinearOperator(*args, check_deterministic=False)
    A @ torch.ones(A.shape[1], _rows.LEAST_COLUMNS - 1).double()
    assert not pulls
    monkeypatch.setattr(_rows, "MOST_OUTPUTS", 2)
    A.to_dense()
    assert not kept(A)
