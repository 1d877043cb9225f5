import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2.evaluation.pair_accuracy import (
    KINDS,
    PairDecision,
    accuracy_by_kind,
    pair_decisions,
)
from oanet_d2.modeling.matching import match_to_segments
from tests.conftest import box_mask, random_scene, thing

PERSON, TIE, CAR, DOG = 0, 1, 2, 3
DIFFERENT, SAME, NOTHING = KINDS


def decide(masks, classes, order, ids, segments):
    return pair_decisions(
        torch.stack(masks), torch.tensor(classes), torch.tensor(order), ids.numpy(), segments
    )


@pytest.mark.parametrize(
    "order, person_right, tie_right, car_right",
    [
        ([0, 1, 2, 3, 4], True, False, False),
        ([4, 3, 2, 1, 0], False, True, True),
        ([1, 3, 0, 2, 4], True, True, True),
        ([2, 4, 0, 3, 1], False, False, False),
        ([3, 0, 4, 2, 1], True, False, True),
    ],
)
def test_all_kinds_by_hand(order, person_right, tie_right, car_right):
    """A tie on a person, a car before a car, and a dog on the person that is not there."""
    person, tie, dog = box_mask(0, 0, 6, 6), box_mask(2, 2, 6, 4), box_mask(0, 5, 4, 9)
    behind, front = box_mask(6, 0, 11, 10), box_mask(8, 4, 12, 10)
    ids = torch.zeros(10, 12, dtype=torch.int64)
    for mask, i in ((person, 7), (tie, 300), (behind, 2), (front, 9)):
        ids[mask] = i
    segments = [thing(7, PERSON), thing(300, TIE), thing(2, CAR), thing(9, CAR)]
    masks, classes = [person, tie, behind, front, dog], [PERSON, TIE, CAR, CAR, DOG]
    decisions = decide(masks, classes, order, ids, segments)
    assert sorted(decisions, key=lambda d: d.pixels) == [
        PairDecision(PERSON, DOG, NOTHING, 4, person_right),
        PairDecision(TIE, PERSON, DIFFERENT, 8, tie_right),
        PairDecision(CAR, CAR, SAME, 18, car_right),
    ]


@pytest.mark.parametrize(
    "tie_shows, person_shows, front, pixels",
    [
        (10, 0, TIE, 10),
        (7, 3, TIE, 4),
        (3, 7, PERSON, 4),
        (4, 0, TIE, 4),  # the rest is void
        (6, 4, None, 2),
        (5, 5, None, 0),
        (2, 0, None, 2),
        (0, 0, None, 0),
    ],
)
def test_only_clear_pairs_count(tie_shows, person_shows, front, pixels):
    """10 pixels are shared; 3 are not enough to tell."""
    person, tie = box_mask(0, 0, 10, 6), box_mask(0, 5, 10, 9)
    ids = torch.where(person, 1, torch.where(tie, 2, 0))
    ids[5, :10] = torch.tensor([2] * tie_shows + [1] * person_shows + [0] * 10)[:10]
    decisions = decide(
        [person, tie], [PERSON, TIE], [1, 0], ids, [thing(1, PERSON), thing(2, TIE)]
    )
    if front is None:
        assert decisions == []
    else:
        behind = PERSON if front == TIE else TIE
        assert decisions == [PairDecision(front, behind, DIFFERENT, pixels, front == TIE)]


def test_a_duplicate_belongs_behind():
    car = box_mask(0, 0, 8, 8)
    masks, segments = [box_mask(0, 0, 8, 6), car], [thing(1, CAR)]
    for order, right in (([1, 0], True), ([0, 1], False)):
        decisions = decide(masks, [CAR, CAR], order, car.long(), segments)
        assert decisions == [PairDecision(CAR, CAR, NOTHING, 48, right)]


def test_what_is_not_painted_is_in_no_pair():
    car, person = box_mask(0, 0, 8, 8), box_mask(4, 0, 12, 8)
    ids = torch.where(person, 1, torch.where(car, 2, 0))
    segments = [thing(1, PERSON), thing(2, CAR)]
    assert len(decide([car, person], [CAR, PERSON], [0, 1], ids, segments)) == 1
    nothing = torch.zeros_like(car)
    assert decide([car, nothing], [CAR, PERSON], [0, 1], ids, segments) == []
    empty = torch.zeros(0, dtype=torch.int64)
    assert pair_decisions(nothing[None][:0], empty, empty, ids.numpy(), segments) == []


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_against_slow_reference(seed, n):
    masks, classes, _, ids, segments = random_scene(seed, n)
    order = np.random.default_rng(seed).permutation(n).tolist()
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
        right = order.index(front) < order.index(behind)
        pair = classes[front].item(), classes[behind].item()
        expected.append(PairDecision(*pair, kind, pixels, right))
    args = masks, classes, torch.tensor(order), ids.numpy(), segments
    assert sorted(map(str, pair_decisions(*args))) == sorted(map(str, expected))


def test_accuracy_by_hand():
    decisions = [
        PairDecision(DOG, CAR, NOTHING, 900, False),
        PairDecision(TIE, PERSON, DIFFERENT, 8, True),
        PairDecision(CAR, DOG, NOTHING, 5, True),
        PairDecision(TIE, PERSON, DIFFERENT, 80, True),
        PairDecision(CAR, PERSON, DIFFERENT, 8, False),
        PairDecision(CAR, PERSON, DIFFERENT, 8, True),
    ]
    assert accuracy_by_kind(decisions) == {DIFFERENT: 75, NOTHING: 50}  # none of one class
    assert list(accuracy_by_kind(decisions)) == [DIFFERENT, NOTHING]
    wrong = [PairDecision(CAR, CAR, SAME, 5, False)]
    assert accuracy_by_kind(wrong) == {SAME: 0}  # a kind with pairs, none of them right
    assert accuracy_by_kind([]) == {}
