import torch

from detectron2.utils.events import EventStorage

from oanet_d2.modeling.candidates import RankingTarget
from oanet_d2.modeling.ranking_metrics import (
    contested_share,
    map_accuracy,
    pair_accuracy,
    put_ranking_scalars,
)
from tests.conftest import box_mask, make_candidates


def test_contested_share():
    # 2 x 6 and 2 x 4 cells that share 2 x 2; another image of one instance with 4 cells
    first = torch.stack([box_mask(0, 0, 6, 2), box_mask(4, 0, 8, 2)])
    second = box_mask(0, 0, 2, 2)[None]
    assert contested_share([first, second]) == 4 / (16 + 4)
    assert contested_share([first[:0]]) is None


def test_map_accuracy():
    """Four cells, three classes (2 is of no instance); category 3 is stuff, 255 void."""
    instances = torch.tensor([[[[1, 1, 1, 1, 1, 1.0]], [[1, 1, 1, 1, 1, 0]], [[0, 0, 0, 0, 0, 0]]]])
    categories = torch.tensor([[[0, 1, 1, 2, 255, 0]]])
    # right; right, as class 2 does not compete; wrong; shows neither; void; not contested
    scores = torch.tensor([[[[5, 1, 5, 5, 5, 1.0]], [[1, 5, 1, 1, 1, 5]], [[9, 9, 9, 9, 9, 9]]]])
    assert map_accuracy(scores, instances, categories) == 2 / 3
    assert map_accuracy(scores, instances, torch.full_like(categories, 3)) is None


def test_pair_accuracy():
    logits = torch.tensor([2.0, -1, 3, -0.5, 7])
    margins = torch.tensor([0.5, -0.1, -0.2, 0.4, 0])  # of the last the ground truth says nothing
    assert pair_accuracy(logits, margins) == 0.5
    assert pair_accuracy(logits[:0], margins[:0]) is None


def test_scalars_of_one_batch_in_twenty():
    candidates = make_candidates(torch.stack([box_mask(0, 0, 6, 2), box_mask(4, 0, 8, 2)]), [0, 1])
    ids = torch.zeros(10, 12, dtype=torch.int64)
    target = RankingTarget(torch.ones_like(ids), ids, [])
    score_map = torch.zeros(1, 2, 10, 12)
    score_map[:, 1] = 1
    found = {}
    for iteration in (18, 19, 39):
        with EventStorage(iteration) as storage:
            put_ranking_scalars([candidates], [target], score_map, torch.ones(1), -torch.ones(1))
            found[iteration] = {k: v for k, (v, _) in storage.latest().items()}
    expected = {
        "srm/contested_cells": 4 / 16,
        "srm/map_accuracy": 1.0,
        "srm/pair_accuracy": 0.0,
    }
    assert found == {18: {}, 19: expected, 39: expected}
    put_ranking_scalars([candidates], [target], score_map)  # outside a training: nothing
