#!/usr/bin/env python3
"""
What the ranking costs: the share of the whole inference time that goes into instance tensor,
ranking head and order, for 100 instances in an image of 800 x 1333 pixels.

    python tools/benchmark_ranking.py [--json FILE]

The network is the COCO R-50 config with random weights, its detections are those of
tools/benchmark.py.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from benchmark_models import COCO, build_detecting, infer
from tabulate import tabulate

from oanet_d2.modeling import RankingEvidence

CONFIG = COCO + "oanet_R_50_1x.yaml"
HEIGHT, WIDTH = 800, 1333
NUM_INSTANCES = 100  # as many detections as Detectron2 keeps
HEAD = "MODEL.SRM_HEAD.NAME"
ORDER = "MODEL.OANET.ORDER"
VARIANTS = {
    "pairs (default)": [],
    "pairs, masks only": ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry',)"],
    "score map, in overlaps": [HEAD, "SpatialRankingHead", ORDER, "srm_overlap"],
    "score map, mean (the paper's)": [HEAD, "SpatialRankingHead", ORDER, "srm_mean"],
}


def timed(function, seconds: list):
    """
    `function`, adding the time of every call to `seconds`.
    """

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def measure(opts: list, repeats: int) -> dict:
    """
    Args:
        opts: config overrides.
        repeats: how often, after one warm-up.

    Returns:
        median seconds of the whole "inference", of the "ranking" in it and of the "order" in that
        (comparisons to a permutation), and the "ratio" of the first two.
    """
    model = build_detecting(CONFIG, opts)
    run_model = infer(model, (HEIGHT, WIDTH))
    inference, ranking, order = [], [], []
    model._rank = timed(model._rank, ranking)
    with mock.patch.object(RankingEvidence, "order", timed(RankingEvidence.order, order)):
        run = timed(run_model, inference)
        for _ in range(repeats + 1):
            run()
    ranking = [a + b for a, b in zip(ranking, order)]
    seconds = {
        "inference": statistics.median(inference[1:]),
        "ranking": statistics.median(ranking[1:]),
        "order": statistics.median(order[1:]),
    }
    return {**seconds, "ratio": seconds["ranking"] / seconds["inference"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    results = {name: measure(opts, args.repeats) for name, opts in VARIANTS.items()}
    table = [
        [name, 1000 * r["order"], 1000 * r["ranking"], r["inference"], 100 * r["ratio"]]
        for name, r in results.items()
    ]
    headers = ["ranking", "order, ms", "ranking, ms", "whole inference, s", "share, %"]
    print(f"{NUM_INSTANCES} instances, {HEIGHT} x {WIDTH}, {CONFIG}, CPU, ", end="")
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(tabulate(table, headers=headers, tablefmt="pipe", floatfmt=".1f"))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
