"""
Copy-paste with known order (compare Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation
Method for Instance Segmentation", CVPR 2021): instances of another image go in front of an image or
behind some of its instances, so it is known who lies on whom. What is covered keeps its whole mask.

Random numbers come from NumPy's global state, the same with and without images.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_util

from detectron2.structures import BitMasks, Boxes, Instances, polygons_to_bitmask

from ..painting.masks import BoxedMasks, Region
from ..painting.matching import match_to_segments, visible_margins
from ..painting.ranking import order_from_margins
from .images import naming
from .load import as_rle, read_file

__all__ = ["Cutout", "cut_out", "paste"]

MOST = 3  # instances of one source
WHOLE = 0.9  # of a source instance is visible at least
SCALES = 0.5, 2.0  # beside that which brings the source to the size of the image
LONGEST = 0.7  # a side of a pasted box, as a share of the image's
VISIBLE = 0.1  # of a pasted instance at least, or it is left out


class Cutout(NamedTuple):
    """
    Attributes:
        mask: (h, w) bool, the instance in its box.
        pixels: (h, w, C), the image there; None without images.
        category_id: contiguous thing class.
    """

    mask: np.ndarray
    pixels: Optional[np.ndarray]
    category_id: int


def cut_out(source: Dict, size: Tuple[int, int], image_format: Optional[str]) -> List[Cutout]:
    """
    Cut up to MOST random instances out of an image, and scale and flip them at random. They are no
    crowds, and nearly all of them is visible: by the annotations, or, without any, by definition.

    Args:
        source: dataset dict of :func:`load_panoptic`; it is not changed.
        size: (H, W) of the image that they are for.
        image_format: see :func:`read_image`; None: no image is read.

    Raises:
        ValueError: a file or an annotation is not as it should be. The message names it.
    """
    ids = read_file(source, "PNG", "segment ids")
    things = [s for s in source["segments_info"] if s["isthing"] and not s.get("iscrowd", 0)]
    found = []
    for i in np.random.permutation(len(things))[: 3 * MOST]:  # so that the time has a limit
        mask = (ids == things[i]["id"]).view(np.uint8)
        box, category_id = cv2.boundingRect(mask), things[i]["category_id"]
        mask = mask[_region(box)]
        with naming(f"annotations of {source['file_name']}"):
            if _is_whole(box, mask, category_id, source):
                found.append((_region(box), mask, category_id))
        if len(found) == MOST:
            break
    image = read_file(source, "image", image_format) if found and image_format else None
    usual = np.sqrt(np.prod(size) / ids.size)
    cutouts = []
    for region, mask, category_id in found:
        scale = usual * np.exp(np.random.uniform(*np.log(SCALES)))
        scale = min(scale, *(LONGEST * a / b for a, b in zip(size, mask.shape)))
        h, w = (max(round(scale * side), 1) for side in mask.shape)
        step = np.random.choice([1, -1])
        mask = cv2.resize(mask, (w, h), interpolation=cv2.INTER_NEAREST)[:, ::step]
        tight = _region(cv2.boundingRect(mask.copy()))  # thin parts may be lost
        pixels = None
        if image is not None:
            smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            pixels = cv2.resize(image[region], (w, h), interpolation=smooth)
            pixels = pixels.reshape(h, w, -1)[:, ::step][tight]
        cutouts.append(Cutout(mask[tight] > 0, pixels, category_id))
    return cutouts


def _region(rect: Sequence[int]) -> Region:
    x, y, w, h = rect
    return slice(y, y + h), slice(x, x + w)


def _is_whole(box: Sequence[int], mask: np.ndarray, category_id: int, source: Dict) -> bool:
    """
    Whether an annotation has the class, the box and the area of a visible mask: what is hidden of
    an instance shrinks at least one of them.
    """
    if mask.size == 0 or "annotations" not in source:
        return mask.size > 0
    size = source["height"], source["width"]
    wholes = [
        as_rle(x["segmentation"], *size)
        for x in source["annotations"]
        if x["category_id"] == category_id and not x.get("iscrowd", 0)
    ]
    if not wholes:
        return False
    near = mask_util.iou(np.array([box], float), mask_util.toBbox(wholes), [0] * len(wholes))[0]
    return bool(((near >= WHOLE) & (mask_util.area(wholes) * WHOLE <= mask.sum())).any())


def paste(cutouts: List[Cutout], sample: Dict, ids: np.ndarray) -> None:
    """
    Paste each cutout near an instance: in front of everything, or behind the instance and all that
    lies on it, but in front of the rest. Painting the whole masks in one order still gives the
    panoptic map, if it did before. Segments that get hidden leave "segments_info" and "instances".

    Args:
        sample: changed in place. "image", (C, H, W), if there is one; "segments_info" with the ids 1
            to N; "instances" with "gt_boxes", "gt_classes" and "gt_masks" of any kind, which become
            bitmasks. The instances pasted are the last ones, and so are their segments.
        ids: (H, W) int64 segment ids. Changed in place.
    """
    if not cutouts:
        return
    instances, segments_info = sample["instances"], sample["segments_info"]
    size, number = instances.image_size, len(instances)
    regions, masks = _regions_and_masks(instances)
    make, device = lambda i: torch.from_numpy(masks[i]), torch.device("cpu")
    boxed = BoxedMasks(regions, make, size, device)
    classes, truth = instances.gt_classes.tolist(), torch.from_numpy(ids)
    no_crowds = [s for s in segments_info if not s.get("iscrowd", 0)]
    matched = match_to_segments(boxed, instances.gt_classes, truth, no_crowds)
    margins, own = visible_margins(boxed, matched, truth), matched.tolist()
    # Where nothing decides, chance does.
    order = order_from_margins(margins, torch.from_numpy(np.random.rand(number))).tolist()

    for mask, pixels, category_id in cutouts:
        seen = [i for i in order if own[i] > 0]
        beside = seen[np.random.randint(len(seen))] if seen else None
        near = [slice(0, n) for n in size] if beside is None else regions[beside]
        (h, w), centers = mask.shape, [np.random.uniform(x.start, x.stop) for x in near]
        y, x = (int(np.clip(c - n / 2, 0, m - n)) for c, n, m in zip(centers, mask.shape, size))
        region = _region((x, y, w, h))
        place = 0 if beside is None or np.random.rand() < 0.5 else order.index(beside) + 1
        front = [i for i in order[:place] if own[i] > 0]
        hidden = np.zeros(size, dtype=bool)
        for i in front:
            hidden[regions[i]] |= masks[i]
        visible = mask & ~hidden[region] & ~np.isin(ids[region], [own[i] for i in front])
        if visible.sum() <= VISIBLE * mask.sum():
            continue
        order.insert(place, len(own))
        own.append(len(segments_info) + 1)
        segment = {"id": own[-1], "category_id": category_id, "isthing": True, "iscrowd": 0}
        segments_info.append(segment)
        ids[region][visible] = own[-1]
        if pixels is not None:
            image = sample["image"].numpy().transpose(1, 2, 0)
            np.copyto(image[region], pixels, where=visible[:, :, None])
        masks.append(mask)
        regions.append(region)
        classes.append(category_id)

    if len(own) == number:
        return
    present = np.bincount(ids.ravel(), minlength=len(segments_info) + 1) > 0
    sample["segments_info"] = [s for s in segments_info if present[s["id"]]]
    kept = [i for i, id in enumerate(own) if id < 0 or present[id]]
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in regions]
    sample["instances"] = Instances(
        size,
        gt_boxes=Boxes(np.array(boxes)[kept]),
        gt_classes=torch.tensor(classes)[kept],
        gt_masks=BitMasks(BoxedMasks(regions, make, size, device).select(kept).full()),
    )


def _regions_and_masks(instances: Instances) -> Tuple[List[Region], List[np.ndarray]]:
    """Every mask in its box, which is grown to whole pixels: boxes of polygons have fractions."""
    size, kind = np.array(instances.image_size[::-1]), instances.gt_masks
    boxes = instances.gt_boxes.tensor.double().numpy()
    first = np.floor(boxes[:, :2]).clip(0, size - 1)
    last = np.ceil(boxes[:, 2:]).clip(first + 1, size)  # a pixel, if a polygon is beside the image
    regions, masks = [], []
    for i, corners in enumerate(np.concatenate([first, last], axis=1).astype(int)):
        x0, y0, x1, y1 = corners.tolist()
        regions.append((slice(y0, y1), slice(x0, x1)))
        # The canvas ends where the polygon's box ends, which saves time. It begins at the image's
        # corner: pycocotools rounds some pixels of the boundary otherwise in a polygon that is moved.
        is_bitmask = isinstance(kind, BitMasks)
        mask = kind.tensor[i].numpy() if is_bitmask else polygons_to_bitmask(kind.polygons[i], y1, x1)
        masks.append(mask[regions[i]])
    return regions, masks
