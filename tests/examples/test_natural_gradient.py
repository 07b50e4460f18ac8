"""The natural gradient: numbers, figures, exit status, error messages."""

import io
import re
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from curvlinops.examples import natural_gradient
from curvlinops.examples._page import Check
from curvlinops.examples.natural_gradient import BATCH_SIZE, main

SMALL = ["--quick", "--quiet"]
FIGURES = {"matrices.png", "neumann.png", "convergence.png"}


def run(output, *options):
    """Return exit status and printed lines of a run."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = main([*SMALL, "--output", str(output), *options])
    return status, printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("figures") / "created" / "by the job"


@pytest.fixture(scope="module")
def result(output):
    return run(output)


@pytest.fixture
def lines(result):
    return result[1]


def table(lines):
    """Return method, steps, residual, error and seconds of the table's rows."""
    start = next(i for i, line in enumerate(lines) if line.startswith("method "))
    rows = [re.split(r"  +", line) for line in lines[start + 1 : start + 8]]
    return [(m, s, float(r), float(e), float(t)) for m, s, r, e, t in rows]


def test_exit_status_and_verdict(result, output):
    status, lines = result
    assert status == 0
    assert lines[-1].endswith(f"in {output}. Checks: all passed.")
    assert sum(line.startswith("ok ") for line in lines) == 5
    assert not any("FAILED" in line for line in lines)


def test_accuracy(lines):
    (line,) = (line for line in lines if line.startswith("Training"))
    found, required = (float(x) for x in re.findall(r"([0-9.]+)%", line))
    assert required == 93
    assert required <= found <= 100


def test_table(lines):
    methods, steps, residuals, errors, seconds = zip(*table(lines), strict=True)
    assert len(set(methods)) == 4
    assert steps[:3] == ("-", "5", "15")
    assert 15 < int(steps[3]) < 200
    assert steps[4:] == ("10", "100", "1000")
    for figures in (residuals, errors):
        dense, few, more, converged, *series = figures
        assert dense < 1e-12
        assert few > more > 1e-6 > 1e-9 > converged > dense
        assert series == sorted(series, reverse=True)
        assert series[0] > 0.1 > 0.01 > series[2]
    assert all(0 < t < 30 for t in seconds)


def test_eigenvalues(lines):
    """Those of the Hessian's GGN part are near, but not equal."""
    ggn, hessian = (
        np.array([float(x) for x in line.split()[1:]])
        for name in ("GGN  ", "Hessian  ")
        for line in lines
        if line.startswith(name)
    )
    for values in (ggn, hessian):
        assert len(values) == 5
        assert (np.diff(values) <= 0).all()
        assert values[-1] > 0
    assert 1e-4 < np.abs(ggn / hessian - 1).max() < 0.5


def test_figures(result, output):
    from matplotlib.image import imread

    assert {path.name for path in output.iterdir()} == FIGURES
    for path in output.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        image = imread(path)
        assert min(image.shape[:2]) > 400
        assert len(np.unique(image[..., :3].sum(2))) > 50


def test_repeatable_and_failing_checks(lines, tmp_path, monkeypatch):
    """The same seed gives the same numbers; a check that fails sets the status."""
    monkeypatch.setattr(natural_gradient, "ROUNDING", -1.0)
    state = torch.get_rng_state()
    status, again = run(tmp_path)
    assert status == 1
    assert again[-1].endswith("Checks: 1 of 5 checks FAILED.")
    assert torch.equal(torch.get_rng_state(), state)

    solves = slice(1, None)  # the first row's numbers are rounding errors
    columns = slice(None, -1)  # the last one's are seconds
    for first, second in zip(table(lines)[solves], table(again)[solves], strict=True):
        assert first[columns] == second[columns]
    assert lines[:9] == again[:9]


@pytest.mark.parametrize(
    ("value", "passed"), [(1.0, True), (2.0, True), (2.1, False), (np.nan, False)]
)
def test_check(value, passed):
    check = Check("something", value, 2.0)
    assert check.passed is passed
    assert str(check).startswith("ok " if passed else "FAILED ")


def test_dense_ggn_is_the_hessian_of_a_linear_model():
    """Without hidden layer, both matrices are the same."""
    data, _ = natural_gradient.load_digits_batches(
        BATCH_SIZE, seed=0, device=torch.device("cpu")
    )
    data = [(X[:7, ::8], y[:7]) for X, y in data]
    model = torch.nn.Linear(8, 10).double()
    dense = natural_gradient.dense_ggn(model, data, bar=lambda data, desc: data)
    params = dict(model.named_parameters())
    loss = torch.nn.CrossEntropyLoss()
    hessian = natural_gradient.functorch_hessian(model, loss, params, data)
    assert np.allclose(dense, hessian.numpy(), rtol=1e-10, atol=1e-14)


def test_too_low_accuracy(tmp_path, capsys):
    assert main([*SMALL, "--epochs", "1", "--output", str(tmp_path)]) == 1
    assert "Increase --epochs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "nonsense"], "--device: nonsense cannot be used here: Expected"),
        (["--device", "meta"], "--device: meta cannot be used here: "),
        (["--seed", "-1"], "'-1' is not an integer from 0 to 4294967295"),
        (["--epochs", "many"], "'many' is not an integer from 1 to 10000"),
        (["--hidden", "0"], "'0' is not an integer from 1 to 64"),
        (["--damping", "nan"], "'nan' is not a number from 0.0001 to 100"),
    ],
)
def test_wrong_arguments(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--device", "cuda"])
    assert "--device: cuda cannot be used here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_output_cannot_be_written(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path / name)])
    assert caught.value.code == 2
    assert f"{name} cannot be written to" in capsys.readouterr().err


def test_missing_packages(tmp_path, capsys, monkeypatch):
    for name in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Run `pip install matplotlib scikit-learn`" in error
    assert "extra `examples`" in error


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(lines, tmp_path):
    status, on_cuda = run(tmp_path, "--device", "cuda")
    assert status == 0
    assert "on cuda" in on_cuda[2]
