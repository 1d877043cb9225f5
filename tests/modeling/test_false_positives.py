import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oanet_d2.modeling.candidates import Candidates
from oanet_d2.modeling.false_positives import _moved, with_false_positives

SIZE = (24, 32)
CLASSES = 5


def rectangles(boxes):
    """Ground truth whose masks fill their boxes, in cells."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    shares = boxes / torch.tensor([SIZE[1], SIZE[0]] * 2)
    return Candidates(masks, torch.arange(len(boxes)) % CLASSES, torch.ones(len(boxes)), shares)


@given(st.integers(0, 6), st.floats(0.1, 1.0), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_real_ones_stay_and_the_others_are_like_detections(num, probability, seed):
    torch.manual_seed(seed)
    real = rectangles([[i, 2 * i, i + 8, 2 * i + 10] for i in range(num)])
    made = with_false_positives(real, CLASSES, probability)
    assert torch.equal(made.masks[:num], real.masks)
    assert torch.equal(made.classes[:num], real.classes)
    assert torch.equal(made.boxes[:num], real.boxes)
    assert num <= len(made.classes) <= 2 * num
    assert len(made.masks) == len(made.scores) == len(made.boxes) == len(made.classes)
    assert ((made.scores > 0) & (made.scores <= 1)).all()
    assert ((made.classes >= 0) & (made.classes < CLASSES)).all()
    assert made.masks[num:].flatten(1).any(1).all()
    assert made.masks.dtype == torch.bool and made.classes.dtype == torch.int64
    # the mean over instances, so that a property of each pair does not depend on who is whose
    if num == 1 and len(made.scores) == 2:
        assert made.scores[1] <= made.scores[0]


def test_how_many():
    torch.manual_seed(0)
    real = rectangles([[4, 4, 16, 16]] * 400)
    made = len(with_false_positives(real, CLASSES, 0.25).classes) - 400
    assert 70 < made < 130
    assert len(with_false_positives(real, CLASSES, 1.0).classes) == 800


def test_none_leaves_everything_as_it_is():
    real = rectangles([[4, 4, 16, 16]])
    assert with_false_positives(real, CLASSES, 0.0) is real


def test_they_lie_near_what_they_are_made_from():
    torch.manual_seed(0)
    real = rectangles([[10, 8, 22, 18]] * 300)
    made = with_false_positives(real, CLASSES, 1.0).masks[300:]
    inside = (made & real.masks[0]).flatten(1).sum(1)
    iou = inside / (made | real.masks[0]).flatten(1).sum(1)
    assert 0.4 < iou.mean() < 0.9
    assert (iou < 0.999).float().mean() > 0.9


def test_moved_by_nothing_is_the_same(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    real = rectangles([[3, 4, 11, 15], [0, 0, 32, 24]])
    assert torch.equal(_moved(real.masks, real.boxes), real.masks)


def test_moved_by_hand(monkeypatch):
    """With every random number 1 and no stretch, a box of 10 x 5 moves by 2 and by 1 cells."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    monkeypatch.setattr("oanet_d2.modeling.false_positives._MOVE", 0.2)
    monkeypatch.setattr("oanet_d2.modeling.false_positives._STRETCH", 0.0)
    real = rectangles([[4, 6, 14, 11]])
    assert torch.equal(_moved(real.masks, real.boxes), rectangles([[6, 7, 16, 12]]).masks)
