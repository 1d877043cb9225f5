from typing import Dict, List

import numpy as np
from panopticapi.utils import rgb2id

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import get_event_storage

from ..data.images import read_image
from ..visualization import draw_result

__all__ = ["PanopticPictures"]


class PanopticPictures(DatasetEvaluator):
    """
    Puts pictures of a few panoptic results into the training's event storage, for TensorBoard: the
    image, its ground truth and the result. They are of the same images at every evaluation. Gives
    no metric.
    """

    def __init__(self, dataset_name: str, max_pictures: int):
        """
        Args:
            dataset_name: a dataset registered by :func:`register_panoptic`.
            max_pictures: how many at most.
        """
        self.dataset_name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        self.max_pictures = max_pictures
        self.reset()

    def reset(self):
        self._kept = []

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        for input, output in zip(inputs, outputs):
            if len(self._kept) < self.max_pictures:
                ids, segments_info = output["panoptic_seg"]
                # Other evaluators change the segments' dicts in place.
                self._kept.append((input, (ids.cpu(), [dict(s) for s in segments_info])))

    def evaluate(self):
        # Every process draws its own; the main one's are written.
        for i, (input, result) in enumerate(self._kept):
            image = read_image(input["file_name"], "RGB")
            gt_ids = rgb2id(read_image(input["pan_seg_file_name"], "RGB"))
            gt = (gt_ids.astype(np.int32), input["segments_info"])
            picture = draw_result(image, gt, result, self.metadata)
            name = f"{self.dataset_name}/{i}"
            get_event_storage().put_image(name, picture.transpose(2, 0, 1))
