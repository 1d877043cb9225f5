"""
Fusion: paint instances in a given order, then fill the rest with stuff.
"""

from bisect import bisect_right
from typing import Dict, List, Tuple, Union

import cv2
import numpy as np
import torch

from .masks import BoxedMasks

__all__ = ["combine"]

# Rows of this many pixels together stay in a CPU's cache.
_PIXELS_AT_ONCE = 2**17


def combine(
    masks: Union[BoxedMasks, torch.Tensor],
    scores: torch.Tensor,
    classes: torch.Tensor,
    order: torch.Tensor,
    semantic: torch.Tensor,
    *,
    overlap_threshold: float,
    stuff_area_thresh: int,
    instances_score_thresh: float,
) -> Tuple[torch.Tensor, List[Dict]]:
    """
    Paint instances in `order`, each onto the pixels that are still free, then the stuff classes onto
    the rest. In the order of the detection scores the result equals
    :func:`detectron2.modeling.meta_arch.panoptic_fpn.combine_semantic_and_instance_outputs` for
    every overlap threshold below 1 and stuff area limit above 0. (Beyond those Detectron2 lists
    segments without a visible pixel, which panopticapi refuses. They are left out here.)

    An instance costs what its region does, not what the image does.

    Args:
        masks: N masks, boxed or as (N, H, W) bool.
        scores: (N,) float, detection scores.
        classes: (N,) int64, contiguous thing ids.
        order: (N,) int64, a permutation of the instances, first painted first.
        semantic: (H, W) int64 from :func:`oanet_d2.painting.semantic.semantic_labels`. Label 0
            stays free.
        overlap_threshold: an instance is dropped if more than this share of its mask is taken.
        stuff_area_thresh: a stuff class with fewer free pixels than this is dropped.
        instances_score_thresh: instances with a lower score are not painted.

    Returns:
        panoptic_seg: (H, W) int32 on semantic's device; 0 is void, segments count from 1.
        segments_info: a dict for every segment, in order of its id: "id", "isthing",
            "category_id" (contiguous), for things "score" and "instance_id" (index into
            `masks`), for stuff "area" (pixels).

    Raises:
        ValueError: `order` is not a permutation of the instances.
    """
    indices = order.tolist()
    if sorted(indices) != list(range(len(scores))):
        raise ValueError(
            f"The painting order is {indices}; it must hold each of the {len(scores)} instances once."
        )
    if not isinstance(masks, BoxedMasks):
        masks = BoxedMasks.from_masks(masks)
    panoptic_seg = torch.zeros_like(semantic, dtype=torch.int32)
    score_of, class_of = scores.tolist(), classes.tolist()
    confident = [i for i in indices if score_of[i] >= instances_score_thresh]
    paint = _paint_on_cpu if panoptic_seg.device.type == "cpu" else _paint_on_device
    segments_info: List[Dict] = []
    for index in paint(panoptic_seg, masks, confident, overlap_threshold):
        segment = {"id": len(segments_info) + 1, "isthing": True, "score": score_of[index]}
        segments_info.append({**segment, "category_id": class_of[index], "instance_id": index})
    for label, area in _fill(panoptic_seg, semantic, stuff_area_thresh, len(segments_info) + 1):
        segment = {"id": len(segments_info) + 1, "isthing": False}
        segments_info.append({**segment, "category_id": label, "area": area})
    return panoptic_seg, segments_info


def _paint_on_cpu(
    panoptic_seg: torch.Tensor, masks: BoxedMasks, indices: List[int], overlap_threshold: float
) -> List[int]:
    """Paint into `panoptic_seg` and return the instances that were not dropped."""
    # NumPy, because PyTorch's overhead is most of the time of such small operations.
    panoptic, kept = panoptic_seg.numpy(), []
    for index in indices:
        boxed, region = masks[index]
        mask, free = boxed.cpu().numpy(), panoptic[region]
        visible = mask & (free == 0)
        area, visible_area = np.count_nonzero(mask), np.count_nonzero(visible)
        if visible_area > 0 and (area - visible_area) / area <= overlap_threshold:
            kept.append(index)
            np.copyto(free, len(kept), where=visible)
    return kept


def _paint_on_device(
    panoptic_seg: torch.Tensor, masks: BoxedMasks, indices: List[int], overlap_threshold: float
) -> List[int]:
    """
    As :func:`_paint_on_cpu`. The host waits for the device twice, however many instances there are.
    """
    if not indices:
        return []
    device = panoptic_seg.device
    boxed = [(mask.to(device), region) for mask, region in map(masks.__getitem__, indices)]
    areas = torch.stack([mask.count_nonzero() for mask, _ in boxed]).tolist()
    count, keeps = torch.zeros((), dtype=torch.int32, device=device), []
    for (mask, region), area in zip(boxed, areas):
        # The host divides, in double precision, which not every device has.
        possible = range(area + 1)
        most_taken = bisect_right(possible, overlap_threshold, key=lambda n: n / max(area, 1)) - 1
        free = panoptic_seg[region]
        visible = mask & (free == 0)
        visible_area = visible.count_nonzero()
        keep = (visible_area > 0) & (area - visible_area <= most_taken)
        count = count + keep
        # Free pixels of an instance that is dropped keep their 0.
        free.masked_fill_(visible, count * keep)
        keeps.append(keep)
    return [index for index, keep in zip(indices, torch.stack(keeps).tolist()) if keep]


def _fill(
    panoptic_seg: torch.Tensor, semantic: torch.Tensor, stuff_area_thresh: int, first_id: int
) -> List[Tuple[int, int]]:
    """
    Paint stuff onto the free pixels of `panoptic_seg` and return the labels and areas of its segments.
    """
    on_cpu = panoptic_seg.device.type == "cpu"
    num_labels = int(semantic.max()) + 1 if semantic.numel() else 1
    if on_cpu and num_labels <= 256:
        semantic = semantic.to(torch.uint8)  # an eighth of the bytes, and OpenCV takes it
    height, width = panoptic_seg.shape
    rows = max(1, _PIXELS_AT_ONCE // max(width, 1)) if on_cpu else max(height, 1)
    strips = list(zip(panoptic_seg.split(rows), semantic.split(rows)))

    areas = torch.zeros(num_labels, dtype=torch.int64, device=panoptic_seg.device)
    for part, labels in strips:
        # Neighbours mostly have one label, so there are far fewer runs to count than pixels.
        runs = torch.unique_consecutive((labels * (part == 0)).flatten(), return_counts=True)
        areas.index_add_(0, runs[0].long(), runs[1])

    least = max(stuff_area_thresh, 1)
    found = [(label, area) for label, area in enumerate(areas.tolist()) if label and area >= least]
    id_of_label = torch.zeros(max(num_labels, 256), dtype=torch.int32)
    for segment_id, (label, _) in enumerate(found, start=first_id):
        id_of_label[label] = segment_id
    on_device = id_of_label.to(panoptic_seg.device)
    for part, labels in strips:
        if labels.dtype == torch.uint8:
            ids = cv2.LUT(labels.numpy(), id_of_label.numpy())
            np.copyto(part.numpy(), ids, where=(part == 0).numpy())
        else:
            part += on_device[labels] * (part == 0)
    return found
