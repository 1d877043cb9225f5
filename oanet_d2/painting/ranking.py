"""
Rules that order instances for painting. A rule takes :class:`OrderInputs` and returns a permutation.
The first instance of the order is painted first and so lies on top, because painting never overwrites
(:func:`oanet_d2.painting.fusion.combine`).

`MODEL.OANET.ORDER` is the name of a registered rule.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from fvcore.common.registry import Registry

from .arrays import order_of_sorted
from .masks import mask_extents

__all__ = ["RANKING_RULE_REGISTRY", "OrderInputs", "mean_scores", "order_from_margins"]
__all__ += ["overlap_margins"]

RANKING_RULE_REGISTRY = Registry("RANKING_RULE")
RANKING_RULE_REGISTRY.__doc__ = """
Registry of ranking rules. A rule is called with the :class:`OrderInputs` of N instances and returns
an int64 tensor of shape (N,): a permutation of 0..N-1, first painted first.
"""


@dataclass
class OrderInputs:
    """What a ranking rule may look at, for the N instances of one image."""

    scores: torch.Tensor  # (N,) float, detection scores
    classes: torch.Tensor  # (N,) int64, thing classes in [0, C)
    # (N, h, w) bool, on the grid of the score map. An instance that will not be painted has none.
    masks: torch.Tensor
    # (C, h, w) float in [0, 1], the spatial ranking score map S.
    score_map: Optional[torch.Tensor] = None
    # (N, N) antisymmetric float, in cells: how strongly a comparison of pairs puts a before b.
    pair_margins: Optional[torch.Tensor] = None

    def __getitem__(self, indices: torch.Tensor) -> "OrderInputs":
        margins = self.pair_margins
        return OrderInputs(
            self.scores[indices],
            self.classes[indices],
            self.masks[indices],
            self.score_map,
            None if margins is None else margins[indices][:, indices],
        )

    def order(self, rule: str) -> torch.Tensor:
        """(N,) int64, the painting order by the registered rule of this name."""
        # A rule sums over many cells, which half precision cannot do.
        with torch.autocast(self.scores.device.type, enabled=False):
            return RANKING_RULE_REGISTRY.get(rule)(self)


@RANKING_RULE_REGISTRY.register()
def score(inputs: OrderInputs) -> torch.Tensor:
    """
    The more confident instance first, as in Panoptic FPN. It is written as Detectron2 writes it, so
    that equal scores fall the same way.
    """
    return torch.argsort(-inputs.scores)


@RANKING_RULE_REGISTRY.register()
def smaller_first(inputs: OrderInputs) -> torch.Tensor:
    """
    The instance with fewer pixels first, which needs no network. The detection score decides between
    equals, as below.
    """
    return _by(inputs, inputs.masks.flatten(1).sum(1))


@RANKING_RULE_REGISTRY.register()
def lower_first(inputs: OrderInputs) -> torch.Tensor:
    """
    The instance that reaches further down first: on the ground it stands nearer.
    """
    return _by(inputs, -mask_extents(inputs.masks)[:, 3])


@RANKING_RULE_REGISTRY.register()
def srm_mean(inputs: OrderInputs) -> torch.Tensor:
    """
    The paper's rule: by the mean ranking score of Eq. 3, highest first.
    """
    return _by(inputs, -mean_scores(inputs))


@RANKING_RULE_REGISTRY.register()
def srm_overlap(inputs: OrderInputs) -> torch.Tensor:
    """
    By who wins inside each overlap on the score map. The mean of Eq. 3 dilutes: most pixels of a
    person are uncontested and score near 1, so the tie on it loses although it wins wherever the
    two meet.
    """
    return order_from_margins(overlap_margins(inputs), inputs.scores)


@RANKING_RULE_REGISTRY.register()
def srm_pairs(inputs: OrderInputs) -> torch.Tensor:
    """
    By what :class:`PairwiseRankingHead` says about every two instances that overlap.

    Raises:
        ValueError: the model does not compare pairs.
    """
    if inputs.pair_margins is None:
        raise ValueError(
            "The order 'srm_pairs' needs a ranking head that compares pairs; set "
            "MODEL.SRM_HEAD.NAME to 'PairwiseRankingHead'."
        )
    return order_from_margins(inputs.pair_margins, inputs.scores)


def _by(inputs: OrderInputs, values: torch.Tensor) -> torch.Tensor:
    by_score = score(inputs)
    return by_score[torch.argsort(values[by_score], stable=True)]


def mean_scores(inputs: OrderInputs) -> torch.Tensor:
    """
    The ranking score of every instance is the mean of its class's channel over its pixels:

        P = sum_ij S[cls, i, j] * m[i, j] / sum_ij m[i, j]          (paper, Eq. 3)

    The printed Eq. 4 has m = 0 inside the instance and 1 outside. Its text, "the average score over
    the instance", needs m = 1 inside and 0 outside, which is what this function computes.

    Returns:
        (N,) float. It is 0 for an instance without a pixel.

    Raises:
        ValueError: there is no score map.
    """
    sums = _scores_of_instances(inputs).flatten(1).sum(1)
    return sums / inputs.masks.flatten(1).sum(1).clamp(min=1)


def overlap_margins(inputs: OrderInputs) -> torch.Tensor:
    """
    By how much instance a beats instance b where both have pixels:

        margin[a, b] = sum_ij (S[cls_a, i, j] - S[cls_b, i, j]) * m_a[i, j] * m_b[i, j]

    Two instances of one class share a channel of S, so their margin is 0.

    Returns:
        (N, N) antisymmetric float, in cells.

    Raises:
        ValueError: there is no score map.
    """
    # [a, b]: S[cls_a] over a and b
    own_class = _scores_of_instances(inputs).flatten(1) @ inputs.masks.flatten(1).float().t()
    margins = own_class - own_class.t()
    return margins.masked_fill(inputs.classes[:, None] == inputs.classes[None, :], 0)


def _scores_of_instances(inputs: OrderInputs) -> torch.Tensor:
    """(N, h, w): the channel of S of every instance, 0 outside of its mask."""
    if inputs.score_map is None:
        raise ValueError(
            "The orders 'srm_mean' and 'srm_overlap' need the score map; set "
            "MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT to 1, so that it is trained, or leave the order out."
        )
    return inputs.score_map[inputs.classes] * inputs.masks


def order_from_margins(margins: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """
    Turn pairwise comparisons into an order. Repeatedly take the instance whose lost margins against
    the instances left have the smallest sum. Among equals, take the highest detection score.

    Without a contradiction among the comparisons, some instance loses to nobody left, and the result
    agrees with every comparison (a topological order). On a cycle the instance that loses by the
    least goes first. The cost is O(N^2).

    Args:
        margins: (N, N) antisymmetric float; margins[a, b] > 0 means that a goes before b.
        scores: (N,) float, detection scores.

    Returns:
        (N,) int64 on scores' device, a permutation of 0..N-1.
    """
    by_score = torch.argsort(-scores)
    by_margin = order_of_sorted(margins.detach()[by_score][:, by_score].cpu().double().numpy())
    return by_score[torch.from_numpy(by_margin).to(by_score.device)]
