"""Whether a training may start in an output folder that is not empty, or go on there."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Dict

import torch
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm

from .config import add_oanet_config

__all__ = ["OutputFolderError", "RunConfig", "prepare_output_folder"]

logger = logging.getLogger(__name__)

# Beginnings of the keys that change nothing about what is trained, or follow from others.
NOT_TRAINED = tuple(
    "OUTPUT_DIR MODEL.DEVICE MODEL.ALLOW_PICKLE VIS_PERIOD CUDNN_BENCHMARK SOLVER.CHECKPOINT_PERIOD "
    "DATALOADER.NUM_WORKERS DATASETS.TEST TEST. INPUT.MIN_SIZE_TEST INPUT.MAX_SIZE_TEST "
    "DATASETS.OCCLUSION_SCENES.VAL_IMAGES MODEL.OANET.ORDER MODEL.OANET.KEEP_THINGS_FREE "
    "MODEL.OANET.OUTPUTS MODEL.PANOPTIC_FPN.COMBINE.OVERLAP MODEL.PANOPTIC_FPN.COMBINE.STUFF "
    "MODEL.POINT_HEAD.NUM_CLASSES".split()
)


class OutputFolderError(ValueError):
    """An output folder that cannot be used for this training. The message says why."""


def prepare_output_folder(cfg, resume: bool = False, eval_only: bool = False) -> None:
    """
    Make the output folder, and see that a training which starts there replaces no other one.

    Args:
        cfg: of a yaml, or a LazyConfig. The latter is not compared: it finds a folder without
            checkpoints, or resumes.

    Raises:
        OutputFolderError: nothing can be written there, or it holds checkpoints of another config.
    """
    if not comm.is_main_process():
        return
    is_yaml = isinstance(cfg, CfgNode)
    folder = cfg.OUTPUT_DIR if is_yaml else cfg.train.output_dir
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputFolderError(f"OUTPUT_DIR {folder!r} cannot be written to: {error}.") from error
    found = sorted(Path(folder).glob("model_[0-9f]*.pth"))  # model_final.pth comes last
    if eval_only or not found or (resume and os.path.exists(f"{folder}/last_checkpoint")):
        return
    reason = "a config in Python is not compared with it"
    if is_yaml:
        here = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).dump()
        try:
            trainer = torch.load(found[-1], map_location="cpu", weights_only=True)["trainer"]
            reason = _listed(_differences(trainer["hooks"]["RunConfig"]["yaml"], here))
        except Exception:  # damaged, or of another program
            reason = "it does not say with which config it was trained"
    if reason:
        raise OutputFolderError(
            f"OUTPUT_DIR holds {found[-1]} of another training: {reason}. Set another OUTPUT_DIR, "
            "delete that one, or go on with the training in it by --resume."
        )
    logger.warning(
        f"This training replaces {found[-1]} of the same config; --resume would go on from there."
    )


class RunConfig(HookBase):
    """Keeps the config in the checkpoints, and compares it when a training is resumed."""

    def state_dict(self) -> Dict:
        return {"yaml": self.trainer.cfg.dump()}

    def load_state_dict(self, state_dict: Dict):
        """
        Raises:
            OutputFolderError: the checkpoint is of another model or optimizer.
        """
        changed = _differences(state_dict["yaml"], self.trainer.cfg.dump())
        loaded, listed = self.trainer.checkpointer, _listed(changed)
        misfits = loaded.new + loaded.unused
        if misfits or "SOLVER.OPTIMIZER" in changed:
            what = f"{len(misfits)} tensors, such as {misfits[0]}," if misfits else "the optimizer"
            raise OutputFolderError(
                f"The training in {self.trainer.cfg.OUTPUT_DIR!r} cannot be resumed with this config: "
                f"{what} would differ. {listed or 'The code is another one'}. Resume with the values "
                "there, or use another OUTPUT_DIR and the checkpoint as MODEL.WEIGHTS."
            )
        if changed:
            logger.warning(
                f"Resumed with another config than before: {listed}. The seed and what the optimizer "
                "is set to stay as they are in the checkpoint."
            )


def _differences(there: str, here: str) -> Dict[str, str]:
    """Where two configs, as :meth:`CfgNode.dump` gives them, train differently: key -> in words."""
    defaults = get_cfg()
    add_oanet_config(defaults)  # an older version, without a key, did as its default says
    known = _flat(yaml.safe_load(defaults.dump()))
    old, new = ({**known, **_flat(yaml.safe_load(dump))} for dump in (there, here))
    keys = [x for x in sorted({*old, *new}) if not x.startswith(NOT_TRAINED)]
    changed = [x for x in keys if old.get(x) != new.get(x)]
    return {x: f"{x} is {new.get(x)!r}, there {old.get(x)!r}" for x in changed}


def _listed(changed: Dict[str, str]) -> str:
    return "; ".join([*changed.values()][:10] + ["..."] * (len(changed) > 10))


def _flat(tree: Any, key: str = "") -> Dict[str, Any]:
    if not isinstance(tree, dict):
        return {key[1:]: tree}
    return {k: v for name, x in tree.items() for k, v in _flat(x, f"{key}.{name}").items()}
