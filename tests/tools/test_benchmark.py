import json
import subprocess
from functools import partial

import benchmark
import benchmark_cases
import pytest
import torch
from benchmark_models import PANOPTIC_FPN
from benchmark_rows import ROWS, TRIED, Row
from marked_region import END

from oanet_d2.modeling.onednn_layout import dense
from tests.conftest import REPOSITORY

SIZE = (160, 240)
MEASURED = {"bytes_moved": 1, "bytes_per_second": 1e9, "flops": 0, "flops_per_second": 1e9}


@pytest.fixture
def measured(monkeypatch):
    """Rows that take no time; "inference" fails."""
    names = []

    def measure_row(name):
        names.append(name)
        if name == "inference":
            return {"error": "it broke"}
        memory = {"ours": 1, "theirs": 10}
        row = {"seconds": {"ours": 1.0, "theirs": 2.0}, "peak_memory": memory, "agreement": 1.0}
        return benchmark.summarise(name, {**MEASURED, **row})

    monkeypatch.setattr(benchmark, "measure_row", measure_row)
    return names


def test_a_row_that_fails_loses_no_other(measured, tmp_path, capsys):
    file, page = tmp_path / "b.json", tmp_path / "page.md"
    page.write_text(f"before\n{benchmark.BEGIN}\n{END}\nafter\n")
    rows = ["semantic_labels", "inference", "paste_combine_800x1333"]
    status = benchmark.main(["--rows", *rows, "--json", str(file), "--update", str(page)])
    assert status == 1 and measured == rows
    results = json.loads(file.read_text())
    assert list(results["rows"]) == rows
    assert results["rows"]["inference"] == {"error": "it broke"}
    assert results["environment"]["threads"] == torch.get_num_threads()
    text = capsys.readouterr().out
    assert "failed: it broke" in text and torch.__version__ in text
    assert text.strip() in page.read_text() and page.read_text().startswith("before\n")


def test_single_rows_are_repeated(measured, tmp_path):
    file = tmp_path / "b.json"
    assert benchmark.main(["--rows", "inference", "semantic_labels", "--json", str(file)]) == 1
    results = json.loads(file.read_text())
    results["rows"]["inference"] = {"error": "an old one"}
    file.write_text(json.dumps(results))
    assert benchmark.main(["--rows", "semantic_labels", "--json", str(file)]) == 1
    again = json.loads(file.read_text())["rows"]
    assert again["inference"] == {"error": "an old one"} and len(again) == 2
    # on another machine they do not mix
    results["environment"]["processor"] = "another"
    file.write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        benchmark.main(["--rows", "semantic_labels", "--json", str(file)])
    assert json.loads(file.read_text()) == results


def test_a_page_without_marks_is_refused_before_anything_is_measured(measured, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        benchmark.main(["--rows", "semantic_labels", "--update", str(page)])
    assert measured == [] and "page.md has no lines" in capsys.readouterr().err


def test_what_goes_wrong_in_a_process_is_told(monkeypatch):
    class Result:
        def __init__(self, error):
            self.error = error

        def __call__(self, *args, **kwargs):
            raise self.error

    failed = subprocess.CalledProcessError(-9, "x", stderr="Traceback\nMemoryError: no\n")
    monkeypatch.setattr(benchmark.subprocess, "run", Result(failed))
    error = benchmark.measure_row("semantic_labels")["error"]
    assert error == "MemoryError: no (exit status -9)"
    monkeypatch.setattr(benchmark.subprocess, "run", Result(subprocess.TimeoutExpired("x", 1)))
    assert "took more than" in benchmark.measure_row("semantic_labels")["error"]


def test_page_of_the_repository_has_the_region():
    benchmark.split_page(REPOSITORY / "docs" / "performance.md", benchmark.BEGIN)


@pytest.mark.parametrize(
    "prepare, agreement",
    [
        (partial(benchmark_cases.fusion, 12, SIZE), 1),
        (partial(benchmark_cases.semantic, (48, 64), (190, 250), (120, 150)), 0.999),
    ],
    ids=["fusion", "semantic"],
)
def test_a_row_measures_the_same_work(monkeypatch, prepare, agreement):
    """The whole of a row, in this process: results agree, and every figure is there."""
    monkeypatch.setattr(benchmark_cases, "STUFF_AREA", 64)
    monkeypatch.setitem(ROWS, "tiny", Row("tiny", prepare, time_goal=1.0, repeats=1))
    monkeypatch.setattr(benchmark.measure, "bytes_per_second", lambda: 1e9)
    monkeypatch.setattr(benchmark.measure, "flops_per_second", lambda: 1e9)
    row = benchmark.summarise("tiny", benchmark.measure_here("tiny"))
    assert row["agreement"] >= agreement
    assert set(row["peak_memory"]) == set(row["seconds"]) == {"ours", "theirs"}
    assert row["time_ratio"] > 0 and row["to_lower_bound"] > 0
    json.dumps(row)


@pytest.mark.parametrize("num_painted", [None, 3])
def test_inference_gives_both_the_same_weights_and_detections(num_painted):
    """With the order of PanopticFPN the result is PanopticFPN's."""
    from benchmark_models import DEMO, inference

    small = ["MODEL.OANET.ORDER", "score", "MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff"]
    small += ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry',)", "TEST.DETECTIONS_PER_IMAGE", "5"]
    variants = {"ours": small, "theirs": [*small, *PANOPTIC_FPN]}
    prepared = inference(DEMO, variants, (448, 448), num_painted=num_painted)
    ours, theirs = (run()[0] for run in prepared.variants.values())
    assert (ours["instances"].scores >= 0.5).sum() == (num_painted or 5)
    assert torch.equal(ours["instances"].scores, theirs["instances"].scores)
    assert torch.equal(ours["sem_seg"], theirs["sem_seg"])
    assert torch.equal(ours["instances"].pred_masks, theirs["instances"].pred_masks)
    assert torch.equal(ours["panoptic_seg"][0], theirs["panoptic_seg"][0])
    assert ours["panoptic_seg"][1] == theirs["panoptic_seg"][1]
    assert prepared.bytes_moved > 0 and prepared.flops > 1e9


def test_a_benchmarked_model_makes_the_masks_that_it_would_make():
    """PanopticFPN all of them, OANet those that are painted."""
    from benchmark_models import DEMO, build_detecting, infer

    made = {}
    # the demo's head could not rank the 80 classes of the made-up detections
    ours = ["MODEL.OANET.OUTPUTS", "()", "MODEL.OANET.ORDER", "score"]
    for name, opts in {"ours": ours, "theirs": PANOPTIC_FPN}.items():
        model = build_detecting(DEMO, ["TEST.DETECTIONS_PER_IMAGE", "5", *opts], num_painted=3)
        model.roi_heads.mask_head.deconv.register_forward_hook(
            lambda m, x, y, name=name: made.update({name: len(y)})
        )
        infer(model, (448, 448))()
    assert made == {"ours": 3, "theirs": 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_what_was_tried_is_the_same_work(name):
    prepared = ROWS[name].prepare()
    ours, theirs = [function() for function in prepared.variants.values()]
    if prepared.agreement is None:
        return
    ours, theirs = dense(ours), dense(theirs)
    if ours.is_floating_point():  # sums that may be rounded in another order
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    else:
        assert prepared.agreement(ours, theirs) >= 0.999
