"""The report of an evaluation: one HTML page with everything in it."""

import json
import os
from typing import Dict, List, Optional

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..files import write_atomically
from ..painting.metrics import KINDS, METRICS
from .recorder import JSON_NAME

__all__ = ["write_report"]


def write_report(folder: str) -> str:
    """
    Write `report.html` from what :class:`ReportRecorder` left.

    Args:
        folder: the output folder of the evaluation.

    Returns:
        the path of the page.

    Raises:
        OSError: there is nothing to read, or the page cannot be written.
    """
    with open(os.path.join(folder, JSON_NAME), encoding="utf-8") as f:
        report = json.load(f)
    environment = Environment(
        loader=PackageLoader("oanet_d2.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, signed=_signed, pair=_pair)
    page = environment.get_template("report.html").render(
        report=report, metrics=METRICS, classes=class_rows(report), kinds=kind_columns(report)
    )
    path = os.path.join(folder, "report.html")
    write_atomically(path, page.strip() + "\n")
    return path


def class_rows(report: Dict) -> List[Dict]:
    """
    The classes with their "gain" in PQ from the first of the compared orders to the second, None where
    either has no PQ. The greatest gain first.
    """
    before, after = report["compared"]
    rows = []
    for c in report["classes"]:
        known = c["pq"][before] is not None and c["pq"][after] is not None
        rows.append({**c, "gain": c["pq"][after] - c["pq"][before] if known else None})
    return sorted(rows, key=lambda r: (r["gain"] is None, -(r["gain"] or 0), r["name"]))


def kind_columns(report: Dict) -> List[Dict]:
    """
    All overlaps, and those of each kind that occurs: "kind", "number", and "right", order -> number.
    """
    columns = []
    for kind in ("all", *KINDS):
        rows = [x for x in report["overlaps"] if kind in ("all", x["kind"])]
        if rows:
            right = {o: sum(x["right"][o] for x in rows) for o in report["orderings"]}
            number = sum(x["number"] for x in rows)
            columns.append({"kind": kind, "number": number, "right": right})
    return columns


def _pair(row: Dict) -> str:
    of_behind = {"same class": "another ", "one matches nothing": "a false "}
    return f"{row['front']} over {of_behind.get(row['kind'], '')}{row['behind']}"


def _number(value: Optional[float], digits: int = 1) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}"


def _signed(value: Optional[float]) -> str:
    if value is None or round(value, 1) == 0:
        return _number(value and 0.0)
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
