"""Curvature matrices of neural networks as SciPy linear operators."""

from curvlinops import _conflicts as _conflicts
from curvlinops.ggn import FisherMCLinearOperator, GGNLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.risk import EmpiricalRisk

__version__ = "0.1.0"

__all__ = [
    "EmpiricalRisk",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
]
