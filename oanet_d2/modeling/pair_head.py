from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.layers import ShapeSpec

from .candidates import Candidates, RankingTarget
from .matching import margins_of_matched, match_to_segments
from .pair_evidence import (
    CLASS_EVIDENCE_DIM,
    PAIR_GEOMETRY_DIM,
    Pairs,
    appearance_means,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
)
from .pair_memory import PairMemory
from .pair_network import DescribedPairs, PairNetwork
from .ranking import RankingEvidence
from .ranking_metrics import put_ranking_scalars
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead

__all__ = ["EVIDENCE", "PairwiseRankingHead"]

EVIDENCE = ("geometry", "score_map", "semantic", "features")
# A batch whose pairs weigh less than this all together counts for less than others.
_LEAST_WEIGHT = 0.1


@SRM_HEAD_REGISTRY.register()
class PairwiseRankingHead(SpatialRankingHead):
    """
    The paper's spatial ranking module and, beyond it, small networks that look at every two
    instances that overlap and say which is visible where they meet.

    The score map has one channel per class, so it cannot tell two persons apart, and it knows
    masks only. This head is told of each pair

    * "geometry": both boxes, mask sizes and detection scores, and how much of each is covered;
    * "score_map": what the spatial ranking score map says of their classes, in the overlap and
      beside it;
    * "semantic": the same for the semantic branch, which is supervised on objects too;
    * "features": whether the overlap looks, in p2, like the rest of the one or of the other;

    and always their classes. Pairs are few, and networks that learn from the same few differ in many
    answers: there are several, each learns from other draws, and the mean of their logits decides.

    Attributes:
        remembers: whether pairs of earlier steps are learned from again. That is for a training in
            which the evidence of a pair does not change: the network that it comes from stands still,
            or there is none.
    """

    @configurable
    def __init__(
        self,
        *,
        evidence: Sequence[str],
        feature_channels: int,
        num_networks: int = 1,
        embed_dim: int = 16,
        feature_dim: int = 32,
        hidden_dim: int = 128,
        dropout: float = 0.0,
        memory_size: int = 0,
        memory_batch: int = 128,
        pair_loss_weight: float = 1.0,
        **kwargs,
    ):
        """
        Args:
            evidence: what the networks are told of a pair, from EVIDENCE.
            feature_channels: channels of the feature map; 0 if there is none.
            num_networks: how many networks compare.
            embed_dim, feature_dim, hidden_dim, dropout: see :class:`PairNetwork`.
            memory_size: how many pairs are remembered while `remembers` is set; 0: none. None either
                with "score_map" among the evidence.
            memory_batch: how many of them every network learns from in a step, besides the pairs of
                the step.
            pair_loss_weight: weight of the loss over pairs.

        Other arguments are the same as :class:`SpatialRankingHead`.

        Raises:
            ValueError: an argument has no meaning; the message names the config key.
        """
        super().__init__(**kwargs)
        unknown = [e for e in evidence if e not in EVIDENCE]
        if unknown:
            raise ValueError(
                f"MODEL.SRM_HEAD.PAIRS.EVIDENCE holds {unknown[0]!r}; it may hold {EVIDENCE}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.PAIRS.DROPOUT is {dropout}; it must lie in [0, 1), 0 for none."
            )
        if num_networks < 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.PAIRS.NUM_NETWORKS is {num_networks}; it must be at least 1."
            )
        if memory_size < 0 or memory_batch < 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.PAIRS.MEMORY is {memory_size} and MEMORY_BATCH {memory_batch}; the "
                "former must be at least 0, for none, the latter at least 1."
            )
        self.kinds = tuple(evidence)
        self.pair_loss_weight = pair_loss_weight
        self.remembers = False
        # What S said of a pair before holds no more: it learns along.
        self.memory = PairMemory(0 if "score_map" in evidence else memory_size)
        self.memory_batch = memory_batch
        dims = {
            "geometry": PAIR_GEOMETRY_DIM,
            "score_map": CLASS_EVIDENCE_DIM,
            "semantic": 2 * CLASS_EVIDENCE_DIM,
            "features": 0,
        }
        self.networks = nn.ModuleList(
            PairNetwork(
                self.num_classes,
                sum(dims[e] for e in self.kinds),
                feature_channels if "features" in self.kinds else 0,
                embed_dim=embed_dim,
                feature_dim=feature_dim,
                hidden_dim=hidden_dim,
                dropout=dropout,
            )
            for _ in range(num_networks)
        )

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        ret = super().from_config(cfg, input_shape)
        pairs = cfg.MODEL.SRM_HEAD.PAIRS
        if "semantic" in pairs.EVIDENCE and cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff":
            raise ValueError(
                "MODEL.SRM_HEAD.PAIRS.EVIDENCE holds 'semantic', but with "
                "MODEL.SEM_SEG_HEAD.SUPERVISION 'stuff' the semantic head knows no thing classes; "
                "leave it out, or set SUPERVISION to 'things_and_stuff'."
            )
        channels = 0
        if "features" in pairs.EVIDENCE:
            if cfg.MODEL.SRM_HEAD.IN_FEATURE not in input_shape:
                raise ValueError(
                    f"MODEL.SRM_HEAD.IN_FEATURE is {cfg.MODEL.SRM_HEAD.IN_FEATURE!r}, but the "
                    f"feature maps are {sorted(input_shape)}; name one of them, or leave "
                    "'features' out of MODEL.SRM_HEAD.PAIRS.EVIDENCE."
                )
            channels = input_shape[cfg.MODEL.SRM_HEAD.IN_FEATURE].channels
        return {
            **ret,
            "evidence": pairs.EVIDENCE,
            "feature_channels": channels,
            "num_networks": pairs.NUM_NETWORKS,
            "feature_dim": pairs.FEATURE_DIM,
            "hidden_dim": pairs.HIDDEN_DIM,
            "dropout": pairs.DROPOUT,
            "memory_size": pairs.MEMORY,
            "memory_batch": pairs.MEMORY_BATCH,
            "pair_loss_weight": pairs.LOSS_WEIGHT,
        }

    def pair_logits(
        self,
        candidates: List[Candidates],
        score_maps: Union[torch.Tensor, Sequence[Optional[torch.Tensor]], None] = None,
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
    ) -> Tuple[List[Pairs], List[torch.Tensor]]:
        """
        Compare the instances of every image that overlap.

        Args:
            candidates, score_maps, semantic, features: see :meth:`describe`.

        Returns:
            for every image its pairs, and (P,) float logits: over 0 where a goes before b.
        """
        with torch.autocast(candidates[0].masks.device.type, enabled=False):
            pairs, described = self.describe(candidates, score_maps, semantic, features)
            logits = torch.stack([network(described) for network in self.networks]).mean(0)
        return pairs, list(logits.split([len(x.a) for x in pairs]))

    def describe(
        self,
        candidates: List[Candidates],
        score_maps: Union[torch.Tensor, Sequence[Optional[torch.Tensor]], None] = None,
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
    ) -> Tuple[List[Pairs], DescribedPairs]:
        """
        Collect what is known of the instances that overlap. Sums over many cells: not to be done
        in half precision, whatever the network runs in.

        Args:
            candidates: the instances of B images.
            score_maps: B of (C, h, w) float, S.
            semantic: (B, C, h, w) float, logits of the semantic branch for the thing classes.
            features: (B, channels, h, w) float.
            (Each is only needed where it is evidence.)

        Returns:
            for every image its pairs, and of all of them together what is known.
        """
        # All images at once: the networks are so small that calling one costs more than it does.
        found, described = [], []
        for i, instances in enumerate(candidates):
            found.append(overlapping_pairs(instances.masks))
            maps = (x if x is None else x[i] for x in (score_maps, semantic, features))
            described.append(self._describe(instances, found[-1], *maps))
        return found, DescribedPairs.cat(described)

    def _describe(
        self, candidates: Candidates, pairs: Pairs, score_map, semantic, features
    ) -> DescribedPairs:
        classes = candidates.classes
        found = []
        if "geometry" in self.kinds:
            found.append(geometry_evidence(candidates, pairs))
        if "score_map" in self.kinds:
            found.append(class_evidence(score_map.float(), classes, pairs))
        if "semantic" in self.kinds:
            semantic = semantic.float()
            found.append(class_evidence(semantic.softmax(0), classes, pairs))
            found.append(class_evidence(semantic / 4, classes, pairs))
        nothing = pairs.areas.new_zeros(len(pairs.a), 0)
        sides = [torch.cat([nothing, *(x[seen] for x in found)], dim=1) for seen in ("ab", "ba")]
        means = nothing[:, None].expand(-1, 3, -1)
        if "features" in self.kinds:
            means = appearance_means(features.float(), pairs)
        of_both = torch.stack([classes[pairs.a], classes[pairs.b]], dim=1)
        return DescribedPairs(of_both, torch.stack(sides, dim=1), means)

    def losses(
        self,
        candidates: List[Candidates],
        targets: List[RankingTarget],
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """
        As :meth:`SpatialRankingHead.losses`, and for every pair the binary cross entropy of every
        network's logit against who is visible in the overlap. A pair weighs as the square root of
        what the smaller instance loses if it is wrong, as a share of that instance: PQ counts
        instances, not pixels. While `remembers` is set, every network also learns from pairs of
        earlier steps, each from a draw of its own.

        Args:
            candidates, targets: one of each for every image.
            semantic: (B, C, h, w) float, logits of the semantic branch for the thing classes.
            features: (B, channels, h, w) float.

        Returns:
            {"loss_srm", "loss_srm_pairs"}: scalars; 0 (with gradients, all 0) without a pair.
        """
        score_maps: Optional[torch.Tensor] = None
        loss_srm: Union[float, torch.Tensor] = 0.0
        if self.loss_weight > 0 or "score_map" in self.kinds:
            logits = self(self.instance_tensors(candidates))
            categories = torch.stack([x.categories for x in targets])
            loss_srm = self.map_loss(logits, categories) * self.loss_weight
            # S is evidence here and learns from its own loss only.
            score_maps = self.score_map(logits).detach()
        with torch.autocast(candidates[0].masks.device.type, enabled=False):
            pairs, described = self.describe(candidates, score_maps, semantic, features)
            shares = torch.cat(
                [_shares_at_stake(*of_image) for of_image in zip(candidates, targets, pairs)]
            )
            loss_pairs, logits = self._pair_loss(described, shares)
        put_ranking_scalars(candidates, targets, score_maps, logits, shares)
        # Every parameter gets a gradient in every step, or DistributedDataParallel would wait.
        anchor = torch.stack([p.sum() * 0 for p in self.parameters()]).sum()
        return {
            "loss_srm": anchor + loss_srm,
            "loss_srm_pairs": anchor + loss_pairs * self.pair_loss_weight,
        }

    def _pair_loss(self, described: DescribedPairs, shares: torch.Tensor):
        """
        Args:
            described: the pairs of this step.
            shares: (P,), see :func:`_shares_at_stake`.

        Returns:
            the loss, summed over the networks, so that each learns as if it were alone; and the (P,)
            mean logits of the pairs of this step.
        """
        losses, logits = [], []
        remembering = self.remembers and self.memory.capacity > 0
        if remembering:
            self.memory.add(described, shares)
        for network in self.networks:
            learned_from, at_stake = described, shares
            if remembering:
                remembered, their_shares = self.memory.draw(self.memory_batch)
                learned_from = DescribedPairs.cat([described, remembered])
                at_stake = torch.cat([shares, their_shares])
            answers = network(learned_from)
            logits.append(answers[: len(shares)].detach())
            losses.append(_weighted_cross_entropy(answers, at_stake))
        return torch.stack(losses).sum(), torch.stack(logits).mean(0)

    def evidence(
        self,
        candidates: List[Candidates],
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
        with_map: bool = True,
    ) -> List[RankingEvidence]:
        """
        As :meth:`SpatialRankingHead.evidence`, with `pair_margins`: the cells that two instances
        share, times P(a before b) - P(b before a). The map is left out where neither a rule nor
        the comparison of pairs looks at it.
        """
        if with_map or "score_map" in self.kinds:
            ranked = super().evidence(candidates, semantic, features)
        else:
            ranked = [RankingEvidence(x.scores, x.classes, x.masks) for x in candidates]
        score_maps = [x.score_map for x in ranked]
        all_pairs, all_logits = self.pair_logits(candidates, score_maps, semantic, features)
        for instances, evidence, pairs, logits in zip(candidates, ranked, all_pairs, all_logits):
            margins = instances.scores.new_zeros(len(instances.scores), len(instances.scores))
            margins[pairs.a, pairs.b] = torch.tanh(logits / 2) * pairs.cells
            evidence.pair_margins = margins - margins.t()
        return ranked


def _shares_at_stake(candidates: Candidates, target: RankingTarget, pairs: Pairs) -> torch.Tensor:
    """
    Returns:
        (P,) float: by how many cells of the overlap the ground truth shows more of a than of b, as a
        share of the smaller of the two. 0 where it does not decide.
    """
    matched = match_to_segments(
        candidates.masks, candidates.classes, target.ids, target.segments_info
    )
    margins = margins_of_matched(candidates.masks, matched, target.ids)
    smaller = torch.minimum(pairs.areas[pairs.a], pairs.areas[pairs.b])
    return margins[pairs.a, pairs.b] / smaller


def _weighted_cross_entropy(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    weight = shares.abs().sqrt()
    loss = F.binary_cross_entropy_with_logits(
        logits, (shares > 0).float(), weight=weight, reduction="sum"
    )
    return loss / weight.sum().clamp(min=_LEAST_WEIGHT)
