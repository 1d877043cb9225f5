import json
import os
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from panopticapi.utils import rgb2id

from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, Instances

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.evaluation import OrderingEvaluator, ReportRecorder
from oanet_d2.modeling import OANet, RankingEvidence
from oanet_d2.modeling.matching import visible_margins
from tests.conftest import registered, scenes_paths

NUM_IMAGES, IMAGE_SIZE = 8, 96
ORDERS = ("score", "srm_pairs", "oracle")


class MisleadingModel:
    """
    "Predicts" whole ground-truth silhouettes, and a duplicate of the first of every image. By
    score the largest comes first. The pairs are right in the first images and all wrong in the
    last three.
    """

    combine_overlap_thresh = 0.65
    combine_stuff_area_thresh = 0
    combine_instances_score_thresh = 0.5
    keep_things_free = True
    order = "srm_pairs"
    combine = OANet.combine

    def __call__(self, d, wrong):
        masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in d["annotations"]]
        # what is not painted, and takes part in nothing
        masks = torch.from_numpy(np.stack([*masks, masks[0], masks[0]]))
        classes = [a["category_id"] for a in d["annotations"]]
        classes = torch.tensor([*classes, classes[0], classes[0]])
        areas = masks.flatten(1).sum(1)
        instances = Instances((d["height"], d["width"]))
        instances.pred_boxes = Boxes(torch.zeros(len(masks), 4))
        instances.pred_masks = masks
        instances.pred_classes = classes
        instances.scores = 0.6 + 0.3 * areas / areas.max()
        instances.scores[-2:] = torch.tensor([0.55, 0.1])

        gt_ids = gt_ids_of(d)
        sem_seg = torch.zeros(7, *gt_ids.shape)
        for s in d["segments_info"]:
            if not s["isthing"]:
                sem_seg[s["category_id"]][torch.from_numpy(gt_ids == s["id"])] = 1.0
        painted = instances.scores >= 0.5
        margins = visible_margins(
            masks & painted[:, None, None], classes, torch.from_numpy(gt_ids), d["segments_info"]
        )
        margins = -margins if wrong else margins
        evidence = RankingEvidence(instances.scores, classes, masks, pair_margins=margins)
        return {"instances": instances, "sem_seg": sem_seg, "ranking_evidence": evidence}


class Evaluation:
    """The scenes, the model and what it gave for each of them."""

    def __init__(self, dataset_name):
        self.dataset_name = dataset_name
        self.model = MisleadingModel()
        self.inputs = DatasetCatalog.get(dataset_name)

    def recorder(self, folder, max_cases=3):
        return ReportRecorder(
            self.dataset_name, str(folder / "report"), max_cases, ("score", "srm_pairs")
        )

    def evaluator(self, report, images=range(NUM_IMAGES)):
        """An evaluator that has seen these images."""
        evaluator = OrderingEvaluator(self.dataset_name, self.model, ORDERS, report=report)
        evaluator.reset()
        for i in images:
            d = self.inputs[i]
            evaluator.process([d], [self.model(d, wrong=i >= NUM_IMAGES - 3)])
        return evaluator


def gt_ids_of(d):
    return rgb2id(utils.read_image(d["pan_seg_file_name"], "RGB"))


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    root = tmp_path_factory.mktemp("report_scenes")
    write_split(root, "val", NUM_IMAGES, image_size=IMAGE_SIZE, seed=3, num_workers=0)
    with registered("test_report_scenes", *scenes_paths(root, "val")) as name:
        yield Evaluation(name)


@pytest.fixture(scope="session")
def evaluated(evaluation, tmp_path_factory):
    """An output folder of an evaluation; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluation.evaluator(evaluation.recorder(folder)).evaluate()
    return folder


@pytest.fixture
def folder(evaluated, tmp_path):
    """A copy of it, to do anything with."""
    shutil.copytree(evaluated, tmp_path / "output")
    return tmp_path / "output"


def read_json(folder):
    return json.loads((folder / "report" / "evaluation.json").read_text())


def change_json(folder, change):
    content = read_json(folder)
    change(content)
    (folder / "report" / "evaluation.json").write_text(json.dumps(content))


def file_names(folder):
    return sorted(os.listdir(folder / "report"))
