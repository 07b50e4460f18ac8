"""Whether sampled gradients are as large as they are in expectation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlinops.losses import Loss

#: By what factor the squares of sampled gradients may differ from their expectation.
TOLERATED = 3.0


@dataclass
class Squares:
    r"""Squares of sampled gradients by the outputs, and what is expected of them.

    In expectation, :math:`\sum_t \lVert g_t \rVert^2 = \operatorname{tr} \nabla_f^2 S`
    for one sample :math:`g_t` per term. Both are sums over the data, and scale a
    Monte-Carlo Fisher matrix as they scale the exact one. Where a model is certain of
    its classes, the trace is made up of targets that are hardly ever sampled.
    """

    found: Any = 0.0
    expected: Any = 0.0

    def expect(self, loss: Loss) -> None:
        """Count a batch's terms; a loss without known trace makes all unknown."""
        trace = loss.hessian_trace()
        known = trace is not None and self.expected is not None
        self.expected = self.expected + trace if known else None

    def add(self, U: Tensor) -> None:
        """Count sampled gradients, which are divided by the root of their number."""
        norm = torch.linalg.vector_norm(U, dtype=torch.float64)
        self.found = self.found + norm.square()

    def warn(self) -> None:
        """Warn if the gradients are too small, or too large."""
        if self.expected is None or not float(self.expected) > 0:
            return
        ratio = float(self.found) / float(self.expected)
        if 1 / TOLERATED <= ratio <= TOLERATED:
            return
        warnings.warn(
            f"The squares of the sampled gradients sum up to {ratio:.2g} times what is "
            "expected, and the Kronecker factors are off by as much: the model is so "
            "certain of its outputs that the targets that matter are hardly ever "
            'sampled, or the data are few. Pass `fisher_type="type-2"`, which is '
            "exact, or a larger `mc_samples`.",
            stacklevel=2,
        )
