"""
What can be wrong with the JSON files of a dataset in the COCO panoptic format. Entries may hold
anything at all; only fields that are what they must be are used.
"""

import math
import reprlib
from collections import Counter
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from .files import Folder
from .load import MAX_SEGMENTS, read_annotations
from .masks import check_polygon, rle_runs

__all__ = [
    "Problem",
    "by_id",
    "check_instances",
    "check_panoptic",
    "entries",
    "read_json",
]

LISTS = ("images", "annotations", "categories")


class Problem(NamedTuple):
    """One thing that is wrong: of what kind, in which file (and entry), what was found there."""

    kind: str
    where: str
    detail: str


def _is_number(value: Any) -> bool:
    # type() here and below, because a bool is an int, too.
    return type(value) in (int, float) and abs(value) < math.inf


INTEGER = "a whole number", lambda v: type(v) is int
LENGTH = "a whole number from 1 on", lambda v: type(v) is int and v > 0
ID = "a whole number or a string", lambda v: type(v) in (int, str)
TEXT = "a string that is not empty", lambda v: isinstance(v, str) and v != ""
LIST = "a list", lambda v: isinstance(v, list)
FLAG = "0 or 1", lambda v: v in (0, 1)
AREA = "a number from 0 on", lambda v: _is_number(v) and v >= 0
BOX = "four numbers", lambda v: isinstance(v, list) and len(v) == 4 and all(map(_is_number, v))
MASK = "polygons or an RLE", bool

CATEGORY = {"id": INTEGER, "name": TEXT}
PANOPTIC_CATEGORY = {**CATEGORY, "isthing": FLAG}
IMAGE = {"id": ID, "file_name": TEXT, "height": LENGTH, "width": LENGTH}
ANNOTATION = {"image_id": ID, "file_name": TEXT, "segments_info": LIST}
SEGMENT = {"id": INTEGER, "category_id": INTEGER, "area": AREA, "iscrowd": FLAG}
INSTANCE = {"id": ID, "image_id": ID, "category_id": INTEGER, "bbox": BOX}
INSTANCE.update({"area": AREA, "iscrowd": FLAG, "segmentation": MASK})
# Kinds of problem that have a name of their own. (Training does without an area and iscrowd, but
# panopticapi and COCO's evaluation do not.)
KINDS = {"isthing": "category without isthing", "segmentation": "instance without a mask"}


def read_json(path: str) -> Dict:
    """
    Raises:
        ValueError: the file cannot be read, is not JSON, or lacks one of the lists.
    """
    content = read_annotations(path, *LISTS)
    for key in LISTS:
        if not isinstance(content[key], list):
            raise ValueError(f"{key!r} is {reprlib.repr(content[key])}; it must be a list")
    return content


def entries(items: List, fields: Dict, where: str = "") -> Iterator[Dict]:
    """
    Yields:
        of every item those of the fields that are what they must be, and "where" it is.
    """
    for i, item in enumerate(items):
        known = [k for k in fields if k in item] if isinstance(item, dict) else []
        entry = {k: item[k] for k in known if fields[k][1](item[k])}
        name = f" ({entry['file_name']})" if "file_name" in entry else ""
        yield {"where": f"{where}[{i}]{name}", **entry}


def by_id(items: List, fields: Dict) -> Dict[Any, Dict]:
    """id -> entry; the last one of an id, as training takes it."""
    return {entry["id"]: entry for entry in entries(items, fields) if "id" in entry}


def check_entries(items: List, fields: Dict, where: str, what: str) -> Iterator[Problem]:
    """Fields that are not what they must be, and ids that an earlier entry has, too."""
    first: Dict[Any, Dict] = {}
    for item, entry in zip(items, entries(items, fields, where)):
        if not isinstance(item, dict):
            yield Problem("malformed entry", entry["where"], f"is {reprlib.repr(item)}, no object")
            continue
        for key in fields:
            if key not in entry:
                found = reprlib.repr(item[key]) if key in item else "missing"
                detail = f"{key!r} is {found}; it must be {fields[key][0]}"
                yield Problem(KINDS.get(key, "malformed entry"), entry["where"], detail)
        other = first.setdefault(entry["id"], entry) if "id" in entry else entry
        if other is not entry:
            contradict = {entry.get("isthing"), other.get("isthing")} == {0, 1}
            kind = "category id is both thing and stuff" if contradict else f"duplicate {what} id"
            detail = f"the id {entry['id']!r} is that of {other['where']}, too"
            yield Problem(kind, entry["where"], detail)


def check_panoptic(
    panoptic: Dict, path: str, image_root: Folder, panoptic_root: Folder
) -> Iterator[Problem]:
    """What is wrong within the panoptic JSON. Its files are named, but not looked for."""
    for key, fields, what in (
        ("categories", PANOPTIC_CATEGORY, "category"),
        ("images", IMAGE, "image"),
        ("annotations", ANNOTATION, "annotation"),
    ):
        yield from check_entries(panoptic[key], fields, f"{path}: {key}", what)
    categories = by_id(panoptic["categories"], PANOPTIC_CATEGORY)
    images = by_id(panoptic["images"], IMAGE)
    annotated: Dict[Any, str] = {}
    for annotation in entries(panoptic["annotations"], ANNOTATION, f"{path}: annotations"):
        where, image_id = annotation["where"], annotation.get("image_id")
        if image_id is not None and image_id not in images:
            detail = f"there is no image of id {image_id!r}"
            yield Problem("annotation of an unknown image", where, detail)
        elif image_id is not None and annotated.setdefault(image_id, where) != where:
            detail = f"image {image_id!r} is annotated by {annotated[image_id]}, too"
            yield Problem("several annotations of one image", where, detail)
        for folder, entry in ((panoptic_root, annotation), (image_root, images.get(image_id, {}))):
            why = outside(folder, entry.get("file_name"))
            if why:
                yield Problem("file name leads outside its folder", where, f"not opened: {why}")
        yield from check_segments(annotation.get("segments_info", []), categories, where)
    for image in entries(panoptic["images"], IMAGE, f"{path}: images"):
        if "id" in image and image["id"] not in annotated:
            detail = f"no annotation has the image_id {image['id']!r}; training leaves it out"
            yield Problem("image without annotation", image["where"], detail)


def outside(folder: Folder, name: Optional[str]) -> Optional[str]:
    """Why the file is not in the folder; None if it is, or has no name."""
    try:
        if name is not None:
            folder.path(name)
    except ValueError as error:
        return str(error)
    return None


def check_segments(segments: List, categories: Dict, where: str) -> Iterator[Problem]:
    """What is wrong with the segments_info of one annotation, as far as the JSON tells."""
    where += " segments_info"
    if len(segments) > MAX_SEGMENTS:
        detail = f"there are {len(segments)}; training takes {MAX_SEGMENTS} in an image"
        yield Problem("too many segments", where, detail)
    yield from check_entries(segments, SEGMENT, where, "segment")
    for segment in entries(segments, SEGMENT, where):
        category = segment.get("category_id")
        if category is not None and category not in categories:
            detail = f"{category} is not among the ids of the 'categories'"
            yield Problem("unknown category id", segment["where"], detail)
        elif segment.get("iscrowd") and categories.get(category, {}).get("isthing") == 0:
            detail = f"'iscrowd' is 1, but category {category} is stuff; it must be 0"
            yield Problem("stuff segment is a crowd", segment["where"], detail)
        if segment.get("area") == 0:
            yield Problem("empty segment", segment["where"], "'area' is 0")
        if not 0 < segment.get("id", 1) < 256**3:
            detail = f"the id is {segment['id']}; it must be 1 to {256 ** 3 - 1} (0 is void)"
            yield Problem("segment id out of range", segment["where"], detail)


def check_instances(instances: Dict, path: str, panoptic: Dict) -> Iterator[Problem]:
    """What is wrong within the instances JSON, and where it contradicts the panoptic one."""
    known = {}
    for key, fields, what in (("images", IMAGE, "image"), ("categories", CATEGORY, "category")):
        known[key] = by_id(panoptic[key], {**fields, "isthing": FLAG})
        yield from check_entries(instances[key], fields, f"{path}: {key}", what)
        for entry in entries(instances[key], fields, f"{path}: {key}"):
            other = known[key].get(entry.get("id"), {})
            for field in fields:
                if field in entry and field in other and entry[field] != other[field]:
                    detail = f"{field!r} is {entry[field]!r}, there it is {other[field]!r}"
                    yield Problem(f"{what} differs from the panoptic JSON", entry["where"], detail)
    images, own_images = known["images"], by_id(instances["images"], IMAGE)
    for image_id in [k for k in images if k not in own_images]:
        name = images[image_id].get("file_name")
        detail = f"{image_id!r} ({name}) is missing; training would think it has no instances"
        yield Problem("image only in the panoptic JSON", f"{path}: images", detail)
    for image_id in [k for k in own_images if k not in images]:
        where = f"{path}: images{own_images[image_id]['where']}"
        detail = f"the panoptic JSON has no image of id {image_id!r}"
        yield Problem("image only in the instances JSON", where, detail)

    annotations = instances["annotations"]
    of_images = Counter(x["image_id"] for x in entries(annotations, INSTANCE) if "image_id" in x)
    for image_id, number in of_images.items():
        if number > MAX_SEGMENTS:
            detail = f"there are {number} of the image {image_id!r}; training takes {MAX_SEGMENTS}"
            yield Problem("too many instances", f"{path}: annotations", detail)
    yield from check_entries(annotations, INSTANCE, f"{path}: annotations", "instance")
    for instance in entries(annotations, INSTANCE, f"{path}: annotations"):
        image_id, category = instance.get("image_id"), instance.get("category_id")
        image = images.get(image_id) or own_images.get(image_id, {})
        where = f"{instance['where']} ({image.get('file_name')})"
        if image_id is not None and image_id not in own_images:
            detail = f"there is no image of id {image_id!r}"
            yield Problem("annotation of an unknown image", where, detail)
        if category is not None and category not in known["categories"]:
            detail = f"{category} is not among the ids of the panoptic JSON's 'categories'"
            yield Problem("unknown category id", where, detail)
        elif known["categories"].get(category, {}).get("isthing") == 0:
            detail = f"category {category} is stuff in the panoptic JSON; it must be a thing"
            yield Problem("instance of stuff", where, detail)
        if min(instance.get("bbox", [1, 1])[-2:]) <= 0:
            detail = f"'bbox' is {instance['bbox']}; width and height must be more than 0"
            yield Problem("box without extent", where, detail)
        if "segmentation" in instance:
            size = [image.get("height"), image.get("width")]
            yield from check_mask(instance["segmentation"], size, where)


def check_mask(mask: Any, size: List, where: str) -> Iterator[Problem]:
    """What is wrong with the segmentation of an instance in an image of size [height, width]."""
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                detail = f"a polygon is {reprlib.repr(polygon)}; it must be 6, 8, 10, ... numbers"
                yield Problem("malformed mask", where, detail)
            elif not all(map(_is_number, polygon)):
                yield Problem("malformed mask", where, "a polygon holds what is no number")
            elif None not in size:
                try:
                    check_polygon(polygon, *size)
                except ValueError as error:
                    yield Problem("malformed mask", where, str(error))
    else:
        try:
            (height, width), runs = mask["size"], rle_runs(mask["counts"])
            if not all(type(x) is int and x >= 0 for x in (height, width, *runs)):
                raise ValueError("it must be of whole numbers from 0 on")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            detail = f"{reprlib.repr(mask)} is no RLE: {error!r}"
            yield Problem("malformed mask", where, detail)
            return
        if None not in size and [height, width] != size:
            detail = f"it is of [height, width] {[height, width]}, the image of {size}"
            yield Problem("RLE size differs from the image", where, detail)
        if sum(runs) != height * width:  # pycocotools reads what lies beyond in the memory
            detail = f"the RLE has {sum(runs)} pixels; {height} x {width} are {height * width}"
            yield Problem("malformed mask", where, detail)
        elif sum(runs[1::2]) == 0:
            yield Problem("instance without a mask", where, "the RLE covers no pixel")
