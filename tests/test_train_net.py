"""
The commands of the README, very small.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from detectron2.modeling import build_model

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.modeling import SRMFromAnnotations
from tests.conftest import (
    CONFIGS,
    REPOSITORY,
    SMALLEST,
    load_config,
    registered,
    scenes_paths,
    trainer_of,
)

ORDERS = ["score", "srm_mean", "srm_overlap", "srm_pairs", "oracle"]


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for split, n in (("train", 6), ("val", 4)):
        write_split(root / "occlusion_scenes", split, n, image_size=64, seed=0, num_workers=0)
    return root


SMALL = [
    *["DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES", "6", "DATASETS.OCCLUSION_SCENES.VAL_IMAGES", "4"],
    *["DATASETS.OCCLUSION_SCENES.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TRAIN", "(64,)"],
    *["INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"],
    *SMALLEST,
]


@pytest.fixture
def train_net(subprocess_env, datasets_root, tmp_path):
    """Runs train_net.py with the demo's config, and gives its output."""

    def run(*args):
        config = str(CONFIGS / "OcclusionScenes" / "oanet_R_18.yaml")
        command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", config]
        result = subprocess.run(
            [*command, *args, *SMALL, "OUTPUT_DIR", str(tmp_path)],
            env={**subprocess_env, "DETECTRON2_DATASETS": str(datasets_root)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    return run


def orderings(folder):
    return json.loads((folder / "orderings.json").read_text())


def test_trains_evaluates_and_evaluates_again(train_net, tmp_path):
    """What `make demo` does; then `--eval-only` on the checkpoint that it leaves."""
    text = train_net("SOLVER.MAX_ITER", "5")
    assert "| srm_overlap" in text and str(tmp_path / "report.html") in text
    first = orderings(tmp_path)
    assert list(first["orderings"]) == ORDERS and first["images"] == 4
    assert first["seconds"]["train"] > 0 and first["seconds"]["eval"] > 0
    (tmp_path / "orderings.json").unlink()
    (tmp_path / "report.html").unlink()
    train_net("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    assert orderings(tmp_path)["orderings"] == first["orderings"]
    assert (tmp_path / "report.html").exists()


def test_two_processes_on_a_cpu(train_net, tmp_path):
    text = train_net("--num-gpus", "2", "--dist-url", "auto", "SOLVER.MAX_ITER", "2")
    assert "| srm_overlap" in text
    assert orderings(tmp_path)["images"] == 4
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 1


def test_the_ranking_trains_from_annotations_alone(tmp_path):
    """The images are empty files: nobody reads them. An OANet takes the ranking head."""
    write_split(tmp_path, "train", 6, image_size=64, seed=0, num_workers=0)
    for image in (tmp_path / "train").iterdir():
        image.write_bytes(b"")
    with registered("test_annotations_alone", *scenes_paths(tmp_path, "train")) as name:
        opts = [*SMALL, "DATASETS.TRAIN", f"('{name}',)", "SOLVER.MAX_ITER", "3"]
        opts += ["OUTPUT_DIR", str(tmp_path / "out")]
        trainer = trainer_of(load_config("OcclusionScenes/srm_from_annotations.yaml", *opts))
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer.train()
    after = trainer.model.state_dict()
    assert isinstance(trainer.model, SRMFromAnnotations)
    assert any(not torch.equal(after[k], v) for k, v in before.items())
    oanet = build_model(load_config("OcclusionScenes/oanet_R_18_masks.yaml", *SMALL))
    unknown = oanet.load_state_dict(after, strict=False)
    assert not unknown.unexpected_keys
    assert not any(name.startswith("srm_head.") for name in unknown.missing_keys)


def test_several_test_sets_have_a_folder_each(train_cfg, few_scenes):
    train_cfg.DATASETS.TEST, train_cfg.TEST.ORDERS = few_scenes, ("score", "srm_pairs", "oracle")
    train_cfg.SOLVER.MAX_ITER = 1
    trainer_of(train_cfg).train()
    for name, images in zip(few_scenes, (6, 3)):
        folder = os.path.join(train_cfg.OUTPUT_DIR, name)
        with open(os.path.join(folder, "orderings.json")) as f:
            assert json.load(f)["images"] == images
        assert {"report.html", "inference"} <= set(os.listdir(folder))


def test_a_short_training_lowers_the_loss(train_cfg):
    solver = train_cfg.SOLVER
    solver.MAX_ITER, solver.WARMUP_ITERS, solver.BASE_LR = 30, 5, 0.01
    train_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"  # so early it detects next to nothing
    trainer = trainer_of(train_cfg)
    trainer.train()
    losses = trainer.storage.histories()
    for key in ("total_loss", "loss_srm", "loss_srm_pairs", "loss_sem_seg"):
        values = [v for v, _ in losses[key].values()]
        assert sum(values[-8:]) < 0.8 * sum(values[:8]), key


def test_files_that_only_the_evaluation_reads_are_missed_before_training(tiny_cfg, datasets_root):
    train, val = (scenes_paths(datasets_root / "occlusion_scenes", s) for s in ("train", "val"))
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = ("test_early_train",), ("test_early_val",)
    moved = (*val[:2], datasets_root / "moved", val[3])
    with registered("test_early_train", *train), registered("test_early_val", *moved):
        with pytest.raises(ValueError, match="'test_early_val': its PANOPTIC_ROOT .*moved does"):
            OANetTrainer(tiny_cfg)
