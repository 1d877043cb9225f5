"""
The painting order that the ground truth gives: the upper bound for any ranking rule.
"""

from typing import Dict, List

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..modeling.ranking import order_from_margins

__all__ = ["match_to_segments", "oracle_order"]


def match_to_segments(
    masks: np.ndarray, classes: np.ndarray, gt_ids: np.ndarray, segments_info: List[Dict]
) -> np.ndarray:
    """
    Assign predictions to ground-truth segments of their class, one to one, such that the sum of
    the IoUs is greatest. (One to one matters: the whole silhouette of a person in the background
    may overlap the person in front of it more than the little that is visible of itself.)

    Args:
        masks: (N, H, W) bool.
        classes: (N,) contiguous thing classes.
        gt_ids: (H, W) integer, ground-truth segment ids.
        segments_info: the ground truth's segments, "category_id" contiguous.

    Returns:
        (N,) int64: the id of the matched segment, -1 for a prediction that matches none.
    """
    matched = np.full(len(masks), -1, dtype=np.int64)
    for cls in np.unique(classes):
        predictions = np.flatnonzero(classes == cls)
        ids = [
            s["id"]
            for s in segments_info
            if s["isthing"] and s["category_id"] == cls and not s.get("iscrowd", 0)
        ]
        iou = np.zeros((len(predictions), len(ids)))
        for column, segment_id in enumerate(ids):
            segment = gt_ids == segment_id
            inside = masks[predictions][:, segment].sum(axis=1)
            union = masks[predictions].sum(axis=(1, 2)) + segment.sum() - inside
            iou[:, column] = inside / np.maximum(union, 1)
        for row, column in zip(*linear_sum_assignment(iou, maximize=True)):
            if iou[row, column] > 0:
                matched[predictions[row]] = ids[column]
    return matched


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
        gt_ids, segments_info: see :func:`match_to_segments`.

    Returns:
        (N,) int64: a permutation, first painted first.
    """
    m = masks.cpu().numpy()
    matched = match_to_segments(m, classes.cpu().numpy(), gt_ids, segments_info)
    owned = np.stack([gt_ids == i for i in matched]) if len(m) else m
    owned = torch.from_numpy((owned & m).reshape(len(m), gt_ids.size)).float()
    # evidence[a, b]: pixels of the overlap of a and b that a's segment owns
    evidence = owned @ masks.flatten(1).cpu().float().t()
    return order_from_margins((evidence - evidence.t()).to(scores.device), scores)
