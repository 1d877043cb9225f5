import os
from typing import Dict, List

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..submission import PanopticSubmission

__all__ = ["PanopticFiles"]


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
            png = png.replace(os.pardir + os.sep, "_" + os.sep)  # stays in the folder
            image = os.path.relpath(x["file_name"], self.metadata.image_root)
            ids, segments_info = output["panoptic_seg"]
            self._submission.add(ids.cpu(), segments_info, x["image_id"], image, png)

    def evaluate(self):
        parts = comm.gather((self._submission.images, self._submission.annotations))
        if comm.is_main_process():
            self._submission.images = [x for images, _ in parts for x in images]
            self._submission.annotations = [x for _, annotations in parts for x in annotations]
            self._submission.save()
