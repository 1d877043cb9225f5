"""
The annotations of a dataset in the COCO panoptic format, as Detectron2's dataset dicts.
"""

import json
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from detectron2.data.datasets import load_coco_json

from .files import Folder, check_json_file, read_json
from .images import MAX_PIXELS
from .masks import check_annotation

__all__ = ["CHECK", "MAX_SEGMENTS", "load_panoptic", "read_annotations"]

# Segments, and instances, of one image. Training holds a mask of the image's size for each thing.
MAX_SEGMENTS = 10_000

CHECK = "`python -m oanet_d2.data.check` finds all such mistakes in a dataset."


def read_annotations(path: str, *keys: str) -> Dict:
    """
    Read a JSON annotation file.

    Args:
        keys: what it must hold.

    Raises:
        ValueError: see :func:`read_json`; or it lacks one of the keys.
    """
    annotations = read_json(path)
    missing = [k for k in keys if not isinstance(annotations, dict) or k not in annotations]
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]!r}; the COCO panoptic format has 'images', 'annotations' "
            "and 'categories'. (An instances JSON goes into instances_json.)"
        )
    return annotations


def load_panoptic(
    image_root: str,
    panoptic_json: str,
    panoptic_root: str,
    instances_json: Optional[str],
    thing_ids: Dict[int, int],
    stuff_ids: Dict[int, int],
) -> List[Dict]:
    """
    Read the annotation files of a dataset registered by :func:`register_panoptic`.

    Raises:
        ValueError: the files contradict each other; `python -m oanet_d2.data.check` finds
            everything that is wrong with a dataset, this stops at the first thing.

    Returns:
        list[dict] in Detectron2's standard format: "file_name", "image_id", "height", "width",
        "pan_seg_file_name", "segments_info" (with contiguous "category_id" and "isthing") and,
        with an instances JSON, "annotations".
    """
    panoptic = read_annotations(panoptic_json, "images", "annotations")
    with _entry(f"{panoptic_json}: images"):
        images = {image["id"]: image for image in panoptic["images"]}
    with _entry(f"{panoptic_json}: annotations"):
        annotations = list(panoptic["annotations"])
    instances = None if instances_json is None else _load_instances(instances_json, image_root)
    folders = Folder(image_root), Folder(panoptic_root)

    dicts = []
    for i, annotation in enumerate(annotations):
        with _entry(f"{panoptic_json}: annotations[{i}]"):
            d = _load_image(annotation, images, *folders, thing_ids, stuff_ids)
        if instances is not None:
            with _entry(instances_json):
                own = instances.get(d["image_id"], [])
                _check_count(own, "instances", d["file_name"])
                d["annotations"] = [_contiguous_annotation(a, thing_ids, d) for a in own]
        dicts.append(d)
    return dicts


@contextmanager
def _entry(where: str) -> Iterator[None]:
    """Whatever an entry makes Python raise in here becomes a ValueError that says where it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}. {CHECK}") from error


def _load_instances(instances_json: str, image_root: str) -> Dict[Any, List[Dict]]:
    check_json_file(instances_json)
    with _entry(instances_json):
        try:
            dicts = load_coco_json(instances_json, image_root)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"it is not a JSON file: {error}") from error
        return {x["image_id"]: x["annotations"] for x in dicts}


def _load_image(
    annotation: Dict,
    images: Dict,
    images_in: Folder,
    pngs_in: Folder,
    thing_ids: Dict,
    stuff_ids: Dict,
) -> Dict:
    """An annotation of the panoptic JSON as a dataset dict, still without "annotations"."""
    image = images.get(annotation["image_id"])
    if image is None:
        raise ValueError(
            f"{annotation.get('file_name')} annotates the image {annotation['image_id']!r}, which "
            "is not among the 'images'."
        )
    height, width = image["height"], image["width"]
    if not all(type(x) is int and x > 0 for x in (height, width)) or height * width > MAX_PIXELS:
        raise ValueError(
            f"the image {image['file_name']} has the height {height!r} and the width {width!r}; "
            f"they must be whole numbers from 1 on, of {MAX_PIXELS:,} pixels at most."
        )
    segments = annotation["segments_info"]
    _check_count(segments, "segments", annotation["file_name"])
    return {
        "file_name": images_in.path(image["file_name"]),
        "image_id": annotation["image_id"],
        "height": height,
        "width": width,
        "pan_seg_file_name": pngs_in.path(annotation["file_name"]),
        "segments_info": [_contiguous_segment(s, thing_ids, stuff_ids) for s in segments],
    }


def _check_count(items: List, what: str, file_name: str) -> None:
    if len(items) > MAX_SEGMENTS:
        raise ValueError(
            f"{file_name} has {len(items):,} {what}; there may be {MAX_SEGMENTS:,} in an image."
        )


def _contiguous_segment(segment: Dict, thing_ids: Dict, stuff_ids: Dict):
    category = segment["category_id"]
    isthing = category in thing_ids
    ids = thing_ids if isthing else stuff_ids
    if category not in ids:
        raise ValueError(
            f"segment {segment['id']} is of category {category}, which is not among the "
            "'categories'."
        )
    if type(segment["id"]) is not int or not 0 < segment["id"] < 256**3:
        raise ValueError(
            f"the id of a segment is {segment['id']!r}; it must be a whole number from 1 to "
            f"{256 ** 3 - 1} (0 is void)."
        )
    return {**segment, "isthing": isthing, "category_id": ids[category]}


def _contiguous_annotation(annotation: Dict, thing_ids: Dict, image: Dict):
    category = annotation["category_id"]
    if category not in thing_ids:
        raise ValueError(
            f"an instance is of category {category}, which is no thing in the panoptic annotation; "
            f"its things are {sorted(thing_ids)}."
        )
    with _entry(f"an instance in {image['file_name']}"):
        check_annotation(annotation, image["height"], image["width"])
    return {**annotation, "category_id": thing_ids[category]}
