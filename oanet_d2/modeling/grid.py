"""
Instances and their ground truth on the grid of the ranking head. A cell is `stride` x `stride` pixels
of the network's input and is sampled at its centre. The grid covers one image without the padding of
its batch, so that nothing here depends on the other images.
"""

from dataclasses import dataclass
from typing import Dict, List, Set, Tuple

import torch
from torch.nn import functional as F

from detectron2.structures import BitMasks, Instances

from ..painting.masks import grid_size, paste_on_grid, relative_boxes

__all__ = ["GridInstances", "GridTruth", "Maps", "detections_on_grid"]
__all__ += ["ground_truth_on_grid", "map_on_grid", "truth_on_grid"]

# What the image itself shows, on the grid, as far as it is known: "semantic", (C, h, w) float, logits
# of the semantic branch for the thing classes, and "features", (channels, h, w) float.
Maps = Dict[str, torch.Tensor]


@dataclass
class GridInstances:
    """The N instances of one image that compete for its cells."""

    masks: torch.Tensor  # (N, h, w) bool
    classes: torch.Tensor  # (N,) int64, thing classes
    scores: torch.Tensor  # (N,) float in [0, 1], detection scores; 1 for ground truth
    boxes: torch.Tensor  # (N, 4) float, XYXY as shares of the image's width and height


@dataclass
class GridTruth:
    """Who is visible in one image, by its panoptic ground truth."""

    categories: torch.Tensor  # (h, w) int64: things in [0, C), stuff from C on, void -1
    ids: torch.Tensor  # (h, w) int64, segment ids
    segments_info: List[Dict]


def detections_on_grid(instances: Instances, stride: int, score_threshold: float) -> GridInstances:
    """
    Args:
        instances: what ROI heads return in inference, "pred_boxes" in pixels of the network's input
            and "pred_masks" (N, 1, M, M) float.
        stride: pixels per cell.
        score_threshold: an instance with a lower score will not be painted and does not compete, so
            its mask is empty.

    Returns:
        the instances, with binary masks. (Probabilities also carry pixels outside the instance.
        Paper, sec. 3.3.) A mask too small to hold the centre of a cell owns the one cell in which
        its most probable pixel lies, so that it can be compared.
    """
    size = grid_size(instances.image_size, stride)
    boxes, scores = instances.pred_boxes.tensor.float(), instances.scores.float()
    painted = (scores >= score_threshold).nonzero()[:, 0]
    roi_masks = instances.pred_masks[painted, 0].float()
    cells = boxes[painted] / stride
    of_painted = paste_on_grid(roi_masks, cells, size) >= 0.5

    best_probability, best_pixel = roi_masks.flatten(1).max(dim=1)
    side = roi_masks.shape[-1]
    offset = torch.stack([best_pixel % side, best_pixel // side], dim=1) + 0.5
    best_cell = (cells[:, :2] + offset / side * (cells[:, 2:] - cells[:, :2])).long()
    nowhere = of_painted.flatten(1).sum(1) == 0
    lost = (nowhere & (best_probability >= 0.5)).nonzero()[:, 0]
    column, row = (best_cell[lost, i].clamp(0, size[1 - i] - 1) for i in (0, 1))
    of_painted[lost, row, column] = True
    masks = of_painted.new_zeros(scores.shape[0], *size)
    masks[painted] = of_painted
    boxes = relative_boxes(boxes, instances.image_size)
    return GridInstances(masks, instances.pred_classes, scores, boxes)


def ground_truth_on_grid(instances: Instances, stride: int) -> GridInstances:
    """
    Args:
        instances: ground truth with "gt_boxes", "gt_classes", "gt_masks" (BitMasks or PolygonMasks).
        stride: pixels per cell.

    Returns:
        the instances. One that holds the centre of no cell owns the cell in its middle, so that it
        can be compared.
    """
    masks, image_size = instances.gt_masks, instances.image_size
    size = grid_size(image_size, stride)
    if isinstance(masks, BitMasks):
        on_grid = _sample(masks.tensor, stride)
    else:
        scaled = [[polygon / stride for polygon in instance] for instance in masks.polygons]
        on_grid = BitMasks.from_polygon_masks(scaled, *size).tensor
    for i in (~on_grid.flatten(1).any(1)).nonzero()[:, 0].tolist():
        mask = masks[i]
        if not isinstance(mask, BitMasks):
            mask = BitMasks.from_polygon_masks(mask, *image_size)
        pixels = mask.tensor[0].nonzero()
        if len(pixels) > 0:
            on_grid[i][_middle_cell(pixels, stride, size)] = True
    classes = instances.gt_classes
    scores = torch.ones(len(instances), device=classes.device)
    boxes = relative_boxes(instances.gt_boxes.tensor, image_size)
    return GridInstances(on_grid.to(classes.device), classes, scores, boxes)


def truth_on_grid(training_input: Dict, stride: int, device: torch.device) -> GridTruth:
    """
    Args:
        training_input: has "panoptic_seg" and "panoptic_category".
        stride: pixels per cell.
    """
    ids, segments_info = training_input["panoptic_seg"]
    ids, categories = ids.to(device), training_input["panoptic_category"].to(device)
    of_cells, category_of_cells = _sample(ids, stride), _sample(categories, stride)
    # A segment too small to hold the centre of a cell is visible all the same: it gets the cell in
    # its middle, as its instance does.
    for i in sorted(_present(ids) - _present(of_cells) - {0}):
        pixels = (ids == i).nonzero()
        cell = _middle_cell(pixels, stride, of_cells.shape)
        of_cells[cell] = i
        category_of_cells[cell] = categories[tuple(pixels[0])]
    return GridTruth(category_of_cells, of_cells, segments_info)


def _present(ids: torch.Tensor) -> Set[int]:
    # Positions of segments are small, so they are counted: sorting an image takes far longer.
    return set(ids.flatten().bincount().nonzero()[:, 0].tolist())


def map_on_grid(
    feature_map: torch.Tensor, map_stride: int, stride: int, image_size: Tuple[int, int]
) -> torch.Tensor:
    """
    Args:
        feature_map: (D, h', w') float of a padded image.
        map_stride: its pixels per cell.
        stride: pixels per cell of the grid. One stride must be a multiple of the other.
        image_size: (H, W) of the image without its padding.

    Returns:
        (D, h, w) float.
    """
    # First the padding goes, or it would enter the means of the last cells.
    rows, columns = grid_size(image_size, map_stride)
    feature_map = feature_map[:, :rows, :columns]
    if stride > map_stride:
        feature_map = F.avg_pool2d(feature_map, stride // map_stride, ceil_mode=True)
    elif stride < map_stride:
        feature_map = F.interpolate(feature_map[None], scale_factor=map_stride // stride)[0]
    rows, columns = grid_size(image_size, stride)
    return feature_map[:, :rows, :columns]


def _sample(labels: torch.Tensor, stride: int) -> torch.Tensor:
    """
    Labels (..., H, W) at the centres of the cells, or at the image's edge if a centre lies outside.
    """
    height, width = labels.shape[-2:]
    cells = (torch.arange(n, device=labels.device) for n in grid_size((height, width), stride))
    rows, columns = (i * stride + stride // 2 for i in cells)
    return labels[..., rows.clamp(max=height - 1)[:, None], columns.clamp(max=width - 1)]


def _middle_cell(pixels: torch.Tensor, stride: int, size: Tuple[int, ...]) -> Tuple[int, int]:
    """The cell of the median of pixels (K, 2), rows and columns."""
    row, column = (pixels.median(dim=0).values / stride).long().tolist()
    return min(row, size[0] - 1), min(column, size[1] - 1)
