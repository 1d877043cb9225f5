from contextlib import contextmanager
from dataclasses import dataclass
from typing import Dict, List, Optional

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, ImageList, Instances

from .instance_tensor import (
    build_instance_tensor,
    gt_masks_to_grid,
    grid_size,
    roi_masks_to_grid,
)
from .panoptic_combiner import combine, semantic_labels
from .ranking import RANKING_RULE_REGISTRY
from .srm_head import build_srm_head

__all__ = ["OANet", "RankingEvidence"]


@contextmanager
def evaluating(module: nn.Module):
    """
    Put a module into evaluation mode and every part of it back into its own mode afterwards.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@dataclass
class RankingEvidence:
    """
    What a ranking rule looks at, for the N instances of one image.

    Attributes:
        scores: (N,) float, detection scores.
        classes: (N,) int64, thing classes.
        masks: (N, h, w) bool, the instances on the grid of the score map. Instances below the
            confidence threshold are not painted, so they do not compete: theirs are empty.
        score_map: (C, h, w) float in [0, 1], or None where no rule asked for it.
    """

    scores: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor
    score_map: Optional[torch.Tensor]

    def __getitem__(self, kept: torch.Tensor) -> "RankingEvidence":
        return RankingEvidence(
            self.scores[kept], self.classes[kept], self.masks[kept], self.score_map
        )

    def order(self, rule: str) -> torch.Tensor:
        """
        Returns:
            (N,) int64: the painting order by the registered rule of that name.
        """
        return RANKING_RULE_REGISTRY.get(rule)(
            self.scores, self.classes, self.masks, self.score_map
        )


@META_ARCH_REGISTRY.register()
class OANet(PanopticFPN):
    """
    Occlusion Aware Network (Liu et al., "An End-to-End Network for Panoptic Segmentation", CVPR
    2019): Panoptic FPN with a spatial ranking module that learns which instance lies on which,
    and a fusion that paints in that order instead of by detection score.

    Parameters are named as in :class:`PanopticFPN`; the ranking module's live under `srm_head`.
    """

    @configurable
    def __init__(
        self,
        *,
        srm_head: nn.Module,
        order: str = "srm_overlap",
        keep_things_free: bool = True,
        return_evidence: bool = False,
        **kwargs,
    ):
        """
        Args:
            srm_head: the spatial ranking head.
            order: name of the rule in RANKING_RULE_REGISTRY that orders the instances.
            keep_things_free: see :func:`semantic_labels`.
            return_evidence: add a "ranking_evidence" (:class:`RankingEvidence`) to every result,
                so that several orders can be compared on the same predictions.

        Other arguments are the same as :class:`PanopticFPN`.
        """
        super().__init__(**kwargs)
        self.srm_head = srm_head
        self.order = order
        self.keep_things_free = keep_things_free
        self.return_evidence = return_evidence

    @classmethod
    def from_config(cls, cfg):
        if not cfg.MODEL.MASK_ON:
            raise ValueError("MODEL.MASK_ON is False; OANet ranks masks, set it to True.")
        if cfg.MODEL.OANET.ORDER not in RANKING_RULE_REGISTRY:
            rules = sorted(name for name, _ in RANKING_RULE_REGISTRY)
            raise ValueError(
                f"MODEL.OANET.ORDER is {cfg.MODEL.OANET.ORDER!r}; it must be one of {rules}."
            )
        ret = super().from_config(cfg)
        ret["srm_head"] = build_srm_head(cfg)
        ret["order"] = cfg.MODEL.OANET.ORDER
        ret["keep_things_free"] = cfg.MODEL.OANET.KEEP_THINGS_FREE
        ret["return_evidence"] = len(cfg.TEST.ORDERS) > 0
        return ret

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: as :meth:`PanopticFPN.forward`; in training with the key
                "panoptic_category" as well: (H, W) int64, the panoptic category of every pixel
                (things in [0, #things), stuff from #things on, or the ignore value).

        Returns:
            in training a dict of losses; otherwise see :meth:`inference`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        sem_seg = self._stack_labels([x["sem_seg"] for x in batched_inputs])
        categories = self._stack_labels([x["panoptic_category"] for x in batched_inputs])

        _, losses = self.sem_seg_head(features, sem_seg)
        proposals, proposal_losses = self.proposal_generator(images, features, gt_instances)
        _, detector_losses = self.roi_heads(images, features, proposals, gt_instances)
        losses.update(proposal_losses)
        losses.update(detector_losses)
        losses.update(self._srm_losses(images, features, gt_instances, categories))
        return losses

    def inference(self, batched_inputs: List[Dict], do_postprocess: bool = True):
        """
        Args:
            batched_inputs: as :meth:`PanopticFPN.inference`.
            do_postprocess: whether to return results at the output resolution.

        Returns:
            as :meth:`PanopticFPN.inference`: a list of dicts with "sem_seg", "instances" and
            "panoptic_seg", plus "ranking_evidence" if `return_evidence` is set; or, without
            post-processing, (list[Instances], list[Tensor]).
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        sem_seg_results, _ = self.sem_seg_head(features, None)
        proposals, _ = self.proposal_generator(images, features, None)
        detector_results, _ = self.roi_heads(images, features, proposals, None)
        if not do_postprocess:
            return detector_results, sem_seg_results

        # Before post-processing, which replaces the mask head's output by full-image masks.
        evidence = self._rank(images, detector_results)
        results = []
        for inputs, image_size, instances, sem_seg, evidence_per_image in zip(
            batched_inputs, images.image_sizes, detector_results, sem_seg_results, evidence
        ):
            height, width = inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
            sem_seg = sem_seg_postprocess(sem_seg, image_size, height, width)
            # Post-processing drops instances whose box is empty; the evidence has to follow.
            instances.kept = torch.arange(len(instances), device=self.device)
            instances = detector_postprocess(instances, height, width)
            evidence_per_image = evidence_per_image[instances.kept]
            instances.remove("kept")
            semantic = semantic_labels(sem_seg, self.keep_things_free)
            panoptic_seg = self.combine(
                instances, semantic, evidence_per_image.order(self.order)
            )
            result = {"sem_seg": sem_seg, "instances": instances, "panoptic_seg": panoptic_seg}
            if self.return_evidence:
                result["ranking_evidence"] = evidence_per_image
            results.append(result)
        return results

    def combine(self, instances: Instances, semantic: torch.Tensor, order: torch.Tensor):
        """
        Fuse one image's post-processed instances and semantic labels in the given painting order.

        Args:
            instances: "pred_masks" (N, H, W) bool, "scores" and "pred_classes".
            semantic: (H, W) int64, see :func:`semantic_labels`.
            order: (N,) int64, first painted first.

        Returns:
            panoptic_seg, segments_info: see :func:`combine`.
        """
        return combine(
            instances.pred_masks,
            instances.scores,
            instances.pred_classes,
            order,
            semantic,
            overlap_threshold=self.combine_overlap_thresh,
            stuff_area_thresh=self.combine_stuff_area_thresh,
            instances_score_thresh=self.combine_instances_score_thresh,
        )

    def _stack_labels(self, label_maps: List[torch.Tensor]) -> torch.Tensor:
        return ImageList.from_tensors(
            [x.to(self.device) for x in label_maps],
            self.backbone.size_divisibility,
            self.sem_seg_head.ignore_value,
            self.backbone.padding_constraints,
        ).tensor

    def _rank(self, images: ImageList, detections: List[Instances]) -> List[RankingEvidence]:
        """
        Run the ranking module on what was detected: one score map per image.
        """
        grids = [
            self._detections_to_grid(instances, images.tensor.shape[-2:])
            for instances in detections
        ]
        score_maps = [None] * len(grids)
        if self.return_evidence or self.order != "score":
            tensors = [
                build_instance_tensor(grid, instances.pred_classes, self.srm_head.num_classes)
                for grid, instances in zip(grids, detections)
            ]
            score_maps = self.srm_head.score_map(self.srm_head(torch.stack(tensors)))
        return [
            RankingEvidence(instances.scores, instances.pred_classes, grid, score_map)
            for instances, grid, score_map in zip(detections, grids, score_maps)
        ]

    def _detections_to_grid(self, instances: Instances, image_size) -> torch.Tensor:
        size = grid_size(image_size, self.srm_head.stride)
        masks = torch.zeros((len(instances), *size), dtype=torch.bool, device=self.device)
        painted = instances.scores >= self.combine_instances_score_thresh
        masks[painted] = roi_masks_to_grid(
            instances.pred_masks[painted, 0],
            instances.pred_boxes.tensor[painted],
            self.srm_head.stride,
            size,
            self.srm_head.mask_threshold,
        )
        return masks

    def _srm_losses(self, images, features, gt_instances, categories) -> Dict[str, torch.Tensor]:
        """
        L_srm on the instance tensors that `srm_head.train_masks` asks for.
        """
        head = self.srm_head
        size = grid_size(images.tensor.shape[-2:], head.stride)
        grids = []
        if head.train_masks in ("gt", "both"):
            grids += [
                gt_masks_to_grid(x.gt_masks, head.stride, size).to(self.device)
                for x in gt_instances
            ]
        if head.train_masks in ("pred", "both"):
            grids += [
                roi_masks_to_grid(masks, boxes, head.stride, size, head.mask_threshold)
                for masks, boxes in self._predict_gt_masks(features, gt_instances)
            ]
        repeats = len(grids) // len(gt_instances)
        classes = [x.gt_classes for x in gt_instances] * repeats
        tensors = [
            build_instance_tensor(grid, c, head.num_classes) for grid, c in zip(grids, classes)
        ]
        return head.losses(head(torch.stack(tensors)), categories.repeat(repeats, 1, 1))

    @torch.no_grad()
    def _predict_gt_masks(self, features, gt_instances):
        """
        The mask head's output on the ground-truth boxes: what the ranking module will see at
        inference, but matched to the ground truth.

        Returns:
            list of (masks (N, M, M) float probabilities, boxes (N, 4)), one for every image.
        """
        given = [
            Instances(
                x.image_size, pred_boxes=Boxes(x.gt_boxes.tensor), pred_classes=x.gt_classes
            )
            for x in gt_instances
        ]
        with evaluating(self.roi_heads):
            predicted = self.roi_heads.forward_with_given_boxes(features, given)
        return [(x.pred_masks[:, 0], x.pred_boxes.tensor) for x in predicted]
