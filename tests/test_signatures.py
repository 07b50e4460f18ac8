"""The public names that scripts import, with the arguments that they pass.

The table is a contract with scripts that were written for another package: names, order
and defaults stay as they are; more arguments may follow by keyword only.
"""

import inspect
from collections.abc import Callable
from importlib import import_module

import pytest

from curvlinops import FisherType, KFACType

SEED = 2147483647
EMPTY = inspect.Parameter.empty
MORE = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


# fmt: off
def _hessian(model_func, loss_func, params, data, progressbar=False,
             check_deterministic=True, num_data=None, num_per_example_loss_terms=None,
             batch_size_fn=None): ...


def _ggn(model_func, loss_func, params, data, progressbar=False,
         check_deterministic=True, num_data=None, batch_size_fn=None, mc_samples=0,
         seed=SEED): ...


def _fisher(model_func, loss_func, params, data, progressbar=False,
            check_deterministic=True, seed=SEED, mc_samples=1, num_data=None,
            batch_size_fn=None): ...


def _jacobian(model_func, params, data, progressbar=False, check_deterministic=True,
              num_data=None, batch_size_fn=None): ...


def _kfac(model_func, loss_func, params, data, progressbar=False,
          check_deterministic=True, seed=SEED, fisher_type=FisherType.MC, mc_samples=1,
          kfac_approx=KFACType.EXPAND, num_per_example_loss_terms=None,
          separate_weight_and_bias=True, num_data=None, batch_size_fn=None,
          backend="hooks"): ...


def _kfoc(model_func, loss_func, params, data, progressbar=False,
          check_deterministic=True, seed=SEED, fisher_type=FisherType.MC, mc_samples=1,
          separate_weight_and_bias=True, num_data=None, batch_size_fn=None): ...


def _kfac_inverse(A, damping=0.0, use_heuristic_damping=False, min_damping=1e-8,
                  use_exact_damping=False, cache=True, retry_double_precision=True): ...


def _inverse(self, damping=0.0, use_heuristic_damping=False, min_damping=1e-8,
             use_exact_damping=False, retry_double_precision=True): ...


def _damped(self, damping=0.0): ...


def _solver(A, **hyperparameters): ...


def _neumann(A, num_terms=100, scale=1.0, check_nan=True, preconditioner=None): ...


def _estimator(A, num_matvecs, distribution="rademacher"): ...


def _spectrum(A, ncv, num_points=1024, num_repeats=1, kappa=3.0, boundaries=None,
              margin=0.05, boundaries_tol=0.01): ...


def _log_spectrum(A, ncv, num_points=1024, num_repeats=1, kappa=1.04, boundaries=None,
                  margin=0.05, boundaries_tol=0.01, epsilon=1e-5): ...


def _cached(A, ncv, boundaries=None, boundaries_tol=0.01): ...


def _of_cached(self, num_repeats, num_points, kappa, margin): ...


def _log_of_cached(self, num_repeats, num_points, kappa, margin, epsilon): ...


def _gradient(model_func, loss_func, params, data, batch_size_fn=None,
              num_data=None): ...


def _functorch(model_func, loss_func, params, data, input_key=None): ...


def _functorch_jacobian(model_func, params, data, input_key=None): ...
# fmt: on


#: By path, a function with the arguments.
TABLE: dict[str, Callable] = {
    "HessianLinearOperator": _hessian,
    "EFLinearOperator": _hessian,
    "GGNLinearOperator": _ggn,
    "GGNDiagonalLinearOperator": _ggn,
    "GGNDiagonalLinearOperator.inverse": _damped,
    "FisherMCLinearOperator": _fisher,
    "JacobianLinearOperator": _jacobian,
    "TransposedJacobianLinearOperator": _jacobian,
    "KFACLinearOperator": _kfac,
    "KFACLinearOperator.inverse": _inverse,
    "EKFACLinearOperator": _kfac,
    "EKFACLinearOperator.inverse": _damped,
    "KFOCLinearOperator": _kfoc,
    "KFACInverseLinearOperator": _kfac_inverse,
    "CGInverseLinearOperator": _solver,
    "LSMRInverseLinearOperator": _solver,
    "NeumannInverseLinearOperator": _neumann,
    "SubmatrixLinearOperator": lambda A, row_idxs, col_idxs: ...,
    "SubmatrixLinearOperator.set_submatrix": lambda self, row_idxs, col_idxs: ...,
    "hutchinson_trace": _estimator,
    "hutchpp_trace": _estimator,
    "xtrace": _estimator,
    "hutchinson_diag": _estimator,
    "hutchinson_squared_fro": _estimator,
    "xdiag": lambda A, num_matvecs: ...,
    "lanczos_approximate_spectrum": _spectrum,
    "lanczos_approximate_log_spectrum": _log_spectrum,
    "LanczosApproximateSpectrumCached": _cached,
    "LanczosApproximateLogSpectrumCached": _cached,
    "LanczosApproximateSpectrumCached.approximate_spectrum": _of_cached,
    "LanczosApproximateLogSpectrumCached.approximate_log_spectrum": _log_of_cached,
    "diag:DiagonalLinearOperator": lambda diagonal: ...,
    "eigh:EighDecomposedLinearOperator": lambda evals, Q: ...,
    "kronecker:KroneckerProductLinearOperator": lambda *factors: ...,
    "blockdiagonal:BlockDiagonalLinearOperator": lambda blocks: ...,
    "submatrix:SubmatrixLinearOperator": lambda A, row_idxs, col_idxs: ...,
    "ekfac:EKFACLinearOperator": _kfac,
    "papyan2020traces.spectrum:lanczos_approximate_spectrum": _spectrum,
    "papyan2020traces.spectrum:lanczos_approximate_log_spectrum": _log_spectrum,
    "sampling:random_vector": lambda dim, distribution, device, dtype: ...,
    "utils:allclose_report": lambda a, b, rtol=1e-5, atol=1e-8: ...,
    "examples:gradient_and_loss": _gradient,
    "examples:IdentityLinearOperator": lambda shapes, device, dtype: ...,
    "examples:TensorLinearOperator": lambda A: ...,
    "examples:OuterProductLinearOperator": lambda c, A: ...,
    "examples.functorch:functorch_hessian": _functorch,
    "examples.functorch:functorch_ggn": _functorch,
    "examples.functorch:functorch_gradient_and_loss": _functorch,
    "examples.functorch:functorch_empirical_fisher": _functorch,
    "examples.functorch:functorch_jacobian": _functorch_jacobian,
}


def find(path):
    """Return what lies at ``module:name.attribute``, the module within the package."""
    module, _, names = path.rpartition(":")
    found = import_module(f"curvlinops.{module}" if module else "curvlinops")
    for name in names.split("."):
        found = getattr(found, name)
    return found


def complaints(actual: Callable, promised: Callable) -> list[str]:
    """Compare a signature with the one that scripts count on."""
    mine = list(inspect.signature(actual).parameters.values())
    theirs = list(inspect.signature(promised).parameters.values())
    found = []
    for i, parameter in enumerate(theirs):
        got = mine[i] if i < len(mine) else None
        if got is None or (got.name, got.kind) != (parameter.name, parameter.kind):
            return [f"argument {i} is {got}, not {parameter}"]
        if parameter.default not in (EMPTY, mine[i].default):
            found.append(f"the default of {parameter.name} is {mine[i].default!r}")
    rest = mine[len(theirs) :]
    return found + [f"{p} is not by keyword only" for p in rest if p.kind not in MORE]


@pytest.mark.parametrize("path", TABLE)
def test_signature(path):
    assert complaints(find(path), TABLE[path]) == []


@pytest.mark.parametrize(
    ("actual", "complaint"),
    [
        (lambda A, k: ..., "argument 1 is k, not n=3"),
        (lambda n, A: ..., "argument 0 is n, not A"),
        (lambda A: ..., "argument 1 is None, not n=3"),
        (lambda A, *, n=3: ..., "argument 1 is n=3, not n=3"),
        (lambda A, n=4: ..., "the default of n is 4"),
        (lambda A, n: ..., "the default of n is <class 'inspect._empty'>"),
        (lambda A, n=3, m=None: ..., "m=None is not by keyword only"),
    ],
)
def test_signatures_that_break_scripts(actual, complaint):
    assert complaints(actual, lambda A, n=3: ...) == [complaint]


def test_signatures_that_do_not():
    for actual in (lambda A, n=3: ..., lambda A=None, n=3, *, m=2, **more: ...):
        assert complaints(actual, lambda A, n=3: ...) == []


def test_enums_are_strings():
    from curvlinops import kfac_utils

    assert kfac_utils.FisherType is FisherType and kfac_utils.KFACType is KFACType
    assert {x.name: str(x) for x in FisherType} == {
        "TYPE2": "type-2",
        "MC": "mc",
        "EMPIRICAL": "empirical",
        "FORWARD_ONLY": "forward-only",
    }
    assert {x.name: str(x) for x in KFACType} == {
        "EXPAND": "expand",
        "REDUCE": "reduce",
    }
