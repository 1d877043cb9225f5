"""
Resize pictures exactly as Detectron2 does by PIL, with NumPy alone.
"""

from typing import Tuple

import numpy as np

__all__ = ["resize", "shortest_edge_size"]

# PIL's weights are integers, multiples of 2**-22.
_BITS = 22


def shortest_edge_size(size: Tuple[int, int], min_size: int, max_size: int) -> Tuple[int, int]:
    """
    Detectron2's :meth:`ResizeShortestEdge.get_output_shape`.

    Args:
        size: (H, W).
        min_size: of the shorter side; 0 leaves the size as it is.
        max_size: of the longer side, which is the stronger limit.

    Returns:
        (height, width). A side of a very narrow picture may be 0.
    """
    if min_size == 0:
        return size
    scale = min_size / min(size)
    height, width = (min_size if side == min(size) else scale * side for side in size)
    if max(height, width) > max_size:
        scale = max_size / max(height, width)
        height, width = height * scale, width * scale
    return int(height + 0.5), int(width + 0.5)


def resize(image: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """
    PIL's `resize` with `Resampling.BILINEAR`, bit for bit. It smooths what becomes smaller.

    Args:
        image: (H, W, C) uint8.
        size: (height, width), at least 1.

    Returns:
        (height, width, C) uint8; `image` itself if it has the size.
    """
    if size == image.shape[:2]:
        return image
    saved = image.shape[0] - size[0], image.shape[1] - size[1]
    # Rounding after the first pass makes its direction visible. This is Pillow 13's choice; older
    # ones always resize the width first, so that a tall picture may differ by 1.
    if saved[0] > max(2 * saved[1], 0):
        return _turned(_resize_rows(_turned(_resize_rows(image, size[0])), size[1]))
    return _resize_rows(_turned(_resize_rows(_turned(image), size[1])), size[0])


def _turned(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.swapaxes(0, 1))


def _resize_rows(image: np.ndarray, length: int) -> np.ndarray:
    if length == len(image):
        return image
    first, weights = _weights(len(image), length)
    flat = image.reshape(len(image), -1)
    out = np.empty((length, flat.shape[1]), np.uint8)
    rows = max(1, 2**16 // flat.shape[1])  # that stay in a CPU's cache
    for start in range(0, length, rows):
        part = slice(start, start + rows)
        total = np.full(out[part].shape, 1 << (_BITS - 1), np.int32)  # a half, to round
        for tap, weight in enumerate(weights[part].T):
            source = flat[np.minimum(first[part] + tap, len(flat) - 1)]  # beyond the end weights are 0
            total += source * weight[:, None]
        out[part] = total >> _BITS
    return out.reshape(length, *image.shape[1:])


def _weights(length: int, new_length: int) -> Tuple[np.ndarray, np.ndarray]:
    """
    For each of the new pixels the first pixel that it is made of, (new_length,), and the weights of
    this and the following ones, (new_length, taps) int32.
    """
    scale = length / new_length
    support = max(scale, 1.0)
    centre = (np.arange(new_length) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    pixel = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs((pixel - centre[:, None] + 0.5) * (1 / support)), 0)
    weights[pixel >= last[:, None]] = 0
    # One after the other, as PIL adds them: another order would round differently.
    weights /= weights.cumsum(axis=1)[:, -1:]
    weights = (0.5 + weights * (1 << _BITS)).astype(np.int32)
    return first, weights[:, : int(weights.any(axis=0).nonzero()[0][-1]) + 1]
