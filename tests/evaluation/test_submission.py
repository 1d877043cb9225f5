import io

import numpy as np
import pytest
import torch
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators

from oanet_d2.data.images import read_segment_ids
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.evaluation import PanopticEvaluator, PanopticFiles
from oanet_d2.submission import png_of
from tests.conftest import registered, scenes_paths
from tests.data.conftest import Dataset
from tests.evaluation.silhouettes import SilhouetteModel


def test_names_that_differ_little_have_a_file_each(tmp_path):
    """Frames without an extension, extensions that differ, and a file outside of the folder."""
    dataset = Dataset(tmp_path)
    for names in (["clip.0000", "clip.0001", "clip"], ["1.png", "1.tiff", "../1.png"]):
        for i, name in enumerate(names):
            dataset.pngs[i] = dataset.pngs[i].rename(tmp_path / "pngs" / name)
            dataset.panoptic["annotations"][i]["file_name"] = name
        images, truth, pngs, _ = dataset.paths()
        with registered("test_submission", images, truth, pngs) as name:
            files = PanopticFiles(name, str(tmp_path / "out" / "results.json"))
            for d in DatasetCatalog.get(name):
                ids = torch.from_numpy(read_segment_ids(d["pan_seg_file_name"]))
                files.process([d], [{"panoptic_seg": (ids, d["segments_info"])}])
            files.evaluate()
        assert pq_compute(truth, files.path, pngs)["All"]["pq"] == 1
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(written) == 7


def test_panopticapi_scores_the_files_as_we_score_the_results(tmp_path):
    """Some of the demo's scenes, painted in a wrong order in half of the images."""
    write_split(tmp_path / "scenes", "val", 6, image_size=96, seed=3, num_workers=0)
    model = SilhouetteModel(wrong_images=(1000002, 1000004, 1000006))
    with registered("test_submission", *scenes_paths(tmp_path / "scenes", "val")) as name:
        files = PanopticFiles(name, str(tmp_path / "results" / "panoptic.json"))
        evaluator = DatasetEvaluators([PanopticEvaluator(), files])
        evaluator.reset()
        for d in DatasetCatalog.get(name):
            evaluator.process([d], [model(d)])
        ours = evaluator.evaluate()["panoptic_seg"]
        truth = MetadataCatalog.get(name).panoptic_json, MetadataCatalog.get(name).panoptic_root
    theirs = pq_compute(truth[0], files.path, truth[1], str(tmp_path / "results" / "panoptic"))
    for key, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        for metric in ("PQ", "SQ", "RQ"):
            assert ours[metric + key] == pytest.approx(100 * theirs[group][metric.lower()])
    assert 10 < ours["PQ_th"] < 99


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (37, 53)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_a_png_holds_every_id(size, dtype):
    rng = np.random.default_rng(0)
    last = min(2**24, np.iinfo(dtype).max + 1)
    for ids in (rng.integers(0, last, size), rng.integers(0, 3, size), np.full(size, last - 1)):
        for layout in (np.ascontiguousarray, np.asfortranarray):
            with Image.open(io.BytesIO(png_of(layout(ids.astype(dtype))))) as png:
                assert png.mode == "RGB"
                assert (rgb2id(np.array(png)) == ids).all()
