#!/usr/bin/env python3
"""
What OANet costs, beside Detectron2's own functions on the same inputs.

    python tools/benchmark.py                                  # every row, on the CPU
    python tools/benchmark.py --rows semantic_labels mapper    # some rows
    python tools/benchmark.py --device cuda --update           # into docs/performance.md

The two sides take turns within one run. Their ratio is the median of ours / theirs over the turns.
Every row has a process of its own. OMP_NUM_THREADS sets the threads.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from results import fill_region, markdown_table
from torch.nn import functional as F

from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from oanet_d2 import complete_config, load_config, register_panoptic
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.images import read_segment_ids
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.painting.fusion import combine
from oanet_d2.painting.masks import BoxedMasks
from oanet_d2.painting.semantic import resized_semantic_labels

ROOT = Path(__file__).resolve().parent.parent
DEMO = "configs/OcclusionScenes/oanet_R_18.yaml"
COCO = "configs/COCO-PanopticSegmentation/oanet_R_50_srm_only.yaml"  # the zoo's network
PANOPTIC_FPN = ["MODEL.META_ARCHITECTURE", "PanopticFPN"]
PANOPTIC_FPN += ["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"]
PANOPTIC_FPN += ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff"]
ONLY_PANOPTIC = ["MODEL.OANET.OUTPUTS", "()"]
NUM_THINGS, NUM_STUFF = 80, 53
IMAGE_SIZE = (800, 1333)

Sides = Tuple[Callable, Callable]  # ours, theirs


# ---------------------------------------------------------------------------- after the network


def blobs(size: Tuple[int, int], device: str) -> Instances:
    """
    100 detections as ROI heads leave them, best first: blobs in boxes of 20 to 400 pixels.
    """
    box_size = 20 + 380 * torch.rand(100, 2)
    first = torch.rand(100, 2) * (torch.tensor([size[1], size[0]]) - box_size)
    line = torch.linspace(-1, 1, 28)
    radius = (line[:, None] ** 2 + line**2).sqrt()
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.cat([first, first + box_size], dim=1))
    instances.scores = 0.5 + 0.5 * torch.rand(100).sort(descending=True).values
    instances.pred_classes = torch.randint(NUM_THINGS, (100,))
    instances.pred_masks = (8 * (0.8 - radius) + 0.5 * torch.randn(100, 1, 28, 28)).sigmoid()
    return instances.to(device)


def smooth_scores(classes: int, size: Tuple[int, int], cell: int, device: str) -> torch.Tensor:
    coarse = torch.randn(1, classes, size[0] // cell, size[1] // cell)
    smooth = 4 * F.interpolate(coarse, size=size, mode="bilinear")[0]
    return (smooth + 0.1 * torch.randn(classes, *size)).to(device)


def paste_and_combine(size: Tuple[int, int], device: str) -> Sides:
    x = blobs(size, device)
    labels = smooth_scores(15, size, 80, device).argmax(dim=0)
    limits = {"overlap_threshold": 0.5, "stuff_area_thresh": 4096, "instances_score_thresh": 0.5}

    def ours():
        masks = BoxedMasks.paste(x.pred_masks[:, 0], x.pred_boxes.tensor, size)
        order = torch.argsort(-x.scores)
        return combine(masks, x.scores, x.pred_classes, order, labels, **limits)

    def theirs():
        pasted = Instances(size, scores=x.scores, pred_classes=x.pred_classes)
        pasted.pred_masks = paste_masks_in_image(x.pred_masks[:, 0], x.pred_boxes, size)
        return combine_semantic_and_instance_outputs(pasted, labels, **limits)

    return ours, theirs


def semantic_labels(device: str) -> Sides:
    scores = smooth_scores(NUM_THINGS + NUM_STUFF, (200, 336), 16, device)
    output = (480, 640)

    def theirs():
        logits = F.interpolate(scores[None], scale_factor=4, mode="bilinear", align_corners=False)
        return sem_seg_postprocess(logits[0], IMAGE_SIZE, *output).argmax(dim=0)

    return partial(resized_semantic_labels, scores, 4, IMAGE_SIZE, output, True), theirs


# -------------------------------------------------------------------------------- whole models


@ROI_HEADS_REGISTRY.register()
class BlobROIHeads(StandardROIHeads):
    """
    They do all their work. Then blobs replace what random weights detect.
    """

    blobs: Instances

    def _forward_box(self, features, proposals):
        super()._forward_box(features, proposals)
        return [self.blobs[:]]

    def _forward_mask(self, features, instances):
        (x,) = super()._forward_mask(features, instances)
        x.pred_masks = self.blobs.pred_masks[: len(x)]  # the painted ones come first
        return [x]


def build_config(config: str, device: str, *opts: str):
    always = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "TEST.ORDERS", "()"]
    cfg = load_config(ROOT / config, [*always, *opts])
    complete_config(cfg)
    return cfg


def inference(ours: Sequence[str], theirs: Sequence[str], painted: int, device: str) -> Sides:
    """
    Whole inference. `painted` of 100 detections have a score over the threshold.
    """
    image = torch.randint(0, 256, (3, *IMAGE_SIZE), dtype=torch.uint8)
    detections = blobs(IMAGE_SIZE, device)
    detections.scores[painted:] *= 0.49
    # Inputs are scaled down so far that nothing overflows in a network of random weights.
    shared = ["MODEL.ROI_HEADS.NAME", "BlobROIHeads", "MODEL.PIXEL_STD", "[1e8, 1e8, 1e8]"]
    models = [build_model(build_config(COCO, device, *shared, *x)).eval() for x in (ours, theirs)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    for model in models:
        model.roi_heads.blobs = detections
    run = torch.no_grad()(lambda model: model([{"image": image}]))
    return partial(run, models[0]), partial(run, models[1])


def scenes(folder: str, number: int, size: int) -> List[Dict]:
    """
    Dataset dicts of scenes that are written into `folder` and registered under its name.
    """
    root = Path(folder)
    write_split(root, "train", number, image_size=size, seed=0, num_workers=0)
    jsons = [root / "annotations" / f"{kind}_train.json" for kind in ("panoptic", "instances")]
    register_panoptic(folder, root / "train", jsons[0], root / "panoptic_train", jsons[1])
    return DatasetCatalog.get(folder)


def training_step(phase: str, device: str) -> Sides:
    """
    Forward, backward and optimizer of the demo, from its weights if `make demo` has left them.
    """
    weights = ROOT / "output" / "occlusion_scenes" / "model_final.pth"
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        dicts = scenes(folder, 8, 192)
        for opts in ([], PANOPTIC_FPN):
            cfg = build_config(DEMO, device, *opts)
            model = build_model(cfg).train()
            if weights.exists():
                state = torch.load(weights, map_location=device, weights_only=True)["model"]
                shapes = {k: v.shape for k, v in model.state_dict().items()}
                state = {k: v for k, v in state.items() if v.shape == shapes.get(k)}
                model.load_state_dict(state, strict=False)
            if not opts:
                model.set_phase(phase)
            optimizer = OANetTrainer.build_optimizer(cfg, model)
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # every step starts from the same weights
            samples = list(map(PanopticDatasetMapper(cfg, is_train=True), dicts))
            batches = itertools.cycle(zip(*[iter(samples)] * cfg.SOLVER.IMS_PER_BATCH))
            sides.append(partial(step, model, optimizer, batches))
    return sides[0], sides[1]


def step(model, optimizer, batches) -> None:
    with EventStorage():
        losses = sum(model(next(batches)).values())
    optimizer.zero_grad()
    losses.backward()
    optimizer.step()


def mapper(device: str) -> Sides:
    """
    Eight training images of COCO's size, on one core. Detectron2's mapper takes them in Panoptic
    FPN's format, with PNGs of semantic labels.
    """
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    dicts = scenes(folder.name, 8, 640)
    names = ["DATASETS.TRAIN", f"('{folder.name}',)", "DATASETS.TEST", "()"]
    cfg = build_config(COCO, "cpu", *names, "INPUT.MASK_FORMAT", "bitmask")
    separated = []
    for i, d in enumerate(dicts):
        ids = read_segment_ids(d["pan_seg_file_name"])
        labels = np.zeros(ids.shape, dtype=np.uint8)
        for segment in d["segments_info"]:
            labels[ids == segment["id"]] = 0 if segment["isthing"] else segment["category_id"]
        path = f"{folder.name}/stuff_{i}.png"
        Image.fromarray(labels).save(path)
        separated.append({**d, "sem_seg_file_name": path})

    def read(mapper, images, folder):
        np.random.seed(0)
        for image in images:
            mapper(image)

    ours, theirs = PanopticDatasetMapper(cfg, is_train=True), DatasetMapper(cfg, is_train=True)
    return partial(read, ours, dicts, folder), partial(read, theirs, separated, folder)


# ----------------------------------------------------------------------------------- measuring


class Row(NamedTuple):
    title: str
    prepare: Callable[[str], Sides]
    turns: int
    goals: Tuple[Optional[float], Optional[float]] = (None, None)  # time and memory, ours / theirs


def of_inference(title: str, theirs: Sequence[str], painted: int, *goals: float) -> Row:
    return Row(title, partial(inference, ONLY_PANOPTIC, theirs, painted), 7, goals or (None, None))


BY_SCORE = [*ONLY_PANOPTIC, "MODEL.OANET.ORDER", "score"]
SMALL, LARGE = (partial(paste_and_combine, size) for size in (IMAGE_SIZE, (2160, 3840)))
ROWS = {
    "paste_combine": Row("paste + combine, 100 instances, 800 x 1333", SMALL, 15),
    "paste_combine_4k": Row("the same, 2160 x 3840", LARGE, 3),
    "semantic_labels": Row("133 semantic scores to labels, 480 x 640", semantic_labels, 7),
    "inference": of_inference("inference, 800 x 1333, 100 painted", PANOPTIC_FPN, 100, 0.9, 0.75),
    "inference_20": of_inference("the same, 20 painted", PANOPTIC_FPN, 20, 0.9, 0.75),
    "ranking": of_inference("100 painted, *srm_pairs* against *score*", BY_SCORE, 100),
    "training_network": Row("demo's step, network's phase", partial(training_step, "network"), 12),
    "training_ranking": Row("demo's step, ranking's phase", partial(training_step, "ranking"), 12),
    "mapper": Row("mapper, 8 images of 640 x 640, one core", mapper, 15),
}


def measure(row: Row, device: str) -> List[str]:
    """
    The row's cells in the table.
    """
    torch.manual_seed(0)
    sides = row.prepare(device)
    for side in sides:
        side()
    turns = [[seconds_of(side, device) for side in sides] for _ in range(row.turns)]
    time_ratio = statistics.median(a / b for a, b in turns)
    ours, theirs = (f"{1e3 * statistics.median(x):.1f}" for x in zip(*turns))
    cells = [row.title, ours, theirs, ratio_text(time_ratio, row.goals[0])]
    peaks = [[peak_memory(side, device) for side in sides] for _ in range(3)]
    if None in peaks[0]:
        return [*cells, "", "", ""]
    ours, theirs = (statistics.median(x) / 2**20 for x in zip(*peaks))
    return [*cells, f"{ours:.1f}", f"{theirs:.1f}", ratio_text(ours / theirs, row.goals[1])]


def ratio_text(ratio: float, goal: Optional[float]) -> str:
    return f"{ratio:.3f}" + (f" (goal: {goal})" if goal else "")


def seconds_of(function: Callable, device: str) -> float:
    gc.collect()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable, device: str) -> Optional[int]:
    """
    Returns:
        bytes by which a call raises the peak: of PyTorch's allocations on a GPU, of this process's
        resident memory on a CPU. None where the system does not tell (not Linux).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # or the call is served from what was freed before
    reset.write_text("5")
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(field + ":"))


def environment(device: str) -> str:
    processor = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    return f"{processor}, PyTorch {torch.__version__}, Python {platform.python_version()}."


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS, default=list(ROWS))
    parser.add_argument("--update", action="store_true", help="write it into docs/performance.md")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(ROWS[args.one], args.device)))
    lines = []
    for name in args.rows:
        command = [sys.executable, __file__, "--device", args.device, "--one", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        lines.append(json.loads(output.splitlines()[-1]))
        print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
    headers = ["", "ours, ms", "Detectron2, ms", "time", "ours, MiB", "Detectron2, MiB", "memory"]
    text = f"{environment(args.device)}\n\n{markdown_table(headers, lines)}"
    print(text)
    if args.update:
        page = ROOT / "docs" / "performance.md"
        fill_region(page, f"tools/benchmark.py --device {args.device}", text)


if __name__ == "__main__":
    main()
