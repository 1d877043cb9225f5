"""
Real data from the folder beside the project, if there is one. One COCO image with its panoptic
annotation is learned by heart and evaluated.
"""

import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import inference_on_dataset

from oanet_d2 import complete_config
from oanet_d2.data.check import check
from oanet_d2.engine import OANetTrainer
from tests.conftest import REPOSITORY, load_config, registered

DATA = REPOSITORY.parent / "shared" / "data"
SAMPLE = DATA / "coco_panoptic_sample"
PATHS = (
    SAMPLE / "val2017",
    SAMPLE / "annotations" / "panoptic_val2017.json",
    SAMPLE / "panoptic_val2017",
)
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")

SMALL = [
    *["MODEL.FPN.OUT_CHANNELS", "64", "MODEL.RESNETS.DEPTH", "18"],
    *["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"],
    *["MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"],
    *["MODEL.ROI_BOX_HEAD.FC_DIM", "128", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"],
    *["MODEL.SRM_HEAD.CONV_DIM", "16", "INPUT.RANDOM_FLIP", "none"],
    *["MODEL.RPN.PRE_NMS_TOPK_TRAIN", "200", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "100"],
    *["INPUT.MIN_SIZE_TRAIN", "(256,)", "INPUT.MIN_SIZE_TEST", "256"],
    *["SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.STEPS", "()"],
    *["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", "0.002", "SOLVER.WARMUP_ITERS", "10"],
    *["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"],
    *["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "10.0", "DATALOADER.NUM_WORKERS", "0"],
    *["TEST.ORDERS", "()", "DATASETS.TEST", "()"],
]


def test_it_is_clean():
    assert check(*PATHS) == []


@pytest.mark.parametrize("name", ["facades", "street_fashion"])
def test_real_sets_with_an_instances_json(name):
    """Clean, and the instances are those that Detectron2 loads."""
    panoptic, instances = (DATA / name / f"{x}_val.json" for x in ("panoptic", "instances"))
    paths = (DATA / name / "images" / "val", panoptic, DATA / name / "panoptic_val", instances)
    assert check(*paths) == []
    with registered("test_real", *paths) as dataset:
        ours = {d["image_id"]: d["annotations"] for d in DatasetCatalog.get(dataset)}
        things = MetadataCatalog.get(dataset).thing_dataset_id_to_contiguous_id
    theirs = load_coco_json(str(instances), str(paths[0]))
    assert len(ours) == len(theirs)
    for d in theirs:
        for annotation in d["annotations"]:
            annotation["category_id"] = things[annotation["category_id"]]
        assert ours[d["image_id"]] == d["annotations"]


@pytest.mark.slow
def test_learned_by_heart(tmp_path):
    """133 classes, one crowd segment, no instances JSON, the COCO config but for its size."""
    with registered("test_coco_sample", *PATHS) as name:
        (image,) = DatasetCatalog.get(name)
        assert any(s["iscrowd"] for s in image["segments_info"]) and "annotations" not in image
        cfg = load_config("COCO-PanopticSegmentation/oanet_R_50_1x.yaml", *SMALL)
        cfg.DATASETS.TRAIN = (name,)
        cfg.merge_from_list(["SOLVER.MAX_ITER", 100, "OUTPUT_DIR", str(tmp_path)])
        complete_config(cfg)
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 133
        torch.manual_seed(0)
        trainer = OANetTrainer(cfg)
        trainer.train()
        model = trainer.model.eval()
        loader = OANetTrainer.build_test_loader(cfg, name)
        result = inference_on_dataset(model, loader, OANetTrainer.build_evaluator(cfg, name))
    # panopticapi's mean is over the classes that are in the ground truth or the prediction
    assert result["panoptic_seg"]["PQ"] > 30
    assert result["panoptic_seg"]["PQ_st"] > 20
