import copy

import pytest
import torch

from detectron2.modeling import build_model

from oanet_d2.modeling.detection import detect, switched_off
from tests.conftest import make_input

SIZES = [(64, 96), (80, 64)]
CASCADE = [
    *["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    *["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", [[10.0, 10.0, 5.0, 5.0]] * 3],
]
KEYPOINTS = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]


def prepared(cfg, *opts):
    """A model in evaluation mode, and what its ROI heads are given for two images."""
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *opts])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        images = model.preprocess_image([make_input(size, [], []) for size in SIZES])
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
    return model.roi_heads, images, features, proposals


def assert_same(ours, theirs, but=()):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.image_size == b.image_size and set(a.get_fields()) == set(b.get_fields())
        for name in set(b.get_fields()) - set(but):
            x, y = (getattr(f, "tensor", f) for f in (a.get(name), b.get(name)))
            assert torch.equal(x, y), name


@pytest.mark.parametrize("opts", [[], CASCADE, KEYPOINTS], ids=["standard", "cascade", "keypoints"])
def test_with_all_masks_it_is_what_the_roi_heads_do(tiny_cfg, opts):
    roi_heads, *inputs = prepared(tiny_cfg, *opts)
    with torch.no_grad():
        theirs, _ = roi_heads(*copy.deepcopy(inputs))
        ours = detect(roi_heads, *inputs, -torch.inf)
    assert sum(map(len, theirs)) > 50
    assert_same(ours, theirs)


@pytest.mark.parametrize("opts", [[], CASCADE, KEYPOINTS], ids=["standard", "cascade", "keypoints"])
def test_a_low_score_gets_no_mask(tiny_cfg, opts):
    roi_heads, *inputs = prepared(tiny_cfg, *opts)
    given = []
    roi_heads.mask_head.register_forward_hook(lambda m, x, y: given.append(len(x[0])))
    with torch.no_grad():
        theirs, _ = roi_heads(*copy.deepcopy(inputs))
        scores = torch.cat([x.scores for x in theirs]).sort(descending=True).values
        threshold = float(scores[50])
        given.clear()
        ours = detect(roi_heads, *inputs, mask_threshold=threshold)
    expected = sum(int((x.scores >= threshold).sum()) for x in theirs)
    assert sum(given) == expected < len(scores)
    assert_same(ours, theirs, but=["pred_masks"])
    for a, b in zip(ours, theirs):
        made = b.scores >= threshold
        # PyTorch computes the last few elements of a tensor in another way than the others.
        torch.testing.assert_close(a.pred_masks[made], b.pred_masks[made], rtol=0, atol=1e-6)
        assert not a.pred_masks[~made].any()


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_nothing_to_make_a_mask_of(tiny_cfg, threshold):
    roi_heads, *inputs = prepared(tiny_cfg)
    if threshold == 0.0:
        roi_heads.box_predictor.test_score_thresh = 1.0  # nothing is detected at all
    with torch.no_grad():
        ours = detect(roi_heads, *inputs, mask_threshold=threshold)
    for instances in ours:
        assert (len(instances) == 0) == (threshold == 0.0)
        assert instances.pred_masks.shape == (len(instances), 1, 28, 28)
        assert not instances.pred_masks.any()


class OwnROIHeads(torch.nn.Module):
    """ROI heads that Detectron2 knows nothing of."""

    def forward(self, images, features, proposals, targets=None):
        return ["all masks", images, features, proposals], {}


def test_other_roi_heads_are_left_alone():
    assert detect(OwnROIHeads(), 1, 2, 3, 0.5) == ["all masks", 1, 2, 3]


def test_a_head_is_switched_on_again_whatever_happens(tiny_cfg):
    roi_heads, *inputs = prepared(tiny_cfg)
    roi_heads.mask_head.forward = None  # as something that fails
    with torch.no_grad(), pytest.raises(TypeError):
        detect(roi_heads, *inputs, 0.0)
    assert roi_heads.mask_on is True and roi_heads.keypoint_on is False
    with pytest.raises(RuntimeError), switched_off(roi_heads, "mask_on"):
        assert roi_heads.mask_on is False
        raise RuntimeError
    assert roi_heads.mask_on is True
