"""
From the results of tools/benchmark.py to its tables.
"""

import statistics
from typing import Dict, List, Optional

from benchmark_rows import COMPARED, GROWING, MOST_GROWTH, OPTIONS, ROWS, TRIED
from tabulate import tabulate

MISSING = ""


def summarise(name: str, row: Dict) -> Dict:
    """
    Add to what was measured of a row what follows from it.

    Args:
        name: of the row in ROWS.
        row: "seconds", "all_seconds" and "peak_memory" by variant, "bytes_moved", "flops",
            "bytes_per_second", "flops_per_second", and "agreement".

    Returns:
        all of that, and "time_ratio" and "memory_ratio" (ours / theirs), "per_instance" (seconds,
        by number and size of the image) with "growth" (last / first), "lower_bound" (seconds: what
        has to be moved or computed, at the speed of this machine), "to_lower_bound" (ours, or the
        last variant, / that), "goals" and "met".
    """
    seconds, memory = row["seconds"], row["peak_memory"]
    result = dict(row)
    bound = max(
        row["bytes_moved"] / row["bytes_per_second"], row["flops"] / row["flops_per_second"]
    )
    if bound > 0:
        last = seconds.get("ours", list(seconds.values())[-1])
        result.update(lower_bound=bound, to_lower_bound=last / bound)
    goals, found = {}, {}
    if name in GROWING:
        result["per_instance"] = costs = cost_per_instance(row["all_seconds"])
        first, *_, largest = costs.values()
        result["growth"] = found["growth"] = largest / first
        goals["growth"] = MOST_GROWTH
    else:
        result["time_ratio"] = found["time_ratio"] = seconds["ours"] / seconds["theirs"]
        goals["time_ratio"] = ROWS[name].time_goal
        if memory.get("ours") is not None and memory.get("theirs"):
            result["memory_ratio"] = memory["ours"] / memory["theirs"]
        found["memory_ratio"] = result.get("memory_ratio")
        goals["memory_ratio"] = ROWS[name].memory_goal
    goals = {k: v for k, v in goals.items() if v is not None}
    result["goals"] = goals
    result["met"] = {k: found[k] is not None and found[k] <= goals[k] for k in goals}
    return result


def cost_per_instance(all_seconds: Dict[str, List[float]]) -> Dict[str, float]:
    """
    Args:
        all_seconds: of every turn, by "N HxW", with N = 0 for every size.

    Returns:
        median over the turns of (seconds - seconds of the same image without instances) / N, for
        every N > 0.
    """
    costs = {}
    for name, values in all_seconds.items():
        num, size = name.split()
        if int(num) > 0:
            empty = all_seconds[f"0 {size}"]
            costs[name] = statistics.median((x - y) / int(num) for x, y in zip(values, empty))
    return costs


def compared_table(rows: Dict[str, Dict]) -> str:
    """
    Us against others, for the rows that are there. "time" and "memory" are ours / theirs.
    """
    headers = ["", "ours", "theirs", "time", "goal", "peak memory, MiB: ours", "theirs", "memory"]
    headers += ["goal", "same result", "lower bound", "ours to that"]
    return _table(headers, [_compared(name, rows[name]) for name in COMPARED if name in rows])


def options_table(rows: Dict[str, Dict]) -> str:
    headers = ["", "with", "without", "time", "peak memory, MiB: with", "without", "memory"]
    lines = [_compared(name, rows[name]) for name in OPTIONS if name in rows]
    return _table(headers, [[*x[:4], *x[5:8]] for x in lines])


def tried_table(rows: Dict[str, Dict]) -> str:
    headers = ["", "as it is", "tried", "time", "same result"]
    lines = [_compared(name, rows[name]) for name in TRIED if name in rows]
    return _table(headers, [[*x[:4], x[9]] for x in lines])


def growing_table(rows: Dict[str, Dict]) -> str:
    headers = ["instances", "image", "time", "time without them", "per instance", "growth", "goal"]
    lines: List[List[str]] = []
    for name in GROWING:
        if name not in rows:
            continue
        row = rows[name]
        if "error" in row:
            lines.append([ROWS[name].title, "failed: " + row["error"]])
            continue
        for variant, cost in row["per_instance"].items():
            num, size = variant.split()
            empty = row["seconds"][f"0 {size}"]
            line = [num, size.replace("x", " x ")]
            line += [time_text(row["seconds"][variant]), time_text(empty), time_text(cost)]
            lines.append(line)
        lines[-1] += [f"{row['growth']:.2f}", _goal(row, "growth")]
    return _table(headers, lines)


def _compared(name: str, row: Dict) -> List[str]:
    title = ROWS[name].title
    if "error" in row:
        return [title, "failed: " + row["error"], *[MISSING] * 10]
    memory = row["peak_memory"]
    agreement = row["agreement"]
    return [
        title,
        time_text(row["seconds"]["ours"]),
        time_text(row["seconds"]["theirs"]),
        ratio_text(row["time_ratio"]),
        _goal(row, "time_ratio"),
        memory_text(memory.get("ours")),
        memory_text(memory.get("theirs")),
        ratio_text(row.get("memory_ratio")),
        _goal(row, "memory_ratio"),
        MISSING if agreement is None else agreement_text(agreement),
        time_text(row["lower_bound"]) if "lower_bound" in row else MISSING,
        f"{row['to_lower_bound']:.1f} x" if "lower_bound" in row else MISSING,
    ]


def _goal(row: Dict, key: str) -> str:
    if key not in row["goals"]:
        return MISSING
    return ratio_text(row["goals"][key]) + (", met" if row["met"][key] else ", **missed**")


def time_text(seconds: float) -> str:
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{1e3 * seconds:.1f} ms"
    return f"{1e6 * seconds:.1f} µs"


def memory_text(number: Optional[int]) -> str:
    return MISSING if number is None else f"{number / 2**20:.1f}"


def ratio_text(ratio: Optional[float]) -> str:
    """
    Below a half as "1/12.3", else as "0.78".
    """
    if ratio is None:
        return MISSING
    if 0 < ratio < 0.45:
        return f"1/{1 / ratio:.3g}"
    return f"{ratio:.2f}"


def agreement_text(share: float) -> str:
    if share == 1:
        return "to the bit"
    return f"{100 * share:.4f} % equal"


def _table(headers: List[str], lines: List[List[str]]) -> str:
    if not lines:
        return ""
    lines = [[*line, *[MISSING] * (len(headers) - len(line))] for line in lines]
    return tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)
