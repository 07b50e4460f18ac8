"""What is true of every operator, as functions of an operator and a problem.

Every law takes a :class:`Subject` and asserts. The decorator :func:`law` says for which
operators and problems; ``test_laws.py`` runs all of them. A law that holds for one
operator only belongs into the tests of that operator.
"""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import (
    LinearOperator,
    aslinearoperator,
    cg,
    eigsh,
    expm_multiply,
    lobpcg,
    lsmr,
    minres,
    onenormest,
    svds,
)
from torch import Tensor

from cases import OPERATORS, PROBLEMS, N, Operator, Problem, find, on_device, resplit
from tolerances import assert_close

# What the laws are about


@contextmanager
def _unused_parameters_are_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        message = "The model's output does not depend on"
        warnings.filterwarnings("ignore", message=message)
        yield


class Subject:
    """An operator on a problem, with what the laws ask for again and again."""

    def __init__(self, operator: Operator, problem: Problem, device: str):
        self.operator = operator
        self.problem = problem
        self.device = device

    def build(self, *built: Any, **options: Any) -> Any:
        """Build the operator, on a problem of its own unless one is given."""
        built = on_device(built or self.problem.build(), self.device)
        with _unused_parameters_are_allowed():
            return self.operator.build(*built, **options)

    @cached_property
    def A(self) -> Any:
        """The operator. Laws share it and must not change it.

        That its data repeat is checked elsewhere.
        """
        A = self.build(check_deterministic=False)
        with _unused_parameters_are_allowed():
            A @ np.ones(A.shape[1])
        return A

    @cached_property
    def dense(self) -> Tensor:
        """The matrix by another road, in float64."""
        return _dense(self.operator.name, self.problem.name)

    @cached_property
    def reference(self) -> np.ndarray:
        """The same as a NumPy array."""
        return self.dense.numpy()

    @property
    def tags(self) -> frozenset[str]:
        return self.operator.tags

    def block(self, *shape: int, rows: bool = False) -> Tensor:
        """Draw a block of vectors of the operator's input, or of its output."""
        generator = torch.Generator().manual_seed(len(shape) + sum(shape))
        length = self.A.shape[0 if rows else 1]
        V = torch.randn(length, *shape, generator=generator, dtype=torch.float64)
        return V.to(self.A.torch_dtype)

    def close(self, actual: Any, expected: Any, dtype: Any = None) -> None:
        """Compare, in the precision of the operator and for its number of summands."""
        dtype = self.A.torch_dtype if dtype is None else dtype
        size = max(self.A.shape)
        assert_close(actual, expected, dtype, size, exponent=self.operator.exponent)


@cache
def _dense(operator_name: str, problem_name: str) -> Tensor:
    [operator] = [o for o in OPERATORS if o.name == operator_name]
    return operator.dense(*find(problem_name).build())


@cache
def subject(operator: Operator, problem: Problem, device: str = "cpu") -> Subject:
    """Return the subject that all laws of one process share."""
    return Subject(operator, problem, device)


#: Problems on which the laws run that have nothing to do with the model: every
#: precision, several terms per datum, a plain callable.
STRUCTURAL = ("conv-float32", "mlp-bfloat16", "ce-tokens-options", "callable")

#: Those of them on which derived operators are checked.
DERIVED = ("conv-float32", "callable")

#: Problems whose loss depends on how data are weighted, in every way.
SPLIT = (
    "linear",
    "conv-float32",
    "batch-norm-2d",
    "tied-weights",
    "dict-input",
    "callable",
    "ce-soft-weights-smoothing",
    "ce-ignored-batch",
    "ce-sum-weights-smoothing",
    "ce-tokens-options",
    "bce-weight",
    "bce-sum-weights",
    "generic-huber",
    "generic-huber-sum",
)


@dataclass(frozen=True)
class Law:
    """A law, and on what it is checked."""

    check: Callable[[Subject], None]
    problems: tuple[Problem, ...]
    only: frozenset[str]
    without: frozenset[str]
    slow: bool

    def subjects(self) -> Iterator[tuple[Operator, Problem]]:
        """Yield what the law is checked on."""
        for operator in OPERATORS:
            if not self.only <= operator.tags or self.without & operator.tags:
                continue
            for problem in self.problems:
                # what is derived inherits what depends on the problem
                few = "derived" not in operator.tags or problem.name in DERIVED
                if (few or self.slow) and operator.exists_for(problem):
                    yield operator, problem


LAWS: list[Law] = []


def law(
    names: Iterable[str] | None = STRUCTURAL,
    problems: Iterable[str] = (),
    but: Iterable[str] = (),
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    slow: bool = False,
) -> Callable:
    """Register a law.

    Parameters
    ----------
    names
        Problems on which it is checked; ``None`` for all.
    problems, but
        Of these, those with all and those with none of some tags.
    only, without
        Operators for which it holds: those with all and with none of some tags.
    slow
        Whether it is checked only if that is asked for.
    """
    chosen = PROBLEMS if names is None else [find(name) for name in names]
    wanted, unwanted = set(problems), set(but)
    tagged = tuple(p for p in chosen if wanted <= p.tags and not unwanted & p.tags)
    assert tagged, "A law needs a problem."

    def register(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        LAWS.append(Law(check, tagged, frozenset(only), frozenset(without), slow))
        return check

    return register


# Numbers


@law(None, without=["core"])
def columns_equal_the_dense_reference(s: Subject) -> None:
    eye = torch.eye(s.A.shape[1], dtype=s.A.torch_dtype)
    s.close(s.A @ eye, s.dense)


@law(None, only=["core"])
def every_route_equals_the_dense_reference(s: Subject) -> None:
    """After some products, they are replayed, vectorised, and materialised."""
    A, V = s.build(check_deterministic="core" in s.tags), s.block(3)
    expected = s.dense @ V.double()
    eye = torch.eye(A.shape[1], dtype=A.torch_dtype)
    with _unused_parameters_are_allowed():
        for _ in range(3):
            s.close(A @ V[:, 0], expected[:, 0])
        for _ in range(2):
            s.close(A @ V, expected)
        s.close(A @ eye, s.dense)
        s.close(A @ V[:, 0], expected[:, 0])
        s.close(A @ V, expected)


@law(None, without=["core", "derived"], slow=True)
def every_route_of_the_others_equals_the_dense_reference(s: Subject) -> None:
    every_route_equals_the_dense_reference(s)


@law(None, only=["derived"], without=["bounded", "datafree"], slow=True)
def columns_of_the_derived_equal_the_dense_reference_everywhere(s: Subject) -> None:
    columns_equal_the_dense_reference(s)


@law()
def to_dense_is_the_product_with_the_identity(s: Subject) -> None:
    dense = s.A.to_dense()
    assert dense.dtype == s.A.torch_dtype and dense.device == s.A.device
    s.close(dense, s.dense)
    s.close(s.A.to_dense(block_size=3), s.dense)


@law()
def product_is_linear(s: Subject) -> None:
    u, v = s.block(2).unbind(1)
    s.close(s.A @ (2 * u - v), 2 * (s.A @ u) - s.A @ v)


@law()
def adjoint_satisfies_its_definition(s: Subject) -> None:
    v, u = s.block().double(), s.block(rows=True).double()
    left = torch.dot((s.A @ v.to(s.A.torch_dtype)).double(), u)
    right = torch.dot(v, (s.A.adjoint() @ u.to(s.A.torch_dtype)).double())
    scale = (s.dense.abs() @ v.abs()) @ u.abs()
    s.close(torch.stack([left, scale]), torch.stack([right, scale]))


@law()
def adjoint_and_transpose_agree_with_dense(s: Subject) -> None:
    u = s.block(2, rows=True)
    expected = s.dense.T @ u.double()
    for B in (s.A.H, s.A.T, s.A.adjoint(), s.A.transpose()):
        assert B.shape == s.A.shape[::-1] and B.dtype == s.A.dtype
        s.close(B @ u, expected)
    s.close(s.A.rmatmat(u), expected)
    s.close(s.A.rmatvec(u[:, 0]), expected[:, 0])
    s.close(s.A.H.H @ s.block(2), s.dense @ s.block(2).double())


@law(without=["rectangular"])
def self_adjoint_operator_is_its_own_adjoint(s: Subject) -> None:
    assert s.A.adjoint() is s.A and s.A.T is s.A and s.A.H is s.A
    assert s.A.shape[0] == s.A.shape[1]


@law(without=["rectangular", "indefinite", "iterative"])
def eigenvalues_are_not_negative(s: Subject) -> None:
    evals = torch.linalg.eigvalsh(s.A.to_dense().double())
    s.close(evals.clamp(max=0.0) + evals[-1], torch.full_like(evals, evals[-1].item()))


@law()
def left_product_is_the_product_with_the_transpose(s: Subject) -> None:
    u = s.block(3, rows=True)
    expected = u.T.double() @ s.dense
    s.close(u.T @ s.A, expected)
    s.close(u[:, 0] @ s.A, expected[0])
    if s.A.torch_dtype is not torch.bfloat16:
        s.close(u.T.numpy() @ s.A, expected)
        s.close(u[:, 0].numpy() @ s.A, expected[0])


@law()
def lists_from_the_left_have_rows_first(s: Subject) -> None:
    u = s.block(3, rows=True)
    shapes = s.A.out_shapes
    pieces = u.T.split([shape.numel() for shape in shapes], dim=1)
    rows = [t.reshape(3, *shape) for t, shape in zip(pieces, shapes, strict=True)]
    result = rows @ s.A
    assert [t.shape for t in result] == [(3, *shape) for shape in s.A.in_shapes]
    joined = torch.cat([t.reshape(3, -1) for t in result], dim=1)
    s.close(joined, u.T.double() @ s.dense)
    first = torch.cat([t.flatten() for t in [row[0] for row in rows] @ s.A])
    s.close(first, u[:, 0].double() @ s.dense)


# Operands


@law()
def block_is_multiplied_column_by_column(s: Subject) -> None:
    for K in (0, 1, 3):
        V = s.block(K)
        result = s.A @ V
        assert result.shape == (s.A.shape[0], K)
        columns = [s.A @ v for v in V.unbind(1)]
        if columns:
            s.close(result, torch.stack(columns, dim=1))


@law()
def containers_agree(s: Subject) -> None:
    A = s.A
    for shape in ((), (1,), (3,)):
        V = s.block(*shape)
        array = V.to(torch.float64 if A.dtype == np.float64 else torch.float32).numpy()
        pieces = V.split([t.numel() for t in map(torch.empty, A.in_shapes)])
        listed = [
            t.reshape((*s_, *shape)) for t, s_ in zip(pieces, A.in_shapes, strict=True)
        ]
        result = A @ V
        assert result.dtype == A.torch_dtype and not result.requires_grad
        on_numpy, on_lists = A @ array, A @ listed
        assert isinstance(on_numpy, np.ndarray) and on_numpy.dtype == A.dtype
        assert on_numpy.shape == result.shape == (A.shape[0], *shape)
        assert [t.shape for t in on_lists] == [(*o, *shape) for o in A.out_shapes]
        s.close(on_numpy, result)
        s.close(torch.cat([t.reshape(-1, *shape) for t in on_lists]), result)


@law()
def every_way_to_multiply_agrees(s: Subject) -> None:
    v, V = s.block(), s.block(3)
    for one in (s.A.matvec(v), s.A.dot(v), s.A * v, s.A(v)):
        s.close(one, s.A @ v)
    for block in (s.A.matmat(V), s.A.dot(V), s.A * V, s.A(V)):
        s.close(block, s.A @ V)


@law()
def single_column_keeps_its_shape(s: Subject) -> None:
    V = s.block(1)
    array = V.float().numpy()
    for x in (V, array):
        for y in (s.A @ x, s.A.matvec(x), s.A.matmat(x), s.A.dot(x)):
            assert y.shape == (s.A.shape[0], 1)
            s.close(y[:, 0], s.A @ x[:, 0])


@law()
def operand_is_not_changed(s: Subject) -> None:
    V = s.block(3)
    array = V.double().numpy().astype(s.A.dtype)
    before, array_before = V.clone(), array.copy()
    for B in (s.A, s.A.H @ s.A, 2 * s.A, s.A + s.A):
        results = [B @ V, B @ V[:, 0], B @ array, B @ array[:, 0]]
        assert torch.equal(V, before) and np.array_equal(array, array_before)
        for result in results:
            result *= 0  # what is returned belongs to the caller
        assert torch.equal(V, before) and np.array_equal(array, array_before)
    s.close(s.A @ V, s.dense @ before.double())


@law()
def results_share_no_memory(s: Subject) -> None:
    V = s.block(2)
    first, second = s.A @ V, s.A @ V
    expected = first.clone()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    first.zero_()
    assert torch.equal(second, expected)
    array = V.double().numpy().astype(s.A.dtype)
    assert not np.shares_memory(s.A @ array, s.A @ array)
    lists = [s.A @ _as_list(s.A, V) for _ in range(2)]
    for a, b in zip(*lists, strict=True):
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


def _as_list(A: Any, V: Tensor) -> list[Tensor]:
    pieces = V.split([torch.Size(shape).numel() for shape in A.in_shapes])
    return [
        t.reshape((*shape, *V.shape[1:]))
        for t, shape in zip(pieces, A.in_shapes, strict=True)
    ]


@law()
def wrong_operands_name_both_sides(s: Subject) -> None:
    M, N = s.A.shape
    for wrong in (torch.ones(N + 1), np.ones(N + 1), np.ones((N + 1, 2))):
        with pytest.raises(ValueError, match=rf"(?s){N}.*{N + 1}"):
            s.A @ (wrong.to(s.A.torch_dtype) if torch.is_tensor(wrong) else wrong)
    with pytest.raises(ValueError, match=rf"{N}.*\({N}, 2, 2\)"):
        s.A @ np.ones((N, 2, 2))
    with pytest.raises(ValueError, match=rf"{M}.*{M + 2}"):
        np.ones(M + 2) @ s.A
    with pytest.raises(ValueError, match=rf"{M}.*{M + 2}"):
        torch.ones(M + 2, dtype=s.A.torch_dtype) @ s.A
    other = torch.float32 if s.A.torch_dtype is torch.float64 else torch.float64
    with pytest.raises(TypeError, match=rf"{s.A.torch_dtype}.*{other}.*\.to\("):
        s.A @ torch.ones(N, dtype=other)
    with pytest.raises((TypeError, ValueError), match=rf"{s.device}.*meta"):
        s.A @ torch.ones(N, dtype=s.A.torch_dtype, device="meta")
    with pytest.raises(ValueError, match="shapes"):
        s.A @ [torch.ones(1, 2, 3, dtype=s.A.torch_dtype)] * 7


# Composites


@law(without=["iterative"])
def composites_agree_with_dense(s: Subject) -> None:
    A, D = s.A, s.dense
    N = A.shape[1]
    V, U = s.block(2), s.block(2, rows=True)
    composites = [
        (2 * A, 2 * D),
        (A * 0.5, 0.5 * D),
        (A / 4, D / 4),
        (-A, -D),
        (A + A, 2 * D),
        (A - 3 * A, -2 * D),
        (A.H @ A, D.T @ D),
        (A @ A.H, D @ D.T),
        ((A @ A.H) ** 2, D @ D.T @ D @ D.T),
        ((A.H @ A) ** 0, torch.eye(N, dtype=torch.float64)),
        (np.float32(3) * A, 3 * D),
        (torch.tensor(3.0) * A, 3 * D),
        ((A + 2 * A).H, 3 * D.T),
    ]
    for B, dense in composites:
        assert isinstance(B, LinearOperator) and B.shape == tuple(dense.shape)
        assert B.dtype == A.dtype and B.torch_dtype == A.torch_dtype
        X = V if B.shape[1] == N else U
        s.close(B @ X, dense @ X.double())
        array = X.double().numpy().astype(A.dtype)
        result = B @ array
        assert isinstance(result, np.ndarray) and result.dtype == A.dtype
        s.close(result, dense @ X.double())
        listed = torch.cat([t.reshape(-1, 2) for t in B @ _as_list(B, X)])
        s.close(listed, dense @ X.double())


@law()
def mixes_with_foreign_operators(s: Subject) -> None:
    A, D = s.A, s.reference
    M, N = A.shape
    generator = np.random.default_rng(0)
    F = generator.standard_normal((M, N))
    E = generator.standard_normal((N, 3))
    foreign = aslinearoperator(F)
    x = s.block(2).double().numpy()
    s.close((A + foreign) @ x, (D + F) @ x)
    s.close((foreign + A) @ x, (D + F) @ x)
    s.close((A - foreign) @ x, (D - F) @ x)
    y = generator.standard_normal((3, 2))
    s.close((A @ aslinearoperator(E)) @ y, D @ (E @ y))
    s.close((aslinearoperator(F.T) @ A) @ x, F.T @ (D @ x))


@law()
def cast_changes_the_vectors_only(s: Subject) -> None:
    assert s.A.to_scipy() is s.A
    assert s.A.to_scipy(s.A.dtype).dtype == s.A.dtype
    other = np.float32 if s.A.dtype == np.float64 else np.float64
    B = s.A.to_scipy(other)
    assert B.dtype == other and B.shape == s.A.shape
    x = s.block(2).double().numpy().astype(other)
    result = B @ x
    assert result.dtype == other
    low = s.A.torch_dtype if s.A.dtype == np.float32 else torch.float32
    s.close(result, s.dense @ torch.from_numpy(x).double(), dtype=low)
    s.close(B.H @ np.ones(B.shape[0], other), s.dense.sum(0), dtype=low)


# State


@law(without=["iterative"])
def same_product_gives_the_same_bits(s: Subject) -> None:
    V = s.block(2)
    one, two = ([A @ V for _ in range(4)] for A in (s.build(), s.build()))
    # one route may follow another, but always at the same product
    assert all(map(torch.equal, one, two))
    for result in one[1:]:
        s.close(result, one[0])


@law(without=["datafree", "iterative"])
def cache_does_not_change_the_numbers(s: Subject) -> None:
    V = s.block(2)
    expected = s.dense @ V.double()
    for setting in ("off", 2_000):
        A = s.build(cache=setting, check_deterministic=False)
        for _ in range(2):
            s.close(A @ V, expected)


@law(None, problems=["splittable"], without=["derived"], slow=True)
def split_of_the_data_does_not_matter(s: Subject) -> None:
    _check_splits(s, (1, 3, 2))


@law(SPLIT, without=["derived"])
def one_batch_and_lone_data_are_splits_too(s: Subject) -> None:
    _check_splits(s, (N,), (1,) * N, (1, 3, 2))


def _check_splits(s: Subject, *splits: tuple[int, ...]) -> None:
    model, loss_func, params, data = s.problem.build()
    V = s.block(2)
    expected = s.dense @ V.double()
    for sizes in splits:
        other = resplit(data, sizes)
        A = s.build(model, loss_func, params, other, check_deterministic=False)
        with _unused_parameters_are_allowed():
            s.close(A @ V, expected)


@law(["conv-float32", "callable", "ce-tokens-options", "bce-weight"], only=["sampled"])
def expectation_is_the_exact_matrix_for_every_split(s: Subject) -> None:
    model, loss_func, params, data = s.problem.build()
    exact = s.operator.expectation(model, loss_func, params, data)
    for sizes in ((N,), (1, 3, 2)):
        other = resplit(data, sizes)
        A = s.build(model, loss_func, params, other, mc_samples=2000)
        error = (A.to_dense().double().cpu() - exact).norm() / exact.norm()
        assert error < 0.15  # falls with the square root of the number of samples


@law(SPLIT, without=["sampled", "ordered", "derived"])
def order_of_the_data_does_not_matter(s: Subject) -> None:
    model, loss_func, params, data = s.problem.build()
    V = s.block(2)
    A = s.build(model, loss_func, params, list(data)[::-1])
    s.close(A @ V, s.dense @ V.double())


@law(without=["datafree"])
def construction_without_check_gives_the_same(s: Subject) -> None:
    V = s.block(2)
    s.close(s.build(check_deterministic=False) @ V, s.dense @ V.double())


@law(["mlp-perturbed-params", "conv-float32", "batch-norm-1d", "loader"])
def pickles_and_copies(s: Subject) -> None:
    V = s.block(2)
    expected = s.A @ V
    for B in (
        pickle.loads(pickle.dumps(s.A)),
        copy.copy(s.A),
        copy.deepcopy(s.A),
        pickle.loads(pickle.dumps(2 * s.A + s.A.H.H)) / 3,
    ):
        assert B.shape == s.A.shape and B.dtype == s.A.dtype
        s.close(B @ V, expected)


@law()
def representation_says_what_it_is(s: Subject) -> None:
    M, N = s.A.shape
    for part in (f"{M}x{N}", type(s.A).__name__, str(s.A.torch_dtype), s.device):
        assert part in repr(s.A)


@law()
def is_a_scipy_operator(s: Subject) -> None:
    assert LinearOperator in type(s.A).__bases__
    assert aslinearoperator(s.A) is s.A
    assert isinstance(s.A.dtype, np.dtype) and s.A.dtype.kind == "f"
    assert s.A.shape == tuple(s.dense.shape)
    assert all(isinstance(n, int) for n in s.A.shape)
    assert sum(map(torch.Size.numel, s.A.in_shapes)) == s.A.shape[1]
    assert sum(map(torch.Size.numel, s.A.out_shapes)) == s.A.shape[0]


# Cost


class Passes:
    """Data that count how often they are read."""

    def __init__(self, batches: Iterable):
        self.batches = list(batches)
        self.count = 0

    def __iter__(self) -> Iterator:
        self.count += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@law(["mlp-tanh-ce"], without=["derived", "stored"])
def passes_and_forward_calls_are_the_documented_ones(s: Subject) -> None:
    calls: list[int] = []

    def measure(A: Any, data: Passes, operand: Tensor) -> tuple[int, int]:
        passes, forward = data.count, len(calls)
        A @ operand
        return data.count - passes, len(calls) - forward

    def build(**options: Any) -> tuple[Any, Passes, int]:
        model, loss_func, params, batches = s.problem.build()
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        data = Passes(batches)
        before = len(calls)
        A = s.build(model, loss_func, params, data, **options)
        return A, data, len(calls) - before

    V, n = s.block(3), len(s.problem.build()[3])
    A, data, forward = build()
    assert data.count == 2 and forward == 2 * n
    assert measure(A, data, V) == (1, n)  # records, and keeps the batches
    assert measure(A, data, V) == (0, 0)
    assert measure(A, data, V[:, 0]) == (0, 0)
    A.refresh()
    assert measure(A, data, V) == (1, n)

    A, data, forward = build(cache="off")
    passes = s.operator.passes
    for _ in range(3):
        assert measure(A, data, V) == (passes, passes * n)

    A, data, forward = build(check_deterministic=False)
    unchecked = s.operator.unchecked_passes
    assert (data.count, forward) == (unchecked, unchecked * n)


@law(["loader"], only=["stored"], without=["derived"])
def entries_take_the_documented_passes_once(s: Subject) -> None:
    model, loss_func, params, data = s.problem.build()
    data = Passes(data)
    V, passes = s.block(3), s.operator.passes
    for setting in ("auto", "off"):
        A = s.build(model, loss_func, params, data, cache=setting)
        for _ in range(2):
            before = data.count
            A @ V
            taken = data.count - before
            if passes is not None:
                # what one pass has computed may be kept for the next
                assert taken == passes if setting == "off" else 0 < taken <= passes
            before = data.count
            for X in (V, V[:, 0]):
                A @ X
            assert data.count == before
            A.refresh()


# SciPy


SOLVABLE = ("callable", "conv-float32")


@law(SOLVABLE, without=["rectangular", "iterative", "datafree"])
def eigensolvers_take_it(s: Subject) -> None:
    expected = torch.linalg.eigvalsh(s.dense).numpy()
    v0 = np.ones(s.A.shape[0], s.A.dtype)
    top = eigsh(s.A, k=2, which="LA", v0=v0, return_eigenvectors=False)
    # of a multiple eigenvalue, it may find a single one
    _close_spectra(s, top[-1:], expected[-1:])
    X = s.block(2).double().numpy().astype(s.A.dtype)
    # in single precision it may stall before; an eigenvalue's error is that squared
    tol = (1e-4 if s.A.dtype == np.float64 else 1e-3) * max(1.0, expected[-1])
    top, _ = lobpcg(s.A, X, largest=True, maxiter=200, tol=tol)
    _close_spectra(s, top[:1], expected[-1:], exponent=0.5)


@law(SOLVABLE, without=["iterative"])
def singular_values_and_least_squares_take_it(s: Subject) -> None:
    expected = torch.linalg.svdvals(s.dense).numpy()
    v0 = np.ones(min(s.A.shape), s.A.dtype)
    top = svds(s.A, k=1, v0=v0, return_singular_vectors=False)
    _close_spectra(s, top, expected[:1])
    # SciPy computes in the right-hand side's precision and overflows in float32
    b = s.block(rows=True).double().numpy()
    x = lsmr(s.A, b, damp=1.0, atol=1e-12, btol=1e-12, maxiter=2000)[0]
    D = s.reference
    normal = D.T @ D + np.eye(D.shape[1])
    _close_spectra(s, x, np.linalg.solve(normal, D.T @ b), exponent=0.5)


def _close_spectra(
    s: Subject, actual: Any, expected: Any, exponent: float = 0.75
) -> None:
    eps = np.finfo(s.A.dtype).eps ** exponent
    bound = 32 * eps * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


@law(SOLVABLE, without=["rectangular", "iterative"])
def linear_solvers_take_it(s: Subject) -> None:
    D = s.reference
    shift = 1.0 + np.abs(np.linalg.eigvalsh(D)).max()
    identity = aslinearoperator(np.eye(len(D), dtype=s.A.dtype))
    b = s.block().double().numpy().astype(s.A.dtype)
    expected = np.linalg.solve(D + shift * np.eye(len(D)), b)
    rtol = 100 * np.finfo(s.A.dtype).eps
    for solver in (cg, minres):
        x, info = solver(s.A + shift * identity, b, rtol=rtol)
        assert info == 0
        np.testing.assert_allclose(
            x, expected, rtol=0, atol=100 * rtol * np.abs(b).max()
        )


@law(SOLVABLE, without=["rectangular", "iterative"])
def exponential_and_norm_estimate_take_it(s: Subject) -> None:
    D = s.reference
    A = s.A / float(np.abs(D).max() or 1.0)
    D = D / float(np.abs(D).max() or 1.0)
    b = s.block().double().numpy()
    actual = expm_multiply(A, b, traceA=float(np.trace(D)))
    expected = expm_multiply(D, b, traceA=float(np.trace(D)))
    s.close(actual, expected)
    norm = np.abs(D).sum(0).max()
    assert norm / 3 <= onenormest(A) <= norm * (1 + 1e-4)  # a lower bound
