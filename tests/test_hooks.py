import errno
import math
import os
import re

import cv2
import numpy as np
import pytest
import torch

from oanet_d2.checkpoint import CheckpointError
from tests.conftest import after_step, trainer_of


@pytest.mark.parametrize(
    "part, spoiled, words",
    [
        ("", ["loss_sem_seg"], "Iteration 4: loss_sem_seg is nan. "),
        # Detectron2's proposal generator raises an error before any loss.
        ("backbone", ["p2"], "Iteration 4: Predicted boxes or scores contain Inf/NaN. "),
    ],
)
def test_a_diverged_training_says_where_and_keeps_the_batch(train_cfg, part, spoiled, words):
    train_cfg.INPUT.RANDOM_FLIP = "none"
    trainer, weights = trainer_of(train_cfg), {}

    def spoil(module, inputs, output):
        broken = spoiled if trainer.iter == 4 else []
        return {k: v * math.nan if k in broken else v for k, v in output.items()}

    def copy():
        weights.update({k: v.clone() for k, v in trainer.model.named_parameters()})

    trainer.model.get_submodule(part).register_forward_hook(spoil)
    trainer.register_hooks([after_step(3, copy)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    folder = f"{train_cfg.OUTPUT_DIR}/non_finite_loss/iteration_0000004_rank_0"
    assert words in message and f"is in {folder}. The last checkpoint is " in message
    assert "model_0000003.pth" in message and "loss_mask" not in message  # that one was fine
    assert len(os.listdir(folder)) == 2
    for picture in os.listdir(folder):
        (file_name,) = re.findall(rf"[^ (]*{picture[3:-4]}.jpg", message)
        seen, original = cv2.imread(os.path.join(folder, picture)), cv2.imread(file_name)
        assert np.abs(seen.astype(int) - cv2.resize(original, seen.shape[1::-1])).mean() < 3
    for name, parameter in trainer.model.named_parameters():  # nothing of the step was kept
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize(
    "step, words",
    [
        (2, "sem_seg_head.predictor.bias is not finite: an earlier step"),
        (3, "model_0000003.pth is not saved: sem_seg_head.predictor.bias"),
    ],
)
def test_weights_that_are_not_finite_never_get_into_a_checkpoint(train_cfg, step, words):
    trainer = trainer_of(train_cfg)

    def spoil():
        trainer.model.sem_seg_head.predictor.bias.data[0] = math.inf

    trainer.register_hooks([after_step(step, spoil)])
    trainer._hooks.insert(0, trainer._hooks.pop())  # before the checkpoint of that step
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()
    with open(os.path.join(train_cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        assert f.read() == "model_0000001.pth"


def test_a_full_disk_is_what_the_error_says(train_cfg, monkeypatch):
    """Although the logs, which are written at the end, meet it as well."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        monkeypatch.setattr(torch, "save", full)
        monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", full)

    trainer = trainer_of(train_cfg)
    trainer.register_hooks([after_step(2, fill)])
    with pytest.raises(CheckpointError, match="model_0000003.pth cannot be written: .*No space"):
        trainer.train()
