"""
OcclusionScenes on disk, in the layout of COCO panoptic.

    <root>/train/000000000001.jpg              the image
    <root>/panoptic_train/000000000001.png     segment ids, R + 256 G + 65536 B
    <root>/annotations/instances_train.json    whole, overlapping silhouettes (COCO RLE), things only
    <root>/annotations/panoptic_train.json     written last: without it a split does not count as there

`info` of both JSON files holds the parameters of the split. Scene i depends on (seed, split, i,
image_size) only, so the number of workers does not change a byte.
"""

import json
import os
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from iopath.common.file_io import file_lock
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...submission import image_of
from ..layers import Annotated, encode, write_jsons
from .scene import CATEGORIES, draw_scene, scene_to_panoptic

GENERATOR = "OcclusionScenes"
GENERATOR_VERSION = 1  # rises when the same parameters give other bytes than before
SPLITS = ("train", "val")


def write_split(
    root: str | Path, split: str, num_images: int, image_size: int = 192, seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """
    Write a split if it is not there. Of several processes that call this at once, one writes and the
    others wait.

    Args:
        root: folder of the dataset, made if it does not exist.
        split: "train" or "val".
        num_images: from 1 to 1,000,000.
        image_size: height and width in pixels, at least 64.
        seed: from 0.
        num_workers: processes that draw; with 0 or 1 this one. Default: up to 8 for a large split.

    Raises:
        ValueError: a parameter is out of range, or a split of other parameters is there.
        OSError: a file cannot be written. The error names it.
        RuntimeError: a worker process died.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be 'train' or 'val'")
    wanted: dict = {"generator": GENERATOR, "generator_version": GENERATOR_VERSION, "split": split}
    ranges = ("num_images", num_images, 1), ("image_size", image_size, 64), ("seed", seed, 0)
    for name, value, least in ranges:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
        wanted[name] = int(value)  # JSON takes no NumPy number
    if not _is_there(root, wanted):
        with file_lock(str(root / f".{split}")):
            if not _is_there(root, wanted):
                _write(root, wanted, num_workers)


def _is_there(root: Path, wanted: dict) -> bool:
    path = root / f"annotations/panoptic_{wanted['split']}.json"
    if not path.exists():
        return False
    found = json.loads(path.read_bytes()).get("info", {}).get("parameters")
    if found != wanted:
        raise ValueError(
            f"{path} is of other parameters.\n  found:     {found}\n  asked for: {wanted}\n"
            "Ask for those found, use another root folder, or remove it."
        )
    return True


def _write(root: Path, parameters: dict, num_workers: int | None) -> None:
    split, count = parameters["split"], parameters["num_images"]
    (root / split).mkdir(exist_ok=True)
    (root / f"panoptic_{split}").mkdir(exist_ok=True)
    if num_workers is None:
        # A worker first imports PyTorch with this package, in 5 s and 400 MB. 25 megapixels take 10 s.
        num_workers = min(os.cpu_count() or 1, count * parameters["image_size"] ** 2 // 25_000_000, 8)
    scenes: DataLoader = DataLoader(
        range(count),  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=partial(_write_scene, root, parameters),
        num_workers=num_workers if num_workers > 1 else 0,
        worker_init_fn=_start_worker,
        # forked workers could hang if this process has used threads
        multiprocessing_context="spawn" if num_workers > 1 else None,
        generator=torch.Generator(),  # or its seed would be a random number of the training
    )
    annotated = list(tqdm(scenes, desc=f"{GENERATOR} {split}", unit="scene", disable=None))
    description = f"{GENERATOR}: synthetic panoptic scenes of things that lie on one another"
    info = {"description": description, "version": str(GENERATOR_VERSION), "parameters": parameters}
    write_jsons(root / "annotations", split, CATEGORIES, annotated, info=info, licenses=[])


def _start_worker(worker_id: int) -> None:
    cv2.setNumThreads(1)


def _write_scene(root: Path, parameters: dict, index: int) -> Annotated:
    split, size = parameters["split"], parameters["image_size"]
    seed = np.random.SeedSequence(parameters["seed"], spawn_key=(SPLITS.index(split), index))
    scene = draw_scene(seed, size)
    ids, segments = scene_to_panoptic(scene)
    number = SPLITS.index(split) * 1_000_000 + index + 1  # the splits share none
    jpg, png = f"{number:012d}.jpg", f"{number:012d}.png"
    _write_image(root / split / jpg, scene.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    rgb = np.array(image_of(ids))
    _write_image(root / f"panoptic_{split}" / png, rgb, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    instances = []
    for (category_id, mask), segment in zip(scene.things, segments):
        instance = {"image_id": number, "category_id": category_id, "segmentation": encode(mask)}
        instance |= {"bbox": list(cv2.boundingRect(mask.astype(np.uint8))), "area": int(mask.sum())}
        instances.append({**instance, "iscrowd": 0, "panoptic_segment_id": segment["id"]})
    image = {"id": number, "file_name": jpg, "height": size, "width": size}
    return image, {"image_id": number, "file_name": png, "segments_info": segments}, instances


def _write_image(path: Path, rgb: np.ndarray, options: list[int]) -> None:
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:  # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
