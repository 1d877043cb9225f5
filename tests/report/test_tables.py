import copy

import pytest

from oanet_d2.evaluation.orderings import METRICS, closure
from oanet_d2.report.tables import (
    case_pairs,
    class_rows,
    kind_rows,
    order_rows,
    pair_rows,
    panoptic_quality,
    summary,
)


def counts(iou, tp, fp, fn):
    return {"iou": iou, "tp": tp, "fp": fp, "fn": fn}


NONE = counts(0.0, 0, 0, 0)
KINDS = "different class", "same class", "one matches nothing"


def pair(front, behind, kind, overlaps, score, srm):
    right = {"score": score, "srm_pairs": srm, "oracle": overlaps}
    return {"front": front, "behind": behind, "kind": kind, "overlaps": overlaps, "right": right}


def decision(front, behind, kind, pixels, score, srm):
    right = {"score": score, "srm_pairs": srm, "oracle": True}
    return {"front": front, "behind": behind, "kind": kind, "pixels": pixels, "right": right}


def of_class(name, index, isthing, score, srm, oracle):
    found = {"score": score, "srm_pairs": srm, "oracle": oracle}
    return {"name": name, "category_id": index, "isthing": isthing, "counts": found}


REPORT = {
    "orderings": {
        "score": dict.fromkeys(METRICS, 60.0),
        "srm_pairs": dict.fromkeys(METRICS, 75.0),
        "oracle": dict.fromkeys(METRICS, 80.0),
    },
    "compared": ["score", "srm_pairs"],
    "classes": [
        of_class(
            "person", 0, True, counts(8.0, 10, 0, 0), counts(7.6, 10, 0, 0), counts(9, 10, 0, 0)
        ),
        of_class("tie", 1, True, counts(0.8, 1, 0, 3), counts(3.0, 4, 2, 0), counts(4, 4, 0, 0)),
        of_class("kite", 2, True, NONE, NONE, NONE),
        of_class("sky", 1, False, NONE, counts(0.0, 0, 1, 0), NONE),
    ],
    "pairs": [
        pair(1, 0, KINDS[0], 430, 30, 412),
        pair(0, 1, KINDS[0], 3, 3, 1),
        pair(0, 0, KINDS[1], 20, 12, 15),
        pair(0, 1, KINDS[2], 7, 5, 6),
    ],
}


def test_panoptic_quality_by_hand():
    assert panoptic_quality(counts(3.0, 4, 2, 0)) == pytest.approx(60)
    assert panoptic_quality(counts(0.0, 0, 0, 2)) == 0
    assert panoptic_quality(NONE) is None


def test_closure_by_hand():
    assert closure(REPORT["orderings"], "srm_pairs") == pytest.approx(0.75)
    without = {k: v for k, v in REPORT["orderings"].items() if k != "oracle"}
    assert closure(without, "srm_pairs") is None
    assert closure(without, "srm_pairs", REPORT["orderings"]) == pytest.approx(0.75)
    no_gap = {**REPORT["orderings"], "oracle": REPORT["orderings"]["score"]}
    assert closure(no_gap, "srm_pairs") is None


def test_order_rows_by_hand():
    rows = order_rows(REPORT)
    assert [(r["order"], r["closure"]) for r in rows] == [
        ("score", 0),
        ("srm_pairs", pytest.approx(75)),
        ("oracle", 100),
    ]
    assert rows[1]["metrics"] == [75] * 9


def test_class_rows_by_hand():
    rows = class_rows(REPORT)
    # no row for the kite, of which there is none; the sky was only ever predicted
    assert [r["name"] for r in rows] == ["tie", "person", "sky"]
    tie, person, sky = rows
    assert tie["score"] == pytest.approx(32) and tie["ranked"] == pytest.approx(60)
    assert tie["gain"] == pytest.approx(28) and tie["oracle"] == pytest.approx(100)
    assert tie["segments"] == 4
    assert person["gain"] == pytest.approx(-4)
    assert (sky["score"], sky["ranked"], sky["gain"], sky["segments"]) == (None, 0, None, 0)


def test_pair_rows_by_hand():
    rows = pair_rows(REPORT, false_positives=False)
    assert [(r["front"], r["behind"], r["overlaps"], r["right"]["srm_pairs"]) for r in rows] == [
        ("tie", "person", 430, 412),
        ("person", "person", 20, 15),
        ("person", "tie", 3, 1),
    ]
    (false,) = pair_rows(REPORT, false_positives=True)
    assert (false["front"], false["behind"], false["overlaps"]) == ("person", "tie", 7)


def test_kind_rows_and_summary_by_hand():
    rows = {r["kind"]: (r["overlaps"], r["right"]["score"]) for r in kind_rows(REPORT)}
    assert rows == {KINDS[0]: (433, 33), KINDS[1]: (20, 12), KINDS[2]: (7, 5), "all": (460, 50)}
    assert kind_rows({**REPORT, "pairs": []}) == []
    assert summary(REPORT) == {
        "score": "score",
        "ranked": "srm_pairs",
        "pq": [60, 75],
        "closure": pytest.approx(75),
        "overlaps": 460,
        "right": [50, 434],
    }
    assert summary({**REPORT, "pairs": []})["right"] == [0, 0]


def test_case_pairs_by_hand():
    case = {
        "orders": ["score", "srm_pairs"],
        "pairs": [
            decision(1, 0, KINDS[0], 12, False, True),
            decision(0, 0, KINDS[1], 90, True, False),
            decision(0, 1, KINDS[2], 40, False, True),
            decision(1, 0, KINDS[0], 500, True, True),  # both are right
        ],
    }
    assert case_pairs(REPORT, case) == [
        {"text": "person over another person", "pixels": 90, "right": False},
        {"text": "person over a false tie", "pixels": 40, "right": True},
        {"text": "tie over person", "pixels": 12, "right": True},
    ]
    still_wrong = copy.deepcopy(case)
    still_wrong["orders"] = ["srm_pairs", "oracle"]
    assert case_pairs(REPORT, still_wrong) == [
        {"text": "person over another person", "pixels": 90, "right": False}
    ]
