import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2.evaluation.oracle import oracle_order
from oanet_d2.modeling.matching import match_to_segments
from tests.conftest import box_mask, random_scene, thing

PERSON, TIE, CAR = 0, 1, 2


def order(masks, scores, classes, gt, segments):
    return oracle_order(
        torch.stack(masks), torch.tensor(scores), torch.tensor(classes), gt.numpy(), segments
    ).tolist()


def test_the_tie_owns_the_overlap():
    person, tie = box_mask(2, 0, 10, 10), box_mask(5, 2, 7, 8)
    gt = torch.where(tie, 2, torch.where(person, 1, 0))
    segments = [thing(1, PERSON), thing(2, TIE)]
    assert order([person, tie], [0.9, 0.6], [PERSON, TIE], gt, segments) == [1, 0]
    behind = torch.where(person, 1, 0)  # the same predictions, a tie that nobody sees
    assert order([person, tie], [0.9, 0.6], [PERSON, TIE], behind, segments[:1]) == [0, 1]


def test_two_of_a_class():
    front, behind = box_mask(4, 0, 12, 10), box_mask(0, 0, 9, 10)
    gt = torch.where(front, 1, torch.where(behind, 2, 0))
    segments = [thing(1, PERSON), thing(2, PERSON)]
    assert order([behind, front], [0.9, 0.8], [PERSON, PERSON], gt, segments) == [1, 0]


def test_what_matches_nothing_goes_behind_what_does():
    car, person = box_mask(0, 0, 8, 8), box_mask(4, 0, 12, 10)
    gt = torch.where(person, 1, 0)
    segments = [thing(1, PERSON), thing(3, CAR, iscrowd=1), {**thing(4, CAR), "isthing": False}]
    assert order([car, person], [0.9, 0.5], [CAR, PERSON], gt, segments) == [1, 0]


def test_no_prediction():
    nothing = torch.zeros(0, 10, 12, dtype=torch.bool)
    empty = torch.zeros(0)
    result = oracle_order(nothing, empty, empty.long(), np.zeros((10, 12), int), [])
    assert result.tolist() == []


def slow_margin(a, b, masks, matched, gt):
    pixels = [(y, x) for y, x in np.ndindex(*gt.shape) if masks[a][y, x] and masks[b][y, x]]
    return sum(gt[p] == matched[a] for p in pixels) - sum(gt[p] == matched[b] for p in pixels)


@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_against_slow_reference(seed, n):
    masks, classes, scores, gt, segments = random_scene(seed, n)
    matched = match_to_segments(masks, classes, gt, segments).tolist()
    result = order(list(masks), scores.tolist(), classes.tolist(), gt, segments)
    assert sorted(result) == list(range(n))
    # the order is the one that the pairwise ownership gives by repeated least loss
    masks, gt = masks.numpy(), gt.numpy()
    left, expected = list(range(n)), []
    while left:
        lost = {
            a: sum(max(-slow_margin(a, b, masks, matched, gt), 0) for b in left if b != a)
            for a in left
        }
        best = min(left, key=lambda a: (lost[a], -scores[a].item()))
        expected.append(best)
        left.remove(best)
    assert result == expected
