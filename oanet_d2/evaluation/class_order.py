from functools import cache
from typing import Callable, Sequence

import torch
from pycocotools import mask as mask_util

from detectron2.data import DatasetCatalog

from ..data.load import as_rle, read_truth
from ..painting.masks import BoxedMasks
from ..painting.matching import match_to_segments, visible_margins
from ..painting.ranking import OrderInputs, order_from_margins

__all__ = ["class_order", "count_class_margins"]


def count_class_margins(dataset_names: Sequence[str], num_things: int) -> torch.Tensor:
    """
    Which class lies on which in the annotations: a rule that needs no network, and a learned one should
    beat it.

    Args:
        dataset_names: training sets with an instances JSON. Others say nothing.
        num_things: C.

    Returns:
        (C, C) antisymmetric float: the pixels of the overlaps of whole masks that show an instance of
        the one class, minus those that show one of the other.
    """
    return _count(num_things, *(DatasetCatalog[name] for name in dataset_names))


@cache  # evaluations of a training ask again and again
def _count(num_things: int, *loaders: Callable) -> torch.Tensor:
    counts = torch.zeros(num_things, num_things, dtype=torch.float64)
    for d in (d for load in loaders for d in load()):
        things = [x for x in d.get("annotations", []) if not x["iscrowd"]]
        if len(things) < 2:
            continue
        rles = [as_rle(x["segmentation"], d["height"], d["width"]) for x in things]
        whole = torch.from_numpy(mask_util.decode(rles)).permute(2, 0, 1)
        classes = torch.tensor([x["category_id"] for x in things])
        ids = torch.from_numpy(read_truth(d)[0])
        masks = BoxedMasks.from_masks(whole)
        matched = match_to_segments(masks, classes, ids, d["segments_info"])
        margins = visible_margins(masks, matched, ids).double()
        pairs = classes[:, None].expand_as(margins), classes.expand_as(margins)
        counts.index_put_(pairs, margins, accumulate=True)
    return counts


def class_order(inputs: OrderInputs, counts: torch.Tensor) -> torch.Tensor:
    """
    The painting order by :func:`count_class_margins`, as the rules of RANKING_RULE_REGISTRY give it.
    """
    masks = inputs.masks.flatten(1).float()
    better = counts.sign().to(masks)[inputs.classes][:, inputs.classes]
    return order_from_margins(better * (masks @ masks.t()), inputs.scores)
