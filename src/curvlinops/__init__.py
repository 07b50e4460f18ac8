"""Curvature matrices of neural networks as SciPy linear operators."""

from curvlinops import _conflicts as _conflicts
from curvlinops.ggn import FisherMCLinearOperator, GGNLinearOperator
from curvlinops.ggn_diagonal import GGNDiagonalLinearOperator
from curvlinops.gradient_covariance import EFLinearOperator
from curvlinops.gram import GramLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.jacobian import (
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops.risk import EmpiricalRisk
from curvlinops.scalar_function import ScalarFunction

__version__ = "0.1.0"

__all__ = [
    "EFLinearOperator",
    "EmpiricalRisk",
    "FisherMCLinearOperator",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "GramLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "ScalarFunction",
    "TransposedJacobianLinearOperator",
]
