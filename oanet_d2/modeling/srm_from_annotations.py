from typing import Dict, List

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY

from .candidates import grid_size, gt_candidates, ranking_target
from .false_positives import with_false_positives
from .srm_head import SpatialRankingHead, build_srm_head

__all__ = ["SRMFromAnnotations"]


@META_ARCH_REGISTRY.register()
class SRMFromAnnotations(nn.Module):
    """
    Only the spatial ranking module, trained from annotations: its input is masks, its target the
    panoptic ground truth, so no image is read and no backbone runs. The weights are named
    `srm_head.*`, as in :class:`OANet`; `tools/attach_srm.py` puts them into any Panoptic FPN
    checkpoint.

    It learns from ground-truth masks alone: `MODEL.SRM_HEAD.TRAIN_MASKS` is ("gt",), and
    `MODEL.SRM_HEAD.PAIRS.EVIDENCE` may hold "geometry" and "score_map", not what an image shows.
    """

    srm_head: SpatialRankingHead

    @configurable
    def __init__(self, *, srm_head: SpatialRankingHead):
        """
        Args:
            srm_head: the spatial ranking head.
        """
        super().__init__()
        self.srm_head = srm_head
        self.srm_head.remembers = True  # masks do not change while it learns

    @classmethod
    def from_config(cls, cfg):
        if tuple(cfg.MODEL.SRM_HEAD.TRAIN_MASKS) != ("gt",):
            raise ValueError(
                f"MODEL.SRM_HEAD.TRAIN_MASKS is {cfg.MODEL.SRM_HEAD.TRAIN_MASKS!r}; without "
                "images there are only ground-truth masks, set it to ('gt',)."
            )
        shown = {"semantic", "features"} & set(cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE)
        if cfg.MODEL.SRM_HEAD.NAME == "PairwiseRankingHead" and shown:
            raise ValueError(
                f"MODEL.SRM_HEAD.PAIRS.EVIDENCE holds {sorted(shown)}, which only an image can "
                "show; without images it may hold 'geometry' and 'score_map'."
            )
        return {"srm_head": build_srm_head(cfg, {})}

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, batched_inputs: List[Dict]) -> Dict[str, torch.Tensor]:
        """
        Args:
            batched_inputs: list[dict] with "instances", "panoptic_seg" and "panoptic_category",
                see :class:`PanopticDatasetMapper`.

        Returns:
            dict of losses.

        Raises:
            RuntimeError: the model is not in training; there is nothing it could predict alone.
        """
        if not self.training:
            raise RuntimeError(
                "SRMFromAnnotations only trains. Put its weights into a Panoptic FPN checkpoint "
                "with tools/attach_srm.py and evaluate that as an OANet."
            )
        head = self.srm_head
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        height = max(x.image_size[0] for x in instances)
        width = max(x.image_size[1] for x in instances)
        size = grid_size((height, width), head.stride)
        candidates = [
            with_false_positives(
                gt_candidates(x, head.stride, size), head.num_classes, head.gt_false_positives
            )
            for x in instances
        ]
        targets = [ranking_target(x, head, size, self.device) for x in batched_inputs]
        return head.losses(candidates, targets)
