"""Interrupted computations go on, bit by bit as if nothing had happened."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from scipy.sparse.linalg import cg, eigsh
from spectra import Counting, TorchSide, symmetric

import curvlinops.estimators as est
from cases import find
from curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
)
from curvlinops._journal import read_identity

N = 90
A = symmetric(np.r_[np.linspace(0.1, 1, N - 2), 5.0, 9.0])


def density(A, **options):
    result = est.lanczos_approximate_spectrum(
        A, 12, num_repeats=4, deflate=2, **options
    )
    return np.concatenate([np.asarray(result.density), result.spikes])


#: Computations as functions of matrix and options.
TASKS = {
    "hutchinson_trace": lambda A, **o: est.hutchinson_trace(A, 40, **o),
    "hutchpp_trace": lambda A, **o: est.hutchpp_trace(A, 39, **o),
    "adaptive hutchpp": lambda A, **o: est.hutchpp_trace(A, 75, until=0.02, **o),
    "xtrace": lambda A, **o: est.xtrace(A, 40, **o),
    "adaptive xtrace": lambda A, **o: est.xtrace(A, 80, until=0.05, **o),
    "xnystrace": lambda A, **o: est.xnystrace(A, 40, **o),
    "diagonal": lambda A, **o: est.hutchinson_diag(A, 40, **o),
    "xdiag": lambda A, **o: est.xdiag(A, 40, **o),
    "density": density,
    "logdet": lambda A, **o: est.logdet(A, ncv=10, num_repeats=4, **o),
    "layers": lambda A, **o: est.layer_summary(
        A, 0.1, 4, 3, blocks={"first": slice(0, 30), "rest": slice(30, N)}, **o
    ),
    "eigenpairs": lambda A, **o: np.concatenate(
        [x.ravel() for x in est.top_eigenpairs(A, 3, **o)]
    ),
}


class Killed(Exception):
    """What stops a computation in a test."""


#: So slightly that the first Lanczos run does not show it.
INDEFINITE = symmetric(np.r_[np.linspace(-1e-3, 1e-3, 390), np.geomspace(1, 50, 10)])


def broken(at, matrix=A):
    B = Counting(matrix, break_at=at, error=Killed())
    B._adjoint = lambda: B
    return B


@pytest.mark.filterwarnings("ignore:schatten_norm")
@pytest.mark.parametrize("at", [5, 60, 205, 500, 10**6])
def test_a_matrix_that_turns_out_indefinite(at, tmp_path):
    """What was recorded of its eigenvalues is not taken for its singular values."""
    for matrix, until in ((INDEFINITE, 0.05), (A, None)):
        path, options = tmp_path / str(until), {"ncv": 10, "until": until, "rng": 0}
        whole = est.schatten_norm(broken(10**7, matrix), 1, **options)
        with suppress(Killed):
            est.schatten_norm(broken(at, matrix), 1, checkpoint=path, **options)
        again = est.schatten_norm(broken(10**6, matrix), 1, checkpoint=path, **options)
        assert again == whole


@pytest.mark.parametrize("task", TASKS)
def test_goes_on_with_the_same_bits(task, tmp_path):
    path, options = tmp_path / "journal", {"rng": 3}
    if task != "eigenpairs":
        options["block_size"] = 4
    whole = np.asarray(TASKS[task](broken(10**6), **options))
    stopped = 0
    for at in (2, 11, 23, 31):
        try:
            TASKS[task](broken(at), checkpoint=path, **options)
        except Killed:
            stopped += 1
    assert stopped >= 1
    last = broken(10**6)
    value = TASKS[task](last, checkpoint=path, **options)
    assert np.array_equal(np.asarray(value), whole)
    again = broken(10**6)
    repeated = TASKS[task](again, checkpoint=path, **options)
    assert np.array_equal(np.asarray(repeated), whole)
    assert again.count <= 2  # the matrix's fingerprint, and that of the result


def test_seed_is_kept(tmp_path):
    path = tmp_path / "journal"
    with pytest.raises(Killed):
        est.xtrace(broken(15), 40, checkpoint=path, block_size=2)
    options = {"block_size": 2, "return_estimate": True}
    result = est.xtrace(broken(10**6), 40, checkpoint=path, **options)
    assert result.seed == read_identity(path)["seed"]
    assert np.array_equal(
        result.value, est.xtrace(A, 40, rng=result.seed, block_size=2)
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"A": A + 1e-3}, "fingerprint"),
        ({"rng": 4}, "seed"),
        ({"A": A.astype(np.float32)}, "dtype"),
        ({"distribution": "normal"}, "distribution"),
        ({"A": torch.from_numpy(A)}, "class"),
    ],
)
def test_another_problem_is_refused(tmp_path, change, named):
    path = tmp_path / "journal"
    arguments = {"A": A, "num_matvecs": 20, "rng": 3, "checkpoint": path}
    est.hutchinson_trace(**arguments)
    with pytest.raises(ValueError, match=f"another computation.*{named}"):
        est.hutchinson_trace(**(arguments | change))
    with pytest.raises(ValueError, match="task"):
        est.xtrace(**arguments)


def test_damaged_files_are_named_or_repaired(tmp_path):
    path = tmp_path / "journal"
    options = {"rng": 3, "block_size": 4, "checkpoint": path}
    whole = est.xtrace(A, 40, **options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"journal is no checkpoint, or a damaged one"):
        est.xtrace(A, 40, **options)
    path.write_bytes(content + b"junk")
    assert est.xtrace(A, 40, **options) == whole
    for start in range(len(content) // 4, len(content), len(content) // 4):
        damaged = bytearray(content)
        damaged[start : start + 8] = bytes(255 - byte for byte in content[start:][:8])
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"journal is damaged: .* computed again"):
            assert est.xtrace(A, 40, **options) == whole
        assert est.xtrace(A, 40, **options) == whole  # which does not warn


def test_journal_does_not_grow_without_bound(tmp_path):
    path, A = tmp_path / "journal", scipy.sparse.eye_array(20_000)
    est.hutchinson_diag(A, 60, rng=0, block_size=1, checkpoint=path)
    assert path.stat().st_size < 2**23  # 60 states of 320 kB each were written


def test_scipy_solvers_go_on(tmp_path):
    b = np.arange(N) * 1.0
    for solve in (
        lambda J: cg(J, b, rtol=1e-10)[0],
        lambda J: eigsh(J, 3, v0=b, return_eigenvectors=False),
    ):
        path = tmp_path / f"{id(solve)}"
        with pytest.raises(Killed), est.JournalledOperator(broken(9), path) as J:
            solve(J)
        with est.JournalledOperator(A, tmp_path / "whole") as J:
            whole, products = solve(J), J.num_products
        (tmp_path / "whole").unlink()
        # Another class of operator is another computation; a plain one here.
        with est.JournalledOperator(broken(10**6), path) as J:
            assert np.array_equal(solve(J), whole)
            assert J.num_products == products - 7
    with (
        est.JournalledOperator(broken(10**6), path) as J,
        pytest.raises(ValueError, match="made with another vector"),
    ):
        cg(J, b + 1)


def test_route_is_fixed_and_stored(tmp_path):
    class Routed(TorchSide):
        asked = ()

        def fix_route(self, route):
            self.asked = (*self.asked, route)
            return route or "replay"

    B = Routed(torch.from_numpy(A))
    for _ in range(2):
        est.hutchinson_trace(B, 20, rng=0, checkpoint=tmp_path / "journal")
    assert B.asked == (None, "replay")


SCRIPT = """
    import sys, time
    import numpy as np
    from scipy.sparse.linalg import LinearOperator
    from curvlinops.estimators import lanczos_approximate_spectrum

    class Slow(LinearOperator):
        def __init__(self, pause):
            super().__init__(np.float64, (400, 400))
            self.pause, self.d = pause, np.linspace(-1, 1, 400) ** 3
        def _matvec(self, x):
            time.sleep(self.pause)
            print(".", end="", flush=True)
            return self.d * x.ravel()

    result = lanczos_approximate_spectrum(
        Slow(float(sys.argv[2])), 30, num_repeats=3, rng=0, block_size=1,
        checkpoint=sys.argv[1],
    )
    np.save(sys.argv[1] + ".npy", result.numpy())
"""


def test_kill_9(tmp_path):
    def start(name, pause):
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), tmp_path / name, pause],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(est.__file__).parents[2])},
        )

    killed, whole = start("a", "0.02"), start("b", "0")
    assert killed.stdout.read(40)  # in the middle of the second run
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    resumed = start("a", "0")
    few, many = (len(p.communicate()[0]) for p in (resumed, whole))
    assert resumed.returncode == whole.returncode == 0 and few <= many - 30
    results = [np.load(tmp_path / f"{name}.npy") for name in "ab"]
    assert np.array_equal(*results)


# -- with operators of this package -------------------------------------------------


def _operator(kind):
    model, loss, params, data = find("mlp-tanh-ce").build()
    G = GGNLinearOperator(model, loss, params, data)
    identity = IdentityLinearOperator(G.in_shapes, G.device, G.torch_dtype)
    return {"ggn": G, "damped": 0.5 * G + 0.1 * identity}[kind]


@pytest.mark.parametrize("kind", ["ggn", "damped"])
def test_a_fixed_route_gives_the_same_bits_in_every_product(kind):
    A = _operator(kind)
    assert A.fix_route() == "plain"
    v = torch.randn(A.shape[1], dtype=torch.float64)
    first = A @ v
    for _ in range(2 * A.shape[1]):
        assert torch.equal(A @ v, first)
    with pytest.raises(ValueError, match="plain"):
        A.fix_route("scenic")


@pytest.mark.parametrize("columns", [(), (3,), (9,)])
def test_interrupted_cg_resumes_with_the_same_bits(tmp_path, columns):
    size = _operator("damped").shape[0]
    b = np.random.default_rng(0).standard_normal((size, *columns))
    options = {"tolerance": 1e-8}
    A = _operator("damped")
    whole = CGInverseLinearOperator(A, checkpoint=tmp_path / "whole", **options) @ b

    class Stop(Exception):
        pass

    A, products = _operator("damped"), 0
    multiply = A._apply

    def stopping(V):
        nonlocal products
        products += 1
        if products > 6:
            raise Stop
        return multiply(V)

    A._apply = stopping
    with pytest.raises(Stop):
        CGInverseLinearOperator(A, checkpoint=tmp_path / "part", **options) @ b
    resumed = CGInverseLinearOperator(
        _operator("damped"), checkpoint=tmp_path / "part", **options
    )
    assert np.array_equal(resumed @ b, whole)
    other = 2 * _operator("damped")
    with pytest.raises(ValueError, match="another"):
        CGInverseLinearOperator(other, checkpoint=tmp_path / "part", **options) @ b


def test_products_are_those_of_the_whole(tmp_path):
    """A resumed computation counts what was spent before, and is identical."""
    options = {"rng": 0, "block_size": 2, "return_estimate": True}
    whole = est.hutchpp_trace(broken(10**6), 39, checkpoint=tmp_path / "a", **options)
    with pytest.raises(Killed):
        est.hutchpp_trace(broken(21), 39, checkpoint=tmp_path / "b", **options)
    part = est.hutchpp_trace(broken(10**6), 39, checkpoint=tmp_path / "b", **options)
    assert vars(part) == vars(whole)
    results = []
    for name, stop in (("c", 10**6), ("d", 30), ("d", 10**6)):
        try:
            found = est.lanczos_approximate_spectrum(
                broken(stop), 12, num_repeats=3, rng=0, checkpoint=tmp_path / name
            )
            results.append(found.provenance)
        except Killed:
            pass
    assert len(results) == 2 and results[0] == results[1]


def test_wrong_arguments_leave_no_checkpoint(tmp_path):
    path = tmp_path / "journal"
    for k in (0, N + 1):
        with pytest.raises(ValueError):
            est.top_eigenpairs(A, k, checkpoint=path)
    with pytest.raises(ValueError):
        est.apply_function(A, np.exp, np.ones(3), checkpoint=path)
    assert not path.exists()
    path.touch()  # as `tempfile` does
    est.top_eigenpairs(A, 2, checkpoint=path)


def test_fewer_samples_than_stored(tmp_path):
    path = tmp_path / "journal"
    est.hutchinson_trace(A, 40, rng=0, checkpoint=path)
    with pytest.raises(ValueError, match="holds 40 samples, and 20 were asked for"):
        est.hutchinson_trace(A, 20, rng=0, checkpoint=path)
    more = est.hutchinson_trace(A, 60, rng=0, checkpoint=path, block_size=16)
    assert np.isclose(more, est.hutchinson_trace(A, 60, rng=0))
    few = {"ncv": 10, "num_repeats": 3, "rng": 0}
    est.logdet(A, checkpoint=tmp_path / "runs", **(few | {"num_repeats": 6}))
    resumed = est.logdet(A, checkpoint=tmp_path / "runs", **few)
    assert np.isclose(resumed, est.logdet(A, **few), rtol=1e-10)
    est.xtrace(A, 20, rng=0, checkpoint=tmp_path / "sketch")
    with pytest.raises(ValueError, match="num_matvecs: stored 20, now 40"):
        est.xtrace(A, 40, rng=0, checkpoint=tmp_path / "sketch")


def test_parameters_are_told_apart_by_their_bits(tmp_path):
    def trace(G):
        return est.hutchinson_trace(G, 10, rng=0, checkpoint=tmp_path / "journal")

    model, loss, params, data = find("mlp-tanh-ce").build()
    G = GGNLinearOperator(model, loss, params, data)
    first = trace(G)
    assert trace(G) == first
    values = params.values() if isinstance(params, dict) else params
    with torch.no_grad():
        next(iter(values)).mul_(1 + 1e-14)
    with pytest.raises(ValueError, match="parameters: stored"):
        trace(G)


@pytest.mark.parametrize("kind", ["ggn", "damped"])
def test_the_route_is_free_again_afterwards(tmp_path, kind):
    A = _operator(kind)
    risk = A.risk if kind == "ggn" else A.args[0].args[0].risk
    est.hutchinson_trace(A, 10, rng=0, checkpoint=tmp_path / "journal")
    assert not risk.plain
    A.fix_route()
    CGInverseLinearOperator(A, checkpoint=tmp_path / "cg", max_iter=3) @ torch.ones(
        A.shape[1], dtype=A.torch_dtype
    )
    assert risk.plain
    A.free_route()
    assert not risk.plain
