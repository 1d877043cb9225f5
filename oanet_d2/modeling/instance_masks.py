from typing import Tuple

import torch
from torch.nn import functional as F

from .candidates import mask_extents

__all__ = ["BoxedMasks"]


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
        self._centers = [
            torch.arange(size, device=boxes.device, dtype=torch.float32) + 0.5
            for size in image_size
        ]

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
        return torch.cat([first.clamp(min=0), last.minimum(size)], dim=1).int()

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
        x0, y0, x1, y1 = self.boxes[index]
        y = (self._centers[0][region[0]] - y0) / (y1 - y0) * 2 - 1
        x = (self._centers[1][region[1]] - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)
        # Every row is a sample of its own: F.grid_sample spreads samples over threads.
        rows = self.roi_masks[index].expand(len(y), 1, -1, -1)
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
