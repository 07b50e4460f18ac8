"""The eigenvalue-corrected operator, under the path that scripts import it from."""

from curvlinops.kfac import EKFACLinearOperator, FisherType, KFACType

__all__ = ["EKFACLinearOperator", "FisherType", "KFACType"]
