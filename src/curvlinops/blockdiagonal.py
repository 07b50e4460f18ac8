"""The block-diagonal operator, under the path that scripts import it from."""

from curvlinops.structured import BlockDiagonalLinearOperator

__all__ = ["BlockDiagonalLinearOperator"]
