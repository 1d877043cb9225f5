import logging
import os
import time
import weakref
from typing import Any, Dict, List

import torch

from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import setup_logger

from . import evaluation, hooks
from .checkpoint import CheckpointError, OANetCheckpointer
from .data import PanopticDatasetMapper, complete_config
from .data.builtin import dataset_root
from .data.check import check_datasets
from .data.occlusion_scenes import ensure_split
from .data.training_stream import TrainingStream, build_train_loader
from .modeling import OANetWithTTA
from .output_folder import RunConfig
from .painting.learned import order_metadata
from .report import ReportRecorder, write_report
from .submission import categories_of

__all__ = ["OANetTrainer", "prepare_datasets", "report_orderings"]

logger = logging.getLogger(__name__)


class BFloat16Trainer(SimpleTrainer):
    """
    Mixed precision without CUDA, which Detectron2's :class:`AMPTrainer` asks for. The range of
    bfloat16 needs no scaling of gradients.
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
    Detectron2's trainer with OANet's mapper, evaluators, checkpoints and phases, on GPUs and CPUs.
    """

    def __init__(self, cfg):
        """
        Raises:
            ValueError: the config or a file of its datasets is wrong.
        """
        # Not DefaultTrainer.__init__, which asks for CUDA in several processes and mixed precision.
        super(DefaultTrainer, self).__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = cfg.clone()
        cfg.defrost()
        complete_config(cfg)
        cfg.freeze()
        check_datasets(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        # Each of two phases leaves the parameters of the other one without a gradient.
        two_phases = hooks.network_iterations(cfg) < cfg.SOLVER.MAX_ITER
        devices: Dict[str, Any] = {} if on_cuda else {"device_ids": None}
        ddp_model = create_ddp_model(
            model, broadcast_buffers=False, find_unused_parameters=two_phases, **devices
        )
        trainer_class = SimpleTrainer
        if cfg.SOLVER.AMP.ENABLED:
            trainer_class = AMPTrainer if on_cuda else BFloat16Trainer
        self._trainer = trainer_class(ddp_model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = OANetCheckpointer(
            model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE, trainer=weakref.proxy(self)
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self):
        self.guard = hooks.DivergenceGuard()
        ours = [RunConfig(), self.guard]
        stream = getattr(self.data_loader, "dataset", None)
        if isinstance(stream, TrainingStream):  # a subclass may build another loader
            ours.append(hooks.DataOrder(stream))
        first_phase = hooks.network_iterations(self.cfg)
        if first_phase < self.max_iter:
            ours.append(hooks.TwoPhases(first_phase))
        theirs = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            last_evaluation = EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            evaluates = [isinstance(x, EvalHook) for x in theirs].index(True)
            theirs.insert(evaluates + 1, last_evaluation)  # before the writers of metrics end
        return [*ours, *theirs]

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:
            raise self.guard.explained(error) from error

    def resume_or_load(self, resume=True):
        """
        Raises:
            CheckpointError: a checkpoint is of no use, or not every process finds the last one.
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
        """
        At the end, before a last evaluation, `model_final.safetensors` is written. It is also a
        :class:`LearnedOrder` if the ranking head looks at nothing but the geometry of masks.
        """
        names = (*self.cfg.DATASETS.TEST, *self.cfg.DATASETS.TRAIN)  # as PanopticPredictor
        if names and self.iter >= self.max_iter:
            categories = categories_of(MetadataCatalog.get(names[0]))
            order = self._learned_order(categories)
            self.checkpointer.save_safetensors("model_final", self.cfg.dump(), categories, **order)
        try:
            super().after_train()
        except Exception as error:
            if self.iter >= self.max_iter:
                raise
            # The error that ended the training comes next, and is what the user has to know.
            logger.warning(f"After that error, a hook failed too: {error}")

    def _learned_order(self, categories: List[Dict]) -> Dict[str, str]:
        head = getattr(self.checkpointer.model, "srm_head", None)
        if getattr(head, "evidence", None) != ("geometry",):
            return {}
        names = [x["name"] for x in categories if x["isthing"]]
        sizes = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        return order_metadata(names, self.cfg.MODEL.SRM_HEAD.STRIDE, *sizes)

    @classmethod
    def build_optimizer(cls, cfg, model):
        """The optimizer that `cfg.SOLVER.OPTIMIZER` names, with Detectron2's parameter groups."""
        sgd = super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return sgd
        if cfg.SOLVER.OPTIMIZER != "ADAMW":
            raise ValueError(
                f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; it must be 'SGD' or 'ADAMW'."
            )
        keys = "params", "lr", "weight_decay"
        groups = [{key: group[key] for key in keys} for group in sgd.param_groups]
        # Not fused: with a GradScaler that unscales in the step itself, after gradients are clipped.
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        if hooks.network_iterations(cfg) < cfg.SOLVER.MAX_ITER:
            return hooks.build_two_phase_lr_scheduler(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, PanopticDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = PanopticDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None, model=None):
        """
        Panoptic quality, with `model` in each order of `cfg.TEST.ORDERS` too, and COCO's
        instance AP where there are an instances JSON and masks (`cfg.MODEL.OANET.OUTPUTS`). Within a
        training a few pictures for TensorBoard.
        """
        folder = output_folder or evaluation_folder(cfg, dataset_name)
        evaluators = [evaluation.PanopticPictures(dataset_name)] if has_event_storage() else []
        orders = cfg.TEST.ORDERS if model is not None else ()
        report = by_class = None
        if orders and _has_report(cfg):
            compared, most = ("score", model.order), cfg.TEST.ORDER_PICTURES
            report = ReportRecorder(dataset_name, folder, most, compared)
        if "class_order" in orders:
            by_class = evaluation.count_class_margins(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        evaluators.append(evaluation.PanopticEvaluator(model, orders, report, by_class))
        metadata = MetadataCatalog.get(dataset_name)
        has_instances = metadata.json_file and metadata.thing_classes
        if has_instances and "pred_masks" in cfg.MODEL.OANET.OUTPUTS:
            path, most = os.path.join(folder, "inference"), cfg.TEST.DETECTIONS_PER_IMAGE
            options = path, most, cfg.TEST.KEYPOINT_OKS_SIGMAS
            evaluators.append(evaluation.build_instance_evaluator(dataset_name, *options))
        if cfg.TEST.SAVE_PANOPTIC:
            path = os.path.join(folder, "inference", "panoptic.json")
            evaluators.append(evaluation.PanopticFiles(dataset_name, path))
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """As :meth:`DefaultTrainer.test`; a comparison of `cfg.TEST.ORDERS` is reported, too."""
        if evaluators is not None:
            return super().test(cfg, model, evaluators)
        bare_model = getattr(model, "module", model)
        if isinstance(bare_model, OANetWithTTA):
            bare_model = bare_model.model
        evaluators = [cls.build_evaluator(cfg, x, model=bare_model) for x in cfg.DATASETS.TEST]
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.ORDERS and comm.is_main_process():
            report_orderings(cfg, results)
        return results

    @classmethod
    def test_with_TTA(cls, cfg, model):
        """
        As :meth:`test`, with the augmentations of `cfg.TEST.AUG`. As in Detectron2's training script
        "_TTA" follows the names of the results, and files go to `OUTPUT_DIR/inference_TTA`.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        cfg.INPUT.MIN_SIZE_TEST = 0  # images as in their files: each scale is made from these
        results = cls.test(cfg, OANetWithTTA(cfg, model))
        return {f"{name}_TTA": x for name, x in results.items()}


def evaluation_folder(cfg, dataset_name: str) -> str:
    """`cfg.OUTPUT_DIR`, or a folder in it for each of several datasets."""
    several = len(cfg.DATASETS.TEST) > 1
    return os.path.join(cfg.OUTPUT_DIR, dataset_name) if several else cfg.OUTPUT_DIR


def _has_report(cfg) -> bool:
    order = cfg.MODEL.OANET.ORDER
    return order != "score" and {"score", order} <= set(cfg.TEST.ORDERS)


def prepare_datasets(cfg) -> None:
    """Draw the synthetic scenes that the config names, where they are missing."""
    scenes = cfg.DATASETS.OCCLUSION_SCENES
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    for split, images in (("train", scenes.TRAIN_IMAGES), ("val", scenes.VAL_IMAGES)):
        if names & {f"occlusion_scenes_{split}", f"occlusion_scenes_{split}_visible"}:
            options = {"image_size": scenes.IMAGE_SIZE, "seed": scenes.SEED}
            ensure_split(dataset_root("occlusion_scenes"), split, images, **options)


def report_orderings(cfg, results: Dict) -> None:
    """
    Log the table of orders, and write `orderings.json` and the report.

    Args:
        cfg: the config of the evaluation.
        results: from the evaluators, by dataset where there are several.
    """
    # Detectron2 takes the time of each iteration, less the first three of a run.
    steps = get_event_storage().histories().get("time") if has_event_storage() else None
    train_seconds = sum(x for x, _ in steps.values()) if steps else None
    names = cfg.DATASETS.TEST
    for name, result in ({names[0]: results} if len(names) == 1 else results).items():
        folder = evaluation_folder(cfg, name)
        path = os.path.join(folder, "orderings.json")
        seconds = {"train": train_seconds, "eval": result["evaluation"]["seconds"]}
        evaluation.write_orderings(path, result, seconds)
        table = evaluation.orderings_table(evaluation.orderings_of(result))
        logger.info(f"Painting orders on {name}, same predictions:\n{table}\nWritten to {path}")
        if _has_report(cfg):
            logger.info(f"Report, for a browser: {write_report(folder)}")
