#!/usr/bin/env python3
"""
Fill docs/RESULTS.md, the table of README.md and their pictures from finished runs that differ in
their seed. A run is the OUTPUT_DIR of a training, or of an evaluation, with TEST.ORDERS.

    python tools/results.py output/seed_1 output/seed_2 output/seed_3
"""

import json
import math
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Dict, List, Sequence

import yaml
from PIL import Image
from tabulate import tabulate

from oanet_d2.painting.metrics import METRICS, closure

ROOT = Path(__file__).resolve().parent.parent


def fill_region(page: Path, name: str, text: str) -> None:
    """Replace what is between "<!-- `name` fills this in -->" and the next "<!-- end -->"."""
    begin, end = f"<!-- {name} fills this in -->", "<!-- end -->"
    before, found, rest = page.read_text().partition(begin)
    if not found:
        raise ValueError(f"{page} has no line {begin!r}.")
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def markdown_table(headers: Sequence[str], rows: List[List[str]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def read_run(folder: Path) -> Dict:
    run = json.loads((folder / "orderings.json").read_text())
    return {**run, "config": yaml.safe_load((folder / "config.yaml").read_text())}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """ "mean ± standard deviation", or the one value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def orders_table(runs: List[Dict], metrics: Sequence[str], orders: Sequence[str]) -> str:
    rows = []
    for order in orders:
        cells = [spread([run["orderings"][order][m] for run in runs]) for m in metrics]
        closures = [closure(run["orderings"], order) for run in runs]
        rows.append([order, *cells, spread([math.nan if x is None else x for x in closures], 3)])
    return markdown_table(["order", *metrics, "closure"], rows)


def runs_table(runs: List[Dict], best: str) -> str:
    rows = []
    for run in runs:
        orderings = run["orderings"]
        score, this, oracle = (orderings[x]["PQ_th"] for x in ("score", best, "oracle"))
        numbers = [orderings[best]["PQ"], this - score, oracle - this]
        rows.append([str(run["config"]["SEED"]), *(f"{x:.1f}" for x in numbers)])
    return markdown_table(["seed", f"PQ ({best})", "PQ_th over score", "PQ_th under oracle"], rows)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with orderings.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    config = runs[0]["config"]
    best = config["MODEL"]["OANET"]["ORDER"]
    about = (
        f"{len(runs)} trainings of {config['SOLVER']['MAX_ITER']} iterations that differ in their "
        f"seed, each evaluated on {runs[0]['images']} images."
    )
    text = [orders_table(runs, METRICS, list(runs[0]["orderings"])), about, runs_table(runs, best)]
    fill_region(args.root / "docs" / "RESULTS.md", "tools/results.py", "\n\n".join(text))
    short = orders_table(runs, ["PQ", "PQ_th", "PQ_st"], ["score", best, "oracle"])
    fill_region(args.root / "README.md", "tools/results.py", f"{short}\n\n{about}")
    for folder, prefix in (("pictures", "right"), ("pictures_still_wrong", "wrong")):
        for i, path in enumerate(sorted((args.runs[0] / folder).glob("*.png"))[:2], start=1):
            picture = args.root / "docs" / "pictures" / f"{prefix}_{i}.jpg"
            Image.open(path).convert("RGB").save(picture, quality=90)


if __name__ == "__main__":
    main()
