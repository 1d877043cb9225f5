"""
Image files: looked at before they are decoded, and read as Detectron2 reads them.
"""

import warnings
from contextlib import contextmanager
from typing import NamedTuple, Tuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "Header",
    "check_header",
    "naming",
    "read_header",
    "read_image",
]

# Where PIL refuses an image as a decompression bomb, whatever PIL's own setting is. Decoded, it is
# 0.5 GB of RGB.
MAX_PIXELS = 178_956_970
# Of what PIL could open besides, some formats are programs or drawings that others interpret
# (EPS is run by Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@contextmanager
def naming(file_name: str):
    """
    Whatever goes wrong in here becomes a ValueError that says with which file.

    Args:
        file_name: what the message begins with.

    Raises:
        ValueError: from the original error.
    """
    try:
        yield
    except Exception as e:
        reason = str(e) if isinstance(e, (OSError, ValueError)) else f"{type(e).__name__}: {e}"
        raise ValueError(f"{file_name}: {reason}") from e


class Header(NamedTuple):
    """
    How an image is stored.

    Attributes:
        format, mode: PIL's names.
        size: width and height in pixels, not yet turned as EXIF asks for.
        is_16_bit: whether a channel has more than 8 bits.
    """

    format: str
    mode: str
    size: Tuple[int, int]
    is_16_bit: bool


def read_header(file_name: str) -> Header:
    """
    Look at an image file without decoding it.

    Raises:
        FileNotFoundError: there is no such regular file; a named pipe would be waited for forever.
        ValueError: it has more than MAX_PIXELS pixels.
        UnidentifiedImageError: it is of none of FORMATS. PIL may raise anything else.
    """
    if not PathManager.isfile(file_name):
        there = PathManager.exists(file_name)
        raise FileNotFoundError("this is not a file" if there else "No such file")
    with PathManager.open(file_name, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        start = f.read(25)
        f.seek(0)
        too_many = f"more than {MAX_PIXELS:,} pixels, which are not decoded"
        try:
            image = Image.open(f, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{too_many}: {error}") from error
        except UnidentifiedImageError:
            raise UnidentifiedImageError(
                f"cannot identify an image of the formats {', '.join(FORMATS)}"
            ) from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{too_many}: {width} x {height}")
        # To PIL a PNG of 3 x 16 bits is of mode RGB; its header has the bit depth.
        is_16_bit = start.startswith(b"\x89PNG") and start[24:] == b"\x10"
        is_16_bit = is_16_bit or image.mode.startswith(("I", "F"))
        return Header(image.format or "", image.mode, image.size, is_16_bit)


def check_header(file_name: str) -> None:
    """
    Raises:
        ValueError: as :func:`read_image`, but for an image that is only broken further on; nothing
            is decoded.
    """
    with naming(file_name):
        header = read_header(file_name)
        if header.is_16_bit:
            mode = header.mode + ", a PNG of 16 bits" * (header.mode == "RGB")
            raise ValueError(
                f"more than 8 bits per channel (PIL's mode {mode}); convert it to 8 bits per "
                "channel, such as PIL's modes L and RGB."
            )


def read_image(file_name: str, format: str) -> np.ndarray:
    """
    As Detectron2's function of this name, for images of 8 bits per channel or fewer. Of more, PIL
    would keep the upper 8 bits or cut off what is above 255, and not say so.

    Args:
        file_name: image file.
        format: see :func:`detection_utils.read_image`.

    Returns:
        (H, W, C) array.

    Raises:
        ValueError: if the file cannot be read, is of none of FORMATS, has more than MAX_PIXELS
            pixels (which is seen before it is decoded), or more than 8 bits per channel.
    """
    check_header(file_name)
    with naming(file_name):
        if format != "BGR":
            return utils.read_image(file_name, format)
        # Detectron2's BGR is a view of RGB from behind, on which augmentations are slower.
        return cv2.cvtColor(utils.read_image(file_name, "RGB"), cv2.COLOR_RGB2BGR)
