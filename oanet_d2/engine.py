import logging
import os
import time
from functools import partial
from typing import Dict, Optional
from unittest import mock

import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import has_event_storage

from .checkpoint import CheckpointError, OANetCheckpointer
from .data import PanopticDatasetMapper, complete_config
from .data.builtin import occlusion_scenes_root
from .data.occlusion_scenes import ensure_split
from .data.register import require_files
from .data.training_stream import TrainingStream, build_train_loader
from .evaluation import (
    OrderingEvaluator,
    PanopticEvaluator,
    PanopticPictures,
    ReportRecorder,
    orderings_of,
    orderings_table,
    write_orderings,
)
from .evaluation.report_data import FOLDER as REPORT_FOLDER
from .hooks import DataOrder, NonFiniteLoss, RememberedPairs, RunConfig
from .modeling import OANet, PairwiseRankingHead
from .output_folder import check_free_space
from .report import write_report
from .srm_last import SRMLast, first_srm_only_iteration, with_cosine_at_the_end
from .visualization import OrderPictures
from .whole_files import drop_unfinished_line

__all__ = [
    "OANetTrainer",
    "prepare_datasets",
    "report_orderings",
    "training_seconds",
]

logger = logging.getLogger(__name__)


class OANetTrainer(DefaultTrainer):
    """
    Detectron2's trainer with OANet's mapper and evaluators.
    """

    checkpointer: DetectionCheckpointer

    def __init__(self, cfg):
        cfg = cfg.clone()
        cfg.defrost()
        complete_config(cfg)
        cfg.freeze()
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):  # the latter would be missed late
            require_files(name, images=cfg.INPUT.READ_IMAGE)
        self.distribute = partial(create_ddp_model, broadcast_buffers=False)
        if cfg.MODEL.DEVICE != "cpu":
            super().__init__(cfg)
            return
        architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        if cfg.SOLVER.AMP.ENABLED and not issubclass(architecture, OANet):
            raise ValueError(
                "SOLVER.AMP.ENABLED is True, but on a CPU only MODEL.META_ARCHITECTURE 'OANet' trains "
                f"in mixed precision, not {cfg.MODEL.META_ARCHITECTURE!r}; set it to False."
            )
        # DefaultTrainer gives DistributedDataParallel `device_ids`, which it refuses on CPU, and
        # its trainer of mixed precision wants a GPU; on a CPU the model sees to that.
        self.distribute = partial(self.distribute, device_ids=None)
        for_cpu = {"create_ddp_model": self.distribute, "AMPTrainer": SimpleTrainer}
        with mock.patch.multiple("detectron2.engine.defaults", **for_cpu):
            super().__init__(cfg)

    def build_hooks(self):
        # DefaultTrainer made its own checkpointer; the hooks that follow hold on to this one.
        self.checkpointer = OANetCheckpointer(
            self.checkpointer.model,
            self.cfg.OUTPUT_DIR,
            allow_pickle=self.cfg.MODEL.ALLOW_PICKLE,
            **self.checkpointer.checkpointables,
        )
        hooks = [RunConfig(), NonFiniteLoss(self.cfg.OUTPUT_DIR, self.cfg.INPUT.FORMAT)]
        stream = getattr(self.data_loader, "dataset", None)
        if isinstance(stream, TrainingStream):  # not if a subclass builds another loader
            hooks.append(DataOrder(stream, self.cfg.SOLVER.IMS_PER_BATCH))
        srm_head = getattr(self.checkpointer.model, "srm_head", None)
        if isinstance(srm_head, PairwiseRankingHead):
            hooks.append(RememberedPairs(srm_head.memory))
        first_alone = first_srm_only_iteration(self.cfg)
        if first_alone < self.cfg.SOLVER.MAX_ITER:
            hooks.append(SRMLast(first_alone, self.distribute))
        hooks += [TrainingClock(), *super().build_hooks()]
        if comm.is_main_process() and self.cfg.TEST.ORDERS:
            hooks.append(OrderingReport())
        return hooks

    def build_writers(self):
        # which append to it, whatever ended the training before
        drop_unfinished_line(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
        return super().build_writers()

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
                f"last checkpoint in {self.cfg.OUTPUT_DIR}. Every machine needs that folder, "
                "shared or copied."
            )

    def train(self):
        """
        As :meth:`DefaultTrainer.train`.

        Raises:
            OutputFolderError: there is no room for a checkpoint.
        """
        if comm.is_main_process():
            check_free_space(self.cfg.OUTPUT_DIR, self.model, self.optimizer)
        return super().train()

    def after_train(self):
        finished = self.iter >= self.max_iter
        try:
            super().after_train()
        except Exception as error:
            if finished:
                raise
            # What ended the training is what the user has to know.
            logger.warning(f"After that error, writing what was left failed too: {error}")

    @classmethod
    def build_optimizer(cls, cfg, model):
        """
        The optimizer that `cfg.SOLVER.OPTIMIZER` names, with Detectron2's parameter groups.
        """
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER == "ADAMW":
            params = get_default_optimizer_params(
                model,
                base_lr=cfg.SOLVER.BASE_LR,
                weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
                bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
                weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            )
            # One kernel for all parameters, where PyTorch has it for CPUs too: looping over them
            # takes a twelfth of the demo's training step.
            fused = {"fused": True} if torch.__version__ >= "2.4" else {}
            return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
                params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, **fused
            )
        raise ValueError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; it must be 'SGD' or 'ADAMW'."
        )

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """
        Detectron2's, of the iterations in which the whole network learns; see
        :func:`with_cosine_at_the_end`.
        """
        first = first_srm_only_iteration(cfg)
        if first == cfg.SOLVER.MAX_ITER:
            return super().build_lr_scheduler(cfg, optimizer)
        whole_network = cfg.clone()
        whole_network.defrost()
        whole_network.SOLVER.MAX_ITER = first
        scheduler = super().build_lr_scheduler(whole_network, optimizer)
        return with_cosine_at_the_end(scheduler, optimizer, cfg)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, PanopticDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = PanopticDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """
        Panoptic quality, and COCO's instance AP where the dataset has an instances JSON and the
        model gives masks (`cfg.MODEL.OANET.OUTPUTS`). Within a training also a few pictures for
        TensorBoard.
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = []
        if has_event_storage():
            # First: what follows changes the results' segments_info in place.
            evaluators.append(PanopticPictures(dataset_name, cfg.TEST.TENSORBOARD_PICTURES))
        evaluators.append(PanopticEvaluator(dataset_name, output_folder))
        has_json_file = bool(MetadataCatalog.get(dataset_name).json_file)
        if has_json_file and "pred_masks" in cfg.MODEL.OANET.OUTPUTS:
            evaluators.append(COCOEvaluator(dataset_name, output_dir=output_folder))
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """
        As :meth:`DefaultTrainer.test`; with `cfg.TEST.ORDERS` it also compares painting orders.
        """
        if evaluators is None and cfg.TEST.ORDERS:
            model_without_ddp = getattr(model, "module", model)
            evaluators = [
                DatasetEvaluators(
                    [
                        cls.build_evaluator(cfg, name),
                        build_ordering_evaluator(cfg, name, model_without_ddp),
                    ]
                )
                for name in cfg.DATASETS.TEST
            ]
        return super().test(cfg, model, evaluators)


def build_ordering_evaluator(cfg, dataset_name: str, model) -> OrderingEvaluator:
    """
    The evaluator that `cfg.TEST.ORDERS` and `cfg.TEST.ORDER_PICTURES` describe.
    """
    folder, pictures = _report_folder(cfg, dataset_name), []
    for name, orders in (
        ("pictures", ("score", model.order)),
        ("pictures_still_wrong", (model.order, "oracle")),
    ):
        if cfg.TEST.ORDER_PICTURES > 0 and set(orders) <= set(cfg.TEST.ORDERS):
            path = os.path.join(folder, name)
            pictures.append(OrderPictures(dataset_name, path, cfg.TEST.ORDER_PICTURES, orders))
    report = None
    if _has_report(cfg):
        path, compared = os.path.join(folder, REPORT_FOLDER), ("score", model.order)
        report = ReportRecorder(dataset_name, path, cfg.TEST.ORDER_PICTURES, compared)
    return OrderingEvaluator(dataset_name, model, cfg.TEST.ORDERS, pictures, report)


def _has_report(cfg) -> bool:
    """
    Whether there is something to report: MODEL.OANET.ORDER against the detection score.
    """
    order = cfg.MODEL.OANET.ORDER
    return order != "score" and {"score", order} <= set(cfg.TEST.ORDERS)


def prepare_datasets(cfg):
    """
    Make the synthetic scenes that the config names, if they are not there yet.
    """
    scenes = cfg.DATASETS.OCCLUSION_SCENES
    sizes = {"train": scenes.TRAIN_IMAGES, "val": scenes.VAL_IMAGES}
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    for split, num_images in sizes.items():
        if names & {f"occlusion_scenes_{split}", f"occlusion_scenes_{split}_visible"}:
            ensure_split(
                occlusion_scenes_root(),
                split,
                num_images,
                image_size=scenes.IMAGE_SIZE,
                seed=scenes.SEED,
            )


def report_orderings(cfg, results: Dict, train_seconds: Optional[float]):
    """
    Print the table of orders, write `orderings.json` into the output folder, and the report.

    Args:
        cfg: the config of the evaluation.
        results: what :meth:`OANetTrainer.test` returned.
        train_seconds: how long the training took, None where it is not known.
    """
    by_dataset = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
    for name, result in by_dataset.items():
        path = os.path.join(_report_folder(cfg, name), "orderings.json")
        seconds = {"train": train_seconds, "eval": result["evaluation"]["seconds"]}
        write_orderings(path, result, seconds)
        table = orderings_table(orderings_of(result))
        logger.info(f"Painting orders on {name}, same predictions:\n{table}\nWritten to {path}")
        if _has_report(cfg):
            logger.info(f"Report, for a browser: {write_report(_report_folder(cfg, name))}")


def training_seconds(checkpoint: Dict) -> Optional[float]:
    """
    The training time that a checkpoint of :class:`OANetTrainer` records.

    Args:
        checkpoint: what :meth:`DetectionCheckpointer.resume_or_load` returned.
    """
    hooks = checkpoint.get("trainer", {}).get("hooks", {})
    return hooks.get(TrainingClock.__qualname__, {}).get("seconds")


def _report_folder(cfg, dataset_name: str) -> str:
    if len(cfg.DATASETS.TEST) == 1:
        return cfg.OUTPUT_DIR
    return os.path.join(cfg.OUTPUT_DIR, dataset_name)


class TrainingClock(HookBase):
    """
    Adds up the wall time of the training steps, over resumed runs too.
    """

    def __init__(self):
        self.seconds = 0.0

    def before_step(self):
        self._start = time.perf_counter()

    def after_step(self):
        self.seconds += time.perf_counter() - self._start

    def state_dict(self):
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict):
        self.seconds = state_dict["seconds"]


class OrderingReport(HookBase):
    """
    Reports the comparison of orders after every evaluation, and last of all at the end.
    """

    def __init__(self):
        self._reported = None

    def after_step(self):
        results = getattr(self.trainer, "_last_eval_results", None)
        if results is not None and results is not self._reported:
            self._reported = results
            clock = next(h for h in self.trainer._hooks if isinstance(h, TrainingClock))
            report_orderings(self.trainer.cfg, results, clock.seconds)

    def after_train(self):
        self.after_step()
