"""OcclusionScenes on disk, in the layout of COCO panoptic; whole or not there at all.

    <root>/train/000000000001.jpg              the image
    <root>/panoptic_train/000000000001.png     segment ids, R + 256 G + 65536 B
    <root>/annotations/instances_train.json    whole, overlapping silhouettes (COCO RLE), things only
    <root>/annotations/panoptic_train.json     written last: a split is complete when it is there

and the same for `val`. In both JSON files `info` holds the parameters the split was made with.
Scene i depends only on (seed, split, i, image_size), so any number of workers writes the same bytes.
"""

import contextlib
import fcntl
import json
import operator
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import cv2
import numpy as np
from panopticapi.utils import id2rgb
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .categories import CATEGORIES
from .scene import SMALLEST_IMAGE, Scene, bounding_box, draw_scene, scene_to_panoptic

GENERATOR = "OcclusionScenes"
GENERATOR_VERSION = 1
"""Raised whenever the same parameters give other bytes than before."""

SPLITS = ("train", "val")
MOST_IMAGES = 1_000_000
"""Of one split; the image ids of the k-th split start at k * MOST_IMAGES + 1, so that no two collide."""
JPEG_QUALITY = 95


# ---------------------------------------------------------------------------------------------------
# One scene


def scene_seed(seed: int, split: str, index: int) -> np.random.SeedSequence:
    """The seed of scene `index` (from 0) of a split; no two (seed, split, index) share one."""
    return np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))


def image_id(split: str, index: int) -> int:
    """The COCO image id of scene `index` (from 0) of a split."""
    return SPLITS.index(split) * MOST_IMAGES + index + 1


def file_names(split: str, index: int) -> tuple[str, str]:
    """(JPEG name, PNG name) of scene `index` (from 0) of a split."""
    number = f"{image_id(split, index):012d}"
    return f"{number}.jpg", f"{number}.png"


def instance_annotations(scene: Scene, segments: list[dict], of_image: int) -> list[dict]:
    """COCO instance annotations of a scene, from back to front; their `id` is within the image, from 0.

    Args:
        segments: as `scene_to_panoptic` gives them: the first ones are the things, in the same order.
    """
    annotations = []
    for k, (thing, segment) in enumerate(zip(scene.things, segments)):
        rle = coco_mask.encode(np.asfortranarray(thing.mask, dtype=np.uint8))
        annotations.append(
            {
                "id": k,
                "image_id": of_image,
                "category_id": thing.category_id,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "bbox": bounding_box(thing.mask),
                "area": int(thing.mask.sum()),
                "iscrowd": 0,
                "panoptic_segment_id": segment["id"],
            }
        )
    return annotations


def write_scene(root: Path, split: str, index: int, image_size: int, seed: int) -> dict:
    """Draws one scene and writes its two image files.

    Returns:
        a JSON-able dict: index, segments_info, instances (whose ids are within the image).
    Raises:
        OSError: a file cannot be written; names it.
    """
    scene = draw_scene(scene_seed(seed, split, index), image_size)
    ids, segments = scene_to_panoptic(scene)
    jpg, png = file_names(split, index)
    _encode(root / split / jpg, scene.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    _encode(root / f"panoptic_{split}" / png, id2rgb(ids), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    instances = instance_annotations(scene, segments, image_id(split, index))
    return {"index": index, "segments_info": segments, "instances": instances}


def _encode(path: Path, rgb: np.ndarray, options: list[int]) -> None:
    # Not cv2.imwrite: on a full disk it only returns False, and write_bytes says what went wrong.
    done, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise OSError(f"OpenCV could not encode {path.name}, an array of {rgb.shape} {rgb.dtype}")
    with _naming(path):
        path.write_bytes(data.tobytes())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes an OSError from within name `path`: Python's own on a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# ---------------------------------------------------------------------------------------------------
# A whole split


def ensure_split(
    root: str | os.PathLike,
    split: str,
    num_images: int,
    image_size: int = 192,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Makes sure a split is there, whole and with these parameters; at once if it already is.

    An incomplete split, such as an interrupted run leaves behind, is written anew. Several processes
    may call this at once: one writes, the others wait for it.

    Args: as for `write_split`.
    Raises:
        ValueError: a parameter is out of range; or a complete split of other parameters is there.
        OSError: as for `write_split`.
    """
    wanted = split_parameters(split, num_images, image_size, seed)
    root = Path(root)
    if _is_there(root, wanted):
        return
    with _locked(root, split) as lock:
        if not _is_there(root, wanted):
            _write(root, wanted, num_workers, lock)


def write_split(
    root: str | os.PathLike,
    split: str,
    num_images: int,
    image_size: int = 192,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Writes a split, in place of whatever split of that name is there.

    Args:
        root: the folder of the data set; made if it is not there.
        split: "train" or "val".
        num_images: 1 to 1,000,000. image_size: pixels, at least 64. seed: at least 0.
        num_workers: processes to draw with; 0 draws in this one; None takes one per CPU this process
            may use, but not more than one per 25 images. The files do not depend on it.
    Raises:
        ValueError: a parameter is out of range.
        FileExistsError: a file that OcclusionScenes did not write is in the way.
        OSError: a file or folder cannot be written (read-only, disk full ...); names it. The split
            then counts as not there.
        RuntimeError: a worker process died (out of memory, killed); the split counts as not there.
    """
    wanted = split_parameters(split, num_images, image_size, seed)
    root = Path(root)
    with _locked(root, split) as lock:
        _write(root, wanted, num_workers, lock)


def split_parameters(split: str, num_images: int, image_size: int, seed: int) -> dict:
    """What a split is made from: exactly what tells two splits apart, and what `info` records.

    Raises:
        ValueError: one of them is out of range.
        TypeError: a number is not a whole one.
    """
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


def _paths(root: Path, split: str) -> tuple[Path, Path, Path, Path]:
    """(image folder, PNG folder, instances JSON, panoptic JSON)"""
    instances_json = root / "annotations" / f"instances_{split}.json"
    panoptic_json = root / "annotations" / f"panoptic_{split}.json"
    return root / split, root / f"panoptic_{split}", instances_json, panoptic_json


def _is_there(root: Path, wanted: dict) -> bool:
    """Whether the split is there, whole.

    Raises:
        ValueError: a whole split of other parameters is there.
    """
    images, segments, instances_json, panoptic_json = _paths(root, wanted["split"])
    found = _read_parameters(panoptic_json)
    if found is None or not instances_json.is_file():
        return False
    if found != wanted:
        raise ValueError(
            f"{panoptic_json} belongs to another split of {GENERATOR} than the one asked for.\n"
            f"  found:     {found}\n  asked for: {wanted}\n"
            "Ask for the parameters found, use another root folder, or write it anew "
            "(write_split, or --overwrite on the command line)."
        )
    jpgs, pngs = zip(*(file_names(wanted["split"], k) for k in range(wanted["num_images"])))
    return _names_in(images).issuperset(jpgs) and _names_in(segments).issuperset(pngs)


def _read_parameters(panoptic_json: Path) -> dict | None:
    """The parameters a split was made with, or None where its last file is not there.

    Raises:
        FileExistsError: the file was not written by OcclusionScenes.
    """
    try:
        content = json.loads(panoptic_json.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    info = content.get("info") if isinstance(content, dict) else None
    parameters = info.get("parameters") if isinstance(info, dict) else None
    if not isinstance(parameters, dict) or parameters.get("generator") != GENERATOR:
        raise FileExistsError(
            f"{panoptic_json} is there but was not written by {GENERATOR}; "
            "use another root folder, or move that file away"
        )
    return parameters


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


@contextlib.contextmanager
def _locked(root: Path, split: str) -> Iterator[int]:
    """Holds the split's lock: one process writes, the others wait. Gives the lock's file descriptor.

    A lock goes when the last process that has it open ends, however it ends.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{split}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _write(root: Path, parameters: dict, num_workers: int | None, lock: int) -> None:
    """Writes the split; the caller holds its lock."""
    workers = _worker_count(num_workers, parameters["num_images"])
    split, count = parameters["split"], parameters["num_images"]
    images, segments, instances_json, panoptic_json = _paths(root, split)
    _read_parameters(panoptic_json)  # raises where the file is somebody else's
    # The marker goes first: from here until the last line the split is not there.
    panoptic_json.unlink(missing_ok=True)
    instances_json.unlink(missing_ok=True)
    for folder, suffix in ((images, "jpg"), (segments, "png")):
        _empty(folder, suffix)
    panoptic_json.parent.mkdir(exist_ok=True)

    records: list[dict] = [{}] * count
    progress = tqdm(total=count, desc=f"{GENERATOR} {split}", unit="scene", disable=None)
    with progress, contextlib.closing(_all_scenes(root, parameters, workers, lock)) as scenes:
        for record in scenes:
            records[record["index"]] = record
            progress.update()
    panoptic, instances = coco_documents(parameters, records)
    _write_json(instances_json, instances)
    _write_json(panoptic_json, panoptic)


def _empty(folder: Path, suffix: str) -> None:
    """Makes `folder` if it is not there, and removes the images an earlier run left in it."""
    folder.mkdir(exist_ok=True)
    own = re.compile(rf"\d{{12}}\.{suffix}")
    foreign = sorted(name for name in os.listdir(folder) if not own.fullmatch(name))
    if foreign:
        raise FileExistsError(
            f"{folder} holds {len(foreign)} files that {GENERATOR} did not write, "
            f"such as {foreign[0]}; use another root folder"
        )
    for name in os.listdir(folder):
        (folder / name).unlink()


def _write_json(path: Path, content: dict) -> None:
    """Writes `path` so that it is either whole or not there, even if the machine goes down."""
    partial = path.with_suffix(".json.partial")
    with _naming(partial):
        with open(partial, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def coco_documents(parameters: dict, records: list[dict]) -> tuple[dict, dict]:
    """The contents of (panoptic JSON, instances JSON), from what `write_scene` gave, in order."""
    split, size = parameters["split"], parameters["image_size"]
    info = {
        "description": f"{GENERATOR}: synthetic panoptic scenes of things that lie on one another",
        "version": str(parameters["generator_version"]),
        "parameters": parameters,
    }
    images: list[dict] = []
    panoptic: list[dict] = []
    instances: list[dict] = []
    for record in records:
        number = image_id(split, record["index"])
        jpg, png = file_names(split, record["index"])
        images.append({"id": number, "file_name": jpg, "height": size, "width": size})
        segments = record["segments_info"]
        panoptic.append({"image_id": number, "file_name": png, "segments_info": segments})
        for annotation in record["instances"]:
            instances.append({**annotation, "id": len(instances) + 1})
    things = [category for category in CATEGORIES if category["isthing"]]
    common = {"info": info, "licenses": [], "images": images}
    return (
        {**common, "annotations": panoptic, "categories": CATEGORIES},
        {**common, "annotations": instances, "categories": things},
    )


# ---------------------------------------------------------------------------------------------------
# Workers
#
# Worker processes are plain `python worker.py` rather than multiprocessing's: those either fork (not
# safe once the training process has threads or a GPU) or import the caller's main module and this
# whole package, torch included, only to draw pictures.


def _worker_count(num_workers: int | None, count: int) -> int:
    """How many processes to start for `count` scenes; 0: none, draw in this one."""
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 0, or None")
    if num_workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(cpus, count // 25)
        return num_workers if num_workers > 1 else 0
    return min(num_workers, count)


def _all_scenes(root: Path, parameters: dict, workers: int, lock: int) -> Generator[dict, None, None]:
    """Writes every scene's images and yields the records, in any order; ends its workers when closed."""
    split, count, size, seed = (parameters[key] for key in ("split", "num_images", "image_size", "seed"))
    if not workers:
        for k in range(count):
            yield write_scene(root, split, k, size, seed)
        return
    lines: queue.Queue = queue.Queue()
    running = []
    try:
        for k in range(workers):
            job = {
                "root": str(root.absolute()),
                "split": split,
                "indices": [k, count, workers],
                "image_size": size,
                "seed": seed,
                "sys_path": sys.path,
            }
            worker = _start_worker(job, lock)
            reader = threading.Thread(target=_read_lines, args=(worker, lines), daemon=True)
            running.append((worker, reader))
            reader.start()
        for _ in range(count):
            record = lines.get()
            if isinstance(record, Exception):
                raise record
            yield record
    finally:
        for worker, reader in running:
            worker.kill()
            reader.join()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


def _start_worker(job: dict, lock: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # Should this process be killed, nobody else starts to write before its workers have ended.
        pass_fds=[lock],
    )


def _read_lines(worker: subprocess.Popen, lines: queue.Queue) -> None:
    """Passes a worker's records on; and where it ends badly, the reason as an exception."""
    assert worker.stdout is not None  # it was asked for
    try:
        for line in worker.stdout:
            record = json.loads(line)
            if "errno" in record:
                raise OSError(record["errno"], record["reason"], record["file"])
            lines.put(record)
        status = worker.wait()
        if status != 0:
            raise RuntimeError(
                f"a worker process of {GENERATOR} ended with exit status {status}; its messages are "
                "above. A negative status is the signal that ended it, -9 often for want of memory."
            )
    except Exception as error:  # whatever it is: whoever waits for the next record has to hear of it
        lines.put(error)


def work(job: dict) -> None:
    """What a worker does: writes its scenes, and prints for each the record as a line of JSON.

    A file that cannot be written ends the work, with a line of errno, reason and file.
    """
    for index in range(*job["indices"]):
        try:
            record = write_scene(Path(job["root"]), job["split"], index, job["image_size"], job["seed"])
        except OSError as error:
            record = {"errno": error.errno, "reason": error.strerror or str(error), "file": error.filename}
        print(json.dumps(record), flush=True)
        if "errno" in record:
            return
