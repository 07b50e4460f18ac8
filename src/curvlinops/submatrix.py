"""The operator of some rows and columns, under the path that scripts import it from."""

from curvlinops.structured import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
