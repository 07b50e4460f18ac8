"""What a spectral density is: Gauss rules, smoothed on a grid, with their error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtr
from scipy.stats import t as student_t

from curvlinops._operand import to_json, to_numpy
from curvlinops.estimators._base import (
    ArrayResult,
    require_choice,
    require_positive_int,
)

SCALES = ("linear", "log", "abs")


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
        Values of ``num_points``, ``kappa``, ``margin``, ``epsilon``, ``boundaries``.
    """
    require_choice("scale", scale, SCALES)
    require_positive_int("num_points", settings["num_points"])
    low, high = settings["boundaries"]
    known = [end for end in (low, high) if end is not None]
    rules = {
        "num_points is at least 2": settings["num_points"] > 1,
        "kappa is above 1": settings["kappa"] > 1,
        "margin is not negative": settings["margin"] >= 0,
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
        \quad \sigma = \frac{b - a}{(m - 1) \sqrt{8 \log \kappa}}

    with the ends :math:`a, b` of the grid (boundaries and margin).

    Attributes
    ----------
    nodes, weights : numpy.ndarray
        Gauss rules of the runs, of shape ``(R, m)``; the weights of a run sum to the
        share of eigenvalues that are not in :attr:`spikes`.
    boundaries : tuple of float
        Smallest and largest eigenvalue (of ``|A|`` if ``scale`` is not ``"linear"``).
    dim : int
        Number of eigenvalues.
    spikes : numpy.ndarray
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
        From NumPy arrays to what grid, density and bands are given as.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.integrate import trapezoid
    >>> from curvlinops.estimators import lanczos_approximate_spectrum
    >>> A = np.diag(np.linspace(-1.0, 1.0, 500))
    >>> result = lanczos_approximate_spectrum(A, 40, kappa=1.1, rng=0)
    >>> grid, density = result
    >>> bool(np.isclose(trapezoid(density, grid), 1.0))
    True
    >>> bool(abs(density[512] - 0.5) < 0.1)  # uniform on [-1, 1]
    True
    """

    nodes: np.ndarray
    weights: np.ndarray
    boundaries: tuple[float, float]
    dim: int
    spikes: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scale: str = "linear"
    num_points: int = 1024
    kappa: float = 3.0
    margin: float = 0.05
    epsilon: float = 1e-5
    provenance: dict[str, Any] = field(default_factory=dict)
    convert: Callable[[Any], Any] = field(default=_identity, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        names = ("num_points", "kappa", "margin", "epsilon", "boundaries")
        check_settings(self.scale, {name: getattr(self, name) for name in names})

    def smooth(self, **settings: Any) -> SpectralDensity:
        """Return the density of the same runs, seen differently.

        Parameters
        ----------
        **settings
            Any of ``num_points``, ``kappa``, ``margin``, ``boundaries``, ``epsilon``.

        Returns
        -------
        SpectralDensity
            Costs no products.
        """
        return replace(self, **settings)

    def _coordinate(self, x: np.ndarray) -> np.ndarray:
        """Map eigenvalues of ``A``, ``|A|`` (or grid points) to the kernel's axis."""
        if self.scale == "linear":
            return x
        return np.abs(x) if self.scale == "abs" else np.log(np.abs(x) + self.epsilon)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        low, high = self._coordinate(np.array(self.boundaries, dtype=np.float64))
        pad = self.margin * (high - low)
        return float(low - pad), float(high + pad)

    @cached_property
    def _points(self) -> np.ndarray:
        points = np.linspace(*self._ends, self.num_points)
        return np.exp(points) if self.scale == "log" else points

    @cached_property
    def samples(self) -> np.ndarray:
        """Density of every run, of shape ``(R, num_points)``.

        Averages over the cells around the grid points, so that the trapezoidal rule
        integrates every kernel to its weight whatever its width. Kernels at the end
        of the grid are cut off there and scaled up.
        """
        low, high = self._ends
        steps = max(self.nodes.shape[1] - 1, 1)
        sigma = (high - low) / steps / np.sqrt(8 * np.log(self.kappa))
        points = self._points
        edges = np.concatenate(
            [points[:1], (points[1:] + points[:-1]) / 2, points[-1:]]
        )
        axis = np.log(edges) if self.scale == "log" else edges
        densities = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            centers = self._coordinate(nodes)[:, None]
            cumulative = ndtr((axis - centers) / sigma)
            mass = cumulative[:, -1] - cumulative[:, 0]
            inside = ((centers >= axis[0]) & (centers <= axis[-1]))[:, 0]
            scaled = weights / np.where(inside, mass, 1.0)
            densities.append(scaled @ np.diff(cumulative, axis=1) / np.diff(edges))
        return np.array(densities)

    @cached_property
    def grid(self) -> Any:
        """Points at which the density is given, of shape ``(num_points,)``."""
        return self.convert(self._points)

    @cached_property
    def density(self) -> Any:
        """Share of the eigenvalues per unit of the grid, without the spikes."""
        return self.convert(self.samples.mean(0))

    @cached_property
    def standard_error(self) -> Any:
        """Standard error of :attr:`density` over the runs; NaN for one run."""
        R = len(self.nodes)
        if R < 2:
            return self.convert(np.full(self.num_points, np.nan))
        return self.convert(self.samples.std(0, ddof=1) / np.sqrt(R))

    def band(self, level: float = 0.95) -> tuple[Any, Any]:
        """Return the pointwise confidence band, cut off at zero.

        Parameters
        ----------
        level : float, optional
            Probability that the band covers the smoothed density, at one point.

        Returns
        -------
        tuple
            Lower and upper end, like :attr:`density`.
        """
        quantile = student_t.ppf((1 + level) / 2, max(len(self.nodes) - 1, 1))
        width = quantile * to_numpy(self.standard_error)
        mean = self.samples.mean(0)
        return self.convert(np.maximum(mean - width, 0)), self.convert(mean + width)

    def __iter__(self) -> Iterator[Any]:
        """Yield grid and density."""
        return iter((self.grid, self.density))

    def numpy(self) -> np.ndarray:
        """Return grid and density as rows of a NumPy array."""
        return np.stack([self._points, self.samples.mean(0)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, provenance included, to an npz file.

        Parameters
        ----------
        path : str or path-like
            File to write. Grid and density are in it for other programs to read.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        del plain["convert"]
        plain["provenance"] = to_json(self.provenance)
        grid, density = self.numpy()
        error = to_numpy(self.standard_error)
        with open(path, "wb") as file:
            np.savez(file, grid=grid, density=density, standard_error=error, **plain)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpectralDensity:
        """Read what :meth:`save` wrote; arrays are NumPy's.

        Parameters
        ----------
        path : str or path-like
            The file.
        """
        with np.load(path) as file:
            plain = {f.name: file[f.name] for f in fields(cls) if f.name != "convert"}
        values = {name: x if x.ndim else x.item() for name, x in plain.items()}
        values["boundaries"] = tuple(values["boundaries"].tolist())
        values["provenance"] = json.loads(values["provenance"])
        return cls(**values)

    def plot(self, ax: Any = None, level: float = 0.95, **style: Any) -> Any:
        """Draw density, confidence band, and spikes.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to; default: the current axes.
        level : float, optional
            Of the band, which takes two runs.
        **style
            Passed on to ``ax.plot``.

        Returns
        -------
        matplotlib.axes.Axes
            What was drawn on. Needs Matplotlib (an extra of this package).
        """
        import matplotlib.pyplot as plt

        ax = plt.gca() if ax is None else ax
        grid, density = self.numpy()
        (line,) = ax.plot(grid, density, **style)
        color = line.get_color()
        if len(self.nodes) > 1:
            low, high = (to_numpy(end) for end in self.band(level))
            ax.fill_between(grid, low, high, color=color, alpha=0.3, linewidth=0)
        if len(self.spikes):
            ax.vlines(self.spikes, 0, density.max() / 10, color=color)
        if self.scale == "log":
            ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(1e-3 / self.dim / (grid[-1] - grid[0]), 3 * density.max())
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        return ax
