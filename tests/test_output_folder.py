"""
What a training does with an output folder that is not empty.
"""

import os

import pytest
import torch

from detectron2.engine import default_argument_parser

import train_net
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.output_folder import OutputFolderError, prepare_output_folder
from tests.conftest import CONFIGS, load_config, registered, scenes_paths

CONFIG = "OcclusionScenes/srm_from_annotations.yaml"
SMALL = [
    *["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"],
    *["SOLVER.MAX_ITER", "2", "MODEL.SRM_HEAD.CONV_DIM", "8", "MODEL.SRM_HEAD.KERNEL_SIZE", "3"],
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "train", 4, image_size=64, seed=0, num_workers=0)
    with registered("test_output_folder", *scenes_paths(root, "train")) as name:
        yield name


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


def test_the_same_config_starts_from_the_beginning_and_says_so(trained, config, caplog):
    prepare_output_folder(config(trained))
    assert f"OUTPUT_DIR holds {trained / 'model_final.pth'} of the same config" in caplog.text


def test_what_is_not_about_training_may_differ(trained, config):
    opts = ["TEST.EVAL_PERIOD", "5", "DATALOADER.NUM_WORKERS", "3", "MODEL.DEVICE", "cuda"]
    opts += ["MODEL.OANET.ORDER", "score", "MODEL.OANET.OUTPUTS", "()", "TEST.ORDER_PICTURES", "1"]
    opts += ["MODEL.OANET.KEEP_THINGS_FREE", "False", "INPUT.MIN_SIZE_TEST", "99"]
    prepare_output_folder(config(trained, *opts))


def test_another_config_is_refused_before_anything_is_written(trained, dataset):
    """By train_net.py itself, whose first steps write a log and the config."""
    before = {x.name: x.read_bytes() for x in trained.iterdir() if x.is_file()}
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
    assert {x.name: x.read_bytes() for x in trained.iterdir() if x.is_file()} == before


def test_checkpoints_of_others(trained, config, tmp_path):
    """Nothing says how they were trained, so they are not replaced."""
    (tmp_path / "notes.txt").write_text("of mine")
    (tmp_path / "srm.pth").write_bytes(b"no training writes this name")
    prepare_output_folder(config(tmp_path))
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    torch.save({"model": checkpoint["model"]}, tmp_path / "model_0000001.pth")
    for resume in (False, True):  # without a last_checkpoint it would not be resumed
        with pytest.raises(OutputFolderError, match="model_0000001.pth of another training: it do"):
            prepare_output_folder(config(tmp_path), resume)
    prepare_output_folder(config(tmp_path), eval_only=True)  # replaces nothing
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    prepare_output_folder(config(tmp_path), resume=True)


@pytest.mark.parametrize("place", ["/proc/oanet_d2", "file", "file/folder"])
def test_nothing_can_be_written(config, place, tmp_path):
    (tmp_path / "file").write_text("")
    folder = os.path.join(tmp_path, place)
    with pytest.raises(OutputFolderError) as error:
        prepare_output_folder(config(folder))
    assert f"OUTPUT_DIR is {folder!r}, where nothing can be written" in str(error.value)


def resumed(cfg):
    trainer = OANetTrainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.mark.parametrize(
    "opts, text",
    [
        (
            ["MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT", "0.0"],
            "tensors, .*MAP_LOSS_WEIGHT is 0.0, there 1.0",
        ),
        (["SOLVER.OPTIMIZER", "SGD"], "the optimizer would.*SOLVER.OPTIMIZER is 'SGD', there"),
    ],
)
def test_resuming_with_another_model_is_refused(trained, config, opts, text):
    with pytest.raises(OutputFolderError, match=text):
        resumed(config(trained, *opts))


def test_resuming_with_other_settings_is_told(trained, config, caplog):
    """What the optimizer's state brings along, the config cannot change."""
    trainer = resumed(config(trained, "SOLVER.MAX_ITER", "8", "SOLVER.BASE_LR", "0.5"))
    assert trainer.start_iter == 2
    assert "SOLVER.BASE_LR is 0.5, there 0.002; SOLVER.MAX_ITER is 8, there 2." in caplog.text
    assert trainer.scheduler.base_lrs[0] == 0.002
