"""
Fusion: paint instances in a given order, then fill the rest with stuff.
"""

from bisect import bisect_right
from typing import Dict, List, Tuple, Union

import torch

from .arrays import MaskOf, fill, fuse, paint, stuff_to_paint
from .masks import BoxedMasks

__all__ = ["combine", "fill_on_device", "paint_on_device"]


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
    if not isinstance(masks, BoxedMasks):
        masks = BoxedMasks.from_masks(masks)
    panoptic_seg = torch.zeros_like(semantic, dtype=torch.int32)
    on_cpu = panoptic_seg.device.type == "cpu"
    # There in NumPy: PyTorch's overhead would be most of the time of such small operations.
    segments_info = fuse(
        panoptic_seg.numpy() if on_cpu else panoptic_seg,
        masks.array if on_cpu else masks.__getitem__,
        scores.tolist(),
        classes.tolist(),
        order.tolist(),
        semantic.numpy() if on_cpu else semantic,
        overlap_threshold=overlap_threshold,
        stuff_area_thresh=stuff_area_thresh,
        instances_score_thresh=instances_score_thresh,
        paint=paint if on_cpu else paint_on_device,
        fill=fill if on_cpu else fill_on_device,
    )
    return panoptic_seg, segments_info


def paint_on_device(
    panoptic_seg: torch.Tensor, mask_of: MaskOf, indices: List[int], overlap_threshold: float
) -> List[int]:
    """
    As :func:`oanet_d2.painting.arrays.paint`. The host waits for the device twice, however many
    instances there are.
    """
    if not indices:
        return []
    device = panoptic_seg.device
    boxed = [(mask.to(device), region) for mask, region in map(mask_of, indices)]
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
        # Free pixels of an instance that is dropped keep their 0. masked_fill_() would wait for the number.
        free.add_(visible * (count * keep))
        keeps.append(keep)
    return [index for index, keep in zip(indices, torch.stack(keeps).tolist()) if keep]


def fill_on_device(
    panoptic_seg: torch.Tensor, semantic: torch.Tensor, stuff_area_thresh: int, first_id: int
) -> List[Tuple[int, int]]:
    """As :func:`oanet_d2.painting.arrays.fill`."""
    device = panoptic_seg.device
    num_labels = int(semantic.max()) + 1
    areas = torch.zeros(num_labels, dtype=torch.int64, device=device)
    # Neighbours mostly have one label, so there are far fewer runs to count than pixels.
    free = panoptic_seg == 0
    runs = torch.unique_consecutive((semantic * free).flatten(), return_counts=True)
    areas.index_add_(0, *runs)
    found, id_of_label = stuff_to_paint(areas.tolist(), stuff_area_thresh, first_id)
    panoptic_seg += torch.from_numpy(id_of_label).to(device)[semantic] * free
    return found
