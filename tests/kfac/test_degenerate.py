"""Singular factors, flat losses, groups of unlike size, weights that are none."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numpy.linalg import LinAlgError
from torch import nn
from torch.nn.utils import parametrizations, prune

import references
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from tolerances import assert_close

EXACT = {"fisher_type": "type-2"}
FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator


# Singular factors


def classes(seed, dtype, sizes, C=3):
    """Return a problem whose gradients by the outputs sum to zero over classes."""
    torch.manual_seed(seed)
    net = nn.Linear(4, C).to(dtype)
    data = [(torch.randn(n, 4, dtype=dtype), torch.randint(C, (n,))) for n in sizes]
    return net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [[5], [7, 40], [1000]])
def test_singular_factors_have_no_inverse(dtype, sizes):
    for seed in range(20):
        K = KFACLinearOperator(*classes(seed, dtype, sizes), **EXACT)
        for options in (
            {},
            {"use_exact_damping": True},
            {"use_heuristic_damping": True, "min_damping": 0.0},
            {"damping": (0.1, 0.0)},
            {"damping": {"weight": 0.1, "bias": 0.0}},
            {"retry_double_precision": False},
        ):
            with pytest.raises(LinAlgError, match=r"singular.*larger `damping`"):
                K.inverse(**options)
        with pytest.raises(LinAlgError, match="singular"):
            KFACInverseLinearOperator(K).to_dense()
        with pytest.raises(LinAlgError, match="singular"):
            EKFACLinearOperator(K.risk, **EXACT).inverse()


def test_damping_that_is_lost_in_rounding_does_not_count():
    net, _, params, data = classes(0, torch.float32, [50])
    loss = nn.CrossEntropyLoss(reduction="sum")
    K = KFACLinearOperator(net, loss, params, data, **EXACT)
    for options in ({"damping": 1e-9}, {"use_heuristic_damping": True}):
        with pytest.raises(LinAlgError, match="singular"):
            K.inverse(**options)


def test_damped_and_regular_factors_have_one():
    problem = classes(0, torch.float64, [50])
    K = KFACLinearOperator(*problem, separate_weight_and_bias=False, **EXACT)
    (factors,) = K.factors().values()
    eye = torch.eye(3).double(), torch.eye(5).double()
    for options, dampings in (
        ({"damping": (0.0, 1e-3)}, (1e-3, 0.0)),
        ({"damping": 1e-6}, (1e-6, 1e-6)),
        ({"use_heuristic_damping": True}, (1e-8, 1e-8)),
    ):
        inverse = K.inverse(**options).block_of("weight").to_dense()
        expected = torch.kron(
            *(
                torch.linalg.inv(f + d * i)
                for f, d, i in zip(
                    (factors.output, factors.input), dampings, eye, strict=True
                )
            )
        )
        assert torch.dist(inverse, expected) < 1e-6 * expected.norm()


# Losses without second derivative


def log_probabilities(sizes=(4, 2)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    data = [(torch.randn(n, 4).double(), torch.arange(n) % 3) for n in sizes]
    return net, dict(net.named_parameters()), data


class OwnLoss(nn.NLLLoss):
    """A subclass, of which nothing is known."""


FLAT = {
    "known": nn.NLLLoss(),
    "subclass": OwnLoss(),
    "function": lambda f, y: F.nll_loss(f, y),
    "with the number of terms": lambda f, y: -f.gather(1, y.unsqueeze(1)).mean(),
    "product": lambda f, y: -(f * F.one_hot(y, 3)).sum(1).mean(),
    "hinge": lambda f, y: (2 + f.gather(1, y.unsqueeze(1))).relu().mean(),
}
ZERO = {
    "GGN": GGNLinearOperator,
    "diagonal": GGNDiagonalLinearOperator,
    **{cls.__name__: partial(cls, **EXACT) for cls in FAMILY},
}


@pytest.mark.parametrize("make", ZERO.values(), ids=list(ZERO))
@pytest.mark.parametrize("name", list(FLAT))
def test_matrices_that_are_zero_say_so_once(name, make):
    net, params, data = log_probabilities()
    options = {"num_terms_fn": lambda f, y: len(y)} if "number" in name else {}
    with pytest.warns(UserWarning, match="linear") as said:
        A = make(net, FLAT[name], params, data, **options)
        assert not A.to_dense().any()
        assert not (A @ torch.ones(A.shape[1]).double()).any()
    (warning,) = said
    assert "logits" in str(warning.message)
    assert "CrossEntropyLoss" in str(warning.message)
    assert "empirical" in str(warning.message)


@pytest.mark.parametrize("name", list(FLAT))
def test_other_matrices_are_not_zero_and_do_not_say_so(name):
    net, params, data = log_probabilities()
    for make in (
        *(HessianLinearOperator, EFLinearOperator),
        *(partial(cls, fisher_type="empirical") for cls in FAMILY),
    ):
        assert make(net, FLAT[name], params, data).to_dense().any()


def square_of_some(f, y):
    """Curved where the class is zero only."""
    return (f.square().sum(1) * (y == 0) - f.sum(1)).mean()


CURVED = {
    "normalised once more": lambda f, y: F.cross_entropy(f, y),
    "of one datum": square_of_some,
}


@pytest.mark.parametrize("make", ZERO.values(), ids=list(ZERO))
@pytest.mark.parametrize("name", list(CURVED))
def test_losses_that_are_curved_somewhere(name, make):
    net, params, data = log_probabilities(sizes=(4, 2))
    if name == "of one datum":  # in the second batch
        data = [(X, y if len(y) == 2 else y.clamp(min=1)) for X, y in data]
    assert make(net, CURVED[name], params, data).to_dense().any()


def test_sampled_matrices_of_flat_losses():
    """Whoever brings a sampler knows what is sampled."""
    net, params, data = log_probabilities()

    def sampler(output, target, num_samples, generator):
        shape = num_samples, *output.shape
        return torch.randn(shape, generator=generator, dtype=output.dtype)

    options = {"sampler": sampler, "reduction": "mean"}
    for make in (partial(GGNLinearOperator, mc_samples=2), KFACLinearOperator):
        A = make(net, FLAT["function"], params, data, **options)
        assert A.to_dense().any()


# Groups


class CrossAttention(nn.Module):
    """Query and key are the same, the value is another: three groups."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, X):
        value = 2 * X.roll(1, -1) + 1
        y, _ = self.attention(X, X, value, need_weights=False)
        return self.last(y.mean(1))


@pytest.mark.parametrize(("seed", "N", "T"), [(25, 2, 4), (11, 3, 5), (53, 5, 5)])
def test_every_group_is_fitted(seed, N, T):
    """A group is as near as its leading singular triple, however small it is."""
    torch.manual_seed(seed)
    net = CrossAttention().double()
    with torch.no_grad():  # queries and keys begin alike
        for p in (net.attention.in_proj_weight, net.attention.in_proj_bias):
            p[4:8] = p[:4]
    data = [(torch.randn(N, T, 4).double(), torch.randint(3, (N,)))]
    params = {"attention.in_proj_weight": net.attention.in_proj_weight}
    problem = net, nn.CrossEntropyLoss(), params, data
    exact = references.ggn(*problem).reshape(3, 16, 3, 16)
    fitted = KFOCLinearOperator(*problem, **EXACT).to_dense().reshape(3, 16, 3, 16)
    for i in range(3):
        block = exact[i, :, i]
        rearranged = block.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 16)
        nearest = torch.linalg.svdvals(rearranged)[1:].norm()
        distance = torch.dist(block, fitted[i, :, i])
        assert nearest * (1 - 1e-9) <= distance <= nearest * (1 + 1e-5)


# Weights that are functions of parameters


def symmetric():
    class Symmetric(nn.Module):
        def forward(self, W):
            return W.triu() + W.triu(1).T

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.utils.parametrize.register_parametrization(net[0], "weight", Symmetric())
    return net


def tensors(**shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def module(net):
    return net, dict(net.named_parameters())


def weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's is deprecated
        return nn.utils.weight_norm(nn.Linear(4, 3))


#: Models, with those of the parameters that are not used themselves.
FUNCTIONS = {
    "scaled": lambda: (
        (lambda p, X: F.linear(X, 2 * p["W"]), tensors(W=(3, 4))),
        {"W": "mul"},
    ),
    "scaled bias": lambda: (
        (lambda p, X: F.linear(X, p["W"], 2 * p["b"]), tensors(W=(3, 4), b=3)),
        {"b": "mul"},
    ),
    "as long as the data": lambda: (
        (lambda p, X: F.linear(X, 2 * p["W"])[:, :3], tensors(W=(5, 4))),
        {"W": "mul"},
    ),
    "also used itself": lambda: (
        (
            lambda p, X: F.linear(X, p["W"]) + F.linear(X.tanh(), -1 * p["W"]),
            tensors(W=(3, 4)),
        ),
        {"W": "mul"},
    ),
    "low rank": lambda: (
        (
            lambda p, X: F.linear(X, p["W"] + 0.5 * (p["B"] @ p["A"])),
            tensors(W=(3, 4), B=(3, 2), A=(2, 4)),
        ),
        {"W": "add", "B": "matmul", "A": "matmul"},
    ),
    "masked": lambda: (
        (lambda p, X: F.linear(X, p["W"] * torch.ones(3, 4)), tensors(W=(3, 4))),
        {"W": "mul"},
    ),
    "logarithm": lambda: (
        (lambda p, X: X[:, :3] * p["s"].exp(), tensors(s=3)),
        {"s": "exp"},
    ),
    "convolution": lambda: (
        (
            lambda p, X: F.conv1d(X.unsqueeze(1), p["W"] / p["W"].norm()).mean(2),
            tensors(W=(3, 1, 2)),
        ),
        {"W": "norm"},
    ),
    "weight normalisation": lambda: (
        module(parametrizations.weight_norm(nn.Linear(4, 3))),
        {
            "parametrizations.weight.original0": "div",
            "parametrizations.weight.original1": "norm_except_dim",
        },
    ),
    "weight normalisation by a hook": lambda: (
        module(weight_norm()),
        {"weight_g": "div", "weight_v": "norm_except_dim"},
    ),
    "spectral normalisation": lambda: (
        module(parametrizations.spectral_norm(nn.Linear(4, 3)).eval()),
        {"parametrizations.weight.original": "flatten"},
    ),
    "orthogonal": lambda: (
        module(parametrizations.orthogonal(nn.Linear(4, 3))),
        {"parametrizations.weight.original": "tril"},
    ),
    "pruned": lambda: (
        module(prune.l1_unstructured(nn.Linear(4, 3), "weight", 3)),
        {"weight_orig": "mul"},
    ),
    "symmetric": lambda: (
        module(symmetric()),
        {"0.parametrizations.weight.original": "triu"},
    ),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("cls", FAMILY)
def test_functions_of_a_weight_are_named(name, cls):
    torch.manual_seed(0)
    (model, params), expected = FUNCTIONS[name]()
    data = [(torch.randn(5, 4), torch.randn(5, 3))]
    problem = model, nn.MSELoss(), params, data
    with pytest.raises(ValueError, match=r"function of the weight") as raised:
        cls(*problem, **EXACT).to_dense()
    message = str(raised.value)
    for parameter, function in expected.items():
        assert f"{parameter!r} in `{function}`" in message
    assert "positions.expand" not in message
    assert "remove_parametrizations" in message
    # What the message names is all that keeps the rest from being understood.
    rest = {n: p for n, p in params.items() if n not in expected}
    if rest and isinstance(model, nn.Module):
        cls(model, nn.MSELoss(), rest, data, **EXACT).to_dense()


def test_what_the_message_says_to_do():
    X, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    params = {n: p.double() for n, p in tensors(W=(3, 4), B=(3, 2), A=(2, 4)).items()}

    def model(p, X):
        low_rank = F.linear(F.linear(X, p["A"]), p["B"])
        return 2 * F.linear(X, p["W"]) + low_rank

    problem = model, nn.MSELoss(), params, [(X, y)]
    A = EKFACLinearOperator(*problem, **EXACT)
    assert_close(A.trace(), references.ggn(*problem).trace(), size=1000)

    net = parametrizations.weight_norm(nn.Linear(4, 3).double())
    nn.utils.parametrize.remove_parametrizations(net, "weight")
    problem = net, nn.MSELoss(), dict(net.named_parameters()), [(X, y)]
    A = EKFACLinearOperator(*problem, **EXACT)
    assert_close(A.trace(), references.ggn(*problem).trace(), size=1000)


def test_positions_are_told_apart_from_weights():
    def model(p, X):
        positions = F.embedding(torch.arange(2), p["P"])
        return (F.embedding(X, p["E"]) + positions).mean(1)

    data = [(torch.randint(6, (5, 2)), torch.randn(5, 3))]
    params = tensors(E=(6, 3), P=(2, 3))
    with pytest.raises(ValueError, match=r"'P' \(no axis.*positions.expand") as raised:
        KFACLinearOperator(model, nn.MSELoss(), params, data, **EXACT).to_dense()
    assert "function of the weight" not in str(raised.value)


# Terms of losses that are not known


@pytest.mark.parametrize("terms", [None, 3])
def test_a_datum_is_one_term_of_an_unknown_loss(terms):
    """The gradients of a datum's tokens are added up before they are squared."""
    torch.manual_seed(0)
    N, T, C = 4, 3, 5
    net = nn.Linear(4, C).double()
    params = dict(net.named_parameters())
    data = [(torch.randn(N, T, 4).double(), torch.randint(C, (N, T)))]

    def loss(f, y):
        return F.cross_entropy(f.flatten(0, 1), y.flatten())

    (X, y), D = data[0], N * (terms or 1)
    rows = []
    for n in range(N):
        value = loss(net(X[n : n + 1]), y[n : n + 1]) * (D / N)
        grads = torch.autograd.grad(value, list(params.values()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    expected = torch.stack(rows).T @ torch.stack(rows) / D
    options = {} if terms is None else {"num_per_example_loss_terms": terms}
    problem = net, loss, params, data
    assert_close(EFLinearOperator(*problem, **options).to_dense(), expected, size=1000)
    factored = {"fisher_type": "empirical", **options}
    E = EKFACLinearOperator(*problem, **factored)
    assert_close(E.trace(), expected.trace(), size=1000)

    # Where the loss is known, every token is a term.
    def swapped(p, X):
        return torch.func.functional_call(net, p, (X,)).mT

    tokens = swapped, nn.CrossEntropyLoss(), params, data
    expected = references.empirical_fisher(*tokens)
    E = EKFACLinearOperator(*tokens, fisher_type="empirical")
    assert_close(E.trace(), expected.trace(), size=1000)
    of_data = EFLinearOperator(*problem).to_dense().trace()
    assert abs(float(E.trace() / of_data) - 1) > 0.1


def test_risks_share_what_was_seen_of_their_loss():
    net, params, data = log_probabilities()
    risk = EmpiricalRisk(net, FLAT["product"], params, data)
    for make in ZERO.values():
        with pytest.warns(UserWarning, match="linear"):
            make(risk)
