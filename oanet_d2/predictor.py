"""
Panoptic segmentation of single pictures in Python:

    from oanet_d2 import PanopticPredictor

    predictor = PanopticPredictor.from_config("config.yaml", "model_final.pth")
    predictor("picture.jpg").draw().save("segmented.png")
"""

import logging
import os
import threading
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.visualizer import VisImage

from .checkpoint import CheckpointError, OANetCheckpointer
from .config import load_config
from .data import complete_config
from .data.images import read_image
from .modeling import OANet
from .painting.ranking import RANKING_RULE_REGISTRY
from .visualization import draw_panoptic

__all__ = ["PanopticPredictor", "PanopticResult"]

logger = logging.getLogger(__name__)

READABLE_SIDE = 480  # pixels: on a smaller picture the labels would cover everything
Picture = Union[str, os.PathLike, np.ndarray]

# Detectron2's catalogs of datasets and torch's list of safe types belong to the whole process.
_building = threading.Lock()


@dataclass
class PanopticResult:
    """
    Attributes:
        image: (H, W, 3) uint8, the picture in BGR.
        panoptic_seg: (H, W) int32 on the CPU. 0 is void, segments count from 1.
        segments_info: Detectron2's, with a "category_name" for every segment.
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
            scale: size of the drawing relative to the picture's. The default is 1, or what makes
                the longer side of a smaller picture 480 pixels.
        """
        if scale is None:
            scale = max(1, READABLE_SIDE / max(self.image.shape[:2]))
        return draw_panoptic(self.image[:, :, ::-1], self.panoptic, self.metadata, scale)

    @property
    def panoptic(self) -> Tuple[torch.Tensor, List[Dict]]:
        """(panoptic_seg, segments_info)"""
        return self.panoptic_seg, self.segments_info


class PanopticPredictor:
    """
    Detectron2's :class:`DefaultPredictor` for an OANet, with the same attributes. One predictor can
    serve several threads.

    The names of the classes come from what is registered under the name of the config's dataset
    or, for a dataset of `DATASETS.PANOPTIC`, from its panoptic JSON. Nothing else of it is read.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: config of the network, with `MODEL.WEIGHTS`.

        Raises:
            ValueError: the config or the checkpoint cannot be used. The message says why.
        """
        self.cfg = cfg = cfg.clone()
        cfg.defrost()
        _check(cfg)
        with _building:
            complete_config(cfg)
            cfg.freeze()
            self.model = build_model(cfg).eval()
            if not isinstance(self.model, OANet):
                found = cfg.MODEL.META_ARCHITECTURE
                raise ValueError(
                    f"MODEL.META_ARCHITECTURE is {found}; to predict it must be OANet."
                )
            _load_weights(self.model, cfg)
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        size = cfg.INPUT.MIN_SIZE_TEST
        self.aug = T.ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

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
            weights: path or URL of its checkpoint. The default is the config's `MODEL.WEIGHTS`.
            opts: "KEY", value, "KEY", value, ... to override in the config. "MODEL.OANET.OUTPUTS"
                is () unless it is set here.

        Raises:
            ValueError: see :meth:`__init__`.
        """
        panoptic_only = ["MODEL.OANET.OUTPUTS", (), "TEST.ORDERS", ()]
        cfg = load_config(os.fspath(config_file), [*panoptic_only, *opts])
        if weights:
            cfg.MODEL.WEIGHTS = os.fspath(weights)
        return cls(cfg)

    def __call__(self, image: Picture) -> PanopticResult:
        """
        Args:
            image: path of a picture, or a (H, W, 3) uint8 array in BGR, OpenCV's order.

        Raises:
            ValueError: the picture cannot be read, is something else, or is too narrow to resize.
        """
        image, predictions = self._predict(image)
        return self._result(image, predictions["panoptic_seg"], predictions)

    def in_orders(self, image: Picture, orders: Sequence[str]) -> Dict[str, PanopticResult]:
        """
        The same predictions painted in several orders.

        Args:
            image: as for :meth:`__call__`.
            orders: names of rules in RANKING_RULE_REGISTRY.

        Returns:
            order -> result.

        Raises:
            ValueError: see :meth:`__call__`, or the network cannot rank by one of the rules.
        """
        for rule in orders:
            if rule not in RANKING_RULE_REGISTRY:
                known = sorted(name for name, _ in RANKING_RULE_REGISTRY)
                raise ValueError(f"There is no order {rule!r}; it must be one of {known}.")
        image, predictions = self._predict(image, return_fusion_inputs=True)
        inputs = predictions["fusion_inputs"]
        inputs = inputs._replace(masks=inputs.masks.cached())
        results = {}
        for rule in orders:
            panoptic = self.model.combine(inputs, inputs.order_inputs.order(rule))
            results[rule] = self._result(image, panoptic, predictions)
        return results

    @torch.no_grad()
    def _predict(self, image: Picture, **options) -> Tuple[np.ndarray, Dict]:
        name = "" if isinstance(image, np.ndarray) else f"{image}: "
        image = _bgr(image)
        height, width = image.shape[:2]
        given = image[:, :, ::-1] if self.input_format == "RGB" else image
        try:
            resized = self.aug.get_transform(given).apply_image(given)
        except ValueError as error:  # less than a pixel would be left
            longest = self.cfg.INPUT.MAX_SIZE_TEST
            raise ValueError(
                f"{name}a picture of {width} x {height} pixels is too narrow; nothing is left of it "
                f"when it is resized to INPUT.MAX_SIZE_TEST {longest} ({error})."
            ) from error
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1), np.float32))
        inputs = {"image": tensor, "height": height, "width": width}
        return image, self.model.inference([inputs], **options)[0]

    def _result(self, image: np.ndarray, panoptic: Tuple, predictions: Dict) -> PanopticResult:
        panoptic_seg, segments_info = panoptic
        names = self.metadata.stuff_classes, self.metadata.thing_classes
        named = [
            {**s, "category_name": names[s["isthing"]][s["category_id"]]} for s in segments_info
        ]
        return PanopticResult(image, panoptic_seg.cpu(), named, self.metadata, predictions)


def _check(cfg: CfgNode) -> None:
    """
    Leaves the config a device that is there, and one dataset, for the names of the classes.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is not set. Give the checkpoint to predict with.")
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; it must be 'RGB' or 'BGR'.")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU; using cpu.")
        cfg.MODEL.DEVICE = "cpu"
    try:
        torch.zeros(1, device=cfg.MODEL.DEVICE)
    except Exception as error:  # every kind of device has its own
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; torch cannot use it here."
        ) from error
    names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[:1]
    if not names:
        raise ValueError("DATASETS.TEST and DATASETS.TRAIN are empty; one names the classes.")
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = names, ()
    described = {k: v for k, v in cfg.DATASETS.PANOPTIC.items() if k in names}
    cfg.DATASETS.PANOPTIC = CfgNode(described, new_allowed=True)


def _load_weights(model: OANet, cfg: CfgNode) -> None:
    checkpointer = OANetCheckpointer(model, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    lacking = [*checkpointer.new, *(name for name, *_ in checkpointer.left_out)]
    if lacking:
        raise CheckpointError(
            f"{cfg.MODEL.WEIGHTS} does not give, or in another shape, {len(lacking)} tensors of the "
            f"model, such as {lacking[0]}. It belongs to another config, or a training starts from it."
        )


def _bgr(image: Picture) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), "BGR")
    found = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
            return image
        found = f"an array of {image.dtype} with shape {image.shape}"
    raise ValueError(
        f"A picture is a path or a (H, W, 3) uint8 array in BGR, as cv2.imread gives it, not {found}."
    )
