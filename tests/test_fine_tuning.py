"""
Fine-tuning a Panoptic FPN from a file of the model zoo.
"""

import pickle

import pytest
import torch

from detectron2.modeling import build_model

from tests.conftest import load_config, panoptic_fpn_cfg, trainer_of


@pytest.fixture
def cfg(train_cfg):
    """Normalized by the batch, so that statistics would move if anything were in training."""
    train_cfg.MODEL.RESNETS.NORM = train_cfg.MODEL.FPN.NORM = "BN"
    train_cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "stuff"
    train_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0
    train_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "features")
    train_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"  # pairs, whatever the network detects
    train_cfg.SOLVER.MAX_ITER, train_cfg.SOLVER.WARMUP_ITERS = 3, 0
    train_cfg.SOLVER.WEIGHT_DECAY = 0.1
    return train_cfg


def fine_tuned(cfg, tmp_path):
    """The tensors in the zoo's file, and those after a training that starts from it."""
    trainer = trainer_of(cfg)
    torch.manual_seed(7)
    complete_cfg = trainer.cfg.clone()
    complete_cfg.defrost()
    zoo = build_model(panoptic_fpn_cfg(complete_cfg)).state_dict()
    content = {
        "model": {k: v.numpy() for k, v in zoo.items()},
        "__author__": "Detectron2 Model Zoo",
    }
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    trainer.checkpointer.load(str(path), checkpointables=[])
    trainer.train()
    return zoo, trainer.model.state_dict()


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_only_the_ranking(cfg, tmp_path, optimizer):
    """Every tensor of the network stays, running statistics too."""
    cfg.MODEL.OANET.TRAIN_SRM_ONLY, cfg.SOLVER.OPTIMIZER = True, optimizer
    zoo, after = fine_tuned(cfg, tmp_path)
    assert any("running_mean" in name for name in zoo)
    for name, tensor in zoo.items():
        assert torch.equal(after[name], tensor), name
    assert {name for name in after if name not in zoo} == {x for x in after if "srm_head." in x}


def test_everything(cfg, tmp_path):
    zoo, after = fine_tuned(cfg, tmp_path)
    moved = {name.split(".")[0] for name, x in zoo.items() if not torch.equal(after[name], x)}
    assert moved == {"backbone", "proposal_generator", "roi_heads", "sem_seg_head"}


def test_the_config_for_coco_freezes():
    model = build_model(load_config("COCO-PanopticSegmentation/oanet_R_50_srm_only.yaml"))
    learning = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {"srm_head"}
