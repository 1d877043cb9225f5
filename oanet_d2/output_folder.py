"""
What a training does with an output folder that is not empty.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
import yaml

from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

__all__ = ["OutputFolderError", "config_differences", "listed", "prepare_output_folder"]

logger = logging.getLogger(__name__)

# Keys, or beginnings of keys, that change nothing about what is trained.
NOT_TRAINED = (
    *("OUTPUT_DIR", "MODEL.DEVICE", "MODEL.ALLOW_PICKLE", "VIS_PERIOD", "CUDNN_BENCHMARK"),
    *("SOLVER.CHECKPOINT_PERIOD", "DATALOADER.NUM_WORKERS", "DATASETS.TEST", "TEST."),
    *("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "DATASETS.OCCLUSION_SCENES.VAL_IMAGES"),
    *("MODEL.OANET.ORDER", "MODEL.OANET.KEEP_THINGS_FREE", "MODEL.OANET.OUTPUTS"),
    *("MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH", "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT"),
)


class OutputFolderError(ValueError):
    """
    An output folder that cannot be used for this training. The message names it, what was found
    there, and the remedy.
    """


def prepare_output_folder(cfg, resume: bool = False, eval_only: bool = False) -> None:
    """
    Make `cfg.OUTPUT_DIR`, and see that a training which starts there replaces no other one.

    Args:
        cfg: the config of what starts.
        resume: it goes on from the last checkpoint if there is one. (:class:`RunConfig` compares the
            configs then.)
        eval_only: nothing is trained.

    Raises:
        OutputFolderError: nothing can be written there, or it holds checkpoints of another config.
    """
    folder = cfg.OUTPUT_DIR
    if not comm.is_main_process():
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFolderError(
            f"OUTPUT_DIR is {folder!r}, where nothing can be written: {error}. Set it to a folder "
            "that can be made or written to."
        ) from error
    found = sorted(Path(folder).glob("model_[0-9f]*.pth"))  # model_final.pth comes last
    if eval_only or not found or (resume and os.path.exists(f"{folder}/last_checkpoint")):
        return
    scaled = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    there = _config_of(found[-1])
    changed = config_differences(there, scaled.dump()) if there else {}
    if changed or there is None:
        reason = listed(changed) if there else "it does not say with which config it was trained"
        raise OutputFolderError(
            f"OUTPUT_DIR holds {found[-1]} of another training: {reason}. Set OUTPUT_DIR to another "
            "folder, delete that one, or go on with the training in it by --resume."
        )
    logger.warning(
        f"OUTPUT_DIR holds {found[-1]} of the same config. This training starts from the beginning "
        "and replaces it. To go on from there, stop and use --resume."
    )


def config_differences(there: str, here: str) -> Dict[str, Tuple[Any, Any]]:
    """
    Compare two configs by what they train.

    Args:
        there, here: yaml, see :meth:`CfgNode.dump`.

    Returns:
        key -> (value there, value here) where they differ; None stands for a missing key.
    """
    old, new = (dict(_flat(yaml.safe_load(dump))) for dump in (there, here))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(NOT_TRAINED)
    }


def listed(changed: Dict[str, Tuple[Any, Any]], most: int = 10) -> str:
    """
    The result of :func:`config_differences` in words.
    """
    texts = [f"{key} is {new!r}, there {old!r}" for key, (old, new) in changed.items()]
    return "; ".join(texts[:most] + ["..."] * (len(texts) > most))


def _flat(tree: Dict, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _config_of(checkpoint: Path) -> Optional[str]:
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return content["trainer"]["hooks"]["RunConfig"]["yaml"]
    except Exception:  # damaged, or of another program
        return None
