"""The numbers of a report agree with the dense matrix, and error bars cover it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import report_problems
import torch

from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops.report._blocks import blocks, js_distance
from curvlinops.report._budget import LEVELS
from curvlinops.report._checkpoint import Stages
from curvlinops.report._contents import Number
from curvlinops.report._measure import Task, measure
from curvlinops.report._problem import Choice, build

FILE = Path(report_problems.__file__)
DAMPING = 0.01
QUICK = LEVELS["quick"].counts
OPERATORS = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}


def exact(dense, threshold):
    values = np.linalg.eigvalsh(dense)
    sizes = np.abs(values)
    return {
        "trace": values.sum(),
        "frobenius norm": np.linalg.norm(dense),
        "effective dimension": (sizes / (sizes + DAMPING)).sum(),
        "negative mass": (values < -threshold).mean(),
    }


def covers(number, value, level=0.95, rounding=1e-9):
    low, high = number.interval(level)
    slack = rounding * max(abs(value), 1.0)
    return bool(low - slack <= value <= high + slack)


def measured(A, name, seed, counts, parts):
    task = Task(counts, seed, DAMPING, parts)
    return measure(A, name, name == "ggn", task, Stages(None, {}))


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return build(Choice())


@pytest.mark.parametrize("name", OPERATORS)
def test_embedded_problem(digits, name):
    """Eigenvalues to the last digits, estimates within their bars, layers summed up."""
    A = OPERATORS[name](digits)
    dense = A.to_dense().numpy()
    parts = ("symmetry", "pairs", "numbers", "density", "layers")
    m = measured(A, name, 0, QUICK, parts)
    assert m.failures == ()

    values, vectors = np.linalg.eigh(dense)
    k = QUICK.top
    np.testing.assert_allclose(m.top.values, values[::-1][:k], rtol=1e-8)
    overlap = np.abs((m.top.vectors * vectors[:, ::-1][:, :k]).sum(0))
    np.testing.assert_allclose(overlap, 1.0, atol=1e-6)
    for i, (value, residual) in enumerate(
        zip(m.bottom.values, m.bottom.residuals, strict=True)
    ):
        assert abs(value - values[i]) <= max(residual, 1e-12)

    truth = exact(dense, m.negative_threshold)
    assert [key for key, _ in m.numbers()] == list(truth)
    for key, number in m.numbers():
        assert covers(number, truth[key], 0.999), key
    shifted = np.linalg.cond(dense + DAMPING * np.eye(len(dense)))
    assert covers(m.condition_number, shifted, rounding=1e-3)

    assert (m.dead.count, m.dead.names) == ((dense == 0).all(0).sum(), ())
    assert m.density.dim == len(dense)
    rest = np.setdiff1d(np.abs(values).argsort(), np.abs(values).argsort()[-k:])
    mean = (m.density.weights * m.density.nodes).sum() / len(m.density.nodes)
    assert mean == pytest.approx(values[rest].mean(), abs=0.1 * values.std())

    start = 0
    for layer in m.layers:
        block = dense[start : start + layer.size, start : start + layer.size]
        start += layer.size
        assert covers(layer.trace, np.trace(block), 0.9999), layer.name
        assert covers(layer.frobenius_norm, np.linalg.norm(block), 0.9999), layer.name


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_error_bars_cover(name):
    """In 43 to 50 of 50 seeds: what 95 % is, at the level of 0.1 % to either side."""
    A = OPERATORS[name](build(Choice(f"{FILE}:wide")))
    dense = A.to_dense().numpy()
    counts = replace(QUICK, probes=40, ncv=30, repeats=12, layer_ncv=8)
    parts = ("pairs", "numbers", "layers")
    hits = {}
    for seed in range(50):
        m = measured(A, name, seed, counts, parts)
        truth = exact(dense, m.negative_threshold)
        found = [(key, number, truth[key]) for key, number in m.numbers()]
        start = 0
        for layer in m.layers:
            block = dense[start : start + layer.size, start : start + layer.size]
            start += layer.size
            found.append((f"{layer.name} trace", layer.trace, np.trace(block)))
            norm = layer.frobenius_norm
            found.append((f"{layer.name} norm", norm, np.linalg.norm(block)))
            sizes = np.abs(np.linalg.eigvalsh(block))
            sure = (sizes / (sizes + DAMPING)).sum()
            found.append((f"{layer.name} dimension", layer.effective_dimension, sure))
        for key, number, value in found:
            hits.setdefault(key, []).append(covers(number, value))
    counted = {key: sum(covered) for key, covered in hits.items()}
    assert {key: n for key, n in counted.items() if not 43 <= n <= 50} == {}


def test_blockwise_densities():
    """Units are the 10th eigenvalues; distances those of the drawn densities."""
    risk = build(Choice(f"{FILE}:wide"))
    A = HessianLinearOperator(risk)
    counts = replace(QUICK, max_blocks=3, block_ncv=20, block_repeats=4)
    found = blocks(A, "hessian", Task(counts, 0, DAMPING), Stages(None, {}))
    sizes = {name: p.numel() for name, p in risk.params.items()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
    assert [b.name for b in found.blocks] == [n for n in sizes if n in largest]
    for b in found.blocks:
        values = np.linalg.eigvalsh(A.block(b.name).to_dense().numpy())
        unit = np.sort(np.abs(values))[::-1][b.rank - 1]
        assert b.rank == min(10, (np.abs(values) > 1e-6 * np.abs(values).max()).sum())
        assert b.unit == pytest.approx(unit, rel=1e-3)
        assert b.size == sizes[b.name]
        np.testing.assert_array_equal(b.curve.grid, found.blocks[0].curve.grid)
        cells = np.diff(b.curve.grid)
        mass = ((b.curve.density[1:] + b.curve.density[:-1]) / 2 * cells).sum()
        assert mass == pytest.approx(1.0, abs=0.02)
    assert (np.diag(found.distances) == 0).all()
    assert (found.distances == found.distances.T).all()
    assert 0 < found.distances[0, 1] < 1
    pairs = found.distances[np.triu_indices(3, 1)]
    assert found.mean_distance == pytest.approx(pairs.mean())


def test_jensen_shannon_distance():
    from scipy.spatial.distance import jensenshannon

    rng = np.random.default_rng(0)
    p, q = rng.random((2, 30))
    p[:5] = 0
    assert js_distance(p, q) == pytest.approx(jensenshannon(p, q, base=2))


def test_exact_numbers_have_no_error():
    """As many probes as columns: nothing is random, and everything is right."""
    A = GGNLinearOperator(build(Choice(f"{FILE}:small")))
    m = measured(A, "ggn", 0, replace(QUICK, probes=43, ncv=43), ("pairs", "numbers"))
    truth = exact(A.to_dense().numpy(), m.negative_threshold)
    for key, number in m.numbers():
        assert number.error == pytest.approx(0, abs=1e-9)
        assert number.value == pytest.approx(truth[key], abs=1e-9), key


def test_condition_number_of_an_indefinite_matrix():
    A = torch.diag(torch.tensor([1.0, 0.5, -0.3, 0.2]).double())
    from curvlinops import TensorLinearOperator

    m = measured(TensorLinearOperator(A), "hessian", 0, QUICK, ("pairs",))
    assert m.condition_number is None
    assert isinstance(
        measured(
            TensorLinearOperator(A @ A), "ggn", 0, QUICK, ("pairs",)
        ).condition_number,
        Number,
    )
