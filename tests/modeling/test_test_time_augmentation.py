import copy

import numpy as np
import pytest
import torch

from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model

from oanet_d2.modeling.test_time_augmentation import OANetWithTTA, mean_order_inputs
from oanet_d2.painting.ranking import OrderInputs
from tests.conftest import make_input
from tests.modeling.test_oanet import assert_same_panoptic, infer, unsure_model

RULES = "score", "smaller_first", "lower_first", "srm_mean", "srm_overlap", "srm_pairs"


def augmented(cfg, min_sizes, flip):
    """An OANet and the same with test-time augmentation."""
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = min_sizes, flip
    model = unsure_model(cfg)
    return model, OANetWithTTA(cfg, model)


def resized(x, min_size):
    """The input of :class:`OANet` that Detectron2's test mapper makes of an image."""
    image = x["image"].permute(1, 2, 0).numpy()
    image = ResizeShortestEdge(min_size, 4000).get_transform(image).apply_image(image)
    return {**x, "image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


def mirrored(x):
    return {**x, "image": x["image"].flip(2)}


def instance_tensors(instances):
    fields = instances.get_fields()
    return {"pred_boxes": fields.pop("pred_boxes").tensor, **fields}


def assert_same_result(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    ours, theirs = (instance_tensors(x["instances"]) for x in (a, b))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert_same_panoptic(a, b)
    if "sem_seg" in a:
        assert torch.equal(a["sem_seg"], b["sem_seg"])
    if "fusion_inputs" in a:
        one, other = (x["fusion_inputs"].order_inputs for x in (a, b))
        for name, tensor in vars(one).items():
            assert tensor is getattr(other, name) is None or torch.equal(tensor, getattr(other, name))


@pytest.mark.parametrize(
    "order, most", [("score", 40), ("srm_pairs", 40), ("srm_pairs", 1), ("srm_pairs", 0)]
)
def test_without_a_real_augmentation_it_is_the_model(tiny_cfg, order, most):
    """Bit for bit: nothing is rounded when boxes move by a factor of 1 and one image is averaged."""
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = most
    model, with_tta = augmented(tiny_cfg, (64,), False)
    model.order = order
    batch = [make_input(size, [], [], seed=i) for i, size in enumerate([(64, 96), (90, 64)])]
    for options in ({}, {"return_fusion_inputs": True}):
        found = with_tta.inference(batch, **options)
        for x, result in zip(batch, found):
            (expected,) = infer(model, [x], **options)
            assert len(expected["instances"]) == most
            assert_same_result(result, expected)
    assert [x.keys() for x in with_tta(batch)] == [x.keys() for x in infer(model, batch)]


def test_without_large_outputs_it_is_the_model(tiny_cfg):
    """With the paper's head. Only what is painted gets a mask, and labels differ by rounding alone."""
    tiny_cfg.MODEL.SRM_HEAD.NAME, tiny_cfg.MODEL.OANET.ORDER = "SpatialRankingHead", "srm_mean"
    tiny_cfg.MODEL.OANET.OUTPUTS = ()
    model, with_tta = augmented(tiny_cfg, (64,), False)
    batch = [make_input((64, 96), [], [])]
    model.combine_instances_score_thresh = infer(model, batch)[0]["instances"].scores.median().item()
    (expected,), (result,) = infer(model, batch, return_fusion_inputs=True), with_tta.inference(batch, True)
    assert set(result) == {"instances", "panoptic_seg", "fusion_inputs"}
    ours, theirs = result["fusion_inputs"], expected["fusion_inputs"]
    assert (ours.semantic == theirs.semantic).float().mean() > 0.999
    assert 0 < theirs.order_inputs.masks.flatten(1).any(1).sum() < len(theirs.instances)
    same_labels = ours._replace(semantic=theirs.semantic)
    result["panoptic_seg"] = model.combine(same_labels, ours.order_inputs.order("srm_mean"))
    assert_same_result(result, expected)


def test_instances_equal_detectron2s(tiny_cfg):
    tiny_cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = False
    model, with_tta = augmented(tiny_cfg, (56, 72), True)
    plain_cfg = tiny_cfg.clone()
    plain_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    plain = build_model(plain_cfg).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.roi_heads.box_predictor.test_score_thresh = 0.05
    model.combine_instances_score_thresh = 0.9  # what is not painted has a mask too
    theirs = GeneralizedRCNNWithTTA(plain_cfg, plain, batch_size=1)
    batch = [make_input(size, [], [], seed=i) for i, size in enumerate([(64, 96), (50, 70)])]
    with torch.no_grad():
        expected = theirs(copy.deepcopy(batch))
    for x, y in zip(with_tta(batch), expected):
        ours, theirs = instance_tensors(x["instances"]), instance_tensors(y["instances"])
        assert ours.keys() == theirs.keys() and (ours["scores"] < 0.9).any()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


def test_semantic_scores_are_the_mean(tiny_cfg):
    model, with_tta = augmented(tiny_cfg, (56, 72), True)
    x = make_input((50, 70), [], [])
    views = [resized(x, 56), mirrored(resized(x, 56)), resized(x, 72), mirrored(resized(x, 72))]
    a, b, c, d = (infer(model, [view])[0]["sem_seg"].numpy() for view in views)
    expected = (a + b[:, :, ::-1] + c + d[:, :, ::-1]) / 4
    (result,) = with_tta.inference([x], return_fusion_inputs=True)
    np.testing.assert_allclose(result["sem_seg"].numpy(), expected, atol=1e-5)
    labels = result["fusion_inputs"].semantic.numpy()
    assert (labels == expected.argmax(0)).mean() > 0.999
    assert (labels != a.argmax(0)).any()


@pytest.mark.parametrize("size", [(64, 96), (80, 64)])
def test_a_mirrored_image_gives_the_mirrored_result(tiny_cfg, size):
    """Up to rounding. Sides are multiples of the stride, so that the grid is mirrored too."""
    model, with_tta = augmented(tiny_cfg, (64,), True)
    x = make_input(size, [], [])
    one, other = (with_tta.inference([view], True)[0] for view in (x, mirrored(x)))
    a, b = (instance_tensors(result["instances"]) for result in (one, other))
    assert len(a["scores"]) > 5
    torch.testing.assert_close(a["scores"], b["scores"])
    boxes = b["pred_boxes"].clone()
    boxes[:, [0, 2]] = size[1] - b["pred_boxes"][:, [2, 0]]
    torch.testing.assert_close(a["pred_boxes"], boxes, atol=1e-3, rtol=0)
    assert (a["pred_masks"] != b["pred_masks"].flip(2)).float().mean() < 1e-3
    torch.testing.assert_close(one["sem_seg"], other["sem_seg"].flip(2), atol=1e-4, rtol=1e-4)
    ranked, ranked_mirrored = (result["fusion_inputs"].order_inputs for result in (one, other))
    torch.testing.assert_close(ranked.score_map, ranked_mirrored.score_map.flip(2), atol=1e-4, rtol=0)
    # A mask may gain or lose a cell where its probability is just one half.
    a, b = (x.pair_margins for x in (ranked, ranked_mirrored))
    assert (a != 0).sum() > 20 and ((a - b).abs() > 1e-3).sum() <= 4
    assert (one["panoptic_seg"][0] != other["panoptic_seg"][0].flip(1)).float().mean() < 0.01


def test_every_rule_orders_instances_of_several_scales(tiny_cfg):
    model, with_tta = augmented(tiny_cfg, (56, 72), True)
    (result,) = with_tta.inference([make_input((50, 70), [], [])], return_fusion_inputs=True)
    inputs = result["fusion_inputs"]
    number = len(inputs.instances)
    assert inputs.order_inputs.masks.shape == (number, 18, 26)  # 72 x 101 pixels, in cells of 4
    assert inputs.order_inputs.masks.flatten(1).any(1).sum() > 5
    for rule in RULES:
        order = inputs.order_inputs.order(rule)
        assert sorted(order.tolist()) == list(range(number))
        painted, segments = model.combine(inputs, order)
        assert painted.shape == (50, 70) and any(x["isthing"] for x in segments)
    own = model.combine(inputs, inputs.order_inputs.order(model.order))
    assert_same_panoptic({"panoptic_seg": own}, result)


def test_mean_of_order_inputs():
    """Two grids, the finer one mirrored: worked out by hand."""
    scores, classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    coarse = torch.tensor([[[1, 0]], [[1, 1]]]).bool()
    fine = torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]]).bool()
    margins = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    one = OrderInputs(scores, classes, coarse, torch.tensor([[[0.0, 1.0]]]), margins)
    steps = torch.tensor([[[0.0, 0.2, 0.4, 0.6], [0.0, 0.2, 0.4, 0.6]]])
    other = OrderInputs(scores, classes, fine, steps, -margins)
    mean = mean_order_inputs([one, other], [False, True])
    assert torch.equal(mean.masks, fine.flip(2)) and mean.scores is scores and mean.classes is classes
    # The coarse map between its cells: 0, 1/4, 3/4, 1.
    row = torch.tensor([0.0 + 0.6, 0.25 + 0.4, 0.75 + 0.2, 1.0 + 0.0]) / 2
    torch.testing.assert_close(mean.score_map, torch.stack([row, row])[None])
    # Half a cell of 2 is 2 cells of 8.
    torch.testing.assert_close(mean.pair_margins, (4 * margins - margins) / 2)
    alone = mean_order_inputs([one, one], [False, False])
    assert torch.equal(alone.pair_margins, margins) and torch.equal(alone.score_map, one.score_map)
    nothing = OrderInputs(scores, classes, torch.zeros(2, 0, 0).bool())
    assert mean_order_inputs([nothing, nothing], [False, True]).score_map is None
