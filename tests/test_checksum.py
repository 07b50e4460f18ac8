"""Every change of a tensor's content shows in its numbers."""

import pytest
import torch

from curvlinops._checksum import Checksum, _together

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
def test_small_tensors_that_are_worked_on_together(dtype):
    tensors = [tensor(size, dtype) for size in (3, 1, 4000)]
    if dtype.is_floating_point and torch.finfo(dtype).max > 1e10:
        tensors[2][0] = 1e10
    look = _together(tensors)
    before = look()
    for t in tensors:
        kept = t.clone()
        change_least(t, len(t) - 1)
        assert not torch.equal(look(), before)
        t.copy_(kept)
        assert torch.equal(look(), before)
