"""
What an output folder holds already, before a training writes into it.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Tuple

import torch
import yaml

from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from .checkpoint import read_checkpoint

__all__ = [
    "OutputFolderError",
    "check_free_space",
    "check_output_folder",
    "differences",
    "flat_config",
    "listed",
    "prepare_output_folder",
]

logger = logging.getLogger(__name__)

# Keys, or the beginnings of keys, that change nothing about what is trained.
_OF_NO_CONSEQUENCE = (
    *("OUTPUT_DIR", "MODEL.DEVICE", "MODEL.ALLOW_PICKLE", "VIS_PERIOD", "CUDNN_BENCHMARK"),
    *("SOLVER.CHECKPOINT_PERIOD", "DATALOADER.NUM_WORKERS", "DATASETS.TEST", "TEST."),
    *("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
    *("MODEL.OANET.ORDER", "MODEL.OANET.KEEP_THINGS_FREE", "MODEL.OANET.OUTPUTS"),
    *("MODEL.OANET.CHANNELS_LAST", "MODEL.OANET.INFERENCE_MODE"),
    *("MODEL.OANET.AUTOCAST", "MODEL.OANET.COMPILE"),
)


class OutputFolderError(ValueError):
    """
    An output folder that cannot be used, or not for this training. The message names it, what was
    found, and what would be right.
    """


def prepare_output_folder(cfg, resume: bool = False, eval_only: bool = False):
    """
    Check `cfg.OUTPUT_DIR`, before anything is written there.

    Args:
        cfg: the config of what will start.
        resume: whether that is to go on from the last checkpoint, if there is one. (The configs
            are compared when it is loaded, see :class:`RunConfig`.)
        eval_only: whether nothing will be trained.

    Raises:
        OutputFolderError: see :func:`check_output_folder`.
    """
    if not comm.is_main_process():
        return
    config = None
    resumes = resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if not (eval_only or resumes):
        scaled = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        config = flat_config(scaled.dump())
    replaced = check_output_folder(cfg.OUTPUT_DIR, config)
    if replaced:
        logger.warning(
            f"OUTPUT_DIR holds {replaced}, of this same config. The training starts anew and "
            "replaces what is there. To go on from there, stop it and give --resume."
        )


def check_output_folder(folder: str, config: Optional[Dict[str, Any]] = None) -> Optional[str]:
    """
    Make the folder if it is not there, and look at it before anything is written.

    Args:
        folder: where to write.
        config: that of a training that will start anew in it, see :func:`flat_config`. It will
            replace the checkpoints of the same config, not those of another. None: nothing that
            is there will be replaced.

    Returns:
        the last checkpoint of an earlier training that will be replaced, if there is one.

    Raises:
        OutputFolderError: nothing can be written, or there are checkpoints of another config.
    """
    if not folder or "://" in folder:  # nowhere, or not on this machine
        return None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFolderError(
            f"OUTPUT_DIR is {folder!r}, where nothing can be written: {error}. Set it to a folder "
            "that can be made or written to."
        ) from error
    last = _last_checkpoint(Path(folder))
    if config is None or last is None:
        return None
    advice = (
        "Set OUTPUT_DIR to another folder, delete that one if it is not needed any more, or go on "
        "with the training in it by --resume."
    )
    theirs = _config_of(last)
    if theirs is None:
        raise OutputFolderError(
            f"OUTPUT_DIR holds {last}, and nothing says of which config. {advice}"
        )
    changed = differences(theirs, config)
    if changed:
        raise OutputFolderError(
            f"OUTPUT_DIR holds {last}, of another config: {listed(changed)}. {advice}"
        )
    return str(last)


def check_free_space(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """
    Args:
        folder: where checkpoints of a model and its optimizer will be written.

    Raises:
        OutputFolderError: there is no room for one.
    """
    if not folder or "://" in folder:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    learning = sum(p.numel() * p.element_size() for p in parameters)
    copies = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    free, needed = shutil.disk_usage(folder).free, weights + copies * learning
    if free < needed:
        raise OutputFolderError(
            f"OUTPUT_DIR is {folder!r}, where {free / 1e6:,.1f} MB are free; one checkpoint takes "
            f"{needed / 1e6:,.1f} MB. Make room, or set it to a folder on another disk."
        )


def flat_config(dump: str) -> Dict[str, Any]:
    """
    Args:
        dump: a config as yaml, see :meth:`CfgNode.dump`.

    Returns:
        key -> value; sequences are lists.
    """
    return _flat(yaml.safe_load(dump))


def differences(there: Dict[str, Any], here: Dict[str, Any]) -> Dict[str, Tuple[Any, Any]]:
    """
    Compare two configs by what is trained.

    Returns:
        key -> (value there, value here) of those that differ; None where a config has no such key.
    """
    return {
        key: (there.get(key), here.get(key))
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and not key.startswith(_OF_NO_CONSEQUENCE)
    }


def listed(changed: Dict[str, Tuple[Any, Any]], most: int = 10) -> str:
    """
    Say what :func:`differences` found.
    """
    texts = [f"{key} is {here!r}, there {there!r}" for key, (there, here) in changed.items()]
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "; ".join([*texts[:most], *more])


def _flat(tree: Dict, prefix: str = "") -> Dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _last_checkpoint(folder: Path) -> Optional[Path]:
    tag = folder / "last_checkpoint"
    named: Iterable[Path] = [folder / tag.read_text().strip()] if tag.is_file() else []
    # and those that a training would replace, the last one last
    found = [*sorted(folder.glob("model_[0-9]*.pth")), *folder.glob("model_final.pth"), *named]
    return next((x for x in reversed(found) if x.is_file()), None)


def _config_of(checkpoint: Path) -> Optional[Dict[str, Any]]:
    """
    The config that a checkpoint was trained with: its own, or, where it is not one of this
    project's, the one that Detectron2 keeps beside it.
    """
    content = read_checkpoint(str(checkpoint))
    beside = checkpoint.parent / "config.yaml"
    try:
        return flat_config(content["trainer"]["hooks"]["RunConfig"]["yaml"])
    except (KeyError, TypeError):  # from before there was a RunConfig, or by someone else
        return flat_config(beside.read_text()) if beside.is_file() else None
