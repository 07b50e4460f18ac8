r"""Kronecker products, and matrices known by their eigendecomposition.

Both are closed under what preconditioning asks for: damped inverses and powers are
operators of the same kind, and trace, determinant, norm, diagonal and eigenvalues cost
no more than a decomposition of the small factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import isfinite, prod
from typing import Any

import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._closed_forms import absent, with_article
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._operator import TorchOperator
from curvlinops._spaces import TensorSpace, real_exponent, real_scalar
from curvlinops.diag import tensors_of
from curvlinops.structured import as_operator

__all__ = ["EighDecomposedLinearOperator", "KroneckerProductLinearOperator"]

#: Units of rounding of the largest eigenvalue that none of a factor is known better.
LEAST_UNITS = 32
#: One number for all factors, or one for each of them, first factor first.
Damping = float | tuple[float, ...]


class KroneckerProductLinearOperator(TorchOperator, LinearOperator):
    r"""A Kronecker product :math:`A_1 \otimes \dots \otimes A_k`.

    With rows :math:`(i_1, \dots, i_k)` and columns :math:`(j_1, \dots, j_k)` in
    lexicographic order its entries are :math:`(A_1)_{i_1 j_1} \cdots (A_k)_{i_k j_k}`.
    For two factors, :math:`(A_1 \otimes A_2) \operatorname{vec}(X) =
    \operatorname{vec}(A_1 X A_2^\top)` with the rows of :math:`X` concatenated.

    Parameters
    ----------
    *factors : Tensor
        The factors :math:`A_i` of shape ``(m_i, n_i)``; one of shape ``(n_i,)`` stands
        for a diagonal matrix. They are not copied.
    grouped : bool, optional
        Whether every factor has one more, leading, dimension of a common length ``G``.
        The operator is then block-diagonal, with ``G`` Kronecker products as blocks.
    name : str, optional
        What error messages call this operator.
    symmetric : bool, optional
        Whether all factors are symmetric, which is not checked: products with one
        vector then need not transpose them, which is faster.

    Raises
    ------
    TypeError
        If factors are no tensors, or their dtypes or devices differ.
    ValueError
        If there are none, or their shapes are not as described.

    Notes
    -----
    A list operand is one tensor of shape ``[n_1, ..., n_k]`` (grouped:
    ``[G, n_1, ..., n_k]``). The adjoint is the product of the adjoints. A product costs
    :math:`2 N \sum_i m_i` operations for square factors, one matrix product per factor;
    the large matrix is never formed.

    References
    ----------
    C. Van Loan, "The ubiquitous Kronecker product", J. Comput. Appl. Math. 123, 2000,
    doi:10.1016/S0377-0427(00)00393-9.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.kronecker import KroneckerProductLinearOperator
    >>> A, B = torch.rand(2, 3).double(), torch.rand(4, 5).double()
    >>> K = KroneckerProductLinearOperator(A, B)
    >>> bool(torch.allclose(K.to_dense(), torch.kron(A, B)))
    True
    >>> A, B = A @ A.T, B @ B.T
    >>> inverse = KroneckerProductLinearOperator(A, B).inverse(use_exact_damping=True,
    ...     damping=0.1)
    >>> dense = torch.linalg.inv(torch.kron(A, B) + 0.1 * torch.eye(8))
    >>> bool(torch.allclose(inverse.to_dense(), dense))
    True
    """

    def __init__(
        self,
        *factors: Tensor,
        grouped: bool = False,
        name: str = "",
        symmetric: bool = False,
    ) -> None:
        given = tensors_of("A Kronecker product", *factors)
        if not given:
            raise ValueError("A Kronecker product needs at least one factor, got none.")
        self.factors = given if grouped else [f.unsqueeze(0) for f in given]
        if (
            any(f.ndim not in (2, 3) for f in self.factors)
            or len({len(f) for f in self.factors}) > 1
        ):
            raise ValueError(
                "Factors of a Kronecker product have shape (m, n), or (n,) if diagonal,"
                " with one more, leading, dimension of a common length if `grouped`; "
                f"got {[tuple(f.shape) for f in given]} with grouped={grouped}."
            )
        self.grouped, self.name, self.symmetric = grouped, name, symmetric
        self._rows = [f.shape[1] for f in self.factors]
        self._cols = [f.shape[-1] for f in self.factors]
        lead = [len(given[0])] if grouped else []
        dtype, device = given[0].dtype, given[0].device
        out_space, in_space = (
            TensorSpace([(*lead, *dims)], dtype, device)
            for dims in (self._rows, self._cols)
        )
        super().__init__(in_space, out_space)

    def _with(self, factors: list[Tensor]) -> KroneckerProductLinearOperator:
        given = factors if self.grouped else [f[0] for f in factors]
        return KroneckerProductLinearOperator(
            *given, grouped=self.grouped, name=self.name
        )

    def _apply(self, V: Tensor) -> Tensor:
        G, K = len(self.factors[0]), V.shape[1]
        return self._multiply(V.T.reshape(K, G, *self._cols)).reshape(K, -1).T

    def _multiply(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Turn ``[K, G, n_1, ...]`` into ``[K, G, m_1, ...]``, in ``out`` if given."""
        if out is not None and X.shape[:2] == (1, 1) and len(self.factors) == 2:
            B, A = (f[0] for f in self.factors)
            if B.ndim == A.ndim == 2 and out.is_contiguous():
                torch.mm(B @ X[0, 0], A if self.symmetric else A.T, out=out[0, 0])
                return out
        for i, factor in enumerate(self.factors):
            X = _multiply(factor, X, i)
        return X if out is None else out.copy_(X)

    def _adjoint(self) -> TorchOperator:
        return self._with([f if f.ndim == 2 else f.mT for f in self.factors])

    # -- scalars ----------------------------------------------------------------

    def _per_group(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply a number per factor over factors; of shape ``(G,)``."""
        return reduce(torch.mul, map(measure, self.factors))

    def trace(self) -> Tensor:
        r"""Return the trace, :math:`\prod_i \operatorname{tr} A_i`."""
        self._check_square("trace")
        return self._per_group(lambda f: _diagonal(f).sum(-1)).sum()

    def frobenius_norm(self) -> Tensor:
        r"""Return the Frobenius norm, :math:`\prod_i \|A_i\|`."""
        return self._per_group(lambda f: f.square().flatten(1).sum(1)).sum().sqrt()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        r"""Return sign and logarithm of :math:`\prod_i \det(A_i)^{N / n_i}`."""
        self._check_square("determinant")
        if delta:
            self._require_symmetric("determinant")
            return self.eigh()._slogdet(delta)
        N = prod(self._cols)
        total = self.factors[0].new_zeros(())
        sign = total + 1
        for f in self.factors:
            power = N // f.shape[-1]
            if f.ndim == 2:
                s, logs = f.sign().prod(-1), f.abs().log().sum(-1)
            else:
                s, logs = torch.linalg.slogdet(f)
                if f.numel() and bool(logs.isfinite().all()):
                    zero = _is_singular(f, self.name)
                    s = s.masked_fill(zero, 0)
                    logs = logs.masked_fill(zero, -torch.inf)
            sign, total = sign * (s**power).prod(), total + power * logs.sum()
        return sign, total

    def diagonal(self) -> Tensor:
        """Return the diagonal, of shape ``(N,)``."""
        self._check_square("diagonal")
        return _outer([_diagonal(f) for f in self.factors]).flatten()

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of symmetric factors' product in ascending order."""
        return self.eigh().eigenvalues()

    # -- operators --------------------------------------------------------------

    def eigh(self, retry_double_precision: bool = True) -> EighDecomposedLinearOperator:
        r"""Decompose symmetric factors, :math:`A_i = Q_i \Lambda_i Q_i^\top`.

        Parameters
        ----------
        retry_double_precision : bool, optional
            Whether to repeat a decomposition that fails in float64.

        Raises
        ------
        numpy.linalg.LinAlgError
            If a factor can't be decomposed, not even in float64.
        """
        self._check_square("eigendecomposition")
        evals, vectors = zip(
            *(eigh(f, self.name, retry_double_precision) for f in self.factors),
            strict=True,
        )
        Q = self._with(list(vectors))
        return EighDecomposedLinearOperator(
            _outer(list(evals)).flatten(), Q, name=self.name, spectra=evals
        )

    def inverse(  # type: ignore[override]
        self,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> KroneckerProductLinearOperator | EighDecomposedLinearOperator:
        r"""Return a damped inverse of a product of positive semi-definite factors.

        Parameters
        ----------
        damping : float or tuple of float, optional
            The number :math:`\delta` that is added to the diagonal of *every factor*,
            :math:`\bigotimes_i (A_i + \delta I)^{-1}`; or one for each factor.
        use_heuristic_damping : bool, optional
            Damp two factors in proportion to their mean eigenvalues instead,
            :math:`(A_1 + \sqrt{\delta} / \pi \, I)^{-1} \otimes
            (A_2 + \sqrt{\delta} \, \pi \, I)^{-1}` with :math:`\pi^2 =
            (\operatorname{tr} A_2 / n_2) / (\operatorname{tr} A_1 / n_1)`. A product
            of one factor is damped by :math:`\delta`, which needs no heuristic.
        min_damping : float, optional
            Least damping of a factor under the heuristic.
        use_exact_damping : bool, optional
            Damp the product instead of its factors,
            :math:`(\bigotimes_i A_i + \delta I)^{-1}`, by eigendecompositions: for a
            preconditioner of a matrix plus :math:`\delta I`.
        retry_double_precision : bool, optional
            Whether to repeat a decomposition that fails in float64.

        Returns
        -------
        KroneckerProductLinearOperator or EighDecomposedLinearOperator
            The latter with exact damping.

        Raises
        ------
        ValueError
            If both ways of damping are asked for, or the exact one with several
            numbers; if there is not one number for each factor; if one is not finite,
            or negative under the heuristic.
        numpy.linalg.LinAlgError
            If a damped factor is not positive definite, or is singular up to rounding
            where damping is lost in that of its diagonal: increase ``damping``.

        References
        ----------
        J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored
        approximate curvature", arXiv:1503.05671, section 6.3 for the heuristic.
        """
        self._check_square("inverse")
        several = isinstance(damping, tuple)
        checked_damping(damping)
        if use_exact_damping and (use_heuristic_damping or several):
            raise ValueError(
                "Exact damping adds one number to the diagonal of the product: leave "
                "out `use_heuristic_damping`, and pass one number as `damping`."
            )
        if use_exact_damping:
            decomposed = self.eigh(retry_double_precision)
            return decomposed.inverse(damping)  # type: ignore[arg-type]
        if use_heuristic_damping and not several and len(self.factors) == 2:
            shares = self._heuristic(damping, min_damping)  # type: ignore[arg-type]
        else:
            given = (
                damping
                if isinstance(damping, tuple)
                else (damping,) * len(self.factors)
            )
            if len(given) != len(self.factors):
                raise ValueError(
                    f"Got {len(given)} dampings for {len(self.factors)} factors."
                )
            shares = [self.factors[0].new_tensor(d) for d in given]
        return self._with(
            [
                _damped_inverse(f, d, self.name, retry_double_precision)
                for f, d in zip(self.factors, shares, strict=True)
            ]
        )

    def _heuristic(self, damping: float, least: float) -> list[Tensor]:
        if damping < 0:
            raise ValueError(
                f"The heuristic needs `damping` from zero, got {damping}: its square "
                "root is taken."
            )
        first, second = (_diagonal(f).mean(-1) for f in self.factors)
        pi = (second / first).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, torch.ones_like(pi))
        root = damping**0.5
        return [(root / pi).clamp(min=least), (root * pi).clamp(min=least)]

    def __pow__(self, p: Any) -> Any:
        """Return the power: lazy for 0, 1, 2, ..., else by eigendecompositions."""
        exponent = real_exponent(p)
        if exponent is None or (exponent >= 0 and exponent == int(exponent)):
            return super().__pow__(p)
        self._check_square("power")
        return self._with([_power(f, exponent, self.name) for f in self.factors])

    def _times(self, c: float) -> KroneckerProductLinearOperator:
        given = [*self.factors]
        smallest = min(range(len(given)), key=lambda i: given[i].numel())
        given[smallest] = c * given[smallest]
        return KroneckerProductLinearOperator(
            *(given if self.grouped else [f[0] for f in given]),
            grouped=self.grouped,
            name=self.name,
            symmetric=self.symmetric,
        )

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        if self._rows != self._cols or not self._looks_symmetric():
            return super()._inverse_of_damped(delta, **options)
        return self.eigh().inverse(delta)

    def _looks_symmetric(self) -> bool:
        return self.symmetric or all(
            f.ndim == 2 or bool(_asymmetry(f) <= f.shape[-1] * torch.finfo(f.dtype).eps)
            for f in self.factors
        )

    def _check_square(self, what: str) -> None:
        if self._rows != self._cols:
            raise LinAlgError(
                f"Only square factors have {with_article(what)} here, got the shapes "
                f"{[tuple(f.shape[1:]) for f in self.factors]}."
            )

    def _require_symmetric(self, what: str) -> None:
        if not self._looks_symmetric():
            raise absent(self, what)


class EighDecomposedLinearOperator(TorchOperator, LinearOperator):
    r"""A symmetric matrix :math:`Q \operatorname{diag}(\lambda) Q^\top`.

    Parameters
    ----------
    evals : Tensor
        The eigenvalues :math:`\lambda`, of shape ``(N,)`` or that of a list operand.
    Q : Tensor or LinearOperator
        The orthogonal matrix with eigenvectors as columns, of shape ``(N, N)``. An
        operator may be a Kronecker product of small orthogonal matrices.
    name : str, optional
        What error messages call this operator.
    spectra : sequence of Tensor, optional
        If ``Q`` is a Kronecker product of eigenvectors of factors: the factors'
        eigenvalues, ``(G, n_i)`` each, of which ``evals`` need not be the products.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    TypeError
        If dtypes or devices differ.

    Notes
    -----
    Self-adjoint. A product costs one product with :math:`Q` and one with
    :math:`Q^\top`. That :math:`Q` is orthogonal is not checked.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.kronecker import EighDecomposedLinearOperator
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    >>> A = EighDecomposedLinearOperator(*torch.linalg.eigh(matrix))
    >>> bool(torch.allclose(A.to_dense(), matrix))
    True
    >>> bool(torch.allclose((A ** -0.5 @ A ** -0.5 @ A).to_dense(), torch.eye(2,
    ...     dtype=torch.float64)))
    True
    """

    def __init__(
        self,
        evals: Tensor,
        Q: Any,
        *,
        name: str = "",
        spectra: Sequence[Tensor] | None = None,
    ) -> None:
        self.Q, self.spectra = as_operator(Q), spectra
        flat = tensors_of("An eigendecomposition", evals)[0].flatten()
        if self.Q.shape != (len(flat), len(flat)):
            raise ValueError(
                f"{len(flat)} eigenvalues need eigenvectors of shape "
                f"{(len(flat), len(flat))}, got {self.Q.shape}."
            )
        if (flat.dtype, flat.device) != (self.Q.torch_dtype, self.Q.device):
            raise TypeError(
                f"The eigenvalues are {flat.dtype} on {flat.device}, the eigenvectors "
                f"{self.Q.torch_dtype} on {self.Q.device}: bring both together."
            )
        super().__init__(self.Q._out_space, self.Q._out_space)
        self.evals, self.name = flat, name

    def _apply(self, V: Tensor) -> Tensor:
        return self.Q._apply(self.evals.unsqueeze(1) * self.Q.adjoint()._apply(V))

    def _without_rounding(self) -> Tensor:
        """Return the eigenvalues, with zeros where nothing but rounding is left.

        An eigenvalue of a matrix of size ``n`` is known up to ``n`` units of rounding
        of the largest, and a few more. A product is zero if a factor's eigenvalue is.
        Other numbers that belong to a Kronecker basis, such as EKFAC's, are squares of
        components, whose rounding is squared, too.
        """
        Q = self.Q
        if not isinstance(Q, KroneckerProductLinearOperator):
            return _without_rounding(self.evals)
        matrices = [f.ndim == 3 for f in Q.factors]
        if self.spectra is not None and torch.equal(
            self.evals, _outer(list(self.spectra)).flatten()
        ):
            parts = [
                _without_rounding(s) if is_matrix else s
                for s, is_matrix in zip(self.spectra, matrices, strict=True)
            ]
            return _outer(parts).flatten()
        units = max((_units(f) for f in Q.factors if f.ndim == 3), default=0.0)
        evals = self.evals.view(len(Q.factors[0]), -1)
        return _without_rounding(evals, units**2).flatten()

    def factors_decomposed(self) -> list[Tensor]:
        """Return the factors that ``Q`` and ``spectra`` are the decompositions of.

        Raises
        ------
        ValueError
            If these are not known.
        """
        if self.spectra is None or not isinstance(
            self.Q, KroneckerProductLinearOperator
        ):
            raise ValueError("It is not known which factors these eigenvectors are of.")
        return [
            evals if Q.ndim == 2 else (Q * evals.unsqueeze(1)) @ Q.mT
            for evals, Q in zip(self.spectra, self.Q.factors, strict=True)
        ]

    def trace(self) -> Tensor:
        """Return the trace, the sum of the eigenvalues."""
        return self.evals.sum()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        evals = self.evals + delta if delta else self._without_rounding()
        return evals.sign().prod(), evals.abs().log().sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, the Euclidean norm of the eigenvalues."""
        return self.evals.norm()

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues in ascending order."""
        return self.evals.sort().values

    def diagonal(self) -> Tensor:
        r"""Return the diagonal, :math:`\sum_j Q_{ij}^2 \lambda_j`."""
        if isinstance(self.Q, KroneckerProductLinearOperator):
            squared = self.Q._with([f.square() for f in self.Q.factors])
            return squared._apply(self.evals.unsqueeze(1))[:, 0]
        return self.Q.to_dense().square() @ self.evals

    def inverse(  # type: ignore[override]
        self, damping: float = 0.0
    ) -> EighDecomposedLinearOperator:
        r"""Return :math:`Q \operatorname{diag}(\lambda + \delta)^{-1} Q^\top`.

        Raises
        ------
        ValueError
            If the damping is not a finite number.
        numpy.linalg.LinAlgError
            If a damped eigenvalue is zero, or it is zero up to rounding and not
            damped: increase ``damping``.
        """
        checked_damping(damping)
        damped = self.evals + damping if damping else self._without_rounding()
        if zeros := int((damped == 0).sum()):
            raise LinAlgError(
                f"{self.name or repr(self)} plus damping={damping} is singular: {zeros}"
                " of its eigenvalues are zero. Pass a larger `damping`."
            )
        return EighDecomposedLinearOperator(damped.reciprocal(), self.Q, name=self.name)

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        return self.inverse(delta)

    def _damped(self, delta: float) -> TorchOperator:
        return EighDecomposedLinearOperator(self.evals + delta, self.Q, name=self.name)

    def _times(self, c: float) -> EighDecomposedLinearOperator:
        evals, spectra = c * self.evals, self.spectra
        if spectra is not None:
            products = torch.equal(self.evals, _outer(list(spectra)).flatten())
            spectra = [c * spectra[0], *spectra[1:]]
            evals = _outer(spectra).flatten() if products else evals
        return EighDecomposedLinearOperator(
            evals, self.Q, name=self.name, spectra=spectra
        )

    def __pow__(self, p: Any) -> Any:
        """Return the power with any real exponent."""
        exponent = real_exponent(p)
        if exponent is None:
            return super().__pow__(p)
        exact = exponent >= 0 and exponent == int(exponent)
        evals = self.evals if exact else self._without_rounding()
        powers = _powers(evals, exponent, self.name)
        return EighDecomposedLinearOperator(powers, self.Q, name=self.name)


# -- factors of shape (G, m, n), or (G, n) if diagonal ------------------------------


def _multiply(factor: Tensor, X: Tensor, i: int) -> Tensor:
    """Multiply the ``i``-th matrix dimension of an ``[K, G, n_1, ..., n_k]``."""
    K, G, *dims = X.shape
    before, n, after = prod(dims[:i]), dims[i], prod(dims[i + 1 :])
    if factor.ndim == 2:
        product = X.reshape(K, G, before, n, after) * factor.view(G, 1, n, 1)
    elif after == 1:
        rows = X.reshape(K, G, before, n)
        product = rows @ factor[0].T if G == 1 else rows @ factor.mT
    else:
        product = factor.unsqueeze(1) @ X.reshape(K, G, before, n, after)
    return product.reshape(K, G, *dims[:i], factor.shape[1], *dims[i + 1 :])


def _asymmetry(factor: Tensor) -> Tensor:
    """Return the largest difference from the transpose, relative to all entries."""
    size = factor.abs().amax() if factor.numel() else factor.new_zeros(())
    difference = (factor - factor.mT).abs().amax() if factor.numel() else size
    return difference / size.clamp(min=torch.finfo(factor.dtype).tiny)


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)


def _outer(vectors: list[Tensor]) -> Tensor:
    """Return the outer products ``[G, n_1 * ... * n_k]`` of ``[G, n_i]``."""
    return reduce(lambda a, b: (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1), vectors)


def eigh(
    factor: Tensor, name: str = "", retry: bool = True, upper: bool = False
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``(G, n)`` and vectors (ones if ``factor`` is diagonal).

    With ``upper``, only a positive semi-definite matrix's upper half is looked at.

    Raises
    ------
    numpy.linalg.LinAlgError
        If that fails, also in float64.
    """
    if factor.ndim == 2:
        return factor, torch.ones_like(factor)

    def decompose(f: Tensor) -> Any:
        return torch.linalg.eigh(f, UPLO="U" if upper else "L")

    # Of a positive semi-definite matrix, the diagonal bounds all entries.
    look_at = _diagonal(factor) if upper else factor
    return _retried(decompose, factor, name, retry, "eigendecomposition", look_at)


def checked_damping(damping: Any) -> None:
    """Raise unless a damping is a finite number, or a tuple of these."""
    for number in damping if isinstance(damping, tuple) else (damping,):
        value = real_scalar(number)
        if value is None or not isfinite(value):
            raise ValueError(
                "`damping` must be a finite number, or a tuple of one for each factor, "
                f"got {damping!r}."
            )


def _damped_inverse(
    factor: Tensor, damping: Tensor, name: str, retry: bool = True
) -> Tensor:
    """Invert ``factor + damping I`` through its Cholesky factor.

    Rounding decides whether a singular matrix has one. Where damping does not change
    the diagonal, by its eigenvalues it is seen what the matrix is.
    """
    damping = damping.reshape(-1, 1)
    if not damping.any() and bool((_diagonal(factor) < 0).all()):  # a multiple by c < 0
        return -_damped_inverse(-factor, damping, name, retry)
    if factor.ndim == 2:
        damped = factor + damping
        if bool((damped > 0).all()):
            return damped.reciprocal()
        raise _failed("inverse", factor, name)
    damped = factor.clone()
    _diagonal(damped).add_(damping)
    same = (_diagonal(damped) == _diagonal(factor)).all(-1)
    if bool(same.any()) and bool(_is_singular(factor[same], name, retry).any()):
        raise _failed("inverse", factor, name)
    return _retried(
        lambda f: torch.cholesky_inverse(torch.linalg.cholesky(f)),
        damped,
        name,
        retry,
        "Cholesky decomposition",
    )


def _without_rounding(evals: Tensor, units: float | None = None) -> Tensor:
    """Set eigenvalues ``[..., n]`` to zero that are small, relative to the largest."""
    if not evals.numel():
        return evals
    if units is None:
        units = _units(evals)
    size = evals.abs()
    return evals.masked_fill(size <= units * size.amax(-1, keepdim=True), 0)


def _units(evals: Tensor) -> float:
    """Return how large the rounding of ``n`` eigenvalues is, relative to the largest.

    Of a decomposition, that is ``n`` units. Entries of a factor are sums over data, of
    which a few are lost, however small the matrix is.
    """
    return max(evals.shape[-1], LEAST_UNITS) * torch.finfo(evals.dtype).eps


def _is_singular(factor: Tensor, name: str, retry: bool = True) -> Tensor:
    """Return which of the matrices ``[G, n, n]`` are singular up to rounding."""
    symmetric = torch.equal(factor, factor.mT)
    spectrum = torch.linalg.eigvalsh if symmetric else torch.linalg.svdvals
    values = _retried(spectrum, factor, name, retry, "decomposition")
    return (_without_rounding(values) == 0).any(-1)


def _powers(evals: Tensor, exponent: float, name: str) -> Tensor:
    powers = evals**exponent
    if not bool(powers.isfinite().all()):
        raise LinAlgError(
            f"{name or 'The matrix'} has no power {exponent}: its least eigenvalue is "
            f"{float(evals.min()):.3e}. Add damping first, e.g. `A.inverse(damping)`."
        )
    return powers


def _power(factor: Tensor, exponent: float, name: str) -> Tensor:
    evals, Q = eigh(factor, name)
    evals = evals if factor.ndim == 2 else _without_rounding(evals)
    powers = _powers(evals, exponent, name)
    return powers if factor.ndim == 2 else (Q * powers.unsqueeze(1)) @ Q.mT


def _retried(
    decompose: Callable[[Tensor], Any],
    factor: Tensor,
    name: str,
    retry: bool,
    what: str,
    look_at: Tensor | None = None,
) -> Any:
    """Decompose, in float64 if that fails in the factor's own precision.

    Whether all entries are finite is seen from ``look_at``, or else the factor itself.
    """
    seen = factor if look_at is None else look_at
    # The sum is quick, and finite if all entries are, unless it overflows.
    if not bool(seen.sum().isfinite()) and not bool(seen.isfinite().all()):
        raise _failed(what, factor, name, finite=False)
    try:
        return decompose(factor)
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        if not retry or factor.dtype == torch.float64:
            raise _failed(what, factor, name) from error
    try:
        result = decompose(factor.double())
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        raise _failed(what, factor, name) from error
    if torch.is_tensor(result):
        return result.to(factor.dtype)
    return tuple(part.to(factor.dtype) for part in result)


def _failed(what: str, factor: Tensor, name: str, finite: bool = True) -> LinAlgError:
    shape = tuple(factor.shape[1:])
    if not finite:
        cause = "has entries that are not finite: look at the parameters and the data"
    elif what == "inverse":
        cause = "is singular up to rounding: pass a larger `damping`"
    elif what == "eigendecomposition":
        cause = "did not converge: scale the loss, or use float64 or another device"
    else:
        cause = "is not positive definite: pass a larger `damping`"
    where = f" of {name}" if name else ""
    return LinAlgError(
        f"The {what} of a factor of shape {shape}{where} failed. It {cause}."
    )
