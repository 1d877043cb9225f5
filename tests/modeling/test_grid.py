import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances, PolygonMasks

from oanet_d2.modeling.grid import (
    detections_on_grid,
    ground_truth_on_grid,
    map_on_grid,
    truth_on_grid,
)
from oanet_d2.painting.masks import grid_size
from tests.conftest import make_input, make_instances

seeds, lengths = st.integers(0, 2**31 - 1), st.integers(1, 30)


def detections(size, boxes, roi_masks, scores=None):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_masks = roi_masks[:, None]
    instances.scores = torch.ones(len(boxes)) if scores is None else scores
    instances.pred_classes = torch.arange(len(boxes))
    return instances


def showing(on_grid, stride, noise):
    """The image `noise` (..., H, W), with `on_grid` at the centres of its cells."""
    for row, column in np.ndindex(*on_grid.shape[-2:]):
        # where the centre lies outside, the image's last pixel counts
        y = min(row * stride + stride // 2, noise.shape[-2] - 1)
        x = min(column * stride + stride // 2, noise.shape[-1] - 1)
        noise[..., y, x] = on_grid[..., row, column]
    return noise


@given(seeds, st.integers(1, 8), lengths, lengths)
def test_cells_are_sampled_at_their_centres(seed, stride, height, width):
    generator = torch.Generator().manual_seed(seed)
    size, grid = (height, width), (math.ceil(height / stride), math.ceil(width / stride))
    masks = torch.rand(2, *grid, generator=generator) < 0.5
    masks[:, 0, 0] = True  # an empty one has a test of its own
    image = showing(masks, stride, torch.rand(2, *size, generator=generator) < 0.5)
    instances = make_instances(size, [[0, 0, width, height]] * 2, [0, 1], image)
    assert torch.equal(ground_truth_on_grid(instances, stride).masks, masks)

    ids = torch.randint(9, grid, generator=generator)
    present = ids.unique()
    image = showing(ids, stride, present[torch.randint(len(present), size, generator=generator)])
    training_input = {"panoptic_seg": (image, []), "panoptic_category": image - 1}
    truth = truth_on_grid(training_input, stride, torch.device("cpu"))
    assert torch.equal(truth.ids, ids) and torch.equal(truth.categories, ids - 1)


def as_polygons(instances):
    corners = [[0, 1, 2, 1, 2, 3, 0, 3]] * len(instances)
    boxes = instances.gt_boxes.tensor.double().numpy()
    instances.gt_masks = PolygonMasks([[box[c]] for box, c in zip(boxes, corners)])
    return instances


def test_polygons_agree_with_their_bitmask():
    boxes = [[8, 8, 88, 56], [0, 0, 96, 64], [80, 40, 96, 64]]
    from_bitmask = ground_truth_on_grid(make_instances((64, 96), boxes, [0] * 3), 8)
    from_polygon = ground_truth_on_grid(as_polygons(make_instances((64, 96), boxes, [0] * 3)), 8)
    assert torch.equal(from_polygon.masks, from_bitmask.masks)
    none = ground_truth_on_grid(as_polygons(make_instances((64, 96), [], [])), 8)
    assert none.masks.shape == (0, 8, 12) and none.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "box, cell",
    [
        ([9, 17, 11, 19], (2, 1)),
        ([44, 29, 45, 30], (3, 5)),  # the last pixel; row 3 ends outside the image
        ([5, 5, 7, 12], (1, 0)),  # in two rows of cells
    ],
)
@pytest.mark.parametrize("background", [None, 2])
def test_ground_truth_smaller_than_a_cell_keeps_one(box, cell, background):
    boxes, classes = [[0, 0, 20, 30], box], [4, 6]
    training_input = make_input((30, 45), boxes, classes, background)
    polygons = as_polygons(make_instances((30, 45), boxes, classes))
    for instances in (training_input["instances"], polygons):
        found = ground_truth_on_grid(instances, 8)
        assert found.masks[1].nonzero().tolist() == [list(cell)]
        assert found.masks[0].sum() >= 8  # the large one does not change
        assert found.classes.tolist() == classes and found.scores.tolist() == [1, 1]
        torch.testing.assert_close(found.boxes[0], torch.tensor([0, 0, 20 / 45, 1]))
    truth = truth_on_grid(training_input, 8, torch.device("cpu"))
    for labels, value in ((truth.ids, 2), (truth.categories, 6)):
        assert (labels == value).nonzero().tolist() == [list(cell)]
    assert truth.segments_info == training_input["panoptic_seg"][1]


@given(seeds, st.sampled_from([1, 4, 8]), st.integers(0, 4))
def test_detections_are_what_detectron2_pastes(seed, stride, n):
    generator = torch.Generator().manual_seed(seed)
    size = (50, 67)
    corners = torch.rand(n, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    boxes = corners * torch.tensor([67.0, 50.0] * 2)
    roi_masks = torch.rand(n, 14, 14, generator=generator).round()
    scores = torch.rand(n, generator=generator)
    found = detections_on_grid(detections(size, boxes.tolist(), roi_masks, scores), stride, 0.3)
    in_cells, grid = Boxes(boxes / stride), grid_size(size, stride)
    expected = paste_masks_in_image(roi_masks, in_cells, grid).bool()
    painted = scores >= 0.3
    assert not found.masks[~painted].any() and torch.equal(found.scores, scores)
    found.masks, expected = found.masks[painted], expected[painted]
    lost = ~expected.flatten(1).any(1)
    assert torch.equal(found.masks[~lost], expected[~lost])
    assert (found.masks[lost].flatten(1).sum(1) == 1).all()
    torch.testing.assert_close(found.boxes, corners)


def test_a_detection_between_centres_keeps_one_cell():
    roi_masks = torch.zeros(3, 28, 28)
    roi_masks[0, 14, 14] = 0.8  # over the threshold, but smaller than a cell
    roi_masks[1] = 0.1  # nowhere over it: stays empty
    roi_masks[2, 27, 27] = 0.8
    boxes = [[20.0, 12.0, 24.0, 16.0], [0.0, 0.0, 32.0, 32.0], [30.0, 20.0, 33.0, 25.0]]
    masks = detections_on_grid(detections((25, 33), boxes, roi_masks), 8, 0.0).masks
    assert masks.shape == (3, 4, 5)
    assert masks[0].nonzero().tolist() == [[1, 2]]  # pixel (22, 14)
    assert not masks[1].any()
    assert masks[2].nonzero().tolist() == [[3, 4]]  # the image's last pixel


@pytest.mark.parametrize("image_size", [(32, 48), (26, 42), (5, 3)])
@pytest.mark.parametrize("stride", [2, 4, 16])
def test_a_map_on_the_grid_knows_nothing_of_the_padding(image_size, stride):
    """A map of stride 4, padded in two ways; every cell against a plain mean."""
    rows, columns = -(-image_size[0] // 4), -(-image_size[1] // 4)
    inside = torch.randn(2, rows, columns)
    for padded in ((8, 16), (24, 16)):
        feature_map = torch.full((2, *padded), 1e6)
        feature_map[:, :rows, :columns] = inside
        found = map_on_grid(feature_map, 4, stride, image_size)
        assert found.shape == (2, *grid_size(image_size, stride))
        for row, column in np.ndindex(*found.shape[1:]):
            y, x, side = row * stride // 4, column * stride // 4, max(stride // 4, 1)
            expected = inside[:, y : y + side, x : x + side].mean((1, 2))
            torch.testing.assert_close(found[:, row, column], expected)
