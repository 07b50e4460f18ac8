"""Every block's trace, top eigenvalue, norm and dimension, against dense blocks."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spectra import GUISES, Counting, symmetric

from curvlinops import (
    BlockDiagonalLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KroneckerProductLinearOperator,
    LayerSummary,
    layer_summary,
)
from curvlinops.plots import plot_layer_summary

QUANTITIES = ("trace", "top_eigenvalue", "frobenius_norm", "effective_dimension")


def network(dtype=torch.float64, hidden=30):
    """Return the risk of a trained network with two blocks of 600 rows."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Linear(20, hidden), torch.nn.Tanh()),
        *(torch.nn.Linear(hidden, 20), torch.nn.Tanh()),
        torch.nn.Linear(20, 5),
    ).to(dtype)
    data = [(torch.randn(n, 20).to(dtype), torch.randint(5, (n,))) for n in (60, 40)]
    loss = torch.nn.CrossEntropyLoss()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        sum(loss(net(x), y) for x, y in data).backward()
        optimiser.step()
    return EmpiricalRisk(net, loss, dict(net.named_parameters()), data)


RISK = network()
SLICES = dict(zip(RISK.space.names, RISK.space.slices(), strict=True))
#: Operators that name their blocks.
OPERATORS = {
    "GGN": GGNLinearOperator(RISK),
    "Hessian": HessianLinearOperator(RISK),
    "KFAC": KFACLinearOperator(RISK),
    "frozen KFAC": KFACLinearOperator(RISK).frozen(),
    "damped": GGNLinearOperator(RISK).damped(0.01),
    "difference": HessianLinearOperator(RISK) - 2 * GGNLinearOperator(RISK),
    "square": GGNLinearOperator(RISK) ** 2,
    "cast": GGNLinearOperator(RISK).to_scipy(np.float32),
}


def truth(D, places, damping):
    """Return the quantities of the dense blocks, of shape (blocks, 4)."""
    D, rows = np.asarray(D, np.float64), []
    for place in places:
        e = np.linalg.eigvalsh(D[place][:, place])
        dimension = (abs(e) / (abs(e) + damping)).sum()
        rows.append([e.sum(), e.max(), np.linalg.norm(e), dimension])
    return np.array(rows)


def inside(table, exact, slack=1e-9, level=0.95):
    """Return which intervals cover, of shape (blocks, 4)."""
    found = []
    for q, quantity in enumerate(QUANTITIES):
        low, high = table.confidence_interval(quantity, level)
        margin = slack * exact[:, max(q, 2)]  # rounding is relative to the norm
        found.append((low - margin <= exact[:, q]) & (exact[:, q] <= high + margin))
    return np.array(found).T


@pytest.mark.parametrize("name", OPERATORS)
def test_against_dense(name):
    A = OPERATORS[name]
    table = layer_summary(A, rng=0)
    assert table["name"].tolist() == list(SLICES)
    assert table["size"].tolist() == [s.stop - s.start for s in SLICES.values()]
    exact = truth(A.to_dense(), SLICES.values(), table.damping)
    single = name == "cast"
    assert inside(table, exact, 1e-4 if single else 1e-9, 0.999).all()
    multiplied_out = table["size"] <= 180
    for q, quantity in enumerate(QUANTITIES):
        errors = table[f"{quantity}_error"]
        assert (errors[multiplied_out] == 0).all() == (multiplied_out.any())
        assert (errors[~multiplied_out] > 0).all()
        if name in ("GGN", "KFAC"):
            assert (errors < 0.15 * abs(exact[:, q])).all()
    assert np.allclose(table["share"], table["trace"] / table["trace"].sum())
    largest = max(np.linalg.norm(A.to_dense()[s, s], 2) for s in SLICES.values())
    assert np.isclose(table.damping, 1e-3 * largest, rtol=1e-3)


def test_blocks_that_are_apart_share_a_column():
    """Kronecker-factored layers take steps in one column, coupled ones in theirs."""
    apart = layer_summary(OPERATORS["KFAC"], rng=0).num_products
    coupled = layer_summary(OPERATORS["GGN"], rng=0).num_products
    assert apart == 6 + 100 + 180  # is zero between? + largest small block + steps
    assert coupled == 6 + (30 + 20 + 100 + 5) + 2 * 180
    joint = KFACLinearOperator(RISK, separate_weight_and_bias=False)
    two = layer_summary(joint, ncv=20, num_repeats=8, rng=0)
    assert two.num_products == 6 + (100 + 30) + 180
    exact = truth(joint.to_dense(), SLICES.values(), two.damping)
    assert inside(two, exact, level=0.999).all()


def test_unbiased_whatever_is_split_off():
    """Traces and squared norms of steps far too few for eigenpairs, over 200 seeds."""
    A = symmetric(np.r_[np.linspace(-1, 1, 100), 5.0, 9.0, 30.0])
    A += 0.5 * np.ones_like(A)  # blocks send something to each other
    places = {"first": slice(0, 50), "last": slice(50, None)}
    exact = truth(A, places.values(), 1.0)
    tables = [layer_summary(A, 1.0, 3, 3, blocks=places, rng=s) for s in range(200)]
    for values, wanted in (
        ([t["trace"] for t in tables], exact[:, 0]),
        ([t["frobenius_norm"] ** 2 for t in tables], exact[:, 2] ** 2),
    ):
        errors = np.std(values, axis=0) / 200**0.5
        assert (abs(np.mean(values, axis=0) - wanted) < 4 * errors).all()


@pytest.mark.parametrize("guise", GUISES)
def test_any_matrix_with_given_blocks(guise):
    """Slices, indices in any order, gaps; the same numbers of every guise and block."""
    A = symmetric(np.r_[np.linspace(0, 1, 57), 2.0, 3.0, 5.0])
    odd = np.arange(1, 31, 2)[::-1]
    blocks = {"tail": slice(30, None), "odd": odd}
    kwargs = {"damping": 0.5, "ncv": 5, "num_repeats": 4, "blocks": blocks, "rng": 1}
    table = layer_summary(GUISES[guise](A), **kwargs)
    exact = truth(A, [np.arange(30, 60), odd], 0.5)
    assert inside(table, exact, level=0.999).all()
    assert table["trace_error"][0] > 0 == table["trace_error"][1]
    narrow = layer_summary(A, block_size=1, **kwargs)
    assert np.allclose(np.asarray(narrow), np.asarray(table), rtol=1e-9)


def test_groups_of_parameters_by_patterns():
    table = layer_summary(
        OPERATORS["GGN"], blocks={"in": "0.*", "out": ["4.weight", "4.bias"]}, rng=0
    )
    assert table["size"].tolist() == [630, 105]
    dense = OPERATORS["GGN"].to_dense()
    places = [slice(0, 630), slice(1250, 1355)]
    assert inside(table, truth(dense, places, table.damping), level=0.999).all()
    sub = layer_summary(OPERATORS["GGN"].block("4.*"), rng=0)
    assert sub["name"].tolist() == ["4.weight", "4.bias"]
    numbered = BlockDiagonalLinearOperator([torch.eye(3), 2 * torch.eye(2)])
    assert layer_summary(numbered)["top_eigenvalue"].tolist() == [1, 2]


def test_single_precision_and_dead_layers():
    risk = network(torch.float32)
    with torch.no_grad():
        risk.params["4.weight"].zero_()  # nothing below has any effect on the output
    table = layer_summary(GGNLinearOperator(risk), rng=0)
    assert table.row("0.weight")["trace"] == table.row("0.weight")["trace_error"] == 0
    assert table.row("0.weight")["effective_dimension"] == 0
    assert table["share"].sum() == pytest.approx(1) and table["share"][0] == 0
    zero = layer_summary(np.zeros((40, 40)), 1.0, 3, 3, blocks={"all": slice(None)})
    assert np.isnan(zero["share"]).all() and zero["frobenius_norm"][0] == 0


def test_the_table(monkeypatch):
    table = layer_summary(OPERATORS["GGN"], 0.01, rng=3)
    numbers = np.asarray(table)
    assert isinstance(table, LayerSummary) and len(table) == 6
    assert numbers.shape == (6, 10) and numbers.dtype == np.float64
    assert np.array_equal(numbers[:, 1], table["trace"])
    assert np.array_equal(np.array(table, np.float32), numbers.astype(np.float32))
    assert (table.damping, table.num_samples, table.seed) == (0.01, 8, 3)
    columns = json.loads(json.dumps(table.to_dict()))
    assert {name: column[2] for name, column in columns.items()} == table.row(
        "2.weight"
    )
    assert list(columns) == list(table.columns) and len(columns["name"]) == 6
    lines = str(table).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 7
    assert "2.weight" in lines[3] and f"{table['trace'][2]:.4g} +- " in lines[3]
    again = layer_summary(OPERATORS["GGN"], 0.01, rng=3)
    assert np.array_equal(np.asarray(again), numbers)
    with pytest.raises(ValueError, match="probability"):
        table.confidence_interval("trace", 1.0)

    class DataFrame(dict):
        def set_index(self, name):
            return name, self

    pandas = SimpleNamespace(DataFrame=DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert table.to_pandas() == ("name", table.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        table.to_pandas()


def test_it_is_drawn():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    table = layer_summary(OPERATORS["GGN"], 0.01, rng=3)
    ax = plot_layer_summary(table, figure.add_subplot())
    assert ax.images[0].get_array().shape == (6, 4)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(SLICES)


A = symmetric(np.arange(30.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_summary(A), "ndarray .* no named blocks"),
        (lambda: layer_summary(torch.from_numpy(A)), "no named blocks"),
        (
            lambda: layer_summary(KroneckerProductLinearOperator(torch.eye(3))),
            "KroneckerProduct.* no named blocks",
        ),
        (
            lambda: layer_summary(JacobianLinearOperator(RISK)),
            "square matrix is needed",
        ),
        (lambda: layer_summary(A, blocks={}), "no named blocks"),
        (lambda: layer_summary(A, blocks={"a": []}), "'a' is empty"),
        (
            lambda: layer_summary(OPERATORS["GGN"], blocks={"a": "conv*"}),
            "'a' is empty.*0.weight",
        ),
        (
            lambda: layer_summary(A, blocks={"a": slice(9), "b": [8, 20]}),
            "a, b overlap",
        ),
        (lambda: layer_summary(A, blocks={"a": [1.5]}), "'a' is empty, or no part"),
        (
            lambda: layer_summary(A, blocks={"a": [0, 10**6]}),
            "'a' is empty, or no part",
        ),
        (lambda: layer_summary(A, blocks={"a": [True]}), "'a' is empty, or no part"),
        (lambda: layer_summary(A, blocks={"a": None}), "'a' is empty, or no part"),
        (lambda: layer_summary(A, 0.0, blocks={"a": slice(9)}), "damping is above 0"),
        (lambda: layer_summary(A, np.inf, blocks={"a": slice(9)}), "and finite"),
        (lambda: layer_summary(A, ncv=0, blocks={"a": slice(9)}), "ncv"),
        (
            lambda: layer_summary(np.triu(A), 1.0, blocks={"a": slice(9)}),
            "Hermitian",
        ),
        (
            lambda: layer_summary(np.triu(A), 1.0, 2, 3, blocks={"a": slice(None)}),
            "Hermitian",
        ),
        (
            lambda: layer_summary(
                Counting(A, break_at=5), 1.0, 2, 3, blocks={"a": slice(None)}
            ),
            "NaN",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_and_tensors_are_blocks():
    mask = np.arange(len(A)) % 3 == 0
    options = {"ncv": 2, "num_repeats": 3, "rng": 0}
    tables = [
        layer_summary(A, blocks={"a": what}, **options)
        for what in (mask, np.flatnonzero(mask), torch.from_numpy(mask), mask.tolist())
    ]
    for table in tables:
        assert table["size"].tolist() == [mask.sum()]
        assert np.array_equal(np.asarray(table), np.asarray(tables[0]))


def test_blocks_have_names():
    with pytest.raises(TypeError, match="blocks is a dictionary"):
        layer_summary(A, blocks=["0.*"])
    table = layer_summary(A, ncv=2, num_repeats=3, blocks={"a": slice(9)}, rng=0)
    with pytest.raises(KeyError, match="No block 'b': there are a"):
        table.row("b")


HARD = {
    "GGN": lambda: (OPERATORS["GGN"].to_dense().numpy(), SLICES),
    "Hessian": lambda: (OPERATORS["Hessian"].to_dense().numpy(), SLICES),
    "coupled": lambda: hard_spectra(),
}


def hard_spectra():
    """Return blocks that decay, are flat, and indefinite with a triple top, coupled."""
    rng = np.random.default_rng(0)
    spectra = [np.geomspace(1e-8, 1, 400), np.linspace(0.5, 1.5, 400)]
    spectra.append(np.r_[np.full(3, 2.0), rng.uniform(-1, 1, 397)])
    D, V = np.zeros((1200, 1200)), 0.1 * rng.standard_normal((1200, 5))
    slices = {f"{i}": slice(400 * i, 400 * (i + 1)) for i in range(3)}
    for seed, (place, spectrum) in enumerate(
        zip(slices.values(), spectra, strict=True)
    ):
        D[place, place] = symmetric(spectrum, seed)
    return D + V @ V.T, slices


@pytest.mark.slow  # 3 minutes, all six
@pytest.mark.parametrize(("ncv", "num_repeats"), [(20, 8), (10, 3)])
@pytest.mark.parametrize("name", HARD)
def test_error_bars_cover(name, ncv, num_repeats):
    """In 43 to 50 of 50 seeds: every block, every quantity."""
    D, slices = HARD[name]()
    places = list(slices.values())
    exact, covered = truth(D, places, 1e-3), np.zeros((len(places), 4))
    A = torch.from_numpy(D)
    for seed in range(50):
        table = layer_summary(A, 1e-3, ncv, num_repeats, blocks=slices, rng=seed)
        covered += inside(table, exact)
    assert (covered >= 43).all()
