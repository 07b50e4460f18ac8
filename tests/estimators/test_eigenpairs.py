"""Leading eigenpairs: values, residuals, partial results, warm starts; tracking."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from spectra import GUISES, Counting, symmetric

import curvlinops.estimators as est
from curvlinops import TensorLinearOperator
from curvlinops.estimators import ritz

N = 200
EIGENVALUES = np.r_[np.linspace(-0.5, 1, N - 5), -9.0, 3.0, 4.0, 6.0, 10.0]
A = symmetric(EIGENVALUES)
WANTED = {
    "LA": [10, 6, 4, 3],
    "SA": [-9, -0.5],
    "LM": [10, -9, 6, 4],
    "BE": [-9, -0.5, 6, 10],
}


@pytest.mark.parametrize("which", WANTED)
@pytest.mark.parametrize("guise", GUISES)
def test_against_dense(which, guise):
    k = len(WANTED[which])
    pairs = est.top_eigenpairs(GUISES[guise](A), k, which, rng=0)
    values, vectors = pairs
    assert torch.is_tensor(values) == (guise in ("tensor", "torch side"))
    assert np.allclose(pairs.numpy(), WANTED[which], atol=1e-8)
    assert np.array_equal(np.asarray(pairs), pairs.numpy())
    residuals = A @ np.asarray(vectors) - np.asarray(vectors) * pairs.numpy()
    norms = np.linalg.norm(residuals, axis=0)
    assert np.allclose(norms, np.asarray(pairs.residual_norms), atol=1e-10)
    assert norms.max() < 1e-5 and pairs.converged


def test_small_matrices():
    D = np.diag([3.0, 1.0, -2.0])
    for which, wanted in {"LA": [3, 1], "BE": [-2, 3], "SM": [1, -2]}.items():
        assert np.allclose(est.top_eigenpairs(D, 2, which).values, wanted)
    assert np.allclose(est.top_eigenpairs(D, 3).values, [3, 1, -2])
    assert est.top_eigenpairs(np.eye(1), 1).values == [1]


def test_float64_krylov_vectors_over_a_float32_model():
    single = torch.from_numpy(A).float()
    coarse = est.top_eigenpairs(single, 3, rng=0)
    fine = est.top_eigenpairs(single, 3, rng=0, dtype=np.float64, tol=1e-8)
    assert coarse.values.dtype == fine.values.dtype == torch.float32
    assert np.allclose(fine.numpy(), [10, 6, 4], rtol=1e-6)


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_warm_starts_pay_whatever_the_unit(tol, scale):
    before = est.top_eigenpairs(scale * A, 4, rng=0)
    A_next = scale * (A + 1e-2 * symmetric(np.linspace(-1, 1, N), 3))
    exact = np.linalg.eigvalsh(A_next)[::-1][:4]
    cold = est.top_eigenpairs(A_next, 4, rng=1, tol=tol)
    warm = est.top_eigenpairs(A_next, 4, rng=1, tol=tol, start=before)
    assert cold.converged and warm.converged
    for pairs in (cold, warm):
        assert np.allclose(pairs.values, exact, rtol=1e-3 if tol else 1e-9)
    assert warm.num_products <= cold.num_products - ritz.CERTIFICATE + 4


#: Spectra whose wanted eigenvalues are easily missed: name, end, number.
TRAPS = {
    "ten-fold": (np.r_[np.linspace(0, 1, N - 10), np.full(10, 2.0)], "LA", 10),
    "double at either end": (np.r_[-2, -2, np.linspace(0, 1, N - 4), 2, 2], "BE", 4),
    "triple in magnitude": (np.r_[-3, -3, -3, np.linspace(0, 1, N - 3)], "LM", 3),
    "projector": (np.r_[np.ones(30), np.zeros(N - 30)], "SA", 2),
    "one zero": (np.linspace(0, 1, N), "SA", 1),
    "identity": (np.ones(N), "LA", 3),
    "zero": (np.zeros(N), "LM", 2),
    "low rank": (np.r_[np.zeros(N - 7), np.arange(1.0, 8)], "SA", 1),
    "nearly all": (np.linspace(-1, 1, N), "LA", N - 1),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_nothing_wanted_is_missed(trap, diagonal, tol):
    eigenvalues, which, k = TRAPS[trap]
    M = np.diag(eigenvalues) if diagonal else symmetric(eigenvalues)
    order = np.sort(eigenvalues)
    wanted = {
        "LA": order[::-1][:k],
        "SA": order[:k],
        "LM": order[np.argsort(-np.abs(order), kind="stable")[:k]],
        "BE": np.r_[order[: k // 2], order[len(order) - k // 2 :]],
    }[which]
    for seed in range(3):
        counted = Counting(M)
        pairs = est.top_eigenpairs(counted, k, which, tol=tol, rng=seed)
        scale = np.abs(eigenvalues).max()
        assert pairs.converged
        assert np.abs(pairs.values - wanted).max() <= (tol or 1e-10) * scale
        assert pairs.residual_norms.max() <= (tol or 1e-10) * scale
        assert np.allclose(pairs.vectors.T @ pairs.vectors, np.eye(k), atol=1e-8)
        assert counted.count == pairs.num_products <= N


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_warm_starts_do_not_trap(which):
    """Invariant subspaces of other eigenvalues, and copies of a multiple one."""
    eigenvalues = np.r_[np.linspace(-1, 0.9, N - 3), 1, 1, 1]
    basis = np.linalg.qr(np.random.default_rng(4).standard_normal((N, N)))[0]
    M = basis * eigenvalues @ basis.T
    order = np.sort(eigenvalues)
    exact = {"LA": order[:-4:-1], "SA": order[:3], "BE": order[[0, -2, -1]]}[which]
    for columns in ([3, 4, 5], [N - 1, N - 4, 0], [N - 1, N - 2, 0], [N - 1] * 3):
        start = basis[:, columns]
        pairs = est.top_eigenpairs(M, 3, which, start=start, rng=0, tol=1e-6)
        assert pairs.converged and np.allclose(pairs.values, exact, atol=1e-6)


def test_starts_of_other_dtypes():
    start = np.eye(N, 4, dtype=int)
    pairs = est.top_eigenpairs(A, 4, start=start, rng=0)
    assert np.allclose(pairs.values, WANTED["LA"], atol=1e-8)
    with pytest.raises(ValueError, match="give its real part"):
        est.top_eigenpairs(A, 4, start=1j * start)
    assert est.top_eigenpairs(A + 0j, 4, start=1j * start, rng=0).converged


def test_a_small_end_takes_tens_of_products():
    rng = np.random.default_rng(1)
    hessian = np.r_[1e-3 * rng.standard_normal(290), np.geomspace(1, 50, 10)]
    X = rng.standard_normal((300, 100))
    for M, k, limit in ((symmetric(hessian), 3, 110), (X @ X.T / 100, 1, 90)):
        pairs = est.top_eigenpairs(M, k, "SA", rng=0)
        exact = np.linalg.eigvalsh(M)[:k]
        assert pairs.converged and pairs.num_products <= limit
        assert np.abs(pairs.values - exact).max() < 1e-8 * np.linalg.norm(M, 2)


@pytest.mark.parametrize("skew", [1.0, 0.04, 1e-6])
@pytest.mark.parametrize("size", [12, N])
def test_asymmetry_raises(skew, size):
    X = np.random.default_rng(0).standard_normal((size, size))
    S = symmetric(np.linspace(0.5, 1.5, size))
    B = S + skew * (X - X.T) / np.linalg.norm(X - X.T, 2)
    for function in (
        lambda: est.top_eigenpairs(B, 3, rng=0),
        lambda: est.logdet(B, 1.0, ncv=10, rng=0),
        lambda: est.logdet(B, 1.0, ncv=size, rng=0),
        lambda: est.apply_function(B, np.exp, np.ones(size), 10),
        lambda: est.lanczos_approximate_spectrum(B, 10, rng=0),
    ):
        with pytest.raises(ValueError, match="Hermitian"):
            function()


def test_coarse_products_are_no_asymmetry():
    """Of float32 products behind a float64 operator, in its guise as in a composite."""
    single = torch.from_numpy(A).float()
    rough = A.astype(np.float32)
    coarse = LinearOperator(A.shape, lambda x: rough @ x.astype("f"), dtype=float)
    cast = TensorLinearOperator(single).to_scipy(np.float64)
    for operator in (coarse, cast, 2 * cast + cast):
        pairs = est.top_eigenpairs(operator, 2, rng=0)
        assert pairs.converged
        assert np.allclose(pairs.numpy() / pairs.numpy()[0], [1, 0.6], rtol=1e-5)


def test_restarts_when_the_basis_is_full():
    counted = Counting(A)
    pairs = est.top_eigenpairs(counted, 3, rng=0, ncv=5)
    assert pairs.converged and np.allclose(pairs.values, [10, 6, 4], atol=1e-8)
    unlimited = est.top_eigenpairs(A, 3, rng=0)
    assert unlimited.num_products <= counted.count <= N


def test_complex_hermitian():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((N, N)) + 1j * rng.standard_normal((N, N)))
    M = basis[0] * EIGENVALUES @ basis[0].conj().T
    values, vectors = est.top_eigenpairs(M, 4, rng=0)
    assert np.allclose(values, WANTED["LA"]) and values.dtype == np.float64
    assert np.allclose(M @ vectors, vectors * values, atol=1e-8)


def test_partial_result_says_how_far():
    hard = symmetric(np.linspace(0, 1, N))
    with pytest.warns(UserWarning, match=r"[0-7] of 8 eigenpairs have a residual of"):
        pairs = est.top_eigenpairs(hard, 8, rng=0, max_products=40, ncv=26)
    assert not pairs.converged and pairs.num_products == 40
    assert "not converged" in repr(pairs)
    with pytest.warns(UserWarning, match="may have been missed"):
        found = est.top_eigenpairs(A, 1, rng=0, tol=1e-3, max_products=12)
    assert np.isclose(found.values[0], 10, rtol=1e-3) and not found.converged
    text = str(est.top_eigenpairs(A, 2, rng=0))
    assert text.splitlines()[0].startswith("10 (residual") and "array" not in text


def test_rules():
    with pytest.raises(ValueError, match="'LA', 'LM', 'SA', 'SM', 'BE'"):
        est.top_eigenpairs(A, 2, "XX")
    with pytest.raises(ValueError, match="dimension"):
        est.top_eigenpairs(A, N + 1)
    with pytest.raises(ValueError, match="positive integer"):
        est.top_eigenpairs(A, 0)
    with pytest.raises(ValueError, match="start has 200 rows"):
        est.top_eigenpairs(A, 2, start=np.ones(3))
    with pytest.raises(ValueError, match="Product 9 "):
        est.top_eigenpairs(Counting(A, break_at=9), 2)


def test_track(tmp_path):
    rotation = np.linalg.qr(np.eye(N) + 0.01 * symmetric(np.linspace(-1, 1, N), 5))[0]
    matrices = [A, 2 * A, rotation @ A @ rotation.T]
    table = est.track(matrices, ["eigenvalues", "trace"], k=3, rng=0, steps=[0, 5, 9])
    assert table["step"].tolist() == [0, 5, 9] and len(table) == 3
    assert np.allclose(table["eigenvalue_0"], [10, 20, 10])
    assert np.allclose(table["eigenvalue_2"], [4, 8, 4])
    assert np.isnan(table["overlap"][0]) and np.isclose(table["overlap"][1], 1)
    assert 0.5 < table["overlap"][2] < 1
    assert np.isclose(table["trace"][1], 2 * table["trace"][0])
    assert (table["trace_error"] > 0).all()
    table.save(tmp_path / "t.npz")
    again = est.Track.load(tmp_path / "t.npz")
    assert again.columns.keys() == table.columns.keys()
    table.to_csv(tmp_path / "t.csv")
    read = np.genfromtxt(tmp_path / "t.csv", delimiter=",", names=True)
    assert np.allclose(read["eigenvalue_0"], table["eigenvalue_0"])


def test_track_checkpoints(tmp_path):
    states = [{"w": torch.full((30,), float(i))} for i in (1, 2)]
    torch.save(states[1], tmp_path / "2.pt")
    table = est.track(
        [states[0], tmp_path / "2.pt"],
        {"norm": lambda M: torch.linalg.norm(M), "eigenvalues": None},
        build=lambda state: torch.diag(state["w"]),
        k=1,
    )
    assert np.allclose(table["norm"], np.array([1, 2]) * 30**0.5)
    assert np.allclose(table["eigenvalue_0"], [1, 2])
    with pytest.raises(ValueError, match="no matrix"):
        est.track(states)
    with pytest.raises(ValueError, match="one of eigenvalues, trace"):
        est.track([A], ["tracee"])


def test_more_rules():
    with pytest.raises(ValueError, match="tol is a tolerance"):
        est.top_eigenpairs(A, 2, tol=-1.0)
    with pytest.raises(ValueError, match="floating-point type"):
        est.top_eigenpairs(A, 2, dtype="int32")
    with pytest.raises(ValueError, match=r"holds vectors of torch\.complex128"):
        est.top_eigenpairs(A + 0j, 2, dtype=np.float64)
    with pytest.raises(ValueError, match="nothing to track"):
        est.track([])
    with pytest.raises(ValueError, match="steps names 1 rows"):
        est.track([A, A], k=1, steps=[7])
    assert est.track([A], "trace", rng=0).columns.keys() == {
        "step",
        "trace",
        "trace_error",
    }
