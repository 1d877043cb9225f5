import copy

import pytest
import torch

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from oanet_d2 import OANet
from oanet_d2.modeling import SRMFromAnnotations
from oanet_d2.modeling.grid import ground_truth_on_grid, truth_on_grid
from tests.conftest import load_config, make_input

PERSON, TIE = 0, 1
SIZE = (64, 96)
WORN_TIE = [[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE]
LOSSES = {"PairwiseRankingHead": {"loss_srm", "loss_srm_pairs"}, "SpatialRankingHead": {"loss_srm"}}


@pytest.fixture
def srm_cfg(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "SRMFromAnnotations"
    head = tiny_cfg.MODEL.SRM_HEAD
    head.TRAIN_MASKS, head.PAIRS.EVIDENCE = "gt", ("geometry", "score_map")
    head.GT_FALSE_POSITIVES = 0.0  # those are random
    return tiny_cfg


@pytest.mark.parametrize("false_positives", [0.0, 1.0])
@pytest.mark.parametrize("head", LOSSES)
def test_trains_without_images(srm_cfg, head, false_positives):
    srm_cfg.MODEL.SRM_HEAD.NAME = head
    srm_cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = false_positives
    model = build_model(srm_cfg).train()
    assert isinstance(model, SRMFromAnnotations)
    smallest, twice = ([[9, 9, 10, 10]], [TIE]), ([[0, 0, 96, 64]] * 2, [PERSON] * 2, 2)
    for args in (([], []), smallest, twice, (*WORN_TIE, 2)):
        training_input = make_input(SIZE, *args)
        del training_input["image"]
        losses = model([training_input])
        assert set(losses) == LOSSES[head] and all(torch.isfinite(x) for x in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_same_losses_as_the_oanet(srm_cfg):
    """From ground truth, without evidence from the image; in a batch of two sizes."""
    torch.manual_seed(0)
    model = build_model(srm_cfg).train()
    srm_cfg.MODEL.META_ARCHITECTURE = "OANet"
    oanet = build_model(srm_cfg).train()
    loaded = oanet.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert not any(key.startswith("srm_head.") for key in loaded.missing_keys)
    batch = [make_input(size, *WORN_TIE, 2) for size in (SIZE, (97, 70))]
    with EventStorage():
        expected = oanet(batch)
    for name, loss in model(batch).items():
        torch.testing.assert_close(loss, expected[name])


def test_results_keep_their_masks_and_scores(srm_cfg):
    """Those below the threshold are not painted, and the others are the detections of inference."""
    srm_cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 1.0
    srm_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry",)
    model = build_model(srm_cfg).train()
    boxes, classes = WORN_TIE
    inputs, expected, truths = [], [], []
    for size, scores in ((SIZE, [0.9, 0.6, 0.49]), ((72, 48), [0.7, 0.8, 0.3])):
        training_input = make_input(size, [*boxes, [0, 0, 30, 30]], [*classes, PERSON], 2)
        on_grid = ground_truth_on_grid(training_input["instances"][:2], model.stride)
        on_grid.scores[:] = torch.tensor(scores[:2])
        truths.append(truth_on_grid(training_input, model.stride, torch.device("cpu")))
        training_input["instances"].scores = torch.tensor(scores)
        inputs.append(training_input)
        expected.append(on_grid)
    norm = copy.deepcopy(model.srm_head.network.norm.state_dict())
    losses = model(inputs)
    model.srm_head.network.norm.load_state_dict(norm)  # it has seen the pairs
    assert losses == model.srm_head.losses(expected, truths, [{}, {}])


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("TRAIN_MASKS", "detections", "TRAIN_MASKS is 'detections'.*'gt'"),
        ("PAIRS.EVIDENCE", ("geometry", "semantic"), "PAIRS.EVIDENCE.*'semantic'.*'geometry'"),
    ],
)
def test_refuses_what_needs_an_image(srm_cfg, key, value, words):
    srm_cfg.merge_from_list([f"MODEL.SRM_HEAD.{key}", value])
    with pytest.raises(ValueError, match=words):
        build_model(srm_cfg)


def test_predicts_nothing(srm_cfg):
    with pytest.raises(RuntimeError, match="only trains.*attach_srm"):
        build_model(srm_cfg).eval()([])


def test_the_coco_configs_belong_together():
    oanet = build_model(load_config("COCO-PanopticSegmentation/oanet_R_50_masks.yaml"))
    opts = ["DATASETS.TRAIN", "('coco_2017_train_oanet',)"]
    alone = build_model(load_config("order.yaml", *opts))
    assert isinstance(oanet, OANet)
    assert oanet.sem_seg_head.predictor.out_channels == 54  # the model zoo's
    shapes = {k: v.shape for k, v in oanet.srm_head.state_dict().items()}
    assert shapes == {k: v.shape for k, v in alone.srm_head.state_dict().items()}
