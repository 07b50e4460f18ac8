"""Whose rows are whose, from values alone."""

import pytest
import torch

from curvlinops._order import (
    BASES,
    Order,
    as_order,
    decode,
    factors,
    filled,
    find_order,
    orders,
    ranks,
    table,
)


@pytest.mark.parametrize("order", [Order(0), Order(0, True), Order(1), Order(2, True)])
@pytest.mark.parametrize("picked", [range(2, 3), range(0, 4, 3), range(4)])
def test_parts_are_found_in_their_place(order, picked):
    """An order picks the rows that a part has, and is found by them."""
    shape = [6, 5, 7, 2]
    shape[order.axis] = 12
    whole = torch.rand(shape).double()
    owners = order.owners(shape, 4)
    mine = torch.isin(owners.movedim(order.axis, 0)[:, 0, 0, 0], torch.tensor(picked))
    part = whole.movedim(order.axis, 0)[mine].movedim(0, order.axis)
    assert torch.equal(order.pick(whole, picked, 4), part)
    found = find_order(whole, part, picked, 4, 1e-8)
    assert found == (order if len(picked) < 4 else None)
    assert as_order(owners.flatten(), shape, 4) == order
    assert find_order(whole, part + 1e-3, picked, 4, 1e-8) is None


def test_what_fits_twice_is_not_found():
    whole = torch.ones(6, 2)
    assert find_order(whole, whole[:2], range(1), 3, 1e-8) is None
    assert find_order(whole, whole[:1], range(1), 3, 1e-8) is None
    ids = torch.arange(40_000, 40_006)
    assert find_order(ids, ids[:2] + 1, range(1), 3, 1e-3) is None
    unknown = torch.tensor([0, -1, -1, -1, -1, -1])
    assert as_order(unknown, [6], 3) is None
    assert as_order(unknown, [6], 3, Order(0, True)) == Order(0, True)
    assert [*orders([3, 6], 3)] == [Order(0), Order(1), Order(1, True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [2, 3, 16, 17, 300])
def test_numbers_tell_data_apart(size, base, dtype):
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(size, (50,), generator=generator)
    rows = torch.randn(50, 3, generator=generator).to(dtype)
    rows[7] = 0
    sent = [rows * f[:, None] for f in factors(owners, size, base)]
    eps = torch.finfo(dtype).eps
    expected = owners.clone()
    expected[7] = -1
    assert decode(sent, size, base, eps).equal(expected)
    other = (owners + 1) % size
    mixed = [
        f[3] * rows[3] + g[3] * rows[4]
        for f, g in zip(
            factors(owners, size, base), factors(other, size, base), strict=True
        )
    ]
    for row, value in zip(sent, mixed, strict=True):
        row[3] = value
    assert decode(sent, size, base, eps) is None


def test_tables():
    owners = torch.tensor([1, 0, 1, -1, 3, 1])
    assert ranks(owners).tolist() == [0, 0, 1, 0, 0, 2]
    assert table(owners, 4).tolist() == [[1, 6, 6], [0, 2, 5], [6, 6, 6], [4, 6, 6]]
    assert table(owners[:0], 2).shape == (2, 0)
    grid = torch.tensor([[1, -1], [0, 0], [-1, 2]])
    assert filled(grid.flatten(), [3, 2], 3).tolist() == [1, 1, 0, 0, 2, 2]
    grid[0, 1] = 2
    assert filled(grid.flatten(), [3, 2], 3).tolist() == grid.flatten().tolist()
