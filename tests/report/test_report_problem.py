"""From a line on the command line to a risk; what cannot be used says so."""

from pathlib import Path

import numpy as np
import pytest
import report_problems
import torch

from curvlinops import GGNLinearOperator
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._problem import (
    Choice,
    build,
    data_digest,
    describe,
    with_random_parameters,
)

FILE = Path(report_problems.__file__)


def choice(name, **options):
    return Choice(f"{FILE}:{name}", **options)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small", 43),
        ("with_params", 18),
        ("functional", 43),
        ("loader", 43),
        ("risk", 43),
        ("tokens", 143),
    ],
)
def test_what_functions_return(name, size):
    """Tuples of three or four, risks, loaders, attention on dict batches."""
    risk = build(choice(name))
    G = GGNLinearOperator(risk)
    assert G.shape == (size, size)
    problem = describe(risk, name, 0.1, (24, 2))
    assert problem.num_params == size
    assert problem.loss == "CrossEntropyLoss"
    gradient, loss = risk.gradient_and_loss()
    assert problem.loss_value == pytest.approx(float(loss))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert problem.gradient_norm == pytest.approx(float(norm))


def test_module_in_a_package(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    source = f"import sys\nsys.path.append({str(FILE.parent)!r})\n"
    source += "from report_problems import small\n"
    (tmp_path / "mine" / "models.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    risk = build(Choice("mine.models:small"))
    assert risk.space.dim == 43


def test_neighbours_of_a_file_can_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "neighbour_of_it.py").write_text(
        f"import sys\nsys.path.append({str(FILE.parent)!r})\n"
        "from report_problems import small"
    )
    path = tmp_path / "it.py"
    path.write_text("import neighbour_of_it\nfunction = neighbour_of_it.small")
    assert build(Choice(f"{path}:function")).space.dim == 43


BROKEN = "x = 1\ny = x +"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no-colon", "PROBLEM is path/to/file.py:function or package"),
        ("there/is/none.py:f", "There is no file there/is/none.py"),
        ("there.is.none:f", "There is no module there.is.none"),
        (f"{FILE}:absent", "has no 'absent'"),
        (f"{FILE}:NOT_A_FUNCTION", "is no function. It returns"),
        (f"{FILE}:raises", "raised ZeroDivisionError: no data today (line"),
        (f"{FILE}:two_things", "returned a tuple of 2. It returns (model, loss, data)"),
        (f"{FILE}:a_number", "returned an int. It returns (model, loss, data)"),
        (f"{FILE}:nan_data", "finite"),
        (f"{FILE}:no_params", "needs params: return (model, loss, params, data)"),
    ],
)
def test_mistakes_are_one_line(spec, message):
    with pytest.raises(MistakeError) as caught:
        build(Choice(spec))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_broken_file(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    with pytest.raises(MistakeError, match="raised SyntaxError"):
        build(Choice(f"{path}:f"))
    path.write_text("x = 1\n1 / 0")
    with pytest.raises(MistakeError, match=r"ZeroDivisionError.*\(line 2\)"):
        build(Choice(f"{path}:f"))


# -- options ---------------------------------------------------------------------------


def test_parameters_by_pattern():
    assert list(build(choice("small", params="2.*")).params) == ["2.weight", "2.bias"]
    assert list(build(choice("functional", params="*bias")).params) == [
        "0.bias",
        "2.bias",
    ]
    with pytest.raises(MistakeError, match=r"No parameter matches 'x\*'"):
        build(choice("small", params="x*"))


def test_precision():
    risk = build(choice("loader", dtype="float64"))
    assert risk.space.dtype == torch.float64
    wide = build(choice("loader", dtype="float64"))
    narrow = build(choice("loader"))
    assert float(wide.loss()) == pytest.approx(float(narrow.loss()), rel=1e-5)
    assert build(choice("small", dtype="float32")).space.dtype == torch.float32


def test_device_that_is_not_there():
    with pytest.raises(MistakeError, match="--device cuda:77 cannot be used here"):
        build(choice("small", device="cuda:77"))
    assert build(choice("small", device="cpu")).space.dim == 43


def test_weights(tmp_path):
    """A state dict is loaded, bare or under the usual key, also into a risk."""
    path = tmp_path / "weights.pt"
    state = {k: v + 1 for k, v in report_problems.network().state_dict().items()}
    for content in (state, {"state_dict": state, "epoch": 3}):
        torch.save(content, path)
        for name in ("small", "risk"):
            params = build(choice(name, weights=str(path))).params
            torch.testing.assert_close(params["0.weight"].detach(), state["0.weight"])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: None, "There is no file"),
        (lambda path: path.write_text("no"), "is no file of weights, as `torch.save"),
        (lambda path: torch.save({"x": torch.ones(1)}, path), "does not fit the model"),
    ],
)
def test_weights_that_are_none(tmp_path, harm, message):
    path = tmp_path / "weights.pt"
    harm(path)
    with pytest.raises(MistakeError, match=message):
        build(choice("small", weights=str(path)))
    with pytest.raises(MistakeError, match="--weights needs a model"):
        build(choice("functional", weights=str(path)))


def test_a_risk_takes_no_options():
    with pytest.raises(MistakeError, match="--params, --dtype would change"):
        build(choice("risk", params="0.*", dtype="float32"))


# -- what there is to say --------------------------------------------------------------


def test_random_parameters():
    """A copy: other values, reproducible, and the model stays as it is."""
    risk = build(choice("small"))
    before = {k: v.detach().clone() for k, v in risk.params.items()}
    states = torch.get_rng_state()
    fresh = [with_random_parameters(risk, seed) for seed in (1, 1, 2)]
    values = [torch.cat([p.flatten() for p in r.params.values()]) for r in fresh]
    assert torch.equal(values[0], values[1])
    assert not torch.isclose(values[0], values[2]).any()
    for name, value in risk.params.items():
        assert torch.equal(value, before[name])
        assert not torch.isclose(fresh[0].params[name], value).any()
    assert torch.equal(torch.get_rng_state(), states)
    assert float(fresh[0].loss()) != pytest.approx(float(risk.loss()), rel=1e-6)
    with pytest.raises(MistakeError, match="the model is no torch"):
        with_random_parameters(build(choice("functional")), 0)


def test_digest_of_data():
    """Neither order nor batches count; every bit does."""
    X, y = report_problems.numbers()
    whole = data_digest([(X, y)])
    assert whole[1:] == (24, 1)
    order = np.random.default_rng(0).permutation(24)
    mixed = [(X[order][a : a + 5], y[order][a : a + 5]) for a in range(0, 24, 5)]
    assert data_digest(mixed) == (whole[0], 24, 5)
    changed = X.clone()
    changed[3, 1] = torch.nextafter(changed[3, 1], torch.tensor(9.0).double())
    for other in ([(changed, y)], [(X, 1 - y)], [(X.float(), y)], [(X[:23], y[:23])]):
        assert data_digest(other)[0] != whole[0]
    uneven = data_digest([(X, torch.zeros(()))])
    assert uneven[1:] == (1, 1)


def test_shuffled_loaders_have_one_digest():
    risk = [build(choice("shuffled")) for _ in range(2)]
    assert data_digest(risk[0].data) == data_digest(risk[1].data)


def test_seeds_of_the_embedded_problem_share_its_data():
    """Two reports with other seeds differ in their parameters alone."""
    pytest.importorskip("sklearn")
    first, second = (build(Choice(seed=seed)) for seed in (0, 1))
    assert data_digest(first.data) == data_digest(second.data)
    pairs = zip(first.params.values(), second.params.values(), strict=True)
    assert not any(torch.equal(p, q) for p, q in pairs)
