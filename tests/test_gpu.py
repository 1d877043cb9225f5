"""
Every stage on another device gives what it gives on the CPU: on CUDA (`pytest -m gpu`), and on a
device of pretence where there is none.
"""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from oanet_d2.modeling import PairwiseRankingHead, SpatialRankingHead
from oanet_d2.modeling.false_positives import with_false_positives
from oanet_d2.modeling.grid import (
    GridInstances,
    GridTruth,
    detections_on_grid,
    ground_truth_on_grid,
    map_on_grid,
    truth_on_grid,
)
from oanet_d2.modeling.pair_head import EVIDENCE
from oanet_d2.painting import BoxedMasks, OrderInputs, combine, order_from_margins
from oanet_d2.painting.matching import match_to_segments, oracle_order, visible_margins
from oanet_d2.painting.semantic import resized_semantic_labels, semantic_labels
from tests.conftest import make_grid_instances, make_input, random_scene
from tests.pretend_device import DEVICE, PretendDevice

SIZE, NUM, CLASSES = (30, 42), 6, 3
LIMITS = {"overlap_threshold": 0.5, "stuff_area_thresh": 8, "instances_score_thresh": 0.3}


def scene(size=SIZE, seed=0):
    masks, classes, scores, ids, segments = random_scene(seed, NUM, size, num_classes=CLASSES)
    return masks, classes, scores.float(), ids, segments


def roi_predictions():
    boxes = torch.rand(NUM, 2, 2).sort(dim=1).values.flatten(1) * torch.tensor([42.0, 30.0] * 2)
    return torch.rand(NUM, 28, 28), boxes


def pasting(to):
    masks = BoxedMasks.paste(*map(to, roi_predictions()), SIZE)
    whole = masks.full()
    return whole, masks.cached().select([2, 0]).full(), BoxedMasks.from_masks(whole).full()


def fusing(to):
    masks, classes, scores, _, _ = scene()
    others = to(scores), to(classes), to(torch.randperm(NUM)), to(torch.randint(4, SIZE))
    pasted = BoxedMasks.paste(*map(to, roi_predictions()), SIZE)
    return [combine(x, *others, **LIMITS) for x in (to(masks), pasted)]


def labelling(to):
    maps = to(torch.randn(5, 8, 12))
    return [
        semantic_labels(maps, True),
        semantic_labels(maps, False),
        resized_semantic_labels(maps, 4, (29, 45), (60, 77), True),
    ]


def ordering(to):
    masks, classes, scores, _, _ = scene()
    margins = torch.randn(NUM, NUM).triu(1)
    numbers = scores, classes, masks, torch.rand(CLASSES, *SIZE), margins - margins.t()
    inputs = OrderInputs(*map(to, numbers))[to(torch.tensor([4, 1, 3, 0]))]
    rules = ("score", "srm_mean", "srm_overlap", "srm_pairs")
    by_hand = order_from_margins(inputs.pair_margins, inputs.scores)
    return [inputs.order(rule) for rule in rules], by_hand


def matching(to):
    masks, classes, scores, ids, segments = scene()
    segments[0]["iscrowd"] = 1
    classes, ids = to(classes), to(ids)
    results = []
    for x in (to(masks), BoxedMasks.from_masks(to(masks))):
        matched = match_to_segments(x, classes, ids, segments)
        order = oracle_order(x, to(scores), classes, ids, segments)
        results.append((matched, visible_margins(x, matched, ids), order))
    return results


def gridding(to):
    training_input = make_input(SIZE, [[2, 2, 30, 20], [31, 21, 32, 22]], [0, 1], stuff=2)
    instances = training_input["instances"].to(to(torch.zeros(0)).device)
    truth = truth_on_grid(training_input, 4, instances.gt_classes.device)
    on_grid = [ground_truth_on_grid(instances, 4)]
    corners = ([2, 2, 30, 2, 30, 20, 2, 20], [31, 21, 32, 21, 32, 22, 31, 22])
    instances.gt_masks = PolygonMasks([[np.array(x, dtype=float)] for x in corners])
    on_grid.append(ground_truth_on_grid(instances, 4))
    detected = Instances(SIZE)
    roi_masks, boxes = map(to, roi_predictions())
    detected.pred_boxes, detected.pred_masks = Boxes(boxes), roi_masks[:, None]
    detected.scores, detected.pred_classes = to(torch.rand(NUM)), to(torch.arange(NUM))
    on_grid.append(detections_on_grid(detected, 4, 0.3))
    maps = [map_on_grid(to(torch.randn(3, 8, 16)), 4, stride, SIZE) for stride in (2, 4, 8)]
    return truth.ids, truth.categories, [vars(x) for x in on_grid], maps


def with_mistakes(to):
    real = GridInstances(*map(to, vars(make_grid_instances(*scene()[:3])).values()))
    found = with_false_positives(real, CLASSES, 1.0)
    assert len(found.masks) == len(found.boxes) == len(found.scores) > NUM
    return found.masks[:NUM], found.classes[:NUM], found.boxes[:NUM]  # the others are random


def ranking(make_head):
    def stage(to):
        instances, truth, maps = [], [], ([], [])
        for seed, size in enumerate([SIZE, (20, 55)]):  # a batch of unequal images
            masks, classes, scores, ids, segments = scene(size, seed)
            on_grid = make_grid_instances(masks, classes, scores)
            instances.append(GridInstances(*map(to, vars(on_grid).values())))
            categories = ids.remainder(CLASSES + 1) - 1
            truth.append(GridTruth(to(categories), to(ids), segments))
            for x, channels in zip(maps, (CLASSES, 4)):
                x.append(to(torch.randn(channels, *size)))
        head = make_head().to(instances[0].masks.device)
        losses = head.losses(instances, truth, *maps)
        sum(losses.values()).backward()
        gradients = [p.grad for p in head.parameters()]
        with torch.no_grad():
            inputs = [vars(x) for x in head.eval().order_inputs(instances, *maps)]
        return {k: v.detach() for k, v in losses.items()}, gradients, inputs

    return stage


def score_map():
    return SpatialRankingHead(num_classes=CLASSES, conv_dim=4, num_blocks=1, kernel_size=5)


def pairs():
    return PairwiseRankingHead(
        num_classes=CLASSES, evidence=EVIDENCE, feature_channels=4, score_map=score_map()
    )


STAGES = {
    "paste": pasting,
    "combine": fusing,
    "labels": labelling,
    "orders": ordering,
    "matching": matching,
    "grid": gridding,
    "false positives": with_mistakes,
    "score map": ranking(score_map),
    "pairs": ranking(pairs),
}


def run(stage, device, mode=None):
    torch.manual_seed(0)
    with mode or nullcontext():
        results = stage(lambda x: x.to(device))
        tensors = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {device.type}
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), results)


def assert_same(found, expected, tolerance=1e-4):
    """
    Numbers added in another order differ by rounding; in a whole network, a few labels do too.
    """
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not isinstance(y, torch.Tensor):
            assert x == (pytest.approx(y, rel=tolerance) if isinstance(y, float) else y)
        elif y.is_floating_point():
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
        else:
            assert x.dtype == y.dtype and (x != y).sum() <= 10 * tolerance * y.numel()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def on_a_gpu(test):
    needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(needs(test))


@pytest.fixture
def single_precision(monkeypatch):
    """cuDNN would round the factors of convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def model(tiny_cfg):
    """Its losses leave nothing to chance: every anchor and every proposal counts."""
    head = tiny_cfg.MODEL.SRM_HEAD
    head.GT_FALSE_POSITIVES, head.PAIRS.EVIDENCE = 0.0, EVIDENCE
    tiny_cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = tiny_cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**5
    tiny_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05  # random weights are never sure
    tiny_cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.05
    torch.manual_seed(0)
    return build_model(tiny_cfg)


BATCH = [  # unequal images
    make_input((64, 96), [[8, 8, 40, 60], [20, 20, 28, 44]], [0, 1], 2, seed=0),
    make_input((50, 130), [[8, 8, 90, 40], [60, 20, 120, 49]], [3, 3], 1, seed=1),
]


def training(model, amp=None):
    def stage(to):
        on_device, losses = to(copy.deepcopy(model)).train(), []
        for on_device.train_masks in ("gt", "detections"):
            with EventStorage(), amp or nullcontext():
                losses += on_device(BATCH).values()
        sum(losses).backward()
        assert all(torch.isfinite(p.grad).all() for p in on_device.parameters())
        return [x.detach() for x in losses]

    return stage


def inferring(model, amp=None):
    @torch.no_grad()
    def stage(to):
        on_device = to(copy.deepcopy(model)).eval()
        with amp or nullcontext():
            results = on_device.inference(BATCH, return_fusion_inputs=True)
        inputs = [x["fusion_inputs"] for x in results]
        painted = [on_device.combine(x, x.order_inputs.order("srm_overlap")) for x in inputs]
        detected = [(x["instances"].scores, x["instances"].pred_masks.float()) for x in results]
        return painted, [(x["panoptic_seg"], x["sem_seg"]) for x in results], detected

    return stage


@pytest.mark.parametrize("stage", STAGES)
def test_stages_on_a_device_of_pretence(stage):
    assert_same(run(STAGES[stage], DEVICE, PretendDevice()), run(STAGES[stage], CPU))


@pytest.mark.parametrize("stage", [training, inferring])
def test_the_whole_model_on_a_device_of_pretence(model, stage):
    assert_same(run(stage(model), DEVICE, PretendDevice()), run(stage(model), CPU))


@on_a_gpu
@pytest.mark.parametrize("stage", STAGES)
def test_stages_on_cuda(single_precision, stage):
    assert_same(run(STAGES[stage], CUDA), run(STAGES[stage], CPU))


@on_a_gpu
@pytest.mark.parametrize("stage", [training, inferring])
def test_the_whole_model_on_cuda(single_precision, model, stage):
    assert_same(run(stage(model), CUDA), run(stage(model), CPU), tolerance=1e-3)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", [training, inferring])
def test_the_whole_model_in_half_precision_on_cuda(model, stage, dtype):
    found = run(stage(model, torch.autocast("cuda", dtype)), CUDA)
    tensors = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
    assert tensors and all(torch.isfinite(x).all() for x in tensors)


def test_the_device_of_pretence_refuses_what_a_device_does():
    """Otherwise the tests above would prove nothing."""
    with PretendDevice():
        x = torch.ones(2, device=DEVICE)
        for wrong in (
            lambda: x + torch.ones(2),
            lambda: torch.stack([x, torch.ones(2)]),
            lambda: torch.ones(2)[x.long()],
            lambda: x.numpy(),
            lambda: x.double(),
            lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert (x + torch.tensor(1.0)).tolist() == (x.cpu() + torch.ones(2)).tolist() == [2, 2]
