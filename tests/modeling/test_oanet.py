import copy

import pytest
import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from oanet_d2 import OANet
from oanet_d2.modeling import RankingEvidence
from oanet_d2.modeling.oanet import evaluating
from tests.conftest import load_config, make_input, panoptic_fpn_cfg

PERSON, TIE, TABLE = 0, 1, 3
SIZE = (64, 96)

# name -> images of a batch: (boxes, classes, stuff)
EDGE_BATCHES = {
    "ordinary": [([[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], 2)],
    "no instance": [([], [], 2)],
    "no stuff": [([[0, 0, 96, 64]], [PERSON], None)],
    "nothing labelled at all": [([], [], None)],
    "one class": [([[8, 8, 40, 60]], [PERSON], 1)],
    "instances all of one class": [([[8, 8, 40, 60], [20, 8, 60, 60]], [PERSON, PERSON], 1)],
    "smaller than a cell": [([[9, 9, 10, 10]], [TIE], 1)],
    "some images without a thing": [([], [], 2), ([[8, 8, 40, 60]], [PERSON], 2)],
    "two sizes": [([[8, 8, 40, 60]], [PERSON], 2), ([[8, 8, 90, 60]], [TABLE], 3)],
}


def make_batch(name):
    images = EDGE_BATCHES[name]
    sizes = [SIZE, (96, 128)] if name == "two sizes" else [SIZE] * len(images)
    return [make_input(size, *image) for size, image in zip(sizes, images)]


@pytest.fixture
def spatial_cfg(tiny_cfg):
    """The same network with the paper's ranking module alone."""
    tiny_cfg.merge_from_list(
        ["MODEL.SRM_HEAD.NAME", "SpatialRankingHead", "MODEL.OANET.ORDER", "srm_overlap"]
    )
    return tiny_cfg


@pytest.mark.parametrize(
    "head, train_masks",
    [
        ("SpatialRankingHead", ("gt",)),
        ("PairwiseRankingHead", ("gt",)),
        ("PairwiseRankingHead", ("pred",)),
        ("PairwiseRankingHead", ("detections",)),
        ("PairwiseRankingHead", ("gt", "pred", "detections")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", EDGE_BATCHES)
def test_trains_on_edge_batches(tiny_cfg, name, head, train_masks):
    """Finite losses, and a gradient for every parameter: without one, DDP would hang."""
    tiny_cfg.MODEL.SRM_HEAD.NAME = head
    tiny_cfg.MODEL.OANET.ORDER = "srm_overlap"
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = train_masks
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    with EventStorage():
        losses = model(make_batch(name))
    assert {"loss_srm", "loss_sem_seg", "loss_mask", "loss_cls", "loss_rpn_cls"} <= set(losses)
    assert ("loss_srm_pairs" in losses) == (head == "PairwiseRankingHead")
    assert all(torch.isfinite(x) for x in losses.values()), losses
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(part.training for part in model.modules())  # "pred" puts the modes back


def test_gradients_are_not_all_zero(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    with EventStorage():
        sum(model(make_batch("ordinary")).values()).backward()
    # (not every entry of a tensor: most classes are not in the batch)
    assert not [n for n, p in model.named_parameters() if not p.grad.any()]


def test_every_step_takes_one_of_the_sources(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 0.0  # those are random

    def losses(*sources):
        tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = sources
        torch.manual_seed(0)
        model = build_model(tiny_cfg).train()
        # the training's random choices come before the ranking module, the same ones every time
        torch.manual_seed(0)
        with EventStorage(), torch.no_grad():
            return model(make_batch("ordinary"))

    gt, pred = losses("gt"), losses("pred")
    both = [losses("gt", "pred") for _ in range(8)]
    for name in ("loss_srm", "loss_srm_pairs"):
        assert gt[name] != pred[name]
        assert {x[name].item() for x in both} == {gt[name].item(), pred[name].item()}
    assert both[0]["loss_cls"] == gt["loss_cls"]


def test_ground_truth_gets_false_positives(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    tiny_cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 1.0
    model = build_model(tiny_cfg).train()
    seen = []
    model.srm_head.losses = lambda candidates, *args: seen.append(candidates) or {}
    batch = make_batch("ordinary")
    with EventStorage(), torch.no_grad():
        model(batch)
    for candidates, input in zip(seen[0], batch):
        num = len(input["instances"])
        assert num < len(candidates.classes) <= 2 * num


def test_learns_from_what_it_detects(tiny_cfg):
    """Not from the ground truth: a duplicate, a wrong class, and one that is too unsure."""
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("detections",)
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    trained = model.roi_heads.forward
    with_detections(
        model,
        [[8, 8, 40, 60], [8, 8, 40, 56], [20, 20, 28, 44], [0, 0, 96, 64]],
        [PERSON, PERSON, TABLE, TIE],
        [0.9, 0.8, 0.7, 0.3],
    )
    detected = model.roi_heads.forward
    modes = []

    def forward(images, features, proposals, targets=None):
        if targets is not None:
            return trained(images, features, proposals, targets)
        modes.append((model.roi_heads.training, torch.is_grad_enabled()))
        return detected(images, features, proposals)

    model.roi_heads.forward = forward
    seen = []
    model.srm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with EventStorage():
        losses = model(make_batch("ordinary"))
    assert modes == [(False, False)]
    (tensor,) = seen
    assert tensor.flatten(1).any(1).nonzero().flatten().tolist() == [PERSON, TABLE]
    assert losses["loss_srm_pairs"] > 0
    losses["loss_srm_pairs"].backward()
    assert model.srm_head.networks[0].compare[0].weight.grad.any()


def test_the_ranking_loss_changes_nothing_but_the_ranking(tiny_cfg):
    """What the image shows is evidence: the other branches learn from their own losses."""
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    tiny_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "score_map", "semantic", "features")
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    with EventStorage():
        losses = model(make_batch("ordinary"))
    (losses["loss_srm"] + losses["loss_srm_pairs"]).backward()
    touched = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert touched and all(n.startswith("srm_head.") for n in touched)


def test_the_score_map_is_computed_only_where_it_is_looked_at(tiny_cfg):
    """... by a rule, by the pairs or by a comparison of orders."""
    inputs = [make_input(SIZE, [], [])]

    def runs_the_map(order, evidence, orders=()):
        cfg = tiny_cfg.clone()
        cfg.MODEL.OANET.ORDER, cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = order, evidence
        cfg.TEST.ORDERS = orders
        model = with_detections(build_model(cfg).eval(), *DETECTIONS["several"])
        calls = []
        model.srm_head.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            model(inputs)
        return bool(calls)

    assert not runs_the_map("srm_pairs", ("geometry", "semantic"))
    assert not runs_the_map("score", ("geometry", "score_map"))
    assert runs_the_map("srm_pairs", ("geometry", "score_map"))
    assert runs_the_map("srm_overlap", ("geometry",))
    assert runs_the_map("srm_pairs", ("geometry",), ("srm_pairs", "srm_mean"))


def with_detections(model, boxes, classes, scores, mask_value=0.9):
    """Make the model's ROI heads return given detections, with box-filling masks."""

    def roi_heads(images, features, proposals, targets=None):
        results = []
        for size in images.image_sizes:
            instances = Instances(size)
            instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
            instances.scores = torch.tensor(scores)
            instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
            instances.pred_masks = torch.full((len(boxes), 1, 28, 28), mask_value)
            results.append(instances)
        return results, {}

    model.roi_heads.forward = roi_heads
    return model


DETECTIONS = {
    "no instance": ([], [], []),
    "one": ([[8, 8, 40, 60]], [PERSON], [0.9]),
    "one class": ([[8, 8, 40, 60], [20, 8, 60, 60]], [PERSON, PERSON], [0.9, 0.8]),
    "several": (
        [[8, 8, 40, 60], [20, 20, 28, 44], [0, 40, 96, 64]],
        [PERSON, TIE, TABLE],
        [0.9, 0.8, 0.7],
    ),
    "an empty box": ([[8, 8, 40, 60], [50, 50, 50, 50]], [PERSON, TIE], [0.9, 0.8]),
    "none confident": ([[8, 8, 40, 60]], [PERSON], [0.1]),
}


@pytest.mark.parametrize("order", ["score", "srm_mean", "srm_overlap", "srm_pairs"])
@pytest.mark.parametrize("mask_value", [0.9, 0.1], ids=["masks", "empty masks"])
@pytest.mark.parametrize("name", DETECTIONS)
def test_infers_on_edge_cases(tiny_cfg, name, mask_value, order):
    tiny_cfg.MODEL.OANET.ORDER = order
    model = with_detections(build_model(tiny_cfg).eval(), *DETECTIONS[name], mask_value)
    inputs = make_input(SIZE, [], [])
    inputs.update(height=128, width=192)  # the output is twice the input
    with torch.no_grad():
        (result,) = model([inputs])
    assert set(result) == {"sem_seg", "instances", "panoptic_seg"}
    panoptic_seg, segments_info = result["panoptic_seg"]
    assert panoptic_seg.shape == (128, 192) and panoptic_seg.dtype == torch.int32
    assert set(panoptic_seg.unique().tolist()) - {0} == {s["id"] for s in segments_info}
    expected = 0 if mask_value < 0.5 or name in ("no instance", "none confident") else 1
    assert sum(s["isthing"] for s in segments_info) >= expected
    assert not result["instances"].has("kept")


def test_srm_decides_who_lies_on_top(tiny_cfg):
    """The person is the more confident; a score map in favour of the tie brings the tie forward."""
    model = build_model(tiny_cfg).eval()
    with_detections(model, [[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], [0.99, 0.6])
    inputs = [make_input(SIZE, [], [])]

    # logit(a, b) = [a is the favoured] - [b is]
    for network in model.srm_head.networks:
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
        for layer in network.compare[::3]:
            layer.weight.data[0, 0] = 1.0

    def owner_of_the_overlap(favoured, order):
        for network in model.srm_head.networks:
            network.class_embedding.weight.data[:, 0] = 0.0
            network.class_embedding.weight.data[favoured, 0] = 1.0
        bias = torch.zeros(8)
        bias[favoured] = 5.0
        model.srm_head.predictor.weight.data.zero_()
        model.srm_head.predictor.bias.data = bias
        model.order = order
        with torch.no_grad():
            panoptic_seg, segments_info = model(inputs)[0]["panoptic_seg"]
        segment = panoptic_seg[30, 24].item()
        return next(s["category_id"] for s in segments_info if s["id"] == segment)

    for order in ("srm_mean", "srm_overlap", "srm_pairs"):
        assert owner_of_the_overlap(TIE, order) == TIE
        assert owner_of_the_overlap(PERSON, order) == PERSON
    assert owner_of_the_overlap(TIE, "score") == PERSON


def test_instances_below_the_confidence_threshold_do_not_compete(tiny_cfg):
    tiny_cfg.TEST.ORDERS = ("srm_overlap",)
    model = build_model(tiny_cfg).eval()
    with_detections(model, [[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], [0.9, 0.3])
    with torch.no_grad():
        evidence = model([make_input(SIZE, [], [])])[0]["ranking_evidence"]
    assert evidence.masks[0].any() and not evidence.masks[1].any()
    assert evidence.pair_margins.shape == (2, 2) and not evidence.pair_margins.any()


def test_evidence_follows_instances_that_post_processing_drops(tiny_cfg):
    tiny_cfg.TEST.ORDERS = ("srm_overlap",)
    model = build_model(tiny_cfg).eval()
    boxes = [[50, 50, 50, 50], [8, 8, 40, 60], [20, 20, 28, 44]]
    with_detections(model, boxes, [TABLE, PERSON, TIE], [0.9, 0.8, 0.7])
    with torch.no_grad():
        result = model([make_input(SIZE, [], [])])[0]
    evidence = result["ranking_evidence"]
    assert isinstance(evidence, RankingEvidence)
    assert evidence.classes.tolist() == result["instances"].pred_classes.tolist() == [PERSON, TIE]
    assert evidence.masks.flatten(1).sum(1).tolist() == [8 * 13, 2 * 6]
    margins = evidence.pair_margins
    assert margins.shape == (2, 2) and margins[0, 1] == -margins[1, 0] != 0


def test_relative_boxes_of_a_padded_image_are_shares_of_the_image(tiny_cfg):
    """The second image is larger, so the first is padded; its own size counts."""
    model = build_model(tiny_cfg).eval()
    with_detections(model, [[8, 8, 40, 60]], [PERSON], [0.9])
    seen = []
    evidence = model.srm_head.evidence

    def spy(candidates, *maps, **kwargs):
        seen.extend(candidates)
        assert all(m.shape[-2:] == candidates[0].masks.shape[1:] for m in maps)
        return evidence(candidates, *maps, **kwargs)

    model.srm_head.evidence = spy
    with torch.no_grad():
        model([make_input(SIZE, [], []), make_input((96, 128), [], [])])
    sizes = torch.tensor([[96.0, 64.0, 96.0, 64.0], [128.0, 96.0, 128.0, 96.0]])
    for candidates, size in zip(seen, sizes):
        expected = torch.tensor([[8.0, 8.0, 40.0, 60.0]]) / size
        torch.testing.assert_close(candidates.boxes, expected)


@pytest.mark.parametrize("stride", [2, 8])
def test_the_maps_follow_the_stride(tiny_cfg, stride):
    """p2 has 4 pixels per cell; the ranking grid may be finer or coarser."""
    tiny_cfg.MODEL.SRM_HEAD.STRIDE = stride
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    with EventStorage():
        losses = model(make_batch("ordinary"))
    assert torch.isfinite(losses["loss_srm_pairs"]) and losses["loss_srm_pairs"] > 0


@pytest.fixture
def zoo_convention(tiny_cfg):
    tiny_cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "stuff"
    tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 7
    # its semantic head knows no thing classes
    tiny_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "score_map", "features")
    return tiny_cfg


def test_panoptic_fpn_weights_load_with_only_the_srm_missing(zoo_convention):
    theirs = build_model(panoptic_fpn_cfg(zoo_convention))
    ours = build_model(zoo_convention)
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys and all(k.startswith("srm_head.") for k in result.missing_keys)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_order_by_score_equals_panoptic_fpn(threads_as_before, zoo_convention, num_threads):
    """Same weights, same convention, order = score: the same output, bit for bit."""
    torch.set_num_threads(num_threads)
    zoo_convention.MODEL.OANET.ORDER = "score"
    torch.manual_seed(0)
    theirs = build_model(panoptic_fpn_cfg(zoo_convention)).eval()
    ours = build_model(zoo_convention).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for model in (ours, theirs):
        model.combine_instances_score_thresh = 0.05  # random weights are never confident
        model.combine_stuff_area_thresh = 16
        model.roi_heads.box_predictor.test_score_thresh = 0.05
    inputs = [make_input(SIZE, [], [], seed=s) for s in range(3)]
    with torch.no_grad():
        results = list(zip(ours(copy.deepcopy(inputs)), theirs(copy.deepcopy(inputs))))
    assert any(len(a["instances"]) > 1 for a, _ in results)
    for a, b in results:
        assert set(a) == set(b)
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])
        assert a["panoptic_seg"][1] == b["panoptic_seg"][1]
        for field in ("scores", "pred_classes", "pred_masks"):
            assert torch.equal(a["instances"].get(field), b["instances"].get(field))


@pytest.mark.parametrize("outputs", [(), ("pred_masks",), ("sem_seg",)])
def test_what_nobody_asks_for_is_not_made(tiny_cfg, outputs):
    torch.manual_seed(0)
    everything = build_model(tiny_cfg).eval()
    tiny_cfg.MODEL.OANET.OUTPUTS = outputs
    model = build_model(tiny_cfg).eval()
    model.load_state_dict(everything.state_dict())
    for m in (everything, model):
        m.combine_instances_score_thresh = 0.05  # random weights are never confident
        m.combine_stuff_area_thresh = 16
        m.roi_heads.box_predictor.test_score_thresh = 0.05
    # another size than the network's, and one that does not fill its padding
    inputs = [{**make_input((SIZE[0] - 5, SIZE[1]), [], []), "height": 50, "width": 130}]
    with torch.no_grad():
        (expected,), (result,) = everything(copy.deepcopy(inputs)), model(copy.deepcopy(inputs))
    assert ("sem_seg" in result) == ("sem_seg" in outputs)
    assert result["instances"].has("pred_masks") == ("pred_masks" in outputs)
    assert expected["instances"].pred_masks.shape[1:] == expected["sem_seg"].shape[1:] == (50, 130)
    (theirs, their_info), (ours, our_info) = expected["panoptic_seg"], result["panoptic_seg"]
    assert any(s["isthing"] for s in our_info) and any(not s["isthing"] for s in our_info)
    assert [s["category_id"] for s in our_info] == [s["category_id"] for s in their_info]
    assert (ours == theirs).float().mean() > 0.999


def test_without_postprocessing_returns_what_panoptic_fpn_does(tiny_cfg):
    model = build_model(tiny_cfg).eval()
    with torch.no_grad():
        detections, sem_seg = model.inference([make_input(SIZE, [], [])], do_postprocess=False)
    assert detections[0].has("pred_masks") and sem_seg[0].shape == (7, *SIZE)


def test_checkpoint_round_trip(tiny_cfg, tmp_path):
    torch.manual_seed(1)
    saved, loaded = build_model(tiny_cfg), build_model(tiny_cfg)
    DetectionCheckpointer(saved, str(tmp_path)).save("model")
    DetectionCheckpointer(loaded).load(str(tmp_path / "model.pth"))
    before, after = saved.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and "srm_head.predictor.weight" in before
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_evaluating_puts_every_mode_back(tiny_cfg):
    model = build_model(tiny_cfg).train()
    model.roi_heads.mask_head.eval()  # as a frozen part would be
    with evaluating(model.roi_heads):
        assert not any(part.training for part in model.roi_heads.modules())
    assert model.roi_heads.training and model.roi_heads.box_head.training
    assert not model.roi_heads.mask_head.training


def test_trains_by_the_zoo_convention(zoo_convention):
    zoo_convention.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    batch = make_batch("ordinary")
    for x in batch:
        x["sem_seg"] = (x["panoptic_category"] - 7).clamp(min=0)
    with EventStorage():
        losses = build_model(zoo_convention).train()(batch)
    assert torch.isfinite(losses["loss_srm_pairs"]) and losses["loss_srm_pairs"] > 0


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.OANET.ORDER", "oracle"], ["MODEL.OANET.ORDER", "'oracle'", "srm_overlap"]),
        (["MODEL.MASK_ON", False], ["MODEL.MASK_ON", "False", "True"]),
        (
            ["MODEL.SEM_SEG_HEAD.SUPERVISION", "all"],
            ["SUPERVISION", "'all'", "things_and_stuff"],
        ),
        (
            ["MODEL.SRM_HEAD.NAME", "SpatialRankingHead"],
            ["MODEL.OANET.ORDER", "'srm_pairs'", "'PairwiseRankingHead'", "'SpatialRankingHead'"],
        ),
        (
            ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7],
            ["PAIRS.EVIDENCE", "'semantic'", "SUPERVISION", "'things_and_stuff'"],
        ),
        (
            ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry', 'depth')"],
            ["PAIRS.EVIDENCE", "'depth'", "'score_map'"],
        ),
        (["MODEL.OANET.OUTPUTS", "('masks',)"], ["OANET.OUTPUTS", "'masks'", "'pred_masks'"]),
        (
            ["MODEL.OANET.OUTPUTS", "()", "TEST.ORDERS", "('score', 'oracle')"],
            ["OANET.OUTPUTS", "TEST.ORDERS", "'sem_seg'"],
        ),
        (["MODEL.SRM_HEAD.IN_FEATURE", "p9"], ["SRM_HEAD.IN_FEATURE", "'p9'", "'p2'"]),
        (["MODEL.SRM_HEAD.TRAIN_MASKS", "('gt', 'all')"], ["TRAIN_MASKS", "'all'", "'pred'"]),
        (["MODEL.SRM_HEAD.TRAIN_MASKS", "()"], ["TRAIN_MASKS", "()", "'pred'"]),
    ],
    ids=str,
)
def test_refuses_wrong_configs_by_name(tiny_cfg, opts, words):
    tiny_cfg.merge_from_list(opts)
    with pytest.raises(ValueError) as error:
        build_model(tiny_cfg)
    assert all(word in str(error.value) for word in words)


def test_a_feature_that_no_head_looks_at_need_not_exist(spatial_cfg):
    spatial_cfg.MODEL.SRM_HEAD.IN_FEATURE = "p9"
    with EventStorage():
        losses = build_model(spatial_cfg).train()(make_batch("ordinary"))
    assert torch.isfinite(losses["loss_srm"])


def test_orders_to_compare_that_the_head_cannot_give_are_refused_before_training(spatial_cfg):
    spatial_cfg.TEST.ORDERS = ("score", "srm_pairs")
    with pytest.raises(ValueError, match="TEST.ORDERS.*'srm_pairs'.*PairwiseRankingHead"):
        build_model(spatial_cfg)


@pytest.mark.parametrize("config", ["oanet_R_50_1x.yaml", "oanet_R_101_3x.yaml"])
def test_coco_configs_train_and_infer(config):
    cfg = load_config(f"COCO-PanopticSegmentation/{config}")
    model = build_model(cfg)
    assert isinstance(model, OANet)
    assert model.sem_seg_head.predictor.out_channels == 133
    inputs = make_input((64, 64), [[8, 8, 40, 60], [20, 20, 28, 44]], [0, 27], 1, num_things=80)
    with EventStorage():
        losses = model.train()([inputs])
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    with torch.no_grad():
        (result,) = model.eval()([inputs])
    assert result["sem_seg"].shape == (54, 64, 64)
