#!/usr/bin/env python3
"""
Segment pictures, a video or what a webcam sees, and look at it.

    python demo/demo.py --config-file configs/OcclusionScenes/oanet_R_18.yaml \\
        --input pictures/ --output segmented/ --compare \\
        --opts MODEL.WEIGHTS output/occlusion_scenes/model_final.pth

It takes what Detectron2's own demo takes, and more. The exit status is 1 if pictures were skipped,
and 2 after any other error.
"""

import argparse
import glob
import io
import itertools
import json
import logging
import os
import sys
import time
from typing import Iterator, List, Optional, Tuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from detectron2.utils.logger import setup_logger
from detectron2.utils.video_visualizer import VideoVisualizer

from oanet_d2 import PanopticPredictor, PanopticResult
from oanet_d2.evaluation import PanopticSubmission
from oanet_d2.files import atomic_path, write_atomically
from oanet_d2.painting.ranking import RANKING_RULE_REGISTRY
from oanet_d2.visualization import changed_pixels, draw_side_by_side

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4")
PANEL_SIDES = 480, 1280  # pixels, the longer side of a panel of --compare: at least and at most

logger = logging.getLogger("oanet_d2.demo")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--webcam", action="store_true", help="take inputs from webcam")
    source.add_argument("--video-input", metavar="FILE", help="path to video file")
    source.add_argument(
        "--input", nargs="+", help="pictures: files, folders, patterns such as 'pictures/*.jpg'"
    )
    parser.add_argument(
        "--output",
        help="folder for the drawings, or a file for one; if not given, a window shows them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="minimum score of instances instead of the config's",
    )
    rules = [name for name, _ in RANKING_RULE_REGISTRY]
    parser.add_argument("--order", choices=rules, help="painting order instead of the config's")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="draw the order of detection scores beside the one asked for, changes outlined",
    )
    parser.add_argument(
        "--save-panoptic",
        nargs="?",
        const="",
        metavar="JSON",
        help="write the COCO panoptic format: a JSON (OUTPUT/panoptic.json if none is named) and "
        "PNGs in a folder of its name; with a JSON and no --output nothing is drawn",
    )
    parser.add_argument(
        "--opts",
        help="modify config options using the command-line 'KEY VALUE' pairs; comes last",
        default=[],
        nargs=argparse.REMAINDER,
    )
    return parser


def check_arguments(args) -> None:
    threshold = args.confidence_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--confidence-threshold is {threshold}; it must lie in [0, 1].")
    if args.webcam and args.output is not None:
        raise ValueError("--webcam shows a window; it takes no --output.")
    if args.save_panoptic is None:
        if args.output is None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
            raise ValueError("There is no display for a window; write drawings with --output.")
        return
    if args.input is None:
        raise ValueError("--save-panoptic is for pictures; it goes with --input.")
    if not args.save_panoptic:
        if args.output is None or args.output.lower().endswith(PICTURES):
            raise ValueError("--save-panoptic needs a folder as --output, or its own JSON.")
        args.save_panoptic = os.path.join(args.output, "panoptic.json")
    if not args.save_panoptic.endswith(".json"):
        raise ValueError(f"--save-panoptic is {args.save_panoptic}; it must end with .json.")


def find_pictures(inputs: List[str]) -> List[str]:
    """
    The files, the pictures right in the folders, and what matches the patterns, each once.
    """
    found = []
    for given in map(os.path.expanduser, inputs):
        if os.path.isdir(given):
            names = sorted(x for x in os.listdir(given) if not x.startswith("."))
            listed = [os.path.join(given, x) for x in names if x.lower().endswith(PICTURES)]
        else:
            listed = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        listed = [path for path in listed if os.path.isfile(path)]
        if not listed:
            raise ValueError(f"--input: there is no picture {given}, nor in a folder of that name.")
        found += listed
    return list({os.path.abspath(path): path for path in found}.values())


def names_of(paths: List[str]) -> Tuple[List[str], List[str]]:
    """
    Names for what is made of pictures, without and with extension: their own or, where two have the
    same, their paths below the folder that holds them all.
    """
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        whole = [os.path.abspath(path) for path in paths]
        top = os.path.commonpath([os.path.dirname(path) for path in whole])
        names = [os.path.relpath(path, top) for path in whole]
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) < len(stems):  # a.jpg beside a.png
        stems = names
    return stems, [x if x.lower().endswith(PICTURES) else f"{x}.png" for x in names]


def check_outputs(outputs: List[str], inputs: List[str], overwrite: bool) -> None:
    given = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in given:
            raise ValueError(f"{path} is an input; write to another place.")
        if os.path.lexists(path) and not overwrite:
            raise ValueError(f"{path} is there already; --overwrite replaces files.")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise ValueError("Two results would be written to one file; make two calls for them.")


def image_ids(paths: List[str], stems: List[str], metadata) -> List:
    """
    Ids for a COCO panoptic JSON: those of the dataset's own JSON for its pictures. Others get the
    number that they are named by, as COCO's are (000000000139.jpg), or their name.
    """
    known = {}
    if os.path.isfile(metadata.get("panoptic_json", "")):
        with open(metadata.panoptic_json, encoding="utf-8") as f:
            images = json.load(f)["images"]
        root = os.path.abspath(metadata.image_root)
        known = {os.path.normpath(os.path.join(root, x["file_name"])): x["id"] for x in images}
    numbers = [int(x) if x.isdecimal() else x for x in stems]
    ids = [known.get(os.path.abspath(path), x) for path, x in zip(paths, numbers)]
    return ids if len(set(ids)) == len(ids) else stems


class Segmenter:
    """
    Gives a list of results for every picture: one in the order of the config and, to compare, one
    in the order of the detection scores before it.
    """

    def __init__(self, args):
        changes = {
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": args.confidence_threshold,
            "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": args.confidence_threshold,
            "MODEL.OANET.ORDER": args.order,
        }
        opts = [x for item in changes.items() if item[1] is not None for x in item]
        self.predictor = PanopticPredictor.from_config(args.config_file, opts=[*args.opts, *opts])
        self.orders = ["score", self.predictor.model.order] if args.compare else []
        if self.orders == ["score", "score"]:
            raise ValueError("--compare needs another order than 'score'; name it by --order.")

    def __call__(self, image) -> List[PanopticResult]:
        if self.orders:
            return list(self.predictor.in_orders(image, self.orders).values())
        return [self.predictor(image)]

    def draw(self, results: List[PanopticResult]) -> np.ndarray:
        if not self.orders:
            return results[0].draw().get_image()
        rgb, metadata = results[0].image[:, :, ::-1], results[0].metadata
        drawn = {order: x.panoptic for order, x in zip(self.orders, results)}
        changed = changed_pixels(*drawn.values())
        side = int(np.clip(max(rgb.shape), *PANEL_SIDES))
        return draw_side_by_side(rgb, drawn, metadata, changed, side)


def run_on_pictures(args) -> int:
    paths = find_pictures(args.input)
    stems, names = names_of(paths)
    drawings, pngs = [], [f"{stem}.png" for stem in stems]
    if args.output is not None:
        one = args.output.lower().endswith(PICTURES) and not os.path.isdir(args.output)
        if one and len(paths) > 1:
            raise ValueError(f"--output is {args.output}; for several pictures it is a folder.")
        drawings = [args.output] if one else [os.path.join(args.output, x) for x in names]
    outputs = list(drawings)
    if args.save_panoptic:
        folder = os.path.splitext(args.save_panoptic)[0]
        outputs += [args.save_panoptic, *(os.path.join(folder, png) for png in pngs)]
    check_outputs(outputs, paths, args.overwrite)
    segmenter = Segmenter(args)
    if args.save_panoptic:
        submission = PanopticSubmission(args.save_panoptic, segmenter.predictor.metadata)
        ids = image_ids(paths, stems, segmenter.predictor.metadata)

    skipped = []
    for i, path in enumerate(tqdm(paths, disable=len(paths) == 1)):
        start = time.perf_counter()
        try:
            results = segmenter(path)
            drawing = segmenter.draw(results) if drawings or not args.save_panoptic else None
        except Exception as error:  # the others are done all the same
            reason = str(error).removeprefix(f"{path}: ")
            logger.error(f"{path} skipped: {reason}", exc_info=not isinstance(error, ValueError))
            skipped.append(path)
            continue
        logger.info(f"{path}: segmented in {time.perf_counter() - start:.2f}s")
        if args.save_panoptic:
            submission.add(*results[-1].panoptic, ids[i], os.path.basename(path), pngs[i])
        if drawings:
            save(drawings[i], drawing)
        elif drawing is not None and not show(drawing, wait=True):
            break  # escape was pressed
    if args.save_panoptic:
        submission.save()
    if skipped:
        logger.error(f"{len(skipped)} of {len(paths)} skipped: {', '.join(skipped)}")
    return 1 if skipped else 0


def save(path: str, rgb: np.ndarray) -> None:
    name = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    options = {"quality": 95, "subsampling": 0} if name == "JPEG" else {}  # letters stay sharp
    content = io.BytesIO()
    Image.fromarray(rgb).save(content, name, **options)
    write_atomically(path, content.getvalue())


def run_on_video(args) -> int:
    output = args.output
    if output is not None:
        if os.path.isdir(output) or not output.lower().endswith(VIDEOS):
            stem = os.path.splitext(os.path.basename(args.video_input))[0]
            output = os.path.join(output, f"{stem}.mp4")
        check_outputs([output], [args.video_input], args.overwrite)
    video = cv2.VideoCapture(0 if args.webcam else args.video_input)
    if not video.isOpened():
        raise ValueError(f"OpenCV can read nothing from {args.video_input or 'a webcam'}.")
    total = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    drawings = iter(tqdm(draw_frames(video, Segmenter(args)), total=total))
    if output is not None:
        write_video(output, drawings, video.get(cv2.CAP_PROP_FPS) or 25)
    else:
        for drawing in drawings:
            if not show(drawing, wait=False):
                break
    return 0


def draw_frames(video: cv2.VideoCapture, segmenter: Segmenter) -> Iterator[np.ndarray]:
    visualizer = VideoVisualizer(segmenter.predictor.metadata)  # an instance keeps its color
    success, frame = video.read()
    while success:
        results = segmenter(frame)
        if segmenter.orders:
            yield segmenter.draw(results)
        else:
            rgb, panoptic = frame[:, :, ::-1], results[0].panoptic
            yield visualizer.draw_panoptic_seg_predictions(rgb, *panoptic).get_image()
        success, frame = video.read()


def write_video(path: str, drawings: Iterator[np.ndarray], rate: float) -> None:
    first = next(drawings, None)
    if first is None:
        raise ValueError("The video has no frame.")
    with atomic_path(path) as temporary:
        codec = cv2.VideoWriter_fourcc(*"mp4v")  # every build of OpenCV with FFmpeg has it
        writer = cv2.VideoWriter(temporary, codec, rate, first.shape[1::-1])
        try:
            for drawing in itertools.chain([first], drawings):
                writer.write(np.ascontiguousarray(drawing[:, :, ::-1]))
        finally:
            writer.release()
        # OpenCV does not say when a disk is full, but then the file cannot be read.
        if not cv2.VideoCapture(temporary).isOpened():
            raise OSError(f"OpenCV could not write {path}. Is the disk full?")


def show(rgb: np.ndarray, wait: bool) -> bool:
    cv2.namedWindow("oanet_d2", cv2.WINDOW_NORMAL)
    cv2.imshow("oanet_d2", np.ascontiguousarray(rgb[:, :, ::-1]))
    return cv2.waitKey(0 if wait else 1) != 27  # escape


def main(argv: Optional[List[str]] = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    for name in ("fvcore", "detectron2", "oanet_d2"):
        setup_logger(name=name)
    with logging_redirect_tqdm([logging.getLogger("oanet_d2")]):
        try:
            check_arguments(args)
            return run_on_video(args) if args.input is None else run_on_pictures(args)
        except (ValueError, OSError, cv2.error) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
