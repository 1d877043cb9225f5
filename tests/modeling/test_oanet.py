import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from tests.conftest import make_input, panoptic_fpn_cfg

PERSON, TIE, TABLE = 0, 1, 3
SIZE = (64, 96)
STUFF = ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7]

# name -> images of a batch: (boxes, classes, stuff)
EDGE_BATCHES = {
    "ordinary": [([[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], 2)],
    "no instance": [([], [], 2)],
    "no stuff": [([[0, 0, 96, 64]], [PERSON], None)],
    "nothing labelled": [([], [], None)],
    "smaller than a cell": [([[9, 9, 10, 10]], [TIE], 1)],
    "images without a thing": [([], [], 2), ([[8, 8, 40, 60]], [PERSON], 2)],
    "two sizes": [([[8, 8, 40, 60]], [PERSON], 2), ([[8, 8, 90, 60]], [TABLE], 3)],
}


def make_batch(name="ordinary"):
    sizes = [SIZE, (90, 125) if name == "two sizes" else SIZE]
    return [make_input(size, *image) for size, image in zip(sizes, EDGE_BATCHES[name])]


def unequal_batch():
    sizes = [(64, 96), (50, 70), (100, 130)]
    return [make_input(size, [], [], seed=i) for i, size in enumerate(sizes)]


def train_step(model, batch):
    """The losses, after their gradients were computed."""
    with EventStorage():
        losses = model.train()(batch)
    if losses:
        sum(losses.values()).backward()
    return losses


def seeded_model(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def unsure_model(cfg):
    """A model that shows what random weights detect: they are never confident."""
    model = seeded_model(cfg).eval()
    model.combine_instances_score_thresh = 0.05
    model.combine_stuff_area_thresh = 16
    model.roi_heads.box_predictor.test_score_thresh = 0.05
    return model


def with_detections(model, boxes, classes, scores, mask_value=0.9):
    """Make the model detect these instances, with box-filling masks, in every image."""
    trained = model.roi_heads.forward

    def forward(images, features, proposals, targets=None):
        if targets is not None:
            return trained(images, features, proposals, targets)
        assert not model.roi_heads.training and not torch.is_grad_enabled()
        results = []
        for size in images.image_sizes:
            instances = Instances(size)
            instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
            instances.scores = torch.tensor(scores)
            instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
            instances.pred_masks = torch.full((len(boxes), 1, 28, 28), mask_value)
            results.append(instances)
        return results, {}

    model.roi_heads.forward = forward
    return model


def infer(model, inputs, **kwargs):
    with torch.no_grad():
        return model.eval().inference(copy.deepcopy(inputs), **kwargs)


def assert_same_panoptic(a, b):
    assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])
    assert a["panoptic_seg"][1] == b["panoptic_seg"][1]


@pytest.mark.parametrize("train_masks", ["gt", "detections"])
@pytest.mark.parametrize("head", ["SpatialRankingHead", "PairwiseRankingHead"])
@pytest.mark.parametrize("name", EDGE_BATCHES)
def test_trains_on_edge_batches(tiny_cfg, name, head, train_masks):
    """Finite losses, and a gradient for every parameter: without one, DDP would hang."""
    tiny_cfg.MODEL.SRM_HEAD.NAME = head
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = train_masks
    tiny_cfg.MODEL.OANET.ORDER = "srm_overlap"
    model = seeded_model(tiny_cfg)
    losses = train_step(model, make_batch(name))
    assert {"loss_srm", "loss_sem_seg", "loss_mask", "loss_cls", "loss_rpn_cls"} <= set(losses)
    assert ("loss_srm_pairs" in losses) == (head == "PairwiseRankingHead")
    assert all(torch.isfinite(x) for x in losses.values()), losses
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, x in gradients.items() if x is None or not torch.isfinite(x).all()] == []
    if name == "ordinary":
        assert [n for n, x in gradients.items() if not x.any() and train_masks == "gt"] == []
    assert all(part.training for part in model.modules())  # detecting puts the modes back


def test_learns_from_what_it_detects(tiny_cfg):
    """Not from the ground truth: a duplicate, a wrong class, and one that is too unsure."""
    boxes = [[8, 8, 40, 60], [8, 8, 40, 56], [20, 20, 28, 44], [0, 0, 96, 64]]
    model = seeded_model(tiny_cfg).train()
    with_detections(model, boxes, [PERSON, PERSON, TABLE, TIE], [0.9, 0.8, 0.7, 0.3])
    seen = []
    model.srm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with EventStorage():
        losses = model(make_batch())
    assert seen[0].classes.tolist() == [PERSON, PERSON, TABLE, TIE]
    assert seen[0].masks.flatten(1).any(1).tolist() == [True, True, True, False]
    losses["loss_srm_pairs"].backward()
    assert losses["loss_srm_pairs"] > 0 and model.srm_head.network.compare[0].weight.grad.any()
    assert all(part.training for part in model.modules())  # detecting puts the modes back


def test_the_ranking_loss_changes_nothing_but_the_ranking(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "score_map", "semantic", "features")
    model = seeded_model(tiny_cfg).train()
    with EventStorage():
        losses = model(make_batch())
    (losses["loss_srm"] + losses["loss_srm_pairs"]).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(n.startswith("srm_head.") for n in touched)


def test_phase_network_leaves_the_ranking_head_alone(tiny_cfg):
    tiny_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    model = seeded_model(tiny_cfg)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith("backbone.bottom_up.") for n in frozen)
    model.set_phase("network")
    losses = train_step(model, make_batch("two sizes"))
    assert "loss_mask" in losses and not [x for x in losses if "srm" in x]
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == frozen | {n for n, _ in model.named_parameters() if n.startswith("srm_head.")}
    model.set_phase("all")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("train_masks", ["gt", "detections"])
def test_phase_ranking_leaves_the_network_alone(tiny_cfg, train_masks):
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = train_masks
    tiny_cfg.MODEL.OANET.TRAIN_SRM_ONLY = True
    model = seeded_model(tiny_cfg)
    assert model.phase == "ranking"
    before = copy.deepcopy(model.state_dict())
    losses = train_step(model, make_batch("two sizes"))
    assert set(losses) == {"loss_srm", "loss_srm_pairs"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("srm_head."), name
    for name, part in model.named_modules():
        assert not name or part.training == name.startswith("srm_head"), name
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert all(n.startswith("srm_head.") for n in changed)  # no running statistic of a BatchNorm


def test_autocast(tiny_cfg):
    """The ranking stays in single precision."""
    model, ranked, others = unsure_model(tiny_cfg), [], []
    for name, part in model.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            seen = ranked if name.startswith("srm_head.") else others
            part.register_forward_hook(lambda *x, seen=seen: seen.append(x[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, make_batch("two sizes"))
        assert any(len(x["instances"]) > 1 for x in infer(model, unequal_batch()))
    assert all(torch.isfinite(x) for x in losses.values())
    assert set(ranked) == {torch.float32} and torch.bfloat16 in others


DETECTIONS = {
    "no instance": ([], [], []),
    "one class": ([[8, 8, 40, 60], [20, 8, 60, 60]], [PERSON, PERSON], [0.9, 0.8]),
    "empty box": ([[50, 50, 50, 50], [8, 8, 40, 60], [20, 20, 28, 44]], [3, 0, 1], [0.9, 0.8, 0.7]),
    "none confident": ([[8, 8, 40, 60]], [PERSON], [0.1]),
}


@pytest.mark.parametrize("name", DETECTIONS)
def test_infers_on_edge_cases(tiny_cfg, name):
    model = seeded_model(tiny_cfg)
    for mask_value in (0.9, 0.1):
        with_detections(model, *DETECTIONS[name], mask_value)
        for model.order in ("score", "srm_mean", "srm_overlap", "srm_pairs"):
            # The output is twice as large as the input.
            inputs = {**make_input(SIZE, [], []), "height": 128, "width": 192}
            (result,) = infer(model, [inputs])
            assert set(result) == {"sem_seg", "instances", "panoptic_seg"}
            panoptic_seg, segments_info = result["panoptic_seg"]
            assert panoptic_seg.shape == (128, 192) and panoptic_seg.dtype == torch.int32
            assert set(panoptic_seg.unique().tolist()) - {0} == {s["id"] for s in segments_info}
            shown = mask_value > 0.5 and name not in ("no instance", "none confident")
            assert any(s["isthing"] for s in segments_info) == shown


def test_the_ranking_decides_who_lies_on_top(tiny_cfg):
    """The person is the more confident; a ranking in favour of the tie brings the tie forward."""
    model = seeded_model(tiny_cfg)
    with_detections(model, [[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], [0.99, 0.6])
    head = model.srm_head
    for parameter in [*head.network.parameters(), *head.score_map.predictor.parameters()]:
        nn.init.zeros_(parameter)
    for layer in head.network.compare[::2]:  # logit(a, b) = [a is favoured] - [b is]
        layer.weight.data[0, 0] = 1.0

    def class_on_top(favoured, order):
        bias = 5.0 * (torch.arange(8) == favoured)
        head.network.class_embedding.weight.data[:, 0] = bias
        head.score_map.predictor.bias.data = bias
        model.order = order
        panoptic_seg, segments_info = infer(model, [make_input(SIZE, [], [])])[0]["panoptic_seg"]
        return segments_info[panoptic_seg[30, 24] - 1]["category_id"]

    for order in ("srm_mean", "srm_overlap", "srm_pairs"):
        assert class_on_top(TIE, order) == TIE
        assert class_on_top(PERSON, order) == PERSON
    assert class_on_top(TIE, "score") == PERSON


def test_order_inputs_belong_to_the_instances(tiny_cfg):
    """Post-processing drops an empty box; an instance below the threshold does not compete."""
    model = seeded_model(tiny_cfg)
    boxes, classes, scores = DETECTIONS["empty box"]
    with_detections(model, [*boxes, [0, 0, 96, 64]], [*classes, 2], [*scores, 0.3])
    (result,) = infer(model, [make_input(SIZE, [], [])], return_fusion_inputs=True)
    inputs = result["fusion_inputs"].order_inputs
    assert inputs.classes.tolist() == result["instances"].pred_classes.tolist() == [PERSON, TIE, 2]
    assert inputs.masks.flatten(1).sum(1).tolist() == [8 * 13, 2 * 6, 0]
    margins = inputs.pair_margins
    assert margins.shape == (3, 3) and torch.equal(margins, -margins.t())
    assert margins[0, 1] != 0 and not margins[2].any()


def test_an_image_gives_the_same_beside_a_larger_one(tiny_cfg):
    """Its padding must count for nothing (detections and feature maps being the same)."""
    tiny_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "score_map", "semantic", "features")
    model = seeded_model(tiny_cfg)
    model.combine_stuff_area_thresh = 16
    with_detections(model, [[8, 8, 40, 60], [20, 20, 88, 44]], [PERSON, TIE], [0.9, 0.8])
    maps = torch.rand(16, 80, 80)

    def backbone(images):
        size = torch.tensor(images.shape[-2:])
        sizes = {f"p{i}": (-(-size // 2**i)).tolist() for i in range(2, 7)}
        return {x: maps[:, :h, :w].expand(len(images), -1, h, w) for x, (h, w) in sizes.items()}

    model.backbone.forward = backbone
    model.sem_seg_head.layers = lambda features: model.sem_seg_head.predictor(features["p2"] * 9)
    a, b = make_input((60, 90), [], []), make_input((256, 320), [], [])
    (alone,) = infer(model, [a], return_fusion_inputs=True)
    beside = infer(model, [a, b], return_fusion_inputs=True)[0]
    assert_same_panoptic(alone, beside)
    assert len(alone["panoptic_seg"][1]) > 2
    ours, theirs = (x["fusion_inputs"].order_inputs for x in (alone, beside))
    assert ours.score_map.shape == (8, 15, 23) and ours.pair_margins.any()
    torch.testing.assert_close(ours.score_map, theirs.score_map)
    torch.testing.assert_close(ours.pair_margins, theirs.pair_margins)


@pytest.mark.parametrize("outputs", [(), ("pred_masks",), ("sem_seg",)])
def test_outputs_and_fusion_inputs(tiny_cfg, outputs):
    """What nobody asks for is not made, and all orders can be painted without it."""
    everything = unsure_model(tiny_cfg)
    tiny_cfg.MODEL.OANET.OUTPUTS = outputs
    model = unsure_model(tiny_cfg)
    inputs = unequal_batch()
    inputs[1].update(height=50, width=130)
    for order in ("score", "srm_pairs"):
        model.order = everything.order = order
        results = infer(model, inputs, return_fusion_inputs=True)
        for x, whole in zip(results, infer(everything, inputs)):
            assert ("sem_seg" in x) == ("sem_seg" in outputs)
            assert x["instances"].has("pred_masks") == ("pred_masks" in outputs)
            fusion_inputs = x["fusion_inputs"]
            assert torch.equal(fusion_inputs.masks.full(), whole["instances"].pred_masks)
            painting_order = fusion_inputs.order_inputs.order(order)
            assert_same_panoptic(x, {"panoptic_seg": model.combine(fusion_inputs, painting_order)})
            (ours, our_info), (theirs, their_info) = x["panoptic_seg"], whole["panoptic_seg"]
            assert {s["isthing"] for s in our_info} == {True, False}
            assert [s["category_id"] for s in our_info] == [s["category_id"] for s in their_info]
            assert (ours == theirs).float().mean() > 0.999  # equal up to ties between two classes
    assert "fusion_inputs" not in infer(model, inputs)[0]
    tiny_cfg.TEST.ORDERS = ("score",)
    assert "fusion_inputs" in infer(build_model(tiny_cfg), inputs)[0]


def test_eight_threads_share_a_model(tiny_cfg):
    model, batch = unsure_model(tiny_cfg), unequal_batch()

    def call(i):
        return infer(model, batch[i % 3 :] if i % 2 else [batch[i % 3]], return_fusion_inputs=i < 3)

    expected = [call(i) for i in range(6)]
    before = [dict(vars(part)) for part in model.modules()]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(call, [*range(6)] * 2))
    for a, b in zip(results, expected * 2):
        for x, y in zip(a, b):
            assert_same_panoptic(x, y)
            assert torch.equal(x["instances"].scores, y["instances"].scores)
            assert torch.equal(x["instances"].pred_masks, y["instances"].pred_masks)
    for part, attributes in zip(model.modules(), before):
        assert all(value is attributes[name] for name, value in vars(part).items())


# What torch says about any trace, and about Detectron2's code in it.
tracing = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")


class PanopticMap(nn.Module):
    """Takes an image and gives its panoptic map: what one would trace or export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model([{"image": image}])[0]["panoptic_seg"][0]


@tracing
@pytest.mark.parametrize("as_function", [False, True])
def test_a_trace_is_refused(tiny_cfg, as_function):
    """It would give any other picture a wrong panoptic map, without an error."""
    module, image = PanopticMap(unsure_model(tiny_cfg)), torch.zeros(3, *SIZE)
    with torch.no_grad(), pytest.raises(RuntimeError, match="oanet-d2 export"):
        torch.jit.trace(module.forward if as_function else module, image)


@tracing
def test_the_tracing_adapter_is_refused(tiny_cfg):
    model, image = unsure_model(tiny_cfg), torch.zeros(3, *SIZE)
    adapter = TracingAdapter(model, [{"image": image}])
    with torch.no_grad(), pytest.raises(RuntimeError, match="oanet-d2 export"):
        torch.jit.trace(adapter, image)


@pytest.mark.skipif(
    not hasattr(getattr(torch, "compiler", None), "is_exporting"), reason="this torch cannot tell"
)
def test_torch_export_is_refused_but_for_a_part(tiny_cfg):
    model, image = unsure_model(tiny_cfg), torch.rand(3, *SIZE)
    inputs = [{"image": image}]
    with torch.no_grad():
        for do_postprocess in (False, True):
            adapter = TracingAdapter(model, inputs, lambda m, x, do=do_postprocess: m.inference(x, do))
            with pytest.raises(RuntimeError, match="oanet-d2 export"):
                torch.export.export(adapter, (image,), strict=False)
        exported = torch.export.export(model.backbone, (image[None],), strict=False).module()
        for name, x in model.backbone(image[None]).items():
            torch.testing.assert_close(exported(image[None])[name], x)


@tracing
def test_a_trace_without_post_processing_is_right_for_other_pictures(tiny_cfg):
    """Other sizes and other numbers of instances, as Panoptic FPN's is."""
    model, batch = unsure_model(tiny_cfg), unequal_batch()
    first = batch[0]["image"].float()
    with torch.no_grad():
        scores = model.inference(batch, do_postprocess=False)[0][0].scores
        model.roi_heads.box_predictor.test_score_thresh = scores.median().item()
        adapter = TracingAdapter(model, [{"image": first}], lambda m, x: m.inference(x, False))
        traced, counts = torch.jit.trace(adapter, first, check_trace=False), set()
        for x in batch:
            expected, found = (f(x["image"].float()) for f in (adapter, traced))
            counts.add(len(expected[0]))
            for a, b in zip(expected, found):
                assert a.shape == b.shape and torch.equal(a, b)
    assert len(counts) > 1


@tracing
def test_operations_are_counted(tiny_cfg):
    """Detectron2's tools/analyze_model.py traces a model too: the network costs what it always did."""
    tiny_cfg.merge_from_list([*STUFF, "MODEL.SRM_HEAD.PAIRS.EVIDENCE", ("geometry",)])
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 3
    inputs, found = [{"image": torch.zeros(3, 32, 32)}], []
    for cfg in (tiny_cfg, panoptic_fpn_cfg(tiny_cfg)):
        flops = FlopCountAnalysis(unsure_model(cfg), inputs)
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        found.append(flops.by_module())
    for part in ("backbone", "proposal_generator", "roi_heads.box_head"):
        assert found[0][f"model.{part}"] == found[1][f"model.{part}"] > 0


def test_order_by_score_equals_panoptic_fpn(tiny_cfg):
    """With its weights and its convention: the same output, bit for bit."""
    tiny_cfg.merge_from_list([*STUFF, "MODEL.OANET.ORDER", "score"])
    tiny_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "score_map", "features")
    theirs, ours = unsure_model(panoptic_fpn_cfg(tiny_cfg)), unsure_model(tiny_cfg)
    loaded = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    head = {f"srm_head.{x}" for x in ours.srm_head.state_dict()}
    assert set(loaded.missing_keys) == head and head
    for a, b in zip(infer(ours, unequal_batch()), infer(theirs, unequal_batch())):
        assert len(a["instances"]) > 1
        assert set(a) == set(b)
        assert_same_panoptic(a, b)
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        for field in ("scores", "pred_classes", "pred_masks"):
            assert torch.equal(a["instances"].get(field), b["instances"].get(field))
    raw, their_raw = (infer(x, unequal_batch(), do_postprocess=False) for x in (ours, theirs))
    assert torch.equal(raw[1], their_raw[1])
    assert torch.equal(raw[0][0].pred_masks, their_raw[0][0].pred_masks)


SPATIAL = ["MODEL.SRM_HEAD.NAME", "SpatialRankingHead"]
NO_MAP = ["MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT", 0.0]


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.OANET.ORDER", "oracle"], ["MODEL.OANET.ORDER", "'oracle'", "srm_overlap"]),
        (["TEST.ORDERS", "('oracle', 'best')"], ["TEST.ORDERS", "'best'"]),
        (SPATIAL, ["MODEL.OANET.ORDER", "'srm_pairs'", "'PairwiseRankingHead'"]),
        ([*NO_MAP, "TEST.ORDERS", "('srm_overlap',)"], ["TEST.ORDERS", "MAP_LOSS_WEIGHT"]),
        ([*NO_MAP, "MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('score_map',)"], ["MAP_LOSS_WEIGHT", "0"]),
        (["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('depth',)"], ["EVIDENCE", "'depth'", "'score_map'"]),
        (STUFF, ["EVIDENCE", "'semantic'", "SUPERVISION", "'things_and_stuff'"]),
        (["MODEL.SEM_SEG_HEAD.SUPERVISION", "all"], ["SUPERVISION", "'all'", "things_and_stuff"]),
        (["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"], ["'SemSegFPNHead'", "things_and_stuff", "'stuff'"]),
        (["MODEL.MASK_ON", False], ["MODEL.MASK_ON", "False", "True"]),
        (["TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True], ["TEST.AUG.ENABLED", "keypoints"]),
        (["MODEL.OANET.OUTPUTS", "('masks',)"], ["OANET.OUTPUTS", "'masks'", "'pred_masks'"]),
        (["MODEL.SRM_HEAD.IN_FEATURE", "p9"], ["SRM_HEAD.IN_FEATURE", "'p9'", "'p2'"]),
        (["MODEL.SRM_HEAD.TRAIN_MASKS", "pred"], ["TRAIN_MASKS", "'pred'", "'detections'"]),
        (["MODEL.SRM_HEAD.STRIDE", 3], ["SRM_HEAD.STRIDE", "3", "4"]),
    ],
    ids=str,
)
def test_refuses_wrong_configs_by_name(tiny_cfg, opts, words):
    tiny_cfg.merge_from_list(opts)
    with pytest.raises(ValueError) as error:
        build_model(tiny_cfg)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["two sizes", "no stuff"])
def test_void_and_padding_are_no_labels_whatever_the_ignore_value(tiny_cfg, name):
    losses = []
    for value in (255, -1):
        tiny_cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = value
        batch = make_batch(name)
        for x in batch:
            x["sem_seg"][x["sem_seg"] == 255] = value
        losses.append(train_step(seeded_model(tiny_cfg), batch)["loss_sem_seg"])
    assert losses[0] == losses[1] > 0
