from dataclasses import replace
from typing import Any, Dict, List

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances

from .false_positives import with_false_positives
from .grid import GridInstances, ground_truth_on_grid, truth_on_grid
from .srm_head import build_srm_head

__all__ = ["SRMFromAnnotations"]


@META_ARCH_REGISTRY.register()
class SRMFromAnnotations(nn.Module):
    """
    The ranking head alone, trained from annotations: it sees masks and learns from the panoptic
    ground truth, so no image is read and no backbone runs. The weights are named `srm_head.*`, as in
    :class:`OANet`; `tools/attach_srm.py` puts them into any Panoptic FPN checkpoint.

    It learns from the masks of the annotations, or of a segmenter's results in their place, so
    `MODEL.SRM_HEAD.TRAIN_MASKS` must be "gt", and `MODEL.SRM_HEAD.PAIRS.EVIDENCE` may hold "geometry"
    and "score_map", not what an image shows.
    """

    @configurable
    def __init__(
        self,
        *,
        srm_head: nn.Module,
        num_classes: int,
        stride: int,
        false_positives: float,
        score_threshold: float = 0.0,
    ):
        """
        Args:
            srm_head: the ranking head.
            num_classes: number of thing classes.
            stride: pixels per cell of the ranking head's grid.
            false_positives: their probability, see :func:`with_false_positives`. Results have their own.
            score_threshold: results with a lower score will not be painted and are left out.
        """
        super().__init__()
        self.srm_head: Any = srm_head
        self.num_classes = num_classes
        self.stride = stride
        self.false_positives = false_positives
        self.score_threshold = score_threshold

    @classmethod
    def from_config(cls, cfg):
        head = cfg.MODEL.SRM_HEAD
        if head.TRAIN_MASKS != "gt":
            raise ValueError(
                f"MODEL.SRM_HEAD.TRAIN_MASKS is {head.TRAIN_MASKS!r}; without images there are only "
                "ground-truth masks, so set it to 'gt'."
            )
        shown = {"semantic", "features"} & set(head.PAIRS.EVIDENCE)
        if head.NAME == "PairwiseRankingHead" and shown:
            raise ValueError(
                f"MODEL.SRM_HEAD.PAIRS.EVIDENCE holds {sorted(shown)}, which only an image can show; "
                "without images it may hold 'geometry' and 'score_map'."
            )
        return {
            "srm_head": build_srm_head(cfg, {}),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "stride": head.STRIDE,
            "false_positives": head.GT_FALSE_POSITIVES,
            "score_threshold": cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH,
        }

    def forward(self, batched_inputs: List[Dict]) -> Dict[str, torch.Tensor]:
        """
        Args:
            batched_inputs: list[dict] with "instances", "panoptic_seg" and "panoptic_category", see
                :class:`PanopticDatasetMapper`. Results of a segmenter have "scores".

        Returns:
            dict of losses.

        Raises:
            RuntimeError: the model is not in training. It cannot predict alone.
        """
        if not self.training:
            raise RuntimeError(
                "SRMFromAnnotations only trains; put its weights into a Panoptic FPN checkpoint with "
                "tools/attach_srm.py, and evaluate that as an OANet."
            )
        stride, device = self.stride, next(self.parameters()).device
        truth = [truth_on_grid(x, stride, device) for x in batched_inputs]
        instances = [self._on_grid(x["instances"].to(device)) for x in batched_inputs]
        with torch.autocast(device.type, enabled=False):
            return self.srm_head.losses(instances, truth, [{}] * len(truth))

    def _on_grid(self, instances: Instances) -> GridInstances:
        if instances.has("scores"):
            painted = instances[instances.scores >= self.score_threshold]
            return replace(ground_truth_on_grid(painted, self.stride), scores=painted.scores)
        on_grid = ground_truth_on_grid(instances, self.stride)
        with torch.autocast(on_grid.masks.device.type, enabled=False):
            return with_false_positives(on_grid, self.num_classes, self.false_positives)
