"""Detectron2's heads and backbones, and a user's own. docs/training.md has a line for each of them."""

import copy
import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
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
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from oanet_d2 import PanopticPredictor, complete_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.engine import OANetTrainer
from oanet_d2.evaluation import build_instance_evaluator
from oanet_d2.export import ExportError, PanopticGraph, export_onnx
from oanet_d2.modeling import OANetSemSegFPNHead, OANetWithTTA
from tests.conftest import make_input, panoptic_fpn_cfg, registered, trainer_of, training_cfg

POINTS = ["left", "right", "middle"]


@SEM_SEG_HEADS_REGISTRY.register()
class OwnSemSegHead(nn.Module):
    """What Detectron2 asks of a head, and no more: logits of the padded images, or losses."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        self.layer = nn.Conv2d(input_shape["p3"].channels, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, 1)

    def forward(self, features, targets=None):
        logits = F.interpolate(self.layer(features["p3"]), scale_factor=8)
        if not self.training:
            return logits, {}
        loss = F.cross_entropy(logits, targets, ignore_index=self.ignore_value)
        return "whatever", {"loss_own": loss}


@SEM_SEG_HEADS_REGISTRY.register()
class OwnThingsHead(nn.Module):
    """The interface, and nothing of a head of Detectron2's."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.ours = OANetSemSegFPNHead(cfg, input_shape)
        self.ignore_value = self.ours.ignore_value
        self.num_things, self.common_stride = self.ours.num_things, self.ours.common_stride

    def layers(self, features):
        return self.ours.layers(features)

    def losses(self, predictions, targets):
        return {"loss_own": self.ours.losses(predictions, targets)["loss_sem_seg"]}

    def stuff_scores(self, logits):
        return self.ours.stuff_scores(logits)

    def predict(self, logits):
        return self.ours.predict(logits)


@ROI_MASK_HEAD_REGISTRY.register()
class OwnMaskHead(BaseMaskRCNNHead):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.layer = nn.Conv2d(input_shape.channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)

    def layers(self, x):
        return self.layer(x)


@BACKBONE_REGISTRY.register()
class OwnBackbone(Backbone):
    size_divisibility = 8

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.p2, self.p3 = nn.Conv2d(input_shape.channels, 16, 4, 4), nn.Conv2d(16, 16, 2, 2)
        self._out_features = ["p2", "p3"]
        self._out_feature_channels = {"p2": 16, "p3": 16}
        self._out_feature_strides = {"p2": 4, "p3": 8}

    def forward(self, x):
        p2 = self.p2(x)
        return {"p2": p2, "p3": self.p3(p2.relu())}


@BACKBONE_REGISTRY.register()
class PaddedC4(Backbone):
    size_divisibility = 16

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.net = build_resnet_backbone(cfg, input_shape)

    def output_shape(self):
        return self.net.output_shape()

    def forward(self, x):
        return self.net(x)


@BACKBONE_REGISTRY.register()
def build_vitdet(cfg, input_shape, square_pad=128):
    net = ViT(
        img_size=64,
        pretrain_img_size=64,
        embed_dim=16,
        depth=2,
        num_heads=2,
        window_size=2,
        window_block_indexes=[0],
        use_rel_pos=True,
        drop_path_rate=0.1,
        out_feature="last_feat",
    )
    scales, top = (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool()
    return SimpleFeaturePyramid(net, "last_feat", 16, scales, top, square_pad=square_pad)


@BACKBONE_REGISTRY.register()
def build_vitdet_of_any_size(cfg, input_shape):
    return build_vitdet(cfg, input_shape, square_pad=0)


@BACKBONE_REGISTRY.register()
def build_swin_fpn(cfg, input_shape):
    net = SwinTransformer(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    return FPN(net, ("p0", "p1", "p2", "p3"), 16, top_block=LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_mvit_fpn(cfg, input_shape):
    net = MViT(img_size=64, embed_dim=8, depth=4, last_block_indexes=(0, 1, 2, 3))
    levels = ("scale2", "scale3", "scale4", "scale5")
    return FPN(net, levels, 16, top_block=LastLevelMaxPool(), square_pad=128)


def model(**values):
    """Keys and values of MODEL; "__" stands for a dot."""
    return [x for k, v in values.items() for x in (f"MODEL.{k.replace('__', '.')}", v)]


def resnet(depth, width, **values):
    sizes = {"STEM_OUT_CHANNELS": width, "RES2_OUT_CHANNELS": width, "WIDTH_PER_GROUP": 4}
    return model(**{f"RESNETS__{k}": v for k, v in {"DEPTH": depth, **sizes}.items()}, **values)


LEVELS = [f"p{i}" for i in range(2, 8)]
SMALL = model(BACKBONE__NAME="OwnBackbone", ANCHOR_GENERATOR__SIZES=[[16], [48]])
SMALL += model(RPN__IN_FEATURES=LEVELS[:2], ROI_HEADS__IN_FEATURES=LEVELS[:2])
CASCADE = model(ROI_HEADS__NAME="CascadeROIHeads", ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True)
KEYPOINTS = model(
    KEYPOINT_ON=True, ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=3, ROI_KEYPOINT_HEAD__CONV_DIMS=[8]
)
KEYPOINTS += ["TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1]]
POINT_HEAD = model(POINT_HEAD__FC_DIM=8, POINT_HEAD__SUBDIVISION_NUM_POINTS=64)
POINT_SEMANTIC = model(SEM_SEG_HEAD__NAME="PointRendSemSegHead", POINT_HEAD__SUBDIVISION_STEPS=2)
POINT_MASKS = model(
    ROI_HEADS__NAME="PointRendROIHeads",
    ROI_MASK_HEAD__NAME="PointRendMaskHead",
    ROI_MASK_HEAD__POOLER_TYPE="",
    ROI_MASK_HEAD__FC_DIM=8,
    ROI_MASK_HEAD__POINT_HEAD_ON=True,
    POINT_HEAD__SUBDIVISION_STEPS=3,
)
IMPLICIT = model(
    ROI_MASK_HEAD__NAME="ImplicitPointRendMaskHead",
    ROI_MASK_HEAD__POOLER_TYPE="",
    ROI_MASK_HEAD__FC_DIM=8,
    POINT_HEAD__NAME="ImplicitPointHead",
    POINT_HEAD__CLS_AGNOSTIC_MASK=True,
    POINT_HEAD__SUBDIVISION_STEPS=2,
)
RES5 = resnet(50, 16, BACKBONE__NAME="PaddedC4", RESNETS__OUT_FEATURES=["res4"])
RES5 += model(ROI_HEADS__NAME="Res5ROIHeads", SRM_HEAD__IN_FEATURE="res4")
for key in ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"):
    RES5 += [f"MODEL.{key}.IN_FEATURES", ["res4"]]
RES5 += model(ANCHOR_GENERATOR__SIZES=[[16, 48]])
SYNC_BN = model(RESNETS__NORM="SyncBN", FPN__NORM="SyncBN")
RETINANET = [*SYNC_BN, *resnet(50, 16, BACKBONE__NAME="build_retinanet_resnet_fpn_backbone")]
RETINANET += model(RPN__IN_FEATURES=LEVELS, ANCHOR_GENERATOR__SIZES=[[8 * 2**i] for i in range(6)])
RESNEXT = [*resnet(50, 32), *model(RESNETS__NUM_GROUPS=2, RESNETS__WIDTH_PER_GROUP=16)]
for key in ("RESNETS", "FPN", "SEM_SEG_HEAD"):
    RESNEXT += [f"MODEL.{key}.NORM", "GN"]  # of 32 groups
RESNEXT += model(FPN__OUT_CHANNELS=32, SEM_SEG_HEAD__CONVS_DIM=32, FPN__FUSE_TYPE="avg")

# name -> keys and values, and which part cannot be exported
VARIANTS = {
    "SemSegFPNHead": ([*SMALL, *model(SEM_SEG_HEAD__NAME="SemSegFPNHead")], None),
    "PointRendSemSegHead": ([*SMALL, *POINT_HEAD, *POINT_SEMANTIC], "PointRend"),
    "own semantic head": ([*SMALL, *model(SEM_SEG_HEAD__NAME="OwnSemSegHead")], None),
    "CascadeROIHeads, keypoints": ([*SMALL, *CASCADE, *KEYPOINTS], None),
    "PointRendMaskHead": ([*SMALL, *POINT_HEAD, *POINT_MASKS], "PointRendMaskHead"),
    "ImplicitPointRendMaskHead": ([*SMALL, *POINT_HEAD, *IMPLICIT], "ImplicitPointRendMaskHead"),
    "one box and mask for all classes": (
        [
            *SMALL,
            *model(ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True, ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True),
        ],
        None,
    ),
    "own mask head, keypoints": (
        [*SMALL, *KEYPOINTS, *model(ROI_MASK_HEAD__NAME="OwnMaskHead")],
        None,
    ),
    "Res5ROIHeads": (RES5, "Res5ROIHeads"),
    "ResNeXt, GN, avg": (RESNEXT, None),
    "top block of RetinaNet, SyncBN": (RETINANET, None),
    "ViTDet": (model(BACKBONE__NAME="build_vitdet"), None),
    "Swin": (model(BACKBONE__NAME="build_swin_fpn"), None),
    "MViT": (model(BACKBONE__NAME="build_mvit_fpn"), None),
}


@pytest.fixture(scope="module")
def datasets(few_scenes, tmp_path_factory):
    """Every second instance has three keypoints in its box."""
    folder, found = tmp_path_factory.mktemp("keypoints"), []
    for name in few_scenes:
        metadata = MetadataCatalog.get(name)
        content = json.loads(Path(metadata.json_file).read_text())
        for x in content["annotations"][::2]:
            left, top, w, h = x["bbox"]
            middle = top + h // 2
            points = [(left, middle, 2), (left + w - 1, middle, 1), (left + w // 2, middle, 2)]
            x["keypoints"] = [n for point in points for n in point]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content))
        found.append((metadata.image_root, metadata.panoptic_json, metadata.panoptic_root, path))
    with registered("points_train", *found[0]), registered("points_val", *found[1]):
        for name in ("points_train", "points_val"):
            metadata = MetadataCatalog.get(name)
            metadata.set(keypoint_names=POINTS, keypoint_flip_map=[("left", "right")])
        yield "points_train", "points_val"


@pytest.fixture
def cfg(datasets, tmp_path):
    """Two steps from images of many sizes, in Panoptic FPN's convention."""
    cfg = training_cfg(datasets[0], tmp_path / "out")
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 3])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (48, 120), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"])
    cfg.merge_from_list(["INPUT.MAX_SIZE_TEST", 128, "TEST.DETECTIONS_PER_IMAGE", 20])
    cfg.merge_from_list(model(SEM_SEG_HEAD__NUM_CLASSES=0, SEM_SEG_HEAD__SUPERVISION="stuff"))
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = 0
    cfg.merge_from_list(model(SRM_HEAD__PAIRS__EVIDENCE=("geometry", "features")))
    # Random weights are sure of nothing.
    cfg.merge_from_list(model(ROI_HEADS__SCORE_THRESH_TEST=0.05))
    cfg.merge_from_list(model(PANOPTIC_FPN__COMBINE__INSTANCES_CONFIDENCE_THRESH=0.1))
    return cfg


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(cfg, datasets, name):
    """Trains from unequal images, resumes to the same weights, evaluates, and is Panoptic FPN."""
    opts, not_exported = VARIANTS[name]
    cfg.merge_from_list(opts)
    trainer, sizes = trainer_of(cfg), []
    count = trainer.model.register_forward_pre_hook(
        lambda _, args: sizes.append({x["image"].shape for x in args[0]})
    )
    trainer.train()
    count.remove()
    assert [len(x) for x in sizes] == [2, 2]
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000000.pth")
    again = OANetTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 1
    again.train()
    file = Path(cfg.OUTPUT_DIR) / "model_final.safetensors"
    predicting = PanopticPredictor.from_file(file).model
    for key, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key
        assert torch.equal(predicting.state_dict()[key], tensor), key

    ours, full = trainer.model.eval(), trainer.cfg.clone()
    full.defrost()
    full.DATASETS.TEST = datasets[1:]
    results = OANetTrainer.test(full, ours)
    assert {"panoptic_seg", "bbox", "segm"} == set(results) - {"keypoints", "evaluation"}
    assert ("keypoints" in results) == cfg.MODEL.KEYPOINT_ON

    theirs = build_model(panoptic_fpn_cfg(full)).eval()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("srm_head.")}
    theirs.load_state_dict(state)  # strictly
    batch = [make_input(size, [], []) for size in ((64, 90), (50, 70))]
    batch[1].update(height=120, width=70)
    with torch.no_grad():
        expected = theirs(copy.deepcopy(batch))
        ours.order = "score"
        found = ours(copy.deepcopy(batch))
        if not cfg.MODEL.KEYPOINT_ON:
            # One image at the test scale is no real augmentation.
            full.TEST.AUG.MIN_SIZES, full.TEST.AUG.FLIP = (64,), False
            (augmented,), (plain,) = (x(batch[:1]) for x in (OANetWithTTA(full, ours), ours))
            assert torch.equal(augmented["panoptic_seg"][0], plain["panoptic_seg"][0])
            assert torch.equal(augmented["sem_seg"], plain["sem_seg"])
            assert torch.equal(*(x["instances"].pred_masks for x in (augmented, plain)))
        ours.outputs, ours.order = (), "srm_pairs"
        lean = ours.inference(copy.deepcopy(batch), return_fusion_inputs=True)
    for a, b, c in zip(found, expected, lean):
        assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])
        assert a["panoptic_seg"][1] == b["panoptic_seg"][1]
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        theirs_fields = b["instances"].get_fields()
        assert set(a["instances"].get_fields()) == set(theirs_fields) and len(a["instances"]) > 1
        theirs_fields["pred_boxes"] = theirs_fields["pred_boxes"].tensor
        for key, value in theirs_fields.items():
            for x in (a, c) if key != "pred_masks" else (a,):
                found_value = getattr(x["instances"].get(key), "tensor", x["instances"].get(key))
                assert torch.equal(found_value, value), key
        # Without the outputs at full resolution: the same masks of what is painted, and labels.
        painted = b["instances"].scores >= 0.1
        masks = c["fusion_inputs"].masks.full()[painted]
        assert torch.equal(masks, b["instances"].pred_masks[painted]) and painted.any()
        labels = b["sem_seg"].argmax(0)
        assert (c["fusion_inputs"].semantic == labels).float().mean() > 0.999

    if not_exported:
        with pytest.raises(ExportError, match=not_exported):
            PanopticGraph(ours)
        return
    with torch.no_grad():
        image = batch[0]["image"]
        boxes, _, classes, masks, semantic, _ = PanopticGraph(ours)(image.permute(1, 2, 0))
        (detected,), sem_seg = ours.inference([{"image": image}], do_postprocess=False)
    detected = detected[detected.scores >= 0.1]
    torch.testing.assert_close(boxes, detected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(masks, detected.pred_masks[:, 0])
    assert torch.equal(classes, detected.pred_classes)
    scale = sem_seg.shape[-1] // semantic.shape[-1]
    semantic = F.interpolate(semantic[None], scale_factor=scale, mode="bilinear")
    torch.testing.assert_close(semantic, sem_seg)


def test_a_head_of_ones_own_that_knows_the_things(cfg):
    """It is seen as the head that it hides: in training, in the ranking and in what is painted."""
    cfg.merge_from_list([*SMALL, *model(SEM_SEG_HEAD__SUPERVISION="things_and_stuff")])
    cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "semantic")
    complete_config(cfg)
    cfg.MODEL.OANET.OUTPUTS = ()
    ours = build_model(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "OwnThingsHead"
    own = build_model(cfg)
    state = {k.replace("sem_seg_head.", "sem_seg_head.ours."): v for k, v in ours.state_dict().items()}
    own.load_state_dict(state)
    batch = [make_input((64, 90), [[8, 8, 40, 60]], [0], 2), make_input((50, 70), [], [], 1)]
    losses = []
    for tested in (ours, own):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(tested(copy.deepcopy(batch)))
    assert losses[1].pop("loss_own") == losses[0].pop("loss_sem_seg") and losses[0] == losses[1]
    with torch.no_grad():
        for a, b in zip(*(x.eval()(copy.deepcopy(batch)) for x in (ours, own))):
            assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])
            assert len(a["panoptic_seg"][1]) > 1


@pytest.mark.parametrize("masks", [POINT_MASKS, IMPLICIT], ids=["PointRend", "implicit"])
def test_points_of_masks_in_a_batch_without_a_thing(cfg, masks):
    """Every parameter has a gradient, and the losses have the same names, as several processes need."""
    cfg.merge_from_list([*SMALL, *POINT_HEAD, *masks])
    cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "things_and_stuff"  # as make_input labels
    complete_config(cfg)
    tested, names = build_model(cfg), []
    for boxes, classes in (([], []), ([[8, 8, 40, 60]], [0])):
        with EventStorage():
            losses = tested([make_input((64, 90), boxes, classes, 2), make_input((50, 70), [], [], 1)])
        names.append({*losses})
        sum(losses.values()).backward()
        mask_head = tested.roi_heads.mask_head
        gradients = [x.grad for x in mask_head.parameters()]
        assert all(x is not None and x.isfinite().all() for x in gradients)
        assert any(x.any() for x in gradients) == (len(boxes) > 0)
        assert (losses["loss_mask_point"] > 0) == (len(boxes) > 0)
    assert names[0] == names[1]


def test_the_ranking_alone_does_without_a_plain_head(cfg):
    cfg.merge_from_list([*SMALL, *model(SEM_SEG_HEAD__NAME="OwnSemSegHead")])
    complete_config(cfg)
    cfg.MODEL.OANET.TRAIN_SRM_ONLY = True
    tested, calls = build_model(cfg), []
    tested.sem_seg_head.register_forward_hook(lambda *args: calls.append(args))
    with EventStorage():
        losses = tested([make_input((64, 90), [[8, 8, 40, 60]], [0], 2)])
    assert set(losses) == {"loss_srm", "loss_srm_pairs"} and calls == []


C4 = [*RES5, *model(BACKBONE__NAME="build_resnet_backbone")]


@pytest.mark.parametrize(
    "opts, words",
    [
        (C4, ["'build_resnet_backbone'", "stride of 16", "size_divisibility"]),
        (model(BACKBONE__NAME="build_vitdet_of_any_size"), ["stride of 32", "size_divisibility"]),
        ([*POINT_SEMANTIC, *model(POINT_HEAD__NUM_CLASSES=8)], ["POINT_HEAD", "is 8", "must be 7"]),
        ([*POINT_MASKS, *POINT_SEMANTIC], ["POINT_HEAD", "8 for", "mask head and 7 for"]),
        ([*IMPLICIT, *POINT_SEMANTIC], ["POINT_HEAD", "8 for", "mask head and 7 for"]),
        (["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", ()], ["TEST.AUG.MIN_SIZES is ()"]),
        ([*KEYPOINTS, "INPUT.COPY_PASTE", 0.5], ["COPY_PASTE is 0.5", "KEYPOINT_ON"]),
        ([*KEYPOINTS, *model(ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=17)], ["is 17", "points_train", "[3]"]),
        (
            [*KEYPOINTS, "TEST.KEYPOINT_OKS_SIGMAS", [], "DATASETS.TEST", ("points_val",)],
            ["is 3", "points_val", "for 17"],
        ),
        ([*KEYPOINTS, "DATASETS.TRAIN", ("few_scenes_train",)], ["few_scenes_train", "[0]"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(cfg, opts, words):
    cfg.merge_from_list(opts)
    with pytest.raises(ValueError) as error:
        trainer_of(cfg)
    assert all(word in str(error.value) for word in words), error.value


def test_an_image_larger_than_the_square_of_a_backbone_is_refused(cfg):
    """In a batch of one image, Detectron2 would cut it off, and so would an exported file."""
    cfg.merge_from_list(model(BACKBONE__NAME="build_vitdet"))
    complete_config(cfg)
    tested = build_model(cfg).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="130 pixels.*128.*MAX_SIZE_TEST"):
        tested([make_input((64, 130), [], [])])
    for key, value in (("MAX_SIZE_TEST", 129), ("MIN_SIZE_TEST", 0)):
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
        cfg.INPUT[key] = value
        with pytest.raises(ExportError, match=rf"MAX_SIZE_TEST.*\b{value}\b.*128"):
            export_onnx(SimpleNamespace(model=tested, cfg=cfg), "unused.onnx")


def test_keypoints_are_flipped_with_the_image(cfg, datasets):
    cfg.merge_from_list(KEYPOINTS)
    complete_config(cfg)
    (d, *_), flip = DatasetCatalog.get(datasets[0]), T.RandomFlip(prob=1.0)
    instances = PanopticDatasetMapper(cfg, True, augmentations=[flip])(d)["instances"]
    found = instances.gt_keypoints.tensor
    assert len(found) == len(d["annotations"]) and found[:, :, 2].any()
    for x, points in zip(d["annotations"], found):
        left, right, middle = torch.tensor(x["keypoints"]).reshape(3, 3)
        if not left[2]:
            assert not points.any()  # nobody labelled them
            continue
        for point, source in zip(points, (right, left, middle)):
            assert point.tolist() == [d["width"] - source[0], source[1], source[2]]


@pytest.mark.parametrize("moved, expected", [(0, 100), (1000, 0)])
def test_ap_of_keypoints(datasets, tmp_path, moved, expected):
    evaluator = build_instance_evaluator(datasets[1], str(tmp_path), 100, [0.1, 0.1, 0.1])
    evaluator.reset()
    for d in DatasetCatalog.get(datasets[1]):
        annotations = [x for x in d["annotations"] if any(x["keypoints"])]
        instances = Instances((d["height"], d["width"]))
        boxes = torch.tensor([x["bbox"] for x in annotations])
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        instances.pred_classes = torch.tensor([x["category_id"] for x in annotations])
        instances.scores = torch.ones(len(annotations))
        points = torch.tensor([x["keypoints"] for x in annotations]).reshape(-1, 3, 3)
        instances.pred_keypoints = points + torch.tensor([moved, 0, 1])
        evaluator.process([d], [{"instances": instances}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "deformable",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not find_spec("detectron2._C"), reason="needs detectron2._C")
        ),
    ],
)
def test_the_cascade_of_the_model_zoo(tmp_path, deformable):
    """Its config as _BASE_, narrower, and a checkpoint in the zoo's format."""
    narrow = [*resnet(101, 32), *model(RESNETS__WIDTH_PER_GROUP=32, ROI_BOX_HEAD__FC_DIM=8)]
    for key in ("FPN.OUT_CHANNELS", "SEM_SEG_HEAD.CONVS_DIM", "ROI_MASK_HEAD.CONV_DIM"):
        narrow += [f"MODEL.{key}", 32]
    content = {
        "_BASE_": model_zoo.get_config_file("Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml"),
        "MODEL": {"META_ARCHITECTURE": "OANet", "DEVICE": "cpu"},
        "DATASETS": {"TRAIN": ["coco_2017_train_oanet"], "TEST": ["coco_2017_val_oanet"]},
    }
    content["MODEL"]["SEM_SEG_HEAD"] = {"NAME": "OANetSemSegFPNHead"}
    if not deformable:
        content["MODEL"]["RESNETS"] = {"DEFORM_ON_PER_STAGE": [False] * 4}
    (tmp_path / "oanet.yaml").write_text(yaml.safe_dump(content))
    cfg = load_config(tmp_path / "oanet.yaml", narrow)
    assert cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" and cfg.MODEL.FPN.NORM == "GN"
    complete_config(cfg)
    stuff = cfg.clone()
    stuff.merge_from_list(model(SEM_SEG_HEAD__SUPERVISION="stuff", SEM_SEG_HEAD__NUM_CLASSES=54))
    zoo = {k: v.numpy() for k, v in build_model(panoptic_fpn_cfg(stuff)).state_dict().items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": zoo, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    oanet = build_model(cfg)
    checkpointer = OANetCheckpointer(oanet)
    checkpointer.load(str(path))
    ranking = {x for x in oanet.state_dict() if x.startswith("srm_head.")}
    predictor = {f"sem_seg_head.predictor.{x}" for x in ("weight", "bias")}
    assert {*checkpointer.new} == ranking | predictor and ranking
    assert not {*checkpointer.unused} - predictor
    for name, tensor in oanet.state_dict().items():
        assert name in ranking | predictor or torch.equal(tensor, torch.from_numpy(zoo[name])), name
