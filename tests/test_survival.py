"""A training that is killed, and goes on."""

import os
import random
import signal
import subprocess
import sys
import time

import torch
import yaml

import oanet_d2
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.data.register import KEYS
from tests.conftest import CONFIGS, REPOSITORY, scenes_paths, trainer_of


def reached(folder):
    tag = folder / "last_checkpoint"
    return torch.load(folder / tag.read_text())["iteration"] if tag.exists() else -1


def test_killed_at_any_moment(tmp_path, subprocess_env):
    """It ends with an uninterrupted one's weights, optimizer state, and place in the order of the data."""
    write_split(tmp_path, "train", 9, image_size=64, seed=0, num_workers=0)
    content = {
        "_BASE_": str(CONFIGS / "OcclusionScenes/srm_from_annotations.yaml"),
        "DATASETS": {
            "PANOPTIC": {"killed": dict(zip(KEYS, map(str, scenes_paths(tmp_path, "train"))))},
            "TRAIN": ["killed"],
        },
        "DATALOADER": {"NUM_WORKERS": 1},
        "INPUT": {"MIN_SIZE_TRAIN": [64]},
        "MODEL": {"SRM_HEAD": {"CONV_DIM": 8}},
        "SOLVER": {"IMS_PER_BATCH": 2, "CHECKPOINT_PERIOD": 2, "MAX_ITER": 40},
    }
    config, folder, log = (tmp_path / x for x in ("killed.yaml", "killed", "log.txt"))
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, REPOSITORY / "train_net.py", "--config-file", config, "--resume"]
    options = {"env": subprocess_env, "stderr": subprocess.STDOUT, "start_new_session": True}
    with open(log, "w") as f:
        process = subprocess.Popen([*command, "OUTPUT_DIR", folder], stdout=f, **options)
    while reached(folder) < 5:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)  # with the process that loads
    assert process.wait() == -signal.SIGKILL
    last, ends = reached(folder), []
    assert last < 39
    for output in (folder, tmp_path / "whole"):
        trainer = trainer_of(oanet_d2.load_config(config, ["OUTPUT_DIR", str(output)]))
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == (last + 1 if output == folder else 0)
        trainer.train()
        ends.append(torch.load(output / "model_final.pth"))
    found, expected = ends
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (found, expected)]
    for i, state in states[1].items():
        for name, tensor in state.items():
            assert torch.equal(states[0][i][name], tensor), (i, name)
    for name in ("DataOrder", "LRScheduler"):
        assert found["trainer"]["hooks"][name] == expected["trainer"]["hooks"][name]
