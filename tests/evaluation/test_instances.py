"""The evaluator of AP gets what was loaded. Faults of instances JSONs are in data/test_faults.py."""

import json

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Instances

from oanet_d2.evaluation import build_instance_evaluator
from tests.conftest import registered
from tests.data.conftest import PERSON, TIE, Dataset


def results_of(name, folder, classes):
    """AP when the masks of some contiguous classes are found, and no other."""
    evaluator = build_instance_evaluator(name, str(folder), 100)
    evaluator.reset()
    for d in DatasetCatalog.get(name):
        instances = Instances((d["height"], d["width"]))
        found = [x for x in d["annotations"] if x["category_id"] in classes]
        masks = BitMasks.from_polygon_masks(
            [x["segmentation"] for x in found], d["height"], d["width"]
        )
        instances.pred_masks, instances.pred_boxes = masks.tensor, masks.get_bounding_boxes()
        instances.pred_classes = torch.tensor([x["category_id"] for x in found], dtype=torch.int64)
        instances.scores = torch.ones(len(found))
        evaluator.process([d], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.fixture
def unsorted(tmp_path):
    """Person and tie in every image, under ids that fall while the classes rise."""
    dataset = Dataset(tmp_path / "data")
    dataset.instances["annotations"] = [
        {"image_id": i, "category_id": c, "segmentation": [[x, 1, x + 3, 1, x + 3, 7, x, 7]]}
        for i in range(3)
        for c, x in ((PERSON, 0), (TIE, 4))
    ]
    for entry in (*dataset.panoptic["categories"], *dataset.panoptic["annotations"]):
        for x in entry.get("segments_info", [entry]):
            key = "category_id" if "category_id" in x else "id"
            x[key] = -x[key]
    for x in dataset.instances["annotations"]:
        x["category_id"] = -x["category_id"]
    return dataset


def test_each_class_has_its_own_ap(unsorted, tmp_path):
    """
    COCOeval sorts classes by id. The instances JSON lists them in yet another order, one more, and not
    the tie.
    """
    unsorted.instances["categories"] = [{"id": 9, "name": "other"}, {"id": -PERSON, "name": "person"}]
    with registered("test_instances", *unsorted.paths()) as name:
        both = results_of(name, tmp_path / "both", (0, 1))
        ties = results_of(name, tmp_path / "ties", (1,))
    assert both["segm"]["AP"] == both["bbox"]["AP"] == pytest.approx(100)
    assert ties["segm"]["AP-tie"] == pytest.approx(100) and ties["segm"]["AP-person"] == 0
    written = json.loads((tmp_path / "ties" / "coco_instances_results.json").read_text())
    assert {x["category_id"] for x in written} == {-TIE}  # of the dataset, as servers take it


def test_only_images_that_are_evaluated_count(unsorted, tmp_path):
    for key in ("images", "annotations"):
        del unsorted.panoptic[key][1:]
    with registered("test_instances", *unsorted.paths()) as name:
        assert results_of(name, tmp_path, (0, 1))["segm"]["AP"] == pytest.approx(100)
    truth = json.loads((tmp_path / "instances_ground_truth.json").read_text())
    assert len(truth["images"]) == 1 and [x["id"] for x in truth["annotations"]] == [1, 2]
