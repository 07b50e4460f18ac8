"""The problems are what they claim to be, and the dense references agree on them."""

import pytest
import torch

import references
from cases import PROBLEMS, SIZES, Problem, find, problems, resplit
from curvlinops.examples.functorch import (
    functorch_empirical_fisher,
    functorch_ggn,
    functorch_gradient_and_loss,
    functorch_hessian,
    functorch_jacobian,
)
from tolerances import assert_close

ALL = problems()
TRANSFORMABLE = problems(without=["no-func"])


def test_names_are_unique():
    names = [problem.name for problem in PROBLEMS]
    assert len(set(names)) == len(names) >= 45


@pytest.mark.parametrize("problem", ALL)
def test_builds_the_same_without_a_trace(problem: Problem):
    state = torch.get_rng_state()
    _, _, params, data = problem.build()
    _, _, again, data_again = problem.build()
    batches, batches_again = list(data), list(data_again)
    assert torch.equal(state, torch.get_rng_state())
    values, values_again = (
        list(p.values()) if isinstance(p, dict) else p for p in (params, again)
    )
    assert all(map(torch.equal, values, values_again))
    assert sum(p.numel() for p in values) <= 250
    for (_, y), (_, y_again) in zip(batches, batches_again, strict=True):
        assert torch.equal(y, y_again)


@pytest.mark.parametrize("problem", ALL)
def test_loss_is_finite_and_dtype_as_tagged(problem: Problem):
    built = problem.build()
    assert references.loss(*built).isfinite()
    model, _, params, data = built
    values = list(params.values()) if isinstance(params, dict) else list(params)
    half, single = "half" in problem.tags, "float32" in problem.tags
    dtypes = (torch.float16, torch.bfloat16) if half else (torch.float64,)
    dtypes = (torch.float32,) if single else dtypes
    assert all(p.dtype in dtypes for p in values)
    if isinstance(model, torch.nn.Module):
        assert all(model(X).dtype in dtypes for X, _ in data)


@pytest.mark.parametrize("problem", TRANSFORMABLE)
def test_gradient_and_loss(problem: Problem):
    built = problem.build()
    gradient, loss = functorch_gradient_and_loss(*built)
    params = built[2]
    values = list(params.values()) if isinstance(params, dict) else list(params)
    assert [g.shape for g in gradient] == [p.shape for p in values]
    assert all(g.dtype == p.dtype for g, p in zip(gradient, values, strict=True))
    assert_close(loss, references.loss(*built))
    flat = torch.cat([g.flatten() for g in gradient])
    assert_close(flat, references.gradient(*built))


@pytest.mark.parametrize("problem", TRANSFORMABLE)
def test_hessian(problem: Problem):
    built = problem.build()
    assert_close(functorch_hessian(*built), references.hessian(*built))


@pytest.mark.parametrize("problem", TRANSFORMABLE)
def test_ggn(problem: Problem):
    built = problem.build()
    assert_close(functorch_ggn(*built), references.ggn(*built))


@pytest.mark.parametrize("problem", TRANSFORMABLE)
def test_empirical_fisher(problem: Problem):
    built = problem.build()
    actual = functorch_empirical_fisher(*built)
    assert_close(actual, references.empirical_fisher(*built))


@pytest.mark.parametrize("problem", TRANSFORMABLE)
def test_jacobian(problem: Problem):
    model, _, params, data = problem.build()
    actual = functorch_jacobian(model, params, data)
    assert_close(actual, references.jacobian(model, params, data))


@pytest.mark.parametrize("method", ["kfac", "ekfac", "kfoc"])
def test_kronecker_factored_reference_is_exact_for_one_linear_layer(method: str):
    built = find("linear").build()
    for fisher, dense in (
        ("type-2", references.ggn),
        ("empirical", references.empirical_fisher),
    ):
        actual = references.kronecker(*built, method=method, fisher=fisher, joint=True)
        same = (actual - dense(*built)).abs().max() < 1e-12
        assert same == (fisher == "type-2")


DIFFERENCED = (
    "mlp-tanh-ce",
    "mlp-perturbed-params",
    "checkpoint-perturbed",
    "custom-function",
    "in-place",
    "index-assignment",
    "lstm",
    "layer-norm",
    "group-norm",
    "attention-block",
    "multihead-attention-sdpa",
    "causal-lm-ragged",
    "encoding-input",
    "ce-soft-weights-smoothing",
    "ce-ignore-weights-smoothing",
    "bce-sum-weights",
    "generic-lambda",
)


@pytest.mark.parametrize("name", DIFFERENCED)
def test_hessian_against_central_differences(name: str):
    problem = find(name)
    built = problem.build()
    expected = references.central_differences_hessian(*built)
    options = {"exponent": 2 / 3}
    assert_close(references.hessian(*built), expected, **options)
    if "no-func" not in problem.tags:
        assert_close(functorch_hessian(*built), expected, **options)


def test_padding_of_an_embedding_counts_as_a_constant():
    """Torch gives it no gradient; the loss depends on its value all the same."""
    built = find("embedding-padding").build()
    H = functorch_hessian(*built)
    padding, rest = slice(0, 3), slice(3, None)  # the first row of the first parameter
    assert not H[padding].any() and not H[:, padding].any()
    expected = references.central_differences_hessian(*built)
    assert_close(H[rest, rest], expected[rest, rest], exponent=2 / 3)


@pytest.mark.parametrize("problem", problems("no-func"))
def test_refusal_is_loud(problem: Problem):
    with pytest.raises(RuntimeError, match=r"saved tensor hooks|setup_context"):
        functorch_hessian(*problem.build())


@pytest.mark.parametrize("sizes", [(1,) * sum(SIZES), (2, 4), (sum(SIZES),)])
@pytest.mark.parametrize("problem", problems("splittable"))
def test_gradient_is_invariant_to_the_split(problem: Problem, sizes: tuple[int, ...]):
    model, loss_func, params, data = problem.build()
    expected = references.gradient(model, loss_func, params, data)
    other = resplit(data, sizes)
    actual = references.gradient(model, loss_func, params, other)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["dict-input", "userdict-input", "encoding-input"])
def test_resplit_keeps_the_kind_of_mapping(name: str):
    _, _, _, data = find(name).build()
    (before, _), (after, _) = data[0], resplit(data, (2, 4))[1]
    assert type(before) is type(after) and set(before) == set(after)


def test_input_key_names_the_batch_size():
    model, loss_func, params, data = find("dict-input").build()
    data = [({"mask": torch.ones(7), **X}, y) for X, y in data]
    expected = functorch_hessian(*find("dict-input").build())
    actual = functorch_hessian(model, loss_func, params, data, input_key="x")
    assert_close(actual, expected)


def test_params_that_cannot_be_named_are_refused():
    model, loss_func, params, data = find("mlp-list-params").build()
    with pytest.raises(ValueError, match="not parameters of the module"):
        functorch_hessian(model, loss_func, [p.clone() for p in params], data)
    model, loss_func, params, data = find("callable").build()
    with pytest.raises(TypeError, match="dict from name to tensor"):
        functorch_hessian(model, loss_func, list(params.values()), data)
