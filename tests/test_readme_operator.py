"""What README.rst says: the operator that it adds, the names that it mentions."""

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

README = (Path(__file__).parent.parent / "README.rst").read_text()
MODULES = ("", ".estimators", ".losses")


def literal_block(marker: str) -> str:
    """Return the literal block after a comment, without its indentation."""
    _, rest = README.split(f".. {marker}\n\n::\n\n")
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


def test_names_exist():
    modules = [importlib.import_module("curvlinops" + name) for name in MODULES]
    quoted = set(re.findall(r"``(\w+)(?:\([^`]*\))?``", README))
    names = {n for n in quoted if n.endswith(("LinearOperator", "Risk", "Function"))}
    names |= {n for n in quoted if n.startswith(("hutch", "xtr", "xdiag", "lanczos"))}
    assert len(names) > 15
    missing = {n for n in names if not any(hasattr(m, n) for m in modules)}
    assert missing == set()


def test_every_matrix_is_listed():
    """The operators that are built from a risk, all of them exported."""
    exported = {n for n in curvlinops.__all__ if n.endswith("LinearOperator")}
    assert {name for name in exported if f"``{name}``" not in README} == set()
