"""Diagonal matrices, which are closed under sums, products, powers and inverses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._operator import TorchOperator, check_same_side
from curvlinops._spaces import TensorSpace, real_exponent

__all__ = ["DiagonalLinearOperator", "IdentityLinearOperator"]

#: A diagonal's entries, of shape ``(N,)``, or the number that all of them are.
Entries = Tensor | float


def tensors_of(name: str, *tensors: Any) -> list[Tensor]:
    """Return tensors of one dtype on one device, without their autograd graphs."""
    for t in tensors:
        if not torch.is_tensor(t):
            raise TypeError(
                f"{name} is built from tensors, got {type(t).__name__}. Convert it "
                "with `torch.as_tensor(x)`."
            )
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        given = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise TypeError(
            f"{name} needs tensors of one dtype on one device, got {given}. Bring them "
            "together with `x.to(dtype=..., device=...)`."
        )
    return [t.detach() for t in tensors]


class Diagonal(TorchOperator):
    """Mixin of diagonal operators: they write one hook, ``_entries``.

    Sums, differences, multiples, products and powers of diagonal operators are diagonal
    operators: a :class:`DiagonalLinearOperator` of the results, unless an operand
    follows a model; then it is one that follows, too.
    """

    #: Whether the entries may change.
    _follows = False

    def _entries(self) -> Entries:
        """Return the entries, which are not changed by whoever gets them."""
        raise NotImplementedError

    def _vector(self, delta: float = 0.0) -> Tensor:
        """Return the entries plus a number, of shape ``(N,)``, maybe as a view."""
        entries = self._entries()
        if isinstance(entries, Tensor):
            return entries + delta if delta else entries
        single = torch.tensor(entries + delta, dtype=self.torch_dtype)
        return single.to(self.device).expand(self.shape[0])

    def _apply(self, V: Tensor) -> Tensor:
        entries = self._entries()
        return V * (entries.unsqueeze(1) if isinstance(entries, Tensor) else entries)

    # -- algebra --------------------------------------------------------------------

    def _plus(self, other: TorchOperator) -> TorchOperator:
        if isinstance(other, Diagonal):
            return combined(operator.add, self, other)
        return super()._plus(other)

    def _damped(self, delta: float) -> TorchOperator:
        return combined(operator.add, self, delta)

    def _times(self, c: float) -> TorchOperator:
        return combined(operator.mul, self, c)

    def _after(self, other: TorchOperator) -> TorchOperator:
        if isinstance(other, Diagonal) and self.shape == other.shape:
            check_same_side(self, other, "multiply")
            return combined(operator.mul, self, other)
        return super()._after(other)

    def _identity_multiple(self) -> float | None:
        entries = None if self._follows else self._entries()
        return None if isinstance(entries, Tensor) else entries

    def __pow__(self, p: Any) -> Any:
        """Return the power with a real exponent, as a diagonal operator.

        Raises
        ------
        numpy.linalg.LinAlgError
            If it has entries that are not finite.
        """
        if (exponent := real_exponent(p)) is None:
            return super().__pow__(p)
        return combined(_power, self, exponent)

    # -- scalars --------------------------------------------------------------------

    def trace(self) -> Tensor:
        return self._vector().sum()

    def diagonal(self) -> Tensor:
        """Return a copy of the entries, flattened, of shape ``(N,)``."""
        return self._vector().clone()

    def frobenius_norm(self) -> Tensor:
        return self._vector().norm()

    def eigenvalues(self) -> Tensor:
        """Return the entries in ascending order."""
        return self._vector().sort().values

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        entries = self._vector(delta)
        return entries.sign().prod(), entries.abs().log().sum()

    def inverse(  # type: ignore[override]
        self, damping: float = 0.0
    ) -> DiagonalLinearOperator:
        r"""Return :math:`(\operatorname{diag}(d) + \delta I)^{-1}`.

        Of the present entries, also where they may change.

        Parameters
        ----------
        damping : float, optional
            The number :math:`\delta` that is added to every entry.

        Returns
        -------
        DiagonalLinearOperator
            The inverse, with vectors of the same shapes.

        Raises
        ------
        numpy.linalg.LinAlgError
            If an entry of the damped diagonal is zero.
        """
        damped = self._entries() + damping
        zeros = damped == 0
        if number := int(zeros.sum()) if isinstance(zeros, Tensor) else zeros:
            raise LinAlgError(
                f"{self!r} plus damping={damping} is singular: {int(number)} of its "
                "entries are zero. Pass another damping, e.g. `inverse(damping=1e-3)`."
            )
        return DiagonalLinearOperator._of(self._in_space, 1.0 / damped)

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        return self.inverse(delta)


def _power(entries: Entries, exponent: float) -> Entries:
    """Return powers, or raise where they are not finite."""
    single = not isinstance(entries, Tensor)
    given = torch.as_tensor(entries, dtype=torch.float64 if single else None)
    powers = given**exponent
    if not bool(powers.isfinite().all()):
        least = float(given.min())
        raise LinAlgError(
            f"A diagonal matrix with the entry {least:.3e} has no power {exponent}: "
            "add damping first, `A.damped(1e-3)`."
        )
    return float(powers) if single else powers


def combined(operation: Callable[..., Entries], A: Diagonal, B: Any) -> Diagonal:
    """Return the diagonal operator with an operation's results as entries.

    Parameters
    ----------
    operation : callable
        Of two diagonals' entries.
    A : Diagonal
        The first.
    B : Diagonal or float
        The second, or a number.
    """
    if A._follows or (isinstance(B, Diagonal) and B._follows):
        return FollowingDiagonal(operation, A, B)
    other = B._entries() if isinstance(B, Diagonal) else B
    return DiagonalLinearOperator._of(A._in_space, operation(A._entries(), other))


class FollowingDiagonal(Diagonal, LinearOperator):
    """An operation on diagonals of which one follows a model, as it is now."""

    _follows = True

    def __init__(
        self, operation: Callable[..., Entries], A: Diagonal, B: Diagonal | float
    ) -> None:
        super().__init__(A._in_space, A._in_space)
        self.operation, self.args = operation, (A, B)

    def _entries(self) -> Entries:
        A, B = self.args
        other = B._entries() if isinstance(B, Diagonal) else B
        return self.operation(A._entries(), other)


class DiagonalLinearOperator(Diagonal, LinearOperator):
    r"""A diagonal matrix :math:`\operatorname{diag}(d) \in \mathbb{R}^{N \times N}`.

    Parameters
    ----------
    diagonal : list of Tensor, or Tensor
        The entries :math:`d`, in the shapes of the tensors that make up a vector.
        They are copied.

    Raises
    ------
    TypeError
        If an entry of the list is no tensor, or dtypes or devices differ.
    ValueError
        If the list is empty.

    Notes
    -----
    Self-adjoint. A product costs one multiplication per entry. Sums, differences,
    multiples, products and powers (with any real exponent) of diagonal operators, the
    identity among them, are diagonal operators again.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import DiagonalLinearOperator
    >>> D = DiagonalLinearOperator([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
    >>> bool(torch.equal(D.to_dense(), torch.diag(torch.tensor([1.0, 2.0, 3.0]))))
    True
    >>> D.inverse(damping=1.0) @ torch.ones(3)
    tensor([0.5000, 0.3333, 0.2500])
    >>> (2 * D + D @ D).diagonal()
    tensor([ 3.,  8., 15.])
    """

    def __init__(self, diagonal: Sequence[Tensor] | Tensor) -> None:
        given = [diagonal] if torch.is_tensor(diagonal) else list(diagonal)
        if not given:
            raise ValueError("A diagonal operator needs at least one tensor, got none.")
        entries = tensors_of("A diagonal operator", *given)
        space = TensorSpace(
            [t.shape for t in entries], entries[0].dtype, entries[0].device
        )
        super().__init__(space, space)
        self._diagonal: Entries = space.pack(entries)

    @classmethod
    def _of(cls, space: TensorSpace, entries: Entries) -> DiagonalLinearOperator:
        """Return an operator of entries that nobody else changes."""
        new = cls.__new__(cls)
        TorchOperator.__init__(new, space, space)
        new._diagonal = entries
        return new

    def _entries(self) -> Entries:
        return self._diagonal


class IdentityLinearOperator(Diagonal, LinearOperator):
    r"""The identity :math:`I \in \mathbb{R}^{N \times N}`.

    Parameters
    ----------
    shapes : iterable of sequences of int
        Shapes of the tensors that make up a vector; ``N`` is their number of entries.
    device : torch.device or str
        Device of the vectors.
    dtype : torch.dtype
        Floating-point type of the vectors.

    Raises
    ------
    TypeError
        If ``dtype`` is not a real floating-point type.

    Notes
    -----
    Self-adjoint. A product copies its operand. Multiples keep one number, whatever
    ``N``. See :meth:`like` for that of another operator.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import IdentityLinearOperator
    >>> I = IdentityLinearOperator([(2, 2), (3,)], "cpu", torch.float64)
    >>> bool(torch.equal((2.0 * I).to_dense(), 2.0 * torch.eye(7).double()))
    True
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        space = TensorSpace(shapes, dtype, device)
        super().__init__(space, space)

    @classmethod
    def like(cls, A: Any) -> Self:
        """Return the identity that goes with a square operator.

        Parameters
        ----------
        A : LinearOperator, array, sparse matrix, or Tensor
            The operator.

        Returns
        -------
        IdentityLinearOperator
            Of its shapes, on its device, in its dtype.

        Raises
        ------
        ValueError
            If the operator is not square.

        Examples
        --------
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator, IdentityLinearOperator
        >>> D = DiagonalLinearOperator([torch.tensor([1.0, 2.0]), torch.ones(1, 1)])
        >>> IdentityLinearOperator.like(D).in_shapes == D.in_shapes
        True
        """
        A = TorchOperator._makers["matrix"](A)
        if A.shape[0] != A.shape[1]:
            raise ValueError(
                f"Only a square matrix has an identity beside it, got {A!r}."
            )
        return cls(A.in_shapes, A.device, A.torch_dtype)

    def _apply(self, V: Tensor) -> Tensor:
        return V.clone()

    def _entries(self) -> Entries:
        return 1.0


TorchOperator._makers["identity"] = IdentityLinearOperator.like
