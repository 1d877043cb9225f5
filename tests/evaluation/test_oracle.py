import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2.evaluation.oracle import match_to_segments, oracle_order

PERSON, TIE, CAR = 0, 1, 2


def box(x0, y0, x1, y1, size=(10, 12)):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def thing(i, c, **extra):
    return {"id": i, "category_id": c, "isthing": True, **extra}


def order(masks, scores, classes, gt, segments):
    return oracle_order(
        torch.from_numpy(np.stack(masks)),
        torch.tensor(scores),
        torch.tensor(classes),
        gt,
        segments,
    ).tolist()


def test_the_tie_owns_the_overlap():
    person, tie = box(2, 0, 10, 10), box(5, 2, 7, 8)
    gt = np.where(tie, 2, np.where(person, 1, 0))
    segments = [thing(1, PERSON), thing(2, TIE)]
    assert order([person, tie], [0.9, 0.6], [PERSON, TIE], gt, segments) == [1, 0]
    behind = np.where(person, 1, 0)  # the same predictions, a tie that nobody sees
    assert order([person, tie], [0.9, 0.6], [PERSON, TIE], behind, segments[:1]) == [0, 1]


def test_two_of_a_class_are_matched_one_to_one():
    """
    The person behind shows a narrow strip. Its whole silhouette overlaps the person in front more
    than that strip, but the person in front is taken by its own prediction.
    """
    front, behind = box(4, 0, 12, 10), box(0, 0, 9, 10)
    gt = np.where(front, 1, np.where(behind, 2, 0))
    segments = [thing(1, PERSON), thing(2, PERSON)]
    matched = match_to_segments(np.stack([behind, front]), np.array([0, 0]), gt, segments)
    assert matched.tolist() == [2, 1]
    assert order([behind, front], [0.9, 0.8], [PERSON, PERSON], gt, segments) == [1, 0]


def test_what_matches_nothing_goes_behind_what_does():
    car, person = box(0, 0, 8, 8), box(4, 0, 12, 10)
    gt = np.where(person, 1, 0)
    segments = [thing(1, PERSON), thing(3, CAR, iscrowd=1), {**thing(4, CAR), "isthing": False}]
    matched = match_to_segments(np.stack([car, person]), np.array([CAR, PERSON]), gt, segments)
    assert matched.tolist() == [-1, 1]
    assert order([car, person], [0.9, 0.5], [CAR, PERSON], gt, segments) == [1, 0]


def test_no_prediction():
    nothing = torch.zeros(0, 10, 12, dtype=torch.bool)
    empty = torch.zeros(0)
    result = oracle_order(nothing, empty, empty.long(), np.zeros((10, 12), int), [])
    assert result.tolist() == []


def slow_margin(a, b, masks, matched, gt):
    pixels = [(y, x) for y, x in np.ndindex(*gt.shape) if masks[a][y, x] and masks[b][y, x]]
    return sum(gt[p] == matched[a] for p in pixels) - sum(gt[p] == matched[b] for p in pixels)


def slow_matching(masks, classes, gt, segments):
    """The best one-to-one assignment by trying all of them."""
    matched = {}
    for c in set(classes):
        mine = [i for i in range(len(masks)) if classes[i] == c]
        ids = [s["id"] for s in segments if s["category_id"] == c]

        def iou(i, s):
            union = (masks[i] | (gt == s)).sum()
            return (masks[i] & (gt == s)).sum() / union if union else 0.0

        slots = ids + [None] * len(mine)
        matched[c] = max(
            sum(iou(i, s) for i, s in zip(mine, chosen) if s is not None)
            for chosen in itertools.permutations(slots, len(mine))
        )
    return sum(matched.values())


@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_against_slow_reference(seed, n):
    rng = np.random.default_rng(seed)
    size = (6, 7)

    def random_box():
        x, y = rng.integers(0, 5), rng.integers(0, 4)
        return box(x, y, x + rng.integers(1, 6), y + rng.integers(1, 5), size)

    gt, segments = np.zeros(size, dtype=int), []
    for i in range(1, 5):
        gt[random_box()] = i
        segments.append(thing(i, int(rng.integers(2))))
    masks = [random_box() for _ in range(n)]
    classes = rng.integers(0, 2, n).tolist()
    scores = rng.permutation(n) / 10 + 0.1

    matched = match_to_segments(np.stack(masks), np.array(classes), gt, segments)
    chosen = [s for s in matched.tolist() if s != -1]
    assert len(set(chosen)) == len(chosen)  # one to one
    total = sum(
        (m & (gt == s)).sum() / (m | (gt == s)).sum() for m, s in zip(masks, matched) if s != -1
    )
    assert np.isclose(total, slow_matching(masks, classes, gt, segments))

    result = order(masks, scores.tolist(), classes, gt, segments)
    assert sorted(result) == list(range(n))
    # the order is the one that the pairwise ownership gives by repeated least loss
    left, expected = list(range(n)), []
    while left:
        lost = {
            a: sum(max(-slow_margin(a, b, masks, matched, gt), 0) for b in left if b != a)
            for a in left
        }
        best = min(left, key=lambda a: (lost[a], -scores[a]))
        expected.append(best)
        left.remove(best)
    assert result == expected
