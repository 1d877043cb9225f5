"""Pictures of panoptic results, and of what the painting order changes in them."""

from typing import Dict, List, Optional, Tuple, Union

import cv2
import numpy as np
import torch

from detectron2.utils.visualizer import VisImage, Visualizer

__all__ = ["changed_pixels", "draw_panels", "draw_panoptic", "side_by_side"]

# A panoptic result: (H, W) segment ids and the segments' descriptions, categories contiguous.
PanopticSeg = Tuple[Union[torch.Tensor, np.ndarray], List[Dict]]

PANEL_SIDE = 480  # pixels, the longer side of a panel
TITLE_HEIGHT = 34
GAP = 6  # between panels
MARK = (255, 0, 255)
_TITLES = {"score": "by detection score", "oracle": "by ground truth (oracle)"}
_FONT = cv2.FONT_HERSHEY_SIMPLEX, 0.7


def changed_pixels(before: PanopticSeg, after: PanopticSeg) -> np.ndarray:
    """
    Where the two results show a different instance or stuff class.

    Returns:
        (H, W) bool.
    """

    def owners(panoptic: PanopticSeg) -> np.ndarray:
        # An instance has different segment ids in two orders. Its index is the same.
        ids, segments_info = np.asarray(panoptic[0]), panoptic[1]
        out = np.zeros(ids.shape, dtype=np.int64)
        for s in segments_info:
            out[ids == s["id"]] = s["instance_id"] + 1 if s["isthing"] else -s["category_id"]
        return out

    return owners(before) != owners(after)


class _OneColorPerClass(Visualizer):
    def _jitter(self, color):
        return color


def draw_panoptic(
    image: np.ndarray, panoptic: PanopticSeg, metadata, scale: float = 1.0, *, jitter: bool = True
) -> VisImage:
    """
    :meth:`Visualizer.draw_panoptic_seg` for images of any shape, however narrow.

    Args:
        image: (H, W, 3) uint8 RGB.
        panoptic: panoptic result of the image.
        metadata: of the dataset.
        scale: size of the drawing relative to the image.
        jitter: vary the color of a class from instance to instance, as Detectron2 does.
    """
    ids = torch.as_tensor(panoptic[0]).cpu()
    if ids.shape[1] == 2:  # Detectron2 takes a mask of two columns for the corners of a polygon.
        image = image.repeat(2, axis=0).repeat(2, axis=1)
        ids = ids.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
        scale /= 2
    scale = max(scale, 1 / min(ids.shape))  # at least a pixel
    visualizer = (Visualizer if jitter else _OneColorPerClass)(image, metadata, scale=scale)
    return visualizer.draw_panoptic_seg(ids, panoptic[1], alpha=0.7 if jitter else 0.6)


def draw_panels(
    image: np.ndarray,
    results: Dict[str, PanopticSeg],
    metadata,
    outlined: Optional[np.ndarray] = None,
    side: int = PANEL_SIDE,
) -> Dict[str, np.ndarray]:
    """
    An image and its panoptic results, all of one size.

    Args:
        image: (H, W, 3) uint8 RGB.
        results: title, or the name of a painting order, to panoptic result.
        metadata: of the dataset.
        outlined: (H, W) bool, pixels to outline in the results, see :func:`changed_pixels`.
        side: the longer side of every panel in pixels.

    Returns:
        "image" and the keys of `results` -> uint8 RGB picture.
    """
    scale = side / max(image.shape[:2])
    size = [max(1, round(x * scale)) for x in image.shape[1::-1]]
    panels = {"image": cv2.resize(image, size)}
    for title, (ids, segments_info) in results.items():
        # Scores would crowd a small picture.
        info = [{k: v for k, v in s.items() if k != "score"} for s in segments_info]
        drawn = draw_panoptic(image, (ids, info), metadata, scale, jitter=False).get_image()
        panels[title] = np.ascontiguousarray(cv2.resize(drawn, size))
        if outlined is not None:
            mask = cv2.resize(outlined.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(panels[title], contours, -1, MARK, 2, cv2.LINE_AA)
    return panels


def side_by_side(panels: Dict[str, np.ndarray]) -> np.ndarray:
    """The pictures of :func:`draw_panels` in one, each under its title."""
    titled: List[np.ndarray] = []
    for title, panel in panels.items():
        text = _TITLES.get(title, title)
        (text_width, _), _ = cv2.getTextSize(text, *_FONT, 1)
        lacking = max(0, text_width + 12 - panel.shape[1])
        left = GAP if titled else 0
        panel = np.pad(panel, ((TITLE_HEIGHT, 0), (left, lacking), (0, 0)), constant_values=255)
        cv2.putText(panel, text, (left + 6, 24), *_FONT, (0, 0, 0), 1, cv2.LINE_AA)
        titled.append(panel)
    return np.concatenate(titled, axis=1)
