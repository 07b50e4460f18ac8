"""The Kronecker-factored operators: KFAC, EKFAC, KFOC, and KFAC's inverse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum
from os import PathLike
from typing import Any, NamedTuple

from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._model import Parameters
from curvlinops._operator import TorchOperator
from curvlinops.ggn import DEFAULT_SEED
from curvlinops.kfac._blocks import Block, BlockwiseLinearOperator, Damping, load
from curvlinops.kfac._corrections import ekfac, kfoc
from curvlinops.kfac._estimation import Estimation, Settings
from curvlinops.kfac._factors import kfac
from curvlinops.kfac._layers import Fisher
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk

#: Largest factor that is kept as a matrix: 256 MiB in single precision.
MAX_FACTOR = 8192


class FisherType(StrEnum):
    """What is sent back through the model; plain strings are accepted."""

    TYPE2 = "type-2"
    MC = "mc"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACType(StrEnum):
    """How positions that share a weight are treated; plain strings are accepted."""

    EXPAND = "expand"
    REDUCE = "reduce"


class Factors(NamedTuple):
    """The covariances of a layer's inputs and of its output gradients.

    Of shape ``(n, n)`` and ``(m, m)``, one dimension less if diagonal, and one more in
    front if the layer has groups.
    """

    input: Tensor
    output: Tensor


class KroneckerFactored(RiskOperator):
    """What KFAC, EKFAC and KFOC share: a block-diagonal matrix computed at first use.

    Parameters
    ----------
    risk : EmpiricalRisk
        Model, loss, parameters and data.
    settings : Settings
        What is estimated.
    """

    def __init__(self, risk: EmpiricalRisk, settings: Settings) -> None:
        super().__init__(risk)
        if risk.loss is None:
            raise ValueError("Kronecker factors need a loss, got a risk without one.")
        if settings.fisher.fisher_type == FisherType.MC:
            risk.require_fixed_order("A Monte-Carlo Fisher")
        self.settings = settings
        self._matrix: BlockwiseLinearOperator | None = None
        self._covariances: dict[str, Factors] = {}

    def _estimate(self, estimation: Estimation) -> tuple[list[Any], dict[str, Any]]:
        """Return blocks with their layouts, and the sums they come from."""
        raise NotImplementedError

    def _apply(self, V: Tensor) -> Tensor:
        return self.representation._apply(V)

    # -- factors ----------------------------------------------------------------------

    @property
    def representation(self) -> BlockwiseLinearOperator:
        """The matrix as block-diagonal operator, without model and data."""
        with self.risk._lock:
            if self._matrix is None:
                self.compute_kronecker_factors()
            assert self._matrix is not None
            return self._matrix

    def compute_kronecker_factors(self) -> None:
        """Compute the factors at the current parameters, replacing earlier ones."""
        title = self._title("compute_kronecker_factors")
        blocks, sums = self._estimate(Estimation(self.risk, self.settings, title))
        order = {name: i for i, name in enumerate(self.risk.params)}
        blocks.sort(key=lambda block: order[block[0].names[0]])
        layouts, operators = zip(*blocks, strict=True)
        self._matrix = BlockwiseLinearOperator(self._in_space, layouts, operators)
        self._covariances = {
            name: Factors(_squeezed(s.A), _squeezed(s.B))
            for name, s in sums.items()
            if not s.layer.elementwise
        }

    def refresh(self) -> None:
        """Forget factors and recordings; the next product computes them anew."""
        super().refresh()
        self._matrix = None

    def factors(self) -> dict[str, Factors]:
        """Return every layer's input and output factor.

        Returns
        -------
        dict of str to Factors
            By the name of the layer's module, or that of the weight if a module has
            several or there is no module.
        """
        self.representation  # noqa: B018  computes them
        names = _layer_names(self._covariances)
        return {names[weight]: f for weight, f in self._covariances.items()}

    @property
    def _input_covariances(self) -> dict[str, Tensor]:
        return {name: f.input for name, f in self.factors().items()}

    @property
    def _gradient_covariances(self) -> dict[str, Tensor]:
        return {name: f.output for name, f in self.factors().items()}

    @property
    def _mapping(self) -> dict[str, dict[str, int]]:
        self.representation  # noqa: B018  computes them
        names = _layer_names(self._covariances)
        places = list(self.risk.params)
        mapping: dict[str, dict[str, int]] = {}
        for weight, layer in names.items():
            for name in places:
                prefix, _, last = name.rpartition(".")
                if name == weight or (prefix == layer and name.endswith("bias")):
                    mapping.setdefault(layer, {})[last] = places.index(name)
        return mapping

    def block_of(self, name: str) -> Block:
        """Return the block that a parameter is in, as an operator of its own."""
        return self.representation.block_of(name)

    # -- algebra ----------------------------------------------------------------------

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.representation.trace()

    def det(self) -> Tensor:
        """Return the determinant."""
        return self.representation.det()

    def logdet(self) -> Tensor:
        """Return the determinant's logarithm."""
        return self.representation.logdet()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return self.representation.frobenius_norm()

    def diagonal(self) -> Tensor:
        """Return the diagonal, of shape ``(P,)``."""
        return self.representation.diagonal()

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues in ascending order."""
        return self.representation.eigenvalues()

    def __pow__(self, p: Any) -> Any:
        """Return the power with a real exponent, e.g. ``-0.5``."""
        return self.representation**p

    # -- files ------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the factors, with the parameters' names and shapes, to an npz file."""
        self.representation.save(path)

    def load(self, path: str | PathLike[str]) -> None:
        """Read factors that were saved, for the same parameters, on any device.

        Raises
        ------
        ValueError
            If names, shapes or dtype of the parameters differ.
        """
        matrix = load(path, self.device)
        mine, its = self._in_space, matrix._in_space
        for what in ("names", "shapes", "dtype"):
            if getattr(mine, what) != getattr(its, what):
                raise ValueError(
                    f"{path!r} was saved for parameters with the {what} "
                    f"{getattr(its, what)}, these have {getattr(mine, what)}."
                )
        self._matrix = matrix
        pairs = zip(matrix.layouts, matrix.blocks, strict=True)
        self._covariances = {
            layout.names[0]: Factors(*map(_squeezed, block.factors[::-1]))
            for layout, block in pairs
            if len(getattr(block, "factors", ())) == 2
        }


def _squeezed(factor: Tensor) -> Tensor:
    return factor[0] if len(factor) == 1 else factor


def _layer_names(weights: Iterable[str]) -> dict[str, str]:
    """Map weights to the names of their modules where these are unique."""
    modules = {weight: weight.rpartition(".")[0] for weight in weights}
    counts = Counter(modules.values())
    plain = {w for w in modules if "." not in w and w not in ("weight", "bias")}
    return {
        w: w if counts[module] > 1 or w in plain else module
        for w, module in modules.items()
    }


def _settings(
    fisher_type: str,
    mc_samples: int,
    seed: int,
    kfac_approx: str,
    bias: str,
    unsupported: str,
    max_factor: int,
) -> Settings:
    """Check the user's choice."""
    for value, name, allowed in (
        (fisher_type, "fisher_type", list(FisherType)),
        (kfac_approx, "kfac_approx", list(KFACType)),
        (unsupported, "unsupported", ["raise", "diagonal"]),
    ):
        if value not in allowed:
            listing = ", ".join(repr(str(v)) for v in allowed)
            raise ValueError(f"`{name}` must be one of {listing}, got {value!r}.")
    if fisher_type == FisherType.MC and mc_samples < 1:
        raise ValueError(
            f"`mc_samples` must be positive, got {mc_samples}. The exact matrix has "
            "`fisher_type='type-2'`."
        )
    fisher = Fisher(str(fisher_type), mc_samples, seed)
    return Settings(
        fisher, kfac_approx == KFACType.REDUCE, bias, unsupported, max_factor
    )


class KFACLinearOperator(KroneckerFactored, LinearOperator):
    r"""Kronecker-factored approximate curvature (KFAC).

    .. math::

        K = P \operatorname{diag}(B_1 \otimes A_1, \dots, B_L \otimes A_L) P^\top
          \approx \frac{1}{D} \sum_b J_b^\top \, \nabla^2_f S_b \, J_b

    With the inputs :math:`a_{nr}` of a layer at datum :math:`n` and position :math:`r`
    and the gradients :math:`b_{nkr}` by its outputs of the :math:`k`-th vector sent
    back for the datum's terms (see ``fisher_type``),

    .. math::

        A = \frac{1}{\sum_n R_n} \sum_{n, r} a_{nr} a_{nr}^\top , \qquad
        B = \frac{1}{D} \sum_{n, k, r} b_{nkr} b_{nkr}^\top .

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
num_per_example_loss_terms, batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first four.
    seed : int, optional
        Seed of the samples; batch number ``i`` uses ``seed + i``.
    fisher_type : str or FisherType, optional
        What is sent back: ``"type-2"``, the columns of a factor of the loss's Hessian,
        one backward pass per class and per term of a datum (exact); ``"mc"``, gradients
        at targets sampled from the model's likelihood, one pass per sample (the former
        in expectation); ``"empirical"``, the loss's gradients, one pass per term of a
        datum; ``"forward-only"``, nothing: :math:`B = I`.
    mc_samples : int, optional
        Number of samples per term for ``"mc"``.
    kfac_approx : str or KFACType, optional
        For weights shared over positions. ``"expand"`` treats positions as independent
        data (the formulas above); ``"reduce"`` uses a datum's mean input
        :math:`\frac{1}{R} \sum_r a_{nr}` and summed gradient :math:`\sum_r b_{nkr}`.
    separate_weight_and_bias : bool, optional
        Whether a bias is a block :math:`B` of its own. Otherwise it is the last column
        of the weight, with constant input 1.
    backend : str, optional
        ``"hooks"`` or ``"make_fx"``; both mean the same here.
    unsupported : str, optional
        ``"raise"``, or ``"diagonal"`` for a diagonal block of parameters that are used
        in a way that has no known factors. It costs a backward pass per datum.
    max_factor : int, optional
        Of a larger factor only the diagonal is kept, with a warning. (The input factor
        of an embedding is diagonal anyway under ``"expand"``.)

    Raises
    ------
    ValueError
        If a parameter is used in a way that is not understood, which is named; if an
        argument has an unknown value; if the loss has no factor or no sampler.

    Notes ----- Scale: of the loss, per squared unit of the parameters; :math:`D` is the
    number of terms that a ``mean`` averages over, or one for ``sum``, so the result
    does not depend on how the data is split. Self-adjoint and positive semi-definite.

    Each weight is a block. Linear layers, matrix products with a weight, convolutions
    (also grouped and transposed), embeddings, and the projections of attention are
    Kronecker-factored. Parameters that scale or shift (affine normalisation, lone
    biases, position embeddings) have their exact block of the matrix. A weight that is
    used several times has one block, for which the uses are further positions; of a
    weight that is both embedding and matrix, rows are rescaled so that the uses match.

    A block is exact (``"type-2"``) for a single datum, if positions do not share
    weights or, under ``"reduce"``, have equal inputs; and for every weight of a deep
    linear network with square loss.

    The data's axis is axis 0 of a layer's input, or else the first one that has the
    batch's length.

    Cost: factors are computed at the first use and kept until :meth:`refresh` or
    :meth:`compute_kronecker_factors`: one pass over the data, with one forward pass and
    backward passes to the layers' outputs, but no gradients by weights. Memory: a
    gradient's, and the factors. A product: two matrix products per layer.

    References ---------- J. Martens and R. Grosse, "Optimizing neural networks with
    Kronecker-factored approximate curvature", arXiv:1503.05671. R. Grosse and J.
    Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers",
    arXiv:1602.01573. R. Eschenhagen et al., "Kronecker-factored approximate curvature
    for modern neural network architectures", arXiv:2311.00636. F. Benzing, "Gradient
    descent on neurons and its link to approximate second-order optimization",
    arXiv:2201.12250, for ``"forward-only"``.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import GGNLinearOperator, KFACLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
    >>> data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
    >>> problem = net, loss, dict(net.named_parameters()), data
    >>> K = KFACLinearOperator(*problem, fisher_type="type-2",
    ...     separate_weight_and_bias=False)
    >>> bool(torch.allclose(K.to_dense(), GGNLinearOperator(*problem).to_dense()))
    True
    """

    def __init__(
        self,
        model_func: Callable[..., Any] | EmpiricalRisk,
        loss_func: Callable[..., Any] | None = None,
        params: Parameters | None = None,
        data: Iterable[Any] | None = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = DEFAULT_SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        backend: str = "hooks",
        *,
        unsupported: str = "raise",
        max_factor: int = MAX_FACTOR,
        **options: Any,
    ) -> None:
        _check_backend(backend)
        bias = "separate" if separate_weight_and_bias else "joint"
        settings = _settings(
            fisher_type, mc_samples, seed, kfac_approx, bias, unsupported, max_factor
        )
        risk = as_risk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            num_per_example_loss_terms=num_per_example_loss_terms,
            batch_size_fn=batch_size_fn,
            **options,
        )
        super().__init__(risk, settings)

    def _estimate(self, estimation: Estimation) -> tuple[list[Any], dict[str, Any]]:
        return kfac(estimation)

    def inverse(
        self,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> BlockwiseLinearOperator:
        r"""Return the damped inverse.

        Parameters
        ----------
        damping : float, tuple of float, or mapping, optional
            The number :math:`\delta`, added to every factor,
            :math:`(B + \delta I)^{-1} \otimes (A + \delta I)^{-1}`; or two numbers for
            inputs and outputs; or either by parameter name (layer-wise).
        use_heuristic_damping : bool, optional
            Add :math:`\sqrt{\delta} / \pi` to :math:`B` and :math:`\sqrt{\delta} \,
            \pi` to :math:`A` with :math:`\pi^2` the ratio of their mean eigenvalues,
            :math:`A`'s over :math:`B`'s. Blocks of one factor are damped by
            :math:`\delta`.
        min_damping : float, optional
            Least damping under the heuristic.
        use_exact_damping : bool, optional
            Return :math:`(B \otimes A + \delta I)^{-1}`, by eigendecompositions.
        retry_double_precision : bool, optional
            Whether to repeat a decomposition that fails in float64.

        Returns
        -------
        BlockwiseLinearOperator
            A product costs what one with this operator does.

        Raises
        ------
        ValueError
            If both ways of damping are asked for, or ``damping`` does not fit them.
        numpy.linalg.LinAlgError
            If a damped block is not positive definite; it is named.
        """
        return self.representation.inverse(
            damping,
            use_heuristic_damping=use_heuristic_damping,
            min_damping=min_damping,
            use_exact_damping=use_exact_damping,
            retry_double_precision=retry_double_precision,
        )


class EKFACLinearOperator(KroneckerFactored, LinearOperator):
    r"""KFAC with corrected eigenvalues (EKFAC).

    .. math::

        E = P \operatorname{diag}\left( (Q_B \otimes Q_A) \Lambda
            (Q_B \otimes Q_A)^\top \right) P^\top

    with the eigenvectors of KFAC's factors, and as :math:`\Lambda` the diagonal of the
    approximated block in this basis: per layer, the second moments of every datum's
    gradient, rotated,

    .. math::

        \Lambda_{ij} = \frac{1}{D} \sum_{n, k} \left(
            Q_B^\top \Big(\sum_r b_{nkr} a_{nr}^\top\Big) Q_A \right)_{ij}^2 .

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, seed, \
fisher_type, mc_samples, kfac_approx, num_per_example_loss_terms, \
separate_weight_and_bias, num_data, batch_size_fn, backend, unsupported, max_factor, \
**options
        As for :class:`KFACLinearOperator`.

    Raises
    ------
    ValueError
        As for :class:`KFACLinearOperator`.
    numpy.linalg.LinAlgError
        If a factor has no eigendecomposition, not even in float64; it is named.

    Notes ----- Scale as for :class:`KFACLinearOperator`. Of all matrices that are
    diagonal in the given basis, this is the nearest to the block in Frobenius norm; so
    it is never further away than KFAC. Traces of the blocks of weights are exact.

    Cost: KFAC's, one eigendecomposition per factor, and a second pass over the data
    with the products that rotate inputs and gradients. A product costs four matrix
    products per layer.

    References
    ----------
    T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", arXiv:1806.03884.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import EKFACLinearOperator, GGNLinearOperator
    >>> net = torch.nn.Linear(3, 2, bias=False).double()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> problem = net, torch.nn.CrossEntropyLoss(), list(net.parameters()), data
    >>> E = EKFACLinearOperator(*problem, fisher_type="type-2")
    >>> G = GGNLinearOperator(*problem).to_dense()
    >>> bool(torch.allclose(E.trace(), G.trace()))
    True
    """

    def __init__(
        self,
        model_func: Callable[..., Any] | EmpiricalRisk,
        loss_func: Callable[..., Any] | None = None,
        params: Parameters | None = None,
        data: Iterable[Any] | None = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = DEFAULT_SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        backend: str = "hooks",
        *,
        unsupported: str = "raise",
        max_factor: int = MAX_FACTOR,
        **options: Any,
    ) -> None:
        _check_backend(backend)
        bias = "separate" if separate_weight_and_bias else "joint"
        settings = _settings(
            fisher_type, mc_samples, seed, kfac_approx, bias, unsupported, max_factor
        )
        risk = as_risk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            num_per_example_loss_terms=num_per_example_loss_terms,
            batch_size_fn=batch_size_fn,
            **options,
        )
        super().__init__(risk, settings)

    def _estimate(self, estimation: Estimation) -> tuple[list[Any], dict[str, Any]]:
        return ekfac(estimation)

    def inverse(self, damping: Damping = 0.0) -> BlockwiseLinearOperator:
        r"""Return the damped inverse, with :math:`(\Lambda + \delta)^{-1}`.

        Parameters
        ----------
        damping : float or mapping of str to float, optional
            The number :math:`\delta`, or one by parameter name.

        Raises
        ------
        numpy.linalg.LinAlgError
            If a damped block is singular; it is named.
        """
        return self.representation.inverse(damping)


class KFOCLinearOperator(KroneckerFactored, LinearOperator):
    r"""Kronecker-factored optimal curvature (KFOC).

    .. math::

        K = P \operatorname{diag}(B_1 \otimes A_1, \dots, B_L \otimes A_L) P^\top ,
        \qquad (B_l, A_l) = \operatorname*{arg\,min}_{B, A}
        \left\| F_l - B \otimes A \right\|_F

    with :math:`F_l` the diagonal block of the GGN (or its sampled or empirical variant)
    of a weight.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, seed, \
fisher_type, mc_samples, separate_weight_and_bias, num_data, batch_size_fn, \
unsupported, max_factor, **options
        As for :class:`KFACLinearOperator`. With ``"forward-only"``, the block is a
        Kronecker product, and KFAC's.
    max_iter : int, optional
        Largest number of iterations, of two passes over the data each.
    tolerance : float, optional
        Relative growth of the squared leading singular value, in one step, below which
        iterations end.

    Raises
    ------
    ValueError
        As for :class:`KFACLinearOperator`.

    Notes ----- Scale as for :class:`KFACLinearOperator`. Factors are symmetric positive
    semi-definite. The power method starts from KFAC and decreases the distance in every
    step, so the result is never further away than KFAC's, and the nearest of all
    Kronecker products when it has converged. A bias that is a block of its own is
    exact. Factors are matrices, also where KFAC's are diagonal.

    Cost: KFAC's, and up to ``2 * max_iter`` passes over the data, each with KFAC's
    backward passes. Products and inverses as for KFAC.

    References
    ----------
    A. Koroko et al., "Efficient approximations of the Fisher matrix in neural networks
    using Kronecker product singular value decomposition", arXiv:2201.10285.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import GGNLinearOperator, KFACLinearOperator, KFOCLinearOperator
    >>> net = torch.nn.Linear(3, 2, bias=False).double()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> problem = net, torch.nn.CrossEntropyLoss(), list(net.parameters()), data
    >>> G = GGNLinearOperator(*problem).to_dense()
    >>> near, far = (cls(*problem, fisher_type="type-2").to_dense()
    ...     for cls in (KFOCLinearOperator, KFACLinearOperator))
    >>> bool((G - near).norm() < (G - far).norm())
    True
    """

    def __init__(
        self,
        model_func: Callable[..., Any] | EmpiricalRisk,
        loss_func: Callable[..., Any] | None = None,
        params: Parameters | None = None,
        data: Iterable[Any] | None = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = DEFAULT_SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        unsupported: str = "raise",
        max_factor: int = MAX_FACTOR,
        max_iter: int = 20,
        tolerance: float = 1e-6,
        **options: Any,
    ) -> None:
        bias = "alone" if separate_weight_and_bias else "joint"
        settings = _settings(
            fisher_type, mc_samples, seed, "expand", bias, unsupported, max_factor
        )
        self.max_iter, self.tolerance = max_iter, tolerance
        risk = as_risk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            **options,
        )
        super().__init__(risk, settings)

    def _estimate(self, estimation: Estimation) -> tuple[list[Any], dict[str, Any]]:
        return kfoc(estimation, self.max_iter, self.tolerance)

    def inverse(
        self, damping: Damping = 0.0, **options: Any
    ) -> BlockwiseLinearOperator:
        """Return the damped inverse; arguments of :meth:`KFACLinearOperator.inverse`.

        Raises
        ------
        numpy.linalg.LinAlgError
            If a damped block is not positive definite; it is named.
        """
        return self.representation.inverse(damping, **options)


class KFACInverseLinearOperator(TorchOperator, LinearOperator):
    """The damped inverse of a Kronecker-factored operator, computed at first use.

    Parameters
    ----------
    A : KFACLinearOperator, EKFACLinearOperator, or KFOCLinearOperator
        The operator.
    damping, use_heuristic_damping, min_damping, use_exact_damping, \
retry_double_precision
        As for :meth:`KFACLinearOperator.inverse`.
    cache : bool, optional
        Whether to keep the inverse for later products.

    Raises
    ------
    TypeError
        If ``A`` is no Kronecker-factored operator.

    Notes
    -----
    The same as ``A.inverse(...)``, except that it follows ``A`` when its factors are
    computed anew.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
    >>> data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
    >>> K = KFACLinearOperator(net, loss, list(net.parameters()), data)
    >>> inverse = KFACInverseLinearOperator(K, damping=0.1, use_exact_damping=True)
    >>> dense = torch.linalg.inv(K.to_dense() + 0.1 * torch.eye(8))
    >>> bool(torch.allclose(inverse.to_dense(), dense))
    True
    """

    def __init__(
        self,
        A: KroneckerFactored,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        cache: bool = True,
        retry_double_precision: bool = True,
    ) -> None:
        if not isinstance(A, KroneckerFactored):
            raise TypeError(
                f"Expected a KFAC, EKFAC or KFOC operator, got {type(A).__name__}. For "
                "others use e.g. `CGInverseLinearOperator`."
            )
        super().__init__(A._in_space, A._out_space)
        self.A, self.damping, self.cache = A, damping, cache
        self._options = {
            "use_heuristic_damping": use_heuristic_damping,
            "min_damping": min_damping,
            "use_exact_damping": use_exact_damping,
            "retry_double_precision": retry_double_precision,
        }
        self._known: tuple[Any, BlockwiseLinearOperator] | None = None

    @property
    def representation(self) -> BlockwiseLinearOperator:
        """The inverse of the current factors."""
        matrix = self.A.representation
        if self._known is not None and self._known[0] is matrix:
            return self._known[1]
        inverse = matrix.inverse(self.damping, **self._options)
        if self.cache:
            self._known = matrix, inverse
        return inverse

    def _apply(self, V: Tensor) -> Tensor:
        return self.representation._apply(V)


def _check_backend(backend: str) -> None:
    if backend not in ("hooks", "make_fx"):
        raise ValueError(f"`backend` must be 'hooks' or 'make_fx', got {backend!r}.")


__all__ = [
    "EKFACLinearOperator",
    "FisherType",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
]
