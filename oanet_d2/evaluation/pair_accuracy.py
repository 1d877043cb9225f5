"""
How often an order puts the right one of two overlapping instances on top.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Dict, List

import numpy as np
import torch

from ..modeling.matching import margins_of_matched, match_to_segments

__all__ = ["KINDS", "PairDecision", "accuracy_by_kind", "pair_decisions"]

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
    id_map = torch.from_numpy(ids)
    segments = match_to_segments(masks, classes, id_map, segments_info)
    margins, matched = margins_of_matched(masks, segments, id_map), segments >= 0
    m = masks.flatten(1).float()
    shared = m @ m.t()
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    clear = (margins > CLEAR_SHARE * shared) & (shared > 0)
    decisions = []
    for front, behind in torch.nonzero(clear).tolist():
        kind = KINDS[int(classes[front] == classes[behind])]
        if not (matched[front] and matched[behind]):
            kind = KINDS[2]
        decisions.append(
            PairDecision(
                front=int(classes[front]),
                behind=int(classes[behind]),
                kind=kind,
                pixels=int(margins[front, behind]),
                right=bool(position[front] < position[behind]),
            )
        )
    return decisions


def accuracy_by_kind(decisions: List[PairDecision]) -> Dict[str, float]:
    """
    Returns:
        kind -> share of its pairs that are right, in percent; kinds without a pair are left out.
    """
    total = Counter(d.kind for d in decisions)
    right = Counter(d.kind for d in decisions if d.right)
    return {kind: 100 * right[kind] / total[kind] for kind in KINDS if total[kind]}
