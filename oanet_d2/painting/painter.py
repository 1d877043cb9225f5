"""
A panoptic map of anyone's masks. It needs NumPy and, for polygons, pycocotools.
"""

import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from .arrays import Region, extent, fuse
from .formats import Detections, _array, read_detections

__all__ = ["RULES", "Painted", "load_order", "paint", "paint_detections"]

# The instance with the smallest number is painted first; the higher score decides between equals. They
# are the rules of these names in `ranking`, at the image's resolution.
_NUMBER: Dict[str, Callable[[np.ndarray, Region], int]] = {
    "smaller_first": lambda mask, region: np.count_nonzero(mask),
    "lower_first": lambda mask, region: -extent(mask, region)[0].stop,
}
RULES = ("score", *_NUMBER)


@dataclass
class Painted:
    panoptic_seg: np.ndarray  # (H, W) int32; 0 is void, segments count from 1
    segments_info: List[Dict]  # see oanet_d2.painting.combine
    order: np.ndarray  # int64 indices of the instances, first painted first: it lies on top


def paint(
    masks: Any,
    scores: Any = None,
    classes: Any = None,
    order: Any = "score",
    *,
    boxes: Any = None,
    image_size: Optional[Tuple[int, int]] = None,
    semantic: Any = None,
    score_threshold: float = 0.0,
    overlap_threshold: float = 0.5,
    stuff_area_threshold: int = 4096,
    class_names: Union[Mapping[int, str], Sequence[str], None] = None,
) -> Painted:
    """
    Decide whose every pixel is. Instances are painted in an order, each onto the pixels that are still
    free, then the stuff classes onto the rest: Panoptic FPN's fusion, with an order of your choice.

    Args:
        masks, scores, classes, boxes, image_size: see :func:`oanet_d2.painting.read_detections`. Without
            classes they are all of class 0.
        order: "score" (highest first), "smaller_first" (fewest pixels), "lower_first" (which reaches
            further down), a :class:`LearnedOrder` or its file `*.safetensors`, or a permutation of the
            instances.
        semantic: (H, W) integers, a stuff class for what is left, 0 for none.
        score_threshold: instances with a lower score are not painted.
        overlap_threshold: an instance is dropped if more than this share of it is covered; 1 keeps
            whatever has a visible pixel.
        stuff_area_threshold: a stuff class with fewer pixels left is dropped.
        class_names: names by class. A learned order needs them; then segments have "category_name", too.

    Raises:
        ValueError: something does not fit together. The message names it.
    """
    detections = read_detections(masks, scores, classes, boxes, image_size)
    if class_names is not None:
        by_class = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
        detections.class_names = dict(by_class)
    return paint_detections(
        detections,
        load_order(order),
        semantic,
        score_threshold=score_threshold,
        overlap_threshold=overlap_threshold,
        stuff_area_threshold=stuff_area_threshold,
    )


def paint_detections(
    detections: Detections,
    order: Any,
    semantic: Any = None,
    *,
    score_threshold: float,
    overlap_threshold: float,
    stuff_area_threshold: int,
) -> Painted:
    """:func:`paint` of detections that are read already, in an order of :func:`load_order`."""
    size, number = detections.image_size, len(detections)
    semantic = np.zeros(size, np.uint8) if semantic is None else _array(semantic)
    if semantic.shape != size or semantic.dtype.kind not in "iu" or semantic.min(initial=0) < 0:
        raise ValueError(
            f"The semantic labels are {semantic.dtype} {semantic.shape}; they must be integers from 0 on, "
            f"{size} as the masks."
        )
    scores = np.full(number, np.inf) if detections.scores is None else detections.scores
    classes = np.zeros(number, np.int64) if detections.classes is None else detections.classes
    painted = scores >= score_threshold
    chosen = np.flatnonzero(painted)
    ordered = chosen[_order(order, detections, chosen)]
    if detections.crowds is not None:  # they lie behind, in any order
        ordered = ordered[np.argsort(detections.crowds[ordered], kind="stable")]
    panoptic_seg = np.zeros(size, np.int32)
    segments_info = fuse(
        panoptic_seg,
        detections.mask_of,
        scores.tolist(),
        classes.tolist(),
        [*ordered.tolist(), *np.flatnonzero(~painted).tolist()],
        semantic,
        overlap_threshold=overlap_threshold,
        stuff_area_thresh=stuff_area_threshold,
        instances_score_thresh=score_threshold,
    )
    for segment in segments_info:
        if segment["isthing"]:
            if detections.scores is None:
                del segment["score"]
            if detections.crowds is not None:
                segment["iscrowd"] = int(detections.crowds[segment["instance_id"]])
            if detections.class_names:
                segment["category_name"] = detections.class_names.get(segment["category_id"], "")
    return Painted(panoptic_seg, segments_info, ordered)


def load_order(order: Any) -> Any:
    """
    The learned order of a file. Other orders stay as they are.

    Raises:
        ValueError: it is no learned order, and no name of a rule.
    """
    if not isinstance(order, (str, os.PathLike)) or order in RULES:
        return order
    if not os.fspath(order).endswith(".safetensors"):
        raise ValueError(f"The order {order!r} is none of {[*RULES]}, and no file *.safetensors.")
    from .learned import LearnedOrder

    return LearnedOrder.load(order)


def _order(order: Any, detections: Detections, chosen: np.ndarray) -> np.ndarray:
    """Positions in `chosen`, first painted first."""
    if hasattr(order, "order"):  # a LearnedOrder
        return _learned(order, detections, chosen)
    if not isinstance(order, str):
        order = _array(order)
        if order.ndim != 1 or sorted(order.tolist()) != list(range(len(detections))):
            raise ValueError(
                f"The order is {order.tolist()}; it must hold each of the {len(detections)} instances once."
            )
        return np.searchsorted(chosen, order[np.isin(order, chosen)])
    if detections.scores is not None:
        by_score = np.argsort(-detections.scores[chosen], kind="stable")
    elif order != "score" or not len(chosen):
        by_score = np.arange(len(chosen))
    else:
        raise ValueError("The order 'score' needs scores.")
    if order == "score":
        return by_score
    values = np.array([_NUMBER[order](*detections.mask_of(i)) for i in chosen[by_score]])
    return by_score[np.argsort(values, kind="stable")]


def _learned(order: Any, detections: Detections, chosen: np.ndarray) -> np.ndarray:
    if not len(chosen):
        return chosen
    if detections.classes is None or not detections.class_names:
        raise ValueError("A learned order needs classes and class_names.")
    of_classes = detections.classes[chosen].tolist()
    unnamed = sorted(set(of_classes) - set(detections.class_names))
    if unnamed:
        raise ValueError(f"The class_names lack a name for {unnamed}.")
    extents = [extent(*detections.mask_of(i)) for i in chosen]
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in extents], float)
    names = [detections.class_names[c] for c in of_classes]
    # Annotations are certain.
    scores = np.ones(len(chosen)) if detections.scores is None else detections.scores[chosen]
    rest = boxes, scores, names, detections.image_size
    return order.order(lambda i: detections.mask_of(int(chosen[i])), *rest)
