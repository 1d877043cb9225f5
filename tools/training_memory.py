#!/usr/bin/env python3
"""
How much memory a training step takes, and what that means for a GPU.

    python tools/training_memory.py --update docs/training.md

Every config runs one whole training step (forward, backward, optimizer) on the CPU with two images
of 800 x 1333 pixels, what one GPU gets in Detectron2's schedules, in a process of its own whose
peak memory is measured. A GPU's figure is estimated from the model zoo's: what it reports for
Panoptic FPN, times the ratio of the measurements here.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from marked_region import begin_mark, split_page, update_page
from tabulate import tabulate

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from oanet_d2 import complete_config, load_config
from oanet_d2.engine import OANetTrainer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = "configs/COCO-PanopticSegmentation/"
SIZE = (800, 1333)
THINGS, STUFF = 8, 5  # about what a COCO image has
BEGIN = begin_mark("tools/training_memory.py")
# Name, config, overrides; and GiB a GPU that Detectron2's model zoo reports for the training of
# Panoptic FPN (MODEL_ZOO.md, column "train mem").
PANOPTIC_FPN = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"]
PANOPTIC_FPN += ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff"]
RUNS = [
    ("Panoptic FPN R-50", "oanet_R_50_1x.yaml", PANOPTIC_FPN, 4.8),
    ("OANet R-50", "oanet_R_50_1x.yaml", [], None),
    ("OANet R-50, only the ranking", "oanet_R_50_srm_only.yaml", [], None),
    ("Panoptic FPN R-101", "oanet_R_101_3x.yaml", PANOPTIC_FPN, 6.0),
    ("OANet R-101", "oanet_R_101_3x.yaml", [], None),
]


def make_input(cfg, seed: int) -> dict:
    """
    A training input at COCO's size: boxes as things on bands of stuff, random pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = SIZE
    rows = torch.arange(height) * STUFF // height
    stuff_only = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff"
    index = (rows + 1)[:, None].repeat(1, width)
    segments = [{"id": i, "category_id": i, "isthing": False} for i in range(1, STUFF + 1)]
    boxes, classes, polygons = [], [], []
    for i in range(THINGS):
        w, h = (torch.rand(2, generator=generator) * 300 + 40).tolist()
        x, y = torch.rand(2, generator=generator).tolist()
        x0, y0 = x * (width - w), y * (height - h)
        boxes.append([x0, y0, x0 + w, y0 + h])
        classes.append(i)
        polygons.append([torch.tensor([x0, y0, x0 + w, y0, x0 + w, y0 + h, x0, y0 + h]).numpy()])
        segments.append({"id": len(segments) + 1, "category_id": i, "isthing": True})
        index[int(y0) : int(y0 + h), int(x0) : int(x0 + w)] = len(segments)
    num_things = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    categories = torch.tensor(
        [255] + [s["category_id"] + (0 if s["isthing"] else num_things - 1) for s in segments]
    )[index]
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor(boxes))
    instances.gt_classes = torch.tensor(classes)
    instances.gt_masks = PolygonMasks(polygons)
    return {
        "image": torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8),
        "instances": instances,
        "panoptic_seg": (index, segments),
        "panoptic_category": categories,
        "sem_seg": (categories - num_things + 1).clamp(min=0) if stuff_only else categories,
    }


def peak_of_a_step(config: str, opts: list) -> int:
    """
    Returns:
        bytes by which a training step raises this process' peak memory.
    """
    cfg = load_config(
        ROOT / CONFIGS / config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]
    )
    complete_config(cfg)
    torch.manual_seed(0)
    batch = [make_input(cfg, seed) for seed in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_model(cfg).train()
    optimizer = OANetTrainer.build_optimizer(cfg, model)
    with EventStorage():
        sum(model(batch).values()).backward()
    optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * (1 if sys.platform == "darwin" else 1024)


def measure(config: str, opts: list) -> int:
    """
    :func:`peak_of_a_step` in a fresh process.
    """
    command = [sys.executable, __file__, "--one", config, *opts]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def memory_table() -> str:
    rows, reference = [], None
    for name, config, opts, reported in RUNS:
        measured = measure(config, opts) / 2**30
        if reported is not None:
            reference = (reported, measured)
        expected = reference[0] * measured / reference[1]
        source = "reported by the model zoo" if reported is not None else "estimated"
        ratio = f"{measured / reference[1]:.2f}"
        rows.append([name, f"{measured:.1f}", ratio, f"{expected:.1f}", source])
        print(*rows[-1], file=sys.stderr, flush=True)
    headers = ["model", "measured on CPU, GiB", "to Panoptic FPN", "a GPU with 2 images, GB", ""]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="page to put the table into")
    parser.add_argument("--one", nargs="+", metavar=("CONFIG", "OPT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak_of_a_step(args.one[0], args.one[1:]))
        return
    if args.update:
        split_page(args.update, BEGIN)  # what is wrong with the page, before minutes of measuring
    table = memory_table()
    print(table)
    if args.update:
        update_page(args.update, BEGIN, table)


if __name__ == "__main__":
    main()
