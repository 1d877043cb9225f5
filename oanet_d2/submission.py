import json
import os
from typing import Any, Dict, List, Union

import cv2
import numpy as np

from .files import write_atomically

__all__ = ["PanopticSubmission"]


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
        self.categories: List[Dict] = []
        self._dataset_ids = {}
        for isthing, group in ((True, "thing"), (False, "stuff")):
            names = getattr(metadata, f"{group}_classes")
            colors = getattr(metadata, f"{group}_colors", None)
            ids = getattr(metadata, f"{group}_dataset_id_to_contiguous_id")
            for dataset_id, index in ids.items():
                self._dataset_ids[isthing, index] = dataset_id
                category = {"id": dataset_id, "name": names[index], "isthing": int(isthing)}
                if colors:
                    category["color"] = list(colors[index])
                self.categories.append(category)
        self.categories.sort(key=lambda c: c["id"])

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
        # An id is R + 256 * G + 256**2 * B.
        bgr = np.stack([ids >> shift & 255 for shift in (16, 8, 0)], axis=2).astype(np.uint8)
        png = cv2.imencode(".png", bgr)[1].tobytes()
        write_atomically(os.path.join(self.folder, png_name), png)
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
