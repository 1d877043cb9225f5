"""
ROIAlign on all threads of a CPU: torchvision's takes one, whatever PyTorch has been given.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from detectron2.layers import ROIAlign

__all__ = ["ParallelROIAlign", "make_roi_align_parallel"]


def make_roi_align_parallel(model: nn.Module) -> nn.Module:
    """
    Turn every :class:`ROIAlign` of Detectron2's into the class below, in place.

    Returns:
        `model`.
    """
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = ParallelROIAlign
    return model


class ParallelROIAlign(ROIAlign):
    """
    Detectron2's :class:`ROIAlign`, to the bit, that in inference on a CPU gives every thread a part
    of the boxes.
    """

    def forward(self, input, rois):
        """
        Args:
            input: (B, C, H, W) float feature map.
            rois: (N, 5) float, index in the batch and XYXY.

        Returns:
            (N, C, *output_size), as :meth:`ROIAlign.forward` does.
        """
        align = super().forward
        num_parts = min(torch.get_num_threads(), len(rois))
        on_one_thread = input.device.type != "cpu" or num_parts < 2 or torch.is_grad_enabled()
        # Half precision comes from autocast, of which other threads know nothing.
        if on_one_thread or input.dtype != torch.float32:
            return align(input, rois)
        input = input.contiguous()  # or every part would make its own copy of it
        align = partial(_in_mode, torch.is_inference_mode_enabled(), align)
        with ThreadPoolExecutor(num_parts) as pool:
            parts = rois.tensor_split(num_parts)
            return torch.cat(list(pool.map(partial(align, input), parts)))


def _in_mode(inference_mode: bool, align, *args):
    with torch.no_grad(), torch.inference_mode(inference_mode):
        return align(*args)
