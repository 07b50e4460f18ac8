"""Every law on every operator, on the problems that the law asks for."""

import pytest
import torch

from cases import OPERATORS, PROBLEMS, Operator, Problem, marks
from laws import LAWS, Law, subject

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _cases(device: str) -> list:
    # one problem after the other, so that what a law needs has just been computed
    position = {problem.name: i for i, problem in enumerate(PROBLEMS)}
    cases = [(law, *case) for law in LAWS for case in law.subjects()]
    cases.sort(key=lambda case: (position[case[2].name], case[1].name))
    return [
        pytest.param(
            law,
            operator,
            problem,
            id=f"{operator.name}-{problem.name}-{law.check.__name__}",
            marks=[*marks(problem), *([pytest.mark.slow] if law.slow else [])],
        )
        for law, operator, problem in cases
        if device == "cpu" or "callable" not in problem.tags  # it can't be moved
    ]


@pytest.mark.parametrize(("law", "operator", "problem"), _cases("cpu"))
def test_law(law: Law, operator: Operator, problem: Problem):
    law.check(subject(operator, problem))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize(
    ("law", "operator", "problem"),
    # without a GPU, one skipped test says enough
    _cases("cuda") if torch.cuda.is_available() else _cases("cuda")[:1],
)
def test_law_on_cuda(law: Law, operator: Operator, problem: Problem, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    law.check(subject(operator, problem, "cuda"))


def test_operators_and_laws_have_distinct_names():
    names = [operator.name for operator in OPERATORS]
    assert len(set(names)) == len(names)
    checks = [law.check.__name__ for law in LAWS]
    assert len(set(checks)) == len(checks)
