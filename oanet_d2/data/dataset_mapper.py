import copy
from typing import Dict, List, Optional

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_util

import detectron2.data.transforms as T
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.file_io import PathManager

from .images import check_header, naming, read_image, read_segment_ids, runs
from .load import check_image_size, check_segment_ids

__all__ = ["PanopticDatasetMapper"]

# Detectron2's augmentations that pad (FixedSizeCrop) fill a label map with this value.
PADDING = 255


def index_segments(ids: np.ndarray, segments_info: List[Dict]) -> np.ndarray:
    """
    Number the segments for augmentations: by their position in `segments_info`, counted from 1, but
    without 255, which is padding. Ids that are not listed get 0.

    Args:
        ids: (H, W) int32 segment ids.
        segments_info: list[dict] with "id".

    Returns:
        (H, W) array, uint8 up to 254 segments (Detectron2 augments them faster), float32 beyond.
    """
    starts, known, inverse = runs(ids)
    position = {s["id"]: i for i, s in enumerate(segments_info, start=1)}
    dtype = np.uint8 if len(segments_info) < PADDING else np.float32
    numbers = np.array([_number(position.get(i, 0)) for i in known.tolist()], dtype=dtype)
    return numbers[inverse].repeat(np.diff(starts, append=ids.size)).reshape(ids.shape)


def _number(position: int) -> int:
    return position + (position >= PADDING)


def segment_positions(numbers: np.ndarray) -> np.ndarray:
    """
    From :func:`index_segments`, augmented, back to positions: (H, W) int64, counted from 1. Padding
    is 0, as void is.
    """
    positions = numbers.astype(np.int64)
    positions[positions == PADDING] = 0
    positions -= positions > PADDING
    return positions


def panoptic_categories(segments_info: List[Dict], num_things: int) -> np.ndarray:
    """
    The panoptic category at every position, (1 + N,) int64. Thing class c is c, stuff class s (counted
    from 1) is num_things + s - 1, void is -1. A crowd counts as its class.

    Args:
        segments_info: N dicts with contiguous "category_id" and "isthing".
    """
    offsets = [0 if s["isthing"] else num_things - 1 for s in segments_info]
    return np.array([-1, *(s["category_id"] + x for s, x in zip(segments_info, offsets))])


class PanopticDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` for datasets registered by :func:`register_panoptic`. In training it adds,
    under the same augmentations as the image,

    * "panoptic_seg": (H, W) int64 segment ids, counted from 1 (0 is void), and segments_info with
      contiguous "category_id", as the model returns it;
    * "panoptic_category": (H, W) int64, see :func:`panoptic_categories`;
    * "sem_seg": (H, W) int64, the labels of the semantic head.

    Without "annotations", the instances are the visible parts of the things in the panoptic PNG. Their
    masks are bitmasks, whatever `instance_mask_format` is.
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
            stuff_only: what "sem_seg" holds. True: Panoptic FPN's labels, 0 for any thing and stuff
                from 1 on. False: panoptic categories.
            ignore_value: label of void in "sem_seg".
            read_image: False: no image file is opened, and there is no "image" in the result.
            kwargs: see :class:`DatasetMapper`.
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
        ret["read_image"] = cfg.MODEL.META_ARCHITECTURE != "SRMFromAnnotations"
        return ret

    def __call__(self, dataset_dict):
        """
        Args:
            dataset_dict (dict): one image, as :func:`load_panoptic` returns it.

        Returns:
            dict: what OANet takes. In inference the ground truth stays a file name.

        Raises:
            ValueError: a file or an annotation is not as it should be. The message names it.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        file_name = dataset_dict["file_name"]
        if self.read_image:
            image = read_image(file_name, self.image_format)
            check_image_size(dataset_dict, image.shape[:2])
        else:  # augmentations look at its size
            image = np.zeros((dataset_dict["height"], dataset_dict["width"]), dtype=np.uint8)
        numbers: Optional[np.ndarray] = None
        if self.is_train:
            ids = read_segment_ids(dataset_dict["pan_seg_file_name"])
            check_segment_ids(dataset_dict, ids)
            numbers = index_segments(ids, dataset_dict["segments_info"])

        aug_input = T.AugInput(image, sem_seg=numbers)
        with naming(f"{file_name}, augmented from {image.shape[1]} x {image.shape[0]} pixels"):
            transforms = self.augmentations(aug_input)
        image = aug_input.image
        if self.read_image:
            dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if numbers is None:
            dataset_dict.pop("annotations", None)
            # Evaluators open it. A dataset without ground truth has none.
            if PathManager.exists(dataset_dict.get("pan_seg_file_name", "")):
                check_header(dataset_dict["pan_seg_file_name"], segment_ids=True)
            return dataset_dict

        with naming(f"annotations of {file_name}"):
            if "annotations" in dataset_dict:
                self._transform_annotations(dataset_dict, transforms, image.shape[:2])
            else:
                dataset_dict["instances"] = self._visible_instances(
                    dataset_dict["segments_info"], numbers, aug_input.sem_seg, transforms
                )
            self._add_labels(dataset_dict, segment_positions(aug_input.sem_seg))
        return dataset_dict

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        """
        As Detectron2's, except that padding is no part of a mask, that one RLE makes bitmasks of all
        masks of an image, and that an image without instances has masks, too (none).
        """
        annotations, mask_format = [], self.instance_mask_format
        for x in dataset_dict.pop("annotations"):
            if x.get("iscrowd", 0):
                continue
            mask = x.pop("segmentation", None)
            if self.use_instance_mask and mask is None:
                raise ValueError("an instance has no segmentation.")
            # Detectron2 transforms integers in place, which cuts off the fractions.
            x["bbox"] = [float(v) for v in x["bbox"]]
            if self.use_instance_mask and isinstance(mask, list):
                x["segmentation"] = [np.asarray(polygon, dtype=float) for polygon in mask]
            x = utils.transform_instance_annotations(x, transforms, image_shape)
            if self.use_instance_mask and not isinstance(mask, list):
                x["segmentation"] = transforms.apply_segmentation(mask_util.decode(mask)) == 1
                mask_format = "bitmask"
            annotations.append(x)
        if annotations:
            instances = utils.annotations_to_instances(annotations, image_shape, mask_format)
            if self.recompute_boxes:
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
            dataset_dict["instances"] = utils.filter_empty_instances(instances)
        else:
            no_masks = np.zeros((0, *image_shape), dtype=bool)
            dataset_dict["instances"] = self._make_instances([], np.zeros((0, 4)), no_masks)

    def _visible_instances(
        self, segments_info: List[Dict], numbers: np.ndarray, augmented: np.ndarray, transforms
    ) -> Instances:
        """
        The things that are no crowds and still have a pixel, as Detectron2 makes instances
        from annotations.

        Args:
            numbers: (H, W) of :func:`index_segments`.
            augmented: `numbers` under `transforms`.
        """
        seen = set(np.unique(augmented).tolist())
        things = {
            _number(i): s["category_id"]
            for i, s in enumerate(segments_info, start=1)
            if s["isthing"] and not s.get("iscrowd", 0) and _number(i) in seen
        }
        boxed = augmented if self.recompute_boxes else numbers
        rects = [cv2.boundingRect((boxed == number).view(np.uint8)) for number in things]
        boxes = np.array(rects, dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if not self.recompute_boxes:
            boxes = transforms.apply_box(boxes).clip(0, augmented.shape[::-1] * 2)
        masks = augmented == np.array([*things], dtype=augmented.dtype)[:, None, None]
        return self._make_instances([*things.values()], boxes, masks)

    def _make_instances(
        self, classes: List[int], boxes: np.ndarray, masks: np.ndarray
    ) -> Instances:
        instances = Instances(masks.shape[1:])
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.from_numpy(masks))
        return instances

    def _add_labels(self, dataset_dict: Dict, positions: np.ndarray) -> None:
        listed = dataset_dict.pop("segments_info")
        segments_info = [{**s, "id": i} for i, s in enumerate(listed, start=1)]
        categories = labels = panoptic_categories(segments_info, self.num_things)
        if self.stuff_only:
            labels = np.maximum(categories - self.num_things + 1, 0)
        labels = np.where(categories < 0, self.ignore_value, labels)
        dataset_dict["panoptic_seg"] = (torch.from_numpy(positions), segments_info)
        # take is several times as fast as indexing
        dataset_dict["panoptic_category"] = torch.from_numpy(categories.take(positions))
        dataset_dict["sem_seg"] = torch.from_numpy(labels.take(positions))
