"""
The painting order that the ground truth gives: the upper bound for any ranking rule.
"""

from typing import Dict, List

import numpy as np
import torch

from ..modeling.matching import visible_margins
from ..modeling.ranking import order_from_margins

__all__ = ["oracle_order"]


def oracle_order(
    masks: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    gt_ids: np.ndarray,
    segments_info: List[Dict],
) -> torch.Tensor:
    """
    For every two overlapping predictions, the one whose matched ground-truth segment owns more of
    the overlap goes first. Where neither owns any, the detection score decides.

    Args:
        masks: (N, H, W) bool predictions at the resolution of the ground truth. Predictions that
            will not be painted should be empty, or they take the matches of those that will.
        scores: (N,) float.
        classes: (N,) int64.
        gt_ids, segments_info: see :func:`visible_margins`.

    Returns:
        (N,) int64: a permutation, first painted first.
    """
    ids = torch.from_numpy(gt_ids).to(masks.device)
    return order_from_margins(visible_margins(masks, classes, ids, segments_info), scores)
