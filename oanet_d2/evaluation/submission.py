import json
import os
from typing import Dict, List, Union

import torch
from panopticapi.utils import id2rgb
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.register import categories_of
from ..files import atomic_path, write_atomically

__all__ = ["PanopticFiles", "PanopticSubmission"]


class PanopticSubmission:
    """
    Predictions in the COCO panoptic format, as evaluation servers and panopticapi take them: a JSON
    file and, where panopticapi looks for it, a folder of PNGs of the same name beside it.
    """

    def __init__(self, path: str, metadata):
        """
        Args:
            path: the JSON file, `*.json`.
            metadata: Detectron2's of the dataset.
        """
        self.path = path
        self.folder = os.path.splitext(path)[0]
        self.images: List[Dict] = []
        self.annotations: List[Dict] = []
        self.categories = sorted(categories_of(metadata), key=lambda c: c["id"])
        self._dataset_ids = {
            (isthing, index): dataset_id
            for isthing, kind in ((True, "thing"), (False, "stuff"))
            for dataset_id, index in metadata.get(f"{kind}_dataset_id_to_contiguous_id").items()
        }

    def add(
        self,
        panoptic_seg: torch.Tensor,
        segments_info: List[Dict],
        image_id: Union[int, str],
        image_name: str,
        png_name: str,
    ):
        """
        Write the PNG of an image, and keep its part of the JSON.

        Args:
            panoptic_seg, segments_info: the model's panoptic result.
            image_id, image_name: of the image.
            png_name: relative to the folder.
        """
        ids = panoptic_seg.cpu().numpy()
        with atomic_path(os.path.join(self.folder, png_name)) as path:
            Image.fromarray(id2rgb(ids)).save(path)
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


class PanopticFiles(DatasetEvaluator):
    """
    Writes the panoptic results of an evaluation as a :class:`PanopticSubmission`. It gives no metric.
    """

    def __init__(self, dataset_name: str, path: str):
        """
        Args:
            dataset_name: for its metadata.
            path: the JSON file. The PNGs are named as the ground truth's, in its folder.
        """
        self.metadata = MetadataCatalog.get(dataset_name)
        self.path = path
        self.reset()

    def reset(self):
        self._submission = PanopticSubmission(self.path, self.metadata)

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        for x, output in zip(inputs, outputs):
            png = os.path.relpath(x["pan_seg_file_name"], self.metadata.panoptic_root)
            if png.startswith(os.pardir):
                png = os.path.basename(png)
            png = os.path.splitext(png)[0] + ".png"
            image = os.path.relpath(x["file_name"], self.metadata.image_root)
            ids, segments_info = output["panoptic_seg"]
            self._submission.add(ids, segments_info, x["image_id"], image, png)

    def evaluate(self):
        parts = comm.gather((self._submission.images, self._submission.annotations))
        if comm.is_main_process():
            self._submission.images = [x for images, _ in parts for x in images]
            self._submission.annotations = [x for _, annotations in parts for x in annotations]
            self._submission.save()
