import copy
from contextlib import contextmanager
from typing import Dict, List, Optional, Tuple

import cv2
import numpy as np
import torch
from PIL import Image

import detectron2.data.transforms as T
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.file_io import PathManager

__all__ = [
    "PanopticDatasetMapper",
    "index_segments",
    "panoptic_categories",
]

CHECK = "`python -m oanet_d2.data.check` finds all such mistakes in a dataset."


@contextmanager
def naming(file_name: str):
    """
    Whatever goes wrong in here becomes a ValueError that says with which file.

    Args:
        file_name: what the message begins with.

    Raises:
        ValueError: from the original error.
    """
    try:
        yield
    except Exception as e:
        reason = str(e) if isinstance(e, (OSError, ValueError)) else f"{type(e).__name__}: {e}"
        raise ValueError(f"{file_name}: {reason}") from e


def read_image(file_name: str, format: str) -> np.ndarray:
    """
    As Detectron2's function of this name, for images of 8 bits per channel or fewer. Of more, PIL
    would keep the upper 8 bits or cut off what is above 255, and not say so.

    Args:
        file_name: image file.
        format: see :func:`detection_utils.read_image`.

    Returns:
        (H, W, C) array.

    Raises:
        ValueError: if the file cannot be read or has more than 8 bits per channel.
    """
    with naming(file_name):
        with PathManager.open(file_name, "rb") as f:
            start = f.read(25)
            mode = Image.open(f).mode
        # To PIL a PNG of 3 x 16 bits is of mode RGB; its header has the bit depth.
        if start.startswith(b"\x89PNG") and start[24:] == b"\x10":
            mode += ", a PNG of 16 bits"
        if mode in ("I", "F") or "16" in mode:
            raise ValueError(
                f"more than 8 bits per channel (PIL's mode {mode}); convert it to 8 bits per "
                "channel, such as PIL's modes L and RGB."
            )
        if format != "BGR":
            return utils.read_image(file_name, format)
        # Detectron2's BGR is a view of RGB from behind, on which augmentations are slower.
        return cv2.cvtColor(utils.read_image(file_name, "RGB"), cv2.COLOR_RGB2BGR)


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
    # The map is constant over long runs: only where they start is there anything to look up.
    flat = ids.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    known, inverse = np.unique(flat[starts], return_inverse=True)
    position = {s["id"]: i for i, s in enumerate(segments_info, start=1)}
    dtype = np.uint8 if len(segments_info) < 256 else np.float32
    values = np.array([position.get(i, 0) for i in known.tolist()], dtype=dtype)
    return values[inverse].repeat(np.diff(starts, append=flat.size)).reshape(ids.shape)


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
    offsets = [0 if s["isthing"] else num_things - 1 for s in segments_info]
    of_segments = [s["category_id"] + offset for s, offset in zip(segments_info, offsets)]
    return torch.tensor([ignore_value, *of_segments])


class PanopticDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` for datasets registered by :func:`register_panoptic`. Without
    "annotations", instances are the visible parts of the things in the panoptic ground truth; their
    masks are bitmasks, whatever `instance_mask_format` is. In training it adds, all under the same
    augmentations as the image,

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

        Raises:
            ValueError: if a file or an annotation is not as it should be; it names the file.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = self._read_image(dataset_dict)
        index: Optional[np.ndarray] = None
        if self.is_train:
            ids = self._read_ids(dataset_dict, image.shape[:2])
            index = self._index_segments(dataset_dict, ids)

        aug_input = T.AugInput(image, sem_seg=index)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        if self.read_image:
            dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
            return dataset_dict
        assert index is not None  # read above

        with naming(f"annotations of {dataset_dict['file_name']}"):
            if "annotations" in dataset_dict:
                self._transform_annotations(dataset_dict, transforms, image.shape[:2])
            else:
                dataset_dict["instances"] = self._visible_instances(
                    dataset_dict["segments_info"], index, aug_input.sem_seg, transforms
                )
            self._add_labels(dataset_dict, aug_input.sem_seg)
        return dataset_dict

    def _read_image(self, dataset_dict: Dict) -> np.ndarray:
        if not self.read_image:
            # Augmentations need something of the image's size to look at.
            return np.zeros((dataset_dict["height"], dataset_dict["width"]), dtype=np.uint8)
        image = read_image(dataset_dict["file_name"], self.image_format)
        utils.check_image_size(dataset_dict, image)
        return image

    def _read_ids(self, dataset_dict: Dict, image_size: Tuple[int, ...]) -> np.ndarray:
        file_name = dataset_dict["pan_seg_file_name"]
        # rgb2id in one go: PIL keeps RGB in four bytes, lowest first, of which the last is alpha.
        ids = read_image(file_name, "RGBA").view("<u4")[:, :, 0] & 0xFFFFFF
        if ids.shape != image_size:
            raise ValueError(
                f"{file_name}: {ids.shape[1]} x {ids.shape[0]} pixels, but the image "
                f"{dataset_dict['file_name']} has {image_size[1]} x {image_size[0]}. {CHECK}"
            )
        return ids

    def _index_segments(self, dataset_dict: Dict, ids: np.ndarray) -> np.ndarray:
        with naming(dataset_dict["pan_seg_file_name"]):
            index = index_segments(ids, dataset_dict["segments_info"])
            unlisted = np.unique(ids[(index == 0) & (ids != 0)]).tolist()
            if unlisted:
                more = f" and {len(unlisted) - 5} more" if len(unlisted) > 5 else ""
                raise ValueError(
                    f"segments_info does not list the ids {unlisted[:5]}{more}; 0 is void. {CHECK}"
                )
        return index

    def _transform_annotations(self, dataset_dict: Dict, transforms, image_shape: Tuple[int, ...]):
        annotations = [a for a in dataset_dict["annotations"] if not a.get("iscrowd", 0)]
        if self.use_instance_mask and not all("segmentation" in a for a in annotations):
            raise ValueError("an instance has no segmentation.")
        # Detectron2 transforms integers in place, and so cuts the results off to integers.
        for a in annotations:
            a["bbox"] = [float(x) for x in a["bbox"]]
            if isinstance(a.get("segmentation"), list):
                a["segmentation"] = [np.asarray(p, dtype=float) for p in a["segmentation"]]
        if annotations:
            mapper = self
            if not all(isinstance(a.get("segmentation", []), list) for a in annotations):
                # Of an RLE Detectron2 makes a bitmask, never polygons.
                mapper = copy.copy(self)
                mapper.instance_mask_format = "bitmask"
            DatasetMapper._transform_annotations(mapper, dataset_dict, transforms, image_shape)
        else:
            # Detectron2 leaves the masks out then, and fails where it is to take boxes from them.
            del dataset_dict["annotations"]
            masks = np.zeros((0, *image_shape), dtype=bool)
            dataset_dict["instances"] = self._make_instances([], np.zeros((0, 4)), masks)

    def _visible_instances(
        self, segments_info: List[Dict], index: np.ndarray, augmented: np.ndarray, transforms
    ) -> Instances:
        """
        Instances from the panoptic ground truth: the visible part of every thing that is not a
        crowd, as bitmasks.

        Args:
            segments_info: the segments that `index` counts.
            index: (H, W), see :func:`index_segments`.
            augmented: `index` under `transforms`.

        Returns:
            those of which something is left, as Detectron2 makes them from annotations.
        """
        things = [
            i
            for i, s in enumerate(segments_info, start=1)
            if s["isthing"] and not s.get("iscrowd", 0) and (augmented == i).any()
        ]
        boxed = augmented if self.recompute_boxes else index
        rects = [cv2.boundingRect((boxed == i).view(np.uint8)) for i in things]
        boxes = np.array(rects, dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if not self.recompute_boxes:
            boxes = transforms.apply_box(boxes).clip(0, augmented.shape[::-1] * 2)
        classes = [segments_info[i - 1]["category_id"] for i in things]
        masks = augmented == np.array(things, dtype=augmented.dtype)[:, None, None]
        return self._make_instances(classes, boxes, masks)

    def _make_instances(
        self, classes: List[int], boxes: np.ndarray, masks: np.ndarray
    ) -> Instances:
        instances = Instances(masks.shape[1:])
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.from_numpy(masks))
        return instances

    def _add_labels(self, dataset_dict: Dict, index: np.ndarray):
        index = index.astype("int64")
        segments_info = [
            {**s, "id": i} for i, s in enumerate(dataset_dict.pop("segments_info"), start=1)
        ]
        categories = panoptic_categories(segments_info, self.num_things, self.ignore_value)
        dataset_dict["panoptic_seg"] = (torch.from_numpy(index), segments_info)
        # take is several times as fast as indexing
        dataset_dict["panoptic_category"] = torch.from_numpy(categories.numpy().take(index))
        dataset_dict["sem_seg"] = dataset_dict["panoptic_category"]
        if self.stuff_only:
            labels = (categories - self.num_things + 1).clamp(min=0)
            labels = labels.where(categories != self.ignore_value, self.ignore_value)
            dataset_dict["sem_seg"] = torch.from_numpy(labels.numpy().take(index))
