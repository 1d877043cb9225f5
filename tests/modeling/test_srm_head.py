import math

import pytest
import torch

from oanet_d2.modeling import SpatialRankingHead, build_srm_head
from oanet_d2.modeling.grid import GridTruth
from tests.conftest import box_mask, make_grid_instances


def make_head(**kwargs):
    args = {"num_classes": 3, "conv_dim": 4, "num_blocks": 2, "kernel_size": 5}
    return SpatialRankingHead(**{**args, **kwargs})


def truth(categories):
    """The part that this head looks at: the categories alone."""
    return GridTruth(categories, torch.zeros_like(categories), [])


def nothing(size=(4, 4)):
    return make_grid_instances(torch.zeros(0, *size, dtype=torch.bool), [])


def unequal_images():
    """Instances and truth of three images, each of another size, the last without an instance."""
    images = []
    for (h, w), classes in (((6, 9), [2, 0]), ((13, 5), [1]), ((8, 8), [])):
        masks = [box_mask(i, 1, i + 4, 5, (h, w)) for i in range(len(classes))]
        instances = make_grid_instances(torch.stack(masks), classes) if masks else nothing((h, w))
        images.append((instances, truth(torch.randint(-1, 5, (h, w)))))
    return images


def test_instance_tensor_by_hand():
    masks = [
        [[1, 1, 0], [1, 1, 0]],  # class 2
        [[0, 1, 1], [0, 0, 0]],  # class 0, competes with the first in one cell
        [[0, 0, 0], [0, 1, 1]],  # class 2 again: the channel is the union
    ]
    head = make_head(num_blocks=0)  # the predictor alone, which leaves the tensor as it is
    head.predictor.weight.data = torch.eye(3)[:, :, None, None]
    found = head(make_grid_instances(torch.tensor(masks).bool(), [2, 0, 2]))
    expected = [[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 1]]]
    assert torch.equal(found, torch.tensor(expected).float())
    assert not head(nothing()).any()


def test_reads_its_keys(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.NAME, tiny_cfg.MODEL.SRM_HEAD.LOSS_WEIGHT = "SpatialRankingHead", 0.3
    tiny_cfg.MODEL.SRM_HEAD.KERNEL_SIZE, tiny_cfg.MODEL.SRM_HEAD.NUM_BLOCKS = 7, 3
    head = build_srm_head(tiny_cfg, {})
    # k x 1, then 1 x k
    assert [x.kernel_size for x in head.blocks] == [(7, 1), (1, 7)] * 3
    assert {x.out_channels for x in head.blocks} == {8} and head.loss_weight == 0.3
    assert head(nothing((6, 9))).shape == (8, 6, 9)


def test_losses_are_over_all_images_and_weighted():
    head = make_head(loss_weight=0.5)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    head.predictor.bias.data[2] = math.log(2.0)  # p = (1/4, 1/4, 1/2) everywhere
    instances = [make_grid_instances(box_mask(0, 0, 2, 1, (2, 2))[None], [c]) for c in (2, 0)]
    targets = [truth(torch.tensor(c)) for c in ([[2, 2], [3, -1]], [[0, -1], [-1, 4]])]
    losses = head.losses(instances, targets, [])
    assert set(losses) == {"loss_srm"}
    expected = 0.5 * (2 * math.log(2) + math.log(4)) / 3
    assert losses["loss_srm"].item() == pytest.approx(expected, rel=1e-6)


def test_an_image_gives_the_same_in_any_batch():
    torch.manual_seed(0)
    head, images = make_head(), unequal_images()
    together = head.order_inputs([x for x, _ in images], [])
    for (instances, _), found in zip(images, together):
        assert found.masks is instances.masks and found.pair_margins is None
        assert found.classes is instances.classes and found.scores is instances.scores
        assert torch.equal(found.score_map, head(instances).softmax(0))
    # The loss is a mean over the cells of all images that show a thing.
    counts = [((t.categories >= 0) & (t.categories < 3)).sum() for _, t in images]
    alone = [head.losses([x], [t], [])["loss_srm"] for x, t in images]
    expected = sum(c * loss for c, loss in zip(counts, alone)) / sum(counts)
    torch.testing.assert_close(head.losses(*map(list, zip(*images)), [])["loss_srm"], expected)


@pytest.mark.parametrize("category", [-1, 3])
def test_loss_without_a_thing_is_zero_and_still_has_gradients(category):
    head = make_head()
    loss = head.losses([nothing()], [truth(torch.full((4, 4), category))], [])["loss_srm"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_learns_who_lies_on_top_from_masks_alone():
    """Where class 0 and class 1 compete, 1 is visible; no picture is needed to learn that."""
    torch.manual_seed(0)
    head = make_head(num_classes=2, kernel_size=3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    below, top = box_mask(2, 1, 8, 7), box_mask(4, 3, 6, 5)
    instances = [make_grid_instances(torch.stack([below, top]), [0, 1])]
    categories = torch.where(top, 1, torch.where(below, 0, -1))
    for _ in range(60):
        optimizer.zero_grad()
        head.losses(instances, [truth(categories)], [])["loss_srm"].backward()
        optimizer.step()
    assert torch.equal(head(instances[0]).argmax(0)[below], categories[below])


@pytest.mark.parametrize("kernel_size", [4, -1])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"KERNEL_SIZE is {kernel_size}.*odd"):
        make_head(kernel_size=kernel_size)
