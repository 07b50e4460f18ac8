"""Leading eigenpairs: values, residuals, partial results, warm starts; tracking."""

import numpy as np
import pytest
import torch
from spectra import GUISES, Counting, symmetric

import curvlinops.estimators as est

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


def test_warm_start_saves_products():
    A_next = A + 1e-4 * symmetric(np.linspace(-1, 1, N), 3)
    before = est.top_eigenpairs(A, 4, rng=0)
    cold = est.top_eigenpairs(A_next, 4, rng=0, tol=1e-3)
    warm = est.top_eigenpairs(A_next, 4, start=before, tol=1e-3)
    assert np.allclose(warm.values, cold.values, rtol=1e-3)
    assert warm.num_products <= cold.num_products
    block = est.top_eigenpairs(A_next, 4, start=before, tol=1e-6, method="lobpcg")
    assert np.allclose(block.values, cold.values, rtol=1e-3)


def test_partial_result_says_how_far():
    hard = symmetric(np.linspace(0, 1, N))
    with pytest.warns(UserWarning, match=r"of 8 eigenpairs converged to tol=1\.0e-13"):
        pairs = est.top_eigenpairs(hard, 8, rng=0, maxiter=2, tol=1e-13, ncv=17)
    assert not pairs.converged and len(pairs.values) < 8
    assert pairs.vectors.shape == (N, len(pairs.values))


def test_rules():
    with pytest.raises(ValueError, match="'LA', 'LM', 'SA', 'SM', 'BE'"):
        est.top_eigenpairs(A, 2, "XX")
    with pytest.raises(ValueError, match="dimension"):
        est.top_eigenpairs(A, N + 1)
    with pytest.raises(ValueError, match="positive integer"):
        est.top_eigenpairs(A, 0)
    with pytest.raises(ValueError, match="LOBPCG"):
        est.top_eigenpairs(A, 2, "LM", method="lobpcg")
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


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_block_method_whatever_the_unit(scale):
    before = est.top_eigenpairs(scale * A, 3, rng=0)
    A_next = scale * (A + 1e-2 * symmetric(np.linspace(-1, 1, N), 3))
    exact = np.linalg.eigvalsh(A_next)[::-1][:3]
    pairs = est.top_eigenpairs(A_next, 3, start=before, tol=1e-3)
    assert pairs.converged and pairs.num_products < 20  # ARPACK's least
    assert np.allclose(pairs.values, exact, rtol=1e-3)


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
