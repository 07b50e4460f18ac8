"""Every change of a tensor's content shows in its numbers."""

import pytest
import torch

from curvlinops import _checksum
from curvlinops._checksum import Checksum, _memory, _weighted

DTYPES = [
    *[torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64],
    *[torch.complex128, torch.int64, torch.int32, torch.int8, torch.bool],
]


def tensor(size, dtype):
    generator = torch.Generator().manual_seed(0)
    if dtype in (torch.int64, torch.int32, torch.int8, torch.bool):
        return torch.randint(2, (size,), generator=generator).to(dtype)
    return torch.randn(size, dtype=dtype, generator=generator)


def change_least(t, place):
    """Change one entry as little as its type can."""
    if t.is_complex():
        change_least(torch.view_as_real(t).view(-1), 2 * place)
    elif t.is_floating_point():
        sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        t.view(sizes[t.element_size()])[place] += 1
    elif t.dtype is torch.bool:
        t[place] = ~t[place]
    else:
        t[place] += 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 4096, 70_001])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_single_entry_cannot_change_unseen(dtype, size, offset):
    t = tensor(size + offset, dtype)[offset:]
    look = Checksum([t])
    before = look()
    assert look() == before
    for place in (0, 1, size // 2, size - 2, size - 1):
        kept = t.clone()
        change_least(t, place)
        assert look() != before
        t.copy_(kept)
        assert look() == before


@pytest.mark.parametrize("size", [50, 5000])
def test_a_single_entry_cannot_change_unseen_beside_larger_ones(size):
    t = tensor(size, torch.float32)
    t[::7] *= 1e6
    look = Checksum([t])
    before = look()
    t[1] *= 1 + 1e-5
    assert look() != before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [50, 5000])
def test_entries_that_are_not_finite_count_too(value, size):
    t = tensor(size, torch.float32)
    t[3] = value
    look = Checksum([t])
    before = look()
    assert look() == before
    change_least(t, 7)
    assert look() != before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changes_that_cancel_in_the_sum_of_bits_are_seen(dtype):
    t = tensor(5001, dtype)
    look = Checksum([t])
    before = look()
    # An even distance: the two are at the same place of their eight bytes.
    other = next(i for i in range(8, 5001, 8) if t[i] != t[0])
    t[[0, other]] = t[[other, 0]]
    assert look() != before


def test_rows_of_a_matrix_in_another_order_are_seen():
    t = tensor(90_000, torch.float32).view(300, 300)
    for matrix in (t, t.T, t[:, ::2]):
        look = Checksum([matrix])
        before = look()
        matrix.copy_(matrix.flip(0))
        assert look() != before


def test_empty_tensors_have_a_content_too():
    for dtype in DTYPES:
        look = Checksum([torch.zeros(0, dtype=dtype)])
        assert look() == look()


def test_conjugates_and_imaginary_parts_that_torch_has_not_written_out_are_seen():
    t = tensor(50, torch.complex64)
    for view in (t.conj(), t.conj().imag):
        look = Checksum([view])
        before = look()
        t[3] += 1 + 1j
        assert look() != before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 4000), (70_001,)])
def test_numbers_of_other_devices(dtype, sizes):
    tensors = [tensor(size, dtype) for size in sizes]
    if dtype.is_floating_point and torch.finfo(dtype).max > 1e10:
        tensors[-1][0] = 1e10

    def look():
        return _weighted([*map(_memory, tensors)])

    before = look()
    for t in tensors:
        kept = t.clone()
        change_least(t, len(t) - 1)
        assert not torch.equal(look(), before)
        t.copy_(kept)
        assert torch.equal(look(), before)


# Entries that change places


def swap(t, i, j):
    t[[i, j]] = t[[j, i]]


def looks(t):
    """Return the numbers of a tensor on a CPU, and as other devices have them."""
    return Checksum([t])(), _weighted([_memory(t)]).tolist()


@pytest.mark.parametrize("large", [0.0, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_rows_that_change_places_beside_large_entries_are_seen(large):
    t = torch.randn(70, 70).masked_fill(torch.ones(70, 70).triu(1).bool(), large)
    before = looks(t)
    t[[40, 60], :40] = t[[60, 40], :40]
    for a, b in zip(before, looks(t), strict=True):
        assert a != b


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_complex], ids=str)
@pytest.mark.parametrize("values", [(1, -1), (0, 1), (2, 4), (0, -128)], ids=str)
def test_two_entries_that_change_places_are_seen_wherever_they_are(dtype, values):
    # The difference of 1 and -1 is the highest bit, which an odd factor leaves alone.
    size = 600_000
    t = torch.tensor(values).to(dtype)[torch.arange(size) % 2]
    if t[0] == t[1]:
        pytest.skip("the type has only one of these values")
    before = looks(t)
    steps = [1, 3, 8 * 719 + 1, 16 * 719 + 1, 727 * 8 + 1, 4093 * 16 + 1]
    for start in (0, 1, size // 2, size - steps[-1] - 9):
        for step in steps:
            i, j = start, start + step + (step + 1) % 2  # of different values
            swap(t, i, j)
            for a, b in zip(before, looks(t), strict=True):
                assert a != b, (i, j)
            swap(t, i, j)
    assert looks(t) == before


@pytest.mark.parametrize("width", [2, 3, 64, 719, 727, 1024, 1438, 1454])
@pytest.mark.parametrize("kind", ["signs", "one-hot", "permutation"])
def test_patterns_with_equal_sums_of_rows_and_columns_are_told_apart(width, kind):
    rows = 20_000 // width + 2
    t = torch.zeros(rows, width)
    if kind == "signs":
        t[:] = torch.tensor([1.0, -1.0]).repeat(width)[:width]
        t[1] = -t[0]
        change = [1, 0]
    elif kind == "one-hot":
        t[0, 0] = t[1, 1] = t[2:, -1] = 1
        change = [1, 0]
    else:
        t[torch.arange(rows), torch.arange(rows) % width] = 1
        change = [1, 0]
    before = looks(t)
    t[[0, 1]] = t[change]
    for a, b in zip(before, looks(t), strict=True):
        assert a != b


def test_all_signs_and_all_halves_change_seen():
    def roll(t):
        t.copy_(t.roll(1))

    for change in (torch.Tensor.neg_, roll, lambda t: t.mul_(2)):
        t = torch.ones(100_000)
        t[::2] = -1
        before = looks(t)
        change(t)
        for a, b in zip(before, looks(t), strict=True):
            assert a != b


def test_more_words_than_are_summed_at_once(monkeypatch):
    monkeypatch.setattr(_checksum, "_PRIMES", {"cpu": (29, 31), "cuda": (29, 31)})
    t = torch.zeros(10_000)
    t[5] = 1
    before = looks(t)
    for place in range(5 + 2 * 29 * 31, 10_000, 2 * 29 * 31):
        swap(t, 5, place)
        for a, b in zip(before, looks(t), strict=True):
            assert a != b
        swap(t, 5, place)


def test_expanded_and_transposed_tensors_are_read_without_a_copy():
    t = torch.randn(1, 90, 100)
    for view in (t.expand(1000, 90, 100), t.mT, torch._neg_view(t), t.permute(2, 0, 1)):
        memory = _memory(view)
        assert memory.is_contiguous() and memory.numel() == t.numel()
        assert memory.data_ptr() == t.data_ptr()
