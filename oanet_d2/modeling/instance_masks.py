from typing import Sequence, Tuple

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ["BoxedMasks", "as_ones", "mask_extents"]


def as_ones(masks: torch.Tensor) -> torch.Tensor:
    """
    Bool as uint8, of which PyTorch finds the maximum ten times faster than any().
    """
    # The tracer, with which Detectron2's analyze_model.py counts operations, knows no view of a type.
    return masks.to(torch.uint8) if torch.jit.is_tracing() else masks.view(torch.uint8)


def mask_extents(masks: torch.Tensor) -> torch.Tensor:
    """
    Args:
        masks: (N, h, w) bool.

    Returns:
        (N, 4) int64: XYXY of the smallest box around each, in cells; of an empty one the whole grid.
    """
    edges = []
    ones = as_ones(masks)
    for occupied in (ones.amax(1), ones.amax(2)):  # (N, w), (N, h)
        first = occupied.argmax(1)
        edges.append((first, occupied.shape[1] - occupied.flip(1).argmax(1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1)


class BoxedMasks:
    """
    The masks of N instances at the resolution of the image, each made when it is asked for and only
    where it can be: in its box. Pixel for pixel they are what
    :func:`detectron2.layers.paste_masks_in_image` puts into N full images.
    """

    def __init__(
        self,
        roi_masks: torch.Tensor,
        boxes: torch.Tensor,
        image_size: Tuple[int, int],
        threshold: float = 0.5,
    ):
        """
        Args:
            roi_masks: (N, M, M) float probabilities in [0, 1], relative to the boxes.
            boxes: (N, 4) float, XYXY in pixels, within the image.
            image_size: (H, W).
            threshold: a pixel belongs to an instance where the probability is at least this.
        """
        self.roi_masks = roi_masks.float()
        self.boxes = boxes
        self.image_size = image_size
        self.threshold = threshold
        # The one time that the host waits for the device, however many instances there are.
        self._regions = self._regions_of_masks().tolist()
        regions = np.array(self._regions, dtype=np.int64).reshape(-1, 4)
        self._x, self._y = (self._relative_centers(regions, axis) for axis in (0, 1))

    def _relative_centers(self, regions: np.ndarray, axis: int) -> Sequence[torch.Tensor]:
        """
        Where the centres of pixels lie in the boxes, -1 to 1 from edge to edge: for every instance
        those of the columns (axis 0) or rows (1) of its region. All at once, for there may be many.
        """
        sizes = regions[:, axis + 2] - regions[:, axis]
        # Pixels 0, 1, ... of each region, one region after the other, and whose they are.
        owner = np.repeat(np.arange(len(regions)), sizes)
        pixel = np.arange(len(owner)) - (sizes.cumsum() - sizes - regions[:, axis])[owner]
        of_instance, of_pixel = (torch.from_numpy(x).to(self.boxes.device) for x in (owner, pixel))
        first, last = (self.boxes[:, i][of_instance] for i in (axis, axis + 2))
        centers = (of_pixel.float() + 0.5 - first) / (last - first) * 2 - 1
        return centers.split(sizes.tolist())

    def _regions_of_masks(self) -> torch.Tensor:
        """
        Returns:
            (N, 4) int32, XYXY in pixels: what of the image can belong to each instance.
        """
        height, width = self.image_size
        size = self.boxes.new_tensor([width, height])
        box_first, box_last = self.boxes[:, :2], self.boxes[:, 2:]
        # A cell reaches to the centres of its neighbours. What lies between cells that are all
        # below the threshold is below it too; a bit of it is for rounding.
        extents = mask_extents(self.roi_masks >= 0.9999 * self.threshold).to(self.boxes)
        cell = (box_last - box_first) / self.roi_masks.shape[-1]
        first = box_first + cell * (extents[:, :2] - 0.5)
        last = box_first + cell * (extents[:, 2:] + 0.5)
        # One pixel around the box, as Detectron2 has it.
        first = first.maximum(box_first).floor() - 1
        last = last.minimum(box_last).ceil() + 1
        first = first.clamp(min=0)
        return torch.cat([first, last.minimum(size).maximum(first)], dim=1).int()

    def __len__(self) -> int:
        return len(self.roi_masks)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Tuple[slice, slice]]:
        """
        Returns:
            (h, w) bool mask, and the rows and columns of the image that it covers; the instance has
            no pixel elsewhere.
        """
        left, top, right, bottom = self._regions[index]
        region = slice(top, bottom), slice(left, right)
        x, y = self._x[index], self._y[index][:, None]
        shape = bottom - top, right - left
        # x and y beside each other, made in one pass
        grid = torch.view_as_real(torch.complex(x.expand(shape), y.expand(shape)))
        # Every row is a sample of its own: F.grid_sample spreads samples over threads.
        rows = self.roi_masks[index].expand(shape[0], 1, -1, -1)
        sampled = F.grid_sample(rows, grid[:, None], align_corners=False)
        return sampled[:, 0, 0] >= self.threshold, region

    def full(self) -> torch.Tensor:
        """
        Returns:
            (N, H, W) bool, as Detectron2's evaluators want them.
        """
        full = self.roi_masks.new_zeros((len(self), *self.image_size), dtype=torch.bool)
        for index, of_image in enumerate(full):
            mask, region = self[index]
            of_image[region] = mask
        return full
