"""
How often an order puts the right one of two overlapping instances on top.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Dict, List

import numpy as np
import torch

from ..modeling.matching import margins_of_matched, match_to_segments

__all__ = [
    "CLEAR_SHARE",
    "KINDS",
    "PairDecision",
    "accuracy_by_kind",
    "decisions_by_order",
    "pair_decisions",
]

# Kinds of pairs: both are in the ground truth and differ in class, or are of one class; or one is
# a detection that matches nothing (a duplicate, a false positive).
KINDS = ("different class", "same class", "one matches nothing")
# Pairs in which the ground truth decides by no more pixels than this share of the overlap are not
# counted: neither order is wrong.
CLEAR_SHARE = 0.3


@dataclass(frozen=True)
class PairDecision:
    """
    What an order made of one pair.

    Attributes:
        front, behind: thing classes, by the ground truth.
        kind: one of KINDS.
        pixels: by how many pixels the ground truth decides.
        right: whether the order puts the front one on top.
    """

    front: int
    behind: int
    kind: str
    pixels: int
    right: bool


def pair_decisions(
    masks: torch.Tensor,
    classes: torch.Tensor,
    order: torch.Tensor,
    ids: np.ndarray,
    segments_info: List[Dict],
) -> List[PairDecision]:
    """
    Compare an order with the ground truth, pair by pair.

    Args:
        masks: (N, H, W) bool; empty where an instance is not painted.
        classes: (N,) int64.
        order: (N,) int64, first painted first.
        ids: (H, W) ground-truth segment ids.
        segments_info: the ground truth's segments.
    """
    return decisions_by_order(masks, classes, {"": order}, ids, segments_info)[""]


def decisions_by_order(
    masks: torch.Tensor,
    classes: torch.Tensor,
    orders: Dict[str, torch.Tensor],
    ids: np.ndarray,
    segments_info: List[Dict],
) -> Dict[str, List[PairDecision]]:
    """
    :func:`pair_decisions` of several orders, for the cost of one.

    Returns:
        order -> what it made of the pairs, which are the same for all and come in one sequence.
    """
    gt_ids = torch.from_numpy(ids)
    segments = match_to_segments(masks, classes, gt_ids, segments_info)
    margins = margins_of_matched(masks, segments, gt_ids)
    m = masks.flatten(1).float()
    shared = m @ m.t()
    clear = (margins > CLEAR_SHARE * shared) & (shared > 0)
    pairs = [(i, j, int(margins[i, j])) for i, j in torch.nonzero(clear).tolist()]
    class_of, matched = classes.tolist(), (segments >= 0).tolist()

    def kind(front: int, behind: int) -> str:
        if not (matched[front] and matched[behind]):
            return KINDS[2]
        return KINDS[int(class_of[front] == class_of[behind])]

    found: Dict[str, List[PairDecision]] = {}
    for name, order in orders.items():
        position = {instance: i for i, instance in enumerate(order.tolist())}
        found[name] = [
            PairDecision(
                front=class_of[front],
                behind=class_of[behind],
                kind=kind(front, behind),
                pixels=pixels,
                right=position[front] < position[behind],
            )
            for front, behind, pixels in pairs
        ]
    return found


def accuracy_by_kind(decisions: List[PairDecision]) -> Dict[str, float]:
    """
    Returns:
        kind -> share of its pairs that are right, in percent; kinds without a pair are left out.
    """
    total = Counter(d.kind for d in decisions)
    right = Counter(d.kind for d in decisions if d.right)
    return {kind: 100 * right[kind] / total[kind] for kind in KINDS if total[kind]}
