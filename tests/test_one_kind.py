"""Datasets of things alone or of stuff alone train, evaluate and predict."""

import math

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2 import PanopticPredictor, complete_config
from oanet_d2.data.register import KEYS
from tests.conftest import SMALLEST, load_config, trainer_of
from tests.data.conftest import Dataset


@pytest.mark.parametrize("supervision", ["things_and_stuff", "stuff"])
@pytest.mark.parametrize("kind", ["things", "stuff"])
def test_one_kind_of_classes(tmp_path, kind, supervision):
    dataset, name = Dataset(tmp_path / "data"), f"test_{kind}_{supervision}"
    dataset.panoptic["categories"] = [
        c for c in dataset.panoptic["categories"] if c["isthing"] == (kind == "things")
    ]
    known = {c["id"] for c in dataset.panoptic["categories"]}
    for i, x in enumerate(dataset.panoptic["annotations"]):
        x["segments_info"] = [s for s in x["segments_info"] if s["category_id"] in known]
        ids = dataset.ids(i)
        ids[ids != x["segments_info"][0]["id"]] = 0
        dataset.write_png(i, ids)
    if kind == "stuff":
        dataset.instances["annotations"] = []
    cfg = load_config(
        "OcclusionScenes/oanet_R_18.yaml",
        *SMALLEST,
        *["DATASETS.TRAIN", (), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / "out")],
        *["MODEL.SEM_SEG_HEAD.SUPERVISION", supervision, "SOLVER.MAX_ITER", 2],
        *["MODEL.SRM_HEAD.PAIRS.EVIDENCE", ("geometry", "features"), "DATALOADER.NUM_WORKERS", 0],
        *["MODEL.OANET.KEEP_THINGS_FREE", False, "SOLVER.IMS_PER_BATCH", 2],
        *["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64],
        *["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0],
        *["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.0],
    )
    cfg.DATASETS.PANOPTIC[name] = CfgNode(dict(zip(KEYS, dataset.paths())))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    try:
        complete_config(cfg)
        trainer = trainer_of(cfg)
        trainer.train()
        results = trainer._last_eval_results
        quality = results["panoptic_seg/srm_pairs"]
        there, absent = ("_th", "_st") if kind == "things" else ("_st", "_th")
        assert math.isnan(quality["PQ" + absent]) and quality["PQ"] == quality["PQ" + there] >= 0
        assert ("segm" in results) == (kind == "things")
        cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
        result = PanopticPredictor(cfg)(str(dataset.images[1]))
        assert {s["isthing"] for s in result.segments_info} <= {kind == "things"}
        result.draw()
        alone = PanopticPredictor.from_file(tmp_path / "out" / "model_final.safetensors")
        assert torch.equal(alone(str(dataset.images[1])).panoptic_seg, result.panoptic_seg)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
