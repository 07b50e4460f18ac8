"""The enums of Kronecker-factored operators, under the path scripts import."""

from curvlinops.kfac import FisherType, KFACType

__all__ = ["FisherType", "KFACType"]
