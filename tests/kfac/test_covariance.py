"""Covariances by short cuts against plain products."""

import pytest
import torch
from torch import nn

from cases import find
from curvlinops import KFACLinearOperator
from curvlinops.kfac._covariance import LEAST_BAND, gram, mirror, patch_covariance
from curvlinops.kfac._handlers import HANDLERS
from curvlinops.kfac._recording import Recorder
from curvlinops.kfac._uses import KINDS
from tolerances import assert_close


@pytest.mark.parametrize("size", [3, 2 * LEAST_BAND - 1, 20 * LEAST_BAND + 3])
def test_gram(size):
    rows = torch.randn(2, 7, size, dtype=torch.float64)
    total = torch.zeros(2, size, size, dtype=torch.float64)
    gram(total, rows[:, :3])
    gram(total, rows[:, 3:])
    assert_close(mirror(total), rows.mT @ rows, size=100)
    diagonal = torch.zeros(2, size, dtype=torch.float64)
    gram(diagonal, rows)
    assert_close(mirror(diagonal), rows.square().sum(1), size=100)


def test_gram_of_half_precision():
    rows = torch.randn(1, 7, 3, dtype=torch.bfloat16)
    total = torch.zeros(1, 3, 3)
    gram(total, rows)
    assert_close(total, rows.float().mT @ rows.float())


SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2, "same"])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_shifted_images(monkeypatch, dims, kernel, padding, groups, joint):
    monkeypatch.setattr("curvlinops.kfac._covariance.PLAIN_COST", torch.inf)
    torch.manual_seed(0)
    layer = getattr(nn, f"Conv{dims}d")
    conv = layer(4, 6, kernel, padding=padding, groups=groups).double()
    recorder = Recorder(dict(conv.named_parameters()), HANDLERS)
    with recorder:
        conv(torch.randn(3, 4, *SIZES[dims]).double())
    [use] = recorder.uses
    rows = KINDS["convolution"].inputs(use, 1).flatten(1, 2)
    if joint:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    expected = rows.mT @ rows
    total = torch.zeros_like(expected)
    count = patch_covariance(total, use, joint)
    assert count == rows.shape[1]
    assert_close(total, expected, size=1000)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}])
def test_other_convolutions_take_the_plain_way(options):
    conv = nn.Conv2d(2, 2, 3, **options)
    recorder = Recorder(dict(conv.named_parameters()), HANDLERS)
    with recorder:
        conv(torch.randn(1, 2, 20, 20))
    assert patch_covariance(torch.zeros(1, 18, 18), recorder.uses[0], False) is None


def test_both_ways_agree(monkeypatch):
    """The factors of a network do not depend on the way they are computed."""
    problem = find("conv2d-padding").build()
    short = KFACLinearOperator(*problem, fisher_type="type-2").to_dense()
    name = "curvlinops.kfac._factors.patch_covariance"
    monkeypatch.setattr(name, lambda *_: None)
    plain = KFACLinearOperator(*problem, fisher_type="type-2").to_dense()
    assert_close(short, plain, size=1000)
