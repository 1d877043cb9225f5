import numpy as np
import pytest
from panopticapi.utils import id2rgb, rgb2id
from PIL import ExifTags, Image

from detectron2.data import detection_utils as utils

from oanet_d2.data.images import read_header, read_image, read_segment_ids


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("wanted", ["BGR", "RGB", "L"])
def test_any_format_is_read_as_detectron2_reads_it(tmp_path, format, wanted):
    path = str(tmp_path / "a")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format)
    assert read_header(path) == ((5, 7), 1)
    image = read_image(path, wanted)
    assert np.array_equal(image, utils.read_image(path, wanted)) and image.std() > 0


def test_segment_ids_are_panopticapis(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**24, (5, 7))
    ids[0, :2] = [0, 2**24 - 1]
    rgb = id2rgb(ids)
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)
    for pixels in (rgb, np.concatenate([rgb, alpha], axis=2)):  # a PNG may be RGBA
        Image.fromarray(pixels).save(tmp_path / "a.png")
        found = read_segment_ids(str(tmp_path / "a.png"))
        assert found.dtype == np.int32
        assert np.array_equal(found, rgb2id(rgb)) and np.array_equal(found, ids)


@pytest.mark.parametrize("mode, format", [("P", "PNG"), ("L", "PNG"), ("RGB", "TIFF"), ("RGB", "BMP")])
def test_segment_ids_are_in_rgb_pngs(tmp_path, mode, format):
    path = tmp_path / "a.png"
    Image.new(mode, (7, 5)).save(path, format)
    with pytest.raises(ValueError, match=f"a.png: it is a {format} of PIL's mode {mode}"):
        read_segment_ids(str(path))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientations_are_those_that_detectron2_obeys(tmp_path, format):
    """6 and 8 turn by 90 degrees. 9 does not exist, and damaged EXIF says nothing."""
    for value in (1, 3, 6, 8, 9):
        info = Image.Exif()
        info[ExifTags.Base.Orientation] = value
        Image.new("RGB", (7, 5)).save(tmp_path / "a", format, exif=info)
        size, orientation = read_header(str(tmp_path / "a"))
        assert size == (5, 7) and orientation == (value if value < 9 else 1)
        turned = size[::-1] if orientation > 4 else size
        assert utils.read_image(str(tmp_path / "a"), "RGB").shape[:2] == turned
    damaged = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\1" * 20
    Image.new("RGB", (7, 5)).save(tmp_path / "b.jpg", exif=damaged)
    assert read_header(str(tmp_path / "b.jpg")) == ((5, 7), 1)
