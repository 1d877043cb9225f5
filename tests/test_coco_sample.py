"""Real data from the folder beside the project, if there is one."""

import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from oanet_d2.data.check import check
from oanet_d2.engine import OANetTrainer
from tests.conftest import REPOSITORY, load_config, registered, trainer_of

DATA = REPOSITORY.parent / "shared" / "data"
PATHS = [DATA / "coco_panoptic_sample" / x for x in ("val2017", "annotations", "panoptic_val2017")]
PATHS[1] /= "panoptic_val2017.json"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")

SMALL = """
    MODEL.FPN.OUT_CHANNELS 64 MODEL.FPN.NORM BN MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.DEPTH 18
    MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN MODEL.SEM_SEG_HEAD.CONVS_DIM 32
    MODEL.ROI_BOX_HEAD.FC_DIM 128 MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.ROI_MASK_HEAD.CONV_DIM 32
    MODEL.ROI_MASK_HEAD.NUM_CONV 1 MODEL.SRM_HEAD.CONV_DIM 16 INPUT.RANDOM_FLIP none
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 200 MODEL.RPN.POST_NMS_TOPK_TRAIN 100 DATALOADER.NUM_WORKERS 0
    INPUT.MIN_SIZE_TRAIN (256,) INPUT.MIN_SIZE_TEST 256 TEST.ORDERS ()
    SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH 1 SOLVER.STEPS () SOLVER.MAX_ITER 100
    SOLVER.OPTIMIZER ADAMW SOLVER.BASE_LR 0.002 SOLVER.CLIP_GRADIENTS.ENABLED True
    SOLVER.WARMUP_ITERS 10 SOLVER.CLIP_GRADIENTS.CLIP_TYPE norm SOLVER.CLIP_GRADIENTS.CLIP_VALUE 10.0
""".split()


def test_coco_is_clean():
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
        opts = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
        opts += [*SMALL, "OUTPUT_DIR", str(tmp_path)]
        cfg = load_config("COCO-PanopticSegmentation/oanet_R_50_1x.yaml", *opts)
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 133
        trainer = trainer_of(cfg)
        trainer.train()
        result = OANetTrainer.test(cfg, trainer.model)
    assert result["panoptic_seg"]["PQ"] > 30 and result["panoptic_seg"]["PQ_st"] > 20
