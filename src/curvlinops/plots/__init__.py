"""Figures of spectra, matrices and training runs, legible in one column of a paper.

Functions take NumPy arrays, tensors, or this package's results, draw on ``ax``
(or on a new figure, 3.4 inches wide with text of 8 points) and return the Matplotlib
axes, for more to be drawn on. On axes that are given, the caller's own style rules, but
for colours: those of :data:`OKABE_ITO`, which people with all kinds of colour vision
tell apart, together with line styles and markers.

Matplotlib is an extra of this package: ``pip install "curvlinops-scipy[report]"``.
Nothing here needs it before something is drawn.

References
----------
Okabe, Ito, "Color universal design: how to make figures and presentations that are
friendly to colorblind people" (2008), https://jfly.uni-koeln.de/color/.
"""

from curvlinops.plots._density import plot_spectral_density
from curvlinops.plots._matrices import plot_layer_summary, plot_matrix
from curvlinops.plots._series import plot_convergence, plot_eigenvalues, plot_tracking
from curvlinops.plots._style import OKABE_ITO, STYLE

__all__ = [
    "OKABE_ITO",
    "STYLE",
    "plot_convergence",
    "plot_eigenvalues",
    "plot_layer_summary",
    "plot_matrix",
    "plot_spectral_density",
    "plot_tracking",
]
