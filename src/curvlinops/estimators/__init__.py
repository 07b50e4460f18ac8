"""Spectra, traces and functions of a matrix, each with its error bar.

Everything here sees a matrix only through ``A @ x``, ``A.shape`` and ``A.dtype``: any
SciPy ``LinearOperator``, array, sparse matrix, tensor, or operator of this package. The
results live where the matrix lives: tensors on its device for tensors and operators of
this package, NumPy for everything else.
"""

from curvlinops._journal import Checkpoint, JournalledOperator
from curvlinops.estimators._base import Estimate
from curvlinops.estimators._layer_table import LayerSummary
from curvlinops.estimators._run import Options
from curvlinops.estimators.density import SpectralDensity
from curvlinops.estimators.diagonal import hutchinson_diag, xdiag
from curvlinops.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from curvlinops.estimators.functions import (
    apply_function,
    effective_dimension,
    eigenvalue_count,
    logdet,
    schatten_norm,
    trace_of_function,
)
from curvlinops.estimators.layers import layer_summary
from curvlinops.estimators.norm import (
    condition_number,
    hutchinson_squared_fro,
    spectral_norm,
    stable_rank,
)
from curvlinops.estimators.spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from curvlinops.estimators.trace import (
    hutchinson_trace,
    hutchpp_trace,
    xnystrace,
    xtrace,
)
from curvlinops.estimators.tracking import Track, track
from curvlinops.estimators.training import TrainingCallback, training_callback

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Checkpoint",
    "JournalledOperator",
    "LayerSummary",
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "Options",
    "SpectralDensity",
    "Track",
    "TrainingCallback",
    "apply_function",
    "condition_number",
    "effective_dimension",
    "eigenvalue_count",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "layer_summary",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "logdet",
    "schatten_norm",
    "spectral_norm",
    "stable_rank",
    "top_eigenpairs",
    "trace_of_function",
    "track",
    "training_callback",
    "xdiag",
    "xnystrace",
    "xtrace",
]
