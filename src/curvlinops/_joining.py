"""Several small batches, multiplied as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlinops._agreement import matrices_agree
from curvlinops._data import joined
from curvlinops._ledger import Ledger
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._policy import Policy
from curvlinops._spaces import rounding

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk


def joining_pays(
    batches: list[Linearization], nbytes: int, ledger: Ledger, policy: Policy
) -> bool:
    """Whether batches are several that cost more for overhead than they compute.

    They, and what is made from them, keep ``nbytes``.
    """
    return (
        len(batches) > 1
        and nbytes <= policy.column_bytes
        and ledger.room_for(3 * nbytes)
        and not any(not batch.is_small or batch.pays_early for batch in batches)
    )


def joined_batch(
    risk: EmpiricalRisk,
    batches: list[Linearization],
    multiply: Callable[[Tensor, Linearization | None], Tensor],
) -> Linearization | None:
    """Return all data as one batch if its product is the sum of the batches'.

    Outputs may depend on which other data are in a batch.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk.
    batches : list of Linearization
        Its batches, in order.
    multiply : callable
        Multiplies a vector by the mean over the batches, or over a single one that is
        given.
    """
    f = risk.space

    def product(one: Linearization | None, vectors: list[Tensor]) -> list[Tensor]:
        return f.split(multiply(f.join(vectors).unsqueeze(1), one)[:, 0])

    like = [torch.empty(s, dtype=f.dtype, device=f.device) for s in f.shapes]
    eps = rounding(f.dtype, f.device, risk.model.convolves)
    try:
        sizes = [risk.batch_size(b.X) for b in batches]
        X = joined([b.X for b in batches], sizes)
        y = joined([b.y for b in batches], sizes, several=True)
        one = Linearization(risk.model, X, y, risk._loss_maker(X), policy=risk.policy)
        found, expected = partial(product, one), partial(product, None)
        return one if matrices_agree(found, expected, like, eps, 0.75) else None
    except Exception as error:  # whatever a model or a loss raises on another batch
        raise_if_out_of_memory(error)
        return None
