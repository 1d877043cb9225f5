#!/usr/bin/env python3
"""
Segment pictures, a video or what a webcam sees, and look at it.

    python demo/demo.py --config-file configs/OcclusionScenes/oanet_R_18.yaml \\
        --input pictures/ --output segmented/ --compare \\
        --opts MODEL.WEIGHTS output/occlusion_scenes/model_final.pth

It takes what Detectron2's own demo takes, and more. Exit status: 0; 1, some pictures could not be
read, and the others are done; 2, nothing is done.
"""

import argparse
import os
import sys
from typing import List, Optional

from pictures import plan_pictures, run_on_pictures
from segmenter import Segmenter
from video import open_video, plan_video, run_on_video
from window import check_display

from detectron2.utils.logger import setup_logger

from oanet_d2 import PanopticPredictor
from oanet_d2.modeling import RANKING_RULE_REGISTRY


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--webcam", action="store_true", help="take inputs from webcam")
    source.add_argument("--video-input", metavar="FILE", help="path to video file")
    source.add_argument(
        "--input", nargs="+", help="pictures: files, folders, and patterns such as 'pictures/*.jpg'"
    )
    parser.add_argument(
        "--output",
        help="folder for the drawings, which get the inputs' names; or, for one input, a file. "
        "If not given, they are shown in a window",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="minimum score of instances; by default what the config says",
    )
    parser.add_argument(
        "--order",
        choices=[name for name, _ in RANKING_RULE_REGISTRY],
        help="the rule that orders the instances; by default what the config says",
    )
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
        help="write results in the COCO panoptic format too: a JSON, and PNGs in a folder of its "
        "name; by default OUTPUT/panoptic.json. With a JSON and no --output nothing is drawn",
    )
    parser.add_argument(
        "--opts",
        help="modify config options using the command-line 'KEY VALUE' pairs; comes last",
        default=[],
        nargs=argparse.REMAINDER,
    )
    return parser


def check_arguments(args):
    """
    Raises:
        ValueError: arguments contradict each other, or name what is not there.
    """
    if not os.path.isfile(args.config_file):
        raise ValueError(f"--config-file: {args.config_file} is no file.")
    threshold = args.confidence_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--confidence-threshold is {threshold}; it must lie in [0, 1].")
    if args.webcam and args.output is not None:
        raise ValueError("--webcam shows a window; it takes no --output.")
    if args.save_panoptic is not None and args.input is None:
        raise ValueError("--save-panoptic is for pictures; it goes with --input.")
    if args.save_panoptic == "" and args.output is None:
        raise ValueError("--save-panoptic needs --output, or the JSON to write after it.")
    if args.save_panoptic and not args.save_panoptic.endswith(".json"):
        raise ValueError(f"--save-panoptic is {args.save_panoptic}; it must end with .json.")
    if args.output is None and args.save_panoptic is None:
        check_display()


def build_predictor(args) -> PanopticPredictor:
    """
    Raises:
        ValueError: the config, the checkpoint or what arguments change in the config is of no use.
    """
    opts = list(args.opts)
    if args.confidence_threshold is not None:
        for key in (
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
        ):
            opts += [key, args.confidence_threshold]
    if args.order is not None:
        opts += ["MODEL.OANET.ORDER", args.order]
    return PanopticPredictor.from_config(args.config_file, opts=opts)


def main(argv: Optional[List[str]] = None) -> int:
    """
    Returns:
        the exit status.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    for name in ("fvcore", "detectron2", "oanet_d2"):
        setup_logger(name=name)
    try:
        check_arguments(args)
        if args.input is not None:
            plan = plan_pictures(args)
        else:
            output = plan_video(args)
            video = open_video(args.video_input)
        segmenter = Segmenter(build_predictor(args), args.compare)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if args.input is not None:
        return 0 if run_on_pictures(plan, segmenter) else 1
    run_on_video(video, segmenter, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
