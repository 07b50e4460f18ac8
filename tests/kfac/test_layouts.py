"""Whose the rows of layers and outputs are, however models sort, pack, or pick them."""

import warnings

import pytest
import torch
from layouts import CASES, WB, Case, W
from packing import ATTENTION, PROJECTIONS, attend, of_lengths, padded, raising
from test_geometry import KNOWN, block_of, exact_blocks
from test_ladder import blocks_only
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from cases import resplit
from curvlinops import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops._data import tensors_in
from tolerances import assert_close

FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator
QUIET = {"check_deterministic": False}

LOSS = nn.CrossEntropyLoss(reduction="sum")
NAMES = list(CASES)


def reference(case, params, batch, empirical):
    """Differentiate every row of the output on its own, and put the matrix together."""
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    X, y = batch
    f = case.model(leaves, X)
    wanted, rows = list(leaves.values()), []
    for entry in f.flatten():
        options = {"retain_graph": True, "materialize_grads": True}
        grads = torch.autograd.grad(entry, wanted, **options)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows).unflatten(0, f.shape)
    p = f.detach().softmax(-1)
    if empirical:
        G = torch.einsum("rc,rcd->rd", p - torch.eye(p.shape[1])[y], J)
        return G.T @ G
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("rcd,rce,ref->df", J, H, J)


def arrangements(case, data):
    """Return batches: together, in another order, of unequal sizes, and one by one."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    ways = [[data], [[data[i] for i in order]], [data[:-1], data[-1:]]]
    ways.append([[datum] for datum in data])
    return [
        [case.batch(part) for part in parts]
        for parts in ways
        if min(map(len, parts)) >= case.least
    ]


def options_of(case, **options):
    size = {} if case.size is None else {"batch_size_fn": case.size}
    return {**options, **size, "check_deterministic": False}


@pytest.fixture(params=NAMES)
def case(request):
    """A case, where a warning says that rows are sent back one by one."""
    case = CASES[request.param]
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", "It was not found which rows")
        yield case


@pytest.mark.parametrize(
    ("fisher_type", "bias"), [("type-2", "joint"), ("empirical", "alone")]
)
def test_blocks_are_exact(case, fisher_type, bias):
    """Rows give every datum's gradient, in whatever order data are."""
    params, data = case.build()
    for batches in arrangements(case, data)[:3]:
        problem = case.model, LOSS, params, batches
        size = {} if case.size is None else {"batch_size_fn": case.size}
        risk, blocks = exact_blocks(problem, fisher_type, bias, **size)
        empirical = fisher_type == "empirical"
        expected = sum(reference(case, params, batch, empirical) for batch in batches)
        assert sum(map(len, blocks)) == len(params)
        for names, block in blocks.items():
            assert_close(block, block_of(expected, risk.space, names), size=1000)


@pytest.mark.parametrize(
    ("fisher_type", "approx"),
    [("type-2", "expand"), ("empirical", "reduce"), ("forward-only", "reduce")],
)
def test_batches_make_no_difference(case, fisher_type, approx):
    """How data are put into batches, and in which order."""
    if approx == "reduce" and not (case.reduces and not case.warns):
        return
    params, data = case.build()
    options = options_of(case, fisher_type=fisher_type, kfac_approx=approx)
    first, *others = [
        KFACLinearOperator(case.model, LOSS, params, batches, **options).to_dense()
        for batches in arrangements(case, data)
    ]
    for other in others:
        assert_close(other, first, size=1000)


def test_corrections_are_those_of_the_matrix(case):
    """EKFAC has its trace; KFOC's products are as near in every arrangement."""
    params, data = case.build()
    options, distances = options_of(case, fisher_type="type-2"), []
    for batches in arrangements(case, data):
        arguments = case.model, LOSS, params, batches
        expected = sum(reference(case, params, b, empirical=False) for b in batches)
        E = EKFACLinearOperator(*arguments, **options)
        assert_close(E.trace(), expected.trace(), size=1000)
        K = KFOCLinearOperator(*arguments, **options, max_iter=40)
        distances.append((blocks_only(expected, K) - K.to_dense()).norm())
    largest = float(max(distances))
    assert largest - float(min(distances)) <= 1e-3 * largest + 1e-10


SPLITTABLE = [p for p in KNOWN if "splittable" in p.values[0].tags]


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("problem", SPLITTABLE)
def test_order_and_batches_make_no_difference(problem, approx):
    """The law of the family, for every kind of model that it understands."""
    model, loss, params, data = problem.build()
    size = sum(len(tensors_in(X)[0]) for X, _ in data)
    apart = resplit(data, [1] * size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    shuffled = [apart[i] for i in order]
    options = {"fisher_type": "type-2", "kfac_approx": approx}
    expected, *others = [
        KFACLinearOperator(
            *(model, loss, params, batches), **options, check_deterministic=False
        ).to_dense()
        for batches in (
            *(apart, resplit(data, [size]), resplit(shuffled, [size])),
            resplit(shuffled, [size - 1, 1]),
        )
    ]
    for other in others:
        assert_close(other, expected, size=100_000)


# Models whose data have parts in each other's outputs


def centred(p, X):
    h = (X @ p["w"]).tanh()
    return (h - h.mean(0)) @ p["v"]


def normalised(p, X):
    return F.batch_norm(X @ p["w"], None, None, training=True).tanh() @ p["v"]


def confused(p, X):
    """Attend along the data's axis."""
    own = {n: p[n] for n in PROJECTIONS}
    X = X.reshape(6, 1, 4)
    y, _ = functional_call(ATTENTION, own, (X, X, X), {"need_weights": False})
    return y[:, 0] @ p["u"]


COUPLED = {
    "negatives": (lambda p, X: (lambda z: z @ z.T)((X @ p["w"]).tanh()), {"w": (4, 3)}),
    "a mean": (centred, W),
    "a norm": (normalised, W),
    "a confused attention": (confused, {**PROJECTIONS, "u": (4, 2)}),
    "pairs": (
        lambda p, X: (
            (X @ p["w"]).tanh().unflatten(0, (-1, 2)).sum(1).repeat_interleave(2, 0)
            @ p["v"]
        ),
        W,
    ),
    "mirror images": (
        lambda p, X: ((h := X @ p["w"]) + h.flip(0)).tanh() @ p["v"],
        W,
    ),
    "all before": (lambda p, X: (X @ p["w"]).tanh().cumsum(0) @ p["v"], W),
    "the next": (
        lambda p, X: ((h := (X @ p["w"]).tanh()) + h.roll(-1, 0)) @ p["v"],
        W,
    ),
    "a parameter per datum": (
        lambda p, X: (X[:, None].expand(-1, 6, -1) + p["b"]).tanh().mean(1) @ p["u"],
        {"b": (6, 1, 4), "u": (4, 2)},
    ),
}


def random_parameters(shapes):
    torch.manual_seed(0)
    return {n: torch.randn(s).double() for n, s in shapes.items()}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("cls", FAMILY)
def test_data_that_are_coupled(name, cls):
    """Refused by name of the parameter and of the cause."""
    model, shapes = COUPLED[name]
    params = random_parameters(shapes)
    data = [(torch.randn(6, 4).double(), torch.randint(2, (6,)))]
    A = cls(model, LOSS, params, data, fisher_type="type-2", **QUIET)
    with pytest.raises(ValueError, match=r"does the model couple data.*`unsupported="):
        A.trace()


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize(
    "near",
    [
        lambda X: (torch.cdist(X, X) < 50).to(X),
        lambda X: (1 - torch.cdist(X, X) / 50).relu(),
    ],
)
def test_data_that_meet_some_others(cls, near):
    """One datum that is far from the others says nothing of them, nor do batches."""

    def model(p, X):
        return near(X) @ (X @ p["w"]).tanh() @ p["v"]

    params, y = random_parameters(W), torch.arange(6) % 2
    X = 0.1 * torch.randn(6, 4).double()
    X[:, 0] += 100 * torch.arange(6)
    options = {"fisher_type": "type-2", **QUIET}
    expected = reference(Case(model, W, list), params, (X, y), empirical=False).trace()
    found = EKFACLinearOperator(model, LOSS, params, [(X, y)], **options).trace()
    assert_close(found, expected, size=1000)
    meeting = X.clone()
    meeting[:4, 0] %= 100
    for batches in ([(meeting, y)], [(X, y), (meeting, y)]):
        A = cls(model, LOSS, params, batches, **options)
        with pytest.raises(ValueError, match="does the model couple data"):
            A.trace()


def test_rows_without_a_datum_are_not_assigned():
    """A mean over inputs needs to know whose they are: as many rows as data say not."""

    def model(p, X):
        h = torch.stack([(x @ p["w"] + p["b"]).tanh().sub(5 * x).relu() for x in X])
        return h.mean(1) @ p["v"]

    params = random_parameters({"w": (3, 3), "b": (3,), "v": (3, 2)})
    X, y = -torch.rand(3, 3, 3).double(), torch.arange(3) % 2
    options = {"fisher_type": "type-2", "kfac_approx": "reduce", **QUIET}
    for dead in (False, True):
        X[0] = 9 if dead else X[0]
        A = KFACLinearOperator(model, LOSS, params, [(X, y)], **options)
        if dead:
            with pytest.raises(ValueError, match=r"No output depends on some of the r"):
                A.trace()
            continue
        apart = [(X[i : i + 1], y[i : i + 1]) for i in range(3)]
        other = KFACLinearOperator(model, LOSS, params, apart, **options)
        assert_close(A.to_dense(), other.to_dense(), size=1000)


@pytest.mark.parametrize("cls", FAMILY)
def test_tables_as_long_as_the_batch(cls):
    """No axis of theirs counts data, and zeros hide nothing."""

    def model(p, X):
        h = X["x"] + F.embedding(X["places"], p["table"])
        return h.tanh().cumsum(1).mean(1) @ p["u"]

    params = random_parameters({"table": (3, 4), "u": (4, 2)})
    for table in (params["table"], params["table"] * 0):
        X = {"x": torch.randn(3, 3, 4).double(), "places": torch.arange(3)}
        arguments = model, LOSS, {**params, "table": table}, [(X, torch.arange(3) % 2)]
        with pytest.raises(ValueError, match=r"'table' \(.*`positions.expand"):
            cls(*arguments, fisher_type="type-2", batch_size_fn=lambda X: 3).trace()


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "mc"])
def test_rows_whose_data_are_not_found(fisher_type):
    """They are sent back one by one, with a warning: the trace is exact."""
    params = random_parameters(W)
    X, y = torch.randn(6, 3, 4).double(), torch.randint(2, (9,))

    def model(p, X):
        h = (X @ p["w"]).tanh()
        return (h + h.flip(0)).flatten(0, 1)[::2] @ p["v"]

    arguments = model, LOSS, params, [(X, y)]
    options = {"fisher_type": fisher_type, **QUIET}
    with pytest.warns(UserWarning, match=r"9 backward passes in place of one"):
        found = EKFACLinearOperator(*arguments, mc_samples=500, **options).trace()
    case = Case(model, W, list)
    expected = reference(case, params, (X, y), fisher_type == "empirical").trace()
    tolerance = 0.1 if fisher_type == "mc" else 1e-10
    assert abs(found - expected) <= tolerance * expected
    reduced = KFACLinearOperator(*arguments, **options, kfac_approx="reduce")
    with (
        pytest.warns(UserWarning, match="It was not found which rows"),
        pytest.raises(ValueError, match="no mean over them"),
    ):
        reduced.trace()


# Every batch is seen, at the cost of what is new about it


def counting(model, sizes):
    """Note the number of data that a model is evaluated on."""

    def counted(p, X):
        sizes.append(len(X))
        return model(p, X)

    return counted


def attended(p, X):
    return attend(X @ p["w"]).mean(1) @ p["v"]


def picked(p, X):
    return attend(X @ p["w"])[torch.arange(len(X)), X[:, :, 0].argmax(1)] @ p["v"]


@pytest.mark.parametrize(
    ("model", "batches", "alone"),
    [
        (attended, (5, 5, 5), [1]),
        (attended, (5, 5, 4), [1, 1]),
        (attended, (3, 1, 2), [1, 1, 1, 1]),
        (raising(2, attended), (5, 5), [1, 2]),
        (lambda p, X: attended(p, X) * float(X.isfinite().all()), (7, 7), [1, 3, 2, 2]),
        (lambda p, X: attended(p, X * (X > 0)), (5, 5), [1, 1]),
        (picked, (5, 5), []),
    ],
)
def test_what_finding_costs(model, batches, alone, monkeypatch):
    """A forward pass on few data for every new kind of batch.

    Where rows are picked by content, two passes back to the layers in each.
    """
    params, sizes, sent = random_parameters(W), [], []
    data = [(torch.randn(n, 3, 4).double(), torch.randint(2, (n,))) for n in batches]
    grad = torch.autograd.grad
    monkeypatch.setattr(
        *(torch.autograd, "grad", lambda *a, **kw: sent.append(1) or grad(*a, **kw))
    )
    K = KFACLinearOperator(counting(model, sizes), LOSS, params, data, **QUIET)
    K.risk.gradient_and_loss()
    sizes.clear()
    sent.clear()
    K.trace()
    for size in batches:
        sizes.remove(size)
    assert sizes == alone
    assert len(sent) == len(batches) * (1 if model is not picked else 3)


def test_batches_of_other_layouts():
    """A full batch comes first, then those of which rows are left out."""
    params = random_parameters(WB)
    model = CASES["masked rows"].model
    lengths = (3, 3, 3), (1, 3, 2), (2, 1, 3), (3, 1, 2)
    batches = []
    for each in lengths:
        y = torch.randint(2, (3,))
        batches.append((padded([torch.randn(n, 4).double() for n in each]), y))
    options = {"fisher_type": "type-2", "batch_size_fn": of_lengths, **QUIET}
    case = Case(model, WB, list)
    expected = sum(reference(case, params, batch, empirical=False) for batch in batches)
    E = EKFACLinearOperator(model, LOSS, params, batches, **options)
    assert_close(E.trace(), expected.trace(), size=1000)
