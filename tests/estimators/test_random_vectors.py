"""Test vectors: moments, independence of device, blocks and order, sources."""

import numpy as np
import pytest
import torch

from curvlinops._random import DISTRIBUTIONS, Probes, as_seed
from curvlinops.sampling import random_vector


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_identity_covariance(distribution):
    V = Probes(6, distribution, 0).block(0, 20_000)
    covariance = V @ V.T / V.shape[1]
    assert (V.mean(1).abs() < 5 / V.shape[1] ** 0.5).all()
    assert ((covariance - torch.eye(6)).abs() < 5 * (3 / V.shape[1]) ** 0.5).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_column_depends_on_its_index_only(distribution, dtype):
    probes = Probes(37, distribution, 3, dtype)
    V = probes.block(0, 9)
    assert V.dtype == dtype and V.shape == (37, 9)
    assert torch.equal(V[:, 4:6], probes.block(4, 6))
    assert not torch.equal(V[:, 0], V[:, 1])
    assert not torch.equal(V, Probes(37, distribution, 4, dtype).block(0, 9))


def test_lengths_and_signs():
    assert set(Probes(50, "rademacher", 0).block(0, 2).unique().tolist()) == {-1, 1}
    norms = torch.linalg.vector_norm(Probes(50, "sphere", 0).block(0, 5), dim=0)
    assert torch.allclose(norms, torch.full_like(norms, 50**0.5))


def test_seed_from_every_source():
    assert as_seed(7) == as_seed(np.int64(7)) == 7
    assert as_seed(np.random.default_rng(1)) == as_seed(np.random.default_rng(1))
    generator = torch.Generator().manual_seed(1)
    assert as_seed(generator) != as_seed(generator)
    torch.manual_seed(5)
    first = as_seed(None)
    torch.manual_seed(5)
    assert as_seed(None) == first


@pytest.mark.parametrize("rng", ["0", 1.5, True])
def test_wrong_source(rng):
    with pytest.raises(TypeError, match=r"numpy\.random\.Generator"):
        as_seed(rng)


def test_negative_seed():
    with pytest.raises(ValueError, match="between 0"):
        as_seed(-1)


def test_random_vector():
    torch.manual_seed(0)
    a = random_vector(5, "normal", torch.device("cpu"), torch.float32)
    b = random_vector(5, "normal", "cpu", torch.float32)
    assert a.shape == (5,) and a.dtype == torch.float32 and not torch.equal(a, b)
    with pytest.raises(ValueError, match="'rademacher', 'normal', 'sphere'"):
        random_vector(5, "uniform", "cpu", torch.float32)
