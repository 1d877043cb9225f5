import json
import os
from collections import Counter
from typing import Any, Dict, List, Tuple

import numpy as np
import torch

from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ..data.images import read_image
from ..evaluation.panoptic import orderings_of
from ..files import write_atomically
from ..painting.masks import BoxedMasks
from ..painting.metrics import CLEAR_SHARE, class_quality, closure, occluded_pairs
from ..visualization import PanopticSeg, changed_pixels
from .pictures import data_uri, draw_segments, labels, resized, shrunk

__all__ = ["FORMAT", "JSON_NAME", "ReportRecorder"]

FORMAT = "oanet_d2 report, 2"
JSON_NAME = os.path.join("report", "evaluation.json")
# Images where the second of the compared orders loses most against the first, where it gains most,
# and where the order of the ground truth would gain most over it.
SECTIONS = LOST, WON, STILL_WRONG = "lost", "won", "still_wrong"
MAX_PAIRS = 5  # of an image


class ReportRecorder:
    """
    Collects, over an evaluation, what the report shows, and writes it as one JSON file, pictures
    included. :func:`write_report` makes the page of it.
    """

    def __init__(
        self, dataset_name: str, output_dir: str, max_cases: int, compared: Tuple[str, str]
    ):
        """
        Args:
            dataset_name: for its metadata.
            output_dir: the JSON goes into `report/` in this folder.
            max_cases: at most this many images in each section.
            compared: "score" and the order that is compared with it.
        """
        self.dataset_name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        self.path = os.path.join(output_dir, JSON_NAME)
        self.max_cases = max_cases
        self.compared = compared
        self.reset()

    def reset(self):
        self._outcomes: Counter = Counter()
        self._overlaps: Counter = Counter()  # (front class, behind class, kind) -> pairs
        self._right: Counter = Counter()  # (the same, order) -> pairs
        self._cases: Dict[str, List[Dict]] = {section: [] for section in SECTIONS}

    def add(
        self,
        input: Dict,
        truth: np.ndarray,
        masks: BoxedMasks,
        classes: torch.Tensor,
        orders: Dict[str, torch.Tensor],
        results: Dict[str, PanopticSeg],
        correct: Dict[str, int],
    ):
        """
        Args:
            input: the dataset dict.
            truth: (H, W) ground-truth segment ids.
            masks, classes: the N instances that are painted.
            orders: order -> (N,) int64, first painted first. The compared two are among them.
            results: order -> panoptic result.
            correct: order -> how many pixels have the right category.
        """
        segments_info, class_of = input["segments_info"], classes.tolist()
        ids = torch.from_numpy(truth).to(masks.device)
        position = {name: order.argsort().tolist() for name, order in orders.items()}
        pairs = []
        for front, behind, kind, pixels in occluded_pairs(masks, classes, ids, segments_info):
            right = [name for name, x in position.items() if x[front] < x[behind]]
            key = class_of[front], class_of[behind], kind
            self._overlaps[key] += 1
            self._right.update((key, name) for name in right)
            pairs.append((*key, pixels, right))

        before, after = self.compared
        gain = correct[after] - correct[before]
        self._outcomes["better" if gain > 0 else "worse" if gain < 0 else "same"] += 1
        sections = [(LOST, -gain, self.compared), (WON, gain, self.compared)]
        if "oracle" in results:
            sections.append((STILL_WRONG, correct["oracle"] - correct[after], (after, "oracle")))
        for section, pixels, shown in sections:
            cases = self._cases[section]
            full = len(cases) >= self.max_cases
            if pixels <= 0 or self.max_cases == 0 or (full and pixels < cases[-1]["pixels"]):
                continue
            maps = [(truth, segments_info), *(results[order] for order in shown)]
            case = {
                "file_name": input["file_name"],
                "pixels": pixels,
                "share": pixels / truth.size,
                "orders": shown,
                "maps": [(shrunk(torch.as_tensor(x).cpu().numpy()), info) for x, info in maps],
                "pairs": [p for p in pairs if len({order in p[4] for order in shown}) == 2],
            }
            cases.append(case)
            cases.sort(key=lambda x: (-x["pixels"], x["file_name"]))
            del cases[self.max_cases :]

    def save(self, results: Dict, counts: Dict[str, Counter]):
        """
        Write the JSON. All processes must call this; the main one's arguments count.

        Args:
            results: from :meth:`PanopticEvaluator.evaluate`.
            counts: order -> sum of :func:`pq_counts`.
        """
        parts = comm.gather((self._outcomes, self._overlaps, self._right, self._cases))
        if not comm.is_main_process():
            return
        outcomes: Counter = sum((part[0] for part in parts), Counter())
        overlaps: Counter = sum((part[1] for part in parts), Counter())
        right: Counter = sum((part[2] for part in parts), Counter())
        orderings = orderings_of(results)
        content = {
            "format": FORMAT,
            "dataset": self.dataset_name,
            **results["evaluation"],
            "orderings": {o: {**m, "closure": closure(orderings, o)} for o, m in orderings.items()},
            "compared": self.compared,
            "outcomes": {x: outcomes[x] for x in ("better", "worse", "same")},
            "clear_share": CLEAR_SHARE,
            "classes": self._classes(counts),
            "overlaps": [
                {
                    **self._named(*key),
                    "number": number,
                    "right": {order: right[key, order] for order in orderings},
                }
                for key, number in sorted(overlaps.items(), key=lambda x: (-x[1], x[0]))
            ],
            "cases": {},
        }
        for section in SECTIONS:
            cases = [x for part in parts for x in part[3][section]]
            cases.sort(key=lambda x: (-x["pixels"], x["file_name"]))
            content["cases"][section] = [self._drawn(x) for x in cases[: self.max_cases]]
        write_atomically(self.path, json.dumps(content))

    def _classes(self, counts: Dict[str, Counter]) -> List[Dict]:
        quality = {order: class_quality(x) for order, x in counts.items()}
        some = counts[self.compared[0]]
        classes = []
        for isthing, group in ((True, "thing"), (False, "stuff")):
            for index in self.metadata.get(f"{group}_dataset_id_to_contiguous_id").values():
                key = isthing, index
                pq = {order: x[key][0] if key in x else None for order, x in quality.items()}
                if any(x is not None for x in pq.values()):
                    name = self.metadata.get(f"{group}_classes")[index]
                    segments = int(some[key, "tp"] + some[key, "fn"])  # the same in every order
                    classes.append(
                        {"name": name, "isthing": isthing, "segments": segments, "pq": pq}
                    )
        return classes

    def _named(self, front: int, behind: int, kind: str) -> Dict[str, str]:
        names = self.metadata.thing_classes
        return {"front": names[front], "behind": names[behind], "kind": kind}

    def _drawn(self, case: Dict) -> Dict[str, Any]:
        """
        A case as the JSON has it: class names for ids, pictures for maps.
        """
        truth, before, after = case["maps"]
        changed = changed_pixels(before, after)
        photo = resized(read_image(case["file_name"], "RGB"))
        pictures = {"photo": photo, "truth": draw_segments(photo, truth, self.metadata)}
        for name, panoptic_seg in (("before", before), ("after", after)):
            pictures[name] = draw_segments(photo, panoptic_seg, self.metadata, changed)
        pairs = sorted(case["pairs"], key=lambda p: -p[3])[:MAX_PAIRS]
        return {
            **{key: case[key] for key in ("pixels", "share", "orders")},
            "file_name": self._shown_name(case["file_name"]),
            "pairs": [{**self._named(*p[:3]), "pixels": p[3], "right": p[4]} for p in pairs],
            "pictures": {name: data_uri(rgb) for name, rgb in pictures.items()},
            "before": labels(before, self.metadata),
            "after": labels(after, self.metadata),
        }

    def _shown_name(self, path: str) -> str:
        # Images in different subfolders may have one name.
        name = os.path.relpath(path, self.metadata.image_root)
        return os.path.basename(path) if name.startswith(os.pardir) else name
