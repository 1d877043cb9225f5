import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import FPN, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from oanet_d2.modeling.lean import (
    BOXES_AT_ONCE,
    LeanFPN,
    LeanFrozenBatchNorm2d,
    LeanMaskHead,
    LeanReLU,
    LeanRPNHead,
    make_lean,
)
from tests.conftest import panoptic_fpn_cfg

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
        fpn(images())
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
    expected = build_model(panoptic_fpn_cfg(tiny_cfg)).backbone
    assert type(expected) is FPN
    assert list(model.backbone.state_dict()) == list(expected.state_dict())
    assert type(model.roi_heads.mask_head) is LeanMaskHead


def mask_head(channels=16, classes=3):
    torch.manual_seed(0)
    shape = ShapeSpec(channels=channels, width=14, height=14)
    return MaskRCNNConvUpsampleHead(shape, num_classes=classes, conv_dims=[channels] * 3).eval()


@pytest.mark.parametrize("num_boxes", [0, 1, 16, 33, 34, 35, 67, 100])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mask_head_equals_detectron2s_to_the_bit(num_boxes, memory_format):
    theirs = mask_head().to(memory_format=memory_format)
    ours = make_lean(copy.deepcopy(theirs))
    assert type(ours) is LeanMaskHead
    sizes = []
    ours.predictor.register_forward_hook(lambda m, x, y: sizes.append(len(y)))
    x = torch.randn(num_boxes, 16, 14, 14).contiguous(memory_format=memory_format)
    with torch.no_grad():
        a, b = ours.layers(x), theirs.layers(x)
    assert torch.equal(a, b) and a.shape == (num_boxes, 3, 28, 28)
    assert sum(sizes) == num_boxes and max(sizes) <= BOXES_AT_ONCE
    # PyTorch may convolve up to 16 samples in another way than more of them.
    assert len(sizes) == 1 or min(sizes) > 16


@pytest.mark.parametrize("conv_dims", [(-1,), (24, 16)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_rpn_head_equals_detectron2s_to_the_bit(
    threads_as_before, conv_dims, memory_format, dtype, num_threads
):
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    theirs = StandardRPNHead(in_channels=16, num_anchors=3, conv_dims=conv_dims)
    theirs.to(dtype=dtype, memory_format=memory_format)
    ours = make_lean(copy.deepcopy(theirs))
    assert type(ours) is LeanRPNHead
    layouts = set()
    ours.objectness_logits.register_forward_hook(lambda m, x, y: layouts.add(x[0].layout))
    maps = [torch.randn(2, 16, h, h + 3).to(dtype=dtype) for h in (1, 7, 40)]
    maps = [x.contiguous(memory_format=memory_format) for x in maps]
    with torch.no_grad():
        for a, b in zip(ours(maps), theirs(maps)):
            assert all(torch.equal(x, y) and x.layout == torch.strided for x, y in zip(a, b))
    is_plain = memory_format == torch.contiguous_format and dtype == torch.float32
    assert (torch._mkldnn in layouts) == (is_plain and num_threads > 1)

    layouts.clear()  # with gradients it is Detectron2's
    x = torch.randn(1, 16, 8, 8, dtype=dtype, requires_grad=True)
    sum(y.sum() for of_each in ours([x]) for y in of_each).backward()
    assert x.grad.any() and layouts == {torch.strided}


def test_mask_head_takes_all_boxes_at_once_with_gradients():
    theirs = mask_head().train()
    ours = make_lean(copy.deepcopy(theirs))
    sizes = []
    ours.predictor.register_forward_hook(lambda m, x, y: sizes.append(len(y)))
    x = torch.randn(50, 16, 14, 14)
    for head in (ours, theirs):
        head.layers(x).sum().backward()
    assert sizes == [50]
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a.grad, b.grad)


def conv(norm, activation):
    """A convolution of Detectron2's with a norm that does something."""
    torch.manual_seed(0)
    norm = get_norm(norm, 32)
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    return Conv2d(3, 32, 3, norm=norm, activation=activation).eval()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("activation", [F.relu, nn.ReLU(), torch.tanh])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_equals_detectron2s_to_the_bit(norm, activation, memory_format, dtype):
    theirs = conv(norm, copy.deepcopy(activation)).to(memory_format=memory_format)
    ours = make_lean(copy.deepcopy(theirs))
    assert isinstance(ours.norm, LeanFrozenBatchNorm2d) == (norm == "FrozenBN")
    assert isinstance(ours.activation, LeanReLU) == (activation is not torch.tanh)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 21, 17).contiguous(memory_format=memory_format)
    before = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        with torch.no_grad():
            a, b = ours(x), theirs(x)
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(x, before)
        gradients = []
        for module in (ours, theirs):  # with gradients it is Detectron2's
            given = x.clone().requires_grad_()
            module(given).square().sum().backward()
            gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_norm_and_relu_write_over_what_nobody_else_has():
    module = make_lean(conv("FrozenBN", nn.ReLU()))
    x = torch.randn(1, 32, 5, 6)
    with torch.no_grad():
        assert module.norm(x).data_ptr() == module.activation(x).data_ptr() == x.data_ptr()
        kept = []
        module.norm.register_forward_hook(lambda m, x, y: kept.extend(x))
        before = x.clone()
        assert module.norm(x).data_ptr() != x.data_ptr()
        assert torch.equal(x, before)


def test_a_norm_that_is_not_of_a_convolution_stays():
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU())
    make_lean(model)
    assert [type(x) for x in model] == [FrozenBatchNorm2d, nn.ReLU]
