"""`paint` against Detectron2, and against a painter that takes one pixel after another."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances

from oanet_d2.painting import BoxedMasks, combine, paint
from oanet_d2.painting.learned import LearnedOrder
from oanet_d2.painting.pairs import GEOMETRY_NUMBERS, PairNetwork

from .test_formats import KINDS, MASKS, SIZE, random_masks


def things_of(result):
    return [
        (s["category_id"], s["score"], s["instance_id"])
        for s in result.segments_info
        if s["isthing"]
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_in_the_order_of_scores_it_is_detectron2s_and_combines(kind, seed):
    rng, size = np.random.default_rng(seed), [(13, 17), (40, 9), (1, 30), (64, 64)][seed]
    masks, scores = random_masks(seed, 8, size), rng.permutation(8) / 8
    classes, semantic = rng.integers(0, 5, 8), rng.integers(0, 4, size)
    result = paint(
        KINDS[kind](masks),
        scores,
        classes,
        semantic=semantic,
        score_threshold=0.2,
        overlap_threshold=0.6,
        stuff_area_threshold=6,
    )

    tensors = torch.from_numpy(masks), torch.from_numpy(scores), torch.from_numpy(classes)
    instances = Instances(size, pred_masks=tensors[0], scores=tensors[1], pred_classes=tensors[2])
    theirs = combine_semantic_and_instance_outputs(
        instances, torch.from_numpy(semantic), 0.6, 6, 0.2
    )
    order = torch.from_numpy(np.argsort(-scores))
    ours = combine(
        *tensors,
        order,
        torch.from_numpy(semantic),
        overlap_threshold=0.6,
        stuff_area_thresh=6,
        instances_score_thresh=0.2,
    )
    for seg, info in (theirs, ours):
        assert (result.panoptic_seg == seg.numpy()).all()
        assert result.segments_info == info
    assert result.order.tolist() == [i for i in order.tolist() if scores[i] >= 0.2]


def test_masks_in_boxes_are_painted_as_combine_paints_them():
    torch.manual_seed(0)
    roi, scores = torch.rand(6, 28, 28) * 0.5 + 0.3, torch.rand(6)
    corners = torch.rand(6, 2) * 20
    boxes = torch.cat([corners, corners + 3 + torch.rand(6, 2) * 15], dim=1)
    size, classes = (41, 37), torch.arange(6)
    boxes[:, 2::2].clamp_(max=37)
    expected, info = combine(
        BoxedMasks.paste(roi, boxes, size),
        scores,
        classes,
        scores.argsort(descending=True),
        torch.zeros(size, dtype=torch.int64),
        overlap_threshold=0.5,
        stuff_area_thresh=1,
        instances_score_thresh=0,
    )
    result = paint(roi, scores, classes, boxes=boxes, image_size=size)
    assert (result.panoptic_seg == expected.numpy()).all() and result.segments_info == info


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
    semantic = draw(
        st.lists(st.integers(0, 3), min_size=size[0] * size[1], max_size=size[0] * size[1])
    )
    scores = draw(st.lists(st.sampled_from([0.2, 0.4, 0.6, 0.8]), min_size=number, max_size=number))
    return masks, np.array(scores), np.array(semantic).reshape(size)


@given(
    scenes(), st.sampled_from([*KEYS, "given"]), st.sampled_from(["bool", "compressed"]), st.data()
)
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


def test_a_thousand_instances():
    masks = random_masks(5, 1000, (30, 50))
    result = paint(KINDS["compressed"](masks), np.linspace(1, 0.5, 1000), overlap_threshold=1)
    owner, drawn = slow_paint(masks, range(1000), 1, np.zeros((1, 1)), 1)
    assert [i for _, _, i in things_of(result)] == [i for _, i in drawn]
    assert result.order.tolist() == [*range(1000)] and (result.panoptic_seg > 0).sum() == len(owner)


def test_without_instances():
    for masks in (np.zeros((0, *SIZE), bool), torch.zeros(0, *SIZE), []):
        result = paint(
            masks, [], [], image_size=SIZE, semantic=np.full(SIZE, 3), stuff_area_threshold=1
        )
        assert (result.panoptic_seg == 1).all() and result.order.tolist() == []
        area = SIZE[0] * SIZE[1]
        assert result.segments_info == [{"id": 1, "isthing": False, "category_id": 3, "area": area}]


def test_crowds_lie_behind():
    masks = np.zeros((3, 4, 6), bool)
    masks[0], masks[1, :2], masks[2, :, 5] = True, True, True
    found = [
        {"segmentation": x, "category_id": 7, "iscrowd": crowd}
        for x, crowd in zip(KINDS["compressed"](masks), [1, 0, 0])
    ]
    for order in ("lower_first", [0, 1, 2]):  # the crowd would be the first
        result = paint(found, order=order, overlap_threshold=1)
        assert result.order[-1] == 0
        crowd = [s["id"] for s in result.segments_info if s["iscrowd"]]
        assert (result.panoptic_seg == crowd).sum() == 24 - 12 - 2


def test_class_names(tmp_path):
    path = tmp_path / "order.safetensors"
    torch.manual_seed(0)
    LearnedOrder(PairNetwork(3, GEOMETRY_NUMBERS, 0), ["dog", "tie", "person"], 4, 16, 16).save(
        path
    )
    scores, classes, names = [0.7, 0.9, 0.8], [1, 0, 1], ["person", "tie"]
    result = paint(MASKS, scores, classes, path, class_names=names, overlap_threshold=1)
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in map(np.nonzero, MASKS)]
    whole, learned = (slice(0, SIZE[0]), slice(0, SIZE[1])), LearnedOrder.load(path)
    expected = learned.order(
        lambda i: (MASKS[i], whole), boxes, scores, ["tie", "person", "tie"], SIZE
    )
    assert result.order.tolist() == expected.tolist()
    assert all(s["category_name"] == names[s["category_id"]] for s in result.segments_info)
    certain = learned.order(lambda i: (MASKS[i], whole), boxes, [1] * 3, ["tie", "person", "tie"], SIZE)
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


SCRIPT = """
import json, sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "detectron2", "fvcore", "cv2", "scipy"]))
import numpy as np
from oanet_d2.painting import paint

rles = json.loads(sys.argv[1])
array = np.zeros((2, 3, 4), bool)
array[0], array[1, 1] = True, True
results = [paint(x, [0.9, 0.8], order="smaller_first") for x in (rles, array)]
print(json.dumps([x.panoptic_seg.tolist() for x in results]))
"""


def test_without_pytorch_detectron2_and_opencv(subprocess_env):
    array = np.zeros((2, 3, 4), np.uint8)
    array[0], array[1, 1] = 1, 1
    rles = KINDS["text"](array)
    command = [sys.executable, "-c", SCRIPT, json.dumps(rles)]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [[[2] * 4, [1] * 4, [2] * 4]] * 2
