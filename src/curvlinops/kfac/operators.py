"""The Kronecker-factored operators: KFAC, EKFAC, KFOC, and KFAC's inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from scipy.sparse.linalg import LinearOperator

from curvlinops._counts import count
from curvlinops._model import Parameters
from curvlinops.ggn import DEFAULT_SEED
from curvlinops.kfac._blocks import Damping
from curvlinops.kfac._corrections import ekfac, kfoc
from curvlinops.kfac._estimation import Estimation
from curvlinops.kfac._factors import blocks_of, sums_of
from curvlinops.kfac._family import (
    MAX_FACTOR,
    FisherType,
    KFACType,
    KroneckerFactored,
    checked_settings,
)
from curvlinops.kfac._following import KFACInverseLinearOperator
from curvlinops.risk import EmpiricalRisk


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
        Seed of the samples. A datum's depend on its number in the data, and not on how
        these are cut into batches.
    fisher_type : str or FisherType, optional
        What is sent back: ``"type-2"``, the columns of a factor of the loss's Hessian,
        one backward pass per class and per term of a datum (exact); ``"mc"``, gradients
        at targets sampled from the model's likelihood, one pass per sample (the former
        in expectation); ``"empirical"``, the loss's gradients, one pass per term of a
        datum (of a loss not known in closed form, a datum is one term, see the notes);
        ``"forward-only"``, nothing: :math:`B = I`.
    mc_samples : int, optional
        Number of samples per term for ``"mc"``. One is enough for a model that is in
        doubt about many terms, such as one to be trained. A nearly fitted classifier's
        samples are hardly ever another class than the predicted one, which happens
        :math:`\sum_t (1 - \max_c p_{tc})` times per sample; if that is less than ten
        or so, the matrix is likely to be far too small, and now and then too large. Use
        ``"type-2"`` then, or as many samples as that takes. If the gradients' squares
        are more than three times smaller or larger than expected, a warning says so.
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
        of an embedding is diagonal anyway under ``"expand"``. Under ``"reduce"``, and
        for EKFAC and KFOC, an embedding's inputs are unit vectors: as many numbers per
        token of a batch as there are kinds of tokens.)

    Raises
    ------
    ValueError
        If a parameter is used in a way that is not understood, which is named; if an
        argument has an unknown value; if the loss has no factor or no sampler.

    Warns
    -----
    UserWarning
        If only the diagonal of a factor is kept, or sampled gradients are not of the
        size that is expected, see ``mc_samples``.

    Notes
    -----
    Scale: of the loss, per squared unit of the parameters; :math:`D` is the number of
    terms that a ``mean`` averages over, or one for ``sum``, so the result does not
    depend on how the data is split. Self-adjoint and positive semi-definite. Where the
    loss has no second derivative (absolute errors, or the negative log-likelihood of
    log-probabilities), ``"type-2"`` is zero, and a warning says what to use instead; of
    a loss not known in closed form, the check finds that.

    Which terms a loss that is not known in closed form consists of cannot be seen
    (a function of your own, even one that calls `F.cross_entropy` of tokens). For
    ``"empirical"``, all of a datum is then one term, whose gradient :math:`g_n = \sum_t
    g_{nt}` is that of its :math:`T` terms together: the matrix is made of :math:`g_n
    g_n^\top`, not of :math:`\sum_t g_{nt} g_{nt}^\top` as for the loss that is known.
    With ``num_per_example_loss_terms`` or ``num_terms_fn`` only :math:`D` is another.
    Pass the known loss itself, or a ``functools.partial`` that binds its options, or
    :func:`register <curvlinops.losses.register>` a class for yours. (``"type-2"`` is
    the same either way.)

    Each weight is a block. Linear layers, matrix products with a weight, convolutions
    (also grouped and transposed), embeddings, and the projections of attention are
    Kronecker-factored. Parameters that scale or shift (affine normalisation, lone
    biases, position embeddings) have their exact block of the matrix. A weight that is
    used several times has one block, for which the uses are further positions; of a
    weight that is both embedding and matrix, rows are rescaled so that the uses match.

    All of the output's dependence on a parameter must go through such uses, or it is
    refused by name. A model whose output has derivatives by its own input (residuals
    of differential equations, forces) multiplies by the weights in between once more:
    these are refused; biases, and layers that follow, are not.

    A block is exact (``"type-2"``) for a single datum, if positions do not share
    weights or, under ``"reduce"``, have equal inputs; and for every weight of a deep
    linear network with square loss.

    Whose the rows of a layer are is found, in every batch, whether data have an axis of
    their own, rows are sorted by positions, packed, or picked by content (experts,
    masks), or the model goes over the data in a loop: data may come in any order and in
    any batches. Models that couple data (a mean over the batch, batch normalisation in
    train mode, products of data with each other) are refused by name of the parameters
    that are used before, and so are uses that have no rows of single data (a position
    embedding of ``arange(T)`` that is only broadcast to the batch later: expand its
    input to the batch). Where it cannot be found whose the output's rows are, each is
    sent back on its own, with a warning; there is no ``"reduce"`` then.

    Finding this takes a forward pass on one datum (two in batches of two or three) for
    the first batch, for every batch with other functions, shapes or numbers in it, and
    for every batch if the model compares tensors (as for masks); on two data where the
    model fails on one; on all data, besides, if it turns tensors into Python's numbers.
    Only where that does not settle it, two backward passes to the layers' outputs
    (three for more than 16 data, four for more than 256); and these in every batch if
    the model picks or sorts rows by content.

    Cost: factors are computed at the first use, and again at the next one after
    parameters, buffers, modes or listed data have changed (of other changes, tell
    :meth:`refresh`): one pass over the data, with one forward pass and backward passes
    to the layers' outputs, but no gradients by weights. Operators of one risk with
    equal settings share them. Memory: a gradient's, of whole batches, and the factors;
    ``max_memory`` bounds the check, and not this. A product: two
    matrix products per layer, and the look for changes, which reads parameters and
    listed data once. :meth:`frozen` returns the matrix as it is, which does without:
    for loops that keep factors for several steps.

    Backward passes per batch: ``mc_samples`` for ``"mc"``, whatever the number of
    terms, since samples of different terms are independent; :math:`T` for
    ``"empirical"`` and :math:`T C` for ``"type-2"`` with :math:`T` terms per datum
    (such as tokens) and :math:`C` classes. Terms of different data share a pass, terms
    of one datum do not: where attention or convolutions mix them, their gradients meet
    at the same position of a layer, and must be squared before they are added. With
    many tokens and classes use ``"mc"``. Small models send several vectors at once.

    References
    ----------
    J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored
    approximate curvature", arXiv:1503.05671. R. Grosse and J. Martens, "A
    Kronecker-factored approximate Fisher matrix for convolution layers",
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
        settings = checked_settings(
            fisher_type,
            mc_samples,
            seed,
            kfac_approx,
            "separate" if separate_weight_and_bias else "joint",
            unsupported,
            max_factor,
            backend,
        )
        super().__init__(
            settings,
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

    def _estimate(self, title: str) -> list[Any]:
        estimation = Estimation(self.risk, self.settings, title)
        return blocks_of(estimation, sums_of(estimation))

    def _recipe(self) -> tuple[Any, ...]:
        return (self.settings,)

    def inverse(  # type: ignore[override]
        self,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> KFACInverseLinearOperator:
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
            :math:`A`'s over :math:`B`'s. The heuristic approximates
            :math:`B \otimes A + \delta I`; blocks of one factor, such as a separate
            bias, are damped by :math:`\delta`, which is exact.
        min_damping : float, optional
            Least damping under the heuristic.
        use_exact_damping : bool, optional
            Return :math:`(B \otimes A + \delta I)^{-1}`, by eigendecompositions: for a
            preconditioner of a matrix plus :math:`\delta I`. (Whether it saves
            iterations depends on the network, see
            :class:`~curvlinops.nystrom.NystromPreconditionerLinearOperator`.)
        retry_double_precision : bool, optional
            Whether to repeat a decomposition that fails in float64.

        Returns
        -------
        KFACInverseLinearOperator
            It follows this operator: after a change of parameters or data, the next
            product inverts new factors. A product costs what one with this operator
            does.

        Raises
        ------
        ValueError
            If both ways of damping are asked for, or ``damping`` does not fit them.
        numpy.linalg.LinAlgError
            If a damped block is not positive definite; it is named.

        Notes
        -----
        The three ways damp three matrices, with three determinants: ``logdet()`` of the
        result is that of the result. By default, that is
        :math:`-\log \det \operatorname{diag}((B_l + \delta I) \otimes (A_l + \delta
        I))`, not :math:`-\log \det (K + \delta I)`. The latter belongs to
        ``use_exact_damping=True``, and is ``-K.damped(delta).logdet()``. The inverse of
        :meth:`damped` is that of exact damping, too.

        Examples
        --------
        >>> import torch
        >>> from curvlinops import KFACLinearOperator
        >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
        >>> data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
        >>> K = KFACLinearOperator(net, loss, dict(net.named_parameters()), data)
        >>> exact = torch.logdet(K.to_dense() + 0.1 * torch.eye(8))
        >>> inverse = K.inverse(0.1, use_exact_damping=True)
        >>> bool(torch.allclose(inverse.logdet(), -exact))
        True
        >>> bool(torch.allclose(K.damped(0.1).logdet(), exact))
        True
        >>> bool(torch.allclose(K.inverse(0.1).logdet(), -exact))  # damps factors
        False
        """
        return self._inverse(
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

    Notes
    -----
    Scale as for :class:`KFACLinearOperator`. Of all matrices that are diagonal in the
    given basis, this is the nearest to the block in Frobenius norm; so it is never
    further away than KFAC. Traces of the blocks of weights are exact.

    Cost: KFAC's, one eigendecomposition per factor, and the products that rotate inputs
    and gradients. These are kept from KFAC's pass over the data if they take no more
    memory than the factors (and ``cache`` allows it), otherwise a second pass computes
    them again. A product costs four matrix products per layer.

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
        settings = checked_settings(
            fisher_type,
            mc_samples,
            seed,
            kfac_approx,
            "separate" if separate_weight_and_bias else "joint",
            unsupported,
            max_factor,
            backend,
        )
        super().__init__(
            settings,
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

    def _estimate(self, title: str) -> list[Any]:
        estimation = Estimation(self.risk, self.settings, title, reuse=True)
        return ekfac(estimation)

    def _recipe(self) -> tuple[Any, ...]:
        return (self.settings,)

    def _depends_on_batches(self) -> str:
        return "the eigenvectors of equal eigenvalues are not unique"

    def inverse(  # type: ignore[override]
        self, damping: Damping = 0.0
    ) -> KFACInverseLinearOperator:
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
        return self._inverse(damping)


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
        iterations end once it holds for all blocks, each group of a layer's by itself.

    Raises
    ------
    ValueError
        As for :class:`KFACLinearOperator`.

    Notes
    -----
    Scale as for :class:`KFACLinearOperator`. Factors are symmetric positive
    semi-definite. The power method starts from KFAC and decreases the distance in every
    step, so the result is never further away than KFAC's, and the nearest of all
    Kronecker products when it has converged. A bias that is a block of its own is
    exact. Factors are matrices, also where KFAC's are diagonal, up to ``max_factor``;
    of a wider one, e.g. for a vocabulary, only the diagonal is fitted, with a warning.

    Cost: KFAC's, and up to ``2 * max_iter`` passes over the data, each with KFAC's
    backward passes; unless inputs and gradients were kept, as for
    :class:`EKFACLinearOperator`. Products and inverses as for KFAC.

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
        settings = checked_settings(
            fisher_type,
            mc_samples,
            seed,
            KFACType.EXPAND,
            "alone" if separate_weight_and_bias else "joint",
            unsupported,
            max_factor,
        )
        super().__init__(
            settings,
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
        self.max_iter, self.tolerance = count("max_iter", max_iter, 1), tolerance

    def _estimate(self, title: str) -> list[Any]:
        estimation = Estimation(self.risk, self.settings, title, reuse=True)
        return kfoc(estimation, self.max_iter, self.tolerance)

    def _recipe(self) -> tuple[Any, ...]:
        return self.settings, self.max_iter, self.tolerance

    @property
    def _kind(self) -> dict[str, Any]:
        its_own = {"max_iter": self.max_iter, "tolerance": self.tolerance}
        return super()._kind | its_own

    def _depends_on_batches(self) -> str:
        return "the iterations end within a tolerance"

    def inverse(
        self, damping: Damping = 0.0, **options: Any
    ) -> KFACInverseLinearOperator:
        """Return the damped inverse; arguments of :meth:`KFACLinearOperator.inverse`.

        Raises
        ------
        numpy.linalg.LinAlgError
            If a damped block is not positive definite; it is named.
        """
        return self._inverse(damping, **options)


__all__ = [
    "EKFACLinearOperator",
    "FisherType",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
]
