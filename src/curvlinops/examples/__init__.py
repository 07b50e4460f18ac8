"""Small helpers around the operators, and operators to try things out with."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from curvlinops._model import Parameters
from curvlinops.risk import EmpiricalRisk
from curvlinops.structured import (
    IdentityLinearOperator,
    OuterProductLinearOperator,
    TensorLinearOperator,
)

__all__ = [
    "IdentityLinearOperator",
    "OuterProductLinearOperator",
    "TensorLinearOperator",
    "gradient_and_loss",
]


def gradient_and_loss(
    model_func: Callable[..., Any],
    loss_func: Callable[..., Any],
    params: Parameters,
    data: Iterable[Any],
    batch_size_fn: Callable[[Any], int] | None = None,
    num_data: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    r"""Compute gradient and value of the loss of the whole data.

    .. math:: \nabla_\theta L(\theta) \quad \text{and} \quad L(\theta)

    with the loss :math:`L` of :class:`~curvlinops.risk.EmpiricalRisk`, that of the
    concatenated data however it is split into batches.

    Parameters
    ----------
    model_func, loss_func, params, data, batch_size_fn, num_data
        As for :class:`~curvlinops.risk.EmpiricalRisk`; ``num_data`` is not needed.

    Returns
    -------
    list of Tensor
        The gradient, in the parameters' shapes.
    Tensor
        The loss, a 0-d tensor.

    Notes
    -----
    One pass over the data.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.examples import gradient_and_loss
    >>> model, loss_func = torch.nn.Linear(3, 1), torch.nn.MSELoss()
    >>> X, y = torch.rand(5, 3), torch.rand(5, 1)
    >>> data = [(X[:3], y[:3]), (X[3:], y[3:])]
    >>> grad, loss = gradient_and_loss(model, loss_func, list(model.parameters()), data)
    >>> bool(torch.allclose(loss, loss_func(model(X), y)))
    True
    """
    risk = EmpiricalRisk(
        model_func,
        loss_func,
        params,
        data,
        check_deterministic=False,
        num_data=num_data,
        batch_size_fn=batch_size_fn,
        cache="off",
    )
    return risk.gradient_and_loss()
