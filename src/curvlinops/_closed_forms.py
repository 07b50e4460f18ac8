"""What a matrix of visible structure knows of itself: scalars, diagonal, inverse."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, ClassVar

import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from curvlinops._spaces import real_scalar

#: What estimates a number of a matrix that is only known by its products.
_ESTIMATORS = {
    "trace": "hutchinson_trace(A, num_matvecs)",
    "diagonal": "xdiag(A, num_matvecs)",
    "Frobenius norm": "hutchinson_squared_fro(A, num_matvecs) ** 0.5",
    "determinant": "logdet(A)",
}


def absent(A: Any, what: str) -> LinAlgError:
    """Return the error of a matrix without something in closed form."""
    return LinAlgError(
        f"{A!r} has no {what} in closed form. Estimate it with "
        f"`curvlinops.{_ESTIMATORS[what]}`, or take that of `A.to_dense()`."
    )


def require_square(A: Any, what: str) -> None:
    """Raise unless a matrix is square."""
    if A.shape[0] != A.shape[1]:
        raise LinAlgError(f"Only a square matrix has {with_article(what)}, got {A!r}.")


def with_article(what: str) -> str:
    """Return a noun with its indefinite article."""
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def _number(name: str, value: Any) -> float:
    """Return an argument that is a finite real number, or raise naming it."""
    if (number := real_scalar(value)) is None:
        raise TypeError(f"`{name}` must be a real number, got {value!r}.")
    if not isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    return number


class ClosedForms:
    """Mixin with the scalars, the diagonal and the inverse of a matrix.

    A matrix with a structure overrides what that makes easy: the public methods
    ``trace``, ``diagonal`` and ``frobenius_norm``, and the hooks ``_slogdet`` and
    ``_inverse_of_damped``. Everything else raises one error, which names what to do.
    """

    shape: tuple[int, int]
    #: Operators made of others, by name; the modules that define them enter these.
    _makers: ClassVar[dict[str, Callable[..., Any]]] = {}

    # -- hooks --------------------------------------------------------------------

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        r"""Return sign and logarithm of :math:`\det(A + \delta I)`."""
        raise absent(self, "determinant")

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        r"""Return :math:`(A + \delta I)^{-1}`, by iterative solves if need be.

        Options are those of the solver, and of no meaning to a closed form.
        """
        return self._makers["solver"](self._damped(delta), **options)

    def _damped(self, delta: float) -> Any:
        r"""Return :math:`A + \delta I`."""
        return self._makers["damped"](self, delta)

    def _identity_multiple(self) -> float | None:
        """Return the number that this is the multiple of the identity by, if it is."""
        return None

    # -- scalars ------------------------------------------------------------------

    def trace(self) -> Tensor:
        r"""Return the trace, :math:`\sum_i A_{ii}`.

        Raises
        ------
        numpy.linalg.LinAlgError
            If it does not exist, or is not known in closed form.
        """
        require_square(self, "trace")
        raise absent(self, "trace")

    def diagonal(self) -> Tensor:
        """Return the diagonal, of shape ``(N,)``.

        Raises
        ------
        numpy.linalg.LinAlgError
            If it does not exist, or is not known in closed form.
        """
        require_square(self, "diagonal")
        raise absent(self, "diagonal")

    def frobenius_norm(self) -> Tensor:
        r"""Return the Frobenius norm, :math:`(\sum_{ij} A_{ij}^2)^{1/2}`.

        Raises
        ------
        numpy.linalg.LinAlgError
            If it is not known in closed form.
        """
        raise absent(self, "Frobenius norm")

    def det(self) -> Tensor:
        """Return the determinant, which overflows easily; see :meth:`logdet`.

        Of exactly this matrix, see there.

        Raises
        ------
        numpy.linalg.LinAlgError
            If it does not exist, or is not known in closed form.
        """
        require_square(self, "determinant")
        sign, logarithm = self._slogdet()
        return sign * logarithm.exp()

    def logdet(self) -> Tensor:
        r"""Return the determinant's logarithm, :math:`\log \det A`.

        NaN if the determinant is negative, minus infinity if the matrix is singular (up
        to rounding, where factors or eigenvalues are known). Of exactly this matrix:
        that of ``A.inverse(d)`` is :math:`-\log \det (A + d I)` only if the inverse is
        damped so. By default, those of KFAC and of Kronecker products are not; there,
        it is ``-A.damped(d).logdet()``.

        Raises
        ------
        numpy.linalg.LinAlgError
            If it does not exist, or is not known in closed form.
        """
        require_square(self, "determinant")
        sign, logarithm = self._slogdet()
        return logarithm if bool(sign >= 0) else logarithm * torch.nan

    # -- operators ----------------------------------------------------------------

    def damped(self, delta: float) -> Any:
        r"""Return :math:`A + \delta I`.

        Parameters
        ----------
        delta : float
            The number :math:`\delta`, of any sign.

        Returns
        -------
        LinearOperator
            It follows changes that this operator follows. Its ``inverse()`` is that of
            exactly this matrix, whatever ``A.inverse(delta)`` damps.

        Raises
        ------
        TypeError
            If ``delta`` is not a real number.
        ValueError
            If it is not finite.
        numpy.linalg.LinAlgError
            If the matrix is not square.

        Examples
        --------
        >>> import torch
        >>> from curvlinops import KroneckerProductLinearOperator
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
        >>> K = KroneckerProductLinearOperator(A, A)
        >>> dense = torch.kron(A, A) + 0.1 * torch.eye(4)
        >>> bool(torch.allclose(K.damped(0.1).to_dense(), dense))
        True
        >>> inverse = K.damped(0.1).inverse().to_dense()
        >>> bool(torch.allclose(inverse, torch.linalg.inv(dense)))
        True
        >>> bool(torch.allclose(K.inverse(0.1).to_dense(), inverse))  # damps factors
        False
        """
        require_square(self, "multiple of the identity added to it")
        return self._damped(_number("delta", delta))

    def inverse(self, damping: float = 0.0, **options: Any) -> Any:
        r"""Return :math:`(A + \delta I)^{-1}`.

        Parameters
        ----------
        damping : float, optional
            The number :math:`\delta`.
        **options
            Hyperparameters of the solver, where it takes one.

        Returns
        -------
        LinearOperator
            In closed form where the structure allows it. Otherwise a product is a
            solve, by :class:`~curvlinops.MINRESInverseLinearOperator` if the matrix is
            its own adjoint, and :class:`~curvlinops.LSMRInverseLinearOperator` if not.
            For a positive definite matrix,
            ``CGInverseLinearOperator(A.damped(damping))`` stops at a residual that is
            small in itself.

        Raises
        ------
        TypeError
            If ``damping`` is not a real number.
        ValueError
            If it is not finite.
        numpy.linalg.LinAlgError
            If the matrix is not square, or a closed form says that it is singular.
        """
        require_square(self, "inverse")
        return self._inverse_of_damped(_number("damping", damping), **options)
