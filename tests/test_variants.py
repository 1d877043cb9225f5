"""Detectron2's heads and backbones in an OANet: docs/training.md has a line for each of them."""

import json
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    MViT,
    SimpleFeaturePyramid,
    SwinTransformer,
    ViT,
    build_model,
)
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.roi_heads import BaseMaskRCNNHead

from oanet_d2 import complete_config
from oanet_d2.engine import OANetTrainer
from oanet_d2.export import ExportError, PanopticGraph
from tests.conftest import after_step, registered, scenes_paths, trainer_of, training_cfg


@SEM_SEG_HEADS_REGISTRY.register()
class OwnSemSegHead(nn.Module):
    """What Detectron2 asks of a head, and no more: logits of the padded images, or losses."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        self.predictor = nn.Conv2d(input_shape["p3"].channels, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, 1)

    def forward(self, features, targets=None):
        logits = F.interpolate(self.predictor(features["p3"]), scale_factor=8)
        if not self.training:
            return logits, {}
        loss = F.cross_entropy(logits, targets, ignore_index=self.ignore_value)
        return "whatever", {"loss_own": loss}


@ROI_MASK_HEAD_REGISTRY.register()
class OwnMaskHead(BaseMaskRCNNHead):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.predictor = nn.Conv2d(input_shape.channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)

    def layers(self, x):
        return self.predictor(x)


@BACKBONE_REGISTRY.register()
class OwnBackbone(Backbone):
    """Two levels."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.p2, self.p3 = nn.Conv2d(input_shape.channels, 16, 4, 4), nn.Conv2d(16, 16, 2, 2)
        self._out_features = ["p2", "p3"]
        self._out_feature_channels = {"p2": 16, "p3": 16}
        self._out_feature_strides = {"p2": 4, "p3": 8}

    size_divisibility = 8

    def forward(self, x):
        p2 = self.p2(x)
        return {"p2": p2, "p3": self.p3(p2.relu())}


@BACKBONE_REGISTRY.register()
def build_vitdet(cfg, input_shape, square_pad=128):
    net = ViT(
        img_size=64, embed_dim=16, depth=2, num_heads=2, window_size=2, window_block_indexes=[0],
        use_rel_pos=True, drop_path_rate=0.1, pretrain_img_size=64, out_feature="last_feat",
    )  # fmt: skip
    scales, top = (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool()
    return SimpleFeaturePyramid(net, "last_feat", 16, scales, top, square_pad=square_pad)


@BACKBONE_REGISTRY.register()
def build_vitdet_without_a_square(cfg, input_shape):
    return build_vitdet(cfg, input_shape, square_pad=0)


@BACKBONE_REGISTRY.register()
def build_swin_fpn(cfg, input_shape):
    net = SwinTransformer(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    return FPN(net, ("p0", "p1", "p2", "p3"), 16, top_block=LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_mvit_fpn(cfg, input_shape):
    net = MViT(img_size=64, embed_dim=8, depth=4, last_block_indexes=(0, 1, 2, 3))
    names = ("scale2", "scale3", "scale4", "scale5")
    return FPN(net, names, 16, top_block=LastLevelMaxPool(), square_pad=96)


@BACKBONE_REGISTRY.register()
def build_c4(cfg, input_shape):
    class Padded(type(build_resnet_backbone(cfg, input_shape))):
        size_divisibility = 16
    net = build_resnet_backbone(cfg, input_shape)
    return net


def opts(**sections):
    return [x for key, value in sections.items() for x in (f"MODEL.{key.replace('__', '.')}", value)]

NARROW = opts(RESNETS__STEM_OUT_CHANNELS=8, RESNETS__RES2_OUT_CHANNELS=16, RESNETS__WIDTH_PER_GROUP=4)
R50 = [*NARROW, *opts(RESNETS__DEPTH=50)]
POINTS = opts(POINT_HEAD__FC_DIM=8, POINT_HEAD__TRAIN_NUM_POINTS=16, POINT_HEAD__SUBDIVISION_NUM_POINTS=64)
POINT_MASKS = [*POINTS, *opts(
    ROI_HEADS__NAME="PointRendROIHeads", ROI_MASK_HEAD__NAME="PointRendMaskHead",
    ROI_MASK_HEAD__POOLER_TYPE="", ROI_MASK_HEAD__FC_DIM=8, ROI_MASK_HEAD__POINT_HEAD_ON=True,
    POINT_HEAD__NUM_CLASSES=8, POINT_HEAD__SUBDIVISION_STEPS=3,
)]  # fmt: skip
POINT_SEMANTIC = [*POINTS, *opts(
    SEM_SEG_HEAD__NAME="PointRendSemSegHead", POINT_HEAD__NUM_CLASSES=7, POINT_HEAD__SUBDIVISION_STEPS=2,
)]  # fmt: skip
CASCADE = opts(ROI_HEADS__NAME="CascadeROIHeads", ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True)
KEYPOINTS = [*opts(KEYPOINT_ON=True, ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=3, ROI_KEYPOINT_HEAD__CONV_DIMS=[8]),
             "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1]]
TWO_LEVELS = opts(
    BACKBONE__NAME="OwnBackbone", RPN__IN_FEATURES=["p2", "p3"], ROI_HEADS__IN_FEATURES=["p2", "p3"],
    ANCHOR_GENERATOR__SIZES=[[16], [48]],
)
VARIANTS = {
    "SemSegFPNHead": opts(SEM_SEG_HEAD__NAME="SemSegFPNHead"),
    "PointRendSemSegHead": POINT_SEMANTIC,
    "own semantic head": opts(SEM_SEG_HEAD__NAME="OwnSemSegHead"),
    "cascade": CASCADE,
    "PointRendMaskHead": POINT_MASKS,
    "cascade, keypoints": [*CASCADE, *KEYPOINTS],
    "keypoints": KEYPOINTS,
    "class-agnostic": opts(ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True, ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True),
    "own mask head": opts(ROI_MASK_HEAD__NAME="OwnMaskHead"),
    "R-34": opts(RESNETS__DEPTH=34),
    "R-152, GN": [*NARROW, *opts(RESNETS__DEPTH=152, RESNETS__NORM="GN", RESNETS__RES2_OUT_CHANNELS=32, RESNETS__WIDTH_PER_GROUP=32, RESNETS__STEM_OUT_CHANNELS=32, FPN__NORM="GN", FPN__OUT_CHANNELS=32, SEM_SEG_HEAD__NORM="GN", SEM_SEG_HEAD__CONVS_DIM=32)],
    "ResNeXt, SyncBN, avg": [*R50, *opts(RESNETS__NUM_GROUPS=2, RESNETS__NORM="SyncBN", FPN__NORM="SyncBN", FPN__FUSE_TYPE="avg")],
    "RetinaNet's top block": [*R50, *opts(BACKBONE__NAME="build_retinanet_resnet_fpn_backbone", RPN__IN_FEATURES=["p2","p3","p4","p5","p6","p7"], ANCHOR_GENERATOR__SIZES=[[8],[16],[32],[64],[128],[256]])],
    "ViTDet": opts(BACKBONE__NAME="build_vitdet"),
    "Swin": opts(BACKBONE__NAME="build_swin_fpn"),
    "MViT": opts(BACKBONE__NAME="build_mvit_fpn"),
    "own backbone": TWO_LEVELS,
}
