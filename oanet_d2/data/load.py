"""
Annotations of a dataset in the COCO panoptic format, as Detectron2's dataset dicts.

What is wrong goes to a `report` function. Training and evaluation pass :func:`stop`, which raises at
the first fatal problem; :mod:`check` collects all problems. So the code that follows the report of a
fatal problem runs in the checker only.
"""

import json
import os
import reprlib
from collections import defaultdict
from itertools import chain, product
from numbers import Integral
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import cv2
import numpy as np
from pycocotools import mask as mask_util

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..painting.arrays import Runs, runs
from ..painting.formats import rle_runs
from .images import decode, read_header

__all__ = ["CATEGORY", "FILES", "Report", "as_rle", "entries", "load_panoptic", "read_annotations"]
__all__ += ["read_file", "read_truth", "stop"]

# report(kind, where, detail, fatal=True): the kind of problem, the file and entry, what was found
# there. Training and evaluation refuse what is fatal; the detail says what becomes of the rest.
Report = Callable[..., None]


def stop(kind: str, where: str, detail: str, fatal: bool = True) -> None:
    """The `report` of training and evaluation: what is fatal raises a ValueError."""
    if fatal:
        check = "`oanet-d2 check` finds all that is wrong with a dataset."
        raise ValueError(f"{where}: {detail}. {check}")


# What a field must be: in words, and as a test. (A bool is an Integral, too.)
INTEGER = "a whole number", lambda x: isinstance(x, Integral) and not isinstance(x, bool)
LENGTH = "a whole number from 1 on", lambda x: INTEGER[1](x) and x > 0
ID = "a whole number or a string", lambda x: INTEGER[1](x) or isinstance(x, str)
TEXT = "a string that is not empty", lambda x: isinstance(x, str) and x != ""
LIST = "a list", lambda x: isinstance(x, list)
SHARE = "a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1
FLAG = "0 or 1", lambda x: isinstance(x, Integral) and x in (0, 1)
SEGMENT_ID = "1 to 16777215 (0 is void)", lambda x: INTEGER[1](x) and 0 < x < 256**3

FILES = {"image": "file_name", "PNG": "pan_seg_file_name"}  # of a dataset dict
FARTHEST = 10**6  # a coordinate of a polygon; pycocotools walks along its edges


def _is_coordinate(x: Any) -> bool:
    return isinstance(x, (int, float)) and abs(x) < FARTHEST  # False for NaN


Fields = Dict[str, Tuple[str, Callable[[Any], bool]]]
CATEGORY_NAME: Fields = {"id": INTEGER, "name": TEXT}
ISTHING = "1 for a thing or 0 for stuff (an instances JSON has no stuff)", FLAG[1]
CATEGORY: Fields = {**CATEGORY_NAME, "isthing": ISTHING}
IMAGE: Fields = {"id": ID, "file_name": TEXT, "height": LENGTH, "width": LENGTH}
ANNOTATION: Fields = {"image_id": ID, "file_name": TEXT, "segments_info": LIST}
SEGMENT: Fields = {"id": SEGMENT_ID, "category_id": INTEGER, "iscrowd": FLAG}
INSTANCE: Fields = {"image_id": ID, "category_id": INTEGER, "iscrowd": FLAG}
INSTANCE["segmentation"] = "polygons or an RLE", bool
RESULT: Fields = {"image_id": ID, "category_id": INTEGER, "score": SHARE}
RESULT["segmentation"] = INSTANCE["segmentation"]


def entries(
    items: List, fields: Fields, where: str, report: Report
) -> Iterator[Tuple[str, Dict, bool]]:
    """
    Report fields that are not what they must be, and ids that an earlier entry has.

    Args:
        items: the list of a JSON that `where` names.
        fields: what every entry must have. "iscrowd" may be missing.

    Yields:
        where an entry is, the entry, and whether it can be used. If not, the entry holds only those
        fields that are what they must be.
    """
    seen = set()
    for i, item in enumerate(items):
        at = f"{where}[{i}]"
        if not isinstance(item, dict):
            report("malformed entry", at, f"it is {reprlib.repr(item)}, not an object")
            continue
        if isinstance(item.get("file_name"), str):
            at += f" ({item['file_name']})"
        required = [k for k in fields if k in item or k != "iscrowd"]
        wrong = [k for k in required if k not in item or not fields[k][1](item[k])]
        for key in wrong:
            found = f"is {reprlib.repr(item[key])}" if key in item else "is missing"
            report("malformed entry", at, f"{key!r} {found}; it must be {fields[key][0]}")
        if wrong:
            item = {k: item[k] for k in required if k not in wrong}
        if "id" in fields and "id" in item:
            if item["id"] in seen:
                report("duplicate id", at, f"an earlier entry has the id {item['id']!r}")
            seen.add(item["id"])
        yield at, item, not wrong


def read_annotations(path: str, report: Report = stop, takes_results: bool = False) -> Dict:
    """
    Read a JSON of one of COCO's formats.

    Args:
        takes_results: COCO's results, a list that is not empty, are taken, too.

    Returns:
        dict with the lists "images", "annotations" and "categories", or "results"; {} if it was
        reported that the file is missing or is something else.
    """
    try:
        with PathManager.open(path, "rb") as f:
            content = json.loads(f.read().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON in UTF-8: {error}"
        report("annotation file unusable", path, reason)
        return {}
    if takes_results and isinstance(content, list) and content:
        return {"results": content}
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            detail = f"it has no list {key!r}; it must have 'images', 'annotations', 'categories'"
            report("annotation file unusable", path, detail)
            return {}
    return content


def load_panoptic(
    image_root: str,
    panoptic_json: str,
    panoptic_root: str,
    instances_json: Optional[str],
    *,
    thing_ids: Dict[int, int],
    stuff_ids: Dict[int, int],
    image_name: Callable[[Dict], str] = lambda image: image["file_name"],
    report: Report = stop,
) -> List[Dict]:
    """
    Args:
        image_root, panoptic_json, panoptic_root, instances_json: see :func:`register_panoptic`.
        thing_ids, stuff_ids: category id -> contiguous id.
        image_name: the file name of an entry of "images".

    Returns:
        list[dict] in Detectron2's standard format: "file_name", "image_id", "height", "width",
        "pan_seg_file_name", "segments_info" (with contiguous "category_id", "isthing", "iscrowd")
        and, with an instances JSON, "annotations" as Detectron2's `load_coco_json` makes them. Those
        of results have a "score", too.

    Raises:
        ValueError: something is wrong. It names the file, the entry and what was found.
    """
    panoptic = read_annotations(panoptic_json, report)
    if not panoptic:
        return []
    dicts, annotated, pngs = [], set(), set()
    images = _by_id(panoptic, "images", IMAGE, panoptic_json, report)
    if len({isinstance(i, str) for i in images}) > 1:
        detail = f"some ids are numbers, others strings: {reprlib.repr([*images])}"
        report("image ids of two types", f"{panoptic_json}: images", detail)
    instances = None
    if instances_json is not None and thing_ids:
        instances = _instances(instances_json, panoptic, images, thing_ids, report)
    where = f"{panoptic_json}: annotations"
    for at, x, usable in entries(panoptic["annotations"], ANNOTATION, where, report):
        image_id, png = x.get("image_id"), x.get("file_name")
        image = images.get(image_id, {})
        segments = _segments(x.get("segments_info", []), at, thing_ids, stuff_ids, report)
        if "image_id" in x and image_id not in images:
            detail = f"it annotates the image {image_id!r}, which is not among the 'images'"
            report("annotation of an unknown image", at, detail)
        elif image_id in annotated:
            detail = f"an earlier one annotates the image {image_id!r}, too"
            report("several annotations of one image", at, detail)
        elif png in pngs:
            report("several annotations with one PNG", at, f"an earlier one has {png!r}, too")
        elif usable and image.keys() >= IMAGE.keys():
            d = {
                "file_name": os.path.join(image_root, image_name(image)),
                "image_id": image_id,
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": os.path.join(panoptic_root, x["file_name"]),
                "segments_info": segments,
            }
            dicts.append(d if instances is None else {**d, "annotations": instances[image_id]})
        annotated.add(x.get("image_id", at))  # without one, it is nobody's
        pngs.add(x.get("file_name", at))
    for image_id in [i for i in images if i not in annotated]:
        detail = f"no annotation has the image_id {image_id!r}; it is left out"
        report("image without annotation", f"{panoptic_json}: images", detail, fatal=False)
    if not panoptic["annotations"]:
        report("no annotated image", panoptic_json, "'annotations' is empty")
    return dicts


def _by_id(content: Dict, key: str, fields: Fields, path: str, report: Report) -> Dict[Any, Dict]:
    found = entries(content[key], fields, f"{path}: {key}", report)
    return {x["id"]: x for _, x, _ in found if "id" in x}


def _segments(items: List, at: str, thing_ids: Dict, stuff_ids: Dict, report: Report) -> List[Dict]:
    segments = []
    for where, x, _ in entries(items, SEGMENT, f"{at} segments_info", report):
        category, iscrowd = x.get("category_id"), int(x.get("iscrowd", 0))
        isthing = category in thing_ids
        contiguous = (thing_ids if isthing else stuff_ids).get(category)
        if contiguous is None and category is not None:
            detail = f"the category {category} is not among the 'categories'"
            report("unknown category id", where, detail)
        elif iscrowd and not isthing:
            detail = f"'iscrowd' is 1, but the category {category} is stuff; it is taken as 0"
            report("stuff segment is a crowd", where, detail, fatal=False)
            iscrowd = 0
        segments.append({**x, "category_id": contiguous, "isthing": isthing, "iscrowd": iscrowd})
    return segments


def _instances(
    path: str, panoptic: Dict, images: Dict, thing_ids: Dict, report: Report
) -> Optional[Dict[Any, List[Dict]]]:
    """Image id -> annotations; None if it was reported that the file cannot be used."""
    content = read_annotations(path, report, takes_results=True)
    if not content:
        return None
    is_results = "results" in content
    if is_results:
        where, items, fields = path, content["results"], RESULT
    else:
        _compare_headers(content, path, panoptic, images, report)
        where, items, fields = f"{path}: annotations", content["annotations"], INSTANCE

    instances = defaultdict(list)
    for at, x, usable in entries(items, fields, where, report):
        image_id, category = x.get("image_id"), x.get("category_id")
        image = images.get(image_id, {})
        at += f" ({image['file_name']})" if "file_name" in image else ""
        if "image_id" in x and image_id not in images:
            detail = f"the panoptic JSON has no image {image_id!r}"
            report("instance of an unknown image", at, detail, fatal=is_results)
        if "category_id" in x and category not in thing_ids:
            detail = f"the category {category} is not a thing in the panoptic JSON"
            report("instance of no thing", at, detail)
        if not usable or not image.keys() >= IMAGE.keys():
            continue
        size = image["height"], image["width"]
        mask = _mask(x["segmentation"], *size, at, report)
        box = _box(mask, *size) if mask else None
        if box is None:
            detail = "its mask has no pixel in the image; the instance is left out"
            report("instance without a pixel", at, detail, fatal=False)
            continue
        instance = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "segmentation": mask}
        instance.update(category_id=thing_ids.get(category), iscrowd=int(x.get("iscrowd", 0)))
        if is_results:
            instance["score"] = x["score"]
        else:
            instance.update(_keypoints(x.get("keypoints"), at, report))
        instances[image_id].append(instance)
    of_all = [*chain.from_iterable(instances.values())]
    most = max((len(x.get("keypoints", ())) for x in of_all), default=0)
    for x in of_all if most else ():  # Detectron2 and COCO's evaluation want them in all or in none
        x.setdefault("keypoints", [0.0] * most)
    if items and not instances:
        detail = "none has a pixel in an image of the panoptic JSON (an image_id of '1' is not 1)"
        report("instances of no image", where, detail)
    elif all(x["iscrowd"] for x in of_all):
        report("no instance", where, "there is none but crowds, so none is learned", fatal=False)
    return instances


def _keypoints(points: Any, at: str, report: Report) -> Dict[str, List[float]]:
    """As Detectron2's `load_coco_json` gives them: in the centres of pixels. Nothing without any."""
    if not points:
        return {}
    if not isinstance(points, list) or len(points) % 3 or not all(map(_is_coordinate, points)):
        detail = f"'keypoints' is {reprlib.repr(points)}, not x, y, visibility, x, ...; it is left out"
        report("malformed keypoints", at, detail, fatal=False)
        return {}
    return {"keypoints": [v + 0.5 if i % 3 < 2 else v for i, v in enumerate(points)]}


def _compare_headers(content: Dict, path: str, panoptic: Dict, images: Dict, report: Report) -> None:
    for key, fields in (("categories", CATEGORY_NAME), ("images", IMAGE)):
        own = _by_id(content, key, fields, path, report)
        others = _by_id(panoptic, key, fields, "", lambda *args, **kwargs: None)
        for i, k in product(own.keys() & others.keys(), fields):
            ours, theirs = own[i].get(k), others[i].get(k)
            if ours != theirs and None not in (ours, theirs):
                detail = f"the {k!r} of id {i!r} is {ours!r}, there it is {theirs!r}"
                report(f"{key} contradict the panoptic JSON", f"{path}: {key}", detail, fatal=False)
    for i in [i for i in images if i not in own]:
        detail = f"the image {i!r} is missing; training takes it to have no instances"
        report("image only in the panoptic JSON", f"{path}: images", detail, fatal=False)


def _mask(mask: Any, height: int, width: int, at: str, report: Report) -> Any:
    """The segmentation as Detectron2's `load_coco_json` gives it; [] if it was reported."""
    kind, size = "malformed mask", [height, width]
    if isinstance(mask, list):
        for p in mask:
            if not isinstance(p, list) or not all(isinstance(v, (int, float)) for v in p):
                found = f"its segmentation holds {reprlib.repr(p)}"
                report(kind, at, f"{found}; a polygon is a list of numbers, x, y, x, y, ...")
                return []
        polygons = [p for p in mask if len(p) >= 6 and len(p) % 2 == 0]
        if len(polygons) < len(mask):
            report(kind, at, "a polygon is not of 6, 8, 10, ... numbers", fatal=False)
        if all(map(_is_coordinate, chain(*polygons))):
            return polygons
        report(kind, at, f"a polygon holds a number that is not between -{FARTHEST} and {FARTHEST}")
    elif not isinstance(mask, dict):
        report(kind, at, f"its segmentation is {reprlib.repr(mask)}; it must be polygons or an RLE")
    elif mask.get("size") != size:
        detail = f"its RLE is of [height, width] {mask.get('size')}, the image of {size}"
        report("RLE size differs from the image", at, detail)
    elif not isinstance(counts := mask.get("counts"), (list, str, bytes)):
        report(kind, at, f"the 'counts' of its RLE are {reprlib.repr(counts)}")
    elif rle_runs(counts).sum() != height * width:
        report(kind, at, f"the runs of its RLE do not add up to {height} x {width} pixels")
    else:
        return mask_util.frPyObjects(mask, *size) if isinstance(counts, list) else mask
    return []


def _box(mask: Any, height: int, width: int) -> Optional[List[float]]:
    """The box around a mask in the image, XYWH; None if the mask has no pixel there."""
    if isinstance(mask, list):
        points = [np.array(p, float).reshape(-1, 2) for p in mask]
        first, last = (f(np.concatenate(points), axis=0) for f in (np.min, np.max))
        area = sum(cv2.contourArea(p.astype(np.float32)) for p in points)
        is_solid = area > max(4, 0.1 * np.prod(last - first))
        if is_solid and (first >= 0).all() and (last <= (width, height)).all():
            return [*first.tolist(), *(last - first).tolist()]
        # Thin polygons may hold the centre of no pixel, and others leave the image.
    box = mask_util.toBbox(as_rle(mask, height, width)).tolist()
    return box if box[2] > 0 else None


def as_rle(segmentation: Any, height: int, width: int) -> Dict:
    """The segmentation of an annotation, polygons or an RLE, of an image of this size, as an RLE."""
    if isinstance(segmentation, dict):
        return segmentation
    return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))


def read_file(d: Dict, what: str, format: Optional[str] = None, report: Report = stop) -> Any:
    """
    Read a file of a dataset dict. Report if it is missing, cannot be used, or is not of the size that
    the JSON says.

    Args:
        what: "image" or "PNG", the panoptic one.
        format: see :func:`decode`. None: look at the header alone.

    Returns:
        the array of :func:`decode`; None without a format, and where something was reported.

    Raises:
        ValueError: the header is as it should be, but the pixels cannot be decoded.
    """
    path = d[FILES[what]]
    try:
        (h, w), orientation = read_header(path, segment_ids=what == "PNG")
    except ValueError as error:
        report(f"{what} unusable", path, str(error).removeprefix(f"{path}: ").rstrip("."))
        return None
    height, width = (w, h) if orientation > 4 else (h, w)
    expected = d.get("height", height), d.get("width", width)
    if (height, width) != expected:
        turned = f"turned as its EXIF orientation {orientation} says, " if orientation > 1 else ""
        found = f"{turned}it has {width} x {height} pixels"
        detail = f"{found}, the JSON says {expected[1]} x {expected[0]}"
        report(f"{what} size differs from the JSON", path, detail)
    elif orientation > 1 and (h, w) == expected:
        detail = (
            f"its EXIF orientation is {orientation}, and the size does not tell whether it was "
            "annotated as stored or as turned; store it upright, without orientation"
        )
        report(f"{what} has an EXIF orientation", path, detail)
    elif format is not None:
        return decode(path, format)
    return None


def read_truth(d: Dict, report: Report = stop) -> Tuple[np.ndarray, Runs]:
    """
    The segment ids of a dataset dict's panoptic PNG. Beside :func:`read_file`, report if it shows a
    segment that is not listed, or does not show one that is.

    Returns:
        (H, W) int32, where 0 is void, and their :func:`runs`.
    """
    path, ids = d["pan_seg_file_name"], read_file(d, "PNG", "segment ids", report)
    if ids is None:
        ids, d = np.zeros((0, 0), np.int32), {"segments_info": []}
    found, inverse, lengths = of_runs = runs(ids)
    pixels = dict(zip(found.tolist(), np.bincount(inverse, lengths).astype(int).tolist()))
    segments = {s["id"]: s for s in d["segments_info"] if "id" in s}
    unlisted = [i for i in pixels if i not in segments and i != 0]
    if unlisted:
        detail = f"segments_info does not list the ids {reprlib.repr(unlisted)}; 0 is void"
        report("PNG id not in segments_info", path, detail)
    absent = [i for i in segments if i not in pixels]
    if absent:
        detail = f"it shows no pixel of the ids {reprlib.repr(absent)} that segments_info lists"
        report("segments_info id not in the PNG", path, detail)
    for i, s in segments.items():
        if s.get("area", pixels.get(i)) != pixels.get(i) and i in pixels:
            detail = f"the segment {i} has {pixels[i]} pixels, its 'area' is {reprlib.repr(s['area'])}"
            report("area differs from the PNG", path, f"{detail}; the pixels count", fatal=False)
    return ids, of_runs
