"""The diagonal of the generalised Gauss-Newton matrix, exact or sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil, prod
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._counts import count
from curvlinops._forms import Form
from curvlinops._identity import identity_of
from curvlinops._linearization import Linearization
from curvlinops._model import Parameters
from curvlinops._parts import one_by_one
from curvlinops._plan import Plan
from curvlinops.diag import Diagonal
from curvlinops.ggn import DEFAULT_SEED, LossHessian
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator, as_risk


class GGNDiagonalLinearOperator(Diagonal, RiskOperator, LinearOperator):
    r"""Diagonal of the generalised Gauss-Newton matrix as a diagonal operator.

    .. math::

        \operatorname{diag}(G) = \frac{1}{\sum_b D_b} \sum_b \sum_i
        \left( J_b^\top a_{b,i} \right) \odot \left( J_b^\top b_{b,i} \right)
        \in \mathbb{R}^{P},
        \qquad \sum_i a_{b,i} b_{b,i}^\top = \nabla^2_f S_b

    with the notation of :class:`~curvlinops.ggn.GGNLinearOperator`. The vectors are
    the columns of a factor of the loss's Hessian, :math:`a = b`, where there is one,
    and unit vectors and columns of the Hessian otherwise. Monte-Carlo: :math:`a = b`
    are the sampled gradients of single terms, over :math:`\sqrt{M}`.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, \
batch_size_fn, mc_samples, seed, **options
        As for :class:`~curvlinops.ggn.GGNLinearOperator`, of which this is the
        diagonal, also with samples: the same seed gives the same ones.

    Raises
    ------
    ValueError
        If ``mc_samples`` is negative.

    Notes
    -----
    Exact for every model and loss that the GGN accepts: only backward passes through
    the model are used, one per vector :math:`a`, never mixed. Self-adjoint; not
    negative if the loss is convex in the output.

    Cost: all in the first product, or in :meth:`diagonal`; later ones are
    multiplications, until parameters or data change. A datum with :math:`C` outputs
    takes a forward pass and :math:`C` backward passes of that datum alone, vectorised
    over data by ``torch.func`` where that works and agrees with a pass of the batch,
    else one by one (:math:`M` per term with samples; twice as many if the loss has no
    factor), vectorised as far as they fit into a few MiB. Where a batch cannot be cut,
    or its data do not contribute apart (which is checked), each is a pass of the whole
    batch. Memory: recordings of a batch and of its single data.

    References
    ----------
    F. Dangel, F. Kunstner, P. Hennig, "BackPACK: packing more into backprop",
    arXiv:1912.10985.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import EmpiricalRisk, GGNDiagonalLinearOperator
    >>> from curvlinops import GGNLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> risk = EmpiricalRisk(net, loss, dict(net.named_parameters()), data)
    >>> D, dense = GGNDiagonalLinearOperator(risk), GGNLinearOperator(risk).to_dense()
    >>> bool(torch.allclose(D.to_dense(), dense.diag().diag()))
    True
    >>> inverse = D.inverse(damping=1e-3).diagonal()
    >>> bool(torch.allclose(inverse, 1 / (dense.diag() + 1e-3)))
    True
    """

    _follows = True

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

    def _apply(self, V: Tensor) -> Tensor:
        _require_room(self, V.shape[1], V.element_size())
        return super()._apply(V)

    def plan(self, columns: int = 1) -> Plan:
        itemsize = self.risk.space.dtype.itemsize
        _require_room(self, count("columns", columns, 1), itemsize)
        return super().plan(columns)

    @property
    def forms(self) -> Sequence[Form]:  # type: ignore[override]
        """The loop that computes the diagonal, whatever vector it is given."""
        return (Form(lambda b, _: self._products(b), linear=False),)

    def _entries(self) -> Tensor:
        """Return the diagonal, computed once until parameters or data change."""
        risk = self.risk

        def compute() -> Tensor:
            ones = torch.ones(risk.space.dim, 1, dtype=risk.space.dtype)
            ones = ones.to(risk.space.device)
            return risk.apply(self.forms, ones, self._title("diagonal"))[:, 0]

        name = identity_of(self._products, risk)
        return compute() if name is None else risk.once((type(self), name), compute)

    def _products(self, b: Linearization) -> list[Tensor]:
        r"""Return :math:`\sum_i (J^\top a_i) \odot (J^\top b_i)` of a batch."""
        risk = self.risk
        dtype = torch.promote_types(risk.space.dtype, torch.float32)
        total = torch.zeros(risk.space.dim, dtype=dtype, device=risk.space.device)
        most = risk.policy.bytes_of_columns(risk.space.device) // total.nbytes
        width = max(1, min(risk.policy.columns, most))
        parts = one_by_one(risk, b)
        sampled = self.middle.mc_samples > 0
        vectors = (
            _sampled(self.middle, b, parts, width) if sampled else _exact(parts, width)
        )
        for part, A, B in vectors:
            left = risk.vjps(part, A)
            right = None if B is A else risk.vjps(part, B)
            for JTA in left:
                JTB = JTA if right is None else next(right)
                for row, x, y in zip(risk.space.split(total), JTA, JTB, strict=True):
                    # The first without a temporary: often there is no other.
                    row.addcmul_(x[0].to(dtype), y[0].to(dtype))
                    if len(x) > 1:
                        row.add_((x[1:].to(dtype) * y[1:].to(dtype)).sum(0))
        return risk.space.split(total)


def _require_room(A: GGNDiagonalLinearOperator, columns: int, itemsize: int) -> None:
    """Raise if operand, product and diagonal take more than there may be."""
    limit, needed = A.risk.max_memory, (2 * columns + 1) * A.shape[0] * itemsize
    if limit is not None and needed > limit:
        raise MemoryError(
            f"{type(A).__name__}._matmat with {columns} columns needs {needed} bytes, "
            f"but `max_memory` is {limit}. Pass `max_memory={ceil(1.02 * needed)}` or "
            "more, or fewer columns."
        )


def _sampled(
    middle: LossHessian, b: Linearization, parts: list[Linearization], width: int
) -> Iterator[tuple[Linearization, Tensor, Tensor]]:
    r"""Yield every part with the sampled gradients of single terms."""
    M = middle.mc_samples
    G = middle.samples(b) / M**0.5
    shares = G.chunk(len(parts), dim=1) if len(parts) > 1 else [G]
    for part, share in zip(parts, shares, strict=True):
        loss = part.loss
        for ones in _unit_vectors(loss.row_shape, max(1, width // M), share):
            if loss.class_axis is not None:
                ones = ones.unsqueeze(loss.class_axis)
            A = (share.unsqueeze(1) * ones).flatten(0, 1)
            yield part, A, A


def _exact(
    parts: list[Linearization], width: int
) -> Iterator[tuple[Linearization, Tensor, Tensor]]:
    r"""Yield every part with :math:`a` and :math:`b` of the loss's Hessian."""
    for part in parts:
        for ones in _unit_vectors(part.output.shape, width, part.output.detach()):
            yield part, *part.loss.hessian_pair(ones)


def _unit_vectors(shape: Sequence[int], width: int, like: Tensor) -> Iterator[Tensor]:
    """Yield the unit vectors of a shape, ``[k, *shape]`` with ``k <= width``."""
    dim = prod(shape)
    for start in range(0, dim, width):
        ones = like.new_zeros(min(width, dim - start), dim)
        ones[:, start : start + width].fill_diagonal_(1.0)
        yield ones.reshape(-1, *shape)
