#!/usr/bin/env python3
"""
What OANet costs: pasting, fusion, semantic labels, whole inference and a training step, each beside
Detectron2's own functions on the same inputs; time, peak memory, and the least that the machine
would need.

    python tools/benchmark.py --json benchmark.json --update docs/performance.md
    python tools/benchmark.py --list
    python tools/benchmark.py --rows semantic_labels inference --json benchmark.json

Every row has a process of its own. Times are medians, after a first call, with the sides taking
turns; peak memory is what the kernel saw during three more calls of each, the median, see
benchmark_measure.py.
Threads are PyTorch's default, set OMP_NUM_THREADS for others. With --rows, the other rows of an
existing --json file stay as they are, if they are of the same machine and versions. A row that fails
is reported and leaves the others alone; the exit status is then 1.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Dict, List, Optional

import benchmark_measure as measure
import numpy
import torch
import torchvision
from benchmark_rows import ROWS
from benchmark_table import (
    compared_table,
    growing_table,
    options_table,
    summarise,
    tried_table,
)
from marked_region import begin_mark, split_page, update_page

import detectron2

from oanet_d2.whole_files import whole_file

BEGIN = begin_mark("tools/benchmark.py")
SECONDS_FOR_A_ROW = 300


def environment() -> Dict:
    """
    What the figures hold for.
    """
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "detectron2": detectron2.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


# -------------------------------------------------------------------- in a process for each row


def measure_here(name: str) -> Dict:
    """
    Measure a row in this process.

    Returns:
        what :func:`summarise` takes.
    """
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    row = ROWS[name]
    prepared = row.prepare()
    results = [function() for function in prepared.variants.values()]
    agreement = prepared.agreement and prepared.agreement(*results[:2])
    del results
    seconds = measure.times_in_turns(prepared.variants, row.repeats)
    memory = {k: measure.peak_memory(v) for k, v in prepared.variants.items() if row.memory}
    return {
        "seconds": {k: statistics.median(v) for k, v in seconds.items()},
        "all_seconds": seconds,
        "peak_memory": memory,
        "agreement": agreement,
        "bytes_moved": prepared.bytes_moved,
        "flops": prepared.flops,
        "bytes_per_second": measure.bytes_per_second(),
        "flops_per_second": measure.flops_per_second(),
    }


def measure_row(name: str) -> Dict:
    """
    Measure a row in a fresh process.

    Returns:
        what was found, see :func:`summarise`; or only an "error".
    """
    command = [sys.executable, __file__, "--one", name]
    try:
        result = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=SECONDS_FOR_A_ROW
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {SECONDS_FOR_A_ROW} s"}
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr, flush=True)
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"{last} (exit status {error.returncode})"}
    return summarise(name, json.loads(result.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------ the whole


def header(results: Dict) -> str:
    env, rows = results["environment"], results["rows"].values()
    text = ", ".join(
        [
            env["processor"],
            f"{env['threads']} threads",
            f"Python {env['python']}",
            f"PyTorch {env['torch']}",
            f"torchvision {env['torchvision']}",
            f"NumPy {env['numpy']}",
            f"Detectron2 {env['detectron2']}",
        ]
    )
    speeds = [x for x in rows if "error" not in x]
    if speeds:
        bandwidth = statistics.median(x["bytes_per_second"] for x in speeds)
        flops = statistics.median(x["flops_per_second"] for x in speeds)
        text += f"; memory {bandwidth / 1e9:.1f} GB/s, arithmetic {flops / 1e9:.0f} GFLOP/s"
    return text


def report(results: Dict) -> str:
    """
    The header and the tables, in Markdown.
    """
    rows = results["rows"]
    parts = [header(results) + ".", compared_table(rows)]
    for title, table in (
        ("Ours alone, growing", growing_table(rows)),
        ("Options, with against without", options_table(rows)),
        ("Tried and not kept", tried_table(rows)),
    ):
        if table:
            parts += [f"### {title}", table]
    return "\n\n".join(parts)


def load_results(file: Path, env: Dict) -> Dict:
    """
    The rows that a file holds, to be added to.

    Raises:
        ValueError: they are of another environment.
    """
    results = json.loads(file.read_text())
    differing = {k: v for k, v in env.items() if results["environment"].get(k) != v}
    if differing:
        raise ValueError(
            f"{file} holds results with other {sorted(differing)} than here ({differing}); "
            "one table would mix them. Give another file, or measure all rows."
        )
    return results


def write_json(file: Path, results: Dict) -> None:
    with whole_file(str(file)) as f:
        json.dump(results, f, indent=2)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS, help="only these")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--update", type=Path, metavar="FILE", help="page to put the tables into")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(measure_here(args.one)))
        return 0
    if args.list:
        print(*(f"{name:32}{row.title}" for name, row in ROWS.items()), sep="\n")
        return 0
    results = {"environment": environment(), "rows": {}}
    try:
        if args.update:
            split_page(args.update, BEGIN)
        if args.rows and args.json and args.json.exists():
            results = load_results(args.json, results["environment"])
    except ValueError as error:
        parser.error(str(error))
    for name in args.rows or ROWS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results["rows"][name] = row = measure_row(name)
        if "error" in row:
            print(f"{name} failed: {row['error']}", file=sys.stderr, flush=True)
        if args.json:
            write_json(args.json, results)
    print(report(results))
    if args.update:
        update_page(args.update, BEGIN, report(results))
    return int(any("error" in row for row in results["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
