import logging
import os
import time
import weakref
from operator import attrgetter
from typing import Any, Dict, List, Sequence, Union

import torch

from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import setup_logger

from . import evaluation, hooks
from .checkpoint import OANetCheckpointer
from .data import PanopticDatasetMapper, complete_config
from .data.builtin import dataset_root
from .data.check import check_datasets
from .data.occlusion_scenes import write_split
from .data.training_stream import TrainingStream, build_train_loader
from .modeling import OANetWithTTA
from .output_folder import RunConfig
from .painting.learned import order_metadata
from .report import ReportRecorder, write_report
from .submission import categories_of

__all__ = ["OANetTrainer", "build_evaluator", "build_step_trainer", "prepare_datasets"]

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


def build_step_trainer(model, data_loader, optimizer, amp: bool, **ddp) -> SimpleTrainer:
    """
    Detectron2's trainer of single steps, in several processes and in mixed precision on a CPU, too.

    Args:
        amp: mixed precision.
        ddp: for :func:`create_ddp_model`.
    """
    on_cuda = next(model.parameters()).device.type == "cuda"
    devices: Dict[str, Any] = {} if on_cuda else {"device_ids": None}
    trainer_class = SimpleTrainer
    if amp:
        trainer_class = AMPTrainer if on_cuda else BFloat16Trainer
    return trainer_class(create_ddp_model(model, **ddp, **devices), data_loader, optimizer)


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

        # Each of two phases leaves the parameters of the other one without a gradient.
        two_phases = _network_iterations(cfg) < cfg.SOLVER.MAX_ITER
        self._trainer = build_step_trainer(
            model,
            data_loader,
            optimizer,
            cfg.SOLVER.AMP.ENABLED,
            broadcast_buffers=False,
            find_unused_parameters=two_phases,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = OANetCheckpointer(
            model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE, trainer=weakref.proxy(self)
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self):
        self.guard = hooks.DivergenceGuard(self.checkpointer, self.cfg.INPUT.FORMAT)
        ours = [RunConfig(), self.guard]
        stream = getattr(self.data_loader, "dataset", None)
        if isinstance(stream, TrainingStream):  # a subclass may build another loader
            ours.append(hooks.DataOrder(stream))
        first_phase = _network_iterations(self.cfg)
        if first_phase < self.max_iter:
            ours.append(hooks.TwoPhases(self.checkpointer.model, first_phase))
        theirs = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED and self.cfg.DATASETS.TEST:
            last_evaluation = EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            evaluates = [isinstance(x, EvalHook) for x in theirs].index(True)
            theirs.insert(evaluates + 1, last_evaluation)  # before the writers of metrics end
        return [*ours, *theirs]

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:
            raise self.guard.explained(error) from error

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
    def build_model(cls, cfg):
        """
        As :meth:`DefaultTrainer.build_model`.

        Raises:
            ValueError: the config asks Detectron2's PanopticFPN for something that it does not have.
        """
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            _check_panoptic_fpn(cfg)
        return super().build_model(cfg)

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
        first, total = _network_iterations(cfg), cfg.SOLVER.MAX_ITER
        if first == total:
            return super().build_lr_scheduler(cfg, optimizer)
        network = cfg.clone()
        network.defrost()
        network.SOLVER.MAX_ITER = first
        network.SOLVER.STEPS = tuple(x for x in cfg.SOLVER.STEPS if x < first)
        schedule = super().build_lr_scheduler(network, optimizer)._multiplier
        return LRMultiplier(optimizer, hooks.two_phase_schedule(schedule, first / total), total)

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
        See :func:`build_evaluator`. The default folder is `cfg.OUTPUT_DIR`, or one in it for each of
        several datasets.
        """
        several = len(cfg.DATASETS.TEST) > 1
        folder = os.path.join(cfg.OUTPUT_DIR, dataset_name) if several else cfg.OUTPUT_DIR
        return build_evaluator(
            dataset_name,
            output_folder or folder,
            model,
            orders=cfg.TEST.ORDERS if model is not None else (),
            train_names=cfg.DATASETS.TRAIN,
            max_pictures=cfg.TEST.ORDER_PICTURES,
            instance_ap="pred_masks" in cfg.MODEL.OANET.OUTPUTS,
            max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            save_panoptic=cfg.TEST.SAVE_PANOPTIC,
        )

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """As :meth:`DefaultTrainer.test`."""
        if evaluators is None:
            bare_model = getattr(model, "module", model)
            if isinstance(bare_model, OANetWithTTA):
                bare_model = bare_model.model
            evaluators = [cls.build_evaluator(cfg, x, model=bare_model) for x in cfg.DATASETS.TEST]
        return super().test(cfg, model, evaluators)

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


def _check_panoptic_fpn(cfg) -> None:
    needed = {
        "MODEL.SEM_SEG_HEAD.SUPERVISION": "stuff",
        "MODEL.OANET.TRAIN_SRM_ONLY": False,
        "TEST.ORDERS": (),
        "TEST.AUG.ENABLED": False,
    }
    for key, value in needed.items():
        found = attrgetter(key)(cfg)
        if found != value:
            raise ValueError(
                f"{key} is {found!r}; with MODEL.META_ARCHITECTURE 'PanopticFPN' it must be {value!r}."
            )


def _network_iterations(cfg) -> int:
    share = 0.0 if cfg.MODEL.OANET.TRAIN_SRM_ONLY else cfg.SOLVER.SRM_ONLY_SHARE
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return hooks.network_iterations(share, cfg.SOLVER.MAX_ITER, model)


def prepare_datasets(cfg) -> None:
    """Draw the synthetic scenes that the config names, where they are missing."""
    scenes = cfg.DATASETS.OCCLUSION_SCENES
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    for split, images in (("train", scenes.TRAIN_IMAGES), ("val", scenes.VAL_IMAGES)):
        if names & {f"occlusion_scenes_{split}", f"occlusion_scenes_{split}_visible"}:
            options = {"image_size": scenes.IMAGE_SIZE, "seed": scenes.SEED}
            write_split(dataset_root("occlusion_scenes"), split, images, **options)


class OrdersReported(DatasetEvaluators):
    """Logs a comparison of orders, and writes its `orderings.json` and report."""

    def __init__(self, evaluators: List, dataset_name: str, output_dir: str, has_report: bool):
        super().__init__(evaluators)
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self.has_report = has_report

    def evaluate(self):
        results = super().evaluate()
        if comm.is_main_process():
            # Detectron2 takes the time of each iteration, less the first three of a run.
            steps = get_event_storage().histories().get("time") if has_event_storage() else None
            train_seconds = sum(x for x, _ in steps.values()) if steps else None
            path = os.path.join(self.output_dir, "orderings.json")
            seconds = {"train": train_seconds, "eval": results["evaluation"]["seconds"]}
            evaluation.write_orderings(path, results, seconds)
            table = evaluation.orderings_table(evaluation.orderings_of(results))
            logger.info(
                f"Painting orders on {self.dataset_name}, same predictions:\n{table}\nWritten to {path}"
            )
            if self.has_report:
                logger.info(f"Report, for a browser: {write_report(self.output_dir)}")
        return results


def build_evaluator(
    dataset_name: str,
    output_dir: str,
    model: Any = None,
    *,
    orders: Sequence[str] = (),
    train_names: Union[str, Sequence[str]] = (),
    max_pictures: int = 12,
    instance_ap: bool = True,
    max_dets_per_image: int = 100,
    oks_sigmas: Sequence[float] = (),
    save_panoptic: bool = False,
) -> DatasetEvaluators:
    """
    Panoptic quality, also in other painting orders, and COCO's instance AP where there is an
    instances JSON. Within a training a few pictures for TensorBoard.

    Args:
        model: the OANet that is evaluated, built with `return_fusion_inputs`, for `orders`.
        orders, max_pictures, save_panoptic: `TEST.ORDERS`, `ORDER_PICTURES` and `SAVE_PANOPTIC`.
        train_names: one or several training sets, for the order "class_order".
        instance_ap: False for a model whose results hold no masks.
        max_dets_per_image: AP counts this many detections of an image.
        oks_sigmas: of keypoints, where they are not COCO's.
    """
    evaluators = [evaluation.PanopticPictures(dataset_name)] if has_event_storage() else []
    report = by_class = None
    if orders and model.order != "score" and {"score", model.order} <= set(orders):
        compared = "score", model.order
        report = ReportRecorder(dataset_name, output_dir, max_pictures, compared)
    if "class_order" in orders:
        names = [train_names] if isinstance(train_names, str) else train_names
        by_class = evaluation.count_class_margins(names, model.roi_heads.num_classes)
    compared_model = model if orders else None  # PanopticFPN
    evaluators.append(evaluation.PanopticEvaluator(compared_model, orders, report, by_class))
    metadata, folder = MetadataCatalog.get(dataset_name), os.path.join(output_dir, "inference")
    if instance_ap and metadata.json_file and metadata.thing_classes:
        options = folder, max_dets_per_image, oks_sigmas
        evaluators.append(evaluation.build_instance_evaluator(dataset_name, *options))
    if save_panoptic:
        path = os.path.join(folder, "panoptic.json")
        evaluators.append(evaluation.PanopticFiles(dataset_name, path))
    if orders:
        return OrdersReported(evaluators, dataset_name, output_dir, report is not None)
    return DatasetEvaluators(evaluators)
