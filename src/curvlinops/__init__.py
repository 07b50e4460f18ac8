"""Curvature matrices of neural networks as SciPy linear operators."""

from curvlinops import _conflicts as _conflicts
from curvlinops._adapter import as_model
from curvlinops.estimators import (
    Eigenpairs,
    Estimate,
    JournalledOperator,
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    LayerSummary,
    SpectralDensity,
    Track,
    TrainingCallback,
    apply_function,
    condition_number,
    effective_dimension,
    eigenvalue_count,
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
    layer_summary,
    logdet,
    schatten_norm,
    spectral_norm,
    stable_rank,
    top_eigenpairs,
    trace_of_function,
    track,
    training_callback,
    xdiag,
    xnystrace,
    xtrace,
)
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
    "hutchinson_trace",
    "hutchpp_trace",
    "xtrace",
    "xdiag",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "lanczos_approximate_spectrum",
    "lanczos_approximate_log_spectrum",
    "LanczosApproximateSpectrumCached",
    "LanczosApproximateLogSpectrumCached",
    "xnystrace",
    "spectral_norm",
    "condition_number",
    "stable_rank",
    "trace_of_function",
    "logdet",
    "effective_dimension",
    "eigenvalue_count",
    "schatten_norm",
    "apply_function",
    "top_eigenpairs",
    "track",
    "layer_summary",
    "LayerSummary",
    "training_callback",
    "TrainingCallback",
    "Estimate",
    "Eigenpairs",
    "SpectralDensity",
    "Track",
    "JournalledOperator",
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
    "as_model",
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
