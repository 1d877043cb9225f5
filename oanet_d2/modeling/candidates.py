"""
What is ranked: instances, and their ground truth, on the grid of the spatial ranking module. One
cell is `stride` x `stride` pixels of the (padded) input image and is sampled at its centre.
"""

from dataclasses import dataclass
from typing import Dict, List, Tuple, Union

import numpy as np
import torch
from torch.nn import functional as F

from detectron2.layers import paste_masks_in_image
from detectron2.structures import BitMasks, Instances, PolygonMasks, polygons_to_bitmask

from .instance_masks import BoxedMasks, as_ones

__all__ = [
    "Candidates",
    "RankingTarget",
    "build_instance_tensor",
    "grid_size",
    "gt_candidates",
    "gt_masks_to_grid",
    "labels_to_grid",
    "ranking_target",
    "relative_boxes",
    "roi_masks_to_grid",
]


@dataclass
class Candidates:
    """
    The N instances of one image that compete for its pixels.

    Attributes:
        masks: (N, h, w) bool, on the grid.
        classes: (N,) int64, thing classes.
        scores: (N,) float in [0, 1], detection scores; 1 for ground truth.
        boxes: (N, 4) float, XYXY as shares of the image's width and height.
    """

    masks: torch.Tensor
    classes: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor


@dataclass
class RankingTarget:
    """
    Who is visible in one image, by its panoptic ground truth.

    Attributes:
        categories: (h, w) int64, panoptic category of every cell: things in [0, C), stuff from C
            on, or the ignore value.
        ids: (h, w) int64, segment id of every cell.
        segments_info: list[dict], the segments.
    """

    categories: torch.Tensor
    ids: torch.Tensor
    segments_info: List[Dict]


def grid_size(image_size: Tuple[int, int], stride: int) -> Tuple[int, int]:
    """
    Returns:
        (h, w) of the grid that covers an image of `image_size` = (H, W) pixels.
    """
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def roi_masks_to_grid(
    roi_masks: torch.Tensor,
    boxes: torch.Tensor,
    stride: int,
    size: Tuple[int, int],
    threshold: float,
) -> torch.Tensor:
    """
    Paste a mask head's output onto the grid, binarized. Binarizing matters (paper, sec. 3.3): the
    raw probabilities also carry the pixels that do not belong to the instance.

    Args:
        roi_masks: (N, M, M) float probabilities in [0, 1], relative to the boxes.
        boxes: (N, 4) float, XYXY in pixels of the input image.
        stride: pixels per cell.
        size: (h, w) of the grid.
        threshold: a cell belongs to the instance where the probability is at least this.

    Returns:
        (N, h, w) bool. An instance too small to hold the centre of any cell owns the one cell in
        which its most probable pixel lies, so that it can still be compared. A mask that is
        nowhere over the threshold stays empty.
    """
    if len(roi_masks) == 0:
        return torch.zeros((0, *size), dtype=torch.bool, device=roi_masks.device)
    if roi_masks.device.type == "cpu":  # the same, and a fifth of the time
        grid = BoxedMasks(roi_masks, boxes / stride, size, threshold).full()
    else:
        grid = paste_masks_in_image(roi_masks, boxes / stride, size, threshold)

    best_probability, best_pixel = roi_masks.flatten(1).max(dim=1)
    side = roi_masks.shape[-1]
    box_sizes = boxes[:, 2:] - boxes[:, :2]
    offset = torch.stack([best_pixel % side, best_pixel // side], dim=1).to(boxes.dtype)
    cell = (boxes[:, :2] + (offset + 0.5) / side * box_sizes) / stride
    column = cell[:, 0].long().clamp(0, size[1] - 1)
    row = cell[:, 1].long().clamp(0, size[0] - 1)
    nowhere = as_ones(grid).flatten(1).amax(dim=1) == 0
    lost = nowhere & (best_probability >= threshold)
    grid[torch.arange(len(grid), device=grid.device), row, column] |= lost
    return grid


def gt_masks_to_grid(
    gt_masks: Union[BitMasks, PolygonMasks], stride: int, size: Tuple[int, int]
) -> torch.Tensor:
    """
    Sample ground-truth masks at the centres of the grid's cells.

    Args:
        gt_masks: N masks in pixels of the input image, in either of Detectron2's formats.
        stride: pixels per cell.
        size: (h, w) of the grid; it may reach beyond the masks (padding), which is empty there.

    Returns:
        (N, h, w) bool, on the masks' device.
    """
    if isinstance(gt_masks, PolygonMasks):
        scaled = [[polygon / stride for polygon in instance] for instance in gt_masks.polygons]
        masks = [polygons_to_bitmask(instance, *size) for instance in scaled]
        stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=bool)
        return torch.from_numpy(stacked.astype(bool))
    return labels_to_grid(gt_masks.tensor, stride, size, False)


def labels_to_grid(
    labels: torch.Tensor, stride: int, size: Tuple[int, int], outside: int
) -> torch.Tensor:
    """
    Sample label maps at the centres of the grid's cells.

    Args:
        labels: (..., H, W), in pixels of the input image.
        stride: pixels per cell.
        size: (h, w) of the grid.
        outside: the label of cells beyond the maps.

    Returns:
        (..., h, w) of the same dtype.
    """
    sampled = labels[..., stride // 2 :: stride, stride // 2 :: stride]
    sampled = sampled[..., : size[0], : size[1]]
    padding = (0, size[1] - sampled.shape[-1], 0, size[0] - sampled.shape[-2])
    return F.pad(sampled, padding, value=outside)


def build_instance_tensor(
    masks: torch.Tensor, classes: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """
    The paper's instance tensor: one channel per thing class, 1 where an instance of that class
    has a cell and 0 elsewhere. Several channels at 1 in one cell = instances of different classes
    compete there.

    Args:
        masks: (N, h, w) bool.
        classes: (N,) int64 in [0, num_classes).
        num_classes: number of thing classes, C.

    Returns:
        (C, h, w) float32 of zeros and ones.
    """
    tensor = torch.zeros((num_classes, *masks.shape[1:]), device=masks.device)
    index = classes[:, None, None].expand(masks.shape)
    return tensor.scatter_reduce(0, index, masks.to(tensor.dtype), reduce="amax")


def gt_candidates(instances: Instances, stride: int, size: Tuple[int, int]) -> Candidates:
    """
    Candidates from ground-truth instances ("gt_boxes", "gt_classes", "gt_masks"), for a grid of
    `size` cells.
    """
    device = instances.gt_classes.device
    return Candidates(
        gt_masks_to_grid(instances.gt_masks, stride, size).to(device),
        instances.gt_classes,
        torch.ones(len(instances), device=device),
        relative_boxes(instances.gt_boxes.tensor, instances.image_size),
    )


def relative_boxes(boxes: torch.Tensor, image_size: Tuple[int, int]) -> torch.Tensor:
    """
    Boxes (N, 4) in pixels as shares of the width and height of an image of `image_size` = (H, W).
    """
    height, width = image_size
    return boxes / torch.tensor([width, height, width, height], device=boxes.device)


def ranking_target(input: Dict, head, size: Tuple[int, int], device) -> RankingTarget:
    """
    Args:
        input: a training input with "panoptic_seg" and "panoptic_category".
        head: the ranking head, for its `stride` and `ignore_value`.
        size: (h, w) of the grid.
    """
    ids, segments_info = input["panoptic_seg"]
    categories = input["panoptic_category"].to(device)
    return RankingTarget(
        labels_to_grid(categories, head.stride, size, head.ignore_value),
        labels_to_grid(ids.to(device), head.stride, size, 0),
        segments_info,
    )
