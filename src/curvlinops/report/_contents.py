"""What a report says: plain data, and the two files in which it lies.

``report.json`` holds all numbers and texts, ``report.npz`` the arrays, whose places in
it the former names. Everything here is computed: nothing draws, prints, or multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from curvlinops.estimators._base import student

FORMAT = "curvlinops report"
#: Raised whenever an older reader would misunderstand what is written.
VERSION = 1

#: From harmless to what sets the exit status.
STATUSES = ("PASS", "WARN", "FAIL")


@dataclass(frozen=True)
class Number:
    """A number with its error.

    Attributes
    ----------
    value, error : float
        The estimate, and its standard error: of the sample and the Krylov spaces
        together. 0 if nothing is estimated, NaN if nobody knows.
    num_samples : int
        Samples behind it; of few, intervals are wider (Student's).
    converged : bool
        Whether the estimator says so.
    """

    value: float
    error: float = 0.0
    num_samples: int = 1
    converged: bool = True

    def half_width(self, level: float = 0.95) -> float:
        """Return by how much the interval of a confidence level goes to either side."""
        return student(self.num_samples, level) * self.error

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the interval of a confidence level."""
        margin = self.half_width(level)
        return self.value - margin, self.value + margin


@dataclass(frozen=True, eq=False)
class Curve:
    """A density on a grid, with its pointwise band.

    Attributes
    ----------
    grid : numpy.ndarray
        Of shape ``(n,)``, ascending; geometric if the scale is logarithmic.
    density, low, high : numpy.ndarray
        Share of the eigenvalues per unit of the grid, without the spikes; the ends of
        its band. All of shape ``(n,)``.
    level : float
        Probability that the band covers, at one point.
    """

    grid: np.ndarray
    density: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float = 0.95


@dataclass(frozen=True, eq=False)
class Density:
    """A spectral density, and what it was made of.

    Attributes
    ----------
    dim : int
        Number of eigenvalues.
    spikes : numpy.ndarray
        Eigenvalues that were taken out of the curves, each of the mass ``1 / dim``.
    nodes, weights : numpy.ndarray
        Gauss rules of the Lanczos runs, of shape ``(R, m)``; the weights of a run sum
        to the share of eigenvalues that are no spikes.
    linear : Curve
        Density of the eigenvalues.
    log : Curve
        Density of ``|eigenvalue| + epsilon``, on a geometric grid.
    epsilon : float
        Shift of the logarithm, in the matrix's unit.
    """

    dim: int
    spikes: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    linear: Curve
    log: Curve
    epsilon: float

    @property
    def spike_mass(self) -> float:
        """Share of the eigenvalues that one spike is."""
        return 1 / self.dim


@dataclass(frozen=True, eq=False)
class Pairs:
    """Eigenpairs at one end of a spectrum, the outermost first.

    Attributes
    ----------
    values, residuals : tuple of float
        Eigenvalues, and the norms of ``A v - value * v``: how far at most an eigenvalue
        is from each. Never below the noise of a product, which limits what any
        recurrence can say about them.
    vectors : numpy.ndarray
        Orthonormal columns, of shape ``(size, k)``; ``(size, 0)`` if not kept.
    converged : bool
        Whether all residuals are small, and none was missed.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    vectors: np.ndarray
    converged: bool

    def with_noise(self, noise: float) -> Pairs:
        """Return the same with residuals of at least the noise of a product."""
        residuals = tuple(max(r, noise) for r in self.residuals)
        return replace(self, residuals=residuals)


@dataclass(frozen=True)
class Layer:
    """One named parameter's diagonal block of a matrix."""

    name: str
    size: int
    trace: Number
    top_eigenvalue: Number
    frobenius_norm: Number
    effective_dimension: Number


@dataclass(frozen=True)
class Symmetry:
    """How unsymmetric a matrix is, and how noisy its products are.

    Both relative to the size of the numbers compared: inner products of test vectors
    with products of others, taken in either order, or made of a multiple.
    """

    error: float
    noise: float


@dataclass(frozen=True)
class Check:
    """One row of what ``A.verify()`` found."""

    name: str
    error: float
    tolerance: float
    passed: bool
    note: str


@dataclass(frozen=True)
class Dead:
    """Parameters on which the matrix does not depend: rows of zeros.

    Attributes
    ----------
    count : int
        Entries.
    names : tuple of str
        Parameters of which every entry is among them.
    """

    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Matrix:
    """What was found out about one matrix; ``None`` was not asked for, or failed.

    Attributes
    ----------
    name, class_name : str
        As on the command line (``"hessian"``), and in the package.
    size : int
        Rows.
    semidefinite : bool
        Whether it has no negative eigenvalue by construction.
    damping : float
        What the effective dimension and the condition number belong to, in the
        matrix's unit.
    top, bottom : Pairs or None
        Largest and smallest (most negative) eigenvalues.
    trace, frobenius_norm : Number or None
        Of the whole.
    effective_dimension : Number or None
        Sum of ``|x| / (|x| + damping)`` over the eigenvalues.
    negative_threshold : float
        Eigenvalues below its negative count as negative.
    negative_mass : Number or None
        Share of the eigenvalues that do.
    condition_number : Number or None
        Of the matrix plus damping; none if that is indefinite.
    symmetry : Symmetry or None
        See there.
    dead : Dead or None
        See there.
    checks : tuple of Check
        What ``A.verify()`` said.
    layers : tuple of Layer
        A row for every named parameter.
    density : Density or None
        The spectral density.
    dense : numpy.ndarray or None
        The matrix itself, if it is small.
    products : int
        Products spent, one per column.
    seconds : float
        Wall time of all of it.
    failures : tuple of str
        What could not be computed, each with the reason.
    """

    name: str
    class_name: str
    size: int
    semidefinite: bool
    damping: float
    top: Pairs | None = None
    bottom: Pairs | None = None
    trace: Number | None = None
    frobenius_norm: Number | None = None
    effective_dimension: Number | None = None
    negative_threshold: float = 0.0
    negative_mass: Number | None = None
    condition_number: Number | None = None
    symmetry: Symmetry | None = None
    dead: Dead | None = None
    checks: tuple[Check, ...] = ()
    layers: tuple[Layer, ...] = ()
    density: Density | None = None
    dense: np.ndarray | None = None
    products: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()

    def numbers(self) -> Iterator[tuple[str, Number]]:
        """Yield the estimates that there are, with their names in words."""
        for name in ("trace", "frobenius_norm", "effective_dimension", "negative_mass"):
            number = getattr(self, name)
            if number is not None:
                yield name.replace("_", " "), number


@dataclass(frozen=True, eq=False)
class Block:
    """Spectral density of one diagonal block, in units of its own.

    Attributes
    ----------
    name : str
        Of the parameter.
    size : int
        Its entries.
    unit : float
        Magnitude of the eigenvalue by which all were divided: the ``rank``-th largest.
    rank : int
        10, or fewer in blocks that have not so many eigenvalues above zero.
    nodes, weights : numpy.ndarray
        Gauss rules in that unit, of shape ``(R, m)``; all eigenvalues are in them.
    curve : Curve
        Density of ``|eigenvalue| / unit + epsilon``, on the geometric grid that all
        blocks share.
    """

    name: str
    size: int
    unit: float
    rank: int
    nodes: np.ndarray
    weights: np.ndarray
    curve: Curve


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blockwise densities of one matrix.

    Attributes
    ----------
    matrix : str
        Its name.
    epsilon : float
        Shift of the logarithm, in the blocks' units.
    blocks : tuple of Block
        The largest blocks, in the order of the parameters.
    distances : numpy.ndarray
        Jensen-Shannon distances (square roots of divergences to the base 2, between 0
        and 1) of every two of them, of shape ``(B, B)``.
    mean_distance : float
        Mean over the pairs; NaN if there is one block only.
    """

    matrix: str
    epsilon: float
    blocks: tuple[Block, ...]
    distances: np.ndarray
    mean_distance: float


@dataclass(frozen=True, eq=False)
class Overlap:
    """How leading eigenvectors of two matrices overlap.

    Attributes
    ----------
    first, second : str
        Names of the matrices.
    squares : numpy.ndarray
        Squared inner products, of shape ``(k, k)``: rows for the first.
    subspace : float
        Their sum over ``k``: 1 for the same subspace, about ``k / size`` for two random
        ones.
    """

    first: str
    second: str
    squares: np.ndarray
    subspace: float


@dataclass(frozen=True, eq=False)
class Baseline:
    """The same model with random parameters, for comparison.

    Attributes
    ----------
    matrix : str
        Which of the matrices it is.
    top : Pairs
        Its largest eigenvalues, without vectors.
    density : Density
        Its spectral density.
    loss : float
        Its loss.
    """

    matrix: str
    top: Pairs
    density: Density
    loss: float


@dataclass(frozen=True)
class Verdict:
    """What one rule says.

    Attributes
    ----------
    rule : str
        Its name, such as ``"symmetry"``.
    subject : str
        Name of a matrix, or ``"problem"``.
    status : str
        One of :data:`STATUSES`.
    number, bound : float
        What was compared with what; the status is ``PASS`` if the number is no larger.
    text : str
        The rule in words, and what follows if it does not hold.
    """

    rule: str
    subject: str
    status: str
    number: float
    bound: float
    text: str


@dataclass(frozen=True)
class Problem:
    """What the matrices belong to.

    Attributes
    ----------
    name : str
        As on the command line, or ``"digits"`` for the embedded one.
    model, loss : str
        Names of the classes or functions.
    parameters : dict of str to int
        Number of entries of every named parameter, in the order of vectors.
    num_batches, num_data : int
        0 data if batches do not say how many they hold.
    loss_value, gradient_norm : float
        Of the whole data.
    learning_rate : float or None
        If one was given.
    """

    name: str
    model: str
    loss: str
    parameters: dict[str, int]
    num_batches: int
    num_data: int
    loss_value: float
    gradient_norm: float
    learning_rate: float | None = None

    @property
    def num_params(self) -> int:
        """Number of all entries."""
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Counts:
    """How much is computed: counts of products and vectors, not minutes.

    Attributes
    ----------
    top : int
        Eigenpairs at the upper end, and half as many (rounded up) at the lower.
    max_products : int
        At most so many for the eigenpairs of one end.
    ncv, repeats : int
        Lanczos steps per run, and runs.
    probes : int
        Test vectors for trace and norm.
    layer_ncv, layer_repeats : int
        Lanczos steps and runs in every layer; 0 for none.
    block_ncv, block_repeats, max_blocks : int
        The same for blockwise densities, of so many blocks; 0 for none.
    dense : int
        Matrices with at most so many rows are also multiplied out.
    baseline : bool
        Whether a random initialisation is looked at.
    """

    top: int
    max_products: int
    ncv: int
    repeats: int
    probes: int
    layer_ncv: int
    layer_repeats: int
    block_ncv: int
    block_repeats: int
    max_blocks: int
    dense: int
    baseline: bool


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from.

    Attributes
    ----------
    command : str
        The command line.
    started : str
        UTC, as in ISO 8601.
    versions : dict of str to str
        Of Python, this package, NumPy, SciPy, torch.
    machine, device, dtype : str
        Platform, name of the device, and dtype of products.
    seed : int
        Of all random vectors.
    parameters_sha256, data_sha256 : str
        Digests of the parameters (names and bits) and of the data (of all data,
        whatever their order and batches).
    products : int
        All products with the matrices.
    seconds : float
        Wall time of the computation, that before interruptions included.
    """

    command: str
    started: str
    versions: dict[str, str]
    machine: str
    device: str
    dtype: str
    seed: int
    parameters_sha256: str
    data_sha256: str
    products: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Report:
    """All of a report.

    Attributes
    ----------
    provenance, problem, counts
        See there.
    matrices : tuple of Matrix
        In the order asked for.
    overlaps : tuple of Overlap
        Of every two matrices with eigenvectors.
    blocks : Blocks or None
        Of the first matrix.
    baseline : Baseline or None
        Of the first matrix.
    verdicts : tuple of Verdict
        What all rules say.
    notes : tuple of str
        Warnings that came up, and why something is missing.
    """

    provenance: Provenance
    problem: Problem
    counts: Counts
    matrices: tuple[Matrix, ...]
    overlaps: tuple[Overlap, ...] = ()
    blocks: Blocks | None = None
    baseline: Baseline | None = None
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def matrix(self, name: str) -> Matrix | None:
        """Return the matrix of a name, if it is in the report."""
        return next((m for m in self.matrices if m.name == name), None)

    @property
    def failed(self) -> int:
        """Number of verdicts that are ``FAIL``."""
        return sum(verdict.status == "FAIL" for verdict in self.verdicts)
