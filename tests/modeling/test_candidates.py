import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detectron2.structures import BitMasks, PolygonMasks

from oanet_d2.modeling.candidates import (
    build_instance_tensor,
    grid_size,
    gt_candidates,
    gt_masks_to_grid,
    labels_to_grid,
    ranking_target,
    relative_boxes,
    roi_masks_to_grid,
)
from oanet_d2.modeling.instance_masks import mask_extents
from oanet_d2.modeling.srm_head import SpatialRankingHead
from tests.conftest import make_input, make_instances


def test_instance_tensor_by_hand():
    masks = torch.tensor(
        [
            [[1, 1, 0], [1, 1, 0]],  # class 2
            [[0, 1, 1], [0, 0, 0]],  # class 0, competes with the first in one cell
            [[0, 0, 0], [0, 1, 1]],  # class 2 again: the channel is the union
        ],
        dtype=torch.bool,
    )
    tensor = build_instance_tensor(masks, torch.tensor([2, 0, 2]), num_classes=3)
    expected = torch.tensor(
        [
            [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]],
            [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]],
        ]
    )
    assert torch.equal(tensor, expected)


def test_no_instance_is_all_zero():
    tensor = build_instance_tensor(
        torch.zeros(0, 2, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), num_classes=4
    )
    assert tensor.shape == (4, 2, 3) and not tensor.any()


@pytest.mark.parametrize("size, stride, expected", [((64, 96), 4, (16, 24)), ((65, 3), 4, (17, 1))])
def test_grid_covers_the_image(size, stride, expected):
    assert grid_size(size, stride) == expected


def test_roi_mask_is_pasted_into_its_box_and_binarized():
    # the left half of the mask at 0.9, the right half just below the threshold
    roi_mask = torch.full((1, 28, 28), 0.49)
    roi_mask[:, :, :14] = 0.9
    box = torch.tensor([[8.0, 4.0, 40.0, 20.0]])  # cells 2..9 x 1..4 at stride 4
    grid = roi_masks_to_grid(roi_mask, box, stride=4, size=(8, 12), threshold=0.5)
    expected = torch.zeros(1, 8, 12, dtype=torch.bool)
    expected[0, 1:5, 2:6] = True
    assert torch.equal(grid, expected)


def test_an_instance_between_cell_centres_keeps_one_cell():
    roi_masks = torch.zeros(2, 28, 28)
    roi_masks[0, 14, 14] = 0.8  # over the threshold, but smaller than a cell
    roi_masks[1] = 0.1  # nowhere over it: stays empty
    boxes = torch.tensor([[20.0, 12.0, 24.0, 16.0], [0.0, 0.0, 32.0, 32.0]])
    grid = roi_masks_to_grid(roi_masks, boxes, stride=8, size=(4, 4), threshold=0.5)
    assert grid[0].nonzero().tolist() == [[1, 2]]  # pixel (22, 14) lies in cell (2, 1)
    assert not grid[1].any()


def test_no_roi_mask():
    grid = roi_masks_to_grid(torch.zeros(0, 28, 28), torch.zeros(0, 4), 4, (3, 5), 0.5)
    assert grid.shape == (0, 3, 5)


@given(st.integers(0, 2**31 - 1), st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
def test_bitmasks_are_sampled_at_cell_centres(seed, stride, height, width):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, height, width, generator=generator) < 0.5
    size = (height // stride + 2, width // stride + 1)  # reaches beyond the image
    grid = gt_masks_to_grid(BitMasks(masks), stride, size)
    assert grid.shape == (2, *size)
    for n, row, column in np.ndindex(*grid.shape):
        y, x = row * stride + stride // 2, column * stride + stride // 2
        inside = y < height and x < width
        assert grid[n, row, column] == (bool(masks[n, y, x]) if inside else False)


def test_polygons_agree_with_their_bitmask():
    polygons = [[np.array([8.0, 8.0, 88.0, 8.0, 88.0, 56.0, 8.0, 56.0])]]
    from_polygon = gt_masks_to_grid(PolygonMasks(polygons), 8, (8, 12))
    bitmask = BitMasks.from_polygon_masks(PolygonMasks(polygons), 64, 96)
    from_bitmask = gt_masks_to_grid(bitmask, 8, (8, 12))
    assert torch.equal(from_polygon, from_bitmask)
    assert gt_masks_to_grid(PolygonMasks([]), 8, (8, 12)).shape == (0, 8, 12)


@given(st.integers(0, 2**31 - 1), st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
def test_labels_are_sampled_at_cell_centres(seed, stride, height, width):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 100, (height, width), generator=generator)
    size = (height // stride + 2, max(width // stride - 1, 1))  # too high, too narrow
    grid = labels_to_grid(labels, stride, size, outside=255)
    assert grid.shape == size and grid.dtype == labels.dtype
    for row, column in np.ndindex(*size):
        y, x = row * stride + stride // 2, column * stride + stride // 2
        inside = y < height and x < width
        assert grid[row, column] == (labels[y, x] if inside else 255)


def test_boxes_as_shares_of_the_image():
    boxes = torch.tensor([[48.0, 16.0, 96.0, 64.0]])
    assert relative_boxes(boxes, (64, 96)).tolist() == [[0.5, 0.25, 1.0, 1.0]]
    assert relative_boxes(torch.zeros(0, 4), (64, 96)).shape == (0, 4)


def test_ground_truth_as_candidates():
    # the grid reaches beyond the image: boxes are shares of the image, not of the grid
    instances = make_instances((32, 40), [[8, 0, 40, 16], [0, 8, 20, 32]], [3, 1])
    candidates = gt_candidates(instances, stride=8, size=(6, 6))
    expected = torch.zeros(2, 6, 6, dtype=torch.bool)
    expected[0, 0:2, 1:5] = True
    expected[1, 1:4, 0:2] = True  # the centre of column 2 is pixel 20, the first one outside
    assert torch.equal(candidates.masks, expected)
    assert candidates.classes.tolist() == [3, 1]
    assert candidates.scores.tolist() == [1.0, 1.0]
    torch.testing.assert_close(
        candidates.boxes, torch.tensor([[0.2, 0.0, 1.0, 0.5], [0.0, 0.25, 0.5, 1.0]])
    )


def test_target_is_sampled_and_padded_with_void():
    head = SpatialRankingHead(
        num_classes=8, conv_dim=4, num_blocks=1, kernel_size=3, stride=8, ignore_value=77
    )
    input = make_input((16, 24), [[0, 0, 24, 8], [8, 0, 16, 16]], [5, 2], stuff=3)
    target = ranking_target(input, head, (3, 4), "cpu")
    # category of stuff class 3: 8 + 3 - 1
    assert target.categories.tolist() == [[5, 2, 5, 77], [10, 2, 10, 77], [77, 77, 77, 77]]
    assert target.ids.tolist() == [[1, 2, 1, 0], [3, 2, 3, 0], [0, 0, 0, 0]]
    assert target.segments_info == input["panoptic_seg"][1]


@given(st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_extents_are_those_of_detectron2(n, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, 7, 9, generator=generator) > 0.93
    masks[:, 3, 4] = True  # Detectron2's box of an empty mask is another one
    assert torch.equal(mask_extents(masks), BitMasks(masks).get_bounding_boxes().tensor.long())


def test_extent_of_an_empty_mask_is_the_grid():
    assert mask_extents(torch.zeros(1, 7, 9, dtype=torch.bool)).tolist() == [[0, 0, 9, 7]]
    assert mask_extents(torch.zeros(0, 7, 9, dtype=torch.bool)).shape == (0, 4)
