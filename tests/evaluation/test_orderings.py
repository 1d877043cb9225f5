import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from panopticapi.utils import rgb2id

from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, Instances

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.evaluation import (
    OrderingEvaluator,
    orderings_of,
    orderings_table,
    write_orderings,
)
from oanet_d2.modeling import OANet, RankingEvidence
from oanet_d2.modeling.matching import visible_margins
from oanet_d2.visualization import OrderPictures, changed_pixels, pixel_gain
from tests.conftest import registered, scenes_paths

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("occlusion_scenes")
    write_split(root, "val", NUM_IMAGES, image_size=96, seed=3, num_workers=0)
    with registered("test_orderings_scenes", *scenes_paths(root, "val")) as name:
        yield name


class GroundTruthModel:
    """
    "Predicts" the whole ground-truth silhouettes, perfect but for the order: the scores put the
    largest instance first. Fuses as OANet does.
    """

    combine_overlap_thresh = 0.65  # of every silhouette at least 40 % is visible
    combine_stuff_area_thresh = 0
    combine_instances_score_thresh = 0.5
    keep_things_free = True
    order = "srm_overlap"
    combine = OANet.combine

    def __call__(self, d):
        masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in d["annotations"]]
        masks = torch.from_numpy(np.stack(masks))
        classes = torch.tensor([a["category_id"] for a in d["annotations"]])
        areas = masks.flatten(1).sum(1)
        instances = Instances((d["height"], d["width"]))
        instances.pred_boxes = Boxes(torch.zeros(len(masks), 4))
        instances.pred_masks = masks
        instances.pred_classes = classes
        instances.scores = 0.6 + 0.3 * areas / areas.max()

        gt_ids = rgb2id(utils.read_image(d["pan_seg_file_name"], "RGB"))
        sem_seg = torch.zeros(7, *gt_ids.shape)
        score_map = torch.zeros(8, *gt_ids.shape)
        for s in d["segments_info"]:
            segment = torch.from_numpy(gt_ids == s["id"])
            target = score_map if s["isthing"] else sem_seg
            target[s["category_id"]][segment] = 1.0
        ids = torch.from_numpy(gt_ids)
        margins = visible_margins(masks, classes, ids, d["segments_info"])
        evidence = RankingEvidence(instances.scores, classes, masks, score_map, margins)
        return {"instances": instances, "sem_seg": sem_seg, "ranking_evidence": evidence}


def test_orders_are_scored_on_the_same_predictions(scenes, tmp_path):
    model = GroundTruthModel()
    pictures = [
        OrderPictures(scenes, str(tmp_path / "pictures"), 2, ("score", "srm_overlap")),
        OrderPictures(scenes, str(tmp_path / "still_wrong"), 2, ("srm_pairs", "oracle")),
    ]
    orders = ("score", "srm_mean", "srm_overlap", "srm_pairs", "oracle")
    evaluator = OrderingEvaluator(scenes, model, orders, pictures)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "99_of_an_earlier_run.png").touch()
    evaluator.reset()
    for d in DatasetCatalog.get(scenes):
        evaluator.process([d], [model(d)])
    results = evaluator.evaluate()

    orderings = orderings_of(results)
    assert list(orderings) == list(orders)
    # whole silhouettes painted in the true order are the ground truth
    for metric in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert orderings["oracle"][metric] == pytest.approx(100, abs=1e-6)
        assert orderings["srm_pairs"][metric] == pytest.approx(100, abs=1e-6)
    # a true category map settles all but pairs of one class
    assert orderings["score"]["PQ_th"] < orderings["srm_overlap"]["PQ_th"] <= 100
    # what lies on top covers little, and stuff does not depend on the order
    assert orderings["score"]["PQ_st"] == pytest.approx(100, abs=1e-6)

    path = tmp_path / "orderings.json"
    write_orderings(str(path), results, {"train": 1.5, "eval": 2.5})
    written = json.loads(path.read_text())
    assert written["images"] == NUM_IMAGES
    assert written["seconds"] == {"train": 1.5, "eval": 2.5}
    assert written["orderings"] == orderings
    table = orderings_table(orderings)
    assert all(order in table for order in orders) and "PQ_th" in table

    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [p.name[:3] for p in drawn] == ["01_", "02_"]
    picture = utils.read_image(str(drawn[0]), "RGB")
    height, width = picture.shape[:2]
    assert width > 3 * height  # four panels side by side
    # the pairs are as good as the oracle: no picture where they lose
    assert not list((tmp_path / "still_wrong").glob("*.png"))
    assert ((picture == (255, 0, 255)).all(-1)).sum() > 50  # what changed is marked


def test_unknown_order_is_refused(scenes):
    with pytest.raises(ValueError, match="'depth'.*oracle"):
        OrderingEvaluator(scenes, GroundTruthModel(), ("score", "depth"))


def thing(i, c, instance):
    return {"id": i, "category_id": c, "isthing": True, "instance_id": instance}


def test_pixel_gain_and_changed_pixels_by_hand():
    gt = np.array([[1, 1, 2, 0]]), [
        {"id": 1, "category_id": 4, "isthing": True},
        {"id": 2, "category_id": 4, "isthing": False},
    ]
    before = np.array([[1, 2, 2, 3]]), [
        thing(1, 4, 0),
        thing(2, 5, 1),
        {"id": 3, "category_id": 4, "isthing": False},
    ]
    # the same instances under other ids, now with pixel 1 right
    after = np.array([[2, 2, 3, 4]]), [
        thing(2, 4, 0),
        thing(3, 5, 1),
        {"id": 4, "category_id": 4, "isthing": False},
    ]
    assert pixel_gain(gt, before, after) == 1
    assert changed_pixels(before, after).tolist() == [[False, True, False, False]]
