"""
Panoptic segmentation of single pictures in Python:

    from oanet_d2 import PanopticPredictor

    predictor = PanopticPredictor.from_config("config.yaml", "model_final.pth")
    predictor("picture.jpg").draw().save("segmented.png")
"""

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union
from unittest import mock

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import VisImage, Visualizer

from .checkpoint import CheckpointError, OANetCheckpointer
from .config_files import load_config
from .data import complete_config
from .data.images import read_image
from .modeling import OANet
from .modeling.oanet import OUTPUTS
from .modeling.semantic_labels import semantic_labels

__all__ = ["PanopticPredictor", "PanopticResult"]

logger = logging.getLogger(__name__)

READABLE_SIDE = 480  # pixels: of a smaller picture the labels would cover everything


@dataclass
class PanopticResult:
    """
    What :class:`PanopticPredictor` makes of a picture.

    Attributes:
        image: (H, W, 3) uint8, the picture in BGR.
        panoptic_seg: (H, W) int32 on the CPU; 0 is void, segments count from 1.
        segments_info: a dict for every segment, see :func:`combine`, and with its "category_name".
        metadata: Detectron2's metadata of the classes.
        predictions: all that the model gave, see `MODEL.OANET.OUTPUTS`.
    """

    image: np.ndarray
    panoptic_seg: torch.Tensor
    segments_info: List[Dict]
    metadata: Any = field(repr=False)
    predictions: Dict = field(default_factory=dict, repr=False)

    def draw(self, scale: Optional[float] = None) -> VisImage:
        """
        The picture with its segments and their names, as Detectron2 draws them.

        Args:
            scale: size of the drawing relative to the picture's. By default 1, or what makes the
                longer side 480 pixels if it has fewer.

        Returns:
            a :class:`VisImage`: `save(path)` writes it, `get_image()` gives an RGB array.
        """
        if scale is None:
            scale = max(1, READABLE_SIDE / max(self.image.shape[:2]))
        visualizer = Visualizer(self.image[:, :, ::-1], self.metadata, scale=scale)
        return visualizer.draw_panoptic_seg(self.panoptic_seg, self.segments_info)


class PanopticPredictor(DefaultPredictor):
    """
    Detectron2's :class:`DefaultPredictor` for an OANet: one picture in, its panoptic segmentation
    out. The dataset's pictures need not be there; the names of its classes come from what is
    registered under its name or, for a dataset of `DATASETS.PANOPTIC`, from its panoptic JSON.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (CfgNode): config of the network, with `MODEL.WEIGHTS`.

        Raises:
            ValueError: the config or the checkpoint is of no use; the message says why.
        """
        cfg = cfg.clone()
        cfg.defrost()
        _keep_one_dataset(cfg)
        complete_config(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise ValueError(
                "MODEL.WEIGHTS is not set; give the checkpoint to predict with, such as the "
                "model_final.pth that a training leaves."
            )
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU; using cpu.")
            cfg.MODEL.DEVICE = "cpu"
        cfg.freeze()
        checkpointer = partial(_WholeCheckpointer, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        with mock.patch("detectron2.engine.defaults.DetectionCheckpointer", checkpointer):
            super().__init__(cfg)

    @classmethod
    def from_config(
        cls,
        config_file: Union[str, os.PathLike],
        weights: Union[str, os.PathLike] = "",
        opts: Sequence = (),
    ) -> "PanopticPredictor":
        """
        Args:
            config_file: yaml that the network was trained with.
            weights: path or URL of its checkpoint; by default the config's `MODEL.WEIGHTS`.
            opts: "KEY", value, "KEY", value, ... to override in the config. For instances' masks
                and the scores of the semantic branch in a result's `predictions`, which take most
                of the time after the network, set "MODEL.OANET.OUTPUTS".

        Raises:
            ValueError: as :meth:`__init__`.
        """
        panoptic_only = ["MODEL.OANET.OUTPUTS", (), "TEST.ORDERS", ()]
        cfg = load_config(os.fspath(config_file), [*panoptic_only, *opts])
        if weights:
            cfg.MODEL.WEIGHTS = os.fspath(weights)
        return cls(cfg)

    def __call__(self, image: Union[str, os.PathLike, np.ndarray]) -> PanopticResult:
        """
        Args:
            image: path of a picture, or a (H, W, 3) uint8 array in BGR, OpenCV's order.

        Raises:
            ValueError: the file cannot be read, or the array is of another kind.
        """
        image = _bgr(image)
        predictions = super().__call__(image)
        return self._result(image, predictions["panoptic_seg"], predictions)

    def in_orders(
        self, image: Union[str, os.PathLike, np.ndarray], orders: Sequence[str]
    ) -> Dict[str, PanopticResult]:
        """
        The same predictions painted in several orders.

        Args:
            image: as for :meth:`__call__`.
            orders: names of rules in RANKING_RULE_REGISTRY.

        Returns:
            order -> result.

        Raises:
            ValueError: as :meth:`__call__`, or the network cannot rank by one of the rules.
        """
        image = _bgr(image)
        needed = mock.patch.multiple(self.model, return_evidence=True, outputs=OUTPUTS)
        with needed, torch.no_grad():
            predictions = super().__call__(image)
            instances = predictions["instances"]
            semantic = semantic_labels(predictions["sem_seg"], self.model.keep_things_free)
            results = {}
            for rule in orders:
                order = predictions["ranking_evidence"].order(rule)
                painted = self.model.combine(instances.pred_masks, instances, semantic, order)
                results[rule] = self._result(image, painted, predictions)
        return results

    def _result(self, image: np.ndarray, panoptic: Tuple, predictions: Dict) -> PanopticResult:
        panoptic_seg, segments_info = panoptic
        names = self.metadata.stuff_classes, self.metadata.thing_classes
        segments_info = [
            {**s, "category_name": names[s["isthing"]][s["category_id"]]} for s in segments_info
        ]
        return PanopticResult(image, panoptic_seg.cpu(), segments_info, self.metadata, predictions)


class _WholeCheckpointer(OANetCheckpointer):
    """
    Refuses a checkpoint that leaves a part of the network as it was initialized.
    """

    def load(self, path: str, *args, **kwargs) -> Dict:
        if not isinstance(self.model, OANet):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {type(self.model).__name__}; to predict it must be "
                "OANet."
            )
        extra = super().load(path, *args, **kwargs)
        lacking = [*self.new, *(name for name, *_ in self.left_out)]
        if lacking:
            raise CheckpointError(
                f"{path} does not give, or in another shape, {len(lacking)} tensors of the model, "
                f"such as {lacking[0]}. It belongs to another config, or is what a training "
                "starts from."
            )
        return extra


def _keep_one_dataset(cfg):
    """
    Leave the config only the dataset that it takes its classes from: the first one whose classes
    can be had.

    Raises:
        ValueError: it names no dataset.
    """
    names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError(
            "DATASETS.TEST and DATASETS.TRAIN are empty; name the dataset that the network was "
            "trained on, from which the names of the classes come."
        )
    described = cfg.DATASETS.PANOPTIC
    name = next((x for x in names if x in DatasetCatalog or _has_json(described, x)), names[0])
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = (name,), ()
    cfg.DATASETS.PANOPTIC = CfgNode(
        {k: v for k, v in described.items() if k == name}, new_allowed=True
    )


def _has_json(described: CfgNode, name: str) -> bool:
    files = described.get(name)
    return isinstance(files, dict) and PathManager.isfile(files.get("PANOPTIC_JSON") or "")


def _bgr(image: Union[str, os.PathLike, np.ndarray]) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), "BGR")
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        raise ValueError(f"A picture is a path or a numpy array in BGR, not {kind}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"The picture is an array of {image.dtype} and shape {image.shape}; it must be uint8 "
            "of shape (H, W, 3) in BGR, as cv2.imread gives it."
        )
    return image
