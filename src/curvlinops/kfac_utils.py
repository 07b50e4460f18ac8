"""The enums of Kronecker-factored operators, under the path scripts import them from."""

from curvlinops.kfac import FisherType, KFACType

__all__ = ["FisherType", "KFACType"]
