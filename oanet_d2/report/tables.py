"""
The report's numbers, from what the evaluation counted; rows for the page's tables.
"""

from typing import Any, Dict, List, Optional

from ..evaluation.orderings import METRICS, closure
from ..evaluation.pair_accuracy import KINDS

__all__ = [
    "case_pairs",
    "class_rows",
    "kind_rows",
    "order_rows",
    "pair_rows",
    "panoptic_quality",
    "summary",
]

SAME_CLASS, MATCHES_NOTHING = KINDS[1:]
Rows = List[Dict[str, Any]]


def panoptic_quality(counts: Dict[str, float]) -> Optional[float]:
    """
    PQ of a class in percent, from its "iou" (sum over true positives), "tp", "fp" and "fn"; None
    where there is no segment of it.
    """
    segments = counts["tp"] + 0.5 * counts["fp"] + 0.5 * counts["fn"]
    return 100 * counts["iou"] / segments if segments > 0 else None


def order_rows(report: Dict) -> Rows:
    """
    Returns:
        {"order", "metrics": in the order of METRICS, "closure": percent or None}, in the order in
        which the evaluation has them.
    """
    orderings = report["orderings"]
    rows = []
    for order, metrics in orderings.items():
        share = closure(orderings, order)
        rows.append(
            {
                "order": order,
                "metrics": [metrics[m] for m in METRICS],
                "closure": None if share is None else 100 * share,
            }
        )
    return rows


def class_rows(report: Dict) -> Rows:
    """
    Returns:
        {"name", "isthing", "segments": in the ground truth, "score", "ranked", "oracle": PQ or
        None, "gain": from score to ranked, or None}, the greatest gain first. Classes without a
        segment, true or predicted, are left out.
    """
    score, ranked = report["compared"]
    rows = []
    for c in report["classes"]:
        pq = {order: panoptic_quality(counts) for order, counts in c["counts"].items()}
        before, after = pq[score], pq[ranked]
        if before is None and after is None:
            continue
        rows.append(
            {
                "name": c["name"],
                "isthing": c["isthing"],
                "segments": c["counts"][ranked]["tp"] + c["counts"][ranked]["fn"],
                "score": before,
                "ranked": after,
                "oracle": pq.get("oracle"),
                "gain": None if before is None or after is None else after - before,
            }
        )
    return sorted(rows, key=lambda r: (r["gain"] is None, -(r["gain"] or 0), r["name"]))


def pair_rows(report: Dict, false_positives: bool) -> Rows:
    """
    Who lies on whom, a row for every pair of classes.

    Args:
        false_positives: those pairs in which one detection matches nothing; otherwise the others.

    Returns:
        {"front", "behind": names, "overlaps", "right": order -> overlaps}, most overlaps first.
    """
    names = _thing_names(report)
    rows = [
        {
            "front": names[p["front"]],
            "behind": names[p["behind"]],
            "overlaps": p["overlaps"],
            "right": p["right"],
        }
        for p in report["pairs"]
        if (p["kind"] == MATCHES_NOTHING) == false_positives
    ]
    return sorted(rows, key=lambda r: (-r["overlaps"], r["front"], r["behind"]))


def kind_rows(report: Dict) -> Rows:
    """
    Returns:
        {"kind", "overlaps", "right": order -> overlaps} for each kind that occurs, and for "all".
    """
    rows = []
    for kind in (*KINDS, "all"):
        pairs = [p for p in report["pairs"] if kind in (p["kind"], "all")]
        if pairs:
            right = {o: sum(p["right"][o] for p in pairs) for o in report["orderings"]}
            overlaps = sum(p["overlaps"] for p in pairs)
            rows.append({"kind": kind, "overlaps": overlaps, "right": right})
    return rows


def case_pairs(report: Dict, case: Dict) -> Rows:
    """
    The overlaps of an image that its two orders decide differently, the largest first.

    Returns:
        {"text": "tie over person", "pixels", "right": whether the ranked order is right}.
    """
    names = _thing_names(report)
    first, second = case["orders"]
    ranked = report["compared"][1]
    rows = []
    for p in case["pairs"]:
        if p["right"][first] == p["right"][second]:
            continue
        front, behind = names[p["front"]], names[p["behind"]]
        text = f"{front} over {behind}"
        if p["kind"] == SAME_CLASS:
            text = f"{front} over another {behind}"
        elif p["kind"] == MATCHES_NOTHING:
            text = f"{front} over a false {behind}"
        rows.append({"text": text, "pixels": p["pixels"], "right": p["right"][ranked]})
    return sorted(rows, key=lambda r: (-r["pixels"], r["text"]))


def summary(report: Dict) -> Dict[str, Any]:
    """
    Returns:
        "score", "ranked": the names of the two orders; "pq": PQ of things by each; "closure":
        percent or None; "overlaps", "right": overlaps, and how many each order has right.
    """
    score, ranked = report["compared"]
    share = closure(report["orderings"], ranked)
    overall = kind_rows(report)[-1:] or [{"overlaps": 0, "right": {score: 0, ranked: 0}}]
    return {
        "score": score,
        "ranked": ranked,
        "pq": [report["orderings"][o]["PQ_th"] for o in (score, ranked)],
        "closure": None if share is None else 100 * share,
        "overlaps": overall[0]["overlaps"],
        "right": [overall[0]["right"][o] for o in (score, ranked)],
    }


def _thing_names(report: Dict) -> Dict[int, str]:
    return {c["category_id"]: c["name"] for c in report["classes"] if c["isthing"]}
