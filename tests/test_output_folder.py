"""
What a training does with an output folder in which something is already.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from detectron2.engine import default_argument_parser

import train_net
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.output_folder import (
    OutputFolderError,
    check_free_space,
    check_output_folder,
    differences,
    flat_config,
    prepare_output_folder,
)
from tests.conftest import CONFIGS, load_config, registered, scenes_paths

CONFIG = "OcclusionScenes/srm_from_annotations.yaml"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "train", 4, image_size=64, seed=0, num_workers=0)
    with registered("test_output_folder", *scenes_paths(root, "train")) as name:
        yield name


SMALL = [
    *["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"],
    *["SOLVER.MAX_ITER", "2", "MODEL.SRM_HEAD.CONV_DIM", "8", "MODEL.SRM_HEAD.KERNEL_SIZE", "3"],
]


@pytest.fixture(scope="module")
def config(dataset):
    """Makes a config of a very small training of 2 steps."""

    def make(folder, *opts):
        out = ["DATASETS.TRAIN", f"('{dataset}',)", "OUTPUT_DIR", str(folder)]
        return load_config(CONFIG, *SMALL, *out, *opts)

    return make


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The output folder of such a training."""
    folder = tmp_path_factory.mktemp("trained")
    OANetTrainer(config(folder)).train()
    return folder


def contents(folder: Path):
    return {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}


def test_the_same_config_starts_anew_and_says_so(trained, config, caplog):
    """As `make demo` does when it is called again."""
    prepare_output_folder(config(trained))
    assert f"OUTPUT_DIR holds {trained / 'model_final.pth'}, of this same config" in caplog.text


def test_what_is_not_about_training_may_differ(trained, config):
    opts = ["TEST.EVAL_PERIOD", "5", "DATALOADER.NUM_WORKERS", "3", "MODEL.DEVICE", "cuda"]
    prepare_output_folder(config(trained, *opts))


def test_another_config_is_refused_before_anything_is_written(trained, dataset):
    """By train_net.py itself, whose first steps write a log and the config."""
    before = contents(trained)
    args = ["--config-file", str(CONFIGS / CONFIG), "OUTPUT_DIR", str(trained), "SEED", "7"]
    args += ["DATASETS.TRAIN", f"('{dataset}',)", *SMALL, "SOLVER.BASE_LR", "0.5"]
    with pytest.raises(OutputFolderError) as error:
        train_net.setup(default_argument_parser().parse_args(args))
    for text in (
        str(trained / "model_final.pth"),
        "SEED is 7, there 1",
        "SOLVER.BASE_LR is 0.5, there 0.002",
        "Set OUTPUT_DIR to another folder",
        "--resume",
    ):
        assert text in str(error.value)
    assert contents(trained) == before


def test_config_of_checkpoints_by_others(trained, config, tmp_path):
    """Without a config in it, the one beside it counts; without that, nobody knows."""
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    del checkpoint["trainer"]
    torch.save(checkpoint, tmp_path / "model_0000001.pth")
    cfg = config(tmp_path)
    with pytest.raises(OutputFolderError, match="model_0000001.pth, and nothing says of which"):
        prepare_output_folder(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    prepare_output_folder(cfg)
    (tmp_path / "config.yaml").write_text(config(tmp_path, "SOLVER.MAX_ITER", "9").dump())
    for resume in (False, True):  # without a last_checkpoint it would not be resumed
        with pytest.raises(OutputFolderError, match="SOLVER.MAX_ITER is 2, there 9"):
            prepare_output_folder(cfg, resume)
    prepare_output_folder(cfg, eval_only=True)  # replaces nothing
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    prepare_output_folder(cfg, resume=True)


def test_a_folder_with_other_files_is_free(tmp_path, config):
    (tmp_path / "notes.txt").write_text("of mine")
    (tmp_path / "srm.pth").write_bytes(b"not of a training")
    prepare_output_folder(config(tmp_path))


@pytest.mark.parametrize("place", ["/proc/oanet_d2", "file", "file/folder", "read_only"])
def test_nothing_can_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    folder = os.path.join(tmp_path, place)
    if place == "read_only":
        os.mkdir(folder)
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere, and may not mount a file system here")
            os.chmod(folder, 0o500)
    try:
        with pytest.raises(OutputFolderError) as error:
            check_output_folder(folder)
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", folder], check=True)
    assert f"OUTPUT_DIR is {folder!r}, where nothing can be written" in str(error.value)


def test_no_room_for_a_checkpoint(trained, config, monkeypatch):
    cfg = config(trained)
    trainer = OANetTrainer(cfg)
    size = os.path.getsize(trained / "model_final.pth")
    usage = shutil.disk_usage(trained)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    check_free_space(cfg.OUTPUT_DIR, trainer.model, trainer.optimizer)
    # by weights and moments alone, so that it never refuses where there is room
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(OutputFolderError, match="MB are free; one checkpoint takes .* MB"):
        trainer.train()


def resumed(cfg):
    trainer = OANetTrainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.mark.parametrize(
    "opts, text",
    [
        (["MODEL.SRM_HEAD.CONV_DIM", "4"], "MODEL.SRM_HEAD.CONV_DIM is 4, there 8"),
        (["SOLVER.OPTIMIZER", "SGD"], "the optimizer would not.*SOLVER.OPTIMIZER is 'SGD', there"),
    ],
)
def test_resuming_with_another_model_is_refused(trained, config, opts, text):
    with pytest.raises(OutputFolderError, match=text):
        resumed(config(trained, *opts))


def test_resuming_with_other_settings_is_told(trained, config, caplog):
    """What the optimizer's state brings along, the config cannot change."""
    opts = ["SOLVER.MAX_ITER", "8", "SOLVER.BASE_LR", "0.5"]
    trainer = resumed(config(trained, *opts))
    assert trainer.start_iter == 2
    text = "Resumed with another config than before: SOLVER.BASE_LR is 0.5, there 0.002; "
    assert text + "SOLVER.MAX_ITER is 8, there 2." in caplog.text
    assert "The checkpoint's SOLVER.BASE_LR stays" in caplog.text
    assert trainer.scheduler.base_lrs[0] == 0.002


def test_differences():
    cfg = load_config(CONFIG)
    other = load_config(CONFIG, "SOLVER.STEPS", "(5, 6)", "TEST.ORDERS", "()", "OUTPUT_DIR", "x")
    here, there = flat_config(cfg.dump()), flat_config(other.dump())
    assert differences(there, here) == {"SOLVER.STEPS": ([5, 6], list(cfg.SOLVER.STEPS))}
    assert differences(here, here) == {}
    del there["SEED"]
    assert differences(there, here)["SEED"] == (None, 1)
