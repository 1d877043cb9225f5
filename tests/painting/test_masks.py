import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detectron2.layers import paste_masks_in_image

from oanet_d2.painting.arrays import pasted_mask
from oanet_d2.painting.masks import BoxedMasks
from tests.conftest import box_mask

SIZE = HEIGHT, WIDTH = 50, 70


@st.composite
def roi_predictions(draw):
    """Masks in boxes of any size, also at the border, with empty and full masks."""
    n = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    centre = torch.rand(n, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    size = torch.rand(n, 2, generator=generator) * draw(st.sampled_from([2.0, 30.0, 150.0])) + 0.01
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    if draw(st.booleans()):
        boxes = boxes.round()
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    side = draw(st.sampled_from([1, 4, 28]))
    masks = torch.rand(len(boxes), side, side, generator=generator)
    kind = draw(st.sampled_from(["noise", "spot", "full", "limit", "mixed"]))
    threshold = draw(st.sampled_from([0.5, 0.3, 0.8]))
    if kind == "spot":  # few cells, so that most of a box is left out
        masks = torch.where(masks > 0.97, masks, 0.4 * masks)
    elif kind == "full":
        masks[:] = 1
    elif kind == "limit":
        masks[:] = threshold
    elif kind == "mixed":
        masks[::2] = 0
    return masks, boxes, threshold


@settings(max_examples=300)
@given(roi_predictions())
def test_pasted_masks_equal_detectron2_pixel_for_pixel(prediction):
    roi_masks, boxes, threshold = prediction
    expected = paste_masks_in_image(roi_masks, boxes, SIZE, threshold)
    masks = BoxedMasks.paste(roi_masks, boxes, SIZE, threshold)
    assert len(masks) == len(boxes) and masks.image_size == SIZE
    full = masks.full()
    assert full.dtype == torch.bool
    assert torch.equal(full, expected.reshape(full.shape))


@given(roi_predictions())
def test_pasted_in_numpy_up_to_rounding(prediction):
    roi_masks, boxes, threshold = prediction
    threshold = max(threshold, 0.5)
    # Between a little less and a little more: at the limit rounding decides.
    lower, upper = (BoxedMasks.paste(roi_masks, boxes, SIZE, threshold + x).full() for x in (1e-4, -1e-4))
    for i, box in enumerate(boxes.tolist()):
        mask, region = pasted_mask(roi_masks[i].numpy(), box, SIZE, threshold)
        full = torch.zeros(SIZE, dtype=torch.bool)
        full[region] = torch.from_numpy(mask)
        assert not (lower[i] & ~full).any() and not (full & ~upper[i]).any()


def test_half_precision_is_pasted_in_float():
    """Neither the network's half precision nor autocast may round the coordinates of pixels."""
    size, roi_masks = (700, 900), torch.rand(2, 28, 28).bfloat16()
    boxes = torch.tensor([[3.0, 4.0, 300.0, 400.0], [500.3, 20.7, 880.1, 690.9]]).bfloat16()
    expected = paste_masks_in_image(roi_masks.float(), boxes.float(), size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(BoxedMasks.paste(roi_masks, boxes, size).full(), expected)


def test_masks_of_another_program():
    full = torch.stack([box_mask(2, 3, 7, 9), box_mask(0, 0, 0, 0), box_mask(0, 0, 12, 10)])
    masks = BoxedMasks.from_masks(full.to(torch.uint8))
    assert masks.image_size == (10, 12) and masks[0][0].dtype == torch.bool
    assert masks[0][1] == (slice(3, 9), slice(2, 7)) and torch.equal(masks.full(), full)
    assert BoxedMasks.from_masks(full[:0]).full().shape == (0, 10, 12)


@given(roi_predictions(), st.data())
def test_some_of_them_cached_or_not(prediction, data):
    masks = BoxedMasks.paste(*prediction[:2], SIZE, prediction[2])
    full = masks.full()
    chosen = data.draw(st.lists(st.integers(0, len(masks) - 1))) if len(masks) else []
    indices = torch.tensor(chosen, dtype=torch.int64)
    for some in (masks.select(chosen), masks.select(indices), masks.cached().select(chosen)):
        assert torch.equal(some.full(), full[indices]) and some.image_size == SIZE
    assert torch.equal(BoxedMasks.from_masks(full).full(), full)
    made = []
    region = slice(0, 2), slice(0, 2)
    cached = BoxedMasks([region], lambda i: made.append(i) or torch.ones(2, 2), SIZE, "cpu").cached()
    assert cached[0][0] is cached[0][0] and made == [0]
