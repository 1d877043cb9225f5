import errno
import math
import os

import cv2
import numpy as np
import pytest
import torch

from oanet_d2.checkpoint import CheckpointError
from tests.conftest import AfterStep, trainer_of


def break_semantic_head(trainer, monkeypatch):
    """From iteration 4 on its loss is NaN."""
    head = trainer.model.sem_seg_head
    losses = head.losses

    def broken(*args):
        factor = math.nan if trainer.iter == 4 else 1
        return {k: v * factor for k, v in losses(*args).items()}

    monkeypatch.setattr(head, "losses", broken)


def break_proposal_generator(trainer, monkeypatch):
    """In iteration 4 it meets infinite numbers, and Detectron2 raises an error before any loss."""
    backbone = trainer.model.backbone

    def spoil(module, inputs, features):
        return {k: v * (math.inf if trainer.iter == 4 else 1) for k, v in features.items()}

    backbone.register_forward_hook(spoil)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (break_semantic_head, "Iteration 4: loss_sem_seg is nan."),
        (break_proposal_generator, "Iteration 4: Predicted boxes or scores contain Inf/NaN."),
    ],
)
def test_a_diverged_training_says_where_and_keeps_the_batch(train_cfg, monkeypatch, spoil, words):
    train_cfg.INPUT.RANDOM_FLIP = "none"
    trainer, weights = trainer_of(train_cfg), {}
    spoil(trainer, monkeypatch)

    def copy():
        weights.update({k: v.clone() for k, v in trainer.model.named_parameters()})

    trainer.register_hooks([AfterStep(3, copy)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    folder = os.path.join(train_cfg.OUTPUT_DIR, "non_finite_loss", "iteration_0000004_rank_0")
    for text in (words, folder, "The weights are finite.", "model_0000003.pth"):
        assert text in message
    assert "loss_mask" not in message  # that one was fine
    pictures = sorted(os.listdir(folder))
    assert len(pictures) == 2
    for picture in pictures:
        stem = os.path.splitext(picture[3:])[0]
        (file_name,) = (x.strip("(),") for x in message.split(" ") if f"{stem}.jpg" in x)
        seen, original = cv2.imread(os.path.join(folder, picture)), cv2.imread(file_name)
        assert np.abs(seen.astype(int) - cv2.resize(original, seen.shape[1::-1])).mean() < 3
    for name, parameter in trainer.model.named_parameters():  # nothing of the step was kept
        assert torch.equal(parameter, weights[name]), name
    checkpoints = sorted(x for x in os.listdir(train_cfg.OUTPUT_DIR) if x.endswith(".pth"))
    assert checkpoints == ["model_0000001.pth", "model_0000003.pth"]


def test_a_learning_rate_that_is_too_high(train_cfg):
    """Whoever notices first, Detectron2 or the guard."""
    solver = train_cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WARMUP_ITERS, solver.MAX_ITER = "SGD", 1000.0, 0, 25
    solver.CLIP_GRADIENTS.ENABLED = False
    with pytest.raises(FloatingPointError, match="Iteration .* The batch .*jpg.* is in .*BASE_LR"):
        trainer_of(train_cfg).train()


def test_weights_that_are_not_finite(train_cfg):
    """The batch before is to blame then; and they never get into a checkpoint."""
    trainer = trainer_of(train_cfg)

    def spoil():
        trainer.model.sem_seg_head.predictor.bias.data[0] = math.inf

    trainer.register_hooks([AfterStep(2, spoil)])
    words = "sem_seg_head.predictor.bias is not finite: the step before .*jpg, .*jpg"
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()

    trainer = trainer_of(train_cfg)
    trainer.register_hooks([AfterStep(3, spoil)])
    trainer._hooks.insert(0, trainer._hooks.pop())  # before the checkpoint of that step
    with pytest.raises(
        FloatingPointError, match="model_0000003.pth is not saved: sem_seg_head.pre"
    ):
        trainer.train()
    with open(os.path.join(train_cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        assert f.read() == "model_0000001.pth"


def test_a_full_disk_is_what_the_error_says(train_cfg, monkeypatch):
    """Although the logs, which are written at the end, meet it as well."""
    trainer = trainer_of(train_cfg)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        monkeypatch.setattr(torch, "save", full)
        monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", full)

    trainer.register_hooks([AfterStep(2, fill)])
    with pytest.raises(CheckpointError, match="model_0000003.pth cannot be written: .*No space"):
        trainer.train()
    again = trainer_of(train_cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
