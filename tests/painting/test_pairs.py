"""
The evidence is matrix products. The references here are sums over cells, one after the other.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oanet_d2.painting.pairs import (
    CLASS_NUMBERS,
    GEOMETRY_NUMBERS,
    PairNetwork,
    PairNorm,
    appearance_means,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
)
from tests.conftest import box_mask

H, W, CLASSES, CHANNELS = 5, 6, 3, 4


def random_instances(seed, n):
    """Masks (one of them empty, one within another), classes, scores and boxes."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, H, W, generator=generator) < 0.4
    if n > 2:
        masks[1] &= masks[0]
        masks[2] = False
    classes = torch.randint(CLASSES, (n,), generator=generator)
    scores = torch.rand(n, generator=generator)
    return masks, classes, scores, torch.rand(n, 4, generator=generator).sort(dim=1).values


def mean(values, mask):
    """The mean over a mask of a map (..., h, w); 0 where there is none."""
    values = [values[..., y, x] for y, x in mask.nonzero().tolist()]
    return sum(values) / max(len(values), 1) + torch.zeros(())


def slow_geometry(one, other, masks, classes, scores, boxes):
    def of(i):
        x0, y0, x1, y1 = boxes[i].tolist()
        size = math.sqrt(masks[i].sum() / (H * W))
        return [x0, y0, x1, y1, x1 - x0, y1 - y0, size, scores[i].item()]

    shared = (masks[one] & masks[other]).sum().item()
    heights = max(of(one)[5] + of(other)[5], 1e-6)
    difference = [(x - y) / heights for x, y in zip(of(one), of(other))]
    covered = [shared / masks[i].sum().item() for i in (one, other)]
    same = float(classes[one] == classes[other])
    return [*of(one), *of(other), *difference, *covered, math.sqrt(shared / (H * W)), same]


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.integers(0, 6), st.booleans())
def test_evidence_against_plain_loops(seed, n, flat_boxes):
    masks, classes, scores, boxes = random_instances(seed, n)
    if flat_boxes:
        boxes[:, 3] = boxes[:, 1]
    class_map, features = torch.rand(CLASSES, H, W), torch.randn(CHANNELS, H, W)
    pairs = overlapping_pairs(masks)
    geometry = geometry_evidence(classes, scores, boxes, pairs)
    of_classes = class_evidence(class_map, classes, pairs)
    means = appearance_means(features, pairs)
    expected = [x for x in itertools.combinations(range(n), 2) if (masks[x[0]] & masks[x[1]]).any()]
    assert list(zip(pairs.a.tolist(), pairs.b.tolist())) == expected
    assert geometry.shape == (len(expected), 2, GEOMETRY_NUMBERS)
    assert of_classes.shape == (len(expected), 2, CLASS_NUMBERS)
    assert means.shape == (len(expected), 3, CHANNELS)
    for i, (a, b) in enumerate(expected):
        for side, one, other in ((0, a, b), (1, b, a)):
            slow = torch.tensor(slow_geometry(one, other, masks, classes, scores, boxes))
            torch.testing.assert_close(geometry[i, side], slow, atol=1e-4, rtol=1e-4)
            both = masks[one] & masks[other]
            parts = both, masks[one] & ~both, masks[other] & ~both
            first, second = ([mean(class_map[classes[x]], y) for y in parts] for x in (one, other))
            slow = torch.stack([first[0], second[0], *first[1:], *second[1:]])
            torch.testing.assert_close(of_classes[i, side], slow)
            slow = torch.stack([mean(features, x) + torch.zeros(CHANNELS) for x in parts])
            found = means[i] if side == 0 else means[i, [0, 2, 1]]
            torch.testing.assert_close(found, slow, atol=1e-5, rtol=1e-5)


def test_an_instance_within_another_looks_like_nothing_alone():
    """The difference of two sums must be 0 here, not rounding error: a cosine has no scale."""
    masks = torch.stack([torch.ones(100, 100).bool(), box_mask(2, 3, 9, 9, (100, 100))])
    means = appearance_means(torch.randn(32, 100, 100), overlapping_pairs(masks))[0]
    assert means[:2].all() and not means[2].any()


@pytest.mark.parametrize("num_channels", [0, CHANNELS])
def test_the_network_is_antisymmetric(num_channels):
    torch.manual_seed(0)
    network = PairNetwork(CLASSES, 7, num_channels)
    pairs = torch.randint(CLASSES, (20, 2)), torch.randn(20, 2, 7), torch.randn(20, 3, num_channels)
    swapped = pairs[0].flip(1), pairs[1].flip(1), pairs[2][:, [0, 2, 1]]
    network(*pairs)  # statistics that are not 0 and 1
    network.eval()
    logits = network(*pairs)
    assert torch.equal(network(*swapped), -logits) and (logits.abs() > 1e-3).all()
    # two that are the same to it are a draw
    assert not network(*(x[:, :1].expand_as(x) for x in pairs)).any()


def test_norm_remembers_what_batch_norm_would_and_normalizes_by_it_in_training_too():
    torch.manual_seed(0)
    norm, reference = PairNorm(3), torch.nn.BatchNorm1d(3, eps=1e-3, affine=False)
    for rows in (40, 1, 0, 7, 25):
        x = 3 + 5 * torch.randn(2, rows, 3)
        found = norm(x)
        if rows:
            reference.train()(x.flatten(0, 1))
        expected = reference.eval()(x.flatten(0, 1)).view_as(x)
        torch.testing.assert_close(found, expected)
