import base64
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Tuple

import cv2
import numpy as np
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ..data.images import read_image
from ..evaluation.panoptic import orderings_of
from ..files import write_atomically
from ..painting.masks import BoxedMasks
from ..painting.metrics import CLEAR_SHARE, class_quality, closure, occluded_pairs
from ..visualization import PANEL_SIDE, PanopticSeg, changed_pixels, draw_panels, side_by_side

__all__ = ["FORMAT", "JSON_NAME", "ReportRecorder"]

FORMAT = "oanet_d2 report, 3"
JSON_NAME = os.path.join("report", "evaluation.json")
# Images where the second of the compared orders loses most against the first, where it gains most,
# and where the order of the ground truth would gain most over it.
SECTIONS = LOST, WON, STILL_WRONG = "lost", "won", "still_wrong"
FOLDERS = {WON: "pictures", STILL_WRONG: "pictures_still_wrong"}
MAX_PAIRS = 5  # of an image


class ReportRecorder:
    """
    Collects, over an evaluation, what the report shows, and writes it as one JSON file, pictures
    included. :func:`write_report` makes the page of it. The images where an order gains also become
    PNGs, in `pictures/` and `pictures_still_wrong/`.
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
        self.folder = Path(output_dir)
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
            if pixels > 0:
                maps = [(truth, segments_info), *(results[order] for order in shown)]
                case = {
                    "file_name": input["file_name"],
                    "pixels": pixels,
                    "share": pixels / truth.size,
                    "orders": shown,
                    "maps": [(_shrunk(ids), info) for ids, info in maps],
                    "pairs": [p for p in pairs if len({order in p[4] for order in shown}) == 2],
                }
                self._cases[section] = self._greatest([*self._cases[section], case])

    def _greatest(self, cases: List[Dict]) -> List[Dict]:
        return sorted(cases, key=lambda x: (-x["pixels"], x["file_name"]))[: self.max_cases]

    def save(self, results: Dict, counts: Dict[str, Counter]):
        """
        Write the JSON and the PNGs. All processes must call this; the main one's arguments count.

        Args:
            results: from :meth:`PanopticEvaluator.evaluate`.
            counts: order -> sum of :func:`pq_counts`.
        """
        parts = comm.gather((self._outcomes, self._overlaps, self._right, self._cases))
        if not comm.is_main_process():
            return
        outcomes, overlaps, right = (sum((part[k] for part in parts), Counter()) for k in range(3))
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
            cases = self._greatest([x for part in parts for x in part[3][section]])
            panels = [self._panels(case) for case in cases]
            content["cases"][section] = [self._described(*x) for x in zip(cases, panels)]
            if section in FOLDERS:
                stems = [Path(case["file_name"]).stem for case in cases]
                names = [f"{rank:02d}_{stem}.png" for rank, stem in enumerate(stems, start=1)]
                pictures = dict(zip(names, map(side_by_side, panels)))
                _replace_pictures(self.folder / FOLDERS[section], pictures)
        write_atomically(str(self.folder / JSON_NAME), json.dumps(content))

    def _classes(self, counts: Dict[str, Counter]) -> List[Dict]:
        quality = {order: class_quality(x) for order, x in counts.items()}
        some = counts[self.compared[0]]
        classes = []
        for isthing, group in ((True, "thing"), (False, "stuff")):
            for index, name in enumerate(self.metadata.get(f"{group}_classes")):
                key = isthing, index
                pq = {order: x[key][0] if key in x else None for order, x in quality.items()}
                if any(x is not None for x in pq.values()):
                    segments = int(some[key, "tp"] + some[key, "fn"])  # the same in every order
                    row = {"name": name, "isthing": isthing, "segments": segments, "pq": pq}
                    classes.append(row)
        return classes

    def _named(self, front: int, behind: int, kind: str) -> Dict[str, str]:
        names = self.metadata.thing_classes
        return {"front": names[front], "behind": names[behind], "kind": kind}

    def _panels(self, case: Dict) -> Dict[str, np.ndarray]:
        truth, before, after = case["maps"]
        image = read_image(case["file_name"], "RGB")
        image = cv2.resize(image, truth[0].shape[::-1], interpolation=cv2.INTER_AREA)
        results = {"ground truth": truth, **dict(zip(case["orders"], (before, after)))}
        return draw_panels(image, results, self.metadata, changed_pixels(before, after))

    def _described(self, case: Dict, panels: Dict[str, np.ndarray]) -> Dict[str, Any]:
        """A case as the JSON has it: class names for ids, pictures for maps."""
        pairs = sorted(case["pairs"], key=lambda p: -p[3])[:MAX_PAIRS]
        return {
            **{key: case[key] for key in ("pixels", "share", "orders")},
            # Images in different subfolders may have one name.
            "file_name": os.path.relpath(case["file_name"], self.metadata.image_root),
            "pairs": [{**self._named(*p[:3]), "pixels": p[3], "right": p[4]} for p in pairs],
            "pictures": dict(
                zip(("photo", "truth", "before", "after"), map(_data_uri, panels.values()))
            ),
        }


def _shrunk(ids) -> np.ndarray:
    """(H, W) ids with a longer side of PANEL_SIDE pixels at most."""
    ids = torch.as_tensor(ids).cpu().numpy().astype(np.int32)
    scale = min(1, PANEL_SIDE / max(ids.shape))
    size = [max(1, round(scale * n)) for n in ids.shape[::-1]]
    return cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)


def _encoded(rgb: np.ndarray, **options) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(rgb).save(out, **options)
        return out.getvalue()


def _data_uri(rgb: np.ndarray) -> str:
    content = _encoded(rgb, format="WEBP", quality=85, method=1)
    return "data:image/webp;base64," + base64.b64encode(content).decode()


def _replace_pictures(folder: Path, pictures: Dict[str, np.ndarray]) -> None:
    """Write PNGs instead of those that an earlier evaluation wrote. Other files there stay."""
    manifest = folder / "written.txt"
    earlier = manifest.read_text("utf-8").splitlines() if manifest.is_file() else []
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    if earlier or pictures:
        write_atomically(str(manifest), "\n".join(pictures))
    for name, rgb in pictures.items():
        write_atomically(str(folder / name), _encoded(rgb, format="PNG"))
