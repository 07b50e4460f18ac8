"""The covariance of the gradients of the loss terms (the empirical Fisher)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._forms import Middle, congruence
from curvlinops._linearization import Linearization
from curvlinops._model import Parameters
from curvlinops._parts import data_gradients
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk


class EFLinearOperator(RiskOperator, LinearOperator):
    r"""Uncentred covariance of the loss terms' gradients, the empirical Fisher.

    .. math::

        E = \frac{1}{\sum_b D_b} \sum_b \sum_{t \in b}
            \left( J_t^\top g_t \right) \left( J_t^\top g_t \right)^\top
          \in \mathbb{R}^{P \times P}

    with :math:`J_t = \partial f_t / \partial \theta` the Jacobian of the model's
    outputs that belong to loss term :math:`t`, :math:`g_t` the gradient of that term
    with respect to them, as a *sum* counts the term, and :math:`D_b` the number of
    terms that a ``mean`` averages over (one overall for ``sum``).

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
num_per_example_loss_terms, batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first four.

    Raises
    ------
    ValueError
        If there is no loss function; if a loss that is not known in closed form is
        neither a sum nor a mean over data, and comes without ``num_terms_fn``; or, in a
        product, if such a loss meets outputs that cannot be told apart by datum.

    Notes
    -----
    Scale: of the squared loss of a term, per squared unit of the parameters, once
    averaged for ``mean``: the gradient of the mean is not squared as a whole, so the
    factor is :math:`1 / \sum_b D_b` and not its square. Self-adjoint, positive
    semi-definite, of rank at most the number of terms.

    A term is one row of the output (a datum; a token, for targets per token) for
    losses that are known in closed form. For any other callable it is one datum, whose
    loss is evaluated without the others: with several tokens per datum, the square is
    that of their gradients' sum. Pass the known loss itself, or a ``functools.partial``
    that binds its options, for one term per token.

    This is not the Fisher information: that takes the expectation over targets drawn
    from the model, which gives the GGN for square and cross-entropy losses; here the
    targets are the data's. The two are close only if the model describes the
    distribution of the targets well and there are many data. Then the mean gradient is
    nearly zero, too, and the matrix is a covariance. For square loss that also means
    residuals of variance 1/2 (the likelihood that belongs to it); residuals
    :math:`\sigma` times as large give :math:`2 \sigma^2` times the GGN. Class
    weights enter squared, but linearly into the GGN. Where all targets are matched
    exactly, this matrix is zero while the GGN is not.

    Cost: as a product with the GGN, and one gradient of the loss with respect to the
    outputs when a batch is recorded; one evaluation of the loss per datum there if it
    is not known in closed form. Where every datum is one term and is treated apart, the
    gradients of the layers' outputs are kept from the ninth product on, which halves
    the matrix products. One pass over the data, however many columns.

    References
    ----------
    F. Kunstner, P. Hennig, L. Balles, "Limitations of the empirical Fisher
    approximation for natural gradient descent", arXiv:1905.12558.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import EFLinearOperator
    >>> from curvlinops.examples.functorch import functorch_empirical_fisher
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> problem = net, loss, dict(net.named_parameters()), data
    >>> E, dense = EFLinearOperator(*problem), functorch_empirical_fisher(*problem)
    >>> bool(torch.allclose(E @ torch.eye(8).double(), dense))
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
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
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
            num_per_example_loss_terms=num_per_example_loss_terms,
            batch_size_fn=batch_size_fn,
            **options,
        )
        if risk.loss_function is None:
            raise ValueError(
                "The empirical Fisher needs a loss function, got a risk without one."
            )
        risk.require_terms("the empirical Fisher")
        super().__init__(risk)
        self.forms = (congruence(LossGradients(risk)),)


@dataclass(frozen=True)
class LossGradients(Middle):
    r"""The terms' :math:`\sum_t g_t g_t^\top` in output space.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk whose batches it multiplies.
    """

    risk: EmpiricalRisk

    def __call__(self, batch: Linearization, U: Tensor) -> Tensor:
        G = self._gradients(batch)
        if not batch.loss.opaque:
            return batch.loss.outer_mul(G, U)
        leading = U.shape[: U.ndim - G.ndim]
        by_datum = (self.risk.batch_size(batch.X), -1)
        products = (G * U).reshape(*leading, *by_datum).sum(-1, keepdim=True)
        return (G.reshape(by_datum) * products).reshape(U.shape)

    def columns(self, batch: Linearization) -> Tensor | None:
        """Return the gradients, if every row of the output has one term."""
        G = self._gradients(batch)
        terms = (
            (self.risk.batch_size(batch.X),)
            if batch.loss.opaque
            else batch.loss.row_shape
        )
        return G.unsqueeze(0) if terms == G.shape[:1] else None

    def _gradients(self, batch: Linearization) -> Tensor:
        """Return the gradients of the terms, computed once."""

        def compute() -> Tensor:
            if batch.loss.opaque:
                return data_gradients(self.risk, batch)
            return batch.loss.gradient()

        return batch.once((type(self)._gradients,), compute)
