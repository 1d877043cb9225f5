"""
The report itself: one HTML page with everything in it.
"""

import base64
import hashlib
import os
from importlib import resources
from typing import Dict, List

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..evaluation.orderings import METRICS
from ..evaluation.report_data import FOLDER, SECTIONS
from ..whole_files import whole_file
from .data import load_report
from .pictures import case_pictures
from .plots import class_quality_plot
from .tables import case_pairs, class_rows, kind_rows, order_rows, pair_rows, summary

__all__ = ["PAGE_NAME", "render", "write_report"]

PAGE_NAME = "report.html"
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
PLOTTED_CLASSES = 40
PAIRS_AT_FIRST = 15
PAIRS_IN_CASE = 5
# Widths in pixels that the plot is drawn in: for a phone and for everything wider.
PLOT_WIDTHS = {"narrow": 300, "wide": 620}
ORDER_NAMES = {
    "score": "by detection score, as Panoptic FPN",
    "srm_mean": "by the mean ranking score, the paper's Eq. 3",
    "srm_overlap": "by who wins inside each overlap on the score map",
    "srm_pairs": "by a learned comparison of every two that overlap",
    "oracle": "by the ground truth: the most that an order can reach",
}


def write_report(folder: str) -> str:
    """
    Write the report of the evaluation in `folder`.

    Returns:
        the path of the page; one that was there is replaced when the new one is whole.

    Raises:
        ReportError: what the evaluation left is missing, broken or of another version.
        OSError: the page cannot be written.
    """
    page = render(folder)
    path = os.path.join(folder, PAGE_NAME)
    with whole_file(path) as f:
        f.write(page)
    return path


def render(folder: str) -> str:
    """
    Returns:
        the page; the same for the same evaluation.
    """
    report = load_report(folder)
    environment = Environment(
        loader=PackageLoader("oanet_d2.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, signed=_signed, percent=_percent)
    cases = _cases(folder, report)
    classes = class_rows(report)
    plotted = [c for c in classes if c["gain"] is not None]
    if len(plotted) > PLOTTED_CLASSES:
        least = sorted((abs(c["gain"]) for c in plotted), reverse=True)[PLOTTED_CLASSES - 1]
        plotted = [c for c in plotted if abs(c["gain"]) >= least][:PLOTTED_CLASSES]
    pairs = pair_rows(report, false_positives=False)
    style, script = (Markup(_file(name)) for name in ("style.css", "script.js"))
    page = environment.get_template("report.html").render(
        report=report,
        summary=summary(report),
        metrics=METRICS,
        order_names=ORDER_NAMES,
        orders=order_rows(report),
        classes=classes,
        plotted=plotted,
        plots={n: class_quality_plot(plotted, n, w) for n, w in PLOT_WIDTHS.items() if plotted},
        kinds=kind_rows(report),
        pairs=pairs[:PAIRS_AT_FIRST],
        more_pairs=pairs[PAIRS_AT_FIRST:],
        false_positives=pair_rows(report, false_positives=True),
        cases=cases,
        sections={s: sum(c["section"] == s for c in cases) for s in SECTIONS},
        case_classes=_case_classes(report, cases),
        data_folder=FOLDER,
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.strip() + "\n"


def _cases(folder: str, report: Dict) -> List[Dict]:
    classes = {(c["isthing"], c["category_id"]): c for c in report["classes"]}
    cases = []
    for case in report["cases"]:
        pairs = case_pairs(report, case)
        cases.append(
            {
                **{k: case[k] for k in ("section", "file_name", "width", "height", "orders")},
                "classes": case["classes"],
                "pixels": case["pixels"],
                "share": 100 * case["pixels"] / (case["width"] * case["height"]),
                "pairs": pairs[:PAIRS_IN_CASE],
                "more_pairs": len(pairs[PAIRS_IN_CASE:]),
                **case_pictures(folder, case, classes),
            }
        )
    return cases


def _case_classes(report: Dict, cases: List[Dict]) -> List[Dict]:
    found = []
    for c in report["classes"]:
        n = sum(c["isthing"] and c["category_id"] in case["classes"] for case in cases)
        if n:
            found.append({"id": c["category_id"], "name": c["name"], "cases": n})
    return sorted(found, key=lambda c: (c["name"], c["id"]))


def _file(name: str) -> str:
    return (resources.files("oanet_d2.report") / "template" / name).read_text(encoding="utf-8")


def _number(value, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def _signed(value, digits: int = 1) -> str:
    if value is None:
        return NONE
    rounded = round(value, digits) + 0.0  # not -0.0
    return f"{rounded:+.{digits}f}".replace("-", MINUS) if rounded else f"{0:.{digits}f}"


def _percent(part, whole) -> str:
    return f"{100 * part / whole:.0f}" if whole else NONE
