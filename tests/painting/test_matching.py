import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2.modeling.matching import match_to_segments, visible_margins
from tests.conftest import box_mask, random_scene, thing

PERSON, TIE, CAR = 0, 1, 2


def test_two_of_a_class_are_matched_one_to_one():
    """
    The person behind shows a narrow strip. Its whole silhouette overlaps the person in front more
    than that strip, but the person in front is taken by its own prediction.
    """
    front, behind = box_mask(4, 0, 12, 10), box_mask(0, 0, 9, 10)
    ids = torch.where(front, 1, torch.where(behind, 2, 0))
    masks, classes = torch.stack([behind, front]), torch.tensor([PERSON, PERSON])
    segments = [thing(1, PERSON), thing(2, PERSON)]
    matched = match_to_segments(masks, classes, ids, segments)
    assert matched.tolist() == [2, 1] and matched.dtype == torch.int64
    # 5 columns of 10 pixels are shared, and show the front
    assert visible_margins(masks, classes, ids, segments).tolist() == [[0, -50], [50, 0]]


def test_visible_margins_by_hand():
    """The overlap of person and tie shows both: 6 pixels of the tie, 2 of the person."""
    person, tie = box_mask(0, 0, 6, 6), box_mask(2, 2, 6, 4)
    ids = torch.where(person, 7, 0)
    ids[2:4, 2:5] = 300
    ids[9, 0:6] = 9  # a third segment, which touches nobody
    masks, classes = torch.stack([person, tie, box_mask(0, 9, 6, 10)]), torch.tensor([0, 1, 0])
    segments = [thing(300, TIE), thing(9, PERSON), thing(7, PERSON)]
    margins = visible_margins(masks, classes, ids, segments)
    assert margins.tolist() == [[0, -4, 0], [4, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "segment, expected",
    [
        (thing(3, CAR), 3),
        (thing(3, CAR, iscrowd=0), 3),
        (thing(3, CAR, iscrowd=1), -1),
        ({**thing(3, CAR), "isthing": False}, -1),
        (thing(3, PERSON), -1),
    ],
    ids=["thing", "not a crowd", "crowd", "stuff", "another class"],
)
def test_what_can_be_matched(segment, expected):
    car = box_mask(0, 0, 8, 8)
    matched = match_to_segments(car[None], torch.tensor([CAR]), torch.where(car, 3, 0), [segment])
    assert matched.tolist() == [expected]


def test_a_segment_beside_the_instance_does_not_match():
    ids = torch.where(box_mask(8, 0, 12, 10), 1, 0)
    masks, classes = box_mask(0, 0, 8, 10)[None], torch.tensor([CAR])
    assert match_to_segments(masks, classes, ids, [thing(1, CAR)]).tolist() == [-1]


def test_a_duplicate_is_visible_nowhere():
    car = box_mask(0, 0, 8, 8)
    masks = torch.stack([box_mask(0, 0, 8, 6), car])
    margins = visible_margins(masks, torch.tensor([CAR, CAR]), car.long(), [thing(1, CAR)])
    assert margins.tolist() == [[0, -48], [48, 0]]


@pytest.mark.parametrize("n, segments", [(0, []), (0, [thing(1, CAR)]), (2, [])])
def test_nothing_to_match(n, segments):
    masks = box_mask(0, 0, 8, 8).expand(n, -1, -1)
    classes = torch.full((n,), CAR)
    ids = torch.ones(10, 12, dtype=torch.int64)
    assert match_to_segments(masks, classes, ids, segments).tolist() == [-1] * n
    assert torch.equal(visible_margins(masks, classes, ids, segments), torch.zeros(n, n))


def iou(a, b):
    union = (a | b).sum().item()
    return (a & b).sum().item() / union if union else 0.0


def slow_total(masks, classes, ids, segments):
    """Sum of the IoUs of the best one-to-one assignment, by trying all of them."""
    total = 0
    for c in set(classes):
        mine = [i for i in range(len(masks)) if classes[i] == c]
        slots = [s["id"] for s in segments if s["category_id"] == c] + [None] * len(mine)
        total += max(
            sum(iou(masks[i], ids == s) for i, s in zip(mine, chosen) if s is not None)
            for chosen in itertools.permutations(slots, len(mine))
        )
    return total


@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_against_slow_reference(seed, n):
    masks, classes, _, ids, segments = random_scene(seed, n)
    matched = match_to_segments(masks, classes, ids, segments).tolist()
    chosen = [s for s in matched if s != -1]
    assert len(set(chosen)) == len(chosen)  # one to one
    class_of = {s["id"]: s["category_id"] for s in segments}
    assert all(s == -1 or class_of[s] == c for s, c in zip(matched, classes.tolist()))
    total = sum(iou(m, ids == s) for m, s in zip(masks, matched) if s != -1)
    assert np.isclose(total, slow_total(masks, classes.tolist(), ids, segments))

    margins = visible_margins(masks, classes, ids, segments)
    for a, b in np.ndindex(n, n):
        shown = ids[masks[a] & masks[b]].tolist()
        expected = sum((i == matched[a]) - (i == matched[b]) for i in shown)
        assert margins[a, b] == expected


def test_margins_are_exact_under_autocast():
    """SOLVER.AMP: they are counts, and half precision cannot count."""
    car, person = box_mask(0, 0, 60, 60, (70, 70)), box_mask(0, 0, 61, 50, (70, 70))
    ids = torch.where(person, 1, torch.where(car, 2, 0))
    ids[0, 0] = 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        margins = visible_margins(
            torch.stack([car, person]), torch.tensor([CAR, PERSON]), ids, [thing(1, 0), thing(2, 2)]
        )
    assert margins.tolist() == [[0, -2998], [2998, 0]]
