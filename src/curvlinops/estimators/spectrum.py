"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import warnings
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from curvlinops._journal import (
    VERSIONS,
    matrix_fingerprint,
    parameters_fingerprint,
)
from curvlinops._operand import to_numpy
from curvlinops._random import as_seed
from curvlinops.estimators._base import (
    require_positive_int,
    require_tolerance,
)
from curvlinops.estimators._run import Options, Run
from curvlinops.estimators.density import SpectralDensity, check_settings
from curvlinops.estimators.lanczos import Recurrence, Runs, block_size, lanczos
from curvlinops.estimators.ritz import eigenpairs

Boundaries = tuple[float | None, float | None] | None


class RunOptions(Options, total=False):
    """Keywords of Lanczos runs, see :func:`lanczos_approximate_spectrum`."""

    deflate: int


class _Distributions(Runs):
    """Runs, and their cumulative distributions at 64 points: what ``until`` sees."""

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the distribution of every run; no Krylov error is known of it."""
        nodes, weights = self.rules()
        points = np.linspace(nodes.min(), nodes.max(), 64)[:, None, None]
        return ((nodes <= points) * weights).sum(2), np.zeros(self.count)


def _apart(low: float, high: float, least: float) -> tuple[float, float]:
    """Return the ends of a grid, which differ where all eigenvalues are the same."""
    if abs(high - low) > 1e-6 * abs(high):
        return low, high
    width = abs(low) / 1e3 or 1e-3
    return max(low - width, least), high + width


class _CachedRuns:
    r"""Lanczos runs of one Hermitian matrix, and the densities they give.

    The arguments are those of :func:`lanczos_approximate_spectrum`.
    """

    def __init__(
        self,
        A: Any,
        ncv: int,
        boundaries: Boundaries = None,
        boundaries_tol: float = 0.01,
        *,
        deflate: int = 0,
        **options: Unpack[Options],
    ) -> None:
        given: Any = (None, None) if boundaries is None else boundaries
        if np.shape(given) != (2,):
            raise ValueError(f"boundaries are a pair (low, high), got {boundaries!r}.")
        require_tolerance("boundaries_tol", boundaries_tol)
        self._A, self._ncv = A, require_positive_int("ncv", ncv)
        self._boundaries = [None if end is None else float(end) for end in given]
        self._boundaries_tol = boundaries_tol
        self._deflate = require_positive_int("deflate", deflate) if deflate else 0
        if options.get("checkpoint") is None:
            options["rng"] = as_seed(options.get("rng"))
        self._options = options
        self._rules = _Distributions()
        self._found: dict[str, np.ndarray] = {}
        self._fingerprint: list[float] | None = None
        self.num_products = 0

    def _run(self, num_repeats: int) -> dict[str, Any]:
        """Have as many Lanczos runs as asked; return what is common to all results."""
        settings: dict[str, Any] = {
            "ncv": self._ncv,
            "deflate": self._deflate,
            "boundaries": self._boundaries,
        }
        total = self._ncv * (num_repeats - self._rules.count)
        task = "lanczos_approximate_spectrum"
        with Run(self._A, task, self._options, "sphere", total, **settings) as run:
            self._ncv = min(self._ncv, run.dim)
            self._options["rng"] = run.seed
            self._deflated(run)
            vectors = self._found.get("vectors")
            basis = None if vectors is None else torch.from_numpy(vectors)
            basis = None if basis is None else basis.to(run.operand.device)
            if self._rules.count < num_repeats:
                self._accumulate(run, num_repeats, basis)
            self._bounded(run, basis)
            nodes, weights = self._rules.rules()
            spikes = self._found.get("spikes", np.zeros(0))
            counted = {"num_repeats": min(num_repeats, self._rules.count)}
            return {
                "nodes": nodes[:num_repeats],
                "weights": weights[:num_repeats] * (1 - len(spikes) / run.dim),
                "dim": run.dim,
                "spikes": spikes,
                "provenance": settings | counted | self._provenance(run),
                "convert": run.operand.result,
            }

    def _accumulate(self, run: Run, num_repeats: int, basis: Tensor | None) -> None:
        """Have Lanczos runs; several go through one product if their bases fit."""
        size = block_size(run, self._ncv)
        keep = size > 0
        if keep:
            run.block_size = max(1, min(run.block_size, size))
        norm = float(np.abs(self._found.get("spikes", np.zeros(1))).max())

        def krylov(V: Tensor) -> Recurrence:
            V = V if basis is None else V - basis @ (basis.mH @ V)
            eps = run.operand.eps
            return lanczos(
                run.multiply, V, self._ncv, keep, eps=eps, norm=norm, deflated=basis
            )

        run.accumulate(self._rules, krylov, num_repeats, section="runs")
        if run.until is not None:
            moments = self._rules.moments()
            run.check(*moments.mean_and_sem(), self._rules.count)

    def _provenance(self, run: Run) -> dict[str, Any]:
        """Return what is known of the matrix, and count the products."""
        if self._fingerprint is None:
            self._fingerprint = (
                matrix_fingerprint(run.operand)
                if run.journal is None
                else run.journal.identity["fingerprint"]
            )
        # A checkpoint counts the products before, too.
        made, before = run.operand.num_products, self.num_products
        resumed = self._options.get("checkpoint") is not None
        self.num_products = max(made, before) if resumed else made + before
        return {
            "class": run.operand.name,
            "shape": list(run.operand.shape),
            "dtype": str(run.operand.dtype),
            "parameters": parameters_fingerprint(run.operand),
            "fingerprint": self._fingerprint,
            "seed": run.seed,
            "num_products": self.num_products,
            "versions": VERSIONS,
        }

    def _section(self, run: Run, name: str, compute: Any) -> None:
        """Find some arrays out once, and keep them here and in the checkpoint."""
        stored = run.load(name)
        if stored is None:
            stored = compute()
            run.save(name, stored)
        self._found.update(stored)

    def _deflated(self, run: Run) -> None:
        if not self._deflate or "spikes" in self._found:
            return
        if self._deflate >= run.dim:
            raise ValueError(f"deflate ({self._deflate}) must be below {run.dim}.")
        tol = run.operand.eps ** (2 / 3)

        def compute() -> dict[str, np.ndarray]:
            found = eigenpairs(run, self._deflate, "LM", tol)
            good = found.residuals <= tol * found.norm
            if not good.all():
                warnings.warn(
                    f"{good.sum()} of {self._deflate} eigenvalues converged and are "
                    "removed; the others stay in the density.",
                    stacklevel=6,
                )
            vectors = to_numpy(found.vectors[:, torch.from_numpy(good)])
            return {"spikes": found.values[good], "vectors": vectors}

        self._section(run, "deflation", compute)

    def _bounded(self, run: Run, basis: Tensor | None) -> None:
        if "ends" in self._found or None not in self._boundaries:
            return

        def compute() -> dict[str, np.ndarray]:
            nodes, weights = self._rules.rules()
            seen = nodes[weights > 1e-12]
            if np.ptp(seen) <= 1e-6 * np.abs(seen).max():  # a multiple of the identity
                return {"ends": np.full(2, seen.mean())}
            found = eigenpairs(
                run, 2, "BE", self._boundaries_tol, deflated=basis, certify=False
            )
            return {"ends": found.values}

        self._section(run, "boundaries", compute)

    def _result(self, scale: str, num_repeats: int, *settings: Any) -> SpectralDensity:
        names = ("num_points", "kappa", "margin", "min_width", "epsilon")
        named = dict(zip(names, settings, strict=False))
        check_settings(scale, {"boundaries": self._boundaries, **named})
        common = self._run(require_positive_int("num_repeats", num_repeats))
        low, high = self._found.get("ends", np.zeros(2)).tolist()
        if scale == "log":  # what was given are the ends of |A|
            low, high = self._absolute((low, high), common["nodes"])
        first, last = self._boundaries
        low, high = low if first is None else first, high if last is None else last
        ends = _apart(low, high, -np.inf if scale == "linear" else 0.0)
        return SpectralDensity(boundaries=ends, scale=scale, **named, **common)

    @staticmethod
    def _absolute(ends: tuple[float, float], nodes: np.ndarray) -> tuple[float, float]:
        """Return the ends of ``|A|``: the nodes tell how near to zero it comes.

        Unless the matrix is definite, and by so much that its end is accurate.
        """
        low, high = sorted(abs(end) for end in ends)
        definite = ends[0] * ends[1] > 0 and low > 0.03 * high
        return low if definite else float(np.abs(nodes).min()), high


class LanczosApproximateSpectrumCached(_CachedRuns):
    r"""Spectral densities of one Hermitian matrix, all from the same Lanczos runs.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    ncv, boundaries, boundaries_tol, deflate, **options
        See :func:`lanczos_approximate_spectrum`.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.linspace(-1.0, 1.0, 500))
    >>> cached = LanczosApproximateSpectrumCached(A, 20, rng=0)
    >>> coarse = cached.approximate_spectrum(num_repeats=2, kappa=1.1)
    >>> products = cached.num_products
    >>> fine = cached.approximate_spectrum(num_repeats=2, kappa=10.0)
    >>> cached.num_products == products  # the second density costs nothing
    True
    """

    def approximate_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        *,
        min_width: str | float = "spacing",
    ) -> SpectralDensity:
        """Return the density of the eigenvalues.

        Parameters
        ----------
        num_repeats : int, optional
            Lanczos runs; those already made are reused.
        num_points, kappa, margin, min_width : int, float, optional
            See :class:`~curvlinops.estimators.SpectralDensity`.

        Returns
        -------
        SpectralDensity
            Unpacks as ``(grid, density)``.
        """
        settings = (num_points, kappa, margin, min_width)
        return self._result("linear", num_repeats, *settings)

    def approximate_abs_spectrum(self, *args: Any, **settings: Any) -> SpectralDensity:
        """Return the density of the eigenvalues' absolute values.

        Takes and returns what :meth:`approximate_spectrum` does.
        """
        signed = self.approximate_spectrum(*args, **settings)
        nodes = self._rules.rules()[0][: len(signed.nodes)]
        ends = _apart(*self._absolute(signed.boundaries, nodes), 0.0)
        return signed.smooth(scale="abs", boundaries=ends)


class LanczosApproximateLogSpectrumCached(_CachedRuns):
    r"""Densities on a logarithmic scale, all from the same Lanczos runs.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    ncv, boundaries, boundaries_tol, deflate, **options
        See :func:`lanczos_approximate_log_spectrum`.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.integrate import trapezoid
    >>> A = np.diag(np.geomspace(1e-3, 1.0, 500))
    >>> cached = LanczosApproximateLogSpectrumCached(A, 20, rng=0)
    >>> grid, density = cached.approximate_log_spectrum(num_repeats=2)
    >>> bool(np.isclose(trapezoid(density, grid), 1.0))
    True
    """

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 1.04,
        margin: float = 0.05,
        epsilon: float = 1e-5,
        *,
        min_width: str | float = "spacing",
    ) -> SpectralDensity:
        """Return the density of the eigenvalues of ``|A| + epsilon I``.

        It is smoothed in the logarithm, and given per unit of the eigenvalue on a
        geometric grid.

        Parameters
        ----------
        num_repeats : int, optional
            Lanczos runs; those already made are reused.
        num_points, kappa, margin, epsilon, min_width : int, float, optional
            See :class:`~curvlinops.estimators.SpectralDensity`.

        Returns
        -------
        SpectralDensity
            Unpacks as ``(grid, density)``.
        """
        settings = (num_points, kappa, margin, min_width, epsilon)
        return self._result("log", num_repeats, *settings)


def lanczos_approximate_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 0.01,
    *,
    min_width: str | float = "spacing",
    **options: Unpack[RunOptions],
) -> SpectralDensity:
    r"""Approximate the density of a Hermitian matrix's eigenvalues.

    .. math::
        \phi(\lambda) \approx \frac{1}{N} \sum_{i=1}^{N} \delta(\lambda - \lambda_i),
        \quad \int \phi(\lambda) \, \mathrm{d}\lambda = 1

    by Gauss rules of Lanczos runs with random start vectors, whose nodes are smoothed
    by a normal kernel (formula in :class:`~curvlinops.estimators.SpectralDensity`).

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    ncv : int
        Lanczos steps per run, at most ``N``: the resolution of the density.
    num_points : int, optional
        Points of the grid.
    num_repeats : int, optional
        Lanczos runs that are averaged; with ``until`` the limit.
    kappa : float, optional
        Width of the kernel, above 1; nearer to 1 is wider. See ``min_width``.
    boundaries : tuple, optional
        Smallest and largest eigenvalue; ``None`` entries are computed by
        a Lanczos run of their own.
    margin : float, optional
        How far the grid goes beyond them, relative to their distance.
    boundaries_tol : float, optional
        Residual norm that they may have, relative to the largest magnitude.
    min_width : str or float, optional
        ``"spacing"``: kernels are not narrower than the distance between the nodes
        where they are, which a Gauss rule does not resolve (and which is zero at
        eigenvalues that the runs have found). A number: nor than that, in the unit of
        ``A``. 0: ``kappa`` alone, the published formula.
    deflate : int, optional
        Number of eigenvalues of largest magnitude that are computed, removed, and
        shown as spikes of their exact mass ``1 / N``.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. ``until`` bounds the relative
        standard error of the cumulative distribution; ``return_estimate`` has no
        effect: the result holds its errors.

    Returns
    -------
    SpectralDensity
        Unpacks as ``(grid, density)``; holds error bands, nodes and weights, spikes,
        and provenance.

    Raises
    ------
    ValueError
        If an argument breaks its rule, a product is not finite, or the matrix turns out
        not to be Hermitian.

    See Also
    --------
    LanczosApproximateSpectrumCached : Several densities of the same runs, and that of
        :math:`|A|`.

    Notes
    -----
    Costs ``ncv * num_repeats`` products, those for the boundaries (10 to 60), and one
    for the fingerprint. Memory: the basis of one run, ``ncv`` vectors, which is kept
    for full orthogonalisation if it fits into 2 GiB; else 5 vectors, and eigenvalues
    may repeat, with weights that add up rightly.

    1-Wasserstein distance of nodes and weights from the exact spectrum, relative to its
    range, for N = 1000 and 10 repeats (``benchmarks/density_wasserstein.py``):

    ==============  =======  =======  =======  ======================
    spectrum        ncv=10   ncv=30   ncv=100  ncv=100 and deflate=2
    ==============  =======  =======  =======  ======================
    clustered       2.2e-03  1.9e-03  1.8e-03  1.7e-03
    heavy-tailed    7.9e-03  2.9e-03  1.4e-03  1.3e-03
    two outliers    1.0e-03  4.0e-04  2.3e-04  8.2e-05
    indefinite      2.5e-02  8.3e-03  2.8e-03  2.8e-03
    rank-deficient  9.5e-03  7.5e-03  7.5e-03  8.0e-03
    ==============  =======  =======  =======  ======================

    References
    ----------
    Papyan, "Traces of class/cross-class structure pervade deep learning spectra", JMLR
    21 (2020). Lin, Saad, Yang, "Approximating spectral densities of large matrices",
    SIAM Review 58 (2016), arXiv:1308.5467. Ghorbani, Krishnan, Xiao, "An investigation
    into neural net optimization via Hessian eigenvalue density", ICML 2019,
    arXiv:1901.10159. Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic
    Lanczos quadrature", SIAM J. Matrix Analysis and Applications 38 (2017),
    doi:10.1137/16M1104974.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.integrate import trapezoid
    >>> A = np.diag(np.r_[np.linspace(-1.0, 1.0, 498), 50.0, 80.0])
    >>> result = lanczos_approximate_spectrum(A, 20, deflate=2, rng=0)
    >>> bool(np.allclose(result.spikes, [80, 50]))
    True
    >>> mass = trapezoid(result.density, result.grid) + 2 / 500
    >>> bool(np.isclose(mass, 1.0))
    True
    """
    cached = LanczosApproximateSpectrumCached(
        A, ncv, boundaries, boundaries_tol, **options
    )
    return cached.approximate_spectrum(
        num_repeats, num_points, kappa, margin, min_width=min_width
    )


def lanczos_approximate_log_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 0.01,
    epsilon: float = 1e-5,
    *,
    min_width: str | float = "spacing",
    **options: Unpack[RunOptions],
) -> SpectralDensity:
    r"""Approximate the density of :math:`|A| + \epsilon I` on a logarithmic scale.

    The nodes of the Gauss rules of ``A`` are mapped by
    :math:`\theta \mapsto \log(|\theta| + \epsilon)` and smoothed there. The density is
    given per unit of the eigenvalue, on a geometric grid: it integrates to one over the
    grid.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    ncv, num_points, num_repeats, kappa, margin, boundaries_tol : int, float, optional
        See :func:`lanczos_approximate_spectrum`.
    boundaries : tuple, optional
        Smallest and largest eigenvalue of ``|A|``; ``None`` entries are computed. The
        smallest of an indefinite matrix is that of the Gauss rules' nodes.
    epsilon : float, optional
        Shift of the logarithm, above 0, in the unit of ``A``.
    min_width : str or float, optional
        As there; a number is in the unit of the logarithm. The distance between the
        nodes at zero, about ``|A| / ncv**2`` to ``|A| / ncv``, is the smallest
        eigenvalue that can be told from zero: below it the density is flat.
    deflate, **options
        See :func:`lanczos_approximate_spectrum`.

    Returns
    -------
    SpectralDensity
        Unpacks as ``(grid, density)``.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    References
    ----------
    Papyan, "Traces of class/cross-class structure pervade deep learning spectra", JMLR
    21 (2020).

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.integrate import trapezoid
    >>> A = np.diag(np.geomspace(1e-4, 1.0, 500))
    >>> grid, density = lanczos_approximate_log_spectrum(A, 40, rng=0)
    >>> bool(np.isclose(trapezoid(density, grid), 1.0))
    True
    """
    cached = LanczosApproximateLogSpectrumCached(
        A, ncv, boundaries, boundaries_tol, **options
    )
    return cached.approximate_log_spectrum(
        num_repeats, num_points, kappa, margin, epsilon, min_width=min_width
    )
