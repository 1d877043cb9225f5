import io
import json
import os
import zlib
from typing import Any, Dict, List, Union

import numpy as np
from PIL import Image

from .files import write_atomically

__all__ = ["PanopticSubmission", "categories_of", "image_of", "png_of"]


class PanopticSubmission:
    """
    Predictions in the COCO panoptic format, as evaluation servers and panopticapi take them: a JSON
    file and, where panopticapi looks for it, a folder of PNGs of the same name beside it.
    """

    def __init__(self, path: str, metadata):
        """
        Args:
            path: the JSON file, `*.json`.
            metadata: Detectron2's of the dataset, or the same attributes.
        """
        self.path = path
        self.folder = os.path.splitext(path)[0]
        self.images: List[Dict] = []
        self.annotations: List[Dict] = []
        self.categories = sorted(categories_of(metadata), key=lambda c: c["id"])
        self._dataset_ids = {
            (isthing, index): dataset_id
            for isthing, kind in ((True, "thing"), (False, "stuff"))
            for dataset_id, index in getattr(metadata, f"{kind}_dataset_id_to_contiguous_id").items()
        }

    def add(
        self,
        panoptic_seg: Any,
        segments_info: List[Dict],
        image_id: Union[int, str],
        image_name: str,
        png_name: str,
    ):
        """
        Write the PNG of an image, and keep its part of the JSON.

        Args:
            panoptic_seg, segments_info: a panoptic result, as an array or a tensor on the CPU.
            image_id, image_name: of the image.
            png_name: relative to the folder.
        """
        ids = np.asarray(panoptic_seg)
        write_atomically(os.path.join(self.folder, png_name), png_of(ids))
        height, width = ids.shape
        image = {"id": image_id, "file_name": image_name, "height": height, "width": width}
        self.images.append(image)
        segments = [
            {"id": s["id"], "category_id": self._dataset_ids[s["isthing"], s["category_id"]]}
            for s in segments_info
        ]
        entry = {"image_id": image_id, "file_name": png_name, "segments_info": segments}
        self.annotations.append(entry)

    def save(self):
        """Write the JSON."""
        keys = ("images", "annotations", "categories")
        write_atomically(self.path, json.dumps({key: getattr(self, key) for key in keys}))


def image_of(ids: np.ndarray) -> Image.Image:
    """The RGB image of a panoptic map, (H, W) integers: an id is R + 256 * G + 256**2 * B."""
    height, width = ids.shape
    return Image.frombytes("RGB", (width, height), ids.astype("<u4").tobytes(), "raw", "RGBX")


def png_of(ids: np.ndarray) -> bytes:
    """The PNG of a panoptic map, (H, W) integers from 0, below 256**3."""
    file = io.BytesIO()
    # Runs alone make smaller files than zlib's best level, in less time.
    image_of(ids).save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def categories_of(metadata) -> List[Dict]:
    """
    The categories that :func:`oanet_d2.data.register.category_metadata` would make these classes of,
    things first.

    Args:
        metadata: see :class:`PanopticSubmission`.
    """
    categories = []
    for isthing, kind in ((1, "thing"), (0, "stuff")):
        names = getattr(metadata, f"{kind}_classes", [])
        colors = getattr(metadata, f"{kind}_colors", None)
        ids = getattr(metadata, f"{kind}_dataset_id_to_contiguous_id", {})
        for id, index in sorted(ids.items(), key=lambda item: item[1]):
            category = {"id": id, "name": names[index], "isthing": isthing}
            categories.append({**category, "color": list(colors[index])} if colors else category)
    return categories
