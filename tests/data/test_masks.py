import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from oanet_d2.data.masks import check_annotation, check_polygon, check_rle, check_size


def annotation(segmentation, bbox=(0, 0, 5, 5)):
    return {"bbox": list(bbox), "segmentation": segmentation}


@pytest.mark.parametrize(
    "bad, words",
    [
        (annotation([], [0, 0, 5]), "a 'bbox' is [0, 0, 5]; it must be four numbers"),
        (annotation([], [0, 0, float("nan"), 5]), "it must be four numbers"),
        (annotation({"size": [9, 9], "counts": b""}), "width] [9, 9], the image of [20, 30]"),
        (annotation([[0, 0, 1e9, 0, 1e9, 1e9]]), "from 0 to 1000000000.0 in an image of 30 x 20"),
        (annotation([[0, 0, float("nan"), 0, 5, 5]]), "in an image of 30 x 20"),
        (annotation([[0, 0, -301, 0, 5, 5]]), "from -301 to 5"),
        (annotation([[0, 0, 29, 19] * 200]), "a polygon of 400 points is"),
    ],
)
def test_what_is_refused(bad, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_annotation(bad, 20, 30)


def test_polygons_of_amodal_masks_leave_the_image():
    check_annotation(annotation([[-60, -5, 90, -5, 90, 40, -60, 40]]), 20, 30)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_outline_of_pixels_is_taken(height, width, seed):
    """The longest there is goes along every side of every pixel."""
    rng = np.random.default_rng(seed)
    rows = [[x, y] for y in range(height) for x in ((0, width) if y % 2 else (width, 0))]
    polygon = np.array(rows, dtype=float) + rng.uniform(0, 0.5, (len(rows), 2))
    if len(rows) > 2:
        check_polygon(polygon.ravel().tolist(), height, width)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_whole_rles(height, width, seed):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    check_rle(rle)
    check_rle({"size": rle["size"], "counts": rle["counts"].decode()})
    with pytest.raises(ValueError, match=f"has {height * width} pixels; {height + 1} x"):
        check_rle({"size": [height + 1, width], "counts": rle["counts"]})


def test_masks_of_an_image_fit_into_memory():
    check_size(4000, 1000, 1000)
    with pytest.raises(ValueError, match="5,000 masks of 1000 x 1000 pixels .* more than 4 GiB"):
        check_size(5000, 1000, 1000)
