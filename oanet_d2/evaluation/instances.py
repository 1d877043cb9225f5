import json
import os
from typing import Sequence

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from ..files import write_atomically

__all__ = ["build_instance_evaluator"]


def build_instance_evaluator(
    dataset_name: str, folder: str, max_dets_per_image: int, oks_sigmas: Sequence[float] = ()
) -> COCOEvaluator:
    """
    Detectron2's evaluator of instance and keypoint AP, on the instances that were loaded and not on
    the JSON that they come from: the images that are evaluated, boxes and areas of the masks, ids from
    1. It must be called in every process.

    Args:
        dataset_name: a dataset of :func:`register_panoptic` with an instances JSON.
        folder: for the results, and for the ground truth as a COCO JSON.
        max_dets_per_image: AP counts this many detections of an image.
        oks_sigmas: of keypoints, where they are not COCO's.
    """
    metadata = MetadataCatalog.get(dataset_name)
    contiguous = metadata.thing_dataset_id_to_contiguous_id
    path = os.path.join(folder, "instances_ground_truth.json")
    if comm.is_main_process():
        write_atomically(path, json.dumps({"annotations": [], **convert_to_coco_dict(dataset_name)}))
    comm.synchronize()
    name = f"{dataset_name}, {path}"
    MetadataCatalog.get(name).set(
        json_file=path,
        thing_dataset_id_to_contiguous_id=contiguous,
        # COCOeval sorts the classes by their ids, and Detectron2 takes the names in its order.
        thing_classes=[metadata.thing_classes[contiguous[i]] for i in sorted(contiguous)],
    )
    options = {"max_dets_per_image": max_dets_per_image, "kpt_oks_sigmas": oks_sigmas}
    return COCOEvaluator(name, output_dir=folder, **options)
