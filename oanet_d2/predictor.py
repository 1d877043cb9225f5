"""Panoptic segmentation of single pictures in Python. The README shows an example."""

import logging
import os
import threading
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from detectron2.config import CfgNode, instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model

from .checkpoint import CheckpointError, OANetCheckpointer, read_description
from .config import is_lazy, load_config
from .data import complete_config
from .data.images import read_image
from .data.register import Path, category_metadata
from .modeling import OANet, OANetWithTTA
from .result import PanopticResult, check_picture, with_names

__all__ = ["PanopticPredictor", "PanopticResult"]

logger = logging.getLogger(__name__)

Picture = Union[Path, np.ndarray]
# What nobody asks a predictor for is not made.
_OPTS = ["MODEL.OANET.OUTPUTS", (), "TEST.ORDERS", ()]
_LAZY_OPTS = ["model.outputs=[]", "model.return_fusion_inputs=False"]
_building = threading.Lock()  # Detectron2's catalogs of datasets belong to the whole process


class PanopticPredictor:
    """
    Detectron2's :class:`DefaultPredictor` for an OANet, with the augmentations of `TEST.AUG` if they
    are enabled. One predictor can serve several threads.

    The names of the classes come from what is registered under the name of the config's dataset
    or, for a dataset of `DATASETS.PANOPTIC`, from its panoptic JSON. Nothing else of it is read.
    :meth:`from_file` needs neither.
    """

    def __init__(self, cfg: CfgNode, metadata: Optional[Metadata] = None, model: Any = None):
        """
        Args:
            cfg: config of the network, with `MODEL.WEIGHTS`.
            metadata: Detectron2's of the classes, instead of that dataset's.
            model: the network, instead of the one that `cfg.MODEL` describes.

        Raises:
            ValueError: the config or the checkpoint cannot be used. The message says why.
        """
        self.cfg = cfg = cfg.clone()
        cfg.defrost()
        if not cfg.MODEL.WEIGHTS:
            raise ValueError(
                "MODEL.WEIGHTS is not set. Give the checkpoint to predict with (with a .py, as "
                "train.init_checkpoint)."
            )
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; it must be 'RGB' or 'BGR'.")
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU; using cpu.")
            cfg.MODEL.DEVICE = "cpu"
        try:
            torch.zeros(1, device=cfg.MODEL.DEVICE)
        except Exception as error:  # every kind of device has its own
            raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: {error}") from error
        names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[:1] if metadata is None else ()
        if not names and metadata is None:
            raise ValueError("DATASETS.TEST and DATASETS.TRAIN are empty; one names the classes.")
        cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = names, ()
        described = {k: v for k, v in cfg.DATASETS.PANOPTIC.items() if k in names}
        cfg.DATASETS.PANOPTIC = CfgNode(described, new_allowed=True)
        with _building:
            complete_config(cfg)
            cfg.freeze()
            model = build_model(cfg) if model is None else model.to(cfg.MODEL.DEVICE)
        self.model = model.eval()
        if not isinstance(self.model, OANet):
            found = type(self.model).__name__
            raise ValueError(f"MODEL.META_ARCHITECTURE is {found}; it must be OANet.")
        checkpointer = OANetCheckpointer(self.model, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        new = checkpointer.new
        if new:
            raise CheckpointError(
                f"{cfg.MODEL.WEIGHTS} lacks {len(new)} tensors of the model or has them in another "
                f"shape, such as {new[0]}. It is for another config, or for a training to start from."
            )
        self.metadata = MetadataCatalog.get(names[0]) if metadata is None else metadata
        with_tta = cfg.TEST.AUG.ENABLED
        self.network = OANetWithTTA(cfg, self.model) if with_tta else self.model
        min_size = 0 if with_tta else cfg.INPUT.MIN_SIZE_TEST  # 0: as it is
        self.aug = T.ResizeShortestEdge(min_size, cfg.INPUT.MAX_SIZE_TEST)

    @classmethod
    def from_config(cls, config_file: Optional[Path], weights: Path = "", opts: Sequence = ()):
        """
        Args:
            config_file: yaml or .py that the network was trained with. A .py is code, and runs. None:
                see :meth:`from_file`.
            weights: path or URL of its checkpoint. The default is the config's `MODEL.WEIGHTS`
                (`train.init_checkpoint`).
            opts: "KEY", value, "KEY", value, ... to override in the config, for a .py "key=value", ...
                "MODEL.OANET.OUTPUTS" (`model.outputs`) is () unless it is set here.
        """
        if config_file is None:
            weights = weights or dict(zip(opts[::2], opts[1::2])).get("MODEL.WEIGHTS", "")
            if not weights:
                raise ValueError("Give --config-file, or MODEL.WEIGHTS model_final.safetensors.")
            return cls.from_file(weights, opts)
        model = None
        if is_lazy(config_file):
            from . import lazy  # it needs what training needs

            with _building:  # while Detectron2 reads such a config, it replaces `import`
                lazy_cfg = lazy.load_lazy_config(config_file, [*_LAZY_OPTS, *opts])
            cfg, model = lazy.yaml_keys(lazy_cfg), instantiate(lazy_cfg.model)
        else:
            cfg = load_config(config_file, [*_OPTS, *opts])
        if weights:
            cfg.MODEL.WEIGHTS = os.fspath(weights)
        return cls(cfg, model=model)

    @classmethod
    def from_file(cls, weights: Path, opts: Sequence = ()):
        """
        A predictor of a training's `model_final.safetensors`, which holds the config and the classes.

        Args:
            weights: its path or URL.
            opts: as for :meth:`from_config`.

        Raises:
            ValueError: it is another file, or its config is for another version of this project.
        """
        weights = os.fspath(weights)
        config, categories = read_description(weights)
        cfg = load_config(weights, [*_OPTS, *opts], config)
        cfg.MODEL.WEIGHTS = weights
        cfg.MODEL.ALLOW_PICKLE = False  # the file must not allow it to itself
        where = f"{weights}: categories"
        return cls(cfg, Metadata(name=weights, **category_metadata(categories, where)))

    def __call__(self, image: Picture) -> PanopticResult:
        """
        Args:
            image: path of a picture, or a (H, W, 3) uint8 array in BGR, OpenCV's order.

        Raises:
            ValueError: the picture cannot be read, or is something else.
        """
        image, predictions = self._predict(image)
        return self._result(image, predictions, *predictions["panoptic_seg"])

    def in_orders(self, image: Picture, orders: Sequence[str]) -> Dict[str, PanopticResult]:
        """
        The same predictions painted in several orders: order -> result.

        Args:
            image: as for :meth:`__call__`.
            orders: names of rules in RANKING_RULE_REGISTRY.

        Raises:
            ValueError: see :meth:`__call__`, or the network cannot rank by one of the rules.
        """
        image, predictions = self._predict(image, return_fusion_inputs=True)
        inputs = predictions["fusion_inputs"]
        inputs = inputs._replace(masks=inputs.masks.cached())
        results = {}
        for rule in orders:
            panoptic = self.model.combine(inputs, inputs.order_inputs.order(rule))
            results[rule] = self._result(image, predictions, *panoptic)
        return results

    @torch.no_grad()
    def _predict(self, image: Picture, **options) -> Tuple[np.ndarray, Dict]:
        if not isinstance(image, np.ndarray):
            image = read_image(os.fspath(image), "BGR")
        check_picture(image)
        given = image[:, :, ::-1] if self.cfg.INPUT.FORMAT == "RGB" else image
        resized = self.aug.get_transform(given).apply_image(given)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        inputs = {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
        return image, self.network.inference([inputs], **options)[0]

    def _result(self, image, predictions, panoptic_seg, segments) -> PanopticResult:
        named = with_names(segments, self.metadata)
        return PanopticResult(image, panoptic_seg.cpu(), named, self.metadata, predictions)
