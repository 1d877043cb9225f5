#!/usr/bin/env python3
"""
Fill docs/RESULTS.md, the table of README.md and their pictures from finished runs: of one or several
datasets, and for each of them trainings that differ in their seed. Those with other settings than the
first of their dataset have a table of their own. A run is the OUTPUT_DIR of a training, or of an
evaluation, with TEST.ORDERS. Pictures of street_fashion are left out. tools/train_results.sh trains all
runs of the page and calls this.

    python tools/results.py output/seed_1 output/seed_2 output/seed_3
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import yaml
from PIL import Image
from tabulate import tabulate

from oanet_d2.painting.metrics import closure

# Of orderings.json, and how a page calls them. "pairs" are pairs in the right order, in percent.
COLUMNS = {
    **{metric: metric for metric in ("PQ", "PQ_th", "PQ_st", "pairs")},
    "pairs, different class": "different class",
    "pairs, same class": "same class",
    "pairs, one matches nothing": "one false",
    "order F1": "order F1",
}
IN_README = ("score", "smaller_first", "class_order", "srm_pairs, annotations", "srm_pairs", "oracle")
# What their names begin with. (The photographs of street_fashion show persons.)
PICTURES = {"occlusion_scenes": "", "facades": "facades_"}
# What a dataset's trainings may differ in beside their seed.
SETTINGS = {
    "iterations": ("SOLVER", "MAX_ITER"),
    "shorter side": ("INPUT", "MIN_SIZE_TEST"),
    "network": ("MODEL", "TIMM", "NAME"),
}
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
    alone = folder / "from_annotations" / "orderings.json"  # see train_results.sh
    if alone.exists():
        orders = run["orderings"]
        oracle = orders.pop("oracle")
        orders["srm_pairs, annotations"] = json.loads(alone.read_text())["orderings"]["srm_pairs"]
        orders["oracle"] = oracle
    run["seconds"] = run["seconds"]["eval"] / run["images"]
    model = folder / "model_final.pth"  # which an evaluation does not have
    state = torch.load(model, map_location="cpu", weights_only=True)["model"] if model.exists() else {}
    run["mebibytes"] = sum(x.nbytes for x in state.values()) / 2**20 or None
    return {**run, "config": yaml.safe_load((folder / "config.yaml").read_text())}


def spread(values: Sequence[Optional[float]], digits: int = 1) -> str:
    """ "mean ± standard deviation", or the one value. None becomes NaN."""
    numbers = np.array(values, float)
    mean = f"{numbers.mean():.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {numbers.std(ddof=1):.{digits}f}"


def orders_rows(runs: List[Dict], metrics: Iterable[str], orders: Iterable[str]) -> List[List[str]]:
    rows = []
    for order in orders:
        cells = [spread([run["orderings"][order][m] for run in runs]) for m in metrics]
        closures = [closure(run["orderings"], order) for run in runs]
        rows.append([order, *cells, spread(closures, 3)])
    return rows


def runs_table(runs: List[Dict], best: str) -> str:
    rows = []
    for run in runs:
        orderings = run["orderings"]
        score, this, oracle = (orderings[x]["PQ_th"] for x in ("score", best, "oracle"))
        numbers = [orderings[best]["PQ"], this - score, oracle - this]
        rows.append([str(run["config"]["SEED"]), *(f"{x:.1f}" for x in numbers)])
    return markdown_table(["seed", f"PQ ({best})", "PQ_th over score", "PQ_th under oracle"], rows)


def name_of(run: Dict) -> str:
    name = run["config"]["DATASETS"]["TEST"][0].removesuffix("_val")
    return f"{name}, copy-paste" if run["config"]["INPUT"]["COPY_PASTE"] > 0 else name


def settings_of(run: Dict) -> Tuple[str, ...]:
    return tuple(str(reduce(getitem, keys, run["config"])) for keys in SETTINGS.values())


def settings_table(all_runs: List[Dict]) -> str:
    """A row for all trainings on one dataset with the same settings, where a dataset has several."""
    rows: Dict[str, Dict[Tuple[str, ...], List[Dict]]] = {}
    for run in all_runs:
        rows.setdefault(name_of(run), {}).setdefault(settings_of(run), []).append(run)
    orders = "score", "smaller_first", "class_order", "srm_pairs", "oracle"
    cells = [
        [name, *settings, str(len(runs)), *(row[1] for row in found), found[-2][2]]
        for name, by_settings in rows.items()
        if len(by_settings) > 1
        for settings, runs in by_settings.items()
        for found in [orders_rows(runs, ("PQ_th",), orders)]
    ]
    return markdown_table(["PQ of things", *SETTINGS, "trainings", *orders, "closure"], cells)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with orderings.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    args = parser.parse_args()
    all_runs, rows, notes = [read_run(folder) for folder in args.runs], [], []
    for name in dict.fromkeys(map(name_of, all_runs)):
        runs = [run for run in all_runs if name_of(run) == name]
        runs = [run for run in runs if settings_of(run) == settings_of(runs[0])]
        solver, best = runs[0]["config"]["SOLVER"], runs[0]["config"]["MODEL"]["OANET"]["ORDER"]
        about = (
            f"{name}: {solver['MAX_ITER']} iterations, {len(runs)} training"
            f"{'s that differ in their seed' * (len(runs) > 1)}, {runs[0]['images']} images."
        )
        seconds = spread([run["seconds"] for run in runs], 2)
        cost = f"{seconds} seconds an image, including every order and the report."
        if all(run["mebibytes"] for run in runs):
            cost = f"{spread([run['mebibytes'] for run in runs])} MiB of weights; {cost}"
        orders = [x for x in runs[0]["orderings"] if all(x in run["orderings"] for run in runs)]
        table = markdown_table(["order", *COLUMNS.values(), "closure"], orders_rows(runs, COLUMNS, orders))
        text = f"{table}\n\n{about} {cost}\n\n{runs_table(runs, best)}"
        fill_region(args.root / "docs" / "RESULTS.md", f"tools/results.py ({name})", text)
        if "copy-paste" in name:
            continue
        of_orders = {row[0]: row for row in orders_rows(runs, ("PQ_th",), orders)}
        rows.append([name, *(of_orders.get(x, (x, "-"))[1] for x in IN_README), of_orders[best][2]])
        notes.append(about)
        if name in PICTURES:
            run = args.runs[all_runs.index(runs[0])]
            copy_pictures(run, args.root / "docs" / "pictures", PICTURES[name])
    fill_region(args.root / "docs" / "RESULTS.md", "tools/results.py (settings)", settings_table(all_runs))
    table = markdown_table(["PQ of things", *IN_README, "closure"], rows)
    fill_region(args.root / "README.md", "tools/results.py", "\n\n".join([table, " ".join(notes)]))


def copy_pictures(run: Path, target: Path, beginning: str) -> None:
    for folder, prefix in (("pictures", "right"), ("pictures_still_wrong", "wrong")):
        for i, path in enumerate(sorted((run / folder).glob("*.png"))[:2], start=1):
            Image.open(path).convert("RGB").save(target / f"{beginning}{prefix}_{i}.jpg", quality=90)


if __name__ == "__main__":
    main()
