"""Spectral densities, under the path that scripts import them from."""

from curvlinops.estimators.spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)

__all__ = [
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
]
