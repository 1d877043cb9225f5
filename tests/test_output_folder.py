"""What a training does with an output folder that is not empty."""

import pytest
import torch
import yaml

from detectron2.engine import default_argument_parser

from oanet_d2 import train
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.output_folder import OutputFolderError, prepare_output_folder
from tests.conftest import CONFIGS, load_config, registered, scenes_paths

CONFIG = "OcclusionScenes/srm_from_annotations.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Makes a config of a very small training of 2 steps."""
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "train", 4, image_size=64, seed=0, num_workers=0)
    small = ["INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    small += ["SOLVER.MAX_ITER", 2, "MODEL.SRM_HEAD.CONV_DIM", 8, "MODEL.SRM_HEAD.KERNEL_SIZE", 3]
    with registered("test_output_folder", *scenes_paths(root, "train")) as name:
        small += ["DATASETS.TRAIN", (name,), "OUTPUT_DIR"]
        yield lambda folder, *opts: load_config(CONFIG, *small, str(folder), *opts)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    OANetTrainer(config(folder, "TEST.AUG.ENABLED", True)).train()  # there is nothing to augment
    return folder


def test_the_same_training_starts_from_the_beginning_and_says_so(trained, config, caplog):
    prepare_output_folder(config(trained, "TEST.EVAL_PERIOD", 5, "MODEL.OANET.ORDER", "score"))
    assert f"replaces {trained / 'model_final.pth'} of the same config" in caplog.text


def test_a_training_of_an_older_version_is_the_same_training(trained, config, tmp_path, caplog):
    """Its config lacks keys. They count where they are set to something else."""
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    hook = checkpoint["trainer"]["hooks"]["RunConfig"]
    content = yaml.safe_load(hook["yaml"])
    del content["MODEL"]["POINT_HEAD"], content["INPUT"]["COPY_PASTE"]
    hook["yaml"] = yaml.safe_dump(content)
    torch.save(checkpoint, tmp_path / "model_0000001.pth")
    prepare_output_folder(config(tmp_path))
    assert "model_0000001.pth of the same config" in caplog.text
    with pytest.raises(OutputFolderError, match="training: INPUT.COPY_PASTE is 0.5, there 0.0[.]"):
        prepare_output_folder(config(tmp_path, "INPUT.COPY_PASTE", 0.5))


def test_another_config_is_refused_before_anything_is_written(trained):
    """By `oanet-d2 train` itself, whose first steps write a log and the config."""
    before = {x.name: x.read_bytes() for x in trained.iterdir() if x.is_file()}
    args = ["--config-file", str(CONFIGS / CONFIG), "OUTPUT_DIR", str(trained), "SEED", "7"]
    words = "model_final.pth .* SEED is 7, there 1; SOLVER.BASE_LR is 0.5, there 0.002"
    with pytest.raises(OutputFolderError, match=words):
        train.setup(default_argument_parser().parse_args([*args, "SOLVER.BASE_LR", "0.5"]))
    assert {x.name: x.read_bytes() for x in trained.iterdir() if x.is_file()} == before


def test_checkpoints_of_others(trained, config, tmp_path):
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    torch.save({"model": checkpoint["model"]}, tmp_path / "model_0000001.pth")
    for resume in (False, True):  # without a last_checkpoint it would not be resumed
        with pytest.raises(OutputFolderError, match="model_0000001.pth of another training: it do"):
            prepare_output_folder(config(tmp_path), resume)
    prepare_output_folder(config(tmp_path), eval_only=True)  # replaces nothing
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    prepare_output_folder(config(tmp_path), resume=True)


def test_nothing_can_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="OUTPUT_DIR .*/file' cannot be written to"):
        prepare_output_folder(config(tmp_path / "file"))


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT", 0.0, "tensors, .*LOSS_WEIGHT is 0.0, there 1.0"),
        ("SOLVER.OPTIMIZER", "SGD", "the optimizer would.*SOLVER.OPTIMIZER is 'SGD', there"),
    ],
)
def test_resuming_with_another_model_is_refused(trained, config, key, value, text):
    with pytest.raises(OutputFolderError, match=text):
        OANetTrainer(config(trained, key, value)).resume_or_load(resume=True)


def test_resuming_with_other_settings_is_told(trained, config, caplog):
    """What the optimizer's state brings along, the config cannot change."""
    trainer = OANetTrainer(config(trained, "SOLVER.MAX_ITER", 8, "SOLVER.BASE_LR", 0.5))
    trainer.resume_or_load(resume=True)
    assert "SOLVER.BASE_LR is 0.5, there 0.002; SOLVER.MAX_ITER is 8, there 2." in caplog.text
    assert trainer.start_iter == 2 and trainer.scheduler.base_lrs[0] == 0.002
