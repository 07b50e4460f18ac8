"""What every loss promises, and helpers of those that keep it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from operator import index
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Generator, Tensor

from curvlinops._hashed import Draws
from curvlinops._hidden import refuse_reentrant
from curvlinops._random import as_seed

Number: TypeAlias = Tensor | int | float
#: On a CPU, up to so many classes of at least so many numbers are added as slices: a
#: short axis is summed up to six times more slowly.
FEW_CLASSES, MANY_NUMBERS = 8, 1 << 16


class Loss(ABC):
    r"""One batch's loss, summed over its terms, as a function of the model's output.

    All tensors have the output's shape, dtype and device; ``U`` may have leading axes,
    ``[*leading, *output.shape]``, and is never written to. What does not depend on
    ``U`` is computed at first use and kept.

    Parameters
    ----------
    output : Tensor
        The model's output; only :meth:`value` uses its autograd graph, if any. Half
        precision is computed in float32 inside; the loss is then float32.
    target : Any
        The batch's targets.

    Attributes
    ----------
    count : Tensor or int or float
        What a ``mean`` over this batch divides the sum by; may be 0.
    opaque : bool
        Whether the number of terms and the likelihood must come from the user.
    """

    opaque: ClassVar[bool] = False
    #: Other names of a mean, each with the options that say what it divides by.
    means: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    count: Number
    #: Number of the output's first row in all data.
    first_row: int = 0

    def __init__(self, output: Tensor, target: Any) -> None:
        if not is_tensor(output) or not output.is_floating_point():
            raise TypeError(
                f"The model's output is {describe(output)}, but a loss needs a real "
                "floating-point tensor: let the model return one."
            )
        self.output = output
        self.target = target
        # work in the output's precision, but at least in float32
        self._dtype = torch.promote_types(output.dtype, torch.float32)

    @classmethod
    def smooth_alternative(cls, **options: Any) -> str | None:
        """Say what to use instead, if there is no second derivative."""
        return None

    @property
    def is_flat(self) -> bool:
        """Whether the Hessian turns out to be zero; known losses need not be asked."""
        return False

    @property
    def class_axis(self) -> int | None:
        """Negative index of the output's class axis; None if each entry is a row."""
        return -1 if self.output.ndim > 1 else None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The output's shape without its class axis."""
        shape = list(self.output.shape)
        if self.class_axis is not None:
            del shape[self.class_axis]
        return tuple(shape)

    @property
    def num_rows(self) -> int:
        """Number of terms, ignored ones included."""
        return prod(self.row_shape)

    def value(self) -> Tensor:
        """Sum-reduced loss, a 0-d tensor, differentiable through the output."""
        return self._evaluate(self.output)

    def gradient(self) -> Tensor:
        r"""Gradient :math:`\nabla_f S`, detached."""
        return self._differentiate(create_graph=False)[1]

    def hessian_mul(self, U: Tensor) -> Tensor:
        r"""Multiply every vector by the Hessian, :math:`\nabla_f^2 S \, u`."""
        return self._hessian_mul(self._checked(U))

    def factor_mul(self, U: Tensor) -> Tensor:
        r"""Multiply by a factor :math:`R` with :math:`R R^\top = \nabla_f^2 S`.

        The factor is square and acts within rows.

        Raises
        ------
        ValueError
            If weights are negative: there is no real factor then.
        """
        return self._factor_mul(self._checked(U))

    def factor_transpose_mul(self, U: Tensor) -> Tensor:
        r"""Multiply by :math:`R^\top`, see :meth:`factor_mul`."""
        return self._factor_transpose_mul(self._checked(U))

    def hessian_pair(self, U: Tensor) -> tuple[Tensor, Tensor]:
        r"""Multiply by two matrices with :math:`A B^\top = \nabla_f^2 S`.

        Both are the factor where there is one, else the identity and the Hessian.
        """
        try:
            FU = self.factor_mul(U)
        except (NotImplementedError, ValueError):
            return U, self.hessian_mul(U)
        return FU, FU

    def sample_gradients(self, num_samples: int, source: int | Generator) -> Tensor:
        r"""Gradients for targets drawn from the likelihood that the loss stands for.

        They are independent over rows and samples, have mean zero, and the Hessian as
        second moment in each row, :math:`\mathbb{E}[g_r g_r^\top] = \nabla_{f_r}^2 S`.

        Parameters
        ----------
        num_samples : int
            Number of samples.
        source : int or Generator
            The seed; a generator is asked for one. What a row gets depends on its
            number in all data, and not on the other rows or the device.

        Returns
        -------
        Tensor
            Of shape ``[num_samples, *output.shape]``.
        """
        seed = as_seed(source) if isinstance(source, Generator) else index(source)
        draws = Draws(seed, self.first_row)
        samples = self._sample_gradients(num_samples, draws)
        check_samples(samples, num_samples, self.output)
        return samples.detach().to(self.output)

    @classmethod
    def class_axes(cls, output: Tensor, target: Any) -> tuple[int, ...]:
        """Return the axes of an output on which classes may be, by the target's shape.

        Nothing if the loss knows no classes, or there is no doubt about them.
        """
        return ()

    def hessian_trace(self) -> Tensor | None:
        r"""Trace of the Hessian, the expected square of sampled gradients.

        ``None`` where no closed form is known.
        """
        return None

    def outer_mul(self, G: Tensor, U: Tensor) -> Tensor:
        r"""Multiply by the rows' outer products, :math:`g_r \langle g_r, u_r \rangle`.

        ``G`` has the output's shape.
        """
        GU = G * self._checked(U)
        return G * (GU if self.class_axis is None else self._row_sum(GU))

    @abstractmethod
    def _evaluate(self, output: Tensor) -> Tensor:
        """Sum-reduced loss at ``output``, differentiable."""

    @abstractmethod
    def _hessian_mul(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _factor_mul(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _factor_transpose_mul(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _sample_gradients(self, num_samples: int, draws: Draws) -> Tensor:
        """Sample with numbers from ``draws.uniform`` or ``draws.normal``."""

    def _nothing_to_sample(self, **options: Any) -> NotImplementedError:
        return NotImplementedError(
            "The loss is piecewise linear in the model's output: its second derivative "
            "is zero, and with it the second moment of the gradients that would be "
            f"sampled. Use {self.smooth_alternative(**options)}, or the empirical "
            "Fisher."
        )

    def _checked(self, U: Tensor) -> Tensor:
        if U.shape[U.ndim - self.output.ndim :] != self.output.shape:
            raise ValueError(
                f"The vectors have shape {tuple(U.shape)}, but must end in the "
                f"output's shape {tuple(self.output.shape)}: reshape them."
            )
        return U

    def _row_sum(self, U: Tensor) -> Tensor:
        axis = self.class_axis
        assert axis is not None
        if U.is_cuda or U.shape[axis] > FEW_CLASSES or U.numel() < MANY_NUMBERS:
            return U.sum(axis, keepdim=True)
        first, *others = U.split(1, axis)
        return sum(others, first)

    def _differentiate(self, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Return a detached copy of the output, and the loss's gradient there."""
        leaf = self.output.detach().requires_grad_()
        with torch.enable_grad():
            value = self._evaluate(leaf)
            if not value.requires_grad:
                raise ValueError(
                    "The loss does not depend on the model's output through autograd. "
                    "Compute it without .detach(), .item(), .numpy() or no_grad()."
                )
            if self.opaque:
                refuse_reentrant(value, "the loss")
            (gradient,) = torch.autograd.grad(
                value, leaf, create_graph=create_graph, materialize_grads=True
            )
        return leaf, gradient

    def _operand(self, value: Tensor, name: str) -> Tensor:
        """Bring a target or weight to the output's device and the working precision."""
        if not is_tensor(value) or value.is_complex():
            raise TypeError(f"The {name} is {describe(value)}: pass a real tensor.")
        return value.detach().to(self.output.device, self._dtype)


def check_samples(samples: Tensor, num_samples: int, output: Tensor) -> None:
    if samples.shape != (num_samples, *output.shape):
        raise ValueError(
            f"The sampler returned shape {tuple(samples.shape)} instead of "
            f"(num_samples, *output.shape) = {(num_samples, *output.shape)}."
        )


def check_reduction(reduction: Any) -> None:
    if reduction in ("mean", "sum"):
        return
    cause = "it combines terms in a way that is not known here"
    if reduction == "none":
        cause = "it gives one value per term, while curvature needs a scalar"
    raise ValueError(
        f"The loss has reduction={reduction!r}, so {cause}: use 'mean' or 'sum'."
    )


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


def root(scale: Tensor) -> Tensor:
    if (scale < 0).any():
        raise ValueError(
            "The loss has terms of negative curvature, so its Hessian has no real "
            "factor and no likelihood. Use weights >= 0, and targets in [0, 1] if they "
            "are probabilities."
        )
    return scale.sqrt()
