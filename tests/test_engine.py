import math
import os

import pytest
import torch

from detectron2.engine import HookBase

from oanet_d2.engine import OANetTrainer
from tests.conftest import AfterStep, panoptic_fpn_cfg, trainer_of


@pytest.fixture
def cfg(train_cfg):
    """Six iterations; in the last three the ranking head learns alone."""
    train_cfg.SOLVER.SRM_ONLY_SHARE = 0.5
    train_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"  # pairs, whatever the network detects
    return train_cfg


def parts_that_change(trainer, first, last):
    """The children of the model in which a tensor changes between two iterations of a training."""
    found = {}

    def copy(iteration):
        state = trainer.model.state_dict()
        found[iteration] = {name: tensor.clone() for name, tensor in state.items()}

    trainer.register_hooks([AfterStep(i, lambda i=i: copy(i)) for i in (first, last)])
    trainer.train()
    return {
        name.split(".")[0]
        for name, tensor in found[first].items()
        if not torch.equal(tensor, found[last][name])
    }


def test_first_the_network_learns(cfg):
    changed = parts_that_change(trainer_of(cfg), 0, 2)
    assert changed == {"backbone", "proposal_generator", "roi_heads", "sem_seg_head"}


@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])  # both with momentum and weight decay
def test_then_only_the_ranking_learns(cfg, optimizer):
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY = optimizer, 0.1
    assert parts_that_change(trainer_of(cfg), 2, 5) == {"srm_head"}


def test_no_iteration_is_left_for_the_network(cfg):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE = 3, 0.97
    assert parts_that_change(trainer_of(cfg), 0, 2) == {"srm_head"}


def learning_rates(cfg, iterations):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=cfg.SOLVER.BASE_LR)
    scheduler, found = OANetTrainer.build_lr_scheduler(cfg, optimizer), []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    "share, first, steps", [(0.4, 6, (3,)), (0.4, 6, (3, 6, 8)), (0.97, 0, ()), (0.9, 1, ())]
)
def test_learning_rates_of_two_phases(cfg, share, first, steps):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE, cfg.SOLVER.WARMUP_ITERS = 10, share, 2
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.STEPS = "WarmupMultiStepLR", steps
    found = learning_rates(cfg, 10)
    length = 10 - first
    cosine = [(1 + math.cos(math.pi * i / length)) / 2 for i in range(length)]
    assert found[first:] == pytest.approx([cfg.SOLVER.BASE_LR * x for x in cosine])
    if first > 0:
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE, cfg.SOLVER.STEPS = first, 0.0, steps[:1]
        assert found[:first] == pytest.approx(learning_rates(cfg, first))  # Detectron2's


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_what_is_no_share_is_refused(cfg, share):
    cfg.SOLVER.SRM_ONLY_SHARE = share
    with pytest.raises(ValueError, match=f"SRM_ONLY_SHARE is {share}.*TRAIN_SRM_ONLY"):
        OANetTrainer(cfg)


def test_a_model_without_a_ranking_head_is_refused(cfg):
    with pytest.raises(ValueError, match="SRM_ONLY_SHARE.*PanopticFPN.*0"):
        OANetTrainer(panoptic_fpn_cfg(cfg))


@pytest.mark.parametrize("resumed_at, seed", [(2, -1), (4, 1)])
def test_resumes_to_the_same_weights(cfg, resumed_at, seed):
    """
    In both phases, with a seed of chance and another number of workers too. Only the checkpoint can
    tell the second training which images, augmentations and samples come next.
    """
    cfg.SEED = seed
    whole = trainer_of(cfg)
    whole.train()
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w") as f:
        f.write(f"model_{resumed_at - 1:07d}.pth")
    cfg.DATALOADER.NUM_WORKERS = 1
    again = OANetTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == resumed_at
    again.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_trains_in_bfloat16_on_a_cpu(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    trainer, dtypes = trainer_of(cfg), []
    for layer in (trainer.model.backbone.fpn_output2, trainer.model.sem_seg_head.predictor):
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))

    class GradientDtypes(HookBase):
        def after_backward(self):
            dtypes.append(
                {p.grad.dtype for p in self.trainer.model.parameters() if p.grad is not None}
            )

    trainer._trainer.register_hooks([GradientDtypes()])
    trainer.train()
    assert dtypes == [torch.bfloat16, torch.bfloat16, {torch.float32}] * 6
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_panoptic_fpn_trains_in_bfloat16(cfg):
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.SRM_ONLY_SHARE, cfg.SOLVER.MAX_ITER = True, 0.0, 1
    trainer_of(panoptic_fpn_cfg(cfg)).train()


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


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_gradients_are_clipped_after_they_are_unscaled(tiny_cfg, name):
    """One step by a GradScaler leaves the optimizer with the gradient itself: its norm is below 10."""
    tiny_cfg.SOLVER.OPTIMIZER = name
    clip = tiny_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "norm", 10.0
    tiny_cfg.SOLVER.WEIGHT_DECAY, tiny_cfg.SOLVER.MOMENTUM = 0.0, 0.9
    layer = torch.nn.Linear(100, 1, bias=False)
    gradient = 0.1 * torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    optimizer = OANetTrainer.build_optimizer(tiny_cfg, layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale((layer.weight * gradient).sum()).backward()
    scaler.step(optimizer)
    state = optimizer.state[layer.weight]
    found = state["momentum_buffer"] if name == "SGD" else state["exp_avg"] / (1 - 0.9)
    torch.testing.assert_close(found, gradient)
