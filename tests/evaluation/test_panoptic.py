import json
import math

import numpy as np
import pytest
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.evaluation import (
    PanopticEvaluator,
    PanopticPictures,
    orderings_of,
    orderings_table,
    write_orderings,
)
from oanet_d2.painting.metrics import METRICS
from tests.conftest import registered, scenes_paths
from tests.evaluation.silhouettes import SilhouetteModel

NUM_IMAGES = 6
ORDERS = ("score", "srm_pairs", "oracle")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("occlusion_scenes")
    write_split(root, "val", NUM_IMAGES, image_size=96, seed=3, num_workers=0)
    return root


@pytest.fixture(scope="module")
def scenes(root):
    with registered("test_panoptic_scenes", *scenes_paths(root, "val")) as name:
        yield name


def evaluate(evaluator, name, model, images=slice(None)):
    evaluator.reset()
    for d in DatasetCatalog.get(name)[images]:
        evaluator.process([d], [model(d)])
    return evaluator.evaluate()


def test_orders_are_scored_on_the_same_predictions(scenes, tmp_path):
    model = SilhouetteModel()
    results = evaluate(PanopticEvaluator(model, ORDERS), scenes, model)
    orderings = orderings_of(results)
    assert list(orderings) == list(ORDERS)
    # Whole silhouettes in the true order are the ground truth. The duplicate finds no free pixel, and
    # what is not painted takes no match.
    assert all(orderings["oracle"][x] == pytest.approx(100) for x in (*METRICS, "pairs"))
    assert orderings["srm_pairs"] == orderings["oracle"]
    assert orderings["oracle"].items() >= results["panoptic_seg"].items()
    assert orderings["score"]["pairs"] < 90 and orderings["score"]["order F1"] < 90
    assert orderings["score"]["PQ_th"] < 90 and orderings["score"]["PQ_st"] == 100
    assert results["evaluation"]["images"] == NUM_IMAGES

    path = tmp_path / "orderings.json"
    write_orderings(str(path), results, {"train": None, "eval": 2.5})
    written = {
        "orderings": orderings,
        "images": NUM_IMAGES,
        "seconds": {"train": None, "eval": 2.5},
    }
    assert json.loads(path.read_text()) == written


def test_an_order_is_restricted_to_what_is_painted(scenes):
    """An unpainted instance in the middle of the order."""
    model = SilhouetteModel()
    (d, *_) = DatasetCatalog.get(scenes)
    output = model(d)
    output["fusion_inputs"].instances.scores[0] = 0.2  # its order goes by the old scores
    own = model.combine(
        output["fusion_inputs"], output["fusion_inputs"].order_inputs.order("score")
    )
    output["panoptic_seg"] = own
    evaluator = PanopticEvaluator(model, ("score",))
    evaluator.process([d], [output])
    results = evaluator.evaluate()
    assert results["panoptic_seg/score"].items() >= results["panoptic_seg"].items()
    assert results["panoptic_seg"]["RQ_th"] < 100


def test_with_true_pairs_alone_it_is_the_oracle(scenes):
    """The duplicate of this model is the one that matches nothing, and lies behind by score, too."""
    model = SilhouetteModel()
    model.order = "score"
    results = evaluate(PanopticEvaluator(model, ("oracle_true", "oracle")), scenes, model)
    assert results["panoptic_seg/oracle_true"] == results["panoptic_seg/oracle"]
    assert results["panoptic_seg"]["PQ_th"] < 90


def test_another_size_is_refused_with_the_file(scenes):
    d = DatasetCatalog.get(scenes)[0]
    output = {"panoptic_seg": (torch.zeros(48, 96, dtype=torch.int32), [])}
    with pytest.raises(ValueError, match=rf"{d['pan_seg_file_name']}.*48 x 96.*96 x 96"):
        PanopticEvaluator().process([d], [output])


CATEGORIES = [{"id": 5, "name": "dog", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}]


def ground_truth(i):
    """A dog (id 7) at another place in every image, sky (id 300) around it. Sizes differ."""
    ids = np.full((12, 16 + i), 300)
    ids[2:8, 3 * i : 3 * i + 5] = 7
    return ids


def write(folder, names, first, scale):
    """A dataset of images and PNGs of these names, with image ids from 0 and areas that are scaled."""
    images, annotations = [], []
    for i, name in enumerate(names):
        ids = ground_truth(first + i)
        path = folder / "pngs" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(id2rgb(ids)).save(path)
        segments = [
            {"id": k, "category_id": c, "area": int(scale * (ids == k).sum())}
            for k, c in ((7, 5), (300, 9))
        ]
        height, width = ids.shape
        images.append({"id": i, "file_name": f"{name}.jpg", "height": height, "width": width})
        annotations.append({"image_id": i, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder / "images", folder / "panoptic.json", folder / "pngs"


def predict(i):
    """The ground truth, as a model returns it."""
    segments = [{"id": 1, "category_id": 0, "isthing": True}]
    segments.append({"id": 2, "category_id": 1, "isthing": False})
    ids = np.where(ground_truth(i) == 7, 1, 2).astype(np.int32)
    return {"panoptic_seg": (torch.from_numpy(ids), segments)}


def test_pixels_alone_count(tmp_path):
    """Some names are equal, two test sets share ids, the areas are wrong, and "iscrowd" is missing."""
    evaluators = []
    for first, names, scale in ((0, ["a/1", "b/1", "1"], 0.1), (3, ["1", "2"], 1.5)):
        paths = write(tmp_path / str(first), names, first, scale)
        evaluators.append(PanopticEvaluator())
        with registered("test_pixels", *paths) as name:
            for i, d in enumerate(DatasetCatalog.get(name), start=first):
                segments = [{**s} for s in d["segments_info"]]
                for s in segments:
                    s.pop("iscrowd", None)
                evaluators[-1].process([{**d, "segments_info": segments}], [predict(i)])
    assert [{*x.evaluate()["panoptic_seg"].values()} for x in evaluators] == [{100}, {100}]


def test_a_group_without_a_segment(tmp_path):
    """NaN in Detectron2's results, null in the file, a dash in the table."""
    quality = {"PQ": 50.0, "SQ": 60.0, "RQ": 70.0}
    metrics = {f"{m}{g}": x for g in ("", "_th") for m, x in quality.items()}
    metrics.update({f"{m}_st": math.nan for m in quality})
    results = {"panoptic_seg/score": metrics, "evaluation": {"images": 2, "seconds": 1.0}}
    orderings = orderings_of(results)
    assert orderings["score"]["PQ_th"] == 50 and orderings["score"]["PQ_st"] is None
    assert orderings_table(orderings).splitlines()[2].split("|")[-2].strip() == "-"
    write_orderings(str(tmp_path / "orderings.json"), results, {})
    assert "NaN" not in (tmp_path / "orderings.json").read_text()


def test_pictures_for_tensorboard(scenes):
    model = SilhouetteModel()
    pictures = PanopticPictures(scenes)
    with EventStorage() as storage:
        assert evaluate(pictures, scenes, model) is None
        names, drawn = zip(*((name, image) for name, image, _ in storage._vis_data))
    assert names == tuple(f"{scenes}/{i}" for i in range(4))
    assert all(x.shape[0] == 3 and x.shape[2] > 3 * x.shape[1] * 0.8 for x in drawn)
