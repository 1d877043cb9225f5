import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from oanet_d2.painting import BoxedMasks
from oanet_d2.painting.matching import (
    margins_of_true_pairs,
    match_to_segments,
    overlapping_regions,
    visible_margins,
)
from oanet_d2.painting.ranking import order_from_margins
from tests.conftest import box_mask, random_scene, thing

PERSON, CAR = 0, 2
seeds = st.integers(0, 2**31 - 1)


def compare(masks, classes, ids, segments):
    """The matches and margins of masks, as lists."""
    masks = torch.stack(masks)
    matched = match_to_segments(masks, torch.tensor(classes), ids, segments)
    return matched.tolist(), visible_margins(masks, matched, ids).tolist()


def test_only_things_of_its_class_can_be_matched():
    car = box_mask(0, 0, 8, 8)
    stuff = {**thing(3, CAR), "isthing": False}
    for segment in (thing(3, CAR), thing(3, CAR, iscrowd=0), thing(3, CAR, iscrowd=1)):
        assert compare([car], [CAR], torch.where(car, 3, 0), [segment])[0] == [3]
    for segment in (stuff, thing(3, PERSON), thing(3, PERSON, iscrowd=1)):
        assert compare([car], [CAR], torch.where(car, 3, 0), [segment])[0] == [-1]


def test_a_crowd_takes_any_number_but_only_who_is_mostly_in_it():
    ids = torch.where(box_mask(0, 0, 12, 5), 1, 0)
    # two are inside, one is in with exactly half, and one with more
    masks = [box_mask(*x) for x in ([0, 0, 4, 5], [2, 0, 6, 5], [0, 3, 4, 7], [0, 2, 4, 7])]
    matched, margins = compare(masks, [PERSON] * 4, ids, [thing(1, PERSON, iscrowd=1)])
    assert matched == [1, 1, -1, 1]
    assert margins[0][1] == 0  # of two in one crowd neither is in front


@given(seeds, st.integers(1, 4), st.lists(st.booleans(), min_size=4, max_size=4))
def test_against_slow_reference(seed, n, crowds):
    masks, classes, _, ids, segments = random_scene(seed, n)
    for segment, is_crowd in zip(segments, crowds):
        segment["iscrowd"] = int(is_crowd)
    matched = match_to_segments(masks, classes, ids, segments).tolist()
    single, ious = [s["id"] for s in segments if not s["iscrowd"]], []
    for mask, c, i in zip(masks, classes.tolist(), matched):
        shown = {s["id"]: mask & (ids == s["id"]) for s in segments if s["category_id"] == c}
        ious.append({k: (x.sum() / (mask | (ids == k)).sum()).item() for k, x in shown.items()})
        in_crowd = [k for k in shown if k not in single and shown[k].sum() > 0.5 * mask.sum()]
        assert shown[i].any() if i in single else [i] == (in_crowd or [-1])
    assert len({i for i in matched if i in single}) == sum(i in single for i in matched)
    total = sum(of_mask[i] for of_mask, i in zip(ious, matched) if i in single)
    sums = (
        sum(of_mask.get(i, 0) for of_mask, i in zip(ious, chosen))
        for chosen in itertools.permutations([*single, *[None] * n], n)
    )
    assert total == pytest.approx(max(sums))

    margins = visible_margins(masks, torch.tensor(matched), ids)
    for a, b in itertools.product(range(n), repeat=2):
        seen = ids[masks[a] & masks[b]].tolist()
        assert margins[a, b] == sum((i == matched[a]) - (i == matched[b]) for i in seen)


def random_predictions(seed, n, size):
    """n pasted masks, and a ground truth of patches of 5 x 5 pixels: void, things, stuff, crowds."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    boxes = corners * torch.tensor([size[1], size[0]] * 2)
    masks = BoxedMasks.paste(torch.rand(n, 4, 4, generator=generator), boxes, size)
    patches = torch.randint(7, [-(-length // 5) for length in size], generator=generator)
    ids = patches.repeat_interleave(5, 0).repeat_interleave(5, 1)[: size[0], : size[1]]
    segments = [thing(i, i % 2, iscrowd=int(i % 3 == 0), isthing=i != 4) for i in range(1, 7)]
    classes, scores = torch.randint(2, (n,), generator=generator), torch.arange(n) / 100
    return masks, scores, classes, ids, segments


@given(seeds, st.integers(0, 7), st.sampled_from([(30, 40), (17, 90), (64, 5)]))
def test_boxed_masks_are_counted_as_full_ones(seed, n, size):
    boxed, _, *truth = random_predictions(seed, n, size)
    full = boxed.full()
    matched = match_to_segments(full, *truth)
    assert torch.equal(match_to_segments(boxed, *truth), matched)
    margins = visible_margins(full, matched, truth[1])
    assert torch.equal(visible_margins(boxed, matched, truth[1]), margins)


@given(seeds, st.integers(0, 9))
def test_regions_that_overlap(seed, n):
    """Every pair of pixels of two regions, against the pixels of the image."""
    masks, *_ = random_predictions(seed, n, (30, 40))
    image, found = np.arange(30 * 40).reshape(30, 40), {}
    for a, b, in_a, in_b in overlapping_regions(masks.regions):
        found[a, b] = image[masks.regions[a]][in_a]
        assert np.array_equal(found[a, b], image[masks.regions[b]][in_b]) and found[a, b].size > 0
    for a, b in itertools.combinations(range(n), 2):
        shared = np.intersect1d(image[masks.regions[a]], image[masks.regions[b]])
        assert np.array_equal(found.get((a, b), np.array([])).ravel(), shared)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_oracle_of_boxed_masks_does_not_hold_all_images_at_once():
    masks, _, *truth = random_predictions(0, 40, (100, 150))
    with Largest() as largest:
        visible_margins(masks, match_to_segments(masks, *truth), truth[1])
    assert largest.numel <= 2 * 100 * 150  # the two coordinates that a mask is sampled at


def test_the_oracle_of_true_pairs_leaves_false_ones_to_the_order():
    margins = torch.tensor([[0.0, -5, 4], [5, 0, 3], [-4, -3, 0]])  # the third matches nothing
    matched, order = torch.tensor([7, 8, -1]), torch.tensor([2, 0, 1])
    known = margins_of_true_pairs(margins, matched, order)
    assert known.tolist() == [[0, -5, -4], [5, 0, -3], [4, 3, 0]]
    assert order_from_margins(known, torch.ones(3)).tolist() == [2, 1, 0]
