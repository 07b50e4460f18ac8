"""Draw README.rst's figure: what a trained network's Hessian and GGN look like.

Run ``python benchmarks/readme_figure.py``. Trains a small network on scikit-learn's
digits, estimates both densities, and writes ``benchmarks/density.png``.
"""

from pathlib import Path

from matplotlib.figure import Figure
from torch.nn import CrossEntropyLoss

from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    lanczos_approximate_spectrum,
)
from curvlinops.examples._digits import trained_digits
from curvlinops.plots import plot_spectral_density

FILE = Path(__file__).with_name("density.png")


def main() -> None:
    """Train, estimate, and draw."""
    digits = trained_digits(hidden=12, epochs=60, seed=0)
    risk = EmpiricalRisk(digits.model, CrossEntropyLoss(), digits.params, digits.data)
    densities = {
        name: lanczos_approximate_spectrum(A, 80, num_repeats=8, deflate=10, rng=0)
        for name, A in {
            "Hessian": HessianLinearOperator(risk),
            "GGN": GGNLinearOperator(risk),
        }.items()
    }
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    plot_spectral_density(densities, figure.add_subplot())
    figure.savefig(FILE, dpi=160)


if __name__ == "__main__":
    main()
