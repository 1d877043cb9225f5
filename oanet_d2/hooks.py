"""The phases of a training, how it goes on after an interruption, and how it ends when it diverges."""

import logging
import os
from typing import Any, Dict, Sequence

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    ParamScheduler,
)
from PIL import Image

from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from .checkpoint import OANetCheckpointer, first_not_finite
from .data.training_stream import TrainingStream, derived_seed

__all__ = ["DataOrder", "DivergenceGuard", "TwoPhases"]

logger = logging.getLogger(__name__)

OF_STEPS = 2  # tells the random numbers of a step from those of a sample of the TrainingStream


def network_iterations(share: float, total: int, model: Any) -> int:
    """
    The number of iterations in which the network learns, at least one. In the others, at the end,
    the ranking head learns.

    Args:
        share: of these others in the total; 0 for a training with one phase.
        model: the model, or its class.

    Raises:
        ValueError: it is no share, or the model has no phases.
    """
    if not 0 <= share < 1 or (share > 0 and not hasattr(model, "set_phase")):
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(
            f"SOLVER.SRM_ONLY_SHARE is {share}; it must lie in [0, 1), and be 0 for a model without "
            f"a ranking head beside a network (the model is {name!r}). To train nothing but the "
            "ranking head, set MODEL.OANET.TRAIN_SRM_ONLY."
        )
    return max(1, total - round(share * total))


def two_phase_schedule(network: ParamScheduler, share: float) -> ParamScheduler:
    """
    A schedule of the network's learning rate over this share of the iterations, then half a cosine
    from the base learning rate to 0.
    """
    phases = [network, CosineParamScheduler(1, 0)]
    return CompositeParamScheduler(phases, [share, 1 - share], ["rescaled", "rescaled"])


class TwoPhases(HookBase):
    """
    First the network learns, without the ranking head. Then the ranking head learns alone, from a
    network that stands still, as it will in inference. (DistributedDataParallel must have been built
    while every parameter required a gradient, with `find_unused_parameters`.)
    """

    def __init__(self, model: Any, network_iterations: int):
        """
        Args:
            model: without DistributedDataParallel.
        """
        self.model = model
        self.network_iterations = network_iterations

    def before_step(self):
        phase = "network" if self.trainer.iter < self.network_iterations else "ranking"
        model = self.model
        if model.phase != phase:
            logger.info(f"Iteration {self.trainer.iter}: from here on, the {phase} learns.")
            model.set_phase(phase)
            if phase == "ranking" and comm.get_world_size() > 1:
                for buffer in model.buffers():  # the statistics that the checkpoints hold
                    torch.distributed.broadcast(buffer, 0)


class DataOrder(HookBase):
    """
    Makes everything random in a step depend on the seed, the step and the process alone, and keeps
    the seed in the checkpoints. So a resumed training sees and samples what it would have.
    """

    def __init__(self, stream: TrainingStream):
        self.stream = stream

    def before_train(self):
        self.stream.first_batch = self.trainer.start_iter

    def before_step(self):
        seed_all_rng(derived_seed(OF_STEPS, self.stream.seed, comm.get_rank(), self.trainer.iter))

    def state_dict(self) -> Dict:
        return {"seed": self.stream.seed}

    def load_state_dict(self, state_dict: Dict):
        self.stream.seed = state_dict["seed"]


class DivergenceGuard(HookBase):
    """
    Ends a training at the first loss that is NaN or infinite, before it reaches a weight, and keeps
    the batch. Every process looks at its own.
    """

    def __init__(self, checkpointer: OANetCheckpointer, image_format: str):
        """
        Args:
            checkpointer: of the model, without DistributedDataParallel.
            image_format: of the images in a batch.
        """
        self.checkpointer = checkpointer
        self.image_format = image_format
        self._batch: Sequence[Dict] = ()

    def before_train(self):
        model = self.checkpointer.model
        model.register_forward_pre_hook(self._remember)
        model.register_forward_hook(self._check)

    def _remember(self, model, inputs):
        self._batch = inputs[0]

    def _check(self, model, inputs, losses: Dict[str, torch.Tensor]):
        if model.training and not torch.as_tensor(sum(losses.values())).isfinite():
            bad = [f"{name} is {x.item()}" for name, x in losses.items() if not x.isfinite()]
            raise FloatingPointError(", ".join(bad) + ".")

    def explained(self, error: FloatingPointError) -> FloatingPointError:
        """
        Save the images of this step as the network saw them, and say what is known.

        Args:
            error: of this guard, or of Detectron2's proposal generator, which comes before the losses.
        """
        checkpointer = self.checkpointer
        name = f"iteration_{self.trainer.iter:07d}_rank_{comm.get_rank()}"
        folder = os.path.join(checkpointer.save_dir, "non_finite_loss", name)
        os.makedirs(folder, exist_ok=True)
        for i, x in enumerate(self._batch):
            if "image" in x:  # a training from annotations has none
                rgb = convert_image_to_rgb(x["image"].byte().permute(1, 2, 0), self.image_format)
                stem = os.path.splitext(os.path.basename(x["file_name"]))[0]
                Image.fromarray(rgb).save(os.path.join(folder, f"{i:02d}_{stem}.png"))
        weight = first_not_finite(checkpointer.model.named_parameters())
        spoiled = f" {weight} is not finite: an earlier step spoiled it." if weight else ""
        file_names = ", ".join(x["file_name"] for x in self._batch)
        return FloatingPointError(
            f"Iteration {self.trainer.iter}: {error} The batch ({file_names}) is in {folder}."
            f"{spoiled} The last checkpoint is {checkpointer.get_checkpoint_file() or 'none yet'}. A "
            "lower learning rate (SOLVER.BASE_LR), a longer warm-up (SOLVER.WARMUP_ITERS) or "
            "SOLVER.CLIP_GRADIENTS may help."
        )
