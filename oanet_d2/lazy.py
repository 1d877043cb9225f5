"""
Training and evaluation of a LazyConfig, a config in Python, as Detectron2's
tools/lazyconfig_train_net.py does it, with the hooks, checkpoints and checks of :mod:`engine`.
"""

import logging
from typing import Any, Dict, Optional, Sequence, Tuple

from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import default_setup, default_writers
from detectron2.engine.hooks import (
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from . import hooks
from .checkpoint import OANetCheckpointer
from .config import add_oanet_config, find_config
from .data import complete_config
from .data.check import check_datasets
from .data.register import Path
from .data.training_stream import TrainingStream
from .engine import build_step_trainer
from .modeling.oanet import check_orders
from .output_folder import prepare_output_folder

__all__ = ["do_test", "do_train", "load_lazy_config", "run", "yaml_keys"]

logger = logging.getLogger(__name__)


def load_lazy_config(config_file: Path, opts: Sequence[str] = ()) -> DictConfig:
    """
    Args:
        config_file: see :func:`oanet_d2.config.find_config`. It is Python code, and runs.
        opts: "key=value" for a key of the config or an argument of a call in it. "+key=value" adds
            another key.

    Raises:
        ValueError: an override is wrong. The message names it.
    """
    cfg, none = LazyConfig.load(find_config(config_file)), object()
    for override in opts:
        key = override.partition("=")[0]
        try:
            parent = OmegaConf.select(cfg, key.rpartition(".")[0], default={})
            is_there = "_target_" in parent or OmegaConf.select(cfg, key, default=none) is not none
            if not is_there and not key.startswith("+"):
                raise ValueError(f"the config has no {key}")
            LazyConfig.apply_overrides(cfg, [override])
        except Exception as error:  # hydra, omegaconf and Detectron2 raise many kinds
            raise ValueError(f"override {override!r} of {config_file}: {error}") from error
    return cfg


def yaml_keys(cfg: DictConfig) -> CfgNode:
    """
    What is read outside of the model and the loaders, as a yaml says it: datasets, classes, weights,
    device, and the size of a picture. Everything else has its default.

    Raises:
        ValueError: pictures are not resized to one size, there are several test sets, or the labels are
            not those of the semantic head.
    """
    model, train, test, keys = cfg.model, cfg.dataloader.train, cfg.dataloader.test, get_cfg()
    add_oanet_config(keys)
    keys.OUTPUT_DIR = cfg.train.output_dir
    keys.MODEL.DEVICE, keys.MODEL.WEIGHTS = cfg.train.device, cfg.train.init_checkpoint
    keys.MODEL.ALLOW_PICKLE = cfg.train.get("allow_pickle", False)
    keys.MODEL.ROI_HEADS.NUM_CLASSES = model.roi_heads.num_classes
    keys.MODEL.SEM_SEG_HEAD.NUM_CLASSES = model.sem_seg_head.num_classes
    stuff_only = not model.sem_seg_head.get("num_things")
    labelled = train.mapper.get("stuff_only", stuff_only)
    if labelled != stuff_only:
        raise ValueError(
            f"dataloader.train.mapper.stuff_only is {labelled}, but model.sem_seg_head.num_things is "
            f"{model.sem_seg_head.get('num_things')}: with such a head it must be {stuff_only}."
        )
    if stuff_only:
        keys.MODEL.SEM_SEG_HEAD.SUPERVISION = "stuff"
    keypoint_head = model.roi_heads.get("keypoint_head")
    if keypoint_head:
        keys.MODEL.KEYPOINT_ON = True
        keys.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = keypoint_head.num_keypoints
        keys.TEST.KEYPOINT_OKS_SIGMAS = list(cfg.dataloader.get("evaluator", {}).get("oks_sigmas", ()))
    for name, loader in (("TRAIN", train), ("TEST", test)):
        names = loader.dataset.names
        keys.DATASETS[name] = (names,) if isinstance(names, str) else tuple(names)
    if len(keys.DATASETS.TEST) > 1:
        raise ValueError(
            f"dataloader.test.dataset.names is {keys.DATASETS.TEST}; a config in Python evaluates one "
            "dataset. Name one; evaluate the others one by one."
        )
    keys.DATALOADER.FILTER_EMPTY_ANNOTATIONS = train.dataset.get("filter_empty", True)
    keys.INPUT.COPY_PASTE = train.mapper.get("copy_paste", 0.0)
    keys.INPUT.FORMAT = test.mapper.image_format
    listed = test.mapper.augmentations
    resize: Any = listed[0] if len(listed) == 1 else None
    if not isinstance(getattr(resize, "short_edge_length", None), int):
        raise ValueError(
            f"dataloader.test.mapper.augmentations is {listed}; it must be one ResizeShortestEdge with "
            "one short_edge_length."
        )
    keys.INPUT.MIN_SIZE_TEST, keys.INPUT.MAX_SIZE_TEST = resize.short_edge_length, resize.max_size
    return keys


def _build_model(cfg: DictConfig) -> Tuple[Any, OANetCheckpointer]:
    model, allow_pickle = instantiate(cfg.model), cfg.train.get("allow_pickle", False)
    _check_evaluator(cfg, model)
    model.to(cfg.train.device)
    return model, OANetCheckpointer(model, cfg.train.output_dir, allow_pickle=allow_pickle)


def _check_evaluator(cfg: DictConfig, model: Any) -> None:
    """Refuses orders that an evaluation, perhaps after a long training, could not paint."""
    orders = cfg.dataloader.get("evaluator", {}).get("orders") or ()
    if not orders:
        return
    if not getattr(model, "return_fusion_inputs", False):  # PanopticFPN does not have it
        raise ValueError(
            f"dataloader.evaluator.orders is {orders}, but model.return_fusion_inputs is not True; set "
            "it to True in an OANet, or set orders to []."
        )
    check_orders("dataloader.evaluator.orders", orders, model.srm_head)


def run(args):
    """As :func:`oanet_d2.train.run`, of a config in Python."""
    args.config_file = find_config(args.config_file)  # default_setup reads it too
    cfg = load_lazy_config(args.config_file, args.opts)
    keys = yaml_keys(cfg)
    complete_config(keys)
    prepare_output_folder(cfg, args.resume, args.eval_only)
    default_setup(cfg, args)
    setup_logger(keys.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="oanet_d2")
    names = keys.DATASETS.TEST if args.eval_only else keys.DATASETS.TRAIN + keys.DATASETS.TEST
    check_datasets(keys, names)
    if not args.eval_only:
        return do_train(cfg, args.resume)
    model, checkpointer = _build_model(cfg)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return do_test(cfg, model)


def do_test(cfg: DictConfig, model: Any) -> Optional[Dict]:
    """Evaluate by `cfg.dataloader.evaluator`; its argument `model`, if it has one, becomes `model`."""
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = cfg.dataloader.evaluator
    if "model" in evaluator:
        evaluator.model = getattr(model, "module", model)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def do_train(cfg: DictConfig, resume: bool = False) -> None:
    """
    Args:
        cfg: as Detectron2's script takes it. `train.srm_only_share` is `SOLVER.SRM_ONLY_SHARE`;
            `lr_multiplier` is then for the iterations before that part.
        resume: go on from the last checkpoint in `train.output_dir`.
    """
    train, max_iter = cfg.train, cfg.train.max_iter
    model, checkpointer = _build_model(cfg)
    logger.info(f"Model:\n{model}")
    cfg.optimizer.params.model = model
    optimizer, schedule = instantiate(cfg.optimizer), instantiate(cfg.lr_multiplier)
    loader, is_main = instantiate(cfg.dataloader.train), comm.is_main_process()
    share = 0.0 if cfg.model.get("train_srm_only") else train.get("srm_only_share", 0.0)
    first_phase = hooks.network_iterations(share, max_iter, model)
    two_phases, ddp = first_phase < max_iter, dict(train.ddp)
    if two_phases:
        schedule = hooks.two_phase_schedule(schedule, first_phase / max_iter)
        ddp["find_unused_parameters"] = True  # those of the other phase
    trainer = build_step_trainer(model, loader, optimizer, train.amp.enabled, **ddp)
    checkpointer.add_checkpointable("trainer", trainer)
    guard = hooks.DivergenceGuard(checkpointer, cfg.dataloader.train.mapper.image_format)
    stream = getattr(loader, "dataset", None)
    writers = default_writers(train.output_dir, max_iter) if is_main else []
    trainer.register_hooks(
        [
            guard,
            hooks.DataOrder(stream) if isinstance(stream, TrainingStream) else None,
            hooks.TwoPhases(model, first_phase) if two_phases else None,
            IterationTimer(),
            LRScheduler(scheduler=schedule),
            PeriodicCheckpointer(checkpointer, **train.checkpointer) if is_main else None,
            EvalHook(train.eval_period, lambda: do_test(cfg, trainer.model)),
            PeriodicWriter(writers, period=train.log_period) if is_main else None,
        ]
    )
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    try:
        trainer.train(trainer.iter + 1 if resumed else 0, max_iter)
    except FloatingPointError as error:
        raise guard.explained(error) from error
