"""
What a training needs to survive: what it keeps in its checkpoints to go on as if nothing had
happened, and what stops it before a bad step is kept.
"""

import json
import logging
import math
import os
from typing import Dict, List, Optional

import cv2
import torch

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from .checkpoint import first_not_finite
from .data.training_stream import TrainingStream, derived_seed
from .modeling.pair_memory import PairMemory
from .output_folder import OutputFolderError, differences, flat_config, listed
from .whole_files import whole_file

__all__ = ["DataOrder", "NonFiniteLoss", "RememberedPairs", "RunConfig"]

logger = logging.getLogger(__name__)

# What tells the random numbers of a step from those of a sample of the TrainingStream.
_OF_STEPS = 2
# Of these the checkpoint's value stays when a training is resumed.
_KEPT_BY_OPTIMIZER = (
    *("SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
    *("SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"),
    *("SEED", "MODEL.WEIGHTS"),
)


class RunConfig(HookBase):
    """
    Keeps the config in the checkpoints, and compares it when a training is resumed.
    """

    def state_dict(self) -> Dict:
        return {"yaml": self.trainer.cfg.dump()}

    def load_state_dict(self, state_dict: Dict):
        """
        Raises:
            OutputFolderError: the model or the optimizer is another one; the message names the
                keys that differ.
        """
        there, here = flat_config(state_dict["yaml"]), flat_config(self.trainer.cfg.dump())
        changed = differences(there, here)
        checkpointer = self.trainer.checkpointer
        misfits = [
            *checkpointer.new,
            *(name for name, *_ in checkpointer.left_out),
            *checkpointer.unused,
        ]
        folder = self.trainer.cfg.OUTPUT_DIR
        if misfits or "SOLVER.OPTIMIZER" in changed:
            what = f"{len(misfits)} tensors, such as {misfits[0]}" if misfits else "the optimizer"
            raise OutputFolderError(
                f"The training in {folder!r} cannot be resumed with this config: {what} would not "
                f"be the same. {listed(changed) or 'The configs are the same, the code is not'}. "
                "Resume with those values, or start a new training in another OUTPUT_DIR, with the "
                "checkpoint as MODEL.WEIGHTS."
            )
        if changed:
            logger.warning(f"Resumed with another config than before: {listed(changed)}.")
            kept = [key for key in _KEPT_BY_OPTIMIZER if key in changed]
            if kept:
                logger.warning(
                    f"The checkpoint's {', '.join(kept)} stays: it is resumed with the optimizer "
                    "and the order of the data."
                )


class DataOrder(HookBase):
    """
    Makes everything that is random in a step a function of the seed, the step and the process, and
    keeps in the checkpoints the seed and how far the training is. A resumed training therefore goes
    on with the images, augmentations and samples that it would have had.

    With another number of images a step than before, it goes on about where it was.
    """

    def __init__(self, stream: TrainingStream, images_per_step: int):
        """
        Args:
            stream: the training data of this process.
            images_per_step: of all processes.
        """
        self.stream = stream
        self.images_per_step = images_per_step
        self.seed = stream.seed
        self.images: Optional[int] = None  # that the steps before have seen; None: not known yet

    def before_train(self):
        if self.images is None:
            self.images = self.trainer.start_iter * self.images_per_step
        # A process on another machine may have no checkpoint of its own.
        self.seed, self.images = comm.all_gather((self.seed, self.images))[0]
        self.stream.seed = self.seed
        self.stream.first_batch = self.images // self.images_per_step

    def before_step(self):
        seed_all_rng(derived_seed(_OF_STEPS, self.seed, comm.get_rank(), self.trainer.iter))

    def after_step(self):
        assert self.images is not None  # known since before_train
        self.images += self.images_per_step

    def state_dict(self) -> Dict:
        return {"seed": self.seed, "images": self.images}

    def load_state_dict(self, state_dict: Dict):
        self.seed, self.images = state_dict["seed"], state_dict["images"]


class RememberedPairs(HookBase):
    """
    Keeps in the checkpoints the pairs that a ranking head learns from again. In a training of several
    processes these are the first one's, and all go on from them.
    """

    def __init__(self, memory: PairMemory):
        self.memory = memory

    def state_dict(self) -> Dict:
        return self.memory.state_dict()

    def load_state_dict(self, state_dict: Dict):
        device = next(self.trainer.checkpointer.model.parameters()).device
        self.memory.load_state_dict(state_dict, device)


class NonFiniteLoss(HookBase):
    """
    Ends the training at the first loss that is NaN or infinite, before it reaches a weight, and
    keeps the batch: its images as the network saw them and a JSON beside them.
    """

    def __init__(self, folder: str, image_format: str):
        """
        Args:
            folder: where a folder for the batch is made.
            image_format: `cfg.INPUT.FORMAT`.
        """
        self.folder = folder
        self.image_format = image_format
        self._handle = None
        self._files_before: List[str] = []

    def before_train(self):
        self._handle = self.trainer.model.register_forward_hook(self._check)

    def after_train(self):
        if self._handle is not None:
            self._handle.remove()

    def _check(self, model, inputs, losses: Dict[str, torch.Tensor]):
        if not model.training:
            return
        (batch,) = inputs
        files = [x.get("file_name", "?") for x in batch]
        if torch.isfinite(torch.as_tensor(sum(losses.values()))):
            self._files_before = files
            return
        values = {name: loss.item() for name, loss in losses.items()}
        bad = {name: x for name, x in values.items() if not math.isfinite(x)} or values
        iteration, rank = self.trainer.iter, comm.get_rank()
        name = f"iteration_{iteration:07d}" + f"_rank_{rank}" * (comm.get_world_size() > 1)
        folder = os.path.join(self.folder, "non_finite_loss", name)
        try:
            save_batch(folder, batch, self.image_format, iteration, values)
            saved = f"as the network saw it, is in {folder}"
        except OSError as error:
            saved = f"could not be saved: {error}"
        tensor = first_not_finite(self.trainer.checkpointer.model)
        if tensor is None:
            cause = "The weights are finite. It is this batch, or what the network makes of it."
        else:
            cause = (
                f"The weights are not finite either, {tensor} for one: the step before has made "
                f"them so, with {', '.join(self._files_before) or 'what it was given'}."
            )
        raise FloatingPointError(
            f"Iteration {iteration}: {', '.join(f'{k} is {v}' for k, v in bad.items())}. The batch "
            f"({', '.join(files)}), {saved}. {cause} Nothing of this step was kept; the last "
            f"checkpoint is {self.trainer.checkpointer.get_checkpoint_file() or 'none yet'}. A "
            "lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help."
        )


def save_batch(
    folder: str, batch: List[Dict], image_format: str, iteration: int, losses: Dict[str, float]
):
    """
    Write a training batch for a person to look at: its images, and batch.json.

    Args:
        folder: made if it is not there.
        batch: training inputs, "image" (3, H, W) uint8 where images are read.
        image_format: "BGR" or "RGB".
        iteration, losses: the JSON holds them; losses that are not finite become strings.

    Raises:
        OSError: it cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    images = []
    for i, x in enumerate(batch):
        file_name = x.get("file_name", "")
        entry = {"file_name": file_name, "image_id": x.get("image_id")}
        if "image" in x:
            stem = os.path.splitext(os.path.basename(file_name))[0]
            picture = x["image"].permute(1, 2, 0).cpu().numpy()
            entry["as_seen"] = f"{i:02d}_{stem}.png"
            # cv2 writes BGR, and says by False what went wrong.
            picture = picture if image_format == "BGR" else picture[:, :, ::-1]
            if not cv2.imwrite(os.path.join(folder, entry["as_seen"]), picture):
                raise OSError(f"cannot write {entry['as_seen']} into {folder}")
        if "instances" in x:
            entry["size"] = list(x["instances"].image_size)
            entry["classes"] = x["instances"].gt_classes.tolist()
            entry["boxes"] = x["instances"].gt_boxes.tensor.tolist()
        images.append(entry)
    written = {k: v if math.isfinite(v) else str(v) for k, v in losses.items()}
    with whole_file(os.path.join(folder, "batch.json")) as f:
        json.dump({"iteration": iteration, "losses": written, "images": images}, f, indent=2)
