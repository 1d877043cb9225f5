from typing import Dict, List

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..data.images import read_image, read_segment_ids
from ..visualization import draw_panels, side_by_side

__all__ = ["PanopticPictures"]

MAX_PICTURES = 4


class PanopticPictures(DatasetEvaluator):
    """
    Puts pictures of a few panoptic results into the training's event storage, for TensorBoard: the
    image, its ground truth and the result. They show the same images at every evaluation. It gives
    no metric.
    """

    def __init__(self, dataset_name: str):
        self.dataset_name = dataset_name
        self.reset()

    def reset(self):
        self._kept: List = []

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        for input, output in zip(inputs, outputs):
            # Only the main process's events are written.
            if comm.is_main_process() and len(self._kept) < MAX_PICTURES:
                ids, segments_info = output["panoptic_seg"]
                self._kept.append((input, (ids.cpu(), segments_info)))

    def evaluate(self):
        metadata = MetadataCatalog.get(self.dataset_name)
        for i, (input, result) in enumerate(self._kept):
            truth = read_segment_ids(input["pan_seg_file_name"]), input["segments_info"]
            titled = {"ground truth": truth, "result": result}
            panels = draw_panels(read_image(input["file_name"], "RGB"), titled, metadata)
            picture = side_by_side(panels)
            get_event_storage().put_image(f"{self.dataset_name}/{i}", picture.transpose(2, 0, 1))
