"""
The rows of tools/benchmark.py: what is measured, how often, and what it should come to.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Optional

from benchmark_cases import (
    Prepared,
    fusion,
    fusion_growing,
    panopticapi_script,
    semantic,
    torchvisions_pasting,
)
from benchmark_models import COCO, DEMO, PANOPTIC_FPN, ROOT, inference, training_step
from benchmark_tried import (
    areas_by_histogram,
    clip_all_at_once,
    label_by_argmax,
    label_by_running_maximum,
    loss_by_logsumexp,
    mask_as_one_sample,
    onednns_own_norm,
    rpn_in_strips,
)

ZOO = COCO + "oanet_R_50_srm_only.yaml"  # Panoptic FPN's own weights and a ranking head
ONLY_PANOPTIC = ["MODEL.OANET.OUTPUTS", "()"]
CHANNELS_LAST = [*ONLY_PANOPTIC, "MODEL.OANET.CHANNELS_LAST", "True"]
REUSE_MEMORY = [*ONLY_PANOPTIC, "MODEL.OANET.REUSE_MEMORY", "True"]
# What `make demo` has left; without it random weights, which detect less than trained ones.
DEMO_WEIGHTS: Optional[Path] = ROOT / "output" / "occlusion_scenes" / "model_final.pth"
if not DEMO_WEIGHTS.exists():
    DEMO_WEIGHTS = None
WEIGHTS = "trained" if DEMO_WEIGHTS else "random"
BOX_AREA = (800, 1333)
NUMBERS = [(n, BOX_AREA) for n in (0, 10, 100, 1000)]
SIZES = [(n, (k * 800, k * 1333)) for k in (1, 2, 3) for n in (0, 100)]


@dataclass
class Row:
    """
    Attributes:
        title: for the table.
        prepare: makes the inputs.
        time_goal, memory_goal: at most this share of the other's; None: no goal.
        repeats: calls of each variant after the first one.
        memory: whether peak memory is measured.
    """

    title: str
    prepare: Callable[[], Prepared]
    time_goal: Optional[float] = None
    memory_goal: Optional[float] = None
    repeats: int = 5
    memory: bool = True


def option(*opts: str) -> Callable[[], Prepared]:
    """
    Whole inference with a config option ("ours") and without ("theirs").
    """
    variants = {"ours": [*ONLY_PANOPTIC, *opts], "theirs": ONLY_PANOPTIC}
    return partial(inference, ZOO, variants, count_work=False)


def against_panoptic_fpn(learns: str) -> Callable[[], Prepared]:
    """
    A training step in which a part of OANet learns, and one of PanopticFPN.
    """
    variants = {"ours": [], "theirs": PANOPTIC_FPN}
    return lambda: training_step(variants, DEMO_WEIGHTS, learns)


# Against Detectron2's functions, unless the title says otherwise.
COMPARED: Dict[str, Row] = {
    "paste_combine_800x1333": Row(
        "paste + combine, 100 instances, 800 x 1333",
        partial(fusion, 100, (800, 1333)),
        time_goal=1 / 10,
        repeats=15,
    ),
    "paste_combine_2160x3840": Row(
        "paste + combine, 100 instances, 2160 x 3840",
        partial(fusion, 100, (2160, 3840)),
        time_goal=1 / 100,
        memory_goal=1 / 10,
        repeats=2,
    ),
    "panopticapi_script": Row(
        "combine and write a PNG, 100 instances, 800 x 1333, against panopticapi's script",
        panopticapi_script,
        repeats=3,
    ),
    "torchvision_paste": Row(
        "100 masks of full images, 800 x 1333, against torchvision's `paste_masks_in_image`",
        torchvisions_pasting,
        repeats=5,
    ),
    "semantic_labels": Row(
        "133 semantic logits, stride 4, 800 x 1344, to labels at 480 x 640",
        semantic,
        time_goal=1 / 5,
        memory_goal=1 / 8,
        repeats=7,
    ),
    "inference": Row(
        "whole inference, R-50 FPN, 800 x 1216, 100 detections, all confident enough to be "
        "painted: OANet with ranking against PanopticFPN",
        partial(inference, ZOO, {"ours": ONLY_PANOPTIC, "theirs": PANOPTIC_FPN}),
        time_goal=0.8,
        memory_goal=0.5,
        repeats=7,
    ),
    "inference_20_painted": Row(
        "the same with 20 of the 100 confident enough",
        partial(inference, ZOO, {"ours": ONLY_PANOPTIC, "theirs": PANOPTIC_FPN}, num_painted=20),
        time_goal=0.8,
        memory_goal=0.5,
        repeats=7,
    ),
    "inference_channels_last": Row(
        "all 100 painted, with `MODEL.OANET.CHANNELS_LAST True`",
        partial(inference, ZOO, {"ours": CHANNELS_LAST, "theirs": PANOPTIC_FPN}),
        repeats=2,
    ),
    "inference_reuse_memory": Row(
        "all 100 painted, with `MODEL.OANET.REUSE_MEMORY True`",
        partial(inference, ZOO, {"ours": REUSE_MEMORY, "theirs": PANOPTIC_FPN}),
        repeats=3,
    ),
    "inference_all_outputs": Row(
        "all 100 painted, with all outputs of PanopticFPN (pred_masks, sem_seg)",
        partial(inference, ZOO, {"ours": [], "theirs": PANOPTIC_FPN}),
        repeats=1,
    ),
    "training_step": Row(
        f"training step, {Path(DEMO).stem}, {WEIGHTS} weights, in the first part of the training, "
        "which is the network's: OANet against PanopticFPN",
        against_panoptic_fpn("network"),
        time_goal=1.1,
        repeats=12,
    ),
    "training_step_ranking": Row(
        "the same in the last part, which is the ranking's (`SOLVER.SRM_ONLY_SHARE`)",
        against_panoptic_fpn("srm"),
        time_goal=1.1,
        repeats=12,
    ),
    "training_step_both": Row(
        "the same with both at once (`SOLVER.SRM_ONLY_SHARE 0.0`)",
        against_panoptic_fpn("all"),
        repeats=12,
    ),
}

# Ours alone, growing.
GROWING: Dict[str, Row] = {
    "instances": Row(
        "10, 100, 1000 instances, 800 x 1333",
        partial(fusion_growing, NUMBERS, BOX_AREA),
        repeats=15,
        memory=False,
    ),
    "image_size": Row(
        "100 instances in an area of 800 x 1333 of a growing image",
        partial(fusion_growing, SIZES, BOX_AREA),
        repeats=15,
        memory=False,
    ),
}
MOST_GROWTH = 1.25  # of the cost per instance, from the first to the last

# OANet with an option against OANet without.
OPTIONS: Dict[str, Row] = {
    "option_channels_last": Row(
        "`MODEL.OANET.CHANNELS_LAST True`", option("MODEL.OANET.CHANNELS_LAST", "True"), repeats=2
    ),
    "option_channels_last_training": Row(
        "the same, training step of the demo",
        lambda: training_step(
            {"ours": ["MODEL.OANET.CHANNELS_LAST", "True"], "theirs": []}, DEMO_WEIGHTS, "network"
        ),
        repeats=12,
    ),
    "option_reuse_memory": Row(
        "`MODEL.OANET.REUSE_MEMORY True`", option("MODEL.OANET.REUSE_MEMORY", "True"), repeats=3
    ),
    "option_amp": Row(
        "`SOLVER.AMP.ENABLED True`, training step of the demo",
        lambda: training_step(
            {"ours": ["SOLVER.AMP.ENABLED", "True"], "theirs": []}, DEMO_WEIGHTS, "network"
        ),
        repeats=12,
    ),
    "option_inference_mode": Row(
        "`MODEL.OANET.INFERENCE_MODE True`",
        option("MODEL.OANET.INFERENCE_MODE", "True"),
        repeats=1,
    ),
    "option_autocast": Row(
        "`MODEL.OANET.AUTOCAST bfloat16`",
        option("MODEL.OANET.AUTOCAST", "bfloat16"),
        repeats=1,
    ),
    "option_compile": Row(
        "`MODEL.OANET.COMPILE True`", option("MODEL.OANET.COMPILE", "True"), repeats=2
    ),
}

# The way that is built ("ours") against another that was tried ("theirs").
TRIED: Dict[str, Row] = {
    "tried_argmax": Row(
        "54 classes, 800 x 1333: `argmax` instead of `max(...).indices`",
        label_by_argmax,
        memory=False,
    ),
    "tried_running_maximum": Row(
        "semantic labels: both interpolations for 8 classes at a time, with a running maximum",
        label_by_running_maximum,
        memory=False,
    ),
    "tried_histogram": Row(
        "areas of stuff, 2160 x 3840: a histogram by OpenCV instead of counting runs",
        areas_by_histogram,
        memory=False,
    ),
    "tried_one_sample": Row(
        "100 masks: `grid_sample` of a box as one sample instead of one for each row",
        mask_as_one_sample,
        repeats=15,
        memory=False,
    ),
    "tried_logsumexp": Row(
        "semantic loss of the demo: log Z - score of the label instead of `F.cross_entropy`",
        loss_by_logsumexp,
        repeats=15,
        memory=False,
    ),
    "tried_rpn_in_strips": Row(
        "the RPN head on p2 of 800 x 1216: 25 rows at a time instead of all",
        rpn_in_strips,
        memory=False,
    ),
    "tried_own_norm": Row(
        "256 channels of p2 in oneDNN's layout: its own norm instead of a convolution of each",
        onednns_own_norm,
        memory=False,
    ),
    "tried_clip_together": Row(
        "clipping of the demo's gradients: all at once instead of one by one",
        clip_all_at_once,
        repeats=15,
        memory=False,
    ),
}
ROWS = {**COMPARED, **GROWING, **OPTIONS, **TRIED}
