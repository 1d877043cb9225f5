import json
from typing import Dict, List, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

__all__ = ["register_panoptic"]


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
    """
    if categories is None:
        with PathManager.open(panoptic_json) as f:
            categories = json.load(f)["categories"]
    things = [c for c in categories if c["isthing"]]
    stuff = [c for c in categories if not c["isthing"]]
    thing_ids = {c["id"]: i for i, c in enumerate(things)}
    stuff_ids = {c["id"]: i for i, c in enumerate(stuff, start=1)}
    metadata = {
        "thing_classes": [c["name"] for c in things],
        "stuff_classes": ["things"] + [c["name"] for c in stuff],
        "thing_dataset_id_to_contiguous_id": thing_ids,
        "stuff_dataset_id_to_contiguous_id": stuff_ids,
    }
    if all("color" in c for c in categories):
        metadata["thing_colors"] = [c["color"] for c in things]
        metadata["stuff_colors"] = [[0, 0, 0]] + [c["color"] for c in stuff]
    DatasetCatalog.register(
        name,
        lambda: load_panoptic(
            image_root, panoptic_json, panoptic_root, instances_json, thing_ids, stuff_ids
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

    Returns:
        list[dict] in Detectron2's standard format: "file_name", "image_id", "height", "width",
        "pan_seg_file_name", "segments_info" (with contiguous "category_id" and "isthing") and,
        with an instances JSON, "annotations".
    """
    with PathManager.open(panoptic_json) as f:
        panoptic = json.load(f)
    images = {image["id"]: image for image in panoptic["images"]}
    instances = {}
    if instances_json is not None:
        instances = {
            x["image_id"]: x["annotations"] for x in load_coco_json(instances_json, image_root)
        }

    dicts = []
    for annotation in panoptic["annotations"]:
        image_id = annotation["image_id"]
        image = images[image_id]
        d = {
            "file_name": f"{image_root}/{image['file_name']}",
            "image_id": image_id,
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": f"{panoptic_root}/{annotation['file_name']}",
            "segments_info": [
                _contiguous_segment(s, thing_ids, stuff_ids) for s in annotation["segments_info"]
            ],
        }
        if instances_json is not None:
            d["annotations"] = [
                {**a, "category_id": thing_ids[a["category_id"]]}
                for a in instances.get(image_id, [])
            ]
        dicts.append(d)
    return dicts


def _contiguous_segment(segment: Dict, thing_ids: Dict[int, int], stuff_ids: Dict[int, int]):
    isthing = segment["category_id"] in thing_ids
    ids = thing_ids if isthing else stuff_ids
    return {**segment, "isthing": isthing, "category_id": ids[segment["category_id"]]}
