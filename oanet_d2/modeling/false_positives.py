from dataclasses import replace

import torch
from torch.nn import functional as F

from ..painting.masks import mask_extents, relative_boxes
from .grid import GridInstances

__all__ = ["with_false_positives"]

# Scores of detections that matter in painting.
_LEAST_SCORE = 0.5
# The least score of a false positive, as a share of the score of its original.
_LEAST_SHARE_OF_SCORE = 0.6
# Standard deviations of the move, in box sizes, and of the logarithm of the stretch.
_OF_INSTANCES = 0.05, 0.1
_OF_FALSE_POSITIVES = 0.12, 0.2
# Share of the false positives that get a random class.
_CLASS_MISTAKEN = 0.3


def with_false_positives(
    instances: GridInstances, num_classes: int, probability: float
) -> GridInstances:
    """
    Make ground truth look more like detections. Instances get random scores, and their masks are moved
    and stretched a little: neighbours that only touch in the ground truth overlap then, as detections
    do. Some get a false positive beside them, a copy that is moved further, with a lower score,
    sometimes of another class. So a ranking that never sees a detector learns what a score is worth.

    Args:
        instances: N ground-truth instances.
        num_classes: number of thing classes.
        probability: that an instance gets a false positive, in [0, 1]. 0 leaves everything as it is.

    Returns:
        the N instances in their order, then the false positives. A copy that lies outside the image
        is left out. Random numbers are torch's.
    """
    if probability == 0 or len(instances.classes) == 0:
        return instances
    num, device = len(instances.classes), instances.masks.device
    scores = _LEAST_SCORE + (1 - _LEAST_SCORE) * torch.rand(num, device=device)
    chosen = torch.rand(num, device=device) < probability
    whole, moved = instances.masks, _moved(instances.masks, *_OF_INSTANCES)
    lost = ~moved.flatten(1).any(1)  # a tiny mask may cover no cell's centre now
    moved[lost] = whole[lost]
    instances = replace(instances, scores=scores, masks=moved, boxes=_extents(moved))
    if not chosen.any():
        return instances

    copies = _moved(whole[chosen], *_OF_FALSE_POSITIVES)
    inside = copies.flatten(1).any(1)
    copies = copies[inside]
    factor = torch.rand(len(copies), device=device)
    factor = _LEAST_SHARE_OF_SCORE + (1 - _LEAST_SHARE_OF_SCORE) * factor
    classes = instances.classes[chosen][inside]
    mistaken = torch.rand(len(copies), device=device) < _CLASS_MISTAKEN
    classes = torch.where(mistaken, torch.randint_like(classes, num_classes), classes)
    return GridInstances(
        torch.cat([instances.masks, copies]),
        torch.cat([instances.classes, classes]),
        torch.cat([scores, scores[chosen][inside] * factor]),
        torch.cat([instances.boxes, _extents(copies)]),
    )


def _extents(masks: torch.Tensor) -> torch.Tensor:
    return relative_boxes(mask_extents(masks), masks.shape[1:])


def _moved(masks: torch.Tensor, move: float, stretch_by: float) -> torch.Tensor:
    """(N, h, w) masks, each moved, and stretched about the centre of its box."""
    boxes = _extents(masks)
    center = boxes[:, :2] + boxes[:, 2:] - 1  # affine_grid's coordinates: -1 to 1
    size = 2 * (boxes[:, 2:] - boxes[:, :2])
    moved_center = center + move * size * torch.randn_like(size)
    stretch = torch.exp(stretch_by * torch.randn_like(size))
    # Where a cell of the new mask comes from: x_old = (x_new - moved_center) / stretch + center.
    theta = torch.cat(
        [torch.diag_embed(1 / stretch), (center - moved_center / stretch)[..., None]], dim=2
    )
    grid = F.affine_grid(theta, [len(masks), 1, *masks.shape[1:]], align_corners=False)
    sampled = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return sampled[:, 0] > 0.5
