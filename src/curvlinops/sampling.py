"""Random test vectors, under the path that scripts import them from."""

from curvlinops._random import random_vector

__all__ = ["random_vector"]
