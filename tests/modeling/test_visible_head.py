import math

import pytest
import torch

from oanet_d2.modeling.visible_head import VisibleMaskHead, visible_on_grid
from tests.conftest import box_mask, make_candidates

SIZE = (12, 12)
CLASSES, CHANNELS = 3, 4


def make_head(with_semantic=True, **kwargs):
    return VisibleMaskHead(CLASSES, CHANNELS, with_semantic, conv_dim=16, num_conv=2, **kwargs)


def maps(num_images=1):
    return torch.randn(num_images, CHANNELS, *SIZE), torch.randn(num_images, CLASSES, *SIZE)


def candidates_of(*masks, classes=None):
    stacked = torch.stack(masks) if masks else torch.zeros(0, *SIZE, dtype=torch.bool)
    return make_candidates(stacked, classes or [i % CLASSES for i in range(len(masks))])


A, B = box_mask(0, 0, 8, 8, SIZE), box_mask(4, 4, 12, 12, SIZE)
EMPTY = torch.zeros(SIZE, dtype=torch.bool)


@pytest.mark.parametrize("with_semantic", [True, False])
def test_images_and_instances_do_not_mix_up(with_semantic):
    """A batch gives what each image gives alone, in whatever order its instances come."""
    torch.manual_seed(0)
    head, (features, semantic) = make_head(with_semantic), maps(3)
    batch = [candidates_of(A, B, EMPTY), candidates_of(), candidates_of(B)]
    with torch.no_grad():
        together = head(batch, features, semantic if with_semantic else None)
        assert [x.shape for x in together] == [(n, 14, 14) for n in (3, 0, 1)]
        for i in range(3):
            of_image = semantic[i : i + 1] if with_semantic else None
            (alone,) = head(batch[i : i + 1], features[i : i + 1], of_image)
            torch.testing.assert_close(together[i], alone)
        swapped = candidates_of(B, EMPTY, A, classes=[1, 2, 0])
        swapped.scores = batch[0].scores[[1, 2, 0]]
        (other,) = head([swapped], features[:1], semantic[:1] if with_semantic else None)
    torch.testing.assert_close(other, together[0][[1, 2, 0]])


def test_loss_by_hand():
    """One alone, and two of the same extent of which the first lies on top."""
    alone, both = candidates_of(A), candidates_of(A, A)
    logits = [torch.full((1, 14, 14), 3.0), torch.tensor([2.0, -1.0])[:, None, None].expand(2, 14, 14)]
    shows = [A[None], torch.stack([A, EMPTY])]
    loss = make_head().loss(logits, [alone, both], shows)

    def of(logit, visible):
        return math.log(1 + math.exp(-logit if visible else logit))

    # cells that nobody else claims count 0.3, the others 1 more
    expected = 0.3 * of(3.0, True) + 1.3 * of(2.0, True) + 1.3 * of(-1.0, False)
    assert loss.item() == pytest.approx(expected / (0.3 + 1.3 + 1.3), rel=1e-5)


def test_the_loss_is_of_the_part_that_is_visible():
    """The left half of an instance is: the logits that say so cost least."""
    candidates = candidates_of(A)
    shows = [(A & box_mask(0, 0, 4, 12, SIZE))[None]]

    def loss(left, right):
        logits = torch.cat([torch.full((14, 7), left), torch.full((14, 7), right)], dim=1)
        return make_head().loss([logits[None]], [candidates], shows).item()

    assert loss(4.0, -4.0) < 0.3 < loss(4.0, 4.0) < loss(-4.0, 4.0)


@pytest.mark.parametrize("masks", [(), (EMPTY,)], ids=["no instance", "empty"])
def test_without_a_cell_the_loss_is_zero_with_gradients(masks):
    head, candidates = make_head(), candidates_of(*masks)
    loss = head.loss(head([candidates], *maps()), [candidates], [candidates.masks])
    loss.backward()
    assert loss.item() == 0
    # (without an instance a normalization has nothing to normalize, and no gradient)
    assert not any(p.grad.any() for p in head.parameters() if p.grad is not None)


def test_on_the_grid_it_says_the_same_within_the_mask_and_nothing_outside():
    candidates = candidates_of(A, B, EMPTY)
    logits = torch.tensor([0.0, 2.0, 5.0])[:, None, None].expand(3, 14, 14)
    found = visible_on_grid(logits, candidates)
    assert not found[~candidates.masks].any()
    for i in (0, 1):
        p = found[i][candidates.masks[i]]
        # steps of 1/255
        assert (p - logits[i, 0, 0].sigmoid()).abs().max() <= 1 / 255
    assert visible_on_grid(logits[:0], candidates_of()).shape == (0, *SIZE)


def test_on_the_grid_it_lies_where_the_instance_does():
    """The upper left quarter of B's extent, and nothing else."""
    logits = torch.full((1, 14, 14), -20.0)
    logits[0, :7, :7] = 20.0
    found = visible_on_grid(logits, candidates_of(B))[0]
    assert torch.equal(found > 0.5, box_mask(4, 4, 8, 8, SIZE))


def test_learns_who_is_visible_from_what_the_overlap_looks_like():
    """Two of one class, of random colours; the overlap has the colour of the one on top."""
    torch.manual_seed(0)
    head = make_head(with_semantic=False)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)

    def draw():
        features = 0.1 * torch.randn(1, CHANNELS, *SIZE)
        first, second = torch.randperm(CHANNELS)[:2].tolist()
        top, below = (A, B) if torch.rand(()) < 0.5 else (B, A)
        features[0, second, below] += 2.0
        features[0, :, top] = 0.1 * torch.randn(CHANNELS, int(top.sum()))
        features[0, first, top] += 2.0
        return candidates_of(top, below, classes=[1, 1]), features, torch.stack([top, below & ~top])

    def step():
        batch = [draw() for _ in range(4)]
        candidates, features, shows = map(list, zip(*batch))
        for x in candidates:
            x.scores = torch.full_like(x.scores, 0.9)  # the order must not tell
        logits = head(candidates, torch.cat(features))
        return head.loss(logits, candidates, shows), logits, candidates

    before = step()[0].item()
    for _ in range(150):
        optimizer.zero_grad()
        step()[0].backward()
        optimizer.step()
    after, logits, candidates = step()
    assert before > 0.5 and after.item() < 0.25
    for one, instances in zip(logits, candidates):
        top, below = visible_on_grid(one, instances)[:, A & B].mean(1)
        assert top - below > 0.5


def test_what_surrounds_an_instance_is_part_of_what_it_is_shown():
    """Every input matters: the mask, the other claims (of its class or not), class and place."""
    torch.manual_seed(0)
    head, (features, semantic) = make_head(), maps()

    def said(candidates, features=features, semantic=semantic):
        with torch.no_grad():
            return head([candidates], features, semantic)[0][0]

    plain = said(candidates_of(A, B, classes=[0, 1]))
    torch.testing.assert_close(plain, said(candidates_of(A, B, EMPTY, classes=[0, 1, 2])))
    changed = {
        "other": said(candidates_of(A, classes=[0])),
        "class of the other": said(candidates_of(A, B, classes=[0, 0])),
        "class": said(candidates_of(A, B, classes=[2, 1])),
        "features": said(candidates_of(A, B, classes=[0, 1]), features=features.flip(1)),
        "semantic": said(candidates_of(A, B, classes=[0, 1]), semantic=semantic.flip(1)),
    }
    for what, logits in changed.items():
        assert (logits - plain).abs().max() > 1e-5, what
    # what lies outside its extent is not
    moved = features.clone()
    moved[..., 10:, 10:] += 1
    torch.testing.assert_close(plain, said(candidates_of(A, B, classes=[0, 1]), features=moved))
