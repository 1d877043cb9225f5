#!/usr/bin/env python3
"""
Train the demo over several seeds, evaluate every run, and write docs/RESULTS.md and the picture of
the README from what came out.

    python tools/results.py --seeds 1 2 3
    python tools/results.py --seeds 1 2 3 -- SOLVER.MAX_ITER 2000    # any config override

A run whose result is there already is not repeated; remove its folder to repeat it.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from oanet_d2.evaluation.orderings import METRICS

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/OcclusionScenes/oanet_R_18.yaml"


def train_net(output_dir: Path, *args: str) -> dict:
    """
    Run train_net.py unless `output_dir` holds its result; return orderings.json.
    """
    result = output_dir / "orderings.json"
    if not result.exists():
        command = [sys.executable, "train_net.py", "--config-file", CONFIG, *args]
        print("+", *command, flush=True)
        subprocess.run([*command, "OUTPUT_DIR", str(output_dir)], cwd=ROOT, check=True)
    return json.loads(result.read_text())


def closure(orderings: dict, order: str) -> float:
    """
    Share of the gap in PQ_th between the orders "score" and "oracle" that `order` closes.
    """
    score, oracle = orderings["score"]["PQ_th"], orderings["oracle"]["PQ_th"]
    return (orderings[order]["PQ_th"] - score) / (oracle - score)


def spread(values: list, digits: int = 1) -> str:
    """
    "mean ± standard deviation" over the seeds.
    """
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def orders_table(runs: list) -> str:
    rows = []
    for order in runs[0]["orderings"]:
        metrics = [spread([r["orderings"][order][m] for r in runs]) for m in METRICS]
        rows.append([order, *metrics, spread([closure(r["orderings"], order) for r in runs], 2)])
    return tabulate(rows, headers=["order", *METRICS, "closure"], tablefmt="pipe")


def seeds_table(seeds: list, runs: list) -> str:
    rows = []
    for seed, run in zip(seeds, runs):
        o, s = run["orderings"], run["seconds"]
        gain = o["srm_overlap"]["PQ_th"] - o["score"]["PQ_th"]
        rows.append([seed, o["srm_overlap"]["PQ"], gain, s["train"] / 60, s["eval"] / 60])
    headers = ["seed", "PQ", "PQ_th over score", "training, min", "evaluation, min"]
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".1f")


def free_pixels_table(free: list, stuff_only: list) -> str:
    rows = [
        [name, *(spread([r["orderings"]["srm_overlap"][m] for r in runs]) for m in METRICS)]
        for name, runs in (("True", free), ("False", stuff_only))
    ]
    return tabulate(rows, headers=["KEEP_THINGS_FREE", *METRICS], tablefmt="pipe")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=Path("output/results"), help="runs go here")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "RESULTS.md")
    parser.add_argument("opts", nargs="*", help="config overrides, after --")
    args = parser.parse_args()
    work = args.work.resolve()

    free, stuff_only = [], []
    for seed in args.seeds:
        folder = work / f"seed_{seed}"
        free.append(train_net(folder, *args.opts, "SEED", str(seed)))
        weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
        override = ["MODEL.OANET.KEEP_THINGS_FREE", "False", "TEST.ORDER_PICTURES", "0"]
        stuff_only.append(
            train_net(work / f"seed_{seed}_stuff_only", "--eval-only", *weights, *override, *args.opts)
        )

    # The picture of the README: the scene of the first run where the order matters most.
    picture = min((work / f"seed_{args.seeds[0]}" / "pictures").glob("*.png"))
    (args.out.parent / "pictures").mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, args.out.parent / "pictures" / "order.png")

    command = "python tools/results.py --seeds " + " ".join(map(str, args.seeds))
    command += " -- " + " ".join(args.opts) if args.opts else ""
    args.out.write_text(
        f"""# Results on OcclusionScenes

Everything on this page was written by

    {command}

on {torch.get_num_threads()} CPU threads with PyTorch {torch.__version__}: {len(args.seeds)} trainings
of `{CONFIG}` that differ in their seed (initial weights and the order of the training images),
each evaluated on the same {free[0]["images"]} scenes, none of which is trained on. Numbers are mean
± standard deviation over the seeds, in percent, by the official `panopticapi`.

## Painting orders

One model, one set of predictions; only the order of painting changes. *closure* is the share of
the gap in PQ_th between the orders *score* and *oracle* that an order closes.

{orders_table(free)}

{seeds_table(args.seeds, free)}

## Pixels that no instance claims

With the order *srm_overlap*: `MODEL.OANET.KEEP_THINGS_FREE True` (default) leaves a pixel whose best
semantic class is a thing void; `False` gives it its best stuff class (the paper: only the stuff
scores are used at inference).

{free_pixels_table(free, stuff_only)}
"""
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
