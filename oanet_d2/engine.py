import logging
import os
import time
from functools import partial
from typing import Dict, Optional
from unittest import mock

import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluators
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm

from .checkpoint import OANetCheckpointer
from .data import PanopticDatasetMapper, complete_config
from .data.builtin import occlusion_scenes_root
from .data.occlusion_scenes import ensure_split
from .evaluation import OrderingEvaluator, orderings_of, orderings_table, write_orderings
from .visualization import OrderPictures

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
        if cfg.MODEL.DEVICE != "cpu":
            super().__init__(cfg)
            return
        # DefaultTrainer gives DistributedDataParallel `device_ids`, which it refuses on CPU.
        cpu_ddp = partial(create_ddp_model, device_ids=None)
        with mock.patch("detectron2.engine.defaults.create_ddp_model", cpu_ddp):
            super().__init__(cfg)

    def build_hooks(self):
        # DefaultTrainer made its own checkpointer; the hooks that follow hold on to this one.
        self.checkpointer = OANetCheckpointer(
            self.checkpointer.model,
            self.cfg.OUTPUT_DIR,
            allow_pickle=self.cfg.MODEL.ALLOW_PICKLE,
            **self.checkpointer.checkpointables,
        )
        hooks = [TrainingClock(), *super().build_hooks()]
        if comm.is_main_process() and self.cfg.TEST.ORDERS:
            hooks.append(OrderingReport())
        return hooks

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
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=PanopticDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = PanopticDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """
        Panoptic quality, and COCO's instance AP where the dataset has an instances JSON and the
        model gives masks (`cfg.MODEL.OANET.OUTPUTS`).
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = [COCOPanopticEvaluator(dataset_name, output_folder)]
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
    return OrderingEvaluator(dataset_name, model, cfg.TEST.ORDERS, pictures)


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
    Print the table of orders and write `orderings.json` into the output folder.

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
