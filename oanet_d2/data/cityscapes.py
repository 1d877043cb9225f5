"""
Cityscapes in this project's convention: things count from 0, stuff from 1. Files are read by
Detectron2's own loader and lie where its documentation wants them; `cityscapesscripts` makes them.
"""

import os
from typing import Dict, List

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic

from .files import Folder, check_json_file
from .images import naming
from .register import category_metadata

__all__ = ["is_cityscapes", "load_cityscapes", "name_images", "register_cityscapes"]

# All images are of this size. Detectron2's loader does not say so.
HEIGHT, WIDTH = 1024, 2048


def register_cityscapes(root: str):
    """
    Register `cityscapes_fine_panoptic_{train,val}_oanet`.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
    """
    categories = [dict(c, color=list(c["color"])) for c in CITYSCAPES_CATEGORIES]
    metadata = category_metadata(categories, "Detectron2's Cityscapes categories")
    for split in ("train", "val"):
        name = f"cityscapes_fine_panoptic_{split}_oanet"
        image_root = os.path.join(root, "leftImg8bit", split)
        panoptic_root = os.path.join(root, "gtFine", f"cityscapes_panoptic_{split}")
        paths = (image_root, panoptic_root, f"{panoptic_root}.json")
        DatasetCatalog.register(name, lambda paths=paths: load_cityscapes(*paths))
        MetadataCatalog.get(name).set(
            image_root=image_root,
            panoptic_root=panoptic_root,
            panoptic_json=f"{panoptic_root}.json",
            json_file=None,
            evaluator_type="coco_panoptic_seg",
            ignore_label=255,
            **metadata,
        )


def is_cityscapes(name: str) -> bool:
    """Whether a registered dataset is Cityscapes, from here or from Detectron2."""
    return "cityscapes" in (getattr(DatasetCatalog[name], "__module__", None) or "")


def name_images(panoptic: Dict):
    """
    Put the images' paths into the panoptic JSON that cityscapesscripts makes, which names them
    after their annotations and without the folder of their city.

    Args:
        panoptic: changed in place; entries that are not what they must be stay.
    """
    for image in panoptic["images"]:
        image_id = image.get("id") if isinstance(image, dict) else None
        if isinstance(image_id, str):
            image["file_name"] = f"{image_id.split('_')[0]}/{image_id}_leftImg8bit.png"


def load_cityscapes(image_root: str, panoptic_root: str, panoptic_json: str) -> List[Dict]:
    """
    Returns:
        list[dict] as :func:`load_panoptic`. There are no instance annotations: the masks are the
        visible parts, from the PNGs.

    Raises:
        ValueError: the JSON is not as cityscapesscripts makes it, or files are missing.
    """
    # Detectron2's loader puts one number for things and stuff alike; ours tell them apart.
    metadata = category_metadata(CITYSCAPES_CATEGORIES, "Detectron2's Cityscapes categories")
    things = metadata["thing_dataset_id_to_contiguous_id"]
    stuff = metadata["stuff_dataset_id_to_contiguous_id"]
    numbers = {
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": {k: len(things) + v for k, v in stuff.items()},
    }
    if os.path.exists(panoptic_json):  # Detectron2 says what makes it if it is not there
        check_json_file(panoptic_json)
    try:
        dicts = load_cityscapes_panoptic(image_root, panoptic_root, panoptic_json, numbers)
    except Exception as error:  # it asserts, and takes the JSON to be as it should
        raise ValueError(f"{panoptic_json}: {type(error).__name__}: {error}") from error
    folders = {"file_name": Folder(image_root), "pan_seg_file_name": Folder(panoptic_root)}
    for d in dicts:
        for key, folder in folders.items():
            inside = os.path.join(folder.root, "")
            name = d[key][len(inside) :] if d[key].startswith(inside) else d[key]
            with naming(panoptic_json):
                folder.path(name)
        d.update(height=HEIGHT, width=WIDTH)
        del d["sem_seg_file_name"]
        for segment in d["segments_info"]:
            segment["isthing"] = segment["category_id"] < len(things)
            segment["category_id"] -= 0 if segment["isthing"] else len(things)
    return dicts
