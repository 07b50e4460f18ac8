"""How wrong factors are whose samples miss what matters, and who says so."""

import re
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from curvlinops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.kfac._sampling import Squares
from curvlinops.losses import MSE, CrossEntropy, Generic
from tolerances import assert_close

FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator
WARNING = "sum up to (.*) times what is expected"


def classifier(margin):
    """Return the risk of a linear classifier that is right by some logits at least."""
    torch.manual_seed(0)
    X = torch.randn(40, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        first, second = model(X).topk(2).values.unbind(1)
        for p in model.parameters():
            p *= margin / (first - second).min()
        y = model(X).argmax(1)
    data = list(zip(X.split(25), y.split(25), strict=True))
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), list(model.parameters()), data)


def top(A):
    """Return the largest eigenvalue."""
    return eigsh(A, k=1, return_eigenvectors=False)[0]


@pytest.mark.parametrize("cls", FAMILY)
def test_nearly_fitted(cls):
    risk = classifier(margin=4.0)
    exact = top(GGNLinearOperator(risk))
    sampled = cls(risk, separate_weight_and_bias=False)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        found = top(sampled)
    assert len(caught) == 1
    ratio = float(re.search(WARNING, str(caught[0].message))[1])
    assert found < exact / 50
    assert 0.1 < ratio * exact / found < 10


@pytest.mark.parametrize("cls", FAMILY)
def test_cures(cls):
    """As the warning says; none is an error here."""
    risk = classifier(margin=4.0)
    exact = top(GGNLinearOperator(risk))
    options = {"separate_weight_and_bias": False}
    assert 0.5 < top(cls(risk, fisher_type="type-2", **options)) / exact < 1.5
    assert 0.3 < top(cls(risk, mc_samples=10_000, **options)) / exact < 3.0


def test_model_in_doubt():
    risk = classifier(margin=0.02)
    exact = top(GGNLinearOperator(risk))
    found = top(KFACLinearOperator(risk, separate_weight_and_bias=False))
    assert 0.5 < found / exact < 2.0


def test_squares_of_samples_over_batches():
    """Against autograd's Hessian and gradients."""
    g = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(8, 3, dtype=torch.float64, generator=g)
    y = torch.arange(8) % 3
    squares, norms, trace = Squares(), 0.0, 0.0
    for part in (slice(0, 5), slice(5, 8)):
        loss = CrossEntropy(f[part], y[part])
        samples = loss.sample_gradients(4, g)
        squares.expect(loss)
        for sample in samples:
            squares.add(sample / 2)
        norms += samples.numpy().ravel() @ samples.numpy().ravel() / 4

        def value(f, y=y[part]):
            return nn.functional.cross_entropy(f, y, reduction="sum")

        H = torch.autograd.functional.hessian(value, f[part])
        trace += np.trace(H.reshape(f[part].numel(), -1))
    assert_close(squares.found, torch.tensor(norms))
    assert_close(squares.expected, torch.tensor(trace))


@pytest.mark.parametrize(("found", "warns"), [(0.3, 1), (0.4, 0), (2.9, 0), (3.1, 1)])
def test_where_it_warns(found, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Squares(found=torch.tensor(2 * found), expected=torch.tensor(2.0)).warn()
        Squares(found=torch.tensor(found), expected=None).warn()
        Squares(found=torch.tensor(0.0), expected=torch.tensor(0.0)).warn()
    assert len(caught) == warns


def test_unknown_traces_make_the_sum_unknown():
    f, y = torch.zeros(2, 1), torch.zeros(2, 1)
    squares = Squares()
    quartic = {"function": lambda f, y: (f**4).sum(), "reduction": "sum"}
    for loss in MSE(f, y), Generic(f, y, num_terms=2, **quartic), MSE(f, y):
        squares.expect(loss)
    assert squares.expected is None
