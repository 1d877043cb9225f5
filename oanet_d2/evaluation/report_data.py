"""
What an evaluation leaves for `python -m oanet_d2.report`: a folder with `evaluation.json` and the
pictures and maps that it names. Nothing else is needed to make the report.

`evaluation.json` is written last, in one piece, and every file that it names is named after its
own content; so what it says is whole, however the evaluation ended.

    format      FORMAT
    dataset     name
    images      how many were evaluated
    seconds     how long that took
    orderings   order -> {"PQ", "SQ", "RQ", "PQ_th", ...}, percent
    compared    [order that is compared, order it is compared with], "score" first
    outcomes    {"better", "worse", "same"}: images by the pixels with the right class in the second
    clear_share of an overlap that must be decided for a pair to count, see pair_accuracy.py
    classes     [{"name", "isthing", "category_id": contiguous, "color": RGB,
                  "counts": order -> {"iou", "tp", "fp", "fn"}}]
    pairs       [{"front", "behind": thing classes, "kind", "overlaps", "right": order -> overlaps}]
    cases       [{"section": one of SECTIONS, "image_id", "file_name", "width", "height",
                  "pixels": how many more have the right class in the second of
                  "orders": the two that are shown,
                  "classes": thing classes whose visible pixels the two orders change,
                  "pairs": [{"front", "behind", "kind", "pixels", "right": order -> bool}],
                  "photo": file,
                  "ground_truth", "before", "after": {"file": COCO panoptic PNG,
                                                      "segments_info": categories contiguous}}]

Photos and maps are at most SIDE pixels wide and high; "width", "height" and "pixels" are the
image's own.
"""

import hashlib
import heapq
import io
import json
import os
import re
from collections import Counter
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.colormap import colormap
from detectron2.utils.file_io import PathManager

from ..visualization import PanopticSeg, category_codes, changed_pixels
from ..whole_files import whole_file
from .class_counts import ClassCounts
from .pair_accuracy import CLEAR_SHARE, KINDS, decisions_by_order

__all__ = ["FILE_NAME", "FOLDER", "FORMAT", "JSON_NAME", "SECTIONS", "SIDE", "ReportRecorder"]

FORMAT = "oanet_d2 report, 1"
FOLDER, JSON_NAME = "report", "evaluation.json"
FILE_NAME = re.compile(r"[0-9a-f]{32}\.(png|webp)")  # the name's first part: see content_name
# Cases where the second of the compared orders loses most, where it gains most, and where the
# ground truth's order would gain most over it.
SECTIONS = LOST, WON, STILL_WRONG = "lost", "won", "still_wrong"
SIDE = 480  # pixels


class ReportRecorder:
    """
    Collects, over an evaluation, what the report shows, and writes it.
    """

    def __init__(self, dataset_name: str, folder: str, max_cases: int, compared: Tuple[str, str]):
        """
        Args:
            dataset_name: for its metadata.
            folder: where everything goes.
            max_cases: at most so many images in each section.
            compared: "score" and the order that it is compared with.
        """
        self.dataset_name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder
        self.max_cases = max_cases
        self.compared = compared
        self.reset()

    def reset(self):
        self._outcomes: Counter = Counter()
        self._overlaps: Counter = Counter()  # (front, behind, kind) -> pairs
        self._right: Counter = Counter()  # (front, behind, kind, order) -> pairs
        # section -> min-heap of (pixels, image id, case)
        self._cases: Dict[str, List[Tuple]] = {section: [] for section in SECTIONS}

    def add(
        self,
        input: Dict,
        instances: Instances,
        painted: torch.Tensor,
        orders: Dict[str, torch.Tensor],
        gt_ids: np.ndarray,
        results: Dict[str, PanopticSeg],
    ):
        """
        Args:
            input: the dataset dict.
            instances: N post-processed instances with "pred_masks" and "pred_classes".
            painted: (N,) bool, those that are confident enough to be painted.
            orders: order -> (N,) int64, first painted first; the compared two are among them.
            gt_ids: (H, W) ground-truth segment ids.
            results: order -> panoptic result of the image.
        """
        decided = decisions_by_order(
            instances.pred_masks[painted],
            instances.pred_classes[painted],
            {name: _order_of_some(order, painted) for name, order in orders.items()},
            gt_ids,
            input["segments_info"],
        )
        for order, decisions in decided.items():
            for d in decisions:
                self._right[d.front, d.behind, d.kind, order] += d.right
        for d in decided[self.compared[0]]:
            self._overlaps[d.front, d.behind, d.kind] += 1

        before, after = self.compared
        # COCOPanopticEvaluator changes the segments' dicts in place
        shown = {
            order: (
                torch.as_tensor(results[order][0]).cpu().numpy(),
                [dict(s) for s in results[order][1]],
            )
            for order in (before, after, "oracle")
            if order in results
        }
        truth = category_codes(gt_ids, input["segments_info"])
        right = {k: int((category_codes(*x) == truth).sum()) for k, x in shown.items()}
        gain = right[after] - right[before]
        self._outcomes["better" if gain > 0 else "worse" if gain < 0 else "same"] += 1
        pairs = [
            {
                "front": d.front,
                "behind": d.behind,
                "kind": d.kind,
                "pixels": d.pixels,
                "right": {order: decisions[i].right for order, decisions in decided.items()},
            }
            for i, d in enumerate(decided[before])
        ]
        self._keep(LOST, -gain, input, (before, after), shown, pairs)
        self._keep(WON, gain, input, (before, after), shown, pairs)
        if "oracle" in shown:
            left = right["oracle"] - right[after]
            self._keep(STILL_WRONG, left, input, (after, "oracle"), shown, pairs)

    def _keep(self, section, pixels, input, orders, shown, pairs):
        if pixels <= 0:
            return
        fields = ("image_id", "file_name", "pan_seg_file_name", "segments_info")
        case = ({k: input[k] for k in fields}, orders, [shown[o] for o in orders], pairs)
        heap = self._cases[section]
        heapq.heappush(heap, (pixels, str(input["image_id"]), case))
        if len(heap) > self.max_cases:
            heapq.heappop(heap)

    def save(
        self,
        images: int,
        seconds: float,
        orderings: Dict[str, Dict[str, float]],
        counts: Dict[str, Dict[int, ClassCounts]],
    ):
        """
        Write the folder; what an earlier evaluation left there is replaced. To be called by all
        processes; the main one's arguments count.

        Args:
            images, seconds: of the evaluation.
            orderings: order -> metrics.
            counts: order -> category id of the dataset -> counts, see :func:`class_counts`.
        """
        parts = comm.gather((self._outcomes, self._overlaps, self._right, self._cases))
        if not comm.is_main_process():
            return
        outcomes: Counter = Counter()
        overlaps: Counter = Counter()
        right: Counter = Counter()
        for part in parts:
            outcomes.update(part[0])
            overlaps.update(part[1])
            right.update(part[2])
        PathManager.mkdirs(self.folder)
        content: Dict[str, Any] = {
            "format": FORMAT,
            "dataset": self.dataset_name,
            "images": images,
            "seconds": seconds,
            "orderings": orderings,
            "compared": list(self.compared),
            "outcomes": {x: outcomes[x] for x in ("better", "worse", "same")},
            "clear_share": CLEAR_SHARE,
            "classes": self._classes(counts),
            "pairs": [
                {
                    "front": front,
                    "behind": behind,
                    "kind": kind,
                    "overlaps": n,
                    "right": {order: right[front, behind, kind, order] for order in orderings},
                }
                for (front, behind, kind), n in sorted(
                    overlaps.items(), key=lambda x: (KINDS.index(x[0][2]), -x[1], x[0])
                )
            ],
            "cases": [],
        }
        for section in SECTIONS:
            found = [x for part in parts for x in part[3][section]]
            found.sort(key=lambda x: x[:2], reverse=True)
            for pixels, _, case in found[: self.max_cases]:
                sign = -1 if section == LOST else 1
                content["cases"].append(
                    {"section": section, "pixels": sign * pixels, **self._write_case(*case)}
                )
        _write(os.path.join(self.folder, JSON_NAME), json.dumps(content, indent=1).encode())
        named = set(re.findall(FILE_NAME.pattern.replace("(", "(?:"), json.dumps(content)))
        for name in os.listdir(self.folder):
            if FILE_NAME.fullmatch(name) and name not in named:
                os.remove(os.path.join(self.folder, name))

    def _classes(self, counts: Dict[str, Dict[int, ClassCounts]]) -> List[Dict]:
        m = self.metadata
        classes: List[Dict] = []
        for isthing, names, ids in (
            (True, m.thing_classes, m.thing_dataset_id_to_contiguous_id),
            (False, m.stuff_classes, m.stuff_dataset_id_to_contiguous_id),
        ):
            given = m.get("thing_colors" if isthing else "stuff_colors")
            for dataset_id, index in ids.items():
                color = given[index] if given else _color(len(classes))
                classes.append(
                    {
                        "name": names[index],
                        "isthing": isthing,
                        "category_id": index,
                        "color": [int(x) for x in color],
                        "counts": {order: of[dataset_id] for order, of in counts.items()},
                    }
                )
        return classes

    def _write_case(self, input: Dict, orders: Sequence[str], shown: List[PanopticSeg], pairs):
        image = utils.read_image(input["file_name"], "RGB")
        gt_ids = rgb2id(utils.read_image(input["pan_seg_file_name"], "RGB"))
        truth = gt_ids, input["segments_info"]
        changed = changed_pixels(*shown)
        maps = {
            name: {"file": self._write_map(x[0]), "segments_info": _segments(x)}
            for name, x in zip(("ground_truth", "before", "after"), (truth, *shown))
        }
        return {
            "image_id": input["image_id"],
            "file_name": self._shown_name(input["file_name"]),
            "height": image.shape[0],
            "width": image.shape[1],
            "orders": list(orders),
            "classes": sorted(
                {
                    s["category_id"]
                    for ids, info in shown
                    for s in info
                    if s["isthing"] and (changed & (ids == s["id"])).any()
                }
            ),
            "pairs": pairs,
            "photo": self._write_picture(
                _shrunk(Image.fromarray(image), Image.Resampling.LANCZOS), "webp", quality=85
            ),
            **maps,
        }

    def _shown_name(self, path: str) -> str:
        # images in different subfolders may have one name
        name = os.path.relpath(path, self.metadata.image_root)
        return os.path.basename(path) if name.startswith(os.pardir) else name

    def _write_map(self, ids: np.ndarray) -> str:
        # Image.fromarray does not take the strides that id2rgb leaves
        rgb = Image.fromarray(np.ascontiguousarray(id2rgb(ids)))
        return self._write_picture(_shrunk(rgb, Image.Resampling.NEAREST), "png")

    def _write_picture(self, picture: Image.Image, format: str, **options) -> str:
        with io.BytesIO() as out:
            picture.save(out, format=format, **options)
            content = out.getvalue()
        name = content_name(content, format)
        _write(os.path.join(self.folder, name), content)
        return name


def content_name(content: bytes, extension: str) -> str:
    """
    The name of a file in the folder: a digest of its content.
    """
    return f"{hashlib.sha256(content).hexdigest()[:32]}.{extension}"


def shrunk_size(width: int, height: int) -> Tuple[int, int]:
    """
    The size, (width, height), in which an image of the given size is kept.
    """
    scale = min(1.0, SIDE / max(width, height))
    return max(1, round(scale * width)), max(1, round(scale * height))


def _order_of_some(order: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """
    The order of the chosen ones among themselves, counted anew.

    Args:
        order: (N,) int64, a permutation.
        chosen: (N,) bool.
    """
    new_index = torch.cumsum(chosen, 0) - 1
    return new_index[order[chosen[order]]]


def _segments(panoptic_seg: PanopticSeg) -> List[Dict]:
    fields = ("id", "category_id", "isthing", "instance_id")
    return [{k: s[k] for k in fields if k in s} for s in panoptic_seg[1]]


def _shrunk(picture: Image.Image, resample) -> Image.Image:
    size = shrunk_size(*picture.size)
    return picture if size == picture.size else picture.resize(size, resample)


def _color(index: int) -> Sequence[int]:
    colors = colormap(rgb=True, maximum=255)
    return colors[index % len(colors)]


def _write(path: str, content: bytes):
    with whole_file(path, "wb") as f:
        f.write(content)
