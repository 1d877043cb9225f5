from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage, has_event_storage

from ..painting.matching import match_to_segments, visible_margins
from ..painting.pairs import (
    CLASS_NUMBERS,
    GEOMETRY_NUMBERS,
    PairDescriptions,
    PairNetwork,
    Pairs,
    appearance_means,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
)
from ..painting.ranking import OrderInputs
from .grid import GridInstances, GridTruth
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead

__all__ = ["EVIDENCE", "PairwiseRankingHead"]

EVIDENCE = ("geometry", "score_map", "semantic", "features")
Maps = Optional[List[torch.Tensor]]  # one for every image


@SRM_HEAD_REGISTRY.register()
class PairwiseRankingHead(nn.Module):
    """
    A small network that looks at every two instances that overlap and says which is visible where
    they meet. The paper's score map has one channel per class, so it cannot tell two persons apart,
    and it knows masks only. This head knows about each pair

    * "geometry": both boxes, mask sizes and detection scores, and how much of each is covered;
    * "score_map": what the paper's score map says about their classes, in the overlap and beside it;
    * "semantic": the same for the semantic branch, which is supervised on things too;
    * "features": whether the overlap looks, in p2, like the rest of the one or of the other;

    and always their classes.
    """

    has_pair_margins = True

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        evidence: Sequence[str],
        feature_channels: int,
        score_map: Optional[SpatialRankingHead] = None,
        loss_weight: float = 1.0,
    ):
        """
        Args:
            num_classes: number of thing classes, C.
            evidence: what the network knows about a pair, from EVIDENCE.
            feature_channels: channels of the feature map; 0 without one.
            score_map: the paper's module, for the orders that need its map or as evidence.
            loss_weight: weight of the loss over pairs.

        Raises:
            ValueError: the evidence is not known, or needs a score map.
        """
        super().__init__()
        for name in evidence:
            if name not in EVIDENCE:
                raise ValueError(
                    f"MODEL.SRM_HEAD.PAIRS.EVIDENCE holds {name!r}; it may hold {EVIDENCE}."
                )
        if "score_map" in evidence and score_map is None:
            raise ValueError(
                "MODEL.SRM_HEAD.PAIRS.EVIDENCE holds 'score_map', but "
                "MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT is 0, so there is no map; set it to 1."
            )
        self.evidence = tuple(evidence)
        self.loss_weight = loss_weight
        self.score_map = score_map
        numbers = {
            "geometry": GEOMETRY_NUMBERS,
            "score_map": CLASS_NUMBERS,
            "semantic": 2 * CLASS_NUMBERS,
            "features": 0,
        }
        self.network = PairNetwork(
            num_classes,
            sum(numbers[name] for name in self.evidence),
            feature_channels if "features" in self.evidence else 0,
        )

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        head, channels = cfg.MODEL.SRM_HEAD, 0
        if "semantic" in head.PAIRS.EVIDENCE and cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff":
            raise ValueError(
                "MODEL.SRM_HEAD.PAIRS.EVIDENCE holds 'semantic', but with "
                "MODEL.SEM_SEG_HEAD.SUPERVISION 'stuff' the semantic head knows no thing classes. "
                "Leave it out, or set SUPERVISION to 'things_and_stuff'."
            )
        if "features" in head.PAIRS.EVIDENCE:
            if head.IN_FEATURE not in input_shape:
                raise ValueError(
                    f"MODEL.SRM_HEAD.IN_FEATURE is {head.IN_FEATURE!r}, but the feature maps are "
                    f"{sorted(input_shape)}. Name one of them, or leave 'features' out of "
                    "MODEL.SRM_HEAD.PAIRS.EVIDENCE."
                )
            channels = input_shape[head.IN_FEATURE].channels
        score_map = None
        if head.PAIRS.MAP_LOSS_WEIGHT > 0:
            arguments = SpatialRankingHead.from_config(cfg, input_shape)
            arguments["loss_weight"] = head.PAIRS.MAP_LOSS_WEIGHT
            score_map = SpatialRankingHead(**arguments)
        return {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "evidence": head.PAIRS.EVIDENCE,
            "feature_channels": channels,
            "score_map": score_map,
            "loss_weight": head.LOSS_WEIGHT,
        }

    @property
    def has_score_map(self) -> bool:
        return self.score_map is not None

    def forward(
        self,
        instances: List[GridInstances],
        score_maps: Maps = None,
        semantic: Maps = None,
        features: Maps = None,
    ) -> Tuple[List[Pairs], torch.Tensor]:
        """
        Compare the instances of every image that overlap.

        Args:
            instances: the instances of B images.
            score_maps: (C, h, w) float for every image, S.
            semantic: (C, h, w) float for every image, logits of the semantic branch for the thing
                classes.
            features: (channels, h, w) float for every image.
            (Each map is only needed where it is evidence.)

        Returns:
            the pairs of every image, and (P,) float logits for all of them together, positive where
            a goes before b.
        """
        pairs = [overlapping_pairs(x.masks) for x in instances]
        # One call for all images: the network is so small that a call costs more than its work.
        descriptions = []
        for i, (of_image, of_pairs) in enumerate(zip(instances, pairs)):
            maps = (None if x is None else x[i] for x in (score_maps, semantic, features))
            descriptions.append(self._describe(of_image, of_pairs, *maps))
        return pairs, self.network(PairDescriptions.cat(descriptions))

    def _describe(
        self, instances: GridInstances, pairs: Pairs, score_map, semantic, features
    ) -> PairDescriptions:
        classes = instances.classes
        found = []
        if "geometry" in self.evidence:
            where = instances.masks, classes, instances.scores, instances.boxes
            found.append(geometry_evidence(*where, pairs))
        if "score_map" in self.evidence:
            found.append(class_evidence(score_map, classes, pairs))
        if "semantic" in self.evidence:
            found.append(class_evidence(semantic.softmax(0), classes, pairs))
            found.append(class_evidence(semantic / 4, classes, pairs))
        nothing = pairs.areas.new_zeros(len(pairs.a), 0)
        sides = [torch.cat([nothing, *(x[seen] for x in found)], dim=1) for seen in ("ab", "ba")]
        means = nothing[:, None].expand(-1, 3, -1)
        if "features" in self.evidence:
            means = appearance_means(features, pairs)
        of_both = torch.stack([classes[pairs.a], classes[pairs.b]], dim=1)
        return PairDescriptions(of_both, torch.stack(sides, dim=1), means)

    def losses(
        self,
        instances: List[GridInstances],
        truth: List[GridTruth],
        semantic: Maps = None,
        features: Maps = None,
    ) -> Dict[str, torch.Tensor]:
        """
        The binary cross entropy of every pair's logit against who is visible in the overlap. A pair
        weighs as the square root of the share of the smaller instance that is lost if the answer is
        wrong: PQ counts instances, not pixels.

        Args:
            instances, truth: one of each for every image.
            semantic, features: see :meth:`forward`.

        Returns:
            {"loss_srm_pairs": scalar}, and with a score map its "loss_srm". Without a pair the loss
            is 0, with gradients of 0.
        """
        losses, score_maps = {}, None
        if self.score_map is not None:
            logits = [self.score_map(x) for x in instances]
            losses["loss_srm"] = self.score_map.map_loss(logits, truth) * self.score_map.loss_weight
            # As evidence S learns from its own loss only.
            score_maps = [x.detach().softmax(0) for x in logits]
        pairs, answers = self(instances, score_maps, semantic, features)
        shares = torch.cat([_shares_at_stake(*x) for x in zip(instances, truth, pairs)])
        weight = shares.abs().sqrt()
        loss = F.binary_cross_entropy_with_logits(
            answers, (shares > 0).float(), weight=weight, reduction="sum"
        )
        # Pairs that weigh little all together count for little.
        losses["loss_srm_pairs"] = loss / weight.sum().clamp(min=0.1) * self.loss_weight
        _put_accuracy(answers, shares)
        return losses

    def order_inputs(
        self,
        instances: List[GridInstances],
        semantic: Maps = None,
        features: Maps = None,
        with_score_map: bool = True,
    ) -> List[OrderInputs]:
        """
        As :meth:`SpatialRankingHead.order_inputs`, with `pair_margins`: the cells that two instances
        share, times P(a before b) - P(b before a).
        """
        score_maps = None
        if self.score_map is not None and (with_score_map or "score_map" in self.evidence):
            score_maps = [self.score_map(x).softmax(0) for x in instances]
        all_pairs, answers = self(instances, score_maps, semantic, features)
        ranked = []
        for i, (x, pairs, logits) in enumerate(
            zip(instances, all_pairs, answers.split([len(x.a) for x in all_pairs]))
        ):
            margins = x.scores.new_zeros(len(x.scores), len(x.scores))
            margins[pairs.a, pairs.b] = torch.tanh(logits / 2) * pairs.cells
            score_map = None if score_maps is None else score_maps[i]
            ranked.append(
                OrderInputs(x.scores, x.classes, x.masks, score_map, margins - margins.t())
            )
        return ranked


def _shares_at_stake(instances: GridInstances, truth: GridTruth, pairs: Pairs) -> torch.Tensor:
    """
    Returns:
        (P,) float: the cells of the overlap that show a, minus those that show b, as a share of the
        smaller of the two. It is 0 where the ground truth does not decide.
    """
    matched = match_to_segments(instances.masks, instances.classes, truth.ids, truth.segments_info)
    margins = visible_margins(instances.masks, matched, truth.ids)
    smaller = torch.minimum(pairs.areas[pairs.a], pairs.areas[pairs.b])
    return margins[pairs.a, pairs.b] / smaller


def _put_accuracy(answers: torch.Tensor, shares: torch.Tensor) -> None:
    """
    "srm/pair_accuracy" for TensorBoard: the share of the decided pairs that are right, in every 20th
    iteration, which is as often as Detectron2 writes scalars.
    """
    if not has_event_storage() or (get_event_storage().iter + 1) % 20:
        return
    right = ((answers > 0) == (shares > 0))[shares != 0]
    if len(right) > 0:
        get_event_storage().put_scalar("srm/pair_accuracy", float(right.float().mean()))
