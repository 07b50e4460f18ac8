"""The diagonal operator, under the path that scripts import it from."""

from curvlinops.structured import DiagonalLinearOperator

__all__ = ["DiagonalLinearOperator"]
