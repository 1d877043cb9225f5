"""`paint` against Detectron2, and against a painter that takes one pixel after another."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances

from oanet_d2.painting import paint
from oanet_d2.painting.learned import LearnedOrder
from oanet_d2.painting.pairs import GEOMETRY_NUMBERS, PairNetwork

from .test_formats import KINDS, MASKS, SIZE, random_masks


@pytest.mark.parametrize("seed, size", [(0, (13, 17)), (1, (40, 9)), (2, (1, 30)), (3, (64, 64))])
def test_in_the_order_of_scores_it_is_detectron2s(seed, size):
    rng = np.random.default_rng(seed)
    masks, scores = random_masks(seed, 8, size), rng.permutation(8) / 8
    classes, semantic = rng.integers(0, 5, 8), rng.integers(0, 4, size)
    limits = {"score_threshold": 0.2, "overlap_threshold": 0.6, "stuff_area_threshold": 6}
    result = paint(KINDS["text"](masks), scores, classes, semantic=semantic, **limits)

    instances = Instances(size, pred_masks=torch.from_numpy(masks))
    instances.scores, instances.pred_classes = map(torch.from_numpy, (scores, classes))
    expected, info = combine_semantic_and_instance_outputs(
        instances, torch.from_numpy(semantic), 0.6, 6, 0.2
    )
    assert (result.panoptic_seg == expected.numpy()).all() and result.segments_info == info
    assert result.order.tolist() == [i for i in np.argsort(-scores) if scores[i] >= 0.2]


def slow_paint(masks, order, overlap_threshold, semantic, stuff_area):
    """Sets of pixels: their owner, and what is drawn, by name."""
    pixels = [{*map(tuple, np.argwhere(m).tolist())} for m in masks]
    owner, drawn = {}, []
    for i in order:
        visible = pixels[i] - owner.keys()
        if visible and len(pixels[i] - visible) <= overlap_threshold * len(pixels[i]):
            owner.update(dict.fromkeys(visible, ("thing", i)))
            drawn.append(("thing", i))
    for label in range(1, int(semantic.max()) + 1):
        visible = {*map(tuple, np.argwhere(semantic == label).tolist())} - owner.keys()
        if len(visible) >= stuff_area:
            owner.update(dict.fromkeys(visible, ("stuff", label)))
            drawn.append(("stuff", label))
    return owner, drawn


def lowest_row(mask):
    return max(np.argwhere(mask)[:, 0], default=-1)


KEYS = {
    "score": lambda mask, score: -score,
    "smaller_first": lambda mask, score: (mask.sum(), -score),
    "lower_first": lambda mask, score: (-lowest_row(mask), -score),
}


@st.composite
def scenes(draw):
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    number = draw(st.integers(0, 5))
    bits = st.lists(st.booleans(), min_size=size[0] * size[1], max_size=size[0] * size[1])
    masks = np.array([draw(bits) for _ in range(number)], bool).reshape(number, *size)
    labels = st.lists(st.integers(0, 3), min_size=size[0] * size[1], max_size=size[0] * size[1])
    scores = draw(st.lists(st.sampled_from([0.2, 0.4, 0.6, 0.8]), min_size=number, max_size=number))
    return masks, np.array(scores), np.array(draw(labels)).reshape(size)


@given(scenes(), st.sampled_from([*KEYS, "given"]), st.sampled_from([*KINDS]), st.data())
def test_every_order_against_a_slow_painter(scene, order, kind, data):
    masks, scores, semantic = scene
    kept = [i for i in range(len(masks)) if scores[i] >= 0.4]
    overlap = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    if order == "given":
        order = data.draw(st.permutations(range(len(masks))))
        expected = [i for i in order if i in kept]
    else:
        expected = sorted(kept, key=lambda i: KEYS[order](masks[i], scores[i]))
    result = paint(
        KINDS[kind](masks),
        scores,
        order=order,
        semantic=semantic,
        score_threshold=0.4,
        image_size=semantic.shape,
        overlap_threshold=overlap,
        stuff_area_threshold=2,
    )
    owner, drawn = slow_paint(masks, expected, overlap, semantic, 2)
    assert result.order.tolist() == expected
    names = {
        s["id"]: ("thing", s["instance_id"]) if s["isthing"] else ("stuff", s["category_id"])
        for s in result.segments_info
    }
    assert [*names.values()] == drawn and [*names] == [*range(1, len(drawn) + 1)]
    found = {pixel: names[i] for pixel, i in np.ndenumerate(result.panoptic_seg) if i}
    assert found == owner


def test_without_instances():
    for masks in (np.zeros((0, *SIZE), bool), torch.zeros(0, *SIZE), []):
        stuff = {"semantic": np.full(SIZE, 3), "stuff_area_threshold": 1}
        result = paint(masks, [], [], image_size=SIZE, **stuff)
        assert (result.panoptic_seg == 1).all() and result.order.tolist() == []
        area = SIZE[0] * SIZE[1]
        assert result.segments_info == [{"id": 1, "isthing": False, "category_id": 3, "area": area}]


def test_crowds_lie_behind():
    masks = np.zeros((3, 4, 6), bool)
    masks[0], masks[1, :2], masks[2, :, 5] = True, True, True
    rles = zip(KINDS["compressed"](masks), [1, 0, 0])
    found = [{"segmentation": x, "category_id": 7, "iscrowd": crowd} for x, crowd in rles]
    for order in ("lower_first", [0, 1, 2]):  # the crowd would be the first
        result = paint(found, order=order, overlap_threshold=1)
        assert result.order[-1] == 0
        crowd = [s["id"] for s in result.segments_info if s["iscrowd"]]
        assert (result.panoptic_seg == crowd).sum() == 24 - 12 - 2


def test_class_names(tmp_path):
    path = tmp_path / "order.safetensors"
    torch.manual_seed(0)
    network = PairNetwork(3, GEOMETRY_NUMBERS, 0)
    LearnedOrder(network, ["dog", "tie", "person"], 4, 16, 16).save(path)
    scores, classes, names = [0.7, 0.9, 0.8], [1, 0, 1], ["person", "tie"]
    result = paint(MASKS, scores, classes, path, class_names=names, overlap_threshold=1)
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in map(np.nonzero, MASKS)]
    whole, learned = (slice(0, SIZE[0]), slice(0, SIZE[1])), LearnedOrder.load(path)
    worn = ["tie", "person", "tie"]
    expected = learned.order(lambda i: (MASKS[i], whole), boxes, scores, worn, SIZE)
    assert result.order.tolist() == expected.tolist()
    assert all(s["category_name"] == names[s["category_id"]] for s in result.segments_info)
    certain = learned.order(lambda i: (MASKS[i], whole), boxes, [1] * 3, worn, SIZE)
    without_scores = paint(MASKS, None, classes, path, class_names=names)
    assert without_scores.order.tolist() == certain.tolist()
    as_dict = paint(MASKS, scores, [5, 9, 5], str(path), class_names={9: "person", 5: "tie"})
    assert as_dict.order.tolist() == expected.tolist()
    for arguments, words in (
        ({}, "class_names"),
        ({"class_names": {1: "tie"}}, r"class_names lack a name for \[0\]"),
        ({"class_names": ["cat", "tie"]}, "'cat'"),
    ):
        with pytest.raises(ValueError, match=words):
            paint(MASKS, scores, classes, path, **arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"order": "largest"}, "'largest' is none of .*smaller_first"),
        ({"order": [0, 1]}, "each of the 3 instances once"),
        ({"order": [0, 1, 1]}, "each of the 3 instances once"),
        ({"order": None}, "order is None"),
        ({"scores": None}, "needs scores"),
        ({"semantic": np.zeros((17, 13), int)}, r"\(17, 13\).*\(13, 17\)"),
        ({"semantic": np.zeros(SIZE)}, "float64"),
        ({"semantic": np.full(SIZE, -1)}, "from 0 on"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        paint(MASKS, **{"scores": [0.9, 0.8, 0.7], **arguments})
