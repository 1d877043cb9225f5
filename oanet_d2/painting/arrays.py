"""
Painting in NumPy, where PyTorch is not needed or not installed. The functions of this package that
take tensors call it for what runs on a CPU.
"""

from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np

__all__ = ["extent", "fill", "fuse", "label_in_tiles", "order_of_sorted", "paint", "pasted_mask"]
__all__ += ["runs", "semantic_labels", "stuff_to_paint"]

Array = Any  # a NumPy array or a tensor
Runs = Tuple[np.ndarray, np.ndarray, np.ndarray]
Region = Tuple[slice, slice]  # rows and columns
MaskOf = Callable[[int], Tuple[Array, Region]]  # gives an instance's mask inside its region

# Rows of this many pixels together stay in a CPU's cache.
_PIXELS_AT_ONCE = 2**17

# Margins are compared as multiples of this, in integers. Their sums and differences are then exact,
# so that the result does not depend on the order of additions.
_MARGIN_QUANTUM = 2.0**-20


def order_of_sorted(margins: np.ndarray) -> np.ndarray:
    """
    :func:`oanet_d2.painting.order_from_margins` of instances in descending order of their scores.

    Args:
        margins: (N, N) antisymmetric float; margins[a, b] > 0 means that a goes before b.

    Returns:
        (N,) int64, a permutation of 0..N-1, first painted first.
    """
    lost = np.rint(np.maximum(-margins.astype(np.float64), 0) / _MARGIN_QUANTUM).astype(np.int64)
    against = lost.sum(axis=1)
    order = np.empty(len(lost), dtype=np.int64)
    for position in range(len(lost)):
        best = int(against.argmin())  # the first minimum: the highest score among equals
        order[position] = best
        against -= lost[:, best]
        against[best] = np.iinfo(np.int64).max
        lost[best] = 0  # so that later subtractions leave `against[best]` alone
    return order


def runs(ids: np.ndarray) -> Runs:
    """
    Segment ids are constant over long runs, so there are far fewer runs to sort than pixels.

    Args:
        ids: (H, W) integers from 0 on.

    Returns:
        the different ids, sorted; for each run of the flattened ids the index of its id among them,
        and its length.
    """
    flat = ids.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    found, inverse = np.unique(flat[starts], return_inverse=True)
    return found, inverse, np.diff(starts, append=ids.size)


def extent(mask: np.ndarray, region: Region) -> Region:
    """
    Args:
        mask: (h, w) bool.
        region: of the image that the mask covers.

    Returns:
        the smallest region of the image with all pixels of the mask; (slice(0, 0), slice(0, 0))
        without a pixel.
    """
    y = np.flatnonzero(mask.any(axis=1))
    if not len(y):
        return slice(0, 0), slice(0, 0)
    x = np.flatnonzero(mask[y[0] : y[-1] + 1].any(axis=0))
    rows, columns = (
        slice(r.start + int(k[0]), r.start + int(k[-1]) + 1) for r, k in zip(region, (y, x))
    )
    return rows, columns


def pasted_mask(
    roi_mask: np.ndarray, box: Sequence[float], image_size: Tuple[int, int], threshold: float = 0.5
) -> Tuple[np.ndarray, Region]:
    """
    What a mask head predicts for one instance, at the resolution of the image, as
    :meth:`oanet_d2.painting.BoxedMasks.paste` makes it up to rounding.

    Args:
        roi_mask: (M, M) float32 probabilities in [0, 1], relative to the box.
        box: XYXY in pixels, within the image, not empty.
        image_size: (H, W).
        threshold: a pixel belongs to the instance where the probability is at least this; 0.5 or
            more.

    Returns:
        (h, w) bool and the region of the image that it covers, which is the box.
    """
    x0, y0, x1, y1 = box
    rows, from_rows = _pasting(y0, y1, image_size[0], len(roi_mask))
    columns, from_columns = _pasting(x0, x1, image_size[1], len(roi_mask))
    return from_rows @ roi_mask @ from_columns.T >= threshold, (rows, columns)


def _pasting(first: float, last: float, length: int, cells: int) -> Tuple[slice, np.ndarray]:
    """
    Along one dimension, the pixels that a box touches and the weight of every cell at each of them,
    (pixels, cells) float32. Outside the box the probability falls to 0 within a cell.
    """
    pixels = slice(max(int(np.floor(first)), 0), min(int(np.ceil(last)), length))
    centre = np.arange(pixels.start, pixels.stop) + 0.5
    position = (centre - first) / (last - first) * cells - 0.5
    weights = np.maximum(1 - np.abs(position[:, None] - np.arange(cells)), 0)
    return pixels, weights.astype(np.float32)


def semantic_labels(sem_seg: Array, keep_things_free: bool) -> Array:
    """
    Args:
        sem_seg: (1 + S, H, W) float scores, an array or a tensor. Channel 0 is "any thing", channels
            1..S are stuff (Detectron2's convention for panoptic segmentation).
        keep_things_free: if True, a pixel whose best channel is 0 gets label 0 and stays free.
            If False, every pixel takes its best stuff class, if there is one.

    Returns:
        (H, W) int64 in [0, S]; 0 means no stuff.
    """
    if keep_things_free or len(sem_seg) == 1:
        return _best(sem_seg)
    return _best(sem_seg[1:]) + 1


def _best(scores: Array) -> Array:
    if isinstance(scores, np.ndarray):
        return scores.argmax(axis=0)
    return scores.max(dim=0).indices  # less than half the time of argmax() on a CPU


def label_in_tiles(
    labels: Array,
    scores: Array,
    stride: int,
    image_size: Tuple[int, int],
    keep_things_free: bool,
    tile: int = 32,
    convert: Callable[[np.ndarray], Array] = np.ascontiguousarray,
) -> None:
    """
    :func:`semantic_labels` at the size of the output, directly from the resolution of the semantic
    branch, one tile at a time. No class is ever held at full resolution.

    Detectron2 interpolates twice: to the network's input and, cut to the image, from there to the
    output. Both steps are linear and treat rows and columns apart. Together they are two matrices,
    and a tile needs only the few entries that are not zero. The labels differ from Detectron2's
    only where two classes are equal up to rounding.

    Args:
        labels: (H, W) int64, the output. It becomes the labels, in [0, S].
        scores: (1 + S, h, w) float32, of the padded input. Arrays and tensors go equally.
        stride: pixels of the network's input per cell.
        image_size: (height, width) of the network's input, without padding.
        keep_things_free: see :func:`semantic_labels`.
        tile: pixels along its sides. A CPU should find a tile of every class in its cache.
        convert: makes of a float32 array what can be multiplied with `scores`.
    """
    rows, columns = (
        [(pixels, cells, convert(part)) for pixels, cells, part in _tiles(_interpolation(*sizes), tile)]
        for sizes in zip(scores.shape[1:], (stride, stride), image_size, labels.shape)
    )
    for out_rows, in_rows, from_rows in rows:
        # Rows first, then columns, with the classes in between. Each step is one matrix product,
        # and the classes of a pixel lie close together when they are compared.
        band = scores[:, in_rows].swapaxes(0, 1).reshape(len(from_rows), -1)
        band = (from_rows.T @ band).reshape(from_rows.shape[1], len(scores), -1)
        for out_columns, in_columns, from_columns in columns:
            part = (band[:, :, in_columns] @ from_columns).swapaxes(0, 1)
            labels[out_rows, out_columns] = semantic_labels(part, keep_things_free)


def _interpolation(cells: int, stride: int, image_length: int, length: int) -> np.ndarray:
    """
    (cells, length) float32: the weight of each cell at each pixel of the output, along one dimension,
    after the interpolations of :meth:`SemSegFPNHead.forward` and :func:`sem_seg_postprocess`.
    """
    image = _interpolated(np.eye(cells, dtype=np.float32), cells * stride, 1 / stride)
    image = image[:, :image_length]
    return _interpolated(image, length, image.shape[1] / length)


def _interpolated(rows: np.ndarray, length: int, step: float) -> np.ndarray:
    """The rows (K, n) at `length` points `step` apart, between centres; the edge goes on outside."""
    last = rows.shape[1] - 1
    position = np.clip((np.arange(length) + 0.5) * step - 0.5, 0, last)
    before = position.astype(np.int64)
    share = (position - before).astype(np.float32)
    return rows[:, before] * (1 - share) + rows[:, np.minimum(before + 1, last)] * share


def _tiles(matrix: np.ndarray, length: int) -> Iterator[Tuple[slice, slice, np.ndarray]]:
    """
    Yields, for parts of `length` pixels, the pixels, the cells with a weight there, and that part of
    a matrix of :func:`_interpolation`.
    """
    for first in range(0, matrix.shape[1], length):
        pixels = slice(first, min(first + length, matrix.shape[1]))
        used = matrix[:, pixels].any(axis=1).nonzero()[0]
        cells = slice(int(used[0]), int(used[-1]) + 1)
        yield pixels, cells, matrix[cells, pixels]


def paint(
    panoptic: np.ndarray, mask_of: MaskOf, indices: List[int], overlap_threshold: float
) -> List[int]:
    """Paint into `panoptic` and return the instances that were not dropped."""
    kept: List[int] = []
    for index in indices:
        mask, region = mask_of(index)
        free = panoptic[region]
        visible = mask & (free == 0)
        area, visible_area = np.count_nonzero(mask), np.count_nonzero(visible)
        if visible_area > 0 and (area - visible_area) / area <= overlap_threshold:
            kept.append(index)
            np.copyto(free, len(kept), where=visible)
    return kept


def fill(
    panoptic: np.ndarray, semantic: np.ndarray, stuff_area_thresh: int, first_id: int
) -> List[Tuple[int, int]]:
    """
    Paint stuff onto the free pixels of `panoptic` and return the labels and areas of its segments.
    """
    num_labels = int(semantic.max()) + 1
    # An eighth of the bytes.
    semantic = semantic.astype(np.uint8 if num_labels <= 256 else np.int64, copy=False)
    rows = max(1, _PIXELS_AT_ONCE // panoptic.shape[1])
    starts = range(0, len(panoptic), rows)
    strips = [(panoptic[i : i + rows], semantic[i : i + rows]) for i in starts]

    areas = np.zeros(num_labels, dtype=np.int64)
    for part, labels in strips:
        # Neighbours mostly have one label, so there are far fewer runs to count than pixels.
        flat = (labels * (part == 0)).ravel()
        ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), len(flat) - 1)
        np.add.at(areas, flat[ends], np.diff(ends, prepend=-1))

    found, id_of_label = stuff_to_paint(areas.tolist(), stuff_area_thresh, first_id)
    for part, labels in strips:
        # "clip" is faster than a check of every label.
        np.copyto(part, np.take(id_of_label, labels, mode="clip"), where=part == 0)
    return found


def stuff_to_paint(
    areas: List[int], stuff_area_thresh: int, first_id: int
) -> Tuple[List[Tuple[int, int]], np.ndarray]:
    """
    Of the free pixels of every label, the labels that are large enough with their areas, and the
    segment ids of at least 256 labels, (L,) int32, 0 for a label that is not painted.
    """
    least = max(stuff_area_thresh, 1)
    found = [(label, area) for label, area in enumerate(areas) if label and area >= least]
    id_of_label = np.zeros(max(len(areas), 256), dtype=np.int32)
    for segment_id, (label, _) in enumerate(found, start=first_id):
        id_of_label[label] = segment_id
    return found, id_of_label


def fuse(
    panoptic: Array,
    mask_of: MaskOf,
    scores: List[float],
    classes: List[int],
    order: List[int],
    semantic: Array,
    *,
    overlap_threshold: float,
    stuff_area_thresh: int,
    instances_score_thresh: float = 0.0,
    paint: Callable[..., List[int]] = paint,
    fill: Callable[..., List[Tuple[int, int]]] = fill,
) -> List[Dict]:
    """
    What :func:`oanet_d2.painting.combine` does, into a map that the caller provides.

    Args:
        panoptic: (H, W) int32 of zeros. It becomes the panoptic map.
        mask_of: gives the (h, w) bool mask of an instance inside its region, and the region.
        semantic: (H, W) integers, see :func:`semantic_labels`.
        paint, fill: where panoptic and semantic are no arrays, what paints them.

    Other arguments are the same as for `combine`, in lists.

    Returns:
        segments_info, see `combine`.

    Raises:
        ValueError: `order` is not a permutation of the instances.
    """
    if sorted(order) != list(range(len(scores))):
        raise ValueError(
            f"The painting order is {order}; it must hold each of the {len(scores)} instances once."
        )
    confident = [i for i in order if scores[i] >= instances_score_thresh]
    segments_info: List[Dict] = []
    for index in paint(panoptic, mask_of, confident, overlap_threshold):
        segment = {"id": len(segments_info) + 1, "isthing": True, "score": scores[index]}
        segments_info.append({**segment, "category_id": classes[index], "instance_id": index})
    for label, area in fill(panoptic, semantic, stuff_area_thresh, len(segments_info) + 1):
        segment = {"id": len(segments_info) + 1, "isthing": False}
        segments_info.append({**segment, "category_id": label, "area": area})
    return segments_info
