import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from detectron2.data import DatasetMapper

from oanet_d2.data import PanopticDatasetMapper
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def benchmark():
    script = REPOSITORY / "tools" / "benchmark_mapper.py"
    spec = importlib.util.spec_from_file_location("benchmark_mapper", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_formats_hold_the_same(benchmark, tmp_path):
    """Or it would not be the same work that is timed."""
    dicts = benchmark.write_set(tmp_path, 2)
    kwargs = {"augmentations": [], "image_format": "BGR", "use_instance_mask": True}
    ours = PanopticDatasetMapper(True, **kwargs, **{**benchmark.OURS, "stuff_only": True})
    theirs = DatasetMapper(True, **kwargs)
    for separated, with_json in zip(dicts["separated"], dicts["instances JSON"]):
        expected, sample = theirs(separated), ours(with_json)
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["sem_seg"], expected["sem_seg"])
        labels = range(1 + benchmark.NUM_STUFF)
        assert set(sample["sem_seg"].unique().tolist()) == {*labels, 255}
        assert len(sample["instances"]) == benchmark.NUM_THINGS
        for x, y in zip(sample["instances"].gt_masks, expected["instances"].gt_masks):
            assert all(map(np.array_equal, x, y))
        # load_coco_json counts from 0 only for registered datasets
        assert torch.equal(sample["instances"].gt_classes + 1, expected["instances"].gt_classes)


def test_command(benchmark, tmp_path, monkeypatch, capsys):
    file = tmp_path / "times.json"
    command = ["benchmark_mapper.py", "--images", "1", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    seconds = json.loads(file.read_text())
    assert set(seconds) == set(benchmark.VARIANTS)
    stages = set(benchmark.STAGES.values())
    for name, x in seconds.items():
        assert set(x) == ({"all"} if name in benchmark.BASELINES else {"all", *stages})
        assert 0 < sum(s for stage, s in x.items() if stage != "all") <= x["all"] or len(x) == 1
    first, second = capsys.readouterr().out.split("\n\n")
    for name in seconds:
        assert f"| {name} " in first and (f"| {name} " in second) == (len(seconds[name]) > 1)
