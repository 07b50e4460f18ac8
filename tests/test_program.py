"""Programs: fused sums and reused memory change no number and no operand."""

import random

import pytest
import torch

from curvlinops._program import reusing_memory
from curvlinops._replay import record
from tolerances import assert_close

aten = torch.ops.aten
CONSTANTS = [
    torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    for i in range(3)
]
OPERATIONS = [
    lambda a, b, C: a + b,
    lambda a, b, C: a - 2 * b,
    lambda a, b, C: C * a,
    lambda a, b, C: a @ C,
    lambda a, b, C: a + (C @ b),
    lambda a, b, C: (b @ C).view(2, 8).view(4, 4) + a,
    lambda a, b, C: -a.t(),
    lambda a, b, C: torch.bmm(a.view(1, 4, 4), C.view(1, 4, 4))[0] + b,
    lambda a, b, C: a[:2].repeat(2, 1).add_(b),
    lambda a, b, C: (a.t() + b.t()).t(),
    lambda a, b, C: a[0].t() + b.t(),
    lambda a, b, C: a.t() + (C @ b).t(),
    lambda a, b, C: a[0].view(1, 4).expand(4, 4) + b,
    lambda a, b, C: C * a[:, 1:2].expand(4, 4),
    lambda a, b, C: b - a[0].expand(4, 4),
]


def random_product(seed):
    """Return a linear function of two matrices, made of random operations."""
    choose = random.Random(seed)
    plan = [
        (
            choose.randrange(len(OPERATIONS)),
            choose.random(),
            choose.random(),
            choose.randrange(3),
        )
        for _ in range(choose.randrange(3, 25))
    ]
    returned = [choose.random() for _ in range(2)]

    def product(vectors):
        pool = list(vectors)
        for kind, first, second, constant in plan:
            a = pool[int(first * len(pool))]
            b = pool[int(second * len(pool))]
            pool.append(OPERATIONS[kind](a, b, CONSTANTS[constant]))
            if choose.random() < 0.3:
                pool.pop(0)
        return [pool[int(r * len(pool))].clone() for r in returned] + [pool[-1]]

    def repeated(vectors):
        choose.seed(seed + 1)  # the same choices in every run
        return product(vectors)

    return repeated


@pytest.mark.parametrize("seed", range(200))
def test_random_programs_give_what_was_recorded(seed):
    product = random_product(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*leading):
        return [
            torch.randn(*leading, 4, 4, dtype=torch.float64, generator=generator)
            for _ in range(2)
        ]

    _, program = record(product, draw())
    constants = [C.clone() for C in CONSTANTS]
    for _ in range(2):
        vectors = draw()
        before = [v.clone() for v in vectors]
        for result, expected in zip(program(vectors), product(vectors), strict=True):
            assert_close(result, expected, size=1000)
        assert all(map(torch.equal, vectors, before))
        assert all(map(torch.equal, constants, CONSTANTS))
    several = draw(3)
    for k in range(3):
        one = product([v[k] for v in several])
        for result, expected in zip(program.vectorised(several), one, strict=True):
            assert_close(result[k], expected, size=1000)


def funcs(product, *shapes):
    """Return the operations that a product is compiled to."""
    _, program = record(product, [torch.randn(shape) for shape in shapes])
    return [call.func for call in reusing_memory(program.calls, program.outputs)]


def test_sums_with_matrix_products_are_one_operation():
    C = torch.randn(4, 4)
    names = [f.__name__ for f in funcs(lambda v: [C @ v[0] + v[0] @ C], (4, 4))]
    assert names == ["mm.default", "_add_mm"]


def test_sums_of_transposes_are_transposed_once():
    C, D = torch.randn(4, 4), torch.randn(4, 4)

    def product(vectors):
        (v,) = vectors
        return [((C @ v).t() + (v @ D).t()).t()]

    assert [f.__name__ for f in funcs(product, (4, 4))] == ["mm.default", "_add_mm"]
    (result,), program = record(product, [torch.eye(4)])
    (again,) = program([torch.eye(4)])
    assert_close(again, result)
    assert again.stride() == result.stride()


@pytest.mark.parametrize(
    ("expanded", "count"),
    [
        (lambda v: v[0].view(1, 4).expand(3, 4), 0),
        (lambda v: v[0].expand(3, 4), 0),
        (lambda v: v[0][:1].expand(4).view(1, 4), 1),
        (lambda v: v[0].sum().expand(3, 4), 1),  # types are promoted differently
    ],
)
def test_operations_broadcast_what_was_expanded(expanded, count):
    C = torch.randn(3, 4, dtype=torch.float64)

    def product(vectors):
        return [C * expanded(vectors)]

    names = [f.__name__ for f in funcs(product, (4,))]
    assert names.count("expand.default") == count
    v = torch.randn(4)
    (result,), program = record(product, [torch.ones(4)])
    assert_close(program([v])[0], product([v])[0])
    assert program([v])[0].dtype == result.dtype == torch.float64


def test_elementwise_operations_reuse_memory():
    C = torch.randn(4)
    assert funcs(lambda v: [C * (v[0] + v[1])], (4,), (4,)) == [
        aten.add.Tensor,  # the user's vectors are not written to
        aten.mul_.Tensor,
    ]


def test_what_is_needed_later_is_not_written_to():
    def product(vectors):
        twice = 2 * vectors[0]
        return [twice.view(2, 2) * 3, twice * 5]

    assert aten.mul_.Tensor not in funcs(product, (4,))[:2]


def test_expanded_and_promoted_tensors_are_not_written_to():
    C = torch.randn(3, 4, dtype=torch.float64)
    assert funcs(lambda v: [(2 * v[0]) * C], (4,)) == [
        aten.mul.Tensor,
        aten.mul.Tensor,
    ]


def test_a_sum_does_not_overwrite_the_factor_of_a_later_one():
    W, E, B, D = (torch.randn(4, 4, dtype=torch.float64) for _ in range(4))

    def product(vectors):
        (v,) = vectors
        a, z = v @ W, v @ E
        first, second = a @ B, v @ D
        return [(a + second) @ W, (z + first) @ E]

    _, program = record(product, [torch.randn(4, 4, dtype=torch.float64)])
    v = torch.randn(4, 4, dtype=torch.float64)
    for result, expected in zip(program([v]), product([v]), strict=True):
        assert_close(result, expected, size=100)
