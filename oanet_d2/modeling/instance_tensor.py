"""
Instances onto the grid of the spatial ranking module: one cell is `stride` x `stride` pixels of
the (padded) input image and is sampled at its centre.
"""

from typing import Tuple, Union

import numpy as np
import torch
from torch.nn import functional as F

from detectron2.layers import paste_masks_in_image
from detectron2.structures import BitMasks, PolygonMasks, polygons_to_bitmask

__all__ = ["build_instance_tensor", "gt_masks_to_grid", "grid_size", "roi_masks_to_grid"]


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
    grid = paste_masks_in_image(roi_masks, boxes / stride, size, threshold)

    best_probability, best_pixel = roi_masks.flatten(1).max(dim=1)
    side = roi_masks.shape[-1]
    box_sizes = boxes[:, 2:] - boxes[:, :2]
    offset = torch.stack([best_pixel % side, best_pixel // side], dim=1).to(boxes.dtype)
    cell = (boxes[:, :2] + (offset + 0.5) / side * box_sizes) / stride
    column = cell[:, 0].long().clamp(0, size[1] - 1)
    row = cell[:, 1].long().clamp(0, size[0] - 1)
    lost = ~grid.flatten(1).any(dim=1) & (best_probability >= threshold)
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
    sampled = gt_masks.tensor[:, stride // 2 :: stride, stride // 2 :: stride]
    sampled = sampled[:, : size[0], : size[1]]
    return F.pad(sampled, (0, size[1] - sampled.shape[2], 0, size[0] - sampled.shape[1]))


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
