"""
Feature maps of the backbone and the proposals made of them.
"""

from typing import Dict, List, Optional, Tuple

import torch
from torch import nn

from detectron2.layers import Conv2d
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import ImageList, Instances

from .lean import LeanFPN, LeanFrozenBatchNorm2d, LeanReLU, LeanRPNHead
from .onednn_layout import dense, is_for_onednn

__all__ = ["propose"]

# What takes maps in oneDNN's layout, with the same result to the bit.
_TAKES_ONEDNN = {
    *(LeanFPN, LastLevelMaxPool, LastLevelP6P7),
    *(ResNet, BasicStem, BasicBlock, BottleneckBlock),
    *(RPN, LeanRPNHead, DefaultAnchorGenerator, BufferList),
    *(nn.Sequential, nn.Conv2d, Conv2d, LeanFrozenBatchNorm2d, LeanReLU),
}


def propose(
    backbone: nn.Module,
    proposal_generator: nn.Module,
    images: ImageList,
    gt_instances: Optional[List[Instances]] = None,
) -> Tuple[Dict[str, torch.Tensor], List[Instances], Dict[str, torch.Tensor]]:
    """
    What `backbone` and `proposal_generator` make of images. Without gradients and on a CPU Detectron2's
    ResNet, FPN and RPN leave all maps between them in oneDNN's memory layout; the result is the same to
    the bit.

    Args:
        gt_instances: for the proposal generator, in training.

    Returns:
        feature maps (B, C, H, W) by name, and the proposal generator's proposals and losses.
    """
    x = images.tensor
    if is_for_onednn(x) and _takes_onednn(backbone) and _takes_onednn(proposal_generator):
        x = x.to_mkldnn()
    features = dict(backbone(x))  # of our own, to let go of one map after the other
    proposals, losses = proposal_generator(images, features, gt_instances)
    return {name: dense(features.pop(name)) for name in list(features)}, proposals, losses


def _takes_onednn(network: nn.Module) -> bool:
    """
    Whether all of it does, and nobody looks at maps on their way.
    """
    return all(
        type(part) in _TAKES_ONEDNN
        and not (part._forward_pre_hooks or part._forward_hooks)
        and (type(part) is not Conv2d or isinstance(part.activation, (LeanReLU, type(None))))
        for part in network.modules()
    )
