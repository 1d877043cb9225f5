from typing import Dict, List, Optional, Sequence

import fvcore.nn.weight_init as weight_init
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry

from .candidates import Candidates, RankingTarget, build_instance_tensor
from .ranking import RankingEvidence
from .ranking_metrics import put_ranking_scalars

__all__ = ["SRM_HEAD_REGISTRY", "SpatialRankingHead", "build_srm_head"]

SRM_HEAD_REGISTRY = Registry("SRM_HEAD")
SRM_HEAD_REGISTRY.__doc__ = """
Registry for spatial ranking heads, which say of the instances of an image who is visible where.

The registered object will be called with `obj(cfg, input_shape)`.
"""

TRAIN_MASKS = ("gt", "pred", "detections")


def build_srm_head(cfg, input_shape: Dict[str, ShapeSpec]):
    """
    Build a spatial ranking head from `cfg.MODEL.SRM_HEAD.NAME`.

    Args:
        input_shape: the backbone's feature maps; empty where there is no backbone.
    """
    return SRM_HEAD_REGISTRY.get(cfg.MODEL.SRM_HEAD.NAME)(cfg, input_shape)


@SRM_HEAD_REGISTRY.register()
class SpatialRankingHead(nn.Module):
    """
    The spatial ranking module (SRM) of OANet: instance tensor -> score map S.

    A stack of separable large kernels, k x 1 followed by 1 x k, so that one cell of S sees a wide
    neighbourhood of the instance tensor, then a 1 x 1 predictor with one channel per thing class.
    It learns, from masks alone, which class is visible where several compete.

    Attributes:
        remembers: see :class:`PairwiseRankingHead`; the map remembers nothing.
    """

    remembers = False

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        conv_dim: int,
        num_blocks: int,
        kernel_size: int,
        norm: str = "",
        stride: int = 4,
        mask_threshold: float = 0.5,
        loss_weight: float = 1.0,
        train_masks: Sequence[str] = ("gt",),
        gt_false_positives: float = 0.0,
        ignore_value: int = 255,
    ):
        """
        Args:
            num_classes: number of thing classes, C.
            conv_dim: channels of the blocks.
            num_blocks: number of (k x 1, 1 x k) pairs, each followed by a ReLU. 0 leaves a 1 x 1
                convolution.
            kernel_size: k, odd, in cells.
            norm: normalization of the blocks, see :func:`detectron2.layers.get_norm`.
            stride: pixels of the input image per cell.
            mask_threshold: mask probability from which on a cell belongs to an instance.
            loss_weight: weight of L_srm.
            train_masks: where the instances come from in training, some of TRAIN_MASKS. Read by
                the meta-architecture, which has them.
            gt_false_positives: probability of a made-up false positive beside a ground-truth
                mask, see :func:`with_false_positives`. Read by the meta-architecture, too.
            ignore_value: category of unlabelled pixels.

        Raises:
            ValueError: an argument has no meaning; the message names the config key.
        """
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.KERNEL_SIZE is {kernel_size}; it must be odd and positive, so "
                "that the score map lies on the instance tensor."
            )
        if stride < 1:
            raise ValueError(f"MODEL.SRM_HEAD.STRIDE is {stride}; it must be at least 1 pixel.")
        if not 0 < mask_threshold < 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.MASK_THRESH is {mask_threshold}; it must lie between 0 and 1."
            )
        if not train_masks or not set(train_masks) <= set(TRAIN_MASKS):
            raise ValueError(
                f"MODEL.SRM_HEAD.TRAIN_MASKS is {train_masks!r}; it must be some of {TRAIN_MASKS}."
            )
        if not 0 <= gt_false_positives <= 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.GT_FALSE_POSITIVES is {gt_false_positives}; it is a probability "
                "and must lie in [0, 1]."
            )
        self.num_classes = num_classes
        self.stride = stride
        self.mask_threshold = mask_threshold
        self.loss_weight = loss_weight
        self.train_masks = tuple(train_masks)
        self.gt_false_positives = gt_false_positives
        self.ignore_value = ignore_value

        half = kernel_size // 2
        layers: List[nn.Module] = []
        channels = num_classes
        for _ in range(num_blocks):
            layers += [
                Conv2d(channels, conv_dim, kernel_size=(kernel_size, 1), padding=(half, 0)),
                Conv2d(
                    conv_dim,
                    conv_dim,
                    kernel_size=(1, kernel_size),
                    padding=(0, half),
                    bias=not norm,
                    norm=get_norm(norm, conv_dim),
                    activation=F.relu,
                ),
            ]
            channels = conv_dim
        self.blocks = nn.Sequential(*layers)
        self.predictor = Conv2d(channels, num_classes, kernel_size=1)
        for layer in [*layers, self.predictor]:
            weight_init.c2_msra_fill(layer)

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        return {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": cfg.MODEL.SRM_HEAD.CONV_DIM,
            "num_blocks": cfg.MODEL.SRM_HEAD.NUM_BLOCKS,
            "kernel_size": cfg.MODEL.SRM_HEAD.KERNEL_SIZE,
            "norm": cfg.MODEL.SRM_HEAD.NORM,
            "stride": cfg.MODEL.SRM_HEAD.STRIDE,
            "mask_threshold": cfg.MODEL.SRM_HEAD.MASK_THRESH,
            "loss_weight": cfg.MODEL.SRM_HEAD.LOSS_WEIGHT,
            "train_masks": cfg.MODEL.SRM_HEAD.TRAIN_MASKS,
            "gt_false_positives": cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        }

    def forward(self, instance_tensor: torch.Tensor) -> torch.Tensor:
        """
        Args:
            instance_tensor: (B, C, h, w) float of zeros and ones.

        Returns:
            (B, C, h, w) float logits; :meth:`score_map` makes S of them.
        """
        return self.predictor(self.blocks(instance_tensor))

    @staticmethod
    def score_map(logits: torch.Tensor) -> torch.Tensor:
        """
        S as probabilities: the softmax over classes, (..., C, h, w) -> the same shape in [0, 1].
        """
        return logits.float().softmax(dim=-3)

    def map_loss(self, logits: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        """
        L_srm = CE(S_map, S_label): cross entropy against the category that the panoptic ground
        truth shows in each cell. Cells that show no thing (stuff, unlabelled) have no label among
        the thing classes and are left out; that is our choice, the paper does not say.

        Args:
            logits: (B, C, h, w).
            categories: (B, h, w) int64 panoptic category of every cell: things in [0, C), stuff
                from C on, or `ignore_value`.

        Returns:
            scalar; 0 (with gradients, all 0) if no cell shows a thing.
        """
        is_thing = categories < self.num_classes
        loss = F.cross_entropy(
            logits.float(), categories.where(is_thing, -1), ignore_index=-1, reduction="sum"
        )
        return loss / is_thing.sum().clamp(min=1)

    def losses(
        self,
        candidates: List[Candidates],
        targets: List[RankingTarget],
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            candidates, targets: one of each for every image.
            semantic, features: see :meth:`PairwiseRankingHead.losses`; the map does not look at
                them.

        Returns:
            {"loss_srm": scalar}, see :meth:`map_loss`.
        """
        logits = self(self.instance_tensors(candidates))
        categories = torch.stack([x.categories for x in targets])
        put_ranking_scalars(candidates, targets, logits)
        return {"loss_srm": self.map_loss(logits, categories) * self.loss_weight}

    def instance_tensors(self, candidates: List[Candidates]) -> torch.Tensor:
        """
        Returns:
            (B, C, h, w): the instance tensor of every image.
        """
        return torch.stack(
            [build_instance_tensor(x.masks, x.classes, self.num_classes) for x in candidates]
        )

    def evidence(
        self,
        candidates: List[Candidates],
        semantic: Optional[torch.Tensor] = None,
        features: Optional[torch.Tensor] = None,
        with_map: bool = True,
    ) -> List[RankingEvidence]:
        """
        What the ranking rules look at, for every image.

        Args:
            candidates, semantic, features: see :meth:`losses`.
            with_map: whether a rule will look at the score map.
        """
        score_maps = self.score_map(self(self.instance_tensors(candidates)))
        return [
            RankingEvidence(x.scores, x.classes, x.masks, score_map)
            for x, score_map in zip(candidates, score_maps)
        ]
