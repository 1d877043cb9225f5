#!/usr/bin/env python3
"""
Train the demo over several seeds, evaluate every run, ablate the ranking, train it from annotations
alone, and write docs/RESULTS.md with its pictures from what came out.

    python tools/results.py --seeds 1 2 3
    python tools/results.py --seeds 1 2 3 --jobs 2                   # two trainings at once
    python tools/results.py --seeds 1 2 3 -- SOLVER.MAX_ITER 2000    # any config override

A run whose result is there already is not repeated; remove its folder to repeat it.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib
import ranking_ablation
import torch
from tabulate import tabulate

from oanet_d2 import load_config
from oanet_d2.data.files import read_json
from oanet_d2.engine import training_seconds
from oanet_d2.evaluation.orderings import METRICS, closure
from oanet_d2.srm_last import first_srm_only_iteration

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = "configs/OcclusionScenes/"
END_TO_END = "oanet_R_18_6x.yaml"
BEST = "srm_pairs"
COCO_TRAIN_IMAGES = 118_287
# Rows of which the mean over the seeds matters; the other tables take the first seed alone.
TABLES_OF_ALL_SEEDS = ["rules", "gap", "order"]
# Enough to see whether ranking costs anything where masks do not overlap.
VISIBLE_ITERATIONS = 1300
# The demo evaluates on the first 200 of them, too few to tell small differences from chance, and
# trains on the first 4,000, to which a training as long as these would come back ten times. Of as many
# as it takes it sees each once, so that the ranking learns from scenes that the network has not learned.
VAL_IMAGES, TRAIN_IMAGES = 500, 40000
SCENES = ["DATASETS.OCCLUSION_SCENES.VAL_IMAGES", str(VAL_IMAGES)]
SCENES += ["DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES", str(TRAIN_IMAGES)]


# ------------------------------------------------------------------------------------ the runs

# Runs a command and says last, on stderr, the peak memory of its largest process in bytes.
MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stderr=subprocess.STDOUT).returncode
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit, file=sys.stderr)
sys.exit(status)
"""


def run(*command: str, env=None) -> dict:
    """
    Run a command in the repository.

    Returns:
        its "seconds" and the peak "memory" of its largest process, in bytes.
    """
    command = [sys.executable, *map(str, command)]
    print("+", *command, flush=True)
    start = time.perf_counter()
    # By way of a small process: a child's peak memory counts from the fork, its parent's included.
    measured = [sys.executable, "-c", MEASURE, *command]
    memory = subprocess.run(
        measured, cwd=ROOT, env={**os.environ, **(env or {})}, check=True, stderr=subprocess.PIPE
    )
    return {"seconds": time.perf_counter() - start, "memory": int(memory.stderr.split()[-1])}


def train_net(output_dir: Path, config: str, *args: str, env=None) -> dict:
    """
    Run train_net.py unless `output_dir` holds its result; return orderings.json.
    """
    result = output_dir / "orderings.json"
    if not result.exists():
        args = ("--config-file", CONFIGS + config, *args, "OUTPUT_DIR", str(output_dir))
        run("train_net.py", *args, env=env)
    return read_json(str(result))


def end_to_end_of_seed(work: Path, opts: list, env: dict, seed: int, tables: list) -> tuple:
    """
    Train a seed end to end, evaluate it, and ablate its ranking.

    Args:
        tables: of tools/ranking_ablation.py; none: all of them.

    Returns:
        the evaluation and the ablation.
    """
    folder = work / f"seed_{seed}"
    checkpoints = ["SOLVER.CHECKPOINT_PERIOD", str(first_srm_only_iteration(config_of(opts)))]
    evaluation = train_net(folder, END_TO_END, "SEED", str(seed), *opts, *checkpoints, env=env)
    only = ["--tables", *tables] if tables else []
    run("tools/ranking_ablation.py", folder, *only, env=env)
    return evaluation, read_json(str(folder / "ablation.json"))


def config_of(opts: list):
    return load_config(ROOT / CONFIGS / END_TO_END, opts)


def evaluate_again(folder: Path, name: str, *args: str, env=None) -> dict:
    """
    Evaluate the result of the run in `folder` with other options, into `folder`_`name`.
    """
    weights = str(folder / "model_final.pth")
    args = ("MODEL.WEIGHTS", weights, "TEST.ORDER_PICTURES", "0", *args)
    output_dir = folder.with_name(f"{folder.name}_{name}")
    return train_net(output_dir, END_TO_END, "--eval-only", *args, env=env)


def train_from_annotations(output_dir: Path, *args: str, env=None) -> dict:
    """
    Train the ranking alone.

    Returns:
        "train": seconds of the training steps, "seconds": of the whole command, "memory": bytes of
        its largest process, "images": training images it took, "dataset": bytes of the annotations
        in memory, for "dataset_images".
    """
    result = output_dir / "annotations.json"
    if not result.exists():
        config = CONFIGS + "srm_from_annotations.yaml"
        usage = run("train_net.py", "--config-file", config, *args, "OUTPUT_DIR", output_dir, env=env)
        checkpoint = torch.load(output_dir / "model_final.pth", weights_only=True)
        log = (output_dir / "log.txt").read_text()
        images = int(re.findall(r"Serializing (\d+) elements", log)[-1])
        dataset = float(re.findall(r"Serialized dataset takes ([\d.]+) MiB", log)[-1])
        batch = int(re.findall(r"IMS_PER_BATCH\D*(\d+)", (output_dir / "config.yaml").read_text())[0])
        usage.update(
            train=training_seconds(checkpoint),
            images=(checkpoint["iteration"] + 1) * batch,
            dataset=dataset * 2**20,
            dataset_images=images,
        )
        result.write_text(json.dumps(usage))
    return read_json(str(result))


def attach(base: Path, srm: Path, output_dir: Path, *args: str, env=None) -> dict:
    """
    Attach a ranking trained from annotations to the network of a run, and evaluate the result.
    """
    if not (output_dir / "orderings.json").exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        config, weights = CONFIGS + "oanet_R_18_masks.yaml", output_dir / "oanet.pth"
        files = ["--base", base / "model_final.pth", "--srm", srm / "model_final.pth"]
        run("tools/attach_srm.py", "--config-file", config, *files, "--output", weights)
        args = ("--eval-only", "MODEL.WEIGHTS", weights, "TEST.ORDER_PICTURES", "0", *args)
    return train_net(output_dir, "oanet_R_18_masks.yaml", *args, env=env)


# ---------------------------------------------------------------------------------- the tables


def spread(values: list, digits: int = 1) -> str:
    """
    "mean ± standard deviation" over the seeds, or the one value.
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(rows: list, *headers: str) -> str:
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def orders_table(runs: list) -> str:
    rows = []
    for order in runs[0]["orderings"]:
        metrics = [spread([r["orderings"][order][m] for r in runs]) for m in METRICS]
        rows.append([order, *metrics, spread([closure(r["orderings"], order) for r in runs], 3)])
    return table(rows, "order", *METRICS, "closure")


def seeds_table(seeds: list, runs: list) -> str:
    rows = []
    for seed, r in zip(seeds, runs):
        o, s = r["orderings"], r["seconds"]
        gain = o[BEST]["PQ_th"] - o["score"]["PQ_th"]
        missing = o["oracle"]["PQ_th"] - o[BEST]["PQ_th"]
        numbers = [o[BEST]["PQ"], gain, missing, 100 * closure(o, BEST)]
        minutes = [s["train"] / 60, s["eval"] / 60]
        rows.append([seed, *(f"{x:.1f}" for x in (*numbers, *minutes))])
    headers = ["seed", f"PQ ({BEST})", "PQ_th over score", "PQ_th under oracle", "closure, %"]
    return table(rows, *headers, "training, min", "evaluation, min")


def free_pixels_table(free: dict, stuff_only: dict) -> str:
    rows = [
        [name, *(f"{r['orderings'][BEST][m]:.1f}" for m in METRICS)]
        for name, r in (("True", free), ("False", stuff_only))
    ]
    return table(rows, "KEEP_THINGS_FREE", *METRICS)


def ablation_table(ablations: list, name: str, header: str) -> str:
    """
    One table of tools/ranking_ablation.py, over the seeds that have it.
    """
    having = [a for a in ablations if name in a]
    rows = []
    for row in having[0][name]:
        of_seeds = [a for a in having if row in a[name]]
        metrics = [spread([a[name][row][m] for a in of_seeds]) for m in ("PQ", "PQ_th", "PQ_st")]
        closures = [closure(a[name], row, a["rules"]) for a in of_seeds]
        seconds = statistics.mean(a[name][row]["seconds"] for a in of_seeds)
        rows.append([row, *metrics, spread(closures, 3), len(of_seeds), f"{seconds:.0f}"])
    return table(rows, header, "PQ", "PQ_th", "PQ_st", "closure", "seeds", "seconds a row")


def pair_table(ablations: list) -> str:
    rows = []
    for kind in ablations[0]["pairs"]["counts"]:
        accuracy = [
            spread([a["pairs"]["accuracy"][order][kind] for a in ablations])
            for order in ("score", BEST)
        ]
        rows.append([kind, spread([a["pairs"]["counts"][kind] for a in ablations], 0), *accuracy])
    return table(rows, "pair", "pairs", "right by score, %", f"right by {BEST}, %")


def annotations_table(ablation: dict, attached: dict) -> str:
    end_to_end = {
        "srm_mean": closure(ablation["rules"], "srm_mean"),
        "srm_overlap": closure(ablation["rules"], "srm_overlap"),
        BEST: closure(ablation["geometry"], "geometry", ablation["rules"]),
    }
    rows = []
    for order, together in end_to_end.items():
        alone = closure(attached["orderings"], order)
        rows.append([order, f"{alone:.3f}", f"{together:.3f}", f"{alone / together:.2f}"])
    return table(rows, "order", "closure, from annotations", "closure, end to end", "ratio")


# -------------------------------------------------------------------------------- the pictures


def draw_closures(runs: list, path: Path) -> None:
    """
    A bar for every order: how much of the gap it closes, mean and spread over the seeds.
    """
    orders = list(runs[0]["orderings"])
    closures = [[100 * closure(r["orderings"], order) for r in runs] for order in orders]
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    deviations = [statistics.stdev(c) if len(c) > 1 else 0 for c in closures]
    bars = axes.barh(orders, [statistics.mean(c) for c in closures], xerr=deviations, color="#4878a8")
    axes.bar_label(bars, fmt="%.0f %%", padding=6)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="share of the gap between score order and oracle, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def copy_pictures(source: Path, target: Path, prefix: str, count: int) -> list:
    """
    Copy the first pictures of an evaluation.

    Returns:
        (name of the copy, image id) of each.
    """
    copied = []
    for i, picture in enumerate(sorted(source.glob("*.png"))[:count], start=1):
        name = f"{prefix}_{i}.png"
        shutil.copy(picture, target / name)
        copied.append((name, int(picture.stem.split("_")[1])))
    return copied


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="end-to-end trainings at once")
    parser.add_argument("--work", type=Path, default=Path("output/results"), help="runs go here")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "RESULTS.md")
    parser.add_argument("opts", nargs="*", help="config overrides, after --")
    args = parser.parse_args()
    work = args.work.resolve()
    opts = [*SCENES, *args.opts]
    env = {"DETECTRON2_DATASETS": str(work / "datasets")}

    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    at_once = {**env, "OMP_NUM_THREADS": str(threads)}
    first_seed = str(args.seeds[0])
    with ThreadPoolExecutor(args.jobs) as pool:
        of_seed = partial(end_to_end_of_seed, work, opts, at_once)
        tables = [[], *[TABLES_OF_ALL_SEEDS] * (len(args.seeds) - 1)]
        ends = pool.map(of_seed, args.seeds, tables)
        visible = pool.submit(
            train_net,
            work / f"seed_{first_seed}_visible",
            "oanet_R_18.yaml",
            *["DATASETS.TRAIN", "('occlusion_scenes_train_visible',)"],
            *["DATASETS.TEST", "('occlusion_scenes_val_visible',)"],
            *["SEED", first_seed, "SOLVER.MAX_ITER", str(VISIBLE_ITERATIONS), *opts],
            env=at_once,
        ).result()
        ends = list(ends)
    first = work / f"seed_{first_seed}"
    stuff_only = evaluate_again(
        first, "stuff_only", "MODEL.OANET.KEEP_THINGS_FREE", "False", *opts, env=at_once
    )
    runs, ablations = zip(*ends)

    # One after the other, on all CPUs: their times are results.
    srm = work / f"seed_{first_seed}_annotations"
    alone = train_from_annotations(srm, "SEED", first_seed, *opts, env=env)
    attached = attach(first, srm, work / f"seed_{first_seed}_attached", *opts, env=env)
    # As large as a COCO image, to see how fast annotations are read and learned from there.
    large = train_from_annotations(
        work / "annotations_640",
        *["DATASETS.OCCLUSION_SCENES.IMAGE_SIZE", "640"],
        *[*opts, "DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES", "200", "INPUT.MIN_SIZE_TRAIN", "(640,)"],
        *["INPUT.MAX_SIZE_TRAIN", "1333", "SOLVER.MAX_ITER", "40"],
        env={"DETECTRON2_DATASETS": str(work / "datasets_640")},
    )
    benchmark = work / "benchmark_ranking.json"
    if not benchmark.exists():
        run("tools/benchmark_ranking.py", "--json", benchmark)

    pictures = args.out.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    draw_closures(runs, pictures / "closure.png")
    right = copy_pictures(first / "pictures", pictures, "right", 4)
    wrong = copy_pictures(first / "pictures_still_wrong", pictures, "wrong", 4)
    mistakes = ablations[0]["pairs"]["mistakes"]
    right_pictures = "\n\n".join(f"![](pictures/{name})" for name, _ in right)
    wrong_pictures = "\n\n".join(
        f"![](pictures/{name})\n\nWrong: {'; '.join(mistakes[str(image)]) or 'only pairs of which the ground truth shows next to nothing'}."
        for name, image in wrong
    )
    costs = read_json(str(benchmark))
    cost_rows = [
        [name, f"{1000 * c['order']:.1f}", f"{1000 * c['ranking']:.0f}"]
        + [f"{c['inference']:.2f}", f"{100 * c['ratio']:.1f}"]
        for name, c in costs.items()
    ]
    o = visible["orderings"]
    visible_rows = [[k, *(f"{o[k][m]:.2f}" for m in ("PQ", "PQ_th", "PQ_st"))] for k in o]
    coco_hours = COCO_TRAIN_IMAGES / (large["images"] / large["train"]) / 3600
    coco_memory = large["dataset"] / large["dataset_images"] * COCO_TRAIN_IMAGES / 2**20

    command = "python tools/results.py --seeds " + " ".join(map(str, args.seeds))
    command += f" --jobs {args.jobs}" if args.jobs > 1 else ""
    command += " -- " + " ".join(args.opts) if args.opts else ""
    config = CONFIGS + END_TO_END
    share = config_of(opts).SOLVER.SRM_ONLY_SHARE
    of_demo = load_config(ROOT / CONFIGS / "oanet_R_18.yaml").DATASETS.OCCLUSION_SCENES
    args.out.write_text(
        f"""# Results on OcclusionScenes

Everything on this page was written by

    {command}

on {torch.get_num_threads()} CPU threads with PyTorch {torch.__version__}: {len(args.seeds)} trainings
of `{config}` that differ in their seed (initial weights and the order of the
{TRAIN_IMAGES} training images), {args.jobs} at once, each evaluated on the same {runs[0]["images"]} scenes, none of
which is trained on (`make demo` trains on the first {of_demo.TRAIN_IMAGES} of the former and evaluates on the first {of_demo.VAL_IMAGES}
of the latter). Trainings and ablations shared the CPUs, so
their times are upper bounds. Numbers are mean
± standard deviation over the seeds, in percent, by the official `panopticapi`; *closure* is a share.

## Painting orders

One model, one set of predictions; only the order of painting changes.

    closure = (PQ_th(order) - PQ_th(score)) / (PQ_th(oracle) - PQ_th(score))

*score*: detection score, Panoptic FPN's order. *srm_mean*: the paper's Eq. 3. *srm_overlap*: the
paper's score map, asked who wins inside each overlap. *srm_pairs*: the comparison of pairs, the
default. *oracle*: the order that the ground truth gives; it also puts a detection that matches
nothing behind one that matches something, which no depth order could (one that leaves those to the
detection score has its row under "What the ranking rests on").

{orders_table(runs)}

![closure by order](pictures/closure.png)

{seeds_table(args.seeds, runs)}

The detection scores of what is painted are next to 1 for carrier and carried alike, so what their order
comes to is half chance and differs by seed; the other orders hardly do.

In the last {100 * share:.0f} % of its iterations (`SOLVER.SRM_ONLY_SHARE`) the ranking head learns alone, from a
network that stands still; before, the network learns without it.

## Where the rest of the gap is

Pairs of overlapping instances that an order puts the right way round, by the ground truth:

{pair_table(ablations)}

And what the oracle's answer for one kind of pair alone would add to *srm_pairs*:

{ablation_table(ablations, "gap", "the oracle for")}

## Scenes

The learned order is right where the detection score is wrong. Image, ground truth, by detection
score, ranked; pixels that the order changes are outlined:

{right_pictures}

Still wrong. Image, ground truth, ranked, by the oracle:

{wrong_pictures}

## What the ranking rests on

From here on the network's predictions are fixed and cached (`tools/ranking_ablation.py`): every row
trains a ranking head anew, {ranking_ablation.ITERATIONS} steps on the predictions for {ranking_ablation.TRAIN_IMAGES} training images, or none,
and paints the same instances. The time is that of training the head, painting and scoring.

Rules, on the network's own ranking head:

{ablation_table(ablations, "rules", "order")}

The evidence that the comparison of pairs is given (`MODEL.SRM_HEAD.PAIRS.EVIDENCE`; S is the score
map, trained along with it):

{ablation_table(ablations, "evidence", "evidence")}

The masks that it learns from (`MODEL.SRM_HEAD.TRAIN_MASKS`); rows "S" are the score map with
*srm_overlap*:

{ablation_table(ablations, "masks", "masks")}

The networks that compare (`MODEL.SRM_HEAD.PAIRS.NUM_NETWORKS`), and whether they learn from the pairs of
earlier steps again (`MODEL.SRM_HEAD.PAIRS.MEMORY`); the rows above are one network that does not:

{ablation_table(ablations, "networks", "networks")}

The paper's large kernels: score maps of different k and depth, trained on ground-truth masks,
*srm_overlap*:

{ablation_table(ablations, "kernel", "convolutions")}

The loss of the score map: cells in which only one class has an instance, weighted down:

{ablation_table(ablations, "loss", "weight")}

More input for the score map than masks, trained on detections, *srm_overlap*:

{ablation_table(ablations, "input", "input")}

From comparisons to an order. The comparisons contradict each other (a over b over c over a) in
{", ".join(str(a["pairs"]["cycles"]) for a in ablations)} of {ablations[0]["pairs"]["images"]} images, by seed; what the order costs is at the end of this page:

{ablation_table(ablations, "order", "order")}

## Masks that are cut to what is visible

`occlusion_scenes_{{train,val}}_visible`: the same scenes, but the instance masks do not overlap, as
in many real datasets. Ranking must not cost anything there. One training of {VISIBLE_ITERATIONS} iterations, seed {first_seed}:

{table(visible_rows, "order", "PQ", "PQ_th", "PQ_st")}

## The ranking from annotations alone

`{CONFIGS}srm_from_annotations.yaml` trains the ranking without an image or a
backbone, on ground-truth masks and made-up false positives; `tools/attach_srm.py` puts it into the network of the run of
seed {first_seed}. End to end: the score map of that run, and a comparison of pairs that is given the same
evidence, geometry, but learns from predictions.

{annotations_table(ablations[0], attached)}

The training took {alone["train"]:.0f} s ({alone["seconds"]:.0f} s with start and data)
for {alone["images"]} images, {alone["images"] / alone["train"]:.0f} images a second.
On images of 640 x 640, about COCO's size, it takes {large["images"] / large["train"]:.0f} images a second, with {large["memory"] / 2**20:.0f} MiB in its largest
process: {coco_hours:.1f} hours for one pass over COCO's {COCO_TRAIN_IMAGES} training images, whose
annotations would take about {coco_memory:.0f} MiB in memory, shared by the workers, if they were like
these (they are kept serialized, by Detectron2's loader; PNGs are read as they are needed).

## Pixels that no instance claims

With the order *{BEST}*: `MODEL.OANET.KEEP_THINGS_FREE True` (default) leaves a pixel whose best
semantic class is a thing void; `False` gives it its best stuff class (the paper: only the stuff
scores are used at inference). Seed {first_seed}:

{free_pixels_table(runs[0], stuff_only)}

## What the ranking costs

`python tools/benchmark_ranking.py`: 100 instances in an image of 800 x 1333 pixels, R-50 FPN, CPU.

{table(cost_rows, "ranking", "order, ms", "ranking, ms", "whole inference, s", "share, %")}
"""
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
