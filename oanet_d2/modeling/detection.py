"""
Detections with the masks that somebody looks at.
"""

from contextlib import contextmanager
from typing import Dict, List

import torch
from torch import nn

from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import ImageList, Instances

__all__ = ["detect"]


def detect(
    roi_heads: nn.Module,
    images: ImageList,
    features: Dict[str, torch.Tensor],
    proposals: List[Instances],
    mask_threshold: float,
) -> List[Instances]:
    """
    What ROI heads in evaluation mode detect: the boxes first, then masks for those whose score is
    high enough. (Made beside fewer others, a mask may be rounded differently.) ROI heads other than
    Detectron2's :class:`StandardROIHeads` and its subclasses make all masks.

    Args:
        images, features, proposals: as :meth:`ROIHeads.forward` takes them.
        mask_threshold: an instance with a lower score gets no mask: zeros. -inf: all get theirs.

    Returns:
        one for each image, with "pred_boxes", "scores", "pred_classes" and "pred_masks".
    """
    if mask_threshold == -torch.inf or not isinstance(roi_heads, StandardROIHeads):
        return roi_heads(images, features, proposals, None)[0]
    with switched_off(roi_heads, "mask_on"):
        detections, _ = roi_heads(images, features, proposals, None)
    if not all(x.has("pred_masks") for x in detections):
        _add_masks(roi_heads, features, detections, mask_threshold)
    return detections


def _add_masks(roi_heads, features, detections: List[Instances], threshold: float) -> None:
    shown = [(x.scores >= threshold).nonzero()[:, 0] for x in detections]
    wanted = [x[indices] for x, indices in zip(detections, shown)]
    # Keypoints, if there are any, have come with the boxes.
    with switched_off(roi_heads, "keypoint_on"):
        wanted = roi_heads.forward_with_given_boxes(features, wanted)
    for instances, indices, with_masks in zip(detections, shown, wanted):
        masks = with_masks.pred_masks
        instances.pred_masks = masks.new_zeros(len(instances), *masks.shape[1:])
        instances.pred_masks[indices] = masks


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
