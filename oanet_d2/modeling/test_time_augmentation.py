from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fvcore.transforms import HFlipTransform, TransformList
from torch.nn import functional as F

from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Instances

from ..painting.ranking import OrderInputs
from ..painting.semantic import semantic_labels
from .oanet import OANet

__all__ = ["OANetWithTTA", "mean_order_inputs"]


class _View(NamedTuple):
    """What the network makes of one augmented image."""

    image_size: Tuple[int, int]  # of the network's input, without padding
    flipped: bool
    features: Dict[str, torch.Tensor]
    semantic: torch.Tensor
    detected: Instances


class OANetWithTTA(GeneralizedRCNNWithTTA):
    """
    An :class:`OANet` with test-time augmentation enabled. Boxes are merged and masks averaged as
    :class:`GeneralizedRCNNWithTTA` does. The semantic scores of all augmented images are averaged at
    the size of the output, and what they say about the order of the merged instances is averaged
    too. The network runs once for each augmented image, one after the other.

    Its :meth:`__call__` takes what GeneralizedRCNNWithTTA's takes. For scales above the test scale
    give images as they are in the file: they are resized for each augmentation.
    """

    model: OANet

    def __init__(self, cfg, model, tta_mapper: Optional[Callable] = None):
        """
        Args:
            cfg: with `TEST.AUG`.
            model (OANet): or a DistributedDataParallel of one.
            tta_mapper: see :class:`GeneralizedRCNNWithTTA`.
        """
        super().__init__(cfg, model, tta_mapper, batch_size=1)

    def _inference_one_image(self, input: Dict) -> Dict:
        return self.inference([input])[0]

    @torch.no_grad()
    def inference(
        self, batched_inputs: List[Dict], return_fusion_inputs: Optional[bool] = None
    ) -> List[Dict]:
        """
        Args:
            batched_inputs: dicts with "image", (C, H, W) uint8 on the CPU, and the size of the output,
                "height" and "width".
            return_fusion_inputs: see :meth:`OANet.inference`.

        Returns:
            as :meth:`OANet.inference`.
        """
        if return_fusion_inputs is None:
            return_fusion_inputs = self.model.return_fusion_inputs
        return [self._infer(x, return_fusion_inputs) for x in batched_inputs]

    def _infer(self, input: Dict, for_all_orders: bool) -> Dict:
        model, size = self.model, (input["height"], input["width"])
        augmented, transforms = self._get_augmented_inputs(input)
        views = [self._view(*x) for x in zip(augmented, transforms)]
        merged = self._merged(views, transforms, size)
        moved = self._rescale_detected_boxes(augmented, merged, transforms)
        moved = [x.to(model.device) for x in moved]
        # Without "pred_masks" only for those that are painted, as the model itself does.
        wanted = merged.scores >= model.combine_instances_score_thresh
        wanted = wanted | ("pred_masks" in model.outputs)
        heads = model.roi_heads
        with_masks = [
            heads.forward_with_given_boxes(view.features, [x[wanted]])[0] for view, x in zip(views, moved)
        ]
        masks = self._reduce_pred_masks(with_masks, transforms)
        merged.pred_masks = masks.new_zeros(len(merged), *masks.shape[1:])
        merged.pred_masks[wanted] = masks

        with torch.autocast(model.device.type, enabled=False):
            ranked = []
            for view, x in zip(views, moved):
                x.pred_masks = merged.pred_masks.flip(3) if view.flipped else merged.pred_masks
                seen = [view.image_size], view.semantic, view.features
                ranked += model._rank(*seen, [x], for_all_orders)
                view.features.clear()  # the largest tensors, before there are semantic scores of this size
            order_inputs = mean_order_inputs(ranked, [x.flipped for x in views])
            sem_seg = self._mean_sem_seg(views, size)
            labels = semantic_labels(sem_seg, model.keep_things_free)
            result = model._result(size, size, merged, order_inputs, labels, for_all_orders)
        return {**result, "sem_seg": sem_seg} if "sem_seg" in model.outputs else result

    def _view(self, augmented: Dict, transforms: TransformList) -> _View:
        sizes, features, semantic, detected = self.model._predict([augmented], all_masks=False)
        flipped = any(isinstance(x, HFlipTransform) for x in transforms.transforms)
        return _View(sizes[0], flipped, features, semantic, detected[0])

    def _merged(self, views: List[_View], transforms: List, size) -> Instances:
        found = [x.detected for x in views]
        boxes = [
            torch.from_numpy(transform.inverse().apply_box(x.pred_boxes.tensor.cpu().numpy()))
            for transform, x in zip(transforms, found)
        ]
        scores, classes = (
            torch.cat([x.get(name) for x in found]).tolist() for name in ("scores", "pred_classes")
        )
        return self._merge_detections(torch.cat(boxes).to(self.model.device), scores, classes, size)

    def _mean_sem_seg(self, views: List[_View], size) -> torch.Tensor:
        branch = self.model.semantic_branch
        channels = branch.stuff_scores(views[0].semantic).shape[1]
        total = torch.zeros(channels, *size, device=self.model.device)
        for view in views:
            # One class after another: all of them at the size of a photograph take gigabytes.
            for of_class, scores in zip(total, branch.predict(view.semantic.float())[0]):
                resized = sem_seg_postprocess(scores[None], view.image_size, *size)[0]
                of_class += resized.flip(1) if view.flipped else resized
        return total.div_(len(views))


def mean_order_inputs(inputs: Sequence[OrderInputs], flipped: Sequence[bool]) -> OrderInputs:
    """
    What several images of one scene say about its N instances.

    Args:
        inputs: of each image, with the same scores and classes. The grids may differ in size.
        flipped: whether each image shows the scene mirrored.

    Returns:
        the masks on the finest grid, the first of several; the mean score map there; and the mean of
        the margins, each in cells of that grid. Where the width of an image is not a multiple of the
        stride, its mirrored map lies off by less than a cell.
    """
    masks = [x.masks.flip(2) if turned else x.masks for x, turned in zip(inputs, flipped)]
    finest = max(masks, key=lambda x: x.shape[1:].numel())
    size = finest.shape[1:]
    maps, margins = [], []
    for x, turned in zip(inputs, flipped):
        if x.score_map is not None:
            score_map = x.score_map.flip(2) if turned else x.score_map
            resized = F.interpolate(score_map[None], size, mode="bilinear", align_corners=False)
            maps.append(resized[0])
        if x.pair_margins is not None:
            margins.append(x.pair_margins * (size.numel() / x.masks.shape[1:].numel()))
    means = [torch.stack(x).mean(0) if x else None for x in (maps, margins)]
    return OrderInputs(inputs[0].scores, inputs[0].classes, finest, *means)
