"""
From scores of the semantic branch to a label for every pixel that no instance takes.
"""

from typing import Tuple

import torch

from .arrays import label_in_tiles, semantic_labels

__all__ = ["resized_semantic_labels", "semantic_labels"]


def resized_semantic_labels(
    scores: torch.Tensor,
    stride: int,
    image_size: Tuple[int, int],
    output_size: Tuple[int, int],
    keep_things_free: bool,
) -> torch.Tensor:
    """
    :func:`oanet_d2.painting.arrays.label_in_tiles`, on the scores' device.

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
    labels = torch.empty(output_size, dtype=torch.int64, device=scores.device)
    with torch.autocast(scores.device.type, enabled=False):
        label_in_tiles(
            labels,
            scores,
            stride,
            image_size,
            keep_things_free,
            tile=32 if scores.device.type == "cpu" else 512,  # a GPU needs enough to do
            convert=lambda matrix: torch.from_numpy(matrix).to(scores),
        )
    return labels
