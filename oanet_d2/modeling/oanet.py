from contextlib import contextmanager
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import ImageList, Instances

from ..painting.fusion import combine
from ..painting.masks import BoxedMasks
from ..painting.ranking import RANKING_RULE_REGISTRY, OrderInputs
from ..painting.semantic import resized_semantic_labels, semantic_labels
from .false_positives import with_false_positives
from .grid import (
    GridInstances,
    detections_on_grid,
    ground_truth_on_grid,
    map_on_grid,
    truth_on_grid,
)
from .semantic_head import OANetSemSegFPNHead
from .srm_head import build_srm_head

__all__ = ["FusionInputs", "OANet"]

OUTPUTS = ("pred_masks", "sem_seg")
TRAIN_MASKS = ("detections", "gt")
MAP_ORDERS = ("srm_mean", "srm_overlap")  # these look at the score map


class FusionInputs(NamedTuple):
    """
    All that the fusion of one image needs, except an order.

    Attributes:
        masks: the N instances' masks at the size of the output.
        instances: post-processed instances with "pred_boxes", "scores" and "pred_classes".
        semantic: (H, W) int64 labels, see :func:`semantic_labels`.
        order_inputs: what the ranking rules look at.
    """

    masks: BoxedMasks
    instances: Instances
    semantic: torch.Tensor
    order_inputs: OrderInputs


@META_ARCH_REGISTRY.register()
class OANet(PanopticFPN):
    """
    Occlusion Aware Network (Liu et al., "An End-to-End Network for Panoptic Segmentation", CVPR
    2019): Panoptic FPN with a ranking module that learns which instance lies on which, and a fusion
    that paints in this order instead of by detection score.

    Parameters are named as in :class:`PanopticFPN`. The ranking module's live under `srm_head`.
    """

    @configurable
    def __init__(
        self,
        *,
        srm_head: nn.Module,
        srm_stride: int = 4,
        srm_in_feature: str = "p2",
        srm_map_stride: int = 4,
        train_masks: str = "detections",
        gt_false_positives: float = 0.0,
        order: str = "srm_pairs",
        keep_things_free: bool = True,
        train_srm_only: bool = False,
        return_fusion_inputs: bool = False,
        outputs: Sequence[str] = OUTPUTS,
        **kwargs,
    ):
        """
        Args:
            srm_head: the ranking head.
            srm_stride: pixels per cell of its grid.
            srm_in_feature: name of the feature map that it may look at.
            srm_map_stride: pixels per cell of that map.
            train_masks: the instances that it learns from: "detections", as inference would give
                them, or "gt", the ground truth.
            gt_false_positives: see :func:`with_false_positives`.
            order: name of the rule in RANKING_RULE_REGISTRY that orders the instances.
            keep_things_free: see :func:`semantic_labels`.
            train_srm_only: only the ranking head learns, see :meth:`set_phase`.
            return_fusion_inputs: see :meth:`inference`.
            outputs: those of PanopticFPN's outputs at full resolution that results hold: "sem_seg",
                and "pred_masks" of the instances. The others are never made.

        Other arguments are the same as :class:`PanopticFPN`.
        """
        super().__init__(**kwargs)
        self.srm_head: Any = srm_head
        self.srm_stride = srm_stride
        self.srm_in_feature = srm_in_feature
        self.srm_map_stride = srm_map_stride
        self.train_masks = train_masks
        self.gt_false_positives = gt_false_positives
        self.order = order
        self.keep_things_free = keep_things_free
        self.return_fusion_inputs = return_fusion_inputs
        self.outputs = tuple(outputs)
        self.phase = "all"
        if train_srm_only:
            self.set_phase("ranking")

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        shapes = ret["backbone"].output_shape()
        in_feature = cfg.MODEL.SRM_HEAD.IN_FEATURE
        ret.update(
            {
                "srm_head": build_srm_head(cfg, shapes),
                "srm_stride": cfg.MODEL.SRM_HEAD.STRIDE,
                "srm_in_feature": in_feature,
                "srm_map_stride": shapes[in_feature].stride if in_feature in shapes else 4,
                "train_masks": cfg.MODEL.SRM_HEAD.TRAIN_MASKS,
                "gt_false_positives": cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES,
                "order": cfg.MODEL.OANET.ORDER,
                "keep_things_free": cfg.MODEL.OANET.KEEP_THINGS_FREE,
                "train_srm_only": cfg.MODEL.OANET.TRAIN_SRM_ONLY,
                "return_fusion_inputs": len(cfg.TEST.ORDERS) > 0,
                "outputs": cfg.MODEL.OANET.OUTPUTS,
            }
        )
        _check(cfg, ret)
        return ret

    def set_phase(self, phase: str) -> None:
        """
        Args:
            phase: what learns from now on. "all"; "network", everything but the ranking head, which
                is not run in training; or "ranking", the ranking head alone: everything else gets no
                gradient and stays in evaluation mode, so that no running statistic moves either.
                There is no way back from "ranking": what it froze stays frozen.
        """
        if phase == "ranking":
            self.requires_grad_(False)
        self.srm_head.requires_grad_(phase != "network")
        self.phase = phase
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.phase == "ranking":
            for name, module in self.named_children():
                module.train(name == "srm_head")
        return self

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: as :meth:`PanopticFPN.forward`. Training needs two more keys:
                "panoptic_category": (H, W) int64, the panoptic category of every pixel (things in
                [0, #things), stuff from #things on, void -1), and "panoptic_seg": (H, W) int64
                segment ids and their segments_info.

        Returns:
            in training a dict of losses; otherwise see :meth:`inference`.
        """
        return self.losses(batched_inputs) if self.training else self.inference(batched_inputs)

    def losses(self, batched_inputs: List[Dict]) -> Dict[str, torch.Tensor]:
        """
        The losses of the part that learns (:meth:`set_phase`), by name.
        """
        images = self.preprocess_image(batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        network_learns = self.phase != "ranking"
        with torch.set_grad_enabled(torch.is_grad_enabled() and network_learns):
            features = self.backbone(images.tensor)
            semantic = self.sem_seg_head.layers(features)
            proposals, losses = self.proposal_generator(images, features, gt_instances)
            if network_learns:
                losses.update(self.roi_heads(images, features, proposals, gt_instances)[1])
                losses.update(self.sem_seg_head.losses(semantic, self._labels(batched_inputs)))
        if self.phase == "network":
            return losses
        detected = self._detect_in_training(images, features, proposals)
        with torch.autocast(self.device.type, enabled=False):
            instances = self._training_instances(detected, gt_instances)
            truth = [truth_on_grid(x, self.srm_stride, self.device) for x in batched_inputs]
            maps = self.ranking_maps(images, semantic, features)
            losses.update(self.srm_head.losses(instances, truth, *maps))
        return losses

    def _labels(self, batched_inputs: List[Dict]) -> torch.Tensor:
        return ImageList.from_tensors(
            [x["sem_seg"].to(self.device) for x in batched_inputs],
            self.backbone.size_divisibility,
            self.sem_seg_head.ignore_value,
            self.backbone.padding_constraints,
        ).tensor

    @torch.no_grad()
    def _detect_in_training(self, images: ImageList, features: Dict, proposals: List[Instances]):
        if self.train_masks == "gt":
            return []
        # Proposals come with the best first. Inference would take this many.
        most = getattr(self.proposal_generator, "post_nms_topk", {}).get(False)
        with _evaluating(self.roi_heads):
            return self._detect(images, features, [x[:most] for x in proposals], all_masks=False)

    @torch.no_grad()
    def _training_instances(self, detected: List[Instances], gt_instances: List[Instances]):
        """
        The instances that the ranking head learns from, for every image.
        """
        if self.train_masks == "detections":
            return [self._on_grid(x) for x in detected]
        num_classes, probability = self.roi_heads.num_classes, self.gt_false_positives
        on_grid = [ground_truth_on_grid(x, self.srm_stride) for x in gt_instances]
        return [with_false_positives(x, num_classes, probability) for x in on_grid]

    def _on_grid(self, detected: Instances) -> GridInstances:
        threshold = self.combine_instances_score_thresh
        return detections_on_grid(detected, self.srm_stride, threshold)

    def ranking_maps(self, images: ImageList, semantic: torch.Tensor, features: Dict):
        """
        What the image itself tells the ranking head, on the head's grid. It is detached: the ranking
        must not change what it looks at. (Its loss would lower the quality of the other branches.)

        Returns:
            logits of the semantic branch for the thing classes, (C, h, w) float for every image, or
            None where it knows none; and the feature map, (channels, h, w) float for every image,
            or None where there is no map of that name.
        """
        num_things = self.sem_seg_head.num_things
        maps = (
            (semantic[:, :num_things] if num_things > 0 else None, self.sem_seg_head.common_stride),
            (features.get(self.srm_in_feature), self.srm_map_stride),
        )
        return [
            x
            if x is None
            else [
                map_on_grid(y, stride, self.srm_stride, size)
                for y, size in zip(x.detach().float(), images.image_sizes)
            ]
            for x, stride in maps
        ]

    def inference(
        self,
        batched_inputs: List[Dict],
        do_postprocess: bool = True,
        return_fusion_inputs: Optional[bool] = None,
    ):
        """
        Args:
            batched_inputs: as :meth:`PanopticFPN.inference`.
            do_postprocess: whether to return results at the output resolution.
            return_fusion_inputs: add "fusion_inputs" (:class:`FusionInputs`) to every result, so that
                :meth:`combine` can paint the same predictions in several orders. By default as the
                model was built.

        Returns:
            as :meth:`PanopticFPN.inference`: a list of dicts with "instances" and "panoptic_seg", and
            with "sem_seg" and the instances' "pred_masks" as far as `outputs` names them. Without
            post-processing (list[Instances], list[Tensor]).
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        semantic = self.sem_seg_head.layers(features)
        proposals, _ = self.proposal_generator(images, features, None)
        all_masks = "pred_masks" in self.outputs or not do_postprocess
        detected = self._detect(images, features, proposals, all_masks)
        if not do_postprocess:
            return detected, self.sem_seg_head.predict(semantic)

        if return_fusion_inputs is None:
            return_fusion_inputs = self.return_fusion_inputs
        with torch.autocast(self.device.type, enabled=False):
            order_inputs = self._rank(images, semantic, features, detected, return_fusion_inputs)
            del features  # the largest tensors
            results = []
            for x, image_size, *of_image in zip(
                batched_inputs, images.image_sizes, detected, semantic.float(), order_inputs
            ):
                size = x.get("height", image_size[0]), x.get("width", image_size[1])
                result, fusion_inputs = self._postprocess(image_size, size, *of_image)
                order = fusion_inputs.order_inputs.order(self.order)
                result["panoptic_seg"] = self.combine(fusion_inputs, order)
                if return_fusion_inputs:
                    result["fusion_inputs"] = fusion_inputs
                results.append(result)
        return results

    def _detect(
        self, images, features: Dict, proposals: List[Instances], all_masks: bool
    ) -> List[Instances]:
        """
        What the ROI heads give in evaluation mode. Without `all_masks` only instances that will be
        painted get a mask, if the heads work in Detectron2's two steps; the masks of others are 0.
        """
        heads = self.roi_heads
        in_two_steps = getattr(heads.forward, "__func__", None) is StandardROIHeads.forward
        if all_masks or not in_two_steps:
            return heads(images, features, proposals, None)[0]
        detected = heads._forward_box(features, proposals)
        painted = [x.scores >= self.combine_instances_score_thresh for x in detected]
        chosen = [x[indices] for x, indices in zip(detected, painted)]
        for x, indices, y in zip(
            detected, painted, heads.forward_with_given_boxes(features, chosen)
        ):
            x.pred_masks = y.pred_masks.new_zeros(len(x), *y.pred_masks.shape[1:])
            x.pred_masks[indices] = y.pred_masks
        return detected

    def _rank(
        self, images, semantic, features, detected: List[Instances], for_all_orders: bool
    ) -> List[OrderInputs]:
        if self.order == "score" and not for_all_orders:
            return [
                OrderInputs(x.scores, x.pred_classes, x.pred_masks.new_zeros(len(x), 0, 0).bool())
                for x in detected
            ]
        with_score_map = self.srm_head.has_score_map and (for_all_orders or self.order != "srm_pairs")
        maps = self.ranking_maps(images, semantic, features)
        instances = [self._on_grid(x) for x in detected]
        return self.srm_head.order_inputs(instances, *maps, with_score_map=with_score_map)

    def _postprocess(self, image_size, size, detected: Instances, logits, order_inputs: OrderInputs):
        """
        One image's result at `size` = (H, W), still without "panoptic_seg", and its fusion inputs.
        """
        # Detectron2 would make a full image of each mask, so it post-processes the rest alone. It
        # drops instances with an empty box; `index` tells which are left.
        roi_masks = detected.pred_masks[:, 0]
        instances = Instances(image_size, **detected.get_fields())
        instances.remove("pred_masks")
        instances.set("index", torch.arange(len(detected), device=self.device))
        instances = detector_postprocess(instances, *size)
        left = instances.index
        instances.remove("index")
        masks = BoxedMasks.paste(roi_masks[left], instances.pred_boxes.tensor, size)
        result = {"instances": instances}
        if "pred_masks" in self.outputs:
            instances.pred_masks = masks.full()
        if "sem_seg" in self.outputs:
            sem_seg = self.sem_seg_head.predict(logits[None])[0]
            result["sem_seg"] = sem_seg_postprocess(sem_seg, image_size, *size)
            labels = semantic_labels(result["sem_seg"], self.keep_things_free)
        else:
            labels = resized_semantic_labels(
                self.sem_seg_head.stuff_scores(logits[None])[0],
                self.sem_seg_head.common_stride,
                image_size,
                size,
                self.keep_things_free,
            )
        return result, FusionInputs(masks, instances, labels, order_inputs[left])

    def combine(self, fusion_inputs: FusionInputs, order: torch.Tensor):
        """
        Fuse one image's instances and semantic labels in the given painting order.

        Args:
            fusion_inputs: from :meth:`inference`.
            order: (N,) int64, first painted first.

        Returns:
            panoptic_seg, segments_info: see :func:`oanet_d2.painting.fusion.combine`.
        """
        return combine(
            fusion_inputs.masks,
            fusion_inputs.instances.scores,
            fusion_inputs.instances.pred_classes,
            order,
            fusion_inputs.semantic,
            overlap_threshold=self.combine_overlap_thresh,
            stuff_area_thresh=self.combine_stuff_area_thresh,
            instances_score_thresh=self.combine_instances_score_thresh,
        )


@contextmanager
def _evaluating(module: nn.Module):
    """
    Evaluation mode for a module, and for every part its own mode afterwards.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _check(cfg, ret: Dict) -> None:
    """
    Raises:
        ValueError: keys of the config contradict each other or the parts of the model.
    """
    if not cfg.MODEL.MASK_ON:
        raise ValueError("MODEL.MASK_ON is False; OANet ranks masks, so set it to True.")
    if not isinstance(ret["sem_seg_head"], OANetSemSegFPNHead):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NAME is {cfg.MODEL.SEM_SEG_HEAD.NAME!r}; OANet needs "
            "'OANetSemSegFPNHead' or a subclass. (With SUPERVISION 'stuff' that is Panoptic FPN's.)"
        )
    head = cfg.MODEL.SRM_HEAD
    if head.TRAIN_MASKS not in TRAIN_MASKS:
        raise ValueError(
            f"MODEL.SRM_HEAD.TRAIN_MASKS is {head.TRAIN_MASKS!r}; it must be one of {TRAIN_MASKS}."
        )
    if not 0 <= head.GT_FALSE_POSITIVES <= 1:
        raise ValueError(
            f"MODEL.SRM_HEAD.GT_FALSE_POSITIVES is {head.GT_FALSE_POSITIVES}; it is a probability "
            "and must lie in [0, 1]."
        )
    for map_stride in (ret["sem_seg_head"].common_stride, ret["srm_map_stride"]):
        if head.STRIDE < 1 or (head.STRIDE % map_stride and map_stride % head.STRIDE):
            raise ValueError(
                f"MODEL.SRM_HEAD.STRIDE is {head.STRIDE}; the feature maps have the stride "
                f"{map_stride}, so it must be a multiple or a divisor of {map_stride}."
            )
    for name in cfg.MODEL.OANET.OUTPUTS:
        if name not in OUTPUTS:
            raise ValueError(
                f"MODEL.OANET.OUTPUTS holds {name!r}; it must be some or none of {OUTPUTS}."
            )
    _check_order("MODEL.OANET.ORDER", cfg.MODEL.OANET.ORDER, ret["srm_head"])
    for order in cfg.TEST.ORDERS:
        if order != "oracle":
            _check_order("TEST.ORDERS", order, ret["srm_head"])


def _check_order(key: str, order: str, srm_head: nn.Module) -> None:
    if order not in RANKING_RULE_REGISTRY:
        rules = sorted(name for name, _ in RANKING_RULE_REGISTRY)
        raise ValueError(f"{key} has the order {order!r}; it must be one of {rules}.")
    if order == "srm_pairs" and not srm_head.has_pair_margins:
        raise ValueError(
            f"{key} has the order 'srm_pairs', which needs MODEL.SRM_HEAD.NAME "
            "'PairwiseRankingHead'."
        )
    if order in MAP_ORDERS and not srm_head.has_score_map:
        raise ValueError(
            f"{key} has the order {order!r}, which needs the score map; set "
            "MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT to 1, so that it is trained, or leave the order out."
        )
