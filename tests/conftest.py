import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng

import oanet_d2
from oanet_d2 import complete_config, register_panoptic
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.modeling.grid import GridInstances, relative_boxes

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"

# The demo's network with as few channels as can be.
SMALLEST = ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"]
SMALLEST += ["MODEL.SEM_SEG_HEAD.NORM", "", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
SMALLEST += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.SRM_HEAD.CONV_DIM", "8"]

settings.register_profile("oanet_d2", deadline=None)  # first calls compile and load
settings.load_profile("oanet_d2")


def load_config(path, *opts):
    """A config of this project, on the CPU and without weights to download."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]
    cfg = oanet_d2.load_config(CONFIGS / path, opts)
    complete_config(cfg)
    return cfg


@pytest.fixture
def tiny_cfg():
    """The demo's network at its smallest, with one mask for all classes."""
    return load_config(
        "OcclusionScenes/oanet_R_18.yaml",
        *SMALLEST,
        *["MODEL.SRM_HEAD.KERNEL_SIZE", "5", "TEST.ORDERS", "()"],
        *["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"],
    )


def panoptic_fpn_cfg(cfg):
    """The config of Detectron2's Panoptic FPN that an OANet's is based on."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    return cfg


def make_instances(size, boxes, classes, masks=None):
    """
    Ground-truth instances in an image of `size`; masks default to the filled boxes.

    Args:
        boxes: list of integer XYXY boxes.
    """
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if masks is None:
        masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes):
            mask[y0:y1, x0:x1] = True
    instances.gt_masks = BitMasks(masks)
    return instances


def make_input(size, boxes, classes, stuff=None, num_things=8, seed=0):
    """
    A training input as PanopticDatasetMapper gives it: filled boxes, later ones on top.

    Args:
        stuff: stuff class behind the things, counted from 1, or None for void.
    """
    generator = torch.Generator().manual_seed(seed)
    category = torch.full(size, -1 if stuff is None else num_things + stuff - 1)
    for (x0, y0, x1, y1), c in zip(boxes, classes):
        category[y0:y1, x0:x1] = c
    segments = [thing(i, c) for i, c in enumerate(classes, start=1)]
    index = torch.zeros(size, dtype=torch.int64)
    if stuff is not None:
        segments.append({"id": len(segments) + 1, "category_id": stuff, "isthing": False})
        index[:] = len(segments)
    for i, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        index[y0:y1, x0:x1] = i
    return {
        "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
        "height": size[0],
        "width": size[1],
        "instances": make_instances(size, boxes, classes),
        "panoptic_seg": (index, segments),
        "panoptic_category": category,
        "sem_seg": category.where(category >= 0, torch.tensor(255)),
    }


def thing(i, c, **extra):
    """A thing's entry in segments_info."""
    return {"id": i, "category_id": c, "isthing": True, **extra}


def box_mask(x0, y0, x1, y1, size=(10, 12)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def make_grid_instances(masks, classes, scores=None):
    """
    Instances with the given masks; their boxes are the masks' extents.

    Args:
        masks: (N, h, w) bool.
        classes, scores: N of each; scores default to 0.9, 0.8, ...
    """
    if scores is None:
        scores = [0.9 - 0.1 * i for i in range(len(classes))]
    return GridInstances(
        masks,
        torch.as_tensor(classes, dtype=torch.int64),
        torch.as_tensor(scores, dtype=torch.float32),
        relative_boxes(BitMasks(masks).get_bounding_boxes().tensor, masks.shape[1:]),
    )


def random_scene(seed, n, size=(6, 7), num_segments=4, num_classes=2):
    """
    N random boxes and, independent of them, a random panoptic ground truth of things.

    Returns:
        masks, classes, scores, ids, segments_info.
    """
    rng = np.random.default_rng(seed)

    def random_box():
        x, y = rng.integers(0, size[1] - 2), rng.integers(0, size[0] - 2)
        return box_mask(x, y, x + rng.integers(1, 6), y + rng.integers(1, 5), size)

    ids, segments = torch.zeros(size, dtype=torch.int64), []
    for i in range(1, num_segments + 1):
        ids[random_box()] = i
        segments.append(thing(i, int(rng.integers(num_classes))))
    masks = torch.stack([random_box() for _ in range(n)])
    classes = torch.from_numpy(rng.integers(0, num_classes, n))
    scores = torch.from_numpy(rng.permutation(n) / 10 + 0.1)
    return masks, classes, scores, ids, segments


@contextmanager
def registered(name, *paths):
    """A dataset that is registered, by `register_panoptic(name, *paths)`, only in here."""
    register_panoptic(name, *map(str, paths))
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def scenes_paths(root, split):
    """What `register_panoptic` takes, for a split of OcclusionScenes."""
    annotations = root / "annotations"
    panoptic, instances = (annotations / f"{x}_{split}.json" for x in ("panoptic", "instances"))
    return root / split, panoptic, root / f"panoptic_{split}", instances


@pytest.fixture(scope="session")
def subprocess_env():
    """Environment for subprocesses that run this checkout."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"needs to mount a file system: {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for split, n in (("train", 6), ("val", 3)):
        write_split(root, split, n, image_size=64, seed=0, num_workers=0)
    with registered("few_scenes_train", *scenes_paths(root, "train")) as train:
        with registered("few_scenes_val", *scenes_paths(root, "val")) as val:
            yield train, val


@pytest.fixture
def train_cfg(few_scenes, tmp_path):
    """
    The demo's network at its smallest, learning as a whole on a few scenes; a checkpoint every
    second step.
    """
    return load_config(
        "OcclusionScenes/oanet_R_18.yaml",
        *SMALLEST,
        *["DATASETS.TRAIN", f"('{few_scenes[0]}',)", "DATASETS.TEST", "()", "TEST.ORDERS", "()"],
        *["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"],
        *["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "6"],
        *["SOLVER.CHECKPOINT_PERIOD", "2", "OUTPUT_DIR", str(tmp_path / "out")],
        *["SOLVER.SRM_ONLY_SHARE", "0.0"],
    )


def trainer_of(cfg):
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(1)
    return OANetTrainer(cfg)


class AfterStep(HookBase):
    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def after_step(self):
        if self.trainer.iter == self.iteration:
            self.action()
