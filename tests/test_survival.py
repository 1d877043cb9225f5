"""
Trainings that are killed, and go on.
"""

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
    """Starts train_net.py on a small dataset of its own, without an evaluation."""
    write_split(tmp_path, "train", 9, image_size=64, seed=0, num_workers=0)
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    dataset = dict(zip(keys, map(str, scenes_paths(tmp_path, "train"))))

    def start(base, folder, *args):
        content = {
            "_BASE_": str(CONFIGS / "OcclusionScenes" / base),
            "DATASETS": {"PANOPTIC": {"killed": dataset}, "TRAIN": ["killed"], "TEST": []},
            "INPUT": {"MIN_SIZE_TRAIN": [64]},
            "SOLVER": {"IMS_PER_BATCH": 2, "CHECKPOINT_PERIOD": 2},
            "TEST": {"ORDERS": []},
        }
        config = tmp_path / base
        config.write_text(yaml.safe_dump(content))
        command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", str(config)]
        with open(f"{folder}.txt", "a") as log:
            return subprocess.Popen(
                [*command, *args, "OUTPUT_DIR", str(folder)],
                env=subprocess_env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    return start


def log_of(folder):
    return folder.with_suffix(".txt").read_text()


def reached(folder):
    tag = folder / "last_checkpoint"
    if not tag.exists():
        return -1
    return torch.load(folder / tag.read_text(), weights_only=True)["iteration"]


def check_same(folder, expected):
    """Weights, the optimizer's state, and where the data order is."""
    found, expected = (
        torch.load(x / "model_final.pth", weights_only=True) for x in (folder, expected)
    )
    assert found["iteration"] == expected["iteration"]
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (found, expected)]
    for i, state in states[1].items():
        for name, tensor in state.items():
            assert torch.equal(states[0][i][name], tensor), (i, name)
    hooks = [x["trainer"]["hooks"] for x in (found, expected)]
    for name in ("DataOrder", "LRScheduler"):
        assert hooks[0][name] == hooks[1][name]


def test_killed_at_any_moment(start, tmp_path):
    """The ranking alone: it ends as if it had not been."""
    base, folder, whole = "srm_from_annotations.yaml", tmp_path / "killed", tmp_path / "whole"
    small = ["DATALOADER.NUM_WORKERS", "1", "SOLVER.MAX_ITER", "40", "MODEL.SRM_HEAD.CONV_DIM", "8"]
    seed = random.SystemRandom().randrange(1000)
    print(f"Moments are those of the seed {seed}.")
    process = start(base, folder, "--resume", *small)
    while reached(folder) < 5:
        assert process.poll() is None, log_of(folder)[-3000:]
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)  # with the processes that load
    assert process.wait() == -signal.SIGKILL
    last = reached(folder)
    assert last < 39
    assert start(base, folder, "--resume", *small).wait() == 0, log_of(folder)[-3000:]
    assert f"Starting training from iteration {last + 1}" in log_of(folder)
    assert start(base, whole, *small).wait() == 0
    check_same(folder, whole)
