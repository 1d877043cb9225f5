import json
import logging
import os
import time
from collections import OrderedDict
from typing import Dict, List, Optional, Sequence

import numpy as np
from panopticapi.utils import rgb2id
from tabulate import tabulate

from detectron2.data import detection_utils as utils
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..modeling import RANKING_RULE_REGISTRY, OANet
from ..modeling.semantic_labels import semantic_labels
from ..visualization import OrderPictures
from .oracle import oracle_order
from .panoptic import PanopticEvaluator

__all__ = ["OrderingEvaluator", "orderings_table"]

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
    ):
        """
        Args:
            dataset_name: a dataset registered by :func:`register_panoptic`.
            model: the model that is evaluated; it fuses, with its own thresholds.
            orders: names of ranking rules, and "oracle".
            pictures: collect the images where the order matters most; theirs must be among
                `orders`.

        Raises:
            ValueError: an order is not known.
        """
        known = [name for name, _ in RANKING_RULE_REGISTRY] + [ORACLE]
        for order in orders:
            if order not in known:
                raise ValueError(f"TEST.ORDERS holds {order!r}; it must be one of {known}.")
        self.model = model
        self.pictures = pictures
        self.evaluators = {order: PanopticEvaluator(dataset_name) for order in orders}

    def reset(self):
        self.num_images = 0
        self.start = time.perf_counter()
        for evaluator in self.evaluators.values():
            evaluator.reset()
        for pictures in self.pictures:
            pictures.reset()

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        """
        Args:
            inputs: from :class:`PanopticDatasetMapper` in inference.
            outputs: from :class:`OANet` with `return_evidence`.
        """
        for input, output in zip(inputs, outputs):
            self.num_images += 1
            gt_ids = rgb2id(utils.read_image(input["pan_seg_file_name"], "RGB"))
            semantic = semantic_labels(output["sem_seg"], self.model.keep_things_free)
            panoptic = {}
            for name in self.evaluators:
                order = self._order(name, input, output, gt_ids)
                panoptic[name] = self.model.combine(
                    output["instances"].pred_masks, output["instances"], semantic, order
                )
            for pictures in self.pictures:
                pictures.add(input, gt_ids, panoptic)
            for order, evaluator in self.evaluators.items():
                evaluator.process([input], [{"panoptic_seg": panoptic[order]}])

    def _order(self, order: str, input: Dict, output: Dict, gt_ids: np.ndarray):
        if order != ORACLE:
            return output["ranking_evidence"].order(order)
        instances = output["instances"]
        painted = instances.scores >= self.model.combine_instances_score_thresh
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
        results = OrderedDict()
        for order, evaluator in self.evaluators.items():
            logger.info(f"Scoring the order '{order}' with panopticapi ...")
            result = evaluator.evaluate()
            if comm.is_main_process():
                results[f"panoptic_seg/{order}"] = result["panoptic_seg"]
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
    with PathManager.open(path + ".tmp", "w") as f:
        json.dump(content, f, indent=2)
    os.replace(path + ".tmp", path)
