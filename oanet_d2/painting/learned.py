"""
A learned painting order for the masks of any segmenter: who lies on whom, from masks, boxes, scores and
classes alone. It needs PyTorch and safetensors, and no Detectron2.
"""

import json
import os
from typing import Any, Dict, Sequence, Tuple, Union

import numpy as np
import safetensors
import safetensors.torch
import torch

from ..files import write_atomically
from ..resize import shortest_edge_size
from .arrays import MaskOf
from .masks import grid_size, relative_boxes
from .pairs import GEOMETRY_NUMBERS, PairNetwork, geometry_evidence, overlapping_pairs, pair_margins
from .ranking import order_from_margins

__all__ = ["LearnedOrder", "masks_on_grid", "order_metadata"]

# Under this name in the metadata of a .safetensors stands what `order_metadata` takes, and a version.
_KEY, _VERSION = "learned_order", 1
# So a training names the tensors of the network, among others.
_PREFIX = "srm_head.network."


class LearnedOrder:
    """
    A painting order by a network that compares every two instances that overlap, as
    :class:`PairwiseRankingHead` does with the evidence "geometry" alone.

    Attributes:
        classes (list[str]): the names of the classes that it knows.
    """

    def __init__(
        self, network: PairNetwork, classes: Sequence[str], stride: int, min_size: int, max_size: int
    ):
        """
        Args:
            network: compares pairs by :func:`geometry_evidence`.
            classes: names of its classes.
            stride, min_size, max_size: see :func:`order_metadata`.
        """
        self.network = network.eval()
        self.classes = list(classes)
        self.stride = stride
        self.min_size = min_size
        self.max_size = max_size

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> "LearnedOrder":
        """
        Args:
            path: a file of :meth:`save`, or the `model_final.safetensors` of a training whose ranking
                head looks at "geometry" alone.

        Raises:
            ValueError: it is missing, damaged, or another file.
        """
        try:
            with safetensors.safe_open(path, "pt") as f:
                found = json.loads((f.metadata() or {})[_KEY])
                if found.pop("version") != _VERSION:
                    raise ValueError("another version wrote it")
            tensors = safetensors.torch.load_file(path)
            of_network = {k.removeprefix(_PREFIX): x for k, x in tensors.items() if k.startswith(_PREFIX)}
            network = PairNetwork(len(found["classes"]), GEOMETRY_NUMBERS, 0)
            network.load_state_dict(of_network)
            return cls(network, **found)
        except Exception as error:  # damaged, or of another program
            raise ValueError(
                f"{path} cannot be used as a learned order ({error!r}). One is the "
                "model_final.safetensors of a training with MODEL.SRM_HEAD.PAIRS.EVIDENCE ('geometry',)."
            ) from error

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write the network and what it needs to know, about 150 kB, as `.safetensors`."""
        tensors = {_PREFIX + name: x for name, x in self.network.state_dict().items()}
        metadata = order_metadata(self.classes, self.stride, self.min_size, self.max_size)
        write_atomically(os.fspath(path), safetensors.torch.save(tensors, metadata))

    @torch.no_grad()
    def order(
        self,
        mask_of: MaskOf,
        boxes: Any,
        scores: Any,
        class_names: Sequence[str],
        image_size: Tuple[int, int],
    ) -> np.ndarray:
        """
        Order the N instances of one image. All of them compete, so leave out what is not painted.

        Args:
            mask_of: gives the (h, w) bool array of an instance in [0, N) and the region of the image
                that it covers.
            boxes: (N, 4) float, XYXY in pixels; in training they were the boxes of the masks.
            scores: (N,) float in [0, 1].
            class_names: of the N instances.
            image_size: (H, W).

        Returns:
            (N,) int64, a permutation of 0..N-1, first painted first.

        Raises:
            ValueError: there are classes that this order does not know.
        """
        unknown = sorted(set(class_names) - set(self.classes))
        if unknown:
            raise ValueError(f"The learned order does not know {unknown}, only {self.classes}.")
        classes = torch.tensor([self.classes.index(x) for x in class_names], dtype=torch.int64)
        scores = torch.as_tensor(np.asarray(scores, dtype=np.float32))
        boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4)
        input_size = shortest_edge_size(image_size, self.min_size, self.max_size)
        masks = masks_on_grid(mask_of, len(classes), image_size, input_size, self.stride)
        pairs = overlapping_pairs(torch.from_numpy(masks))
        numbers = geometry_evidence(classes, scores, relative_boxes(boxes, image_size), pairs)
        of_both = torch.stack([classes[pairs.a], classes[pairs.b]], dim=1)
        logits = self.network(of_both, numbers, numbers.new_zeros(len(numbers), 3, 0))
        return order_from_margins(pair_margins(pairs, logits), scores).numpy()


def order_metadata(
    classes: Sequence[str], stride: int, min_size: int, max_size: int
) -> Dict[str, str]:
    """
    Metadata that make a `.safetensors` a learned order.

    Args:
        classes: names of the network's classes.
        stride: pixels per cell of the grid on which masks are compared, after an image is resized.
        min_size, max_size: of the resized image's shorter and longer side, see
            :func:`shortest_edge_size`.
    """
    sizes = {"stride": stride, "min_size": min_size, "max_size": max_size}
    return {_KEY: json.dumps({"version": _VERSION, "classes": list(classes), **sizes})}


def masks_on_grid(
    mask_of: MaskOf,
    number: int,
    image_size: Tuple[int, int],
    input_size: Tuple[int, int],
    stride: int,
) -> np.ndarray:
    """
    Masks on the grid on which a ranking head compares them. A cell shows the pixel under its centre. A
    mask under no centre owns the cell in its middle, so that it can be compared.

    Args:
        mask_of: see :meth:`LearnedOrder.order`.
        number: N.
        image_size: (H, W) of the masks.
        input_size: (height, width) of the network's input.
        stride: pixels of the input per cell.

    Returns:
        (N, h, w) bool.
    """
    lengths = max(input_size[0], 1), max(input_size[1], 1)  # of a very narrow image
    size = grid_size(lengths, stride)
    # The pixel under the centre of every cell of a row or column, and at the image's edge.
    pixels = [
        np.minimum((2 * np.arange(cells) + 1) * stride * whole // (2 * length), whole - 1)
        for cells, whole, length in zip(size, image_size, lengths)
    ]
    on_grid = np.zeros((number, *size), dtype=bool)
    for i in range(number):
        mask, region = mask_of(i)
        (first_row, last_row), (first_column, last_column) = (
            np.searchsorted(x, (r.start, r.stop)) for x, r in zip(pixels, region)
        )
        rows = pixels[0][first_row:last_row] - region[0].start
        columns = pixels[1][first_column:last_column] - region[1].start
        inside = mask[rows[:, None], columns]
        on_grid[i, first_row:last_row, first_column:last_column] = inside
        if not inside.any() and mask.any():
            middle = np.quantile(mask.nonzero(), 0.5, axis=1, method="lower")
            middle += [r.start for r in region]
            row, column = (middle * lengths / image_size / stride).astype(int)
            on_grid[i, min(row, size[0] - 1), min(column, size[1] - 1)] = True
    return on_grid
