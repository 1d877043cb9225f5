"""
How many classes a model has follows from its datasets.
"""

from typing import Dict, List

from detectron2.data import DatasetCatalog, MetadataCatalog

from .register import register_from_config

__all__ = ["check_classes", "complete_config"]

SAME_CLASSES = "datasets of one config must have the same classes in the same order."


def complete_config(cfg):
    """
    Register the datasets that the config describes (`DATASETS.PANOPTIC`), and fill in the class
    counts that it leaves to its datasets (0). Call it before the config is frozen.

    Args:
        cfg (CfgNode): changed in place.

    Raises:
        ValueError: see :func:`register_from_config` and :func:`check_classes`; or the config wants
            files unpickled that are no checkpoints, without MODEL.ALLOW_PICKLE.
    """
    if cfg.MODEL.LOAD_PROPOSALS and not cfg.MODEL.ALLOW_PICKLE:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True: Detectron2 unpickles proposals, which can run any code. "
            "If you trust the files, set MODEL.ALLOW_PICKLE True."
        )
    register_from_config(cfg)
    for name in _datasets(cfg)[:1]:
        for key, (found, right) in _class_counts(cfg, name).items():
            if found == 0:
                cfg.merge_from_list([key, right])
    check_classes(cfg)


def check_classes(cfg):
    """
    Compare the class counts of the config with those of its datasets, and the classes of these
    with each other.

    Raises:
        ValueError: they differ; the message names the key, both numbers (or both classes) and what
            would be right.
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
                    f"{len(metadata.thing_dataset_id_to_contiguous_id)} thing and "
                    f"{len(metadata.stuff_dataset_id_to_contiguous_id)} stuff classes: with "
                    f"MODEL.SEM_SEG_HEAD.SUPERVISION {cfg.MODEL.SEM_SEG_HEAD.SUPERVISION!r} it "
                    f"must be {right}{how}"
                )
        for field in ("thing_classes", "stuff_classes"):
            first, other = (getattr(MetadataCatalog.get(x), field) for x in (names[0], name))
            for i, (theirs, ours) in enumerate(zip(first, other)):
                if theirs != ours:
                    raise ValueError(
                        f"{field}[{i}] of dataset {name!r} is {ours!r}, of {names[0]!r} it is "
                        f"{theirs!r}. A model knows classes by their position; {SAME_CLASSES}"
                    )


def _datasets(cfg) -> List[str]:
    for key in ("TRAIN", "TEST"):
        if not isinstance(cfg.DATASETS[key], (list, tuple)):
            found = cfg.DATASETS[key]
            raise ValueError(f"DATASETS.{key} is {found!r}; it must be a list of names.")
    return [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]


def _class_counts(cfg, dataset: str) -> Dict:
    """
    Returns:
        key -> (number in the config, number for the dataset).
    """
    if not isinstance(dataset, str) or dataset not in DatasetCatalog:
        raise ValueError(
            f"There is no dataset {dataset!r}. Register it with oanet_d2.register_panoptic, or "
            "describe it in DATASETS.PANOPTIC."
        )
    metadata = MetadataCatalog.get(dataset)
    # Detectron2's own panoptic datasets of Cityscapes count things and stuff together.
    if "things" not in getattr(metadata, "stuff_classes", ())[:1]:
        raise ValueError(
            f"Dataset {dataset!r} is not registered as a panoptic dataset; register it with "
            "oanet_d2.register_panoptic."
        )
    num_things = len(metadata.thing_dataset_id_to_contiguous_id)
    num_stuff = len(metadata.stuff_dataset_id_to_contiguous_id)
    stuff_only = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION == "stuff"
    return {
        "MODEL.ROI_HEADS.NUM_CLASSES": (cfg.MODEL.ROI_HEADS.NUM_CLASSES, num_things),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": (
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            num_stuff + (1 if stuff_only else num_things),
        ),
    }
