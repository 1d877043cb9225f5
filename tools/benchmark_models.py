"""
What tools/benchmark.py measures of whole models: Panoptic FPN and OANet with the same weights.
Nothing is measured here.
"""

import copy
import itertools
import random
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from benchmark_cases import Prepared, make_detections
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

import oanet_d2
from oanet_d2 import register_panoptic
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.occlusion_scenes import ensure_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.modeling import OANet

ROOT = Path(__file__).resolve().parent.parent
COCO = "configs/COCO-PanopticSegmentation/"
DEMO = "configs/OcclusionScenes/oanet_R_18.yaml"
PANOPTIC_FPN = [
    "MODEL.META_ARCHITECTURE",
    "PanopticFPN",
    "MODEL.SEM_SEG_HEAD.NAME",
    "SemSegFPNHead",
]
PANOPTIC_FPN += ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff"]


def load_config(config: str, opts: Sequence):
    """
    One of our configs for the CPU, complete, without weights.
    """
    for_cpu = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.ORDERS", "()"]
    cfg = oanet_d2.load_config(ROOT / config, [*for_cpu, *opts])
    oanet_d2.complete_config(cfg)
    return cfg


def work_of(model: nn.Module, run: Callable) -> Tuple[int, int]:
    """
    Returns:
        bytes that the layers of a model read and write when `run` is called (their inputs, outputs
        and parameters, in the forward pass), and floating-point operations, in all passes.
    """
    total = 0

    def count(module, inputs, output):
        nonlocal total
        tensors = [x for x in (*inputs, output) if isinstance(x, torch.Tensor)]
        total += sum(x.numel() * x.element_size() for x in (*tensors, *module.parameters()))

    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [m.register_forward_hook(count) for m in leaves]
    with FlopCounterMode(display=False) as counter:
        run()
    for handle in handles:
        handle.remove()
    return total, counter.get_total_flops()


# ---------------------------------------------------------------------------------- inference


def build_detecting(config: str, opts: Sequence, num_painted: Optional[int] = None) -> nn.Module:
    """
    A model with random weights for inference. Those detect nothing sensible: the boxes, scores and
    classes that the box head comes to are replaced, after it has computed them, by those of
    :func:`make_detections`, and so are the masks that the mask head makes of these boxes, be it of
    all or of some.

    Args:
        num_painted: as many of the detections have a score above the threshold; None: all.
    """
    # Inputs so small that nothing overflows.
    cfg = load_config(config, ["MODEL.PIXEL_STD", "[1e8, 1e8, 1e8]", *opts])
    model = build_model(cfg).eval()
    detect_boxes = model.roi_heads.box_predictor.inference
    make_masks = model.roi_heads.mask_head.forward

    def made_up_boxes(predictions, proposals):
        found, kept = detect_boxes(predictions, proposals)
        return [_made_up(cfg, x.image_size, num_painted) for x in found], kept

    def made_up_masks(x, instances):
        for made in make_masks(x, instances):
            made.pred_masks = made.made_up_masks
        return instances

    model.roi_heads.box_predictor.inference = made_up_boxes
    model.roi_heads.mask_head.forward = made_up_masks
    return model


def _made_up(cfg, size: Tuple[int, int], num_painted: Optional[int]) -> Instances:
    """
    As many detections as there are at the most, the best first, as a box head returns them; with
    "made_up_masks".
    """
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    instances = make_detections(most, size)
    instances.pred_classes %= cfg.MODEL.ROI_HEADS.NUM_CLASSES
    instances = instances[instances.scores.argsort(descending=True)]
    if num_painted is not None:
        threshold = cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH
        instances.scores[num_painted:] *= threshold / 1.01
    instances.made_up_masks = instances.pred_masks
    instances.remove("pred_masks")
    return instances


def infer(model: nn.Module, size: Tuple[int, int]) -> Callable:
    """
    A function that runs `model` on an image of `size`.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    inputs = [{"image": image, "height": size[0], "width": size[1]}]

    def run():
        with torch.no_grad():
            return model(copy.copy(inputs))

    return run


def inference(
    config: str,
    variants: Dict[str, Sequence],
    size: Tuple[int, int] = (800, 1216),
    count_work: bool = True,
    num_painted: Optional[int] = None,
) -> Prepared:
    """
    Whole inference of models with the same weights, as far as they have the same layers.

    Args:
        config: of all.
        variants: config overrides for each, by name.
        size: (H, W) of the image.
        count_work: whether to count what the last variant has to do.
        num_painted: so many of the detections have a score above the threshold; None: all.
    """
    models = {name: build_detecting(config, opts, num_painted) for name, opts in variants.items()}
    first = next(iter(models.values())).state_dict()
    for model in models.values():
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        shared = {k: v for k, v in first.items() if shapes.get(k) == v.shape}
        model.load_state_dict(shared, strict=False)
    runs = {name: infer(model, size) for name, model in models.items()}
    last = next(reversed(models))
    work = work_of(models[last], runs[last]) if count_work else (0, 0)
    return Prepared(runs, *work)


# ----------------------------------------------------------------------------------- training


def training_step(
    variants: Dict[str, Sequence], weights: Optional[Path] = None, learns: str = "all"
) -> Prepared:
    """
    A step of the demo's config on its scenes: forward, backward, optimizer.

    Args:
        variants: config overrides for each, by name.
        weights: of a trained demo, for all; None: random ones, which detect less than trained ones.
        learns: which part of an OANet: "network", "srm" or "all", see :meth:`OANet.learn_only`.
    """
    cfgs = {name: load_config(DEMO, opts) for name, opts in variants.items()}
    solver = next(iter(cfgs.values())).SOLVER
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        image_size = load_config(DEMO, []).DATASETS.OCCLUSION_SCENES.IMAGE_SIZE
        ensure_split(root, "train", 4 * solver.IMS_PER_BATCH, image_size)
        jsons = [root / "annotations" / f"{kind}_train.json" for kind in ("panoptic", "instances")]
        register_panoptic(folder, root / "train", jsons[0], root / "panoptic_train", jsons[1])
        dicts = DatasetCatalog.get(folder)
        samples = {
            name: list(map(PanopticDatasetMapper(cfg, is_train=True), dicts))
            for name, cfg in cfgs.items()
        }
    torch.manual_seed(0)
    random.seed(0)
    models = {name: build_model(cfg).train() for name, cfg in cfgs.items()}
    for model in models.values():
        if isinstance(model, OANet) and learns != "all":
            model.learn_only(learns)
    steps = {name: make_step(cfgs[name], models[name], samples[name], weights) for name in cfgs}
    last = next(reversed(models))
    steps[last]()  # counting needs gradients that are there already
    return Prepared(steps, *work_of(models[last], steps[last]))


def make_step(cfg, model: nn.Module, samples: List[Dict], weights: Optional[Path]) -> Callable:
    """
    A function that trains `model` for one step on the next batch of `samples`. It always starts
    from the same weights: the learning rate is 0.
    """
    batches = itertools.cycle(zip(*[iter(samples)] * cfg.SOLVER.IMS_PER_BATCH))
    if weights:
        OANetCheckpointer(model).load(str(weights))
    optimizer = OANetTrainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def step():
        with EventStorage():
            losses = sum(model(next(batches)).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

    return step
