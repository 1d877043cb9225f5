"""
Parts of Detectron2's networks that need less memory in inference, and the time that it takes to get
and clear it. Names of parameters, and results to the bit, are Detectron2's.
"""

from typing import List, Optional

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import FPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from .onednn_layout import dense, frozen_norm_in_onednn, is_for_onednn

__all__ = [
    "LeanFPN",
    "LeanFrozenBatchNorm2d",
    "LeanMaskHead",
    "LeanRPNHead",
    "LeanReLU",
    "make_lean",
]

# What the mask head is given at once on a CPU. Up to 16 boxes PyTorch may convolve in another way,
# which rounds differently; equal parts of what is more than this are more than 16 each.
BOXES_AT_ONCE = 33


def make_lean(model: nn.Module) -> nn.Module:
    """
    Turn what can be made lean into the classes below, in place, with parameters, hooks and modes.
    Only Detectron2's own classes are: what a subclass does with its maps is not known.

    Returns:
        `model`.
    """
    for module in model.modules():
        if type(module) is FPN:
            # As PyTorch's parametrize and fully_shard do.
            module.__class__ = LeanFPN
        elif type(module) is MaskRCNNConvUpsampleHead:
            module.__class__ = LeanMaskHead
        elif type(module) is StandardRPNHead:
            module.__class__ = LeanRPNHead
        elif isinstance(module, Conv2d):
            # Nobody else has what a convolution gives to its norm, and that to its activation.
            if type(module.norm) is FrozenBatchNorm2d:
                module.norm.__class__ = LeanFrozenBatchNorm2d
            if type(module.activation) is nn.ReLU:
                module.activation.__class__ = LeanReLU
            elif module.activation is F.relu:
                module.activation = LeanReLU()
    return model


class LeanFPN(FPN):
    """
    Detectron2's :class:`FPN`, to the bit, that in inference lets go of every map as soon as it has
    been used for the last time. Detectron2's holds all maps of the backbone below until it returns,
    and makes a new map for every sum.
    """

    def forward(self, x):
        """
        Args:
            x: (B, 3, H, W) images, in oneDNN's memory layout or not.

        Returns:
            dict of feature maps, as :meth:`FPN.forward` does, in the layout of `x`.
        """
        if torch.is_grad_enabled():
            return super().forward(x)  # a backward pass needs what is let go of here
        in_feature = getattr(self.top_block, "in_feature", None)
        below = self.bottom_up(x)
        of_top_block = below.get(in_feature)
        # A copy, as what is not needed any more is taken out.
        below = {name: below[name] for name in self.in_features}
        merged: Optional[torch.Tensor] = None
        results: List[torch.Tensor] = []
        for name, lateral_conv, output_conv in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs
        ):
            lateral = dense(lateral_conv(below.pop(name)))
            if merged is None:
                merged = lateral
            else:
                # In place in the map that is made here: hooks may have kept the other one.
                merged = F.interpolate(merged, scale_factor=2.0, mode="nearest")
                merged += lateral
                if self._fuse_type == "avg":
                    merged /= 2
            del lateral
            summed = merged.to_mkldnn() if x.is_mkldnn else merged
            if not below:
                merged = None  # the largest one, which only its convolution needs now
            results.insert(0, output_conv(summed))
        if self.top_block is not None:
            if of_top_block is None:
                of_top_block = results[self._out_features.index(in_feature)]
            results.extend(self.top_block(of_top_block))
        return dict(zip(self._out_features, results))


class LeanMaskHead(MaskRCNNConvUpsampleHead):
    """
    Detectron2's mask head, which in inference on a CPU takes a few boxes at a time: its largest
    map has 0.8 MB for each.
    """

    def layers(self, x):
        """
        Args:
            x: (N, C, h, w) pooled features.

        Returns:
            (N, classes, 2 h, 2 w) logits.
        """
        layers = super().layers
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return layers(x)
        num_parts = max(1, -(-len(x) // BOXES_AT_ONCE))
        return torch.cat([layers(part) for part in x.tensor_split(num_parts)])


class LeanRPNHead(StandardRPNHead):
    """
    Detectron2's RPN head, which in inference on a CPU leaves the map between its convolutions in
    oneDNN's memory layout.
    """

    def forward(self, features: List[torch.Tensor]):
        """
        Args:
            features: L maps (B, C, H, W), in oneDNN's memory layout or not.

        Returns:
            as :meth:`StandardRPNHead.forward`.
        """
        if not all(is_for_onednn(x) for x in features):
            return super().forward(features)
        # One level at a time.
        in_onednn = (x if x.is_mkldnn else x.to_mkldnn() for x in features)
        logits, deltas = super().forward(in_onednn)
        return [x.to_dense() for x in logits], [x.to_dense() for x in deltas]


class LeanFrozenBatchNorm2d(FrozenBatchNorm2d):
    """
    Detectron2's frozen batch norm, which in inference on a CPU writes over its input. It also takes a map
    in oneDNN's memory layout, of which it makes a new one.
    """

    def forward(self, x):
        if x.is_mkldnn:
            return frozen_norm_in_onednn(self, x)
        hooks = self._forward_pre_hooks or self._forward_hooks  # which may keep the input
        if torch.is_grad_enabled() or x.device.type != "cpu" or hooks:
            return super().forward(x)
        # What F.batch_norm calls, with a place for the result; the last two are for training.
        statistics = self.running_mean, self.running_var
        unused = self.weight.new_empty(0), self.weight.new_empty(0)
        torch.ops.aten.native_batch_norm.out(
            *(x, self.weight, self.bias, *statistics, False, 0.1, self.eps),
            out=x,
            save_mean=unused[0],
            save_invstd=unused[1],
        )
        return x


class LeanReLU(nn.ReLU):
    """
    ReLU that in inference writes over its input.
    """

    def forward(self, x):
        return F.relu(x, inplace=not torch.is_grad_enabled())
