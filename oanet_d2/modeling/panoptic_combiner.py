"""
Fusion: paint instances in a given order, then fill what is left with stuff.
"""

import itertools
from typing import Dict, Iterator, List, Tuple, Union

import cv2
import numpy as np
import torch

from .instance_masks import BoxedMasks

__all__ = ["combine"]

PIXELS_AT_ONCE = 2**17


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
    Paint instances in `order`, each onto the pixels still free, then the stuff classes onto what
    is left. With `order` = detection score, highest first, the result equals
    :func:`detectron2.modeling.meta_arch.panoptic_fpn.combine_semantic_and_instance_outputs` for
    every overlap threshold below 1 and stuff area limit above 0. (Outside of that Detectron2 lists
    segments of which no pixel is visible, which panopticapi refuses; here they are left out.)

    An instance costs what its box does, not what the image does. The host waits for a GPU a few
    times in all, however many instances there are.

    Args:
        masks: N masks in their boxes, or an (N, H, W) bool tensor.
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
    scores_list, classes_list = scores.tolist(), classes.tolist()
    painted = [i for i in order.tolist() if scores_list[i] >= instances_score_thresh]
    kept = _paint_instances(panoptic_seg, masks, painted, overlap_threshold)
    segments_info: List[Dict] = []
    for index in itertools.compress(painted, kept):
        segments_info.append(
            {
                "id": len(segments_info) + 1,
                "isthing": True,
                "score": scores_list[index],
                "category_id": classes_list[index],
                "instance_id": index,
            }
        )
    num_labels = int(semantic.max()) + 1 if semantic.numel() else 1
    if panoptic_seg.device.type == "cpu" and num_labels <= 256:
        semantic = semantic.to(torch.uint8)  # an eighth of the bytes, and OpenCV takes it
    areas = _free_areas(panoptic_seg, semantic, num_labels)
    id_of_label = torch.zeros(num_labels, dtype=torch.int32)
    for label, area in enumerate(areas):
        if label == 0 or area < max(stuff_area_thresh, 1):
            continue
        id_of_label[label] = len(segments_info) + 1
        segments_info.append(
            {"id": len(segments_info) + 1, "isthing": False, "category_id": label, "area": area}
        )
    _fill(panoptic_seg, semantic, id_of_label)
    return panoptic_seg, segments_info


def _paint_instances(
    panoptic_seg: torch.Tensor, masks, painted: List[int], overlap_threshold: float
) -> List[bool]:
    """
    Paint instances into `panoptic_seg`, which is changed in place.

    Returns:
        which of `painted` were not dropped.
    """
    paint = _paint_on_cpu if panoptic_seg.device.type == "cpu" else _paint_on_device
    boxed = (masks[i] if isinstance(masks, BoxedMasks) else (masks[i], ...) for i in painted)
    return paint(panoptic_seg, boxed, overlap_threshold)


def _paint_on_cpu(panoptic_seg: torch.Tensor, boxed, overlap_threshold: float) -> List[bool]:
    # NumPy: of calls as small as these most of the time is PyTorch's overhead.
    panoptic, count, kept = panoptic_seg.numpy(), 0, []
    for mask, region in boxed:
        mask, free = mask.to("cpu", torch.bool).numpy(), panoptic[region]
        visible = mask & (free == 0)
        area, visible_area = np.count_nonzero(mask), np.count_nonzero(visible)
        keep = visible_area > 0 and (area - visible_area) / area <= overlap_threshold
        if keep:
            count += 1
            np.copyto(free, count, where=visible)
        kept.append(keep)
    return kept


def _paint_on_device(panoptic_seg: torch.Tensor, boxed, overlap_threshold: float) -> List[bool]:
    # Whether an instance is kept is decided on the device: the host waits for it once, at the end.
    count = torch.zeros((), dtype=torch.int32, device=panoptic_seg.device)
    kept = []
    for mask, region in boxed:
        free = panoptic_seg[region]
        visible = mask.to(free.device, torch.bool) & (free == 0)
        area, visible_area = mask.count_nonzero(), visible.count_nonzero()
        taken_share = (area - visible_area).double() / area
        keep = (visible_area > 0) & (taken_share <= overlap_threshold)
        count = count + keep
        # Where it is dropped, what is free gets the 0 that it has.
        free.masked_fill_(visible, count * keep)
        kept.append(keep)
    return torch.stack(kept).tolist() if kept else []


def _strips(
    panoptic_seg: torch.Tensor, semantic: torch.Tensor
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """
    Both maps in strips of so many rows that a CPU's cache holds them.
    """
    on_cpu = panoptic_seg.device.type == "cpu"
    rows = max(1, PIXELS_AT_ONCE // panoptic_seg.shape[1]) if on_cpu else len(panoptic_seg)
    return zip(panoptic_seg.split(rows), semantic.split(rows))


def _free_areas(panoptic_seg: torch.Tensor, semantic: torch.Tensor, num_labels: int) -> List[int]:
    """
    Returns:
        the number of free pixels of every label from 0 on; what is not free counts as label 0.
    """
    areas = torch.zeros(num_labels, dtype=torch.int64, device=panoptic_seg.device)
    for part, labels in _strips(panoptic_seg, semantic):
        # Counted by runs: neighbours mostly have one label, and counting pixel after pixel into
        # the same place takes longer.
        labels, counts = torch.unique_consecutive((labels * (part == 0)).flatten(), return_counts=True)
        areas.index_add_(0, labels.long(), counts)
    return areas.tolist()


def _fill(panoptic_seg: torch.Tensor, semantic: torch.Tensor, id_of_label: torch.Tensor) -> None:
    """
    Give the free pixels of `panoptic_seg`, which is changed in place, the ids of their labels.
    """
    for_opencv = np.zeros(256, np.int32)
    for_opencv[: len(id_of_label)] = id_of_label[:256]
    id_of_label = id_of_label.to(panoptic_seg.device)
    for part, labels in _strips(panoptic_seg, semantic):
        free = part == 0
        if labels.dtype == torch.uint8:
            ids = cv2.LUT(labels.numpy(), for_opencv)
            np.copyto(part.numpy(), ids, where=free.numpy())
        else:
            part += id_of_label.take(labels) * free
