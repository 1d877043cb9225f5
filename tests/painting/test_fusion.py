import re
from bisect import bisect_right
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs

from oanet_d2.painting import BoxedMasks, combine, fusion

SIZE = (12, 16)


def random_prediction(seed, n):
    """Random boxes with holes, some empty, two equal, tied scores, few classes."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *SIZE), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
        mask[y : y + rng.integers(0, 9), x : x + rng.integers(0, 9)] = True
        mask &= rng.random(SIZE) < 0.9
    if n > 1 and rng.random() < 0.5:
        masks[1] = masks[0]
    return SimpleNamespace(
        masks=torch.from_numpy(masks),
        scores=torch.from_numpy(rng.integers(0, 11, n) / 10).float(),
        classes=torch.from_numpy(rng.integers(0, 3, n)),
        order=torch.from_numpy(rng.permutation(n)),
        semantic=torch.from_numpy(np.kron(rng.integers(0, 4, (3, 4)), np.ones((4, 4), dtype=int))),
        limits={
            "overlap_threshold": rng.choice([0.0, 0.25, 0.5, 0.75]).item(),
            "stuff_area_thresh": rng.choice([1, 10, 40]).item(),
            "instances_score_thresh": rng.choice([0.0, 0.3, 0.5]).item(),
        },
    )


predictions = st.builds(random_prediction, st.integers(0, 2**31 - 1), st.integers(0, 8))


def ours(p, order, masks=None):
    masks = p.masks if masks is None else masks
    return combine(masks, p.scores, p.classes, order, p.semantic, **p.limits)


def detectron2s(p, scores, masks, classes, least_score):
    instances = SimpleNamespace(pred_masks=masks, scores=scores, pred_classes=classes)
    overlap, area, _ = p.limits.values()
    return combine_semantic_and_instance_outputs(instances, p.semantic, overlap, area, least_score)


@settings(max_examples=400)
@given(predictions, st.sampled_from([1, 85, 86, 1000]))
def test_order_by_score_equals_detectron2_bit_for_bit(p, step):
    """However many labels of stuff there are: 0 to 3 of these steps."""
    p.semantic *= step
    least_score = p.limits["instances_score_thresh"]
    expected_seg, expected_info = detectron2s(p, p.scores, p.masks, p.classes, least_score)
    seg, info = ours(p, torch.argsort(-p.scores))
    assert seg.dtype == expected_seg.dtype
    assert torch.equal(seg, expected_seg) and info == expected_info


@settings(max_examples=300)
@given(predictions)
def test_any_order_equals_detectron2_where_scores_say_the_same(p):
    painted = p.order[p.scores[p.order] >= p.limits["instances_score_thresh"]]
    falling = torch.arange(len(painted), 0, -1).float()
    expected_seg, expected = detectron2s(p, falling, p.masks[painted], p.classes[painted], 0)
    for segment in (s for s in expected if s["isthing"]):
        segment["instance_id"] = painted[segment["instance_id"]].item()
        segment["score"] = p.scores[segment["instance_id"]].item()
    seg, info = ours(p, p.order)
    assert torch.equal(seg, expected_seg) and info == expected


@given(predictions, st.sampled_from([1, 300]))
def test_boxed_or_full_on_a_device_or_a_cpu_is_the_same_picture(p, step):
    p.semantic *= step
    seg, info = ours(p, p.order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "_paint_on_cpu", fusion._paint_on_device)
        on_device = ours(p, p.order)
    for other_seg, other_info in (on_device, ours(p, p.order, BoxedMasks.from_masks(p.masks))):
        assert torch.equal(seg, other_seg) and info == other_info


@settings(max_examples=200)
@given(st.integers(1, 200), st.floats(0, 2))
def test_the_most_pixels_that_may_be_taken(area, threshold):
    """As Detectron2 divides. Among the thresholds are those where rounding decides."""
    shares = [taken / area for taken in range(area + 1)]
    for limit in (threshold, *shares):
        assert fusion._most_taken(area, limit) == bisect_right(shares, limit) - 1


class OnDevice(TorchFunctionMode):
    """
    Counts what makes the host wait for a GPU: reading numbers, and results of unknown size. Refuses
    double precision, which not every device has.
    """

    WAITS = "tolist item __bool__ __int__ nonzero masked_select unique_consecutive".split()
    waits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.waits += getattr(func, "__name__", "") in self.WAITS
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func
        return result


def test_on_a_device_the_host_does_not_wait_for_every_instance(monkeypatch):
    monkeypatch.setattr(fusion, "_paint_on_cpu", fusion._paint_on_device)
    waits = []
    for n in (3, 60):
        p = random_prediction(0, n)
        p.semantic *= 200  # more labels than the CPU's table of bytes holds
        with OnDevice() as counter:
            ours(p, p.order)
        waits.append(counter.waits)
    assert 0 < waits[0] == waits[1] < 12


def two_everywhere(order, overlap_threshold=0.5):
    p = random_prediction(0, 2)
    p.masks[:], p.semantic[:] = True, 0
    p.limits = dict(zip(p.limits, (overlap_threshold, 0, 0.0)))
    return ours(p, torch.tensor(order).long())


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_an_instance_without_a_visible_pixel_is_no_segment(threshold):
    seg, info = two_everywhere([1, 0], threshold)
    assert [s["instance_id"] for s in info] == [1] and (seg == 1).all()


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 1, 1], [0, 2], [-1, 0], []], ids=str)
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match=re.escape(str(order))):
        two_everywhere(order)
