import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs

from oanet_d2.painting import BoxedMasks, combine
from oanet_d2.painting.arrays import fuse
from oanet_d2.painting.fusion import fill_on_device, paint_on_device

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


def ours_on_device(p, order):
    """As `combine` paints on a GPU, here on a CPU."""
    panoptic = torch.zeros_like(p.semantic, dtype=torch.int32)
    mask_of = BoxedMasks.from_masks(p.masks).__getitem__
    given = mask_of, p.scores.tolist(), p.classes.tolist(), order.tolist(), p.semantic
    how = {"paint": paint_on_device, "fill": fill_on_device}
    return panoptic, fuse(panoptic, *given, **p.limits, **how)


@settings(max_examples=400)
@given(predictions, st.sampled_from([1, 85, 86, 1000]))
def test_order_by_score_equals_detectron2_bit_for_bit(p, step):
    """However many labels of stuff there are: 0 to 3 of these steps."""
    p.semantic *= step
    p.pred_masks, p.pred_classes = p.masks, p.classes
    expected_seg, expected_info = combine_semantic_and_instance_outputs(
        p, p.semantic, *p.limits.values()
    )
    seg, info = ours(p, torch.argsort(-p.scores))
    assert seg.dtype == expected_seg.dtype
    assert torch.equal(seg, expected_seg) and info == expected_info


@given(predictions, st.sampled_from([1, 300]), st.sampled_from([*(i / 7 for i in range(15)), 0.1, 0.3]))
def test_boxed_or_full_on_a_device_or_a_cpu_is_the_same_picture(p, step, overlap_threshold):
    """Also at thresholds where rounding decides."""
    p.semantic *= step
    p.limits["overlap_threshold"] = overlap_threshold
    seg, info = ours(p, p.order)
    boxed = ours(p, p.order, BoxedMasks.from_masks(p.masks))
    for other_seg, other_info in (ours_on_device(p, p.order), boxed):
        assert torch.equal(seg, other_seg) and info == other_info


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a GPU: reading numbers, and results of unknown size."""

    # On a GPU masked_fill() takes a tensor's value by item().
    WAITS = "tolist item __bool__ __int__ nonzero masked_select masked_fill_ unique_consecutive".split()
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.WAITS
        return func(*args, **(kwargs or {}))


def test_on_a_device_the_host_does_not_wait_for_every_instance():
    counts = []
    for n in (3, 60):
        p = random_prediction(0, n)
        with Waits() as waits:
            ours_on_device(p, p.order)
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1] < 12


def two_everywhere(order, overlap_threshold=0.5):
    p = random_prediction(0, 2)
    p.masks[:], p.semantic[:] = True, 0
    p.limits = dict(zip(p.limits, (overlap_threshold, 0, 0.0)))
    return ours(p, torch.tensor(order).long())


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_the_order_decides_and_who_has_no_visible_pixel_is_no_segment(order, threshold):
    seg, info = two_everywhere(order, threshold)
    assert [s["instance_id"] for s in info] == order[:1] and (seg == 1).all()


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 1, 1], [0, 2], [-1, 0], []], ids=str)
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match=re.escape(str(order))):
        two_everywhere(order)
