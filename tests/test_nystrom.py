"""The Nyström preconditioner against its definition, and in use."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg

from curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    NystromPreconditionerLinearOperator,
)
from tolerances import assert_close


def decaying(N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, N, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(noise).Q
    spectrum = 10 * torch.arange(1, N + 1, dtype=torch.float64) ** -2.0
    return ((Q * spectrum) @ Q.T).to(dtype)


def test_full_rank_is_the_inverse_up_to_a_factor():
    A = decaying(12)
    M = NystromPreconditionerLinearOperator(A, 12, damping=0.1, rng=0)
    least = torch.linalg.eigvalsh(A)[0] + 0.1
    identity = torch.eye(12, dtype=torch.float64)
    product = M.to_dense() @ (A + 0.1 * identity)
    assert_close(product, least * identity, size=10**8)


def test_sketch_and_seed():
    A = decaying(40)
    M = NystromPreconditionerLinearOperator(A, 6, damping=0.1, rng=3)
    assert_close(M.U.T @ M.U, torch.eye(6))
    assert (M.evals[:-1] >= M.evals[1:]).all()
    assert M.evals[0] <= torch.linalg.eigvalsh(A)[-1] * (1 + 1e-10)
    again = NystromPreconditionerLinearOperator(A, 6, damping=0.1, rng=3)
    assert torch.equal(M.to_dense(), again.to_dense())
    assert_close(M.to_dense(), M.to_dense().T)
    assert M.adjoint() is M


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saves_iterations(dtype):
    A, damping = decaying(200, dtype), 1e-3
    identity = torch.eye(200, dtype=dtype)
    M = NystromPreconditionerLinearOperator(A, 40, damping=damping, rng=0)
    steps = {}
    for name, preconditioner in (("plain", None), ("sketched", M)):
        count = []
        matrix = (A + damping * identity).double().numpy()
        M64 = None if preconditioner is None else preconditioner.to_scipy(np.float64)
        cg(matrix, np.ones(200), M=M64, rtol=1e-6, callback=count.append)
        steps[name] = len(count)
    assert steps["sketched"] < 0.6 * steps["plain"]


def test_inside_of_an_inverse():
    A = decaying(50)
    M = NystromPreconditionerLinearOperator(A, 20, damping=0.01, rng=0)
    damped = A + 0.01 * torch.eye(50, dtype=torch.float64)
    inverse = CGInverseLinearOperator(damped, preconditioner=M)
    x = np.ones(50)
    assert_close(damped.numpy() @ (inverse @ x), x, size=10**10)


def test_zero_matrix():
    M = NystromPreconditionerLinearOperator(torch.zeros(5, 5), 2, rng=0)
    assert_close(M.to_dense(), torch.eye(5))


@pytest.mark.parametrize(
    ("shape", "rank", "damping"),
    [((3, 2), 1, 0.0), ((3, 3), 0, 0.0), ((3, 3), 4, 0.0), ((3, 3), 1, -1.0)],
)
def test_arguments(shape, rank, damping):
    with pytest.raises(ValueError, match="1 <= rank <= N"):
        NystromPreconditionerLinearOperator(torch.ones(shape), rank, damping)


def test_is_a_snapshot():
    net = torch.nn.Linear(3, 2).double()
    data = [(torch.rand(6, 3).double(), torch.rand(6, 2).double())]
    G = GGNLinearOperator(net, torch.nn.MSELoss(), dict(net.named_parameters()), data)
    M = NystromPreconditionerLinearOperator(G, 8, damping=0.1, rng=0)
    before = M.to_dense()
    data[0][0].mul_(2.0)
    assert_close(M.to_dense(), before, size=1)
    new = NystromPreconditionerLinearOperator(G, 8, damping=0.1, rng=0)
    damped = G.to_dense() + 0.1 * torch.eye(8).double()
    factor = torch.linalg.eigvalsh(damped)[0]
    assert_close(new.to_dense() @ damped, factor * torch.eye(8).double(), size=10**4)
    # An old one costs iterations, not accuracy.
    inverse = CGInverseLinearOperator(damped, preconditioner=M)
    assert_close(
        damped @ (inverse @ torch.ones(8).double()), torch.ones(8), size=10**10
    )
