"""`train_net.py` with srm_from_annotations.yaml: the ranking alone, without images."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from detectron2.data import detection_utils as utils
from detectron2.modeling import build_model

from oanet_d2 import OANet
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.modeling import SRMFromAnnotations
from tests.conftest import CONFIGS, REPOSITORY, load_config

CONFIG = str(CONFIGS / "OcclusionScenes" / "srm_from_annotations.yaml")
SMALL = [
    *["DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES", "5", "DATASETS.OCCLUSION_SCENES.IMAGE_SIZE", "64"],
    *["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"],
    *["MODEL.SRM_HEAD.CONV_DIM", "8", "MODEL.SRM_HEAD.KERNEL_SIZE", "3"],
]


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory):
    """Scenes whose pictures are empty files."""
    root = tmp_path_factory.mktemp("datasets")
    scenes = root / "occlusion_scenes"
    write_split(scenes, "train", 5, image_size=64, seed=0, num_workers=0)
    pictures = list((scenes / "train").iterdir())
    assert len(pictures) == 5
    for picture in pictures:
        picture.write_bytes(b"")
    with pytest.raises(OSError):  # whoever opened one would notice
        utils.read_image(str(pictures[0]), "BGR")
    return root


@pytest.fixture(scope="module")
def train_net(subprocess_env, datasets_root):
    def run(output_dir, *args):
        command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", CONFIG, *args]
        result = subprocess.run(
            [*command, *SMALL, "OUTPUT_DIR", str(output_dir)],
            env={**subprocess_env, "DETECTRON2_DATASETS": str(datasets_root)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    return run


@pytest.fixture(scope="module")
def first_part(train_net, tmp_path_factory):
    """The output folder of a training of 3 steps."""
    folder = tmp_path_factory.mktemp("first_part")
    train_net(folder, "SOLVER.MAX_ITER", "3")
    return folder


def small_config(name):
    return load_config(f"OcclusionScenes/{name}", *SMALL)


def load(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_trains_without_images(first_part, datasets_root):
    pictures = (datasets_root / "occlusion_scenes" / "train").iterdir()
    assert all(os.path.getsize(x) == 0 for x in pictures)  # not drawn anew
    checkpoint = load(first_part)
    assert checkpoint["iteration"] == 2
    model = build_model(small_config("srm_from_annotations.yaml"))
    assert isinstance(model, SRMFromAnnotations)
    model.load_state_dict(checkpoint["model"])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    metrics = json.loads((first_part / "metrics.json").read_text().splitlines()[-1])
    assert metrics["loss_srm"] > 0 and metrics["loss_srm_pairs"] > 0
    assert math.isfinite(metrics["total_loss"])
    assert not (first_part / "orderings.json").exists()  # there is nothing to evaluate


def test_resume_continues(train_net, first_part, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(first_part, folder)
    text = train_net(folder, "--resume", "SOLVER.MAX_ITER", "5")
    assert "Starting training from iteration 3" in text
    before, after = load(first_part), load(folder)
    assert after["iteration"] == 4
    optimizer = after["trainer"]["_trainer"]["optimizer"]
    steps = {int(s["step"]) for s in optimizer["state"].values()}
    assert steps == {5}  # 3 before and 2 after, with the optimizer's own state
    assert any(not torch.equal(v, after["model"][k]) for k, v in before["model"].items())


def test_the_oanet_of_masks_has_the_same_ranking():
    ours = build_model(small_config("srm_from_annotations.yaml"))
    oanet = build_model(small_config("oanet_R_18_masks.yaml"))
    assert isinstance(ours, SRMFromAnnotations) and isinstance(oanet, OANet)
    theirs = {k: v.shape for k, v in oanet.state_dict().items() if k.startswith("srm_head.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == theirs
    assert len(theirs) < len(oanet.state_dict())
    for name in ("kinds", "stride", "train_masks", "num_classes", "ignore_value"):
        assert getattr(ours.srm_head, name) == getattr(oanet.srm_head, name), name
