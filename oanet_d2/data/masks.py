"""
Masks of instances in a JSON, before C code takes their word for how much memory they need.
"""

import math
from typing import Any, Dict, List

import numpy as np

__all__ = ["check_annotation", "check_polygon", "check_rle", "check_size", "rle_runs"]

# Polygons may leave the image (amodal masks do), but not by more than so many of its longer side.
REACH = 10
# Of all masks of an image.
MAX_BYTES = 4 * 2**30


def check_annotation(annotation: Dict, height: int, width: int) -> None:
    """
    Args:
        annotation: of an instance, as Detectron2's `load_coco_json` gives it.
        height, width: of its image.

    Raises:
        ValueError, TypeError, KeyError: the box is not four finite numbers, or to draw the mask
            would take more memory than some masks of the image's size.
    """
    box, mask = annotation["bbox"], annotation.get("segmentation", [])
    if len(box) != 4 or not math.isfinite(sum(box)):
        raise ValueError(f"a 'bbox' is {box!r}; it must be four numbers")
    if isinstance(mask, dict):
        if list(mask["size"]) != [height, width]:
            raise ValueError(
                f"an RLE is of [height, width] {mask['size']}, the image of {[height, width]}"
            )
        return
    for polygon in mask:
        check_polygon(polygon, height, width)


def check_polygon(polygon: List[float], height: int, width: int) -> None:
    """
    Args:
        polygon: x and y in turn, at least three of each, in an image of `height` x `width`.

    Raises:
        ValueError: it lies far out of the image or winds beyond measure. pycocotools takes memory
            for every pixel of the outline.
        TypeError: it is not of numbers.
    """
    low, high, longer = min(polygon), max(polygon), max(height, width)
    if not math.isfinite(sum(polygon)) or low < -REACH * longer or high > REACH * longer:
        raise ValueError(
            f"a polygon has coordinates from {low} to {high} in an image of {width} x {height}"
        )
    # No outline within an image is longer than all sides of its pixels. That one is shorter shows
    # mostly without adding it up.
    longest = 4 * height * width + 100 * (height + width)
    if len(polygon) / 2 * (high - low) > longest and _length(polygon) > longest:
        raise ValueError(
            f"a polygon of {len(polygon) // 2} points is {_length(polygon):.0f} pixels long, in an "
            f"image of {width} x {height}"
        )


def _length(polygon: List[float]) -> float:
    points = np.array(polygon, dtype=float).reshape(-1, 2)
    return float(np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum())


def check_rle(rle: Dict) -> None:
    """
    Raises:
        ValueError: it has fewer or more pixels than its size says. Of fewer, pycocotools makes up
            the rest from what is in the memory.
    """
    height, width = rle["size"]
    pixels = sum(rle_runs(rle["counts"]))
    if pixels != height * width:
        raise ValueError(f"an RLE has {pixels} pixels; {height} x {width} are {height * width}")


def check_size(num_masks: int, height: int, width: int) -> None:
    """
    Raises:
        ValueError: so many masks of this size take more than MAX_BYTES.
    """
    if num_masks * height * width > MAX_BYTES:
        raise ValueError(
            f"{num_masks:,} masks of {width} x {height} pixels would take more than "
            f"{MAX_BYTES / 2**30:.0f} GiB; cut the image into parts"
        )


def rle_runs(counts: Any) -> List[int]:
    """
    The runs of an RLE, outside and inside in turn. pycocotools does not say where they are wrong.

    Args:
        counts: the runs, or pycocotools' string of them: 5 bits in a character, the sixth says that
            more follow; from the fourth run on the difference to the last run but one.
    """
    if isinstance(counts, list):
        return counts
    runs: List[int] = []
    value, shift = 0, 0
    for code in counts if isinstance(counts, bytes) else counts.encode():
        value |= ((code - 48) & 31) << shift
        shift += 5
        if not (code - 48) & 32:
            value -= ((code - 48) & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
