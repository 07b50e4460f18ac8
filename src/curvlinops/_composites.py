"""Operators made of others: sums, multiples, products, powers, casts.

They are lazy, and know in closed form what follows from the parts.
"""

from __future__ import annotations

from math import copysign
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._operator import TorchOperator, check_same_side
from curvlinops._spaces import TensorSpace, real_exponent


class Sum(TorchOperator, LinearOperator):
    """The lazy sum ``A + B``."""

    def __init__(self, A: TorchOperator, B: TorchOperator) -> None:
        super().__init__(A._in_space, A._out_space)
        self.args = (A, B)

    def _apply(self, V: Tensor) -> Tensor:
        A, B = self.args
        return A._apply(V).add_(B._apply(V))

    def _adjoint(self) -> TorchOperator:
        A, B = self.args
        adjoints = A.adjoint(), B.adjoint()
        return self if adjoints == self.args else Sum(*adjoints)

    def trace(self) -> Tensor:
        A, B = self.args
        return A.trace() + B.trace()

    def diagonal(self) -> Tensor:
        A, B = self.args
        return A.diagonal() + B.diagonal()


class Damped(TorchOperator, LinearOperator):
    r"""The lazy sum :math:`A + \delta I`."""

    def __init__(self, A: TorchOperator, delta: float) -> None:
        super().__init__(A._in_space, A._out_space)
        self.args = (A, delta)

    def _apply(self, V: Tensor) -> Tensor:
        A, delta = self.args
        return A._apply(V).add_(V, alpha=delta)

    def _adjoint(self) -> TorchOperator:
        A, delta = self.args
        return self if A.adjoint() is A else Damped(A.adjoint(), delta)

    def _damped(self, delta: float) -> TorchOperator:
        A, own = self.args
        return Damped(A, own + delta)

    def _times(self, c: float) -> TorchOperator:
        A, delta = self.args
        return Damped(c * A, c * delta)

    def trace(self) -> Tensor:
        A, delta = self.args
        return A.trace() + delta * self.shape[0]

    def diagonal(self) -> Tensor:
        A, delta = self.args
        return A.diagonal() + delta

    def frobenius_norm(self) -> Tensor:
        A, delta = self.args
        squares = A.frobenius_norm() ** 2 + delta * (2 * A.trace())
        return (squares + delta**2 * self.shape[0]).clamp(min=0).sqrt()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        A, own = self.args
        return A._slogdet(own + delta)

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        A, own = self.args
        return A._inverse_of_damped(own + delta, **options)


class Scaled(TorchOperator, LinearOperator):
    """The lazy multiple ``c A``."""

    def __init__(self, A: TorchOperator, c: float) -> None:
        super().__init__(A._in_space, A._out_space)
        self.args = (A, c)

    def _apply(self, V: Tensor) -> Tensor:
        A, c = self.args
        return A._apply(V).mul_(c)

    def _adjoint(self) -> TorchOperator:
        A, c = self.args
        return self if A.adjoint() is A else Scaled(A.adjoint(), c)

    def trace(self) -> Tensor:
        A, c = self.args
        return c * A.trace()

    def diagonal(self) -> Tensor:
        A, c = self.args
        return c * A.diagonal()

    def frobenius_norm(self) -> Tensor:
        A, c = self.args
        return abs(c) * A.frobenius_norm()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        A, c = self.args
        if c == 0:
            return self._makers["identity"](self)._times(delta)._slogdet()
        sign, logarithm = A._slogdet(delta / c)
        N = self.shape[0]
        size = torch.as_tensor(abs(c)).to(logarithm).log()
        return sign * copysign(1.0, c) ** (N % 2), logarithm + N * size

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        A, c = self.args
        if c == 0:
            return super()._inverse_of_damped(delta, **options)
        return 1.0 / c * A._inverse_of_damped(delta / c, **options)


class Product(TorchOperator, LinearOperator):
    """The lazy product ``A B``."""

    def __init__(self, A: TorchOperator, B: TorchOperator) -> None:
        if A.shape[1] != B.shape[0]:
            raise ValueError(
                f"Cannot multiply {A!r} and {B!r}: the columns of the first are not "
                "the rows of the second."
            )
        check_same_side(A, B, "multiply")
        super().__init__(B._in_space, A._out_space)
        self.args = (A, B)

    def _apply(self, V: Tensor) -> Tensor:
        A, B = self.args
        return A._apply(B._apply(V))

    def _adjoint(self) -> TorchOperator:
        A, B = self.args
        return Product(B.adjoint(), A.adjoint())


#: Products with a matrix that one with its power may take.
_LARGEST_POWER = 10**6


class Power(TorchOperator, LinearOperator):
    """The lazy power ``A ** k`` of a square operator, ``k = 0, 1, 2, ...``."""

    def __init__(self, A: TorchOperator, exponent: int) -> None:
        if A.shape[0] != A.shape[1]:
            raise ValueError(
                f"Only a square operator has powers, got {A!r}. `A.H @ A` is square."
            )
        number = real_exponent(exponent)
        if number is None or not number.is_integer() or number < 0:
            raise ValueError(
                f"{A!r} has powers 0, 1, 2, ..., got the exponent {exponent!r}. For an "
                "inverse use `A.inverse()`, or e.g. `CGInverseLinearOperator(A)`."
            )
        if number > _LARGEST_POWER:
            raise ValueError(
                f"A product with the power {exponent} takes as many products with "
                f"{A!r}: more than {_LARGEST_POWER} are not made. Use its eigenpairs."
            )
        super().__init__(A._in_space, A._in_space)
        self.args = (A, int(number))

    def _apply(self, V: Tensor) -> Tensor:
        A, exponent = self.args
        V = V.clone()
        for _ in range(exponent):
            V = A._apply(V)
        return V

    def _adjoint(self) -> TorchOperator:
        A, exponent = self.args
        return self if A.adjoint() is A else Power(A.adjoint(), exponent)


class Cast(TorchOperator, LinearOperator):
    """An operator whose vectors have another floating-point type.

    Products are computed in the type of the operator inside.
    """

    def __init__(self, A: TorchOperator, dtype: DTypeLike) -> None:
        torch_dtype = {"float32": torch.float32, "float64": torch.float64}.get(
            np.dtype(dtype).name
        )
        if torch_dtype is None:
            raise TypeError(
                f"An operator can be cast to float32 or float64, got {dtype!r}."
            )
        super().__init__(
            A._in_space.with_dtype(torch_dtype), A._out_space.with_dtype(torch_dtype)
        )
        self.args = (A,)

    def _apply(self, V: Tensor) -> Tensor:
        (A,) = self.args
        return A._apply(V.to(A.torch_dtype)).to(V.dtype)

    def _adjoint(self) -> TorchOperator:
        (A,) = self.args
        return self if A.adjoint() is A else Cast(A.adjoint(), self.dtype)

    def trace(self) -> Tensor:
        (A,) = self.args
        return A.trace().to(self.torch_dtype)

    def diagonal(self) -> Tensor:
        (A,) = self.args
        return A.diagonal().to(self.torch_dtype)

    def frobenius_norm(self) -> Tensor:
        (A,) = self.args
        return A.frobenius_norm().to(self.torch_dtype)

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        (A,) = self.args
        sign, logarithm = A._slogdet(delta)
        return sign.to(self.torch_dtype), logarithm.to(self.torch_dtype)


class Foreign(TorchOperator, LinearOperator):
    """A SciPy operator from elsewhere as one of ours: NumPy inside, on the CPU."""

    def __init__(self, A: Any) -> None:
        dtype = torch.float32 if A.dtype == np.float32 else torch.float64
        if np.dtype(A.dtype).kind == "c":
            raise TypeError(f"Complex operators are not supported, got {A!r}.")
        M, N = A.shape
        super().__init__(
            TensorSpace.flat(N, dtype, "cpu"), TensorSpace.flat(M, dtype, "cpu")
        )
        self.args = (A,)

    def _apply(self, V: Tensor) -> Tensor:
        (A,) = self.args
        result = np.array(A @ V.numpy(), dtype=self.dtype)
        return torch.from_numpy(result)

    def _adjoint(self) -> TorchOperator:
        (A,) = self.args
        return Foreign(A.adjoint())


TorchOperator._makers.update(
    sum=Sum, damped=Damped, multiple=Scaled, product=Product, power=Power, cast=Cast
)
