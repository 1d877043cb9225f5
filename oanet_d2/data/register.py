from typing import Any, Dict, List, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .load import load_panoptic, read_annotations

__all__ = [
    "category_metadata",
    "load_panoptic",
    "read_annotations",
    "register_from_config",
    "register_panoptic",
    "require_files",
]

# Keys of a dataset in DATASETS.PANOPTIC, in the order of register_panoptic's arguments, and the
# metadata that holds their values.
PATHS = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT")
OPTIONAL_PATH = "INSTANCES_JSON"
FIELDS = ("image_root", "panoptic_json", "panoptic_root", "json_file")
# What the fields of a category must be.
CATEGORY_FIELDS = {
    "id": ("a whole number", lambda x: type(x) is int),
    "name": ("a string that is not empty", lambda x: isinstance(x, str) and x != ""),
    "isthing": ("1 for a thing or 0 for stuff", lambda x: type(x) in (int, bool) and x in (0, 1)),
}


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
            if [getattr(known, field, None) for field in FIELDS] != paths:
                raise ValueError(
                    f"{key}: a dataset {name!r} from other files is registered already; choose "
                    "another name."
                )
            continue
        register_panoptic(name, *paths)


def require_files(name: str, images: bool = True):
    """
    See that the files of a panoptic dataset are there, before a training that would look for some
    of them only at its end. What lies behind a URL is not looked for.

    Args:
        name: a dataset with the metadata of :func:`register_panoptic`.
        images: look for the folder of the images, too.

    Raises:
        ValueError: one is missing; the message names it.
    """
    for field, key in zip(FIELDS, (*PATHS, OPTIONAL_PATH)):
        path = getattr(MetadataCatalog.get(name), field, None)
        is_local = path and "://" not in path and (images or field != "image_root")
        if is_local and not PathManager.exists(path):
            raise ValueError(f"Dataset {name!r}: its {key} {path} does not exist.")


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


def _is_color(value: Any) -> bool:
    is_three = isinstance(value, (list, tuple)) and len(value) == 3
    return is_three and all(type(x) is int and 0 <= x <= 255 for x in value)
