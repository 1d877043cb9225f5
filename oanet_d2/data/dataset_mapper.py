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
from detectron2.structures import BitMasks, BoxMode

__all__ = [
    "PanopticDatasetMapper",
    "annotations_from_panoptic",
    "index_segments",
    "panoptic_categories",
]


def index_segments(ids: np.ndarray, segments_info: List[Dict]) -> np.ndarray:
    """
    Segment ids to positions in `segments_info`, counted from 1; 0 for ids that are not listed.
    Positions are small numbers, which augmentations keep on Detectron2's fast path.

    Args:
        ids: (H, W) integer, segment ids.
        segments_info: list[dict] with "id".

    Returns:
        (H, W) array; uint8 up to 255 segments, float32 beyond.
    """
    known, inverse = np.unique(ids, return_inverse=True)
    position = {s["id"]: i for i, s in enumerate(segments_info, start=1)}
    dtype = np.uint8 if len(segments_info) < 256 else np.float32
    values = np.array([position.get(i, 0) for i in known.tolist()], dtype=dtype)
    return values[inverse].reshape(ids.shape)


def panoptic_categories(
    segments_info: List[Dict], num_things: int, ignore_value: int
) -> torch.Tensor:
    """
    The panoptic category of every segment: thing class c is c, stuff class s (counted from 1) is
    num_things + s - 1, void is `ignore_value`. A crowd segment counts as its class.

    Args:
        segments_info: contiguous "category_id" and "isthing".

    Returns:
        (1 + len(segments_info),) int64, to be indexed with the positions of
        :func:`index_segments`.
    """
    of_segments = [s["category_id"] + (0 if s["isthing"] else num_things - 1) for s in segments_info]
    return torch.tensor([ignore_value, *of_segments])


def annotations_from_panoptic(ids: np.ndarray, segments_info: List[Dict]) -> List[Dict]:
    """
    Instance annotations from the panoptic ground truth: the visible part of every thing.

    Args:
        ids: (H, W) integer, segment ids.
        segments_info: "id", contiguous "category_id" and "isthing".

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

    * "panoptic_seg": as :class:`OANet` returns it, (H, W) int64 segment ids, counted from 1 (0 is
      void), and segments_info;
    * "panoptic_category": (H, W) int64 tensor, the category of every pixel, see
      :func:`panoptic_categories`;
    * "sem_seg": (H, W) int64 tensor, the labels that the semantic head is supervised on.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        num_things: int,
        stuff_only: bool,
        ignore_value: int,
        read_image: bool = True,
        **kwargs,
    ):
        """
        Args:
            num_things: number of thing classes.
            stuff_only: what "sem_seg" holds. True: Panoptic FPN's labels, 0 for any thing and
                stuff from 1 on. False: panoptic categories.
            ignore_value: label of void.
            read_image: if False, the image file is never opened and no "image" is returned; for
                :class:`SRMFromAnnotations`.

        Other arguments are the same as :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.num_things = num_things
        self.stuff_only = stuff_only
        self.ignore_value = ignore_value
        self.read_image = read_image

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        ret = super().from_config(cfg, is_train)
        ret["num_things"] = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        ret["stuff_only"] = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff"
        ret["ignore_value"] = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        ret["read_image"] = cfg.INPUT.READ_IMAGE
        return ret

    def __call__(self, dataset_dict):
        """
        Args:
            dataset_dict (dict): one image, as returned by :func:`load_panoptic`.

        Returns:
            dict: what OANet takes. In inference the ground truth stays a file name.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        if self.read_image:
            image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
            utils.check_image_size(dataset_dict, image)
        else:
            # Augmentations need something of the image's size to look at.
            image = np.zeros((dataset_dict["height"], dataset_dict["width"]), dtype=np.uint8)
        ids = index = None
        if self.is_train:
            ids = rgb2id(utils.read_image(dataset_dict["pan_seg_file_name"], "RGB"))
            index = index_segments(ids, dataset_dict["segments_info"])

        aug_input = T.AugInput(image, sem_seg=index)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        if self.read_image:
            dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
            return dataset_dict

        if "annotations" not in dataset_dict:
            dataset_dict["annotations"] = annotations_from_panoptic(
                ids, dataset_dict["segments_info"]
            )
        self._add_labels(dataset_dict, torch.as_tensor(aug_input.sem_seg.astype("int64")))
        self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        if not dataset_dict["instances"].has("gt_masks"):
            # Detectron2 leaves the masks out where there is no instance.
            dataset_dict["instances"].gt_masks = BitMasks(torch.zeros(0, *image.shape[:2]))
        return dataset_dict

    def _add_labels(self, dataset_dict: Dict, index: torch.Tensor):
        segments_info = [
            {**s, "id": i} for i, s in enumerate(dataset_dict.pop("segments_info"), start=1)
        ]
        of_segments = panoptic_categories(segments_info, self.num_things, self.ignore_value)
        categories = of_segments[index]
        dataset_dict["panoptic_seg"] = (index, segments_info)
        dataset_dict["panoptic_category"] = categories
        dataset_dict["sem_seg"] = categories
        if self.stuff_only:
            labels = (categories - self.num_things + 1).clamp(min=0)
            dataset_dict["sem_seg"] = labels.where(
                categories != self.ignore_value, self.ignore_value
            )
