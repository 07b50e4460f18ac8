"""Named tensors as flat vectors, and the border between NumPy and torch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from curvlinops._spaces import (
    NUMPY_DTYPES,
    TensorSpace,
    numeric_array,
    real_scalar,
    rounding,
    to_numpy,
)

SHAPES = [(2, 3), (), (4,), (0, 2), (1, 1, 2)]
DIM = 6 + 1 + 4 + 0 + 2


def space(dtype: torch.dtype = torch.float64) -> TensorSpace:
    return TensorSpace(SHAPES, dtype, "cpu", names="abcde")


def test_dimensions_are_those_of_the_tensors():
    s = space()
    assert s.dim == DIM and s.sizes == (6, 1, 4, 0, 2)
    assert s.names == ("a", "b", "c", "d", "e")
    assert s.slices() == [
        slice(0, 6),
        slice(6, 7),
        slice(7, 11),
        slice(11, 11),
        slice(11, 13),
    ]
    assert TensorSpace(SHAPES, torch.float32, "cpu").names == ("0", "1", "2", "3", "4")
    assert "13" in repr(s) and "float64" in repr(s) and "cpu" in repr(s)


def test_spaces_are_equal_if_their_vectors_are_alike():
    assert space() == TensorSpace(SHAPES, torch.float64, "cpu")
    assert space() != space(torch.float32) == space().with_dtype(torch.float32)
    assert space() != TensorSpace(SHAPES[::-1], torch.float64, "cpu")
    assert space() != 3


def test_flat_space():
    s = TensorSpace.flat(5, torch.float32, "cpu")
    assert s.dim == 5 and s.shapes == (torch.Size([5]),)


@pytest.mark.parametrize("K", [None, 0, 1, 3])
def test_pack_and_unpack_are_inverse(K: int | None):
    columns = () if K is None else (K,)
    s = space()
    tensors = [torch.randn((*shape, *columns), dtype=torch.float64) for shape in SHAPES]
    flat = s.pack(tensors)
    assert flat.shape == (DIM, *columns)
    for before, after in zip(tensors, s.unpack(flat), strict=True):
        assert torch.equal(before, after)
    if K == 3:
        # column by column, every tensor is flattened row by row
        one = torch.cat([t[..., 1].flatten() for t in tensors])
        assert torch.equal(flat[:, 1], one)


def test_split_and_join_are_inverse():
    flat = torch.randn(2, DIM)
    s = space(torch.float32)
    parts = s.split(flat)
    assert [p.shape for p in parts] == [(2, *shape) for shape in SHAPES]
    assert torch.equal(s.join(parts, leading=1), flat)
    assert torch.equal(s.join(s.split(flat[0])), flat[0])
    parts[0].zero_()
    assert not flat[:, :6].any()  # views


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.zeros(2, 3)],
        [torch.zeros(3, 2), torch.zeros(()), torch.zeros(4)],
        [torch.zeros(2, 3, 5), torch.zeros(5), torch.zeros(4, 4)],
        [torch.zeros(2, 3, 5, 1), torch.zeros(5), torch.zeros(4, 5)],
        [torch.zeros(2, 3), torch.zeros(()), torch.zeros(4), torch.zeros(1)],
    ],
    ids=["none", "few", "transposed", "columns", "4-d", "many"],
)
def test_pack_names_the_shapes_on_both_sides(tensors: list):
    s = TensorSpace([(2, 3), (), (4,)], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"list of tensors|\(2, 3\).*got the shapes"):
        s.pack(tensors)


def test_only_real_floating_types_make_a_space():
    for dtype in NUMPY_DTYPES:
        assert TensorSpace([(2,)], dtype, "cpu").numpy_dtype == NUMPY_DTYPES[dtype]
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=r"real floating-point.*\.to\("):
            TensorSpace([(2,)], dtype, "cpu")


def test_adopt_moves_nothing_that_fits():
    s, x = space(), torch.randn(DIM, dtype=torch.float64)
    assert s.adopt(x).data_ptr() == x.data_ptr()
    assert not s.adopt(x.requires_grad_()).requires_grad
    assert s.adopt(torch.ones(DIM, dtype=torch.int32)).dtype is torch.float64
    assert s.adopt(torch.ones(DIM, dtype=torch.bool)).dtype is torch.float64
    with pytest.raises(TypeError, match=r"float64.*float32.*x\.to\("):
        s.adopt(torch.ones(DIM))
    with pytest.raises(ValueError, match=r"cpu.*meta.*x\.to\("):
        s.adopt(torch.ones(DIM, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize(
    "value", [1, [1.0, 2.0], np.float16(3), True, (1, 2j), np.ones(3, ">f8")]
)
def test_numbers_are_arrays(value: object):
    assert isinstance(numeric_array(value), np.ndarray)


@pytest.mark.parametrize(
    "value",
    [
        "abc",
        None,
        np.array([1, None]),
        np.array(["1"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        {"a": 1},
        np.zeros(2, [("a", float)]),
    ],
    ids=["str", "None", "object", "strings", "dates", "dict", "records"],
)
def test_anything_else_is_refused(value: object):
    with pytest.raises(TypeError, match=r"multiplies numbers.*dtype.*NumPy array"):
        numeric_array(value)


@pytest.mark.parametrize("dtype", list(NUMPY_DTYPES))
def test_tensors_cross_to_numpy(dtype: torch.dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    array = to_numpy(x)
    assert array.dtype == NUMPY_DTYPES[dtype]
    assert array.tolist() == x.tolist()
    shares = dtype in (torch.float32, torch.float64)
    assert (array.ctypes.data == x.data_ptr()) == shares
    assert to_numpy(x.requires_grad_()).shape == (2, 3)


@pytest.mark.parametrize(
    "scalar",
    [
        2,
        2.0,
        np.float32(2),
        np.int8(2),
        np.float16(2),
        np.longdouble(2),
        np.array(2),
        torch.tensor(2),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.tensor(2.0)),
    ],
)
def test_scalars(scalar: object):
    assert real_scalar(scalar) == 2.0 and type(real_scalar(scalar)) is float
    assert real_scalar(True) == real_scalar(np.True_) == 1.0


@pytest.mark.parametrize(
    "make", [lambda: 2j, lambda: "2", lambda: [2], lambda: np.ones(1), lambda: None]
)
def test_what_is_no_real_scalar(make: Callable):
    assert real_scalar(make()) is None
    assert real_scalar(torch.ones(1)) is None


def test_arrays_with_strides_that_torch_lacks_are_copied():
    records = np.zeros(4, dtype=[("a", "f8"), ("b", "u1")])
    records["a"] = [1, 2, 3, 4]
    space = TensorSpace.flat(4, torch.float64, "cpu")
    with space.staging.convert(records["a"], space) as tensor:
        assert tensor.tolist() == [1, 2, 3, 4]


def test_rounding_knows_tf32(tf32):
    cuda, (products, convolutions) = torch.device("cuda"), tf32
    for matmul, cudnn in ((False, True), (False, False), (True, False)):
        products.allow_tf32, convolutions.allow_tf32 = matmul, cudnn
        for convolves in (False, True):
            rough = matmul or (cudnn and convolves)
            eps = 2.0**-10 if rough else torch.finfo(torch.float32).eps
            assert rounding(torch.float32, cuda, convolves) == eps
        assert rounding(torch.float64, cuda, True) == torch.finfo(torch.float64).eps
        assert rounding(torch.float32, torch.device("cpu"), True) < 1e-6
