import base64
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Dict, List, Tuple

import cv2
import numpy as np
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ..data.images import read_image
from ..evaluation.panoptic import orderings_of
from ..files import write_atomically
from ..painting.metrics import CLEAR_SHARE, class_quality, closure
from ..visualization import PANEL_SIDE, PanopticSeg, changed_pixels, draw_panels, side_by_side

__all__ = ["JSON_NAME", "ReportRecorder"]

JSON_NAME = os.path.join("report", "evaluation.json")
# Images where the second of the compared orders loses most against the first, where it gains most,
# and where the order of the ground truth would gain most over it.
SECTIONS = ("lost", "won", "still_wrong")
FOLDERS = {"won": "pictures", "still_wrong": "pictures_still_wrong"}
MAX_PAIRS = 5  # of an image

# As the JSON has it, but for its pictures; and the ground truth and the two results.
Case = Tuple[Dict, List[PanopticSeg]]


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
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = Path(output_dir)
        self.max_cases = max_cases
        self.compared = compared
        self.reset()

    def reset(self):
        self._outcomes: Counter = Counter()
        self._cases: Dict[str, List[Case]] = {section: [] for section in SECTIONS}

    def add(
        self,
        input: Dict,
        truth: np.ndarray,
        pairs: List[Dict],
        results: Dict[str, PanopticSeg],
        correct: Dict[str, int],
    ):
        """
        Args:
            input: the dataset dict.
            truth: (H, W) ground-truth segment ids.
            pairs: those that overlap and that the ground truth decides: "key" (front class, behind
                class, kind), "pixels" by which it does, and the orders that are "right".
            results: order -> panoptic result. The compared two are among them.
            correct: order -> how many pixels have the right category.
        """
        segments_info = input["segments_info"]
        before, after = self.compared
        gain = correct[after] - correct[before]
        self._outcomes["better" if gain > 0 else "worse" if gain < 0 else "same"] += 1
        sections = [("lost", -gain, self.compared), ("won", gain, self.compared)]
        if "oracle" in results:
            sections.append(("still_wrong", correct["oracle"] - correct[after], (after, "oracle")))
        for section, pixels, shown in sections:
            if pixels > 0:
                one_is_right = [p for p in pairs if len({x in p["right"] for x in shown}) == 2]
                most = sorted(one_is_right, key=lambda p: -p["pixels"])[:MAX_PAIRS]
                case = {
                    # Images in different subfolders may have one name.
                    "file_name": os.path.relpath(input["file_name"], self.metadata.image_root),
                    "pixels": pixels,
                    "share": pixels / truth.size,
                    "orders": shown,
                    "pairs": [
                        {**self._named(*p["key"]), "pixels": p["pixels"], "right": p["right"]}
                        for p in most
                    ],
                }
                maps = [(truth, segments_info), *(results[order] for order in shown)]
                kept: Case = (case, [(_shrunk(ids), info) for ids, info in maps])
                self._cases[section] = self._greatest([*self._cases[section], kept])

    def _greatest(self, cases: List[Case]) -> List[Case]:
        return sorted(cases, key=lambda x: (-x[0]["pixels"], x[0]["file_name"]))[: self.max_cases]

    def save(self, results: Dict, counts: Dict[str, Counter], overlaps: Counter, right: Counter):
        """
        Write the JSON and the PNGs. All processes must call this; the main one's arguments count.

        Args:
            results: from :meth:`PanopticEvaluator.evaluate`.
            counts: order -> sum of :func:`pq_counts`.
            overlaps: "key" of the pairs -> number.
            right: (key, order) -> number of pairs that the order has right.
        """
        parts = comm.gather((self._outcomes, self._cases))
        if not comm.is_main_process():
            return
        outcomes: Counter = sum((part[0] for part in parts), Counter())
        orderings = orderings_of(results)
        content = {
            "dataset": self.metadata.name,
            **results["evaluation"],
            "orderings": {o: {**m, "closure": closure(orderings, o)} for o, m in orderings.items()},
            "compared": self.compared,
            "outcomes": {x: outcomes[x] for x in ("better", "worse", "same")},
            "clear_share": CLEAR_SHARE,
            "classes": self._classes(counts),
            "overlaps": [],
            "cases": {},
        }
        for key, number in sorted(overlaps.items(), key=lambda x: (-x[1], x[0])):
            by_order = {order: right[key, order] for order in orderings}
            row = {**self._named(*key), "number": number, "right": by_order}
            content["overlaps"].append(row)
        for section in SECTIONS:
            described, pictures = [], {}
            cases = self._greatest([x for part in parts for x in part[1][section]])
            for rank, (case, maps) in enumerate(cases, start=1):
                panels = self._panels(case, *maps)
                uris = map(_data_uri, panels.values())
                named = dict(zip(("photo", "truth", "before", "after"), uris))
                described.append({**case, "pictures": named})
                pictures[f"{rank:02d}_{Path(case['file_name']).stem}.png"] = side_by_side(panels)
            content["cases"][section] = described
            if section in FOLDERS:
                _replace_pictures(self.folder / FOLDERS[section], pictures)
        write_atomically(str(self.folder / JSON_NAME), json.dumps(content))

    def _classes(self, counts: Dict[str, Counter]) -> List[Dict]:
        quality = {order: class_quality(x) for order, x in counts.items()}
        some = counts[self.compared[0]]
        rows = []
        for key in sorted(set().union(*quality.values())):
            isthing, index = key
            names = self.metadata.thing_classes if isthing else self.metadata.stuff_classes
            pq = {order: x[key][0] if key in x else None for order, x in quality.items()}
            segments = some[key, "tp"] + some[key, "fn"]  # the same in every order
            rows.append({"name": names[index], "isthing": isthing, "segments": segments, "pq": pq})
        return rows

    def _named(self, front: int, behind: int, kind: str) -> Dict[str, str]:
        names = self.metadata.thing_classes
        return {"front": names[front], "behind": names[behind], "kind": kind}

    def _panels(self, case: Dict, truth, before, after) -> Dict[str, np.ndarray]:
        image = read_image(os.path.join(self.metadata.image_root, case["file_name"]), "RGB")
        image = cv2.resize(image, truth[0].shape[::-1], interpolation=cv2.INTER_AREA)
        results = {"ground truth": truth, **dict(zip(case["orders"], (before, after)))}
        return draw_panels(image, results, self.metadata, changed_pixels(before, after))


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
