"""What is drawn: areas, places, numbers, colours, and that it can be read."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm

import curvlinops.estimators as est
from curvlinops import plots

Figure = pytest.importorskip("matplotlib.figure").Figure
pyplot = pytest.importorskip("matplotlib.pyplot")

N = 300
DENSITIES = {
    "linear": est.lanczos_approximate_spectrum,
    "log": est.lanczos_approximate_log_spectrum,
    "abs": lambda A, ncv, num_repeats=1, **options: (
        est.LanczosApproximateSpectrumCached(
            A, ncv, **options
        ).approximate_abs_spectrum(num_repeats)
    ),
}


@pytest.fixture
def ax():
    return Figure().add_subplot()


@pytest.fixture(autouse=True)
def without_windows():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def spectrum(kind="outliers"):
    rng = np.random.default_rng(0)
    bulk = {
        "outliers": np.sort(0.1 * rng.standard_normal(N - 3)),
        "semidefinite": np.geomspace(1e-6, 0.5, N - 3),
    }
    return np.r_[bulk[kind], 2.0, 3.0, 7.0]


def lines(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def area(ax, gid):
    """Integrate a curve over what the horizontal axis shows evenly."""
    total = 0.0
    for line in lines(ax, gid):
        x, y = line.get_data()
        total += trapezoid(y, np.log10(x) if ax.get_xscale() == "log" else x)
    return total


# -- densities ---------------------------------------------------------------------


@pytest.mark.parametrize("convert", [np.array, torch.from_numpy])
@pytest.mark.parametrize("deflate", [0, 3])
@pytest.mark.parametrize("scale", DENSITIES)
def test_areas_are_masses(ax, scale, deflate, convert):
    A = convert(np.diag(spectrum()))
    density = DENSITIES[scale](A, 30, num_repeats=2, deflate=deflate, rng=0)
    assert plots.plot_spectral_density(density, ax, log=True) is ax
    assert area(ax, "density") == pytest.approx(1 - deflate / N, rel=1e-3)
    assert area(ax, "spikes") == pytest.approx(deflate / N, rel=1e-3)
    if deflate:
        (tops,) = lines(ax, "tops")
        assert sorted(tops.get_xdata()) == pytest.approx([2, 3, 7])


def test_peak_of_a_spike_has_its_mass(ax):
    A = np.diag(spectrum())
    density = est.lanczos_approximate_spectrum(A, 20, deflate=3, rng=0)
    plots.plot_spectral_density(density, ax)
    x, y = lines(ax, "spikes")[0].get_data()
    around = abs(x - 7) < 1.5
    assert trapezoid(y[around], x[around]) == pytest.approx(1 / N, rel=1e-3)
    # Its top, and an eigenvalue's, can be seen above the lower end of the axis.
    _, heights = lines(ax, "tops")[0].get_data()
    assert 0 < ax.get_ylim()[0] < heights.min() / 5
    assert ax.get_ylim()[1] > max(line.get_ydata().max() for line in ax.lines)


@pytest.mark.parametrize("bulk", [None, (-0.3, 0.3)])
def test_kernels_suit_the_window(ax, bulk):
    # As many nodes as eigenvalues are the eigenvalues: what is drawn is known.
    eigenvalues = np.linspace(-0.2, 2.0, 40)
    density = est.lanczos_approximate_spectrum(np.diag(eigenvalues), 40, rng=0)
    seen = est.SpectralDensity(
        eigenvalues[None], np.full((1, 40), 1 / 40), (-0.2, 2.0), 40
    )
    for given in (density, seen):
        assert given.width < 0.05
    plots.plot_spectral_density(seen, ax, bulk=bulk)
    low, high = bulk or (-0.2, 2.0)
    length = high - low
    width = max(length / 39 / np.sqrt(8 * np.log(3)), length / 100)
    x, y = lines(ax, "density")[0].get_data()
    inside = (x > low) & (x < high)
    truth = norm.pdf(x[inside, None], eigenvalues, width).mean(1)
    assert np.allclose(y[inside], truth, rtol=0.02, atol=1e-3 * truth.max())
    if bulk:
        assert ax.get_xlim() == bulk


def test_width_is_at_least_a_hundredth_of_the_window(ax):
    eigenvalues = np.arange(200.0)
    rule = eigenvalues[None], np.full((1, 200), 1 / 200)
    plots.plot_spectral_density(est.SpectralDensity(*rule, (0, 199), 200), ax)
    x, y = lines(ax, "density")[0].get_data()
    truth = norm.pdf(x[:, None], eigenvalues, 1.99).mean(1)
    inside = (x > 0) & (x < 199)
    assert np.allclose(y[inside], truth[inside], rtol=0.01)
    plots.plot_spectral_density(est.SpectralDensity(*rule, (0, 199), 200), ax, width=5)
    x, y = lines(ax, "density")[1].get_data()
    truth = norm.pdf(x[:, None], eigenvalues, 5).mean(1)
    inside = (x > 0) & (x < 199)
    assert np.allclose(y[inside], truth[inside], rtol=0.01)


def test_automatic_bulk_is_the_central_mass(ax):
    eigenvalues = spectrum()
    density = est.lanczos_approximate_spectrum(np.diag(eigenvalues), 40, rng=0)
    plots.plot_spectral_density(density, ax, bulk="auto")
    low, high = ax.get_xlim()
    inside = (low < eigenvalues) & (eigenvalues < high)
    assert 0.96 < inside.mean() < 1 and high - low < 1.5


@pytest.mark.parametrize("bulk", ["auto", (1e-3, 1.0)])
@pytest.mark.parametrize("scale", ["log", "abs"])
def test_windows_of_magnitudes(ax, scale, bulk):
    density = DENSITIES[scale](np.diag(spectrum()), 30, rng=0)
    plots.plot_spectral_density(density, ax, bulk=bulk)
    low, high = ax.get_xlim()
    assert (low, high) == bulk if bulk != "auto" else 0 <= low < 0.1 < high < 3
    below = plots.plot_spectral_density(density, Figure().add_subplot(), bulk=(-1, 1))
    assert 0 <= below.get_xlim()[0] < 1e-10


def test_several_densities_have_kernels_of_one_width(ax):
    eigenvalues = np.linspace(0, 1, 60)
    known = est.SpectralDensity(
        eigenvalues[None], np.full((1, 60), 1 / 60), (0.0, 1.0), 60
    )
    few = est.SpectralDensity(np.array([[0.2, 0.7]]), np.full((1, 2), 0.5), (0, 1), 2)
    plots.plot_spectral_density({"60": known, "2": few}, ax)
    width = 1 / np.sqrt(8 * np.log(3))
    for line, values in zip(
        lines(ax, "density"), (eigenvalues, [0.2, 0.7]), strict=True
    ):
        x, y = line.get_data()
        truth = norm.pdf(x[:, None], np.array(values), width).mean(1)
        assert np.allclose(y, truth, rtol=0.02, atol=1e-3)


def test_band_covers_what_it_is_of(ax):
    eigenvalues = spectrum("semidefinite")
    density = est.lanczos_approximate_spectrum(
        np.diag(eigenvalues), 30, num_repeats=3, deflate=3, rng=0
    )
    plots.plot_spectral_density(density, ax, level=0.95)
    (band,) = ax.collections
    (line,) = lines(ax, "density")
    x, y = line.get_data()
    vertices = band.get_paths()[0].vertices
    top = np.array([vertices[vertices[:, 0] == point, 1].max() for point in x])
    assert (top >= y * (1 - 1e-9)).all() and (top > 1.05 * y).any()
    assert "95 % band" in [t.get_text() for t in ax.get_legend().get_texts()]
    bare = plots.plot_spectral_density(density, Figure().add_subplot(), level=None)
    assert not bare.collections


def test_two_densities_in_one_axes(ax):
    named = {
        name: est.lanczos_approximate_spectrum(
            np.diag(spectrum(kind)), 20, deflate=3, rng=0
        )
        for name, kind in (("Hessian", "outliers"), ("GGN", "semidefinite"))
    }
    plots.plot_spectral_density(named, ax)
    first, second = lines(ax, "density")
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()
    ends = [line.get_xdata()[[0, -1]] for line in (first, second)]
    assert all(low < spectrum()[0] and high > 7 for low, high in ends)
    tops = lines(ax, "tops")
    assert tops[0].get_marker() != tops[1].get_marker()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["Hessian", "GGN", "95 % band", f"one eigenvalue, 1/{N}"]
    # One after the other is the same as both at once, as far as looks go.
    other = Figure().add_subplot()
    for name, density in named.items():
        plots.plot_spectral_density(density, other, label=name)
    looks = [(line.get_color(), line.get_linestyle()) for line in other.lines]
    assert looks == [(line.get_color(), line.get_linestyle()) for line in ax.lines]


def test_density_from_elsewhere(ax):
    grid = torch.linspace(0, 1, 5)
    plots.plot_spectral_density((grid, grid.square()), ax, label="mine")
    assert np.allclose(ax.lines[0].get_ydata(), np.linspace(0, 1, 5) ** 2)


@pytest.mark.parametrize("bulk", ["all", (1.0, 0.0), (0.0, 0.0)])
def test_wrong_windows(ax, bulk):
    density = est.lanczos_approximate_spectrum(np.diag(spectrum()), 5, rng=0)
    with pytest.raises(ValueError, match="bulk is 'auto' or a pair"):
        plots.plot_spectral_density(density, ax, bulk=bulk)


def test_scales_are_not_mixed(ax):
    A = np.diag(spectrum())
    mixed = {name: DENSITIES[name](A, 5, rng=0) for name in ("linear", "log")}
    with pytest.raises(ValueError, match="have one scale; got linear, log"):
        plots.plot_spectral_density(mixed, ax)


# -- matrices ----------------------------------------------------------------------


def test_logarithm_of_a_matrix(ax):
    A = torch.tensor([[10.0, 0.0], [-0.01, 1.0]])
    plots.plot_matrix(A, ax, decades=4)
    image = ax.images[0].get_array()
    assert image.tolist() == [[1.0, None], [pytest.approx(-2.0), 0.0]]
    assert ax.images[0].get_clim() == (-3, 1)
    assert ax.figure.axes[1].get_ylabel() == r"$\log_{10}$ |entry|"


@pytest.mark.parametrize(
    ("matrix", "limits"),
    [([[1.0, -4.0]], (-4, 4)), ([[1.0, 4.0]], (0, 4)), ([[3j, 4.0]], (0, 4))],
)
def test_entries_of_a_matrix(ax, matrix, limits):
    plots.plot_matrix(np.array(matrix), ax, log=False)
    assert ax.images[0].get_clim() == limits


def test_large_matrices_keep_single_entries(ax):
    A = np.zeros((2001, 1700))
    A[1234, 999], A[7, 1699] = -5.0, 3.0
    plots.plot_matrix(A, ax, log=False)
    image = ax.images[0].get_array()
    assert max(image.shape) <= 800 and image.min() == -5 and image.max() == 3
    row, column = np.argwhere(image == -5)[0]
    left, right, bottom, top = ax.images[0].get_extent()
    assert abs(top + (row + 0.5) * (bottom - top) / len(image) - 1234) < 3
    assert abs(left + (column + 0.5) * (right - left) / image.shape[1] - 999) < 3


def test_blocks_of_a_matrix(ax):
    plots.plot_matrix(np.eye(100), ax, blocks={"a": 60, "b": 1, "c": 39})
    rows = [line.get_ydata()[0] for line in ax.lines[::2]]
    assert rows == [59.5, 60.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "c"]
    assert ax.get_yticks().tolist() == [29.5, 80.0]
    with pytest.raises(ValueError, match="blocks sum to 3"):
        plots.plot_matrix(np.eye(4), ax, blocks={"a": 3})
    with pytest.raises(ValueError, match="A matrix with entries is needed"):
        plots.plot_matrix(np.zeros(3), ax)


def test_operators_are_multiplied_out(ax):
    from curvlinops import DiagonalLinearOperator

    plots.plot_matrix(DiagonalLinearOperator([torch.tensor([1.0, 100.0])]), ax)
    assert ax.images[0].get_array().tolist() == [[0.0, None], [None, 2.0]]


# -- layers ------------------------------------------------------------------------

TABLE = {
    "name": ["0.weight", "0.bias"],
    "size": [20, 2],
    "trace": torch.tensor([4.0, -1.0]),
    "trace_error": [0.25, np.nan],
    "effective_dimension": np.array([0.0, 3.25]),
}


class Table:
    def to_dict(self):
        return TABLE


@pytest.mark.parametrize("table", [TABLE, Table()])
def test_layers(ax, table):
    plots.plot_layer_summary(table, ax)
    assert ax.images[0].get_array().tolist() == [[1.0, 0.0], [0.25, 1.0]]
    assert [t.get_text() for t in ax.texts] == ["4.0(2)", "0", "-1.00", "3.25"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.weight", "0.bias"]
    chosen = plots.plot_layer_summary(
        TABLE, Figure().add_subplot(), quantities=["size"]
    )
    assert [t.get_text() for t in chosen.texts] == ["20.0", "2.00"]


@pytest.mark.parametrize("quantities", [["sharpness"], []])
def test_unknown_quantities(ax, quantities):
    with pytest.raises(ValueError, match="quantities among name, size, trace"):
        plots.plot_layer_summary(TABLE, ax, quantities=quantities)


def test_names_stay_different(ax):
    names = [
        f"model.layers.{i}.self_attn.{k}_proj.weight"
        for i in (3, 14)
        for k in ("q", "k")
    ]
    plots.plot_layer_summary({"name": names, "trace": np.ones(4)}, ax)
    shown = [t.get_text() for t in ax.get_yticklabels()]
    assert len(set(shown)) == 4 and max(map(len, shown)) < 30


# -- curves ------------------------------------------------------------------------


def test_eigenvalues_and_their_bars(ax):
    A = np.diag([5.0, -4.0, 1.0, 0.5])
    pairs = est.top_eigenpairs(A, 3, "LM", rng=0)
    errors = torch.tensor([0.5, 0.25])
    plots.plot_eigenvalues({"A": pairs, "B": (torch.tensor([-1.0, 2.0]), errors)}, ax)
    first, second = (line.get_ydata() for line in lines(ax, "eigenvalues"))
    assert np.allclose(first, [5, 1]) and second.tolist() == [2]
    first, second = (line.get_ydata() for line in lines(ax, "negative"))
    assert np.allclose(first, [4]) and second.tolist() == [1]
    assert len({line.get_color() for line in ax.lines}) == 2
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["A", "A, negative", "B", "B, negative"]
    hollow = {line.get_markerfacecolor() for line in lines(ax, "negative")}
    assert hollow == {"white"}
    bars = [c.get_segments()[0][:, 1] for c in ax.collections[2:]]
    assert np.allclose(bars, [[1.75, 2.25], [0.5, 1.5]])


def test_convergence(ax):
    plots.plot_convergence(
        {"CG": torch.tensor([1.0, 0.1, 0.0]), "preconditioned": ([50, 60], [1.0, 0.2])},
        ax,
        tol=1e-3,
    )
    first, second = lines(ax, "history")
    assert first.get_xdata().tolist() == [1, 2, 3]
    assert second.get_xdata().tolist() == [50, 60]
    assert ax.get_yscale() == "log" and ax.lines[-1].get_ydata()[0] == 1e-3
    with pytest.raises(ValueError, match="2 products, and 1 numbers"):
        plots.plot_convergence(([1, 2], [1.0]), ax)


@pytest.mark.parametrize("lr", [0.1, [0.1, 0.2, 0.4]])
def test_tracking(ax, lr):
    A = np.diag(np.arange(20.0))
    table = est.track([A, 1.5 * A, 2 * A], k=2, steps=[0, 10, 30], rng=0)
    plots.plot_tracking(
        table, ax, lr=lr, loss=([0, 1, 2], torch.tensor([3.0, 2.0, 0.1]))
    )
    (line,), (bound,) = lines(ax, "track"), lines(ax, "bound")
    assert line.get_xdata().tolist() == [0, 10, 30]
    assert np.allclose(line.get_ydata(), [19, 28.5, 38])
    assert np.allclose(bound.get_ydata(), 2 / np.array(lr))
    assert bound.get_linestyle() == "--"
    right = ax.figure.axes[-1]
    assert right is not ax and right.get_yscale() == "log"
    assert np.allclose(right.lines[0].get_ydata(), [3, 2, 0.1])


def test_tracked_errors_are_bands(ax):
    table = {"trace": np.array([1.0, 2.0]), "trace_error": np.array([0.5, 0.25])}
    plots.plot_tracking(table, ax)
    vertices = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert {0.5, 1.5, 1.75, 2.25} <= set(vertices.tolist())
    assert ax.get_ylabel() == "trace" and len(lines(ax, "track")) == 1
    with pytest.raises(ValueError, match="'norm' is no column; there are trace"):
        plots.plot_tracking(table, ax, columns=["norm"])


# -- legibility --------------------------------------------------------------------


def drawn():
    """Draw what each function is for, at the size that it chooses itself."""
    A = np.diag(spectrum())
    density = est.lanczos_approximate_spectrum(A, 20, deflate=3, rng=0)
    logarithmic = est.lanczos_approximate_log_spectrum(A, 20, deflate=3, rng=0)
    names = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(12)]
    table = {"name": names} | {
        name: np.geomspace(1e-5, 1e5, 12)
        for q in ("trace", "top_eigenvalue", "frobenius_norm", "effective_dimension")
        for name in (q, f"{q}_error")
    }
    steps = {"step": np.arange(50), "eigenvalue_0": np.linspace(0, 21, 50)}
    return {
        "density": plots.plot_spectral_density({"Hessian": density, "GGN": density}),
        "bulk": plots.plot_spectral_density(density, bulk="auto"),
        "log density": plots.plot_spectral_density(logarithmic, label="Hessian"),
        "matrix": plots.plot_matrix(A, blocks={"0.weight": 200, "2.weight": 100}),
        "layers": plots.plot_layer_summary(table),
        "eigenvalues": plots.plot_eigenvalues(spectrum()[-40:]),
        "convergence": plots.plot_convergence({"CG": 0.5 ** np.arange(30)}, tol=1e-6),
        "tracking": plots.plot_tracking(steps, lr=0.1, loss=0.9 ** np.arange(50)),
    }


def assert_legible(figure, name):
    """Texts of a figure are large enough, within the page, and apart."""
    figure.draw_without_rendering()
    page = figure.bbox
    for place in figure.axes:
        labels = [place.xaxis.label, place.yaxis.label, *place.texts]
        if place.get_legend():
            labels += place.get_legend().get_texts()
        ticks = [
            [t for t in axis.get_ticklabels() if t.get_text() and seen(axis, t)]
            for axis in (place.xaxis, place.yaxis)
        ]
        for text in itertools.chain(labels, *ticks):
            if text.get_text():
                assert text.get_fontsize() >= 6.5, (name, text)
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.y0 >= -1, (name, text)
                assert box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, (name, text)
        for texts in ticks:
            for one, other in itertools.pairwise(texts):
                a, b = one.get_window_extent(), other.get_window_extent()
                assert not a.overlaps(b), (name, one, other)


def seen(axis, text):
    """Whether a tick's label is within what its axis shows."""
    low, high = sorted(axis.get_view_interval())
    place = text.get_position()[0 if axis.axis_name == "x" else 1]
    return low <= place <= high


def test_figures_are_legible_in_a_column():
    for name, ax in drawn().items():
        assert ax.figure.get_size_inches()[0] == pytest.approx(3.4), name
        assert_legible(ax.figure, name)


def test_what_cannot_be_read_is_seen():
    small, wide, dense = (Figure((3.4, 2.4)) for _ in range(3))
    small.add_subplot().set_xlabel("x", fontsize=4)
    wide.add_subplot().text(2.0, 0.5, "outside")
    dense.add_subplot().set_xticks(np.linspace(0, 1, 30), ["0.12345"] * 30)
    wrong = {"get_fontsize": small, "outside": wide, "overlaps": dense}
    for word, figure in wrong.items():
        with pytest.raises(AssertionError, match=word):
            assert_legible(figure, "planted")


def distance(first, second, matrix):
    """Return the distance of two colours in CIELAB as somebody sees them."""

    def lab(color):
        code = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        light = np.where(code > 0.04045, ((code + 0.055) / 1.055) ** 2.4, code / 12.92)
        light = (matrix @ light).clip(0, 1)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722]]
        x, y, z = np.array([*to_xyz, [0.0193, 0.1192, 0.9505]]) @ light
        f = np.cbrt(np.maximum([x / 0.9505, y, z / 1.089], 0.008856))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return np.linalg.norm(lab(first) - lab(second))


#: Colour blindness as linear maps of light (Machado, Oliveira, Fernandes, "A
#: physiologically-based model for simulation of color vision deficiency", IEEE TVCG 15
#: (2009), doi:10.1109/TVCG.2009.113).
EYES = {
    "all cones": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart(eyes):
    matrix = np.array(EYES[eyes])
    colors = list(enumerate(plots.OKABE_ITO.values()))
    for (_, one), (index, other) in itertools.combinations(colors, 2):
        assert distance(one, other, matrix) > (20 if index < 3 else 15)
    if eyes == "no green":  # red and green are not told apart: the rule bites
        assert distance("#00A000", "#B06000", matrix) < 20


def test_matplotlib_is_asked_for_when_something_is_drawn():
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from curvlinops.plots import plot_eigenvalues\n"
        "plot_eigenvalues([1.0])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert 'pip install "curvlinops-scipy[report]"' in run.stderr.splitlines()[-1]
