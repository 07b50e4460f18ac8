import pickle

import numpy as np
import pytest
import torch
from torch import nn

import references
from cases import find
from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from tolerances import assert_close


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, X):
        return self.head(self.encoder(X).tanh())


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Pair().double()
    data = [(torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1]))]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def places(params: dict, *names: str) -> list[int]:
    found, start = [], 0
    for name, p in params.items():
        if name in names:
            found += range(start, start + p.numel())
        start += p.numel()
    return found


ENCODER = ("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias")


@pytest.mark.parametrize(
    ("rows", "cols", "row_names", "col_names"),
    [
        ("encoder.*", None, ENCODER, ENCODER),
        ("head.weight", "encoder.?.bias", ("head.weight",), ENCODER[1::2]),
        (["head.*", "encoder.0.weight"], "*", ("head.weight", "head.bias", ENCODER[0]),
         (*ENCODER, "head.weight", "head.bias")),
        ("*.bias", ["head.bias"], ("encoder.0.bias", "encoder.2.bias", "head.bias"),
         ("head.bias",)),
    ],
)  # fmt: skip
def test_blocks_are_those_of_the_matrix(problem, rows, cols, row_names, col_names):
    H, dense = HessianLinearOperator(*problem), references.hessian(*problem)
    B = H.block(rows) if cols is None else H.block(rows, cols)
    params = problem[2]
    i, j = places(params, *row_names), places(params, *col_names)
    assert_close(B.to_dense(), dense[i][:, j], size=100)
    assert_close(B.H.to_dense(), dense[i][:, j].T, size=100)
    v = torch.randn(len(j)).double()
    assert_close(B @ v.numpy(), dense[i][:, j] @ v, size=100)
    columns = [torch.ones(*p.shape, 2).double() for n, p in params.items()
               if n in col_names]  # fmt: skip
    shapes = [(*p.shape, 2) for n, p in params.items() if n in row_names]
    assert [t.shape for t in B @ columns] == shapes


@pytest.mark.parametrize(
    ("cls", "dense"),
    [
        (GGNLinearOperator, references.ggn),
        (EFLinearOperator, references.empirical_fisher),
        (GGNDiagonalLinearOperator, lambda *p: references.ggn(*p).diag().diag()),
    ],
)
def test_diagonal_blocks(problem, cls, dense):
    blocks, expected = cls(*problem).blocks(), dense(*problem)
    assert list(blocks) == list(problem[2])
    for name, block in blocks.items():
        i = places(problem[2], name)
        assert block.H is block
        assert_close(block.to_dense(), expected[i][:, i], size=100)
    bias = blocks["head.bias"].to_dense()
    assert_close(pickle.loads(pickle.dumps(blocks["head.bias"])).to_dense(), bias)
    copied = pickle.loads(pickle.dumps(cls(*problem)))
    assert_close(copied.block("head.bias").to_dense(), bias)


def test_a_product_with_a_block_costs_one_product(problem, monkeypatch):
    G = GGNLinearOperator(*problem)
    B = G.block("head.*")
    widths = []
    original = GGNLinearOperator._apply

    def counting(self, V):
        widths.append(V.shape[1])
        return original(self, V)

    monkeypatch.setattr(GGNLinearOperator, "_apply", counting)
    B @ np.ones((B.shape[1], 3))
    assert widths == [3]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("encodr.0.weight", "encoder.0.weight"), ("decoder.*", "there are|close names"),
     ("", "there are")],
)  # fmt: skip
def test_names_that_match_nothing(problem, pattern, hint):
    H = HessianLinearOperator(*problem)
    for choose in (
        lambda: H.block(pattern),
        lambda: H.block("head.*", pattern),
        lambda: H.block(["head.*", pattern]),
        lambda: HessianLinearOperator(problem[0], problem[1], pattern, problem[3]),
    ):
        with pytest.raises(ValueError, match=f"No parameter matches.*({hint})"):
            choose()


def test_names_of_what_is_no_parameter(problem):
    model, _, params, data = problem
    J = JacobianLinearOperator(model, params, data)
    K = GramLinearOperator(*problem)
    for A in (J, J.H, K):
        with pytest.raises(TypeError, match="does not map parameters to parameters"):
            A.block("head.*")


def test_no_names(problem):
    with pytest.raises(ValueError, match="at least one name"):
        HessianLinearOperator(*problem).block([])


def test_an_exact_name_is_no_pattern():
    params = {"a[0]": torch.randn(2), "a0": torch.randn(3)}
    H = HessianLinearOperator(
        lambda p, X: X @ torch.cat(list(p.values())).unsqueeze(1),
        nn.MSELoss(),
        params,
        [(torch.randn(4, 5), torch.randn(4, 1))],
    )
    assert H.block("a[0]").shape == (2, 2)
    assert H.block("a*").shape == (5, 5)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*", (*ENCODER, "head.weight", "head.bias")), ("head.bias", ("head.bias",)),
     ("*.weight", (ENCODER[0], ENCODER[2], "head.weight"))],
)  # fmt: skip
def test_parameters_by_pattern(problem, pattern, names):
    model, loss, params, data = problem
    H = HessianLinearOperator(model, loss, pattern, data)
    i = places(params, *names)
    assert tuple(H.risk.params) == names
    dense = references.hessian(*problem)
    assert_close(H.to_dense(), dense[i][:, i], size=100)


def test_tied_parameters_by_pattern():
    model = find("tied-weights").build()[0]
    data = [(torch.randn(3, 4).double(), torch.tensor([0, 1, 2]))]
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), "*", data)
    assert list(risk.params) == ["0.weight", "0.bias", "2.bias"]
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), "2.*", data)
    assert list(risk.params) == ["2.weight", "2.bias"]


def test_a_pattern_needs_a_module():
    data = [(torch.ones(1, 2), torch.ones(1, 2))]
    with pytest.raises(TypeError, match=r"callable has no named parameters.*dict"):
        EmpiricalRisk(lambda p, X: p["a"] * X, nn.MSELoss(), "a", data)
