"""Curvature matrices of neural networks as SciPy linear operators."""

from curvlinops import _conflicts as _conflicts
from curvlinops.ggn import FisherMCLinearOperator, GGNLinearOperator
from curvlinops.ggn_diagonal import GGNDiagonalLinearOperator
from curvlinops.gradient_covariance import EFLinearOperator
from curvlinops.gram import GramLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.inverse import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from curvlinops.jacobian import (
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops.kfac import (
    EKFACLinearOperator,
    FisherType,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
    KFOCLinearOperator,
)
from curvlinops.kronecker import (
    EighDecomposedLinearOperator,
    KroneckerProductLinearOperator,
)
from curvlinops.losses import as_loss_function
from curvlinops.nystrom import NystromPreconditionerLinearOperator
from curvlinops.risk import EmpiricalRisk
from curvlinops.scalar_function import ScalarFunction
from curvlinops.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    IdentityLinearOperator,
    OuterProductLinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
)

__version__ = "0.1.0"

__all__ = [
    "CGInverseLinearOperator",
    "LSMRInverseLinearOperator",
    "MINRESInverseLinearOperator",
    "NeumannInverseLinearOperator",
    "NystromPreconditionerLinearOperator",
    "BlockDiagonalLinearOperator",
    "DiagonalLinearOperator",
    "IdentityLinearOperator",
    "OuterProductLinearOperator",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "EKFACLinearOperator",
    "FisherType",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
    "EighDecomposedLinearOperator",
    "KroneckerProductLinearOperator",
    "as_loss_function",
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
