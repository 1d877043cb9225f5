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
# It rises when the same parameters give other bytes than before.
GENERATOR_VERSION = 1
SPLITS = ("train", "val")
# Image ids of "val" are larger than this, so that the splits share none.
MOST_IMAGES = 1_000_000

PathLike = str | os.PathLike[str]


def ensure_split(
    root: PathLike, split: str, num_images: int, image_size: int = 192, seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """
    Write a split if it is not there or not complete. Of several processes that call this at once, one
    writes and the others wait.

    Raises:
        ValueError: a parameter is out of range, or a complete split of other parameters is there.
        OSError, RuntimeError: as :func:`write_split`.
    """
    root, wanted = Path(root), _checked_parameters(split, num_images, image_size, seed)
    if not _is_complete(root, wanted):
        with _lock(root, split):
            if not _is_complete(root, wanted):
                _write(root, wanted, num_workers)


def write_split(
    root: PathLike, split: str, num_images: int, image_size: int = 192, seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """
    Write a split in place of the one that is there.

    Args:
        root: folder of the dataset, made if it does not exist.
        split: "train" or "val".
        num_images: from 1 to 1,000,000.
        image_size: height and width in pixels, at least 64.
        seed: from 0.
        num_workers: processes that draw; with 0 or 1 this one draws. By default a large split gets up
            to 8, not more than one per CPU.

    Raises:
        ValueError: a parameter is out of range.
        FileExistsError: files that OcclusionScenes did not write are in the way.
        OSError: a file cannot be written. The error names it.
        RuntimeError: a worker process died.
    """
    root, wanted = Path(root), _checked_parameters(split, num_images, image_size, seed)
    with _lock(root, split):
        _write(root, wanted, num_workers)


def _checked_parameters(split: str, num_images: int, image_size: int, seed: int) -> dict:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
    parameters: dict = {"generator": GENERATOR, "generator_version": GENERATOR_VERSION, "split": split}
    numbers = [("num_images", num_images, 1), ("image_size", image_size, SMALLEST_IMAGE), ("seed", seed, 0)]
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
        parameters[name] = operator.index(value)  # JSON takes no NumPy number
    return parameters


def image_id(split: str, index: int) -> int:
    """The COCO image id of scene `index` (from 0)."""
    return SPLITS.index(split) * MOST_IMAGES + index + 1


def file_names(split: str, index: int) -> tuple[str, str]:
    """The names of the image and of the PNG of scene `index` (from 0)."""
    return f"{image_id(split, index):012d}.jpg", f"{image_id(split, index):012d}.png"


def _paths(root: Path, split: str) -> list[Path]:
    names = [split, f"panoptic_{split}"]
    names += [f"annotations/{contents}_{split}.json" for contents in ("instances", "panoptic")]
    return [root / name for name in names]


def _lock(root: Path, split: str):
    """One process writes at a time. The system frees the lock when its process ends, even if killed."""
    _read_parameters(root, split)  # raises if the files are somebody else's
    root.mkdir(parents=True, exist_ok=True)
    return file_lock(str(root / f".{split}"))  # makes the file .{split}.lock


def _is_complete(root: Path, wanted: dict) -> bool:
    found = _read_parameters(root, wanted["split"])
    if found is None:
        return False
    if found != wanted:
        raise ValueError(
            f"{root} holds a split of other parameters.\n  found:     {found}\n  asked for: {wanted}\n"
            "Ask for the parameters found, use another root folder, or replace the split "
            "(write_split, or --overwrite on the command line)."
        )
    images, segments, instances_json, _ = _paths(root, wanted["split"])
    on_disk = {path.name for folder in (images, segments) for path in folder.glob("*")}
    names = (file_names(wanted["split"], k) for k in range(wanted["num_images"]))
    return instances_json.is_file() and all(on_disk.issuperset(pair) for pair in names)


def _read_parameters(root: Path, split: str) -> dict | None:
    """
    Return the parameters of the split on disk, None if none was finished.

    Raises:
        FileExistsError: files of others have the names of the split.
    """
    images, segments, instances_json, panoptic_json = _paths(root, split)
    # The files come first: another process makes the lock before it writes them.
    files = [*images.glob("*"), *segments.glob("*"), *instances_json.parent.glob(instances_json.name)]
    try:
        parameters = json.loads(panoptic_json.read_bytes())["info"]["parameters"]
        if parameters["generator"] == GENERATOR:
            return parameters
        files = [panoptic_json]
    except FileNotFoundError:
        if not files or (root / f".{split}.lock").exists():
            return None
    except (ValueError, LookupError, TypeError):
        files = [panoptic_json]
    raise FileExistsError(
        f"{files[0]} exists, but {GENERATOR} did not write it; use another root folder, or move it away"
    )


def _write(root: Path, parameters: dict, num_workers: int | None) -> None:
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 0, or None")
    images, segments, instances_json, panoptic_json = _paths(root, parameters["split"])
    # From here to the last line the split does not count as there.
    panoptic_json.unlink(missing_ok=True)
    instances_json.unlink(missing_ok=True)
    for folder, extension in ((images, ".jpg"), (segments, ".png")):
        folder.mkdir(exist_ok=True)
        for path in folder.glob("[0-9]" * 12 + extension):
            path.unlink()
    scenes = _write_scenes(root, parameters, num_workers)
    info = {
        "description": f"{GENERATOR}: synthetic panoptic scenes of things that lie on one another",
        "version": str(GENERATOR_VERSION),
        "parameters": parameters,
    }
    common = {"info": info, "licenses": [], "images": [image for image, _, _ in scenes]}
    instances = [annotation for _, _, of_scene in scenes for annotation in of_scene]
    instances = [{"id": k, **annotation} for k, annotation in enumerate(instances, 1)]
    things = [category for category in CATEGORIES if category["isthing"]]
    document = {**common, "annotations": instances, "categories": things}
    write_atomically(str(instances_json), json.dumps(document))
    panoptic = [annotation for _, annotation, _ in scenes]
    document = {**common, "annotations": panoptic, "categories": CATEGORIES}
    write_atomically(str(panoptic_json), json.dumps(document))


def _write_scenes(root: Path, parameters: dict, num_workers: int | None) -> list[tuple]:
    split, count = parameters["split"], parameters["num_images"]
    if num_workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A worker first imports PyTorch with this package, in 5 s and 400 MB. 25 megapixels take 10 s.
        num_workers = min(cpus, count * parameters["image_size"] ** 2 // 25_000_000, 8)
    write = partial(_write_scene, root, parameters)
    progress = partial(tqdm, total=count, desc=f"{GENERATOR} {split}", unit="scene", disable=None)
    if num_workers <= 1:
        return list(progress(map(write, range(count))))
    # Forked workers could hang if this process has used threads or a GPU.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker) as pool:
        return list(progress(pool.map(write, range(count))))


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent cannot end its workers.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_scene(root: Path, parameters: dict, index: int) -> tuple[dict, dict, list[dict]]:
    """Return the COCO image, its panoptic annotation and its instance annotations, still without "id"."""
    split, size = parameters["split"], parameters["image_size"]
    seed = np.random.SeedSequence(parameters["seed"], spawn_key=(SPLITS.index(split), index))
    scene = draw_scene(seed, size)
    ids, segments = scene_to_panoptic(scene)
    number, (jpg, png) = image_id(split, index), file_names(split, index)
    _write_image(root / split / jpg, scene.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    _write_image(root / f"panoptic_{split}" / png, id2rgb(ids), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    instances = []
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
    image = {"id": number, "file_name": jpg, "height": size, "width": size}
    return image, {"image_id": number, "file_name": png, "segments_info": segments}, instances


def _write_image(path: Path, rgb: np.ndarray, options: list[int]) -> None:
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:  # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
