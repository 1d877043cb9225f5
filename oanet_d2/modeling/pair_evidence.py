"""
What can be said of two instances that overlap: where each lies, what class the image shows in
their overlap, and whether the overlap looks like the rest of the one or of the other. Numbers for
:class:`PairNetwork` to learn from; no rule is written here.
"""

from dataclasses import dataclass
from typing import Dict, List

import torch
from torch.nn import functional as F

from .candidates import Candidates
from .instance_masks import mask_extents

__all__ = [
    "Pairs",
    "appearance_evidence",
    "appearance_means",
    "class_evidence",
    "geometry_evidence",
    "overlapping_pairs",
]

GEOMETRY_DIM = 8  # numbers per instance, see geometry()
PAIR_GEOMETRY_DIM = 3 * GEOMETRY_DIM + 4
CLASS_EVIDENCE_DIM = 6


def geometry(candidates: Candidates) -> torch.Tensor:
    """
    Returns:
        (N, GEOMETRY_DIM): box corners, box width and height, the square root of the mask's share
        of the grid, and the detection score.
    """
    area = candidates.masks.flatten(1).float().mean(1, keepdim=True).sqrt()
    sizes = candidates.boxes[:, 2:] - candidates.boxes[:, :2]
    return torch.cat([candidates.boxes, sizes, area, candidates.scores[:, None]], dim=1)


@dataclass
class Pairs:
    """
    The P pairs of instances that share a cell.

    Attributes:
        a, b: (P,) int64, indices of the two, a < b.
        cells: (P,) float, cells that the two share.
        areas: (N,) float, cells of every instance.
        masks: (N, h * w) float, zeros and ones.
    """

    a: torch.Tensor
    b: torch.Tensor
    cells: torch.Tensor
    areas: torch.Tensor
    masks: torch.Tensor

    def mean_over_parts(self, sums: torch.Tensor, in_overlap: torch.Tensor) -> List[torch.Tensor]:
        """
        Split sums over whole instances into means over the parts of every pair.

        Args:
            sums: (2, P, ...) sums over the whole of a and the whole of b.
            in_overlap: (P, ...) sums over the cells that the two share.

        Returns:
            (P, ...) means over the overlap, over a without b, and over b without a (0 where
            there is no such cell).
        """
        trailing = (-1,) + (1,) * (in_overlap.dim() - 1)
        parts = [in_overlap / self.cells.view(trailing)]
        for total, i in zip(sums, (self.a, self.b)):
            left = (self.areas[i] - self.cells).view(trailing)
            # Where nothing is left the difference is rounding error, which has a direction.
            parts.append((total - in_overlap) / left.clamp(min=1) * (left > 0))
        return parts


def overlapping_pairs(masks: torch.Tensor) -> Pairs:
    """
    Args:
        masks: (N, h, w) bool.
    """
    # Cells are counted: exact in single precision up to 2**24 of them, not in half.
    with torch.autocast(masks.device.type, enabled=False):
        flat = masks.flatten(1).float()
        shared = flat @ flat.t()
    a, b = torch.nonzero(torch.triu(shared, diagonal=1), as_tuple=True)
    return Pairs(a, b, shared[a, b], shared.diagonal(), flat)


def geometry_evidence(candidates: Candidates, pairs: Pairs) -> Dict[str, torch.Tensor]:
    """
    Where the two lie.

    Returns:
        "ab" and "ba", (P, PAIR_GEOMETRY_DIM) each, seen from a and from b: the geometry of the
        one, of the other, their difference in units of the two heights, the share of each that
        the other covers, the size of the overlap, and whether they are of one class.
    """
    of_each, heights = geometry(candidates), candidates.boxes[:, 3] - candidates.boxes[:, 1]
    size = (pairs.cells / pairs.masks.shape[1]).sqrt()
    same = (candidates.classes[pairs.a] == candidates.classes[pairs.b]).float()

    def seen_from(one, other):
        scale = (heights[one] + heights[other]).clamp(min=1e-6)[:, None]
        shares = [pairs.cells / pairs.areas[i] for i in (one, other)]
        difference = (of_each[one] - of_each[other]) / scale
        numbers = torch.stack([*shares, size, same], dim=1)
        return torch.cat([of_each[one], of_each[other], difference, numbers], dim=1)

    return {"ab": seen_from(pairs.a, pairs.b), "ba": seen_from(pairs.b, pairs.a)}


def class_evidence(
    class_map: torch.Tensor, classes: torch.Tensor, pairs: Pairs
) -> Dict[str, torch.Tensor]:
    """
    What a map of the thing classes says of the two classes, over the overlap and over what each
    has for itself. N x N matrix products, however many the pairs.

    Args:
        class_map: (C, h, w) float, a score for every thing class in every cell.
        classes: (N,) int64.

    Returns:
        "ab" and "ba", (P, CLASS_EVIDENCE_DIM) each.
    """
    own = class_map[classes].flatten(1)  # (N, h * w)
    # shown[i, j]: the class of i, summed over the cells of j; meeting[i, j]: over those of both
    shown = own @ pairs.masks.t()
    meeting = (own * pairs.masks) @ pairs.masks.t()
    a, b = pairs.a, pairs.b
    parts_of_class = {}
    for name, cls, other in (("a", a, b), ("b", b, a)):
        sums = torch.stack([shown[cls, a], shown[cls, b]])
        parts_of_class[name] = pairs.mean_over_parts(sums, meeting[cls, other])
    (in_a, a_in_a, a_in_b), (in_b, b_in_a, b_in_b) = parts_of_class["a"], parts_of_class["b"]
    return {
        "ab": torch.stack([in_a, in_b, a_in_a, a_in_b, b_in_a, b_in_b], dim=1),
        "ba": torch.stack([in_b, in_a, b_in_b, b_in_a, a_in_b, a_in_a], dim=1),
    }


def _sums_over_overlaps(features: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """
    Sum a feature map over the cells that each pair shares. An overlap lies within the extent of its
    first instance, and only there is it looked for.

    Args:
        features: (D, h, w) float.

    Returns:
        (P, D) float.
    """
    masks = pairs.masks.unflatten(1, features.shape[1:])
    channels_last = features.permute(1, 2, 0).contiguous()
    extents = mask_extents(masks > 0).tolist()
    # The pairs are in the order of their first instance.
    others = pairs.b.split(torch.bincount(pairs.a, minlength=len(masks)).tolist())
    sums = [features.new_zeros(0, len(features))]
    for mask, (left, top, right, bottom), b in zip(masks, extents, others):
        if len(b) == 0:
            continue
        cells = slice(top, bottom), slice(left, right)
        shared = masks[:, cells[0], cells[1]][b] * mask[cells]
        sums.append(shared.flatten(1) @ channels_last[cells].flatten(0, 1))
    return torch.cat(sums)


def appearance_means(features: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """
    What the parts of every pair look like.

    Args:
        features: (D, h, w) float.

    Returns:
        (P, 3, D): the mean feature of the overlap, of a without b, and of b without a; 0 where there
        is no such cell.
    """
    whole = pairs.masks @ features.flatten(1).t()  # (N, D)
    sums = torch.stack([whole[pairs.a], whole[pairs.b]])
    return torch.stack(pairs.mean_over_parts(sums, _sums_over_overlaps(features, pairs)), dim=1)


def appearance_evidence(means: torch.Tensor) -> Dict[str, torch.Tensor]:
    """
    Whether the overlap looks like the rest of the one or like the rest of the other.

    Args:
        means: (P, 3, D) float, see :func:`appearance_means`, or a linear map of them.

    Returns:
        "ab" and "ba", (P, 4 * D + 3) each: elementwise products of the mean feature of the
        overlap with those of what each has for itself, the absolute differences, and the three
        cosines between the means.
    """
    overlap, alone_a, alone_b = means.unbind(1)
    like_a, unlike_a = overlap * alone_a, (overlap - alone_a).abs()
    like_b, unlike_b = overlap * alone_b, (overlap - alone_b).abs()
    cosine_a, cosine_b, cosine = (
        F.cosine_similarity(x, y, dim=1)[:, None]
        for x, y in ((overlap, alone_a), (overlap, alone_b), (alone_a, alone_b))
    )
    return {
        "ab": torch.cat([like_a, like_b, unlike_a, unlike_b, cosine_a, cosine_b, cosine], dim=1),
        "ba": torch.cat([like_b, like_a, unlike_b, unlike_a, cosine_b, cosine_a, cosine], dim=1),
    }
