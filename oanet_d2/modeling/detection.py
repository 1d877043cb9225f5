"""
Detections with the masks that somebody looks at, made a few at a time.
"""

import itertools
from contextlib import contextmanager
from typing import Dict, Iterator, List, Sequence

import torch
from torch import nn

from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import ImageList, Instances

__all__ = ["detect"]

# What the mask head is given at once on a CPU. With fewer boxes than 16, PyTorch's convolutions may
# add in another order, so parts are of equal size: more than half of this.
BOXES_AT_ONCE = 32


def detect(
    roi_heads: nn.Module,
    images: ImageList,
    features: Dict[str, torch.Tensor],
    proposals: List[Instances],
    mask_threshold: float = -torch.inf,
) -> List[Instances]:
    """
    What ROI heads in evaluation mode detect: the boxes first, then masks for those whose score is
    high enough. ROI heads other than Detectron2's :class:`StandardROIHeads` and subclasses, which
    make masks in their own way, make all of them.

    Args:
        images, features, proposals: as :meth:`ROIHeads.forward` takes them.
        mask_threshold: an instance with a lower score gets no mask: zeros.

    Returns:
        one for each image, with "pred_boxes", "scores", "pred_classes" and "pred_masks".
    """
    if not isinstance(roi_heads, StandardROIHeads):
        return roi_heads(images, features, proposals, None)[0]
    with switched_off(roi_heads, "mask_on"):
        detections, _ = roi_heads(images, features, proposals, None)
    if not all(x.has("pred_masks") for x in detections):
        _add_masks(roi_heads, features, detections, mask_threshold)
    return detections


def _add_masks(roi_heads, features, detections: List[Instances], threshold: float) -> None:
    shown = [(x.scores >= threshold).nonzero()[:, 0] for x in detections]
    wanted = [x[indices] for x, indices in zip(detections, shown)]
    on_cpu = all(x.device.type == "cpu" for x in shown)
    lengths = [len(x) for x in wanted]
    masks = []
    # Keypoints, if there are any, have come with the boxes.
    with switched_off(roi_heads, "keypoint_on"):
        for part in equal_parts(lengths, BOXES_AT_ONCE if on_cpu else max(sum(lengths), 1)):
            given = [x[of_image] for x, of_image in zip(wanted, part)]
            given = roi_heads.forward_with_given_boxes(features, given)
            masks.append([x.pred_masks for x in given])
    for instances, indices, parts in zip(detections, shown, zip(*masks)):
        pred_masks = parts[0].new_zeros(len(instances), *parts[0].shape[1:])
        pred_masks[indices] = torch.cat(parts)
        instances.pred_masks = pred_masks


def equal_parts(lengths: Sequence[int], most: int) -> Iterator[List[slice]]:
    """
    Divide several sequences, one after the other, into as few parts as possible.

    Args:
        lengths: of the sequences.
        most: elements in a part, of all sequences together.

    Yields:
        for each part what it has of every sequence. Parts differ by one element at the most; there
        is one at the least, be it empty.
    """
    total = sum(lengths)
    num_parts = max(1, -(-total // most))
    starts = list(itertools.accumulate(lengths, initial=0))
    for k in range(num_parts):
        first, last = (total * i // num_parts for i in (k, k + 1))
        yield [
            slice(min(max(first - start, 0), length), min(max(last - start, 0), length))
            for start, length in zip(starts, lengths)
        ]


@contextmanager
def switched_off(roi_heads: nn.Module, switch: str):
    """
    ROI heads without one of their heads, as Detectron2's test-time augmentation does it.

    Args:
        switch: "mask_on" or "keypoint_on".
    """
    before = getattr(roi_heads, switch)
    setattr(roi_heads, switch, False)
    try:
        yield
    finally:
        setattr(roi_heads, switch, before)
