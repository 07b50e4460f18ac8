"""Gram matrices of the model's Jacobian: tangent kernels, spectra of large GGNs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._forms import Form, Side
from curvlinops._linearization import Linearization
from curvlinops._model import Parameters
from curvlinops.jacobian import PULL_BACK, PUSH_FORWARD, output_space
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk


class GramLinearOperator(RiskOperator, LinearOperator):
    r"""Gram matrix of the Jacobian's rows, weighted by the Hessian of the loss.

    .. math::

        K = \frac{1}{\sum_b D_b} R^\top J J^\top R \in \mathbb{R}^{M \times M}
        \quad \text{or} \quad
        K = J J^\top \in \mathbb{R}^{M \times M}

    with :math:`J` the Jacobian of the model's :math:`M` outputs on all data (:math:`M
    = N C` for :math:`C` outputs per datum, see
    :class:`~curvlinops.jacobian.JacobianLinearOperator`), :math:`R R^\top` the Hessian
    of the summed loss with respect to them, and :math:`D_b` the number of terms that a
    ``mean`` averages over (one overall for ``sum``). Without loss it is the empirical
    neural tangent kernel.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first four. ``loss_func`` may be ``None``. The data's batches must come in
        the same order in every pass.
    weighted : bool, optional
        Whether :math:`R` enters. By default it does if there is a loss.

    Raises
    ------
    ValueError
        If there is no loss but ``weighted`` is set, or the batches are known to differ
        between passes.
    NotImplementedError
        In a product, if the loss's Hessian has no known factor.

    Notes
    -----
    :math:`K = B B^\top` with :math:`B = (\sum_b D_b)^{-1/2} R^\top J`, while the GGN
    is :math:`B^\top B`. Both have the same non-zero eigenvalues, exactly and with the
    same scale: for :math:`M < P` the spectrum of the GGN costs vectors of length
    :math:`M`. From an eigenvector :math:`u` of :math:`K`, :math:`J^\top R u` is one of
    the GGN.

    Self-adjoint and positive semi-definite. Lists of tensors have the shapes of the
    Jacobian's output.

    Cost: a product with :math:`J^\top` and one with :math:`J`, each one pass over the
    data, together as much as a product with the GGN. The vector in between takes
    :math:`P` numbers per column.

    References
    ----------
    A. Jacot, F. Gabriel, C. Hongler, "Neural tangent kernel: convergence and
    generalization in neural networks", arXiv:1806.07572.
    F. Dangel, L. Tatzel, P. Hennig, "ViViT: curvature access through the generalized
    Gauss-Newton's low-rank structure", arXiv:2106.02624.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import EmpiricalRisk, GGNLinearOperator, GramLinearOperator
    >>> net, loss = torch.nn.Linear(5, 2).double(), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.rand(3, 5).double(), torch.tensor([0, 1, 1]))]
    >>> risk = EmpiricalRisk(net, loss, "weight", data)
    >>> K, G = GramLinearOperator(risk), GGNLinearOperator(risk)
    >>> K.shape, G.shape
    ((6, 6), (10, 10))
    >>> small, large = (torch.linalg.eigvalsh(A.to_dense()) for A in (K, G))
    >>> bool(torch.allclose(small, large[-6:]))
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
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        weighted: bool | None = None,
        **options: Any,
    ) -> None:
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
        if weighted and risk.loss_function is None:
            raise ValueError(
                "A weighted Gram matrix needs a loss function: pass one, or "
                "`weighted=False` for the tangent kernel."
            )
        risk.require_fixed_order("A Gram matrix")
        self.weighted = risk.loss_function is not None if weighted is None else weighted
        if self.weighted and risk.loss_function is not None:
            risk.loss_function.warn_if_flat("this Gram matrix", stacklevel=2)
        space = output_space(risk)
        super().__init__(risk, space, space)
        self.forms = WEIGHTED if self.weighted else (PULL_BACK, PUSH_FORWARD)


def _pull_back_factor(batch: Linearization, u: list[Tensor]) -> list[Tensor]:
    return batch.vjp(batch.loss.factor_mul(u[0]))


def _push_forward_factor(batch: Linearization, v: list[Tensor]) -> list[Tensor]:
    return [batch.loss.factor_transpose_mul(batch.jvp(v))]


#: Products with :math:`J^\top R`, divided by what a mean is, and its transpose.
WEIGHTED = (
    Form(_pull_back_factor, cols=Side.OUTPUTS),
    Form(_push_forward_factor, rows=Side.OUTPUTS, mean=False),
)
