import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from panopticapi.evaluation import pq_compute
from panopticapi.utils import id2rgb
from PIL import Image

from oanet_d2.painting import BoxedMasks
from oanet_d2.painting.matching import match_to_segments, visible_margins
from oanet_d2.painting.metrics import (
    KINDS,
    METRICS,
    OccludedPair,
    class_quality,
    closure,
    correct_pixels,
    occluded_pairs,
    pq_averages,
    pq_counts,
    shared_pixels,
)
from tests.conftest import random_scene, thing

PERSON, TIE, CAR, DOG = 0, 1, 2, 3
DIFFERENT, SAME, NOTHING = KINDS
# Ids in the dataset of the contiguous things 0, 1, 2 and stuff 1, 2.
DATASET_IDS = {(True, 0): 7, (True, 1): 3, (True, 2): 90, (False, 1): 1, (False, 2): 200}


def stuff(i, c):
    return {"id": i, "category_id": c, "isthing": False}


def count(truth, truth_info, prediction, info):
    return pq_counts(shared_pixels(np.array(truth), np.array(prediction)), truth_info, info)


def random_panoptic(rng, size, largest_id, crowds):
    """
    Random boxes on top of each other, and void. At most one crowd and one stuff segment per class, as
    in COCO.
    """
    ids, info, crowd_classes = np.zeros(size, dtype=np.int64), [], set()
    for i in rng.choice(np.arange(1, largest_id), 7, replace=False).tolist():
        y, x = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
        isthing, c = list(DATASET_IDS)[rng.integers(len(DATASET_IDS))]
        s = {"id": i, "category_id": c, "isthing": isthing}
        if is_known_stuff(s, info):
            continue
        ids[y : y + rng.integers(2, size[0]), x : x + rng.integers(2, size[1])] = i
        if crowds and isthing and c not in crowd_classes and rng.random() < 0.3:
            s["iscrowd"] = 1
            crowd_classes.add(c)
        info.append(s)
    return ids, [s for s in info if (ids == s["id"]).any()]


def nearly(rng, ids, info, largest_id):
    """The same segments, a little moved, under other ids, some of another class or missing."""
    ids = np.roll(ids, rng.integers(-1, 2, 2), (0, 1))
    new_ids = rng.choice(np.arange(1, largest_id), len(info), replace=False)
    result, new_info = np.zeros_like(ids), []
    for s, i in zip(info, new_ids.tolist()):
        if rng.random() < 0.85 and (ids == s["id"]).any():
            result[ids == s["id"]] = i
            isthing, c = s["isthing"], s["category_id"]
            if rng.random() < 0.2:
                isthing, c = list(DATASET_IDS)[rng.integers(len(DATASET_IDS))]
            new = {"id": i, "category_id": c, "isthing": isthing}
            if is_known_stuff(new, new_info):
                result[result == i] = 0
            else:
                new_info.append(new)
    return result, new_info


def is_known_stuff(segment, info):
    return not segment["isthing"] and segment["category_id"] in [
        s["category_id"] for s in info if not s["isthing"]
    ]


def write(folder, name, panoptics):
    """Panoptic PNGs and their JSON, as panopticapi reads them."""
    annotations = []
    (folder / name).mkdir()
    for image_id, (ids, info) in enumerate(panoptics):
        png = f"{image_id}.png"
        Image.fromarray(id2rgb(ids)).save(folder / name / png)
        segments = []
        for s in info:
            category, area = DATASET_IDS[s["isthing"], s["category_id"]], int((ids == s["id"]).sum())
            segments.append({"iscrowd": 0, **s, "category_id": category, "area": area})
        annotations.append({"image_id": image_id, "file_name": png, "segments_info": segments})
    categories = [{"id": i, "name": "", "isthing": int(x)} for (x, _), i in DATASET_IDS.items()]
    content = {"annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder / f"{name}.json")


def test_pq_is_panopticapis(tmp_path):
    """Random results of unequal sizes, with void, crowds, and ids of all three bytes."""
    rng = np.random.default_rng(0)
    truths, predictions, counts = [], [], Counter()
    for size in [(9, 12), (20, 7), (6, 30)] * 20:
        truth = random_panoptic(rng, size, 2**24, crowds=True)
        if rng.random() < 0.7:
            prediction = nearly(rng, *truth, 2**24)
        else:
            prediction = random_panoptic(rng, size, 300, crowds=False)
        counts.update(count(truth[0], truth[1], *prediction))
        truths.append(truth)
        predictions.append(prediction)
    theirs = pq_compute(write(tmp_path, "gt", truths), write(tmp_path, "pred", predictions))
    ours = pq_averages(counts)
    assert list(ours) == METRICS
    for name, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        for metric in ("pq", "sq", "rq"):
            assert ours[metric.upper() + name] == pytest.approx(100 * theirs[group][metric])
    assert 20 < ours["PQ"] < 80
    for category, quality in class_quality(counts).items():
        expected = theirs["per_class"][DATASET_IDS[category]]
        assert quality == pytest.approx([100 * expected[m] for m in ("pq", "sq", "rq")])


def test_counts_by_hand():
    truth = [[1, 1, 1, 1, 2, 2, 0, 0]]
    truth_info = [thing(1, CAR), thing(2, CAR, area=999)]
    prediction = [[5, 5, 5, 0, 6, 7, 7, 8]]
    info = [thing(5, CAR), thing(6, DOG), thing(7, CAR), thing(8, CAR)]
    counts = count(truth, truth_info, prediction, info)
    car, dog = (True, CAR), (True, DOG)
    # 5 matches 1. 7 has one pixel of 2 and one of void, so it is no match (1 of 2 pixels) and wrong.
    # 8 lies in void and is ignored.
    of_car = {(car, "iou"): 0.75, (car, "tp"): 1, (car, "fp"): 1, (car, "fn"): 1}
    assert counts == {**of_car, (dog, "fp"): 1}
    assert class_quality(counts)[car] == pytest.approx((37.5, 75, 50))
    assert class_quality(counts)[dog] == (0, 0, 0)


def test_segments_of_one_stuff_class_are_one():
    """In truth and prediction, however each is cut into segments."""
    sky, grass = {"category_id": 3, "isthing": False}, {"category_id": 4, "isthing": False}
    truth = [{"id": 1, **sky}, {"id": 2, **sky}, {"id": 3, **grass}]
    prediction = [{"id": 7, **sky}, {"id": 8, **grass}, {"id": 9, **grass}]
    ids, predicted = [[1, 1, 2, 1, 3, 3, 3, 3]], [[7, 7, 7, 7, 8, 9, 9, 9]]
    averages = pq_averages(count(ids, truth, predicted, prediction))
    assert averages["PQ"] == averages["PQ_st"] == 100


def test_every_crowd_of_a_class_takes_false_positives():
    """panopticapi looks at the last one only."""
    truth = [[1, 1, 2, 2, 3, 3]]
    truth_info = [thing(i, CAR, iscrowd=1) for i in (1, 2)] + [thing(3, DOG, iscrowd=1)]
    prediction = [[4, 4, 5, 6, 7, 7]]
    info = [thing(4, CAR), thing(5, CAR), thing(6, DOG), thing(7, CAR)]
    # Only the dog in the crowd of cars and the car in the crowd of dogs are wrong.
    expected = {((True, DOG), "fp"): 1, ((True, CAR), "fp"): 1}
    assert count(truth, truth_info, prediction, info) == expected


def test_a_group_without_a_segment_has_no_number():
    things_only = pq_averages(count([[1, 1]], [thing(1, CAR)], [[2, 2]], [thing(2, CAR)]))
    assert things_only["PQ"] == things_only["PQ_th"] == 100
    assert math.isnan(things_only["PQ_st"]) and math.isnan(things_only["SQ_st"])
    stuff_only = pq_averages(count([[1, 1]], [stuff(1, 2)], [[2, 2]], [stuff(2, 2)]))
    assert stuff_only["PQ"] == stuff_only["PQ_st"] == 100 and math.isnan(stuff_only["PQ_th"])
    assert all(map(math.isnan, pq_averages(Counter()).values()))


def test_predictions_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3\].*\[1, 2\]"):
        count([[1, 1]], [thing(1, CAR)], [[1, 3]], [thing(1, CAR), thing(2, CAR)])
    with pytest.raises(ValueError, match="2 x 3.*3 x 2"):
        shared_pixels(np.zeros((3, 2), int), np.zeros((2, 3), int))


def test_correct_pixels_by_hand():
    """Void is right where the truth is void. Another segment of the class is right too."""
    shared = shared_pixels(np.array([[1, 1, 2, 3, 0, 0]]), np.array([[5, 6, 6, 7, 0, 7]]))
    truth = [thing(1, CAR), thing(2, DOG), stuff(3, CAR)]
    assert correct_pixels(shared, truth, [thing(5, CAR), thing(6, CAR), thing(7, CAR)]) == 3


def test_closure_by_hand():
    orderings = {name: {"PQ_th": x} for name, x in (("score", 40), ("pairs", 55), ("oracle", 60))}
    assert [closure(orderings, name) for name in orderings] == [0, 0.75, 1]
    assert closure({**orderings, "oracle": {"PQ_th": 40}}, "pairs") is None
    assert closure({**orderings, "oracle": {"PQ_th": None}}, "pairs") is None
    del orderings["score"]
    assert closure(orderings, "pairs") is None


def all_pairs(masks, classes, ids, segments):
    boxed = BoxedMasks.from_masks(masks)
    matched = match_to_segments(boxed, classes, ids, segments)
    return occluded_pairs(boxed, classes, matched, visible_margins(boxed, matched, ids))


def test_without_instances():
    nothing, ids = torch.zeros(0, 10, 12, dtype=torch.bool), torch.zeros(10, 12, dtype=torch.int64)
    assert all_pairs(nothing, torch.zeros(0, dtype=torch.int64), ids, []) == ([], 0)


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_pairs_against_slow_reference(seed, n):
    masks, classes, _, ids, segments = random_scene(seed, n)
    matched = match_to_segments(masks, classes, ids, segments).tolist()
    expected = []
    for front, behind in np.ndindex(n, n):
        shown = ids[masks[front] & masks[behind]].tolist()
        pixels = shown.count(matched[front]) - shown.count(matched[behind])
        if front == behind or 10 * pixels <= 3 * len(shown):
            continue
        kind = SAME if classes[front] == classes[behind] else DIFFERENT
        if -1 in (matched[front], matched[behind]):
            kind = NOTHING
        expected.append(OccludedPair(front, behind, kind, pixels))
    pairs, overlapping = all_pairs(masks, classes, ids, segments)
    assert sorted(pairs) == sorted(expected)
    shared = (masks.flatten(1).float() @ masks.flatten(1).float().t()).triu(1)
    assert overlapping == (shared > 0).sum()
