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
    PairNetwork,
    Pairs,
    appearance_means,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
    pair_margins,
)
from ..painting.ranking import OrderInputs
from .grid import GridInstances, GridTruth, Maps
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead

__all__ = ["EVIDENCE", "PairwiseRankingHead"]

# What the network can know about a pair, and how many numbers each is. (Features are not numbers.)
EVIDENCE = {
    "geometry": GEOMETRY_NUMBERS,
    "score_map": CLASS_NUMBERS,
    "semantic": 2 * CLASS_NUMBERS,
    "features": 0,
}


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
        """
        super().__init__()
        self.evidence = tuple(evidence)
        self.loss_weight = loss_weight
        self.score_map = score_map
        self.has_score_map = score_map is not None
        self.network = PairNetwork(
            num_classes,
            sum(EVIDENCE[name] for name in self.evidence),
            feature_channels if "features" in self.evidence else 0,
        )

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        head, evidence, channels = cfg.MODEL.SRM_HEAD, cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE, 0
        for name in evidence:
            if name not in EVIDENCE:
                raise ValueError(
                    f"MODEL.SRM_HEAD.PAIRS.EVIDENCE holds {name!r}; it may hold {tuple(EVIDENCE)}."
                )
        if "score_map" in evidence and head.PAIRS.MAP_LOSS_WEIGHT <= 0:
            raise ValueError(
                "MODEL.SRM_HEAD.PAIRS.EVIDENCE holds 'score_map', but "
                "MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT is 0, so there is no map; set it to 1."
            )
        if "semantic" in evidence and cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff":
            raise ValueError(
                "MODEL.SRM_HEAD.PAIRS.EVIDENCE holds 'semantic', but with "
                "MODEL.SEM_SEG_HEAD.SUPERVISION 'stuff' the semantic head knows no thing classes. "
                "Leave it out, or set SUPERVISION to 'things_and_stuff'."
            )
        if "features" in evidence:
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
            "evidence": evidence,
            "feature_channels": channels,
            "score_map": score_map,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(
        self, instances: List[GridInstances], maps: List[Maps], appearance=appearance_means
    ) -> Tuple[List[Pairs], torch.Tensor]:
        """
        Compare the instances of every image that overlap.

        Args:
            instances: the instances of B images.
            maps: for every image the maps that are evidence; "score_map" is S, (C, h, w) float.
            appearance: a function that computes :func:`appearance_means`.

        Returns:
            the pairs of every image, and (P,) float logits for all of them together, positive where
            a goes before b.
        """
        pairs = [overlapping_pairs(x.masks) for x in instances]
        # One call for all images: the network is so small that a call costs more than its work.
        descriptions = [self._describe(*x, appearance) for x in zip(instances, pairs, maps)]
        return pairs, self.network(*map(torch.cat, zip(*descriptions)))

    def _describe(self, instances: GridInstances, pairs: Pairs, maps: Maps, appearance):
        classes = instances.classes
        number = pairs.a.shape[0]
        numbers = [pairs.areas.new_zeros(number, 2, 0)]
        means = pairs.areas.new_zeros(number, 3, 0)
        if "geometry" in self.evidence:
            numbers.append(geometry_evidence(classes, instances.scores, instances.boxes, pairs))
        if "score_map" in self.evidence:
            numbers.append(class_evidence(maps["score_map"], classes, pairs))
        if "semantic" in self.evidence:
            numbers.append(class_evidence(maps["semantic"].softmax(0), classes, pairs))
            numbers.append(class_evidence(maps["semantic"] / 4, classes, pairs))
        if "features" in self.evidence:
            means = appearance(maps["features"], pairs)
        of_both = torch.stack([classes[pairs.a], classes[pairs.b]], dim=1)
        return of_both, torch.cat(numbers, dim=2), means

    def losses(
        self, instances: List[GridInstances], truth: List[GridTruth], maps: List[Maps]
    ) -> Dict[str, torch.Tensor]:
        """
        The binary cross entropy of every pair's logit against who is visible in the overlap. A pair
        weighs as the square root of the share of the smaller instance that is lost if the answer is
        wrong: PQ counts instances, not pixels.

        Args:
            instances, truth, maps: one of each for every image.

        Returns:
            {"loss_srm_pairs": scalar}, and with a score map its "loss_srm". Without a pair the loss
            is 0, with gradients of 0. "srm/pair_accuracy" for TensorBoard is the share of the pairs
            that the ground truth decides and the head has right.
        """
        losses = {}
        if self.score_map is not None:
            logits = [self.score_map(x) for x in instances]
            losses["loss_srm"] = self.score_map.map_loss(logits, truth)
            # As evidence S learns from its own loss only.
            maps = [{**m, "score_map": x.detach().softmax(0)} for m, x in zip(maps, logits)]
        pairs, answers = self(instances, maps)
        # Of the overlap, the share of the smaller instance that shows a, minus the share that shows b.
        shares = torch.cat([_shares_at_stake(*x) for x in zip(instances, truth, pairs)])
        weight = shares.abs().sqrt()
        loss = F.binary_cross_entropy_with_logits(
            answers, (shares > 0).float(), weight=weight, reduction="sum"
        )
        # Pairs that weigh little all together count for little.
        losses["loss_srm_pairs"] = loss / weight.sum().clamp(min=0.1) * self.loss_weight
        # As often as Detectron2 writes scalars.
        if has_event_storage() and (get_event_storage().iter + 1) % 20 == 0 and shares.any():
            right = ((answers > 0) == (shares > 0))[shares != 0]
            get_event_storage().put_scalar("srm/pair_accuracy", float(right.float().mean()))
        return losses

    def order_inputs(
        self, instances: List[GridInstances], maps: List[Maps], appearance=appearance_means
    ) -> List[OrderInputs]:
        """
        As :meth:`SpatialRankingHead.order_inputs`, with :func:`pair_margins`.
        """
        if self.score_map is not None:
            score_maps = [self.score_map(x).softmax(0) for x in instances]
            maps = [{**m, "score_map": x} for m, x in zip(maps, score_maps)]
        all_pairs, answers = self(instances, maps, appearance)
        logits = answers.split([x.a.shape[0] for x in all_pairs])
        ranked = []
        for x, m, pairs, of_pairs in zip(instances, maps, all_pairs, logits):
            known = m.get("score_map"), pair_margins(pairs, of_pairs)
            ranked.append(OrderInputs(x.scores, x.classes, x.masks, *known))
        return ranked


def _shares_at_stake(instances: GridInstances, truth: GridTruth, pairs: Pairs) -> torch.Tensor:
    matched = match_to_segments(instances.masks, instances.classes, truth.ids, truth.segments_info)
    margins = visible_margins(instances.masks, matched, truth.ids)
    return margins[pairs.a, pairs.b] / torch.minimum(pairs.areas[pairs.a], pairs.areas[pairs.b])
