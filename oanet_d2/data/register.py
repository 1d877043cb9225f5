import os
from collections import Counter
from functools import partial
from typing import Any, Dict, List, Optional, Union

from detectron2.data import DatasetCatalog, MetadataCatalog

from .load import CATEGORY, Report, entries, load_panoptic, read_annotations, stop

__all__ = ["category_metadata", "dataset_paths", "register_from_config", "register_panoptic"]

Path = Union[str, os.PathLike]

# The keys of a dataset in DATASETS.PANOPTIC, in the order of register_panoptic's arguments, and the
# metadata with their values.
KEYS = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
FIELDS = ("image_root", "panoptic_json", "panoptic_root", "json_file")


def register_panoptic(
    name: str,
    image_root: Path,
    panoptic_json: Path,
    panoptic_root: Path,
    instances_json: Optional[Path] = None,
    categories: Optional[List[Dict]] = None,
    **kwargs,
) -> None:
    """
    Register a dataset in the COCO panoptic format. Nothing has to be converted: the mapper makes all
    labels from the panoptic PNGs.

    Contiguous ids follow the order of the categories: things count from 0, stuff from 1. (Stuff 0 is
    "any thing", Detectron2's convention for panoptic semantic segmentation.)

    Args:
        name: name in DatasetCatalog and MetadataCatalog.
        image_root: folder of the images.
        panoptic_json: COCO panoptic annotation file.
        panoptic_root: folder of the panoptic PNGs.
        instances_json: COCO instances annotation file of the same images. Its masks may overlap,
            which is what the ranking learns from. Without it, the masks are the visible parts. Or
            results of a segmenter, a list as COCO's evaluation takes it, for
            :class:`SRMFromAnnotations` to learn from.
        categories: "categories" of `panoptic_json`; read from the file by default.
        kwargs: see :func:`load_panoptic`.

    Raises:
        ValueError: `panoptic_json` is missing or is no panoptic JSON, or its categories contradict
            each other.
    """
    given = (image_root, panoptic_json, panoptic_root, instances_json)
    paths: List[Any] = [path and os.fspath(path) for path in given]
    if categories is None:
        categories = read_annotations(str(panoptic_json))["categories"]
    metadata = category_metadata(categories, f"{panoptic_json}: categories")
    load = partial(
        load_panoptic,
        *paths,
        thing_ids=metadata["thing_dataset_id_to_contiguous_id"],
        stuff_ids=metadata["stuff_dataset_id_to_contiguous_id"],
        **kwargs,
    )
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        **dict(zip(FIELDS, paths)),
        **metadata,
    )


def register_from_config(cfg) -> None:
    """
    Register the datasets of `cfg.DATASETS.PANOPTIC`, so that a yaml is all that one's own data needs.
    One that is registered already, from the same files, stays.

    Raises:
        ValueError: a dataset lacks a path, or its name is taken by another dataset.
    """
    for name in cfg.DATASETS.PANOPTIC:
        paths = dataset_paths(cfg, name)
        if name not in DatasetCatalog:
            register_panoptic(name, *paths)
        elif [getattr(MetadataCatalog.get(name), field, None) for field in FIELDS] != paths:
            raise ValueError(
                f"DATASETS.PANOPTIC.{name}: a dataset {name!r} from other files is registered "
                "already; choose another name."
            )


def dataset_paths(cfg, name: str) -> List[Any]:
    """
    The paths of a dataset of `cfg.DATASETS.PANOPTIC`, as :func:`register_panoptic` takes them.

    Raises:
        ValueError: it lacks a path, or has other keys.
    """
    key, files = f"DATASETS.PANOPTIC.{name}", cfg.DATASETS.PANOPTIC[name]
    if not isinstance(files, dict) or not set(files) <= set(KEYS):
        found = sorted(files) if isinstance(files, dict) else repr(files)
        raise ValueError(f"{key} holds {found}; it must hold paths: {', '.join(KEYS)}.")
    paths = [files.get(k) or None for k in KEYS]
    for k, path in zip(KEYS, paths):
        if not isinstance(path, str) and (path is not None or k != "INSTANCES_JSON"):
            raise ValueError(f"{key}.{k} is {path!r}; it must be a path.")
    return paths


def category_metadata(categories: List, where: str, report: Report = stop) -> Dict:
    """
    What Detectron2 wants to know of a panoptic dataset's classes.

    Args:
        categories: "categories" of a COCO panoptic JSON.
        where: where they come from.
        report: told of categories that lack their id, name or isthing, and of ids that are there
            twice. See :mod:`load`.

    Returns:
        "thing_classes", "stuff_classes", "{thing,stuff}_dataset_id_to_contiguous_id" and, where every
        category has a color, "{thing,stuff}_colors".
    """
    listed = entries(categories, CATEGORY, where, report)
    found = [{**c, "id": int(c["id"])} for _, c, usable in listed if usable]  # JSON takes no np.int64
    things = [c for c in found if c["isthing"]]
    for name, number in Counter(c["name"] for c in things).items():
        if number > 1:  # results by class would be those of one of them
            report("duplicate name", where, f"{number} thing classes have the name {name!r}")
    stuff = [c for c in found if not c["isthing"]]
    metadata = {
        "thing_classes": [c["name"] for c in things],
        "stuff_classes": ["things", *(c["name"] for c in stuff)],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(stuff, start=1)},
    }
    if all(_is_color(c.get("color")) for c in found):
        metadata["thing_colors"] = [list(c["color"]) for c in things]
        metadata["stuff_colors"] = [[0, 0, 0], *(list(c["color"]) for c in stuff)]
    return metadata


def _is_color(value: Any) -> bool:
    is_three = isinstance(value, (list, tuple)) and len(value) == 3
    return is_three and all(type(x) is int and 0 <= x <= 255 for x in value)
