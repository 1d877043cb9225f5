"""
Instances against the panoptic ground truth: which segment each instance is, and who is visible where
two instances overlap.
"""

from typing import Dict, List, Union

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .masks import BoxedMasks, Region

__all__ = ["margins_of_true_pairs", "match_to_segments", "overlapping_regions", "visible_margins"]

# (N, h, w) bool suits the small grids of training, on any device. Boxed masks suit full images.
Masks = Union[BoxedMasks, torch.Tensor]


def match_to_segments(
    masks: Masks, classes: torch.Tensor, ids: torch.Tensor, segments_info: List[Dict]
) -> torch.Tensor:
    """
    Assign instances to ground-truth segments of their class, one to one, so that the sum of the IoUs
    is greatest. (One to one matters: the whole silhouette of a person in the background may overlap
    the person in front more than its own visible rest.)

    A crowd stands for any number of instances: an instance without a segment belongs to a crowd of
    its class if more than half of its pixels show that crowd, as panopticapi decides it.

    Args:
        masks: N masks, as (N, H, W) bool or boxed.
        classes: (N,) int64, contiguous thing classes.
        ids: (H, W) integer, ground-truth segment ids.
        segments_info: the ground truth's segments, "category_id" contiguous.

    Returns:
        (N,) int64 on ids' device: the id of the matched segment, -1 for an instance without one.
    """
    things = [s for s in segments_info if s["isthing"]]
    segment_ids = torch.tensor([s["id"] for s in things], dtype=torch.int64)
    same_class = classes.cpu()[:, None] == torch.tensor([s["category_id"] for s in things])
    crowd = torch.tensor([bool(s.get("iscrowd", 0)) for s in things], dtype=torch.bool)
    areas, segment_areas, inside = _count(masks, ids, segment_ids)
    inside = inside * same_class
    iou = inside / (areas[:, None] + segment_areas - inside).clamp(min=1) * ~crowd
    matched = torch.full((len(masks),), -1, dtype=torch.int64)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(iou.numpy(), maximize=True))
    found = iou[rows, columns] > 0
    matched[rows[found]] = segment_ids[columns[found]]
    if crowd.any():
        share, best = (inside * crowd / areas.clamp(min=1)[:, None]).max(dim=1)
        in_crowd = (matched < 0) & (share > 0.5)
        matched[in_crowd] = segment_ids[best[in_crowd]]
    return matched.to(ids.device)


def visible_margins(masks: Masks, matched: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """
    Who is visible where two instances meet, by the ground truth. An instance without a segment is
    visible nowhere.

    Args:
        masks: N masks, as (N, H, W) bool or boxed.
        matched: (N,) int64 from :func:`match_to_segments`.
        ids: (H, W) integer, ground-truth segment ids.

    Returns:
        (N, N) antisymmetric float on ids' device: the pixels of the overlap of a and b that show a,
        minus those that show b. :func:`order_from_margins` makes of them the oracle's order, an upper
        bound for any rule.
    """
    if isinstance(masks, BoxedMasks):
        # NumPy, because PyTorch's overhead is most of the time of such small operations.
        margins = np.zeros((len(masks), len(masks)), dtype=np.float32)
        boxed, truth = masks.numpy(), ids.cpu().numpy()
        visible = [
            (truth[region] == i) & mask
            for mask, region, i in zip(boxed, masks.regions, matched.tolist())
        ]
        for a, b, in_a, in_b in overlapping_regions(masks.regions):
            shows_a = np.count_nonzero(visible[a][in_a] & boxed[b][in_b])
            shows_b = np.count_nonzero(visible[b][in_b] & boxed[a][in_a])
            margins[a, b], margins[b, a] = shows_a - shows_b, shows_b - shows_a
        return torch.from_numpy(margins).to(ids.device)
    m = masks.flatten(1)
    own = m & (ids.flatten() == matched[:, None])
    # Counts are exact in single precision up to 2**24, far beyond a grid, but not in half precision.
    with torch.autocast(m.device.type, enabled=False):
        shown = own.float() @ m.float().t()
    return shown - shown.t()


def margins_of_true_pairs(
    margins: torch.Tensor, matched: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """
    What the oracle would know if it could not tell which instances are false.

    Args:
        margins: (N, N) from :func:`visible_margins`.
        matched: (N,) int64 from :func:`match_to_segments`.
        order: (N,) int64, a permutation; it decides the pairs with an instance that matches nothing.

    Returns:
        (N, N) antisymmetric float for :func:`order_from_margins`.
    """
    place, true = order.argsort(), matched >= 0
    in_order = torch.sign(place - place[:, None]) * margins.abs()
    return torch.where(true & true[:, None], margins, in_order)


def _count(masks: Masks, ids: torch.Tensor, segment_ids: torch.Tensor):
    """Pixels of every mask (N,), of every segment (S,), and of both (N, S), as floats on the CPU."""
    if not isinstance(masks, BoxedMasks):
        with torch.autocast(masks.device.type, enabled=False):
            m = masks.flatten(1).float()
            segments = (ids.flatten() == segment_ids.to(ids.device)[:, None]).float()
            return m.sum(1).cpu(), segments.sum(1).cpu(), (m @ segments.t()).cpu()
    # Ids become columns, and other ids one more column, so that a histogram counts all segments.
    number = len(segment_ids)
    known, column = torch.cat([segment_ids, torch.tensor([-1])]).to(ids.device).sort()
    # Neighbours mostly have one id, so there are far fewer runs to look up than pixels.
    runs, lengths = torch.unique_consecutive(ids.long(), return_counts=True)
    place = torch.searchsorted(known, runs, right=True) - 1
    of_runs = column[place].masked_fill(known[place] != runs, number)
    columns = of_runs.repeat_interleave(lengths).view(ids.shape)
    areas, shared = torch.zeros(len(masks)), torch.zeros(len(masks), number)
    for n in range(len(masks)):
        mask, region = masks[n]
        areas[n] = mask.count_nonzero()
        shared[n] = columns[region][mask].bincount(minlength=number + 1)[:number]
    segment_areas = lengths.new_zeros(number + 1).index_add_(0, of_runs, lengths)[:number]
    return areas, segment_areas.cpu().float(), shared


def overlapping_regions(regions: List[Region]):
    """Yields two instances a < b whose regions overlap, and the overlap relative to each region."""
    edges = np.array([(r.start, c.start, r.stop, c.stop) for r, c in regions]).reshape(-1, 4)
    starts = np.maximum(edges[:, None, :2], edges[:, :2])
    stops = np.minimum(edges[:, None, 2:], edges[:, 2:])
    a, b = np.nonzero(np.triu((starts < stops).all(axis=2), 1))
    overlap = np.concatenate([starts[a, b], stops[a, b]], axis=1)
    relative = [(overlap - np.tile(edges[i, :2], 2)).tolist() for i in (a, b)]
    for i, j, in_a, in_b in zip(a.tolist(), b.tolist(), *relative):
        yield i, j, *((slice(x[0], x[2]), slice(x[1], x[3])) for x in (in_a, in_b))
