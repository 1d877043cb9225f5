"""
`oanet-d2 paint --gt`: the same instances painted in several orders, against a panoptic ground truth.
"""

import os
from functools import partial
from typing import Any, Dict, List

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

from .json_lists import JsonLists
from .paint import Job, Task, map_images
from .painting.masks import BoxedMasks
from .painting.matching import match_to_segments, visible_margins
from .painting.metrics import closure, occluded_pairs, shared_pixels
from .painting.order_counts import PAIR_METRICS, OrderCounts
from .painting.painter import RULES
from .painting.ranking import order_from_margins

__all__ = ["compare"]

COLUMNS = ("PQ", "PQ_th", "PQ_st", *PAIR_METRICS)


def compare(job: Job, tasks: List[Task], gt: str, folder: str, processes: int) -> str:
    """
    Args:
        gt: the panoptic JSON. Images that it does not have are left out.
        folder: of its PNGs.

    Returns:
        a table of the rules, the job's order, and the oracle.

    Raises:
        ValueError: the ground truth does not fit the images.
    """
    (categories,) = JsonLists(gt).read("categories")
    is_thing = {c["id"]: bool(c.get("isthing", 1)) for c in categories}
    with_truth = [task for task in tasks if task.truth]
    if not with_truth:
        raise ValueError(f"{gt} has none of the images.")
    # Annotations have no scores; an image without instances does not show it.
    rules = [x for x in RULES if x != "score" or JsonLists(job.instances).is_list()]
    function = partial(_count, job, rules, JsonLists(gt), folder, is_thing)
    counts = OrderCounts.total(map_images(function, with_truth, processes, "comparing"))
    orders = {order: counts.metrics(order) for order in counts.quality}
    rows = [[o, *map(metrics.get, COLUMNS), closure(orders, o)] for o, metrics in orders.items()]
    rows = [[None if x != x else x for x in row] for row in rows]  # NaN: there is no such segment or pair
    formats = ("", *[".1f"] * len(COLUMNS), ".3f")
    return tabulate(rows, ["order", *COLUMNS, "closure"], "pipe", floatfmt=formats, missingval="-")


def _count(
    job: Job, rules: List[str], gt: JsonLists, folder: str, is_thing: Dict[int, bool], task: Task
) -> OrderCounts:
    (annotation,) = gt.parse(task.truth)
    truth = []
    for x in annotation["segments_info"]:
        if x["category_id"] not in is_thing:
            raise ValueError(f"{gt.path}: the category {x['category_id']} of a segment is not listed.")
        truth.append({**x, "isthing": is_thing[x["category_id"]]})
    path = os.path.join(folder, annotation["file_name"])
    with Image.open(path) as png:
        ids = np.asarray(png.convert("RGB")).astype(np.int64) @ (1, 256, 256**2)
    shown, listed = set(np.unique(ids).tolist()) - {0}, {x["id"] for x in truth}
    if shown != listed:
        raise ValueError(
            f"{path} shows the ids {sorted(shown - listed)}, which {gt.path} does not list, and lacks "
            f"{sorted(listed - shown)}."
        )
    detections, semantic = job.read(task)
    if ids.shape != detections.image_size:
        raise ValueError(f"{path} has {ids.shape} pixels, the image {detections.image_size}.")
    masks = BoxedMasks(
        detections.regions,
        lambda i: torch.from_numpy(detections.make(i)),
        detections.image_size,
        torch.device("cpu"),
    ).cached()
    number = len(detections)
    none = np.zeros(number)
    scores, classes = (
        torch.from_numpy(none if x is None else x) for x in (detections.scores, detections.classes)
    )
    matched = match_to_segments(masks, classes, torch.from_numpy(ids), truth)
    margins = visible_margins(masks, matched, torch.from_numpy(ids))
    orders: Dict[str, Any] = {os.path.basename(name): name for name in [*rules, job.order]}
    orders["oracle"] = order_from_margins(margins, scores).numpy()
    counts, painted = OrderCounts(), {}
    for name, order in orders.items():
        result = job.paint(detections, semantic, order)
        counts.add_result(name, shared_pixels(ids, result.panoptic_seg), truth, result.segments_info)
        painted[name] = result.order.tolist()
    counts.add_pairs(*occluded_pairs(masks, classes, matched, margins), classes.tolist(), painted)
    return counts
