import math

import pytest
import torch
from torch.nn import functional as F

from detectron2.utils.events import EventStorage

from oanet_d2.modeling import PairwiseRankingHead, SpatialRankingHead
from oanet_d2.modeling.grid import GridTruth, ground_truth_on_grid
from oanet_d2.modeling.pair_head import EVIDENCE
from tests.conftest import box_mask, make_grid_instances, make_instances, thing

SIZE = (12, 12)
CLASSES, CHANNELS = 3, 4


def make_head(evidence=tuple(EVIDENCE), **kwargs):
    if "score_map" in evidence:
        kwargs["score_map"] = SpatialRankingHead(
            num_classes=CLASSES, conv_dim=4, num_blocks=1, kernel_size=3, loss_weight=0.3
        )
    channels = CHANNELS if "features" in evidence else 0
    return PairwiseRankingHead(
        num_classes=CLASSES, evidence=evidence, feature_channels=channels, **kwargs
    )


def scene(masks, classes, scores=None, size=SIZE):
    """Instances and their ground truth: later masks on top."""
    masks = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64)
    categories = torch.full_like(ids, -1)
    for i, (mask, c) in enumerate(zip(masks, classes), start=1):
        ids[mask], categories[mask] = i, c
    segments = [thing(i, c) for i, c in enumerate(classes, start=1)]
    return make_grid_instances(masks, classes, scores), GridTruth(categories, ids, segments)


def boxes(seed, n, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 6, (n, 2), generator=generator).tolist()
    sides = torch.randint(2, 7, (n, 2), generator=generator).tolist()
    return [box_mask(x, y, x + w, y + h, size) for (x, y), (w, h) in zip(corners, sides)]


def two_boxes(size=SIZE):
    """They share four cells; the second has 25."""
    return [box_mask(0, 0, 6, 6, size), box_mask(4, 4, 9, 9, size)]


def maps_of(size):
    """Semantic logits and features of an image."""
    return {"semantic": torch.randn(CLASSES, *size), "features": torch.randn(CHANNELS, *size)}


def unequal_batch():
    """Instances, truth and maps of images of several sizes, two of them without a pair."""
    sizes = [(12, 15), (9, 20), (14, 11), (7, 7)]
    images = [scene(boxes(i, 4, s), [0, 1, 2, 1], None, s) for i, s in enumerate(sizes[:2])]
    images += [scene(boxes(3, 1, sizes[2]), [1], None, sizes[2]), scene([], [], None, sizes[3])]
    return [(*image, maps_of(size)) for image, size in zip(images, sizes)]


def prefer(head, values):
    """Make logit(a, b) = values[class of a] - values[class of b]."""
    network = head.eval().network
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    network.class_embedding.weight.data[:, 0] = torch.tensor(values)
    network.norm.running_var.fill_(1 - network.norm.eps)  # which leaves its input as it is
    for layer in network.compare[::2]:
        layer.weight.data[0, 0] = 1.0
    return head


LOG_3 = [0.0, math.log(3.0), 0.0]  # class 1 goes before the others with P = 3/4


def pair_loss(head, *images):
    return head.losses(*map(list, zip(*images)), [{} for _ in images])["loss_srm_pairs"]


def test_loss_by_hand():
    """Over three images of unequal size, each with one pair."""
    head = prefer(make_head((), loss_weight=0.5), LOG_3)
    first = scene(two_boxes((9, 14)), [0, 1])
    second = scene([box_mask(0, 0, 6, 6), box_mask(3, 3, 9, 9)], [1, 2])
    draw = scene(two_boxes(), [2, 1])
    draw[1].ids[4, 4:6] = 1  # two cells of either
    # the first: 4 of the smaller one's 25 cells, with P = 3/4 for what is shown; the second: 9 of
    # 36, with P = 1/4
    weights = math.sqrt(4 / 25), math.sqrt(9 / 36)
    expected = 0.5 * (weights[0] * math.log(4 / 3) + weights[1] * math.log(4)) / sum(weights)
    assert pair_loss(head, first, second, draw).item() == pytest.approx(expected, rel=1e-5)
    # and four shared cells, with P = 3/4 for the second
    margins = head.order_inputs([first[0]], [{}])[0].pair_margins
    torch.testing.assert_close(margins, torch.tensor([[0.0, -2.0], [2.0, 0.0]]))


def test_an_image_gives_the_same_in_any_batch():
    torch.manual_seed(0)
    head, (instances, _, maps) = make_head().eval(), map(list, zip(*unequal_batch()))
    together = head.order_inputs(instances, maps)
    assert [bool(x.pair_margins.any()) for x in together] == [True, True, False, False]
    for i, found in enumerate(together):
        (alone,) = head.order_inputs(instances[i : i + 1], maps[i : i + 1])
        torch.testing.assert_close(found.pair_margins, alone.pair_margins)
        assert torch.equal(found.score_map, alone.score_map)


def test_semantic_evidence_by_hand():
    """The branch sees class 1 everywhere."""
    head, seen = make_head(("semantic",)), []
    head.network.register_forward_pre_hook(lambda _, args: seen.append(args[1][0]))
    semantic = torch.zeros(CLASSES, *SIZE)
    semantic[1] = 8.0
    head.order_inputs([scene(two_boxes(), [0, 1])[0]], [{"semantic": semantic}])
    p = F.softmax(torch.tensor([0.0, 8.0, 0.0]), 0)
    mine, other = [p[0].item(), 0.0], [p[1].item(), 2.0]  # probability, logit / 4
    for numbers, (one, two) in zip(seen[0], ((mine, other), (other, mine))):
        expected = [[one[i], two[i], one[i], one[i], two[i], two[i]] for i in (0, 1)]
        torch.testing.assert_close(numbers, torch.tensor(expected).flatten())


@pytest.mark.parametrize("kind", EVIDENCE)
def test_every_evidence_matters_and_no_other_is_needed(kind):
    torch.manual_seed(0)
    head, (instances, truth) = make_head((kind,)), scene(two_boxes(), [0, 1])
    maps = {**maps_of(SIZE), "score_map": torch.rand(CLASSES, *SIZE)}
    needed = {name: x for name, x in maps.items() if name == kind}
    shifted = scene(two_boxes(), [0, 1], [0.3, 0.9])[0]
    with torch.no_grad():
        before = head.eval()([instances], [needed])[1]
        assert torch.equal(head([shifted], [needed])[1], before) == (kind != "geometry")
        for name, x in maps.items():
            changed = head([instances], [{**maps, name: x.flip(0)}])[1]
            assert torch.equal(changed, before) == (name != kind)
    sum(head.train().losses([instances], [truth], [needed]).values()).backward()
    assert all(p.grad.any() for p in head.parameters())


def test_the_map_learns_as_it_does_without_pairs():
    torch.manual_seed(0)
    head, batch = make_head(), [*map(list, zip(*unequal_batch()))]
    losses = head.losses(*batch)
    assert losses["loss_srm"] == head.score_map.losses(*batch)["loss_srm"]
    losses["loss_srm_pairs"].backward()
    # To the pairs S is only evidence.
    assert all(p.grad is None for p in head.score_map.parameters())


APART = [box_mask(0, 0, 5, 5, SIZE), box_mask(6, 6, 9, 9, SIZE)]
VOID = two_boxes()


@pytest.mark.parametrize("masks", [[], APART[:1], APART, VOID], ids=["none", "one", "apart", "void"])
def test_without_a_pair_the_loss_is_zero_with_gradients(masks):
    instances, truth = scene(masks, [1, 1][: len(masks)])
    if masks is VOID:
        truth.ids[:] = 0
    head = make_head()
    losses = head.losses([instances], [truth], [maps_of(SIZE)])
    sum(losses.values()).backward()
    assert losses["loss_srm_pairs"].item() == 0
    assert not any(p.grad.any() for p in head.network.parameters())
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def drawn(rule):
    """
    An image and its features: two boxes of one class that meet in a corner, in random order. On top
    is the lower one ("place"), or the one that the overlap looks like ("looks").
    """
    size = tuple(torch.randint(11, 15, (2,)).tolist())
    x, y = torch.randint(0, 3, (2,)).tolist()
    masks = [box_mask(x, y, x + 6, y + 6, size), box_mask(x + 3, y + 3, x + 9, y + 9, size)]
    swap = [1, 0] if torch.rand(()) < 0.5 else [0, 1]
    if rule == "looks" and torch.rand(()) < 0.5:
        masks.reverse()
    instances, truth = scene(masks, [2, 2])
    features = 0.1 * torch.randn(CHANNELS, *size)
    if rule == "looks":
        colours = torch.randperm(CHANNELS)
        for mask, colour in zip(masks, colours):
            features[colour, mask] += 1.0
        features[colours[0], masks[0] & masks[1]] -= 1.0
    instances = make_grid_instances(instances.masks[swap], instances.classes[swap], [0.9, 0.9])
    return instances, truth, {"features": features}


@pytest.mark.parametrize(
    "rule, evidence, learns",
    # those that learn nothing show that it is this evidence
    [("place", "geometry", True), ("looks", "features", True), ("looks", "geometry", False)],
)
def test_learns_from_the_evidence_that_tells(rule, evidence, learns):
    torch.manual_seed(0)
    head = make_head((evidence,))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)

    def loss(images):
        batch = map(list, zip(*(drawn(rule) for _ in range(images))))
        return head.losses(*batch)["loss_srm_pairs"]

    for _ in range(40):
        optimizer.zero_grad()
        loss(8).backward()
        optimizer.step()
    with torch.no_grad():
        after = loss(32).item()
    assert after < 0.2 if learns else after > 0.6


def test_accuracy_of_the_decided_pairs_for_tensorboard():
    head = prefer(make_head(()), LOG_3)
    images = [scene(two_boxes(), classes) for classes in ([0, 1], [2, 1], [1, 0], [1, 2], [0, 1])]
    images[-1][1].ids[:] = 0  # not decided
    with EventStorage(18) as storage:
        pair_loss(head, *images)
        assert "srm/pair_accuracy" not in storage.latest()
        storage.step()
        pair_loss(head, *images)
        assert storage.latest()["srm/pair_accuracy"] == (0.5, 19)


@pytest.mark.parametrize("iscrowd, loss", [(1, math.log(4 / 3)), (0, 0.0)])
def test_an_instance_in_a_crowd_is_in_front_where_the_crowd_shows(iscrowd, loss):
    """
    A person (class 1), one of two in a segment of persons, covers a corner of a chair. Without the
    crowd's mark the segment is the other person's.
    """
    persons = [box_mask(6, 0, 12, 4, SIZE), box_mask(4, 4, 9, 8, SIZE)]
    instances, _ = scene([box_mask(0, 0, 6, 6, SIZE), persons[1], persons[0]], [0, 1, 1])
    ids = torch.zeros(SIZE, dtype=torch.int64)
    ids[instances.masks[0]] = 1
    ids[persons[0] | persons[1]] = 2
    segments = [thing(1, 0), thing(2, 1, iscrowd=iscrowd)]
    image = instances, GridTruth(torch.zeros_like(ids), ids, segments)
    assert pair_loss(prefer(make_head(()), LOG_3), image).item() == pytest.approx(loss, rel=1e-5)


def test_geometry_is_shares_of_the_image():
    """Whatever else is in the batch: the sizes of both and of the overlap in an image 64 x 96."""
    head, seen = make_head(("geometry",)).eval(), []
    head.network.register_forward_pre_hook(lambda _, args: seen.append(args[1][-1, 0]))
    pair = make_instances((64, 96), [[8, 8, 64, 56], [32, 24, 88, 64]], [0, 1])
    pair = ground_truth_on_grid(pair, 4)
    larger = make_instances((130, 180), [[8, 8, 64, 56], [32, 24, 88, 64]], [0, 1])
    for batch in ([pair], [ground_truth_on_grid(larger, 4), pair]):
        head.order_inputs(batch, [{} for _ in batch])
        # 14 x 12, 14 x 10 and 8 x 8 of 24 x 16 cells
        expected = torch.tensor([168.0, 140.0, 64.0]).div(384).sqrt()
        torch.testing.assert_close(seen[-1][[6, 14, 26]], expected)
    assert torch.equal(*seen)
