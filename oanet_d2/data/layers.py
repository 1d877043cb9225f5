"""What lies on what in photographs, written in the COCO panoptic format."""

import json
import os
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Tuple

import numpy as np
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from ..files import write_atomically

__all__ = ["Layers", "shrink", "write_split"]


class Layers(NamedTuple):
    """
    A photograph, its segments, and which of them lies on which.

    Attributes:
        file_name: its name in the dataset, a .jpg.
        image: RGB.
        masks: (category id, (H, W) bool) of each segment, the lowest first. What is covered belongs
            to the mask.
        void: (H, W) bool, the pixels that belong to nothing, whatever is painted there.
    """

    file_name: str
    image: Image.Image
    masks: List[Tuple[int, np.ndarray]]
    void: np.ndarray


def write_split(
    root: str, split: str, categories: List[Dict], photographs: Iterable[Layers]
) -> None:
    """
    Write `images/<split>`, `panoptic_<split>`, `instances_<split>.json`, which holds the whole masks
    of the things, and last `panoptic_<split>.json`. A segment that nobody can see is in the
    instances alone.

    Args:
        root: folder of the dataset, made if it does not exist.
        categories: of the panoptic JSON.
    """
    folders = Path(root, "images", split), Path(root, f"panoptic_{split}")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    images: List[Dict] = []
    panoptic: List[Dict] = []
    instances: List[Dict] = []
    things = [c for c in categories if c["isthing"]]
    thing_ids = {c["id"] for c in things}
    for image_id, photo in enumerate(tqdm(photographs, desc=split, disable=None), 1):
        ids, segments = np.zeros(photo.void.shape, np.int64), []
        for k, (_, mask) in enumerate(photo.masks, 1):
            ids[mask] = k
        ids[photo.void] = 0
        for k, (category_id, mask) in enumerate(photo.masks, 1):
            visible, whole = _encode(ids == k), _encode(mask)
            if mask_util.area(visible):
                segments.append({"id": k, **_annotation(category_id, visible)})
            if category_id in thing_ids:
                instance = {"id": len(instances) + 1, "image_id": image_id, "segmentation": whole}
                instances.append({**instance, **_annotation(category_id, whole)})
        png, (width, height) = f"{Path(photo.file_name).stem}.png", photo.image.size
        photo.image.save(folders[0] / photo.file_name, quality=92)
        Image.fromarray(id2rgb(ids)).save(folders[1] / png)
        file = {"file_name": photo.file_name, "height": height, "width": width}
        images.append({"id": image_id, **file})
        panoptic.append({"image_id": image_id, "file_name": png, "segments_info": segments})
    for kind, annotations, listed in (
        ("instances", instances, things),
        ("panoptic", panoptic, categories),
    ):
        document = {"images": images, "annotations": annotations, "categories": listed}
        write_atomically(os.path.join(root, f"{kind}_{split}.json"), json.dumps(document))


def _encode(mask: np.ndarray) -> Dict:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**rle, "counts": rle["counts"].decode()}


def _annotation(category_id: int, rle: Dict) -> Dict:
    area, bbox = int(mask_util.area(rle)), mask_util.toBbox(rle).tolist()
    return {"category_id": category_id, "area": area, "bbox": bbox, "iscrowd": 0}


def shrink(image: Image.Image, side: int = 416) -> Image.Image:
    """
    The image, or a map of labels of mode "L", of at most `side` pixels a side.
    """
    scale = min(1, side / max(image.size))
    width, height = (max(1, round(scale * x)) for x in image.size)
    how = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return image.resize((width, height), how)
