"""
What can be said of two instances that overlap: where each lies, what class the image shows in
their overlap, and whether the overlap looks like the rest of the one or of the other. Numbers for
:class:`PairNetwork` to learn from; no rule is written here.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Dict, List, Tuple

import torch
from torch.nn import functional as F

from .candidates import Candidates

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


def geometry(candidates: Candidates, areas: torch.Tensor) -> torch.Tensor:
    """
    Args:
        areas: (N,) float, cells of every instance.

    Returns:
        (N, GEOMETRY_DIM): box corners, box width and height, the square root of the mask's share
        of the grid, and the detection score.
    """
    share = areas / (candidates.masks.shape[1] * candidates.masks.shape[2])
    sizes = candidates.boxes[:, 2:] - candidates.boxes[:, :2]
    numbers = [candidates.boxes, sizes, share.sqrt()[:, None], candidates.scores[:, None]]
    return torch.cat(numbers, dim=1)


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

    @cached_property
    def overlaps(self) -> List[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        The overlaps by their first instance, which are N: (n,) int64, the cells of that instance; (k,)
        int64, the second ones; and (k, n) float, where each of those has the cells too. The host waits
        for the device twice, however many there are.
        """
        cells = self.masks.nonzero()[:, 1].split(self.areas.long().tolist())
        # The pairs are in the order of their first instance.
        others = self.b.split(torch.bincount(self.a, minlength=len(cells)).tolist())
        return [(x, b, self.masks[b[:, None], x]) for x, b in zip(cells, others)]

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
    of_each = geometry(candidates, pairs.areas)
    heights = candidates.boxes[:, 3] - candidates.boxes[:, 1]
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
    has for itself.

    Args:
        class_map: (C, h, w) float, a score for every thing class in every cell.
        classes: (N,) int64.

    Returns:
        "ab" and "ba", (P, CLASS_EVIDENCE_DIM) each.
    """
    flat = class_map.flatten(1)
    shown = pairs.masks @ flat.t()  # (N, C): every class, summed over the cells of an instance
    met = [flat.new_zeros(2, 0)]  # the classes of the first and of the second, over the overlap
    for i, (cells, others, shared) in enumerate(pairs.overlaps):
        of_first, of_second = (flat[classes[x][:, None], cells] for x in (slice(i, i + 1), others))
        met.append(torch.stack([(shared * x).sum(1) for x in (of_first, of_second)]))
    parts_of_class = []
    for whose, meeting in zip((pairs.a, pairs.b), torch.cat(met, dim=1)):
        sums = torch.stack([shown[x, classes[whose]] for x in (pairs.a, pairs.b)])
        parts_of_class.append(pairs.mean_over_parts(sums, meeting))
    (in_a, a_in_a, a_in_b), (in_b, b_in_a, b_in_b) = parts_of_class
    return {
        "ab": torch.stack([in_a, in_b, a_in_a, a_in_b, b_in_a, b_in_b], dim=1),
        "ba": torch.stack([in_b, in_a, b_in_b, b_in_a, a_in_b, a_in_a], dim=1),
    }


def appearance_means(features: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """
    What the parts of every pair look like.

    Args:
        features: (D, h, w) float.

    Returns:
        (P, 3, D): the mean feature of the overlap, of a without b, and of b without a; 0 where there
        is no such cell.
    """
    by_cell = features.flatten(1).t().contiguous()
    whole, overlaps = [features.new_zeros(0, len(features))], [features.new_zeros(0, len(features))]
    for cells, _, shared in pairs.overlaps:
        everywhere = shared.new_ones(1, len(cells))
        sums = torch.cat([everywhere, shared]) @ by_cell[cells]
        whole.append(sums[:1])
        overlaps.append(sums[1:])
    of_all = torch.cat(whole)
    sums = torch.stack([of_all[pairs.a], of_all[pairs.b]])
    return torch.stack(pairs.mean_over_parts(sums, torch.cat(overlaps)), dim=1)


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
