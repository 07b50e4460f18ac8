"""Curvature matrices of neural networks as SciPy linear operators."""

from curvlinops.ggn import FisherMCLinearOperator, GGNLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.risk import EmpiricalRisk

__all__ = [
    "EmpiricalRisk",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
]
