import math

import pytest
import torch
from torch.nn import functional as F

from oanet_d2.modeling import SRM_HEAD_REGISTRY, PairwiseRankingHead
from oanet_d2.modeling.candidates import RankingTarget
from oanet_d2.modeling.pair_head import EVIDENCE
from oanet_d2.modeling.pair_network import PairNorm
from tests.conftest import box_mask, make_candidates, thing

SIZE = (12, 12)
CLASSES, CHANNELS = 3, 4
VOID = 255

def make_head(evidence=EVIDENCE, **kwargs):
    args = {"num_classes": CLASSES, "conv_dim": 4, "num_blocks": 1, "kernel_size": 3, "stride": 1}
    dims = {"feature_channels": CHANNELS, "embed_dim": 4, "feature_dim": 6, "hidden_dim": 16}
    return PairwiseRankingHead(evidence=evidence, **{**args, **dims, **kwargs})


def make_ready(*args, **kwargs):
    """For a head that only has to answer: its statistics stand still."""
    return make_head(*args, **kwargs).eval()


def scene(masks, classes, scores=None):
    """What is ranked and its ground truth: later masks on top."""
    masks = torch.stack(masks) if masks else torch.zeros(0, *SIZE, dtype=torch.bool)
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64)
    categories = torch.full_like(ids, VOID)
    for i, (mask, c) in enumerate(zip(masks, classes), start=1):
        ids[mask], categories[mask] = i, c
    target = RankingTarget(categories, ids, [thing(i, c) for i, c in enumerate(classes, start=1)])
    return make_candidates(masks, classes, scores), target


def random_maps(generator=None):
    return (
        torch.randn(1, CLASSES, *SIZE, generator=generator),
        torch.randn(1, CHANNELS, *SIZE, generator=generator),
    )


def test_is_registered():
    assert SRM_HEAD_REGISTRY.get("PairwiseRankingHead") is PairwiseRankingHead


def boxes(seed, n):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 7, (n, 2), generator=generator).tolist()
    sizes = torch.randint(2, 7, (n, 2), generator=generator).tolist()
    return [box_mask(x, y, x + w, y + h, SIZE) for (x, y), (w, h) in zip(corners, sizes)]


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_does_not_depend_on_the_order_of_the_instances(seed):
    torch.manual_seed(seed)
    head, maps, n = make_ready(), random_maps(), 7
    masks, classes = boxes(seed, n), torch.randint(CLASSES, (n,))
    scores = torch.rand(n)
    permutation = torch.randperm(n)
    candidates, _ = scene(masks, classes.tolist(), scores)
    permuted, _ = scene(
        [masks[i] for i in permutation], classes[permutation].tolist(), scores[permutation]
    )
    with torch.no_grad():
        margins = head.evidence([candidates], *maps)[0].pair_margins
        of_permuted = head.evidence([permuted], *maps)[0].pair_margins
    assert margins.any()
    torch.testing.assert_close(
        of_permuted, margins[permutation][:, permutation], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(5))
def test_margins_are_antisymmetric_and_bounded_by_the_shared_cells(seed):
    torch.manual_seed(seed)
    head, n = make_ready(), 6
    for parameter in head.networks[0].compare.parameters():
        parameter.data *= 5  # sure of itself
    candidates, _ = scene(boxes(seed, n), torch.randint(CLASSES, (n,)).tolist())
    with torch.no_grad():
        evidence = head.evidence([candidates], *random_maps())[0]
    margins = evidence.pair_margins
    assert torch.equal(margins, -margins.t())
    shared = torch.tensor(
        [[(a & b).sum() for b in candidates.masks] for a in candidates.masks]
    ).fill_diagonal_(0)
    assert (margins.abs() <= shared).all()
    assert (margins.abs() > 0.5 * shared).any()
    assert not margins[shared == 0].any() and (shared == 0).sum() > n
    assert evidence.score_map.shape == (CLASSES, *SIZE)


def test_two_that_are_the_same_to_it_are_a_draw():
    torch.manual_seed(0)
    mask = box_mask(2, 2, 8, 8, SIZE)
    candidates, _ = scene([mask, mask], [1, 1], [0.5, 0.5])
    with torch.no_grad():
        (pairs,), (logits,) = make_ready().pair_logits(
            [candidates], [torch.rand(CLASSES, *SIZE)], *random_maps()
        )
    assert pairs.cells.tolist() == [36] and logits.tolist() == [0]


def prefer(head, values):
    """Make logit(a, b) = values[class of a] - values[class of b]."""
    for network in head.networks:
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
        network.class_embedding.weight.data[:, 0] = torch.tensor(values)
        # which leaves its input as it is
        network.norm.running_var.fill_(1 - network.norm.eps)
        for layer in network.compare[::3]:
            layer.weight.data[0, 0] = 1.0
    return head


def test_margin_by_hand():
    head = prefer(make_ready(), [0.0, math.log(3.0), 0.0])
    candidates, _ = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(4, 4, 9, 9, SIZE)], [0, 1])
    with torch.no_grad():
        margins = head.evidence([candidates], *random_maps())[0].pair_margins
    # four shared cells, with P = 3/4 for the second
    torch.testing.assert_close(margins, torch.tensor([[0.0, -2.0], [2.0, 0.0]]))


def test_pair_loss_by_hand():
    head = prefer(make_ready((), pair_loss_weight=0.5), [0.0, math.log(3.0), 0.0])
    first = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(4, 4, 9, 9, SIZE)], [0, 1])
    second = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(3, 3, 9, 9, SIZE)], [1, 2])
    draw = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(4, 4, 9, 9, SIZE)], [2, 1])
    draw[1].ids[4, 4:6] = 1  # two cells of either
    draw[1].ids[5, 4:6] = 2
    candidates, targets = zip(first, second, draw)
    losses = head.losses(list(candidates), list(targets))
    assert set(losses) == {"loss_srm", "loss_srm_pairs"}
    # the first: 4 of the smaller one's 25 cells, with P = 3/4 for what is shown; the second: 9 of
    # 36, with P = 1/4
    weights = math.sqrt(4 / 25), math.sqrt(9 / 36)
    expected = 0.5 * (weights[0] * math.log(4 / 3) + weights[1] * math.log(4)) / sum(weights)
    assert losses["loss_srm_pairs"].item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_that_hardly_decides_anything_counts_for_less():
    """120 shared cells show 60 of the one, 59 of the other and void; each has 132."""
    head = prefer(make_ready(()), [0.0, math.log(3.0), 0.0])
    candidates, target = scene([box_mask(0, 0, 11, 12, SIZE), box_mask(1, 0, 12, 12, SIZE)], [0, 1])
    target.ids[:6, 1:11] = 1
    target.ids[11, 10] = 0
    loss = head.losses([candidates], [target])["loss_srm_pairs"]
    # the first is shown, with P = 1/4
    assert loss.item() == pytest.approx(math.sqrt(1 / 132) * math.log(4) / 0.1, rel=1e-5)


def test_the_map_learns_as_it_does_without_pairs():
    torch.manual_seed(0)
    head = make_head(loss_weight=0.3)
    candidates, target = scene(boxes(0, 4), [0, 1, 2, 1])
    losses = head.losses([candidates], [target], *random_maps())
    expected = super(PairwiseRankingHead, head).losses([candidates], [target])
    assert losses["loss_srm"] == expected["loss_srm"]
    losses["loss_srm_pairs"].backward()
    assert not head.predictor.weight.grad.any()  # S is only evidence to the pairs


@pytest.mark.parametrize("evidence, runs", [(("geometry",), False), (("score_map",), True)])
def test_the_map_is_left_out_where_nobody_looks_at_it(evidence, runs):
    torch.manual_seed(0)
    head = make_ready(evidence, loss_weight=0.0)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    candidates, target = scene(boxes(0, 4), [0, 1, 2, 1])
    losses = head.losses([candidates], [target])
    assert bool(calls) == runs and losses["loss_srm"] == 0 < losses["loss_srm_pairs"]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters())

    with torch.no_grad():
        (full,), (lean,) = head.evidence([candidates]), head.evidence([candidates], with_map=False)
    assert full.score_map is not None and (lean.score_map is not None) == runs
    assert torch.equal(full.pair_margins, lean.pair_margins)


@pytest.mark.parametrize("name", ["no instance", "one instance", "apart", "void"])
def test_without_a_pair_the_loss_is_zero_with_gradients(name):
    torch.manual_seed(0)
    apart = [box_mask(0, 0, 5, 5, SIZE), box_mask(6, 6, 9, 9, SIZE)]
    candidates, target = {
        "no instance": lambda: scene([], []),
        "one instance": lambda: scene(apart[:1], [1]),
        "apart": lambda: scene(apart, [1, 1]),
        "void": lambda: scene(boxes(0, 4), [0, 1, 2, 1]),
    }[name]()
    if name == "void":
        target = RankingTarget(
            torch.full(SIZE, VOID), torch.zeros(SIZE, dtype=torch.int64), target.segments_info
        )
    head = make_head()
    loss = head.losses([candidates], [target], *random_maps())["loss_srm_pairs"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize(
    "evidence", [(), *((x,) for x in EVIDENCE), ("features", "geometry")], ids=str
)
def test_asks_for_no_map_that_it_does_not_use(evidence):
    torch.manual_seed(0)
    head = make_head(evidence, feature_channels=CHANNELS if "features" in evidence else 0)
    semantic, features = random_maps()
    maps = (
        semantic if "semantic" in evidence else None,
        features if "features" in evidence else None,
    )
    candidates, target = scene(boxes(0, 4), [0, 1, 2, 1])
    sum(head.losses([candidates], [target], *maps).values()).backward()
    assert all(p.grad.any() for p in head.parameters())
    assert head.evidence([candidates], *maps)[0].pair_margins.any()
    assert hasattr(head.networks[0], "projection") == ("features" in evidence)


@pytest.mark.parametrize("kind", EVIDENCE)
def test_every_evidence_matters(kind):
    """Changing only what it shows changes the answer, and nothing else does."""
    torch.manual_seed(0)
    candidates, _ = scene(boxes(1, 2), [0, 1])
    shifted, _ = scene(boxes(1, 2), [0, 1], [0.3, 0.9])
    score_map, (semantic, features) = torch.rand(CLASSES, *SIZE), (x[0] for x in random_maps())
    changed = {
        "geometry": (shifted, score_map, semantic, features),
        "score_map": (candidates, score_map.flip(0), semantic, features),
        "semantic": (candidates, score_map, semantic.flip(0), features),
        "features": (candidates, score_map, semantic, features.flip(0)),
    }
    head = make_ready((kind,))
    with torch.no_grad():

        def logits(candidates, *maps):
            return head.pair_logits([candidates], *(x[None] for x in maps))[1][0]

        before = logits(candidates, score_map, semantic, features)
        for what, args in changed.items():
            assert torch.equal(logits(*args), before) == (what != kind)


def test_images_of_a_batch_do_not_mix():
    """Several images at once give what each gives alone, one without a pair among them."""
    torch.manual_seed(0)
    batch = [
        scene(boxes(1, 2), [0, 1])[0],
        scene([box_mask(2, 2, 8, 8, SIZE)], [1])[0],
        scene(boxes(1, 2), [2, 1])[0],
    ]
    head, score_maps = make_ready(), torch.rand(3, CLASSES, *SIZE)
    semantic, features = torch.rand(3, CLASSES, *SIZE), random_maps()[1].repeat(3, 1, 1, 1)
    with torch.no_grad():
        _, together = head.pair_logits(batch, score_maps, semantic, features)
        for i, logits in enumerate(together):
            part = slice(i, i + 1)
            _, (alone,) = head.pair_logits(
                batch[part], score_maps[part], semantic[part], features[part]
            )
            torch.testing.assert_close(logits, alone)
    assert [len(x) for x in together] == [1, 0, 1]


def train(head, draw, steps=50, batch=8):
    """
    Returns:
        the pair loss on fresh images, before and after.
    """

    def loss():
        scenes = [draw() for _ in range(batch)]
        candidates, targets, features = zip(*scenes)
        return head.losses(list(candidates), list(targets), None, torch.stack(features))[
            "loss_srm_pairs"
        ]

    def on_fresh_images():
        with torch.no_grad():
            return sum(loss().item() for _ in range(4)) / 4

    before = on_fresh_images()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, on_fresh_images()


def two_boxes():
    """Two boxes that meet in a corner, either of them the upper one; neither within the other."""
    x, y = torch.randint(0, 3, (2,)).tolist()
    upper, lower = box_mask(x, y, x + 6, y + 6, SIZE), box_mask(x + 3, y + 3, x + 9, y + 9, SIZE)
    return (upper, lower) if torch.rand(()) < 0.5 else (lower, upper)


def shuffled(masks, classes):
    """A scene with masks[-1] on top whose candidates come in random order."""
    candidates, target = scene(list(masks), classes)
    flip = [1, 0] if torch.rand(()) < 0.5 else [0, 1]
    candidates = make_candidates(candidates.masks[flip], [classes[i] for i in flip], [0.9, 0.9])
    return candidates, target


def by_class():
    """Class 1 is on top of class 0, wherever it lies."""
    return (*shuffled(two_boxes(), [0, 1]), torch.zeros(CHANNELS, *SIZE))


def by_place():
    """Of two of one class, the lower one is on top."""
    masks = sorted(two_boxes(), key=lambda m: m.nonzero()[0, 0].item())
    return (*shuffled(masks, [2, 2]), torch.zeros(CHANNELS, *SIZE))


def by_looks():
    """Of two of one class, the overlap looks like the one on top; each has a colour of its own."""
    below, top = masks = two_boxes()
    features = 0.1 * torch.randn(CHANNELS, *SIZE)
    colours = torch.randperm(CHANNELS)
    for mask, colour in zip(masks, colours):
        features[:, mask] = features[:, mask] * 0.5
        features[colour, mask] += 1.0
    features[colours[0], below & top] -= 1.0
    return (*shuffled(masks, [2, 2]), features)


@pytest.mark.parametrize(
    "draw, evidence",
    [(by_class, ()), (by_place, ("geometry",)), (by_looks, ("features",))],
    ids=["class", "geometry", "features"],
)
def test_learns(draw, evidence):
    torch.manual_seed(0)
    before, after = train(make_head(evidence, hidden_dim=32, feature_dim=8), draw)
    assert before > 0.5
    assert after < 0.2


@pytest.mark.parametrize(
    "draw, evidence",
    [(by_place, ()), (by_place, ("features",)), (by_looks, ()), (by_looks, ("geometry",))],
)
def test_learns_nothing_from_what_does_not_tell(draw, evidence):
    """... or the tests above would not show which evidence does."""
    torch.manual_seed(0)
    _, after = train(make_head(evidence, hidden_dim=32, feature_dim=8), draw, steps=30)
    assert after > 0.6


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_that_is_no_share_is_refused(dropout):
    with pytest.raises(ValueError, match=f"PAIRS.DROPOUT is {dropout}.*in \\[0, 1\\)"):
        make_head(dropout=dropout)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    head, maps = make_head(dropout=0.5), random_maps()
    candidates, _ = scene(boxes(1, 4), [0, 1, 2, 1])

    def margins():
        with torch.no_grad():
            return head.evidence([candidates], *maps)[0].pair_margins

    assert not torch.equal(margins(), margins())
    head.eval()
    assert torch.equal(margins(), margins())


def test_inputs_are_brought_to_one_scale_by_what_batch_norm_would_remember():
    torch.manual_seed(0)
    norm, reference = PairNorm(3), torch.nn.BatchNorm1d(3, eps=1e-3, affine=False)
    for rows in (40, 1, 0, 7, 25):
        x = 3 + 5 * torch.randn(2, rows, 3)
        found = norm(x)
        if rows:
            reference.train()(x.flatten(0, 1))
        expected = reference.eval()(x.flatten(0, 1)).view_as(x) if rows else x
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


def test_unknown_evidence_is_refused_by_name():
    with pytest.raises(ValueError, match="PAIRS.EVIDENCE.*'depth'.*geometry"):
        make_head(("geometry", "depth"))


def test_semantic_evidence_of_one_sided_logits():
    """By hand: where the branch sees class 1 in the whole overlap, 'semantic' says so."""
    head = make_head(("semantic",))
    seen = []
    head.networks[0].norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    semantic = torch.zeros(CLASSES, *SIZE)
    semantic[1] = 8.0
    candidates, _ = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(4, 4, 9, 9, SIZE)], [0, 1])
    with torch.no_grad():
        head.pair_logits([candidates], semantic=semantic[None])
    forward, backward = seen[0][:, 0, 8:]  # behind two embeddings of 4
    p = F.softmax(torch.tensor([0.0, 8.0, 0.0]), 0)
    mine, other = [p[0].item(), 0.0], [p[1].item(), 2.0]  # probability, logit / 4
    for numbers, (one, two) in ((forward, (mine, other)), (backward, (other, mine))):
        expected = [[one[i], two[i], one[i], one[i], two[i], two[i]] for i in (0, 1)]
        torch.testing.assert_close(numbers, torch.tensor(expected).flatten())


def test_several_networks_answer_with_their_mean():
    torch.manual_seed(0)
    head, maps = make_ready(num_networks=3), random_maps()
    candidates, _ = scene(boxes(1, 4), [0, 1, 2, 1])
    score_maps = torch.rand(1, CLASSES, *SIZE)
    with torch.no_grad():
        _, described = head.describe([candidates], score_maps, *maps)
        answers = torch.stack([network(described) for network in head.networks])
        _, (logits,) = head.pair_logits([candidates], score_maps, *maps)
    torch.testing.assert_close(logits, answers.mean(0))
    assert (answers.std(0) > 0).all()  # they do not start the same


def test_loss_of_several_networks_is_the_sum_of_theirs():
    """By hand: one prefers the one by log 3, one the other."""
    head = make_head((), num_networks=2).eval()
    prefer(head, [0.0, math.log(3.0), 0.0])
    head.networks[1].class_embedding.weight.data[:2, 0] = torch.tensor([math.log(3.0), 0.0])
    case = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(4, 4, 9, 9, SIZE)], [0, 1])
    loss = head.losses(*([x] for x in case))["loss_srm_pairs"]
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(4), rel=1e-5)


def test_what_is_remembered_is_learned_from_again():
    """By hand, in a step that shows no pair."""
    head = prefer(make_head((), memory_size=10, memory_batch=5).eval(), [0.0, math.log(3.0), 0.0])
    shown = scene([box_mask(0, 0, 6, 6, SIZE), box_mask(4, 4, 9, 9, SIZE)], [0, 1])
    nothing = scene([box_mask(0, 0, 6, 6, SIZE)], [0])
    loss = {}
    assert make_head(("score_map",), memory_size=10).memory.capacity == 0  # which learns along
    for remembers in (False, True):
        head.remembers = remembers
        head.losses(*([x] for x in shown))
        loss[remembers] = head.losses(*([x] for x in nothing))["loss_srm_pairs"].item()
    assert loss == {False: 0, True: pytest.approx(math.log(4 / 3), rel=1e-5)}


@pytest.mark.parametrize(
    "args, message",
    [
        ({"num_networks": 0}, "PAIRS.NUM_NETWORKS is 0; .*at least 1"),
        ({"memory_size": -1}, "PAIRS.MEMORY is -1 .*at least 0"),
        ({"memory_batch": 0}, "MEMORY_BATCH 0; .*at least 1"),
    ],
)
def test_refuses_what_has_no_meaning(args, message):
    with pytest.raises(ValueError, match=message):
        make_head(**args)
