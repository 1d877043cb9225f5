"""
What follows from the datasets of a config, and what is wrong with it before any of them is read.
"""

from itertools import zip_longest
from operator import attrgetter
from typing import Any, List, Tuple

import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy

from ..modeling.timm_backbone import follow_timm_input
from .register import register_from_config

__all__ = ["complete_config"]

# What Detectron2 knows. It would refuse others in the middle of a training, not always by name.
CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "INPUT.CROP.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
}


def complete_config(cfg) -> None:
    """
    Register the datasets that the config describes (`DATASETS.PANOPTIC`), and fill in what follows
    from its datasets: class counts that are 0, and an IGNORE_VALUE that is no class. The input follows
    a backbone of timm (:func:`follow_timm_input`). Call it before the config is frozen.

    Args:
        cfg (CfgNode): changed in place. A second call changes nothing.

    Raises:
        ValueError: a value of the config is wrong, or its datasets differ in their classes.
    """
    follow_timm_input(cfg)
    _check_values(cfg)
    register_from_config(cfg)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        return
    things, stuff = _classes(names[0])
    for name in names[1:]:
        for kind, ours, theirs in zip(("thing", "stuff"), (things, stuff), _classes(name)):
            for i, (x, y) in enumerate(zip_longest(ours, theirs)):
                if x != y:
                    raise ValueError(
                        f"The {kind} class {i} of dataset {name!r} is {y!r}, of {names[0]!r} it is "
                        f"{x!r}. Datasets of one config must have the same classes in the same order."
                    )
    if len({*cfg.DATASETS.TEST}) < len(cfg.DATASETS.TEST):
        raise ValueError(f"DATASETS.TEST is {cfg.DATASETS.TEST!r}; it must name each dataset once.")
    if not things:
        # Detectron2's ROI heads need a class. This one is never annotated, and never detected.
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    num_things = max(1, len(things))
    supervision = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION
    labels = len(stuff) + (1 if supervision == "stuff" else num_things)
    counts = {"ROI_HEADS": num_things, "SEM_SEG_HEAD": labels, "POINT_HEAD": num_things}
    if cfg.MODEL.SEM_SEG_HEAD.NAME == "PointRendSemSegHead":
        counts["POINT_HEAD"] = labels
        mask_head = cfg.MODEL.ROI_MASK_HEAD
        reads_it = mask_head.POINT_HEAD_ON or mask_head.NAME == "ImplicitPointRendMaskHead"
        if reads_it and labels != num_things:
            raise ValueError(
                f"MODEL.POINT_HEAD.NUM_CLASSES must be {num_things} for PointRend's mask head and {labels} "
                "for its semantic head; set MODEL.SEM_SEG_HEAD.NAME to another head, or use "
                "PointRendMaskHead with MODEL.ROI_MASK_HEAD.POINT_HEAD_ON False."
            )
    for section, right in counts.items():
        found = cfg.MODEL[section].NUM_CLASSES
        if found not in (0, right):
            raise ValueError(
                f"MODEL.{section}.NUM_CLASSES is {found}, but dataset {names[0]!r} has {len(things)} "
                f"thing and {len(stuff)} stuff classes: with MODEL.SEM_SEG_HEAD.SUPERVISION "
                f"{supervision!r} it must be {right} (or 0, to follow the dataset)."
            )
        if found == 0:
            cfg.MODEL[section].NUM_CLASSES = right
    if 0 <= cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE < labels:
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = -1  # the mapper labels void with it


def _classes(dataset: str) -> Tuple[List[str], List[str]]:
    """Names of the thing and stuff classes."""
    if not isinstance(dataset, str) or dataset not in DatasetCatalog:
        raise ValueError(
            f"There is no dataset {dataset!r}. Register it with oanet_d2.register_panoptic, or "
            "describe it in DATASETS.PANOPTIC."
        )
    metadata = MetadataCatalog.get(dataset).as_dict()
    things = metadata.get("thing_classes", [])
    any_thing, *stuff = metadata.get("stuff_classes") or [""]
    keys = [f"{kind}_dataset_id_to_contiguous_id" for kind in ("thing", "stuff")]
    thing_ids, stuff_ids = (sorted(metadata.get(key, {}).values()) for key in keys)
    # Detectron2's panoptic datasets count things and stuff together. Its "separated" ones look like
    # ours, but the class 0 ("any thing") is one of the dataset's, and they have no segments_info.
    known = any_thing == "things" and stuff_ids == [*range(1, len(stuff) + 1)]
    if not known or thing_ids != [*range(len(things))]:
        raise ValueError(
            f"Dataset {dataset!r} is not registered as this project needs it. Register its files "
            "with oanet_d2.register_panoptic."
        )
    return things, stuff


def _check_values(cfg) -> None:
    if cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        raise ValueError(
            f"MODEL.LOAD_PROPOSALS is {cfg.MODEL.LOAD_PROPOSALS} and MODEL.PROPOSAL_GENERATOR.NAME is "
            f"{cfg.MODEL.PROPOSAL_GENERATOR.NAME!r}; a Panoptic FPN takes no proposals from files. Set "
            "them to False and, for example, 'RPN'."
        )
    if cfg.MODEL.META_ARCHITECTURE == "SRMFromAnnotations" and cfg.DATASETS.TEST:
        raise ValueError(
            f"DATASETS.TEST is {cfg.DATASETS.TEST!r}, but SRMFromAnnotations cannot predict; set it to "
            "() and evaluate its weights in an OANet (tools/attach_srm.py)."
        )
    if cfg.MODEL.KEYPOINT_ON and cfg.INPUT.COPY_PASTE > 0:
        raise ValueError(
            f"INPUT.COPY_PASTE is {cfg.INPUT.COPY_PASTE}, but what is pasted has no keypoints; with "
            "MODEL.KEYPOINT_ON set it to 0."
        )
    for key in ("TRAIN", "TEST"):
        found = cfg.DATASETS[key]
        if not isinstance(found, (list, tuple)):
            raise ValueError(f"DATASETS.{key} is {found!r}; it must be a list of names.")
    for key, known in CHOICES.items():
        found = attrgetter(key)(cfg)
        if found not in known:
            raise ValueError(f"{key} is {found!r}; it must be one of {known}.")
    crop = cfg.INPUT.CROP
    is_right = _is_share if crop.TYPE.startswith("relative") else _is_length
    if crop.ENABLED and not all(map(is_right, crop.SIZE)):
        raise ValueError(
            f"INPUT.CROP.SIZE is {crop.SIZE} and INPUT.CROP.TYPE {crop.TYPE!r}; a relative size has "
            "shares in (0, 1], an absolute one whole pixels."
        )
    sizes = cfg.TEST.AUG.MIN_SIZES
    if cfg.TEST.AUG.ENABLED and not (len(sizes) > 0 and all(map(_is_length, sizes))):
        raise ValueError(f"TEST.AUG.MIN_SIZES is {sizes}; it must hold numbers of whole pixels.")
    channels = len(cfg.MODEL.PIXEL_MEAN)
    try:
        shape = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), cfg.INPUT.FORMAT).shape
    except ValueError:
        shape = ()
    if shape[2:] not in ((1,), (channels,)):  # one channel stands for all
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; it must be 'BGR', 'RGB', or a format that "
            f"Detectron2 can read with {channels} channels, as MODEL.PIXEL_MEAN has."
        )
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: {error}") from error
    if device.type == "cpu" and device.index is not None:
        raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; it must be 'cpu', without a number.")


def _is_share(x: Any) -> bool:
    return 0 < x <= 1


def _is_length(x: Any) -> bool:
    return isinstance(x, int) and x > 0
