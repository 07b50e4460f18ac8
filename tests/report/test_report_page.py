"""The page: what it says, that it escapes, and how a browser shows it."""

import io
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

from browser import browser, find
from report_samples import sample

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from curvlinops.report._comparison import compare
from curvlinops.report._contents import Number, Verdict
from curvlinops.report._figures import write_figures
from curvlinops.report._files import load, save
from curvlinops.report._html import with_error, write_comparison_page, write_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def page(folder):
    return write_page(sample(), folder).read_text()


def plain(text):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def test_the_page_says_what_the_report_says(page):
    report, text = sample(), plain(page)
    for m in report.matrices:
        assert m.class_name in text
        assert all(f"{value:.6g}" in text for value in m.top.values)
        assert with_error(m.trace) in text and with_error(m.negative_mass) in text
        for layer in m.layers:
            assert with_error(layer.trace) in text
    for verdict in report.verdicts:
        row = f"{verdict.status} {verdict.rule}"
        assert row in text and verdict.text in text
        assert f"{verdict.number:.4g} {verdict.bound:.4g}" in text
    assert "1437 data in 3 batches" in text and "A note." in text
    for value in ("ab" * 32, "cd" * 32, "curvlinops report", "2468", "torch 2.13"):
        assert value in text
    # What is worst comes first.
    assert re.search(r"Verdicts\s+FAIL", text)
    assert text.index("Ritz residuals") < text.index("Products are equal.")


def test_shares_are_of_the_whole(page):
    m = sample().matrices[0]
    whole = sum(layer.trace.value for layer in m.layers)
    text = plain(page)
    for layer in m.layers:
        assert f" {layer.trace.value / whole:.1%} " in text


def test_every_figure_is_in_the_page_with_its_caption(page, folder):
    pictures = write_figures(sample(), folder)
    assert len(re.findall(r"<img ", page)) == len(pictures) == 13
    sources = re.findall(r'<img src="(data:image/[^;]*;base64,)', page)
    assert len(sources) == len(pictures)
    for picture in pictures:
        assert f'id="{picture.name}"' in page
        assert picture.caption in unescape(plain(page))


def test_nothing_is_outside_the_page(page):
    without_data = re.sub(r'"data:[^"]*"', '""', page)
    assert "//" not in without_data and "<script" not in without_data
    links = re.findall(r'(?:src|href)="([^"]*)"', without_data)
    assert all(not link or link.startswith("#") for link in links)
    targets = {link[1:] for link in links if link}
    assert targets and targets <= set(re.findall(r'id="([^"]*)"', without_data))


def test_a_page_is_rebuilt_from_the_files(page, tmp_path):
    save(sample(), tmp_path)
    assert write_page(load(tmp_path), tmp_path).read_text() == page


NASTY = "<script>alert('x')</script>\"&"


def test_texts_of_others_are_escaped(tmp_path):
    report = sample()
    m = report.matrices[0]
    layers = tuple(replace(layer, name=NASTY + layer.name) for layer in m.layers)
    blocks = tuple(
        replace(b, name=f"$_{{{NASTY}$\\{i}")
        for i, b in enumerate(report.blocks.blocks)
    )
    sizes = {f"{NASTY}{name}": n for name, n in report.problem.parameters.items()}
    report = replace(
        report,
        problem=replace(report.problem, name=NASTY, model=NASTY, parameters=sizes),
        matrices=(replace(m, name=NASTY, layers=layers, failures=(NASTY,)),),
        overlaps=(),
        blocks=replace(report.blocks, blocks=blocks),
        verdicts=(Verdict(NASTY, NASTY, "WARN", float("nan"), 0.0, NASTY),),
        notes=(NASTY,),
        provenance=replace(report.provenance, command=NASTY),
    )
    page = write_page(report, tmp_path).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 8
    assert "unknown" in page  # a number that is none
    names = [path.name for path in (tmp_path / "figures").iterdir()]
    assert all(re.fullmatch(r"[\w-]+\.(png|svg)", name) for name in names)


def test_a_report_with_little_in_it(tmp_path):
    report = sample()
    empty = {"top": None, "bottom": None, "trace": None, "density": None}
    empty |= {"frobenius_norm": None, "effective_dimension": None, "dense": None}
    empty |= {"negative_mass": None, "condition_number": None, "symmetry": None}
    empty |= {"dead": None, "checks": (), "layers": ()}
    matrices = tuple(replace(m, **empty) for m in report.matrices)
    report = replace(report, matrices=matrices, overlaps=(), blocks=None)
    report = replace(report, baseline=None, verdicts=(), notes=())
    page = write_page(report, tmp_path).read_text()
    assert "<img" not in page and "No rule applies." in page


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number(-0.123456, 0.00123), "-0.1235 ± 0.0012"),
        (Number(1.5e-9, 2e-10), "1.5e-09 ± 2e-10"),
        (Number(0.0, 0.5), "0.00 ± 0.50"),
        (Number(4.87e-24, 2e-16), "0 ± 2e-16"),
        (Number(1.031951, 2.3e-15), "1.03195"),
        (Number(float("nan"), float("nan")), "unknown ± unknown"),
        (Number(99.96, 0.0, converged=False), "99.96 (not converged)"),
        (None, "–"),
    ],
)
def test_numbers_and_their_errors(number, text):
    assert with_error(number) == text


# -- comparisons -------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    return compare(sample(), sample(3), ("runs/<10>", "runs/20"))


@pytest.fixture(scope="module")
def comparison_page(comparison, folder):
    return write_comparison_page(comparison, folder).read_text()


def test_the_page_says_what_has_changed(comparison, comparison_page):
    text = unescape(plain(comparison_page))
    assert "runs/&lt;10&gt;, loss 0.074" in comparison_page
    assert all(note in text for note in comparison.notes)
    for pair in comparison.pairs:
        assert f"{pair.overlap.subspace:.1%}" in text
        assert f"{pair.distance.value:.3f}" in text
        for change in pair.changes():
            answer = "yes" if change.significant else "no"
            both = f"{with_error(change.first)} {with_error(change.second)}"
            rest = f"{change.difference:+.3g} {change.margin:.2g} {answer}"
            assert f"{change.name} {both} {rest}" in text
    moved = [layer.name for layer in comparison.pairs[0].layers]
    places = [text.index(f" {name} ") for name in moved]
    assert places == sorted(places)


# -- in a browser ------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    find() is None, reason="no Chromium is installed (Debian: apt install chromium)"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def pixels(screenshot):
    from matplotlib.image import imread

    return imread(io.BytesIO(screenshot), format="png")[:, :, :3]


def contrast(colors):
    """Return the contrast ratio of two colours, as WCAG 2 defines it."""

    def light(color):
        code = np.array([int(n) for n in re.findall(r"\d+", color)[:3]]) / 255
        parts = np.where(code > 0.04045, ((code + 0.055) / 1.055) ** 2.4, code / 12.92)
        return float(parts @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(light, colors))
    return (high + 0.05) / (low + 0.05)


@needs_browser
@pytest.mark.parametrize("width", [400, 1300])
def test_in_a_browser(tab, folder, page, width):
    seen = tab.visit(folder / "report.html", width, pdf=True)
    assert seen.fetched == [] and seen.complaints == []
    answers = seen.answers
    assert answers["overflow"] <= 0
    assert answers["colors"][1] == "rgb(255, 255, 255)"
    assert contrast(answers["colors"]) > 7
    assert len(answers["images"]) == 13
    picture = pixels(seen.screenshot)
    for image in answers["images"]:
        assert image["decoded"] and image["natural"] > 0, image
        left, top, across, down = (round(x) for x in image["box"])
        assert left >= 0 and left + across <= width and across > 250, image
        part = picture[top : top + down, left : left + across]
        # White, axes and curves: something is drawn, in all four quarters.
        for rows in np.array_split(part, 2):
            for quarter in np.array_split(rows, 2, axis=1):
                assert (quarter.min(-1) < 0.6).mean() > 1e-3, image
    assert "Provenance" in answers["text"]
    assert seen.pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", seen.pdf)) >= 3
    assert len(seen.pdf) > 100_000


@needs_browser
@pytest.mark.parametrize("width", [400, 1300])
def test_a_comparison_in_a_browser(tab, folder, comparison_page, width):
    seen = tab.visit(folder / "comparison.html", width)
    assert seen.fetched == [] and seen.complaints == []
    assert seen.answers["overflow"] <= 0
    images = seen.answers["images"]
    assert len(images) == 8 and all(image["decoded"] for image in images)


@needs_browser
def test_what_is_wrong_with_a_page_is_seen(tab, tmp_path):
    path = tmp_path / "wrong.html"
    path.write_text(
        "<body style='width: 900px'><script>console.error('no')</script>"
        "<img alt='lost' src='https://example.org/lost.png'>"
        "<img alt='broken' src='data:image/png;base64,AAAA'></body>"
    )
    seen = tab.visit(path, 400)
    assert seen.fetched == ["https://example.org/lost.png"]
    assert any("no" in complaint for complaint in seen.complaints)
    assert [image["decoded"] for image in seen.answers["images"]] == [False, False]
    assert seen.answers["overflow"] > 0
    assert contrast(["rgb(119, 119, 119)", "rgb(255, 255, 255)"]) < 7
