"""
Image files, read as Detectron2 reads them, and the segment ids in panoptic PNGs.
"""

from contextlib import contextmanager
from typing import Iterator, Tuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager

__all__ = ["decode", "naming", "read_header", "read_image", "read_segment_ids"]


@contextmanager
def naming(file_name: str) -> Iterator[None]:
    """Errors of the block become a ValueError that begins with `file_name`."""
    try:
        yield
    except Exception as e:
        known = isinstance(e, (OSError, ValueError))
        reason = getattr(e, "strerror", None) or (str(e) if known else f"{type(e).__name__}: {e}")
        raise ValueError(f"{file_name}: {reason}") from e


def read_header(file_name: str, segment_ids: bool = False) -> Tuple[Tuple[int, int], int]:
    """
    Look at an image file without decoding it.

    Args:
        segment_ids: the file is a panoptic PNG.

    Returns:
        (height, width) as stored, and the EXIF orientation: 1 if there is none, from 2 on if
        Detectron2 turns or mirrors the image when it reads it.

    Raises:
        ValueError: the file is missing, is no image, or has more than 8 bits per channel (PIL would
            cut them off silently); or a panoptic PNG is not a PNG of mode RGB or RGBA.
    """
    with naming(file_name), PathManager.open(file_name, "rb") as f:
        image = Image.open(f)
        try:
            # Not PngImageFile's, which decodes the image.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        except Exception:  # Detectron2 reads an image with damaged EXIF as stored, too
            orientation = None
        f.seek(0)
        start = f.read(25)
        # PIL says RGB of a PNG of 3 x 16 bits, too. The bit depth is in its header.
        is_16_bit_png = start[:4] == b"\x89PNG" and start[24] == 16
        if is_16_bit_png or image.mode.startswith(("I", "F")):
            raise ValueError(
                f"it has more than 8 bits per channel ({image.format}, PIL's mode {image.mode}); "
                "convert it to 8 bits per channel."
            )
        if segment_ids and (image.format != "PNG" or image.mode not in ("RGB", "RGBA")):
            raise ValueError(
                f"it is a {image.format} of PIL's mode {image.mode}; segment ids are kept in a PNG "
                "of mode RGB, as R + 256 * G + 256**2 * B."
            )
        if not isinstance(orientation, int) or orientation not in range(2, 9):
            orientation = 1
        return (image.height, image.width), orientation


def read_image(file_name: str, format: str) -> np.ndarray:
    """
    Detectron2's function of this name, for images of at most 8 bits per channel.

    Args:
        format: see :func:`detection_utils.read_image`.

    Returns:
        (H, W, C) array.

    Raises:
        ValueError: see :func:`read_header`, or the file is damaged. The message names it.
    """
    read_header(file_name)
    return decode(file_name, format)


def read_segment_ids(file_name: str) -> np.ndarray:
    """
    The segment ids in a panoptic PNG; panopticapi's `rgb2id` of its pixels.

    Returns:
        (H, W) int32. 0 is void.

    Raises:
        ValueError: see :func:`read_image`.
    """
    read_header(file_name, segment_ids=True)
    return decode(file_name, "segment ids")


def decode(file_name: str, format: str) -> np.ndarray:
    """
    :func:`read_image` or, with the format "segment ids", :func:`read_segment_ids` of a file whose
    header was looked at.
    """
    with naming(file_name):
        if format == "segment ids":
            # PIL keeps RGB in four bytes, lowest first. The last one is alpha.
            return utils.read_image(file_name, "RGBA").view("<i4")[:, :, 0] & 0xFFFFFF
        if format == "BGR":
            # Detectron2's BGR is a reversed view of RGB, on which augmentations are slower.
            return cv2.cvtColor(utils.read_image(file_name, "RGB"), cv2.COLOR_RGB2BGR)
        return utils.read_image(file_name, format)
