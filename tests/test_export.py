import json

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.layers import DeformConv
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model

from oanet_d2 import PanopticPredictor, export
from oanet_d2.export import ExportError, PanopticGraph, export_onnx
from oanet_d2.modeling.pair_head import EVIDENCE
from oanet_d2.painting.ranking import RANKING_RULE_REGISTRY, overlap_margins
from oanet_d2.runtime import OnnxPredictor
from tests.conftest import SMALLEST, load_config, panoptic_fpn_cfg
from tests.test_variants import SMALL

SIZES = (64, 96), (50, 130), (97, 33)
LOW = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05", "TEST.DETECTIONS_PER_IMAGE", "30"]
LOW += ["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.1", "TEST.ORDERS", "('score',)"]
PAPER = ["MODEL.SRM_HEAD.NAME", "SpatialRankingHead"]
MAP = ["MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT", "1.0"]
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
STUFF = ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "0"]
THEIR_HEAD = ["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"]
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0"]


def order(name):
    return ["MODEL.OANET.ORDER", name]


def config(*opts):
    return load_config("OcclusionScenes/oanet_R_18.yaml", *SMALLEST, *LOW, *opts)


def model(*opts):
    torch.manual_seed(0)
    return build_model(config(*opts)).eval()


def image(size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "opts",
    [
        [*MAP, "MODEL.SRM_HEAD.PAIRS.EVIDENCE", str(tuple(EVIDENCE))],
        [*MAP, *order("srm_overlap")],
        [*PAPER, *order("srm_mean")],
        [*STUFF, "MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry', 'features')"],
        [*CASCADE, *order("smaller_first")],
        [*CASCADE, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
        ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True", *order("lower_first")],
        ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", *order("score")],
        ["MODEL.SRM_HEAD.STRIDE", "8", "TEST.DETECTIONS_PER_IMAGE", "-1"],
        TIMM,
    ],
    ids=lambda opts: " ".join(x.rpartition(".")[2] for x in opts),
)
def test_the_graph_gives_what_inference_gives(opts):
    tested = model(*opts)
    graph = PanopticGraph(tested)
    for size in SIZES:
        given = image(size)
        with torch.no_grad():
            boxes, scores, classes, masks, semantic, last = graph(given)
            batch = [{"image": given.permute(2, 0, 1).float()}]
            (detected,), sem_seg = tested.inference(batch, do_postprocess=False)
            inputs = tested.inference(batch)[0]["fusion_inputs"].order_inputs
        painted = detected.scores >= 0.1
        assert len(boxes) == painted.sum() > 1
        detected = detected[painted]
        torch.testing.assert_close(boxes, detected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(scores, detected.scores)
        assert torch.equal(classes, detected.pred_classes)
        torch.testing.assert_close(masks, detected.pred_masks[:, 0])
        stride = tested.sem_seg_head.common_stride
        large = nn.functional.interpolate(semantic[None], scale_factor=stride, mode="bilinear")
        torch.testing.assert_close(large[..., : sem_seg.shape[2], : sem_seg.shape[3]], sem_seg)
        inputs = inputs[painted.nonzero()[:, 0]]
        if tested.order in ("srm_pairs", "srm_overlap"):
            expected = inputs.pair_margins if tested.order == "srm_pairs" else overlap_margins(inputs)
            torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(last, inputs.order(tested.order))


def test_the_graph_of_an_image_without_instances():
    graph = PanopticGraph(model("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "1.0"))
    shapes = [tuple(x.shape) for x in graph(image((40, 72)))]
    assert shapes == [(0, 4), (0,), (0,), (0, 28, 28), (7, 16, 24), (0, 0)]


# What is exported in earnest. An export takes a second for every thirty operations, hence the backbones.
SMALLER = [*map(str, SMALL)]
SMALL_TIMM = [*TIMM[:-1], "tf_mobilenetv3_small_minimal_100", "MODEL.FPN.IN_FEATURES", "['res4', 'res5']"]
SMALL_TIMM += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [48]]"]
for key in ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"):
    SMALL_TIMM += [f"MODEL.{key}.IN_FEATURES", "['p4', 'p5']"]
EXPORTED = {
    "pairs": [*SMALLER, *CASCADE, *MAP, "MODEL.SRM_HEAD.PAIRS.EVIDENCE", str(tuple(EVIDENCE))],
    "timm": [*SMALL_TIMM, *PAPER, *STUFF, *THEIR_HEAD, *order("lower_first")],
}


def run(*args):
    """The command line, without a logger that the tests after it would keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "setup_logger", lambda name: None)
        return export.main([*map(str, args)])


@pytest.fixture(scope="module", params=EXPORTED)
def predictors(request, tmp_path_factory):
    """PyTorch's and the exported one of a network with random weights, and the file."""
    folder = tmp_path_factory.mktemp(request.param)
    # Few candidates: among many of random weights, some are equal up to rounding.
    few = ["MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "30"]
    few += ["INPUT.MIN_SIZE_TEST", "0"]
    cfg = config(*few, *EXPORTED[request.param])
    torch.manual_seed(0)
    cfg.MODEL.WEIGHTS = str(folder / "tiny.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (folder / "tiny.yaml").write_text(cfg.dump())
    file = folder / "new" / "tiny.onnx"
    assert run("--config-file", folder / "tiny.yaml", "--output", file) == 0
    return PanopticPredictor.from_config(folder / "tiny.yaml"), OnnxPredictor(file), file


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_file_gives_what_the_network_gives(predictors, engine):
    pytest.importorskip(engine)
    ours, exported, file = predictors
    if engine == "openvino":
        exported = OnnxPredictor(file, openvino={})
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (300, 420), (33, 200), *rng.integers(40, 200, (21, 2)).tolist()]
    same = []
    for i, size in enumerate(sizes):
        picture = image(size, i).numpy()
        expected, found = ours(picture), exported(picture)
        keys = "id", "isthing", "category_id", "category_name", "instance_id"
        segments = [[[s.get(k) for k in keys] for s in x.segments_info] for x in (expected, found)]
        equal = (expected.panoptic_seg.numpy() == found.panoptic_seg).mean()
        same.append(segments[0] == segments[1] and equal > 0.999)
    # An exporter's error is in every image. Random weights are sure of nothing, so that rounding
    # decides a tie in a few.
    assert sum(same) >= 0.94 * len(same), [s for s, x in zip(sizes, same) if not x]


def test_the_file_says_what_it_was_exported_with(predictors):
    ours, exported, _ = predictors
    assert exported.options["order"] == ours.model.order
    for name in ("classes", "colors", "dataset_id_to_contiguous_id"):
        for kind in ("thing", "stuff"):
            found, expected = (getattr(x.metadata, f"{kind}_{name}") for x in (exported, ours))
            assert json.dumps(found) == json.dumps(expected)


@ROI_HEADS_REGISTRY.register()
class OwnROIHeads(StandardROIHeads):
    def _forward_box(self, features, proposals):
        return super()._forward_box(features, proposals)


def test_what_works_otherwise_is_refused():
    with pytest.raises(ExportError, match="OwnROIHeads"):
        PanopticGraph(model("MODEL.ROI_HEADS.NAME", "OwnROIHeads"))
    panoptic_fpn = build_model(panoptic_fpn_cfg(config(*STUFF)))
    with pytest.raises(ExportError, match="PanopticFPN"):
        PanopticGraph(panoptic_fpn)
    pooling = model("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool")
    with pytest.raises(ExportError, match=r"box_pooler.*RoIPool"):
        PanopticGraph(pooling)


class Deformable(DeformConv, nn.Module):
    def __init__(self):  # Detectron2's own needs its compiled part
        nn.Module.__init__(self)


def test_deformable_convolutions_are_refused():
    deformed = model()
    deformed.backbone.deformed = Deformable()
    with pytest.raises(ExportError, match=r"backbone\.deformed is a deformable"):
        PanopticGraph(deformed)


def by_values(inputs):
    return torch.tensor(sorted(range(len(inputs.scores)), key=inputs.scores.tolist().__getitem__))


def test_what_only_the_config_shows_is_refused(tmp_path):
    if "by_values" not in RANKING_RULE_REGISTRY:
        RANKING_RULE_REGISTRY.register(by_values)
    cfg = config(*SMALLER, *order("by_values"))
    cfg.MODEL.WEIGHTS = str(tmp_path / "tiny.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ExportError, match="PyTorch cannot export"):
        export_onnx(PanopticPredictor(cfg), str(tmp_path / "out" / "m.onnx"))
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(ExportError, match=r"TEST\.AUG\.ENABLED"):
        export_onnx(PanopticPredictor(cfg), str(tmp_path / "out" / "m.onnx"))
    assert not (tmp_path / "out").exists()


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    for args in ([], ["MODEL.WEIGHTS", tmp_path / "gone.safetensors"]):
        with pytest.raises(SystemExit) as error:
            run("--output", tmp_path / "m.onnx", *args)
        assert error.value.code == 2
        assert "safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
