import copy
from typing import Dict, List

import numpy as np
import pycocotools.mask as mask_util
import torch
from panopticapi.utils import rgb2id

import detectron2.data.transforms as T
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode

__all__ = ["PanopticDatasetMapper", "annotations_from_panoptic", "panoptic_category_map"]


def panoptic_category_map(
    ids: np.ndarray, segments_info: List[Dict], num_things: int, ignore_value: int
) -> np.ndarray:
    """
    Panoptic ids to panoptic categories: thing class c is c, stuff class s (counted from 1) is
    num_things + s - 1, void is `ignore_value`. A crowd segment counts as its class.

    Args:
        ids: (H, W) integer, segment ids.
        segments_info: "id", contiguous "category_id" and "isthing".

    Returns:
        (H, W) array; uint8 where all values fit (which keeps resizing on Detectron2's fast path),
        float32 otherwise.
    """
    known, inverse = np.unique(ids, return_inverse=True)
    category_of_id = {
        s["id"]: s["category_id"] + (0 if s["isthing"] else num_things - 1) for s in segments_info
    }
    values = np.array([category_of_id.get(i, ignore_value) for i in known.tolist()])
    dtype = np.uint8 if max(values.max(), ignore_value) < 256 else np.float32
    return values.astype(dtype)[inverse].reshape(ids.shape)


def annotations_from_panoptic(ids: np.ndarray, segments_info: List[Dict]) -> List[Dict]:
    """
    Instance annotations from the panoptic ground truth: the visible part of every thing.

    Args: see :func:`panoptic_category_map`.

    Returns:
        list[dict] in Detectron2's "annotations" format, masks as COCO RLE.
    """
    annotations = []
    for segment in segments_info:
        if not segment["isthing"]:
            continue
        rle = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
        annotations.append(
            {
                "bbox": mask_util.toBbox(rle).tolist(),
                "bbox_mode": BoxMode.XYWH_ABS,
                "segmentation": rle,
                "category_id": segment["category_id"],
                "iscrowd": segment.get("iscrowd", 0),
            }
        )
    return annotations


class PanopticDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` for datasets registered by :func:`register_panoptic`. In training it
    adds, all under the same augmentations as the image,

    * "panoptic_category": (H, W) int64 tensor, see :func:`panoptic_category_map`;
    * "sem_seg": (H, W) int64 tensor, the labels that the semantic head is supervised on.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, num_things: int, stuff_only: bool, ignore_value: int, **kwargs
    ):
        """
        Args:
            num_things: number of thing classes.
            stuff_only: what "sem_seg" holds. True: Panoptic FPN's labels, 0 for any thing and
                stuff from 1 on. False: panoptic categories.
            ignore_value: label of void.

        Other arguments are the same as :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.num_things = num_things
        self.stuff_only = stuff_only
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        ret = super().from_config(cfg, is_train)
        ret["num_things"] = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        ret["stuff_only"] = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff"
        ret["ignore_value"] = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        return ret

    def __call__(self, dataset_dict):
        """
        Args:
            dataset_dict (dict): one image, as returned by :func:`load_panoptic`.

        Returns:
            dict: what OANet takes. In inference the ground truth stays a file name.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)
        ids = categories = None
        if self.is_train:
            ids = rgb2id(utils.read_image(dataset_dict["pan_seg_file_name"], "RGB"))
            categories = panoptic_category_map(
                ids, dataset_dict["segments_info"], self.num_things, self.ignore_value
            )

        aug_input = T.AugInput(image, sem_seg=categories)
        transforms = self.augmentations(aug_input)
        image = np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(image)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
            return dataset_dict

        categories = torch.as_tensor(aug_input.sem_seg.astype("int64"))
        dataset_dict["panoptic_category"] = categories
        dataset_dict["sem_seg"] = self._semantic_labels(categories)
        if "annotations" not in dataset_dict:
            dataset_dict["annotations"] = annotations_from_panoptic(
                ids, dataset_dict["segments_info"]
            )
        self._transform_annotations(dataset_dict, transforms, image.shape[1:])
        return dataset_dict

    def _semantic_labels(self, categories: torch.Tensor) -> torch.Tensor:
        if not self.stuff_only:
            return categories
        labels = (categories - self.num_things + 1).clamp(min=0)
        return labels.where(categories != self.ignore_value, self.ignore_value)
