import benchmark_table
import pytest
from benchmark_rows import BOX_AREA, COMPARED, GROWING, NUMBERS, OPTIONS, ROWS, SIZES, TRIED

MEASURED = {"bytes_moved": 4e6, "bytes_per_second": 1e9, "flops": 0, "flops_per_second": 1e9}


def compared(ours, theirs, **extra):
    memory = {"ours": 30 * 2**20, "theirs": 2**30}
    row = {"seconds": {"ours": ours, "theirs": theirs}, "peak_memory": memory, "agreement": None}
    return {**MEASURED, **row, **extra}


def test_ratios_goals_and_lower_bound():
    row = benchmark_table.summarise("paste_combine_2160x3840", compared(0.02, 3.0))
    assert row["time_ratio"] == pytest.approx(1 / 150)
    assert row["memory_ratio"] == pytest.approx(30 / 1024)
    assert row["goals"] == {"time_ratio": 1 / 100, "memory_ratio": 1 / 10}
    assert row["met"] == {"time_ratio": True, "memory_ratio": True}
    assert row["lower_bound"] == pytest.approx(0.004)  # 4 MB at 1 GB/s
    assert row["to_lower_bound"] == pytest.approx(5)
    slower = benchmark_table.summarise("paste_combine_2160x3840", compared(0.04, 3.0))
    assert slower["met"] == {"time_ratio": False, "memory_ratio": True}


def test_lower_bound_of_what_computes_more_than_it_moves():
    row = benchmark_table.summarise("inference", compared(1.0, 2.0, flops=5e8))
    assert row["lower_bound"] == pytest.approx(0.5)


def test_memory_that_was_not_measured_is_not_a_goal_that_was_met():
    row = compared(1.0, 10.0, peak_memory={"ours": None, "theirs": None})
    row = benchmark_table.summarise("semantic_labels", row)
    assert "memory_ratio" not in row
    assert row["met"] == {"time_ratio": True, "memory_ratio": False}


def test_cost_per_instance_is_beyond_that_of_the_image():
    # 2 ms for the image, 1 ms for each of ten instances, 1.5 ms for each of a hundred; in the
    # second of three turns everything takes 1 s more, in the third only what has no instances
    turns = {
        "0 8x8": [0.002, 1.002, 1.002],
        "10 8x8": [0.012, 1.012, 0.012],
        "100 8x8": [0.152, 1.152, 0.152],
    }
    assert benchmark_table.cost_per_instance(turns) == pytest.approx(
        {"10 8x8": 0.001, "100 8x8": 0.0015}
    )
    seconds = {k: v[0] for k, v in turns.items()}
    row = {**MEASURED, "seconds": seconds, "all_seconds": turns, "peak_memory": {}}
    row["agreement"] = None
    row = benchmark_table.summarise("instances", row)
    assert row["growth"] == pytest.approx(1.5)
    assert row["met"] == {"growth": False}
    text = benchmark_table.growing_table({"instances": row})
    assert "| 100" in text and "1.50" in text and "**missed**" in text


def test_every_growing_row_has_its_image_without_instances():
    for steps in (NUMBERS, SIZES):
        empty = {size for num, size in steps if num == 0}
        assert {size for _, size in steps} == empty
        assert all(size >= BOX_AREA for size in empty)


def test_table_shows_all_rows_and_what_failed():
    done = benchmark_table.summarise("semantic_labels", compared(0.1, 1.0, agreement=0.99999))
    rows = {"semantic_labels": done, "inference": {"error": "out of memory"}}
    lines = benchmark_table.compared_table(rows).splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    assert len(lines) == 4 and len({len(x) for x in cells}) == 1
    assert cells[2][0] == ROWS["semantic_labels"].title
    assert cells[2][1:5] == ["100.0 ms", "1.00 s", "1/10", "1/5, met"]
    assert cells[2][5:9] == ["30.0", "1024.0", "1/34.1", "1/8, met"]
    assert cells[2][9:] == ["99.9990 % equal", "4.0 ms", "25.0 x"]
    assert cells[3][:2] == [ROWS["inference"].title, "failed: out of memory"]


def test_goals_of_the_issue_are_all_there():
    goals = {k: (row.time_goal, row.memory_goal) for k, row in COMPARED.items()}
    assert goals["paste_combine_800x1333"][0] == 1 / 10
    assert goals["paste_combine_2160x3840"] == (1 / 100, 1 / 10)
    assert goals["semantic_labels"] == (1 / 5, 1 / 8)
    assert goals["inference"] == (0.8, 0.5)
    assert goals["training_step"][0] == goals["training_step_ranking"][0] == 1.1
    assert {*COMPARED, *GROWING, *OPTIONS, *TRIED} == set(ROWS)


@pytest.mark.parametrize(
    "number, text",
    [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4e-6, "4.0 µs"), (-2e-7, "-0.2 µs")],
)
def test_time_text(number, text):
    assert benchmark_table.time_text(number) == text


@pytest.mark.parametrize("number, text", [(1 / 124, "1/124"), (0.78, "0.78"), (2, "2.00")])
def test_ratio_text(number, text):
    assert benchmark_table.ratio_text(number) == text
