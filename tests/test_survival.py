"""
Trainings that are killed, and go on.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from detectron2.utils.env import seed_all_rng

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from tests.conftest import CONFIGS, REPOSITORY, load_config, scenes_paths

SMALL_NETWORK = {
    "FPN": {"OUT_CHANNELS": 16},
    "SEM_SEG_HEAD": {"CONVS_DIM": 16, "NORM": ""},
    "ROI_BOX_HEAD": {"FC_DIM": 32},
    "ROI_MASK_HEAD": {"CONV_DIM": 16},
    "SRM_HEAD": {"CONV_DIM": 8, "KERNEL_SIZE": 3},
}


@pytest.fixture
def config(tmp_path):
    """Writes a config with a dataset of its own, for a small training without evaluation."""
    write_split(tmp_path, "train", 9, image_size=64, seed=0, num_workers=0)
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    dataset = dict(zip(keys, map(str, scenes_paths(tmp_path, "train"))))

    def write(base, name, steps, period, workers, model):
        content = {
            "_BASE_": str(CONFIGS / "OcclusionScenes" / base),
            "DATASETS": {"PANOPTIC": {name: dataset}, "TRAIN": [name], "TEST": []},
            "INPUT": {"MIN_SIZE_TRAIN": [64]},
            "MODEL": model,
            "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": steps, "CHECKPOINT_PERIOD": period},
            "DATALOADER": {"NUM_WORKERS": workers},
            "TEST": {"ORDERS": []},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def start(env, config: Path, folder: Path, *args):
    command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", str(config)]
    with open(f"{folder}.txt", "a") as log:
        return subprocess.Popen(
            [*command, *args, "OUTPUT_DIR", str(folder)],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process, folder: Path):
    assert process.wait() == 0, Path(f"{folder}.txt").read_text()[-3000:]


def load(folder: Path, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def check_same(found, expected):
    """Weights, the optimizer's state, and where the data order is, to the bit."""
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


def test_killed_once_it_goes_on(config, subprocess_env, tmp_path):
    """The ranking alone: killed between two checkpoints, it ends as if it had not been."""
    model = {"SRM_HEAD": {"CONV_DIM": 8, "KERNEL_SIZE": 3}}
    path = config("srm_from_annotations.yaml", "killed_once", 40, 3, 1, model)
    folder = tmp_path / "killed"
    process = start(subprocess_env, path, folder)
    while not (folder / "model_0000008.pth").exists():
        assert process.poll() is None, Path(f"{folder}.txt").read_text()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    last = (folder / "last_checkpoint").read_text()
    reached = load(folder, last)["iteration"]
    assert 5 <= reached < 39

    finish(start(subprocess_env, path, folder, "--resume"), folder)
    text = Path(f"{folder}.txt").read_text()
    assert f"Starting training from iteration {reached + 1}" in text
    seed_all_rng(1)
    (tmp_path / "whole").mkdir()
    cfg = load_config(path, "OUTPUT_DIR", str(tmp_path / "whole"))
    OANetTrainer(cfg).train()
    check_same(load(folder), load(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_many_times_at_random(config, subprocess_env, tmp_path):
    """The demo's network with two loading processes, killed ten times, whatever it does then."""
    path = config("oanet_R_18.yaml", "killed_often", 100, 2, 2, SMALL_NETWORK)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    finish(start(subprocess_env, path, whole), whole)

    def reached():
        tag = folder / "last_checkpoint"
        return load(folder, tag.read_text())["iteration"] if tag.exists() else -1

    seed = random.SystemRandom().randrange(1000)
    moments, kills = random.Random(seed), []
    print(f"Moments are those of the seed {seed}.")
    for _ in range(10):
        before = reached()
        goal = before + 2 * moments.randrange(4)  # some checkpoints later, and then any time
        process = start(subprocess_env, path, folder, "--resume")
        while reached() < goal and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.4 if goal > before else 6))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break  # it has come to the end
        kills.append(reached())
        assert kills[-1] >= goal
    print(f"Killed with the last whole checkpoint of the iterations {kills}.")
    assert len(kills) >= 5
    finish(start(subprocess_env, path, folder, "--resume"), folder)
    check_same(load(folder), load(whole))
    curves = []
    for output in (whole, folder):
        lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
        curves.append({x["iteration"]: x for x in lines if "total_loss" in x})
    # Those of the writer are medians over 20 iterations, or as many as there were since it started.
    for iteration, expected in curves[0].items():
        if iteration in curves[1]:
            found = curves[1][iteration]
            assert found["lr"] == expected["lr"]
            assert found["total_loss"] == pytest.approx(expected["total_loss"], rel=0.3)
    assert 99 in curves[1]


@pytest.mark.slow
def test_killed_training_of_two_processes(config, subprocess_env, tmp_path):
    """Rank 1 is killed: the command ends and names it; resumed, it ends as if nothing had been."""
    path = config("oanet_R_18.yaml", "killed_rank", 30, 2, 1, SMALL_NETWORK)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    args = ["--num-gpus", "2", "--dist-url", "auto"]
    finish(start(subprocess_env, path, whole, *args), whole)

    process = start(subprocess_env, path, folder, *args)
    while not (folder / "model_0000003.pth").exists():
        assert process.poll() is None, Path(f"{folder}.txt").read_text()[-3000:]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [x for x in children if b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert process.wait(timeout=120) not in (0, None)
    text = Path(f"{folder}.txt").read_text()
    assert f"The process of rank 1 (pid {ranks[1]}) was killed by SIGKILL" in text
    assert not Path(f"/proc/{ranks[0]}").exists()

    finish(start(subprocess_env, path, folder, "--resume", *args), folder)
    check_same(load(folder), load(whole))
