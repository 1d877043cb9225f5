import math
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from detectron2.structures import Boxes, Instances

from oanet_d2.modeling import PairwiseRankingHead
from oanet_d2.modeling.grid import detections_on_grid, ground_truth_on_grid
from oanet_d2.painting import BoxedMasks
from oanet_d2.painting.learned import LearnedOrder, masks_on_grid, order_metadata
from oanet_d2.painting.pairs import GEOMETRY_NUMBERS, PairNetwork
from tests.conftest import box_mask, make_instances

CLASSES = ["person", "tie", "dog"]
seeds = st.integers(0, 2**31 - 1)


def make_order(seed=0, stride=4, min_size=0, max_size=0, classes=CLASSES):
    """Of random weights and statistics. With the sizes at 0 an image is not resized."""
    torch.manual_seed(seed)
    network = PairNetwork(len(classes), GEOMETRY_NUMBERS, 0)
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.1, 1)
    return LearnedOrder(network, classes, stride, min_size, max_size)


def preferring(values):
    """An order whose logit(a, b) is values[class of a] - values[class of b]."""
    order = make_order()
    network = order.network
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    network.norm.running_mean.zero_()
    network.norm.running_var.fill_(1 - network.norm.eps)
    network.class_embedding.weight.data[:, 0] = torch.tensor(values)
    for layer in network.compare[::2]:
        layer.weight.data[0, 0] = 1.0
    return order


def order_of(order, masks, names, scores, boxes=None, size=(10, 12)):
    boxes = np.zeros((len(masks), 4)) if boxes is None else boxes
    whole = slice(0, size[0]), slice(0, size[1])
    return order.order(lambda i: (masks[i].numpy(), whole), boxes, scores, names, size).tolist()


def test_by_hand():
    """A tie lies on persons, where the two meet; the score decides the rest."""
    ties = preferring([0.0, math.log(3.0), 0.0])
    person, tie, beside = box_mask(0, 0, 8, 10), box_mask(0, 0, 6, 9), box_mask(8, 0, 12, 10)
    assert order_of(ties, [person, tie], ["person", "tie"], [0.9, 0.6]) == [1, 0]
    assert order_of(ties, [tie, person], ["tie", "person"], [0.6, 0.9]) == [0, 1]
    assert order_of(ties, [person, tie], ["person", "dog"], [0.6, 0.9]) == [1, 0]
    assert order_of(ties, [person, beside], ["person", "tie"], [0.9, 0.6]) == [0, 1]
    three = [person, beside, tie], ["person", "person", "tie"], [0.9, 0.95, 0.6]
    assert order_of(ties, *three) == [1, 2, 0]


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (2000, 1), (37, 50)])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_any_image(size, number):
    masks = [torch.ones(size, dtype=torch.bool)] * number
    boxes = np.tile([0, 0, size[1], size[0]], (number, 1))
    order = make_order(min_size=32, max_size=48)
    found = order_of(order, masks, ["tie"] * number, np.full(number, 0.5), boxes, size)
    assert sorted(found) == list(range(number))


@given(seeds, st.integers(1, 2))
def test_as_the_ranking_head_orders_the_same_detections(seed, scale):
    """
    Detections of a network, whose masks fill their boxes, and the same masks in an image `scale` times
    as large as the network's input. Every box holds the centre of a cell and ends beside one: the head
    samples before it cuts the mask at a half, so an edge at a centre may fall to the other side.
    """
    rng, size = np.random.default_rng(seed), (int(40 + seed % 9), 57)
    first = 2 * rng.integers(0, 12, (6, 2)) + 1
    boxes = torch.from_numpy(np.concatenate([first, first + 2 * rng.integers(2, 8, (6, 2))], 1)).float()
    scores, classes = torch.from_numpy(rng.random(6)).float(), torch.from_numpy(rng.integers(0, 3, 6))
    detected = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    detected.pred_masks = torch.ones(6, 1, 28, 28)

    order = make_order(seed % 1000, min_size=size[0], max_size=size[1])
    head = PairwiseRankingHead(num_classes=3, evidence=("geometry",), feature_channels=0)
    head.network = order.network
    with torch.no_grad():
        (inputs,) = head.order_inputs([detections_on_grid(detected, order.stride, 0.0)], [{}])

    image_size = scale * size[0], scale * size[1]
    masks = BoxedMasks.paste(detected.pred_masks[:, 0], boxes * scale, image_size)
    names = [CLASSES[c] for c in classes]
    found = order.order(masks.array, boxes.numpy() * scale, scores.numpy(), names, image_size)
    assert found.dtype == np.int64 and found.tolist() == inputs.order("srm_pairs").tolist()


@given(seeds, st.integers(1, 5))
def test_masks_of_the_inputs_size_lie_on_the_grid_as_in_training(seed, stride):
    rng, size = np.random.default_rng(seed), (23, 18)
    masks = torch.from_numpy(rng.random((4, *size)) < rng.choice([0.005, 0.1, 0.9], (4, 1, 1)))
    boxed = BoxedMasks.from_masks(masks)
    found = masks_on_grid(boxed.array, 4, size, size, stride)
    truth = make_instances(size, [[0, 0, 1, 1]] * 4, [0] * 4, masks)
    assert np.array_equal(found, ground_truth_on_grid(truth, stride).masks.numpy())


@given(seeds)
def test_a_cell_shows_the_pixel_under_its_centre(seed):
    """Whatever the image's size is, larger or smaller than the input."""
    rng = np.random.default_rng(seed)
    image_size, input_size = rng.integers(1, 40, (2, 2)).tolist()
    stride = int(rng.integers(1, 6))
    mask = rng.random(image_size) < 0.5
    mask[0, 0] = True
    region = slice(0, image_size[0]), slice(0, image_size[1])
    (found,) = masks_on_grid(lambda i: (mask, region), 1, image_size, input_size, stride)
    assert found.shape == tuple(math.ceil(n / stride) for n in input_size)
    expected = np.zeros_like(found)
    for cell in np.ndindex(found.shape):
        centre = [Fraction(2 * i + 1, 2) * stride for i in cell]
        pixel = [math.floor(c * n / m) for c, n, m in zip(centre, image_size, input_size)]
        expected[cell] = mask[tuple(min(p, n - 1) for p, n in zip(pixel, image_size))]
    assert np.array_equal(found, expected) if expected.any() else found.sum() == 1


def test_a_mask_under_no_centre_owns_the_cell_in_its_middle():
    pixel = np.ones((1, 1), dtype=bool)
    region = slice(8, 9), slice(30, 31)
    (found,) = masks_on_grid(lambda i: (pixel, region), 1, (20, 40), (10, 20), 4)
    assert found.shape == (3, 5) and np.argwhere(found).tolist() == [[1, 3]]
    (found,) = masks_on_grid(lambda i: (pixel[:0], (slice(8, 8), region[1])), 1, (20, 40), (10, 20), 4)
    assert not found.any()


def test_a_file_holds_all_of_it(tmp_path):
    order = make_order(3, stride=2, min_size=20, max_size=30)
    order.save(tmp_path / "order.safetensors")
    again = LearnedOrder.load(str(tmp_path / "order.safetensors"))
    assert again.classes == CLASSES
    assert (again.stride, again.min_size, again.max_size) == (2, 20, 30)
    for name, x in order.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], x)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "order.safetensors"
    order = make_order()
    order.save(path)
    whole, tensors = path.read_bytes(), safetensors.torch.load_file(path)
    metadata = order_metadata(CLASSES, 4, 256, 384)
    newer = {k: v.replace('"version": 1', '"version": 2') for k, v in metadata.items()}
    for content in (
        b"",
        b"<html>",
        whole[:-4],
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, newer),
        safetensors.torch.save({"x": torch.ones(1)}, metadata),
        safetensors.torch.save(tensors, order_metadata(CLASSES[:2], 4, 256, 384)),
        None,
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} cannot be used as a learned order"):
            LearnedOrder.load(path)
        path.touch()
