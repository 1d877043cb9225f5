"""
The masks of any program: arrays, tensors, RLEs, polygons, masks in boxes, and the results of well-known
segmenters. They are told apart by what they look like, so none of these programs has to be installed.
"""

import reprlib
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from .arrays import Region, extent, pasted_mask

__all__ = ["Detections", "read_detections", "rle_runs"]

Size = Tuple[int, int]  # height and width


@dataclass
class Detections:
    """N instances of one image. No mask is larger than its box, and each is made when it is asked for."""

    regions: List[Region]
    make: Callable[[int], np.ndarray]  # gives the (h, w) bool mask of an instance inside its region
    image_size: Size
    scores: Optional[np.ndarray] = None  # (N,) float64
    classes: Optional[np.ndarray] = None  # (N,) int64
    crowds: Optional[np.ndarray] = None  # (N,) bool
    class_names: Dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.regions)

    def mask_of(self, i: int) -> Tuple[np.ndarray, Region]:
        return self.make(i), self.regions[i]


def read_detections(
    masks: Any, scores: Any = None, classes: Any = None, boxes: Any = None, image_size: Any = None
) -> Detections:
    """
    Args:
        masks: one of

            * (N, H, W) bool, or zeros and ones, an array or a tensor on any device
            * a list of COCO segmentations: RLEs, compressed or not, and lists of polygons
            * (N, M, M) float probabilities inside `boxes`
            * `Instances` of Detectron2, `Detections` of supervision, `Results` of ultralytics, the dict of
              a Mask R-CNN of torchvision, or a list of dicts with "segmentation": SAM's, or COCO
              annotations and results

        scores: (N,) float, detection scores, if `masks` has none.
        classes: (N,) integers, if `masks` has none.
        boxes: (N, 4) float, XYXY in pixels, within the image.
        image_size: (H, W). Polygons, boxes and 0 instances do not say it themselves.

    Raises:
        ValueError: these are no masks of one image, or the rest does not fit them.
    """
    given = {"scores": scores, "classes": classes, "boxes": boxes, "image_size": image_size}
    found = {"masks": masks, **_parts(masks)}
    found.update({name: x for name, x in given.items() if x is not None})
    masks, size = found["masks"], found.get("image_size")
    size = None if size is None else (int(size[0]), int(size[1]))
    if found.get("boxes") is not None:
        detections = _in_boxes(_array(masks), _array(found["boxes"]), _known(size))
    elif hasattr(masks, "shape"):
        detections = _full(_array(masks))
    else:
        detections = _segmentations(list(masks), size)
    if size is not None and detections.image_size != size:
        raise ValueError(f"The masks have {detections.image_size} pixels; the image has {size}.")
    number = len(detections)
    for name, dtype in (("scores", np.float64), ("classes", np.int64), ("crowds", np.bool_)):
        values = found.get(name)
        if values is not None:
            setattr(detections, name, _numbers(values, name, number).astype(dtype))
    detections.class_names = found.get("class_names", {})
    return detections


def _parts(x: Any) -> Dict[str, Any]:
    """What the result of a known program holds, or nothing."""
    if hasattr(x, "get_fields") and hasattr(x, "image_size"):  # detectron2.structures.Instances
        parts = {"masks": x.pred_masks, "scores": x.scores, "classes": x.pred_classes}
        if len(x.pred_masks.shape) == 4:  # before they are pasted
            parts = {**parts, "masks": x.pred_masks[:, 0], "boxes": x.pred_boxes.tensor}
        return {**parts, "image_size": x.image_size}
    if hasattr(x, "class_id") and hasattr(x, "confidence"):  # supervision.Detections
        if x.mask is None and len(x.xyxy):
            raise ValueError("These Detections have no masks.")
        names = x.data.get("class_name") if x.class_id is not None else None
        of_class = {} if names is None else dict(zip(x.class_id.tolist(), map(str, names)))
        masks: Any = [] if x.mask is None else np.asarray(x.mask)
        return {"masks": masks, "scores": x.confidence, "classes": x.class_id, "class_names": of_class}
    if hasattr(x, "orig_shape") and hasattr(x, "boxes"):  # ultralytics.engine.results.Results
        # The masks are as large as the network's input. The contours fit the image.
        contours = [] if x.masks is None else [[_array(c).ravel()] for c in x.masks.xy]
        parts = {"masks": contours, "scores": x.boxes.conf, "classes": x.boxes.cls}
        return {**parts, "image_size": x.orig_shape, "class_names": dict(x.names)}
    if isinstance(x, dict) and "masks" in x:  # torchvision.models.detection.MaskRCNN
        masks = x["masks"]
        masks = masks[:, 0] >= 0.5 if len(masks.shape) == 4 else masks
        return {"masks": masks, "scores": x.get("scores"), "classes": x.get("labels")}
    if isinstance(x, (list, tuple)) and x and all(isinstance(y, dict) and "segmentation" in y for y in x):
        parts = {"masks": [y["segmentation"] for y in x]}
        if all(hasattr(m, "shape") for m in parts["masks"]):
            sizes = sorted({tuple(m.shape) for m in parts["masks"]})
            if len(sizes) > 1:
                raise ValueError(f"The masks have several sizes: {sizes}; they must be masks of one image.")
            parts["masks"] = np.stack([_array(m) for m in parts["masks"]])
        names = {"scores": ("score", "predicted_iou"), "classes": ("category_id",)}
        for name, keys in names.items():
            key = next((key for key in keys if any(key in y for y in x)), None)
            if key is not None:
                parts[name] = [y.get(key) for y in x]
        if any(y.get("iscrowd") for y in x):
            parts["crowds"] = [y.get("iscrowd", 0) for y in x]
        return parts
    return {}


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def _numbers(values: Any, name: str, number: int) -> np.ndarray:
    """(N,) float64."""
    array = _array(values)
    if array.shape != (number,):
        raise ValueError(f"The {name} have the shape {array.shape}; there are {number} masks.")
    is_number = array.dtype.kind in "biuf" or not number
    if not is_number or not np.isfinite(array).all() or (name != "scores" and (array % 1).any()):
        kind = "a number" if name == "scores" else "an integer"
        raise ValueError(f"The {name} are {reprlib.repr(array.tolist())}; each must be {kind}.")
    return array.astype(np.float64)


def _known(size: Optional[Size]) -> Size:
    if size is None:
        raise ValueError("These masks do not say how large the image is: image_size=(H, W) is missing.")
    return size


def _full(masks: np.ndarray) -> Detections:
    if masks.ndim != 3:
        raise ValueError(f"The masks have the shape {masks.shape}; it must be (N, H, W).")
    if masks.dtype != bool:
        if masks.dtype.kind not in "iuf" or ((masks != 0) & (masks != 1)).any():
            raise ValueError(
                f"The masks are {masks.dtype}; they must be bool, or zeros and ones. Apply a threshold."
            )
        masks = masks.astype(bool)
    size = (masks.shape[1], masks.shape[2])
    regions = [extent(mask, (slice(0, size[0]), slice(0, size[1]))) for mask in masks]
    return Detections(regions, lambda i: masks[i][regions[i]], size)


def _in_boxes(masks: np.ndarray, boxes: np.ndarray, size: Size) -> Detections:
    boxes, limit = boxes.astype(np.float64).reshape(-1, 4), np.array([size[1], size[0]] * 2)
    square = masks.ndim == 3 and masks.shape[1] == masks.shape[2]
    if not square or masks.dtype.kind != "f" or len(masks) != len(boxes):
        raise ValueError(
            f"The masks are {masks.dtype} {masks.shape}, with {len(boxes)} boxes; masks in boxes are float "
            "(N, M, M). Masks of the whole image need no boxes."
        )
    if not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError("The masks in boxes must be probabilities from 0 to 1.")
    if not (np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= limit).all()):
        raise ValueError(f"A box lies outside the image of {size[1]} x {size[0]} pixels: {boxes.tolist()}.")
    masks, full = masks.astype(np.float32), (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    regions = [
        (slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1)))) if some else (slice(0, 0),) * 2
        for (x0, y0, x1, y1), some in zip(boxes.tolist(), full)
    ]

    def make(i: int) -> np.ndarray:
        if not full[i]:
            return np.zeros((0, 0), bool)
        return pasted_mask(masks[i], boxes[i].tolist(), size)[0]

    return Detections(regions, make, size)


def _segmentations(segmentations: List[Any], size: Optional[Size]) -> Detections:
    rles = [_rle(x, size, f"mask {i}") for i, x in enumerate(segmentations)]
    sizes = sorted({of_one for of_one, _ in rles})
    if len(sizes) > 1:
        raise ValueError(f"The masks have several sizes: {sizes}; they must be masks of one image.")
    size = sizes[0] if sizes else _known(size)
    height = size[0]
    # Of every run of pixels of a mask, the first and what follows its last, counted down the columns.
    edges = [np.cumsum(runs)[: len(runs) // 2 * 2].reshape(-1, 2) for _, runs in rles]
    edges = [x[x[:, 1] > x[:, 0]] for x in edges]
    regions = [_extent_of_runs(x, height) for x in edges]

    def make(i: int) -> np.ndarray:
        rows, columns = regions[i]
        first, last = columns.start * height, columns.stop * height
        changes = np.concatenate([[first], edges[i].ravel(), [last]])
        inside = np.arange(len(changes) - 1) % 2 == 1
        mask = np.repeat(inside, np.diff(changes)).reshape(-1, height)
        return np.ascontiguousarray(mask[:, rows].T)

    return Detections(regions, make, size)


def _extent_of_runs(edges: np.ndarray, height: int) -> Region:
    if not len(edges):
        return slice(0, 0), slice(0, 0)
    first, last = edges[:, 0], edges[:, 1] - 1
    columns = slice(int(first[0]) // height, int(last[-1]) // height + 1)
    if (first // height != last // height).any():  # one ends at the bottom and goes on at the top
        return slice(0, height), columns
    return slice(int((first % height).min()), int((last % height).max()) + 1), columns


def _rle(segmentation: Any, size: Optional[Size], name: str) -> Tuple[Size, np.ndarray]:
    """The size and the runs of any segmentation of COCO."""
    if not isinstance(segmentation, dict):
        from pycocotools import mask as mask_util

        height, width = _known(size)
        try:
            polygons = [_array(x).astype(float).ravel().tolist() for x in segmentation]
        except (TypeError, ValueError):
            polygons = [[np.nan]]
        if any(len(x) % 2 or not np.isfinite(x).all() for x in polygons):
            found = reprlib.repr(segmentation)
            raise ValueError(f"The polygons of {name} are no lists of numbers x, y, x, y, ...: {found}")
        polygons = [x for x in polygons if len(x) >= 6]
        if not polygons:
            return (height, width), np.array([height * width])
        segmentation = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    try:
        height, width = map(int, segmentation["size"])
        counts = segmentation["counts"]
    except (KeyError, TypeError, ValueError):
        found = reprlib.repr(segmentation)
        raise ValueError(f"Segmentation {found} of {name} is no RLE of 'size' and 'counts'.") from None
    runs = rle_runs(counts.tolist() if isinstance(counts, np.ndarray) else counts)
    if runs.sum() != height * width:
        raise ValueError(f"The runs of the RLE of {name} do not add up to {height} x {width} pixels.")
    return (height, width), runs


def rle_runs(counts: Any) -> np.ndarray:
    """
    Args:
        counts: of an RLE of COCO, a list or compressed.

    Returns:
        the lengths of its runs, int64, as `rleFrString` of pycocotools reads them; none if it is no RLE.
    """
    none = np.zeros(0, np.int64)
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
    if isinstance(counts, list):
        is_good = all(isinstance(x, (int, np.integer)) and 0 <= x < 2**31 for x in counts)
        return np.array(counts if is_good else [], np.int64)
    if not isinstance(counts, bytes):
        return none
    # A run is written in parts of 5 bits, the lowest first. Bit 5 says that there is another part, bit 4
    # of the last one is the sign.
    parts = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    is_last = parts & 32 == 0
    if not len(parts) or not is_last[-1]:
        return none
    starts = np.flatnonzero(np.concatenate([[True], is_last[:-1]]))
    place = np.arange(len(parts)) - np.repeat(starts, np.diff(starts, append=len(parts)))
    runs = np.add.reduceat((parts & 31) << 5 * place, starts)
    runs -= (parts[is_last] & 16) << 5 * place[is_last] + 1
    # From the fourth on, the difference from the last but one is written.
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs if runs.min() >= 0 else none
