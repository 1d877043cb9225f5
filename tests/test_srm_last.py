import math
import os

import pytest
import torch

from detectron2.modeling import META_ARCH_REGISTRY

from oanet_d2.engine import OANetTrainer
from oanet_d2.modeling import OANet
from tests.conftest import AfterStep, panoptic_fpn_cfg, trainer_of


@pytest.fixture
def cfg(train_cfg):
    """Six iterations, of the last three the ranking head's alone."""
    train_cfg.SOLVER.SRM_ONLY_SHARE = 0.5
    return train_cfg


def state_after(trainer, iteration, found):
    def copy():
        state = trainer.model.state_dict()
        found[iteration] = {name: tensor.clone() for name, tensor in state.items()}

    trainer.register_hooks([AfterStep(iteration, copy)])


def test_the_network_learns_and_then_the_ranking(cfg):
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)  # pairs, whatever it detects
    trainer, found = trainer_of(cfg), {}
    for iteration in (0, 2, 5):
        state_after(trainer, iteration, found)
    trainer.train()

    def changed(first, last):
        return {
            name.split(".")[0]
            for name, tensor in found[first].items()
            if not torch.equal(tensor, found[last][name])
        }

    network = {name.split(".")[0] for name in found[0]} - {"srm_head"}
    assert {"backbone", "sem_seg_head", "roi_heads"} <= changed(0, 2) <= network
    assert changed(2, 5) == {"srm_head"}  # nor do running statistics


def test_trains_in_bfloat16_on_a_cpu(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    trainer, found = trainer_of(cfg), {}
    layers = (trainer.model.backbone.fpn_output2, trainer.model.sem_seg_head.predictor)
    for layer in layers:
        layer.register_forward_hook(lambda m, x, y: found.setdefault(y.dtype, []).append(m))
    trainer.train()
    assert set(found) == {torch.bfloat16} and len(found[torch.bfloat16]) == 12
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_another_model_does_not_train_in_bfloat16_on_a_cpu(cfg):
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.SRM_ONLY_SHARE = True, 0.0
    with pytest.raises(ValueError, match="SOLVER.AMP.ENABLED is True.*'PanopticFPN'.*False"):
        OANetTrainer(panoptic_fpn_cfg(cfg))


def test_a_model_of_ones_own_trains_in_bfloat16_if_it_is_an_oanet(cfg, monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Mine", type("Mine", (OANet,), {}))
    cfg.SOLVER.AMP.ENABLED, cfg.MODEL.META_ARCHITECTURE = True, "Mine"
    assert OANetTrainer(cfg).model.execution.train_autocast == torch.bfloat16


def test_the_learning_rate_begins_anew(cfg):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE, cfg.SOLVER.WARMUP_ITERS = 10, 0.4, 2

    def rates(cfg, iterations):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=cfg.SOLVER.BASE_LR)
        scheduler, found = OANetTrainer.build_lr_scheduler(cfg, optimizer), []
        for _ in range(iterations):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    found = rates(cfg, 10)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE = 6, 0.0
    assert found[:6] == pytest.approx(rates(cfg, 6))  # Detectron2's
    half_a_cosine = [cfg.SOLVER.BASE_LR * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert found[6:] == pytest.approx(half_a_cosine)


@pytest.mark.parametrize("resumed_at", [2, 4])
def test_resumes_to_the_bit(cfg, resumed_at):
    """Before and within the last part, in which pairs are remembered."""
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)  # pairs, whatever it detects
    whole = trainer_of(cfg)
    whole.train()
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w") as f:
        f.write(f"model_{resumed_at - 1:07d}.pth")
    again = OANetTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == resumed_at
    again.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert len(again.model.srm_head.memory) == len(whole.model.srm_head.memory) > 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_what_is_no_share_is_refused(cfg, share):
    cfg.SOLVER.SRM_ONLY_SHARE = share
    with pytest.raises(ValueError, match=f"SRM_ONLY_SHARE is {share}.*TRAIN_SRM_ONLY"):
        OANetTrainer(cfg)


def test_a_model_without_a_ranking_head_is_refused(cfg):
    with pytest.raises(ValueError, match="SRM_ONLY_SHARE.*PanopticFPN.*0"):
        OANetTrainer(panoptic_fpn_cfg(cfg))
