#!/usr/bin/env python3
"""
What a training image costs a worker of the data loader: PanopticDatasetMapper, with and without an
instances JSON, beside Detectron2's DatasetMapper on the same images in the separated format
(instances JSON and PNGs of stuff labels), from which Panoptic FPN is trained.

    python tools/benchmark_mapper.py [--images N] [--repeats N] [--json FILE]

The images are made up at COCO's sizes: noise that JPEG compresses about as well as photos, five
stuff segments and eight things whose polygons overlap. The mappers take turns, each with all images
and the same random sizes and flips; times are medians of the process's CPU time.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List

import cv2
import numpy as np
import torch
from panopticapi.utils import id2rgb
from PIL import Image
from tabulate import tabulate

import detectron2.data.transforms as T
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic

from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.register import load_panoptic

HEIGHT, WIDTH, NUM_THINGS, NUM_STUFF = 480, 640, 8, 5
THING_IDS = {1 + c: c for c in range(NUM_THINGS)}
STUFF_IDS = {1 + NUM_THINGS + c: 1 + c for c in range(NUM_STUFF)}
CATEGORIES = [{"id": i, "name": str(i)} for i in (*THING_IDS, *STUFF_IDS)]
OURS = {"num_things": NUM_THINGS, "stuff_only": False, "ignore_value": 255}
# Format of the dataset, of the masks (COCO's configs have polygons), arguments of our mapper.
VARIANTS = {
    "Detectron2, polygons": ("separated", "polygon", None),
    "Detectron2, bitmasks": ("separated", "bitmask", None),
    "ours, polygons": ("instances JSON", "polygon", OURS),
    "ours, polygons, stuff labels": ("instances JSON", "polygon", {**OURS, "stuff_only": True}),
    "ours, bitmasks": ("instances JSON", "bitmask", OURS),
    "ours, bitmasks from the PNG": ("PNG", "bitmask", OURS),
}
BASELINES = ["Detectron2, polygons", "Detectron2, bitmasks"]
# What our mapper calls, and for what.
STAGES = {"_read_image": "image", "_read_ids": "PNG", "_index_segments": "ids"}
STAGES.update(augmentations="augmentation", _transform_annotations="annotations")
STAGES.update(_visible_instances="annotations", _add_labels="labels")


def noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(HEIGHT, WIDTH) float32 in about [-1, 1], smooth over 1 / `cells` of the width."""
    grid = rng.uniform(-1, 1, (cells * HEIGHT // WIDTH + 1, cells)).astype("float32")
    return cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def make_polygon(rng: np.random.Generator) -> np.ndarray:
    """(N, 2) float, an outline with dents."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(15, 60)))
    radii = np.exp(rng.uniform(np.log(20), np.log(160))) * rng.uniform(0.6, 1, (len(angles), 1))
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
    outline += rng.uniform((0, 0), (WIDTH, HEIGHT))
    return outline.clip(0, (WIDTH - 1, HEIGHT - 1)).round(2)


def write_scene(folder: Path, image_id: int) -> Dict:
    """Write an image and its PNGs; returns what the annotation files say of it."""
    rng = np.random.default_rng(image_id)
    jpg, png = f"{image_id:012d}.jpg", f"{image_id:012d}.png"
    shades = np.stack([noise(rng, 6) + 0.3 * noise(rng, 100) for _ in range(3)], axis=2)
    grain = rng.uniform(-0.25, 0.25, (HEIGHT, WIDTH, 1))
    picture = (128 + 80 * (shades + grain)).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(folder / "images" / jpg, quality=90)

    areas = np.stack([noise(rng, 6) + 0.1 * noise(rng, 60) for _ in range(NUM_STUFF)])
    index = np.where(areas.max(axis=0) > 0, areas.argmax(axis=0) + 1, 0).astype("int32")
    instances = []
    for c in range(NUM_THINGS):
        polygon = make_polygon(rng)
        cv2.fillPoly(index, [polygon.round().astype("int32")], 1 + NUM_STUFF + c)
        box = [*polygon.min(axis=0).tolist(), *np.ptp(polygon, axis=0).tolist()]
        instance = {"bbox": box, "segmentation": [polygon.flatten().tolist()], "category_id": 1 + c}
        instance.update(id=1 + NUM_THINGS * image_id + c, image_id=image_id, iscrowd=0)
        instances.append(instance)
    stuff = np.array([255, *STUFF_IDS.values(), *[0] * NUM_THINGS], dtype=np.uint8)
    ids = np.append(0, 1 + rng.choice(2**24 - 1, NUM_STUFF + NUM_THINGS, replace=False))
    Image.fromarray(stuff[index]).save(folder / "stuff" / png)
    Image.fromarray(id2rgb(ids[index])).save(folder / "panoptic" / png)
    categories = zip(ids[1:].tolist(), [*STUFF_IDS, *THING_IDS])
    segments = [{"id": i, "category_id": c, "iscrowd": 0} for i, c in categories]
    return {
        "images": [{"id": image_id, "file_name": jpg, "height": HEIGHT, "width": WIDTH}],
        "panoptic": [{"image_id": image_id, "file_name": png, "segments_info": segments}],
        "instances": instances,
    }


def write_set(folder: Path, num_images: int) -> Dict[str, List[Dict]]:
    """
    Write images and annotations in both formats.

    Returns:
        dataset dicts for every dataset format of VARIANTS.
    """
    images, panoptic, stuff = (str(folder / name) for name in ("images", "panoptic", "stuff"))
    for path in (images, panoptic, stuff):
        Path(path).mkdir()
    scenes = [write_scene(folder, i) for i in range(num_images)]
    for name in ("panoptic", "instances"):
        content = {"categories": CATEGORIES, "images": [x for s in scenes for x in s["images"]]}
        content["annotations"] = [x for s in scenes for x in s[name]]
        (folder / f"{name}.json").write_text(json.dumps(content))
    instances_json, paths = f"{folder}/instances.json", (images, f"{panoptic}.json", panoptic)
    boxes_and_masks = load_coco_json(instances_json, images)
    return {
        "separated": merge_to_panoptic(boxes_and_masks, load_sem_seg(stuff, images)),
        "instances JSON": load_panoptic(*paths, instances_json, THING_IDS, STUFF_IDS),
        "PNG": load_panoptic(*paths, None, THING_IDS, STUFF_IDS),
    }


def timed(function: Callable, seconds: List[float]) -> Callable:
    """`function`, adding the CPU time of every call to `seconds`."""

    def call(*args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - start)
        return result

    return call


def measure(dicts: Dict[str, List[Dict]], repeats: int) -> Dict[str, Dict[str, float]]:
    """
    Args:
        dicts: from :func:`write_set`.
        repeats: how often every image is read, after one warm-up.

    Returns:
        median seconds per image of every variant: of "all" and, of ours, of the stages in it.
    """
    runs, seconds = [], {}
    for name, (source, masks, ours) in VARIANTS.items():
        sizes = T.ResizeShortestEdge((640, 672, 704, 736, 768, 800), 1333, "choice")
        kwargs = {"augmentations": [sizes, T.RandomFlip()], "image_format": "BGR"}
        kwargs.update(use_instance_mask=True, instance_mask_format=masks, **ours or {})
        mapper = PanopticDatasetMapper(True, **kwargs) if ours else DatasetMapper(True, **kwargs)
        seconds[name] = {"all": []}
        for method, stage in STAGES.items() if ours else []:
            call = timed(getattr(mapper, method), seconds[name].setdefault(stage, []))
            setattr(mapper, method, call)
        runs.append((timed(mapper, seconds[name]["all"]), dicts[source]))
    num_images = len(dicts["separated"])
    for repeat in range(repeats + 1):
        for mapper, images in runs:
            np.random.seed(repeat)
            for image in images:
                mapper(image)
    return {
        name: {stage: statistics.median(x[num_images:]) for stage, x in stages.items()}
        for name, stages in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the results, in seconds, here too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(write_set(Path(folder), args.images), args.repeats)
    stages, table, table_of_stages = [*dict.fromkeys(STAGES.values())], [], []
    for name, s in seconds.items():
        table.append([name, 1 / s["all"], *(s["all"] / seconds[x]["all"] for x in BASELINES)])
        if name not in BASELINES:
            rest = s["all"] - sum(s[stage] for stage in stages)
            table_of_stages.append([name, *(1000 * x for x in [*map(s.get, stages), rest])])
    headers = ["mapper", "images / s", *(f"time / {name}" for name in BASELINES)]
    print(f"{args.images} images of {WIDTH} x {HEIGHT}, one core, PyTorch {torch.__version__}")
    print(tabulate(table, headers, tablefmt="pipe", floatfmt=("", ".1f", ".2f", ".2f")))
    print("\n" + tabulate(table_of_stages, ["ms", *stages, "rest"], "pipe", floatfmt=".1f"))
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
