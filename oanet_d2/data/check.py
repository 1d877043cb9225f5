"""
Find everything that is wrong with a dataset in the COCO panoptic format, before training stops at
the first of it or silently learns from it:

    python -m oanet_d2.data.check NAME
    python -m oanet_d2.data.check IMAGE_ROOT PANOPTIC_JSON PANOPTIC_ROOT [INSTANCES_JSON]

Exit status: 0 if nothing is wrong, 1 if something is, 2 if the command itself is wrong.
"""

import argparse
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
from panopticapi.utils import rgb2id
from PIL import Image
from tqdm import tqdm

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager

from ..config import add_oanet_config
from .check_annotations import (
    ANNOTATION,
    IMAGE,
    SEGMENT,
    Problem,
    by_id,
    check_instances,
    check_panoptic,
    entries,
    leads_outside,
    read_json,
)
from .register import register_from_config

__all__ = ["Problem", "check", "format_report", "main"]

YAML_KEYS = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
CHUNK = 16  # samples that a worker takes at once


def check(
    image_root: str,
    panoptic_json: str,
    panoptic_root: str,
    instances_json: Optional[str] = None,
    workers: Optional[int] = None,
    progress: bool = True,
) -> List[Problem]:
    """
    Check a whole dataset; the first four arguments are :func:`register_panoptic`'s.

    Args:
        workers: processes that read the images; up to 1: only this one; None: one per CPU, fewer
            for small datasets. A script that asks for several needs `if __name__ == "__main__":`.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        everything that is wrong: first in the JSONs, then in the images, in the JSON's order.

    Raises:
        BrokenProcessPool: the worker processes do not start.
    """
    paths = (image_root, panoptic_json, panoptic_root, instances_json)
    return _check([None if p is None else str(p) for p in paths], workers, progress)[0]


def _check(paths: List, workers: Optional[int], progress: bool) -> Tuple[List[Problem], int]:
    """What :func:`check` returns, and the number of samples."""
    image_root, panoptic_json, panoptic_root, instances_json = paths
    contents, problems = [], []
    for path in (panoptic_json, instances_json):
        try:
            contents.append(None if path is None else read_json(path))
        except Exception as error:  # whatever a file, or a handler of PathManager, makes it raise
            contents.append(None)
            problems.append(Problem("annotation file unusable", path, repr(error)))
    panoptic, instances = contents
    if panoptic is None:
        return problems, 0

    samples = list(make_samples(panoptic, image_root, panoptic_root))
    problems += check_panoptic(panoptic, panoptic_json)
    if instances is not None:
        problems += check_instances(instances, instances_json, panoptic)
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        workers = min(len(affinity(0)), len(samples) // 50)
    results = run(check_sample, samples, min(workers, len(samples)))
    disable = None if progress else True  # None: unless stderr is a terminal
    for found in tqdm(results, "Checking", len(samples), unit="sample", disable=disable):
        problems += found
    return problems, len(samples)


def format_report(problems: List[Problem], num_samples: int, examples: int = 3) -> str:
    """
    Args:
        problems: what :func:`check` returns.
        examples: so many of every kind are shown.

    Returns:
        lines of text, of nothing but printable characters whatever the file names are.
    """
    counts = Counter(p.kind for p in problems)
    lines = [f"Samples: {num_samples}. Problems: {len(problems)}, of {len(counts)} kinds."]
    for kind, count in counts.items():
        lines += ["", f"{kind}: {count}"]
        for p in islice((p for p in problems if p.kind == kind), examples):
            text = f"{p.where}: {p.detail}"
            lines.append(f"    {text if text.isprintable() else repr(text)[1:-1]}")
        if 0 < examples < count:
            lines.append(f"    ... and {count - examples} more")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Image files


class Sample(NamedTuple):
    """An annotation's files and what the JSON says of them; None: unknown, or not to be opened."""

    image: Optional[str]
    png: Optional[str]
    size: Optional[Tuple[int, int]]  # width, height
    areas: Optional[Dict[int, Optional[float]]]  # segment id -> area


class Picture(NamedTuple):
    """An image file as training reads it, and how it is stored."""

    rgb: np.ndarray
    size: Tuple[int, int]  # width, height
    storage: str
    is_16_bit: bool


def make_samples(panoptic: Dict, image_root: str, panoptic_root: str) -> Iterator[Sample]:
    """A sample for every annotation of the panoptic JSON."""
    images = by_id(panoptic["images"], IMAGE)
    for annotation in entries(panoptic["annotations"], ANNOTATION):
        image, areas = images.get(annotation.get("image_id"), {}), None
        if "segments_info" in annotation:
            segments = [s for s in entries(annotation["segments_info"], SEGMENT) if "id" in s]
            areas = {s["id"]: s.get("area") for s in segments if 0 < s["id"] < 256**3}
        names = (image_root, image.get("file_name")), (panoptic_root, annotation.get("file_name"))
        image_path, png_path = (
            None if not n or leads_outside(n) else f"{root}/{n}" for root, n in names
        )
        size = (image["width"], image["height"]) if {"width", "height"} <= image.keys() else None
        yield Sample(image_path, png_path, size, areas)


def check_sample(sample: Sample) -> List[Problem]:
    """Compare the files of an annotation with what it says, and with each other."""
    try:
        return list(_check_sample(sample))
    except Exception as error:  # one sample must not end the check of all others
        return [_not_checked(sample, repr(error))]


def _check_sample(sample: Sample) -> Iterator[Problem]:
    pictures: Dict[str, Picture] = {}
    paths = {"image": sample.image or "", "PNG": sample.png or ""}
    for what, path in paths.items():
        try:
            if path:
                pictures[what] = read_picture(path)
        except FileNotFoundError as error:
            yield Problem(f"{what} missing", path, str(error))
        except Exception as error:  # PIL's decoders raise whatever they stumble over
            yield Problem(f"{what} unreadable", path, repr(error))
    size, source = sample.size, "the JSON says"
    image, png = pictures.get("image"), pictures.get("PNG")
    if image is not None:
        if image.is_16_bit:
            detail = f"is {image.storage}; training takes 8 bits per channel"
            yield Problem("image of more than 8 bits", paths["image"], detail)
        if size is not None and image.size != size:
            detail = f"is {image.size} (width, height), the JSON says {size}"
            yield Problem("image size differs from the JSON", paths["image"], detail)
        size, source = image.size, "the image is"
    if png is not None:
        if size is not None and png.size != size:
            detail = f"is {png.size} (width, height), {source} {size}"
            yield Problem("PNG size differs from the image", paths["PNG"], detail)
        yield from check_png(png, paths["PNG"], sample.areas)


def read_picture(path: str) -> Picture:
    """
    Raises:
        FileNotFoundError: there is no such file. Anything else: it cannot be decoded.
    """
    if not PathManager.isfile(path):  # opening a named pipe would wait forever
        raise FileNotFoundError("there is no such file")
    with PathManager.open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PIL opens RGB PNGs of 16 bits per channel as if they had 8, and does not tell.
        header = f.read(25)
        f.seek(0)
        image = Image.open(f)
        is_16_bit = header.startswith(b"\x89PNG") and header[24:] == b"\x10"
        is_16_bit = is_16_bit or image.mode.startswith(("I", "F"))
        storage = f"{image.format} of mode {image.mode}" + " and 16 bits" * is_16_bit
        rgb = utils.read_image(path, "RGB")
    return Picture(rgb, (rgb.shape[1], rgb.shape[0]), storage, is_16_bit)


def check_png(png: Picture, path: str, areas: Optional[Dict]) -> Iterator[Problem]:
    """Compare the segments in a PNG with those that its annotation lists."""
    if png.is_16_bit:
        detail = f"is {png.storage}; it must have 8 bits per channel"
        yield Problem("PNG of more than 8 bits", path, detail)
    elif png.storage != "PNG of mode RGB":
        yield Problem("PNG is not RGB", path, f"is {png.storage}; it must be PNG of mode RGB")
    elif areas is not None:
        ids, pixels = np.unique(rgb2id(png.rgb), return_counts=True)
        pixels = dict(zip(ids.tolist(), pixels.tolist()))
        pixels.pop(0, None)  # void
        unlisted = [f"{i} ({n} pixels)" for i, n in pixels.items() if i not in areas]
        unseen = [str(i) for i, area in areas.items() if i not in pixels and area != 0]
        wrong = [
            f"segment {i} has {pixels[i]} pixels, the JSON says {area}"
            for i, area in areas.items()
            if area and i in pixels and area != pixels[i]
        ]
        for kind, found in (
            ("PNG id not in segments_info", unlisted),
            ("segments_info id not in the PNG", unseen),
            ("area differs from the PNG", wrong),
        ):
            if found:
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                yield Problem(kind, path, ", ".join(found[:3]) + more)


def _not_checked(sample: Sample, why: str) -> Problem:
    return Problem("could not be checked", f"{sample.png}, {sample.image}", why)


# -------------------------------------------------------------------------------------------------
# Processes


def run(function: Callable, samples: List[Sample], workers: int) -> Iterator[List[Problem]]:
    """
    Yields:
        function(sample) of every sample, in order.
    """
    if workers <= 1:
        yield from map(function, samples)
        return
    with _pool(1) as pool:
        pool.submit(os.getpid).result()  # raises if workers do not start
    done = 0
    while done < len(samples):
        try:
            with _pool(workers) as pool:
                for result in pool.map(function, samples[done:], chunksize=CHUNK):
                    done += 1
                    yield result
        except BrokenProcessPool:
            # One worker has died (no memory left, a fault in a decoder), which ends all of them.
            # The samples that were under way go one by one, which tells whose fault it was.
            for sample in samples[done : done + workers * CHUNK]:
                try:
                    with _pool(1) as pool:
                        result = pool.submit(function, sample).result()
                except BrokenProcessPool:
                    result = [_not_checked(sample, "the process that read it died")]
                done += 1
                yield result


def _pool(workers: int) -> ProcessPoolExecutor:
    # To fork this process, which may have threads, is not safe. On Linux a server that has none
    # imports torch and all that once and forks; elsewhere every worker imports it.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload([__package__])
    return ProcessPoolExecutor(workers, context)


# -------------------------------------------------------------------------------------------------
# Command line


def find_dataset(name: str, config_file: Optional[str]) -> List[Optional[str]]:
    """
    Returns:
        :func:`register_panoptic`'s paths of a dataset that is registered, or described by a yaml.

    Raises:
        ValueError: it is neither, or the yaml is wrong.
    """
    if config_file is not None:
        cfg = get_cfg()
        add_oanet_config(cfg)
        try:
            cfg.merge_from_file(config_file)
            files = cfg.DATASETS.PANOPTIC.get(name, {})
            is_complete = isinstance(files, dict) and set(YAML_KEYS[:3]) <= set(files) <= set(
                YAML_KEYS
            )
            if is_complete and all(files[key] for key in YAML_KEYS[:3]):
                # Registering it would stop at the first of what is to be reported.
                return [files.get(key) or None for key in YAML_KEYS]
            register_from_config(cfg)
        except Exception as error:  # whatever a yaml makes it raise
            raise ValueError(f"{config_file}: {error!r}") from error
    names = sorted(filter(_is_coco_panoptic, DatasetCatalog.list()))
    if name not in names:
        raise ValueError(
            f"{name!r} is not registered as a dataset in the COCO panoptic format. Give its files, "
            f"a --config-file that describes it, or one of {', '.join(names)}."
        )
    keys = ("image_root", "panoptic_json", "panoptic_root", "json_file")
    return [getattr(MetadataCatalog.get(name), key, None) for key in keys]


def _is_coco_panoptic(name: str) -> bool:
    # Cityscapes has the same metadata, but its images lie in a folder per city.
    loader = getattr(DatasetCatalog[name], "__module__", None) or ""
    keys = ("image_root", "panoptic_json", "panoptic_root")
    is_panoptic = all(getattr(MetadataCatalog.get(name), key, None) for key in keys)
    return is_panoptic and "cityscapes" not in loader


def main(argv: Optional[List[str]] = None) -> int:
    """
    The command line.

    Returns:
        its exit status: 0 nothing wrong, 1 problems, 2 no such dataset.
    """
    parser = argparse.ArgumentParser(
        prog="python -m oanet_d2.data.check",
        description="Finds everything that is wrong with a dataset in the COCO panoptic format.",
        usage="%(prog)s [options] NAME | IMAGE_ROOT PANOPTIC_JSON PANOPTIC_ROOT [INSTANCES_JSON]",
    )
    add = parser.add_argument
    add("dataset", nargs="+", metavar="DATASET", help="a registered name, or three or four paths")
    add("--config-file", metavar="YAML", help="a config that describes it (DATASETS.PANOPTIC)")
    add("--workers", type=int, metavar="N", help="processes; default: one per CPU")
    add("--examples", type=int, default=3, metavar="N", help="shown of each kind of problem")
    args = parser.parse_args(argv)
    if len(args.dataset) not in (1, 3, 4):
        parser.error(f"{len(args.dataset)} arguments given; it must be a NAME or 3 or 4 paths")
    paths = (args.dataset + [None])[:4]
    if len(args.dataset) == 1:
        try:
            paths = find_dataset(args.dataset[0], args.config_file)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    problems, num_samples = _check(paths, args.workers, progress=True)
    print(format_report(problems, num_samples, args.examples))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
