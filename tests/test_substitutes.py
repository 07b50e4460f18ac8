"""Functions of torch whose higher derivatives are wrong, and what serves instead.

References are models with the normalisation written out.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import references
from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    _substitutes,
)
from tolerances import assert_close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class WrittenOut(nn.Module):
    """Subtracts the mean over some axes and divides by the standard deviation."""

    def __init__(self, *dims):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(4))
        self.dims = dims

    def forward(self, x):
        centred = x - x.mean(self.dims, keepdim=True)
        variance = centred.square().mean(self.dims, keepdim=True)
        x = centred / (variance + 1e-5).sqrt()
        if self.dims == (2,):
            return x * self.weight[:, None] + self.bias[:, None]
        return x * self.weight + self.bias


class Direct(WrittenOut):
    """Calls torch's function without the detour of `torch.nn.functional`."""

    def forward(self, x):
        return torch.layer_norm(x, (4,), self.weight, self.bias)


def by_grad(u, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]


def by_grad_twice(u, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    return h


def by_func(u, x):
    return torch.func.vmap(torch.func.grad(lambda z: u(z[None])[0, 0]))(x)


def by_jacrev(u, x):
    return torch.func.jacrev(lambda z: u(z).sum(0))(x)[0]


def by_jvp(u, x):
    return torch.func.jvp(u, (x,), (torch.ones_like(x),))[1]


def by_functional(u, x):
    create = {"create_graph": True}
    return torch.autograd.functional.jacobian(lambda z: u(z).sum(0), x, **create)[0]


class Residual(nn.Module):
    """A network that itself differentiates by its input."""

    def __init__(self, normalisation, differentiate):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)
        self.normalisation, self.differentiate = normalisation, differentiate

    def u(self, x):
        h = self.a(x)
        if isinstance(self.normalisation, nn.InstanceNorm1d) or (
            getattr(self.normalisation, "dims", None) == (2,)
        ):
            h = self.normalisation(h[:, :, None] * h.new_tensor([1.0, 2.0, -1.0])).sum(
                2
            )
            return self.b((h + self.a(x)).tanh())
        return self.b(self.normalisation(h).tanh())

    def forward(self, x):
        derivative = self.differentiate(self.u, x)
        return torch.cat([self.u(x), derivative.reshape(len(x), -1)], 1)


def alike(normalisation, written, differentiate):
    """Return a problem, and the same with the normalisation written out."""
    problems = []
    for part in (normalisation, written):
        model = Residual(part, differentiate).double()
        torch.manual_seed(1)
        for p in model.parameters():
            p.data.copy_(torch.randn_like(p))
        X = torch.randn(3, 2, dtype=torch.float64)
        data = [(X, torch.randn_like(model(X)))]
        problems.append((model, nn.MSELoss(), dict(model.named_parameters()), data))
    return problems


@pytest.mark.parametrize("kind", [lambda: nn.LayerNorm(4), lambda: Direct(-1)])
@pytest.mark.parametrize(
    "differentiate", [by_grad, by_grad_twice, by_func, by_jacrev, by_jvp, by_functional]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_layer_norm_where_the_model_differentiates(differentiate, kind):
    problem, written = alike(kind(), WrittenOut(-1), differentiate)
    for operator, dense in (
        (HessianLinearOperator, references.hessian),
        (GGNLinearOperator, references.ggn),
    ):
        A, expected = operator(*problem), dense(*written)
        assert_close(A.to_dense(), expected, size=2000)


@pytest.mark.parametrize("differentiate", [by_grad, by_grad_twice])
@pytest.mark.parametrize(
    "kind, dims",
    [
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), 0),
        (lambda: nn.BatchNorm1d(4), 0),
        (lambda: nn.InstanceNorm1d(4, affine=True), 2),
        (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 2),
    ],
)
def test_statistics_of_a_batch_where_the_model_differentiates(
    kind, dims, differentiate
):
    problem, written = alike(kind(), WrittenOut(dims), differentiate)
    H = HessianLinearOperator(*problem, check_deterministic=False)
    assert_close(H.to_dense(), references.hessian(*written), size=2000)


def test_running_statistics_are_kept_as_torch_does():
    x = torch.randn(5, 4, 3)
    for norm in (F.batch_norm, F.instance_norm):
        stats = [(torch.ones(4), torch.ones(4)) for _ in range(2)]
        options = {"training": True} if norm is F.batch_norm else {}
        y = norm(x, *stats[0], momentum=0.3, **options)
        other = _substitutes._IN_DERIVATIVES[norm](
            x, *stats[1], momentum=0.3, **options
        )
        assert_close(other, y, torch.float32, size=50)
        assert all(map(torch.equal, *stats))


def test_plain_models_keep_the_kernels_of_torch():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    net, X = net.double(), torch.randn(3, 2).double()
    problem = (
        net,
        nn.MSELoss(),
        dict(net.named_parameters()),
        [(X, torch.ones_like(net(X)))],
    )
    with mock.patch.object(_substitutes, "_standardised", side_effect=AssertionError):
        H = HessianLinearOperator(*problem).to_dense()
        G = GGNLinearOperator(*problem).to_dense()
    assert_close(H, references.hessian(*problem), size=500)
    assert_close(G, references.ggn(*problem), size=500)


def test_a_model_that_writes_into_its_input_is_evaluated_twice():
    class Writing(Residual):
        def forward(self, x):
            x.mul_(2.0)
            return super().forward(x)

    net = Writing(nn.LayerNorm(4), by_grad).double()
    X = torch.randn(3, 2).double()
    written = Residual(WrittenOut(-1), by_grad).double()
    written.load_state_dict(net.state_dict())
    data = [(X, torch.zeros(3, 3).double())]
    H = HessianLinearOperator(net, nn.MSELoss(), dict(net.named_parameters()), data)
    data = [(2 * X, data[0][1])]
    problem = written, nn.MSELoss(), dict(written.named_parameters()), data
    assert_close(H.to_dense(), references.hessian(*problem), size=500)


def third(function, x, v):
    """Return a directional derivative of third order, or of second."""
    x = x.clone().requires_grad_()
    y = function(x)
    y = (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
    for w in v:
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        y = (g * w).sum()
    return y.detach()


@pytest.mark.parametrize(
    "function, substitute",
    [
        (lambda x: F.layer_norm(x, (5,)), _substitutes._layer_norm),
        (
            lambda x: F.batch_norm(x, None, None, training=True),
            _substitutes._batch_norm,
        ),
        (lambda x: F.instance_norm(x[None]), _substitutes._instance_norm),
    ],
)
def test_torch_is_still_wrong(function, substitute):
    """Where this fails, the substitute is no longer needed."""
    x, *v = torch.randn(4, 3, 5, dtype=torch.float64)
    ahead, behind = (third(function, x + s * v[2], v[:2]) for s in (1e-5, -1e-5))
    expected = (ahead - behind) / 2e-5
    try:
        found = third(function, x, v)
    except RuntimeError as error:  # torch 2.14
        assert "3rd" in str(error)
    else:
        assert abs(found - expected) > 1e-3 * abs(expected)
    with _substitutes.Substitutions(differentiates=True):
        found = third(function, x, v)
    assert abs(found - expected) < 1e-6 * abs(expected)


# -- where torch's derivative of a linear function is not finite ----------------------


@pytest.mark.parametrize("columns", ["single", "block", "transposed"])
def test_products_where_a_formula_does_not_exist_at_zero(columns):
    def model(p: dict, X: Tensor) -> Tensor:
        return torch.logcumsumexp(X @ p["w"], 1)

    params = {"w": torch.randn(3, 4, dtype=torch.float64)}
    data = [(torch.randn(n, 3, dtype=torch.float64), None) for n in (5, 2)]
    J, expected = (
        JacobianLinearOperator(model, params, data),
        references.jacobian(
            lambda p, X: (X @ p["w"]).exp().cumsum(1).log(), params, data
        ),
    )
    V = torch.randn(12, 3, dtype=torch.float64)
    if columns == "single":
        found = torch.stack([J @ v for v in V.T], 1)
    else:
        found = J @ V
    assert (found - expected @ V).abs().max() < 1e-8


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_standard_deviation_of_equal_entries(cache):
    """Its derivative is zero there, to torch: the others count."""
    net = nn.Linear(3, 4, bias=False).double()
    net.weight.data[:] = torch.randn(1, 3)  # equal outputs ...

    def model(p: dict, X: Tensor) -> Tensor:
        h = X @ p["w"].T
        return torch.cat([h.std(1, keepdim=True), (h + X[:, :1]).tanh()], 1)

    def plain(p: dict, X: Tensor) -> Tensor:  # ... whose deviation contributes nothing
        h = X @ p["w"].T
        return torch.cat([0 * h[:, :1], (h + X[:, :1]).tanh()], 1)

    params = {"w": net.weight.detach()}
    data = [(torch.randn(5, 3).double(), torch.randn(5, 5).double())]
    J = JacobianLinearOperator(model, params, data, cache=cache)
    dense = references.jacobian(plain, params, data)
    G = GGNLinearOperator(model, nn.MSELoss(), params, data, cache=cache)
    ggn = references.ggn(plain, nn.MSELoss(), params, data)
    for _ in range(4):
        v = torch.randn(12, dtype=torch.float64)
        assert_close(J @ v, dense @ v, size=200)
        assert_close(G @ v, ggn @ v, size=200)
    assert_close(J @ torch.eye(12).double(), dense, size=200)


def test_sparse_gradients():
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Linear(3, 2))
    net, X = net.double(), torch.tensor([0, 3, 3, 1])
    data = [(X, torch.randn(4, 2).double())]
    problem = net, nn.MSELoss(), dict(net.named_parameters()), data
    H, G = HessianLinearOperator(*problem), GGNLinearOperator(*problem)
    net[0].sparse = False
    for A, dense in ((H, references.hessian(*problem)), (G, references.ggn(*problem))):
        net[0].sparse = True
        assert_close(A @ torch.ones(23).double(), dense.sum(1), size=200)
        net[0].sparse = False


# Embeddings whose gradients are sparse, or that are summed by torch

IDS = torch.tensor(
    [[0, 3, 3, 5], [6, 1, 2, 2], [4, 4, 0, 1], [5, 6, 6, 6], [2, 0, 1, 3]]
)


class Words(nn.Module):
    """Averages embeddings; the rest is the same for all."""

    def __init__(self, options, padding=None, tied=False):
        super().__init__()
        self.embed = nn.Embedding(7, 3, padding_idx=padding, **options)
        self.last = nn.Linear(3, 7 if tied else 2, bias=not tied)
        if tied:
            self.last.weight = self.embed.weight

    def forward(self, x):
        return self.last(torch.tanh(self.embed(x)).mean(1))


class Straight(Words):
    """Calls torch's function without the detour of `torch.nn.functional`."""

    def forward(self, x):
        weight = self.embed.weight
        rows = torch.embedding(weight, x, -1, False, self.embed.sparse)
        return self.last(torch.tanh(rows).mean(1))


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Words, {}),
        (Words, {"padding": 3}),
        (Words, {"tied": True}),
        (Straight, {}),
    ],
)
def test_sparse_gradients_are_the_dense_ones(kind, options, cache):
    sparse, dense = (kind({"sparse": s}, **options).double() for s in (True, False))
    sparse.load_state_dict(dense.state_dict())
    data = [(IDS[:2], torch.tensor([0, 1])), (IDS[2:], torch.tensor([1, 0, 1]))]
    loss = nn.CrossEntropyLoss()
    its, own = (dict(m.named_parameters()) for m in (dense, sparse))
    for cls, reference in (
        (HessianLinearOperator, references.hessian),
        (GGNLinearOperator, references.ggn),
        (EFLinearOperator, references.empirical_fisher),
    ):
        A = cls(sparse, loss, own, data, cache=cache)
        for _ in range(3):
            assert_close(A.to_dense(), reference(dense, loss, its, data))
        assert A.verify().ok
    J = JacobianLinearOperator(sparse, own, data, cache=cache)
    assert_close(J.to_dense(), references.jacobian(dense, its, data))
    options = {"fisher_type": "type-2", "unsupported": "diagonal"}
    A, B = (
        KFACLinearOperator(m, loss, p, data, **options)
        for m, p in ((sparse, own), (dense, its))
    )
    assert_close(A.to_dense(), B.to_dense())


class Bag(nn.Module):
    def __init__(self, by_offsets=False, **options):
        super().__init__()
        self.embed = nn.EmbeddingBag(7, 3, **options)
        self.last = nn.Linear(3, 2)
        self.by_offsets = by_offsets

    def forward(self, x):
        weights = None
        if self.embed.mode == "sum":
            weights = torch.linspace(0.5, 1.5, x.numel()).to(self.last.weight)
            weights = weights.reshape(x.shape)
        if not self.by_offsets:
            return self.last(torch.tanh(self.embed(x, per_sample_weights=weights)))
        offsets = torch.arange(0, x.numel(), x.shape[1])
        flat = None if weights is None else weights.flatten()
        return self.last(torch.tanh(self.embed(x.flatten(), offsets, flat)))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("by_offsets", [True, False])
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"padding_idx": -1}])
def test_bags_of_embeddings(mode, by_offsets, options):
    """Compared with differences: torch has no second derivative of these."""
    model = Bag(by_offsets, mode=mode, **options).double()
    data = [(IDS[:2], torch.rand(2, 2)), (IDS[2:], torch.rand(3, 2))]
    data = [(X, y.double()) for X, y in data]
    params, loss = dict(model.named_parameters()), nn.MSELoss()
    dense = Bag(by_offsets, mode=mode, **{**options, "sparse": False}).double()
    dense.load_state_dict(model.state_dict())
    its = dict(dense.named_parameters())
    H = HessianLinearOperator(model, loss, params, data)
    expected = references.central_differences_hessian(dense, loss, its, data)
    assert_close(H.to_dense(), expected, exponent=2 / 3)
    J = JacobianLinearOperator(model, params, data)
    expected = references.jacobian(dense, its, data)
    assert_close(J.to_dense(), expected)
    G = GGNLinearOperator(model, loss, params, data)
    assert_close(G.to_dense(), 2 / len(expected) * expected.T @ expected)


def test_empty_bags_are_zero():
    class Empty(Bag):
        def forward(self, x):
            return self.embed(x, torch.tensor([0, 0, 3]))

    model = Empty(mode="mean").double()
    x = torch.tensor([1, 2, 3, 3])
    J = JacobianLinearOperator(model, [model.embed.weight], [(x, None)])
    assert_close(
        J.to_dense(),
        references.jacobian(model, {"embed.weight": model.embed.weight}, [(x, None)]),
    )
