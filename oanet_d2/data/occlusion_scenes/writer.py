"""
OcclusionScenes on disk, in the layout of COCO panoptic.

    <root>/train/000000000001.jpg              the image
    <root>/panoptic_train/000000000001.png     segment ids, R + 256 G + 65536 B
    <root>/annotations/instances_train.json    whole, overlapping silhouettes (COCO RLE), things only
    <root>/annotations/panoptic_train.json     written last: without it a split does not count as there

The split "val" has the same files. `info` of both JSON files holds the parameters of the split. Scene i
depends on (seed, split, i, image_size) only, so the number of workers does not change a byte.
"""

import json
import operator
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import cv2
import numpy as np
from iopath.common.file_io import file_lock
from panopticapi.utils import id2rgb
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ...files import write_atomically
from .categories import CATEGORIES
from .scene import SMALLEST_IMAGE, bounding_box, draw_scene, scene_to_panoptic

GENERATOR = "OcclusionScenes"
# Counts the times that the same parameters began to give other bytes.
GENERATOR_VERSION = 1
SPLITS = ("train", "val")
# Image ids of the k-th split start at k * MOST_IMAGES + 1, so the splits share none.
MOST_IMAGES = 1_000_000
JPEG_QUALITY = 95


def ensure_split(
    root: str | os.PathLike,
    split: str,
    num_images: int,
    image_size: int = 192,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """
    Write a split if it is not there or incomplete. Several processes may call this at once: one
    writes, the others wait.

    Args: as for :func:`write_split`.

    Raises:
        ValueError: a parameter is out of range, or a complete split of other parameters is there.
        OSError, RuntimeError: as for :func:`write_split`.
    """
    root, wanted = Path(root), split_parameters(split, num_images, image_size, seed)
    if not _is_complete(root, wanted):
        with _lock(root, split):
            if not _is_complete(root, wanted):
                _write(root, wanted, num_workers)


def write_split(
    root: str | os.PathLike,
    split: str,
    num_images: int,
    image_size: int = 192,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """
    Write a split. It replaces the split of that name.

    Args:
        root: folder of the dataset, made if it does not exist.
        split: "train" or "val".
        num_images: 1 to 1,000,000.
        image_size: height and width in pixels, at least 64.
        seed: at least 0.
        num_workers: processes to draw with; 0 draws in this one. By default one per CPU, but at most
            8, and fewer for a small split.

    Raises:
        ValueError: a parameter is out of range.
        FileExistsError: a file of somebody else is in the way.
        OSError: a file cannot be written. The error names it.
        RuntimeError: a worker process died.
    """
    root, wanted = Path(root), split_parameters(split, num_images, image_size, seed)
    with _lock(root, split):
        _write(root, wanted, num_workers)


def split_parameters(split: str, num_images: int, image_size: int, seed: int) -> dict:
    """Check the parameters of a split and return them as the JSON files record them."""
    num_images, image_size, seed = map(operator.index, (num_images, image_size, seed))
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
    if not 1 <= num_images <= MOST_IMAGES:
        raise ValueError(f"num_images is {num_images}; it must be 1 to {MOST_IMAGES}")
    if image_size < SMALLEST_IMAGE:
        raise ValueError(f"image_size is {image_size}; it must be at least {SMALLEST_IMAGE}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    return {
        "generator": GENERATOR,
        "generator_version": GENERATOR_VERSION,
        "split": split,
        "num_images": num_images,
        "image_size": image_size,
        "seed": seed,
    }


def image_id(split: str, index: int) -> int:
    """The COCO image id of scene `index` (from 0)."""
    return SPLITS.index(split) * MOST_IMAGES + index + 1


def file_names(split: str, index: int) -> tuple[str, str]:
    """The names of the image and of the PNG of scene `index` (from 0)."""
    return f"{image_id(split, index):012d}.jpg", f"{image_id(split, index):012d}.png"


def _paths(root: Path, split: str) -> tuple[Path, Path, Path, Path]:
    annotations = root / "annotations"
    instances_json, panoptic_json = (annotations / f"{k}_{split}.json" for k in ("instances", "panoptic"))
    return root / split, root / f"panoptic_{split}", instances_json, panoptic_json


def _is_complete(root: Path, wanted: dict) -> bool:
    images, segments, instances_json, panoptic_json = _paths(root, wanted["split"])
    found = _read_parameters(panoptic_json)
    if found is None or not instances_json.is_file():
        return False
    if found != wanted:
        raise ValueError(
            f"{panoptic_json} belongs to a split of other parameters.\n"
            f"  found:     {found}\n  asked for: {wanted}\n"
            "Ask for the parameters found, use another root folder, or replace the split "
            "(write_split, or --overwrite on the command line)."
        )
    on_disk = {path.name for folder in (images, segments) for path in folder.glob("*")}
    names = (file_names(wanted["split"], k) for k in range(wanted["num_images"]))
    return all(on_disk.issuperset(pair) for pair in names)


def _read_parameters(panoptic_json: Path) -> dict | None:
    """The parameters of the split on disk; None if its panoptic JSON does not exist."""
    try:
        parameters = json.loads(panoptic_json.read_bytes())["info"]["parameters"]
        if parameters["generator"] == GENERATOR:
            return parameters
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        pass
    raise FileExistsError(
        f"{panoptic_json} exists, but {GENERATOR} did not write it; "
        "use another root folder, or move that file away"
    )


def _lock(root: Path, split: str):
    """
    A lock for one writer. The system drops it when its process ends, in whatever way.

    Raises:
        FileExistsError: the folders hold files, but no split was ever written here.
    """
    images, segments, instances_json, panoptic_json = _paths(root, split)
    ours = _read_parameters(panoptic_json) is not None
    files = [*images.glob("*"), *segments.glob("*"), *instances_json.parent.glob(instances_json.name)]
    if files and not ours and not (root / f".{split}.lock").exists():
        raise FileExistsError(
            f"{files[0]} exists, but {GENERATOR} did not write it; "
            "use another root folder, or move that file away"
        )
    root.mkdir(parents=True, exist_ok=True)
    return file_lock(str(root / f".{split}"))


def _write(root: Path, parameters: dict, num_workers: int | None) -> None:
    images, segments, instances_json, panoptic_json = _paths(root, parameters["split"])
    workers = _worker_count(num_workers, parameters["num_images"])
    # From here to the last line the split does not count as there.
    panoptic_json.unlink(missing_ok=True)
    instances_json.unlink(missing_ok=True)
    for folder, suffix in ((images, ".jpg"), (segments, ".png")):
        folder.mkdir(exist_ok=True)
        for path in folder.glob("[0-9]" * 12 + suffix):
            path.unlink()
    scenes = _write_scenes(root, parameters, workers)
    info = {
        "description": f"{GENERATOR}: synthetic panoptic scenes of things that lie on one another",
        "version": str(GENERATOR_VERSION),
        "parameters": parameters,
    }
    common = {"info": info, "licenses": [], "images": [image for image, _, _ in scenes]}
    instances = [annotation for _, _, of_scene in scenes for annotation in of_scene]
    documents = {
        instances_json: (
            [{"id": k, **annotation} for k, annotation in enumerate(instances, 1)],
            [category for category in CATEGORIES if category["isthing"]],
        ),
        panoptic_json: ([annotation for _, annotation, _ in scenes], CATEGORIES),
    }
    for path, (annotations, categories) in documents.items():
        content = {**common, "annotations": annotations, "categories": categories}
        write_atomically(str(path), json.dumps(content))


def _worker_count(num_workers: int | None, num_images: int) -> int:
    if num_workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A worker imports PyTorch with this package; in that time it could have drawn 200 scenes.
        num_workers = min(cpus, num_images // 200, 8)
        return num_workers if num_workers > 1 else 0
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 0, or None")
    return num_workers


def _write_scenes(root: Path, parameters: dict, workers: int) -> list[dict]:
    """Write the images of all scenes; return what `write_scene` returned, in order."""
    split, count = parameters["split"], parameters["num_images"]
    write = partial(write_scene, root, split, parameters["image_size"], parameters["seed"])
    progress = partial(tqdm, total=count, desc=f"{GENERATOR} {split}", unit="scene", disable=None)
    if workers == 0:
        return list(progress(map(write, range(count))))
    # Forked workers would hang if this process has used threads or a GPU.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with pool:
            return list(progress(pool.map(write, range(count))))
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"A worker process of {GENERATOR} died: out of memory, killed, or started by a script that "
            'lacks `if __name__ == "__main__":`. With num_workers=0 this process draws the scenes itself.'
        ) from error


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and the parent its workers

    def end_with_parent():
        # A killed parent cannot end its workers.
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def write_scene(
    root: Path, split: str, image_size: int, seed: int, index: int
) -> tuple[dict, dict, list[dict]]:
    """
    Draw scene `index` (from 0) and write its image and its PNG.

    Returns:
        its COCO entries: the image, the panoptic annotation, and the instance annotations from back to
        front, still without "id".
    """
    scene = draw_scene(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)), image_size)
    ids, segments = scene_to_panoptic(scene)
    jpg, png = file_names(split, index)
    _write_image(root / split / jpg, scene.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    _write_image(root / f"panoptic_{split}" / png, id2rgb(ids), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    number, instances = image_id(split, index), []
    for (category_id, mask), segment in zip(scene.things, segments):
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        instances.append(
            {
                "image_id": number,
                "category_id": category_id,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "bbox": bounding_box(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "panoptic_segment_id": segment["id"],
            }
        )
    image = {"id": number, "file_name": jpg, "height": image_size, "width": image_size}
    return image, {"image_id": number, "file_name": png, "segments_info": segments}, instances


def _write_image(path: Path, rgb: np.ndarray, options: list[int]) -> None:
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    try:
        path.write_bytes(data)
    except OSError as error:  # cv2.imwrite would not say why, and a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
