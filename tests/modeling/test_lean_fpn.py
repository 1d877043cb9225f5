import copy
import weakref

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from oanet_d2.modeling.lean_fpn import LeanFPN, make_lean

OUT_CHANNELS = 32  # GN divides them into so many groups
TOP_BLOCKS = {
    "none": lambda: None,
    "pooled p5": LastLevelMaxPool,
    "from res5": lambda: LastLevelP6P7(512, OUT_CHANNELS),
    "from p5": lambda: LastLevelP6P7(OUT_CHANNELS, OUT_CHANNELS, in_feature="p5"),
}


def resnet_fpn(cfg, in_features=("res2", "res3", "res4", "res5"), **kwargs):
    """Detectron2's FPN on a ResNet-18 with random weights."""
    torch.manual_seed(0)
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return FPN(bottom_up, list(in_features), OUT_CHANNELS, **kwargs).eval()


def images(size=(64, 96)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def assert_same_maps(ours, theirs):
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].stride() == theirs[name].stride(), name


@pytest.mark.parametrize("top_block", TOP_BLOCKS)
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_equals_detectron2s_to_the_bit(tiny_cfg, top_block, fuse_type, norm):
    fpn = resnet_fpn(tiny_cfg, norm=norm, fuse_type=fuse_type, top_block=TOP_BLOCKS[top_block]())
    lean = make_lean(copy.deepcopy(fpn))
    assert type(lean) is LeanFPN and type(fpn) is FPN
    with torch.no_grad():
        assert_same_maps(lean(images()), fpn(images()))


def test_of_some_of_the_maps_only(tiny_cfg):
    fpn = resnet_fpn(tiny_cfg, ["res3", "res4"])
    with torch.no_grad():
        assert_same_maps(make_lean(copy.deepcopy(fpn))(images()), fpn(images()))


def test_channels_last(tiny_cfg):
    fpn = resnet_fpn(tiny_cfg).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_same_maps(make_lean(copy.deepcopy(fpn))(x), fpn(x))


def test_autocast(tiny_cfg):
    fpn = resnet_fpn(tiny_cfg)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = make_lean(copy.deepcopy(fpn))(images())
        assert_same_maps(ours, fpn(images()))
    assert ours["p2"].dtype == torch.bfloat16


def test_gradients_are_detectron2s(tiny_cfg):
    fpn = resnet_fpn(tiny_cfg, top_block=LastLevelMaxPool()).train()
    lean = make_lean(copy.deepcopy(fpn))
    for model in (fpn, lean):
        sum(x.square().sum() for x in model(images()).values()).backward()
    for (name, theirs), ours in zip(fpn.named_parameters(), lean.parameters()):
        assert (theirs.grad is None) == (ours.grad is None), name
        assert theirs.grad is None or torch.equal(ours.grad, theirs.grad), name


class Recorded(Backbone):
    """Two maps, of which references are kept that keep nothing alive."""

    def __init__(self):
        super().__init__()
        self._out_features = ["res2", "res3"]
        self._out_feature_channels = {"res2": 4, "res3": 4}
        self._out_feature_strides = {"res2": 4, "res3": 8}
        self.made = {}

    def forward(self, x):
        maps = {"res2": torch.ones(1, 4, 16, 16), "res3": torch.ones(1, 4, 8, 8)}
        self.made = {name: weakref.ref(x) for name, x in maps.items()}
        return maps


def test_maps_are_gone_when_they_have_been_used():
    fpn = make_lean(FPN(Recorded(), ["res2", "res3"], 8).eval())
    alive = {}

    def look(module, args):
        alive[module] = [name for name, x in fpn.bottom_up.made.items() if x() is not None]

    for part in (fpn.fpn_output3, fpn.fpn_output2):
        part.register_forward_pre_hook(look)
    with torch.no_grad():
        fpn(None)
    assert alive == {fpn.fpn_output3: ["res2"], fpn.fpn_output2: []}


def test_what_a_hook_keeps_is_not_changed(tiny_cfg):
    fpn = resnet_fpn(tiny_cfg)
    kept = []
    fpn.fpn_lateral2.register_forward_hook(lambda m, x, y: kept.append((y, y.clone())))
    with torch.no_grad():
        make_lean(fpn)(images())
    ((output, as_it_was),) = kept
    assert torch.equal(output, as_it_was)


def test_other_backbones_stay_what_they_are(tiny_cfg):
    class Special(FPN):
        pass

    special = Special(Recorded(), ["res2", "res3"], 8)
    assert type(make_lean(special)) is Special
    resnet = build_resnet_backbone(tiny_cfg, ShapeSpec(channels=3))
    assert make_lean(resnet) is resnet


def test_every_oanet_with_detectron2s_fpn_has_it(tiny_cfg):
    model = build_model(tiny_cfg)
    assert type(model.backbone) is LeanFPN
    theirs = tiny_cfg.clone()
    theirs.MODEL.META_ARCHITECTURE = "PanopticFPN"
    theirs.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    expected = build_model(theirs).backbone
    assert type(expected) is FPN
    assert list(model.backbone.state_dict()) == list(expected.state_dict())
