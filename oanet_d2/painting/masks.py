"""
Instance masks that are known only inside a region of the image, which is where they can have pixels.
"""

from functools import cache
from typing import Callable, List, Sequence, Tuple

import numpy as np
import torch
from torch.nn import functional as F

from .arrays import Region

__all__ = ["BoxedMasks", "grid_size", "mask_extents", "paste_on_grid", "relative_boxes"]


class BoxedMasks:
    """
    The masks of N instances of one image. `masks[i]` is a (h, w) bool tensor and the region (rows,
    columns) of the image that it covers. The instance has no pixel elsewhere.

    Memory and time follow the regions, not N images.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        make: Callable[[int], torch.Tensor],
        image_size: Tuple[int, int],
        device: torch.device,
    ):
        """
        Args:
            regions: N regions.
            make: gives the (h, w) bool mask of an instance inside its region.
            image_size: (H, W).
            device: where the masks are.
        """
        self.regions = list(regions)
        self.image_size = image_size
        self.device = device
        self._make = make

    @classmethod
    def from_masks(cls, masks: torch.Tensor) -> "BoxedMasks":
        """The masks of any program, (N, H, W) bool."""
        masks = masks.bool()
        regions = _regions(mask_extents(masks))
        size = int(masks.shape[1]), int(masks.shape[2])
        return cls(regions, lambda i: masks[i][regions[i]], size, masks.device)

    @classmethod
    def paste(
        cls,
        roi_masks: torch.Tensor,
        boxes: torch.Tensor,
        image_size: Tuple[int, int],
        threshold: float = 0.5,
    ) -> "BoxedMasks":
        """
        What a mask head predicts, at the resolution of the image. Every mask is made when it is
        asked for. Pixel for pixel they are the masks that
        :func:`detectron2.layers.paste_masks_in_image` puts into N full images.

        Args:
            roi_masks: (N, M, M) float probabilities in [0, 1], relative to the boxes.
            boxes: (N, 4) float, XYXY in pixels, within the image.
            image_size: (H, W).
            threshold: a pixel belongs to an instance where the probability is at least this.
        """
        # Not in half precision: that has no room for the coordinates of a large image.
        roi_masks, boxes = roi_masks.float(), boxes.float()
        regions = _regions_of_roi_masks(roi_masks, boxes, image_size, threshold)
        # The centres of all pixels relative to the boxes: -1 to 1 from edge to edge.
        x, y = (
            (torch.arange(length, device=boxes.device) + 0.5 - first) / (last - first) * 2 - 1
            for length, first, last in zip(image_size[::-1], boxes.T[:2, :, None], boxes.T[2:, :, None])
        )

        def sample(i: int) -> torch.Tensor:
            rows, columns = regions[i]
            grid = torch.stack(torch.meshgrid(x[i, columns], y[i, rows], indexing="xy"), dim=2)
            # Every row is a sample of its own: F.grid_sample spreads samples over threads.
            masks = roi_masks[i].expand(len(grid), 1, -1, -1)
            with torch.autocast(roi_masks.device.type, enabled=False):
                sampled = F.grid_sample(masks, grid[:, None], align_corners=False)
            return sampled[:, 0, 0] >= threshold

        return cls(regions, sample, image_size, roi_masks.device)

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Region]:
        return self._make(index), self.regions[index]

    def select(self, indices: Sequence[int]) -> "BoxedMasks":
        """The masks of some instances; `indices` in [0, N) are a list or a tensor."""
        chosen = [int(i) for i in indices]
        regions = [self.regions[i] for i in chosen]
        return BoxedMasks(regions, lambda i: self._make(chosen[i]), self.image_size, self.device)

    def cached(self) -> "BoxedMasks":
        """The same masks, each made once, for who looks at them several times."""
        return BoxedMasks(self.regions, cache(self._make), self.image_size, self.device)

    def array(self, index: int) -> Tuple[np.ndarray, Region]:
        """As `masks[index]`, with the mask on the CPU as a NumPy array."""
        return self._make(index).cpu().numpy(), self.regions[index]

    def numpy(self) -> List[np.ndarray]:
        """Every mask inside its region."""
        return [self.array(i)[0] for i in range(len(self))]

    def full(self) -> torch.Tensor:
        """(N, H, W) bool, as Detectron2's evaluators want them."""
        full = torch.zeros((len(self), *self.image_size), dtype=torch.bool, device=self.device)
        for i, region in enumerate(self.regions):
            full[i][region] = self._make(i)
        return full


def paste_on_grid(
    roi_masks: torch.Tensor, boxes: torch.Tensor, size: Tuple[int, int]
) -> torch.Tensor:
    """
    What :meth:`BoxedMasks.paste` samples, for all instances at once: on a small grid that is faster.
    Half precision has no room for the coordinates, so autocast must be off.

    Args:
        roi_masks, boxes, size: see :meth:`BoxedMasks.paste`.

    Returns:
        (N, H, W) float probabilities.
    """
    cells = torch.arange(roi_masks.shape[-1], device=boxes.device)
    weights = []
    for length, axis in zip(size, (1, 0)):
        first, last = boxes[:, axis, None], boxes[:, axis + 2, None]
        centres = torch.arange(length, device=boxes.device) + 0.5
        positions = (centres - first) / (last - first) * len(cells) - 0.5
        # Bilinear interpolation treats rows and columns apart: (N, length, M) each.
        weights.append((1 - (positions[:, :, None] - cells).abs()).clamp(min=0))
    rows, columns = weights
    return rows @ roi_masks @ columns.transpose(1, 2)


def grid_size(image_size: Tuple[int, int], stride: int) -> Tuple[int, int]:
    """(h, w) of the grid that covers an image of `image_size` = (H, W) pixels."""
    # ONNX divides negative numbers otherwise.
    return (image_size[0] + stride - 1) // stride, (image_size[1] + stride - 1) // stride


def relative_boxes(boxes: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
    """
    Boxes (N, 4) in pixels as shares of the width and height of an image of `image_size` = (H, W).
    """
    height, width = image_size
    x, y = boxes[:, 0::2] / width, boxes[:, 1::2] / height
    return torch.stack([x, y], dim=2).flatten(1)


def _regions(boxes: torch.Tensor) -> List[Region]:
    return [(slice(y0, y1), slice(x0, x1)) for x0, y0, x1, y1 in boxes.tolist()]


def mask_extents(masks: torch.Tensor) -> torch.Tensor:
    """
    Args:
        masks: (N, h, w) bool.

    Returns:
        (N, 4) int64, XYXY of the smallest box around each mask. The box around an empty mask is
        the whole grid.
    """
    ones = masks.to(torch.uint8)  # PyTorch finds its maximum ten times as fast as any() of a bool
    occupied = ones.amax(1), ones.amax(2)  # (N, w), (N, h)
    first = [x.argmax(1) for x in occupied]
    last = [x.shape[1] - x.flip(1).argmax(1) for x in occupied]
    return torch.stack([*first, *last], dim=1)


def _regions_of_roi_masks(
    roi_masks: torch.Tensor, boxes: torch.Tensor, image_size: Tuple[int, int], threshold: float
) -> List[Region]:
    height, width = image_size
    size = boxes.new_tensor([width, height])
    box_first, box_last = boxes[:, :2], boxes[:, 2:]
    # A cell of the prediction reaches to the centres of its neighbours, so what lies between cells
    # below the threshold is below it too. The factor leaves room for rounding.
    extents = mask_extents(roi_masks >= 0.9999 * threshold).to(boxes)
    cell = (box_last - box_first) / roi_masks.shape[-1]
    first = box_first + cell * (extents[:, :2] - 0.5)
    last = box_first + cell * (extents[:, 2:] + 0.5)
    # Detectron2 samples one pixel around the box too.
    first = (first.maximum(box_first).floor() - 1).clamp(min=0)
    last = (last.minimum(box_last).ceil() + 1).minimum(size).maximum(first)
    # The host waits for the device here, once for all instances.
    return _regions(torch.cat([first, last], dim=1).long())
