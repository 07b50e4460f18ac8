"""How many columns are multiplied at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

from torch import Tensor

from curvlinops._agreement import random_like, same_operations_agree
from curvlinops._forms import Body
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._policy import POLICY, Policy
from curvlinops._spaces import TensorSpace, rounding

#: Key of products with the transposed Jacobian alone.
VJPS = "vjps"


class Columns:
    """Chooses how many columns of a product are multiplied at once.

    Parameters
    ----------
    space : TensorSpace
        Space of the parameters.
    policy : Policy, optional
        How many there may be.
    """

    def __init__(self, space: TensorSpace, policy: Policy = POLICY) -> None:
        self._space, self.policy = space, policy
        # Whether each product, by key, agrees with itself vectorised.
        self._vectorises: dict[Hashable, bool] = {}
        #: Most of them, where a bound for memory says so.
        self.most: int | None = None
        #: Chooses for a plan, whose batches are slices of larger ones.
        self.planned: Callable[[Columns, Hashable, Linearization], int] | None = None

    def width(
        self,
        key: Hashable,
        body: Body,
        batch: Linearization,
        V: Tensor,
        inputs: TensorSpace,
        plain: bool,
    ) -> int:
        """Return how many columns of ``V`` to multiply at once.

        Parameters
        ----------
        key, body, batch
            The product.
        V : Tensor
            Its columns, vectors of the space ``inputs``.
        inputs : TensorSpace
            That space.
        plain : bool
            Whether nothing recorded is used.
        """
        width = 1 if V.shape[1] == 1 else self.at_once(key, batch)
        if width == 1:
            return 1
        if not plain and batch.replays(key):
            return width  # vectorised, and checked, on its own
        if key is None or key not in self._vectorises:
            self._vectorises[key] = self._agrees(body, batch, V, inputs)
        return width if self._vectorises[key] else 1

    def at_once(self, key: Hashable, batch: Linearization) -> int:
        """Return how many columns may be multiplied at once."""
        if self.planned is not None:
            return self.planned(self, key, batch)
        return self.fitting(key, batch.nbytes)

    def fitting(self, key: Hashable, nbytes: int) -> int:
        """Return how many may be, with a batch that keeps so many bytes."""
        per_column = nbytes + self._space.dim * self._space.dtype.itemsize
        policy, device = self.policy, self._space.device
        most = policy.columns if self.most is None else self.most
        width = min(policy.bytes_of_columns(device) // per_column, most)
        return width if width >= 4 and self.vectorises(key) else 1

    def vectorises(self, key: Hashable) -> bool:
        """Whether several columns of a product may be multiplied at once."""
        return self._vectorises.get(key, True)

    def refuse(self, key: Hashable) -> None:
        """Multiply one by one from now on, since some operation cannot otherwise."""
        self._vectorises[key] = False

    def _agrees(
        self, body: Body, batch: Linearization, V: Tensor, inputs: TensorSpace
    ) -> bool:
        """Check a product with two random columns at once against one by one."""
        [columns] = random_like([V[:, :1].T.expand(2, -1)])
        pair, eps = inputs.split(columns), rounding(V.dtype, V.device, batch.convolves)
        multiply = partial(body, batch)
        try:
            both = multiply(pair)
        except RuntimeError as error:
            raise_if_out_of_memory(error)
            return False
        return all(
            same_operations_agree(
                [p[k] for p in both], multiply(column), eps, 0.5, multiply, column
            )
            for k, column in enumerate([v[k] for v in pair] for k in range(2))
        )
