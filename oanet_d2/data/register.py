import json
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .files import Folder, check_json_file, read_json
from .images import MAX_PIXELS
from .masks import check_annotation

__all__ = [
    "category_metadata",
    "load_panoptic",
    "read_annotations",
    "register_from_config",
    "register_panoptic",
]

# Keys of a dataset in DATASETS.PANOPTIC, in the order of register_panoptic's arguments.
PATHS = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT")
OPTIONAL_PATH = "INSTANCES_JSON"
# Segments, and instances, of one image. Training holds a mask of the image's size for each thing.
MAX_SEGMENTS = 10_000

# What the fields of a category must be.
CATEGORY_FIELDS = {
    "id": ("a whole number", lambda x: type(x) is int),
    "name": ("a string that is not empty", lambda x: isinstance(x, str) and x != ""),
    "isthing": ("1 for a thing or 0 for stuff", lambda x: type(x) in (int, bool) and x in (0, 1)),
}

CHECK = "`python -m oanet_d2.data.check` finds all such mistakes in a dataset."


def register_panoptic(
    name: str,
    image_root: str,
    panoptic_json: str,
    panoptic_root: str,
    instances_json: Optional[str] = None,
    categories: Optional[List[Dict]] = None,
):
    """
    Register a dataset in the COCO panoptic format. Nothing has to be converted: the mapper makes
    semantic labels and the panoptic category map from the panoptic PNGs.

    Contiguous ids follow the order of the categories in the JSON: things count from 0, stuff from
    1 (0 stands for "any thing", Detectron2's convention for panoptic semantic segmentation).

    Args:
        name: name in DatasetCatalog and MetadataCatalog.
        image_root: folder of the images.
        panoptic_json: COCO panoptic annotation file.
        panoptic_root: folder of the panoptic PNGs.
        instances_json: COCO instances annotation file of the same images. Its masks may overlap,
            which is what the ranking module learns from. Without it the instance masks are the
            visible parts, taken from the PNGs.
        categories: the "categories" of `panoptic_json`, for callers who know them; read from the
            file if not given.

    Raises:
        ValueError: `panoptic_json` is missing or is no panoptic annotation, or its categories
            contradict each other.
    """
    if categories is None:
        categories = read_annotations(panoptic_json, "categories")["categories"]
    metadata = category_metadata(categories, panoptic_json)
    DatasetCatalog.register(
        name,
        lambda: load_panoptic(
            image_root,
            panoptic_json,
            panoptic_root,
            instances_json,
            metadata["thing_dataset_id_to_contiguous_id"],
            metadata["stuff_dataset_id_to_contiguous_id"],
        ),
    )
    MetadataCatalog.get(name).set(
        image_root=image_root,
        panoptic_json=panoptic_json,
        panoptic_root=panoptic_root,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        **metadata,
    )


def register_from_config(cfg):
    """
    Register the datasets of `cfg.DATASETS.PANOPTIC`, so that a yaml is all that training on one's
    own data needs. One that is registered already, from the same files, stays.

    Raises:
        ValueError: a dataset lacks a path, or its name is taken by another dataset.
    """
    for name, files in cfg.DATASETS.PANOPTIC.items():
        key = f"DATASETS.PANOPTIC.{name}"
        if not isinstance(files, dict):
            raise ValueError(f"{key} is {files!r}; it must hold {', '.join(PATHS)}.")
        unknown = set(files) - {*PATHS, OPTIONAL_PATH}
        if unknown:
            raise ValueError(
                f"{key} holds {sorted(unknown)}; it may hold {', '.join(PATHS)} and {OPTIONAL_PATH}."
            )
        for path, value in files.items():
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"{key}.{path} is {value!r}; it must be a path.")
        missing = [path for path in PATHS if not files.get(path)]
        if missing:
            raise ValueError(f"{key}.{missing[0]} is not set; {', '.join(PATHS)} are all needed.")
        paths = [files[path] for path in PATHS] + [files.get(OPTIONAL_PATH) or None]
        if name in DatasetCatalog:
            known = MetadataCatalog.get(name)
            fields = ("image_root", "panoptic_json", "panoptic_root", "json_file")
            if [getattr(known, field, None) for field in fields] != paths:
                raise ValueError(
                    f"{key}: a dataset {name!r} from other files is registered already; choose "
                    "another name."
                )
            continue
        register_panoptic(name, *paths)


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


def category_metadata(categories: List[Dict], source: str) -> Dict:
    """
    What Detectron2 wants to know of a panoptic dataset's classes.

    Args:
        categories: "categories" of a COCO panoptic JSON.
        source: where they come from, for error messages.

    Returns:
        "thing_classes", "stuff_classes", "{thing,stuff}_dataset_id_to_contiguous_id" and, where
        every category has a color, "{thing,stuff}_colors".

    Raises:
        ValueError: a category lacks its id, name or isthing, or one is not what it must be, or two
            have one id.
    """
    if not isinstance(categories, (list, tuple)):
        raise ValueError(f"{source}: 'categories' is {categories!r}; it must be a list.")
    ids = set()
    for c in categories:
        for field, (right, is_right) in CATEGORY_FIELDS.items():
            if not isinstance(c, dict) or field not in c:
                raise ValueError(
                    f"{source}: category {c} has no {field!r}; in the COCO panoptic format every "
                    "category has 'id', 'name' and 'isthing' (1 for things, 0 for stuff)."
                )
            if not is_right(c[field]):
                raise ValueError(
                    f"{source}: the {field!r} of category {c} is {c[field]!r}; it must be {right}."
                )
        if c["id"] in ids:
            raise ValueError(f"{source}: two categories have the id {c['id']}; ids are unique.")
        ids.add(c["id"])
    things = [c for c in categories if c["isthing"]]
    stuff = [c for c in categories if not c["isthing"]]
    metadata = {
        "thing_classes": [c["name"] for c in things],
        "stuff_classes": ["things"] + [c["name"] for c in stuff],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(stuff, start=1)},
    }
    if all(_is_color(c.get("color")) for c in categories):
        metadata["thing_colors"] = [c["color"] for c in things]
        metadata["stuff_colors"] = [[0, 0, 0]] + [c["color"] for c in stuff]
    return metadata


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
        raise ValueError(
            f"{where} is not as in the COCO panoptic format ({type(error).__name__}: {error}). "
            f"{CHECK}"
        ) from error


def _load_instances(instances_json: str, image_root: str) -> Dict[Any, List[Dict]]:
    check_json_file(instances_json)
    with _entry(instances_json):
        try:
            dicts = load_coco_json(instances_json, image_root)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"it is not a JSON file: {error}") from error
        return {x["image_id"]: x["annotations"] for x in dicts}


def _load_image(
    annotation: Dict, images: Dict, images_in: Folder, pngs_in: Folder, thing_ids: Dict, stuff_ids: Dict
) -> Dict:
    """An annotation of the panoptic JSON as a dataset dict, still without "annotations"."""
    image = images.get(annotation["image_id"])
    if image is None:
        raise ValueError(
            f"{annotation.get('file_name')} annotates the image {annotation['image_id']!r}, which is "
            "not among its 'images'."
        )
    height, width = image["height"], image["width"]
    if not all(type(x) is int and x > 0 for x in (height, width)) or height * width > MAX_PIXELS:
        raise ValueError(
            f"the image {image['file_name']} has the height {height!r} and the width {width!r}; they "
            f"must be whole numbers from 1 on, of {MAX_PIXELS:,} pixels at most."
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
            f"segment {segment['id']} is of category {category}, which is not among its "
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


def _is_color(value: Any) -> bool:
    is_three = isinstance(value, (list, tuple)) and len(value) == 3
    return is_three and all(type(x) is int and 0 <= x <= 255 for x in value)
