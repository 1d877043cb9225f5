"""
What tools/benchmark.py measures of other ways to do what oanet_d2 does, which were tried and not
kept: "ours" is the way that is built, "theirs" the other one. Nothing is measured here.
"""

import cv2
import numpy as np
import torch
from benchmark_cases import Prepared, make_detections, make_labels, make_scores, same_labels
from torch.nn import functional as F

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead

from oanet_d2.modeling.instance_masks import BoxedMasks
from oanet_d2.modeling.lean import make_lean
from oanet_d2.modeling.onednn_layout import frozen_norm_in_onednn
from oanet_d2.modeling.panoptic_combiner import _free_areas, _strips
from oanet_d2.modeling.semantic_labels import resized_semantic_labels, semantic_labels

CLASSES, IGNORE = 12, 255  # the demo's
P2 = 256, 200, 304  # of an image of 800 x 1216


def label_by_argmax() -> Prepared:
    scores = make_scores(54, (800, 1333))
    return Prepared(
        {"ours": lambda: semantic_labels(scores, True), "theirs": lambda: scores.argmax(dim=0)},
        scores.numel() * scores.element_size(),
        agreement=same_labels,
    )


def label_by_running_maximum() -> Prepared:
    """
    Both of Detectron2's interpolations, but a few classes at a time, against two matrices.
    """
    scores = make_scores(133, (200, 336))
    sizes = (800, 1333), (480, 640)

    def running():
        best = torch.full(sizes[1], -torch.inf)
        labels = torch.zeros(sizes[1], dtype=torch.int64)
        for first in range(0, len(scores), 8):
            part = scores[None, first : first + 8]
            up = F.interpolate(part, scale_factor=4, mode="bilinear", align_corners=False)
            values, indices = sem_seg_postprocess(up[0], sizes[0], *sizes[1]).max(dim=0)
            better = values > best
            best[better], labels[better] = values[better], indices[better] + first
        return labels

    return Prepared(
        {"ours": lambda: resized_semantic_labels(scores, 4, *sizes, True), "theirs": running},
        scores.numel() * scores.element_size(),
        agreement=same_labels,
    )


def areas_by_histogram() -> Prepared:
    """
    OpenCV's histogram, in the same strips, against runs of equal labels.
    """
    labels = make_labels((2160, 3840)).to(torch.uint8)
    num_labels = int(labels.max()) + 1
    free = torch.zeros(labels.shape, dtype=torch.int32)

    def histogram():
        areas = torch.zeros(num_labels, dtype=torch.int64)
        for part, of_part in _strips(free, labels):
            mask = (part == 0).numpy().view(np.uint8)
            counts = cv2.calcHist([of_part.numpy()], [0], mask, [num_labels], [0, num_labels])
            areas += torch.from_numpy(counts[:, 0]).long()
        return areas

    return Prepared(
        {"ours": lambda: torch.tensor(_free_areas(free, labels, num_labels)), "theirs": histogram},
        labels.numel() * (labels.element_size() + free.element_size()),
        agreement=same_labels,
    )


def mask_as_one_sample() -> Prepared:
    """
    F.grid_sample of all of a box at once, against a sample for each row.
    """
    instances = make_detections(100, (800, 1333))
    masks = BoxedMasks(instances.pred_masks[:, 0], instances.pred_boxes.tensor, (800, 1333))

    def whole(index):
        grid = torch.stack(torch.meshgrid(masks._x[index], masks._y[index], indexing="xy"), dim=2)
        mask = masks.roi_masks[index][None, None]
        return F.grid_sample(mask, grid[None], align_corners=False)[0, 0] >= masks.threshold

    return Prepared(
        {
            "ours": lambda: torch.cat([masks[i][0].flatten() for i in range(len(masks))]),
            "theirs": lambda: torch.cat([whole(i).flatten() for i in range(len(masks))]),
        },
        masks.roi_masks.numel() * masks.roi_masks.element_size(),
        agreement=same_labels,
    )


def loss_by_logsumexp() -> Prepared:
    """
    The semantic loss of a training step of the demo, forward and backward: log Z minus the score
    of the label, which makes no map of the classes' logarithms, against F.cross_entropy.
    """
    scores = make_scores(CLASSES, (48, 48)).expand(4, -1, -1, -1).contiguous().requires_grad_()
    labels = make_labels((192, 192)).remainder(CLASSES).expand(4, -1, -1).contiguous()
    labels[:, :20] = IGNORE

    def backward(loss_of):
        scores.grad = None
        up = F.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False)
        loss_of(up).backward()
        return scores.grad

    def cross_entropy(up):
        return F.cross_entropy(up, labels, reduction="sum", ignore_index=IGNORE)

    def difference(up):
        known = labels != IGNORE
        chosen = up.gather(1, labels.where(known, 0)[:, None])[:, 0]
        return ((up.logsumexp(1) - chosen) * known).sum()

    with_gradients = torch.enable_grad()
    return Prepared(
        {
            "ours": with_gradients(lambda: backward(cross_entropy)),
            "theirs": with_gradients(lambda: backward(difference)),
        },
        2 * 4 * CLASSES * 192 * 192 * 4,  # the upsampled scores and their gradient
        agreement=lambda a, b: torch.isclose(a, b, rtol=1e-3, atol=1e-4).double().mean().item(),
    )


def clip_all_at_once() -> Prepared:
    """
    Detectron2 clips parameter by parameter; torch._foreach functions take all of them. As many
    parameters as the demo's network has, in its sizes.
    """
    from benchmark_models import DEMO, load_config  # a network is built only here

    from detectron2.modeling import build_model

    cfg = load_config(DEMO, [])
    parameters = list(build_model(cfg).parameters())
    limit = cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def one_by_one():
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_(parameter, limit, 2.0)

    def together():
        gradients = [x.grad for x in parameters]
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    moved = 3 * sum(x.numel() for x in parameters) * 4
    return Prepared({"ours": one_by_one, "theirs": together}, moved)


def rpn_in_strips() -> Prepared:
    """
    The RPN head on a few rows of a map at a time, which needs little memory, against all of it.
    """
    head = make_lean(StandardRPNHead(in_channels=P2[0], num_anchors=3))
    x, num_rows = make_map(), 25

    def of_rows(first):
        # With a row more on either side, as the first convolution looks at it.
        before, after = min(first, 1), min(P2[1] - first - num_rows, 1)
        rows = x[:, :, first - before : first + num_rows + after].contiguous()
        outputs = [y[0] for y in head([rows])]
        return torch.cat(outputs, dim=1)[:, :, before : before + num_rows]

    return Prepared(
        {
            "ours": lambda: torch.cat([y[0] for y in head([x])], dim=1),
            "theirs": lambda: torch.cat([of_rows(y) for y in range(0, P2[1], num_rows)], dim=2),
        },
        x.numel() * x.element_size(),
        agreement=same_labels,
    )


def onednns_own_norm() -> Prepared:
    """
    oneDNN's norm of a map in its own layout, against a convolution of every channel for itself.
    """
    x = make_map().to_mkldnn()
    norm = FrozenBatchNorm2d(P2[0])
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    statistics = norm.running_mean, norm.running_var
    return Prepared(
        {
            "ours": lambda: frozen_norm_in_onednn(norm, x),
            "theirs": lambda: F.batch_norm(x, *statistics, norm.weight, norm.bias, eps=norm.eps),
        },
        2 * x.numel() * x.element_size(),
        agreement=lambda a, b: same_labels(a.to_dense(), b.to_dense()),
    )


def make_map() -> torch.Tensor:
    return torch.randn(1, *P2, generator=torch.Generator().manual_seed(0))
