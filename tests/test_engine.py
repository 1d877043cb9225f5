import math
import os

import pytest
import torch
import yaml

from oanet_d2.checkpoint import read_description
from oanet_d2.data.occlusion_scenes import CATEGORIES
from oanet_d2.engine import OANetTrainer
from tests.conftest import after_step, panoptic_fpn_cfg, trainer_of


@pytest.fixture
def cfg(train_cfg):
    """Six iterations; in the last three the ranking head learns alone."""
    train_cfg.SOLVER.SRM_ONLY_SHARE = 0.5
    train_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"  # pairs, whatever the network detects
    return train_cfg


@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])  # both with momentum and weight decay
def test_first_the_network_learns_then_only_the_ranking(cfg, optimizer):
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY = optimizer, 0.1
    trainer, states = trainer_of(cfg), {}

    def copy():
        state = trainer.model.state_dict()
        states[trainer.iter] = {name: tensor.clone() for name, tensor in state.items()}

    trainer.register_hooks([after_step(i, copy) for i in (0, 2, 5)])
    trainer.train()
    for first, last, parts in (
        (0, 2, {"backbone", "proposal_generator", "roi_heads", "sem_seg_head"}),
        (2, 5, {"srm_head"}),
    ):
        changed = (x for x in states[0] if not torch.equal(states[first][x], states[last][x]))
        assert {name.split(".")[0] for name in changed} == parts


def test_what_a_training_leaves(cfg, tmp_path):
    """Nothing before its end. Another training starts from it."""
    trainer, path = trainer_of(cfg), os.path.join(cfg.OUTPUT_DIR, "model_final.safetensors")
    early = []
    trainer.register_hooks([after_step(5, lambda: early.append(os.path.exists(path)))])
    trainer.train()
    assert early == [False]
    config, categories = read_description(path)
    assert yaml.safe_load(config) == yaml.safe_load(cfg.dump())
    known = ("id", "name", "isthing", "color")
    expected = [{key: c[key] for key in known} for c in CATEGORIES]
    assert sorted(categories, key=lambda c: c["id"]) == expected
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        assert f.read() == "model_final.pth"
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SEED = path, str(tmp_path / "other"), 7
    other = OANetTrainer(cfg)
    other.resume_or_load(resume=False)
    assert other.start_iter == 0 and other.checkpointer.new == []
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name


def test_a_training_that_fails_leaves_no_final_weights(cfg):
    trainer = trainer_of(cfg)
    trainer.register_hooks([after_step(4, lambda: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not os.path.exists(os.path.join(cfg.OUTPUT_DIR, "model_final.safetensors"))


def learning_rates(cfg, iterations):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=cfg.SOLVER.BASE_LR)
    scheduler, found = OANetTrainer.build_lr_scheduler(cfg, optimizer), []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("share, first, steps", [(0.4, 6, (3, 6, 8)), (0.9, 1, ()), (0.97, 1, ())])
def test_learning_rates_of_two_phases(cfg, share, first, steps):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE, cfg.SOLVER.WARMUP_ITERS = 10, share, 2
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.STEPS = "WarmupMultiStepLR", steps
    found = learning_rates(cfg, 10)
    length = 10 - first
    cosine = [(1 + math.cos(math.pi * i / length)) / 2 for i in range(length)]
    assert found[first:] == pytest.approx([cfg.SOLVER.BASE_LR * x for x in cosine])
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.SRM_ONLY_SHARE, cfg.SOLVER.STEPS = first, 0.0, steps[:1]
    assert found[:first] == pytest.approx(learning_rates(cfg, first))  # Detectron2's


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.5])
def test_what_is_no_share_is_refused(cfg, share):
    cfg.SOLVER.SRM_ONLY_SHARE = share
    if share == 0.5:
        cfg = panoptic_fpn_cfg(cfg)
        cfg.MODEL.SEM_SEG_HEAD.SUPERVISION, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "stuff", 0
    with pytest.raises(ValueError, match=f"SRM_ONLY_SHARE is {share}.*TRAIN_SRM_ONLY"):
        OANetTrainer(cfg)


def test_detectron2s_panoptic_fpn(train_cfg, few_scenes):
    """For a comparison on the same data. What only an OANet has is refused before the training."""
    cfg = panoptic_fpn_cfg(train_cfg)
    cfg.DATASETS.TEST, cfg.SOLVER.MAX_ITER = few_scenes[1:], 1
    cfg.TEST.ORDERS, cfg.TEST.AUG.ENABLED = ("score",), True
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, right = 0, ("stuff", (), False)
    keys = "MODEL.SEM_SEG_HEAD.SUPERVISION", "TEST.ORDERS", "TEST.AUG.ENABLED"
    for key, value in zip(keys, right):
        with pytest.raises(ValueError, match=f"{key} is .*PanopticFPN"):
            OANetTrainer(cfg)
        cfg.merge_from_list([key, value])
    trainer = trainer_of(cfg)
    trainer.train()
    assert 0 <= trainer.test(cfg, trainer.model)["panoptic_seg"]["PQ"] <= 100


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
    trainer, dtypes = trainer_of(cfg), set()
    layer = trainer.model.backbone.fpn_output2
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all(), name


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
