"""
The demo on pictures.
"""

import logging
import os
import time
from dataclasses import dataclass
from typing import List, Optional

import numpy as np
import torch
from files import check_outputs, find_pictures, image_ids, is_picture, output_names, png_names
from PIL import Image
from segmenter import Segmenter, summary
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from window import show

from oanet_d2.evaluation import PanopticSubmission
from oanet_d2.whole_files import whole_path

logger = logging.getLogger("oanet_d2.demo")


@dataclass
class PicturePlan:
    """
    What is read and what is written.

    Attributes:
        paths: of the pictures.
        drawings: a file for each of them; empty: nothing is drawn, or it is only shown.
        json_path: of the COCO panoptic results, if they are written.
        pngs: their files for the pictures, relative to the folder of the JSON's name.
    """

    paths: List[str]
    drawings: List[str]
    json_path: Optional[str]
    pngs: List[str]


def plan_pictures(args) -> PicturePlan:
    """
    Raises:
        ValueError: an input is missing, or an output is not possible or there already.
    """
    paths = find_pictures(args.input)
    names = output_names(paths)
    drawings = _drawings(args.output, names) if args.output is not None else []
    json_path = args.save_panoptic
    if json_path == "":
        if drawings == [args.output]:
            raise ValueError("--save-panoptic needs a folder as --output, or its own JSON.")
        json_path = os.path.join(args.output, "panoptic.json")
    pngs = png_names(names) if json_path else []
    outputs = [*drawings, *(os.path.join(_folder(json_path), png) for png in pngs)]
    outputs += [json_path] if json_path else []
    check_outputs(outputs, paths, args.overwrite)
    return PicturePlan(paths, drawings, json_path, pngs)


def _drawings(output: str, names: List[str]) -> List[str]:
    """
    `output` is a folder, as in Detectron2's demo, unless it has the name of a picture.
    """
    if os.path.isdir(output) or not is_picture(output, Image.SAVE):
        if os.path.exists(output) and not os.path.isdir(output):
            raise ValueError(f"--output: {output} is a file, and not of a picture.")
        return [os.path.join(output, name) for name in names]
    if len(names) > 1:
        raise ValueError(f"--output is {output}; for {len(names)} pictures it must be a folder.")
    return [output]


def _folder(json_path: str) -> str:
    return os.path.splitext(json_path)[0]


def run_on_pictures(plan: PicturePlan, segmenter: Segmenter) -> bool:
    """
    Returns:
        whether all pictures could be read.
    """
    metadata = segmenter.predictor.metadata
    submission, ids = None, []
    if plan.json_path:
        submission = PanopticSubmission(plan.json_path, metadata)
        ids = image_ids(plan.paths, plan.pngs, metadata)
    windows = not (plan.drawings or submission)
    skipped = []
    with logging_redirect_tqdm([logging.getLogger("oanet_d2")]):
        for i, path in enumerate(tqdm(plan.paths, disable=windows or len(plan.paths) == 1)):
            start = time.perf_counter()
            try:
                results = segmenter(path)
            except (ValueError, torch.cuda.OutOfMemoryError) as error:
                reason = str(error).removeprefix(f"{path}: ")
                logger.error(f"{path} skipped: {reason}")
                skipped.append(path)
                continue
            seconds = time.perf_counter() - start
            logger.info(f"{path}: {summary(results)} in {seconds:.2f}s")
            if submission:
                panoptic = results[-1].panoptic_seg, results[-1].segments_info
                submission.add(*panoptic, ids[i], os.path.basename(path), plan.pngs[i])
            if plan.drawings:
                _save(plan.drawings[i], segmenter.draw(results))
            elif windows and not show(segmenter.draw(results), wait=True):
                break
    if submission:
        submission.save()
        logger.info(f"COCO panoptic results: {plan.json_path} and {_folder(plan.json_path)}/")
    if plan.drawings:
        folder = os.path.commonpath([os.path.dirname(x) or "." for x in plan.drawings])
        logger.info(f"Drawings: {len(plan.paths) - len(skipped)} in {folder}/")
    if skipped:
        logger.error(f"{len(skipped)} of {len(plan.paths)} skipped: {', '.join(skipped)}")
    return not skipped


def _save(path: str, rgb: np.ndarray):
    is_jpeg = Image.registered_extensions()[os.path.splitext(path)[1].lower()] == "JPEG"
    options = {"quality": 95, "subsampling": 0} if is_jpeg else {}  # letters stay sharp
    with whole_path(path) as temporary:
        Image.fromarray(rgb).save(temporary, **options)
