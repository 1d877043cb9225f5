"""
The evidence is matrix products. The references here are sums over cells, one after the other.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from oanet_d2.painting.pairs import (
    CLASS_NUMBERS,
    GEOMETRY_NUMBERS,
    PairDescriptions,
    PairNetwork,
    PairNorm,
    _likeness,
    appearance_means,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
)
from tests.conftest import box_mask

H, W, CLASSES, CHANNELS = 5, 6, 3, 4
WIDTHS = {"geometry": GEOMETRY_NUMBERS, "class": CLASS_NUMBERS, "appearance": 4 * CHANNELS + 3}
seeds = st.integers(0, 2**31 - 1)


class Case(NamedTuple):
    masks: torch.Tensor
    classes: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    class_map: torch.Tensor
    features: torch.Tensor


def random_case(seed, n):
    """Random instances (one of them empty, one within another), a class map and features."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, H, W, generator=generator) < 0.4
    if n > 2:
        masks[1] &= masks[0]
        masks[2] = False
    return Case(
        masks,
        torch.randint(CLASSES, (n,), generator=generator),
        torch.rand(n, generator=generator),
        torch.rand(n, 4, generator=generator).sort(dim=1).values,
        torch.rand(CLASSES, H, W, generator=generator),
        torch.randn(CHANNELS, H, W, generator=generator),
    )


def evidence(kind, case):
    pairs = overlapping_pairs(case.masks)
    if kind == "geometry":
        return geometry_evidence(*case[:4], pairs)
    if kind == "class":
        return class_evidence(case.class_map, case.classes, pairs)
    overlap, alone_a, alone_b = appearance_means(case.features, pairs).unbind(1)
    return {"ab": _likeness(overlap, alone_a, alone_b), "ba": _likeness(overlap, alone_b, alone_a)}


def cells_of(mask):
    return {(y, x) for y, x in mask.nonzero().tolist()}


def slow_pairs(masks):
    pairs = itertools.combinations(range(len(masks)), 2)
    return [(a, b) for a, b in pairs if cells_of(masks[a] & masks[b])]


def parts(one, other, case):
    """The cells of the overlap, of the one without the other, and of the other without the one."""
    first, second = cells_of(case.masks[one]), cells_of(case.masks[other])
    return first & second, first - second, second - first


def mean(values, cells):
    """The mean over some cells of a map (..., h, w); 0 where there is none."""
    values = [values[..., y, x] for y, x in sorted(cells)]
    return sum(values) / len(values) if values else torch.zeros(CHANNELS)


def slow_geometry(one, other, case):
    def of(i):
        x0, y0, x1, y1 = case.boxes[i].tolist()
        size = math.sqrt(len(cells_of(case.masks[i])) / (H * W))
        return [x0, y0, x1, y1, x1 - x0, y1 - y0, size, case.scores[i].item()]

    shared, alone_one, alone_other = map(len, parts(one, other, case))
    heights = max(of(one)[5] + of(other)[5], 1e-6)
    return [
        *of(one),
        *of(other),
        *((x - y) / heights for x, y in zip(of(one), of(other))),
        shared / (shared + alone_one),
        shared / (shared + alone_other),
        math.sqrt(shared / (H * W)),
        float(case.classes[one] == case.classes[other]),
    ]


def slow_class(one, other, case):
    maps = [case.class_map[case.classes[i]] for i in (one, other)]
    both, alone_one, alone_other = parts(one, other, case)
    of_parts = [(i, cells) for i in (0, 1) for cells in (alone_one, alone_other)]
    of_parts = [(0, both), (1, both), *of_parts]
    return [mean(maps[i], cells).item() if cells else 0.0 for i, cells in of_parts]


def slow_appearance(one, other, case):
    both, x, y = (mean(case.features, cells) for cells in parts(one, other, case))
    cosines = [F.cosine_similarity(*two, dim=0) for two in ((both, x), (both, y), (x, y))]
    like, unlike = [both * x, both * y], [(both - x).abs(), (both - y).abs()]
    return torch.cat([*like, *unlike, torch.stack(cosines)])


SLOW = {"geometry": slow_geometry, "class": slow_class, "appearance": slow_appearance}


@pytest.mark.parametrize("kind", SLOW)
@settings(max_examples=40)
@given(seed=seeds, n=st.integers(0, 6))
def test_evidence_against_plain_loops(kind, seed, n):
    case = random_case(seed, n)
    found = evidence(kind, case)
    pairs = slow_pairs(case.masks)
    for name, order in (("ab", 1), ("ba", -1)):
        assert found[name].shape == (len(pairs), WIDTHS[kind])
        for row, pair in zip(found[name], pairs):
            expected = torch.as_tensor(SLOW[kind](*pair[::order], case))
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_geometry_does_not_depend_on_the_number_of_cells():
    """Its numbers are shares of the image, whatever the size of that is."""
    case = random_case(0, 5)
    finer = case._replace(masks=case.masks.repeat_interleave(2, 1).repeat_interleave(3, 2))
    torch.testing.assert_close(evidence("geometry", finer), evidence("geometry", case))


def test_flat_boxes_give_finite_geometry():
    case = random_case(0, 3)
    found = evidence("geometry", case._replace(boxes=case.boxes[:, [0, 1, 2, 1]]))
    assert len(found["ab"]) and torch.isfinite(found["ab"]).all()


@pytest.mark.parametrize("size", [16, 48, 100])
def test_an_instance_within_another_looks_like_nothing_alone(size):
    """The difference of two sums must be 0 here, not rounding error: a cosine has no scale."""
    masks = torch.stack([torch.ones(size, size).bool(), box_mask(2, 3, 9, 9, (size, size))])
    features = torch.randn(32, size, size).requires_grad_()
    means = appearance_means(features, overlapping_pairs(masks))[0]
    assert means[:2].all() and not means[2].any()
    means[2].sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize("num_channels", [0, CHANNELS])
def test_the_network_is_antisymmetric(num_channels):
    torch.manual_seed(0)
    network = PairNetwork(CLASSES, 7, num_channels)
    pairs = PairDescriptions(
        torch.randint(CLASSES, (20, 2)), torch.randn(20, 2, 7), torch.randn(20, 3, num_channels)
    )
    swapped = PairDescriptions(
        pairs.classes.flip(1), pairs.numbers.flip(1), pairs.means[:, [0, 2, 1]]
    )
    network(pairs)  # statistics that are not 0 and 1
    network.eval()
    logits = network(pairs)
    assert torch.equal(network(swapped), -logits) and (logits.abs() > 1e-3).all()
    # two that are the same to it are a draw
    same = [x[:, :1].expand_as(x) for x in (pairs.classes, pairs.numbers, pairs.means)]
    assert not network(PairDescriptions(*same)).any()


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
    norm.eval()
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm.running_mean, before)


def test_a_number_that_never_changed_in_training_does_not_explode():
    norm = PairNorm(1)
    for _ in range(500):
        norm(torch.ones(2, 8, 1))  # the score of ground truth
    assert norm.eval()(torch.full((2, 1, 1), 0.9)).abs().max() < 4
