"""
The gallery's pictures: a photo, and for every result a layer to lay over it. A layer is drawn
without text; its labels are placed by the page, so that they are as legible on a phone as on a
wide screen.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
from panopticapi.utils import rgb2id
from PIL import Image

from ..evaluation.report_data import SIDE, shrunk_size
from ..visualization import MARK, PanopticSeg, changed_pixels
from .data import ReportError, read_picture

__all__ = ["Label", "Layer", "case_pictures", "draw_layer", "labels"]

FILL = 150  # opacity of a segment's color, of 255
EDGE = (255, 255, 255, 255)
# A segment with a smaller share of the picture is not labelled.
LABEL_SHARE = 0.008


@dataclass(frozen=True)
class Label:
    """
    Where a segment's name stands: in percent of the picture's width and height.
    """

    text: str
    x: float
    y: float
    isthing: bool


@dataclass(frozen=True)
class Layer:
    """
    A result: a picture (as data URI) that is transparent where nothing is, and its labels.
    """

    uri: str
    labels: List[Label]


def case_pictures(folder: str, case: Dict, classes: Dict) -> Dict:
    """
    Read the files of a case and draw its layers.

    Args:
        folder: the evaluation's output folder.
        case: see :mod:`oanet_d2.evaluation.report_data`.
        classes: (isthing, category_id) -> the class.

    Returns:
        "photo": data URI; "ground_truth", "before", "after": :class:`Layer`.

    Raises:
        ReportError: a file is missing or broken.
    """
    size = shrunk_size(case["width"], case["height"])
    photo = read_picture(folder, case["photo"])
    _decode(photo, "WEBP", size, case["photo"])
    maps = {}
    for key in ("ground_truth", "before", "after"):
        name = case[key]["file"]
        picture = _decode(read_picture(folder, name), "PNG", size, name)
        ids = rgb2id(np.asarray(picture.convert("RGB"))).astype(np.int64)
        maps[key] = ids, case[key]["segments_info"]
    changed = changed_pixels(maps["before"], maps["after"])
    pictures: Dict[str, Any] = {"photo": _uri(photo)}
    for key, panoptic_seg in maps.items():
        drawn = draw_layer(panoptic_seg, classes, None if key == "ground_truth" else changed)
        pictures[key] = Layer(_uri(_webp(drawn)), labels(panoptic_seg, classes))
    return pictures


def draw_layer(
    panoptic_seg: PanopticSeg, classes: Dict, changed: Optional[np.ndarray] = None
) -> np.ndarray:
    """
    Every segment in its class's color, things with a white edge.

    Args:
        panoptic_seg: (h, w) segment ids and the segments.
        classes: (isthing, category_id) -> {"color": RGB}.
        changed: (h, w) bool; outlined.

    Returns:
        (H, W, 4) uint8 RGBA, the longer side SIDE pixels.
    """
    ids, segments_info = panoptic_seg
    scale = SIDE / max(ids.shape)
    height, width = (max(1, round(scale * x)) for x in ids.shape)
    size = width, height
    layer = np.zeros((height, width, 4), dtype=np.uint8)
    enlarged = [_enlarged(ids == s["id"], size) for s in segments_info]
    for mask, s in zip(enlarged, segments_info):
        layer[mask] = (*classes[s["isthing"], s["category_id"]]["color"], FILL)
    for mask, s in zip(enlarged, segments_info):
        if s["isthing"]:
            _outline(layer, mask, EDGE, 1)
    if changed is not None:
        _outline(layer, _enlarged(changed, size), (*MARK, 255), 2)
    return layer


def labels(panoptic_seg: PanopticSeg, classes: Dict) -> List[Label]:
    """
    The names of the segments that are large enough, each at a point of its segment that is
    farthest from the segment's edge.

    Args:
        panoptic_seg: (h, w) segment ids, h and w at most SIDE, and the segments.
    """
    ids, segments_info = panoptic_seg
    height, width = ids.shape
    found = []
    for s in segments_info:
        mask = ids == s["id"]
        if mask.mean() < LABEL_SHARE:
            continue
        # The picture's border is an edge too. In whole numbers, which are the same every time.
        depth = cv2.distanceTransform(
            np.pad(mask, 1).astype(np.uint8), cv2.DIST_L1, cv2.DIST_MASK_3, dstType=cv2.CV_8U
        )[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        name = classes[s["isthing"], s["category_id"]]["name"]
        x, y = 100 * (column + 0.5) / width, 100 * (row + 0.5) / height
        found.append(Label(name, round(float(x), 1), round(float(y), 1), s["isthing"]))
    return found


def _enlarged(mask: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    # Linear, so that edges are smooth; neighbours meet halfway.
    enlarged = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return enlarged >= 0.5


def _outline(layer: np.ndarray, mask: np.ndarray, color: Sequence[int], thickness: int):
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(layer, contours, -1, color, thickness)


def _decode(content: bytes, format: str, size: Tuple[int, int], name: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(content), formats=[format])
        # before anything is decoded: a small file can hold a very large picture
        if picture.size != size:
            raise ReportError(f"{name} is of size {picture.size}; it must be {size}.")
        picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ReportError(f"{name} is not a {format} picture: {error}") from error
    return picture


def _webp(layer: np.ndarray) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(layer).save(out, format="WEBP", lossless=True, quality=60, method=4)
        return out.getvalue()


def _uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()
