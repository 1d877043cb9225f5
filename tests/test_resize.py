import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detectron2.data.transforms import ResizeShortestEdge

from oanet_d2.resize import resize, shortest_edge_size

sides = st.integers(1, 120)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13 resizes as tested")
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 999))
def test_equals_pil_bit_for_bit(size, new_size, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    image[rng.random(size) < 0.3] = 255
    expected = Image.fromarray(image).resize(new_size[::-1], Image.Resampling.BILINEAR)
    assert (resize(image, new_size) == np.asarray(expected)).all()


@pytest.mark.parametrize("new_size", [(61, 97), (240, 401), (131, 203), (131, 40), (200, 31)])
def test_wide_pictures_in_every_pillow(new_size):
    image = np.random.default_rng(0).integers(0, 256, (131, 203, 3), np.uint8)[:, ::-1]
    expected = Image.fromarray(image).resize(new_size[::-1], Image.Resampling.BILINEAR)
    assert (resize(image, new_size) == np.asarray(expected)).all()


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 900), st.integers(1, 1400))
def test_sizes_are_detectron2s(size, min_size, max_size):
    expected = ResizeShortestEdge.get_output_shape(*size, min_size, max_size)
    assert shortest_edge_size(size, min_size, max_size) == expected
    assert shortest_edge_size(size, 0, max_size) == size
