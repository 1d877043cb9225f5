"""Trainings that are killed, and go on."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import CONFIGS, REPOSITORY, scenes_paths


@pytest.fixture
def start(tmp_path, subprocess_env):
    """Starts train_net.py: the ranking alone, on a small dataset of its own."""
    write_split(tmp_path, "train", 9, image_size=64, seed=0, num_workers=0)
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    dataset = dict(zip(keys, map(str, scenes_paths(tmp_path, "train"))))

    content = {
        "_BASE_": str(CONFIGS / "OcclusionScenes/srm_from_annotations.yaml"),
        "DATASETS": {"PANOPTIC": {"killed": dataset}, "TRAIN": ["killed"]},
        "DATALOADER": {"NUM_WORKERS": 1},
        "INPUT": {"MIN_SIZE_TRAIN": [64]},
        "MODEL": {"SRM_HEAD": {"CONV_DIM": 8}},
        "SOLVER": {"IMS_PER_BATCH": 2, "CHECKPOINT_PERIOD": 2, "MAX_ITER": 40},
    }
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(content))

    command = [sys.executable, REPOSITORY / "train_net.py", "--config-file", config]

    def start(folder, *args):
        with open(f"{folder}.txt", "a") as log:
            options = {"env": subprocess_env, "stdout": log, "start_new_session": True}
            arguments = [*command, *args, "OUTPUT_DIR", folder]
            return subprocess.Popen(arguments, stderr=subprocess.STDOUT, **options)

    return start


def reached(folder):
    tag = folder / "last_checkpoint"
    return torch.load(folder / tag.read_text())["iteration"] if tag.exists() else -1


def check_same(folder, expected):
    """Weights, the optimizer's state, and where the data order is."""
    found, expected = (torch.load(x / "model_final.pth") for x in (folder, expected))
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (found, expected)]
    for i, state in states[1].items():
        for name, tensor in state.items():
            assert torch.equal(states[0][i][name], tensor), (i, name)
    for name in ("DataOrder", "LRScheduler"):
        assert found["trainer"]["hooks"][name] == expected["trainer"]["hooks"][name]


def test_killed_at_any_moment(start, tmp_path):
    """A training ends as an uninterrupted one."""
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(folder, "--resume")
    log = folder.with_suffix(".txt")
    while reached(folder) < 5:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)  # with the processes that load
    assert process.wait() == -signal.SIGKILL
    last = reached(folder)
    assert last < 39 and start(folder, "--resume").wait() == 0, log.read_text()[-3000:]
    assert f"Starting training from iteration {last + 1}" in log.read_text()
    assert start(whole).wait() == 0
    check_same(folder, whole)
