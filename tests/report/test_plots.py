import re
from xml.etree import ElementTree

import pytest

from oanet_d2.report.plots import VARIABLES, class_quality_plot

SVG = "{http://www.w3.org/2000/svg}"
CLASSES = [
    {"name": "tie", "score": 10.0, "ranked": 60.0, "oracle": 80.0},
    {"name": "sky", "score": 50.0, "ranked": 50.0, "oracle": None},
    {"name": "person", "score": 70.0, "ranked": 40.0, "oracle": 90.0},
]


def texts(root):
    return ["".join(t.itertext()) for t in root.iter(SVG + "text")]


def test_every_class_has_a_row():
    root = ElementTree.fromstring(class_quality_plot(CLASSES, "wide", 620))
    found = [t for t in texts(root) if not t.isdigit()]
    assert found == ["tie", "sky", "person"]
    y = [float(t.get("y")) for t in root.iter(SVG + "text") if not "".join(t.itertext()).isdigit()]
    assert y == sorted(y) and len(set(y)) == 3  # from top to bottom
    assert root.get("width") == "620"


def test_points_are_where_the_numbers_are():
    """Markers' x against that of the axis' own numbers."""
    root = ElementTree.fromstring(class_quality_plot(CLASSES, "wide", 620))
    at = {}
    for text in root.iter(SVG + "text"):
        label = "".join(text.itertext())
        if label.isdigit():
            at[int(label)] = float(text.get("x"))
    uses = [(u.get("style"), float(u.get("x"))) for u in root.iter(SVG + "use")]

    def marked(color):
        return sorted(
            round((x - at[0]) / (at[100] - at[0]) * 100, 3) for style, x in uses if color in style
        )

    assert marked("fill: var(--ranked)") == [50, 60]
    assert marked("fill: var(--worse)") == [40]
    assert marked("stroke: var(--score)") == [10, 50, 70]
    assert marked("stroke: var(--ink)") == [80, 90]


def test_it_fits_into_a_page():
    plots = {name: class_quality_plot(CLASSES, name, w) for name, w in (("a", 620), ("b", 300))}
    ids = re.findall(r'\bid="([^"]*)"', plots["a"] + plots["b"])
    assert len(ids) == len(set(ids)) > 20
    for svg in plots.values():
        root = ElementTree.fromstring(svg)
        own = {x.get("id") for x in root.iter()}
        used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
        assert used and all(a + b in own for a, b in used)
        assert svg.startswith("<svg") and "<style" not in svg and "<metadata" not in svg
        # no color but the page's own
        assert not any(color in svg for color in VARIABLES) and not re.search(
            r"#[0-9a-f]{6}\b", svg
        )
        assert "DejaVu" not in svg


def test_the_same_again():
    assert class_quality_plot(CLASSES, "a", 300) == class_quality_plot(CLASSES, "a", 300)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a$b$^_", "$\\frac{", "&amp;", "雨", ""]
)
def test_names_are_text(name):
    (first, *_) = CLASSES
    root = ElementTree.fromstring(class_quality_plot([{**first, "name": name}], "a", 300))
    shown = name if len(name) <= 22 else name[:21] + "…"
    assert shown in [*texts(root), ""]
    assert not list(root.iter(SVG + "script"))


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\ufffe"])
def test_what_no_svg_may_hold_is_replaced(character):
    named = [{**CLASSES[0], "name": f"a{character}b"}]
    root = ElementTree.fromstring(class_quality_plot(named, "a", 300))
    assert [t for t in texts(root) if not t.isdigit()] == ["a\N{REPLACEMENT CHARACTER}b"]
