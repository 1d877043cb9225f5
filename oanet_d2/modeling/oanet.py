import random
from contextlib import contextmanager
from typing import Dict, List, Sequence, Union

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, ImageList, Instances

from .candidates import (
    Candidates,
    RankingTarget,
    grid_size,
    gt_candidates,
    ranking_target,
    relative_boxes,
    roi_masks_to_grid,
)
from .detection import detect
from .execution import Execution
from .false_positives import with_false_positives
from .instance_masks import BoxedMasks
from .pair_head import PairwiseRankingHead
from .panoptic_combiner import combine
from .proposals import propose
from .ranking import RANKING_RULE_REGISTRY, RankingEvidence
from .semantic_labels import resized_semantic_labels, semantic_labels
from .srm_head import SpatialRankingHead, build_srm_head

__all__ = ["OANet"]

OUTPUTS = ("pred_masks", "sem_seg")


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


@META_ARCH_REGISTRY.register()
class OANet(PanopticFPN):
    """
    Occlusion Aware Network (Liu et al., "An End-to-End Network for Panoptic Segmentation", CVPR
    2019): Panoptic FPN with a spatial ranking module that learns which instance lies on which,
    and a fusion that paints in that order instead of by detection score.

    Parameters are named as in :class:`PanopticFPN`; the ranking module's live under `srm_head`.
    """

    srm_head: SpatialRankingHead

    @configurable
    def __init__(
        self,
        *,
        srm_head: SpatialRankingHead,
        srm_in_feature: str = "p2",
        order: str = "srm_overlap",
        keep_things_free: bool = True,
        train_srm_only: bool = False,
        return_evidence: bool = False,
        outputs: Sequence[str] = OUTPUTS,
        execution: Execution = Execution(),
        **kwargs,
    ):
        """
        Args:
            srm_head: the spatial ranking head.
            srm_in_feature: the feature map that it is given.
            order: name of the rule in RANKING_RULE_REGISTRY that orders the instances.
            keep_things_free: see :func:`semantic_labels`.
            train_srm_only: only the ranking head learns. Everything else is frozen: it gets no
                gradient and stays in evaluation mode, so that no running statistic moves either.
            return_evidence: add a "ranking_evidence" (:class:`RankingEvidence`) to every result,
                so that several orders can be compared on the same predictions.
            outputs: which of PanopticFPN's outputs at full resolution results hold: "sem_seg",
                and "pred_masks" of the instances. What is not asked for is never made.
            execution: how the network is run.

        Other arguments are the same as :class:`PanopticFPN`.
        """
        super().__init__(**kwargs)
        self.srm_head = srm_head
        self.srm_in_feature = srm_in_feature
        self.order = order
        self.keep_things_free = keep_things_free
        self.learns = "all"
        self.return_evidence = return_evidence
        self.outputs = outputs
        self.execution = execution
        if train_srm_only:
            self.learn_only("srm")
        execution.prepare(self)

    @classmethod
    def from_config(cls, cfg):
        if not cfg.MODEL.MASK_ON:
            raise ValueError("MODEL.MASK_ON is False; OANet ranks masks, set it to True.")
        if cfg.MODEL.OANET.ORDER not in RANKING_RULE_REGISTRY:
            rules = sorted(name for name, _ in RANKING_RULE_REGISTRY)
            raise ValueError(
                f"MODEL.OANET.ORDER is {cfg.MODEL.OANET.ORDER!r}; it must be one of {rules}."
            )
        for name in cfg.MODEL.OANET.OUTPUTS:
            if name not in OUTPUTS:
                raise ValueError(
                    f"MODEL.OANET.OUTPUTS holds {name!r}; it must be some or none of {OUTPUTS}."
                )
        if cfg.TEST.ORDERS and set(cfg.MODEL.OANET.OUTPUTS) != set(OUTPUTS):
            raise ValueError(
                f"MODEL.OANET.OUTPUTS is {cfg.MODEL.OANET.OUTPUTS}, but comparing the orders of "
                f"TEST.ORDERS needs all of {OUTPUTS}. Set one or the other to ()."
            )
        ret = super().from_config(cfg)
        ret["srm_head"] = build_srm_head(cfg, ret["backbone"].output_shape())
        orders = {"MODEL.OANET.ORDER": (cfg.MODEL.OANET.ORDER,), "TEST.ORDERS": cfg.TEST.ORDERS}
        for key, names in orders.items():
            if "srm_pairs" in names and not isinstance(ret["srm_head"], PairwiseRankingHead):
                raise ValueError(
                    f"{key} is or holds 'srm_pairs', which needs MODEL.SRM_HEAD.NAME "
                    f"'PairwiseRankingHead', but that is {cfg.MODEL.SRM_HEAD.NAME!r}."
                )
        ret["srm_in_feature"] = cfg.MODEL.SRM_HEAD.IN_FEATURE
        ret["order"] = cfg.MODEL.OANET.ORDER
        ret["keep_things_free"] = cfg.MODEL.OANET.KEEP_THINGS_FREE
        ret["train_srm_only"] = cfg.MODEL.OANET.TRAIN_SRM_ONLY
        ret["return_evidence"] = len(cfg.TEST.ORDERS) > 0
        ret["outputs"] = cfg.MODEL.OANET.OUTPUTS
        ret["execution"] = Execution.from_config(cfg)
        return ret

    def learn_only(self, part: str):
        """
        From now on only a part of the model learns.

        Args:
            part: "srm", the ranking head: everything else is frozen, and in evaluation mode. Or
                "network", everything else: the ranking head is not run in training.
        """
        self.learns = part
        if part == "srm":
            self.requires_grad_(False)
        self.srm_head.requires_grad_(part == "srm")
        self.srm_head.remembers = part == "srm"  # then its evidence stays what it is
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.learns == "srm":
            for name, module in self.named_children():
                module.train(name == "srm_head")
        return self

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: as :meth:`PanopticFPN.forward`; in training with two more keys:
                "panoptic_category": (H, W) int64, the panoptic category of every pixel (things
                in [0, #things), stuff from #things on, or the ignore value), and
                "panoptic_seg": (H, W) int64 segment ids and their segments_info.

        Returns:
            in training a dict of losses; otherwise see :meth:`inference`.
        """
        if not self.training:
            num_pixels = sum(x["image"].shape[1] * x["image"].shape[2] for x in batched_inputs)
            with self.execution.inference(self.device, num_pixels):
                return self.inference(batched_inputs)
        with self.execution.training(self.device):
            return self.losses(batched_inputs)

    def losses(self, batched_inputs: List[Dict]) -> Dict[str, torch.Tensor]:
        """
        The losses of what learns (see :meth:`learn_only`), by name.
        """
        images = self.preprocess_image(batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        network_learns = self.learns != "srm"
        # With nothing to learn outside the ranking head, nothing is kept for a backward pass.
        with torch.set_grad_enabled(torch.is_grad_enabled() and network_learns):
            features, proposals, losses = propose(
                self.backbone, self.proposal_generator, images, gt_instances
            )
            semantic = self.sem_seg_head.layers(features)
            if network_learns:
                _, detector_losses = self.roi_heads(images, features, proposals, gt_instances)
                losses.update(detector_losses)
                losses.update(self._semantic_losses(semantic, batched_inputs))
        if self.learns == "network":
            return losses

        kind = random.choice(self.srm_head.train_masks)
        candidates = self.training_candidates(kind, images, features, proposals, gt_instances)
        targets = self.ranking_targets(images, batched_inputs)
        maps = self.ranking_maps(images, semantic, features)
        losses.update(self.srm_head.losses(candidates, targets, *maps))
        return losses

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        images = super().preprocess_image(batched_inputs)
        images.tensor = self.execution.images(images.tensor)
        return images

    def _semantic_losses(self, semantic: torch.Tensor, batched_inputs: List[Dict]):
        labels = ImageList.from_tensors(
            [x["sem_seg"].to(self.device) for x in batched_inputs],
            self.backbone.size_divisibility,
            self.sem_seg_head.ignore_value,
            self.backbone.padding_constraints,
        )
        return self.sem_seg_head.losses(semantic, labels.tensor)

    def inference(self, batched_inputs: List[Dict], do_postprocess: bool = True):
        """
        Args:
            batched_inputs: as :meth:`PanopticFPN.inference`.
            do_postprocess: whether to return results at the output resolution.

        Returns:
            as :meth:`PanopticFPN.inference`: a list of dicts with "sem_seg", "instances" and
            "panoptic_seg", plus "ranking_evidence" if `return_evidence` is set; or, without
            post-processing, (list[Instances], list[Tensor]). "sem_seg" and the instances'
            "pred_masks" are there if `outputs` names them.
        """
        images = self.preprocess_image(batched_inputs)
        features, proposals, _ = propose(self.backbone, self.proposal_generator, images)
        semantic = self.sem_seg_head.layers(features)
        # A mask that is neither returned nor painted is not made.
        every_mask = "pred_masks" in self.outputs or not do_postprocess
        threshold = -torch.inf if every_mask else self.combine_instances_score_thresh
        detector_results = detect(self.roi_heads, images, features, proposals, threshold)
        if not do_postprocess:
            return detector_results, self.sem_seg_head.predict(semantic)

        # Before post-processing, which scales the boxes.
        evidence = self._rank(images, semantic, features, detector_results)
        del features  # the largest tensors that there are, and not needed any more
        results = []
        for inputs, image_size, instances, logits, evidence_per_image in zip(
            batched_inputs, images.image_sizes, detector_results, semantic, evidence
        ):
            size = inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
            result = self._postprocess(image_size, size, instances, logits, evidence_per_image)
            results.append(result)
        return results

    def _postprocess(self, image_size, size, instances, logits, evidence) -> Dict:
        """
        One image's result at `size` = (H, W), from what the network made of it at `image_size`.
        """
        # Not with its masks: Detectron2 would make a full image of each.
        roi_masks = instances.pred_masks[:, 0]
        instances.remove("pred_masks")
        # Post-processing drops instances whose box is empty; the evidence has to follow.
        instances.kept = torch.arange(len(instances), device=self.device)
        instances = detector_postprocess(instances, *size)
        kept = instances.kept
        instances.remove("kept")
        masks = BoxedMasks(roi_masks[kept], instances.pred_boxes.tensor, size)
        evidence = evidence[kept]
        result = {"instances": instances}
        if "pred_masks" in self.outputs:
            instances.pred_masks = masks.full()
        if "sem_seg" in self.outputs:
            sem_seg = self.sem_seg_head.predict(logits[None])[0]
            result["sem_seg"] = sem_seg_postprocess(sem_seg, image_size, *size)
            semantic = semantic_labels(result["sem_seg"], self.keep_things_free)
        else:
            scores = self.sem_seg_head.stuff_scores(logits[None])[0]
            stride = self.sem_seg_head.common_stride
            semantic = resized_semantic_labels(
                scores, stride, image_size, size, self.keep_things_free
            )
        order = evidence.order(self.order)
        result["panoptic_seg"] = self.combine(masks, instances, semantic, order)
        if self.return_evidence:
            result["ranking_evidence"] = evidence
        return result

    def combine(
        self,
        masks: Union[BoxedMasks, torch.Tensor],
        instances: Instances,
        semantic: torch.Tensor,
        order: torch.Tensor,
    ):
        """
        Fuse one image's post-processed instances and semantic labels in the given painting order.

        Args:
            masks: of the N instances. Without "pred_masks" in `outputs` those of instances below
                the confidence threshold, which are not painted, are empty.
            instances: "scores" and "pred_classes".
            semantic: (H, W) int64, see :func:`semantic_labels`.
            order: (N,) int64, first painted first.

        Returns:
            panoptic_seg, segments_info: see :func:`combine`.
        """
        return combine(
            masks,
            instances.scores,
            instances.pred_classes,
            order,
            semantic,
            overlap_threshold=self.combine_overlap_thresh,
            stuff_area_thresh=self.combine_stuff_area_thresh,
            instances_score_thresh=self.combine_instances_score_thresh,
        )

    def _rank(self, images, semantic, features, detections) -> List[RankingEvidence]:
        """
        Run the ranking module on what was detected.
        """
        if self.order == "score" and not self.return_evidence:
            return [
                RankingEvidence(x.scores, x.pred_classes, x.pred_masks.new_zeros(len(x), 0, 0))
                for x in detections
            ]
        candidates = [self._detected(images, x) for x in detections]
        of_things, feature_map = self.ranking_maps(images, semantic, features)
        with_map = self.return_evidence or self.order != "srm_pairs"
        return self.srm_head.evidence(candidates, of_things, feature_map, with_map=with_map)

    def ranking_maps(self, images: ImageList, semantic: torch.Tensor, features: Dict):
        """
        The image's part of the evidence, on the grid of the ranking module. Detached: it is
        evidence, not something that the ranking may change. (Attached, its loss lowers the
        quality of the semantic and the instance branch.)

        Returns:
            logits of the semantic branch for the thing classes, (B, C, h, w), or None where it
            knows none; and the feature map, (B, channels, h, w), or None where there is none of
            that name (a head that looks at it refuses to be built then).
        """
        size = grid_size(images.tensor.shape[-2:], self.srm_head.stride)
        num_things = self.sem_seg_head.num_things
        of_things = semantic[:, :num_things] if num_things > 0 else None
        maps = (of_things, features.get(self.srm_in_feature))
        return tuple(x if x is None else _resize(x.detach(), size) for x in maps)

    def _detected(self, images: ImageList, instances: Instances) -> Candidates:
        """
        Candidates from what the ROI heads return. Instances below the confidence threshold will
        not be painted, so they do not compete: their masks are empty.
        """
        size = grid_size(images.tensor.shape[-2:], self.srm_head.stride)
        masks = torch.zeros((len(instances), *size), dtype=torch.bool, device=self.device)
        painted = instances.scores >= self.combine_instances_score_thresh
        boxes = instances.pred_boxes.tensor
        masks[painted] = roi_masks_to_grid(
            instances.pred_masks[painted, 0],
            boxes[painted],
            self.srm_head.stride,
            size,
            self.srm_head.mask_threshold,
        )
        return Candidates(
            masks,
            instances.pred_classes,
            instances.scores.float(),  # autocast on a CPU leaves them in half precision
            relative_boxes(boxes, instances.image_size),
        )

    @torch.no_grad()
    def training_candidates(
        self, kind: str, images, features, proposals, gt_instances
    ) -> List[Candidates]:
        """
        The instances to learn the ranking from.

        Args:
            kind: one of `MODEL.SRM_HEAD.TRAIN_MASKS`.
            images, features, proposals, gt_instances: as the ROI heads take them in training.

        Returns:
            one for each image.
        """
        make = {
            "gt": self._ground_truth,
            "pred": self._predicted_on_gt_boxes,
            "detections": self._detected_in_training,
        }
        with evaluating(self.roi_heads):
            return make[kind](images, features, proposals, gt_instances)

    def _ground_truth(self, images, features, proposals, gt_instances) -> List[Candidates]:
        head = self.srm_head
        size = grid_size(images.tensor.shape[-2:], head.stride)
        return [
            with_false_positives(
                gt_candidates(x, head.stride, size), head.num_classes, head.gt_false_positives
            )
            for x in gt_instances
        ]

    def _predicted_on_gt_boxes(self, images, features, proposals, gt_instances):
        given = [
            Instances(
                x.image_size,
                pred_boxes=Boxes(x.gt_boxes.tensor),
                pred_classes=x.gt_classes,
                scores=torch.ones_like(x.gt_classes, dtype=torch.float32),
            )
            for x in gt_instances
        ]
        predicted = self.roi_heads.forward_with_given_boxes(features, given)
        return [self._detected(images, x) for x in predicted]

    def _detected_in_training(self, images, features, proposals, gt_instances):
        # As many proposals as there are at inference; they come with the best first.
        most = getattr(self.proposal_generator, "post_nms_topk", {}).get(False)
        detected = detect(
            self.roi_heads,
            images,
            features,
            [x[:most] for x in proposals],
            self.combine_instances_score_thresh,
        )
        return [self._detected(images, x) for x in detected]

    def ranking_targets(self, images: ImageList, batched_inputs) -> List[RankingTarget]:
        """
        The ground truth of every image, on the grid of the ranking module.
        """
        size = grid_size(images.tensor.shape[-2:], self.srm_head.stride)
        return [ranking_target(x, self.srm_head, size, self.device) for x in batched_inputs]


def _resize(maps: torch.Tensor, size) -> torch.Tensor:
    return maps if maps.shape[-2:] == size else F.adaptive_avg_pool2d(maps, size)
