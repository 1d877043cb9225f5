import math

import pytest
import torch

from oanet_d2.modeling import SRM_HEAD_REGISTRY, SpatialRankingHead, build_srm_head
from oanet_d2.modeling.candidates import RankingTarget, build_instance_tensor
from tests.conftest import box_mask, load_config, make_candidates


def make_head(**kwargs):
    args = {"num_classes": 3, "conv_dim": 4, "num_blocks": 2, "kernel_size": 5, "stride": 2}
    return SpatialRankingHead(**{**args, **kwargs})


def target(categories):
    """What this head looks at: the categories alone."""
    return RankingTarget(categories, torch.zeros_like(categories), [])


def test_is_registered_and_reads_its_keys():
    cfg = load_config(
        "OcclusionScenes/oanet_R_18.yaml",
        *["MODEL.SRM_HEAD.KERNEL_SIZE", "7", "MODEL.SRM_HEAD.NUM_BLOCKS", "3"],
        *[
            "MODEL.SRM_HEAD.CONV_DIM",
            "24",
            "MODEL.SRM_HEAD.NORM",
            "GN",
            "MODEL.SRM_HEAD.STRIDE",
            "8",
        ],
        *["MODEL.SRM_HEAD.MASK_THRESH", "0.4", "MODEL.SRM_HEAD.LOSS_WEIGHT", "0.3"],
        *["MODEL.SRM_HEAD.NAME", "SpatialRankingHead"],
        *["MODEL.SRM_HEAD.TRAIN_MASKS", "('pred', 'gt')", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "99"],
    )
    cfg.MODEL.SRM_HEAD.NORM = "BN"
    head = build_srm_head(cfg, {})
    assert type(head) is SRM_HEAD_REGISTRY.get("SpatialRankingHead")
    convolutions = [m for m in head.blocks if isinstance(m, torch.nn.Conv2d)]
    # k x 1, then 1 x k
    assert [c.kernel_size for c in convolutions] == [(7, 1), (1, 7)] * 3
    assert {c.out_channels for c in convolutions} == {24}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in head.modules()) == 3
    assert (head.stride, head.mask_threshold, head.loss_weight) == (8, 0.4, 0.3)
    assert (head.train_masks, head.ignore_value) == (("pred", "gt"), 99)
    assert head(torch.zeros(2, 8, 6, 9)).shape == (2, 8, 6, 9)


def test_one_block_sees_a_k_by_k_neighbourhood():
    head = make_head(num_blocks=1, kernel_size=5)
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, 0.1)  # no ReLU is off
    tensor = torch.ones(1, 3, 15, 15, requires_grad=True)
    head(tensor)[0, :, 7, 7].sum().backward()
    seen = tensor.grad[0].abs().sum(0) > 0
    expected = torch.zeros(15, 15, dtype=torch.bool)
    expected[5:10, 5:10] = True
    assert torch.equal(seen, expected)


def test_score_map_is_a_distribution_over_classes():
    score_map = SpatialRankingHead.score_map(torch.randn(2, 3, 4, 5))
    torch.testing.assert_close(score_map.sum(1), torch.ones(2, 4, 5))


def test_loss_by_hand():
    """Stuff (3 is the first stuff class) and void do not count."""
    categories = torch.tensor([[[2, 0], [3, 255]]])
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, :, 0, 0] = torch.tensor([0.0, 0.0, math.log(2.0)])  # p(2) = 1/2
    loss = make_head().map_loss(logits, categories)
    # p(0) = 1/3 in cell (0, 1)
    assert loss.item() == pytest.approx((math.log(2) + math.log(3)) / 2, rel=1e-6)


def test_losses_are_over_all_images_and_weighted():
    head = make_head(loss_weight=0.5)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    head.predictor.bias.data[2] = math.log(2.0)  # p = (1/4, 1/4, 1/2) everywhere
    candidates = [make_candidates(box_mask(0, 0, 2, 1, (2, 2))[None], [c]) for c in (2, 0)]
    targets = [target(torch.tensor(c)) for c in ([[2, 2], [3, 255]], [[0, 255], [255, 4]])]
    losses = head.losses(candidates, targets)
    assert set(losses) == {"loss_srm"}
    expected = 0.5 * (2 * math.log(2) + math.log(4)) / 3
    assert losses["loss_srm"].item() == pytest.approx(expected, rel=1e-6)


def test_evidence_is_the_score_map_of_the_instance_tensor():
    torch.manual_seed(0)
    head = make_head()
    images = [
        make_candidates(torch.stack([box_mask(0, 0, 5, 6), box_mask(3, 2, 9, 9)]), [2, 0]),
        make_candidates(torch.zeros(0, 10, 12, dtype=torch.bool), []),
    ]
    for candidates, evidence in zip(images, head.evidence(images)):
        assert evidence.masks is candidates.masks and evidence.pair_margins is None
        assert evidence.classes is candidates.classes and evidence.scores is candidates.scores
        tensor = build_instance_tensor(candidates.masks, candidates.classes, 3)
        torch.testing.assert_close(evidence.score_map, head(tensor[None])[0].softmax(0))


def test_loss_without_a_thing_is_zero_and_still_has_gradients():
    head = make_head()
    nothing = make_candidates(torch.zeros(0, 4, 4, dtype=torch.bool), [])
    loss = head.losses([nothing], [target(torch.full((4, 4), 255))])["loss_srm"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_learns_who_lies_on_top_from_masks_alone():
    """Where class 0 and class 1 compete, 1 is visible; no picture is needed to learn that."""
    torch.manual_seed(0)
    head = make_head(num_classes=2, stride=1, kernel_size=3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)

    def scene():
        x, y = torch.randint(0, 6, (2,)).tolist()
        below = box_mask(x, y, x + 6, y + 6, (12, 12))
        top = box_mask(x + 2, y + 2, x + 4, y + 4, (12, 12))
        categories = torch.where(top, 1, torch.where(below, 0, 255))
        return make_candidates(torch.stack([below, top]), [0, 1]), categories

    for _ in range(60):
        candidates, categories = scene()
        optimizer.zero_grad()
        head.losses([candidates], [target(categories)])["loss_srm"].backward()
        optimizer.step()
    candidates, categories = scene()
    predicted = head.evidence([candidates])[0].score_map.argmax(0)
    thing = categories < 2
    assert torch.equal(predicted[thing], categories[thing])


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"kernel_size": 4}, ["KERNEL_SIZE", "4", "odd"]),
        ({"stride": 0}, ["STRIDE", "0", "at least 1"]),
        ({"mask_threshold": 1.0}, ["MASK_THRESH", "1.0", "between 0 and 1"]),
        ({"train_masks": ("gt", "all")}, ["TRAIN_MASKS", "'all'", "'pred'"]),
        ({"train_masks": ()}, ["TRAIN_MASKS", "()", "'detections'"]),
    ],
)
def test_refuses_what_has_no_meaning(kwargs, words):
    with pytest.raises(ValueError) as error:
        make_head(**kwargs)
    assert all(word in str(error.value) for word in words)
