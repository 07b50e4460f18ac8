"""Two reports side by side: what has changed, and what chance explains."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import report_problems
import torch
from torch import nn

from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    TensorLinearOperator,
    __version__,
)
from curvlinops.estimators import lanczos_approximate_spectrum
from curvlinops.report._checkpoint import Stages
from curvlinops.report._cli import main
from curvlinops.report._comparison import Change, Distance, compare, distance
from curvlinops.report._contents import Counts, Number
from curvlinops.report._files import load, save
from curvlinops.report._measure import Task, measure
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._problem import Choice
from curvlinops.report._rules import MEASURES, condition
from curvlinops.report._settings import Settings, to_toml
from report_samples import sample

FILE = Path(report_problems.__file__)
COUNTS = Counts(3, 80, 40, 8, 16, 6, 8, 20, 6, 4, 0, False)


def spectrum(values, seed, repeats=8):
    A = TensorLinearOperator(torch.diag(torch.from_numpy(values)))
    found = lanczos_approximate_spectrum(A, 20, num_repeats=repeats, rng=seed)
    return np.asarray(found.nodes), np.asarray(found.weights)


def test_change():
    sure = Change("x", Number(1.0, 0.01, 100), Number(1.1, 0.01, 100))
    assert sure.significant
    assert sure.difference == pytest.approx(0.1)
    assert sure.relative == pytest.approx(0.1)
    assert sure.margin == pytest.approx(1.96 * 0.01 * 2**0.5, rel=0.05)
    assert not Change("x", Number(1.0, 0.05, 100), Number(1.1, 0.05, 100)).significant
    assert not Change("x", Number(1.0), Number(1.0 + 1e-12)).significant
    assert not Change("x", Number(1.0, float("nan")), Number(9.0)).significant


@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_precision_changes_nothing_significantly(kind):
    """Errors of eigenvalues, and those of exact numbers, contain the rounding."""
    X, y = report_problems.numbers(torch.float32, 240)
    loss = nn.CrossEntropyLoss()
    task = Task(COUNTS, 0, 0.01, ("symmetry", "pairs", "layers"))
    reports = []
    for dtype in (torch.float32, torch.float64):
        model, Z = report_problems.network(torch.float32).to(dtype), X.to(dtype)
        A = kind(model, loss, dict(model.named_parameters()), [(Z, y)])
        m = measure(A, "ggn", False, task, Stages(None, {}))
        noise = torch.finfo(dtype).eps * abs(m.top.values[0])
        assert min(*m.top.residuals, *m.bottom.residuals) >= noise
        base = sample()
        name = str(dtype).removeprefix("torch.")
        origin = replace(base.provenance, dtype=name)
        problem = replace(base.problem, loss_value=loss(model(Z), y).item())
        changed = {"problem": problem, "provenance": origin, "matrices": (m,)}
        reports.append(replace(base, blocks=None, **changed))
    found = compare(*reports)
    changes = [found.loss, *found.pairs[0].changes()]
    changes += [c for layer in found.pairs[0].layers for c in layer.changes]
    assert all(c.difference for c in (found.loss, *found.pairs[0].eigenvalues))
    assert [c.name for c in changes if c.significant] == []


def test_distance_of_the_same_spectrum_is_chance():
    """In most of 20 pairs of runs: the bound is that of 95 %."""
    values = np.random.default_rng(0).standard_normal(300)
    rules = [spectrum(values, seed) for seed in range(40)]
    pairs = [distance(rules[i : i + 2], [300, 300], 1e-3) for i in range(0, 40, 2)]
    assert sum(pair.significant for pair in pairs) <= 4
    assert all(0 < pair.value < 0.3 for pair in pairs)


def test_distance_of_other_spectra_is_not():
    values = np.random.default_rng(0).standard_normal(300)
    rules = [spectrum(values, 0), spectrum(3 * values, 1)]
    found = distance(rules, [300, 300], 1e-3)
    assert found.significant
    assert found.value > 2 * found.chance
    few = [spectrum(values, 0, 2), spectrum(3 * values, 1, 2)]
    assert distance(few, [300, 300], 1e-3).chance == 1.0


def test_report_with_itself():
    """Nothing has changed, and the parameters are the same."""
    found = compare(sample(), sample())
    assert [pair.name for pair in found.pairs] == ["hessian", "ggn"]
    for pair in found.pairs:
        assert not any(change.significant for change in pair.changes())
        assert not any(layer.significant for layer in pair.layers)
        assert pair.overlap.subspace == pytest.approx(1.0)
        assert pair.distance.value == 0.0
    assert "The parameters are the same, bit by bit." in found.notes
    assert all(MEASURES[name][0](found) == pytest.approx(0.0) for name in MEASURES)


def moved_sample():
    """The trace of a layer is tenfold, another one's a fifth more; all else stays."""
    report = sample()
    m = report.matrices[0]
    rows = list(m.layers)
    for i, factor in ((1, 10.0), (2, 3.0)):
        trace = replace(rows[i].trace, value=factor * rows[i].trace.value)
        rows[i] = replace(rows[i], trace=trace)
    trace = replace(m.trace, value=2 * m.trace.value)
    changed = replace(m, layers=tuple(rows), trace=trace)
    return replace(report, matrices=(changed, report.matrices[1]))


def test_layers_in_the_order_of_how_much():
    found = compare(sample(), moved_sample())
    names = [layer.name for layer in found.pairs[0].layers]
    assert names[:2] == ["0.bias", "2.weight"]
    assert [layer.significant for layer in found.pairs[0].layers][:3] == [
        *[True, True, False]
    ]
    assert {
        change.name for change in found.pairs[0].changes() if change.significant
    } == {"trace"}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("trace", True),
        ("trace>50%", True),
        ("trace > 1.5", False),
        ("layers>1", True),
        ("layers>2", False),
        ("top-eigenvalue", False),
        ("anything", True),
        ("anything>3", False),
        ("density", False),
        ("turned>1e-6", False),
        ("negative-mass", False),
        ("loss", False),
    ],
)
def test_conditions(text, holds):
    assert condition(text).holds(compare(sample(), moved_sample()))[0] is holds


@pytest.mark.parametrize(
    "text",
    ["", "tracé", "trace<1", "trace>", "__import__('os')", "trace>1>2", "norm>x"],
)
def test_conditions_that_are_none(text):
    with pytest.raises(MistakeError, match="--fail-if is NAME or NAME>NUMBER"):
        condition(text)


def test_what_cannot_be_compared():
    report = sample()
    sizes = {**report.problem.parameters, "2.bias": 7}
    other = replace(report, problem=replace(report.problem, parameters=sizes))
    with pytest.raises(MistakeError, match=r"'2.bias' one has 5 entries, the other 7"):
        compare(report, other)
    first = replace(report, matrices=report.matrices[:1])
    second = replace(report, matrices=report.matrices[1:])
    with pytest.raises(MistakeError, match="has hessian and second has ggn: no matrix"):
        compare(first, second)


def test_what_is_not_comparable_is_left_out():
    report = sample()
    p = replace(report.provenance, data_sha256="0", dtype="float32")
    matrices = tuple(replace(m, damping=1.0) for m in report.matrices)
    found = compare(report, replace(report, provenance=p, matrices=matrices))
    assert "effective dimension" not in {c.name for c in found.pairs[0].changes()}
    assert len(found.notes) == 5
    assert Distance(0.2, 0.1).significant


# -- the command -----------------------------------------------------------------------


def call(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    text = capsys.readouterr()
    return status, text.out, text.err


@pytest.fixture
def reports(tmp_path):
    for name, report in (("one", sample()), ("two", moved_sample())):
        (tmp_path / name).mkdir()
        save(report, tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def test_two_reports(reports, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, errors = call(capsys, "compare", *reports, "--output", out)
    assert (status, errors) == (0, "")
    content = json.loads((out / "comparison.json").read_text())
    trace = content["matrices"]["hessian"]["changes"]["trace"]
    assert trace["significant"] is True
    assert content["matrices"]["hessian"]["layers"][0]["name"] == "0.bias"
    lines = text.splitlines()
    (line,) = (x for x in lines if x.startswith("  trace ") and x.endswith("yes"))
    assert f"{trace['difference']:+.3g}" in line
    status, text, _ = call(capsys, "compare", *reports, "--json")
    assert json.loads(text)["matrices"] == content["matrices"]


def test_exit_status(reports, capsys):
    status, _, errors = call(capsys, "compare", *reports, "--fail-if", "trace>10%")
    assert status == 1
    assert "FAIL trace is 1, above 0.1." in errors
    same = reports[0], reports[0]
    rules = ["--fail-if", "trace>10%", "--fail-if", "anything"]
    assert call(capsys, "compare", *same, *rules)[0] == 0


def test_wrong_input(reports, tmp_path, capsys):
    weights = tmp_path / "w.pt"
    torch.save({}, weights)
    for arguments, message in (
        ((reports[0], tmp_path / "none"), "There is no"),
        ((reports[0], weights), "compare two of one kind"),
        ((*reports, "--fail-if", "nothing"), "--fail-if is NAME"),
        ((weights, weights, "--weights", weights), "leave --weights out"),
        ((reports[0], tmp_path), "report.json cannot be read"),
    ):
        status, text, errors = call(capsys, "compare", *arguments)
        assert (status, text) == (2, "")
        assert message in errors
        assert errors.count("\n") == 1


def test_two_files_of_weights(tmp_path, capsys):
    """One model, two states: counts are the same, and what was moved has moved."""
    state = report_problems.wide()[0].state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save(
        {k: v * (3 if k == "2.weight" else 1) for k, v in state.items()},
        tmp_path / "b.pt",
    )
    config = tmp_path / "run.toml"
    settings = Settings(Choice(f"{FILE}:wide"), ("ggn",), counts=COUNTS)
    config.write_text(to_toml(settings, __version__))
    out = tmp_path / "out"
    status, _, errors = call(
        capsys,
        "compare",
        tmp_path / "a.pt",
        tmp_path / "b.pt",
        *("--config", config, "--output", out, "--fail-if", "top-eigenvalue>1%"),
    )
    assert status == 1, errors
    first, second = load(out / "first"), load(out / "second")
    assert first.counts == second.counts == COUNTS
    (pair,) = compare(first, second).pairs
    moved = {layer.name: layer for layer in pair.layers}
    # the first layer's block grows with the squared weight behind it
    assert moved["0.weight"].significant
    trace = moved["0.weight"].changes[0]
    assert 2 < trace.second.value / trace.first.value < 12
    assert moved["0.weight"].distance.significant
    assert moved["0.weight"].amount >= pair.layers[-1].amount
