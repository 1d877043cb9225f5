import json
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from panopticapi.combine_semantic_and_instance_predictions import combine_to_panoptic_single_core
from panopticapi.utils import rgb2id
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs

from oanet_d2.modeling import panoptic_combiner
from oanet_d2.modeling.instance_masks import BoxedMasks
from oanet_d2.modeling.panoptic_combiner import combine

SIZE = (12, 16)


@st.composite
def predictions(draw):
    """Random boxes and ellipses with holes, some empty, some equal, tied scores, few classes."""
    n = draw(st.integers(0, 8))
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *SIZE), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
        mask[y : y + rng.integers(0, 9), x : x + rng.integers(0, 9)] = True
        mask &= rng.random(SIZE) < 0.9
    if n > 1 and draw(st.booleans()):
        masks[1] = masks[0]
    scores = rng.integers(0, 11, n) / 10
    classes = rng.integers(0, 3, n)
    semantic = np.kron(rng.integers(0, 4, (3, 4)), np.ones((4, 4), dtype=int))
    return SimpleNamespace(
        masks=torch.from_numpy(masks),
        scores=torch.tensor(scores, dtype=torch.float32),
        classes=torch.from_numpy(classes),
        semantic=torch.from_numpy(semantic),
        overlap=draw(st.sampled_from([0.0, 0.25, 0.5, 0.75])),
        stuff=draw(st.sampled_from([1, 10, 40])),
        confidence=draw(st.sampled_from([0.0, 0.3, 0.5])),
        order=torch.from_numpy(rng.permutation(n)),
    )


def ours(p, order):
    return combine(
        p.masks,
        p.scores,
        p.classes,
        order,
        p.semantic,
        overlap_threshold=p.overlap,
        stuff_area_thresh=p.stuff,
        instances_score_thresh=p.confidence,
    )


@settings(max_examples=500, deadline=None)
@given(predictions(), st.sampled_from([1, 85, 86, 1000]))
def test_order_by_score_equals_detectron2_bit_for_bit(p, step):
    """However many labels of stuff there are: 0 to 3 of these steps."""
    p.semantic *= step
    instances = SimpleNamespace(pred_masks=p.masks, scores=p.scores, pred_classes=p.classes)
    theirs_seg, theirs_info = combine_semantic_and_instance_outputs(
        instances, p.semantic, p.overlap, p.stuff, p.confidence
    )
    seg, info = ours(p, torch.argsort(-p.scores))
    assert seg.dtype == theirs_seg.dtype
    assert torch.equal(seg, theirs_seg)
    assert info == theirs_info


@settings(max_examples=300, deadline=None)
@given(predictions())
def test_invariants(p):
    seg, info = ours(p, p.order)
    ids, areas = np.unique(seg.numpy(), return_counts=True)
    area_of = dict(zip(ids.tolist(), areas.tolist()))
    # every id in the map is described, and the reverse
    assert {s["id"] for s in info} == set(area_of) - {0}
    assert [s["id"] for s in info] == list(range(1, len(info) + 1))
    for s in info:
        segment = (seg == s["id"]).numpy()
        if s["isthing"]:
            # an instance owns only pixels of its own mask, and enough of them
            mask = p.masks[s["instance_id"]].numpy()
            assert not (segment & ~mask).any()
            assert 1 - segment.sum() / mask.sum() <= p.overlap + 1e-9
            assert s["score"] >= p.confidence
        else:
            assert s["area"] == area_of[s["id"]] >= p.stuff
            assert (p.semantic.numpy()[segment] == s["category_id"]).all()
    # first painted owns all of its mask: nobody paints over it
    painted = [s["instance_id"] for s in info if s["isthing"]]
    assert painted == [i for i in p.order.tolist() if i in painted]
    if painted:
        assert area_of[1] == p.masks[painted[0]].sum()


@settings(max_examples=30, deadline=None)
@given(p=predictions())
def test_equals_panopticapi_script(p, tmp_path_factory):
    """
    panopticapi drops an instance by its overlap with everything *not dropped* before it, which
    for one that is kept is the same as Detectron2's "pixels already taken".
    """
    folder = tmp_path_factory.mktemp("panopticapi")
    categories = {1 + c: {"id": 1 + c, "isthing": 1, "color": [60 * c, 9, 9]} for c in range(3)}
    categories.update(
        {10 + s: {"id": 10 + s, "isthing": 0, "color": [9, 60 * s, 200]} for s in range(4)}
    )

    def rle(mask):
        return mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    kept = [i for i in p.order.tolist() if p.scores[i] >= p.confidence]
    instances = [
        {"segmentation": rle(p.masks[i]), "category_id": 1 + int(p.classes[i])} for i in kept
    ]
    stuff = [
        {"segmentation": rle(p.semantic == s), "category_id": 10 + s}
        for s in p.semantic.unique().tolist()
        if s > 0
    ]
    annotation = combine_to_panoptic_single_core(
        0,
        [7],
        {7: {"file_name": "7.jpg", "height": SIZE[0], "width": SIZE[1]}},
        {7: instances},
        {7: stuff},
        str(folder),
        p.overlap,
        p.stuff,
        categories,
    )[0]
    ids = rgb2id(np.array(Image.open(folder / "7.png"), dtype=np.uint32))
    expected = np.zeros(SIZE, dtype=int)
    for number, segment in enumerate(annotation["segments_info"], start=1):
        expected[ids == segment["id"]] = number
    seg, info = ours(p, p.order)
    np.testing.assert_array_equal(seg.numpy(), expected)
    found = [1 + s["category_id"] if s["isthing"] else 10 + s["category_id"] for s in info]
    assert found == [s["category_id"] for s in annotation["segments_info"]]
    json.dumps(info)  # plain Python numbers only


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_masks_in_boxes_are_painted_like_full_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    first, size = 40 * torch.rand(2, 6, 2, generator=generator)
    boxes = torch.cat([first, first + size], dim=1).clamp(max=48)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    masks = BoxedMasks(torch.rand(len(boxes), 4, 4, generator=generator), boxes, (40, 48))
    semantic = torch.randint(0, 3, (40, 48), generator=generator)
    results = [
        combine(
            m,
            torch.ones(len(boxes)),
            torch.zeros(len(boxes), dtype=torch.int64),
            torch.randperm(len(boxes), generator=torch.Generator().manual_seed(seed)),
            semantic,
            overlap_threshold=0.5,
            stuff_area_thresh=10,
            instances_score_thresh=0.5,
        )
        for m in (masks, masks.full())
    ]
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


class CountingWaits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading numbers, and results of unknown size."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits = 0
        to_list = torch.Tensor.tolist

        def counting(tensor):
            self.waits += 1
            return to_list(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counting)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func.name().split(".")[0] in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_painting_on_a_device_is_painting_on_a_cpu(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(12, *SIZE, generator=generator) < 0.3
    masks[3] = False
    boxed = [(mask, ...) for mask in masks]
    on_cpu, on_device = torch.zeros(2, *SIZE, dtype=torch.int32)
    kept = panoptic_combiner._paint_on_cpu(on_cpu, boxed, threshold)
    assert kept == panoptic_combiner._paint_on_device(on_device, boxed, threshold)
    assert torch.equal(on_cpu, on_device) and any(kept) and not all(kept)


def test_the_host_does_not_wait_for_every_instance(monkeypatch):
    monkeypatch.setattr(panoptic_combiner, "_paint_on_cpu", panoptic_combiner._paint_on_device)
    waits = {}
    for n in (3, 60):
        first = torch.rand(n, 2) * 20
        boxes = torch.cat([first, first + 1 + torch.rand(n, 2) * 20], dim=1)
        with monkeypatch.context() as patch, CountingWaits(patch) as counter:
            combine(
                BoxedMasks(torch.rand(n, 28, 28), boxes, (41, 41)),
                torch.rand(n),
                torch.zeros(n, dtype=torch.int64),
                torch.randperm(n),
                torch.randint(0, 3, (41, 41)),
                overlap_threshold=0.5,
                stuff_area_thresh=10,
                instances_score_thresh=0.5,
            )
        waits[n] = counter.waits
    assert 0 < waits[3] == waits[60] < 10


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_invisible_instance_is_never_a_segment(threshold):
    mask = torch.ones(2, *SIZE, dtype=torch.bool)
    seg, info = combine(
        mask,
        torch.tensor([0.9, 0.8]),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
        torch.zeros(SIZE, dtype=torch.int64),
        overlap_threshold=threshold,
        stuff_area_thresh=0,
        instances_score_thresh=0.5,
    )
    assert [s["instance_id"] for s in info] == [0]
    assert (seg == 1).all()
