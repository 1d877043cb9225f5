"""
Rules that decide in which order instances are painted: evidence in, a permutation out. The first
instance of an order is painted first and so lies on top, since painting never overwrites
(:func:`oanet_d2.modeling.panoptic_combiner.combine`).

Every rule has the same signature and is registered under the name that `MODEL.OANET.ORDER` uses.
"""

from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from detectron2.utils.registry import Registry

__all__ = [
    "RANKING_RULE_REGISTRY",
    "RankingEvidence",
    "mean_scores",
    "order_from_margins",
    "overlap_margins",
]

RANKING_RULE_REGISTRY = Registry("RANKING_RULE")
RANKING_RULE_REGISTRY.__doc__ = """
Registry of ranking rules. A rule is called with a :class:`RankingEvidence` of N instances and
returns an int64 tensor of shape (N,): a permutation of 0..N-1, first painted first.
"""

# Margins are compared as multiples of this, in integers: sums and differences are then exact, so
# the order does not depend on the order of additions.
_MARGIN_QUANTUM = 2.0**-20


@dataclass
class RankingEvidence:
    """
    What a ranking rule looks at, for the N instances of one image.

    Attributes:
        scores: (N,) float, detection scores.
        classes: (N,) int64, thing classes in [0, C).
        masks: (N, h, w) bool, the instances on the grid of the score map. Instances below the
            confidence threshold are not painted, so they do not compete: theirs are empty.
        score_map: (C, h, w) float in [0, 1], the spatial ranking score map S; None where no rule
            asked for it.
        pair_margins: (N, N) antisymmetric float, in cells: by how much a pairwise ranking head
            puts a before b; None where the model has no such head.
    """

    scores: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor
    score_map: Optional[torch.Tensor] = None
    pair_margins: Optional[torch.Tensor] = None

    def __getitem__(self, kept: torch.Tensor) -> "RankingEvidence":
        margins = self.pair_margins
        return RankingEvidence(
            self.scores[kept],
            self.classes[kept],
            self.masks[kept],
            self.score_map,
            None if margins is None else margins[kept][:, kept],
        )

    def order(self, rule: str) -> torch.Tensor:
        """
        Returns:
            (N,) int64: the painting order by the registered rule of that name.
        """
        # Sums over many cells: not in half precision, whatever the network runs in.
        with torch.autocast(self.scores.device.type, enabled=False):
            return RANKING_RULE_REGISTRY.get(rule)(self)


@RANKING_RULE_REGISTRY.register()
def score(evidence: RankingEvidence) -> torch.Tensor:
    """
    The more confident instance first: what Panoptic FPN and panopticapi do. Written as
    Detectron2 writes it, so that equal scores fall the same way.
    """
    return torch.argsort(-evidence.scores)


@RANKING_RULE_REGISTRY.register()
def srm_mean(evidence: RankingEvidence) -> torch.Tensor:
    """
    The paper's rule: by the mean ranking score of Eq. 3, highest first. Equal means (and
    instances without a pixel) fall back to the detection score.
    """
    by_score = score(evidence)
    means = mean_scores(_map_of(evidence), evidence.masks, evidence.classes)
    return by_score[torch.argsort(-means[by_score], stable=True)]


@RANKING_RULE_REGISTRY.register()
def srm_overlap(evidence: RankingEvidence) -> torch.Tensor:
    """
    Ask who wins *inside each overlap*. The mean of Eq. 3 dilutes: most of a person's pixels are
    uncontested and score near 1, so the tie on it loses although it wins everywhere they meet.
    """
    margins = overlap_margins(_map_of(evidence), evidence.masks, evidence.classes)
    return order_from_margins(margins, evidence.scores)


@RANKING_RULE_REGISTRY.register()
def srm_pairs(evidence: RankingEvidence) -> torch.Tensor:
    """
    By what :class:`PairwiseRankingHead` says of every two instances that overlap.

    Raises:
        ValueError: the model has another head.
    """
    if evidence.pair_margins is None:
        raise ValueError(
            "The order 'srm_pairs' needs MODEL.SRM_HEAD.NAME 'PairwiseRankingHead'; this model's "
            "ranking head does not compare pairs."
        )
    return order_from_margins(evidence.pair_margins, evidence.scores)


def _map_of(evidence: RankingEvidence) -> torch.Tensor:
    if evidence.score_map is None:
        raise ValueError(
            "This order needs the score map, which the model was not asked for; name the order in "
            "MODEL.OANET.ORDER or TEST.ORDERS."
        )
    return evidence.score_map


def mean_scores(
    score_map: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """
    Ranking score of every instance: the mean of its class's channel over its pixels,

        P = sum_ij S[cls, i, j] * m[i, j] / sum_ij m[i, j]          (Eq. 3)

    The printed Eq. 4 of the paper gives m = 0 inside the instance and 1 outside, which would be
    the mean over everything else (0/0 if taken over the instance's own pixels). Its text, "the
    average score over the instance", needs m = 1 inside and 0 outside; that is what this does.

    Args:
        score_map: (C, h, w) float.
        masks: (N, h, w) bool.
        classes: (N,) int64 in [0, C).

    Returns:
        (N,) tensor of score_map's dtype; 0 for an instance without a pixel.
    """
    m = masks.to(score_map.dtype)
    total = (score_map[classes] * m).flatten(1).sum(1)
    return total / m.flatten(1).sum(1).clamp(min=1)


def overlap_margins(
    score_map: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """
    By how much instance a beats instance b where both have pixels:

        margin[a, b] = sum_ij (S[cls_a, i, j] - S[cls_b, i, j]) * m_a[i, j] * m_b[i, j]

    Two instances of one class share a channel of S, so their margin is 0: S cannot tell.

    Args:
        score_map: (C, h, w) float.
        masks: (N, h, w) bool.
        classes: (N,) int64 in [0, C).

    Returns:
        (N, N) antisymmetric tensor of score_map's dtype, in units of grid cells.
    """
    m = masks.flatten(1).to(score_map.dtype)
    evidence = (score_map[classes].flatten(1) * m) @ m.t()  # [a, b]: for a, inside a and b
    margins = evidence - evidence.t()
    return margins.masked_fill(classes[:, None] == classes[None, :], 0)


def order_from_margins(margins: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """
    Turn pairwise comparisons into an order. Repeatedly take the instance with the least evidence
    against it among those left (the sum of its lost margins); among equals, the one with the
    highest detection score.

    While the comparisons do not contradict each other, some instance is left that loses to
    nobody left, so the result agrees with every one of them (a topological order). On a cycle the
    instance that loses by the least goes first. O(N^2), deterministic.

    Args:
        margins: (N, N) antisymmetric float; margins[a, b] > 0 means a goes before b.
        scores: (N,) float, detection scores.

    Returns:
        (N,) int64 on scores' device: a permutation of 0..N-1.
    """
    by_score = torch.argsort(-scores)
    quanta = (-margins).clamp(min=0)[by_score][:, by_score].double() / _MARGIN_QUANTUM
    lost = quanta.round().long().cpu().numpy()
    against = lost.sum(axis=1)
    order = np.empty(len(lost), dtype=np.int64)
    for position in range(len(lost)):
        best = int(against.argmin())  # the first minimum: the highest score among equals
        order[position] = best
        against -= lost[:, best]
        against[best] = np.iinfo(np.int64).max
        lost[best] = 0  # taken: later subtractions leave it alone
    return by_score[torch.from_numpy(order).to(by_score.device)]
