"""
How well the ranking does while it trains: scalars for TensorBoard.
"""

from typing import List, Optional

import torch

from detectron2.utils.events import get_event_storage, has_event_storage

from .candidates import Candidates, RankingTarget, build_instance_tensor

__all__ = ["contested_share", "map_accuracy", "pair_accuracy", "put_ranking_scalars"]

# Detectron2's trainer writes what is there in every 20th iteration.
PERIOD = 20


def contested_share(masks: List[torch.Tensor]) -> Optional[float]:
    """
    Args:
        masks: for every image (N, h, w) bool.

    Returns:
        of the cells that an instance has, the share that several have, in [0, 1]; None without an
        instance.
    """
    owners = [x.sum(0) for x in masks]
    return _share(sum((x > 1).sum() for x in owners), sum((x > 0).sum() for x in owners))


def map_accuracy(
    score_maps: torch.Tensor, instance_tensors: torch.Tensor, categories: torch.Tensor
) -> Optional[float]:
    """
    Whether S is right where it matters.

    Args:
        score_maps: (B, C, h, w) float, S or its logits.
        instance_tensors: (B, C, h, w), see :func:`build_instance_tensor`.
        categories: (B, h, w) int64, panoptic category of every cell.

    Returns:
        of the cells for which several classes compete and which show one of those, the share where
        S is greatest for that one; None without such a cell.
    """
    competes = instance_tensors > 0
    is_thing = categories < competes.shape[1]
    shown = categories.where(is_thing, torch.zeros_like(categories))
    counted = is_thing & (competes.sum(1) > 1) & competes.gather(1, shown[:, None])[:, 0]
    winner = score_maps.masked_fill(~competes, -torch.inf).argmax(1)
    return _share((counted & (winner == shown)).sum(), counted.sum())


def pair_accuracy(logits: torch.Tensor, margins: torch.Tensor) -> Optional[float]:
    """
    Args:
        logits: (P,) float, over 0 where the first of two overlapping instances goes before.
        margins: (P,) float, over 0 where the ground truth shows more of the first in the overlap.

    Returns:
        of the pairs that the ground truth decides (it is not 0), the share that is right; None
        without such a pair.
    """
    decided = margins != 0
    return _share((decided & ((logits > 0) == (margins > 0))).sum(), decided.sum())


def _share(part, whole) -> Optional[float]:
    part, whole = int(part), int(whole)
    return part / whole if whole else None


@torch.no_grad()
def put_ranking_scalars(
    candidates: List[Candidates],
    targets: List[RankingTarget],
    score_maps: Optional[torch.Tensor],
    pair_logits: Optional[torch.Tensor] = None,
    pair_margins: Optional[torch.Tensor] = None,
):
    """
    Put the shares above, as far as there is something to count, into the training's event storage:
    "srm/contested_cells", "srm/map_accuracy", "srm/pair_accuracy", of one batch in 20.

    Args:
        candidates, targets: one of each for every image.
        score_maps: see :func:`map_accuracy`.
        pair_logits, pair_margins: see :func:`pair_accuracy`.
    """
    if not has_event_storage() or (get_event_storage().iter + 1) % PERIOD:
        return
    shares = {"contested_cells": contested_share([x.masks for x in candidates])}
    if score_maps is not None:
        num_classes = score_maps.shape[1]
        tensors = [build_instance_tensor(x.masks, x.classes, num_classes) for x in candidates]
        categories = torch.stack([x.categories for x in targets])
        shares["map_accuracy"] = map_accuracy(score_maps, torch.stack(tensors), categories)
    if pair_logits is not None and pair_margins is not None:
        shares["pair_accuracy"] = pair_accuracy(pair_logits, pair_margins)
    for name, share in shares.items():
        if share is not None:
            get_event_storage().put_scalar(f"srm/{name}", share)
