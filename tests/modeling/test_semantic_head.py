import pytest
import torch
from torch.nn import functional as F

from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from oanet_d2.modeling import OANetSemSegFPNHead

SHAPES = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}
ARGS = {"conv_dims": 8, "common_stride": 4, "loss_weight": 0.5}


def features():
    return {"p2": torch.randn(2, 8, 8, 12), "p3": torch.randn(2, 8, 4, 6)}


def make_heads(num_things, ignore_value=255):
    torch.manual_seed(0)
    args = {**ARGS, "num_classes": 5, "ignore_value": ignore_value}
    ours = OANetSemSegFPNHead(SHAPES, num_things=num_things, **args)
    theirs = SemSegFPNHead(SHAPES, **args)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_stuff_convention_is_detectron2s_head():
    ours, theirs = make_heads(num_things=0)
    x = features()
    assert torch.equal(ours.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("ignore_value", [255, -1, 7])
@pytest.mark.parametrize("num_things", [0, 3])
def test_loss_is_detectron2s(num_things, ignore_value):
    ours, theirs = make_heads(num_things, ignore_value)
    x, targets = features(), torch.randint(0, 5, (2, 32, 48))
    targets[:, :5] = ignore_value
    nothing, losses = ours(x, targets)
    assert nothing is None and losses == ours.losses(ours.layers(x), targets)
    assert losses == theirs(x, targets)[1]
    # A label that is not void changes it.
    targets[:, :5] = 0
    assert losses != ours(x, targets)[1]


def test_things_become_one_channel_in_inference():
    ours, theirs = make_heads(num_things=3)
    x = features()
    reduced, losses = ours.eval()(x)
    assert losses == {} and reduced.shape == (2, 3, 32, 48)
    assert torch.equal(ours.predict(ours.layers(x)), reduced)
    # Enlarging is linear, so the stuff channels are the last two of the plain head.
    torch.testing.assert_close(reduced[:, 1:], theirs.eval()(x)[0][:, 3:])
    # Channel 0 is the best thing, at the head's own resolution.
    logits = ours.layers(x)
    small = torch.cat([logits[:, :3].amax(1, keepdim=True), logits[:, 3:]], 1)
    assert torch.equal(small.argmax(1) == 0, logits.argmax(1) < 3)
    torch.testing.assert_close(reduced, F.interpolate(small, scale_factor=4, mode="bilinear"))


def test_a_batch_without_a_label_has_zero_loss_and_gradients():
    ours, _ = make_heads(num_things=3)
    loss = ours(features(), torch.full((2, 32, 48), 255))[1]["loss_sem_seg"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_refuses_contradicting_class_counts():
    with pytest.raises(ValueError, match="NUM_CLASSES is 54.*80 thing classes"):
        OANetSemSegFPNHead(SHAPES, num_classes=54, num_things=80, ignore_value=255, **ARGS)
    with pytest.raises(ValueError, match="IGNORE_VALUE is 255.*300 classes"):
        OANetSemSegFPNHead(SHAPES, num_classes=300, num_things=80, ignore_value=255, **ARGS)
