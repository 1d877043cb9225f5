"""What lies on what in pictures, written in the COCO panoptic format."""

import json
from argparse import ArgumentParser
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Set, Tuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from ..files import write_atomically
from ..submission import image_of

__all__ = ["Annotated", "Layers", "encode", "prepare", "shrink", "write_jsons"]

# An image as the JSONs describe it: its entries in "images" and in the panoptic "annotations", and its
# instances, still without their ids.
Annotated = Tuple[Dict, Dict, List[Dict]]


def write_jsons(
    folder: Path, split: str, categories: List[Dict], annotated: Iterable[Annotated], **header: Any
) -> None:
    """
    Write `instances_<split>.json`, which has the things among the categories, and last
    `panoptic_<split>.json`. Both hold the `header`.
    """
    images, panoptic, instances = zip(*annotated)
    numbered = [{"id": k, **instance} for k, instance in enumerate(chain(*instances), 1)]
    things = [c for c in categories if c["isthing"]]
    for kind, found, listed in ("instances", numbered, things), ("panoptic", panoptic, categories):
        document = {**header, "images": images, "annotations": found, "categories": listed}
        write_atomically(f"{folder}/{kind}_{split}.json", json.dumps(document))


def encode(mask: np.ndarray) -> Dict:
    """The COCO RLE of an (H, W) mask, as JSON takes it."""
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**rle, "counts": rle["counts"].decode()}


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


def prepare(
    page: str, root: str, categories: List[Dict], photographs: Callable[[Path, bool], Iterable[Layers]]
) -> None:
    """
    The command line of a script that makes a dataset. Of each split it writes `images/<split>`,
    `panoptic_<split>`, `instances_<split>.json`, which holds the whole masks of the things, and last
    `panoptic_<split>.json`. A segment that nobody can see is in the instances alone.

    Args:
        page: the docstring of the script.
        root: folder of the dataset, unless the user names another. It is made if it does not exist.
        categories: of the panoptic JSON.
        photographs: called with the folder of the source, and whether those for validation are wanted.
    """
    parser = ArgumentParser(description=page.split("\n\n")[0])
    parser.add_argument("--source", required=True, type=Path, help="a checkout of the repository")
    parser.add_argument("--output", default=root, type=Path, help="default: %(default)s")
    options = parser.parse_args()
    things = {c["id"] for c in categories if c["isthing"]}
    for split in ("train", "val"):
        folders = options.output / "images" / split, options.output / f"panoptic_{split}"
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        found = tqdm(photographs(options.source, split == "val"), desc=split, disable=None)
        annotated = [_write(*folders, k, photo, things) for k, photo in enumerate(found, 1)]
        write_jsons(options.output, split, categories, annotated)


def _write(images: Path, pngs: Path, image_id: int, photo: Layers, things: Set[int]) -> Annotated:
    ids = np.max([k * mask for k, (_, mask) in enumerate(photo.masks, 1)], axis=0)
    ids[photo.void] = 0
    segments, instances = [], []
    for k, (category_id, mask) in enumerate(photo.masks, 1):
        visible, whole = encode(ids == k), encode(mask)
        if mask_util.area(visible):
            segments.append({"id": k, **_annotation(category_id, visible)})
        if category_id in things:
            instance = {"image_id": image_id, "segmentation": whole}
            instances.append({**instance, **_annotation(category_id, whole)})
    png = f"{Path(photo.file_name).stem}.png"
    photo.image.save(images / photo.file_name, quality=92)
    image_of(ids).save(pngs / png)
    image = {"id": image_id, "file_name": photo.file_name, "height": len(ids), "width": len(ids[0])}
    return image, {"image_id": image_id, "file_name": png, "segments_info": segments}, instances


def _annotation(category_id: int, rle: Dict) -> Dict:
    area, bbox = int(mask_util.area(rle)), mask_util.toBbox(rle).tolist()
    return {"category_id": category_id, "area": area, "bbox": bbox, "iscrowd": 0}


def shrink(image: Image.Image, side: int = 416) -> Image.Image:
    """The image, or a map of labels of mode "L", of at most `side` pixels a side."""
    scale = min(1, side / max(image.size))
    width, height = (max(1, round(scale * x)) for x in image.size)
    how = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return image.resize((width, height), how)
