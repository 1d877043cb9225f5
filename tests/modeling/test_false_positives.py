import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oanet_d2.modeling.false_positives import _moved, with_false_positives
from oanet_d2.modeling.grid import ground_truth_on_grid
from tests.conftest import box_mask, make_grid_instances, make_instances

SIZE = (24, 32)
CLASSES = 5


def rectangles(boxes):
    """Ground truth whose masks fill their boxes, in cells."""
    masks = [box_mask(*box, SIZE) for box in boxes] or [torch.zeros(SIZE, dtype=torch.bool)]
    classes = [i % CLASSES for i in range(len(boxes))]
    return make_grid_instances(torch.stack(masks)[: len(boxes)], classes, [1.0] * len(boxes))


@given(st.integers(0, 6), st.floats(0.1, 1.0), st.integers(0, 10**6))
@settings(max_examples=20)
def test_the_real_ones_stay_and_the_others_are_like_detections(num, probability, seed):
    torch.manual_seed(seed)
    real = rectangles([[i, 2 * i, i + 8, 2 * i + 10] for i in range(num)])
    found = with_false_positives(real, CLASSES, probability)
    assert torch.equal(found.classes[:num], real.classes)
    assert num <= len(found.classes) <= 2 * num
    assert len(found.masks) == len(found.scores) == len(found.boxes) == len(found.classes)
    assert ((found.scores > 0) & (found.scores <= 1)).all()
    assert ((found.classes >= 0) & (found.classes < CLASSES)).all()
    assert found.masks.flatten(1).any(1).all()
    assert found.masks.dtype == torch.bool and found.classes.dtype == torch.int64
    boxes_of_masks = make_grid_instances(found.masks, found.classes).boxes
    torch.testing.assert_close(found.boxes, boxes_of_masks)
    if num == 1 and len(found.scores) == 2:
        assert found.scores[1] <= found.scores[0]


def test_they_lie_around_what_they_are_made_from():
    torch.manual_seed(0)
    real = rectangles([[10, 8, 22, 18]] * 400)
    assert with_false_positives(real, CLASSES, 0.0) is real
    assert 70 < len(with_false_positives(real, CLASSES, 0.25).classes) - 400 < 130
    of_all = with_false_positives(real, CLASSES, 1.0).masks
    for masks, least, most in ((of_all[:400], 0.7, 0.95), (of_all[400:], 0.4, 0.7)):
        inside = (masks & real.masks[0]).flatten(1).sum(1)
        iou = inside / (masks | real.masks[0]).flatten(1).sum(1)
        assert least < iou.mean() < most
        assert (iou < 0.999).float().mean() > 0.9
        # neither the move nor the stretch has a preferred direction
        middles = torch.stack([mask.nonzero().float().mean(0) for mask in masks])
        assert ((middles.mean(0) - torch.tensor([12.5, 15.5])).abs() < 0.3).all()


def test_an_instance_of_one_cell_is_not_lost():
    torch.manual_seed(0)
    real = rectangles([[i, i, i + 1, i + 1] for i in range(20)] * 10)
    assert with_false_positives(real, CLASSES, 0.3).masks[:200].flatten(1).any(1).all()


def test_moved_by_hand(monkeypatch):
    """With every random number 1 and no stretch, a box of 10 x 5 cells moves by 2 and by 1."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    moved = _moved(rectangles([[4, 6, 14, 11]]).masks, 0.2, 0.0)
    assert torch.equal(moved, rectangles([[6, 7, 16, 12]]).masks)


def test_an_unmoved_copy_has_the_box_of_its_original(monkeypatch):
    """Whatever the batch is padded to: both are shares of the image."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for size, box in (((64, 96), [0, 0, 96, 64]), ((50, 70), [0, 0, 70, 50])):
        real = ground_truth_on_grid(make_instances(size, [box, [16, 16, 48, 48]], [0, 1]), 4)
        found = with_false_positives(real, CLASSES, 1.0)
        assert torch.equal(found.masks[2:], real.masks)
        assert real.boxes[0].tolist() == found.boxes[2].tolist() == [0, 0, 1, 1]
        height, width = size
        pixels = found.boxes[3] * torch.tensor([width, height] * 2)
        assert (pixels - torch.tensor([16, 16, 48, 48])).abs().max() < 4  # in cells
