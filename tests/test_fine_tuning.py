"""
Training only the ranking on top of a network that stays as it is.
"""

import pytest
import torch

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from tests.conftest import load_config, make_input, registered, scenes_paths


@pytest.fixture
def srm_only_cfg(tiny_cfg):
    """Normalized by the batch, so that statistics would move if anything were in training."""
    tiny_cfg.MODEL.OANET.TRAIN_SRM_ONLY = True
    tiny_cfg.MODEL.RESNETS.NORM = tiny_cfg.MODEL.FPN.NORM = "BN"
    return tiny_cfg


def batch():
    return [
        make_input((64, 96), [[8, 8, 40, 60], [20, 20, 28, 44]], [0, 1], 2),
        make_input((64, 64), [], [], 1),
    ]


@pytest.mark.parametrize("source", ["gt", "pred", "detections"])
def test_only_the_ranking_learns(srm_only_cfg, source):
    srm_only_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = (source,)
    torch.manual_seed(0)
    model = build_model(srm_only_cfg).train()
    with EventStorage():
        losses = model(batch())
    assert set(losses) == {"loss_srm", "loss_srm_pairs"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("srm_head."), name


def test_modes(srm_only_cfg):
    model = build_model(srm_only_cfg)
    for _ in range(2):
        model.train()
        assert model.training
        in_training = {n.split(".")[0] for n, m in model.named_modules() if n and m.training}
        assert in_training == {"srm_head"}
        model.eval()
        assert not any(m.training for m in model.modules())


def test_everything_else_is_unchanged_after_a_training(srm_only_cfg, tmp_path):
    """Every tensor, running statistics too, after steps with momentum and weight decay."""
    write_split(tmp_path, "train", 4, image_size=64, seed=0, num_workers=0)
    with registered("test_srm_only", *scenes_paths(tmp_path, "train")) as name:
        srm_only_cfg.merge_from_list(
            [
                *["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"],
                *["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", "0"],
                *["SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "0", "SOLVER.WEIGHT_DECAY", "0.1"],
                *["OUTPUT_DIR", str(tmp_path)],
            ]
        )
        torch.manual_seed(0)
        trainer = OANetTrainer(srm_only_cfg)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer.train()
    after = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert set(after) == set(before) and any("running_mean" in k for k in before)
    for name, tensor in before.items():
        if not name.startswith("srm_head."):
            assert torch.equal(after[name], tensor), name
    assert any(not torch.equal(after[k], v) for k, v in before.items())


def test_results_of_the_network_are_the_same(tiny_cfg):
    """Freezing changes what learns, not what comes out."""
    torch.manual_seed(0)
    free = build_model(tiny_cfg).eval()
    tiny_cfg.MODEL.OANET.TRAIN_SRM_ONLY = True
    frozen = build_model(tiny_cfg).train()
    frozen.load_state_dict(free.state_dict())
    with torch.no_grad():
        (a,), (b,) = free(batch()[:1]), frozen.eval()(batch()[:1])
    assert torch.equal(a["sem_seg"], b["sem_seg"])
    assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])


def test_the_config_for_coco_freezes():
    cfg = load_config("COCO-PanopticSegmentation/oanet_R_50_srm_only.yaml")
    model = build_model(cfg)
    learning = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {"srm_head"}
