"""Operators that multiply through blocks, and follow what these are computed from."""

from __future__ import annotations

from contextlib import ExitStack
from os import PathLike
from typing import Any, Self

from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._operator import TorchOperator, _is_tensor_list
from curvlinops._spaces import real_exponent
from curvlinops.kfac._blocks import Block, BlockwiseLinearOperator, Damping, Factors
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import RiskOperator


class Represented(RiskOperator):
    """Multiplies through another operator: its ``representation``, made of blocks."""

    @property
    def representation(self) -> BlockwiseLinearOperator:
        """The operator that does the work, at the present parameters and data."""
        raise NotImplementedError

    def frozen(self) -> BlockwiseLinearOperator:
        """Return the matrix as it is now, which does not follow any changes.

        Returns
        -------
        BlockwiseLinearOperator
            Factors and decompositions only, without model and data: with the same
            products, scalars, inverses and powers, and files that :func:`load
            <curvlinops.kfac.load>` reads. Its products do not look for changes. Copies
            and pickles of it are the same matrix. It knows a checksum of the
            parameters that it belongs to, for which these are read once.
        """
        matrix = self.representation
        if matrix.parameters is None:
            matrix.parameters = self.parameters_fingerprint()
        return matrix

    def save(self, path: str | PathLike[str]) -> None:
        """Write the blocks to an npz file, with what tells them from those of others.

        Those are the operator's settings and loss, and names, shapes, dtype, and a
        checksum of the parameters.

        Parameters
        ----------
        path : str or path
            The file. It replaces an earlier one once it is complete.

        Raises
        ------
        ValueError
            If something that is no regular file is there.
        OSError
            If it cannot be written. What was there before is as it was.
        """
        self.frozen().save(path)

    def _alone(self) -> ExitStack:
        """Take the model's lock and then the risk's, as everything else does."""
        with ExitStack() as stack:
            stack.enter_context(self.risk.model.exclusive())
            stack.enter_context(self.risk._lock)
            return stack.pop_all()

    def _apply(self, V: Tensor) -> Tensor:
        return self.representation._apply(V)

    def _product(
        self, x: Any, columns: int | None = None, ndim: int | None = None
    ) -> Any:
        """Hand on a list of tensors, which the blocks need not be joined for."""
        if _is_tensor_list(x):
            return self.representation._product(x, columns, ndim)
        return super()._product(x, columns, ndim)

    def block_of(self, name: str) -> Block:
        """Return the block that a parameter is in, as it is now.

        An operator of its own, which does not follow any changes.
        """
        return self.representation.block_of(name)

    # -- algebra ----------------------------------------------------------------------

    def trace(self) -> Tensor:
        return self.representation.trace()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.representation._slogdet(delta)

    def frobenius_norm(self) -> Tensor:
        return self.representation.frobenius_norm()

    def diagonal(self) -> Tensor:
        return self.representation.diagonal()

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues in ascending order."""
        return self.representation.eigenvalues()

    def _inverse(self, damping: Damping, **options: Any) -> KFACInverseLinearOperator:
        """Return the inverse that follows; what cannot be inverted raises now."""
        inverse = KFACInverseLinearOperator(self, damping, **options)
        _ = inverse.representation
        return inverse

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        return self._inverse(delta, use_exact_damping=True)

    def _times(self, c: float) -> TorchOperator:
        return KFACMultipleLinearOperator(self, c)

    def __pow__(self, p: Any) -> Any:
        """Return the power with a real exponent, e.g. ``-0.5``; it follows this one."""
        exponent = real_exponent(p)
        if exponent is None or (exponent >= 0 and exponent == int(exponent)):
            return super().__pow__(p)
        power = KFACPowerLinearOperator(self, exponent)
        _ = power.representation
        return power


class Following(Represented):
    """A function of another operator's blocks, computed anew whenever these are.

    Parameters
    ----------
    A : Represented
        The operator.
    cache : bool, optional
        Whether to keep the result for later products.
    """

    def __init__(self, A: Represented, cache: bool = True) -> None:
        super().__init__(A.risk)
        self.A, self.cache = A, cache
        self._known: tuple[Any, BlockwiseLinearOperator] | None = None

    def _function(self, matrix: BlockwiseLinearOperator) -> BlockwiseLinearOperator:
        """Compute the representation from the other operator's."""
        raise NotImplementedError

    @property
    def representation(self) -> BlockwiseLinearOperator:
        """The function of the other operator's blocks as they are now."""
        matrix = self.A.representation
        if (known := self._known) is not None and known[0] is matrix:
            return known[1]
        with self._alone():
            matrix = self.A.representation
            if (known := self._known) is None or known[0] is not matrix:
                self._known = known = None  # frees it before there are two
                known = matrix, self._function(matrix)
                self._known = known if self.cache else None
            return known[1]

    def factors(self) -> dict[str, Factors]:
        """Return the present factors of blocks that have two, by the weight's name."""
        return self.representation.factors()

    def inverse(
        self, damping: Damping = 0.0, **options: Any
    ) -> KFACInverseLinearOperator:
        """Return the damped inverse, which follows this operator.

        Parameters
        ----------
        damping, **options
            As for :class:`KFACInverseLinearOperator`.

        Raises
        ------
        ValueError
            If ``damping`` or the options do not fit.
        numpy.linalg.LinAlgError
            If a damped block is not positive definite; it is named.
        """
        return self._inverse(damping, **options)

    def _of(self, risk: EmpiricalRisk) -> Self:
        twin = super()._of(risk)
        twin.A = self.A._of(risk)
        return twin

    def _depends_on_batches(self) -> str:
        return self.A._depends_on_batches()


class KFACPowerLinearOperator(Following, LinearOperator):
    """A power of a Kronecker-factored operator, which follows it.

    Parameters
    ----------
    A : Represented
        The operator.
    exponent : float
        The exponent.
    """

    def __init__(self, A: Represented, exponent: float) -> None:
        super().__init__(A)
        self.exponent = exponent

    def _function(self, matrix: BlockwiseLinearOperator) -> BlockwiseLinearOperator:
        return matrix**self.exponent


class KFACMultipleLinearOperator(Following, LinearOperator):
    """A multiple of a Kronecker-factored operator, which follows it.

    Parameters
    ----------
    A : Represented
        The operator.
    c : float
        The number it is multiplied by.
    """

    def __init__(self, A: Represented, c: float) -> None:
        super().__init__(A)
        self.c = c

    def _function(self, matrix: BlockwiseLinearOperator) -> BlockwiseLinearOperator:
        return matrix._times(self.c)


class KFACInverseLinearOperator(Following, LinearOperator):
    """The damped inverse of a Kronecker-factored operator, which follows it.

    Parameters
    ----------
    A : KFACLinearOperator, EKFACLinearOperator, or KFOCLinearOperator
        The operator.
    damping, use_heuristic_damping, min_damping, use_exact_damping, \
retry_double_precision
        As for :meth:`KFACLinearOperator.inverse`.
    cache : bool, optional
        Whether to keep the inverse for later products.

    Raises
    ------
    TypeError
        If ``A`` is no Kronecker-factored operator.

    Notes
    -----
    What ``A.inverse(...)`` returns, which computes it at once. It follows ``A``: after
    a change of parameters, buffers, modes or listed data it is computed anew from the
    new factors, at the next use. For one that stays as it is, see :meth:`frozen`.

    As a preconditioner of a matrix plus ``damping I``, pass ``use_exact_damping=True``:
    the default damps every factor, which is another matrix and takes more iterations.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
    >>> data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
    >>> K = KFACLinearOperator(net, loss, list(net.parameters()), data)
    >>> inverse = KFACInverseLinearOperator(K, damping=0.1, use_exact_damping=True)
    >>> dense = torch.linalg.inv(K.to_dense() + 0.1 * torch.eye(8))
    >>> bool(torch.allclose(inverse.to_dense(), dense))
    True
    """

    def __init__(
        self,
        A: Represented,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        cache: bool = True,
        retry_double_precision: bool = True,
    ) -> None:
        if not isinstance(A, Represented):
            raise TypeError(
                f"Expected a KFAC, EKFAC or KFOC operator, got {type(A).__name__}. A "
                "frozen one has `inverse`; for others, use e.g. "
                "`CGInverseLinearOperator`."
            )
        super().__init__(A, cache)
        self.damping = damping
        self._options = {
            "use_heuristic_damping": use_heuristic_damping,
            "min_damping": min_damping,
            "use_exact_damping": use_exact_damping,
            "retry_double_precision": retry_double_precision,
        }

    def _function(self, matrix: BlockwiseLinearOperator) -> BlockwiseLinearOperator:
        return matrix.inverse(self.damping, **self._options)


__all__ = ["KFACInverseLinearOperator", "Represented"]
