from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oanet_d2.modeling.pair_memory import PairMemory
from oanet_d2.modeling.pair_network import DescribedPairs

CPU = torch.device("cpu")
# Numbers of pairs that are added in one step, and how many of those the ground truth decides.
steps = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=8)


def numbered(first, decided, undecided=0):
    """Pairs first, first + 1, ..., of which every tensor and the share tell the number."""
    n = torch.arange(first, first + decided + undecided)
    pairs = DescribedPairs(
        n[:, None].expand(-1, 2),
        n.float()[:, None, None].expand(-1, 2, 5) * 1e5,
        n.float()[:, None, None].expand(-1, 3, 2),
    )
    shares = torch.where(n < first + decided, n + 1.0, 0.0)
    return pairs, shares


def numbers_in(memory):
    """What is remembered, by enough draws."""
    pairs, shares = memory.draw(400)
    for x, factor in ((pairs.classes, 1), (pairs.numbers, 1e5), (pairs.means, 1)):
        expected = ((shares - 1) * factor).view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        assert torch.equal(x.float(), expected)
    assert len(pairs) == len(shares)
    return set((shares - 1).tolist())


@settings(max_examples=30, deadline=None)
@given(steps, st.integers(1, 6))
def test_remembers_the_last_that_were_decided(steps, capacity):
    torch.manual_seed(0)
    memory, expected, first = PairMemory(capacity), deque(maxlen=capacity), 0
    for decided, undecided in steps:
        memory.add(*numbered(first, decided, undecided))
        expected.extend(range(first, first + decided))
        first += decided + undecided
    assert len(memory) == len(expected)
    assert numbers_in(memory) == set(expected)


def test_more_at_once_than_it_can_hold():
    memory = PairMemory(3)
    memory.add(*numbered(0, 10))
    assert numbers_in(memory) == {7, 8, 9}


@pytest.mark.parametrize("added", [0, 2, 7])
def test_goes_on_after_a_checkpoint_as_if_nothing_had_happened(added, tmp_path):
    memory, resumed = PairMemory(4), PairMemory(4)
    for i in range(added):
        memory.add(*numbered(i, 1))
    torch.save(memory.state_dict(), tmp_path / "memory.pth")
    resumed.load_state_dict(torch.load(tmp_path / "memory.pth", weights_only=True), CPU)
    drawn = []
    for one in (memory, resumed):
        one.add(*numbered(10, 1))
        torch.manual_seed(0)
        drawn.append(one.draw(50))
    for a, b in zip(*drawn):
        assert torch.equal(getattr(a, "means", a), getattr(b, "means", b))


def test_what_was_remembered_does_not_fit_another_capacity():
    memory, smaller = PairMemory(4), PairMemory(2)
    memory.add(*numbered(0, 4))
    smaller.load_state_dict(memory.state_dict(), CPU)
    assert len(smaller) == 0


def test_a_checkpoint_is_not_larger_than_what_is_remembered():
    memory = PairMemory(1000)
    memory.add(*numbered(0, 3))
    assert {len(x) for x in memory.state_dict()["tensors"]} == {3}
    assert sum(x.untyped_storage().nbytes() for x in memory.state_dict()["tensors"]) < 1000
