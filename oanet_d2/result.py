"""What a predictor gives, with PyTorch or without."""

import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

from .files import write_atomically

__all__ = ["Drawing", "PanopticResult", "check_picture", "with_names"]

_FONT = cv2.FONT_HERSHEY_SIMPLEX, 0.45


@dataclass
class PanopticResult:
    """
    Attributes:
        image: (H, W, 3) uint8, the picture in BGR.
        panoptic_seg: (H, W) int32. 0 is void, segments count from 1. It is a tensor on the CPU from
            :class:`PanopticPredictor`, and an array from :class:`OnnxPredictor`.
        segments_info: Detectron2's, with a "category_name" for every segment.
        metadata: of the classes: Detectron2's, or the same attributes.
        predictions: what else the predictor gave.
    """

    image: np.ndarray
    panoptic_seg: Any
    segments_info: List[Dict]
    metadata: Any = field(repr=False)
    predictions: Dict = field(default_factory=dict, repr=False)

    def draw(self, scale: Optional[float] = None):
        """
        The picture with its segments and their names, as Detectron2 draws them or, without
        Detectron2, as :func:`draw_with_opencv` does.

        Args:
            scale: size of the drawing relative to the picture's. The default is 1, or more for a
                picture whose longer side is below 480 pixels.

        Returns:
            Detectron2's `VisImage` or a :class:`Drawing`. Both have `get_image()` and `save(path)`.
        """
        if scale is None:  # smaller, the labels would cover everything
            scale = max(1, 480 / max(self.image.shape[:2]))
        rgb = self.image[:, :, ::-1]
        if isinstance(self.panoptic_seg, np.ndarray):
            return draw_with_opencv(rgb, *self.panoptic, self.metadata, scale)
        from .visualization import draw_panoptic  # it needs Detectron2

        return draw_panoptic(rgb, self.panoptic, self.metadata, scale)

    @property
    def panoptic(self) -> Tuple[Any, List[Dict]]:
        """(panoptic_seg, segments_info)"""
        return self.panoptic_seg, self.segments_info


class Drawing:
    """A picture with the methods of Detectron2's `VisImage` that show it."""

    def __init__(self, rgb: np.ndarray):
        self._rgb = rgb

    def get_image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return self._rgb

    def save(self, path: Union[str, os.PathLike]) -> None:
        """
        Write it in the format that the extension names. The folder is made if it does not exist.

        Raises:
            ValueError: OpenCV does not know the format.
        """
        extension = os.path.splitext(path)[1]
        if not cv2.haveImageWriter(f"a{extension}"):
            raise ValueError(f"{path}: OpenCV cannot write {extension!r}; use .png or .jpg.")
        encoded = cv2.imencode(extension, self._rgb[:, :, ::-1])[1]
        write_atomically(os.fspath(path), encoded.tobytes())


def draw_with_opencv(
    rgb: np.ndarray, ids: np.ndarray, segments_info: Sequence[Dict], metadata: Any, scale: float
) -> Drawing:
    """
    Every segment in the color of its class, outlined, with its name where it is widest.

    Args:
        rgb: (H, W, 3) uint8.
        ids: (H, W) int32 segment ids.
        segments_info: with "category_name".
        metadata: "thing_colors" and "stuff_colors", a list of RGB for every class.
        scale: size of the drawing relative to the picture's.
    """
    size = [max(1, round(x * scale)) for x in ids.shape[::-1]]
    drawn = cv2.resize(np.ascontiguousarray(rgb), size)
    ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    colors = metadata.stuff_colors, metadata.thing_colors
    painted = drawn.copy()
    for s in segments_info:
        painted[ids == s["id"]] = colors[s["isthing"]][s["category_id"]]
    drawn = cv2.addWeighted(drawn, 0.5, painted, 0.5, 0)
    labels = []
    for s in segments_info:
        mask = (ids == s["id"]).astype(np.uint8)
        color = tuple(int(x) for x in colors[s["isthing"]][s["category_id"]])
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(drawn, outlines, -1, color, 1, cv2.LINE_AA)
        # Of all its pixels this one lies farthest from the others, the picture's edge included.
        inside = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        labels.append((s, cv2.minMaxLoc(inside)[3]))
    for s, (x, y) in labels:  # upon all outlines
        text = s["category_name"] + (f" {s['score']:.0%}" if "score" in s else "")
        (width, height), _ = cv2.getTextSize(text, *_FONT, 1)
        x = min(max(x - width // 2, 2), max(size[0] - width - 2, 2))
        y = min(max(y + height // 2, height + 2), max(size[1] - 3, height + 2))
        cv2.rectangle(drawn, (x - 2, y - height - 2), (x + width + 1, y + 3), (0, 0, 0), cv2.FILLED)
        cv2.putText(drawn, text, (x, y), *_FONT, (255, 255, 255), 1, cv2.LINE_AA)
    return Drawing(drawn)


def check_picture(image: np.ndarray) -> None:
    """
    Raises:
        ValueError: the array is no picture.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        raise ValueError(
            f"A picture is a path or a (H, W, 3) uint8 array, not {image.dtype} {image.shape}."
        )


def with_names(segments_info: Sequence[Dict], metadata: Any) -> List[Dict]:
    """The segments with a "category_name", from the metadata's "thing_classes" and "stuff_classes"."""
    names = metadata.stuff_classes, metadata.thing_classes
    return [{**s, "category_name": names[s["isthing"]][s["category_id"]]} for s in segments_info]
