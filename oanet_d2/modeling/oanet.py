from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.evaluation import inference_context
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.projects.point_rend import ImplicitPointRendMaskHead
from detectron2.structures import ImageList, Instances

from ..painting.fusion import combine
from ..painting.masks import BoxedMasks
from ..painting.ranking import RANKING_RULE_REGISTRY, OrderInputs
from ..painting.semantic import resized_semantic_labels, semantic_labels
from .false_positives import with_false_positives
from .grid import (
    GridInstances,
    Maps,
    detections_on_grid,
    ground_truth_on_grid,
    map_on_grid,
    truth_on_grid,
)
from .semantic_head import SemanticBranch, semantic_branch
from .srm_head import build_srm_head

__all__ = ["FusionInputs", "OANet", "check_orders"]

OUTPUTS = ("pred_masks", "sem_seg")
TRAIN_MASKS = ("detections", "gt")
# They find boxes first, then what is in them.
IN_TWO_STEPS = (StandardROIHeads.forward, CascadeROIHeads.forward)


class FusionInputs(NamedTuple):
    """All that the fusion of one image needs, except an order."""

    masks: BoxedMasks  # the N instances' masks at the size of the output
    instances: Instances  # post-processed, with "pred_boxes", "scores" and "pred_classes"
    semantic: torch.Tensor  # (H, W) int64 labels, see semantic_labels()
    order_inputs: OrderInputs  # what the ranking rules look at


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
        self.train_masks = train_masks
        self.gt_false_positives = gt_false_positives
        self.order = order
        self.keep_things_free = keep_things_free
        self.return_fusion_inputs = return_fusion_inputs
        self.outputs = tuple(outputs)
        self.phase = "all"
        _check_parts(self)
        if train_srm_only:
            self.set_phase("ranking")

    @classmethod
    def from_config(cls, cfg):
        ret, head = super().from_config(cfg), cfg.MODEL.SRM_HEAD
        srm_head = build_srm_head(cfg, ret["backbone"].output_shape())
        _check(cfg, ret["backbone"], ret["sem_seg_head"], srm_head)
        return {
            **ret,
            "srm_head": srm_head,
            "srm_stride": head.STRIDE,
            "srm_in_feature": head.IN_FEATURE,
            "train_masks": head.TRAIN_MASKS,
            "gt_false_positives": head.GT_FALSE_POSITIVES,
            "order": cfg.MODEL.OANET.ORDER,
            "keep_things_free": cfg.MODEL.OANET.KEEP_THINGS_FREE,
            "train_srm_only": cfg.MODEL.OANET.TRAIN_SRM_ONLY,
            "return_fusion_inputs": len(cfg.TEST.ORDERS) > 0,
            "outputs": cfg.MODEL.OANET.OUTPUTS,
        }

    @property
    def semantic_branch(self) -> SemanticBranch:
        return semantic_branch(self.sem_seg_head)

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
        """The losses of the part that learns (:meth:`set_phase`), by name."""
        images = self.preprocess_image(batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        network_learns = self.phase != "ranking"
        with torch.set_grad_enabled(torch.is_grad_enabled() and network_learns):
            features = self.backbone(images.tensor)
            head = self.semantic_branch
            needed = network_learns or head.num_things > 0
            semantic: Any = head.layers(features) if needed else None
            proposals, losses = self.proposal_generator(images, features, gt_instances)
            if network_learns:
                losses.update(self._roi_losses(images, features, proposals, gt_instances))
                losses.update(head.losses(semantic, self._labels(batched_inputs)))
        if self.phase == "network":
            return losses
        instances = self._training_instances(images, features, proposals, gt_instances)
        with torch.autocast(self.device.type, enabled=False):
            truth = [truth_on_grid(x, self.srm_stride, self.device) for x in batched_inputs]
            maps = self.ranking_maps(images.image_sizes, semantic, features)
            losses.update(self.srm_head.losses(instances, truth, maps))
        return losses

    def _roi_losses(self, images, features, proposals, gt: List[Instances]) -> Dict[str, torch.Tensor]:
        heads = self.roi_heads
        if any(map(len, gt)) or not getattr(getattr(heads, "mask_head", None), "mask_point_on", False):
            return heads(images, features, proposals, gt)[1]
        # PointRend's mask losses fail in a batch without a thing. Losses of 0 give all of its parameters
        # a gradient, as DistributedDataParallel wants.
        sampled = heads.label_and_sample_proposals(proposals, gt)
        targets = [gt] if isinstance(heads, CascadeROIHeads) else []
        losses = heads._forward_box(features, sampled, *targets)
        losses.update(heads._forward_keypoint(features, sampled))
        nothing = 0 * sum(x.sum() for x in heads.mask_head.parameters())
        first = "loss_l2" if isinstance(heads.mask_head, ImplicitPointRendMaskHead) else "loss_mask"
        return {**losses, first: nothing, "loss_mask_point": nothing}

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """As PanopticFPN's. A ValueError says that an image does not fit the backbone's square."""
        side = self.backbone.padding_constraints.get("square_size", 0)
        largest = max(max(x["image"].shape[1:]) for x in batched_inputs)
        if 0 < side < largest:  # Detectron2 would cut it off
            raise ValueError(
                f"An image has a side of {largest} pixels, but the backbone wants squares of {side}. Set "
                f"INPUT.MAX_SIZE_TRAIN, INPUT.MAX_SIZE_TEST and TEST.AUG.MAX_SIZE to at most {side}."
            )
        return super().preprocess_image(batched_inputs)

    def _labels(self, batched_inputs: List[Dict]) -> torch.Tensor:
        labels = [x["sem_seg"].to(self.device) for x in batched_inputs]
        padding = self.backbone.size_divisibility, self.sem_seg_head.ignore_value
        return ImageList.from_tensors(labels, *padding, self.backbone.padding_constraints).tensor

    @torch.no_grad()
    def _training_instances(
        self, images: ImageList, features: Dict, proposals: List[Instances], gt: List[Instances]
    ) -> List[GridInstances]:
        """The instances that the ranking head learns from, for every image."""
        if self.train_masks == "detections":
            # Proposals come with the best first. Inference would take this many.
            most = getattr(self.proposal_generator, "post_nms_topk", {}).get(False)
            proposals = [x[:most] for x in proposals]
            with inference_context(self.roi_heads):
                detected = self._detect(images, features, proposals, all_masks=False)
            with torch.autocast(self.device.type, enabled=False):
                return [self._on_grid(x) for x in detected]
        num_classes, probability = self.roi_heads.num_classes, self.gt_false_positives
        on_grid = [ground_truth_on_grid(x, self.srm_stride) for x in gt]
        with torch.autocast(self.device.type, enabled=False):
            return [with_false_positives(x, num_classes, probability) for x in on_grid]

    def _on_grid(self, detected: Instances) -> GridInstances:
        return detections_on_grid(detected, self.srm_stride, self.combine_instances_score_thresh)

    def ranking_maps(
        self, image_sizes: Sequence, semantic: torch.Tensor, features: Dict
    ) -> List[Maps]:
        """
        What every image itself tells the ranking head. It is detached: the loss of the ranking would
        lower the quality of the other branches.

        Args:
            image_sizes: (H, W) of every image without padding.
            semantic: what the layers of the semantic branch return.
            features: the backbone's.
        """
        head, name = self.semantic_branch, self.srm_in_feature
        found = {}
        if head.num_things > 0:
            found["semantic"] = semantic[:, : head.num_things], head.common_stride
        if name in features:
            found["features"] = features[name], self.backbone.output_shape()[name].stride
        maps: List[Maps] = [{} for _ in image_sizes]
        for key, (batch, stride) in found.items():
            for of_image, x, size in zip(maps, batch.detach().float(), image_sizes):
                of_image[key] = map_on_grid(x, stride, self.srm_stride, size)
        return maps

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

        Raises:
            RuntimeError: torch.export runs it, or torch.jit.trace with post-processing.
        """
        _refuse_export(do_postprocess)
        all_masks = "pred_masks" in self.outputs or not do_postprocess
        sizes, features, semantic, detected = self._predict(batched_inputs, all_masks)
        if not do_postprocess:
            return detected, self.semantic_branch.predict(semantic)

        if return_fusion_inputs is None:
            return_fusion_inputs = self.return_fusion_inputs
        with torch.autocast(self.device.type, enabled=False):
            order_inputs = self._rank(sizes, semantic, features, detected, return_fusion_inputs)
            del features  # the largest tensors
            results = []
            for x, image_size, detections, logits, ranked in zip(
                batched_inputs, sizes, detected, semantic.float(), order_inputs
            ):
                size = x.get("height", image_size[0]), x.get("width", image_size[1])
                labels, sem_seg = self._semantic(image_size, size, logits)
                of_image = image_size, size, detections, ranked, labels, return_fusion_inputs
                results.append({**sem_seg, **self._result(*of_image)})
        return results

    def _predict(self, batched_inputs: List[Dict], all_masks: bool):
        # What the network makes of a batch: sizes of the images without padding, features, output of the
        # semantic layers, instances.
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        semantic = self.semantic_branch.layers(features)
        proposals, _ = self.proposal_generator(images, features, None)
        detected = self._detect(images, features, proposals, all_masks)
        return images.image_sizes, features, semantic, detected

    def _detect(
        self, images, features: Dict, proposals: List[Instances], all_masks: bool
    ) -> List[Instances]:
        """
        What the ROI heads give in evaluation mode. Without `all_masks` only instances that will be
        painted get a mask, if the heads work in Detectron2's two steps; the masks of others are 0.
        In training there are no keypoints then.
        """
        heads = self.roi_heads
        if all_masks or getattr(heads.forward, "__func__", None) not in IN_TWO_STEPS:
            return heads(images, features, proposals, None)[0]
        detected = heads._forward_box(features, proposals)
        painted = [x.scores >= self.combine_instances_score_thresh for x in detected]
        chosen = [x[indices] for x, indices in zip(detected, painted)]
        chosen = heads._forward_mask(features, chosen)
        for x, indices, masks in zip(detected, painted, [x.pred_masks for x in chosen]):
            x.pred_masks = masks.new_zeros(len(x), *masks.shape[1:])
            x.pred_masks[indices] = masks
        return detected if self.training else heads._forward_keypoint(features, detected)

    def _rank(
        self, image_sizes, semantic, features, detected: List[Instances], for_all_orders: bool
    ) -> List[OrderInputs]:
        if self.order == "score" and not for_all_orders:
            masks = [x.pred_masks.new_zeros(len(x), 0, 0).bool() for x in detected]
            return [OrderInputs(x.scores, x.pred_classes, m) for x, m in zip(detected, masks)]
        instances = [self._on_grid(x) for x in detected]
        maps = self.ranking_maps(image_sizes, semantic, features)
        return self.srm_head.order_inputs(instances, maps)

    def _semantic(self, image_size, size, logits: torch.Tensor) -> Tuple[torch.Tensor, Dict]:
        # One image's labels at `size` = (H, W), and its "sem_seg" if that is wanted.
        if "sem_seg" in self.outputs:
            sem_seg = self.semantic_branch.predict(logits[None])[0]
            sem_seg = sem_seg_postprocess(sem_seg, image_size, *size)
            return semantic_labels(sem_seg, self.keep_things_free), {"sem_seg": sem_seg}
        scores = self.semantic_branch.stuff_scores(logits[None])[0]
        sizes = self.semantic_branch.common_stride, image_size, size
        return resized_semantic_labels(scores, *sizes, self.keep_things_free), {}

    def _result(
        self, image_size, size, detected: Instances, order_inputs: OrderInputs, labels, for_all_orders
    ) -> Dict:
        # One image's result at `size` = (H, W), but for "sem_seg".
        # Detectron2 would make a full image of each mask, so it post-processes the rest alone. It
        # drops instances with an empty box; `index` tells which are left.
        fields = {**detected.get_fields(), "index": torch.arange(len(detected), device=self.device)}
        roi_masks = fields.pop("pred_masks")[:, 0]
        instances = detector_postprocess(Instances(image_size, **fields), *size)
        left = instances.index
        instances.remove("index")
        masks = BoxedMasks.paste(roi_masks[left], instances.pred_boxes.tensor, size)
        if "pred_masks" in self.outputs:
            instances.pred_masks = masks.full()
        fusion_inputs = FusionInputs(masks, instances, labels, order_inputs[left])
        order = fusion_inputs.order_inputs.order(self.order)
        result = {"instances": instances, "panoptic_seg": self.combine(fusion_inputs, order)}
        return {**result, "fusion_inputs": fusion_inputs} if for_all_orders else result

    def combine(self, fusion_inputs: FusionInputs, order: torch.Tensor):
        """
        Fuse what :meth:`inference` gives for one image, in an order: (N,) int64, first painted first.

        Returns:
            panoptic_seg, segments_info: see :func:`oanet_d2.painting.fusion.combine`.
        """
        masks, instances, semantic, _ = fusion_inputs
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


def _refuse_export(do_postprocess: bool) -> None:
    # How often the fusion paints depends on the picture, and a trace would keep the number.
    compiler = getattr(torch, "compiler", None)
    exported = getattr(compiler, "is_exporting", lambda: False)()  # older versions have neither
    if exported or (do_postprocess and _is_jit_trace()):
        raise RuntimeError(
            "An OANet cannot be exported by torch.jit.trace, torch.export or torch.onnx: the result "
            "would be wrong for other pictures. Export it with `oanet-d2 export`."
        )


def _is_jit_trace() -> bool:
    """Whether somebody will use the trace. Detectron2's tools/analyze_model.py only counts in it."""
    if not torch.jit.is_tracing():
        return False
    # The counters of fvcore push scopes themselves; torch.jit.trace pushes those in its map, or none.
    counted = torch._C._get_tracing_state().current_scope()
    return torch.jit._trace._trace_module_map is not None or not counted


def _check(cfg, backbone: Any, sem_seg_head: nn.Module, srm_head: nn.Module) -> None:
    """Refuses keys of the config that contradict each other or the parts of the model."""
    if not cfg.MODEL.MASK_ON:
        raise ValueError("MODEL.MASK_ON is False; OANet ranks masks, so set it to True.")
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            "TEST.AUG.ENABLED and MODEL.KEYPOINT_ON are True, but Detectron2 merges no keypoints of "
            "augmented images; set one of the two to False."
        )
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.SUPERVISION != "stuff" and not isinstance(sem_seg_head, SemanticBranch):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.SUPERVISION is {head.SUPERVISION!r}, but the head {head.NAME!r} does "
            "not know the thing classes; set it to 'stuff', or NAME to 'OANetSemSegFPNHead'. "
            "oanet_d2.modeling.SemanticBranch says what a head of your own needs."
        )
    shapes = backbone.output_shape()
    padded_to = backbone.padding_constraints.get("square_size") or backbone.size_divisibility or 1
    largest = max((shapes[x].stride for x in head.IN_FEATURES if x in shapes), default=1)
    if padded_to % largest:
        raise ValueError(
            f"The backbone {cfg.MODEL.BACKBONE.NAME!r} wants images of multiples of {padded_to} "
            f"pixels, but MODEL.SEM_SEG_HEAD.IN_FEATURES holds one with a stride of {largest}. Its "
            f"size_divisibility must be a multiple of {largest}, so that the labels fit the images."
        )
    check_orders("TEST.ORDERS", cfg.TEST.ORDERS, srm_head)


def _check_parts(model: OANet) -> None:
    """Refuses what contradicts itself however the model was built. Messages name the yaml's keys."""
    choices = ("SRM_HEAD.TRAIN_MASKS", [model.train_masks], TRAIN_MASKS)
    for key, values, known in (choices, ("OANET.OUTPUTS", model.outputs, OUTPUTS)):
        for value in values:
            if value not in known:
                raise ValueError(f"MODEL.{key} holds {value!r}; it may hold {known}.")
    in_feature, stride = model.backbone.output_shape().get(model.srm_in_feature), model.srm_stride
    for map_stride in (model.semantic_branch.common_stride, in_feature.stride if in_feature else 4):
        if stride < 1 or (stride % map_stride and map_stride % stride):
            raise ValueError(
                f"MODEL.SRM_HEAD.STRIDE is {stride}; the feature maps have the stride {map_stride}, "
                f"so it must be a multiple or a divisor of {map_stride}."
            )
    _check_order("MODEL.OANET.ORDER", model.order, model.srm_head)


def check_orders(key: str, orders: Sequence[str], srm_head: nn.Module) -> None:
    """
    Args:
        key: names the orders in an error.
        orders: what an evaluation compares, see `TEST.ORDERS`.

    Raises:
        ValueError: there is no such order, or the head does not give what it looks at.
    """
    for order in sorted({*orders} - {"oracle", "oracle_true", "class_order"}):
        _check_order(key, order, srm_head)


def _check_order(key: str, order: str, srm_head: nn.Module) -> None:
    if order not in RANKING_RULE_REGISTRY:
        rules = sorted(name for name, _ in RANKING_RULE_REGISTRY)
        raise ValueError(f"{key} has the order {order!r}; it must be one of {rules}.")
    # A rule says what it misses, even if there is nothing to order.
    none = torch.zeros(0)
    score_map = torch.zeros(1, 1, 1) if srm_head.has_score_map else None
    margins = torch.zeros(0, 0) if srm_head.has_pair_margins else None
    try:
        OrderInputs(none, none.long(), torch.zeros(0, 1, 1).bool(), score_map, margins).order(order)
    except ValueError as error:
        raise ValueError(f"{key} has the order {order!r}. {error}") from error
