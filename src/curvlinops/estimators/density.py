"""What a spectral density is: Gauss rules, smoothed on a grid, with their error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtr

from curvlinops._files import ArrayFile
from curvlinops._operand import to_numpy
from curvlinops.estimators._base import (
    ArrayResult,
    require_choice,
    require_positive_int,
)
from curvlinops.estimators.smoothing import beta_means, node_spacing

SCALES = ("linear", "log", "abs")
#: What densities' files are, and the fields that are arrays.
FILE = ArrayFile("spectral density", "curvlinops-density", 2)
ARRAYS = ("nodes", "weights", "spikes")


def _identity(x: Any) -> Any:
    """Leave arrays as NumPy's."""
    return x


def check_settings(scale: str, settings: dict[str, Any]) -> None:
    """Raise if a setting breaks its rule; ``None`` boundaries are not known yet.

    Parameters
    ----------
    scale : str
        See :class:`SpectralDensity`, like all others.
    settings : dict
        Values of ``num_points``, ``kappa``, ``margin``, ``epsilon``, ``boundaries``,
        ``min_width``.
    """
    require_choice("scale", scale, SCALES)
    require_positive_int("num_points", settings["num_points"])
    low, high = settings["boundaries"]
    width = settings["min_width"]
    known = [end for end in (low, high) if end is not None]
    rules = {
        "num_points is at least 2": settings["num_points"] > 1,
        "kappa is above 1": settings["kappa"] > 1,
        "margin is not negative": settings["margin"] >= 0,
        "min_width is 'spacing' or a number that is not negative": width == "spacing"
        or (not isinstance(width, str) and 0 <= width < np.inf),
        "epsilon is above 0": scale != "log" or settings["epsilon"] > 0,
        "boundaries are finite": all(np.isfinite(known)),
        "boundaries are a pair (low, high), low < high": len(known) < 2 or low < high,
        "boundaries of |A| are not negative": scale == "linear"
        or min(known, default=0) >= 0,
    }
    for rule, holds in rules.items():
        if not holds:
            given = ", ".join(f"{name}={value}" for name, value in settings.items())
            raise ValueError(f"{rule}; got {given}.")


@dataclass(frozen=True, eq=False)
class SpectralDensity(ArrayResult):
    r"""Density of a matrix's eigenvalues; unpacks as ``(grid, density)``.

    .. math::
        \phi(\lambda) = \frac{1}{R} \sum_{r=1}^{R} \sum_{j=1}^{m} w_{rj}
        \frac{1}{\sigma} \varphi\left(\frac{\lambda - \theta_{rj}}{\sigma}\right),
        \quad \sigma^2 = \left(\frac{b - a}{(m - 1) \sqrt{8 \log \kappa}}\right)^2
        + s(\theta_{rj})^2

    with the ends :math:`a, b` of the grid (boundaries and margin) and the
    :meth:`spacing` :math:`s` of the nodes, which depends on the position. Of ``|A|`` it
    is folded at zero. In the logarithm the nodes are first smoothed by :math:`s` and
    folded, then smoothed by the rest on the logarithmic axis.

    What is estimated is the spectrum, smoothed with the same kernels
    (:meth:`smoothed`). Nodes see it as if all eigenvalues within their spacing were at
    one place, hence kernels that are narrower show the nodes' places instead.

    Attributes
    ----------
    nodes, weights : Tensor or numpy.ndarray
        Gauss rules of the runs, of shape ``(R, m)``; the weights of a run sum to the
        share of eigenvalues that are not in :attr:`spikes`.
    boundaries : tuple of float
        Smallest and largest eigenvalue (of ``|A|`` if ``scale`` is not ``"linear"``).
    dim : int
        Number of eigenvalues.
    spikes : Tensor or numpy.ndarray
        Eigenvalues taken out beforehand, each of the mass ``1 / dim``.
    scale : str
        ``"linear"``; ``"abs"`` for the density of ``|A|``; ``"log"`` for that of
        ``|A| + epsilon I``, smoothed in the logarithm, on a geometric grid.
    num_points, kappa, margin, epsilon : int, float
        Points of the grid; width of the kernel (nearer to one is wider); margin beyond
        the boundaries relative to their distance; shift of the logarithm.
    provenance : dict
        Operator class, shape, dtype, digest of the model's parameters (``None`` for
        other matrices), fingerprint of the matrix (norm and inner products of a product
        with a fixed vector), seed, settings, products, versions.
    convert : callable
        From NumPy arrays to what all arrays are given as.
    min_width : str or float
        ``"spacing"``: the formula above. A number: instead of adding :math:`s`, kernels
        are at least that wide, in the unit of ``A`` or of its logarithm; 0 leaves the
        width to ``kappa``, as it was published, and then the band does not know how far
        nodes are from the eigenvalues for which they stand.

    References
    ----------
    Golub, Meurant, "Matrices, Moments and Quadrature with Applications", Princeton
    (2010), doi:10.1515/9781400833887, on the mass that nodes stand for. Lin, Saad,
    Yang, "Approximating spectral densities of large matrices", SIAM Review 58 (2016),
    arXiv:1308.5467.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.integrate import trapezoid
    >>> from curvlinops.estimators import lanczos_approximate_spectrum
    >>> A = np.diag(np.linspace(-1.0, 1.0, 500))
    >>> result = lanczos_approximate_spectrum(A, 40, rng=0)
    >>> grid, density = result
    >>> bool(np.isclose(trapezoid(density, grid), 1.0))
    True
    >>> truth = result.smoothed(np.linspace(-1.0, 1.0, 500))
    >>> low, high = result.band()
    >>> bool(np.mean((low <= truth) & (truth <= high)) > 0.9)
    True
    """

    nodes: Any
    weights: Any
    boundaries: tuple[float, float]
    dim: int
    spikes: Any = ()
    scale: str = "linear"
    num_points: int = 1024
    kappa: float = 3.0
    margin: float = 0.05
    epsilon: float = 1e-5
    provenance: dict[str, Any] = field(default_factory=dict)
    convert: Callable[[Any], Any] = field(default=_identity, repr=False)
    min_width: Any = field(default="spacing", kw_only=True)
    _exact: dict[str, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments; arrays are shown in the matrix's kind and precision."""
        names = ("num_points", "kappa", "margin", "min_width", "epsilon", "boundaries")
        check_settings(self.scale, {name: getattr(self, name) for name in names})
        arrays = {name: getattr(self, name) for name in ("nodes", "weights", "spikes")}
        exact = {name: np.float64(to_numpy(array)) for name, array in arrays.items()}
        shown = {name: self.convert(array) for name, array in exact.items()}
        vars(self).update(shown, _exact=exact)

    def smooth(self, **settings: Any) -> SpectralDensity:
        """Return the density of the same runs, seen differently.

        Parameters
        ----------
        **settings
            Any of ``num_points``, ``kappa``, ``margin``, ``boundaries``, ``epsilon``,
            ``min_width``.

        Returns
        -------
        SpectralDensity
            Costs no products.
        """
        return replace(self, **self._exact | settings)

    def _coordinate(self, x: np.ndarray) -> np.ndarray:
        """Map eigenvalues of ``A``, ``|A|`` (or grid points) to the kernel's axis."""
        if self.scale == "linear":
            return x
        return np.abs(x) if self.scale == "abs" else np.log(np.abs(x) + self.epsilon)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        low, high = self._coordinate(np.array(self.boundaries, dtype=np.float64))
        pad = self.margin * (high - low)
        start = low - pad if self.scale != "abs" else max(low - pad, 0.0)
        return float(start), float(high + pad)

    @cached_property
    def _cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Points of the grid, and the ends of the cells around them."""
        points = np.linspace(*self._ends, self.num_points)
        points = np.exp(points) if self.scale == "log" else points
        return points, np.r_[points[:1], (points[1:] + points[:-1]) / 2, points[-1:]]

    @cached_property
    def width(self) -> float:
        """Standard deviation of kernels where nothing widens them, in their axis."""
        low, high = self._ends
        steps = max(self._exact["nodes"].shape[1] - 1, 1)
        width = (high - low) / steps / np.sqrt(8 * np.log(self.kappa))
        least = 0.0 if isinstance(self.min_width, str) else self.min_width
        return float(max(width, least))

    @cached_property
    def _spacings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        nodes, weights = self._exact["nodes"], self._exact["weights"]
        # As many nodes as eigenvalues are the eigenvalues.
        if not isinstance(self.min_width, str) or nodes.shape[1] > self._seen - 0.5:
            return []
        return [node_spacing(*rule) for rule in zip(nodes, weights, strict=True)]

    def spacing(self, eigenvalues: Any) -> np.ndarray:
        """Return by how much kernels are widened, in the unit of the matrix.

        Parameters
        ----------
        eigenvalues : array-like
            Where, of any shape.

        Returns
        -------
        numpy.ndarray
            Mean of the runs' spacing of nodes (:func:`node_spacing`), which is linear
            between nodes, of the same shape. Zero unless ``min_width="spacing"``, and
            if there are as many nodes as eigenvalues.
        """
        x = np.asarray(to_numpy(eigenvalues), dtype=np.float64)
        runs = (np.interp(x, *known) for known in self._spacings)
        return sum(runs, np.zeros_like(x)) / max(len(self._spacings), 1)

    def _normal(self, centers: np.ndarray, widths: Any) -> np.ndarray:
        """Return the mass of normal kernels in cells, of shape ``(n, num_points)``."""
        _, axis = self._cells
        axis = np.log(axis) if self.scale == "log" else axis
        c, w = centers[:, None], np.broadcast_to(widths, centers.shape)[:, None]
        below = ndtr((axis - c) / w)
        if self.scale == "abs":
            below -= ndtr((-axis - c) / w)
        return np.diff(below, axis=1)

    def _kernels(self, x: np.ndarray, blur: np.ndarray) -> np.ndarray:
        """Return the density of one eigenvalue each, of shape ``(n, num_points)``.

        Averages over the cells around the grid points, so that the trapezoidal rule
        integrates every kernel to one whatever its width. Kernels at the end of the
        grid are cut off there and scaled up.
        """
        centers = self._coordinate(x)
        slope = 1 / (np.abs(x) + self.epsilon) if self.scale == "log" else 1.0
        reach = slope * blur
        kernels = self._normal(centers, np.hypot(self.width, reach))
        bent = reach > self.width / 4
        if self.scale == "log" and bent.any():
            # Their image is not normal in the logarithm: smoothed cell by cell.
            c, s = x[bent, None], blur[bent, None]
            top = np.log((np.abs(c) + 8 * s).max() + self.epsilon)
            axis = np.arange(np.log(self.epsilon), top, self.width / 8)
            size = np.append(np.exp(axis) - self.epsilon, np.inf)
            mass = np.diff(ndtr((size - c) / s) - ndtr((-size - c) / s))
            kernels[bent] = mass @ self._normal(axis + self.width / 16, self.width)
        low, high = self._ends
        inside = (centers + reach >= low) & (centers - reach <= high)
        scale = np.where(inside, kernels.sum(1), 1.0)
        return kernels / scale[:, None] / np.diff(self._cells[1])

    def smoothed(self, eigenvalues: Any) -> Any:
        """Return the density of given eigenvalues through the kernels of this one.

        Parameters
        ----------
        eigenvalues : array-like
            Of ``A``, without those in :attr:`spikes`.

        Returns
        -------
        Tensor or numpy.ndarray
            Like :attr:`density`, which estimates it if these are all eigenvalues.
        """
        x = np.asarray(to_numpy(eigenvalues), dtype=np.float64)
        parts = np.array_split(x, len(x) // 1000 + 1)
        total = sum(self._kernels(part, self.spacing(part)).sum(0) for part in parts)
        return self.convert(total / self.dim)

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Integrals of the kernels by every rule, and of their squares by all."""
        nodes, weights = self._exact["nodes"], self._exact["weights"]
        runs = zip(weights, map(self._kernels, nodes, self.spacing(nodes)), strict=True)
        moments = [(w @ kernels, w @ kernels**2) for w, kernels in runs]
        first, second = zip(*moments, strict=True)
        return np.array(first), np.mean(second, axis=0)

    @property
    def _seen(self) -> float:
        """Number of eigenvalues that the start vectors see."""
        return float(self._exact["weights"].sum(1).mean()) * self.dim

    @cached_property
    def samples(self) -> Any:
        """Density of every run, of shape ``(R, num_points)``."""
        return self.convert(self._moments[0])

    @cached_property
    def grid(self) -> Any:
        """Points at which the density is given, of shape ``(num_points,)``."""
        return self.convert(self._cells[0])

    @cached_property
    def density(self) -> Any:
        """Share of the eigenvalues per unit of the grid, without the spikes."""
        return self.convert(self._moments[0].mean(0))

    @cached_property
    def standard_error(self) -> Any:
        r"""Standard deviation of :attr:`density` over start vectors on the sphere.

        .. math::
            \sqrt{\frac{2}{R (N + 2)} \left(\int k^2 \, \mathrm{d} \mu -
            \left(\int k \, \mathrm{d} \mu\right)^2\right)}

        for the kernel :math:`k` at a point and the mean :math:`\mu` of the Gauss rules,
        so that it exists for one run. For complex matrices it is too large, at most by
        the square root of two.
        """
        (samples, second), seen = self._moments, self._seen
        spread = seen / self.dim * second - samples.mean(0) ** 2
        variance = 2 / len(samples) / (seen + 2) * np.maximum(spread, 0.0)
        return self.convert(np.sqrt(variance))

    def band(self, level: float = 0.95) -> tuple[Any, Any]:
        r"""Return the pointwise confidence band of the smoothed density.

        At a point, a run's density is a mean of kernels with the squared entries of a
        vector on the sphere as weights. Where kernels are equal or zero, this has a
        beta distribution. The one with the same mean and variance stands for it
        elsewhere (Satterthwaite), and the band holds the means for which the density is
        not in its tails: exactly right for eigenvalues far from all others.

        Parameters
        ----------
        level : float, optional
            Probability that the band covers :meth:`smoothed` of all eigenvalues, at one
            point.

        Returns
        -------
        tuple
            Lower and upper end, like :attr:`density`.

        Raises
        ------
        ValueError
            If the level is not between 0 and 1.

        References
        ----------
        Satterthwaite, "An approximate distribution of estimates of variance
        components", Biometrics Bulletin 2 (1946), doi:10.2307/3002019.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is between 0 and 1, got {level!r}.")
        (samples, second), seen = self._moments, self._seen
        mean = samples.mean(0)
        tiny = np.finfo(mean.dtype).tiny
        height = seen / self.dim * second / np.maximum(mean, tiny)
        part = mean / np.maximum(height, tiny)
        count = len(samples) * (seen / 2 + 1) - 1
        ends = beta_means(part, count, ((1 + level) / 2, (1 - level) / 2))
        low, high = (self.convert(end * height) for end in ends)
        return low, high

    def __iter__(self) -> Iterator[Any]:
        """Yield grid and density."""
        return iter((self.grid, self.density))

    def numpy(self) -> np.ndarray:
        """Return grid and density as rows of a NumPy array."""
        return np.stack([self._cells[0], self._moments[0].mean(0)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, provenance included, to an npz file.

        Parameters
        ----------
        path : str or path-like
            File to write. Grid and density are in it for other programs to read. It
            replaces an earlier one once it is complete.

        Raises
        ------
        ValueError
            If something that is no regular file is there.
        OSError
            If it cannot be written. What was there before is as it was.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self)} | self._exact
        del plain["convert"], plain["_exact"]
        about = {name: plain.pop(name) for name in [*plain] if name not in ARRAYS}
        grid, density = self.numpy()
        error = to_numpy(self.standard_error)
        shown = {"grid": grid, "density": density, "standard_error": error}
        FILE.write(path, about, plain | shown)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpectralDensity:
        """Read what :meth:`save` wrote; arrays are NumPy's.

        Parameters
        ----------
        path : str or path-like
            The file.

        Raises
        ------
        ValueError
            If it is another file, of another version, cut off, or damaged; the message
            says which.
        OSError
            If there is no such file, or it cannot be read.
        """
        about, arrays = FILE.read(path)
        about["boundaries"] = tuple(about["boundaries"])
        return cls(**about | {name: arrays[name] for name in ARRAYS})
