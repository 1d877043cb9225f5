"""
Reads what an evaluation left for the report (:mod:`oanet_d2.evaluation.report_data`), and refuses
everything else.
"""

import json
import math
import os
from typing import Any, Dict, List

from ..evaluation.orderings import METRICS
from ..evaluation.pair_accuracy import KINDS
from ..evaluation.report_data import (
    FILE_NAME,
    FOLDER,
    FORMAT,
    JSON_NAME,
    SECTIONS,
    content_name,
)

__all__ = ["ReportError", "evaluation_folders", "load_report", "read_picture"]

HOW = (
    "Evaluate with TEST.ORDERS that hold 'score' and MODEL.OANET.ORDER: "
    "train_net.py --eval-only MODEL.WEIGHTS ... OUTPUT_DIR ..."
)


class ReportError(ValueError):
    """What an evaluation left is missing, broken or of another version."""


class OneOf(tuple):
    """In a schema: one of these values."""


class MapOf(dict):
    """In a schema, with the one key `str`: any keys, all values alike."""


NUMBER = (int, float)
COUNTS = MapOf({str: {"iou": NUMBER, "tp": int, "fp": int, "fn": int}})
PAIR = {"front": int, "behind": int, "kind": OneOf(KINDS)}
MAP = {
    "file": FILE_NAME,
    "segments_info": [{"id": int, "category_id": int, "isthing": bool}],
}
SCHEMA = {
    "format": OneOf([FORMAT]),
    "dataset": str,
    "images": int,
    "seconds": NUMBER,
    "orderings": MapOf({str: dict.fromkeys(METRICS, NUMBER)}),
    "compared": [str],
    "outcomes": {"better": int, "worse": int, "same": int},
    "clear_share": NUMBER,
    "classes": [
        {"name": str, "isthing": bool, "category_id": int, "color": [int], "counts": COUNTS}
    ],
    "pairs": [{**PAIR, "overlaps": int, "right": MapOf({str: int})}],
    "cases": [
        {
            "section": OneOf(SECTIONS),
            "image_id": (int, str),
            "file_name": str,
            "width": int,
            "height": int,
            "pixels": int,
            "orders": [str],
            "classes": [int],
            "pairs": [{**PAIR, "pixels": int, "right": MapOf({str: bool})}],
            "photo": FILE_NAME,
            "ground_truth": MAP,
            "before": MAP,
            "after": MAP,
        }
    ],
}


def evaluation_folders(output_dir: str) -> List[str]:
    """
    The folders of an output folder that an evaluation left something for a report in: itself, or,
    with several test datasets, one for each.

    Raises:
        ReportError: there is none.
    """
    if not os.path.isdir(output_dir):
        raise ReportError(f"There is no folder {output_dir}.")
    folders = [output_dir, *sorted(e.path for e in os.scandir(output_dir) if e.is_dir())]
    found = [f for f in folders if os.path.isfile(os.path.join(f, FOLDER, JSON_NAME))]
    if not found:
        raise ReportError(f"There is no {os.path.join(output_dir, FOLDER, JSON_NAME)}. {HOW}")
    return found[:1] if found[0] == output_dir else found


def load_report(folder: str) -> Dict:
    """
    Read and check `evaluation.json`.

    Args:
        folder: one of :func:`evaluation_folders`.

    Returns:
        its content, see :mod:`oanet_d2.evaluation.report_data`.

    Raises:
        ReportError: it is missing, broken, or was written by another version or program.
    """
    path = os.path.join(folder, FOLDER, JSON_NAME)
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f, parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ReportError(f"There is no {path}. {HOW}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not a whole JSON file: {error}. {HOW}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ReportError(f"{path} has the format {found!r}; this version reads {FORMAT!r}. {HOW}")
    try:
        _check(content, SCHEMA, "")
        _check_references(content)
    except ReportError as error:
        raise ReportError(f"{path}: {error} {HOW}") from error
    return content


def read_picture(folder: str, name: str) -> bytes:
    """
    Read one of the files that `evaluation.json` names.

    Raises:
        ReportError: it is missing or is not what the evaluation wrote.
    """
    path = os.path.join(folder, FOLDER, name)
    if os.path.exists(path) and not os.path.isfile(path):  # a named pipe would be waited for forever
        raise ReportError(f"Cannot read {path}: it is not a file. {HOW}")
    try:
        with open(path, "rb") as f:
            content = f.read()
    except OSError as error:
        raise ReportError(f"Cannot read {path}: {error.strerror}. {HOW}") from error
    if content_name(content, name.rsplit(".", 1)[1]) != name:
        raise ReportError(f"{path} is not what the evaluation wrote. {HOW}")
    return content


def _refuse_constant(name: str):
    raise ValueError(f"it holds {name}")


def _check(value: Any, schema: Any, where: str):
    """
    Args:
        schema: a type or a tuple of types; [schema of every element]; {key: schema}, further keys
            are ignored; a pattern; MapOf; OneOf.

    Raises:
        ReportError: `value` is something else.
    """
    if isinstance(schema, OneOf):
        _expect(isinstance(value, str) and value in schema, value, f"one of {list(schema)}", where)
    elif isinstance(schema, MapOf):
        _expect(isinstance(value, dict), value, "an object", where)
        for key, x in value.items():
            _check(x, schema[str], f"{where}[{key!r}]")
    elif isinstance(schema, dict):
        _expect(isinstance(value, dict), value, "an object", where)
        for key, of_key in schema.items():
            _expect(key in value, value, f"an object with {key!r}", where)
            _check(value[key], of_key, f"{where}.{key}" if where else key)
    elif isinstance(schema, list):
        _expect(isinstance(value, list), value, "a list", where)
        for i, x in enumerate(value):
            _check(x, schema[0], f"{where}[{i}]")
    elif hasattr(schema, "fullmatch"):
        fits = isinstance(value, str) and schema.fullmatch(value)
        _expect(fits, value, "the name of a picture", where)
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        # bool is a subclass of int
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        names = " or ".join(t.__name__ for t in types)
        _expect(fits and _is_finite(value), value, names, where)


def _is_finite(value: Any) -> bool:
    # 1e999 is valid JSON; larger integers than these come from no evaluation, and overflow later
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**63


def _check_references(content: Dict):
    """
    Raises:
        ReportError: an order, a class or a size is named that is not there.
    """
    orders = set(content["orderings"])
    _expect(
        len(content["compared"]) == 2 and set(content["compared"]) <= orders,
        content["compared"],
        f"two of {sorted(orders)}",
        "compared",
    )
    things = {c["category_id"] for c in content["classes"] if c["isthing"]}
    stuff = {c["category_id"] for c in content["classes"] if not c["isthing"]}

    def has_orders(value: Dict, where: str):
        _expect(set(value) == orders, sorted(value), f"{sorted(orders)}", where)

    def has_things(pair: Dict, where: str):
        for key in ("front", "behind"):
            _expect(pair[key] in things, pair[key], f"one of {sorted(things)}", f"{where}.{key}")
        has_orders(pair["right"], f"{where}.right")

    for i, c in enumerate(content["classes"]):
        where = f"classes[{i}]"
        has_orders(c["counts"], f"{where}.counts")
        fits = len(c["color"]) == 3 and all(0 <= x <= 255 for x in c["color"])
        _expect(fits, c["color"], "three numbers from 0 to 255", f"{where}.color")
    for i, pair in enumerate(content["pairs"]):
        has_things(pair, f"pairs[{i}]")
    for i, case in enumerate(content["cases"]):
        where = f"cases[{i}]"
        for key in ("width", "height"):
            _expect(case[key] > 0, case[key], "more than 0", f"{where}.{key}")
        shown = len(case["orders"]) == 2 and set(case["orders"]) <= orders
        _expect(shown, case["orders"], f"two of {sorted(orders)}", f"{where}.orders")
        fits = set(case["classes"]) <= things
        _expect(fits, case["classes"], f"some of {sorted(things)}", f"{where}.classes")
        for j, pair in enumerate(case["pairs"]):
            has_things(pair, f"{where}.pairs[{j}]")
        for key in ("ground_truth", "before", "after"):
            for j, s in enumerate(case[key]["segments_info"]):
                known = things if s["isthing"] else stuff
                place = f"{where}.{key}.segments_info[{j}].category_id"
                _expect(
                    s["category_id"] in known, s["category_id"], f"one of {sorted(known)}", place
                )
                if s["isthing"] and key != "ground_truth":
                    _check(s.get("instance_id"), int, place.replace("category_id", "instance_id"))


def _expect(fits: Any, value: Any, what: str, where: str):
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ReportError(f"{where or 'it'} is {shown}; it must be {what}.")
