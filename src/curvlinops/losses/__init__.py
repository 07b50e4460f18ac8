r"""Everything the package knows about loss functions, one class per loss.

A :class:`Loss` is one batch's loss as a function of the model's output ``f``, the
**sum** :math:`S(f) = \sum_t \ell(f_t, y_t)` over its terms, whatever the reduction of
the user's loss. A term is one row of the output: the entries along the class axis at
one position. What a ``mean`` divides by is kept aside as ``count``, so the loss of the
concatenated batches is :math:`\sum_b S_b / \sum_b D_b`.

:func:`as_loss_function` turns what users hold into a :class:`LossFunction`, which
builds the :class:`Loss` of every batch.

Adding a loss takes one call of :func:`register` and a subclass of :class:`Loss`: its
constructor takes options as keyword-only arguments and sets ``count``, and its hooks
``_evaluate``, ``_hessian_mul``, ``_factor_mul``, ``_factor_transpose_mul`` and
``_sample_gradients`` compute what the public methods promise.
"""

from curvlinops.losses._categorical import CrossEntropy, NegativeLogLikelihood
from curvlinops.losses._elementwise import MSE, BCEWithLogits
from curvlinops.losses._generic import Generic
from curvlinops.losses._loss import FEW_CLASSES, MANY_NUMBERS, Loss, Number
from curvlinops.losses._table import LossFunction, as_loss_function, register

__all__ = [
    "FEW_CLASSES",
    "MANY_NUMBERS",
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "Generic",
    "Loss",
    "LossFunction",
    "NegativeLogLikelihood",
    "Number",
    "as_loss_function",
    "register",
]
