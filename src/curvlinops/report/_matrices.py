"""The matrices that the command line knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curvlinops.ggn import FisherMCLinearOperator, GGNLinearOperator
from curvlinops.ggn_diagonal import GGNDiagonalLinearOperator
from curvlinops.gradient_covariance import EFLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.kfac import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.risk import EmpiricalRisk


@dataclass(frozen=True)
class Kind:
    """One of the matrices.

    Attributes
    ----------
    name : str
        On the command line.
    operator : type
        The class.
    semidefinite : bool
        Whether it has no negative eigenvalue, for losses convex in the output.
    sampled : bool
        Whether it takes a seed.
    """

    name: str
    operator: Callable[..., Any]
    semidefinite: bool = True
    sampled: bool = False

    def build(self, risk: EmpiricalRisk, seed: int) -> Any:
        """Return the matrix of a risk."""
        options = {"seed": seed} if self.sampled else {}
        return self.operator(risk, **options)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("hessian", HessianLinearOperator, semidefinite=False),
        Kind("ggn", GGNLinearOperator),
        Kind("fisher", FisherMCLinearOperator, sampled=True),
        Kind("ef", EFLinearOperator),
        Kind("kfac", KFACLinearOperator, sampled=True),
        Kind("ekfac", EKFACLinearOperator, sampled=True),
        Kind("kfoc", KFOCLinearOperator, sampled=True),
        Kind("ggn-diagonal", GGNDiagonalLinearOperator),
    )
}

DEFAULT = ("hessian", "ggn")
