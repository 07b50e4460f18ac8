"""The Hessian of the empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from scipy.sparse.linalg import LinearOperator

from curvlinops._forms import Form
from curvlinops._model import Parameters
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk


class HessianLinearOperator(RiskOperator, LinearOperator):
    r"""Hessian of the empirical risk.

    .. math::

        H = \nabla^2_\theta L(\theta)
          = \frac{1}{\sum_b D_b} \sum_b \nabla^2_\theta S_b(\theta)
          \in \mathbb{R}^{P \times P}

    with :math:`S_b` the summed loss of batch :math:`b` and :math:`D_b` the number of
    terms that a ``mean`` averages over (one overall for ``sum``).

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
num_per_example_loss_terms, batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first four.

    Notes
    -----
    Scale: of the loss, per squared unit of the parameters. Self-adjoint, in general
    indefinite. It equals the GGN if the model is linear in its parameters, or if the
    loss has zero gradient with respect to every output (an interpolating model).

    Cost: per batch, the first product builds the graph of the gradient (one forward
    and one backward pass) and differentiates it once more; later products only do the
    latter, about 1.6 times a gradient for a multi-layer perceptron, as long as the
    recordings fit into memory. One pass over the data, however many columns.

    References
    ----------
    B. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation
    6(1), 1994, doi:10.1162/neco.1994.6.1.147.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import HessianLinearOperator
    >>> from curvlinops.examples.functorch import functorch_hessian
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> params = dict(net.named_parameters())
    >>> H = HessianLinearOperator(net, loss, params, data)
    >>> dense = functorch_hessian(net, loss, params, data)
    >>> bool(torch.allclose(H @ torch.eye(8).double(), dense))
    True
    """

    forms = (Form(lambda b, v: b.hvp(v)),)

    def __init__(
        self,
        model_func: Callable[..., Any] | EmpiricalRisk,
        loss_func: Callable[..., Any] | None = None,
        params: Parameters | None = None,
        data: Iterable[Any] | None = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            as_risk(
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
        )
