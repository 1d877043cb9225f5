import math

import pytest

from oanet_d2.painting.metrics import KINDS, OccludedPair
from oanet_d2.painting.order_counts import OF_IMAGES, OrderCounts


def test_pairs_and_f1_by_hand():
    """
    Three pairs of four that overlap are decided in the first image, one of one in the second; nothing
    overlaps in the third. The order "good" has two and one right, "bad" none.
    """
    first, second = OrderCounts(), OrderCounts()
    decided = [
        OccludedPair(0, 1, KINDS[0], 50),
        OccludedPair(2, 0, KINDS[0], 20),
        OccludedPair(2, 1, KINDS[2], 10),
    ]
    orders = {"good": [2, 1, 0, 3], "bad": [1, 0, 2, 3]}
    pairs = first.add_pairs(decided, 4, [5, 5, 6, 6], orders)
    assert [x["right"] for x in pairs] == [[], ["good"], ["good"]]
    orders = {"good": [1, 0], "bad": [0, 1]}
    second.add_pairs([OccludedPair(1, 0, KINDS[1], 7)], 1, [5, 5], orders)
    empty = OrderCounts()
    empty.add_pairs([], 0, [5], {"good": [0], "bad": [0]})
    total = OrderCounts.total([first, second, empty])
    good, bad = total.metrics("good"), total.metrics("bad")
    assert good["pairs"] == 75 and bad["pairs"] == 0
    assert [good[f"pairs, {kind}"] for kind in KINDS] == [50, 100, 100]
    # Precision: right of those that overlap, recall: right of those that are decided; of images.
    precision, recall = (2 / 4, 1 / 1), (2 / 3, 1 / 1)
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall)]
    expected = [50 * sum(x) for x in (precision, recall, f1)]
    assert [good[x] for x in OF_IMAGES] == pytest.approx(expected)
    assert [bad[x] for x in OF_IMAGES] == [0, 0, 0]


def test_without_a_pair_there_is_no_number():
    counts = OrderCounts()
    counts.add_pairs([], 0, [1], {"score": [0]})
    assert all(math.isnan(counts.metrics("score")[x]) for x in ("pairs", *OF_IMAGES))
