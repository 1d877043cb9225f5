"""
The phases of a training, what it keeps to go on after an interruption, and what ends it when it
diverges.
"""

import logging
import math
import os
from typing import Dict, Sequence, Tuple

import torch
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler
from PIL import Image

from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from .checkpoint import first_not_finite
from .data.training_stream import TrainingStream, derived_seed
from .output_folder import OutputFolderError, config_differences, listed

__all__ = ["DataOrder", "DivergenceGuard", "RunConfig", "TwoPhases"]

logger = logging.getLogger(__name__)

OF_STEPS = 2  # tells the random numbers of a step from those of a sample of the TrainingStream


def network_iterations(cfg) -> int:
    """
    The number of iterations in which the network learns. `cfg.SOLVER.SRM_ONLY_SHARE` takes the others,
    at the end, for the ranking head. It is `cfg.SOLVER.MAX_ITER` for a training with one phase.

    Raises:
        ValueError: it is no share, or the model has no phases.
    """
    share = cfg.SOLVER.SRM_ONLY_SHARE
    if not 0 <= share < 1:
        raise ValueError(
            f"SOLVER.SRM_ONLY_SHARE is {share}; it must lie in [0, 1), 0 for one phase. (To train "
            "nothing but the ranking head, set MODEL.OANET.TRAIN_SRM_ONLY.)"
        )
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if share > 0 and not hasattr(architecture, "set_phase"):
        raise ValueError(
            f"SOLVER.SRM_ONLY_SHARE is {share}, but MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE!r} has no ranking head beside a network; set it to 0."
        )
    if cfg.MODEL.OANET.TRAIN_SRM_ONLY:
        return cfg.SOLVER.MAX_ITER
    return cfg.SOLVER.MAX_ITER - round(share * cfg.SOLVER.MAX_ITER)


def build_two_phase_lr_scheduler(cfg, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """
    Detectron2's schedule over :func:`network_iterations`, then half a cosine from SOLVER.BASE_LR to 0.
    """
    first, total = network_iterations(cfg), cfg.SOLVER.MAX_ITER
    cosine = CosineParamScheduler(1, 0)
    if first == 0:
        return LRMultiplier(optimizer, cosine, total)
    network = cfg.clone()
    network.defrost()
    network.SOLVER.MAX_ITER = first
    network.SOLVER.STEPS = tuple(x for x in cfg.SOLVER.STEPS if x < first)
    schedule = build_lr_scheduler(network, optimizer)._multiplier
    lengths = [first / total, 1 - first / total]
    both = CompositeParamScheduler([schedule, cosine], lengths, ["rescaled", "rescaled"])
    return LRMultiplier(optimizer, both, total)


class TwoPhases(HookBase):
    """
    First the network learns, without the ranking head. Then the ranking head learns alone, from a
    network that stands still, as it will in inference.

    DistributedDataParallel is not told. It must have been built while every parameter required a
    gradient, with `find_unused_parameters`.
    """

    def __init__(self, network_iterations: int):
        self.network_iterations = network_iterations

    def before_step(self):
        phase = "network" if self.trainer.iter < self.network_iterations else "ranking"
        model = self.trainer.checkpointer.model  # without DistributedDataParallel
        if model.phase != phase:
            logger.info(f"From iteration {self.trainer.iter} on, this learns: {phase}.")
            model.set_phase(phase)
            if phase == "ranking" and comm.get_world_size() > 1:
                for buffer in model.buffers():  # the statistics that the checkpoints hold
                    torch.distributed.broadcast(buffer, 0)


class RunConfig(HookBase):
    """
    Keeps the config in the checkpoints, and compares it when a training is resumed.
    """

    def state_dict(self) -> Dict:
        return {"yaml": self.trainer.cfg.dump()}

    def load_state_dict(self, state_dict: Dict):
        """
        Raises:
            OutputFolderError: the checkpoint is of another model or optimizer; the message names the
                keys that differ.
        """
        changed = config_differences(state_dict["yaml"], self.trainer.cfg.dump())
        checkpointer = self.trainer.checkpointer
        left_out = [name for name, *_ in checkpointer.left_out]
        misfits = [*checkpointer.new, *left_out, *checkpointer.unused]
        if misfits or "SOLVER.OPTIMIZER" in changed:
            what = f"{len(misfits)} tensors, such as {misfits[0]}," if misfits else "the optimizer"
            raise OutputFolderError(
                f"The training in {self.trainer.cfg.OUTPUT_DIR!r} cannot be resumed with this config: "
                f"{what} would differ. {listed(changed) or 'The code is another one'}. Resume with the "
                "values there, or use another OUTPUT_DIR and the checkpoint as MODEL.WEIGHTS."
            )
        if changed:
            logger.warning(
                f"Resumed with another config than before: {listed(changed)}. SEED, learning rate, "
                "momentum and weight decay stay as they are in the checkpoint."
            )


class DataOrder(HookBase):
    """
    Makes everything random in a step depend on the seed, the step and the process alone, and keeps
    the seed and the place in the data in the checkpoints. A resumed training therefore sees the
    images, augmentations and samples that it would have seen. (With another SOLVER.IMS_PER_BATCH it
    goes on at about the same image.)
    """

    def __init__(self, stream: TrainingStream, images_per_step: int):
        self.stream = stream
        self.images_per_step = images_per_step
        self.seed = stream.seed
        self.images = 0  # seen so far, by all processes

    def before_train(self):
        self.stream.seed = self.seed
        self.stream.first_batch = self.images // self.images_per_step

    def before_step(self):
        seed_all_rng(derived_seed(OF_STEPS, self.seed, comm.get_rank(), self.trainer.iter))

    def after_step(self):
        self.images += self.images_per_step

    def state_dict(self) -> Dict:
        return {"seed": self.seed, "images": self.images}

    def load_state_dict(self, state_dict: Dict):
        self.seed, self.images = state_dict["seed"], state_dict["images"]


class DivergenceGuard(HookBase):
    """
    Ends a training at the first loss that is NaN or infinite, before it reaches a weight, and keeps
    the batch. Every process looks at its own losses, and at those of the model itself: it does not
    matter what wraps the model.
    """

    _handles: Tuple = ()
    _batch: Sequence[Dict] = ()
    _files_before = ""

    def before_train(self):
        model = self.trainer.checkpointer.model
        self._handles = (
            model.register_forward_pre_hook(self._keep),
            model.register_forward_hook(self._check),
        )

    def after_train(self):
        for handle in self._handles:
            handle.remove()

    def _keep(self, model, inputs):
        if model.training:
            self._files_before = _file_names(self._batch)
            self._batch = inputs[0]

    def _check(self, model, inputs, losses: Dict[str, torch.Tensor]):
        if model.training and not torch.isfinite(torch.as_tensor(sum(losses.values()))):
            values = {name: loss.item() for name, loss in losses.items()}
            bad = {name: x for name, x in values.items() if not math.isfinite(x)} or values
            raise FloatingPointError(", ".join(f"{name} is {x}" for name, x in bad.items()) + ".")

    def explained(self, error: FloatingPointError) -> FloatingPointError:
        """
        Save the images of this step as the network saw them, and say what is known.

        Args:
            error: raised in the step, by this guard or by Detectron2, whose proposal generator may
                meet infinite numbers before there is a loss.
        """
        trainer = self.trainer
        name = f"iteration_{trainer.iter:07d}_rank_{comm.get_rank()}"
        folder = os.path.join(trainer.cfg.OUTPUT_DIR, "non_finite_loss", name)
        try:
            _save_images(folder, self._batch, trainer.cfg.INPUT.FORMAT)
            kept = f"is in {folder}"
        except OSError as failed:
            kept = f"could not be saved: {failed}"
        cause = "The weights are finite."
        weight = first_not_finite(trainer.checkpointer.model.named_parameters())
        if weight is not None:
            before = self._files_before or "images that this run has not seen"
            cause = f"{weight} is not finite: the step before spoiled it, with {before}."
        return FloatingPointError(
            f"Iteration {trainer.iter}: {error} The batch ({_file_names(self._batch)}) {kept}. {cause} "
            f"The last checkpoint is {trainer.checkpointer.get_checkpoint_file() or 'none yet'}. A lower "
            "SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help."
        )


def _save_images(folder: str, batch: Sequence[Dict], image_format: str) -> None:
    os.makedirs(folder, exist_ok=True)
    for i, x in enumerate(batch):
        if "image" in x:
            rgb = x["image"].flip(0) if image_format == "BGR" else x["image"]
            name = os.path.splitext(os.path.basename(x.get("file_name", "")))[0]
            picture = Image.fromarray(rgb.byte().permute(1, 2, 0).cpu().contiguous().numpy())
            picture.save(os.path.join(folder, f"{i:02d}_{name}.png"))


def _file_names(batch: Sequence[Dict]) -> str:
    return ", ".join(x.get("file_name", "?") for x in batch)
