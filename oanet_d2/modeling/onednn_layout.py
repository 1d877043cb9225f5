"""
Feature maps that stay in oneDNN's own memory layout. On a CPU a convolution brings its input into that
layout and its output out of it, which for large maps takes much of its time, and three maps' memory.
"""

import torch
from torch.nn import functional as F

from detectron2.layers import FrozenBatchNorm2d

__all__ = ["dense", "frozen_norm_in_onednn", "is_for_onednn"]


def is_for_onednn(x: torch.Tensor) -> bool:
    """
    Whether `x` is in oneDNN's layout, or may be brought there as a convolution would do it: without
    gradients, which are left to Detectron2. (Channels last a convolution takes as it is; autocast would
    change the map once more; on one thread PyTorch may convolve without oneDNN, which rounds
    differently; the tracer, which counts operations, knows plain maps only.)
    """
    if x.is_mkldnn:
        return True
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    is_used = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    return is_used and is_plain and torch.get_num_threads() > 1 and not _is_autocast_on_cpu()


def _is_autocast_on_cpu() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before PyTorch 2.4
        return torch.is_autocast_cpu_enabled()


def dense(x: torch.Tensor) -> torch.Tensor:
    """
    `x`, in oneDNN's layout or not, as a plain tensor.
    """
    return x.to_dense() if x.is_mkldnn else x


def frozen_norm_in_onednn(norm: FrozenBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """
    Args:
        x: (B, C, H, W) float32 in oneDNN's layout.

    Returns:
        what `norm` makes of it, in the same layout. oneDNN's own norm takes the mean off first, which
        rounds differently; a convolution of every channel for itself multiplies and adds at once, as
        PyTorch's norm does.
    """
    zeros = torch.zeros_like(norm.bias)
    ones = torch.ones_like(zeros)
    statistics = norm.running_mean, norm.running_var
    shift = F.batch_norm(zeros[None], *statistics, norm.weight, norm.bias, eps=norm.eps)
    factor = F.batch_norm(ones[None], zeros, norm.running_var, norm.weight, zeros, eps=norm.eps)
    return F.conv2d(x, factor.view(-1, 1, 1, 1), shift[0], groups=norm.num_features)
