r"""Everything the package knows about loss functions, one class per loss.

A :class:`Loss` is one batch's loss as a function of the model's output ``f``, the
**sum** :math:`S(f) = \sum_t \ell(f_t, y_t)` over its terms, whatever the reduction of
the user's loss. A term is one row of the output: the entries along the class axis at
one position. What a ``mean`` divides by is kept aside as ``count``, so the loss of the
concatenated batches is :math:`\sum_b S_b / \sum_b D_b`.

:func:`as_loss_function` turns what users hold into a :class:`LossFunction`, which
builds the :class:`Loss` of every batch. These of torch's losses are known in closed
form, as module and as function:

=====================  =========================  =====================
known as               a ``mean`` divides by      second derivative
=====================  =========================  =====================
MSE                    entries, or their weights  constant
Huber, SmoothL1        entries                    zero far from targets
L1                     entries, or their weights  zero
PoissonNLL             entries                    positive
BCEWithLogits          entries                    positive
BCE                    entries                    positive
SoftMargin             entries                    positive
MultiLabelSoftMargin   rows                       positive
HingeEmbedding         entries                    zero
CrossEntropy           rows, by their weights     couples classes
NegativeLogLikelihood  rows, by their weights     zero
KLDiv                  entries, or first axis     zero
=====================  =========================  =====================

A row is the output's last axis, or a single entry if there is only one axis; for
cross-entropy and the negative log-likelihood, it is the axis of the classes. Where the
second derivative is zero, so is a GGN, and operators that are made of it warn.

Adding a loss takes one call of :func:`register` and a subclass of :class:`Loss`: its
constructor takes options as keyword-only arguments and sets ``count``, and its hooks
``_evaluate``, ``_hessian_mul``, ``_factor_mul``, ``_factor_transpose_mul`` and
``_sample_gradients`` compute what the public methods promise. A sum over entries is a
subclass of :class:`Elementwise`, and needs ``_evaluate`` and ``_second_derivative``.
"""

from curvlinops.losses._binary import (
    BCE,
    BCEWithLogits,
    HingeEmbedding,
    MultiLabelSoftMargin,
    SoftMargin,
)
from curvlinops.losses._categorical import CrossEntropy, KLDiv, NegativeLogLikelihood
from curvlinops.losses._elementwise import Elementwise
from curvlinops.losses._generic import Generic
from curvlinops.losses._loss import FEW_CLASSES, MANY_NUMBERS, Loss, Number
from curvlinops.losses._regression import L1, MSE, Huber, PoissonNLL, SmoothL1
from curvlinops.losses._table import (
    LossFunction,
    as_loss_function,
    register,
    unwrapped,
)

__all__ = [
    "BCE",
    "FEW_CLASSES",
    "L1",
    "MANY_NUMBERS",
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "Elementwise",
    "Generic",
    "HingeEmbedding",
    "Huber",
    "KLDiv",
    "Loss",
    "LossFunction",
    "MultiLabelSoftMargin",
    "NegativeLogLikelihood",
    "Number",
    "PoissonNLL",
    "SmoothL1",
    "SoftMargin",
    "as_loss_function",
    "register",
    "unwrapped",
]
