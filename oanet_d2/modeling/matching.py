"""
Instances against the panoptic ground truth: which segment is whose, and who is visible where.
"""

from typing import Dict, List

import torch
from scipy.optimize import linear_sum_assignment

__all__ = ["margins_of_matched", "match_to_segments", "visible_margins"]

# Pixels are counted by matrix products; autocast would round those of smaller types.
_COUNT = torch.float64


def match_to_segments(
    masks: torch.Tensor, classes: torch.Tensor, ids: torch.Tensor, segments_info: List[Dict]
) -> torch.Tensor:
    """
    Assign instances to ground-truth segments of their class, one to one, such that the sum of
    the IoUs is greatest. (One to one matters: the whole silhouette of a person in the background
    may overlap the person in front of it more than the little that is visible of itself.)

    Args:
        masks: (N, H, W) bool.
        classes: (N,) int64, contiguous thing classes.
        ids: (H, W) integer, ground-truth segment ids.
        segments_info: the ground truth's segments, "category_id" contiguous.

    Returns:
        (N,) int64 on masks' device: the id of the matched segment, -1 for an instance that
        matches none.
    """
    things = [s for s in segments_info if s["isthing"] and not s.get("iscrowd", 0)]
    segment_ids = torch.tensor([s["id"] for s in things], dtype=torch.int64, device=masks.device)
    segment_classes = torch.tensor([s["category_id"] for s in things], device=masks.device)
    m = masks.flatten(1).to(_COUNT)
    segments = (ids.to(masks.device).flatten() == segment_ids[:, None]).to(_COUNT)
    inside = m @ segments.t()
    iou = inside / (m.sum(1)[:, None] + segments.sum(1) - inside).clamp(min=1)
    iou = iou * (classes[:, None] == segment_classes)

    rows, columns = map(torch.from_numpy, linear_sum_assignment(iou.cpu().numpy(), maximize=True))
    matched = torch.full((len(masks),), -1, dtype=torch.int64, device=masks.device)
    found = (iou[rows, columns] > 0).cpu()
    matched[rows[found]] = segment_ids[columns[found]]
    return matched


def visible_margins(
    masks: torch.Tensor, classes: torch.Tensor, ids: torch.Tensor, segments_info: List[Dict]
) -> torch.Tensor:
    """
    Who is visible where two instances meet, by the ground truth. An instance that matches no
    segment is visible nowhere.

    Args: see :func:`match_to_segments`.

    Returns:
        (N, N) antisymmetric float: pixels of the overlap of a and b that show a, minus those that
        show b.
    """
    matched = match_to_segments(masks, classes, ids, segments_info)
    return margins_of_matched(masks, matched, ids)


def margins_of_matched(
    masks: torch.Tensor, matched: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """
    :func:`visible_margins` of instances whose segments are known.

    Args:
        masks: (N, H, W) bool.
        matched: (N,) int64, see :func:`match_to_segments`.
        ids: (H, W) integer, ground-truth segment ids.
    """
    m = masks.flatten(1).to(_COUNT)
    shows = (ids.to(masks.device).flatten() == matched[:, None]).to(_COUNT) * m
    evidence = (shows @ m.t()).float()
    return evidence - evidence.t()
