"""What is drawn of a report, and of a comparison."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import trapezoid

pytest.importorskip("matplotlib")

from curvlinops.plots import STYLE
from curvlinops.report import _comparison_figures, _figures
from curvlinops.report._comparison import compare
from curvlinops.report._contents import Number
from curvlinops.report._pictures import spectral
from report_samples import PARAMETERS, TOP, sample
from test_plots import area, assert_legible, lines

REPORT = sample()


def drawn(draws, content):
    import matplotlib

    with matplotlib.rc_context(STYLE):
        found = (item for draw in draws for item in draw(content))
        return {name: (figure, caption) for name, _, caption, figure in found}


@pytest.fixture(scope="module")
def figures():
    return drawn(_figures.FIGURES, REPORT)


@pytest.fixture(scope="module")
def compared():
    comparison = compare(REPORT, sample(3))
    return comparison, {
        pair.name: drawn(_comparison_figures.FIGURES, pair) for pair in comparison.pairs
    }


def test_which_figures_there_are(figures):
    assert list(figures) == [
        "density_hessian",
        "density_ggn",
        "comparison",
        "log_density",
        "eigenvalues",
        "layers_hessian",
        "layers_ggn",
        "overlap_hessian_ggn",
        "blocks",
        "block_distances",
        "baseline",
        "matrix_hessian",
        "matrix_ggn",
    ]


@pytest.mark.parametrize(
    ("name", "axes", "densities"),
    [
        ("density_hessian", 0, 1),
        ("density_ggn", 0, 1),
        ("comparison", 0, 2),
        ("log_density", 0, 2),
        ("baseline", 0, 2),
        ("baseline", 1, 2),
    ],
)
def test_areas_are_masses(figures, name, axes, densities):
    ax = figures[name][0].axes[axes]
    assert len(lines(ax, "density")) == densities
    size = REPORT.problem.num_params
    single = densities * TOP / size
    assert area(ax, "density") == pytest.approx(densities - single, rel=2e-3)
    if ax.get_yscale() == "log":
        assert area(ax, "spikes") == pytest.approx(single, rel=2e-3)


def test_densities_are_those_of_the_report():
    for m in REPORT.matrices:
        for scale in ("linear", "log"):
            known = getattr(m.density, scale)
            found = spectral(m.density, scale)
            grid = np.asarray(found.grid)
            # Not the same grid, so the same mean, as far as grids go.
            means = [
                trapezoid(y * x, x)
                for x, y in ((grid, found.density), (known.grid, known.density))
            ]
            assert means[0] == pytest.approx(means[1], rel=0.05), (m.name, scale)


def test_one_eigenvalue_many_times():
    m = REPORT.matrices[0]
    same = replace(m.density, nodes=np.full((2, 1), 3.0), weights=np.full((2, 1), 0.95))
    for scale in ("linear", "log"):
        x, y = spectral(same, scale)
        assert trapezoid(y, x) == pytest.approx(0.95)


def test_eigenvalues_and_the_learning_rate(figures):
    figure, caption = figures["eigenvalues"]
    (ax,) = figure.axes
    for line, m in zip(lines(ax, "eigenvalues"), REPORT.matrices, strict=True):
        assert np.allclose(line.get_ydata(), m.top.values)
    low = np.array(REPORT.matrices[0].bottom.values)
    assert np.allclose(lines(ax, "negative")[0].get_ydata(), -low[low < 0])
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert "2 / 0.1 = 20" in caption


def test_overlaps(figures):
    figure, caption = figures["overlap_hessian_ggn"]
    (overlap,) = REPORT.overlaps
    assert np.array_equal(figure.axes[0].images[0].get_array(), overlap.squares)
    assert f"{overlap.subspace:.1%}" in caption


def test_layers(figures):
    ax = figures["layers_ggn"][0].axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(PARAMETERS)
    traces = np.array([la.trace.value for la in REPORT.matrices[1].layers])
    assert np.allclose(ax.images[0].get_array()[:, 0], traces / traces.max())


def test_many_layers():
    """The largest are drawn, in the order of the parameters."""
    m = REPORT.matrices[0]
    traces = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    layers = tuple(
        replace(m.layers[0], name=f"{i}.weight", trace=Number(float(trace), 0.1))
        for i, trace in enumerate(traces)
    )
    few = replace(REPORT, matrices=(replace(m, layers=layers),))
    figure, caption = drawn([_figures._layers], few)["layers_hessian"]
    shown = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert shown == [f"{i}.weight" for i in np.flatnonzero(traces > 40)]
    assert "The 60 of 100 with the largest traces." in caption
    assert figure.get_size_inches()[1] < 12


def test_blocks_share_one_scale(figures):
    figure, caption = figures["blocks"]
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == list(PARAMETERS)
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    heights = [line.get_ydata() - (3 - row) for row, line in enumerate(curves)]
    assert max(map(np.max, heights)) == pytest.approx(0.9)
    for height, block in zip(heights, REPORT.blocks.blocks, strict=True):
        per_decade = np.log(10) * block.curve.grid * block.curve.density
        assert np.allclose(height / height.max(), per_decade / per_decade.max())
    distances = figures["block_distances"][0].axes[0].images[0].get_array()
    assert np.array_equal(distances, REPORT.blocks.distances)
    assert f"{REPORT.blocks.mean_distance:.3f}" in caption


def test_matrices(figures):
    ax = figures["matrix_hessian"][0].axes[0]
    A = REPORT.matrices[0].dense
    assert np.allclose(10.0 ** ax.images[0].get_array(), np.abs(A))
    assert [line.get_ydata()[0] for line in ax.lines[::2]] == [59.5, 69.5, 109.5]


def test_equal_reports_give_equal_files(tmp_path):
    few = replace(REPORT, matrices=REPORT.matrices[1:], overlaps=(), baseline=None)
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pictures = _figures.write_figures(few, tmp_path / name)
        written.append([path.read_bytes() for p in pictures for path in p.paths])
    assert written[0] == written[1]


def test_all_of_them_can_be_read(figures, compared):
    for name, (figure, caption) in figures.items():
        assert_legible(figure, name)
        assert caption.endswith((".", ")."))
    for name, found in compared[1].items():
        for kind, (figure, _) in found.items():
            assert_legible(figure, f"{name} {kind}")


# -- comparisons -------------------------------------------------------------------


def test_which_figures_a_comparison_has(compared):
    kinds = ("density", "eigenvalues", "layers", "overlap")
    assert list(compared[1]["ggn"]) == [f"{kind}_ggn" for kind in kinds]


def test_ratios_of_layers(compared):
    comparison, found = compared
    pair = comparison.pairs[0]
    left, right = found["hessian"]["layers_hessian"][0].axes
    points = {"trace": [], "top eigenvalue": []}
    for line in left.lines:
        if len(line.get_xdata()) == 1:
            kind = "trace" if line.get_marker() == "v" else "top eigenvalue"
            points[kind].append((line.get_xdata()[0], line.get_mfc() != "white"))
    for kind, place in (("trace", 0), ("top eigenvalue", 1)):
        changes = [layer.changes[place] for layer in pair.layers]
        ratios = [np.log2(c.second.value / c.first.value) for c in changes]
        assert np.allclose([x for x, _ in points[kind]], ratios)
        assert [full for _, full in points[kind]] == [c.significant for c in changes]
    bars = [patch.get_width() for patch in right.patches]
    assert np.allclose(bars, [layer.distance.value for layer in pair.layers])
    names = [t.get_text() for t in left.get_yticklabels()]
    assert names == [layer.name for layer in pair.layers]


def test_changes_of_sign_have_no_ratio(compared):
    pair = compared[0].pairs[1]
    layer = pair.layers[0]
    flipped = replace(layer.changes[0], second=Number(-1.0, 0.1))
    layers = (replace(layer, changes=(flipped, *layer.changes[1:])), *pair.layers[1:])
    found = drawn(_comparison_figures.FIGURES, replace(pair, layers=layers))
    (ax,) = found["layers_ggn"][0].axes  # no block has a density
    assert np.isnan([line.get_xdata()[0] for line in ax.lines[:1]]).all()
    assert_legible(found["layers_ggn"][0], "layers")
