"""Runs of a solver in step."""

import threading
from collections import Counter

import numpy as np
import pytest

from curvlinops._lockstep import solve_each, solve_together

rng = np.random.default_rng(0)
A, M = rng.standard_normal((2, 6, 6)) / 6
B = rng.standard_normal((6, 7))


class Block:
    """A product that remembers the widths of its blocks, and its thread."""

    def __init__(self, matrix):
        self.matrix, self.widths, self.threads = matrix, [], set()

    def __call__(self, X):
        self.widths.append(1 if X.ndim == 1 else X.shape[1])
        self.threads.add(threading.get_ident())
        return self.matrix @ X


def richardson(steps):
    def solve(j, multiply):
        x = B[:, j]
        for _ in range(steps(j)):
            x = B[:, j] - multiply("M", multiply("A", x))
        return x

    return solve


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("block_size", [1, 3, 32])
@pytest.mark.parametrize(
    "steps", [lambda j: 4, lambda j: j, lambda j: 0], ids=["equal", "unequal", "none"]
)
def test_agrees_with_single_runs(steps, block_size):
    products = {"A": Block(A), "M": Block(M)}
    singles = solve_each(richardson(steps), products, 7)
    together = solve_together(richardson(steps), products, 7, block_size)
    np.testing.assert_allclose(together, singles, rtol=1e-13)


def test_no_runs():
    assert solve_together(richardson(lambda j: 3), {}, 0) == []


def test_blocks_are_full_and_multiplied_by_the_caller():
    products = {"A": Block(A), "M": Block(M)}
    solve_together(richardson(lambda j: 3), products, 7, block_size=5)
    for product in products.values():
        assert sum(product.widths) == 3 * 7
        assert max(product.widths) == 5
        assert product.threads == {threading.get_ident()}


def test_runs_out_of_step_fall_into_step():
    product = {"A": Block(A), "M": Block(M)}

    def solve(j, multiply):
        x = multiply("A", B[:, j]) if j == 0 else B[:, j]
        for _ in range(4):
            x = multiply("A", multiply("M", x))
        return x

    solve_together(solve, product, 7)
    assert Counter(product["M"].widths)[7] >= 3
    assert len(product["A"].widths) <= 6


def test_runs_see_the_callers_error_state():
    with np.errstate(divide="ignore"):
        (x,) = solve_together(lambda j, multiply: np.ones(1) / np.zeros(1), {}, 1)
    assert np.isinf(x)


def test_exception_of_a_run_is_raised_by_the_caller():
    ended = []

    def solve(j, multiply):
        try:
            for k in range(5):
                if (j, k) == (3, 2):
                    raise ZeroDivisionError("third run")
                multiply("A", B[:, j])
        finally:
            ended.append(j)

    with pytest.raises(ZeroDivisionError, match="third run"):
        solve_together(solve, {"A": Block(A)}, 7)
    assert sorted(ended) == list(range(7))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_exception_of_a_product_ends_all_runs(error):
    calls = []

    def interrupted(X):
        calls.append(X)
        if len(calls) == 3:
            raise error
        return A @ X

    with pytest.raises(error):
        solve_together(
            lambda j, multiply: [multiply("A", B[:, j]) for _ in range(9)],
            {"A": interrupted},
            7,
            block_size=4,
        )
    assert len(calls) == 3


def test_a_run_that_swallows_its_end_gets_no_more_products():
    calls = []

    def solve(j, multiply):
        for _ in range(3):
            try:
                multiply("A", B[:, j])
            except BaseException:
                calls.append(j)

    def fail(X):
        raise ValueError("product")

    with pytest.raises(ValueError, match="product"):
        solve_together(solve, {"A": fail}, 2)
    assert sorted(calls) == [0, 0, 0, 1, 1, 1]
