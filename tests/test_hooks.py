import errno
import json
import math
import os

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng

from oanet_d2.checkpoint import CheckpointError
from oanet_d2.engine import OANetTrainer
from tests.conftest import AfterStep, trainer_of


def test_stops_at_a_loss_that_is_nan(train_cfg, monkeypatch):
    train_cfg.INPUT.RANDOM_FLIP = "none"
    trainer = trainer_of(train_cfg)
    head = trainer.model.sem_seg_head
    losses, weights = head.losses, {}

    def broken(*args):
        if trainer.iter == 4:
            weights.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
        factor = math.nan if trainer.iter == 4 else 1
        return {k: v * factor for k, v in losses(*args).items()}

    monkeypatch.setattr(head, "losses", broken)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    folder = os.path.join(train_cfg.OUTPUT_DIR, "non_finite_loss", "iteration_0000004")
    with open(os.path.join(folder, "batch.json")) as f:
        batch = json.load(f)
    for text in ("Iteration 4: loss_sem_seg is nan.", folder, "The weights are finite."):
        assert text in str(error.value)
    assert "loss_mask" not in str(error.value)  # that one was fine
    assert batch["iteration"] == 4 and batch["losses"]["loss_sem_seg"] == "nan"
    assert batch["losses"]["loss_mask"] > 0
    assert len(batch["images"]) == 2
    of_name = {x["file_name"]: x for x in DatasetCatalog.get(train_cfg.DATASETS.TRAIN[0])}
    for image in batch["images"]:
        assert image["file_name"] in str(error.value)
        seen = cv2.imread(os.path.join(folder, image["as_seen"]))
        shown = cv2.resize(cv2.imread(image["file_name"]), seen.shape[1::-1])
        assert np.abs(seen.astype(int) - shown).mean() < 3
        assert len(image["boxes"]) == len(of_name[image["file_name"]]["annotations"])
    for name, parameter in trainer.model.named_parameters():  # nothing of the step was kept
        assert torch.equal(parameter, weights[name]), name
    names = sorted(x for x in os.listdir(train_cfg.OUTPUT_DIR) if x.endswith(".pth"))
    assert names == ["model_0000001.pth", "model_0000003.pth"]
    assert "model_0000003.pth" in str(error.value)


def test_weights_that_are_not_finite(train_cfg):
    """The batch before is to blame then; and they never get into a checkpoint."""
    trainer = trainer_of(train_cfg)

    def spoil():
        trainer.model.srm_head.predictor.bias.data[0] = math.inf

    trainer.register_hooks([AfterStep(2, spoil)])
    with pytest.raises(FloatingPointError, match="srm_head.predictor.bias for one: the step befor"):
        trainer.train()

    trainer = trainer_of(train_cfg)
    trainer.register_hooks([AfterStep(3, spoil)])
    trainer._hooks.insert(0, trainer._hooks.pop())  # before the checkpoint of that step
    with pytest.raises(FloatingPointError, match="model_0000003.pth is not saved: srm_head.pred"):
        trainer.train()
    with open(os.path.join(train_cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        assert f.read() == "model_0000001.pth"


def test_a_full_disk_is_what_the_error_says(train_cfg, monkeypatch):
    """Although the logs, which are written at the end, meet it as well."""
    trainer = trainer_of(train_cfg)
    save = torch.save

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        monkeypatch.setattr(torch, "save", full)
        monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", full)

    trainer.register_hooks([AfterStep(2, fill)])
    with pytest.raises(CheckpointError, match="model_0000003.pth cannot be written: .*No space"):
        trainer.train()
    monkeypatch.setattr(torch, "save", save)
    again = trainer_of(train_cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2


def test_resumes_to_the_bit(train_cfg):
    """
    Also with a seed of chance, and another number of workers. Only what the first part kept can
    tell the second one which images, augmentations and samples are next.
    """
    train_cfg.SEED = -1
    whole = trainer_of(train_cfg)
    whole.train()
    folder = train_cfg.OUTPUT_DIR
    with open(os.path.join(folder, "last_checkpoint"), "w") as f:
        f.write("model_0000001.pth")
    train_cfg.DATALOADER.NUM_WORKERS = 2
    seed_all_rng(2)
    again = OANetTrainer(train_cfg)
    order = next(h for h in again._hooks if type(h).__name__ == "DataOrder")
    other = order.seed
    again.resume_or_load(resume=True)
    assert again.start_iter == 2 and order.seed != other and order.images == 4
    again.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_tensorboard(train_cfg, few_scenes):
    """Every loss, the ranking's own scalars, and pictures at each evaluation."""
    train_cfg.DATASETS.TEST = (few_scenes[1],)
    train_cfg.TEST.EVAL_PERIOD, train_cfg.TEST.TENSORBOARD_PICTURES = 12, 2
    train_cfg.SOLVER.MAX_ITER = 21
    train_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    trainer_of(train_cfg).train()
    events = EventAccumulator(train_cfg.OUTPUT_DIR, size_guidance={"images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    losses = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    losses |= {"loss_sem_seg", "loss_srm", "loss_srm_pairs", "total_loss"}
    ours = {"srm/contested_cells", "srm/map_accuracy", "srm/pair_accuracy"}
    assert losses | ours <= scalars
    for name in ours:
        (event,) = events.Scalars(name)
        assert event.step == 19 and 0 <= event.value <= 1
    assert set(events.Tags()["images"]) == {f"{few_scenes[1]}/{i}" for i in range(2)}
    for tag in events.Tags()["images"]:
        shown = events.Images(tag)
        assert [x.step for x in shown] == [11, 21]
        picture = cv2.imdecode(np.frombuffer(shown[0].encoded_image_string, np.uint8), 1)
        assert picture.shape == (480 + 34, 3 * 480 + 2 * 6, 3) and picture.std() > 20
