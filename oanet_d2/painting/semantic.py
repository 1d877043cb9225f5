"""
From scores of the semantic branch to a label for every pixel that no instance takes.
"""

from typing import Iterator, Tuple

import torch
from torch.nn import functional as F

__all__ = ["resized_semantic_labels", "semantic_labels"]


def semantic_labels(sem_seg: torch.Tensor, keep_things_free: bool) -> torch.Tensor:
    """
    Args:
        sem_seg: (1 + S, H, W) float scores. Channel 0 is "any thing", channels 1..S are stuff
            (Detectron2's convention for panoptic segmentation).
        keep_things_free: if True, a pixel whose best channel is 0 gets label 0 and stays free.
            If False, every pixel takes its best stuff class, if there is one.

    Returns:
        (H, W) int64 in [0, S]; 0 means no stuff.
    """
    # max() takes less than half the time of argmax() on a CPU.
    if keep_things_free or len(sem_seg) == 1:
        return sem_seg.max(dim=0).indices
    return sem_seg[1:].max(dim=0).indices + 1


def resized_semantic_labels(
    scores: torch.Tensor,
    stride: int,
    image_size: Tuple[int, int],
    output_size: Tuple[int, int],
    keep_things_free: bool,
) -> torch.Tensor:
    """
    :func:`semantic_labels` at the size of the output, directly from the resolution of the semantic
    branch, one tile at a time. No class is ever held at full resolution.

    Detectron2 interpolates twice: to the network's input and, cut to the image, from there to the
    output. Both steps are linear and treat rows and columns apart. Together they are two matrices,
    and a tile needs only the few entries that are not zero. The labels differ from Detectron2's
    only where two classes are equal up to rounding.

    Args:
        scores: (1 + S, h, w) float, of the padded input.
        stride: pixels of the network's input per cell.
        image_size: (height, width) of the network's input, without padding.
        output_size: (H, W).
        keep_things_free: see :func:`semantic_labels`.

    Returns:
        (H, W) int64 in [0, S].
    """
    scores = scores.float()
    # A CPU should find a tile of every class in its cache. A GPU needs enough to do.
    tile = 32 if scores.device.type == "cpu" else 512
    rows, columns = (
        list(_tiles(_interpolation(*sizes), tile, scores))
        for sizes in zip(scores.shape[1:], (stride, stride), image_size, output_size)
    )
    labels = torch.empty(output_size, dtype=torch.int64, device=scores.device)
    with torch.autocast(scores.device.type, enabled=False):
        for out_rows, in_rows, from_rows in rows:
            # Rows first, then columns, with the classes in between. Each step is one matrix product,
            # and the classes of a pixel lie close together when they are compared.
            band = from_rows.T @ scores[:, in_rows].transpose(0, 1).flatten(1)
            band = band.unflatten(1, (len(scores), -1))  # (rows, classes, w)
            for out_columns, in_columns, from_columns in columns:
                part = (band[:, :, in_columns] @ from_columns).transpose(0, 1)
                labels[out_rows, out_columns] = semantic_labels(part, keep_things_free)
    return labels


def _interpolation(cells: int, stride: int, image_length: int, length: int) -> torch.Tensor:
    """
    (cells, length) float32: the weight of each cell at each pixel of the output, along one dimension,
    after the interpolations of :meth:`SemSegFPNHead.forward` and :func:`sem_seg_postprocess`.
    """
    unit = torch.eye(cells)[None]
    image = F.interpolate(unit, scale_factor=stride, mode="linear", align_corners=False)
    image = image[:, :, :image_length]
    return F.interpolate(image, size=length, mode="linear", align_corners=False)[0]


def _tiles(
    matrix: torch.Tensor, length: int, like: torch.Tensor
) -> Iterator[Tuple[slice, slice, torch.Tensor]]:
    """
    Yields, for parts of `length` pixels, the pixels, the cells with a weight there, and that part of
    a matrix of :func:`_interpolation`, with the device and dtype of `like`.
    """
    for first in range(0, matrix.shape[1], length):
        pixels = slice(first, min(first + length, matrix.shape[1]))
        used = matrix[:, pixels].any(dim=1).nonzero()
        cells = slice(int(used[0]), int(used[-1]) + 1)
        yield pixels, cells, matrix[cells, pixels].to(like)
