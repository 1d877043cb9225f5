from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.utils import comm

from .candidates import Candidates, RankingTarget
from .matching import margins_of_matched, match_to_segments
from .pair_evidence import (
    CLASS_EVIDENCE_DIM,
    PAIR_GEOMETRY_DIM,
    Pairs,
    appearance_evidence,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
)
from .ranking import RankingEvidence
from .ranking_metrics import put_ranking_scalars
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead

__all__ = ["EVIDENCE", "PairwiseRankingHead"]

EVIDENCE = ("geometry", "score_map", "semantic", "features")
# A batch whose pairs weigh less than this all together counts for less than others.
_LEAST_WEIGHT = 0.1


class PairNorm(nn.BatchNorm1d):
    """
    Brings every number that is said of a pair to mean 0 and variance 1. By running statistics, in
    training too: a batch may hold one pair, or none.
    """

    def __init__(self, dim: int):
        # A number that never changed in training (the score of ground truth) may do so later: with
        # this epsilon it counts at most 32 times.
        super().__init__(dim, eps=1e-3, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (..., dim) float.
        """
        rows = x.flatten(0, -2)
        if self.training:
            self._remember(rows.detach().double())
        rows = F.batch_norm(rows, self.running_mean, self.running_var, eps=self.eps)
        return rows.view_as(x)

    def _remember(self, rows: torch.Tensor) -> None:
        """
        Bring mean and variance up to date, as :class:`nn.BatchNorm1d` does it, by the rows of all
        processes: a checkpoint holds the statistics of one. (Every process comes here in every
        step, with rows or without.)
        """
        count = rows.new_full((1,), len(rows))
        moments = torch.cat([count, rows.sum(0), rows.square().sum(0)])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(moments)
        count, total, squares = moments.split([1, self.num_features, self.num_features])
        mean = total / count.clamp(min=1)
        variance = (squares - total * mean) / (count - 1).clamp(min=1)
        share = self.momentum * (count > 1)
        for statistic, now in ((self.running_mean, mean), (self.running_var, variance)):
            assert statistic is not None
            statistic += share * (now - statistic)


@SRM_HEAD_REGISTRY.register()
class PairwiseRankingHead(SpatialRankingHead):
    """
    The paper's spatial ranking module and, beyond it, a small network that looks at every two
    instances that overlap and says which is visible where they meet.

    The score map has one channel per class, so it cannot tell two persons apart, and it knows
    masks only. This head is told of each pair

    * "geometry": both boxes, mask sizes and detection scores, and how much of each is covered;
    * "score_map": what the spatial ranking score map says of their classes, in the overlap and
      beside it;
    * "semantic": the same for the semantic branch, which is supervised on objects too;
    * "features": whether the overlap looks, in p2, like the rest of the one or of the other;

    and always their classes. The answer is antisymmetric by construction:
    logit(a, b) = f(a, b) - f(b, a).
    """

    @configurable
    def __init__(
        self,
        *,
        evidence: Sequence[str],
        feature_channels: int,
        embed_dim: int = 16,
        feature_dim: int = 32,
        hidden_dim: int = 128,
        dropout: float = 0.0,
        pair_loss_weight: float = 1.0,
        **kwargs,
    ):
        """
        Args:
            evidence: what the network is told of a pair, from EVIDENCE.
            feature_channels: channels of the feature map; 0 if there is none.
            embed_dim: numbers that stand for a class.
            feature_dim: numbers that stand for a cell of the feature map.
            hidden_dim: width of the two hidden layers.
            dropout: share of the hidden layers' numbers that is dropped in training.
            pair_loss_weight: weight of the loss over pairs.

        Other arguments are the same as :class:`SpatialRankingHead`.

        Raises:
            ValueError: `evidence` holds something unknown, or `dropout` is no share.
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
        self.kinds = tuple(evidence)
        self.pair_loss_weight = pair_loss_weight
        self.class_embedding = nn.Embedding(self.num_classes, embed_dim)
        dims = {
            "geometry": PAIR_GEOMETRY_DIM,
            "score_map": CLASS_EVIDENCE_DIM,
            "semantic": 2 * CLASS_EVIDENCE_DIM,
            "features": 4 * feature_dim + 3,
        }
        if "features" in evidence:
            self.feature_projection = Conv2d(feature_channels, feature_dim, kernel_size=1)
        dim = 2 * embed_dim + sum(dims[e] for e in self.kinds)
        self.norm = PairNorm(dim)
        self.compare = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, 1, bias=False),  # a bias would cancel in f(a, b) - f(b, a)
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
            "feature_dim": pairs.FEATURE_DIM,
            "hidden_dim": pairs.HIDDEN_DIM,
            "dropout": pairs.DROPOUT,
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
            candidates: the instances of B images.
            score_maps: B of (C, h, w) float, S.
            semantic: (B, C, h, w) float, logits of the semantic branch for the thing classes.
            features: (B, channels, h, w) float.
            (Each is only needed where it is evidence.)

        Returns:
            for every image its pairs, and (P,) float logits: over 0 where a goes before b.
        """
        # Sums over many cells: not in half precision, whatever the network runs in.
        with torch.autocast(candidates[0].masks.device.type, enabled=False):
            if "features" in self.kinds and features is not None:
                features = self.feature_projection(features.float())
            pairs, inputs = [], []
            of_batch = score_maps, semantic, features
            for i, instances in enumerate(candidates):
                pairs.append(overlapping_pairs(instances.masks))
                maps = (x if x is None else x[i] for x in of_batch)
                inputs.append(self._inputs(instances, pairs[-1], *maps))
            # All images at once: the network is so small that calling it costs more than it does.
            # One side at a time: what is the same from both is then the same to the bit.
            sides = self.norm(torch.cat(inputs, dim=1))
            seen_from_a, seen_from_b = (self.compare(side)[:, 0] for side in sides)
            logits = (seen_from_a - seen_from_b).split([len(x.a) for x in pairs])
        return pairs, list(logits)

    def _inputs(
        self, candidates: Candidates, pairs: Pairs, score_map, semantic, features
    ) -> torch.Tensor:
        """
        Returns:
            (2, P, D): what `compare` is told of the pairs, as (a, b) and as (b, a).
        """
        classes = candidates.classes
        embedded = self.class_embedding(classes)
        a, b = embedded[pairs.a], embedded[pairs.b]
        found = [{"ab": torch.cat([a, b], dim=1), "ba": torch.cat([b, a], dim=1)}]
        if "geometry" in self.kinds:
            found.append(geometry_evidence(candidates, pairs))
        if "score_map" in self.kinds:
            found.append(class_evidence(score_map.float(), classes, pairs))
        if "semantic" in self.kinds:
            semantic = semantic.float()
            found.append(class_evidence(semantic.softmax(0), classes, pairs))
            found.append(class_evidence(semantic / 4, classes, pairs))
        if "features" in self.kinds:
            found.append(appearance_evidence(features, pairs))
        return torch.stack([torch.cat([x[seen] for x in found], dim=1) for seen in ("ab", "ba")])

    def losses(
        self,
        candidates: List[Candidates],
        targets: List[RankingTarget],
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """
        As :meth:`SpatialRankingHead.losses`, and for every pair the binary cross entropy of its
        logit against who is visible in the overlap. A pair weighs as the square root of what the
        smaller instance loses if it is wrong, as a share of that instance: PQ counts instances,
        not pixels.

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
        pairs, pair_logits = self.pair_logits(candidates, score_maps, semantic, features)
        shares_by_image = []
        for instances, target, found in zip(candidates, targets, pairs):
            matched = match_to_segments(
                instances.masks, instances.classes, target.ids, target.segments_info
            )
            margins = margins_of_matched(instances.masks, matched, target.ids)
            smaller = torch.minimum(found.areas[found.a], found.areas[found.b])
            shares_by_image.append(margins[found.a, found.b] / smaller)
        shares = torch.cat(shares_by_image)
        weight = shares.abs().sqrt()
        loss_pairs = F.binary_cross_entropy_with_logits(
            torch.cat(pair_logits), (shares > 0).float(), weight=weight, reduction="sum"
        )
        loss_pairs = loss_pairs / weight.sum().clamp(min=_LEAST_WEIGHT)
        put_ranking_scalars(candidates, targets, score_maps, torch.cat(pair_logits), shares)
        # Every parameter gets a gradient in every step, or DistributedDataParallel would wait.
        anchor = torch.stack([p.sum() * 0 for p in self.parameters()]).sum()
        return {
            "loss_srm": anchor + loss_srm,
            "loss_srm_pairs": anchor + loss_pairs * self.pair_loss_weight,
        }

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
