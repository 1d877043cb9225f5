"""
What tools/benchmark.py measures after the network: the same work done by Detectron2 and by us, on
the same inputs. Nothing is measured here.
"""

import os
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import pycocotools.mask as mask_util
import torch
from panopticapi.combine_semantic_and_instance_predictions import combine_to_panoptic_single_core
from panopticapi.utils import id2rgb
from PIL import Image
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image as torchvision_paste

from detectron2.layers import paste_masks_in_image
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances

from oanet_d2.modeling.instance_masks import BoxedMasks
from oanet_d2.modeling.panoptic_combiner import combine
from oanet_d2.modeling.semantic_labels import resized_semantic_labels

NUM_THINGS, NUM_STUFF = 80, 53
FLOAT, INT32, INT64 = 4, 4, 8
OVERLAP, STUFF_AREA, CONFIDENCE = 0.5, 4096, 0.5


@dataclass
class Prepared:
    """
    Attributes:
        variants: ways to do the same work, by name: mostly "ours" and "theirs" (Detectron2's).
        bytes_moved: what has to be read and written at the very least: inputs, outputs, and what
            of the output has to be looked at for every instance. 0: not known.
        flops: floating-point operations that it takes at the very least; 0: next to none.
        agreement: of the results of the first two variants, the share in [0, 1] that is equal;
            None where they are not meant to be.
    """

    variants: Dict[str, Callable]
    bytes_moved: int
    flops: int = 0
    agreement: Optional[Callable] = None


def make_detections(num_instances: int, size, box_area=None) -> Instances:
    """
    Instances as an ROI head leaves them: soft-edged blobs in boxes of 20 to 400 pixels.

    Args:
        num_instances: N.
        size: (H, W) of the image.
        box_area: (h, w) at the top left of the image that holds all boxes; None: the image.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = box_area or size
    box_size = 20 + 380 * torch.rand(num_instances, 2, generator=generator)
    first = torch.rand(num_instances, 2, generator=generator)
    first = first * (torch.tensor([width, height]) - box_size)
    line = torch.linspace(-1, 1, 28)
    radius = (line[:, None] ** 2 + line**2).sqrt()
    noise = 0.5 * torch.randn(num_instances, 28, 28, generator=generator)
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.cat([first, first + box_size], dim=1))
    instances.scores = 0.5 + 0.5 * torch.rand(num_instances, generator=generator)
    instances.pred_classes = torch.randint(NUM_THINGS, (num_instances,), generator=generator)
    instances.pred_masks = torch.sigmoid(8 * (0.8 - radius) + noise)[:, None]
    return instances


def make_labels(size) -> torch.Tensor:
    """
    (H, W) int64: blobs of stuff, a fifth of the image free for things (0).
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 15, size[0] // 80, size[1] // 80, generator=generator)
    return F.interpolate(coarse, size=size, mode="bilinear")[0].argmax(dim=0)


def make_scores(num_classes: int, size) -> torch.Tensor:
    """
    (classes, h, w) logits: smooth, with a little noise.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, num_classes, size[0] // 16, size[1] // 16, generator=generator)
    smooth = 4 * F.interpolate(coarse, size=size, mode="bicubic")[0]
    return smooth + 0.1 * torch.randn(num_classes, *size, generator=generator)


def paste_and_combine(instances: Instances, labels: torch.Tensor):
    """
    Ours, from the output of the mask head to the panoptic map, in order of score.
    """
    masks = BoxedMasks(
        instances.pred_masks[:, 0], instances.pred_boxes.tensor, instances.image_size
    )
    return combine(
        masks,
        instances.scores,
        instances.pred_classes,
        torch.argsort(-instances.scores),
        labels,
        overlap_threshold=OVERLAP,
        stuff_area_thresh=STUFF_AREA,
        instances_score_thresh=CONFIDENCE,
    )


def detectron2s_paste_and_combine(instances: Instances, labels: torch.Tensor):
    """
    What :func:`detector_postprocess` and :meth:`PanopticFPN.inference` do.
    """
    pasted = Instances(
        instances.image_size, scores=instances.scores, pred_classes=instances.pred_classes
    )
    pasted.pred_masks = paste_masks_in_image(
        instances.pred_masks[:, 0], instances.pred_boxes, instances.image_size
    )
    return combine_semantic_and_instance_outputs(pasted, labels, OVERLAP, STUFF_AREA, CONFIDENCE)


def same_panoptic(ours, theirs) -> float:
    """
    The share of equal pixels; 0 where the segments are not the same.
    """
    return same_labels(ours[0], theirs[0]) * (ours[1] == theirs[1])


def same_labels(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours == theirs).double().mean().item()


def bytes_of_fusion(instances: Instances) -> int:
    height, width = instances.image_size
    return (
        height * width * (INT64 + INT32)
        + instances.pred_masks.numel() * FLOAT
        # each instance looks at the panoptic map where it is
        + int(instances.pred_boxes.area().sum()) * INT32
    )


def fusion(num_instances: int, size) -> Prepared:
    """
    Pasting and combining.
    """
    instances, labels = make_detections(num_instances, size), make_labels(size)
    return Prepared(
        {
            "ours": lambda: paste_and_combine(instances, labels),
            "theirs": lambda: detectron2s_paste_and_combine(instances, labels),
        },
        bytes_of_fusion(instances),
        agreement=same_panoptic,
    )


def fusion_growing(steps: Sequence[Tuple[int, Tuple[int, int]]], box_area) -> Prepared:
    """
    Ours alone, for several numbers of instances and image sizes.

    Args:
        steps: (N, (H, W)) of each; a variant is named "N HxW".
        box_area: (h, w) at the top left of every image that holds all boxes.
    """
    inputs = {
        f"{num} {size[0]}x{size[1]}": (make_detections(num, size, box_area), make_labels(size))
        for num, size in steps
    }
    last, _ = inputs[next(reversed(inputs))]
    variants = {name: partial(paste_and_combine, *x) for name, x in inputs.items()}
    return Prepared(variants, bytes_of_fusion(last))


def panopticapi_script() -> Prepared:
    """
    panopticapi's combine script, which starts from run-length encodings and writes a PNG; ours
    starts from the mask head's output and writes one too.
    """
    size = (800, 1333)
    instances, labels = make_detections(100, size), make_labels(size)
    folder = tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "ours.png")

    def encode(mask: torch.Tensor):
        return mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    masks = paste_masks_in_image(instances.pred_masks[:, 0], instances.pred_boxes, size)
    things = [
        {"segmentation": encode(masks[i]), "category_id": 1 + int(instances.pred_classes[i])}
        for i in torch.argsort(-instances.scores)
    ]
    stuff = [
        {"segmentation": encode(labels == s), "category_id": NUM_THINGS + int(s)}
        for s in labels.unique()
        if s > 0
    ]
    categories = {
        i: {"id": i, "isthing": int(i <= NUM_THINGS), "color": [i, i, i]}
        for i in range(1, NUM_THINGS + NUM_STUFF + 1)
    }
    images = {1: {"file_name": "theirs.jpg", "height": size[0], "width": size[1]}}

    def ours():
        panoptic_seg, _ = paste_and_combine(instances, labels)
        Image.fromarray(id2rgb(panoptic_seg.numpy())).save(path)

    def theirs():
        combine_to_panoptic_single_core(
            0, [1], images, {1: things}, {1: stuff}, folder.name, OVERLAP, STUFF_AREA, categories
        )

    ours.folder = folder  # lives as long as what writes into it
    return Prepared({"ours": ours, "theirs": theirs}, bytes_of_fusion(instances))


def torchvisions_pasting() -> Prepared:
    """
    Masks of full images, as evaluators of instances want them, by torchvision's Mask R-CNN; it leaves
    probabilities, of boxes that were rounded to pixels.
    """
    size = (800, 1333)
    instances = make_detections(100, size)
    masks, boxes = instances.pred_masks, instances.pred_boxes.tensor
    return Prepared(
        {
            "ours": lambda: BoxedMasks(masks[:, 0], boxes, size).full(),
            "theirs": lambda: torchvision_paste(masks, boxes, size) >= 0.5,
        },
        masks.numel() * FLOAT + 100 * size[0] * size[1],
        agreement=lambda a, b: same_labels(a, b[:, 0]),
    )


def semantic(cells=(200, 336), image_size=(800, 1333), output_size=(480, 640)) -> Prepared:
    """
    Logits of 133 classes at stride 4 to a label map.

    Args:
        cells: (h, w) of the logits.
        image_size: of the network's input, without padding.
        output_size: of the label map.
    """
    scores = make_scores(NUM_THINGS + NUM_STUFF, cells)

    def theirs():
        up = F.interpolate(scores[None], scale_factor=4, mode="bilinear", align_corners=False)
        return sem_seg_postprocess(up[0], image_size, *output_size).argmax(dim=0)

    return Prepared(
        {
            "ours": lambda: resized_semantic_labels(scores, 4, image_size, output_size, True),
            "theirs": theirs,
        },
        scores.numel() * FLOAT + output_size[0] * output_size[1] * INT64,
        agreement=same_labels,
    )
