"""
Annotations of a dataset in the COCO panoptic format, as Detectron2's dataset dicts.

What is wrong goes to a `report` function. Training passes :func:`stop`, which raises at the first
problem; :mod:`check` collects all of them. So the code that follows the report of a fatal problem
runs in the checker only.
"""

import json
import math
import os
import reprlib
from collections import defaultdict
from itertools import product
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
from pycocotools import mask as mask_util

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .images import count_pixels

__all__ = [
    "CATEGORY",
    "Report",
    "check_image_size",
    "check_segment_ids",
    "entries",
    "load_panoptic",
    "read_annotations",
    "stop",
]

# report(kind, where, detail, fatal=True): the kind of problem, the file and entry, what was found
# there. Training refuses what is fatal; of the rest it would learn, or evaluation would fail.
Report = Callable[..., None]


def stop(kind: str, where: str, detail: str, fatal: bool = True) -> None:
    """
    The `report` of training.

    Raises:
        ValueError: the problem is fatal.
    """
    if fatal:
        check = "`python -m oanet_d2.data.check` finds all that is wrong with a dataset."
        raise ValueError(f"{where}: {detail}. {check}")


def _finite(values: Any) -> bool:
    try:
        return math.isfinite(sum(values))
    except (OverflowError, TypeError):
        return False


# What a field must be: in words, and as a test. (type(), because a bool is an int, too.)
INTEGER = "a whole number", lambda x: type(x) is int
LENGTH = "a whole number from 1 on", lambda x: type(x) is int and x > 0
ID = "a whole number or a string", lambda x: type(x) in (int, str)
TEXT = "a string that is not empty", lambda x: isinstance(x, str) and x != ""
LIST = "a list", lambda x: isinstance(x, list)
FLAG = "0 or 1", lambda x: type(x) in (int, bool) and x in (0, 1)
AREA = "a number from 0 on", lambda x: type(x) in (int, float) and 0 <= x < math.inf
BOX = "four numbers", lambda x: isinstance(x, list) and len(x) == 4 and _finite(x)
SEGMENT_ID = "1 to 16777215 (0 is void)", lambda x: type(x) is int and 0 < x < 256**3

Fields = Dict[str, Tuple[str, Callable[[Any], bool]]]
CATEGORY_NAME: Fields = {"id": INTEGER, "name": TEXT}
ISTHING = "1 for a thing or 0 for stuff (an instances JSON has no stuff)", FLAG[1]
CATEGORY: Fields = {**CATEGORY_NAME, "isthing": ISTHING}
IMAGE: Fields = {"id": ID, "file_name": TEXT, "height": LENGTH, "width": LENGTH}
ANNOTATION: Fields = {"image_id": ID, "file_name": TEXT, "segments_info": LIST}
SEGMENT: Fields = {"id": SEGMENT_ID, "category_id": INTEGER, "area": AREA, "iscrowd": FLAG}
INSTANCE: Fields = {"id": ID, "image_id": ID, "category_id": INTEGER, "bbox": BOX}
INSTANCE.update({"area": AREA, "iscrowd": FLAG, "segmentation": ("polygons or an RLE", bool)})
# They may be missing: training does without, but panopticapi and pycocotools do not.
OPTIONAL = ("area", "iscrowd", "segmentation")


def entries(
    items: List, fields: Fields, where: str, report: Report
) -> Iterator[Tuple[str, Dict, bool]]:
    """
    Report fields that are not what they must be, and ids that an earlier entry has.

    Args:
        items: the list of a JSON that `where` names.
        fields: what every entry must have.

    Yields:
        where an entry is, the entry, and whether training can use it. If not, the entry holds only
        those fields that are what they must be.
    """
    seen = set()
    for i, item in enumerate(items):
        at = f"{where}[{i}]"
        if not isinstance(item, dict):
            report("malformed entry", at, f"it is {reprlib.repr(item)}, not an object")
            continue
        if isinstance(item.get("file_name"), str):
            at += f" ({item['file_name']})"
        wrong = [k for k, (_, is_right) in fields.items() if k not in item or not is_right(item[k])]
        for key in wrong:
            found = f"is {reprlib.repr(item[key])}" if key in item else "is missing"
            fatal = key in item or key not in OPTIONAL
            report("malformed entry", at, f"{key!r} {found}; it must be {fields[key][0]}", fatal)
        usable = all(k not in item and k in OPTIONAL for k in wrong)
        if not usable:
            item = {k: item[k] for k in fields if k in item and k not in wrong}
        if "id" in item:
            if item["id"] in seen:
                report("duplicate id", at, f"an earlier entry has the id {item['id']!r}")
            seen.add(item["id"])
        yield at, item, usable


def read_annotations(path: str, report: Report = stop) -> Dict:
    """
    Read a JSON of one of COCO's formats.

    Returns:
        dict with the lists "images", "annotations" and "categories"; {} if it was reported that the
        file is missing or is something else.
    """
    try:
        with PathManager.open(path, "rb") as f:
            content = json.loads(f.read().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON in UTF-8: {error}"
        report("annotation file unusable", path, reason)
        return {}
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
        and, with an instances JSON, "annotations" as Detectron2's `load_coco_json` makes them.

    Raises:
        ValueError: something is wrong. It names the file, the entry and what was found.
    """
    panoptic = read_annotations(panoptic_json, report)
    if not panoptic:
        return []
    where, dicts, annotated = f"{panoptic_json}: annotations", [], set()
    images = _by_id(panoptic, "images", IMAGE, panoptic_json, report)
    instances = None
    if instances_json is not None:
        instances = _instances(instances_json, panoptic, images, thing_ids, report)
    for at, x, usable in entries(panoptic["annotations"], ANNOTATION, where, report):
        image_id, image = x.get("image_id"), images.get(x.get("image_id"), {})
        segments = _segments(x.get("segments_info", []), at, thing_ids, stuff_ids, report)
        if "image_id" in x and image_id not in images:
            detail = f"it annotates the image {image_id!r}, which is not among the 'images'"
            report("annotation of an unknown image", at, detail)
        elif image_id in annotated:
            detail = f"an earlier one annotates the image {image_id!r}, too"
            report("several annotations of one image", at, detail)
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
        annotated.add(image_id)
    for image_id in [i for i in images if i not in annotated]:
        detail = f"no annotation has the image_id {image_id!r}; training leaves it out"
        report("image without annotation", f"{panoptic_json}: images", detail, fatal=False)
    return dicts


def _by_id(content: Dict, key: str, fields: Fields, path: str, report: Report) -> Dict[Any, Dict]:
    found = entries(content[key], fields, f"{path}: {key}", report)
    return {x["id"]: x for _, x, _ in found if "id" in x}


def _segments(
    items: List, at: str, thing_ids: Dict, stuff_ids: Dict, report: Report
) -> List[Dict]:
    segments = []
    for where, x, _ in entries(items, SEGMENT, f"{at} segments_info", report):
        category, iscrowd = x.get("category_id"), int(x.get("iscrowd", 0))
        isthing = category in thing_ids
        contiguous = (thing_ids if isthing else stuff_ids).get(category)
        if contiguous is None and category is not None:
            detail = f"the category {category} is not among the 'categories'"
            report("unknown category id", where, detail)
        elif iscrowd and not isthing:
            detail = f"'iscrowd' is 1, but the category {category} is stuff"
            report("stuff segment is a crowd", where, detail, fatal=False)
        segments.append({**x, "category_id": contiguous, "isthing": isthing, "iscrowd": iscrowd})
    return segments


def _instances(
    path: str, panoptic: Dict, images: Dict, thing_ids: Dict, report: Report
) -> Optional[Dict[Any, List[Dict]]]:
    """Image id -> annotations; None if it was reported that the file cannot be used."""
    content = read_annotations(path, report)
    if not content:
        return None
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

    instances, where = defaultdict(list), f"{path}: annotations"
    for at, x, usable in entries(content["annotations"], INSTANCE, where, report):
        image_id, category = x.get("image_id"), x.get("category_id")
        image, mask = images.get(image_id, {}), x.get("segmentation")
        at += f" ({image['file_name']})" if "file_name" in image else ""
        if "image_id" in x and image_id not in images:
            detail = f"the panoptic JSON has no image {image_id!r}"
            report("instance of an unknown image", at, detail, fatal=False)
        if "category_id" in x and category not in thing_ids:
            detail = f"the category {category} is not a thing in the panoptic JSON"
            report("instance of no thing", at, detail)
        if min(x.get("bbox", [1])[-2:]) <= 0:
            detail = f"'bbox' is {x['bbox']}; width and height must be more than 0"
            report("box without extent", at, detail, fatal=False)
        if mask and image.keys() >= IMAGE.keys():
            mask = _mask(mask, image["height"], image["width"], at, report)
            usable = usable and bool(mask)
        if usable and image_id in images:
            kept = {"bbox": x["bbox"], "bbox_mode": BoxMode.XYWH_ABS}
            kept.update(category_id=thing_ids.get(category), iscrowd=int(x.get("iscrowd", 0)))
            instances[image_id].append({**kept, "segmentation": mask} if mask else kept)
    if content["annotations"] and not instances:
        detail = "none is of an image in the panoptic JSON (an image_id of '1' is not 1)"
        report("instances of no image", where, detail)
    return instances


def _mask(mask: Any, height: int, width: int, at: str, report: Report) -> Any:
    """The segmentation as Detectron2's `load_coco_json` gives it; [] if no polygon is one."""
    kind, size = "malformed mask", [height, width]
    if isinstance(mask, dict):
        counts = mask.get("counts")
        if mask.get("size") != size:
            detail = f"its RLE is of [height, width] {mask.get('size')}, the image of {size}"
            report("RLE size differs from the image", at, detail)
        elif isinstance(counts, list):
            if not _finite(counts) or sum(counts) != height * width or min(counts) < 0:
                report(kind, at, f"the runs of its RLE do not add up to {height} x {width} pixels")
            else:
                mask = mask_util.frPyObjects(mask, *size)
        elif not isinstance(counts, (str, bytes)):
            report(kind, at, f"the 'counts' of its RLE are {reprlib.repr(counts)}")
        return mask
    if not isinstance(mask, list):
        report(kind, at, f"its segmentation is {reprlib.repr(mask)}; it must be polygons or an RLE")
        return mask
    polygons = [p for p in mask if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
    if len(polygons) < len(mask):
        report(kind, at, "a polygon is not of 6, 8, 10, ... numbers", fatal=False)
    if not all(map(_finite, polygons)):
        report(kind, at, "a polygon holds something else than finite numbers")
    return polygons


def check_image_size(d: Dict, size: Tuple[int, ...], report: Report = stop) -> None:
    """
    Report if the image of a dataset dict is not of the (height, width) that the JSON says.
    """
    if size != (d["height"], d["width"]):
        detail = f"it has {size[1]} x {size[0]} pixels, the JSON says {d['width']} x {d['height']}"
        report("image size differs from the JSON", d["file_name"], detail)


def check_segment_ids(d: Dict, ids: np.ndarray, report: Report = stop) -> None:
    """
    Report if the segment ids of a dataset dict's PNG, (H, W) int32, are of another size than its
    image, or show a segment that is not listed.
    """
    if ids.shape != (d["height"], d["width"]):
        size = f"{d['width']} x {d['height']}"
        detail = f"it has {ids.shape[1]} x {ids.shape[0]} pixels, the image {d['file_name']} {size}"
        report("PNG size differs from the image", d["pan_seg_file_name"], detail)
    listed = {0, *(s["id"] for s in d["segments_info"] if "id" in s)}
    unlisted = [i for i in count_pixels(ids) if i not in listed]
    if unlisted:
        detail = f"segments_info does not list the ids {reprlib.repr(unlisted)}; 0 is void"
        report("PNG id not in segments_info", d["pan_seg_file_name"], detail)
