import json

import numpy as np
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOPanopticEvaluator

from oanet_d2.evaluation import PanopticEvaluator
from tests.conftest import registered

CATEGORIES = [{"id": 5, "name": "dog", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}]


def ground_truth(i):
    """A dog (id 7) at another place in every image, sky (id 300) around it."""
    ids = np.full((12, 16), 300)
    ids[2:8, 3 * i : 3 * i + 5] = 7
    return ids


def write(folder, names):
    """A dataset of images of these names and PNGs of the same names; what registers it."""
    images, annotations = [], []
    for i, name in enumerate(names):
        ids = ground_truth(i)
        path = folder / "pngs" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(id2rgb(ids)).save(path)
        segments = [
            {"id": k, "category_id": c, "area": int((ids == k).sum()), "iscrowd": 0}
            for k, c in ((7, 5), (300, 9))
        ]
        images.append({"id": i, "file_name": f"{name}.jpg", "height": 12, "width": 16})
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


def results_of(cls, name, output_dir):
    evaluator = cls(name, str(output_dir))
    evaluator.reset()
    for i, input in enumerate(DatasetCatalog.get(name)):
        evaluator.process([input], [predict(i)])
    return evaluator.evaluate()["panoptic_seg"]


def test_images_of_one_name_in_two_folders(tmp_path):
    """Detectron2's evaluator scores one prediction against both, or fails on its segments."""
    with registered("test_panoptic_folders", *write(tmp_path, ["a/1", "b/1", "1"])) as name:
        results = results_of(PanopticEvaluator, name, tmp_path / "ours")
        assert results["PQ"] == results["PQ_th"] == results["PQ_st"] == 100
        assert results_of(COCOPanopticEvaluator, name, tmp_path / "theirs")["PQ"] < 90


def test_in_cocos_layout_it_is_detectron2s(tmp_path):
    with registered("test_panoptic_flat", *write(tmp_path, ["000001", "000.2"])) as name:
        results, files = [], []
        for cls in (PanopticEvaluator, COCOPanopticEvaluator):
            results.append(results_of(cls, name, tmp_path / cls.__name__))
            files.append(json.loads((tmp_path / cls.__name__ / "predictions.json").read_text()))
    assert results[0] == results[1] and files[0] == files[1]
