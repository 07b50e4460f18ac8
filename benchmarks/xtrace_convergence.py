"""Convergence of trace estimators on four matrices.

Modelled on the experiments of Epperly, Tropp, Webber, "XTrace: making the most of every
sample in stochastic trace estimation" (2024), arXiv:2301.07825: random eigenvectors and
the spectra

* flat: ``linspace(1, 3)``;
* poly: ``i ** -2``;
* exp: ``0.7 ** i``;
* step: 50 ones, then 1e-3.

Prints the mean relative error over seeds, per estimator and number of products. What
theory says, and ``check`` asserts: on the flat spectrum all are alike; on
polynomial decay Hutch++ beats Hutchinson by orders of magnitude, and XTrace and
XNysTrace beat Hutch++; on exponential decay these fall exponentially, Hutch++ at two
thirds of XTrace's rate, XTrace at half of XNysTrace's; on the step all but Hutchinson
fall once they have 50 vectors for the range.

Run: ``python benchmarks/xtrace_convergence.py [--seeds 100]``. Takes a minute.
"""

import argparse

import numpy as np

from curvlinops.estimators import hutchinson_trace, hutchpp_trace, xnystrace, xtrace

N = 1000
SPECTRA = {
    "flat": np.linspace(3, 1, N),
    "poly": np.arange(1.0, N + 1) ** -2,
    "exp": 0.7 ** np.arange(N),
    "step": np.r_[np.ones(50), np.full(N - 50, 1e-3)],
}
ESTIMATORS = {
    "Hutchinson": hutchinson_trace,
    "Hutch++": hutchpp_trace,
    "XTrace": xtrace,
    "XNysTrace": xnystrace,
}
PRODUCTS = (24, 48, 96, 192, 288)


def errors(seeds: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the mean relative errors by spectrum and estimator."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, eigenvalues in SPECTRA.items():
        A, exact = basis * eigenvalues @ basis.T, eigenvalues.sum()
        found[name] = {
            estimator: np.array(
                [
                    np.mean(
                        [
                            abs(function(A, m, "sphere", rng=s) / exact - 1)
                            for s in range(seeds)
                        ]
                    )
                    for m in PRODUCTS
                ]
            )
            for estimator, function in ESTIMATORS.items()
        }
    return found


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Return the geometric mean of the ratios of two curves."""
    return float(np.exp(np.log(a / b).mean()))


def check(found: dict[str, dict[str, np.ndarray]]) -> None:
    """Assert what the estimators differ in."""
    poly, decay, step = found["poly"], found["exp"], found["step"]
    assert ratio(poly["XTrace"], poly["Hutch++"]) < 1
    assert (poly["Hutch++"][1:] < poly["Hutchinson"][1:] / 10).all()
    assert ratio(poly["XNysTrace"], poly["XTrace"]) < 1
    assert decay["XTrace"][1] < decay["Hutch++"][1] / 5
    assert decay["XNysTrace"][0] < decay["XTrace"][0] / 5
    assert decay["XTrace"][2] < 1e-5 < decay["Hutchinson"][2]
    assert step["Hutchinson"][-1] > 100 * step["XTrace"][-1]
    assert step["XTrace"][3] < step["Hutch++"][2] / 10
    flat = [curve[-1] for curve in found["flat"].values()]
    assert max(flat) < 5 * min(flat)


def main() -> None:
    """Print the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    found = errors(parser.parse_args().seeds)
    print(f"{'':5} {'':10}" + "".join(f"{f'm={m}':>10}" for m in PRODUCTS))
    for name, curves in found.items():
        for estimator, curve in curves.items():
            print(f"{name:5} {estimator:10}" + "".join(f"{e:10.1e}" for e in curve))
    check(found)


if __name__ == "__main__":
    main()
