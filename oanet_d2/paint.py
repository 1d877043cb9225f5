"""
Make a panoptic map of every image from overlapping masks: COCO results of any segmenter, or COCO
annotations.

    oanet-d2 paint --instances results.json --images instances_val.json --order smaller_first \\
        --output panoptic_val
    oanet-d2 paint --instances instances_train.json --order smaller_first --output panoptic_train

It writes OUTPUT.json and the PNGs in OUTPUT/, in the COCO panoptic format. An interrupted run goes on
where it was. With --gt it compares orders with a panoptic ground truth (this needs PyTorch and SciPy).
"""

import argparse
import json
import logging
import math
import os
import reprlib
import sys
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from .files import atomic_path, write_atomically
from .json_lists import JsonLists, Range
from .painting.arrays import extent
from .painting.formats import Detections, read_detections
from .painting.painter import RULES, Painted, load_order, paint_detections
from .submission import png_of

__all__ = ["Job", "Task", "main", "map_images"]

logger = logging.getLogger("oanet_d2.paint")


@dataclass
class Task:
    """An image, and where its entries are in the JSONs."""

    image: Dict
    instances: List[Range] = field(default_factory=list)
    semantic: List[Range] = field(default_factory=list)
    truth: List[Range] = field(default_factory=list)


@dataclass
class Job:
    """How images are painted. Processes get a copy."""

    instances: str
    images: str
    semantic: Optional[str]
    categories: List[Dict]
    order: str
    score_threshold: float
    overlap_threshold: float
    stuff_area: int
    skip_broken: bool

    def read(self, task: Task) -> Tuple[Detections, Optional[np.ndarray]]:
        """The instances of an image that have the score, and (H, W) positions of stuff in `categories`."""
        size = task.image["height"], task.image["width"]
        entries = JsonLists(self.instances).parse(task.instances)
        try:
            detections = self._detections(entries, size)
        except ValueError as error:
            at = f"{self.instances}, image {task.image['id']!r}"
            if not self.skip_broken:
                raise ValueError(f"{at}: {error} (--skip-broken leaves such instances out.)") from None
            detections = self._detections([x for x in entries if self._is_good(x, size, at)], size)
        if self.semantic is None:
            return detections, None
        return detections, self._semantic(JsonLists(self.semantic).parse(task.semantic), task)

    def _semantic(self, entries: List[Dict], task: Task) -> np.ndarray:
        at = f"{self.semantic}, image {task.image['id']!r}"
        labels = {c["id"]: 0 if c["isthing"] else i for i, c in enumerate(self.categories, start=1)}
        unknown = [x.get("category_id") for x in entries if x.get("category_id") not in labels]
        if unknown:
            raise ValueError(f"{at}: the category_id {unknown[0]!r} is not listed in the categories.")
        stuff = [x for x in entries if labels[x["category_id"]]]
        size = task.image["height"], task.image["width"]
        try:
            masks = read_detections([x.get("segmentation") for x in stuff], image_size=size)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
        semantic = np.zeros(size, np.int32)
        for i in reversed(range(len(stuff))):  # the first has the pixel, as in panopticapi
            mask, region = masks.mask_of(i)
            semantic[region][mask] = labels[stuff[i]["category_id"]]
        return semantic

    def _detections(self, entries: List[Dict], size: Tuple[int, int]) -> Detections:
        things = {c["id"]: c["name"] for c in self.categories if c["isthing"]}
        for x in entries:
            category, score = x.get("category_id"), x.get("score", 1)
            if category not in [*things]:
                raise ValueError(f"The category_id {category!r} is no thing of the categories.")
            if not x.get("segmentation"):  # [] is what boxes without masks have
                raise ValueError(f"An instance of category {category} has no segmentation.")
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                raise ValueError(f"The score {score!r} of an instance is no number.")
        chosen = [x for x in entries if x.get("score", 1) >= self.score_threshold]
        detections = read_detections(chosen, image_size=size)
        detections.class_names = things
        return detections

    def _is_good(self, entry: Dict, size: Tuple[int, int], at: str) -> bool:
        try:
            self._detections([entry], size)
        except ValueError as error:
            logger.warning(f"{at}: {error} It is left out.")
            return False
        return True

    def paint(self, detections: Detections, semantic: Any, order: Any) -> Painted:
        """The segments have the category_id of the JSON."""
        painted = paint_detections(
            detections,
            _loaded(order) if isinstance(order, str) else order,
            semantic,
            score_threshold=-np.inf,
            overlap_threshold=self.overlap_threshold,
            stuff_area_threshold=self.stuff_area,
        )
        for x in painted.segments_info:
            if not x["isthing"]:
                x["category_id"] = self.categories[x["category_id"] - 1]["id"]
        return painted

    def write(self, folder: str, task: Task) -> Dict:
        """Write the PNG of an image, and return its entry of the JSON."""
        detections, semantic = self.read(task)
        painted = self.paint(detections, semantic, self.order)
        name = _png_name(task.image)
        write_atomically(os.path.join(folder, name), png_of(painted.panoptic_seg), sync=False)
        whole = slice(0, task.image["height"]), slice(0, task.image["width"])
        segments = []
        for x in painted.segments_info:
            region = detections.regions[x["instance_id"]] if x["isthing"] else whole
            mask = painted.panoptic_seg[region] == x["id"]
            rows, columns = extent(mask, region)
            bbox = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
            segment = {key: x.get(key, 0) for key in ("id", "category_id", "iscrowd")}
            segments.append({**segment, "area": int(np.count_nonzero(mask)), "bbox": bbox})
        return {"image_id": task.image["id"], "file_name": name, "segments_info": segments}


_loaded = cache(load_order)  # every process loads it once


def _png_name(image: Dict) -> str:
    return os.path.splitext(image["file_name"])[0] + ".png"


def map_images(function: Callable, tasks: List[Task], processes: int, about: str) -> Iterator:
    """The function of every task, in their order. The first error ends it."""
    with tqdm(total=len(tasks), desc=about, unit="image", disable=None) as bar:
        if processes == 1:
            for task in tasks:
                yield function(task)
                bar.update()
            return
        # Not forked: a copy of a process whose threads have worked may wait for them for ever.
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for result in pool.map(function, tasks, chunksize=8):
                yield result
                bar.update()


def write_all(job: Job, output: str, tasks: List[Task], processes: int) -> None:
    """
    Write OUTPUT.json and the PNGs. Until all images are done, their entries are lines of
    OUTPUT.unfinished.
    """
    unfinished = f"{output}.unfinished"
    # What is done before a broken instance is found is the same with --skip-broken.
    options = json.dumps({k: x for k, x in vars(job).items() if k != "skip_broken"})
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    done = _lines(unfinished)
    if os.path.exists(f"{output}.json") or (not done and os.path.isdir(output) and os.listdir(output)):
        raise ValueError(f"{output}.json or {output} exists. Remove both, or choose another --output.")
    if len(done) > 1 and done[0] != options:
        there, here = json.loads(done[0]), json.loads(options)
        changed = {k: x for k, x in there.items() if here.get(k) != x}
        raise ValueError(
            f"{unfinished} is of a run with other options: {reprlib.repr(changed)}. Repeat them, or remove "
            f"that file and {output}."
        )
    ids = {json.loads(line)["image_id"] for line in done[1:]}
    write_atomically(unfinished, "".join(f"{line}\n" for line in [options, *done[1:]]))
    left = [task for task in tasks if task.image["id"] not in ids]
    with open(unfinished, "a", encoding="utf-8") as f:
        for entry in map_images(partial(job.write, output), left, processes, "painting"):
            f.write(json.dumps(entry) + "\n")
            f.flush()
    with atomic_path(f"{output}.json") as path, open(path, "w", encoding="utf-8") as f:
        f.write(f'{{"images": {json.dumps([task.image for task in tasks])}, ')
        f.write(f'"categories": {json.dumps(job.categories)}, "annotations": [\n')
        with open(unfinished, encoding="utf-8") as lines:
            next(lines)
            for i, line in enumerate(lines):
                f.write(",\n" * (i > 0) + line.rstrip("\n"))
        f.write("\n]}\n")
    os.remove(unfinished)


def _lines(path: str) -> List[str]:
    """The whole lines of a file; a last one without an end was interrupted."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [line.rstrip("\n") for line in f if line.endswith("\n")]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oanet-d2 paint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--instances", required=True, metavar="JSON", help="COCO results, or annotations")
    about = "COCO JSON with images and categories (default: --instances)"
    parser.add_argument("--images", metavar="JSON", help=about)
    about = f"{', '.join(RULES)}, or a learned one, *.safetensors"
    parser.add_argument("--order", required=True, help=about)
    parser.add_argument("--semantic", metavar="JSON", help="COCO stuff results, for what is left")
    parser.add_argument("--output", required=True, help="folder of the PNGs; the JSON is OUTPUT.json")
    about = "least score of an instance (default: 0.5 for results)"
    parser.add_argument("--score-threshold", type=float, metavar="X", help=about)
    about = (
        "an instance is dropped if more than this share of it is covered (default: 0.5 for results, 1 for "
        "annotations: whatever is visible stays)"
    )
    parser.add_argument("--overlap-threshold", type=float, metavar="X", help=about)
    about = "least pixels of a stuff class (default: 4096)"
    parser.add_argument("--stuff-area", type=int, default=4096, metavar="N", help=about)
    parser.add_argument("--skip-broken", action="store_true", help="leave out unreadable instances")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--gt", metavar="JSON", help="panoptic ground truth to compare orders with")
    parser.add_argument("--gt-folder", help="folder of its PNGs (default: the JSON without .json)")
    return parser


# The fields that images and categories need, with their types.
FIELDS: Dict[str, Dict[str, Tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "categories": {"id": (int,), "name": (str,)},
}


def _check(entries: List[Dict], name: str, path: str) -> None:
    """Refuse images and categories that would overwrite a map or write it outside the folder."""
    for x in entries:
        for key, types in FIELDS[name].items():
            if not isinstance(x, dict) or not isinstance(x.get(key), types):
                kinds = " or ".join(t.__name__ for t in types)
                raise ValueError(f"{path}: {x} of the {name} needs {key!r}, {kinds}.")
    unique = {"id": [x["id"] for x in entries]}
    if name == "images":
        unique["PNG"] = [_png_name(x) for x in entries]
        outside = [x for x in unique["PNG"] if os.path.isabs(x) or os.pardir in x.split("/")]
        if outside:
            raise ValueError(f"{path}: the file name of {outside[0]} must be relative, without '..'.")
    for key, values in unique.items():
        ((value, number),) = Counter(values).most_common(1)
        if number > 1:
            raise ValueError(f"{path}: {number} of the {name} have the {key} {value!r}.")


def prepare(args: argparse.Namespace) -> Tuple[Job, List[Task]]:
    """Read the headers of the JSONs, and find the entries of every image."""
    instances, header = JsonLists(args.instances), JsonLists(args.images or args.instances)
    is_results = instances.is_list()
    if is_results and not args.images:
        raise ValueError(
            f"{args.instances} holds results; --images must name a JSON with images and categories."
        )
    images, categories = header.read("images", "categories")
    for name, found in (("images", images), ("categories", categories)):
        if not found:
            raise ValueError(f"{header.path} has no {name}.")
        _check(found, name, header.path)
    tasks = {image["id"]: Task(image) for image in images}
    sources = {
        "instances": (instances, None if is_results else "annotations"),
        "semantic": (JsonLists(args.semantic), None) if args.semantic else None,
        "truth": (JsonLists(args.gt), "annotations") if args.gt else None,
    }
    for name, source in sources.items():
        for image_id, ranges in source[0].ranges_by_image(source[1]).items() if source else ():
            if image_id in tasks:
                setattr(tasks[image_id], name, ranges)
            elif name == "instances":
                raise ValueError(f"{args.instances} has the image {image_id!r}, {header.path} has not.")
    by_kind = {"score_threshold": (0.0, 0.5), "overlap_threshold": (1.0, 0.5)}
    thresholds = {
        name: getattr(args, name) if getattr(args, name) is not None else default[is_results]
        for name, default in by_kind.items()
    }
    _loaded(args.order)  # a wrong one is found before anything is written
    job = Job(
        instances=args.instances,
        images=header.path,
        semantic=args.semantic,
        categories=[{"isthing": 1, **category} for category in categories],
        order=args.order,
        stuff_area=args.stuff_area,
        skip_broken=args.skip_broken,
        **thresholds,
    )
    return job, list(tasks.values())


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    output = args.output.rstrip("/\\").removesuffix(".json")
    try:
        job, tasks = prepare(args)
        write_all(job, output, tasks, args.processes)
        if args.gt:
            from .compare import compare

            folder = args.gt_folder or os.path.splitext(args.gt)[0]
            print(compare(job, tasks, args.gt, folder, args.processes))
    except (OSError, ValueError, BrokenExecutor) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
