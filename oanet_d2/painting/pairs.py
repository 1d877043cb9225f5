"""
The comparison of two instances that overlap: numbers that describe a pair, and a small network that
says from them which of the two is visible where they meet.
"""

from dataclasses import dataclass
from typing import List

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

__all__ = ["CLASS_NUMBERS", "GEOMETRY_NUMBERS", "PairNetwork", "Pairs", "appearance_means"]
__all__ += ["class_evidence", "geometry_evidence", "overlapping_pairs", "pair_margins"]

GEOMETRY_NUMBERS = 3 * 8 + 4  # 8 of each instance, see geometry_evidence
CLASS_NUMBERS = 6


@dataclass
class Pairs:
    """The P pairs of instances that share a cell."""

    a: torch.Tensor  # (P,) int64, index of the one, sorted
    b: torch.Tensor  # (P,) int64, index of the other, larger than a
    cells: torch.Tensor  # (P,) float, cells that the two share
    areas: torch.Tensor  # (N,) float, cells of every instance
    masks: torch.Tensor  # (N, h * w) float, zeros and ones

    def mean_over_parts(self, sums: torch.Tensor, in_overlap: torch.Tensor) -> List[torch.Tensor]:
        """
        (P, ...) means over the overlap, over a without b, and over b without a, from (2, P, ...) sums
        over the whole of a and of b, and (P, ...) sums over the overlap. A mean over no cell is 0.
        """
        trailing = (-1,) + (1,) * (in_overlap.dim() - 1)
        parts = [in_overlap / self.cells.view(trailing)]
        for total, i in zip(sums, (self.a, self.b)):
            left = (self.areas[i] - self.cells).view(trailing)
            # Without a cell left the difference is a rounding error, which still has a direction.
            parts.append((total - in_overlap) / left.clamp(min=1) * (left > 0))
        return parts


def overlapping_pairs(masks: torch.Tensor) -> Pairs:
    """The pairs of (N, h, w) bool masks."""
    flat = masks.flatten(1).float()
    shared = flat @ flat.t()  # counts, exact in single precision up to 2**24
    a, b = torch.nonzero(torch.triu(shared, diagonal=1), as_tuple=True)
    return Pairs(a, b, shared[a, b], shared.diagonal(), flat)


def geometry_evidence(
    classes: torch.Tensor, scores: torch.Tensor, boxes: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """
    Where the two instances lie. An instance is described by its box corners, box width and height,
    the square root of its share of the image, and its detection score.

    Args:
        classes: (N,) int64.
        scores: (N,) float in [0, 1].
        boxes: (N, 4) float, XYXY as shares of the image's width and height.

    Returns:
        (P, 2, GEOMETRY_NUMBERS) float, seen from a and from b: the one, the other, their difference
        in units of the two heights, the share of each that the other covers, the size of the
        overlap, and whether the two are of one class.
    """
    cells = pairs.masks.shape[1]
    sizes = boxes[:, 2:] - boxes[:, :2]
    size = (pairs.areas / cells).sqrt()
    instances = torch.cat([boxes, sizes, size[:, None], scores[:, None]], dim=1)
    overlap = (pairs.cells / cells).sqrt()
    same = (classes[pairs.a] == classes[pairs.b]).float()
    sides = []
    for one, other in ((pairs.a, pairs.b), (pairs.b, pairs.a)):
        heights = (sizes[one, 1] + sizes[other, 1]).clamp(min=1e-6)[:, None]
        difference = (instances[one] - instances[other]) / heights
        covered = [pairs.cells / pairs.areas[i] for i in (one, other)]
        numbers = torch.stack([*covered, overlap, same], dim=1)
        sides.append(torch.cat([instances[one], instances[other], difference, numbers], dim=1))
    return torch.stack(sides, dim=1)


def class_evidence(class_map: torch.Tensor, classes: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """
    What a map of the thing classes says about the two classes, over the overlap and over the rest of
    each instance.

    Args:
        class_map: (C, h, w) float, a score for every thing class in every cell.
        classes: (N,) int64.

    Returns:
        (P, 2, CLASS_NUMBERS) float, seen from a and from b.
    """
    flat = class_map.flatten(1)
    by_class = pairs.masks @ flat.t()  # (N, C): the sum of every class over an instance
    meeting = (pairs.masks * flat[classes]) @ pairs.masks.t()  # [i, j]: class of i over i and j
    parts = []
    for whose, other in ((pairs.a, pairs.b), (pairs.b, pairs.a)):
        sums = torch.stack([by_class[i, classes[whose]] for i in (pairs.a, pairs.b)])
        parts.append(pairs.mean_over_parts(sums, meeting[whose, other]))
    (in_a, a_in_a, a_in_b), (in_b, b_in_a, b_in_b) = parts
    from_a = torch.stack([in_a, in_b, a_in_a, a_in_b, b_in_a, b_in_b], dim=1)
    from_b = torch.stack([in_b, in_a, b_in_b, b_in_a, a_in_b, a_in_a], dim=1)
    return torch.stack([from_a, from_b], dim=1)


def appearance_means(features: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """
    What the parts of every pair look like.

    Args:
        features: (D, h, w) float.

    Returns:
        (P, 3, D): the mean feature of the overlap, of a without b, and of b without a. A mean over no
        cell is 0.
    """
    by_cell = features.flatten(1).t().contiguous()
    whole, in_overlap = [by_cell[:0]], [by_cell[:0]]
    # One instance at a time, and only its own cells: P masks of the whole grid would be large.
    cells = pairs.masks.nonzero()[:, 1].split(pairs.areas.long().tolist())
    others = pairs.b.split(torch.bincount(pairs.a, minlength=len(cells)).tolist())
    for own, b in zip(cells, others):
        rows = by_cell[own]
        whole.append(rows.sum(0, keepdim=True))
        in_overlap.append(pairs.masks[b][:, own] @ rows)
    totals = torch.cat(whole)
    sums = torch.stack([totals[pairs.a], totals[pairs.b]])
    return torch.stack(pairs.mean_over_parts(sums, torch.cat(in_overlap)), dim=1)


class PairNetwork(nn.Module):
    """
    Says about two instances that overlap which is visible where they meet. The answer is
    antisymmetric by construction: logit(a, b) = f(a, b) - f(b, a).
    """

    def __init__(self, num_classes: int, num_numbers: int, num_channels: int):
        """
        Args:
            num_classes: number of thing classes.
            num_numbers, num_channels: F and D of :meth:`forward`.
        """
        super().__init__()
        embed_dim, feature_dim, hidden_dim = 16, 64, 128
        self.class_embedding = nn.Embedding(num_classes, embed_dim)
        dim = 2 * embed_dim + num_numbers
        if num_channels > 0:
            # Without a bias, so that the 0 of a part without a cell stays 0.
            self.projection = nn.Linear(num_channels, feature_dim, bias=False)
            dim += 4 * feature_dim + 3
        self.norm = PairNorm(dim)
        self.compare = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1, bias=False),  # a bias would cancel in f(a, b) - f(b, a)
        )

    def forward(
        self, classes: torch.Tensor, numbers: torch.Tensor, means: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            classes: (P, 2) int64, of a and of b.
            numbers: (P, 2, F) float, the evidence as seen from a, and as seen from b.
            means: (P, 3, D) float, see :func:`appearance_means`. D may be 0.

        Returns:
            (P,) float logits, positive where a goes before b.
        """
        embedded = self.class_embedding(classes)
        seen_from_a = [embedded.flatten(1), numbers[:, 0]]
        seen_from_b = [embedded.flip(1).flatten(1), numbers[:, 1]]
        if means.shape[-1] > 0:
            overlap, alone_a, alone_b = self.projection(means).unbind(1)
            seen_from_a.append(_likeness(overlap, alone_a, alone_b))
            seen_from_b.append(_likeness(overlap, alone_b, alone_a))
        sides = torch.stack([torch.cat(x, dim=1) for x in (seen_from_a, seen_from_b)])
        # One side at a time: numbers that are the same from both sides then cancel exactly.
        from_a, from_b = (self.compare(side)[:, 0] for side in self.norm(sides))
        return from_a - from_b


class PairNorm(nn.Module):
    """
    Brings every number about a pair to mean 0 and variance 1, by running statistics, in training
    too, because a batch may hold one pair, or none. All processes share the statistics.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    momentum = 0.1  # weight of the newest batch
    # Added to the variance. A number that never changed in training (the score of ground truth) may
    # change later; with this eps it is enlarged by 32 at most.
    eps = 1e-3

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._update(x.detach().flatten(0, -2))
        return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()

    def _update(self, rows: torch.Tensor) -> None:
        # Squares of differences from the old mean stay small, as single precision needs it.
        rows = rows - self.running_mean
        moments = torch.cat([rows.new_full((1,), len(rows)), rows.sum(0), rows.square().sum(0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)  # every process gets here in every step, with rows or without
        count, total, squares = moments.split([1, rows.shape[1], rows.shape[1]])
        shift = total / count.clamp(min=1)
        variance = (squares - total * shift) / (count - 1).clamp(min=1)
        share = self.momentum * (count > 1)
        self.running_mean += share * shift
        self.running_var += share * (variance - self.running_var)


def pair_margins(pairs: Pairs, logits: torch.Tensor) -> torch.Tensor:
    """
    What :func:`oanet_d2.painting.order_from_margins` takes, from the answers of :class:`PairNetwork`.

    Args:
        logits: (P,) float.

    Returns:
        (N, N) antisymmetric float: the cells that a and b share, times P(a before b) - P(b before a).
    """
    number = pairs.areas.shape[0]
    margins = pairs.areas.new_zeros(number, number)
    margins[pairs.a, pairs.b] = torch.tanh(logits / 2) * pairs.cells
    return margins - margins.t()


def _likeness(overlap: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    Whether the overlap looks like the rest of the one instance or like the rest of the other: products
    and absolute differences by channel, and the cosines between the three.
    """
    products = [overlap * one, overlap * other]
    differences = [(overlap - one).abs(), (overlap - other).abs()]
    cosines = [
        F.cosine_similarity(x, y, dim=1)[:, None]
        for x, y in ((overlap, one), (overlap, other), (one, other))
    ]
    return torch.cat([*products, *differences, *cosines], dim=1)
