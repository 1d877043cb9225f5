"""
Pictures of panoptic results, and of what the painting order changes in them.
"""

import heapq
import itertools
import os
from typing import Dict, List, Optional, Tuple, Union

import cv2
import numpy as np
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.visualizer import VisImage, Visualizer

from .data.images import read_image, read_segment_ids
from .files import atomic_path, write_atomically
from .painting.metrics import correct_pixels, shared_pixels

__all__ = [
    "OrderPictures",
    "changed_pixels",
    "draw_panoptic",
    "draw_side_by_side",
]

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


def draw_side_by_side(
    image: np.ndarray,
    results: Dict[str, PanopticSeg],
    metadata,
    outlined: Optional[np.ndarray] = None,
    side: int = PANEL_SIDE,
) -> np.ndarray:
    """
    An image and its panoptic results side by side, each under its title.

    Args:
        image: (H, W, 3) uint8 RGB.
        results: title, or the name of a painting order, to panoptic result.
        metadata: of the dataset.
        outlined: (H, W) bool, pixels to outline in the results, see :func:`changed_pixels`.
        side: the longer side of every panel in pixels.

    Returns:
        uint8 RGB picture.
    """
    scale = side / max(image.shape[:2])
    size = [max(1, round(x * scale)) for x in image.shape[1::-1]]
    panels = [_titled("image", cv2.resize(image, size))]
    for title, (ids, segments_info) in results.items():
        # Scores would crowd a small picture.
        info = [{k: v for k, v in s.items() if k != "score"} for s in segments_info]
        drawn = draw_panoptic(image, (ids, info), metadata, scale, jitter=False).get_image()
        panel = np.ascontiguousarray(cv2.resize(drawn, size))
        if outlined is not None:
            mask = cv2.resize(outlined.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(panel, contours, -1, MARK, 2, cv2.LINE_AA)
        panels += [np.full((len(panels[0]), GAP, 3), 255, dtype=np.uint8)]
        panels += [_titled(_TITLES.get(title, title), panel)]
    return np.concatenate(panels, axis=1)


def _titled(title: str, panel: np.ndarray) -> np.ndarray:
    (text_width, _), _ = cv2.getTextSize(title, *_FONT, 1)
    lacking = max(0, text_width + 12 - panel.shape[1])
    panel = np.pad(panel, ((TITLE_HEIGHT, 0), (0, lacking), (0, 0)), constant_values=255)
    return cv2.putText(panel, title, (6, 24), *_FONT, (0, 0, 0), 1, cv2.LINE_AA)


class OrderPictures:
    """
    Collects, over an evaluation, the images where one order gains the most pixels over another,
    and draws them.
    """

    def __init__(self, dataset_name: str, folder: str, max_pictures: int, orders: Tuple[str, str]):
        """
        Args:
            dataset_name: for its metadata.
            folder: where the pictures go, one PNG for every image. `written.txt` lists them.
            max_pictures: how many at most.
            orders: the order that loses, and the one that gains.
        """
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder
        self.max_pictures = max_pictures
        self.orders = orders
        self.reset()

    def reset(self) -> None:
        self._best: List[Tuple] = []  # min-heap of (gain, image id, number, input, before, after)
        self._number = itertools.count()  # decides between equal gains and ids

    def add(self, input: Dict, gt_ids: np.ndarray, results: Dict[str, PanopticSeg]) -> None:
        """
        Args:
            input: the dataset dict.
            gt_ids: (H, W) ground-truth segment ids.
            results: order -> panoptic result of the image.
        """
        before, after = (
            (torch.as_tensor(ids).cpu().numpy(), info)
            for ids, info in (results[order] for order in self.orders)
        )
        right_before, right_after = (
            correct_pixels(shared_pixels(gt_ids, ids), input["segments_info"], info)
            for ids, info in (before, after)
        )
        gain = right_after - right_before
        if gain > 0:
            kept = {k: input[k] for k in ("file_name", "pan_seg_file_name", "segments_info")}
            entry = gain, str(input["image_id"]), next(self._number), kept, before, after
            heapq.heappush(self._best, entry)
            if len(self._best) > self.max_pictures:
                heapq.heappop(self._best)

    def save(self) -> List[str]:
        """
        Draw the pictures. They replace those that an earlier evaluation wrote into the same folder.
        Other files there stay.

        Returns:
            their paths, the greatest gain first. Empty on all processes but the main one.
        """
        collected = [x for part in comm.gather(self._best) for x in part]
        if not comm.is_main_process():
            return []
        best = sorted(collected, key=lambda x: x[:2], reverse=True)[: self.max_pictures]
        paths = self._replace_earlier([x[3]["file_name"] for x in best])
        for path, (*_, input, before, after) in zip(paths, best):
            image = read_image(input["file_name"], "RGB")
            gt = read_segment_ids(input["pan_seg_file_name"]), input["segments_info"]
            results = {"ground truth": gt, **dict(zip(self.orders, (before, after)))}
            changed = changed_pixels(before, after)
            picture = draw_side_by_side(image, results, self.metadata, changed)
            with atomic_path(path) as temporary:
                Image.fromarray(picture).save(temporary)
        return paths

    def _replace_earlier(self, file_names: List[str]) -> List[str]:
        manifest = os.path.join(self.folder, "written.txt")
        if os.path.isfile(manifest):
            with open(manifest, encoding="utf-8") as f:
                names = [os.path.basename(x) for x in f.read().splitlines()]
            for path in filter(os.path.isfile, (os.path.join(self.folder, x) for x in names)):
                os.remove(path)
        stems = [os.path.splitext(os.path.basename(x))[0] for x in file_names]
        names = [f"{rank:02d}_{stem}.png" for rank, stem in enumerate(stems, start=1)]
        write_atomically(manifest, "\n".join(names))
        return [os.path.join(self.folder, name) for name in names]
