"""A small report of a problem that does not exist, made without any model."""

import numpy as np

from curvlinops.estimators import lanczos_approximate_spectrum
from curvlinops.report._contents import (
    Baseline,
    Block,
    Blocks,
    Check,
    Counts,
    Curve,
    Dead,
    Density,
    Layer,
    Matrix,
    Number,
    Overlap,
    Pairs,
    Problem,
    Provenance,
    Report,
    Symmetry,
    Verdict,
)

PARAMETERS = {"0.weight": 60, "0.bias": 10, "2.weight": 40, "2.bias": 5}
TOP, DAMPING = 5, 1e-2


def numbers(rng, exact, relative=0.05):
    """An estimate near a value."""
    exact = float(exact)
    error = relative * abs(exact)
    return Number(exact + error * float(rng.standard_normal()), error, 16)


def curve(density):
    low, high = density.band(0.95)
    return Curve(density.grid, density.density, low, high, 0.95)


def density_of(A, seed, spikes=TOP):
    found = lanczos_approximate_spectrum(
        A, 20, num_points=256, num_repeats=8, deflate=spikes, rng=seed
    )
    low = float(np.abs(found.nodes).min())
    high = float(np.abs(found.boundaries).max())
    log = found.smooth(scale="log", boundaries=(low, high), kappa=1.04, epsilon=1e-5)
    return Density(
        len(A),
        np.asarray(found.spikes),
        found.nodes,
        found.weights,
        curve(found),
        curve(log),
        1e-5,
    )


def pairs(A, k, largest=True):
    values, vectors = np.linalg.eigh(A)
    order = slice(None, -k - 1, -1) if largest else slice(k)
    values = tuple(values[order].tolist())
    return Pairs(values, (1e-12,) * k, vectors[:, order], True)


def layers_of(A, rng):
    rows, start = [], 0
    for name, size in PARAMETERS.items():
        block = A[start : start + size, start : start + size]
        values = np.linalg.eigvalsh(block)
        exact = (
            np.trace(block),
            values[-1],
            np.linalg.norm(block),
            (np.abs(values) / (np.abs(values) + DAMPING)).sum(),
        )
        rows.append(Layer(name, size, *(numbers(rng, x) for x in exact)))
        start += size
    return tuple(rows)


def matrix_of(name, A, rng, seed):
    values = np.linalg.eigvalsh(A)
    return Matrix(
        name,
        "GGNLinearOperator" if name == "ggn" else "HessianLinearOperator",
        len(A),
        semidefinite=name == "ggn",
        damping=DAMPING,
        top=pairs(A, TOP),
        bottom=pairs(A, 3, largest=False),
        trace=numbers(rng, np.trace(A)),
        frobenius_norm=numbers(rng, np.linalg.norm(A)),
        effective_dimension=numbers(rng, (np.abs(values) > DAMPING).sum()),
        negative_threshold=1e-3 * float(values[-1]),
        negative_mass=Number(float((values < -1e-3 * values[-1]).mean()), 0.01, 16),
        condition_number=Number(float(values[-1]) / DAMPING) if name == "ggn" else None,
        symmetry=Symmetry(1e-15, 2e-15),
        dead=Dead(4),
        checks=(Check("adjoint", 1e-15, 1e-13, True, ""),),
        layers=layers_of(A, rng),
        density=density_of(A, seed),
        dense=A,
        products=1234,
        seconds=1.5,
    )


def blocks_of(A, name):
    found, start = [], 0
    for block_name, size in PARAMETERS.items():
        values = np.linalg.eigvalsh(A[start : start + size, start : start + size])
        start += size
        rank = min(10, size)
        unit = np.sort(np.abs(values))[-rank]
        spectrum = lanczos_approximate_spectrum(
            np.diag(values / unit),
            min(10, size),
            num_points=256,
            num_repeats=4,
            boundaries=(-2.0, 20.0),
            rng=0,
        ).smooth(scale="log", boundaries=(0.0, 20.0), kappa=1.04, epsilon=1e-3)
        arrays = spectrum.nodes, spectrum.weights, curve(spectrum)
        found.append(Block(block_name, size, float(unit), rank, *arrays))
    distances = np.full((4, 4), 0.3) - 0.3 * np.eye(4)
    return Blocks(name, 1e-3, tuple(found), distances, 0.3)


def sample(seed=0):
    """A complete report, with two matrices and all parts."""
    rng = np.random.default_rng(seed)
    size = sum(PARAMETERS.values())
    factor = rng.standard_normal((size, size)) * np.geomspace(1.0, 1e-3, size)
    ggn = factor @ factor.T / size
    noise = rng.standard_normal((size, size)) / size / 10
    hessian = ggn + noise + noise.T
    matrices = (
        matrix_of("hessian", hessian, rng, seed),
        matrix_of("ggn", ggn, rng, seed + 1),
    )
    squares = (matrices[0].top.vectors.T @ matrices[1].top.vectors) ** 2
    start = hessian + 0.1 * np.eye(size)
    top = pairs(start, TOP)
    top = Pairs(top.values, top.residuals, np.zeros((size, 0)), True)
    return Report(
        Provenance(
            "curvlinops report",
            "2026-01-02T03:04:05Z",
            {"python": "3.12", "curvlinops": "0.1.0", "torch": "2.13"},
            "Linux x86_64",
            "cpu",
            "float64",
            seed,
            "ab" * 32,
            "cd" * 32,
            2468,
            3.25,
        ),
        Problem(
            "digits",
            "Sequential",
            "CrossEntropyLoss",
            PARAMETERS,
            3,
            1437,
            0.074,
            0.0195,
            0.1,
        ),
        Counts(TOP, 100, 20, 8, 16, 10, 8, 10, 4, 4, 1000, True),
        matrices,
        (Overlap("hessian", "ggn", squares, float(squares.sum() / TOP)),),
        blocks_of(hessian, "hessian"),
        Baseline("hessian", top, density_of(start, seed + 2), 2.3),
        (
            Verdict("symmetry", "hessian", "PASS", 1e-15, 1e-13, "Products are equal."),
            Verdict("negative mass", "hessian", "WARN", 0.1, 0.0, "A saddle."),
            Verdict("Ritz residuals", "ggn", "FAIL", 0.3, 0.01, "Not converged."),
        ),
        ("A note.",),
    )
