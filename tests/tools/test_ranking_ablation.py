import importlib.util
import os
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from detectron2.layers import ShapeSpec

from oanet_d2.modeling import RANKING_RULE_REGISTRY, RankingEvidence, SpatialRankingHead
from oanet_d2.modeling.candidates import RankingTarget
from tests.conftest import REPOSITORY, box_mask, make_candidates, random_scene

SIZE = (8, 16)  # shares of 16 columns are exact
CLASSES, CHANNELS, STRIDE = 3, 5, 4


@pytest.fixture(scope="module")
def ablation():
    """The tool; the rules that it registers are gone afterwards."""
    before = dict(RANKING_RULE_REGISTRY)
    script = REPOSITORY / "tools" / "ranking_ablation.py"
    spec = importlib.util.spec_from_file_location("ranking_ablation", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(dict(RANKING_RULE_REGISTRY)) - set(before):
        del RANKING_RULE_REGISTRY._obj_map[name]


def test_code_in_a_cache_does_not_run(ablation, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save(([Evil()], []), tmp_path / "cache.pt")
    with pytest.raises(ValueError, match="cache.pt is not what this tool has written.*mkdir"):
        ablation.cached_predictions(None, None, tmp_path / "cache.pt")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def model():
    """As much of an OANet as the rows look at."""
    return SimpleNamespace(
        srm_head=SimpleNamespace(num_classes=CLASSES, stride=STRIDE),
        sem_seg_head=SimpleNamespace(num_things=CLASSES),
        backbone=SimpleNamespace(output_shape=lambda: {"p2": ShapeSpec(channels=CHANNELS)}),
        srm_in_feature="p2",
    )


def scene(seed, n=5):
    """
    Returns:
        candidates, target (with stuff and void), thing logits, features.
    """
    masks, classes, scores, ids, segments = random_scene(seed, n, SIZE, num_classes=CLASSES)
    class_of = {s["id"]: s["category_id"] for s in segments} | {0: CLASSES + 1}
    categories = ids.clone().apply_(lambda i: class_of[i])
    categories[0] = 255
    torch.manual_seed(seed)
    maps = torch.randn(CLASSES, *SIZE), torch.randn(CHANNELS, *SIZE)
    return make_candidates(masks, classes, scores), RankingTarget(categories, ids, segments), *maps


def batch(*seeds):
    candidates, targets, semantic, features = zip(*map(scene, seeds))
    return list(candidates), list(targets), torch.stack(semantic), torch.stack(features)


# ------------------------------------------------------------------------------ heads to compare

SHAPE = {"num_classes": CLASSES, "conv_dim": 4, "num_blocks": 1, "kernel_size": 3, "stride": 1}


def test_weighted_map_with_weight_1_is_the_plain_map(ablation):
    torch.manual_seed(0)
    head, plain = ablation.WeightedMap(1.0, **SHAPE), SpatialRankingHead(**SHAPE)
    plain.load_state_dict(head.state_dict())
    images = batch(0, 1)
    expected = plain.losses(*images)
    torch.testing.assert_close(head.losses(*images), expected)
    head.uncontested = 0.25
    assert not torch.isclose(head.losses(*images)["loss_srm"], expected["loss_srm"])


def test_weighted_map_by_hand(ablation):
    """8 cells show class 0, the rest void; in 4 of them an instance of class 1 lies too."""
    head = ablation.WeightedMap(0.25, **{**SHAPE, "num_blocks": 0})
    with torch.no_grad():
        head.predictor.weight.zero_()
        head.predictor.weight[1, 1] = 2.0  # logit 2 of class 1 where an instance of it lies
    masks = torch.stack([box_mask(0, 0, 8, 1, SIZE), box_mask(4, 0, 12, 1, SIZE)])
    categories = torch.full(SIZE, 255)
    categories[0, :8] = 0
    target = RankingTarget(categories, torch.zeros(SIZE, dtype=torch.int64), [])
    loss = head.losses([make_candidates(masks, [0, 1])], [target])["loss_srm"]
    plain, contested = torch.tensor([3.0, 2 + torch.e**2]).log()
    torch.testing.assert_close(loss, (4 * 0.25 * plain + 4 * contested) / (4 * 0.25 + 4))
    # ... and without a cell that counts the loss is 0
    categories[:] = 255
    assert head.losses([make_candidates(masks, [0, 1])], [target])["loss_srm"] == 0


@pytest.mark.parametrize("channels", [0, CHANNELS])
def test_informed_map_that_looks_at_masks_only_is_the_plain_map(ablation, channels):
    torch.manual_seed(0)
    head = ablation.InformedMap(CLASSES, channels, **SHAPE)
    plain = SpatialRankingHead(**SHAPE)
    plain.load_state_dict(head.state_dict(), strict=False)
    with torch.no_grad():
        head.mix.weight.zero_()
        head.mix.weight[range(CLASSES), range(CLASSES)] = 1.0
        head.mix.bias.zero_()
    candidates, targets, semantic, features = batch(0, 1)
    nothing = torch.zeros_like(semantic)
    expected = plain.losses(candidates, targets)
    torch.testing.assert_close(head.losses(candidates, targets, nothing, features), expected)
    with torch.no_grad():
        ours = head.evidence(candidates, nothing, features)
        for x, y in zip(ours, plain.evidence(candidates), strict=True):
            torch.testing.assert_close(x.score_map, y.score_map)
    # what the image shows counts where it is not nothing
    informed = head.losses(candidates, targets, semantic, features)["loss_srm"]
    assert not torch.isclose(informed, expected["loss_srm"])


# ------------------------------------------------------------------------------------- flipping


def assert_same_candidates(ours, theirs):
    for field in fields(ours):
        torch.testing.assert_close(getattr(ours, field.name), getattr(theirs, field.name))


def test_flip_by_hand(ablation):
    """The boxes stay the masks' extents."""
    candidates = scene(0)[0]
    flipped = ablation._flip(candidates)
    expected = make_candidates(candidates.masks.flip(2), candidates.classes, candidates.scores)
    assert_same_candidates(flipped, expected)
    assert not torch.equal(flipped.boxes, candidates.boxes)


def test_flipped_twice_is_the_same(ablation):
    candidates, target, semantic, features = scene(1)
    sources = {"gt": candidates, "pred": scene(2)[0]}
    image = ablation.TrainImage(sources, target, semantic.half(), features.half())
    once = image.flipped()
    twice = once.flipped()
    assert set(once.sources) == set(sources)
    for name, source in sources.items():
        assert torch.equal(once.sources[name].masks, source.masks.flip(2))
        assert_same_candidates(twice.sources[name], source)
    for name in ("categories", "ids"):
        given = getattr(target, name)
        assert torch.equal(getattr(once.target, name), given.flip(1))
        assert torch.equal(getattr(twice.target, name), given)
    assert once.target.segments_info == target.segments_info
    for name in ("semantic", "features"):
        assert torch.equal(getattr(once, name), getattr(image, name).flip(2))
        assert torch.equal(getattr(twice, name), getattr(image, name))


# ---------------------------------------------------------------------------------------- orders


def order(rule, margins, scores):
    """margins: {(a, b): by how much a goes before b}."""
    n = len(scores)
    matrix = torch.zeros(n, n)
    for (a, b), margin in margins.items():
        matrix[a, b], matrix[b, a] = margin, -margin
    masks, classes = torch.ones(n, 2, 2, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    evidence = RankingEvidence(torch.tensor(scores), classes, masks, pair_margins=matrix)
    return evidence.order(rule).tolist()


@pytest.mark.parametrize(
    "margins, scores, by_wins, by_sum",
    [
        # 2 wins once by much; 0 wins twice by little
        ({(0, 1): 1, (0, 3): 1, (2, 1): 9}, [0.5, 0.6, 0.7, 0.8], [0, 2, 3, 1], [2, 0, 3, 1]),
        # a chain against the scores: wins less losses 1, 0, -1
        ({(0, 1): 3, (1, 2): 2}, [0.1, 0.2, 0.3], [0, 1, 2], [0, 1, 2]),
        # a cycle: no difference in wins, so by score; sums -3, 1 and 2
        ({(0, 1): 1, (1, 2): 2, (2, 0): 4}, [0.3, 0.2, 0.1], [0, 1, 2], [2, 1, 0]),
        # nothing is compared
        ({}, [0.2, 0.9, 0.5], [1, 2, 0], [1, 2, 0]),
        ({}, [], [], []),
    ],
)
def test_copeland_and_borda_by_hand(ablation, margins, scores, by_wins, by_sum):
    assert order("pairs_by_wins", margins, scores) == by_wins
    assert order("pairs_by_sum", margins, scores) == by_sum


# ------------------------------------------------------------------------------------- the rows


def random_margins(n, seed):
    margins = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return margins - margins.t()


@pytest.fixture
def val_image(ablation):
    class WithoutFiles(ablation.ValImage):
        def oracle(self):
            matched = torch.tensor([3, -1, 1, -1, 2])
            return random_margins(5, 1), matched

    candidates, _, semantic, features = scene(3)
    score_map = torch.rand(CLASSES, *SIZE)
    own = RankingEvidence(
        candidates.scores, candidates.classes, candidates.masks, score_map, random_margins(5, 2)
    )
    maps = semantic.half(), features.half()
    return WithoutFiles({}, {"ranking_evidence": own}, candidates, *maps)


def test_tables_hold_all_their_rows(ablation, model):
    """Of rows with one name only the last would be left."""
    tables = ablation.rows(model, [], seed=0)
    made_in_loops = {"masks": 6 + 3, "kernel": 1 + 6, "loss": 3}
    assert {table: len(tables[table]) for table in made_in_loops} == made_in_loops
    assert {"score", "srm_mean", "srm_overlap", "srm_pairs", "oracle"} <= set(tables["rules"])
    assert "pairs" not in tables  # taken by the report of pairs


def test_every_row_gives_an_order(ablation, model, val_image, monkeypatch):
    """With heads that are not trained: each can rank what its row hands it."""
    trained = []

    def fit(head, train, sources, seed):
        assert seed == 5 and set(sources) <= {*ablation.SOURCES, ablation.FALSE_POSITIVES}
        trained.append(head)
        return head.eval()

    monkeypatch.setattr(ablation, "fit", fit)
    tables = ablation.rows(model, [], seed=5)
    assert not trained  # only for the rows that are asked for
    with torch.no_grad():
        for table, rows in tables.items():
            for name, make in rows.items():
                rule, evidence = make()
                result = evidence(val_image).order(rule)
                assert sorted(result.tolist()) == [0, 1, 2, 3, 4], (table, name)
    own = {"rules", "gap", "order"}  # rank by what the network said, or the oracle
    assert len(trained) == sum(len(rows) for table, rows in tables.items() if table not in own)


def test_every_head_trains_on_what_is_cached(ablation, model, monkeypatch):
    """The real `fit`, two steps of it, once for every kind of head."""
    monkeypatch.setattr(ablation, "ITERATIONS", 2)
    monkeypatch.setattr(ablation, "BATCH", 2)
    train = []
    for seed in range(3):
        candidates, target, semantic, features = scene(seed)
        sources = dict.fromkeys(ablation.SOURCES, candidates)
        train.append(ablation.TrainImage(sources, target, semantic.half(), features.half()))
    informed = partial(ablation.InformedMap, CLASSES, CHANNELS)
    torch.manual_seed(0)
    for head in (
        ablation.pair_head(model),
        ablation.pair_head(model, ("geometry", "score_map")),
        ablation.map_head(model, kernel_size=3),
        ablation.map_head(model, kernel_size=3, head=partial(ablation.WeightedMap, 0)),
        ablation.map_head(model, kernel_size=3, head=informed),
    ):
        before = {k: v.clone() for k, v in head.state_dict().items()}
        fitted = ablation.fit(head, train, ("pred", "detections"), seed=0)
        assert not fitted.training
        assert any(not torch.equal(v, before[k]) for k, v in fitted.state_dict().items())


def test_gap_rows_take_the_oracle_where_they_say(ablation, model, val_image):
    oracle, matched = val_image.oracle()
    classes, own = val_image.candidates.classes.tolist(), val_image.evidence.pair_margins
    assert len(set(classes)) > 1
    rows = ablation.rows(model, [], seed=0)["gap"]
    decided = torch.zeros(5, 5)
    for name, asked in {
        "pairs of one class": lambda a, b, known: known and classes[a] == classes[b],
        "pairs of different classes": lambda a, b, known: known and classes[a] != classes[b],
        "pairs with a false positive": lambda a, b, known: not known,
    }.items():
        rule, evidence = rows[name]()
        assert rule == "srm_pairs"
        margins = evidence(val_image).pair_margins
        for a in range(5):
            for b in range(5):
                known = matched[a] >= 0 and matched[b] >= 0
                is_asked = asked(a, b, known)
                expected = oracle[a, b] if is_asked else own[a, b] * STRIDE**2
                assert margins[a, b] == expected, (name, a, b)
                decided[a, b] += bool(is_asked)
    assert (decided == 1).all()  # every pair is in one of the three
