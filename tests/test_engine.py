import math
import os
import shutil

import pytest
import torch
import yaml

from oanet_d2.checkpoint import read_description
from oanet_d2.data.occlusion_scenes import CATEGORIES
from oanet_d2.engine import OANetTrainer
from tests.conftest import after_step, panoptic_fpn_cfg, trainer_of, training_cfg


def two_phases_cfg(dataset, folder):
    """Six iterations; in the last three the ranking head learns alone. A seed of chance."""
    cfg = training_cfg(dataset, folder, share="0.5")
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"  # pairs, whatever the network detects
    cfg.SOLVER.WEIGHT_DECAY, cfg.SEED = 0.1, -1
    return cfg


@pytest.fixture
def cfg(few_scenes, tmp_path):
    return two_phases_cfg(few_scenes[0], tmp_path / "out")


@pytest.fixture(scope="module")
def whole(few_scenes, tmp_path_factory):
    """A training: its config, its weights after some iterations, and what it has left before the last."""
    cfg, weights, early = two_phases_cfg(few_scenes[0], tmp_path_factory.mktemp("whole")), {}, []
    trainer = trainer_of(cfg)

    def look():
        weights[trainer.iter] = {k: x.clone() for k, x in trainer.model.state_dict().items()}
        early.extend(os.listdir(cfg.OUTPUT_DIR))

    trainer.register_hooks([after_step(i, look) for i in (0, 2, 5)])
    trainer.train()
    return cfg, weights, early


def assert_equal_weights(model, expected):
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_first_the_network_learns_then_only_the_ranking(whole):
    """The optimizer has momentum and weight decay. (SGD: see test_lazy.)"""
    _, weights, _ = whole
    for first, last, parts in (
        (0, 2, {"backbone", "proposal_generator", "roi_heads", "sem_seg_head"}),
        (2, 5, {"srm_head"}),
    ):
        changed = (x for x in weights[0] if not torch.equal(weights[first][x], weights[last][x]))
        assert {name.split(".")[0] for name in changed} == parts


def test_what_a_training_leaves(whole, tmp_path):
    """Nothing before its end. Another training starts from it."""
    (cfg, weights, early), final = whole, "model_final.safetensors"
    path = os.path.join(cfg.OUTPUT_DIR, final)
    assert final not in early and "model_0000003.pth" in early
    config, categories = read_description(path)
    assert yaml.safe_load(config) == yaml.safe_load(cfg.dump())
    known = ("id", "name", "isthing", "color")
    expected = [{key: c[key] for key in known} for c in CATEGORIES]
    assert sorted(categories, key=lambda c: c["id"]) == expected
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        assert f.read() == "model_final.pth"
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SEED = path, str(tmp_path), 7
    other = OANetTrainer(cfg)
    other.resume_or_load(resume=False)
    assert other.start_iter == 0 and other.checkpointer.new == []
    assert_equal_weights(other.model, weights[5])


@pytest.mark.parametrize("resumed_at", [2, 4])
def test_resumes_to_the_same_weights(whole, tmp_path, resumed_at):
    """
    In both phases, with another number of workers too. Only the checkpoint can tell the second training
    which images, augmentations and samples come next.
    """
    cfg, weights, _ = whole
    cfg, folder = cfg.clone(), tmp_path / "out"
    shutil.copytree(cfg.OUTPUT_DIR, folder)
    (folder / "last_checkpoint").write_text(f"model_{resumed_at - 1:07d}.pth")
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = str(folder), 1
    again = OANetTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == resumed_at
    again.train()
    assert_equal_weights(again.model, weights[5])


def test_a_training_that_fails_leaves_no_final_weights(cfg):
    cfg.SOLVER.MAX_ITER = 2
    trainer = trainer_of(cfg)
    trainer.register_hooks([after_step(0, lambda: 1 / 0)])
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


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_what_is_no_share_is_refused(cfg, share):
    cfg.SOLVER.SRM_ONLY_SHARE = share
    with pytest.raises(ValueError, match=f"SRM_ONLY_SHARE is {share}.*TRAIN_SRM_ONLY"):
        OANetTrainer(cfg)


def test_detectron2s_panoptic_fpn(cfg, few_scenes):
    """For a comparison on the same data. What only an OANet has is refused before the training."""
    cfg = panoptic_fpn_cfg(cfg)
    cfg.DATASETS.TEST, cfg.SOLVER.MAX_ITER = few_scenes[1:], 1
    cfg.TEST.ORDERS, cfg.TEST.AUG.ENABLED, cfg.MODEL.OANET.TRAIN_SRM_ONLY = ("score",), True, True
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0
    for key, right in {
        "MODEL.SEM_SEG_HEAD.SUPERVISION": "stuff",
        "MODEL.OANET.TRAIN_SRM_ONLY": False,
        "TEST.ORDERS": (),
        "TEST.AUG.ENABLED": False,
        "SOLVER.SRM_ONLY_SHARE": 0.0,
    }.items():
        with pytest.raises(ValueError, match=f"{key} is .*PanopticFPN"):
            OANetTrainer(cfg)
        cfg.merge_from_list([key, right])
    trainer = trainer_of(cfg)
    trainer.train()
    assert 0 <= trainer.storage.latest()["panoptic_seg/PQ"][0] <= 100


def test_trains_in_bfloat16_on_a_cpu(cfg):
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.MAX_ITER = True, 2  # one iteration of each phase
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
