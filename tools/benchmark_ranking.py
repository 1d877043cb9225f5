#!/usr/bin/env python3
"""
What the ranking costs: the share of the whole inference time that goes into instance tensor,
ranking head and order, for 100 instances in an image of 800 x 1333 pixels.

    python tools/benchmark_ranking.py [--json FILE]

The network is the COCO R-50 config with random weights. Its detections are replaced, after they
have been computed, by made-up ones with boxes of 20 to 400 pixels: random weights detect nothing
that overlaps as instances do.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from oanet_d2 import complete_config, load_config
from oanet_d2.modeling import RankingEvidence

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/COCO-PanopticSegmentation/oanet_R_50_1x.yaml"
HEIGHT, WIDTH, NUM_INSTANCES = 800, 1333, 100
HEAD = "MODEL.SRM_HEAD.NAME"
ORDER = "MODEL.OANET.ORDER"
VARIANTS = {
    "pairs (default)": [],
    "pairs, masks only": ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry',)"],
    "score map, in overlaps": [HEAD, "SpatialRankingHead", ORDER, "srm_overlap"],
    "score map, mean (the paper's)": [HEAD, "SpatialRankingHead", ORDER, "srm_mean"],
}


def make_detections(num_classes: int) -> Instances:
    """
    NUM_INSTANCES elliptical instances, most of them near another one.
    """
    generator = torch.Generator().manual_seed(0)
    size = 20 + 380 * torch.rand(NUM_INSTANCES, 2, generator=generator)
    centre = torch.rand(NUM_INSTANCES, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    boxes = Boxes(torch.cat([centre - size / 2, centre + size / 2], dim=1))
    boxes.clip((HEIGHT, WIDTH))
    line = torch.linspace(-1, 1, 28)
    ellipse = ((line[:, None] ** 2 + line[None] ** 2) < 1).float()
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = boxes
    instances.scores = torch.rand(NUM_INSTANCES, generator=generator) * 0.5 + 0.5
    instances.pred_classes = torch.randint(num_classes, (NUM_INSTANCES,), generator=generator)
    instances.pred_masks = ellipse.expand(NUM_INSTANCES, 1, 28, 28).clone()
    return instances


def timed(function, seconds: list):
    """
    `function`, adding the time of every call to `seconds`.
    """

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call


@torch.no_grad()
def measure(opts: list, repeats: int) -> dict:
    """
    Args:
        opts: config overrides.
        repeats: how often, after one warm-up.

    Returns:
        median seconds of the whole "inference", of the "ranking" in it and of the "order" in that
        (comparisons to a permutation), and the "ratio" of the first two.
    """
    cfg = load_config(ROOT / CONFIG)
    # Random weights: inputs so small that nothing overflows, and as many detections as the mask
    # head may be given, whatever their scores.
    cfg.merge_from_list(["MODEL.PIXEL_STD", "[1e8, 1e8, 1e8]"])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.ORDERS", "()"])
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", *opts])
    complete_config(cfg)
    model = build_model(cfg).eval()
    detections = make_detections(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    detect = model.roi_heads.forward

    def roi_heads(*args):
        detected, _ = detect(*args)
        assert len(detected[0]) == NUM_INSTANCES, f"the mask head has had {len(detected[0])} boxes"
        return [Instances((HEIGHT, WIDTH), **detections.get_fields())], {}

    model.roi_heads.forward = roi_heads
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    inputs = [{"image": image, "height": HEIGHT, "width": WIDTH}]
    inference, ranking, order = [], [], []
    model._rank = timed(model._rank, ranking)
    with mock.patch.object(RankingEvidence, "order", timed(RankingEvidence.order, order)):
        run = timed(lambda: model(inputs), inference)
        for _ in range(repeats + 1):
            run()
    ranking = [a + b for a, b in zip(ranking, order)]
    seconds = {
        "inference": statistics.median(inference[1:]),
        "ranking": statistics.median(ranking[1:]),
        "order": statistics.median(order[1:]),
    }
    return {**seconds, "ratio": seconds["ranking"] / seconds["inference"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    results = {name: measure(opts, args.repeats) for name, opts in VARIANTS.items()}
    table = [
        [name, 1000 * r["order"], 1000 * r["ranking"], r["inference"], 100 * r["ratio"]]
        for name, r in results.items()
    ]
    headers = ["ranking", "order, ms", "ranking, ms", "whole inference, s", "share, %"]
    print(f"{NUM_INSTANCES} instances, {HEIGHT} x {WIDTH}, {CONFIG}, CPU, ", end="")
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(tabulate(table, headers=headers, tablefmt="pipe", floatfmt=".1f"))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
