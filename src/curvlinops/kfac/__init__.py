"""Kronecker-factored approximations of curvature matrices."""

from curvlinops.kfac._blocks import BlockwiseLinearOperator, load
from curvlinops.kfac.operators import (
    EKFACLinearOperator,
    FisherType,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
    KFOCLinearOperator,
)

__all__ = [
    "BlockwiseLinearOperator",
    "EKFACLinearOperator",
    "FisherType",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
    "load",
]
