"""Which preconditioner saves iterations where: what README says, on small networks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from curvlinops import (
    CGInverseLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    NystromPreconditionerLinearOperator,
)

RANK = 10


def perceptron(*widths):
    layers = []
    for m, n in pairwise(widths):
        layers += [nn.Linear(m, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def risk_of(model, size):
    """Train on inputs with variances over four orders of magnitude."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, 10, dtype=torch.float64)
    Z = torch.randn(size, 10, dtype=torch.float64)
    X, y = Z * scales, (Z[:, :5] + torch.randn(size, 5) / 2).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = nn.CrossEntropyLoss()
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    return EmpiricalRisk(model, loss, list(model.parameters()), [(X, y)])


def iterations(risk, damping):
    """Return the iterations of CG by preconditioner, all with the right solution."""
    G = GGNLinearOperator(risk)
    A = G + damping * IdentityLinearOperator(G.in_shapes, G.device, G.torch_dtype)
    b = torch.cat([g.flatten() for g in risk.gradient_and_loss()[0]])
    solution = torch.linalg.solve(A.to_dense(), b)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = KFACLinearOperator(risk, **options)
    found = {}
    for name, M in {
        "none": None,
        "exact": K.inverse(damping, use_exact_damping=True),
        "factors": K.inverse(damping),
        "nystrom": NystromPreconditionerLinearOperator(G, RANK, damping, rng=0),
    }.items():
        solver = CGInverseLinearOperator(A, M=M, rtol=1e-8, maxiter=20_000)
        np.testing.assert_allclose(solver @ b, solution, atol=1e-5 * solution.norm())
        found[name] = int(solver.statistics.iterations[0])
    return found


@pytest.mark.parametrize("damping", [1e-1, 1e-2])
def test_more_parameters_than_data(damping):
    """A sketch helps, Kronecker factors do not; damped by factors, even less."""
    torch.manual_seed(1)
    found = iterations(risk_of(perceptron(10, 20, 20, 5), size=30), damping)
    assert found["nystrom"] < found["none"] < found["exact"] / 1.5
    assert found["exact"] < found["factors"] / 1.5


@pytest.mark.parametrize("damping", [1e-3, 1e-5])
def test_more_data_than_parameters(damping):
    """Kronecker factors help at small dampings, more than a sketch of low rank."""
    torch.manual_seed(1)
    found = iterations(risk_of(perceptron(10, 5), size=400), damping)
    assert found["exact"] < found["nystrom"] < found["none"]
    assert found["exact"] < found["none"] / 2.5
    assert found["exact"] < found["factors"]
