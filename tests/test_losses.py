"""Every law of losses on every loss with every option, and every error."""

import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
)
from curvlinops.losses import (
    MSE,
    BCEWithLogits,
    CrossEntropy,
    Elementwise,
    Generic,
    KLDiv,
    LossFunction,
    _table,
    as_loss_function,
    register,
)
from loss_cases import CASES, KINDS, Case, Hidden, bce_with_logits, num_entries
from tolerances import assert_close

CLOSED = {name: case for name, case in CASES.items() if not case.loss().opaque}
#: Those without second derivative.
FLAT = {
    name: case
    for name, case in CLOSED.items()
    if name.split("-")[0] in {"l1", "hinge", "nll", "kl"} or name.endswith("no-beta")
}
SAMPLED = {name: case for name, case in CLOSED.items() if name not in FLAT}
HALF = {name: case for name, case in CLOSED.items() if not case.extreme}


def over(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


each, each_closed, each_sampled = over(CASES), over(CLOSED), over(SAMPLED)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def vectors(case: Case, *leading: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    shape = (*leading, *case.output.shape)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def dense(product: Callable[[Tensor], Tensor], case: Case) -> Tensor:
    """Build the matrix of a product from its columns."""
    size = case.output.numel()
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *case.output.shape)
    return product(eye).reshape(size, size).T


# ------------------------------------------------------------------ laws


def test_known_losses_are_recognised():
    for name, case in CASES.items():
        assert type(case.loss()) is KINDS[name.split("-")[0]], name


@each
def test_which_losses_have_no_second_derivative(case):
    flat = case in FLAT.values()
    assert (case.loss_function().smooth_alternative is not None) == flat
    if flat:
        assert not case.hessian().any()
        with pytest.raises(NotImplementedError, match=r"piecewise linear.*zero.*Use "):
            case.loss().sample_gradients(1, torch.Generator())


@each
@each_reduction
def test_value_is_the_sum(case, reduction):
    value = case.loss(reduction).value()
    assert value.shape == ()
    assert_close(value, case.torch(case.output, "sum"), size=case.output.numel())


@each
def test_count_is_what_the_mean_divides_by(case):
    loss = case.loss()
    if not loss.count:
        assert torch.isnan(case.torch(case.output, "mean"))
        assert loss.value() == 0
    else:
        mean = loss.value() / loss.count
        assert_close(mean, case.torch(case.output, "mean"), size=case.output.numel())


@each
def test_rows_and_class_axis(case):
    loss = case.loss()
    assert loss.row_shape == case.rows
    assert loss.num_rows == prod(case.rows)
    assert loss.class_axis == case.class_axis


@each
@each_reduction
def test_gradient(case, reduction):
    output = case.output.clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.torch(output, "sum"), output)
    loss = case.loss_function(reduction)(output, case.target)
    with torch.no_grad():
        gradient = loss.gradient()
    assert not gradient.requires_grad
    assert_close(gradient, expected, size=case.output.numel())


@each
def test_value_is_differentiable_through_the_output(case):
    inputs = case.output.clone().requires_grad_()
    loss = case.loss_function()(inputs.sigmoid(), case.target)
    (gradient,) = torch.autograd.grad(loss.value(), inputs)
    s = case.output.sigmoid()
    expected = loss.gradient() * s * (1 - s)
    assert_close(gradient, expected, size=case.output.numel())


@each
@each_reduction
def test_hessian(case, reduction):
    with torch.no_grad():
        H = dense(case.loss(reduction).hessian_mul, case)
    assert not H.requires_grad
    assert_close(H, case.hessian(), size=case.output.numel())


@each_sampled
def test_trace_of_the_hessian(case):
    trace = case.loss().hessian_trace()
    assert_close(trace, case.hessian().trace(), size=case.output.numel())


@over({name: case for name, case in CASES.items() if case.loss().opaque})
def test_trace_that_is_not_known(case):
    assert case.loss().hessian_trace() is None


def test_trace_of_the_hessian_where_classes_are_certain():
    logits = torch.tensor([[0.0, -20.0, -25.0]])
    loss = CrossEntropy(logits, torch.tensor([0]))
    p = logits.double().softmax(1)
    expected = (p * (1 - p)).sum()  # 4e-9, below what float32 resolves of the sum
    assert float(loss.hessian_trace()) == pytest.approx(float(expected) / 2, rel=0.1)


@each
def test_hessian_of_an_output_with_a_graph(case):
    output = case.output.clone().requires_grad_() * 1
    H = dense(case.loss_function()(output, case.target).hessian_mul, case)
    assert not H.requires_grad
    assert_close(H, case.hessian(), size=case.output.numel())


@each
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_leading_axes(case, leading):
    loss, U = case.loss(), vectors(case, *leading)
    G = loss.gradient()
    products = [loss.hessian_mul, partial(loss.outer_mul, G)]
    if not loss.opaque:
        products += [loss.factor_mul, loss.factor_transpose_mul]
    for product in products:
        before = U.clone()
        actual = product(U)
        assert torch.equal(U, before)
        assert actual.dtype == U.dtype
        singles = [product(u) for u in U.reshape(prod(leading), *case.output.shape)]
        expected = torch.stack(singles) if singles else U
        assert_close(actual, expected.reshape(U.shape), size=case.output.numel())


@each_closed
def test_factor(case):
    loss = case.loss()
    R, RT = dense(loss.factor_mul, case), dense(loss.factor_transpose_mul, case)
    assert_close(RT, R.T)
    assert_close(R @ RT, case.hessian())
    rows = case.row_of_entry()
    assert not R[rows[:, None] != rows].any()


@each
def test_outer_mul(case):
    loss, G = case.loss(), vectors(case)
    g, rows = G.flatten(), case.row_of_entry()
    expected = torch.outer(g, g) * (rows[:, None] == rows)
    assert_close(dense(partial(loss.outer_mul, G), case), expected)


@over({name: case for name, case in SAMPLED.items() if not case.extreme})
def test_sampled_gradients_have_the_right_moments(case):
    """Also across rows, where moments of independent gradients vanish."""
    # flatter distributions, where no event is too rare to estimate a deviation from
    case = Case(**{**vars(case), "output": case.output / 4})
    n = 20_000
    rng = torch.Generator().manual_seed(2)
    samples = case.loss().sample_gradients(n, rng)
    assert samples.shape == (n, *case.output.shape)
    assert samples.dtype == case.output.dtype
    g = samples.reshape(n, -1)

    def assert_mean(values, expected):
        deviation = (values.mean(0) - expected).abs()
        rounding = 1e-12 * (1 + expected.abs())
        assert (deviation <= 5 * values.std(0) / n**0.5 + rounding).all()

    H, zero = case.hessian(), torch.zeros(())
    assert_mean(g, zero)
    assert_mean(g[:, :, None] * g[:, None, :], H)
    assert_mean(g[1:, :, None] * g[:-1, None, :], zero)
    # squares of independent variables are uncorrelated, too
    rows, squares = case.row_of_entry(), g.square() - H.diag()
    products = squares[:, :, None] * squares[:, None, :]
    assert_mean(products * (rows[:, None] != rows), zero)


@each_sampled
def test_samples_are_reproducible(case):
    def sample(num_samples, seed):
        rng = torch.Generator().manual_seed(seed)
        return case.loss().sample_gradients(num_samples, rng)

    assert torch.equal(sample(3, 0), sample(3, 0))
    assert sample(0, 0).shape == (0, *case.output.shape)


@each
def test_a_loss_function_pickles(case):
    again = pickle.loads(pickle.dumps(case.loss_function()))(case.output, case.target)
    assert torch.equal(again.value(), case.loss().value())
    U = vectors(case, 2)
    assert torch.equal(again.hessian_mul(U), case.loss().hessian_mul(U))


@over(HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(case, dtype):
    rounded = Case(**{**vars(case), "output": case.output.to(dtype)})
    reference = Case(**{**vars(case), "output": rounded.output.double()})
    U = vectors(case, 2).to(dtype)
    size = case.output.numel()
    low, high = rounded.loss(), reference.loss()
    assert low.value().dtype == torch.float32
    assert_close(low.value(), high.value(), torch.float32, size)
    assert low.gradient().dtype == dtype
    assert_close(low.gradient(), high.gradient(), size=size)
    for name in ["hessian_mul", "factor_mul", "factor_transpose_mul"]:
        product = getattr(low, name)(U)
        assert product.dtype == dtype
        assert_close(product, getattr(high, name)(U.double()), size=size)
    if case in SAMPLED.values():
        assert low.sample_gradients(2, torch.Generator()).dtype == dtype


def test_half_precision_sums_do_not_overflow():
    output = torch.full((1000,), 100.0, dtype=torch.float16)
    assert MSE(output, torch.zeros(1000)).value() == 1e7


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_closed
def test_cuda_agrees_with_the_cpu(case):
    """With targets, and weights in the options, that are still on the CPU."""
    cuda = Case(**{**vars(case), "output": case.output.cuda()}).loss()
    cpu, U, size = case.loss(), vectors(case, 2), case.output.numel()
    assert_close(cuda.value(), cpu.value(), size=size)
    assert float(cuda.count) == pytest.approx(float(cpu.count))
    for name in ["hessian_mul", "factor_mul", "factor_transpose_mul"]:
        assert_close(getattr(cuda, name)(U.cuda()), getattr(cpu, name)(U), size=size)
    if case in FLAT.values():
        return
    samples = [
        loss.sample_gradients(50, torch.Generator().manual_seed(0))
        for loss in (cuda, cpu)
    ]
    assert samples[0].is_cuda
    assert_close(*samples, size=size)


# ------------------------------------------------------------------ in operators


def problem_of(case: Case, reduction: str, sizes: list[int]) -> tuple:
    """Return a model whose parameters are the outputs of the data, one by one."""
    rows = torch.arange(len(case.output)).split(sizes)
    data = [(i, case.target[i]) for i in rows]
    params = {"f": case.output.clone()}
    return lambda p, i: p["f"][i], case.bound(reduction), params, data


def splits(case: Case) -> list[list[int]]:
    """Return sizes of batches; of one only, if options have values for every datum."""
    N = len(case.output)
    tensors = [t for t in case.options.values() if isinstance(t, Tensor)]
    if any(t.ndim == case.output.ndim > 1 for t in tensors):
        return [[N]]
    return [[N], [1] * N, [1, N - 1]]


@over({name: case for name, case in CLOSED.items() if case.rows})
@each_reduction
def test_matrices_of_all_data(case, reduction):
    """All data count alike, however they are split."""
    f, P = case.output.clone(), case.output.numel()
    summed, meant = (case.torch(f.requires_grad_(), r) for r in ("sum", reduction))
    if meant.isnan():
        return  # nothing counts
    (g,) = torch.autograd.grad(summed, f)
    share = case.loss().count if reduction == "mean" else 1
    assert_close(meant * share, summed, size=P)  # c = 1 / share
    rows = case.row_of_entry()
    G = g.flatten() * (rows == torch.arange(rows.max() + 1)[:, None])
    for sizes in splits(case):
        built = problem_of(case, reduction, sizes)
        risk = EmpiricalRisk(*built)
        (gradient,), value = risk.gradient_and_loss()
        assert_close(value, meant, size=P)
        assert_close(gradient * share, g, size=P)
        assert_close(EFLinearOperator(risk).to_dense() * share, G.T @ G, size=P)
        H = HessianLinearOperator(risk).to_dense()
        assert_close(H * share, case.hessian(), size=P)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The loss is piecewise linear")
            A = GGNLinearOperator(risk)
        assert_close(A.to_dense() * share, case.hessian(), size=P)


# ------------------------------------------------------------------ the front door

W = torch.tensor([0.5, 2.0, 1.0])
PROBABILITIES = nn.BCELoss, nn.PoissonNLLLoss


@each_reduction
@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (nn.MSELoss, F.mse_loss, {}),
        (nn.HuberLoss, F.huber_loss, {}),
        (nn.HuberLoss, F.huber_loss, {"delta": 0.3}),
        (nn.SmoothL1Loss, F.smooth_l1_loss, {}),
        (nn.SmoothL1Loss, F.smooth_l1_loss, {"beta": 0.3}),
        (nn.L1Loss, F.l1_loss, {}),
        (nn.PoissonNLLLoss, F.poisson_nll_loss, {}),
        (nn.PoissonNLLLoss, F.poisson_nll_loss, {"full": True}),
        (nn.PoissonNLLLoss, F.poisson_nll_loss, {"log_input": False, "eps": 0.1}),
        (nn.BCELoss, F.binary_cross_entropy, {}),
        (nn.BCELoss, F.binary_cross_entropy, {"weight": W}),
        (nn.SoftMarginLoss, F.soft_margin_loss, {}),
        (nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, {}),
        (nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, {"weight": W}),
        (nn.HingeEmbeddingLoss, F.hinge_embedding_loss, {}),
        (nn.HingeEmbeddingLoss, F.hinge_embedding_loss, {"margin": 0.3}),
        (nn.KLDivLoss, F.kl_div, {}),
        (nn.KLDivLoss, F.kl_div, {"log_target": True}),
        (nn.NLLLoss, F.nll_loss, {}),
        (nn.NLLLoss, F.nll_loss, {"weight": W, "ignore_index": 1}),
        (nn.BCEWithLogitsLoss, bce_with_logits, {}),
        (nn.BCEWithLogitsLoss, bce_with_logits, {"weight": W, "pos_weight": 2 * W}),
        (nn.CrossEntropyLoss, F.cross_entropy, {}),
        (nn.CrossEntropyLoss, F.cross_entropy, {"weight": W, "label_smoothing": 0.2}),
        (nn.CrossEntropyLoss, F.cross_entropy, {"ignore_index": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_modules_and_partials_agree(module, function, options, reduction):
    output = torch.linspace(-2, 3, 12).reshape(4, 3)
    output = output.sigmoid() if module in PROBABILITIES else output
    output = output.log_softmax(1) if module in (nn.NLLLoss, nn.KLDivLoss) else output
    indices = module in (nn.CrossEntropyLoss, nn.NLLLoss)
    target = torch.tensor([0, 1, 2, 1]) if indices else output.sigmoid().square()
    instance = module(reduction=reduction, **options)
    state = {name: tensor.clone() for name, tensor in instance.state_dict().items()}
    forms = [instance, partial(function, reduction=reduction, **options)]
    forms.append(partial(partial(function, **options), reduction=reduction))
    forms.append(partial(instance))
    if not options and reduction == "mean":
        forms.append(function)
    for form in forms:
        loss_function = as_loss_function(form)
        assert loss_function.reduction == reduction
        assert not loss_function.loss.opaque
        assert as_loss_function(loss_function) is loss_function
        loss = loss_function(output, target)
        expected = instance(output, target)
        actual = loss.value() / (loss.count if reduction == "mean" else 1)
        assert_close(actual, expected, size=12)
    assert all(torch.equal(state[n], t) for n, t in instance.state_dict().items())


def test_legacy_reductions_of_modules():
    with pytest.warns(UserWarning, match="size_average"):
        module = nn.MSELoss(size_average=False)
    assert as_loss_function(module).reduction == "sum"


def test_subclasses_are_opaque():
    class Doubled(nn.MSELoss):
        def forward(self, output, target):
            return 2 * super().forward(output, target)

    loss_function = as_loss_function(Doubled(reduction="sum"))
    assert loss_function.reduction == "sum"
    output = torch.ones(2, 2)
    assert loss_function(output, 0 * output).value() == 8


class Reduced(nn.HuberLoss):
    """Nobody knows what a subclass computes."""

    def __init__(self, reduction):
        super().__init__(reduction=reduction)


@pytest.mark.parametrize(
    ("loss_func", "reduction"),
    [
        (Reduced("mean"), "mean"),
        (Reduced("sum"), "sum"),
        (Hidden(F.huber_loss), "mean"),
        (partial(Hidden(F.huber_loss), reduction="sum"), "sum"),
        (partial(Reduced("sum")), "sum"),
        (lambda output, target: output.mean(), "mean"),
    ],
)
def test_reduction_of_other_callables(loss_func, reduction):
    loss_function = as_loss_function(loss_func)
    assert loss_function.loss is Generic
    assert loss_function.reduction == reduction


def test_unhashable_callable():
    @dataclass
    class Scaled:
        scale: float

        def __call__(self, output, target):
            return self.scale * (output - target).square().mean()

    output = torch.ones(3)
    loss = as_loss_function(Scaled(2.0))(output, 0 * output)
    assert loss.value() == 6
    assert torch.equal(loss.hessian_mul(output), 4 * output)


def test_number_of_terms():
    output, target = torch.ones(4, 3), torch.zeros(4, 3)
    unknown = Hidden(F.huber_loss)
    loss_function = as_loss_function(unknown)
    assert loss_function(output, target).count == 4
    assert loss_function(output, target, num_terms=7).count == 7
    assert loss_function(output[0, 0], target[0, 0]).count == 1
    counted = as_loss_function(unknown, lambda o, t: (t == 0).sum())
    assert counted(output, target, num_terms=7).count == 12
    assert as_loss_function(F.mse_loss)(output, target, num_terms=7).count == 12


def test_no_terms():
    """Where torch's mean is NaN, the sum is zero."""
    output = torch.ones(0, 3)
    known = [f for f in _table._KNOWN if not isinstance(f, type)]
    by_class = (F.cross_entropy, F.nll_loss)
    entries = [f for f in known if f not in by_class]
    for loss_func in (Hidden(F.huber_loss), *entries):
        loss = as_loss_function(loss_func)(output, output)
        assert loss.count == loss.value() == 0
        assert loss.gradient().shape == loss.hessian_mul(output).shape == (0, 3)
    loss = CrossEntropy(output, torch.zeros(0, dtype=torch.int64))
    assert loss.count == loss.value() == 0
    assert loss.sample_gradients(2, torch.Generator()).shape == (2, 0, 3)

    def masked(output, target):
        return output[target].square().mean()

    output, nothing = torch.ones(4), torch.zeros(4, dtype=torch.bool)
    loss = as_loss_function(masked, lambda o, t: t.sum())(output, nothing)
    assert loss.value() == 0
    assert not loss.gradient().any()
    assert not loss.hessian_mul(output).any()


def test_sampler():
    def sampler(output, target, num_samples, generator):
        return torch.randn(num_samples, *output.shape, generator=generator).double()

    loss_function = as_loss_function(Hidden(F.huber_loss), sampler=sampler)
    loss = loss_function(torch.ones(4, 3), torch.zeros(4, 3))
    samples = loss.sample_gradients(5, torch.Generator())
    assert samples.shape == (5, 4, 3)
    assert samples.dtype == torch.float32


def test_targets_of_opaque_losses_are_passed_on():
    def first(output, target):
        return (output - target["y"]).square().sum() / 2

    loss = as_loss_function(first)(torch.ones(1, 3), {"y": 0.5})
    assert_close(loss.hessian_mul(torch.ones(2, 1, 3)), torch.ones(2, 1, 3))


def test_register(monkeypatch):
    monkeypatch.setattr(_table, "_KNOWN", dict(_table._KNOWN))

    class Scaled:
        reduction = "sum"
        weight = torch.tensor(3.0)

        def __call__(self, output, target):
            return 3 * F.mse_loss(output, target, reduction="sum")

    assert as_loss_function(Scaled()).loss is Generic
    register(Scaled, MSE)
    loss_function = as_loss_function(Scaled())
    assert (loss_function.loss, loss_function.reduction) == (MSE, "sum")
    assert loss_function(torch.ones(2), torch.zeros(2)).value() == 6


class MyDivergence(nn.KLDivLoss):
    """Nobody knows what a subclass computes."""


class LogCosh(Elementwise):
    """Two hooks are all that a sum over entries needs."""

    def _evaluate(self, output):
        return (output - self.target).cosh().log().sum()

    def _second_derivative(self):
        return (self._prediction - self.target).cosh() ** -2


def log_cosh(output, target, reduction="mean"):
    values = (output - target).cosh().log()
    return values.mean() if reduction == "mean" else values.sum()


def test_a_sum_over_entries_needs_two_hooks(monkeypatch):
    monkeypatch.setattr(_table, "_KNOWN", {**_table._KNOWN, log_cosh: LogCosh})
    f, y = torch.randn(2, 4, 3, dtype=torch.float64)
    case = Case(log_cosh, f, y, {}, (4,), -1)
    loss = case.loss()
    assert type(loss) is LogCosh
    assert loss.count == 12
    assert_close(dense(loss.hessian_mul, case), case.hessian(), size=12)
    R = dense(loss.factor_mul, case)
    assert_close(R @ R.T, case.hessian(), size=12)
    samples = loss.sample_gradients(5, torch.Generator().manual_seed(0))
    assert_close(samples.square(), case.hessian().diag().view(4, 3).expand(5, 4, 3))


# ------------------------------------------------------------------ rounding


def test_sure_and_wrong_scores_do_not_overflow():
    """Where torch's loss is infinite and its derivatives are NaN."""
    f, y = torch.tensor([-1000.0, 1000.0, -1000.0]), torch.tensor([1.0, 1.0, -1.0])
    loss = as_loss_function(F.soft_margin_loss)(f, y)
    assert loss.value() == 1000
    assert torch.equal(loss.gradient(), torch.tensor([-1.0, 0.0, 0.0]))
    leaf = f.clone().requires_grad_()
    value = as_loss_function(F.soft_margin_loss)(leaf, y).value()
    (g,) = torch.autograd.grad(value, leaf, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), leaf)
    assert not h.any()
    assert not loss.hessian_mul(torch.ones(3)).any()


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_curvature_of_probabilities_near_their_targets(distance):
    """Torch's own formula cancels: it is off by a factor, in single precision."""
    f = torch.tensor([distance, 1 - distance])
    y, u = torch.tensor([0.0, 1.0]), torch.ones(2)
    exact = 1 / torch.stack([1 - f[0].double(), f[1].double()]).square()
    h = as_loss_function(F.binary_cross_entropy)(f, y).hessian_mul(u)
    assert_close(h, exact)


@pytest.mark.parametrize(
    ("loss_func", "kind"),
    [
        (nn.KLDivLoss(reduction="batchmean"), KLDiv),
        (partial(F.kl_div, reduction="batchmean"), KLDiv),
        (MyDivergence(reduction="batchmean"), Generic),
    ],
)
def test_batchmean_is_a_mean_over_the_first_axis(loss_func, kind):
    """Also if batches have several, and different numbers of, rows per datum."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(-1), nn.Flatten(0, -2)).double()
    data = []
    for size, length in ((3, 2), (2, 4), (1, 1)):
        X = torch.randn(size, length, 3, dtype=torch.float64)
        data.append((X, torch.rand(size * length, 4, dtype=torch.float64).softmax(1)))
    params = dict(net.named_parameters())
    loss_function = as_loss_function(loss_func)
    assert (loss_function.loss, loss_function.reduction) == (kind, "mean")
    risk = EmpiricalRisk(net, loss_func, params, data)
    gradient, value = risk.gradient_and_loss()
    f, y = (torch.cat(t) for t in zip(*((net(X), y) for X, y in data), strict=True))
    expected = F.kl_div(f, y, reduction="batchmean")
    assert_close(value, expected)
    grads = torch.autograd.grad(expected, list(params.values()))
    for actual, g in zip(gradient, grads, strict=True):
        assert_close(actual, g, size=100)
    cure = "pass sampler" if kind is Generic else "CrossEntropyLoss"
    with pytest.raises(NotImplementedError, match=cure):
        loss_function(f, y).sample_gradients(1, torch.Generator())


# ------------------------------------------------------------------ errors

X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])
D = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("loss_func", "error", "message"),
    [
        (3, TypeError, "3 is not callable"),
        (nn.MSELoss, TypeError, r"a class: pass an instance such as nn\.MSELoss\(\)"),
        (partial(nn.MSELoss, reduction="sum"), TypeError, "is a class"),
        (nn.MSELoss(reduction="none"), ValueError, "reduction='none'.*'mean' or 'sum'"),
        (nn.L1Loss(reduction="none"), ValueError, "reduction='none'"),
        (partial(F.l1_loss, reduction="none"), ValueError, "reduction='none'"),
        (
            partial(F.mse_loss, reduction="batchmean"),
            ValueError,
            "reduction='batchmean', so it combines terms in a way.*'mean' or 'sum'",
        ),
        (partial(F.mse_loss, size_average=False), ValueError, "legacy.*size_average"),
        (partial(F.huber_loss, reduce=True), ValueError, r"legacy.*\['reduce'\]"),
        (partial(F.mse_loss, X), ValueError, "bound to positional arguments"),
        (partial(F.mse_loss, target=X), ValueError, r"\['target'\].*weight, reduction"),
    ],
)
def test_refused_loss_functions(loss_func, error, message):
    with pytest.raises(error, match=message):
        as_loss_function(loss_func)


@pytest.mark.parametrize("name", ["num_terms_fn", "sampler"])
@pytest.mark.parametrize("loss_func", [nn.MSELoss(), LossFunction(MSE, "sum")])
def test_known_losses_take_no_helpers(name, loss_func):
    with pytest.raises(ValueError, match="brings its own: leave them out"):
        as_loss_function(loss_func, **{name: num_entries})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MSE([0.0], D), TypeError, "output is of type list"),
        (lambda: MSE(D.long(), D), TypeError, r"a torch\.int64 tensor.*floating-point"),
        (lambda: MSE(D, 1.0), TypeError, "target is of type float: pass a real tensor"),
        (lambda: MSE(D, D + 0j), TypeError, "target is a torch.complex64 tensor"),
        (lambda: MSE(D, D[:, :1]), ValueError, r"\(4, 1\).*\(4, 3\).*not broadcast"),
        (lambda: MSE(D[:, 0], D[:, :1]), ValueError, r"\(4, 1\).*squeeze"),
        (
            lambda: MSE(D, D, weight=D[0, :2]),
            ValueError,
            r"weight of shape \(2,\) does",
        ),
        (lambda: MSE(D[0], D[0], weight=D), ValueError, r"\(4, 3\) does not broadcast"),
        (lambda: BCEWithLogits(D, D[0]), ValueError, r"target has shape \(3,\)"),
        (
            lambda: BCEWithLogits(D, D, pos_weight=D[:, 0]),
            ValueError,
            r"pos_weight of shape \(4,\) does not broadcast.*\(4, 3\)",
        ),
        (lambda: CrossEntropy(D[0, 0], Y[0]), ValueError, "0-d: return one logit per"),
        (lambda: CrossEntropy(X, Y.tolist()), TypeError, "target is of type list"),
        (
            lambda: CrossEntropy(X, Y + 1),
            ValueError,
            r"contains 3, .* in 0\.\.2 nor.*-100",
        ),
        (
            lambda: CrossEntropy(X, Y - 1),
            ValueError,
            r"contains -1, .*check the labels",
        ),
        (lambda: CrossEntropy(X, Y.float()), ValueError, r"a torch\.float32 tensor of"),
        (lambda: CrossEntropy(X, Y > 1), ValueError, r"a torch\.bool tensor.*integers"),
        (
            lambda: CrossEntropy(X, X.long()),
            ValueError,
            r"int64 tensor of shape \(4, 3\)",
        ),
        (lambda: CrossEntropy(X, Y[:3]), ValueError, r"\(3,\).*indices.*shape \(4,\)"),
        (lambda: CrossEntropy(X[None], Y[None]), ValueError, "4 classes on axis 1"),
        (lambda: CrossEntropy(X, Y, weight=W[:2]), ValueError, r"\(2,\).*3 classes"),
        (
            lambda: CrossEntropy(X, Y, label_smoothing=1.2),
            ValueError,
            r"1\.2 must be in",
        ),
        (
            lambda: CrossEntropy(X, D, ignore_index=0),
            ValueError,
            "ignore_index=0 has no",
        ),
        (lambda: LossFunction(MSE, "none"), ValueError, "reduction='none'"),
        (
            lambda: Generic(X, Y, function=F.l1_loss, reduction="none", num_terms=1),
            ValueError,
            "reduction='none'",
        ),
    ],
)
def test_refused_arguments(build, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        build()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda o, t: (o - t).square(), r"a torch\.float32 tensor of shape \(4, 3\)"),
        (lambda o, t: (o - t).sum().reshape(1), r"tensor of shape \(1,\), not a 0-d"),
        (lambda o, t: (o - t).sum().item(), r"of type float.*\.mean\(\)"),
    ],
)
def test_refused_results(function, message):
    with pytest.raises(ValueError, match=message):
        as_loss_function(function)(X, D).value()


def test_refused_detached_losses():
    loss = as_loss_function(lambda o, t: (o.detach() - t).square().sum())(X, D)
    for call in (loss.gradient, partial(loss.hessian_mul, D)):
        with pytest.raises(ValueError, match="does not depend on the model's output"):
            call()


@pytest.mark.parametrize("shape", [(4,), (3, 4), (4, 3, 2), ()])
def test_refused_vectors(shape):
    loss, U = MSE(X, D), torch.zeros(shape)
    methods = [loss.hessian_mul, loss.factor_mul, loss.factor_transpose_mul]
    for product in [*methods, partial(loss.outer_mul, D)]:
        with pytest.raises(
            ValueError, match=r"must end in the output's shape \(4, 3\)"
        ):
            product(U)


@pytest.mark.parametrize(
    "loss",
    [
        MSE(X, D, weight=torch.tensor(-1.0)),
        BCEWithLogits(X, D, weight=-W),
        BCEWithLogits(X, D + 2, pos_weight=torch.tensor([0.1])),
        CrossEntropy(X, Y, weight=-W),
    ],
)
def test_refused_factors(loss):
    rng = torch.Generator()
    calls = [partial(loss.factor_mul, D), partial(loss.factor_transpose_mul, D)]
    for call in [*calls, partial(loss.sample_gradients, 1, rng)]:
        with pytest.raises(ValueError, match=r"negative curvature.*weights >= 0"):
            call()
    assert loss.hessian_mul(D).isfinite().all()


def test_what_opaque_losses_cannot_do():
    unknown = Hidden(F.huber_loss)
    loss = as_loss_function(unknown)(X, D)
    for product in (loss.factor_mul, loss.factor_transpose_mul):
        with pytest.raises(
            NotImplementedError, match="no known factor: use hessian_mul"
        ):
            product(D)
    with pytest.raises(NotImplementedError, match=r"unknown: pass sampler\(output"):
        loss.sample_gradients(1, torch.Generator())

    wrong = as_loss_function(unknown, sampler=lambda o, t, n, g: o)(X, D)
    with pytest.raises(
        ValueError, match=r"sampler returned shape \(1, 3\).*\(2, 1, 3\)"
    ):
        wrong.sample_gradients(2, torch.Generator())


# -- negative log-likelihood --------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_negative_log_likelihood_counts_like_torch(weighted):
    torch.manual_seed(0)
    output = torch.randn(5, 3, 2, dtype=torch.float64).log_softmax(1).requires_grad_()
    target = torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2], [-100, 0]])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) if weighted else None
    loss = as_loss_function(nn.NLLLoss(weight=weight))(output, target)
    mean = F.nll_loss(output, target, weight=weight)
    assert_close(loss.value() / loss.count, mean, size=10)
    (expected,) = torch.autograd.grad(mean, output)
    assert_close(loss.gradient() / loss.count, expected, size=10)
    assert not loss.hessian_mul(torch.ones_like(output)).any()
    assert loss.class_axis == -2
    with pytest.raises(NotImplementedError, match="CrossEntropyLoss"):
        loss.sample_gradients(1, torch.Generator())


def test_negative_log_likelihood_takes_class_indices():
    with pytest.raises(ValueError, match="class indices"):
        as_loss_function(F.nll_loss)(torch.zeros(2, 3), torch.zeros(2, 3))


def own_loss(f, y):
    return (f - y).abs().mean()


WEIGHT = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "same", "others"),
    [
        (
            nn.CrossEntropyLoss(),
            F.cross_entropy,
            [
                nn.CrossEntropyLoss(reduction="sum"),
                nn.CrossEntropyLoss(label_smoothing=0.1),
                nn.CrossEntropyLoss(ignore_index=0),
                nn.CrossEntropyLoss(WEIGHT),
                nn.CrossEntropyLoss(WEIGHT + 1),
                nn.MSELoss(),
            ],
        ),
        (nn.CrossEntropyLoss(WEIGHT), partial(F.cross_entropy, weight=WEIGHT), []),
        (
            own_loss,
            own_loss,
            [nn.L1Loss(), partial(own_loss, y=WEIGHT), lambda f, y: 0],
        ),
        (nn.HuberLoss(delta=2.0), partial(F.huber_loss, delta=2.0), [nn.HuberLoss()]),
    ],
)
def test_titles_tell_losses_apart(loss, same, others):
    title = as_loss_function(loss).title
    assert title == as_loss_function(same).title
    assert " at 0x" not in title
    titles = [title, *(as_loss_function(other).title for other in others)]
    assert len(set(titles)) == len(titles)


def test_titles_are_the_same_in_other_processes():
    """No address and no salted hash is part of them."""
    digest = sha256(struct.pack("<2d", 1, 2)).hexdigest()
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]), label_smoothing=0.1)
    assert as_loss_function(loss).title == (
        "CrossEntropy(ignore_index=-100, label_smoothing=0.1, reduction=mean, "
        f"weight=tensor[2]:{digest[:16]})"
    )
