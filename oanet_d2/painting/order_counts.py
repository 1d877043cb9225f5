"""
What a comparison of painting orders counts, image by image, and the metrics of the sums.
"""

import math
from collections import Counter, defaultdict
from typing import Dict, Iterable, List, Mapping, Optional, Sequence

from tabulate import tabulate

from .metrics import (
    KINDS,
    METRICS,
    OccludedPair,
    SharedPixels,
    order_scores,
    pq_averages,
    pq_counts,
)

__all__ = ["PAIR_METRICS", "OrderCounts", "Orderings", "orderings_table"]

# How often an order is right about two instances that overlap, in percent: all pairs, those of each
# of KINDS, and means over the images of InstaOrder's metrics.
OF_IMAGES = "order precision", "order recall", "order F1"
PAIR_METRICS = ("pairs", *(f"pairs, {kind}" for kind in KINDS), *OF_IMAGES)
Orderings = Dict[str, Dict[str, Optional[float]]]  # order -> metrics


class OrderCounts:
    """
    Attributes:
        quality: order -> sum of :func:`pq_counts`.
        overlaps: (front class, behind class, kind) -> pairs that the ground truth decides.
        right: (that, order) -> those that the order has right.
    """

    def __init__(self):
        self.quality: Dict[str, Counter] = defaultdict(Counter)
        self.overlaps: Counter = Counter()
        self.right: Counter = Counter()
        self._of_images: Counter = Counter()  # (order, one of OF_IMAGES) -> sum; None -> images with a pair

    def add_result(
        self, order: str, shared: SharedPixels, truth: List[Dict], prediction: List[Dict]
    ) -> None:
        """An image painted in this order; see :func:`pq_counts`."""
        self.quality[order].update(pq_counts(shared, truth, prediction))

    def add_pairs(
        self,
        decided: List[OccludedPair],
        overlapping: int,
        class_of: Sequence[int],
        orders: Mapping[str, Sequence[int]],
    ) -> List[Dict]:
        """
        Args:
            decided, overlapping: of an image, from :func:`occluded_pairs`.
            class_of: classes of the instances.
            orders: name -> indices of the instances, first painted first.

        Returns:
            for every pair its "key", in `overlaps`, its "pixels", and the names of the orders that have
            it "right".
        """
        position = {name: {i: p for p, i in enumerate(order)} for name, order in orders.items()}
        pairs: List[Dict] = []
        for front, behind, kind, pixels in decided:
            right = [name for name, x in position.items() if x[front] < x[behind]]
            key = class_of[front], class_of[behind], kind
            self.overlaps[key] += 1
            self.right.update((key, name) for name in right)
            pairs.append({"key": key, "pixels": pixels, "right": right})
        if pairs:
            rights = Counter(name for pair in pairs for name in pair["right"])
            self._of_images[None] += 1
            for name in orders:
                scores = order_scores(rights[name], len(pairs), overlapping)
                for metric, value in zip(OF_IMAGES, scores):
                    self._of_images[name, metric] += value  # type: ignore[assignment]
        return pairs

    def metrics(self, order: str) -> Dict[str, float]:
        """The METRICS and PAIR_METRICS of an order; NaN without a segment or a pair."""
        images = self._of_images[None]
        accuracies = [self._accuracy(kinds, order) for kinds in (KINDS, *((kind,) for kind in KINDS))]
        means = [_share(self._of_images[order, metric], images) for metric in OF_IMAGES]
        return {**pq_averages(self.quality[order]), **dict(zip(PAIR_METRICS, [*accuracies, *means]))}

    def _accuracy(self, kinds: Sequence[str], order: str) -> float:
        keys = [key for key in self.overlaps if key[2] in kinds]
        right = sum(self.right[key, order] for key in keys)
        return 100 * _share(right, sum(self.overlaps[key] for key in keys))

    @classmethod
    def total(cls, parts: Iterable["OrderCounts"]) -> "OrderCounts":
        total = cls()
        for part in parts:
            for order, counts in part.quality.items():
                total.quality[order].update(counts)
            for name in ("overlaps", "right", "_of_images"):
                getattr(total, name).update(getattr(part, name))
        return total


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def orderings_table(orderings: Orderings) -> str:
    """
    PQ, SQ and RQ for all classes, things and stuff, the share of pairs in the right order, and the F1
    of the occlusion order; a row for each painting order.
    """
    columns = [*METRICS, "pairs", "order F1"]
    rows = [[order, *(metrics.get(m) for m in columns)] for order, metrics in orderings.items()]
    headers = ["order", *columns]
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".1f", missingval="-")
