"""
The pictures of the report's cases. Names of segments are not drawn: the page places them as text.
"""

import base64
import io
from typing import Dict, List, Optional, Tuple

import cv2
import numpy as np
from PIL import Image

from detectron2.utils.colormap import colormap

from ..visualization import MARK, PanopticSeg

__all__ = ["SIDE", "data_uri", "draw_segments", "labels", "resized", "shrunk"]

SIDE = 480  # pixels, the longer side
FILL = 0.6  # opacity of a segment's color
LABEL_SHARE = 0.008  # a segment with a smaller share of the picture gets no label


def resized(image: np.ndarray) -> np.ndarray:
    """
    An RGB image with a longer side of SIDE pixels.
    """
    height, width = _size(image.shape)
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method)


def shrunk(ids: np.ndarray) -> np.ndarray:
    """
    (H, W) ids with a longer side of SIDE pixels at most.
    """
    rows, columns = (
        np.linspace(0, n - 1, min(n, most)).astype(int)
        for n, most in zip(ids.shape, _size(ids.shape))
    )
    return ids[np.ix_(rows, columns)]


def draw_segments(
    photo: np.ndarray, panoptic: PanopticSeg, metadata, outlined: Optional[np.ndarray] = None
) -> np.ndarray:
    """
    Every segment in the color of its class, things with a white edge.

    Args:
        photo: from :func:`resized`.
        panoptic: NumPy ids of any resolution, and segments_info.
        metadata: of the dataset. Detectron2's colors are taken for classes without one.
        outlined: bool, at the resolution of the ids.

    Returns:
        RGB, of the size of `photo`.
    """
    ids, segments_info = panoptic
    size = photo.shape[1], photo.shape[0]
    masks = [_enlarged(ids == s["id"], size) for s in segments_info]
    filled = photo.copy()
    for mask, s in zip(masks, segments_info):
        filled[mask] = _color(metadata, s["isthing"], s["category_id"])
    drawn = cv2.addWeighted(photo, 1 - FILL, filled, FILL, 0)
    for mask, s in zip(masks, segments_info):
        if s["isthing"]:
            _outline(drawn, mask, (255, 255, 255), 1)
    if outlined is not None:
        _outline(drawn, _enlarged(outlined, size), MARK, 2)
    return drawn


def labels(panoptic: PanopticSeg, metadata) -> List[Dict]:
    """
    The names of the large segments, each at a point far from the edges of its segment.

    Returns:
        dicts of "text", "isthing", and "x" and "y" in percent of the picture.
    """
    ids, segments_info = panoptic
    height, width = ids.shape
    found = []
    for s in segments_info:
        mask = ids == s["id"]
        if mask.mean() < LABEL_SHARE:
            continue
        padded = np.pad(mask, 1).astype(np.uint8)  # the picture's border is an edge too
        depth = cv2.distanceTransform(padded, cv2.DIST_L1, cv2.DIST_MASK_3)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        names = metadata.thing_classes if s["isthing"] else metadata.stuff_classes
        x, y = 100 * (column + 0.5) / width, 100 * (row + 0.5) / height
        text = names[s["category_id"]]
        found.append({"text": text, "isthing": bool(s["isthing"]), "x": float(x), "y": float(y)})
    return found


def data_uri(rgb: np.ndarray) -> str:
    with io.BytesIO() as out:
        Image.fromarray(rgb).save(out, format="WEBP", quality=85, method=1)
        return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _size(shape: Tuple[int, ...]) -> Tuple[int, int]:
    scale = SIDE / max(shape[:2])
    return max(1, round(scale * shape[0])), max(1, round(scale * shape[1]))


def _color(metadata, isthing: bool, category_id: int):
    colors = metadata.get("thing_colors" if isthing else "stuff_colors")
    if colors:
        return colors[category_id]
    colors = colormap(rgb=True, maximum=255)
    return colors[(category_id if isthing else -category_id) % len(colors)]


def _enlarged(mask: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    # Linear, so that edges are smooth. Neighbours meet halfway.
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) >= 0.5


def _outline(rgb: np.ndarray, mask: np.ndarray, color: Tuple[int, int, int], thickness: int):
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(rgb, contours, -1, color, thickness)
