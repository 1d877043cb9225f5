import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oanet_d2.modeling.ranking import (
    RANKING_RULE_REGISTRY,
    RankingEvidence,
    mean_scores,
    order_from_margins,
    overlap_margins,
)

PERSON, TIE = 0, 1
RULES = ("score", "srm_mean", "srm_overlap", "srm_pairs")


def rows(*text):
    """Masks drawn as text: '#' is inside."""
    return torch.tensor([[c == "#" for c in line] for line in text])


# A person of 8 cells, a tie on 2 of them; the person is the more confident.
PERSON_MASK = rows("####", "####")
TIE_MASK = rows(".##.", "....")
MASKS = torch.stack([PERSON_MASK, TIE_MASK])
CLASSES = torch.tensor([PERSON, TIE])
SCORES = torch.tensor([0.99, 0.80])
# S: the person is sure of itself where it is alone, and the tie wins where they meet, 0.6 to 0.4.
SCORE_MAP = torch.tensor(
    [
        [[1.0, 0.4, 0.4, 1.0], [1.0, 1.0, 1.0, 1.0]],
        [[0.0, 0.6, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]],
    ]
)


def order(
    rule, scores=SCORES, classes=CLASSES, masks=MASKS, score_map=SCORE_MAP, pair_margins=None
):
    return RankingEvidence(scores, classes, masks, score_map, pair_margins).order(rule).tolist()


def test_eq_3_by_hand():
    # person: (6 * 1.0 + 2 * 0.4) / 8, tie: (0.6 + 0.6) / 2
    expected = torch.tensor([6.8 / 8, 0.6])
    torch.testing.assert_close(mean_scores(SCORE_MAP, MASKS, CLASSES), expected)


def test_eq_4_erratum_mean_is_over_the_inside():
    # With m = 0 inside and 1 outside, as printed, the tie would score the mean of S[tie] over the
    # six cells that are *not* the tie: 0. Cells outside must not count at all.
    outside_changed = SCORE_MAP.clone()
    outside_changed[TIE][~TIE_MASK] = 123.0
    before, after = (mean_scores(s, MASKS, CLASSES)[1] for s in (SCORE_MAP, outside_changed))
    assert before == after
    assert before == pytest.approx(0.6)


def test_empty_mask_has_mean_zero():
    masks = torch.stack([PERSON_MASK, torch.zeros_like(TIE_MASK)])
    assert mean_scores(SCORE_MAP, masks, CLASSES)[1] == 0


def test_the_rules_disagree_where_the_paper_says_they_should():
    assert order("score") == [0, 1]
    assert order("srm_mean") == [0, 1]  # 0.85 > 0.6: the mean is diluted by uncontested cells
    assert order("srm_overlap") == [1, 0]  # 0.6 > 0.4 where they meet


def test_overlap_margin_by_hand():
    margins = overlap_margins(SCORE_MAP, MASKS, CLASSES)
    # two cells, 0.6 - 0.4 each, for the tie
    torch.testing.assert_close(margins, torch.tensor([[0.0, -0.4], [0.4, 0.0]]))


def test_one_class_falls_back_to_the_score():
    classes = torch.tensor([PERSON, PERSON])
    assert overlap_margins(SCORE_MAP, MASKS, classes).abs().max() == 0
    assert order("srm_overlap", classes=classes) == [0, 1]
    assert order("srm_overlap", scores=SCORES.flip(0), classes=classes) == [1, 0]


def test_no_instance():
    empty = torch.zeros(0)
    masks = torch.zeros(0, 2, 4, dtype=torch.bool)
    assert sorted(name for name, _ in RANKING_RULE_REGISTRY) == sorted(RULES)
    for rule in RULES:
        assert order(rule, empty, empty.long(), masks, pair_margins=torch.zeros(0, 0)) == []


def test_pair_margins_decide_where_no_score_map_can():
    classes = torch.tensor([PERSON, PERSON])
    behind = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
    assert order("srm_pairs", classes=classes, pair_margins=behind) == [1, 0]
    assert order("srm_pairs", classes=classes, pair_margins=-behind) == [0, 1]
    # nothing to compare: the score
    assert order("srm_pairs", scores=SCORES.flip(0), pair_margins=torch.zeros(2, 2)) == [1, 0]


def test_srm_pairs_without_a_pairwise_head_is_refused_by_name():
    with pytest.raises(ValueError, match="srm_pairs.*SRM_HEAD.NAME.*PairwiseRankingHead"):
        order("srm_pairs")


def test_evidence_of_some_instances():
    margins = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]])
    masks = torch.stack([PERSON_MASK, TIE_MASK, TIE_MASK.flip(0)])
    evidence = RankingEvidence(
        torch.tensor([0.9, 0.8, 0.7]), torch.tensor([4, 5, 6]), masks, SCORE_MAP, margins
    )
    some = evidence[torch.tensor([2, 0])]
    assert some.classes.tolist() == [6, 4]
    torch.testing.assert_close(some.scores, torch.tensor([0.7, 0.9]))
    assert torch.equal(some.masks, masks[[2, 0]])
    assert some.score_map is SCORE_MAP
    assert some.pair_margins.tolist() == [[0.0, -2.0], [2.0, 0.0]]
    assert RankingEvidence(SCORES, CLASSES, MASKS)[torch.tensor([1])].pair_margins is None


def test_a_cycle_is_broken_at_its_weakest_link():
    # 0 beats 1 by 5, 1 beats 2 by 4, 2 beats 0 by 1: giving up the last costs least.
    margins = torch.tensor([[0.0, 5.0, -1.0], [-5.0, 0.0, 4.0], [1.0, -4.0, 0.0]])
    for scores in itertools.permutations([0.5, 0.6, 0.7]):
        assert order_from_margins(margins, torch.tensor(scores)).tolist() == [0, 1, 2]


def slow_order_from_margins(margins, scores):
    """The same rule, restated with Python lists and recomputed from scratch every time."""
    left = list(range(len(scores)))
    result = []
    while left:
        against = {
            a: sum(max(round(-margins[a][b] * 2**20), 0) for b in left if b != a) for a in left
        }
        best = min(left, key=lambda a: (against[a], -scores[a]))
        result.append(best)
        left.remove(best)
    return result


@st.composite
def tournaments(draw):
    n = draw(st.integers(1, 8))
    # eighths: exact in float32
    upper = draw(st.lists(st.integers(-16, 16), min_size=n * n, max_size=n * n))
    matrix = np.triu(np.array(upper, dtype=np.float32).reshape(n, n) / 8, 1)
    scores = draw(st.permutations([i / 10 for i in range(n)]))
    return torch.from_numpy(matrix - matrix.T), torch.tensor(scores)


@given(tournaments())
def test_order_equals_slow_reference(tournament):
    margins, scores = tournament
    expected = slow_order_from_margins(margins.tolist(), scores.tolist())
    assert order_from_margins(margins, scores).tolist() == expected


@given(st.permutations(range(7)), st.data())
def test_comparisons_without_contradiction_are_all_kept(true_order, data):
    """Any subset of comparisons that some order satisfies is satisfied by the result."""
    n = len(true_order)
    position = {instance: i for i, instance in enumerate(true_order)}
    margins = torch.zeros(n, n)
    for a, b in itertools.combinations(range(n), 2):
        if data.draw(st.booleans()):
            margins[a, b] = 1.0 if position[a] < position[b] else -1.0
            margins[b, a] = -margins[a, b]
    result = order_from_margins(margins, torch.rand(n)).tolist()
    assert sorted(result) == list(range(n))
    for a, b in itertools.permutations(range(n), 2):
        if margins[a, b] > 0:
            assert result.index(a) < result.index(b)


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 9))
def test_rules_against_plain_loops(seed, n):
    """Every rule on random instances, against sums written out cell by cell."""
    generator = torch.Generator().manual_seed(seed)
    h, w, num_classes = 4, 5, 3
    masks = torch.rand(n, h, w, generator=generator) < 0.4
    classes = torch.randint(num_classes, (n,), generator=generator)
    scores = torch.rand(n, generator=generator)
    score_map = torch.rand(num_classes, h, w, generator=generator).softmax(0)

    def mean(i):
        values = [score_map[classes[i], y, x].item() for y, x in masks[i].nonzero().tolist()]
        return sum(values) / len(values) if values else 0.0

    def margin(a, b):
        if classes[a] == classes[b]:
            return 0.0
        cells = (masks[a] & masks[b]).nonzero().tolist()
        return sum(
            score_map[classes[a], y, x].item() - score_map[classes[b], y, x].item()
            for y, x in cells
        )

    by_score = sorted(range(n), key=lambda i: -scores[i].item())
    assert order("score", scores, classes, masks, None) == by_score
    means = mean_scores(score_map, masks, classes)
    torch.testing.assert_close(means, torch.tensor([mean(i) for i in range(n)]))
    ranked = order("srm_mean", scores, classes, masks, score_map)
    assert all(means[a] >= means[b] for a, b in itertools.pairwise(ranked))
    margins = overlap_margins(score_map, masks, classes)
    expected = torch.tensor([[margin(a, b) for b in range(n)] for a in range(n)]).reshape(n, n)
    torch.testing.assert_close(margins, expected, atol=1e-5, rtol=1e-5)
    assert order("srm_overlap", scores, classes, masks, score_map) == slow_order_from_margins(
        margins.tolist(), scores.tolist()
    )
    pairs = torch.randn(n, n, generator=generator)
    pairs = pairs - pairs.t()
    assert order("srm_pairs", scores, classes, masks, None, pairs) == slow_order_from_margins(
        pairs.tolist(), scores.tolist()
    )


@pytest.mark.parametrize("rule", ["srm_mean", "srm_overlap"])
def test_a_rule_that_looks_at_the_map_says_so_where_there_is_none(rule):
    evidence = RankingEvidence(torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="This order needs the score map"):
        evidence.order(rule)
