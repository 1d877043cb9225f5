"""
Detectron2's FPN, with less memory in inference.
"""

from typing import List, Optional

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.modeling import FPN

__all__ = ["LeanFPN", "make_lean"]


class LeanFPN(FPN):
    """
    Detectron2's :class:`FPN`, to the bit, that in inference lets go of every map as soon as it has
    been used for the last time. Detectron2's holds all maps of the backbone below until it returns,
    and makes a new map for every sum.

    It has the same parameters by the same names, so that an FPN can become one: :func:`make_lean`.
    """

    def forward(self, x):
        """
        Args:
            x: (B, 3, H, W) images.

        Returns:
            dict of feature maps, as :meth:`FPN.forward` does.
        """
        if torch.is_grad_enabled():
            return super().forward(x)  # a backward pass needs what is let go of here
        below = dict(self.bottom_up(x))  # a copy, as what is not needed any more is taken out
        in_feature = getattr(self.top_block, "in_feature", None)
        of_top_block = below.get(in_feature)
        merged: Optional[torch.Tensor] = None
        results: List[torch.Tensor] = []
        for name, lateral_conv, output_conv in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs
        ):
            lateral = lateral_conv(below.pop(name))
            if merged is None:
                merged = lateral
            else:
                # In place in the map that is made here: hooks may have kept the other one.
                merged = F.interpolate(merged, scale_factor=2.0, mode="nearest")
                merged += lateral
                if self._fuse_type == "avg":
                    merged /= 2
            del lateral
            results.insert(0, output_conv(merged))
        if self.top_block is not None:
            if of_top_block is None:
                of_top_block = results[self._out_features.index(in_feature)]
            results.extend(self.top_block(of_top_block))
        return dict(zip(self._out_features, results))


def make_lean(backbone: nn.Module) -> nn.Module:
    """
    Turn Detectron2's own FPN into a :class:`LeanFPN`, in place, with its parameters, hooks and mode.
    Any other backbone, subclasses of FPN among them, stays what it is.

    Returns:
        `backbone`.
    """
    if type(backbone) is FPN:
        backbone.__class__ = LeanFPN  # as PyTorch's own parametrize and fully_shard do
    return backbone
