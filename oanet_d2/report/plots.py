"""
The report's plot, as SVG to stand in a page: colors are CSS variables, so that it follows the
page's light or dark scheme, and text stays text.
"""

import io
import re
import warnings
from typing import Any, Dict, List
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

__all__ = ["ClassQuality", "class_quality_plot"]

# "name", and PQ in percent: "score", "ranked", "oracle" (or None)
ClassQuality = Dict[str, Any]

SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", SVG[1:-1])
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
POINTS_PER_PIXEL = 0.75
ROW = 26  # pixels
# What no XML document, and so no SVG, may hold, not even escaped.
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Colors that stand for variables of the page's style sheet.
VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--score)",
    "#050505": "var(--ranked)",
    "#060606": "var(--worse)",
    "#070707": "var(--surface)",
}
INK, MUTED, LINE, SCORE, RANKED, WORSE, SURFACE = VARIABLES


def class_quality_plot(classes: List[ClassQuality], name: str, width: int) -> Markup:
    """
    A row for every class: PQ by score, an arrow to PQ by the ranked order, a tick for the oracle.

    Args:
        classes: at least one, from top to bottom.
        name: begins the ids within the picture, which must be unique in a page.
        width: pixels.

    Returns:
        an <svg>; the same for the same arguments.
    """
    settings: Dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 13 * POINTS_PER_PIXEL,
        "text.parse_math": False,
        "axes.unicode_minus": True,
    }
    height = ROW * len(classes) + 56
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 96, height / 96), dpi=96)
        left = min(
            0.42 * width, 20 + 7.5 * max((len(_short(c["name"])) for c in classes), default=0)
        )
        axes = figure.add_axes(
            (left / width, 30 / height, 1 - (left + 14) / width, 1 - 56 / height), facecolor="none"
        )
        _draw(axes, classes)
        with io.StringIO() as out, warnings.catch_warnings():
            # text is drawn by the browser, with its fonts
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
            svg = out.getvalue()
    return Markup(_for_page(svg, name, height))


def _draw(axes, classes: List[ClassQuality]):
    for y, c in enumerate(classes):
        # as the table says: what it shows as 0.0 is no loss
        color = WORSE if round(c["ranked"] - c["score"], 1) < 0 else RANKED
        axes.plot([c["score"], c["ranked"]], [y, y], color=color, linewidth=2.5, zorder=2)
        if c["oracle"] is not None:
            axes.plot(
                c["oracle"], y, "|", color=INK, markersize=11, markeredgewidth=1.6, zorder=2.5
            )
        axes.plot(
            c["score"],
            y,
            "o",
            color=SURFACE,
            markeredgecolor=SCORE,
            markeredgewidth=1.8,
            markersize=6.5,
            zorder=3,
        )
        axes.plot(c["ranked"], y, "o", color=color, markersize=7.5, zorder=4)
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_yticks(range(len(classes)), [_short(c["name"]) for c in classes], color=INK)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.tick_params(axis="x", colors=MUTED, top=True, labeltop=True, length=0)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(axis="x", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _short(name: str) -> str:
    name = NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", name)
    return name if len(name) <= 22 else name[:21] + "…"


def _for_page(svg: str, name: str, height: int) -> str:
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # a style sheet in a page's <svg> holds for the whole page
            if child.tag in (SVG + "metadata", SVG + "style"):
                parent.remove(child)
        for key, value in parent.attrib.items():
            parent.set(key, _for_page_attribute(key, value, name))
    width = float(root.attrib["viewBox"].split()[2])
    root.set("width", f"{width / POINTS_PER_PIXEL:.0f}")
    root.set("height", f"{height}")
    # for those who see: the table beside it says the same
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return ElementTree.tostring(root, encoding="unicode")


def _for_page_attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        for color, variable in VARIABLES.items():
            value = value.replace(color, variable)
        value = re.sub(r"font-family: [^;]*", "font-family: inherit", value)
        return re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
    return re.sub(r"^(url\()?#", rf"\g<1>#{name}-", value)
