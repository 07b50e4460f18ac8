"""Algebra, factors, files and errors of the Kronecker-factored operators."""

import copy
import io
import pickle
from inspect import signature

import numpy as np
import pytest
import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from test_geometry import block_of
from torch import nn
from torch.nn import functional as F

import curvlinops
import references
from cases import Lambda, find, mlp, split
from curvlinops import (
    EKFACLinearOperator,
    FisherType,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
    KFOCLinearOperator,
    kfac_utils,
)
from curvlinops.kfac import load
from tolerances import assert_close

FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator
EXACT = {"fisher_type": "type-2", "check_deterministic": False}


def eye(size):
    return torch.eye(size, dtype=torch.float64)


@pytest.fixture(params=FAMILY, ids=lambda cls: cls.__name__)
def A(request):
    return request.param(*find("mlp-tanh-mse").build(), **EXACT)


@pytest.fixture
def K():
    problem = find("mlp-tanh-ce").build()
    return KFACLinearOperator(*problem, separate_weight_and_bias=False, **EXACT)


def test_bases():
    for cls in FAMILY:
        assert LinearOperator in cls.__bases__
        assert not any(issubclass(cls, other) for other in FAMILY if other is not cls)


def test_public_names():
    assert kfac_utils.FisherType is FisherType
    assert kfac_utils.KFACType is KFACType
    assert FisherType.TYPE2 == "type-2"
    assert KFACType.REDUCE == "reduce"


def test_scalars(A):
    dense = A.to_dense()
    assert_close(A.trace(), dense.trace(), size=1000)
    assert_close(A.frobenius_norm(), dense.norm(), size=1000)
    assert_close(A.diagonal(), dense.diagonal(), size=1000)
    assert_close(A.eigenvalues(), torch.linalg.eigvalsh(dense), size=1000)
    regular = A.inverse(0.5)
    dense = regular.to_dense()
    assert_close(regular.logdet(), dense.logdet(), size=1000)
    assert_close(regular.det(), dense.det(), size=100_000)


def test_products(A):
    dense, x = A.to_dense(), torch.rand(A.shape[1]).double()
    assert_close(A @ x, dense @ x)
    assert_close(A @ x.numpy(), dense @ x)
    assert_close(A @ torch.stack([x, -x], 1), dense @ torch.stack([x, -x], 1))
    parts = A @ A._in_space.unpack(x)
    assert [p.shape for p in parts] == list(A.in_shapes)
    assert_close(torch.cat([p.flatten() for p in parts]), dense @ x)
    assert A.adjoint() is A


def test_exact_damping_and_powers(A):
    N = A.shape[0]
    options = {} if isinstance(A, EKFACLinearOperator) else {"use_exact_damping": True}
    inverse = A.inverse(0.1, **options)
    assert_close(inverse.to_dense() @ (A.to_dense() + 0.1 * eye(N)), eye(N), size=1000)
    root = inverse**-0.5
    assert_close((root @ root @ inverse).to_dense(), eye(N), size=10_000)
    assert_close((A**2).to_dense(), A.to_dense() @ A.to_dense(), size=100)
    half = inverse**0.5
    assert_close((half @ half).to_dense(), inverse.to_dense(), size=10_000)


def test_factor_damping(K):
    inverse = K.inverse(0.1).to_dense()
    pair = K.inverse((0.2, 0.3)).to_dense()
    heuristic = K.inverse(0.1, use_heuristic_damping=True).to_dense()
    for layout in K.representation.layouts:
        layer = layout.names[0].partition(".")[0]
        A, B = K.factors()[layer]
        m, n = len(B), len(A)
        pi = ((A.trace() / n) / (B.trace() / m)).sqrt()
        root = 0.1**0.5
        for result, a, b in (
            (inverse, 0.1, 0.1),
            (pair, 0.2, 0.3),
            (heuristic, root * pi, root / pi),
        ):
            left, right = (
                torch.linalg.inv(F) for F in (B + b * eye(m), A + a * eye(n))
            )
            expected = torch.kron(left, right)
            # weight rows with the bias as last column, in the layout of parameters
            order = torch.arange(m * n).reshape(m, n)
            order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
            block = block_of(result, K._in_space, layout.names)
            assert_close(block, expected[order][:, order], size=10_000)


def test_layerwise_damping(K):
    weights = [n for n in K.risk.params if "weight" in n]
    dampings = {name: 0.1 * (i + 1) for i, name in enumerate(weights)}
    inverse = K.inverse(dampings)
    for name, damping in dampings.items():
        alone = K.inverse(damping).block_of(name)
        assert_close(inverse.block_of(name).to_dense(), alone.to_dense())
    with pytest.raises(ValueError, match=r"no entry for '2.weight'"):
        K.inverse({"0.weight": 0.1})
    with pytest.raises(ValueError, match="no parameters"):
        K.inverse({**dampings, "zero": 0.1})


def test_inverse_operator(K):
    inverse = KFACInverseLinearOperator(K, damping=0.1)
    x = np.ones(K.shape[1])
    assert_close(inverse @ x, K.inverse(0.1) @ x)
    assert inverse.representation is inverse.representation
    fresh = KFACInverseLinearOperator(K, damping=0.1, cache=False)
    assert fresh.representation is not fresh.representation
    before = inverse.representation
    K.compute_kronecker_factors()
    assert inverse.representation is not before
    with pytest.raises(TypeError, match="KFAC, EKFAC or KFOC"):
        KFACInverseLinearOperator(np.eye(3))


def test_singular_block_is_named(K):
    with pytest.raises(LinAlgError, match=r"block of '0.weight'.*larger `damping`"):
        K.inverse(-1.0)


def test_scipy(K):
    regular = K + 0.1 * curvlinops.IdentityLinearOperator(
        K.in_shapes, "cpu", torch.float64
    )
    b = np.ones(K.shape[1])
    M = K.inverse(0.1, use_exact_damping=True)
    steps = []
    x, info = cg(regular, b, M=M, rtol=1e-10, callback=lambda _: steps.append(1))
    assert info == 0
    assert len(steps) <= 2
    assert_close(regular @ x, b, size=10**8)
    top = eigsh(K, k=1, return_eigenvectors=False)[0]
    assert top == pytest.approx(float(K.eigenvalues()[-1]), rel=1e-10)


def test_factors_and_aliases(K):
    factors = K.factors()
    assert list(factors) == ["0", "2", "4"]
    assert factors["2"].input.shape == (6, 6)
    assert factors["2"].output.shape == (4, 4)
    assert K._mapping["2"] == {"weight": 2, "bias": 3}
    assert torch.equal(K._input_covariances["2"], factors["2"].input)
    assert torch.equal(K._gradient_covariances["2"], factors["2"].output)
    block = K.block_of("2.bias")
    assert_close(block.to_dense(), torch.kron(factors["2"].output, factors["2"].input))
    with pytest.raises(KeyError, match="No parameter 'two'"):
        K.block_of("two")


def test_names_of_layers():
    problem = find("multihead-attention").build()
    K = KFACLinearOperator(*problem, **EXACT)
    assert list(K.factors()) == ["inner.0", "inner.0.out_proj", "inner.1"]
    assert K._mapping["inner.0.out_proj"].keys() == {"weight", "bias"}
    data = find("mlp-tanh-mse").build()[3]

    def function(values, X):
        return (X @ values["A"]) @ values["B"]

    params = {"A": torch.rand(4, 2).double(), "B": torch.rand(2, 3).double()}
    K = KFACLinearOperator(function, nn.MSELoss(), params, data, **EXACT)
    assert list(K.factors()) == ["A", "B"]


def test_pickle_and_torch_save(A):
    dense = A.to_dense()
    assert torch.equal(pickle.loads(pickle.dumps(A)).to_dense(), dense)
    assert torch.equal(copy.deepcopy(A).to_dense(), dense)
    file = io.BytesIO()
    torch.save(A, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).to_dense(), dense)


def test_save_and_load(A, tmp_path):
    path = tmp_path / "factors.npz"
    A.save(path)
    dense = A.to_dense()
    alone = load(path)
    assert torch.equal(alone.to_dense(), dense)
    assert alone._in_space.names == A._in_space.names
    model, _, params, data = find("mlp-tanh-mse").build()
    fresh = type(A)(model, nn.MSELoss(), params, data, **EXACT)
    fresh.load(path)
    assert torch.equal(fresh.to_dense(), dense)
    assert list(fresh.factors()) == list(A.factors()) == ["0", "2", "4"]
    assert fresh._mapping == A._mapping
    for name, factors in A.factors().items():
        for mine, its in zip(factors, fresh.factors()[name], strict=True):
            assert torch.equal(mine, its)
    again = tmp_path / "again.npz"
    fresh.save(again)
    assert torch.equal(load(again).to_dense(), dense)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda"])
def test_load_to_a_device(A, tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    path = tmp_path / "factors.npz"
    A.save(path)
    loaded = load(path, device)
    kind = torch.device(device).type
    assert loaded.device.type == kind
    for block in loaded.blocks:
        tensors = [*getattr(block, "Q", block).factors]
        tensors += [getattr(block, "evals", tensors[0])]
        assert {t.device.type for t in tensors} == {kind}
    assert_close(loaded.to_dense().cpu(), A.to_dense())
    assert loaded.factors()["2.weight"].input.device.type == kind
    x = torch.ones(A.shape[1], dtype=torch.float64)
    assert_close(loaded @ x, A @ x)
    model, loss, _, data = find("mlp-tanh-mse").build()
    model, data = model.to(device), [(X.to(device), y.to(device)) for X, y in data]
    moved = type(A)(model, loss, list(model.parameters()), data, **EXACT)
    moved.load(path)
    assert moved.representation.device.type == kind
    assert_close(moved @ x, A @ x)


def test_factors_of_ekfac_are_kfacs():
    problem = find("conv2d").build()
    K, E = (cls(*problem, **EXACT) for cls in FAMILY[:2])
    assert list(E.factors()) == list(K.factors())
    for name, factors in K.factors().items():
        for mine, its in zip(factors, E.factors()[name], strict=True):
            assert_close(its, mine, size=100)
    with pytest.raises(ValueError, match="not known which factors"):
        E.inverse(0.1).frozen().blocks[0].factors_decomposed()


def test_heuristic_damping_of_a_lone_bias():
    """A block of one factor needs no heuristic: its damping is exact."""
    K = KFACLinearOperator(*find("mlp-tanh-ce").build(), **EXACT)
    inverse = K.inverse(0.1, use_heuristic_damping=True)
    B = K.factors()["2"].output
    expected = torch.linalg.inv(B + 0.1 * eye(len(B)))
    assert_close(inverse.block_of("2.bias").to_dense(), expected, size=1000)


def test_load_refuses_mismatches(A, tmp_path):
    path = tmp_path / "factors.npz"
    A.save(path)
    for name, what in (("mlp-no-bias", "names"), ("linear", "names")):
        other = type(A)(*find(name).build(), **EXACT)
        with pytest.raises(ValueError, match=f"with the {what}"):
            other.load(path)
    problem = find("mlp-tanh-mse").build()
    model, loss, params, data = references.convert(*problem, dtype=torch.float32)
    with pytest.raises(ValueError, match="with the dtype"):
        type(A)(model, loss, params, data, **EXACT).load(path)
    wider = mlp(4, 6, 4, 3)
    X, y = torch.rand(6, 4), torch.rand(6, 3)
    other = type(A)(wider, loss, list(wider.parameters()), split(X, y), **EXACT)
    with pytest.raises(ValueError, match="with the shapes"):
        other.load(path)
    for cls in FAMILY:
        if cls is not type(A):
            with pytest.raises(ValueError, match=f"class: '{type(A).__name__}' there"):
                cls(*problem, **EXACT).load(path)
    joint = type(A)(*problem, separate_weight_and_bias=False, **EXACT)
    with pytest.raises(ValueError, match="'joint' here"):
        joint.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fisher_type": "empirical"}, "fisher_type: 'mc' there, 'empirical' here"),
        ({"fisher_type": "type-2"}, r"mc_samples: 1 there, None here; seed: 5 there"),
        ({"mc_samples": 2}, "mc_samples: 1 there, 2 here"),
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"kfac_approx": "reduce"}, "kfac_approx: 'expand' there, 'reduce' here"),
        ({"max_factor": 3}, "max_factor: 8192 there, 3 here"),
        ({"unsupported": "diagonal"}, "unsupported: 'raise' there, 'diagonal' here"),
        ({"max_iter": 7}, "max_iter: 20 there, 7 here"),
        ({"tolerance": 1e-3}, "tolerance: 1e-06 there, 0.001 here"),
    ],
)
@pytest.mark.parametrize("cls", FAMILY)
def test_factors_of_another_matrix_are_refused(tmp_path, cls, change, said):
    problem, path = find("mlp-tanh-mse").build(), tmp_path / "factors.npz"
    if not change.keys() <= signature(cls).parameters.keys():
        pytest.skip("no setting of this class")
    settings = {"seed": 5, "check_deterministic": False}
    A = cls(*problem, **settings)
    A.save(path)
    with pytest.raises(ValueError, match=rf"factors.npz holds .* \(.*{said}.*\). Buil"):
        cls(*problem, **settings | change).load(path)
    same = cls(*problem, **settings)
    same.load(path)
    assert torch.equal(same.to_dense(), A.to_dense())


def test_factors_of_another_loss_are_refused(tmp_path):
    model, loss, params, data = find("mlp-tanh-mse").build()
    path = tmp_path / "factors.npz"
    A = KFACLinearOperator(model, loss, params, data, **EXACT)
    A.save(path)
    other = KFACLinearOperator(model, nn.MSELoss(reduction="sum"), params, data)
    with pytest.raises(ValueError, match=r"loss: 'MSE\(reduction=mean, .* there"):
        other.load(path)
    same = KFACLinearOperator(model, F.mse_loss, params, data, **EXACT)
    same.load(path)
    assert torch.equal(same.to_dense(), A.to_dense())


@pytest.mark.parametrize("frozen", [False, True])
def test_factors_of_other_parameters_are_warned_of(A, tmp_path, frozen):
    path, again = tmp_path / "factors.npz", tmp_path / "again.npz"
    kept = A.frozen() if frozen else A
    if not frozen:
        kept.save(path)
    dense = A.to_dense()
    with torch.no_grad():
        next(iter(A.risk.params.values())).mul_(1.5)
    if frozen:
        kept.save(path)  # the parameters are those of before
    for file in (path, again):
        with pytest.warns(UserWarning, match="with other values of the para.*refresh"):
            A.load(file)
        assert torch.equal(A.to_dense(), dense)
        A.save(again)  # which stay those of others
    A.refresh()
    assert not torch.allclose(A.to_dense(), dense)


# Parameters that have no factors


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("name", ["lstm", "callable", "parametrized"])
def test_unsupported(name, fisher_type):
    problem = find(name).build()
    with pytest.raises(ValueError, match=r"No Kronecker-factored form.*unsupported"):
        KFACLinearOperator(*problem, fisher_type="type-2").to_dense()
    options = {"fisher_type": fisher_type, "unsupported": "diagonal"}
    reference = {"type-2": references.ggn, "empirical": references.empirical_fisher}[
        fisher_type
    ](*problem)
    for cls in FAMILY:
        A = cls(*problem, **options)
        diagonal = A.to_dense()
        for layout, block in zip(
            A.representation.layouts, A.representation.blocks, strict=True
        ):
            if (
                len(getattr(block, "factors", (1, 2))) == 1
                and block.factors[0].ndim == 2
            ):
                F = block_of(reference, A._in_space, layout.names)
                mine = block_of(diagonal, A._in_space, layout.names)
                assert_close(mine, F.diagonal().diag(), size=1000)


def test_custom_function_is_seen():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W):
            ctx.save_for_backward(x, W)
            return x @ W

        @staticmethod
        def backward(ctx, g):
            x, W = ctx.saved_tensors
            return g @ W.T, x.T @ g

    model = Lambda(lambda s, X: Product.apply(X, s.W), W=torch.rand(3, 2)).double()
    X, y = torch.rand(6, 3).double(), torch.rand(6, 2).double()
    K = KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), split(X, y))
    with pytest.raises(ValueError, match="'W' in `ProductBackward`"):
        K.to_dense()


def test_nothing_of_the_users_is_changed():
    model, loss, params, data = find("attention-block").build()
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}

    class Interrupted(Exception):
        pass

    def interrupted(X):
        raise Interrupted

    broken = copy.deepcopy(model)
    broken.inner[1].forward = interrupted
    K = KFACLinearOperator(
        broken, loss, list(broken.parameters()), data, check_deterministic=False
    )
    with pytest.raises(Interrupted):
        K.to_dense()
    assert torch.overrides._len_torch_function_stack() == 0
    KFACLinearOperator(model, loss, params, data).to_dense()
    after = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    assert after == hooks
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_large_factors_keep_their_diagonal():
    problem = find("mlp-tanh-ce").build()
    whole = KFACLinearOperator(*problem, **EXACT)
    K = KFACLinearOperator(*problem, max_factor=4, **EXACT)
    with pytest.warns(UserWarning, match="only its diagonal is kept") as warned:
        factors = K.factors()
    assert "'0.weight' would have the shape (5, 5)" in str(warned[0].message)
    assert_close(factors["0"].output, whole.factors()["0"].output.diagonal())
    assert_close(factors["0"].input, whole.factors()["0"].input)
    inverse = K.inverse(0.1, use_exact_damping=True)
    N = K.shape[0]
    assert_close(inverse.to_dense() @ (K.to_dense() + 0.1 * eye(N)), eye(N), size=1000)


@pytest.mark.parametrize("name", ["mlp-float32", "mlp-bfloat16", "conv-float32"])
def test_low_precision(name):
    problem = find(name).build()
    expected = KFACLinearOperator(
        *references.convert(*problem, dtype=torch.float64), **EXACT
    ).to_dense()
    K = KFACLinearOperator(*problem, **EXACT)
    assert K.to_dense().dtype == next(iter(K.risk.params.values())).dtype
    assert_close(K.to_dense().double(), expected, dtype=K.torch_dtype, size=100)
    assert torch.isfinite(K.inverse(0.1).to_dense()).all()


def test_generic_loss():
    model, _, params, data = find("mlp-tanh-mse").build()
    known = KFACLinearOperator(model, nn.MSELoss(), params, data, **EXACT)

    def loss(prediction, y):
        return (prediction - y).square().mean()

    generic = KFACLinearOperator(model, loss, params, data, **EXACT)
    assert_close(generic.to_dense(), known.to_dense(), size=1000)

    def concave(prediction, y):
        return -(prediction - y).square().mean()

    with pytest.raises(ValueError, match="not convex"):
        KFACLinearOperator(model, concave, params, data, **EXACT).to_dense()

    def coupled(prediction, y):
        return (prediction - y).square().sum().square()

    with pytest.raises(ValueError, match="couples entries"):
        KFACLinearOperator(
            model, coupled, params, data, reduction="mean", **EXACT
        ).to_dense()

    def sampler(output, target, num_samples, generator):
        noise = torch.randn(
            (num_samples, *output.shape), generator=generator, dtype=output.dtype
        )
        return (2 / 3) ** 0.5 * noise

    options = {"sampler": sampler, "mc_samples": 4000, "check_deterministic": False}
    sampled = KFACLinearOperator(model, loss, params, data, **options).trace()
    assert float(sampled) == pytest.approx(float(known.trace()), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "exact"}, "`fisher_type` must be one of 'type-2'"),
        ({"kfac_approx": "mean"}, "`kfac_approx` must be one of"),
        ({"unsupported": "ignore"}, "`unsupported` must be one of"),
        ({"mc_samples": 0}, "`mc_samples` must be a positive"),
        ({"backend": "triton"}, "`backend` must be"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        KFACLinearOperator(*find("linear").build(), **options)


def test_seed():
    problem = find("mlp-tanh-ce").build()
    a, b, c = (KFACLinearOperator(*problem, seed=seed).to_dense() for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_scalars_of_an_inverse(A):
    inverse = KFACInverseLinearOperator(A, damping=0.1, use_exact_damping=True)
    dense = inverse.to_dense()
    assert_close(inverse.trace(), dense.trace())
    assert_close(inverse.logdet(), torch.logdet(dense), size=1000)
    assert_close(inverse.frobenius_norm(), dense.norm())
    assert_close(inverse.diagonal(), dense.diagonal(), size=100)
    assert_close(inverse.eigenvalues(), torch.linalg.eigvalsh(dense), size=100)
    assert_close((inverse**-1).to_dense(), torch.linalg.inv(dense), size=1000)
    name = next(iter(A.risk.params))
    block = inverse.block_of(name).to_dense()
    assert_close(block, dense[: len(block), : len(block)])
