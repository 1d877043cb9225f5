"""
Cityscapes in this project's convention: things count from 0, stuff from 1. The files lie where
Detectron2's documentation wants them; `cityscapesscripts` makes the panoptic ones.
"""

import os
from typing import Dict

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from .register import register_panoptic

__all__ = ["image_name", "register_cityscapes"]


def register_cityscapes(root: str) -> None:
    """
    Register `cityscapes_fine_panoptic_{train,val}_oanet`. There are no instance annotations, so the
    masks are the visible parts.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
    """
    for split in ("train", "val"):
        panoptic = os.path.join(root, "gtFine", f"cityscapes_panoptic_{split}")
        register_panoptic(
            f"cityscapes_fine_panoptic_{split}_oanet",
            os.path.join(root, "leftImg8bit", split),
            f"{panoptic}.json",
            panoptic,
            categories=CITYSCAPES_CATEGORIES,
            image_name=image_name,
        )


def image_name(image: Dict) -> str:
    """
    The file of an image, such as `aachen/aachen_000000_000019_leftImg8bit.png`. (The JSON names
    another one, in no city's folder.)
    """
    city = str(image["id"]).split("_")[0]
    return f"{city}/{image['id']}_leftImg8bit.png"
