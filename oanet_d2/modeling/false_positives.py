from dataclasses import replace

import torch
from torch.nn import functional as F

from .candidates import Candidates, relative_boxes
from .instance_masks import mask_extents

__all__ = ["with_false_positives"]

# Detections that matter when instances are painted have about these scores.
_LEAST_SCORE = 0.5
# A false positive scores this share of what the instance does that it is made from, at least.
_LEAST_SHARE_OF_SCORE = 0.6
# Standard deviations: of the move, in box sizes, and of the logarithm of the stretch.
_MOVE, _STRETCH = 0.12, 0.2
# How many false positives are of a random class.
_CLASS_MISTAKEN = 0.3


def with_false_positives(
    candidates: Candidates, num_classes: int, probability: float
) -> Candidates:
    """
    Make ground truth look more like detections: instances get random scores, and some a false
    positive, a moved and stretched copy with a lower score, at times of another class. So a
    ranking that never sees a detector learns what a score is worth.

    Args:
        candidates: N ground-truth instances.
        num_classes: number of thing classes.
        probability: that an instance gets a false positive, in [0, 1]. 0 leaves everything,
            scores too, as it is.

    Returns:
        the N instances in their order, then the false positives. One that lies outside the grid
        is left out. Random numbers are torch's.
    """
    num, device = len(candidates.classes), candidates.masks.device
    if probability == 0:
        return candidates
    scores = _LEAST_SCORE + (1 - _LEAST_SCORE) * torch.rand(num, device=device)
    chosen = torch.rand(num, device=device) < probability
    if not chosen.any():
        return replace(candidates, scores=scores)

    masks = _moved(candidates.masks[chosen], candidates.boxes[chosen])
    inside = masks.flatten(1).any(1)
    masks = masks[inside]
    share = torch.rand(len(masks), device=device)
    share = _LEAST_SHARE_OF_SCORE + (1 - _LEAST_SHARE_OF_SCORE) * share
    classes = candidates.classes[chosen][inside]
    mistaken = torch.rand(len(masks), device=device) < _CLASS_MISTAKEN
    classes = torch.where(mistaken, torch.randint_like(classes, num_classes), classes)
    height, width = masks.shape[1:]
    return Candidates(
        torch.cat([candidates.masks, masks]),
        torch.cat([candidates.classes, classes]),
        torch.cat([scores, scores[chosen][inside] * share]),
        torch.cat([candidates.boxes, relative_boxes(mask_extents(masks), (height, width))]),
    )


def _moved(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """
    (N, h, w) masks, each moved and stretched about the centre of its box (shares of the grid).
    """
    center = boxes[:, :2] + boxes[:, 2:] - 1  # affine_grid's coordinates: -1 to 1
    size = 2 * (boxes[:, 2:] - boxes[:, :2])
    moved_center = center + _MOVE * size * torch.randn_like(size)
    stretch = torch.exp(_STRETCH * torch.randn_like(size))
    # Where a cell of the new mask comes from: x_old = (x_new - moved_center) / stretch + center.
    theta = torch.cat(
        [torch.diag_embed(1 / stretch), (center - moved_center / stretch)[..., None]], dim=2
    )
    grid = F.affine_grid(theta, [len(masks), 1, *masks.shape[1:]], align_corners=False)
    sampled = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return sampled[:, 0] > 0.5
