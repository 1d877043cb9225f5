import json
import os
import subprocess
import sys

import pytest
import torch

from detectron2.config import get_cfg
from detectron2.utils.env import seed_all_rng

from oanet_d2 import add_oanet_config
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from tests.conftest import CONFIGS, REPOSITORY, load_config, registered, scenes_paths

CONFIG = str(CONFIGS / "OcclusionScenes" / "oanet_R_18.yaml")
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
    *["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"],
    *["MODEL.SEM_SEG_HEAD.NORM", "", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.SRM_HEAD.CONV_DIM", "8"],
]


def train_net(env, datasets_root, *args, check=True):
    """Its output; or, if it is to fail, what it prints as the error."""
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", CONFIG, *args],
        env={**env, "DETECTRON2_DATASETS": str(datasets_root)},
        capture_output=True,
        text=True,
    )
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout
    assert result.returncode != 0
    return result.stderr


def test_trains_evaluates_and_evaluates_again(subprocess_env, datasets_root, tmp_path):
    """What `make demo` does, very small; then `--eval-only` on the checkpoint it leaves."""
    out = ["OUTPUT_DIR", str(tmp_path)]
    text = train_net(subprocess_env, datasets_root, *SMALL, *out, "SOLVER.MAX_ITER", "3")
    assert "| srm_overlap" in text and f"Written to {tmp_path / 'orderings.json'}" in text
    assert text.rstrip().endswith(f"Report, for a browser: {tmp_path / 'report.html'}")
    assert "occlusion_scenes_val" in (tmp_path / "report.html").read_text()
    after_training = json.loads((tmp_path / "orderings.json").read_text())
    assert list(after_training["orderings"]) == ORDERS
    assert after_training["images"] == 4
    assert after_training["seconds"]["train"] > 0 and after_training["seconds"]["eval"] > 0
    checkpoint = tmp_path / "model_final.pth"
    assert (tmp_path / "last_checkpoint").read_text() == checkpoint.name

    (tmp_path / "orderings.json").unlink()
    (tmp_path / "report.html").unlink()
    weights = ["MODEL.WEIGHTS", str(checkpoint)]
    text = train_net(subprocess_env, datasets_root, "--eval-only", *SMALL, *out, *weights)
    again = json.loads((tmp_path / "orderings.json").read_text())
    assert again["orderings"] == after_training["orderings"]
    assert (tmp_path / "report.html").exists()
    # read from the checkpoint
    assert again["seconds"]["train"] == pytest.approx(after_training["seconds"]["train"])


def test_resume_continues(subprocess_env, datasets_root, tmp_path):
    common = [*SMALL, "OUTPUT_DIR", str(tmp_path), "TEST.ORDERS", "()", "DATASETS.TEST", "()"]
    train_net(subprocess_env, datasets_root, *common, "SOLVER.MAX_ITER", "2")
    text = train_net(subprocess_env, datasets_root, "--resume", *common, "SOLVER.MAX_ITER", "4")
    assert "Starting training from iteration 2" in text
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3


def test_two_processes_on_cpu(subprocess_env, datasets_root, tmp_path):
    """Detectron2's launch, over gloo; images without a thing on one side must not hang it."""
    args = ["--num-gpus", "2", "--dist-url", "auto", *SMALL, "OUTPUT_DIR", str(tmp_path)]
    text = train_net(subprocess_env, datasets_root, *args, "SOLVER.MAX_ITER", "2")
    assert "| srm_overlap" in text
    assert json.loads((tmp_path / "orderings.json").read_text())["images"] == 4
    assert "4 images" in (tmp_path / "report.html").read_text()


def test_a_short_training_lowers_the_loss(datasets_root, tmp_path):
    paths = scenes_paths(datasets_root / "occlusion_scenes", "train")
    with registered("test_short_training", *paths) as name:
        cfg = load_config(
            "OcclusionScenes/oanet_R_18.yaml",
            *SMALL,
            *["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", "TEST.ORDERS", "()"],
            *["SOLVER.MAX_ITER", "60", "SOLVER.WARMUP_ITERS", "5", "OUTPUT_DIR", str(tmp_path)],
            *["SOLVER.BASE_LR", "0.01", "SOLVER.SRM_ONLY_SHARE", "0.0"],
            # so early it detects next to nothing
            *["MODEL.SRM_HEAD.TRAIN_MASKS", "('pred', 'detections')"],
        )
        seed_all_rng(0)  # all of them: the seed of the data order is one of numpy's
        trainer = OANetTrainer(cfg)
        trainer.train()
        losses = trainer.storage.histories()
        for key in ("total_loss", "loss_srm", "loss_sem_seg"):
            values = [v for v, _ in losses[key].values()]
            assert sum(values[-8:]) < 0.8 * sum(values[:8]), key


def test_optimizer_follows_the_config(tiny_cfg):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    tiny_cfg.SOLVER.WEIGHT_DECAY, tiny_cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01, 0.0
    for name, cls in (("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)):
        tiny_cfg.SOLVER.OPTIMIZER = name
        optimizer = OANetTrainer.build_optimizer(tiny_cfg, model)
        assert isinstance(optimizer, cls)
        decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert [decay[p] for p in model.parameters()] == [0.01, 0.01, 0.0, 0.0]
    tiny_cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'LION'.*'ADAMW'"):
        OANetTrainer.build_optimizer(tiny_cfg, model)


def test_wrong_config_ends_with_the_key_and_the_value(subprocess_env, datasets_root, tmp_path):
    args = [*SMALL, "OUTPUT_DIR", str(tmp_path), "MODEL.OANET.ORDER", "depth"]
    text = train_net(subprocess_env, datasets_root, *args, check=False)
    assert "MODEL.OANET.ORDER is 'depth'; it must be one of ['score', 'srm_mean'" in text


def test_every_config_loads():
    for path in CONFIGS.rglob("*.yaml"):
        cfg = get_cfg()
        add_oanet_config(cfg)
        cfg.merge_from_file(str(path))
        assert cfg.MODEL.META_ARCHITECTURE in ("OANet", "SRMFromAnnotations")
        assert os.path.isabs(cfg.OUTPUT_DIR) is False


def test_files_that_only_the_evaluation_reads_are_missed_before_training(tiny_cfg, datasets_root):
    train, val = (scenes_paths(datasets_root / "occlusion_scenes", s) for s in ("train", "val"))
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = ("test_early_train",), ("test_early_val",)
    moved = (*val[:2], datasets_root / "moved", val[3])
    with registered("test_early_train", *train), registered("test_early_val", *moved):
        with pytest.raises(ValueError, match="'test_early_val': its PANOPTIC_ROOT .*moved does"):
            OANetTrainer(tiny_cfg)
