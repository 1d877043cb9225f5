from typing import Dict, List

import fvcore.nn.weight_init as weight_init
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.utils.registry import Registry

from ..painting.ranking import OrderInputs
from .grid import GridInstances, GridTruth, Maps

__all__ = ["SRM_HEAD_REGISTRY", "SpatialRankingHead", "build_srm_head"]

SRM_HEAD_REGISTRY = Registry("SRM_HEAD")
SRM_HEAD_REGISTRY.__doc__ = """
Registry for ranking heads, which say who is visible where instances overlap.

The registered object will be called with `obj(cfg, input_shape)`.
"""


def build_srm_head(cfg, input_shape: Dict[str, ShapeSpec]) -> nn.Module:
    """
    The ranking head that `cfg.MODEL.SRM_HEAD.NAME` names; `input_shape` is empty without a backbone.
    """
    return SRM_HEAD_REGISTRY.get(cfg.MODEL.SRM_HEAD.NAME)(cfg, input_shape)


@SRM_HEAD_REGISTRY.register()
class SpatialRankingHead(nn.Module):
    """
    The paper's spatial ranking module (SRM): from the instance tensor to the score map S.

    The instance tensor has one channel per thing class, 1 where an instance of that class has a cell,
    0 elsewhere. Where several channels are 1, instances of different classes compete. A stack of
    separable large kernels, k x 1 followed by 1 x k, lets one cell of S see a wide neighbourhood. A
    1 x 1 predictor with one channel per thing class follows. The module learns, from masks alone,
    which class is visible where several compete.
    """

    has_score_map = True
    has_pair_margins = False

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        conv_dim: int,
        num_blocks: int,
        kernel_size: int,
        loss_weight: float = 1.0,
    ):
        """
        Args:
            num_classes: number of thing classes, C.
            conv_dim: channels of the blocks.
            num_blocks: number of (k x 1, 1 x k) pairs, each followed by a ReLU. 0 leaves a 1 x 1
                convolution.
            kernel_size: k, odd, in cells.
            loss_weight: weight of L_srm.

        Raises:
            ValueError: the kernel size is even or not positive.
        """
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(
                f"MODEL.SRM_HEAD.KERNEL_SIZE is {kernel_size}; it must be odd and positive, so "
                "that the score map lies on the instance tensor."
            )
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        half = kernel_size // 2
        layers: List[nn.Module] = []
        channels = num_classes
        for _ in range(num_blocks):
            layers += [
                Conv2d(channels, conv_dim, (kernel_size, 1), padding=(half, 0)),
                Conv2d(conv_dim, conv_dim, (1, kernel_size), padding=(0, half), activation=F.relu),
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
            "loss_weight": cfg.MODEL.SRM_HEAD.LOSS_WEIGHT,
        }

    def forward(self, instances: GridInstances) -> torch.Tensor:
        """(C, h, w) float logits for one image; their softmax over the classes is S."""
        # One image at a time. In a padded batch the padding would reach into the image, because a
        # bias makes it more than 0 after the first block.
        masks = instances.masks.float()
        tensor = masks.new_zeros(self.num_classes, *masks.shape[1:])
        tensor = tensor.index_put((instances.classes,), masks, accumulate=True).clamp(max=1)
        return self.predictor(self.blocks(tensor[None]))[0]

    def losses(
        self, instances: List[GridInstances], truth: List[GridTruth], maps: List[Maps]
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            instances, truth, maps: one of each for every image. This head does not look at the maps.

        Returns:
            {"loss_srm": scalar}, see :meth:`map_loss`.
        """
        return {"loss_srm": self.map_loss([self(x) for x in instances], truth)}

    def map_loss(self, logits: List[torch.Tensor], truth: List[GridTruth]) -> torch.Tensor:
        """
        L_srm = CE(S_map, S_label): cross entropy against the category that the panoptic ground truth
        shows in each cell. A cell that shows stuff or nothing has no label among the thing classes
        and is left out. (The paper does not say what happens there.)

        Args:
            logits: (C, h, w) float for every image.

        Returns:
            the mean over the cells of all images that show a thing, times the loss's weight; 0, with
            gradients of 0, without such a cell.
        """
        total = logits[0].sum() * 0
        count = torch.zeros((), dtype=torch.int64, device=total.device)
        for x, target in zip(logits, truth):
            labels = target.categories.masked_fill(target.categories >= self.num_classes, -1)
            total = total + F.cross_entropy(x[None], labels[None], ignore_index=-1, reduction="sum")
            count = count + (labels >= 0).sum()
        return total / count.clamp(min=1) * self.loss_weight

    def order_inputs(self, instances: List[GridInstances], maps: List[Maps]) -> List[OrderInputs]:
        """
        What the ranking rules look at, for every image. Arguments are those of :meth:`losses`.
        """
        return [OrderInputs(x.scores, x.classes, x.masks, self(x).softmax(0)) for x in instances]
