"""
Find everything that is wrong with a dataset in the COCO panoptic format, before training stops at
the first of it or silently learns from it:

    oanet-d2 check NAME
    oanet-d2 check IMAGE_ROOT PANOPTIC_JSON PANOPTIC_ROOT [INSTANCES_JSON]

Exit status: 0 if nothing is wrong, 1 if something is, 2 if the command itself is wrong.
"""

import argparse
import logging
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from tqdm import tqdm

from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ..config import find_config, is_lazy, load_config
from .load import FILES, load_panoptic, read_annotations, read_file, read_truth
from .register import Path, category_metadata, dataset_paths

logger = logging.getLogger(__name__)

__all__ = ["Problem", "check", "check_datasets", "format_report", "main"]


class Problem(NamedTuple):
    """What kind of problem it is, in which file and entry, and what was found there."""

    kind: str
    where: str
    detail: str


class Problems(List[Problem]):
    def report(self, kind: str, where: str, detail: str, fatal: bool = True) -> None:
        """A `report` function of :mod:`load`."""
        self.append(Problem(kind, where, detail))


def check(
    image_root: Path, panoptic_json: Path, panoptic_root: Path, instances_json: Optional[Path] = None
) -> List[Problem]:
    """
    Check a whole dataset; see :func:`register_panoptic` for the arguments.

    Returns:
        everything that is wrong: first in the JSONs, then in the files, in the JSON's order.
    """
    given = (image_root, panoptic_json, panoptic_root, instances_json)
    return _check([path and os.fspath(path) for path in given], {})[0]


def _check(paths: Sequence, options: Dict) -> Tuple[Problems, int]:
    """The problems, and the number of samples whose files were looked at."""
    problems = Problems()
    if not options:
        content = read_annotations(paths[1], problems.report)
        if not content:
            return problems, 0
        where = f"{paths[1]}: categories"
        metadata = category_metadata(content["categories"], where, problems.report)
        for kind in ("thing", "stuff"):
            options[f"{kind}_ids"] = metadata[f"{kind}_dataset_id_to_contiguous_id"]
    dicts = load_panoptic(*paths, **options, report=problems.report)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and sorting do without the GIL
        results = pool.map(check_files, dicts)
        # disable=None: a progress bar if stderr is a terminal
        for found in tqdm(results, "Checking", len(dicts), unit="sample", disable=None):
            problems += found
    return problems, len(dicts)


def check_files(d: Dict) -> Problems:
    """What is wrong with the image and the panoptic PNG of a dataset dict."""
    problems = Problems()
    readers = {"image": partial(read_file, d, "image", "RGB"), "PNG": partial(read_truth, d)}
    for what, read in readers.items():
        try:
            read(report=problems.report)
        except ValueError as error:
            path = d[FILES[what]]
            problems.report(f"{what} unusable", path, str(error).removeprefix(f"{path}: "))
    return problems


def check_datasets(cfg, names: Sequence[str]) -> None:
    """
    See before a training or an evaluation that it will not stop at a file: the annotations of the
    datasets are loaded, and every file's header is looked at, a share of them in each process. What
    lies behind a URL is not looked at.

    Args:
        cfg: the completed config.
        names: datasets of `cfg.DATASETS.TRAIN` and `cfg.DATASETS.TEST`.

    Raises:
        ValueError: something is wrong. The message names it.
    """
    problem = None
    try:
        for name in names:
            _check_dataset(cfg, name)
    except ValueError as error:
        problem = str(error)
    for found in comm.all_gather(problem):  # every process stops, wherever the problem is
        if found:
            raise ValueError(found)


def _check_dataset(cfg, name: str) -> None:
    dicts = DatasetCatalog.get(name)
    most, limit = max(map(_number_of_things, dicts), default=0), cfg.TEST.DETECTIONS_PER_IMAGE
    if name in cfg.DATASETS.TEST and most > limit:
        logger.warning(
            f"Dataset {name!r} has images with up to {most} things, but TEST.DETECTIONS_PER_IMAGE is "
            f"{limit}: no more of them can be found."
        )
    without_images = cfg.MODEL.META_ARCHITECTURE == "SRMFromAnnotations"
    # Anything else would take results for the ground truth.
    takes_results = without_images and name not in cfg.DATASETS.TEST and cfg.INPUT.COPY_PASTE == 0
    if not takes_results and any("score" in x for d in dicts for x in d.get("annotations", [])):
        raise ValueError(
            f"The INSTANCES_JSON of dataset {name!r} holds results of a segmenter. Only a training with "
            "MODEL.META_ARCHITECTURE 'SRMFromAnnotations' and INPUT.COPY_PASTE 0 learns from them; "
            "anything else needs annotations."
        )
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, name, dicts)
    # Detectron2 filters only what has "annotations".
    is_filtered = name in cfg.DATASETS.TRAIN and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    if is_filtered and all("annotations" in d and not _no_crowds(d["annotations"]) for d in dicts):
        raise ValueError(
            f"No image of dataset {name!r} has an instance, so DATALOADER.FILTER_EMPTY_ANNOTATIONS "
            "True leaves nothing to learn from. Set it False."
        )
    whats = ("PNG",) if without_images else ("image", "PNG")

    def look_at(d: Dict) -> None:
        if not any(re.match(r"\w+://", d[key]) for key in FILES.values()):
            for what in whats:
                read_file(d, what)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(look_at, dicts[comm.get_rank() :: comm.get_world_size()]))


def _check_keypoints(cfg, name: str, dicts: List[Dict]) -> None:
    found = {len(x.get("keypoints", ())) // 3 for d in dicts for x in d.get("annotations", [])}
    number, evaluated = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, name in cfg.DATASETS.TEST and found
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS or range(17))  # COCO's
    wrong = found != {number} and (evaluated or name in cfg.DATASETS.TRAIN)
    if wrong or (evaluated and sigmas != number):
        raise ValueError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}; the annotations in the INSTANCES_JSON of "
            f"dataset {name!r} have {sorted(found or {0})}, and TEST.KEYPOINT_OKS_SIGMAS is for {sigmas}. "
            "Set the right number, or MODEL.KEYPOINT_ON to False."
        )


def _number_of_things(d: Dict) -> int:
    things = [s for s in d["segments_info"] if s["isthing"]]
    return max(len(_no_crowds(x)) for x in (things, d.get("annotations", [])))


def _no_crowds(items: List[Dict]) -> List[Dict]:
    return [x for x in items if not x.get("iscrowd", 0)]


def format_report(problems: List[Problem], num_samples: int, examples: int = 3) -> str:
    """
    Args:
        problems: what :func:`check` returns.
        examples: how many of each kind are shown.

    Returns:
        lines of printable characters, whatever the file names are.
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


def find_dataset(name: str, config_file: Optional[str]) -> Tuple[Sequence, Dict]:
    """
    Returns:
        the arguments of :func:`load_panoptic` for a dataset that a yaml describes or that is
        registered, perhaps by a config in Python.

    Raises:
        ValueError: it is neither, or the yaml is wrong.
    """
    if is_lazy(config_file):
        LazyConfig.load(find_config(str(config_file)))
    elif config_file is not None:
        cfg = load_config(config_file)
        if name in cfg.DATASETS.PANOPTIC:
            return dataset_paths(cfg, name), {}
    loaders = {x: DatasetCatalog[x] for x in sorted(DatasetCatalog)}
    ours = {k: v for k, v in loaders.items() if getattr(v, "func", None) is load_panoptic}
    if name not in ours:
        raise ValueError(
            f"{name!r} is not registered as a dataset in the COCO panoptic format. Give its files, "
            f"a --config-file that describes it, or one of {', '.join(ours)}."
        )
    return ours[name].args, ours[name].keywords


def main(argv: Optional[List[str]] = None) -> int:
    """The command line. Returns its exit status: 0 nothing wrong, 1 problems, 2 no such dataset."""
    parser = argparse.ArgumentParser(
        prog="oanet-d2 check",
        description="Finds everything that is wrong with a dataset in the COCO panoptic format.",
        usage="%(prog)s [options] NAME | IMAGE_ROOT PANOPTIC_JSON PANOPTIC_ROOT [INSTANCES_JSON]",
    )
    add = parser.add_argument
    add("dataset", nargs="+", metavar="DATASET", help="a registered name, or three or four paths")
    add("--config-file", metavar="FILE", help="a yaml that describes it, or a .py that registers it")
    add("--examples", type=int, default=3, metavar="N", help="shown of each kind of problem")
    args = parser.parse_args(argv)
    if len(args.dataset) not in (1, 3, 4):
        parser.error(f"{len(args.dataset)} arguments given; it must be a NAME or 3 or 4 paths")
    paths: Sequence = (args.dataset + [None])[:4]
    options: Dict = {}
    try:
        if len(args.dataset) == 1:
            paths, options = find_dataset(args.dataset[0], args.config_file)
    except (OSError, ValueError) as error:  # a .py that is not there
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems, num_samples = _check(paths, options)
    print(format_report(problems, num_samples, args.examples))
    return 1 if problems else 0
