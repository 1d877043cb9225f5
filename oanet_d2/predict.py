"""
Segment pictures, a video or what a webcam sees, and look at it.

    oanet-d2 predict --config-file OcclusionScenes/oanet_lite0.yaml \\
        --input pictures/ --output segmented/ --compare \\
        --opts MODEL.WEIGHTS output/occlusion_scenes/model_final.pth

It takes what Detectron2's own demo takes, and more. `--onnx model.onnx` instead of a config runs an
exported model, for which neither Detectron2 nor PyTorch is needed. The exit status is 1 if pictures
were skipped, and 2 after any other error.
"""

import argparse
import glob
import logging
import os
import sys
import time
from typing import Any, Iterable, Iterator, List, Optional

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .files import atomic_path
from .result import PanopticResult
from .submission import PanopticSubmission

# What needs Detectron2, PyTorch or ONNX Runtime is imported where it is used.

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4")
# What --confidence-threshold (two of them) and --order change, in a yaml and in a .py.
KEYS = {
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "model.roi_heads.box_predictor.test_score_thresh",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": "model.combine_instances_score_thresh",
    "MODEL.OANET.ORDER": "model.order",
}
PANEL_SIDES = 480, 1280  # pixels, the longer side of a panel of --compare: at least and at most

logger = logging.getLogger("oanet_d2.predict")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    about = "path to config file; not needed with MODEL.WEIGHTS model_final.safetensors in --opts"
    model.add_argument("--config-file", metavar="FILE", help=about)
    model.add_argument("--onnx", metavar="FILE", help="exported model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--webcam", action="store_true", help="take inputs from webcam")
    source.add_argument("--video-input", metavar="FILE", help="path to video file")
    about = "pictures: files, folders, patterns such as 'pictures/*.jpg'"
    source.add_argument("--input", nargs="+", help=about)
    add("--output", help="folder for the drawings, or a file for one; without it, a window opens")
    add("--confidence-threshold", type=float, metavar="SCORE", help="minimum score of instances")
    add("--order", metavar="RULE", help="painting order instead of the config's")
    about = "draw the order of detection scores beside the one asked for, changes outlined"
    add("--compare", action="store_true", help=about)
    about = (
        "write the COCO panoptic format: this JSON (default: panoptic.json in OUTPUT) and PNGs in a "
        "folder of its name; without --output nothing is drawn"
    )
    add("--save-panoptic", nargs="?", const="", metavar="JSON", help=about)
    about = "config's KEY VALUE ..., of a .py key=value ...; comes last"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=about)
    return parser


def check_arguments(args) -> None:
    if args.onnx is not None:
        given = {"--order": args.order, "--compare": args.compare or None, "--opts": args.opts or None}
        given["--confidence-threshold"] = args.confidence_threshold
        refused = [option for option, value in given.items() if value is not None]
        if refused:
            raise ValueError(f"An exported model is as it is: {', '.join(refused)} cannot change --onnx.")
    threshold = args.confidence_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--confidence-threshold is {threshold}; it must lie in [0, 1].")
    if args.webcam and args.output is not None:
        raise ValueError("--webcam shows a window; it takes no --output.")
    if args.save_panoptic is not None:
        if args.input is None:
            raise ValueError("--save-panoptic is for pictures; it goes with --input.")
        if args.save_panoptic and not args.save_panoptic.endswith(".json"):
            raise ValueError(f"--save-panoptic is {args.save_panoptic}; it must end with .json.")
    elif args.output is None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise ValueError("There is no display for a window; write drawings with --output.")


def find_pictures(inputs: List[str]) -> List[str]:
    """The files, the pictures right in the folders, and what matches the patterns, each once."""
    found = []
    for given in inputs:
        if os.path.isdir(given):
            inside = glob.glob(os.path.join(glob.escape(given), "*"))
            listed = [path for path in inside if path.lower().endswith(PICTURES)]
        else:
            listed = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
        listed = sorted(filter(os.path.isfile, listed))
        if not listed:
            raise ValueError(f"--input: there is no picture {given}, nor in a folder of that name.")
        found += listed
    return list(dict.fromkeys(found))


def check_outputs(outputs: List[str], inputs: List[str]) -> None:
    taken = dict.fromkeys(map(os.path.realpath, inputs), "an input")
    for path in outputs:
        file = os.path.realpath(path)
        if file in taken:
            raise ValueError(f"{path} is {taken[file]}; write to another place, or in two calls.")
        taken[file] = "the output of another picture too"


class Segmenter:
    """
    Gives a list of results for every picture: one in the order of the config and, to compare, one
    in the order of the detection scores before it.
    """

    predictor: Any

    def __init__(self, args):
        self.exported = args.onnx is not None
        if self.exported:
            from .runtime import OnnxPredictor

            self.predictor, self.orders = OnnxPredictor(args.onnx), []
            return
        from .config import is_lazy
        from .predictor import PanopticPredictor

        lazy, opts = is_lazy(args.config_file), list(args.opts)
        values = args.confidence_threshold, args.confidence_threshold, args.order
        for (key, lazy_key), value in zip(KEYS.items(), values):
            if value is not None:
                opts += [f"{lazy_key}={value}"] if lazy else [key, value]
        self.predictor = PanopticPredictor.from_config(args.config_file, opts=opts)
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
        from .visualization import changed_pixels, draw_panels, side_by_side

        rgb, metadata = results[0].image[:, :, ::-1], results[0].metadata
        drawn = {order: x.panoptic for order, x in zip(self.orders, results)}
        changed = changed_pixels(*drawn.values())
        side = int(np.clip(max(rgb.shape), *PANEL_SIDES))
        return side_by_side(draw_panels(rgb, drawn, metadata, changed, side))


def run_on_pictures(args) -> int:
    paths = find_pictures(args.input)
    names = [os.path.basename(path) for path in paths]
    stems = [os.path.splitext(name)[0] for name in names]
    drawings, pngs, folder = [], [f"{stem}.png" for stem in stems], args.output or ""
    if folder.lower().endswith(PICTURES) and not os.path.isdir(folder):
        if len(paths) > 1:
            raise ValueError(f"--output is {folder}; for several pictures it is a folder.")
        drawings, folder = [folder], os.path.dirname(folder)
    elif folder:
        drawings = [os.path.join(folder, name) for name in names]
    panoptic, outputs = None, list(drawings)
    if args.save_panoptic is not None:
        panoptic = args.save_panoptic or os.path.join(folder, "panoptic.json")
        outputs += [panoptic, *(os.path.join(os.path.splitext(panoptic)[0], x) for x in pngs)]
    check_outputs(outputs, paths)
    segmenter = Segmenter(args)
    submission = panoptic and PanopticSubmission(panoptic, segmenter.predictor.metadata)

    skipped = []
    for i, path in enumerate(tqdm(paths, disable=len(paths) == 1)):
        start = time.perf_counter()
        try:
            results = segmenter(path)
            drawing: Any = segmenter.draw(results) if drawings or not submission else None
        except Exception as error:  # the others are done all the same
            reason = str(error).removeprefix(f"{path}: ")
            logger.error(f"{path} skipped: {reason}", exc_info=not isinstance(error, ValueError))
            skipped.append(path)
            continue
        logger.info(f"{path}: segmented in {time.perf_counter() - start:.2f}s")
        if submission:
            id = int(stems[i]) if stems[i].isdecimal() else stems[i]  # as COCO names its images
            submission.add(*results[-1].panoptic, id, names[i], pngs[i])
        if drawings:
            with atomic_path(drawings[i]) as temporary:
                # For JPEG: letters stay sharp.
                Image.fromarray(drawing).save(temporary, quality=95, subsampling=0)
        elif drawing is not None and not show(drawing, wait=True):
            break  # escape was pressed
    if submission:
        submission.save()
    if skipped:
        logger.error(f"{len(skipped)} of {len(paths)} skipped: {', '.join(skipped)}")
    return 1 if skipped else 0


def run_on_video(args) -> int:
    output = args.output
    if output is not None:
        if os.path.isdir(output) or not output.lower().endswith(VIDEOS):
            stem = os.path.splitext(os.path.basename(args.video_input))[0]
            output = os.path.join(output, f"{stem}.mp4")
        check_outputs([output], [args.video_input])
    video = cv2.VideoCapture(0 if args.webcam else args.video_input)
    if not video.isOpened():
        raise ValueError(f"OpenCV can read nothing from {args.video_input or 'a webcam'}.")
    total = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    drawings = tqdm(draw_frames(video, Segmenter(args)), total=total)
    if output is not None:
        write_video(output, drawings, video.get(cv2.CAP_PROP_FPS) or 25)
    else:
        for drawing in drawings:
            if not show(drawing, wait=False):
                break
    return 0


def draw_frames(video: cv2.VideoCapture, segmenter: Segmenter) -> Iterator[np.ndarray]:
    visualizer = None
    if not segmenter.exported and not segmenter.orders:
        from detectron2.utils.video_visualizer import VideoVisualizer

        visualizer = VideoVisualizer(segmenter.predictor.metadata)  # an instance keeps its color
    success, frame = video.read()
    while success:
        results = segmenter(frame)
        if visualizer is None:
            yield segmenter.draw(results)
        else:
            rgb, panoptic = frame[:, :, ::-1], results[0].panoptic
            yield visualizer.draw_panoptic_seg_predictions(rgb, *panoptic).get_image()
        success, frame = video.read()


def write_video(path: str, drawings: Iterable[np.ndarray], rate: float) -> None:
    codec, writer = cv2.VideoWriter.fourcc(*"mp4v"), None  # every OpenCV with FFmpeg has this codec
    with atomic_path(path) as temporary:
        for drawing in drawings:
            writer = writer or cv2.VideoWriter(temporary, codec, rate, drawing.shape[1::-1])
            writer.write(np.ascontiguousarray(drawing[:, :, ::-1]))
        if writer is None:
            raise ValueError("The video has no frame.")
        writer.release()


def show(rgb: np.ndarray, wait: bool) -> bool:
    cv2.namedWindow("oanet_d2", cv2.WINDOW_NORMAL)
    cv2.imshow("oanet_d2", np.ascontiguousarray(rgb[:, :, ::-1]))
    return cv2.waitKey(0 if wait else 1) != 27  # escape


def set_up_logging(args) -> None:
    if args.onnx is not None:
        ours, handler = logging.getLogger("oanet_d2"), logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ours.setLevel(logging.INFO)
        ours.addHandler(handler)
        return
    from detectron2.utils.logger import setup_logger

    for name in ("fvcore", "detectron2", "oanet_d2"):
        setup_logger(name=name)


def main(argv: Optional[List[str]] = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    set_up_logging(args)
    with logging_redirect_tqdm([logging.getLogger("oanet_d2")]):
        try:
            check_arguments(args)
            return run_on_video(args) if args.input is None else run_on_pictures(args)
        except (ValueError, OSError, cv2.error) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
