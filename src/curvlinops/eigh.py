"""The eigendecomposed operator, under the path that scripts import it from."""

from curvlinops.kronecker import EighDecomposedLinearOperator

__all__ = ["EighDecomposedLinearOperator"]
