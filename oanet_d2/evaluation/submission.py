import json
import os
from typing import Dict, List, Union

import torch
from panopticapi.utils import id2rgb
from PIL import Image

from ..whole_files import whole_file, whole_path

__all__ = ["PanopticSubmission"]


class PanopticSubmission:
    """
    Predictions in the COCO panoptic format, as evaluation servers and panopticapi take them: a
    JSON file and, where panopticapi looks for it, a folder of PNGs of the same name beside it.
    """

    def __init__(self, path: str, metadata):
        """
        Args:
            path: the JSON file, `*.json`.
            metadata: Detectron2's of the dataset.
        """
        self.path = path
        self.folder = os.path.splitext(path)[0]
        self.categories = categories(metadata)
        self._dataset_ids = {
            True: {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()},
            False: {v: k for k, v in metadata.stuff_dataset_id_to_contiguous_id.items()},
        }
        self.images: List[Dict] = []
        self.annotations: List[Dict] = []

    def add(
        self,
        panoptic_seg: torch.Tensor,
        segments_info: List[Dict],
        image_id: Union[int, str],
        image_name: str,
        png_name: str,
    ):
        """
        Write a picture's PNG and keep what the JSON has to say of it.

        Args:
            panoptic_seg, segments_info: the model's panoptic result.
            image_id, image_name: of the picture.
            png_name: relative to the folder.
        """
        ids = panoptic_seg.cpu().numpy()
        with whole_path(os.path.join(self.folder, png_name)) as path:
            Image.fromarray(id2rgb(ids)).save(path)
        height, width = ids.shape
        self.images.append(
            {"id": image_id, "file_name": image_name, "height": height, "width": width}
        )
        segments = [
            {"id": s["id"], "category_id": self._dataset_ids[s["isthing"]][s["category_id"]]}
            for s in segments_info
        ]
        self.annotations.append(
            {"image_id": image_id, "file_name": png_name, "segments_info": segments}
        )

    def save(self):
        """
        Write the JSON.
        """
        keys = ("images", "annotations", "categories")
        with whole_file(self.path) as f:
            json.dump({key: getattr(self, key) for key in keys}, f)


def categories(metadata) -> List[Dict]:
    """
    The "categories" of a COCO panoptic JSON, from the metadata that they became.
    """
    listed = []
    for kind in ("thing", "stuff"):
        names = getattr(metadata, f"{kind}_classes")
        colors = metadata.get(f"{kind}_colors")
        ids = getattr(metadata, f"{kind}_dataset_id_to_contiguous_id")
        for dataset_id, index in ids.items():
            category = {"id": dataset_id, "name": names[index], "isthing": int(kind == "thing")}
            listed.append({**category, "color": list(colors[index])} if colors else category)
    return sorted(listed, key=lambda c: c["id"])
