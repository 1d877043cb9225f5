"""
What panopticapi counts for each class on its way to PQ, and Detectron2's evaluator drops.
"""

from contextlib import contextmanager
from typing import Dict, Iterator
from unittest import mock

from panopticapi.evaluation import PQStat

__all__ = ["ClassCounts", "class_counts"]

# "iou": sum of the IoUs of the true positives; "tp", "fp", "fn": segments.
ClassCounts = Dict[str, float]


@contextmanager
def class_counts() -> Iterator[Dict[int, ClassCounts]]:
    """
    Yields:
        a dict that every :func:`panopticapi.evaluation.pq_compute` within the context fills:
        category id of the dataset -> {"iou", "tp", "fp", "fn"}, for all categories.
    """
    counts: Dict[int, ClassCounts] = {}
    average = PQStat.pq_average

    def count_and_average(stat, categories, isthing):
        for category in categories:
            of_class = stat.pq_per_cat[category]
            counts[category] = {
                "iou": float(of_class.iou),
                "tp": int(of_class.tp),
                "fp": int(of_class.fp),
                "fn": int(of_class.fn),
            }
        return average(stat, categories, isthing)

    with mock.patch.object(PQStat, "pq_average", count_and_average):
        yield counts
