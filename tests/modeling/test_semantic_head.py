import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from oanet_d2.modeling import OANetSemSegFPNHead

SHAPES = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}
ARGS = {"conv_dims": 8, "common_stride": 4, "ignore_value": 255, "loss_weight": 0.5}


def features():
    return {"p2": torch.randn(2, 8, 8, 12), "p3": torch.randn(2, 8, 4, 6)}


def make_heads(num_classes, num_things):
    torch.manual_seed(0)
    ours = OANetSemSegFPNHead(SHAPES, num_classes=num_classes, num_things=num_things, **ARGS)
    theirs = SemSegFPNHead(SHAPES, num_classes=num_classes, **ARGS)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_stuff_convention_is_detectron2s_head():
    ours, theirs = make_heads(num_classes=5, num_things=0)
    x = features()
    assert torch.equal(ours.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("num_things", [0, 3])
def test_loss_is_detectron2s(num_things):
    ours, theirs = make_heads(num_classes=5, num_things=num_things)
    x, targets = features(), torch.randint(0, 5, (2, 32, 48))
    targets[:, :5] = 255
    for a, b in zip(ours(x, targets)[1].values(), theirs(x, targets)[1].values()):
        torch.testing.assert_close(a, b)


def test_things_become_one_channel_at_inference():
    ours, theirs = make_heads(num_classes=5, num_things=3)
    x = features()
    ours.eval()
    reduced, losses = ours(x)
    assert losses == {} and reduced.shape == (2, 3, 32, 48)
    assert torch.equal(ours.train().predict(ours.layers(x)), reduced)
    # enlarging is linear, so the stuff channels are exactly the last two of the plain head
    torch.testing.assert_close(reduced[:, 1:], theirs.eval()(x)[0][:, 3:])
    # and channel 0 is the best thing, at the head's own resolution
    logits = ours.layers(x)
    best_is_thing = logits.argmax(1) < 3
    reduced_small = torch.cat([logits[:, :3].amax(1, keepdim=True), logits[:, 3:]], 1)
    assert torch.equal(reduced_small.argmax(1) == 0, best_is_thing)
    torch.testing.assert_close(
        reduced, torch.nn.functional.interpolate(reduced_small, scale_factor=4, mode="bilinear")
    )


def test_losses_of_the_layers_are_those_of_the_head():
    ours, _ = make_heads(num_classes=5, num_things=3)
    x, targets = features(), torch.randint(0, 5, (2, 32, 48))
    assert ours.losses(ours.layers(x), targets) == ours(x, targets)[1]


def test_batch_without_a_label_has_zero_loss_and_gradients():
    ours, _ = make_heads(num_classes=5, num_things=3)
    loss = ours(features(), torch.full((2, 32, 48), 255))[1]["loss_sem_seg"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.parameters())


def test_refuses_contradicting_class_counts():
    with pytest.raises(ValueError, match="NUM_CLASSES is 54.*80 thing classes"):
        OANetSemSegFPNHead(SHAPES, num_classes=54, num_things=80, **ARGS)
    with pytest.raises(ValueError, match="IGNORE_VALUE is 255.*300 classes"):
        OANetSemSegFPNHead(SHAPES, num_classes=300, num_things=80, **ARGS)
