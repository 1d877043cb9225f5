import json
import logging
import time
from collections import OrderedDict
from typing import Dict, List, Optional, Sequence

import numpy as np
from panopticapi.utils import rgb2id
from tabulate import tabulate

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.images import read_image
from ..modeling import RANKING_RULE_REGISTRY, OANet
from ..modeling.semantic_labels import semantic_labels
from ..visualization import OrderPictures
from ..whole_files import whole_file
from .class_counts import class_counts
from .oracle import oracle_order
from .panoptic import PanopticEvaluator
from .report_data import ReportRecorder

__all__ = ["OrderingEvaluator", "closure", "orderings_table"]

logger = logging.getLogger(__name__)

ORACLE = "oracle"
# The columns of a table of orders, named as COCOPanopticEvaluator names them.
METRICS = [metric + part for part in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")]


class OrderingEvaluator(DatasetEvaluator):
    """
    Compare painting orders on the same predictions, in one pass: every order fuses the same
    instances and the same semantic scores, and panopticapi scores each.
    """

    def __init__(
        self,
        dataset_name: str,
        model: OANet,
        orders: Sequence[str],
        pictures: Sequence[OrderPictures] = (),
        report: Optional[ReportRecorder] = None,
    ):
        """
        Args:
            dataset_name: a dataset registered by :func:`register_panoptic`.
            model: the model that is evaluated; it fuses, with its own thresholds.
            orders: names of ranking rules, and "oracle".
            pictures: collect the images where the order matters most; theirs must be among
                `orders`.
            report: collects what `python -m oanet_d2.report` shows; the orders that it compares
                must be among `orders`.

        Raises:
            ValueError: an order is not known.
        """
        known = [name for name, _ in RANKING_RULE_REGISTRY] + [ORACLE]
        for order in orders:
            if order not in known:
                raise ValueError(f"TEST.ORDERS holds {order!r}; it must be one of {known}.")
        self.model = model
        self.pictures = pictures
        self.report = report
        self.evaluators = {order: PanopticEvaluator(dataset_name) for order in orders}

    def reset(self):
        self.num_images = 0
        self.start = time.perf_counter()
        for evaluator in self.evaluators.values():
            evaluator.reset()
        for pictures in self.pictures:
            pictures.reset()
        if self.report is not None:
            self.report.reset()

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        """
        Args:
            inputs: from :class:`PanopticDatasetMapper` in inference.
            outputs: from :class:`OANet` with `return_evidence`.
        """
        for input, output in zip(inputs, outputs):
            self.num_images += 1
            gt_ids = rgb2id(read_image(input["pan_seg_file_name"], "RGB"))
            semantic = semantic_labels(output["sem_seg"], self.model.keep_things_free)
            instances = output["instances"]
            painted = instances.scores >= self.model.combine_instances_score_thresh
            orders, panoptic = {}, {}
            for name in self.evaluators:
                orders[name] = self._order(name, input, output, painted, gt_ids)
                panoptic[name] = self.model.combine(
                    instances.pred_masks, instances, semantic, orders[name]
                )
            if self.report is not None:
                self.report.add(input, instances, painted, orders, gt_ids, panoptic)
            for pictures in self.pictures:
                pictures.add(input, gt_ids, panoptic)
            for order, evaluator in self.evaluators.items():
                evaluator.process([input], [{"panoptic_seg": panoptic[order]}])

    def _order(self, order: str, input: Dict, output: Dict, painted, gt_ids: np.ndarray):
        if order != ORACLE:
            return output["ranking_evidence"].order(order)
        instances = output["instances"]
        return oracle_order(
            instances.pred_masks & painted[:, None, None],
            instances.scores,
            instances.pred_classes,
            gt_ids,
            input["segments_info"],
        )

    def evaluate(self):
        """
        Returns:
            OrderedDict: "panoptic_seg/<order>" -> {"PQ", "SQ", "RQ", "PQ_th", ...} in percent, as
            :class:`COCOPanopticEvaluator` gives them, and "evaluation" -> {"images", "seconds"}.
            None on all processes but the main one.
        """
        num_images = sum(comm.gather(self.num_images))
        for pictures in self.pictures:
            pictures.save()
        results, counts = OrderedDict(), {}
        for order, evaluator in self.evaluators.items():
            logger.info(f"Scoring the order '{order}' with panopticapi ...")
            with class_counts() as counts[order]:
                result = evaluator.evaluate()
            if comm.is_main_process():
                results[f"panoptic_seg/{order}"] = result["panoptic_seg"]
        if self.report is not None:
            so_far = time.perf_counter() - self.start
            self.report.save(num_images, so_far, orderings_of(results), counts)
        if comm.is_main_process():
            seconds = time.perf_counter() - self.start
            results["evaluation"] = {"images": num_images, "seconds": seconds}
            return results


def orderings_of(results: Dict) -> Dict[str, Dict[str, float]]:
    """
    The part of an evaluation's results that :class:`OrderingEvaluator` wrote: order -> metrics.
    """
    prefix = "panoptic_seg/"
    return {k[len(prefix) :]: dict(v) for k, v in results.items() if k.startswith(prefix)}


def closure(
    orderings: Dict[str, Dict[str, float]], order: str, reference: Optional[Dict] = None
) -> Optional[float]:
    """
    Share of the gap in PQ_th between the orders "score" and "oracle" that `order` closes.

    Args:
        orderings: order -> metrics.
        reference: where "score" and "oracle" come from, if not from `orderings`.

    Returns:
        1 for the oracle; None where one of the two is missing or there is no gap.
    """
    reference = reference or orderings
    if not {"score", ORACLE} <= set(reference):
        return None
    score, oracle = reference["score"]["PQ_th"], reference[ORACLE]["PQ_th"]
    return (orderings[order]["PQ_th"] - score) / (oracle - score) if oracle > score else None


def orderings_table(orderings: Dict[str, Dict[str, float]]) -> str:
    """
    PQ, SQ and RQ for all, things and stuff, a row for every order.
    """
    rows = [[order] + [metric[m] for m in METRICS] for order, metric in orderings.items()]
    return tabulate(rows, headers=["order", *METRICS], tablefmt="pipe", floatfmt=".1f")


def write_orderings(path: str, results: Dict, seconds: Dict[str, Optional[float]]):
    """
    Write `orderings.json`.

    Args:
        path: the file; it appears whole or not at all.
        results: as returned by :meth:`OrderingEvaluator.evaluate`.
        seconds: "train" and "eval"; None where it is not known.
    """
    content = {
        "orderings": orderings_of(results),
        "images": results["evaluation"]["images"],
        "seconds": seconds,
    }
    with whole_file(path) as f:
        json.dump(content, f, indent=2)
