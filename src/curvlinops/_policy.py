"""When products change their route, and how much they may take at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Policy:
    """Thresholds, on which no matrix depends: only how its products are computed.

    Costs are counted in products with one vector, never timed, so that the same
    product takes the same route in every run.

    Parameters
    ----------
    record_early, record_soon, record_late : int
        Plain products of a batch before one is recorded: where replaying it costs far
        less (convolutions on a CPU), where little but overhead is left out, and
        elsewhere.
    fold_late : int
        Products after these before sensitivities are computed, for every one per datum.
    max_rank : int
        Most sensitivities per datum and entry of a tensor.
    entry_cost : float
        What reading a sensitivity costs, in floating-point operations of a matrix
        product.
    small : int
        Most entries of parameters and inputs with which operations take little longer
        than starting them.
    dense_dim : int
        Largest dimension of a matrix that is materialised.
    jacobian_cost : float
        Largest number of products that a batch's Jacobian may cost to be kept.
    factor_bytes : int
        Bytes of a batch's Jacobian `J` per product after which `M J` is computed. That
        takes what four times as many products save: done early, since solvers make
        dozens.
    columns : int
        Most columns that one vectorised backward pass takes.
    column_bytes, column_bytes_on_gpu : int
        Bytes that its intermediate results may take up, and the graphs of batches that
        are multiplied as one. Measured on a CPU: beyond about 1 MiB per column, single
        passes are faster (``benchmarks/block_columns.py``). On a GPU, many columns at
        once are faster as long as they fit.
    matrices : int
        Most matrices of one state that are recorded.
    cache_fraction : float
        Fraction of a device's free memory that ``cache="auto"`` may fill.
    """

    record_early: int = 1
    record_soon: int = 2
    record_late: int = 8
    fold_late: int = 8
    max_rank: int = 16
    entry_cost: float = 32
    small: int = 1 << 14
    dense_dim: int = 4096
    jacobian_cost: float = 32
    factor_bytes: int = 1 << 19
    columns: int = 64
    column_bytes: int = 4 << 20
    column_bytes_on_gpu: int = 1 << 30
    matrices: int = 256
    cache_fraction: float = 0.4

    def bytes_of_columns(self, device: torch.device) -> int:
        """Return how many bytes several columns may take up in one backward pass."""
        cpu = device.type == "cpu"
        return self.column_bytes if cpu else self.column_bytes_on_gpu

    def record_after(self, pays_early: bool, is_small: bool) -> int:
        """Return the number of plain products of a batch before one is recorded."""
        if pays_early:
            return self.record_early
        return self.record_soon if is_small else self.record_late

    @property
    def last_change(self) -> int:
        """Most products of a batch until its route has settled."""
        return self.record_late + self.fold_late * self.max_rank + 4


#: What everybody gets who does not ask for something else.
POLICY = Policy()
