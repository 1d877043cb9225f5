import copy
from typing import Dict, List, Sequence, Tuple

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_util

import detectron2.data.transforms as T
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.projects.point_rend import ColorAugSSDTransform
from detectron2.structures import BitMasks, Boxes, Instances

from ..painting.arrays import Runs
from .copy_paste import cut_out, paste
from .images import naming
from .load import read_file, read_truth

__all__ = ["PanopticDatasetMapper"]

# Detectron2's augmentations that pad (FixedSizeCrop) fill a label map with this value.
PADDING = 255


def index_segments(runs: Runs, shape: Tuple[int, ...], segments_info: List[Dict]) -> np.ndarray:
    """
    Number the segments for augmentations, which are fastest on uint8: by their position in
    `segments_info`, counted from 1. From 255 segments on they count from 256, as float32, because 255
    is padding. Void is 0.

    Args:
        runs, shape: of the segment ids, see :func:`read_truth`.
        segments_info: list[dict] with "id".
    """
    found, inverse, lengths = runs
    dtype, first = (np.uint8, 1) if len(segments_info) < PADDING else (np.float32, PADDING + 1)
    number = {s["id"]: i for i, s in enumerate(segments_info, start=first)}
    numbers = np.array([number.get(i, 0) for i in found.tolist()], dtype=dtype)
    return numbers[inverse].repeat(lengths).reshape(shape)


def segment_positions(numbers: np.ndarray) -> np.ndarray:
    """
    From :func:`index_segments`, augmented, back to positions, counted from 1, in the same dtype.
    Padding is 0, as void is.
    """
    if numbers.dtype == np.uint8:
        return numbers * (numbers != PADDING)
    return np.maximum(numbers - PADDING, 0)


def visible_instances(segments_info: List[Dict], ids: np.ndarray) -> Instances:
    """
    The things that are no crowds and have a pixel, as Detectron2 makes instances from annotations.

    Args:
        segments_info, ids: counted from 1, see :func:`segment_positions`.
    """
    seen = set(np.unique(ids).tolist())
    things = {
        s["id"]: s["category_id"]
        for s in segments_info
        if s["isthing"] and not s.get("iscrowd", 0) and s["id"] in seen
    }
    masks = ids == np.array([*things], dtype=ids.dtype)[:, None, None]
    return _instances([*things.values()], masks)


def _instances(classes: List[int], masks: np.ndarray) -> Instances:
    return Instances(
        masks.shape[1:],
        gt_boxes=_boxes(masks),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_masks=BitMasks(torch.from_numpy(masks)),
    )


def _boxes(masks: np.ndarray) -> Boxes:
    # BitMasks.get_bounding_boxes takes ten times as long.
    rects = np.array([cv2.boundingRect(mask.view(np.uint8)) for mask in masks]).reshape(-1, 4)
    return Boxes(np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], axis=1))


class PanopticDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` for datasets registered by :func:`register_panoptic`. In training it adds,
    under the same augmentations as the image,

    * "panoptic_seg": (H, W) int64 segment ids, counted from 1 (0 is void), and segments_info with
      contiguous "category_id", as the model returns it;
    * "panoptic_category": (H, W) int64. Thing class c is c, stuff class s (counted from 1) is
      num_things + s - 1, void is -1. A crowd counts as its class;
    * "sem_seg": (H, W) int64, the labels of the semantic head.

    Without "annotations", the instances are the visible parts of the things in the panoptic PNG. Their
    masks are bitmasks, whatever `instance_mask_format` is. Boxes always come from the masks.
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
        copy_paste: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            num_things: number of thing classes.
            stuff_only: what "sem_seg" holds. True: Panoptic FPN's labels, 0 for any thing and stuff
                from 1 on. False: panoptic categories.
            ignore_value: label of void in "sem_seg".
            read_image: False: no image file is opened, and there is no "image" in the result.
            copy_paste: the probability that instances of another image are pasted.
            kwargs: see :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.num_things = num_things
        self.stuff_only = stuff_only
        self.ignore_value = ignore_value
        self.read_image = read_image
        self.copy_paste = copy_paste

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        ret, crop = super().from_config(cfg, is_train), cfg.INPUT.CROP
        most = crop.SINGLE_CATEGORY_MAX_AREA  # PointRend's key, as COLOR_AUG_SSD; here, of one segment
        if is_train and crop.ENABLED and most < 1:
            limited = T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, most, ignored_category=0)
            ret["augmentations"][0] = limited
        if is_train and cfg.INPUT.COLOR_AUG_SSD and cfg.MODEL.META_ARCHITECTURE != "SRMFromAnnotations":
            ret["augmentations"].append(ColorAugSSDTransform(cfg.INPUT.FORMAT))
        ret["num_things"] = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        ret["stuff_only"] = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff"
        ret["ignore_value"] = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        ret["read_image"] = cfg.MODEL.META_ARCHITECTURE != "SRMFromAnnotations"
        ret["copy_paste"] = cfg.INPUT.COPY_PASTE
        return ret

    def __call__(self, dataset_dict, others: Sequence[Dict] = ()):
        """
        Args:
            dataset_dict (dict): one image, as :func:`load_panoptic` returns it.
            others: in training, images whose instances may be pasted, see :func:`cut_out`.

        Returns:
            dict: what OANet takes. In inference the ground truth stays a file name.

        Raises:
            ValueError: a file or an annotation is not as it should be. The message names it.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        file_name, annotations = dataset_dict["file_name"], dataset_dict.pop("annotations", None)
        if self.read_image:
            image = read_file(dataset_dict, "image", self.image_format)
        else:  # augmentations look at its size
            image = np.zeros((dataset_dict["height"], dataset_dict["width"]), dtype=np.uint8)
        numbers = None
        if self.is_train:
            ids, runs = read_truth(dataset_dict)
            numbers = index_segments(runs, ids.shape, dataset_dict["segments_info"])
        else:
            read_file(dataset_dict, "PNG")  # its header; evaluators read the rest

        aug_input = T.AugInput(image, sem_seg=numbers)
        with naming(f"{file_name}, augmented from {image.shape[1]} x {image.shape[0]} pixels"):
            transforms = self.augmentations(aug_input)
        image = aug_input.image
        if self.read_image:
            dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if numbers is None:
            return dataset_dict

        ids = segment_positions(aug_input.sem_seg)
        listed = [{**s, "id": i} for i, s in enumerate(dataset_dict["segments_info"], start=1)]
        dataset_dict["segments_info"] = listed
        with naming(f"annotations of {file_name}"):
            dataset_dict["instances"] = (
                visible_instances(listed, ids)
                if annotations is None
                else self._annotated_instances(annotations, transforms, image.shape[:2])
            )
        ids = ids.astype(np.int64)
        if len(others) > 0 and np.random.rand() < self.copy_paste:
            source = others[np.random.randint(len(others))]
            image_format = self.image_format if self.read_image else None
            paste(cut_out(source, image.shape[:2], image_format), dataset_dict, ids)
        self._add_labels(dataset_dict, ids)
        return dataset_dict

    def _annotated_instances(self, annotations: List[Dict], transforms, image_shape) -> Instances:
        """
        As Detectron2's, except that boxes come from the masks, that padding is no part of a mask, that
        one RLE makes bitmasks of all masks of an image, and that an image without instances has masks,
        too (none).
        """
        transformed, mask_format = [], self.instance_mask_format
        for x in annotations:
            if x.get("iscrowd", 0):
                continue
            mask = x.pop("segmentation")
            if not self.use_keypoint:
                x.pop("keypoints", None)
            if isinstance(mask, list):
                x["segmentation"] = [np.asarray(polygon, dtype=float) for polygon in mask]
            flip = {"keypoint_hflip_indices": self.keypoint_hflip_indices}
            x = utils.transform_instance_annotations(x, transforms, image_shape, **flip)
            if not isinstance(mask, list):
                x["segmentation"] = transforms.apply_segmentation(mask_util.decode(mask)) == 1
                mask_format = "bitmask"
            transformed.append(x)
        if not transformed:
            return _instances([], np.zeros((0, *image_shape), dtype=bool))
        instances = utils.annotations_to_instances(transformed, image_shape, mask_format)
        if "score" in transformed[0]:
            instances.scores = torch.tensor([x["score"] for x in transformed])
        if mask_format == "bitmask":
            instances.gt_boxes = _boxes(instances.gt_masks.tensor.numpy())
        else:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        instances = utils.filter_empty_instances(instances)
        instances.gt_boxes.clip(image_shape)  # polygons may leave the image
        return instances

    def _add_labels(self, dataset_dict: Dict, ids: np.ndarray) -> None:
        segments_info = dataset_dict.pop("segments_info")
        categories = np.full(1 + max((s["id"] for s in segments_info), default=0), -1)
        for s in segments_info:
            categories[s["id"]] = s["category_id"] + (0 if s["isthing"] else self.num_things - 1)
        labels = np.maximum(categories - self.num_things + 1, 0) if self.stuff_only else categories
        labels = np.where(categories < 0, self.ignore_value, labels)
        dataset_dict["panoptic_seg"] = (torch.from_numpy(ids), segments_info)
        # take is several times as fast as indexing
        dataset_dict["panoptic_category"] = torch.from_numpy(categories.take(ids))
        dataset_dict["sem_seg"] = torch.from_numpy(labels.take(ids))
