import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from oanet_d2.data import images
from oanet_d2.data.images import MAX_PIXELS, read_header, read_image


def png_header(width, height):
    """The beginning of a PNG of any size; no pixel follows."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    chunks = struct.pack(">I", 13) + header + crc + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.fixture
def never_decoded(monkeypatch):
    """Whoever decodes fails; not PIL's limit, ours is tested."""

    def fail(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(images.utils, "read_image", fail)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (1, MAX_PIXELS + 1)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, never_decoded, size):
    path = str(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png_header(*size))
    words = f"{path}: more than 178,956,970 pixels, which are not decoded: {size[0]} x {size[1]}"
    with pytest.raises(ValueError, match=re.escape(words)):
        read_image(path, "RGB")


def test_an_image_of_the_limit_is_decoded(tmp_path, never_decoded):
    (tmp_path / "a.png").write_bytes(png_header(1, MAX_PIXELS))
    with pytest.raises(ValueError, match="AssertionError: decoded"):
        read_image(str(tmp_path / "a.png"), "RGB")


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(hi) print\n",
        b"<html>404</html>",
        b"",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_programs_and_other_formats_are_refused(tmp_path, never_decoded, content):
    """PIL takes the first for an image, which it would give to Ghostscript to run."""
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.png: cannot identify an image of the formats BMP"):
        read_image(str(path), "RGB")


def test_pil_would_take_the_program():
    """Otherwise the test above would prove nothing."""
    Image.init()
    assert Image.OPEN["EPS"][1](b"%!PS-Adobe-3.0 EP")


def test_only_files_are_opened(tmp_path):
    with pytest.raises(ValueError, match="a.png: No such file"):
        read_image(str(tmp_path / "a.png"), "RGB")
    os.mkfifo(tmp_path / "a.png")  # to open it would wait forever
    with pytest.raises(ValueError, match="a.png: this is not a file"):
        read_image(str(tmp_path / "a.png"), "RGB")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_header_of_every_format(tmp_path, format):
    path = str(tmp_path / "a")
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(path, format)
    header = read_header(path)
    assert (header.format, header.size, header.is_16_bit) == (format, (7, 5), False)
    assert read_image(path, "RGB").shape == (5, 7, 3)
