import os
from typing import Dict, List

from detectron2.evaluation import COCOPanopticEvaluator

__all__ = ["PanopticEvaluator"]


class PanopticEvaluator(COCOPanopticEvaluator):
    """
    :class:`COCOPanopticEvaluator` for images in subfolders, too. Detectron2 names the PNG of a
    prediction after its image, without the folder: of `a/1.jpg` and `b/1.jpg` the last one would be
    scored against both annotations. Here it is named after the PNG of the ground truth, with the
    folder, which in COCO's layout is the same name.
    """

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        """
        Args:
            inputs: from :class:`PanopticDatasetMapper` in inference.
            outputs: as :meth:`COCOPanopticEvaluator.process`.
        """
        named = [{**input, "file_name": self._file_name(input)} for input in inputs]
        super().process(named, outputs)

    def _file_name(self, input: Dict) -> str:
        path = os.path.relpath(input["pan_seg_file_name"], self._metadata.panoptic_root)
        return path.replace(os.sep, "--")
