import json
import math
import time
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.images import naming
from ..data.load import read_truth
from ..files import write_atomically
from ..painting.matching import margins_of_true_pairs, match_to_segments, visible_margins
from ..painting.metrics import correct_pixels, occluded_pairs, pq_averages, shared_pixels
from ..painting.order_counts import OrderCounts, Orderings, orderings_table
from ..painting.ranking import order_from_margins
from .class_order import class_order

__all__ = ["PanopticEvaluator", "orderings_of", "orderings_table", "write_orderings"]


class PanopticEvaluator(DatasetEvaluator):
    """
    Panoptic quality of the model's result, and of the same predictions painted in other orders. It is
    counted from pixels while the model runs, so nothing is written, and neither the names nor the ids
    of images matter.
    """

    def __init__(
        self, model: Any = None, orders: Sequence[str] = (), report: Any = None, class_margins: Any = None
    ):
        """
        Args:
            model: the OANet that is evaluated, needed for `orders`. It paints with its own thresholds.
            orders: names of ranking rules, "class_order", "oracle" and "oracle_true".
            report: a :class:`ReportRecorder` of some of the orders.
            class_margins: (C, C) from :func:`count_class_margins`, for "class_order".
        """
        self.model = model
        self.orders = tuple(orders)
        self.report = report
        self.class_margins = class_margins
        self.reset()

    def reset(self):
        self.own_order = "" if self.model is None else self.model.order
        self._start = time.perf_counter()
        self._images = 0
        self._counts = OrderCounts()
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
            truth, _ = read_truth(input)
            with naming(input["pan_seg_file_name"]):
                correct = self._count(self.own_order, input, truth, output["panoptic_seg"])
            if self.orders:
                self._compare(input, truth, output, correct)
            self._images += 1

    def _count(self, order: str, input: Dict, truth: np.ndarray, panoptic_seg) -> int:
        ids, segments_info = panoptic_seg
        segments = input["segments_info"], segments_info
        shared = shared_pixels(truth, torch.as_tensor(ids).cpu().numpy())
        self._counts.add_result(order, shared, *segments)
        return correct_pixels(shared, *segments)

    def _compare(self, input: Dict, truth: np.ndarray, output: Dict, own_correct: int):
        fusion_inputs = output["fusion_inputs"]
        # Only the instances that are painted, and each mask made once.
        all_instances, order_inputs = fusion_inputs.instances, fusion_inputs.order_inputs
        painted = all_instances.scores >= self.model.combine_instances_score_thresh
        masks = fusion_inputs.masks.select(painted.nonzero()[:, 0]).cached()
        instances = all_instances[painted]
        fusion_inputs = fusion_inputs._replace(masks=masks, instances=instances)
        ids, scores = torch.from_numpy(truth).to(masks.device), instances.scores
        matched = match_to_segments(masks, instances.pred_classes, ids, input["segments_info"])
        margins = visible_margins(masks, matched, ids)
        orders = {}
        for name in self.orders:
            if name == "oracle":
                orders[name] = order_from_margins(margins.to(scores.device), scores)
            elif name == "oracle_true":
                own = _restricted(order_inputs.order(self.own_order), painted)
                known = margins_of_true_pairs(margins, matched, own.to(margins.device))
                orders[name] = order_from_margins(known.to(scores.device), scores)
            elif name == "class_order":
                orders[name] = _restricted(class_order(order_inputs, self.class_margins), painted)
            else:
                orders[name] = _restricted(order_inputs.order(name), painted)
        # The model's own result is painted and counted already.
        results, correct = {self.own_order: output["panoptic_seg"]}, {self.own_order: own_correct}
        for name in orders.keys() - results.keys():
            results[name] = self.model.combine(fusion_inputs, orders[name])
            correct[name] = self._count(name, input, truth, results[name])
        decided, overlapping = occluded_pairs(masks, instances.pred_classes, matched, margins)
        by_name = {name: order.tolist() for name, order in orders.items()}
        pairs = self._counts.add_pairs(decided, overlapping, instances.pred_classes.tolist(), by_name)
        if self.report is not None:
            self.report.add(input, truth, pairs, results, correct)

    def evaluate(self):
        """
        Returns:
            dict: "panoptic_seg" -> the METRICS of the model's own result, and with `orders`
            also "panoptic_seg/<order>" -> the METRICS and PAIR_METRICS (NaN without a pair) and
            "evaluation" -> {"images", "seconds"}. None on all processes but the main one.
        """
        images, parts = zip(*comm.all_gather((self._images, self._counts)))
        counts = OrderCounts.total(parts)
        results: Dict[str, Dict] = {"panoptic_seg": pq_averages(counts.quality[self.own_order])}
        for order in self.orders:
            results[_key(order)] = counts.metrics(order)
        if self.orders:
            seconds = time.perf_counter() - self._start
            results["evaluation"] = {"images": sum(images), "seconds": seconds}
        if self.report is not None:
            self.report.save(results, counts.quality, counts.overlaps, counts.right)
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
    """The order, a permutation of N instances, of the chosen (N,) among themselves."""
    new_index = chosen.cumsum(0) - 1
    return new_index[order[chosen[order]]]
