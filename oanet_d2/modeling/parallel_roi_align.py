"""
ROIAlign on all threads of a CPU: torchvision's takes one, whatever PyTorch has been given.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from detectron2.layers import ROIAlign

__all__ = ["ParallelROIAlign", "make_roi_align_parallel"]

# What a thread takes at once: what it makes of them is copied to its place while a cache holds it.
BOXES_AT_ONCE = 32


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
        num_threads = min(torch.get_num_threads(), len(rois))
        on_one_thread = input.device.type != "cpu" or num_threads < 2 or torch.is_grad_enabled()
        # Half precision comes from autocast, of which other threads know nothing; nor does the tracer.
        if on_one_thread or input.dtype != torch.float32 or torch.jit.is_tracing():
            return align(input, rois)
        input = input.contiguous()  # or every part would make its own copy of it
        inference_mode = torch.is_inference_mode_enabled()
        result = input.new_empty(len(rois), input.shape[1], *self.output_size)
        most = min(BOXES_AT_ONCE, -(-len(rois) // num_threads))

        def fill(first):
            some = slice(first, first + most)
            # In this order: without inference mode there are gradients again.
            with torch.inference_mode(inference_mode), torch.no_grad():
                result[some].copy_(align(input, rois[some]))

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(fill, range(0, len(rois), most)))  # a list, to see what was raised
        return result
