import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine.hooks import CallbackHook
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng

import oanet_d2
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.modeling.grid import GridInstances
from oanet_d2.painting.masks import relative_boxes

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"

# The demo's network with as few channels as can be.
SMALLEST = ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"]
SMALLEST += ["MODEL.SEM_SEG_HEAD.NORM", "", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
SMALLEST += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.SRM_HEAD.CONV_DIM", "8"]
# A ResNet-18 cannot be made narrower: its checkpoints would be 20 times as large as this one's.
NARROW = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"]

# Without a deadline: first calls compile and load. The same examples in each run, so that a change
# fails for what it changed; `pytest --hypothesis-profile=default` looks for others.
settings.register_profile("oanet_d2", deadline=None, derandomize=True)
settings.load_profile("oanet_d2")


def load_config(path, *opts):
    """A config of this project, on the CPU and without weights to download."""
    cfg = oanet_d2.load_config(CONFIGS / path, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
    oanet_d2.complete_config(cfg)
    return cfg


@pytest.fixture
def tiny_cfg():
    """The demo's network at its smallest, with one mask for all classes."""
    opts = ["MODEL.SRM_HEAD.KERNEL_SIZE", "5", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"]
    return load_config("OcclusionScenes/oanet_R_18.yaml", *SMALLEST, *opts, "TEST.ORDERS", "()")


def panoptic_fpn_cfg(cfg):
    """The config of Detectron2's Panoptic FPN that an OANet's is based on."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    if cfg.MODEL.SEM_SEG_HEAD.NAME == "OANetSemSegFPNHead":
        cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    return cfg


def make_instances(size, boxes, classes, masks=None):
    """Ground truth for integer XYXY boxes in an image of `size`; masks default to filled boxes."""
    if masks is None:
        masks = torch.stack([box_mask(*box, size) for box in [*boxes, (0, 0, 0, 0)]])[: len(boxes)]
    instances = Instances(size, gt_classes=torch.tensor(classes, dtype=torch.int64))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_masks = BitMasks(masks)
    return instances


def make_input(size, boxes, classes, stuff=None, num_things=8, seed=0):
    """A training input of filled boxes, later ones on top, before a stuff class (from 1) or void."""
    category = torch.full(size, -1 if stuff is None else num_things + stuff - 1)
    index, segments = torch.zeros(size, dtype=torch.int64), []
    if stuff is not None:
        index[:] = len(boxes) + 1
        segments = [{"id": len(boxes) + 1, "category_id": stuff, "isthing": False}]
    for i, (box, c) in enumerate(zip(boxes, classes), start=1):
        mask = box_mask(*box, size)
        index[mask], category[mask] = i, c
    image = np.random.default_rng(seed).integers(0, 256, (3, *size), np.uint8)
    return {
        "image": torch.from_numpy(image),
        "height": size[0],
        "width": size[1],
        "instances": make_instances(size, boxes, classes),
        "panoptic_seg": (index, [thing(i, c) for i, c in enumerate(classes, start=1)] + segments),
        "panoptic_category": category,
        "sem_seg": category.where(category >= 0, torch.tensor(255)),
    }


def thing(i, c, **extra):
    return {"id": i, "category_id": c, "isthing": True, **extra}


def box_mask(x0, y0, x1, y1, size=(10, 12)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def make_grid_instances(masks, classes, scores=None):
    """Instances of (N, h, w) bool masks in their boxes; scores default to 0.9, 0.8, ..."""
    scores = 0.9 - 0.1 * torch.arange(len(classes)) if scores is None else torch.as_tensor(scores)
    boxes = relative_boxes(BitMasks(masks).get_bounding_boxes().tensor, masks.shape[1:])
    return GridInstances(masks, torch.as_tensor(classes).long(), scores.float(), boxes)


def random_scene(seed, n, size=(6, 7), num_classes=2):
    """N random boxes and, independent of them, a random panoptic ground truth of things."""
    rng = np.random.default_rng(seed)

    def random_box():
        x, y = rng.integers(0, size[1] - 2), rng.integers(0, size[0] - 2)
        return box_mask(x, y, x + rng.integers(1, 6), y + rng.integers(1, 5), size)

    ids = torch.zeros(size, dtype=torch.int64)
    segments = [thing(i, int(rng.integers(num_classes))) for i in range(1, 5)]
    for s in segments:
        ids[random_box()] = s["id"]
    masks = torch.stack([random_box() for _ in range(n)])
    classes = torch.from_numpy(rng.integers(0, num_classes, n))
    return masks, classes, torch.from_numpy(rng.permutation(n) / 10 + 0.1), ids, segments


@contextmanager
def registered(name, *paths):
    oanet_d2.register_panoptic(name, *map(str, paths))
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def scenes_paths(root, split):  # as `register_panoptic` takes them
    jsons = [root / f"annotations/{x}_{split}.json" for x in ("panoptic", "instances")]
    return root / split, jsons[0], root / f"panoptic_{split}", jsons[1]


@pytest.fixture(scope="session")
def subprocess_env():
    """For a command: this project first, then what the path of this process has, perhaps Detectron2."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs to mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "train", 6, image_size=64, seed=0, num_workers=0)
    write_split(root, "val", 3, image_size=64, seed=0, num_workers=0)
    train, val = (scenes_paths(root, split) for split in ("train", "val"))
    with registered("few_scenes_train", *train), registered("few_scenes_val", *val):
        yield "few_scenes_train", "few_scenes_val"


def training_cfg(dataset, folder, share="0.0"):
    """The demo's network at its smallest, six iterations, a checkpoint every second one."""
    opts = ["DATASETS.TRAIN", f"('{dataset}',)", "DATASETS.TEST", "()", "TEST.ORDERS", "()"]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    opts += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "6"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.SRM_ONLY_SHARE", share]
    opts += ["OUTPUT_DIR", str(folder)]
    return load_config("OcclusionScenes/oanet_R_18.yaml", *SMALLEST, *NARROW, *opts)


@pytest.fixture
def train_cfg(few_scenes, tmp_path):
    return training_cfg(few_scenes[0], tmp_path / "out")


def trainer_of(cfg):
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(1)
    return OANetTrainer(cfg)


def after_step(iteration, action):
    return CallbackHook(after_step=lambda trainer: trainer.iter == iteration and action())
