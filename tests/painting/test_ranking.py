import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2.painting.ranking import OrderInputs, mean_scores, order_from_margins, overlap_margins

PERSON, TIE = 0, 1
# A person of 8 cells, a tie on 2 of them; the person is the more confident.
MASKS = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 1]], [[0, 1, 1, 0], [0, 0, 0, 0]]]).bool()
CLASSES = torch.tensor([PERSON, TIE])
SCORES = torch.tensor([0.99, 0.80])
# S: the person is sure of itself where it is alone, and the tie wins where they meet, 0.6 to 0.4.
SCORE_MAP = torch.tensor(
    [
        [[1.0, 0.4, 0.4, 1.0], [1.0, 1.0, 1.0, 1.0]],
        [[0.0, 0.6, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]],
    ]
)


def order(rule, scores=SCORES, classes=CLASSES, masks=MASKS, score_map=SCORE_MAP, pairs=None):
    return OrderInputs(scores, classes, masks, score_map, pairs).order(rule).tolist()


def test_the_rules_disagree_where_the_paper_says_they_should():
    assert order("score") == [0, 1]
    assert order("srm_mean") == [0, 1]  # 0.85 > 0.6: the mean is diluted by uncontested cells
    assert order("srm_overlap") == [1, 0]  # 0.6 > 0.4 where they meet
    # two cells, 0.6 - 0.4 each, for the tie
    margins = overlap_margins(OrderInputs(SCORES, CLASSES, MASKS, SCORE_MAP))
    torch.testing.assert_close(margins, torch.tensor([[0.0, -0.4], [0.4, 0.0]]))


def test_a_rule_names_what_it_misses():
    with pytest.raises(ValueError, match="srm_pairs.*SRM_HEAD.NAME.*PairwiseRankingHead"):
        order("srm_pairs")
    for rule in ("srm_mean", "srm_overlap"):
        with pytest.raises(ValueError, match="score map.*MAP_LOSS_WEIGHT"):
            order(rule, score_map=None)


def slow_order_from_margins(margins, scores):
    """The same rule with Python lists. Every sum is computed again in every round."""
    margins, scores = margins.tolist(), scores.tolist()
    left, result = list(range(len(scores))), []
    while left:
        against = {a: sum(max(round(-margins[a][b] * 2**20), 0) for b in left) for a in left}
        result.append(min(left, key=lambda a: (against[a], -scores[a])))
        left.remove(result[-1])
    return result


@given(st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_order_equals_slow_reference(n, seed):
    generator = torch.Generator().manual_seed(seed)
    # eighths, so that sums are often equal
    upper = torch.randint(-16, 17, (n, n), generator=generator).triu(1) / 8
    scores, margins = torch.randperm(n, generator=generator) / 10, upper - upper.t()
    expected = slow_order_from_margins(margins, scores)
    assert order_from_margins(margins, scores).tolist() == expected


@given(st.integers(0, 2**31 - 1), st.integers(0, 9))
def test_rules_against_plain_loops(seed, n):
    """Every rule on random instances, against sums written out cell by cell."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, 4, 5, generator=generator) < 0.4
    classes = torch.randint(3, (n,), generator=generator)
    scores = torch.rand(n, generator=generator)
    score_map = torch.rand(3, 4, 5, generator=generator).softmax(0)
    instances = scores, classes, masks

    def mean(i):
        values = [score_map[classes[i], y, x].item() for y, x in masks[i].nonzero().tolist()]
        return sum(values) / max(len(values), 1)

    def margin(a, b):
        cells = (masks[a] & masks[b]).nonzero().tolist()
        return sum((score_map[classes[a], y, x] - score_map[classes[b], y, x]) for y, x in cells)

    def by(key):
        return sorted(range(n), key=lambda i: (key(i), -scores[i].item()))

    assert order("score", *instances) == by(lambda i: 0)
    assert order("smaller_first", *instances) == by(lambda i: masks[i].sum().item())
    rows = [masks[i].any(1).nonzero()[:, 0].tolist() or [3] for i in range(n)]
    assert order("lower_first", *instances) == by(lambda i: -max(rows[i]))
    inputs = OrderInputs(*instances, score_map)
    means = mean_scores(inputs)
    torch.testing.assert_close(means, torch.tensor([mean(i) for i in range(n)]))
    ranked = order("srm_mean", *instances, score_map)
    assert all(means[a] >= means[b] for a, b in itertools.pairwise(ranked))
    margins = overlap_margins(inputs)
    expected = torch.tensor([[margin(a, b) for b in range(n)] for a in range(n)]).reshape(n, n)
    torch.testing.assert_close(margins, expected, atol=1e-5, rtol=1e-5)
    expected_order = slow_order_from_margins(margins, scores)
    assert order("srm_overlap", *instances, score_map) == expected_order
    assert order("srm_pairs", *instances, None, margins) == expected_order
