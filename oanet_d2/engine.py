import logging
import os
import time
import weakref
from typing import Dict, Optional

import torch

from detectron2.data import build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .checkpoint import CheckpointError, OANetCheckpointer
from .data import PanopticDatasetMapper, complete_config
from .data.builtin import occlusion_scenes_root
from .data.occlusion_scenes import ensure_split
from .data.register import require_files
from .data.training_stream import TrainingStream, build_train_loader
from .hooks import (
    DataOrder,
    DivergenceGuard,
    RunConfig,
    TrainingClock,
    TwoPhases,
    build_two_phase_lr_scheduler,
    network_iterations,
)

__all__ = ["OANetTrainer", "prepare_datasets", "report_orderings", "training_seconds"]

logger = logging.getLogger(__name__)


class BFloat16Trainer(SimpleTrainer):
    """
    Mixed precision where there is no CUDA. (Detectron2's :class:`AMPTrainer` asks for CUDA.) The range
    of bfloat16 needs no scaling of gradients.
    """

    def run_step(self):
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16):
            losses = self.model(data)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class OANetTrainer(DefaultTrainer):
    """
    Detectron2's trainer with OANet's mapper, evaluators, checkpointer and phases. Several processes
    can train on CPUs as well.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (CfgNode): the config of the training.

        Raises:
            ValueError: the config is wrong, or a file of its datasets is missing.
        """
        # DefaultTrainer.__init__ asks for CUDA in several processes and in mixed precision.
        super(DefaultTrainer, self).__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = cfg.clone()
        cfg.defrost()
        complete_config(cfg)
        cfg.freeze()
        reads_images = cfg.MODEL.META_ARCHITECTURE != "SRMFromAnnotations"
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):  # the latter are read at the end
            require_files(name, images=reads_images)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        on_cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"

        # As DefaultTrainer does it, in its order.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp_args = {"broadcast_buffers": False}
        # Each phase leaves the parameters of the other one without a gradient.
        ddp_args["find_unused_parameters"] = network_iterations(cfg) < cfg.SOLVER.MAX_ITER
        if not on_cuda:
            ddp_args["device_ids"] = None
        model = create_ddp_model(model, **ddp_args)
        trainer_class = SimpleTrainer
        if cfg.SOLVER.AMP.ENABLED:
            trainer_class = AMPTrainer if on_cuda else BFloat16Trainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = OANetCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self):
        self.guard = DivergenceGuard()
        ours = [RunConfig(), self.guard, TrainingClock()]
        stream = getattr(self.data_loader, "dataset", None)
        if isinstance(stream, TrainingStream):  # a subclass may build another loader
            ours.append(DataOrder(stream, self.cfg.SOLVER.IMS_PER_BATCH))
        first_phase = network_iterations(self.cfg)
        if first_phase < self.max_iter:
            ours.append(TwoPhases(first_phase))
        reports = comm.is_main_process() and self.cfg.TEST.ORDERS
        return [*ours, *super().build_hooks(), OrderReport() if reports else None]

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:
            raise self.guard.explained(error) from error

    def resume_or_load(self, resume=True):
        """
        As :meth:`DefaultTrainer.resume_or_load`.

        Raises:
            CheckpointError: not every process finds the checkpoint to resume from.
            OutputFolderError: it is of another model or optimizer, see :class:`RunConfig`.
        """
        super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise CheckpointError(
                f"The processes would start at the iterations {starts}: not all of them find the "
                f"last checkpoint in {self.cfg.OUTPUT_DIR}. Every machine needs that folder."
            )

    def after_train(self):
        finished = self.iter >= self.max_iter
        try:
            super().after_train()
        except Exception as error:
            if finished:
                raise
            # The user has to know what ended the training, and that comes next.
            logger.warning(f"After that error, a hook failed too: {error}")

    @classmethod
    def build_optimizer(cls, cfg, model):
        """
        The optimizer that `cfg.SOLVER.OPTIMIZER` names, with Detectron2's parameter groups.
        """
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "ADAMW":
            raise ValueError(
                f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; it must be 'SGD' or 'ADAMW'."
            )
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        # Not fused: with a GradScaler that unscales within the step, after the gradients are clipped.
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        if network_iterations(cfg) < cfg.SOLVER.MAX_ITER:
            return build_two_phase_lr_scheduler(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, PanopticDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = PanopticDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
