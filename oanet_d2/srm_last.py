"""
A training in two parts: first the network learns, without the ranking head, and then the ranking
head alone: it is evidence from a network that does not change any more, as at inference, that it
has to read.
"""

import logging
from typing import Callable

from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler
from torch import nn

from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import LRMultiplier

__all__ = ["SRMLast", "first_srm_only_iteration", "with_cosine_at_the_end"]

logger = logging.getLogger(__name__)


def first_srm_only_iteration(cfg) -> int:
    """
    Returns:
        the iteration from which on `cfg.SOLVER.SRM_ONLY_SHARE` has the ranking head learn alone;
        `cfg.SOLVER.MAX_ITER` if the training has no such parts, or nothing else learns anyway
        (`cfg.MODEL.OANET.TRAIN_SRM_ONLY`).

    Raises:
        ValueError: it is no share, or the model is not one that can do that.
    """
    share = cfg.SOLVER.SRM_ONLY_SHARE
    if not 0 <= share < 1:
        raise ValueError(
            f"SOLVER.SRM_ONLY_SHARE is {share}; it must lie in [0, 1), 0 for none. (To train nothing "
            "but the ranking head, set MODEL.OANET.TRAIN_SRM_ONLY.)"
        )
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if share > 0 and not hasattr(architecture, "learn_only"):
        raise ValueError(
            f"SOLVER.SRM_ONLY_SHARE is {share}, but MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE!r} has no ranking head that could learn alone; set it to 0."
        )
    if cfg.MODEL.OANET.TRAIN_SRM_ONLY:
        return cfg.SOLVER.MAX_ITER
    return cfg.SOLVER.MAX_ITER - round(share * cfg.SOLVER.MAX_ITER)


def with_cosine_at_the_end(scheduler: LRMultiplier, optimizer, cfg) -> LRMultiplier:
    """
    Args:
        scheduler: of the iterations before :func:`first_srm_only_iteration`.

    Returns:
        one of all iterations: after that one the learning rate begins anew and falls to 0 along
        half a cosine.
    """
    first, total = first_srm_only_iteration(cfg), cfg.SOLVER.MAX_ITER
    whole = CompositeParamScheduler(
        [scheduler._multiplier, CosineParamScheduler(1, 0)],
        lengths=[first / total, 1 - first / total],
        interval_scaling=["rescaled", "rescaled"],
    )
    return LRMultiplier(optimizer, whole, total)


class SRMLast(HookBase):
    """
    Has the network learn first and the ranking head last, from whichever iteration a training starts.
    """

    def __init__(self, first_iteration: int, distribute: Callable[[nn.Module], nn.Module]):
        """
        Args:
            first_iteration: see :func:`first_srm_only_iteration`.
            distribute: wraps a model for training in several processes, if there are several.
        """
        self.first_iteration = first_iteration
        self.distribute = distribute

    def before_step(self):
        model = self.trainer.checkpointer.model  # as it is without DistributedDataParallel
        part = "network" if self.trainer.iter < self.first_iteration else "srm"
        if model.learns == part:
            return
        logger.info(f"From iteration {self.trainer.iter} on only this learns: {part}.")
        model.learn_only(part)
        # DistributedDataParallel waits for the gradients of those that it saw when it was made.
        self.trainer._trainer.model = None
        self.trainer._trainer.model = self.distribute(model)
        # With a gradient, though of the step before, they would be changed once more.
        self.trainer.optimizer.zero_grad(set_to_none=True)
