"""The commands of the README, very small."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

from oanet_d2 import train
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.painting.learned import LearnedOrder
from tests.conftest import (
    NARROW,
    REPOSITORY,
    SMALLEST,
    load_config,
    registered,
    scenes_paths,
    trainer_of,
)


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for split in ("train", "val"):
        write_split(root / "occlusion_scenes", split, 4, image_size=64, seed=0, num_workers=0)
    return root


SMALL = [
    *["DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES", "4", "DATASETS.OCCLUSION_SCENES.VAL_IMAGES", "4"],
    *["DATASETS.OCCLUSION_SCENES.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TRAIN", "(64,)"],
    *["INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"],
    *[*SMALLEST, *NARROW],
]


def test_trains_in_two_processes_and_evaluates_again_in_one(
    subprocess_env, datasets_root, tmp_path, monkeypatch
):
    def command(*args):
        config = ["--config-file", "OcclusionScenes/oanet_R_18.yaml"]
        return [*config, *args, *SMALL, "OUTPUT_DIR", str(tmp_path)]

    two = "--num-gpus", "2", "--dist-url", "auto", "SOLVER.MAX_ITER", "4"
    result = subprocess.run(
        [sys.executable, "train_net.py", *command(*two)],
        cwd=REPOSITORY,
        env={**subprocess_env, "DETECTRON2_DATASETS": str(datasets_root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    files = tmp_path / "orderings.json", tmp_path / "report.html"
    first = json.loads(files[0].read_text())
    assert first["images"] == 4 and {"score", "srm_pairs", "oracle"} <= set(first["orderings"])
    assert first["seconds"]["train"] > 0 and first["seconds"]["eval"] > 0
    for file in files:
        file.unlink()
    monkeypatch.setattr(train, "setup_logger", lambda *args, **kwargs: None)  # other tests read the log
    train_set, val_set = (scenes_paths(datasets_root / "occlusion_scenes", x) for x in ("train", "val"))
    with registered("again_train", *train_set), registered("again_val", *val_set):
        again = ["--eval-only", "DATASETS.TRAIN", "('again_train',)", "DATASETS.TEST", "('again_val',)"]
        again += ["MODEL.WEIGHTS", str(tmp_path / "model_final.safetensors")]
        # One image at the test scale is no real augmentation, so it changes nothing.
        again += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "False"]
        train.run(default_argument_parser().parse_args(command(*again)))
    for file in (files[0], tmp_path / "inference_TTA/orderings.json"):
        assert json.loads(file.read_text())["orderings"] == first["orderings"]
    assert files[1].exists() and (tmp_path / "inference_TTA/report.html").exists()


def test_the_ranking_trains_from_annotations_alone(tmp_path):
    """
    The images are empty files: nobody reads them. An OANet takes the ranking head, and masks of any
    program an order.
    """
    write_split(tmp_path, "train", 6, image_size=64, seed=0, num_workers=0)
    for image in (tmp_path / "train").iterdir():
        image.write_bytes(b"")
    with registered("test_annotations_alone", *scenes_paths(tmp_path, "train")) as name:
        opts = [*SMALL, "DATASETS.TRAIN", f"('{name}',)", "SOLVER.MAX_ITER", "3"]
        opts += ["OUTPUT_DIR", str(tmp_path / "out")]
        trainer = trainer_of(load_config("OcclusionScenes/srm_from_annotations.yaml", *opts))
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[k], v) for k, v in before.items())
    oanet = build_model(load_config("OcclusionScenes/oanet_R_18_masks.yaml", *SMALL))
    assert {x for x in oanet.state_dict() if x.startswith("srm_head.")} == set(after)
    order = LearnedOrder.load(tmp_path / "out/model_final.safetensors")
    assert order.classes == MetadataCatalog.get("occlusion_scenes_train").thing_classes
    assert (order.stride, order.min_size, order.max_size) == (4, 64, 192)
    for key, value in order.network.state_dict().items():
        assert torch.equal(value, after[f"srm_head.network.{key}"])


def test_evaluations_of_a_training(train_cfg, few_scenes):
    """Several test sets have a folder each. The last evaluation is augmented, too."""
    train_cfg.DATASETS.TEST, train_cfg.TEST.ORDERS = few_scenes, ("score", "srm_pairs", "oracle")
    train_cfg.TEST.EVAL_PERIOD, train_cfg.SOLVER.MAX_ITER = 1, 2
    train_cfg.TEST.AUG.ENABLED, train_cfg.TEST.AUG.MIN_SIZES = True, (48, 64)
    trainer_of(train_cfg).train()
    output = Path(train_cfg.OUTPUT_DIR)
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    plain, augmented = (f"{few_scenes[1]}{x}/panoptic_seg/PQ" for x in ("", "_TTA"))
    assert [augmented in x for x in metrics if plain in x] == [False, True]
    for name, images in zip(few_scenes, (6, 3)):
        for folder in (output / name, output / "inference_TTA" / name):
            assert json.loads((folder / "orderings.json").read_text())["images"] == images
            assert {"report.html", "inference"} <= set(os.listdir(folder))
    with pytest.raises(ValueError, match="EVIDENCE \\('geometry',\\)"):  # it looked at images
        LearnedOrder.load(output / "model_final.safetensors")


def test_files_that_only_the_evaluation_reads_are_missed_before_training(tiny_cfg, datasets_root):
    train, val = (scenes_paths(datasets_root / "occlusion_scenes", s) for s in ("train", "val"))
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = ("test_early_train",), ("test_early_val",)
    moved = (*val[:2], datasets_root / "moved", val[3])
    with registered("test_early_train", *train), registered("test_early_val", *moved):
        with pytest.raises(ValueError, match="moved/000001000001.png: No such file"):
            OANetTrainer(tiny_cfg)
