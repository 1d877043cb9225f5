"""
What follows from the datasets of a config, and what is wrong with it before any of them is read.
"""

from typing import Dict, List

import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy

from .register import register_from_config

__all__ = ["check_classes", "complete_config"]

SAME_CLASSES = "datasets of one config must have the same classes in the same order."


def complete_config(cfg) -> None:
    """
    Register the datasets that the config describes (`DATASETS.PANOPTIC`), and fill in the class
    counts that it leaves to its datasets (0). Call it before the config is frozen.

    Args:
        cfg (CfgNode): changed in place. A second call changes nothing.

    Raises:
        ValueError: the config is wrong. The message names the key, its value and what would be right.
    """
    _check_input(cfg)
    register_from_config(cfg)
    for name in _datasets(cfg)[:1]:
        for key, (found, right) in _class_counts(cfg, name).items():
            if found == 0:
                cfg.merge_from_list([key, right])
    check_classes(cfg)


def check_classes(cfg) -> None:
    """
    Compare the class counts of the config with those of its datasets, and the classes of these
    with each other.

    Raises:
        ValueError: they differ.
    """
    names = _datasets(cfg)
    for name in names:
        for key, (found, right) in _class_counts(cfg, name).items():
            if found != right:
                metadata = MetadataCatalog.get(name)
                fits_first = found == _class_counts(cfg, names[0])[key][1]
                also = f", as dataset {names[0]!r} needs it" if fits_first else ""
                how = f"; {SAME_CLASSES}" if fits_first else " (or 0, to follow the dataset)."
                raise ValueError(
                    f"{key} is {found}{also}, but dataset {name!r} has "
                    f"{len(metadata.thing_classes)} thing and {len(metadata.stuff_classes) - 1} "
                    f"stuff classes: with MODEL.SEM_SEG_HEAD.SUPERVISION "
                    f"{cfg.MODEL.SEM_SEG_HEAD.SUPERVISION!r} it must be {right}{how}"
                )
        for field in ("thing_classes", "stuff_classes"):
            first, other = (getattr(MetadataCatalog.get(x), field) for x in (names[0], name))
            for i, (theirs, ours) in enumerate(zip(first, other)):
                if theirs != ours:
                    raise ValueError(
                        f"{field}[{i}] of dataset {name!r} is {ours!r}, of {names[0]!r} it is "
                        f"{theirs!r}. A model knows classes by their position; {SAME_CLASSES}"
                    )


def _check_input(cfg) -> None:
    if cfg.MODEL.LOAD_PROPOSALS and not cfg.MODEL.ALLOW_PICKLE:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True: Detectron2 unpickles proposals, which can run any code. "
            "If you trust the files, set MODEL.ALLOW_PICKLE True."
        )
    if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
        found = cfg.INPUT.MASK_FORMAT
        raise ValueError(f"INPUT.MASK_FORMAT is {found!r}; it must be 'polygon' or 'bitmask'.")
    try:
        shape = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), cfg.INPUT.FORMAT).shape
    except ValueError:
        shape = ()
    if shape[2:] not in ((1,), (len(cfg.MODEL.PIXEL_MEAN),)):  # one channel stands for all
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; it must be 'BGR' or 'RGB', or a format of "
            f"Detectron2's with {len(cfg.MODEL.PIXEL_MEAN)} channels, as MODEL.PIXEL_MEAN has."
        )
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: {error}") from error
    if device.type == "cpu" and device.index is not None:
        raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; it must be 'cpu', without a number.")


def _datasets(cfg) -> List[str]:
    for key in ("TRAIN", "TEST"):
        if not isinstance(cfg.DATASETS[key], (list, tuple)):
            found = cfg.DATASETS[key]
            raise ValueError(f"DATASETS.{key} is {found!r}; it must be a list of names.")
    return [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]


def _class_counts(cfg, dataset: str) -> Dict:
    """Key -> (number in the config, number for the dataset)."""
    if not isinstance(dataset, str) or dataset not in DatasetCatalog:
        raise ValueError(
            f"There is no dataset {dataset!r}. Register it with oanet_d2.register_panoptic, or "
            "describe it in DATASETS.PANOPTIC."
        )
    metadata = MetadataCatalog.get(dataset).as_dict()
    stuff_classes = metadata.get("stuff_classes", [])
    stuff_ids = metadata.get("stuff_dataset_id_to_contiguous_id", {}).values()
    # Detectron2's panoptic datasets count things and stuff together. Its "separated" ones look like
    # ours, but list the stuff class 0 ("any thing") among the dataset's, and have no segments_info.
    if stuff_classes[:1] != ["things"] or sorted(stuff_ids) != [*range(1, len(stuff_classes))]:
        raise ValueError(
            f"Dataset {dataset!r} is not registered as this project needs it; register its files "
            "with oanet_d2.register_panoptic."
        )
    num_things, num_stuff = len(metadata["thing_classes"]), len(stuff_ids)
    stuff_only = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff"
    return {
        "MODEL.ROI_HEADS.NUM_CLASSES": (cfg.MODEL.ROI_HEADS.NUM_CLASSES, num_things),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": (
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            num_stuff + (1 if stuff_only else num_things),
        ),
    }
