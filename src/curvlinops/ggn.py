"""The generalised Gauss-Newton matrix and its Monte-Carlo approximation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._counts import as_count, count
from curvlinops._forms import Middle, congruence
from curvlinops._linearization import Linearization
from curvlinops._model import Parameters
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk

#: Seed of the Monte-Carlo samples unless the user gives one.
DEFAULT_SEED = 2147483647


class GGNLinearOperator(RiskOperator, LinearOperator):
    r"""Generalised Gauss-Newton matrix (GGN) of the empirical risk.

    .. math::

        G = \frac{1}{\sum_b D_b} \sum_b J_b^\top \, \nabla^2_f S_b \, J_b
          \in \mathbb{R}^{P \times P}

    with :math:`J_b = \partial f_b / \partial \theta` the Jacobian of the model's output
    on batch :math:`b`, :math:`S_b` its summed loss as a function of the output, and
    :math:`D_b` the number of terms that a ``mean`` averages over (one overall for
    ``sum``).

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first four.
    mc_samples : int, optional
        Zero (default) for the exact matrix; otherwise the number of would-be targets
        sampled per term for :class:`FisherMCLinearOperator`'s approximation.
    seed : int, optional
        Seed of the samples.

    Raises
    ------
    ValueError
        If ``mc_samples`` is negative.

    Notes
    -----
    Scale: of the loss, per squared unit of the parameters. Self-adjoint; positive
    semi-definite if the loss is convex in the output. It is the Hessian of the loss
    with the model replaced by its linearisation at :math:`\theta`. For square,
    cross-entropy and binary cross-entropy loss it equals the Fisher information
    matrix of the corresponding likelihood (up to a constant factor for square loss,
    whose Hessian :math:`2 I` belongs to a Gaussian of variance 1/2); for losses that
    are no log-likelihood of an exponential family in its natural parameters it does
    not. If the loss is (piecewise) linear in the output, such as absolute errors, or
    the negative log-likelihood of log-probabilities, it is zero, and a warning says
    what to use instead; of a loss not known in closed form, the check finds that.

    Cost: per batch, the first product builds two graphs, those of the output and of
    :math:`u \mapsto J_b^\top u` (one forward and one backward pass), and compares the
    products with both by three dot products; later products are two backward passes,
    about 1.2 times a gradient for a multi-layer perceptron, as long as what is kept
    fits into memory. If data are treated apart and have few outputs, half of this is
    done once after 8 products per output, which takes one backward pass per output and
    keeps that many gradients of the layers' outputs: 0.9 gradients from then on. Where
    nothing is kept, a product is one forward pass in forward mode and one forward and
    backward pass in reverse mode, if the two agree in the first one. One pass over the
    data, however many columns.

    References
    ----------
    N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14(7), 2002, doi:10.1162/08997660260028683.
    J. Martens, "New insights and perspectives on the natural gradient method",
    arXiv:1412.1193.

    Examples
    --------
    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> from curvlinops import GGNLinearOperator
    >>> from curvlinops.examples.functorch import functorch_ggn
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> params = dict(net.named_parameters())
    >>> G = GGNLinearOperator(net, loss, params, data)
    >>> dense = functorch_ggn(net, loss, params, data)
    >>> bool(torch.allclose(G @ torch.eye(8).double(), dense))
    True
    >>> top = eigsh(G, k=1, return_eigenvectors=False)[0]
    >>> bool(abs(top - torch.linalg.eigvalsh(dense)[-1]) < 1e-10)
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
        mc_samples: int = 0,
        seed: int = DEFAULT_SEED,
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
                batch_size_fn=batch_size_fn,
                **options,
            )
        )
        self.middle = LossHessian.of(self.risk, mc_samples, seed)
        self.forms = (congruence(self.middle),)


class FisherMCLinearOperator(RiskOperator, LinearOperator):
    r"""Monte-Carlo approximation of the Fisher information matrix.

    .. math::

        F = \frac{1}{M \sum_b D_b} \sum_b \sum_{t \in b} \sum_{m=1}^{M}
            J_t^\top g_{t,m} g_{t,m}^\top J_t
          \in \mathbb{R}^{P \times P}

    where :math:`g_{t,m}` is the gradient, with respect to the model's output, of the
    summed loss of term :math:`t` at a target drawn from the model's own likelihood.
    Its expectation is the GGN, class weights included.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
batch_size_fn, **options
        As for :class:`~curvlinops.risk.EmpiricalRisk`, which may be passed in place of
        the first four. The data's batches must come in the same order in every pass.
    seed : int, optional
        Seed of the samples. The same seed gives the same matrix in every product, on
        every device, and however the data are cut into batches: a datum's samples
        depend on its number in the data. Of a user's ``sampler`` that holds if targets
        are tensors; it is then called with the rows of the output one by one. It does
        not hold for outputs flattened with time first, ``[T * N, C]``, whose rows mix
        the data of a batch.
    mc_samples : int, optional
        Number :math:`M` of targets sampled per term.

    Raises
    ------
    ValueError
        If ``mc_samples`` is not positive, or the loss has no known likelihood.

    Notes
    -----
    Scale, cost and references as for :class:`GGNLinearOperator`. Each term (each
    token, each data point) is its own random variable. Self-adjoint and positive
    semi-definite, of rank at most :math:`M` times the number of terms. The relative
    standard deviation of an entry falls as :math:`1/\sqrt{M}`. Where a loss's Hessian
    depends on the targets of the data, or its likelihood is not sampled (see
    :class:`~curvlinops.losses.Elementwise`), the gradients are random vectors whose
    second moment is that Hessian: the expectation is the GGN still.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import FisherMCLinearOperator, GGNLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
    >>> data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
    >>> problem = net, loss, dict(net.named_parameters()), data
    >>> G = GGNLinearOperator(*problem).to_dense()
    >>> F = FisherMCLinearOperator(*problem, mc_samples=20000).to_dense()
    >>> bool((F - G).norm() / G.norm() < 0.05)
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
        mc_samples: int = 1,
        num_data: int | None = None,
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
                batch_size_fn=batch_size_fn,
                **options,
            )
        )
        if mc_samples == 0:
            raise ValueError(
                "`mc_samples` must be positive for a Monte-Carlo Fisher, got 0. The "
                "exact matrix is `GGNLinearOperator(...)`."
            )
        self.middle = LossHessian.of(self.risk, mc_samples, seed)
        self.forms = (congruence(self.middle),)


@dataclass(frozen=True)
class LossHessian(Middle):
    r"""The matrix between :math:`J^\top` and :math:`J`: exact, or sampled.

    Parameters
    ----------
    mc_samples : int
        Zero for the Hessian of the loss, else the number of samples per term.
    seed : int or None
        Seed of the samples, if there are any.
    """

    mc_samples: int = 0
    seed: int | None = None

    @classmethod
    def of(cls, risk: EmpiricalRisk, mc_samples: int, seed: int) -> Self:
        """Return the matrix for a risk's batches, after checking the settings.

        Raises
        ------
        ValueError
            If there is no such matrix.
        """
        number = as_count(mc_samples)
        if number is None or number < 0:
            raise ValueError(
                "`mc_samples` must be 0 (exact) or a positive number of samples, got "
                f"{mc_samples!r}."
            )
        if risk.loss_function is None:
            raise ValueError("The GGN needs a loss function, got a risk without one.")
        known = risk.loss_function if number else risk.terms
        known.warn_if_flat("the GGN", stacklevel=3)
        if number > 0:
            risk.require_fixed_order("A Monte-Carlo Fisher")
            risk.require_terms("a Monte-Carlo Fisher")
        return cls(number, count("seed", seed, None) if number else None)

    def __call__(self, batch: Linearization, U: Tensor) -> Tensor:
        if self.mc_samples == 0:
            return batch.loss.hessian_mul(U)
        total = torch.zeros_like(U)
        for gradients in self.samples(batch):
            total += batch.loss.outer_mul(gradients, U)
        return total / self.mc_samples

    def columns(self, batch: Linearization) -> Tensor | None:
        """Return the samples, if they are fewer than the outputs of a datum."""
        count, shape = self.mc_samples, batch.output_space.shapes[0]
        if count == 0 or count >= shape[1:].numel():
            return None
        one_term = self.samples(batch).ndim == 3 or len(shape) == 1
        return self.samples(batch) / count**0.5 if one_term else None

    def samples(self, batch: Linearization) -> Tensor:
        """Return the would-be gradients ``[M, *output.shape]``, drawn once."""

        def draw() -> Tensor:
            assert self.seed is not None
            return batch.loss.sample_gradients(self.mc_samples, self.seed)

        return batch.once((type(self).samples, self.mc_samples, self.seed), draw)
