import copy

import pytest
import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from oanet_d2.modeling import lean
from oanet_d2.modeling.lean import make_lean
from oanet_d2.modeling.proposals import propose

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def norms_in_onednn(monkeypatch):
    """The norms that were computed in oneDNN's layout."""
    seen = []
    compute = lean.frozen_norm_in_onednn
    monkeypatch.setattr(
        lean, "frozen_norm_in_onednn", lambda norm, x: seen.append(norm) or compute(norm, x)
    )
    return seen


def network(*opts, depth=18):
    """Detectron2's backbone and RPN, as small as can be, with norms that do something."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.merge_from_list(opts)
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    rpn = build_proposal_generator(cfg, backbone.output_shape())
    for part in backbone.modules():
        if isinstance(part, FrozenBatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return nn.ModuleList([backbone, rpn]).eval()


def images(size=(96, 128), batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = [(size[0] - 5 * i, size[1] - 3 * i) for i in range(batch)]
    return ImageList(torch.randn(batch, 3, *size, generator=generator), sizes)


def assert_same(ours, theirs):
    """Of what :func:`propose` and Detectron2's own calls return."""
    features, found, losses = ours
    expected, expected_found, expected_losses = theirs
    assert list(features) == list(expected)
    for name, x in expected.items():
        assert features[name].layout == torch.strided and torch.equal(features[name], x), name
    assert len(found) == len(expected_found)
    for a, b in zip(found, expected_found):
        assert len(a) > 0 and torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)
    assert {k: v.item() for k, v in losses.items()} == {
        k: v.item() for k, v in expected_losses.items()
    }


def detectron2s(network, images, gt_instances=None):
    backbone, rpn = network
    features = backbone(images.tensor)
    return (features, *rpn(images, features, gt_instances))


def assert_as_detectron2s(theirs, batch=None):
    """Without gradients."""
    ours, batch = make_lean(copy.deepcopy(theirs)), batch or images()
    with torch.no_grad():
        assert_same(propose(*ours, batch), detectron2s(theirs, batch))


@pytest.mark.parametrize(
    "opts, depth",
    [
        ([], 18),
        ([], 50),
        (["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"], 50),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.FPN.FUSE_TYPE", "avg"], 50),
        (["MODEL.RPN.CONV_DIMS", "[-1, 24]"], 18),
        (
            [
                *["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"],
                *["MODEL.RPN.IN_FEATURES", "['p3', 'p4', 'p5', 'p6', 'p7']"],
                *["MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"],
            ],
            50,
        ),
    ],
    ids=["R-18", "R-50", "ResNeXt", "fb.torch and avg", "two convolutions", "p6 and p7"],
)
@pytest.mark.parametrize("size", [(96, 128), (160, 224)])
def test_equals_detectron2s_to_the_bit(norms_in_onednn, opts, depth, size):
    theirs = network(*opts, depth=depth)
    ours = make_lean(copy.deepcopy(theirs))
    with torch.no_grad():
        expected = detectron2s(theirs, images(size))
        assert_same(propose(*ours, images(size)), expected)
    num_norms = sum(isinstance(x, FrozenBatchNorm2d) for x in ours.modules())
    assert len(norms_in_onednn) == num_norms > 0
    # The backbone for itself gives plain maps too.
    with torch.no_grad():
        for name, x in ours[0](images(size).tensor).items():
            assert torch.equal(x, expected[0][name])


def test_inference_mode(norms_in_onednn):
    with torch.inference_mode():
        assert_as_detectron2s(network())
    assert norms_in_onednn


def with_gn(network):
    backbone = network[0]
    backbone.fpn_lateral3.norm = nn.GroupNorm(4, 32)
    backbone.fpn_lateral3.norm.requires_grad_(False)


def with_a_hook(network):
    def look(module, args, output):
        output.numpy()

    network[0].bottom_up.res3.register_forward_hook(look)


def with_a_hook_before_the_rpn(network):
    def look(module, args):
        for x in args[1].values():
            x.numpy()

    network[1].register_forward_pre_hook(look)


def with_an_activation(network):
    network[0].fpn_output2.activation = torch.tanh


class OwnHead(StandardRPNHead):
    def forward(self, features):
        return super().forward([x.flip(3) for x in features])


def with_a_head_of_ones_own(network):
    network[1].rpn_head.__class__ = OwnHead


class OwnRPN(RPN):
    def forward(self, images, features, gt_instances=None):
        return super().forward(images, {k: x.flip(3) for k, x in features.items()}, gt_instances)


def with_a_proposal_generator_of_ones_own(network):
    network[1].__class__ = OwnRPN


CHANGES = [with_gn, with_a_hook, with_a_hook_before_the_rpn, with_an_activation]
CHANGES += [with_a_head_of_ones_own, with_a_proposal_generator_of_ones_own]


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_not_take_such_maps_is_not_given_any(norms_in_onednn, change):
    theirs = network()
    change(theirs)
    assert_as_detectron2s(theirs)
    assert not norms_in_onednn


def test_channels_last_stay_so(norms_in_onednn):
    batch = images()
    batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
    assert_as_detectron2s(network().to(memory_format=torch.channels_last), batch)
    assert not norms_in_onednn


def test_autocast(norms_in_onednn):
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_detectron2s(network())
    assert not norms_in_onednn


def test_one_thread(norms_in_onednn):
    torch.set_num_threads(1)
    assert_as_detectron2s(network())
    assert not norms_in_onednn


def test_losses_and_gradients_are_detectron2s(norms_in_onednn):
    theirs = network().train()
    ours = make_lean(copy.deepcopy(theirs))
    box = Boxes(torch.tensor([[8.0, 8, 60, 50]]))
    gt = [Instances(size, gt_boxes=box) for size in images().image_sizes]
    results = []
    for run in (lambda *args: propose(*ours, *args), lambda *args: detectron2s(theirs, *args)):
        torch.manual_seed(0)
        with EventStorage():
            results.append(run(images(), gt))
        sum(results[-1][2].values()).backward()
    assert_same(*results)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    assert not norms_in_onednn
