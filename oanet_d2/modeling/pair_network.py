"""
The network that compares two instances: what is known of a pair in, who is visible out.
"""

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.utils import comm

from .pair_evidence import appearance_evidence

__all__ = ["DescribedPairs", "PairNetwork", "PairNorm"]


@dataclass
class DescribedPairs:
    """
    All that is known of P pairs of instances (a, b), without anything that is learned.

    Attributes:
        classes: (P, 2) int64, of a and of b.
        numbers: (P, 2, F) float, what is said of the pair as seen from a, and as seen from b.
        means: (P, 3, D) float, see :func:`appearance_means`.
    """

    classes: torch.Tensor
    numbers: torch.Tensor
    means: torch.Tensor

    def __len__(self) -> int:
        return len(self.classes)

    @staticmethod
    def cat(parts: Sequence["DescribedPairs"]) -> "DescribedPairs":
        """
        One after the other.
        """
        return DescribedPairs(
            torch.cat([x.classes for x in parts]),
            torch.cat([x.numbers for x in parts]),
            torch.cat([x.means for x in parts]),
        )


class PairNorm(nn.BatchNorm1d):
    """
    Brings every number that is said of a pair to mean 0 and variance 1. By running statistics, in
    training too: a batch may hold one pair, or none.
    """

    def __init__(self, dim: int):
        # A number that never changed in training (the score of ground truth) may do so later: with
        # this epsilon it counts at most 32 times.
        super().__init__(dim, eps=1e-3, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (..., dim) float.
        """
        rows = x.flatten(0, -2)
        if self.training:
            self._remember(rows.detach().double())
        rows = F.batch_norm(rows, self.running_mean, self.running_var, eps=self.eps)
        return rows.view_as(x)

    def _remember(self, rows: torch.Tensor) -> None:
        """
        Bring mean and variance up to date, as :class:`nn.BatchNorm1d` does it, by the rows of all
        processes: a checkpoint holds the statistics of one. (Every process comes here in every
        step, with rows or without.)
        """
        count = rows.new_full((1,), len(rows))
        moments = torch.cat([count, rows.sum(0), rows.square().sum(0)])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(moments)
        count, total, squares = moments.split([1, self.num_features, self.num_features])
        mean = total / count.clamp(min=1)
        variance = (squares - total * mean) / (count - 1).clamp(min=1)
        share = self.momentum * (count > 1)
        for statistic, now in ((self.running_mean, mean), (self.running_var, variance)):
            assert statistic is not None
            statistic += share * (now - statistic)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1


class PairNetwork(nn.Module):
    """
    Says of two instances that overlap which is visible where they meet. The answer is antisymmetric
    by construction: logit(a, b) = f(a, b) - f(b, a).
    """

    def __init__(
        self,
        num_classes: int,
        numbers_dim: int,
        means_dim: int,
        *,
        embed_dim: int,
        feature_dim: int,
        hidden_dim: int,
        dropout: float,
    ):
        """
        Args:
            num_classes: number of thing classes.
            numbers_dim, means_dim: F and D of :class:`DescribedPairs`.
            embed_dim: numbers that stand for a class.
            feature_dim: numbers that the D of a mean feature are projected to.
            hidden_dim: width of the two hidden layers.
            dropout: share of the hidden layers' numbers that is dropped in training.
        """
        super().__init__()
        self.class_embedding = nn.Embedding(num_classes, embed_dim)
        dim = 2 * embed_dim + numbers_dim
        if means_dim > 0:
            # No bias: nothing (0, where a part has no cell) stays nothing.
            self.projection = nn.Linear(means_dim, feature_dim, bias=False)
            dim += 4 * feature_dim + 3
        self.norm = PairNorm(dim)
        self.compare = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, 1, bias=False),  # a bias would cancel in f(a, b) - f(b, a)
        )

    def forward(self, pairs: DescribedPairs) -> torch.Tensor:
        """
        Returns:
            (P,) float logits: over 0 where a goes before b.
        """
        classes = self.class_embedding(pairs.classes)
        seen_from_a = [classes.flatten(1), pairs.numbers[:, 0]]
        seen_from_b = [classes.flip(1).flatten(1), pairs.numbers[:, 1]]
        if pairs.means.shape[-1] > 0:
            appearance = appearance_evidence(self.projection(pairs.means))
            seen_from_a.append(appearance["ab"])
            seen_from_b.append(appearance["ba"])
        sides = torch.stack([torch.cat(x, dim=1) for x in (seen_from_a, seen_from_b)])
        # One side at a time: what is the same from both is then the same to the bit.
        from_a, from_b = (self.compare(side)[:, 0] for side in self.norm(sides))
        return from_a - from_b
