import numpy as np
import pytest
import torch
from torch.nn import functional as F

from detectron2.modeling.postprocessing import sem_seg_postprocess

from oanet_d2.painting.arrays import label_in_tiles
from oanet_d2.painting.semantic import resized_semantic_labels, semantic_labels


def test_semantic_labels_by_hand():
    # pixels: thing best; stuff 2 best; thing best but stuff 1 the best stuff
    sem_seg = torch.tensor([[[5.0, 0.0, 3.0]], [[1.0, 1.0, 2.0]], [[2.0, 4.0, 1.0]]])
    assert semantic_labels(sem_seg, keep_things_free=True).tolist() == [[0, 2, 0]]
    assert semantic_labels(sem_seg, keep_things_free=False).tolist() == [[2, 2, 1]]


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("stride", [4, 2, 1])
@pytest.mark.parametrize(
    "cells, image_size, output_size",
    [
        ((24, 40), (83, 130), (83, 130)),  # it does not fill the last cells
        ((24, 40), (90, 133), (200, 301)),  # more than a tile in both directions
        ((24, 40), (96, 160), (31, 150)),
        ((8, 8), (29, 32), (1, 1)),
    ],
)
def test_equals_detectron2s_two_interpolations(cells, image_size, output_size, stride, free):
    scores = torch.randn(7, *cells, generator=torch.Generator().manual_seed(0))
    image_size = tuple(length * stride // 4 for length in image_size)
    up = F.interpolate(scores[None], scale_factor=stride, mode="bilinear", align_corners=False)[0]
    expected = sem_seg_postprocess(up, image_size, *output_size)
    labels = resized_semantic_labels(scores, stride, image_size, output_size, free)
    assert labels.shape == output_size and labels.dtype == torch.int64
    wrong = labels != semantic_labels(expected, free)
    assert wrong.float().mean() <= 0.001
    # and there only by rounding
    best = (expected if free else expected[1:]).amax(dim=0)
    torch.testing.assert_close(expected.gather(0, labels[None])[0], best, rtol=0, atol=1e-5)
    # NumPy may add in another order.
    in_numpy = np.empty(output_size, np.int64)
    label_in_tiles(in_numpy, scores.numpy(), stride, image_size, free)
    assert (in_numpy != labels.numpy()).mean() <= 0.001
