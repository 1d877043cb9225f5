import json
import math
import time
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from tabulate import tabulate

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.images import naming
from ..data.load import read_truth
from ..files import write_atomically
from ..painting.matching import oracle_order
from ..painting.metrics import METRICS, correct_pixels, pq_averages, pq_counts, shared_pixels

__all__ = ["PanopticEvaluator", "orderings_of", "orderings_table", "write_orderings"]

ORACLE = "oracle"
Orderings = Dict[str, Dict[str, Optional[float]]]


class PanopticEvaluator(DatasetEvaluator):
    """
    Panoptic quality of the model's result, and of the same predictions painted in other orders. It is
    counted from pixels while the model runs, so nothing is written, and neither the names nor the ids
    of images matter.
    """

    def __init__(self, model: Any = None, orders: Sequence[str] = (), report: Optional[Any] = None):
        """
        Args:
            model: the OANet that is evaluated, needed for `orders`. It paints with its own thresholds.
            orders: names of ranking rules, and "oracle".
            report: a :class:`ReportRecorder` of some of the orders.
        """
        self.model = model
        self.orders = tuple(orders)
        self.report = report
        self.reset()

    def reset(self):
        self._start = time.perf_counter()
        self._images = 0
        self._counts: Dict[str, Counter] = {
            key: Counter() for key in ("panoptic_seg", *map(_key, self.orders))
        }
        if self.report is not None:
            self.report.reset()

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        """
        Args:
            inputs: dataset dicts with "pan_seg_file_name" and "segments_info".
            outputs: from the model, with "panoptic_seg" and, for `orders`, "fusion_inputs".

        Raises:
            ValueError: a ground truth is not as training needs it, or of another size than the result.
        """
        for input, output in zip(inputs, outputs):
            truth = read_truth(input)
            with naming(input["pan_seg_file_name"]):
                self._count("panoptic_seg", input, truth, output["panoptic_seg"])
            if self.orders:
                self._compare(input, truth, output["fusion_inputs"])
            self._images += 1

    def _count(self, key: str, input: Dict, truth: np.ndarray, panoptic_seg) -> int:
        ids, segments_info = panoptic_seg
        segments = input["segments_info"], segments_info
        shared = shared_pixels(truth, torch.as_tensor(ids).cpu().numpy())
        self._counts[key].update(pq_counts(shared, *segments))
        return correct_pixels(shared, *segments)

    def _compare(self, input: Dict, truth: np.ndarray, fusion_inputs):
        # Only the instances that are painted, and each mask made once.
        all_instances, order_inputs = fusion_inputs.instances, fusion_inputs.order_inputs
        painted = all_instances.scores >= self.model.combine_instances_score_thresh
        masks = fusion_inputs.masks.select(painted.nonzero()[:, 0]).cached()
        instances = all_instances[painted]
        fusion_inputs = fusion_inputs._replace(masks=masks, instances=instances)
        orders = {}
        for name in self.orders:
            if name == ORACLE:
                ids = torch.from_numpy(truth).to(masks.device)
                args = instances.scores, instances.pred_classes, ids, input["segments_info"]
                orders[name] = oracle_order(masks, *args)
            else:
                orders[name] = _restricted(order_inputs.order(name), painted)
        results = {name: self.model.combine(fusion_inputs, x) for name, x in orders.items()}
        correct = {name: self._count(_key(name), input, truth, x) for name, x in results.items()}
        if self.report is not None:
            self.report.add(input, truth, masks, instances.pred_classes, orders, results, correct)

    def evaluate(self):
        """
        Returns:
            dict: "panoptic_seg" -> the METRICS of the model's own result, and with `orders`
            also "panoptic_seg/<order>" -> the METRICS and "evaluation" -> {"images", "seconds"}.
            None on all processes but the main one.
        """
        parts = comm.gather((self._images, self._counts))
        counts: Dict[str, Counter] = {
            key: sum((x[key] for _, x in parts), Counter()) for key in self._counts
        }
        results = {key: pq_averages(x) for key, x in counts.items()}
        if self.orders:
            images, seconds = sum(n for n, _ in parts), time.perf_counter() - self._start
            results["evaluation"] = {"images": images, "seconds": seconds}
        if self.report is not None:
            self.report.save(results, {order: counts[_key(order)] for order in self.orders})
        return results if comm.is_main_process() else None


def orderings_of(results: Dict) -> Orderings:
    """
    Args:
        results: from :meth:`PanopticEvaluator.evaluate`.

    Returns:
        order -> metrics in percent. None for a group of classes without a segment.
    """
    prefix = _key("")
    return {
        key.removeprefix(prefix): {m: None if math.isnan(x) else x for m, x in metrics.items()}
        for key, metrics in results.items()
        if key.startswith(prefix)
    }


def orderings_table(orderings: Orderings) -> str:
    """
    PQ, SQ and RQ for all classes, things and stuff, a row for each order.
    """
    rows = [[order, *(metrics[m] for m in METRICS)] for order, metrics in orderings.items()]
    headers = ["order", *METRICS]
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".1f", missingval="-")


def write_orderings(path: str, results: Dict, seconds: Dict[str, Optional[float]]) -> None:
    """
    Write `orderings.json`.

    Args:
        path: the file.
        results: from :meth:`PanopticEvaluator.evaluate`.
        seconds: "train" and "eval". None where it is not known.
    """
    images = results["evaluation"]["images"]
    content = {"orderings": orderings_of(results), "images": images, "seconds": seconds}
    write_atomically(path, json.dumps(content, indent=2))


def _key(order: str) -> str:
    return f"panoptic_seg/{order}"


def _restricted(order: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """
    The order, a permutation of N instances, of the chosen (N,) among themselves.
    """
    new_index = chosen.cumsum(0) - 1
    return new_index[order[chosen[order]]]
