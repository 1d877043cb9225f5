import numpy as np
import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

import oanet_d2
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.submission import categories_of
from tests.conftest import SMALLEST, load_config


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """A tiny network that finds much: config and checkpoint. No dataset lies beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    opts = [*SMALLEST, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True", "INPUT.MIN_SIZE_TEST", "64"]
    opts += ["TEST.DETECTIONS_PER_IMAGE", "12", "MODEL.WEIGHTS", str(folder / "tiny.pth")]
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml", *opts)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (folder / "tiny.yaml").write_text(cfg.dump())
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def weights_file(config_file):
    """The same network as a training on another machine would leave it, of a dataset unknown here."""
    cfg = oanet_d2.load_config(config_file)
    model = build_model(cfg)
    OANetCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("unknown_here",)
    cfg.DATASETS.PANOPTIC.unknown_here = CfgNode({"IMAGE_ROOT": "/gone"})
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "/gone/start.pth", "/gone"
    cfg.TEST.ORDERS = ("score", "class_order")
    categories = categories_of(MetadataCatalog.get("occlusion_scenes_val"))
    OANetCheckpointer(model, str(config_file.parent)).save_safetensors("tiny", cfg.dump(), categories)
    return config_file.parent / "tiny.safetensors"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The folder of a split "val" with four pictures of 64 x 64."""
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "val", 4, image_size=64, seed=0, num_workers=0)
    return root


@pytest.fixture(scope="session")
def pictures(scenes):
    return sorted((scenes / "val").glob("*.jpg"))


def owners(panoptic_seg, segments_info):
    """For every pixel 1 + the index of the instance, minus the id of the stuff class, or 0."""
    out = np.zeros(panoptic_seg.shape, dtype=int)
    for s in segments_info:
        owner = s["instance_id"] + 1 if s["isthing"] else -s["category_id"]
        out[panoptic_seg.numpy() == s["id"]] = owner
    return out


def files_in(folder):
    """Paths of the files in a folder, relative to it."""
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())
