"""What every estimator shares: the result that it returns, and checks of arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from curvlinops._counts import as_count
from curvlinops._operand import to_numpy


class ArrayResult:
    """Mixin that lets NumPy and Matplotlib take a result object as an array."""

    def numpy(self) -> np.ndarray:
        """Return the result as NumPy array, copied from the device if need be."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return :meth:`numpy`, for NumPy functions."""
        if copy is None:  # which NumPy 1 does not know
            return np.asarray(self.numpy(), dtype=dtype)
        return np.array(self.numpy(), dtype=dtype, copy=copy)


#: Fewest samples whose spread is believed: below it nothing counts as converged.
FEWEST_SAMPLES = 8


def student(num_samples: int, level: float = 0.95) -> float:
    """Return how many standard errors a two-sided interval takes to either side.

    Student's, with half the degrees of freedom: quadratic forms are skewed, and with
    all of them intervals of few samples cover 89 % instead of 95. Fewer than three
    samples have no standard error: then nothing is random, and the normal
    distribution's number is returned.
    """
    freedom = (num_samples - 1) / 2 if num_samples > 2 else np.inf
    return float(stdtrit(freedom, (1 + level) / 2))


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(ArrayResult):
    r"""A number, or an array of numbers, with its error and its price.

    Prints as ``value +- error``.

    Attributes
    ----------
    value : Tensor or numpy.ndarray
        The estimate, of the operator's kind and on its device.
    standard_error : Tensor or numpy.ndarray
        Sampling error: the standard deviation of ``value`` over seeds, estimated from
        the samples. NaN for fewer than three of them, 0 if nothing is random.
    num_products : int
        Products with the matrix that were spent, one per column.
    num_samples : int
        Samples whose mean ``value`` is.
    seed : int or None
        Seed that reproduces ``value``; ``None`` if nothing is random.
    krylov_error : float
        How far the exact mean over the same samples may be from ``value``, because
        Krylov spaces of finite depth stand for the matrix: half of a bracket where the
        function has one, else the change from half the depth.
    converged : bool
        Whether the error asked for was reached. If none was, whether there are at least
        eight samples, and the Krylov error is no larger than the sampling error or one
        per cent of the value.
    """

    value: Any
    standard_error: Any
    num_products: int
    num_samples: int = 1
    seed: int | None = None
    krylov_error: float = 0.0
    converged: bool = True

    @property
    def error(self) -> Any:
        r"""Both errors, :math:`\sqrt{\mathrm{se}^2 + \mathrm{krylov}^2}`."""
        return (self.standard_error**2 + self.krylov_error**2) ** 0.5

    @property
    def truncation_error(self) -> float:
        """Another name of :attr:`krylov_error`."""
        return self.krylov_error

    def confidence_interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """Return lower and upper end of Student's interval, of :attr:`error`.

        Parameters
        ----------
        level : float, optional
            Probability that the interval covers the true value, in (0, 1).

        Returns
        -------
        tuple
            Two objects like :attr:`value`.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is a probability in (0, 1), got {level!r}.")
        margin = student(self.num_samples, level) * self.error
        return self.value - margin, self.value + margin

    def numpy(self) -> np.ndarray:
        """Return :attr:`value` as NumPy array."""
        return to_numpy(self.value)

    def __float__(self) -> float:
        """Return a scalar :attr:`value` as Python float."""
        return float(self.value)

    def __repr__(self) -> str:
        """Return value, error, and a word if it is not converged."""
        value, error = self.numpy(), to_numpy(self.error)
        text = f"{value} +- {error}" if value.ndim else f"{value:.8g} +- {error:.2g}"
        return text if self.converged else f"{text} (not converged)"


def require_positive_int(name: str, value: Any) -> int:
    """Return a positive integer argument (all that has an index), or raise."""
    number = as_count(value)
    if number is None:
        raise TypeError(f"{name} is a positive integer, got {value!r}.")
    if number < 1:
        raise ValueError(f"{name} is a positive integer, got {value}.")
    return number


def require_tolerance(name: str, value: Any) -> None:
    """Raise unless a tolerance is a number that is not negative."""
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} is a tolerance, 0 or above, got {value!r}.")


def require_choice(name: str, value: Any, choices: Any) -> Any:
    """Return an argument that is one of a few values, or raise listing them."""
    if value not in choices:
        raise ValueError(
            f"{name} is one of {', '.join(map(repr, choices))}; got {value!r}."
        )
    return value
