"""
Pictures of what the painting order changes.
"""

import heapq
import os
from typing import Dict, List, Tuple, Union

import cv2
import numpy as np
import torch
from panopticapi.utils import rgb2id

from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import Visualizer

__all__ = ["OrderPictures", "draw_order_comparison", "pixel_gain"]

# A panoptic result: (H, W) segment ids and the segments' descriptions, categories contiguous.
PanopticSeg = Tuple[Union[torch.Tensor, np.ndarray], List[Dict]]

PANEL_SIDE = 480  # pixels, the longer side of a panel
TITLE_HEIGHT = 34
MARK = (255, 0, 255)
_TITLES = {"score": "by detection score", "oracle": "by ground truth (oracle)"}


def category_codes(panoptic_seg: np.ndarray, segments_info: List[Dict]) -> np.ndarray:
    """
    Segment ids to a code of the category: thing c is 2c + 1, stuff s is 2s, void is 0.

    Returns:
        (H, W) int64.
    """
    codes = np.zeros(panoptic_seg.shape, dtype=np.int64)
    for s in segments_info:
        codes[panoptic_seg == s["id"]] = 2 * s["category_id"] + bool(s["isthing"])
    return codes


def pixel_gain(gt: PanopticSeg, before: PanopticSeg, after: PanopticSeg) -> int:
    """
    How many more pixels carry the right category in `after` than in `before`.
    """
    truth, b, a = (category_codes(np.asarray(ids), info) for ids, info in (gt, before, after))
    return int((a == truth).sum()) - int((b == truth).sum())


def changed_pixels(before: PanopticSeg, after: PanopticSeg) -> np.ndarray:
    """
    Where the two results show a different instance or stuff class.

    Returns:
        (H, W) bool.
    """

    def owners(panoptic: PanopticSeg) -> np.ndarray:
        # The same instance has different segment ids in two orders; its index is the same.
        ids, info = np.asarray(panoptic[0]), panoptic[1]
        out = np.zeros(ids.shape, dtype=np.int64)
        for s in info:
            out[ids == s["id"]] = s["instance_id"] + 1 if s["isthing"] else -s["category_id"]
        return out

    return owners(before) != owners(after)


def draw_order_comparison(
    image: np.ndarray,
    gt: PanopticSeg,
    before: PanopticSeg,
    after: PanopticSeg,
    metadata,
    orders: Tuple[str, str],
) -> np.ndarray:
    """
    Image, ground truth, and the results of two orders side by side; in the last two the pixels
    that the order changed are outlined.

    Args:
        image: (H, W, 3) uint8 RGB.
        gt, before, after: panoptic results of the image.
        metadata: of the dataset.
        orders: names of the two orders, for the titles.

    Returns:
        uint8 RGB picture.
    """
    changed = changed_pixels(before, after)
    panels = [
        _titled("image", _enlarge(image)),
        _titled("ground truth", _draw_panoptic(image, gt, metadata)),
        *(
            _titled(_TITLES.get(order, order), _outline(_draw_panoptic(image, x, metadata), changed))
            for order, x in zip(orders, (before, after))
        ),
    ]
    gap = np.full((panels[0].shape[0], 6, 3), 255, dtype=np.uint8)
    return np.concatenate([x for panel in panels for x in (panel, gap)][:-1], axis=1)


def _enlarge(image: np.ndarray) -> np.ndarray:
    scale = PANEL_SIDE / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)


class _Visualizer(Visualizer):
    """Detectron2's, with one colour for every class, the same in all panels."""

    def _jitter(self, color):
        return color


def _draw_panoptic(image: np.ndarray, panoptic: PanopticSeg, metadata) -> np.ndarray:
    scale = PANEL_SIDE / max(image.shape[:2])
    # without the scores, which would crowd a small picture
    info = [{k: v for k, v in s.items() if k != "score"} for s in panoptic[1]]
    drawn = _Visualizer(image, metadata, scale=scale).draw_panoptic_seg(
        torch.as_tensor(panoptic[0]), info, alpha=0.6
    )
    return cv2.resize(drawn.get_image(), _enlarge(image).shape[1::-1])


def _outline(panel: np.ndarray, changed: np.ndarray) -> np.ndarray:
    panel = np.ascontiguousarray(panel)
    enlarged = cv2.resize(
        changed.astype(np.uint8), panel.shape[1::-1], interpolation=cv2.INTER_NEAREST
    )
    contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(panel, contours, -1, MARK, 2, cv2.LINE_AA)


def _titled(title: str, panel: np.ndarray) -> np.ndarray:
    bar = np.full((TITLE_HEIGHT, panel.shape[1], 3), 255, dtype=np.uint8)
    cv2.putText(bar, title, (6, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, panel])


class OrderPictures:
    """
    Collects, over an evaluation, the images where one order gains the most pixels over another,
    and draws them.
    """

    def __init__(self, dataset_name: str, folder: str, max_pictures: int, orders: Tuple[str, str]):
        """
        Args:
            dataset_name: for its metadata.
            folder: where the pictures go, one PNG for every image.
            max_pictures: how many at most.
            orders: the order that loses, and the one that gains.
        """
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder
        self.max_pictures = max_pictures
        self.orders = orders
        self.reset()

    def reset(self):
        self._best: List[Tuple] = []  # min-heap of (gain, image id, input, result before, result after)

    def add(self, input: Dict, gt_ids: np.ndarray, results: Dict[str, PanopticSeg]):
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
        gain = pixel_gain((gt_ids, input["segments_info"]), before, after)
        if gain > 0:
            kept = {k: input[k] for k in ("file_name", "pan_seg_file_name", "segments_info")}
            copies = map(_with_own_dicts, (before, after))
            heapq.heappush(self._best, (gain, str(input["image_id"]), kept, *copies))
            if len(self._best) > self.max_pictures:
                heapq.heappop(self._best)

    def save(self) -> List[str]:
        """
        Draw the pictures; pictures of an earlier evaluation in the same folder are replaced.

        Returns:
            their paths, the greatest gain first; empty on all processes but the main one.
        """
        collected = [x for part in comm.gather(self._best) for x in part]
        if not comm.is_main_process():
            return []
        PathManager.mkdirs(self.folder)
        for name in os.listdir(self.folder):
            if name.endswith(".png"):
                os.remove(os.path.join(self.folder, name))
        paths = []
        best = sorted(collected, key=lambda x: x[:2], reverse=True)[: self.max_pictures]
        for rank, (_, _, input, before, after) in enumerate(best, start=1):
            image = utils.read_image(input["file_name"], "RGB")
            gt_ids = rgb2id(utils.read_image(input["pan_seg_file_name"], "RGB"))
            gt = (gt_ids.astype(np.int32), input["segments_info"])
            picture = draw_order_comparison(image, gt, before, after, self.metadata, self.orders)
            stem = os.path.splitext(os.path.basename(input["file_name"]))[0]
            path = os.path.join(self.folder, f"{rank:02d}_{stem}.png")
            cv2.imwrite(path, picture[:, :, ::-1])
            paths.append(path)
        return paths


def _with_own_dicts(panoptic: PanopticSeg) -> PanopticSeg:
    # COCOPanopticEvaluator changes the segments' dicts in place
    return panoptic[0], [dict(s) for s in panoptic[1]]
