import pytest
import torch

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from oanet_d2 import OANet
from oanet_d2.modeling import SRMFromAnnotations
from tests.conftest import load_config, make_input

PERSON, TIE = 0, 1
SIZE = (64, 96)


@pytest.fixture
def srm_cfg(tiny_cfg):
    tiny_cfg.merge_from_list(
        [
            *["MODEL.META_ARCHITECTURE", "SRMFromAnnotations", "INPUT.READ_IMAGE", "False"],
            *["MODEL.SRM_HEAD.TRAIN_MASKS", "('gt',)"],
            *["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry', 'score_map')"],
        ]
    )
    return tiny_cfg


def without_image(*args, **kwargs):
    input = make_input(*args, **kwargs)
    del input["image"]
    return input


def worn_tie(size=SIZE):
    return without_image(size, [[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], 2)


def test_trains_a_step_without_images(srm_cfg):
    srm_cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 0.0  # those are random
    srm_cfg.MODEL.SRM_HEAD.PAIRS.DROPOUT = 0.0  # that too
    torch.manual_seed(0)
    model = build_model(srm_cfg).train()
    assert isinstance(model, SRMFromAnnotations)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = [worn_tie(), worn_tie((96, 72)), without_image(SIZE, [], [], 1)]

    def losses():
        found = model(batch)
        assert set(found) == {"loss_srm", "loss_srm_pairs"}
        return found

    before = losses()
    sum(before.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    after = losses()
    assert all(0 < after[name] < before[name] for name in before)


@pytest.mark.parametrize("head", ["PairwiseRankingHead", "SpatialRankingHead"])
def test_edge_batches(srm_cfg, head):
    srm_cfg.MODEL.SRM_HEAD.NAME = head
    model = build_model(srm_cfg).train()
    for args in ([[], []], [[[9, 9, 10, 10]], [TIE]], [[[0, 0, 96, 64]] * 2, [PERSON] * 2, 2]):
        losses = model([without_image(SIZE, *args)])
        assert all(torch.isfinite(x) for x in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_same_losses_as_the_oanet(srm_cfg):
    """On one image without padding, ground-truth masks and targets are the same."""
    srm_cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 0.0  # those are random
    srm_cfg.MODEL.SRM_HEAD.PAIRS.DROPOUT = 0.0  # that too
    torch.manual_seed(0)
    model = build_model(srm_cfg).train()
    srm_cfg.MODEL.META_ARCHITECTURE = "OANet"
    oanet = build_model(srm_cfg)
    oanet.load_state_dict(model.state_dict(), strict=False)
    candidates, targets = [], []
    losses_of, oanet.srm_head.losses = (
        oanet.srm_head.losses,
        lambda c, t, *_: (
            candidates.extend(c),
            targets.extend(t),
            {},
        )[-1],
    )
    input = make_input(SIZE, [[8, 8, 40, 60], [20, 20, 28, 44]], [PERSON, TIE], 2)
    with EventStorage():
        oanet.train()([input])
    expected = losses_of(candidates, targets)
    for name, loss in model([worn_tie()]).items():
        torch.testing.assert_close(loss, expected[name])


def test_weights_are_the_oanets(srm_cfg):
    ours = build_model(srm_cfg).state_dict()
    srm_cfg.MODEL.META_ARCHITECTURE = "OANet"
    oanet = build_model(srm_cfg)
    assert isinstance(oanet, OANet)
    theirs = {k: v.shape for k, v in oanet.state_dict().items() if k.startswith("srm_head.")}
    assert {k: v.shape for k, v in ours.items()} == theirs
    assert any(k.startswith("srm_head.networks.0.compare") for k in theirs)


@pytest.mark.parametrize("sources", ["('pred',)", "('gt', 'pred')", "('detections',)", "()"])
def test_refuses_masks_that_need_an_image(srm_cfg, sources):
    srm_cfg.merge_from_list(["MODEL.SRM_HEAD.TRAIN_MASKS", sources])
    with pytest.raises(ValueError, match="TRAIN_MASKS.*'gt'"):
        build_model(srm_cfg)


@pytest.mark.parametrize("evidence", ["semantic", "features"])
def test_refuses_evidence_that_needs_an_image(srm_cfg, evidence):
    srm_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", evidence)
    with pytest.raises(ValueError, match=f"PAIRS.EVIDENCE.*'{evidence}'.*'geometry'"):
        build_model(srm_cfg)
    # a head without pairs does not look at it
    srm_cfg.MODEL.SRM_HEAD.NAME = "SpatialRankingHead"
    build_model(srm_cfg)


def test_predicts_nothing(srm_cfg):
    model = build_model(srm_cfg).eval()
    with pytest.raises(RuntimeError, match="only trains.*attach_srm"):
        model([worn_tie()])


def test_the_coco_configs_belong_together():
    oanet, alone = (
        build_model(load_config(f"COCO-PanopticSegmentation/{name}.yaml")).state_dict()
        for name in ("oanet_R_50_masks", "srm_from_annotations")
    )
    assert oanet["sem_seg_head.predictor.weight"].shape[0] == 54  # the model zoo's
    assert {k: v.shape for k, v in alone.items()} == {
        k: v.shape for k, v in oanet.items() if k.startswith("srm_head.")
    }
