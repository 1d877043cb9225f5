"""
How good a panoptic result is, and how good a painting order: counted from pixels, image by image.
"""

import math
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from .arrays import runs
from .masks import BoxedMasks
from .matching import overlapping_regions

__all__ = ["CLEAR_SHARE", "KINDS", "METRICS", "class_quality", "closure", "correct_pixels"]
__all__ += ["occluded_pairs", "order_scores", "pq_averages", "pq_counts", "shared_pixels"]

METRICS = [metric + group for group in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")]
# What two overlapping instances are to each other: both match a segment, of different classes or of
# one class, or one is a duplicate or a false positive.
KINDS = ("different class", "same class", "one matches nothing")
# The ground truth must decide a pair by more than this share of the overlap. Below, neither order is
# wrong.
CLEAR_SHARE = 0.3
VOID = 0

Category = Tuple[bool, int]  # isthing and the contiguous category_id
SharedPixels = Dict[Tuple[int, int], int]


def shared_pixels(truth: np.ndarray, prediction: np.ndarray) -> SharedPixels:
    """
    Args:
        truth, prediction: (H, W) integer segment ids, at least 0 and less than 2**31; 0 is void.

    Returns:
        (true id, predicted id) -> how many pixels have both.

    Raises:
        ValueError: the two differ in size.
    """
    if truth.shape != prediction.shape:
        (h, w), (height, width) = prediction.shape, truth.shape
        raise ValueError(
            f"The prediction has {h} x {w} pixels; it must have the ground truth's {height} x {width}."
        )
    found, run, lengths = runs(truth.astype(np.int64) << 32 | prediction)
    pixels = np.bincount(run, lengths, len(found)).astype(np.int64)
    return dict(zip(zip((found >> 32).tolist(), (found & 0xFFFFFFFF).tolist()), pixels.tolist()))


def pq_counts(shared: SharedPixels, truth: List[Dict], prediction: List[Dict]) -> Counter:
    """
    What the panoptic quality of an image is computed from, by the rules of panopticapi's
    `pq_compute_single_core`. Areas are counted; no "area" is read. Where panopticapi knows one crowd
    per class, here every crowd of a class takes false positives. Several segments of one stuff class
    in an image are one.

    Args:
        shared: from :func:`shared_pixels`.
        truth, prediction: segments_info, each with "id", "isthing" and the contiguous "category_id".
            The ground truth's may have "iscrowd", 0 by default.

    Returns:
        (category, key) -> number, where category is (isthing, category_id) and key is "iou" (sum over
        the true positives), "tp", "fp" or "fn". Counts of several images are added.

    Raises:
        ValueError: the predicted ids and the predicted segments_info differ.
    """
    shared, truth, prediction = _with_whole_stuff(shared, truth, prediction)
    true_areas: Counter = Counter()
    areas: Counter = Counter()
    for (i, j), pixels in shared.items():
        true_areas[i] += pixels
        areas[j] += pixels
    segments = {s["id"]: _category(s) for s in truth if not s.get("iscrowd", 0)}
    crowds = {s["id"]: _category(s) for s in truth if s.get("iscrowd", 0)}
    predicted = {s["id"]: _category(s) for s in prediction}
    if set(areas) - {VOID} != set(predicted):
        raise ValueError(
            f"The prediction shows the ids {sorted(set(areas) - {VOID})} and lists "
            f"{sorted(predicted)} in segments_info; the two must be equal."
        )

    counts: Counter = Counter()
    for (i, j), pixels in shared.items():
        category = predicted.get(j)
        union = true_areas[i] + areas[j] - pixels - shared.get((VOID, j), 0)
        if category is not None and segments.get(i) == category and 2 * pixels > union:
            counts[category, "iou"] += pixels / union  # type: ignore[assignment]
            counts[category, "tp"] += 1
            del segments[i], predicted[j]  # more than half of both is taken: nothing else can match
    for category in segments.values():
        counts[category, "fn"] += 1
    for j, category in predicted.items():
        ignored = [VOID, *(i for i, c in crowds.items() if c == category)]
        if 2 * sum(shared.get((i, j), 0) for i in ignored) <= areas[j]:
            counts[category, "fp"] += 1
    return counts


def _with_whole_stuff(shared: SharedPixels, truth: List[Dict], prediction: List[Dict]):
    """The arguments of :func:`pq_counts` with one segment for each stuff class."""
    firsts, listed = [], []
    for segments in (truth, prediction):
        known: Dict = {}
        first = {
            s["id"]: s["id"] if s["isthing"] else known.setdefault(_stuff(s), s["id"])
            for s in segments
        }
        firsts.append(first)
        listed.append([s for s in segments if first[s["id"]] == s["id"]])
    whole: Counter = Counter()
    for (i, j), pixels in shared.items():
        whole[firsts[0].get(i, i), firsts[1].get(j, j)] += pixels
    return whole, *listed


def correct_pixels(shared: SharedPixels, truth: List[Dict], prediction: List[Dict]) -> int:
    """
    How many pixels have the right category. Void is one too. Arguments are those of
    :func:`pq_counts`.
    """
    true = {s["id"]: _category(s) for s in truth}
    predicted = {s["id"]: _category(s) for s in prediction}
    return sum(n for (i, j), n in shared.items() if true.get(i) == predicted.get(j))


def class_quality(counts: Counter) -> Dict[Category, Tuple[float, float, float]]:
    """
    Args:
        counts: sum of :func:`pq_counts` over the images.

    Returns:
        category -> panoptic, segmentation and recognition quality in percent. Categories without a
        segment, true or predicted, are left out.
    """
    quality = {}
    for category in sorted({category for category, _ in counts}):
        iou, tp, fp, fn = (counts[category, key] for key in ("iou", "tp", "fp", "fn"))
        segments = tp + (fp + fn) / 2
        quality[category] = 100 * iou / segments, 100 * iou / max(tp, 1), 100 * tp / segments
    return quality


def pq_averages(counts: Counter) -> Dict[str, float]:
    """
    Args:
        counts: sum of :func:`pq_counts` over the images.

    Returns:
        the METRICS: means over all classes, over things and over stuff, in percent. NaN for a group
        without a segment, as Detectron2's COCOEvaluator has it.
    """
    quality = class_quality(counts)
    averages = {}
    for group, kinds in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
        rows = [q for (isthing, _), q in quality.items() if isthing in kinds] or [(math.nan,) * 3]
        for metric, values in zip(("PQ", "SQ", "RQ"), zip(*rows)):
            averages[metric + group] = sum(values) / len(values)
    return averages


def closure(orderings: Dict[str, Dict[str, Any]], order: str) -> Optional[float]:
    """
    The share of the gap in PQ_th between the orders "score" and "oracle" that `order` closes.

    Args:
        orderings: order -> metrics.

    Returns:
        1 for the oracle. None where one of the two is missing, or there is no gap.
    """
    score, oracle = (orderings.get(x, {}).get("PQ_th") for x in ("score", "oracle"))
    if score is None or oracle is None or not oracle > score:
        return None
    return (orderings[order]["PQ_th"] - score) / (oracle - score)


class OccludedPair(NamedTuple):
    """
    Two instances that overlap. By the ground truth `front` lies on `behind`.
    """

    front: int  # index of the instance
    behind: int
    kind: str  # one of KINDS
    pixels: int  # by how many the ground truth decides


def occluded_pairs(
    masks: BoxedMasks, classes: torch.Tensor, matched: torch.Tensor, margins: torch.Tensor
) -> Tuple[List[OccludedPair], int]:
    """
    The pairs that the ground truth decides clearly. An order is right about a pair if it has `front`
    before `behind`.

    Args:
        masks: N instances at the resolution of the ground truth, only those that are painted.
        classes: (N,) int64, contiguous thing classes.
        matched: (N,) int64 from :func:`match_to_segments`.
        margins: (N, N) from :func:`visible_margins`.

    Returns:
        the pairs, and how many pairs overlap, decided or not.
    """
    decided, class_of, is_matched = margins.tolist(), classes.tolist(), (matched >= 0).tolist()
    boxed, pairs, overlapping = masks.numpy(), [], 0
    for a, b, in_a, in_b in overlapping_regions(masks.regions):
        pixels = int(decided[a][b])
        overlap = np.count_nonzero(boxed[a][in_a] & boxed[b][in_b])
        overlapping += overlap > 0
        if abs(pixels) > CLEAR_SHARE * overlap:
            kind = KINDS[int(class_of[a] == class_of[b])]
            if not (is_matched[a] and is_matched[b]):
                kind = KINDS[2]
            pairs.append(OccludedPair(*((a, b) if pixels > 0 else (b, a)), kind, abs(pixels)))
    return pairs, overlapping


def order_scores(right: int, decided: int, overlapping: int) -> Tuple[float, float, float]:
    """
    InstaOrder's precision, recall and F1 of the occlusion order of one image (Lee and Park, CVPR 2022),
    in percent. An order says of every pair that overlaps who lies on whom.

    Args:
        right: pairs that the ground truth decides and the order has right.
        decided: pairs that the ground truth decides, at least 1.
        overlapping: pairs that overlap.
    """
    return 100 * right / overlapping, 100 * right / decided, 100 * 2 * right / (decided + overlapping)


def _stuff(segment: Dict) -> Tuple[int, bool]:
    return segment["category_id"], bool(segment.get("iscrowd", 0))


def _category(segment: Dict) -> Category:
    return bool(segment["isthing"]), segment["category_id"]
