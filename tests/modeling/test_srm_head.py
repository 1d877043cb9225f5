import math

import pytest
import torch

from oanet_d2.modeling import SRM_HEAD_REGISTRY, SpatialRankingHead, build_srm_head
from tests.conftest import load_config


def make_head(**kwargs):
    args = {"num_classes": 3, "conv_dim": 4, "num_blocks": 2, "kernel_size": 5, "stride": 2}
    return SpatialRankingHead(**{**args, **kwargs})


def test_is_registered_and_reads_its_keys():
    cfg = load_config(
        "OcclusionScenes/oanet_R_18.yaml",
        *["MODEL.SRM_HEAD.KERNEL_SIZE", "7", "MODEL.SRM_HEAD.NUM_BLOCKS", "3"],
        *["MODEL.SRM_HEAD.CONV_DIM", "24", "MODEL.SRM_HEAD.NORM", "GN", "MODEL.SRM_HEAD.STRIDE", "8"],
        *["MODEL.SRM_HEAD.MASK_THRESH", "0.4", "MODEL.SRM_HEAD.LOSS_WEIGHT", "0.3"],
    )
    cfg.MODEL.SRM_HEAD.NORM = "BN"
    head = build_srm_head(cfg)
    assert type(head) is SRM_HEAD_REGISTRY.get("SpatialRankingHead")
    convolutions = [m for m in head.blocks if isinstance(m, torch.nn.Conv2d)]
    # k x 1, then 1 x k
    assert [c.kernel_size for c in convolutions] == [(7, 1), (1, 7)] * 3
    assert {c.out_channels for c in convolutions} == {24}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in head.modules()) == 3
    assert (head.stride, head.mask_threshold, head.loss_weight) == (8, 0.4, 0.3)
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
    """Cells are labelled at their centres; stuff and void do not count."""
    head = make_head(stride=2, loss_weight=0.5)
    categories = torch.full((1, 4, 4), 255)
    categories[0, 1, 1] = 2  # centre of cell (0, 0): class 2
    categories[0, 1, 3] = 0  # centre of cell (0, 1): class 0
    categories[0, 3, 1] = 3  # centre of cell (1, 0): the first stuff class
    categories[0, 0, 0] = 1  # not a centre
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, :, 0, 0] = torch.tensor([0.0, 0.0, math.log(2.0)])  # p(2) = 1/2
    loss = head.losses(logits, categories)["loss_srm"]
    # p(0) = 1/3 in cell (0, 1)
    expected = 0.5 * (math.log(2) + math.log(3)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_loss_without_a_thing_is_zero_and_still_has_gradients():
    head = make_head()
    loss = head.losses(head(torch.zeros(1, 3, 4, 4)), torch.full((1, 8, 8), 255))["loss_srm"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_learns_who_lies_on_top_from_masks_alone():
    """Where class 0 and class 1 compete, 1 is visible; no picture is needed to learn that."""
    torch.manual_seed(0)
    head = make_head(num_classes=2, stride=1, kernel_size=3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)

    def scene():
        tensor = torch.zeros(1, 2, 12, 12)
        x, y = torch.randint(0, 6, (2,)).tolist()
        tensor[0, 0, y : y + 6, x : x + 6] = 1
        tensor[0, 1, y + 2 : y + 4, x + 2 : x + 4] = 1
        categories = torch.where(tensor[:, 1] > 0, 1, torch.where(tensor[:, 0] > 0, 0, 255))
        return tensor, categories

    for _ in range(60):
        tensor, categories = scene()
        optimizer.zero_grad()
        head.losses(head(tensor), categories)["loss_srm"].backward()
        optimizer.step()
    tensor, categories = scene()
    predicted = head(tensor).argmax(1)
    thing = categories < 2
    assert torch.equal(predicted[thing], categories[thing])


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"kernel_size": 4}, ["KERNEL_SIZE", "4", "odd"]),
        ({"stride": 0}, ["STRIDE", "0", "at least 1"]),
        ({"mask_threshold": 1.0}, ["MASK_THRESH", "1.0", "between 0 and 1"]),
        ({"train_masks": "all"}, ["TRAIN_MASKS", "'all'", "'pred'"]),
    ],
)
def test_refuses_what_has_no_meaning(kwargs, words):
    with pytest.raises(ValueError) as error:
        make_head(**kwargs)
    assert all(word in str(error.value) for word in words)
