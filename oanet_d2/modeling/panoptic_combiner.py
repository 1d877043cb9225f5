"""
Fusion: paint instances in a given order, then fill what is left with stuff.
"""

from typing import Dict, List, Tuple

import torch

__all__ = ["combine", "semantic_labels"]


def semantic_labels(sem_seg: torch.Tensor, keep_things_free: bool) -> torch.Tensor:
    """
    Per-pixel label for the part of the image that no instance takes.

    Args:
        sem_seg: (1 + S, H, W) float scores; channel 0 is "any thing", channels 1..S are stuff
            (Detectron2's convention for panoptic semantic segmentation).
        keep_things_free: if True, a pixel whose best channel is 0 gets label 0 and stays free;
            if False, every pixel takes its best stuff class.

    Returns:
        (H, W) int64 in [0, S]; 0 means no stuff.
    """
    if keep_things_free:
        return sem_seg.argmax(dim=0)
    return sem_seg[1:].argmax(dim=0) + 1


def combine(
    masks: torch.Tensor,
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
    Paint instances in `order`, each onto the pixels still free, then the stuff classes onto what
    is left. With `order` = detection score, highest first, the result equals
    :func:`detectron2.modeling.meta_arch.panoptic_fpn.combine_semantic_and_instance_outputs` for
    every overlap threshold below 1 and stuff area limit above 0. (Outside of that Detectron2 lists
    segments of which no pixel is visible, which panopticapi refuses; here they are left out.)

    Args:
        masks: (N, H, W) bool.
        scores: (N,) float, detection scores.
        classes: (N,) int64, contiguous thing ids.
        order: (N,) int64, indices of the instances, first painted first.
        semantic: (H, W) int64 as given by :func:`semantic_labels`; 0 is left free.
        overlap_threshold: an instance is dropped if more than this share of its mask is taken.
        stuff_area_thresh: a stuff class with fewer free pixels than this is dropped.
        instances_score_thresh: instances with a lower score are not painted.

    Returns:
        panoptic_seg: (H, W) int32 on semantic's device; 0 is void, segments count from 1.
        segments_info: a dict for every segment, in order of its id: "id", "isthing",
            "category_id" (contiguous), and for things "score" and "instance_id" (index into
            `masks`), for stuff "area" (pixels).
    """
    panoptic_seg = torch.zeros_like(semantic, dtype=torch.int32)
    masks = masks.to(device=semantic.device, dtype=torch.bool)
    areas = masks.flatten(1).sum(1).tolist()
    scores, classes = scores.tolist(), classes.tolist()
    segments_info: List[Dict] = []

    for index in order.tolist():
        if scores[index] < instances_score_thresh or areas[index] == 0:
            continue
        visible = masks[index] & (panoptic_seg == 0)
        visible_area = int(visible.sum())
        taken_share = (areas[index] - visible_area) / areas[index]
        if taken_share > overlap_threshold or visible_area == 0:
            continue
        segment_id = len(segments_info) + 1
        panoptic_seg[visible] = segment_id
        segments_info.append(
            {
                "id": segment_id,
                "isthing": True,
                "score": scores[index],
                "category_id": classes[index],
                "instance_id": index,
            }
        )

    free_labels = semantic * (panoptic_seg == 0)
    labels, label_areas = torch.unique(free_labels, return_counts=True)
    for label, area in zip(labels.tolist(), label_areas.tolist()):
        if label == 0 or area < stuff_area_thresh:
            continue
        segment_id = len(segments_info) + 1
        panoptic_seg[free_labels == label] = segment_id
        segments_info.append(
            {"id": segment_id, "isthing": False, "category_id": label, "area": area}
        )
    return panoptic_seg, segments_info
