"""What README.rst and its pages say: an operator to add, names that are there."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import curvlinops
from curvlinops.examples.functorch import functorch_jacobian
from tolerances import assert_close

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text()
PAGES = ROOT / "src" / "curvlinops" / "examples"
EXTENDING = (PAGES / "extending.rst").read_text()
MODULES = ("", ".estimators", ".losses", ".plots")


def literal_block(marker: str) -> str:
    """Return the literal block after a comment, without its indentation."""
    _, rest = EXTENDING.split(f".. {marker}\n\n::\n\n")
    block = re.match(r"((    .*)?\n)*", rest)[0]
    return re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n"


@pytest.fixture(scope="module")
def example() -> type:
    module = ModuleType("readme_example")
    exec(literal_block("example: operator"), vars(module))
    return module.JacobianGramLinearOperator


@pytest.fixture
def problem() -> tuple:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)
        model = torch.nn.Sequential(*layers).double()
        data = [(torch.randn(n, 4).double(), torch.randint(2, (n,))) for n in (3, 1, 2)]
    return model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def test_operator_is_short():
    lines = literal_block("example: operator").splitlines()
    assert len([line for line in lines if line.strip()]) <= 25
    assert max(map(len, lines)) <= 88


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (6,)])
def test_operator_is_right(example, problem, sizes, cache):
    model, loss, params, data = problem
    X, y = (torch.cat(tensors) for tensors in zip(*data, strict=True))
    data = list(zip(X.split(sizes), y.split(sizes), strict=True))
    A = example(model, loss, params, data, cache=cache)
    J = functorch_jacobian(model, params, data)
    dense = J.T @ J / len(X)
    for _ in range(3):  # by plain products, then by recorded ones
        assert_close(A.to_dense(), dense, torch.float64, A.shape[0])
    assert isinstance(A, LinearOperator)
    assert A.adjoint() is A
    top = eigsh(A, k=1, return_eigenvectors=False)
    assert_close(top, torch.linalg.eigvalsh(dense)[-1:], torch.float64, A.shape[0])


def test_operator_takes_a_risk(example, problem):
    risk = curvlinops.EmpiricalRisk(*problem)
    H, A = curvlinops.HessianLinearOperator(risk), example(risk)
    sum_ = (H + A).to_dense()
    assert_close(sum_, H.to_dense() + A.to_dense(), torch.float64, A.shape[0])


def everything(text: str) -> set[str]:
    """Return the names in a text that look like ours."""
    return set(re.findall(r"``(?:plots\.)?(\w+)(?:\([^`]*\))?``", text))


def test_names_exist():
    modules = [importlib.import_module("curvlinops" + name) for name in MODULES]
    text = "".join(page.read_text() for page in PAGES.glob("*.rst"))
    names = everything(README + text)
    names = {
        n
        for n in names
        if n.endswith(("LinearOperator", "Risk", "Function"))
        or n.startswith(("hutch", "xtr", "xdiag", "lanczos", "plot_"))
    }
    assert len(names) > 15
    missing = {n for n in names if not any(hasattr(m, n) for m in modules)}
    assert missing == set()


def test_every_matrix_and_estimator_is_listed():
    """The operators, the estimators, the figures: all that are exported."""
    plots = importlib.import_module("curvlinops.plots")
    exported = {n for n in curvlinops.__all__ if n.endswith("LinearOperator")}
    functions = importlib.import_module("curvlinops.estimators")
    exported |= {n for n in functions.__all__ if callable(getattr(functions, n))}
    results = {"Eigenpairs", "Estimate", "LayerSummary", "Options"}
    results |= {"SpectralDensity", "Track", "TrainingCallback"}
    exported |= {n for n in plots.__all__ if n.startswith("plot_")}
    names = set(re.findall(r"\w+", README))
    assert exported - results - names == set()


def printed_form(text: str) -> list[str]:
    """Return the lines of a text without its numbers, and the widths they give."""
    text = re.sub(r"[-+]?\d[\d.,]*(e[+-]?\d+)?", "#", text)
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


@pytest.mark.slow  # half a minute on a busy machine
def test_readme_shows_what_the_main_job_prints(tmp_path, monkeypatch, capsys):
    """The same lines and verdicts, whatever the numbers are."""
    pytest.importorskip("sklearn")
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module("curvlinops.__main__").main
    assert main(["report"]) == 0
    _, rest = README.split(".. output: main job\n\n::\n\n")
    shown = re.match(r"((    .*)?\n)*", rest)[0]
    found = capsys.readouterr().out
    assert printed_form(shown.strip()) == printed_form(found.strip())


def test_newcomers_read_it_to_the_end():
    assert len(README.splitlines()) <= 300


def test_pages_are_linked():
    """Every page is named in README, and every file that README names is there."""
    assert {page.name for page in PAGES.glob("*.rst")} <= set(
        re.findall(r"[\w/]+\.rst", README)
    )
    named = set(re.findall(r"(?:src|benchmarks)/[\w/]+\.(?:rst|py|png)", README))
    assert named and all((ROOT / path).is_file() for path in named)


def test_figure_is_small_and_not_in_the_package():
    (figure,) = re.findall(r"image:: (\S+)", README)
    assert not figure.startswith("src")
    assert (ROOT / figure).stat().st_size < 100_000
