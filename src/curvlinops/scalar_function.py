"""Any scalar function of named tensors, in place of an empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from curvlinops._failures import function_failure, no_scalar
from curvlinops._hashed import Draws
from curvlinops.losses import Loss, LossFunction
from curvlinops.risk import EmpiricalRisk


class ScalarFunction(EmpiricalRisk):
    r"""A scalar function :math:`f(\theta)` of named tensors, without any data.

    Stands in place of an :class:`~curvlinops.risk.EmpiricalRisk` where an operator is
    built, for losses that are no sum over data points: those of physics-informed
    models, penalties, energies.

    Parameters
    ----------
    f : callable
        Maps a dict of the tensors to a 0-d tensor, through operations that autograd
        can differentiate twice.
    params : dict of str to Tensor
        The tensors, :math:`\theta`. Their order defines the layout of vectors. They
        are neither changed nor required to require gradients.
    check_deterministic, cache
        As for :class:`~curvlinops.risk.EmpiricalRisk`.

    Raises
    ------
    TypeError, ValueError
        If ``f`` does not return a 0-d tensor, or one that does not depend on the
        tensors, is not finite, or differs between two calls.

    Notes
    -----
    The Hessian is that of :math:`f`. Its Jacobian is the gradient as a matrix of shape
    ``(1, P)``, its empirical Fisher the outer product of the gradient with itself. The
    GGN needs a model and a loss to tell apart, so it raises: build it from these.

    What ``f`` closes over is not seen to change: call :meth:`refresh` then. A risk of
    this kind pickles if ``f`` does.

    Cost: as for one batch of data. A product with the Hessian takes about as long as
    two evaluations of the gradient, and holds the graph of one.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import HessianLinearOperator, ScalarFunction
    >>> def f(params):
    ...     return params["a"].square().prod() + params["b"].exp()
    >>> params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.0)}
    >>> HessianLinearOperator(ScalarFunction(f, params)).to_dense()
    tensor([[8., 8., 0.],
            [8., 2., 0.],
            [0., 0., 1.]])
    """

    def __init__(
        self,
        f: Callable[[dict[str, Tensor]], Tensor],
        params: Mapping[str, Tensor],
        *,
        check_deterministic: bool = True,
        cache: str | int = "auto",
    ) -> None:
        if not callable(f):
            raise TypeError(
                "A scalar function is a callable that maps a dict of tensors to a 0-d "
                f"tensor, got {type(f).__name__}."
            )
        super().__init__(
            _OfParameters(f),
            LossFunction(_Itself, "sum"),
            params,
            [((), None)],
            check_deterministic=check_deterministic,
            cache=cache,
        )

    def _failure(self, error: Exception, X: Any, index: int) -> Exception | None:
        return function_failure(error)


class _OfParameters:
    """The function as a model that ignores its input."""

    def __init__(self, f: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.f = f

    def __call__(self, params: dict[str, Tensor], X: Any) -> Tensor:
        value = self.f(params)
        if not torch.is_tensor(value):
            raise no_scalar(value)
        if value.ndim:
            raise TypeError(
                "A scalar function must return a 0-d tensor, got one of shape "
                f"{tuple(value.shape)}. Reduce it, e.g. with `.sum()`."
            )
        return value.clone()  # for a graph, also if it is one of the parameters


class _Itself(Loss):
    """The loss that is the model's output."""

    def __init__(self, output: Tensor, target: Any) -> None:
        super().__init__(output, target)
        self.count = 1

    def _evaluate(self, output: Tensor) -> Tensor:
        return output

    def _hessian_mul(self, U: Tensor) -> NoReturn:
        raise NotImplementedError(
            "A scalar function has no loss apart from a model, hence no Gauss-Newton "
            "or Fisher matrix. Use `HessianLinearOperator`, or build an "
            "`EmpiricalRisk` from a model and a loss."
        )

    _factor_mul = _factor_transpose_mul = _hessian_mul

    def _sample_gradients(self, num_samples: int, draws: Draws) -> NoReturn:
        self._hessian_mul(self.output)
