"""
The evidence is matrix products; the references here are sums over cells, one after the other.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oanet_d2.modeling.candidates import Candidates
from oanet_d2.modeling.pair_evidence import (
    CLASS_EVIDENCE_DIM,
    PAIR_GEOMETRY_DIM,
    appearance_evidence,
    appearance_means,
    class_evidence,
    geometry_evidence,
    overlapping_pairs,
)
from tests.conftest import box_mask, make_candidates

H, W, CLASSES, CHANNELS = 5, 6, 3, 4
KINDS = ("geometry", "class", "appearance")
seeds = st.integers(0, 2**31 - 1)
counts = st.integers(0, 6)


def random_case(seed, n):
    """Candidates (one of them empty, one within another), a class map and features."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, H, W, generator=generator) < 0.4
    if n > 2:
        masks[1] &= masks[0]
        masks[2] = False
    candidates = Candidates(
        masks,
        torch.randint(CLASSES, (n,), generator=generator),
        torch.rand(n, generator=generator),
        torch.rand(n, 4, generator=generator).sort(dim=1).values,
    )
    class_map = torch.rand(CLASSES, H, W, generator=generator)
    features = torch.randn(CHANNELS, H, W, generator=generator)
    return candidates, class_map, features


def evidence_of(kind, case):
    candidates, class_map, features = case
    pairs = overlapping_pairs(candidates.masks)
    if kind == "geometry":
        return geometry_evidence(candidates, pairs)
    if kind == "class":
        return class_evidence(class_map, candidates.classes, pairs)
    return appearance_evidence(appearance_means(features, pairs))


def cells_of(mask):
    return {(y, x) for y, x in mask.nonzero().tolist()}


def slow_pairs(masks):
    cells = [cells_of(m) for m in masks]
    n = len(masks)
    return [(a, b) for a in range(n) for b in range(a + 1, n) if cells[a] & cells[b]]


def mean(values, cells):
    """The mean over some cells of a map (..., h, w); 0 where there is none."""
    values = [values[..., y, x] for y, x in sorted(cells)]
    return sum(values) / len(values) if values else torch.zeros(CHANNELS)


def slow_geometry(one, other, case):
    candidates = case[0]

    def of(i):
        x0, y0, x1, y1 = candidates.boxes[i].tolist()
        area = math.sqrt(len(cells_of(candidates.masks[i])) / (H * W))
        return [x0, y0, x1, y1, x1 - x0, y1 - y0, area, candidates.scores[i].item()]

    heights = max(of(one)[5] + of(other)[5], 1e-6)
    shared = cells_of(candidates.masks[one]) & cells_of(candidates.masks[other])
    return [
        *of(one),
        *of(other),
        *((x - y) / heights for x, y in zip(of(one), of(other))),
        len(shared) / len(cells_of(candidates.masks[one])),
        len(shared) / len(cells_of(candidates.masks[other])),
        math.sqrt(len(shared) / (H * W)),
        float(candidates.classes[one] == candidates.classes[other]),
    ]


def slow_class(one, other, case):
    candidates, class_map, _ = case
    cells = [cells_of(candidates.masks[i]) for i in (one, other)]
    parts = cells[0] & cells[1], cells[0] - cells[1], cells[1] - cells[0]

    def say(part, i):
        return mean(class_map[candidates.classes[i]], part).item() if part else 0.0

    both, alone_one, alone_other = parts
    return [
        *(say(both, one), say(both, other)),
        *(say(alone_one, one), say(alone_other, one)),
        *(say(alone_one, other), say(alone_other, other)),
    ]


def cosine(x, y):
    if not x.any() or not y.any():
        return torch.zeros(())
    return (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt())


def slow_appearance(one, other, case):
    candidates, _, features = case
    cells = [cells_of(candidates.masks[i]) for i in (one, other)]
    both = mean(features, cells[0] & cells[1])
    alone_one, alone_other = (mean(features, x) for x in (cells[0] - cells[1], cells[1] - cells[0]))
    cosines = [cosine(both, alone_one), cosine(both, alone_other), cosine(alone_one, alone_other)]
    like = [both * alone_one, both * alone_other]
    unlike = [(both - alone_one).abs(), (both - alone_other).abs()]
    return torch.cat([*like, *unlike, torch.stack(cosines)])


SLOW = {"geometry": slow_geometry, "class": slow_class, "appearance": slow_appearance}
WIDTHS = {
    "geometry": PAIR_GEOMETRY_DIM,
    "class": CLASS_EVIDENCE_DIM,
    "appearance": 4 * CHANNELS + 3,
}


@given(seeds, counts)
def test_pairs_against_plain_loops(seed, n):
    masks = random_case(seed, n)[0].masks
    pairs = overlapping_pairs(masks)
    assert list(zip(pairs.a.tolist(), pairs.b.tolist())) == slow_pairs(masks)
    assert pairs.areas.tolist() == [len(cells_of(m)) for m in masks]
    shared = [len(cells_of(masks[a]) & cells_of(masks[b])) for a, b in slow_pairs(masks)]
    assert pairs.cells.tolist() == shared
    assert torch.equal(pairs.masks, masks.flatten(1))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(seed=seeds, n=counts)
def test_evidence_against_plain_loops(kind, seed, n):
    case = random_case(seed, n)
    found = evidence_of(kind, case)
    pairs = slow_pairs(case[0].masks)
    for name, order in (("ab", 1), ("ba", -1)):
        assert found[name].shape == (len(pairs), WIDTHS[kind])
        for row, pair in zip(found[name], pairs):
            expected = torch.as_tensor(SLOW[kind](*pair[::order], case))
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=seeds)
def test_swapping_the_instances_swaps_ab_and_ba(kind, seed):
    candidates, *maps = case = random_case(seed, 2)
    flipped = Candidates(
        *(getattr(candidates, x).flip(0) for x in ("masks", "classes", "scores", "boxes"))
    )
    found, swapped = evidence_of(kind, case), evidence_of(kind, (flipped, *maps))
    torch.testing.assert_close(found["ab"], swapped["ba"])
    torch.testing.assert_close(found["ba"], swapped["ab"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", ["no instance", "one", "apart", "empty"])
def test_no_pair_is_an_empty_tensor(kind, masks):
    _, *maps = random_case(0, 0)
    masks = {
        "no instance": torch.zeros(0, H, W, dtype=torch.bool),
        "one": torch.ones(1, H, W, dtype=torch.bool),
        "apart": torch.stack([box_mask(0, 0, 3, H, (H, W)), box_mask(3, 0, W, H, (H, W))]),
        "empty": torch.stack([torch.ones(H, W), *torch.zeros(2, H, W)]).bool(),
    }[masks]
    candidates = make_candidates(masks, [0] * len(masks))
    assert len(overlapping_pairs(masks).a) == 0
    found = evidence_of(kind, (candidates, *maps))
    assert {k: v.shape for k, v in found.items()} == dict.fromkeys(("ab", "ba"), (0, WIDTHS[kind]))


@settings(max_examples=20)
@given(seeds)
def test_class_evidence_looks_at_no_cell_outside(seed):
    candidates, class_map, features = case = random_case(seed, 4)
    outside = ~candidates.masks.any(dim=0)
    for kind in ("class", "appearance"):
        changed = [m.masked_fill(outside, 99.0) for m in (class_map, features)]
        before, after = evidence_of(kind, case), evidence_of(kind, (candidates, *changed))
        torch.testing.assert_close(before["ab"], after["ab"])


def test_flat_boxes_give_finite_geometry():
    candidates, *maps = random_case(0, 3)
    flat = replace(candidates, boxes=candidates.boxes[:, [0, 1, 2, 1]])
    found = evidence_of("geometry", (flat, *maps))
    assert len(found["ab"]) and torch.isfinite(found["ab"]).all()


def within(size, num_channels=32, n=2):
    """Instances within the first one, which covers everything: the others have no part alone."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(n, size, size, dtype=torch.bool)
    masks[0] = True
    for i in range(1, n):
        x, y = torch.randint(0, size - 6, (2,), generator=generator).tolist()
        masks[i, y : y + 6, x : x + 6] = True
    return masks, torch.randn(num_channels, size, size, generator=generator)


@pytest.mark.parametrize("size", [16, 48, 100])
def test_an_instance_within_another_looks_like_nothing_alone(size):
    """The difference of two sums must be 0 here, not rounding error: a cosine has no scale."""
    masks, features = within(size)
    found = appearance_evidence(appearance_means(features, overlapping_pairs(masks)))["ab"][0]
    like_b, (_, cosine_b, cosine_ab) = found[32:64], found[-3:]
    assert not like_b.any()
    assert (cosine_b.item(), cosine_ab.item()) == (0, 0)


def test_gradients_are_those_of_plain_loops():
    """... and the missing parts have none, rather than huge ones that nearly cancel."""
    masks, features = within(16, CHANNELS, n=12)
    fast, slow = (features.clone().requires_grad_() for _ in range(2))
    pairs = overlapping_pairs(masks)
    appearance_evidence(appearance_means(fast, pairs))["ab"].sum().backward()
    case = make_candidates(masks, [0] * len(masks)), None, slow
    sum(slow_appearance(a, b, case).sum() for a, b in slow_pairs(masks)).backward()
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-4, rtol=1e-3)


def test_counts_are_exact_under_autocast():
    """SOLVER.AMP: in half precision 2049 is not a number, and 65520 is infinite."""
    masks = torch.zeros(2, 70, 70, dtype=torch.bool)
    masks[0] = True
    masks[1].view(-1)[:2049] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = overlapping_pairs(masks)
    assert pairs.areas.tolist() == [4900, 2049] and pairs.cells.tolist() == [2049]
