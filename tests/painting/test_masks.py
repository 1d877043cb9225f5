import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detectron2.layers import paste_masks_in_image

from oanet_d2.modeling.instance_masks import BoxedMasks

HEIGHT, WIDTH = 50, 70


@st.composite
def instances(draw):
    """Masks in boxes of any size, at the border and across it, with empty and full masks."""
    n = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    centre = torch.rand(n, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    size = torch.rand(n, 2, generator=generator) * draw(st.sampled_from([2.0, 30.0, 150.0])) + 0.01
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
    if draw(st.booleans()):
        boxes = boxes.round()
    boxes = boxes.clamp(min=0).minimum(limit)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    side = draw(st.sampled_from([1, 4, 28]))
    masks = torch.rand(len(boxes), side, side, generator=generator)
    kind = draw(st.sampled_from(["noise", "spot", "full", "empty", "mixed"]))
    if kind == "spot":  # few cells, so that most of a box is left out
        masks = torch.where(masks > 0.97, masks, 0.4 * masks)
    elif kind == "full":
        masks[:] = 1
    elif kind == "empty":
        masks[:] = 0.49
    elif kind == "mixed":
        masks[::2] = 0
    return masks, boxes, draw(st.sampled_from([0.5, 0.3, 0.8]))


@settings(max_examples=400, deadline=None)
@given(instances())
def test_equals_detectron2_pixel_for_pixel(given_instances):
    roi_masks, boxes, threshold = given_instances
    expected = paste_masks_in_image(roi_masks, boxes, (HEIGHT, WIDTH), threshold)
    masks = BoxedMasks(roi_masks, boxes, (HEIGHT, WIDTH), threshold)
    assert len(masks) == len(boxes)
    full = masks.full()
    assert full.dtype == torch.bool
    assert torch.equal(full, expected.reshape(full.shape))
    for index in range(len(masks)):
        mask, region = masks[index]
        assert torch.equal(mask, expected[index][region])


def test_only_where_the_mask_can_be():
    roi_masks = torch.zeros(1, 28, 28)
    roi_masks[0, 14:18, 7:14] = 1
    masks = BoxedMasks(roi_masks, torch.tensor([[100.0, 200.0, 380.0, 480.0]]), (600, 600))
    mask, (rows, columns) = masks[0]
    # ten pixels a cell; half a cell on each side, and one pixel more
    assert (rows, columns) == (slice(334, 386), slice(164, 246))
    assert mask.shape == (52, 82)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    roi_masks = torch.rand(2, 28, 28).to(dtype)
    boxes = torch.tensor([[3.0, 4.0, 30.0, 40.0], [10.0, 20.0, 60.0, 50.0]])
    expected = paste_masks_in_image(roi_masks.float(), boxes, (HEIGHT, WIDTH))
    assert torch.equal(BoxedMasks(roi_masks, boxes, (HEIGHT, WIDTH)).full(), expected)
