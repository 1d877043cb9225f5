"""Results of a segmenter instead of an instances JSON."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import detectron2.data.transforms as T
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from oanet_d2 import add_oanet_config
from oanet_d2.data.check import check, check_datasets
from tests.conftest import registered
from tests.data.conftest import PERSON, SIZES, SKY, TIE, make_mapper

NO_CATEGORY = 4


def rle(i, rows):
    """The first columns of these rows of the image i."""
    mask = np.zeros(SIZES[i][::-1], dtype=np.uint8, order="F")
    mask[rows, :4] = 1
    found = coco_mask.encode(mask)
    return {"size": found["size"], "counts": found["counts"].decode()}


@pytest.fixture
def results(dataset):
    """Two for the first image, one for the last, as COCO's evaluation takes them."""
    dataset.instances = [
        {"image_id": 0, "category_id": PERSON, "score": 0.9, "segmentation": rle(0, slice(1, 8))},
        {"image_id": 0, "category_id": TIE, "score": 0.3, "segmentation": rle(0, slice(2, 4))},
        {"image_id": 2, "category_id": PERSON, "score": 1, "segmentation": [[0, 1, 9, 1, 9, 30, 0, 30]]},
    ]
    dataset.instances[0]["bbox"] = [0.5, 1.25, 7, 6.5]  # a detector's own, which is not its mask's
    return dataset


def look_at(name, *opts):
    cfg = get_cfg()
    add_oanet_config(cfg)
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "SRMFromAnnotations", *opts])
    check_datasets(cfg, [name])


def test_they_become_the_instances(results):
    paths = results.paths()
    assert check(*paths) == []
    with registered("test_results", *paths) as name:
        look_at(name)
        dicts = DatasetCatalog.get(name)
    assert [len(d["annotations"]) for d in dicts] == [2, 0, 1]
    assert [x["bbox"] for x in dicts[0]["annotations"]] == [[0, 1, 4, 7], [0, 2, 4, 2]]
    first, none, last = (make_mapper()(d)["instances"] for d in dicts)
    assert first.scores.tolist() == pytest.approx([0.9, 0.3]) and first.gt_classes.tolist() == [0, 1]
    assert first.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [28, 8]
    assert len(none) == 0 and last.scores.tolist() == [1]


def test_scores_stay_with_their_masks(results):
    """Where a crop leaves nothing of an instance."""
    with registered("test_results", *results.paths()) as name:
        d = DatasetCatalog.get(name)[0]
    d["annotations"].reverse()
    mapper = make_mapper(augmentations=[T.CropTransform(0, 5, 12, 3), T.HFlipTransform(12)])
    instances = mapper(d)["instances"]
    assert instances.scores.tolist() == pytest.approx([0.9]) and instances.gt_classes.tolist() == [0]
    assert torch.equal(instances.gt_masks.tensor[0], torch.arange(12).expand(3, 12) >= 8)


@pytest.mark.parametrize(
    "changed, kind, words",
    [
        ({"image_id": 9}, "instance of an unknown image", "no image 9"),
        ({"image_id": "0"}, "instance of an unknown image", "no image '0'"),
        ({"category_id": NO_CATEGORY}, "instance of no thing", "category 4"),
        ({"category_id": SKY}, "instance of no thing", "category 300"),
        ({"segmentation": rle(1, slice(2))}, "RLE size differs from the image", r"\[14, 9\]"),
        ({"segmentation": {"size": [8, 12], "counts": [1, 2]}}, "malformed mask", "add up to 8 x 12"),
        ({"segmentation": None}, "malformed entry", "'segmentation' is None"),
        ({"score": 1.5}, "malformed entry", "'score' is 1.5; it must be a number from 0 to 1"),
        ({"score": float("nan")}, "malformed entry", "'score' is nan"),
        ({"score": "0.5"}, "malformed entry", "'score' is '0.5'"),
    ],
)
def test_a_bad_entry_is_named(results, changed, kind, words):
    """By the checker and, in one sentence, by a training."""
    results.instances[1].update(changed)
    paths = results.paths()
    problem, *_ = check(*paths)
    assert problem.kind == kind and problem.where.startswith(f"{paths[3]}[1]")
    with registered("test_results", *paths) as name:
        for function in (DatasetCatalog.get, look_at):
            with pytest.raises(ValueError, match=rf"instances.json\[1\].*: .*{words}"):
                function(name)


@pytest.mark.parametrize("key", ["image_id", "category_id", "score", "segmentation"])
def test_what_must_be_there(results, key):
    del results.instances[1][key]
    assert [p.detail.split(";")[0] for p in check(*results.paths())] == [f"{key!r} is missing"]


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.META_ARCHITECTURE", "OANet"],
        ["INPUT.COPY_PASTE", "0.5"],
        ["DATASETS.TEST", "('test_results',)"],
    ],
)
def test_nobody_takes_them_for_the_ground_truth(results, opts):
    with registered("test_results", *results.paths()) as name:
        with pytest.raises(ValueError, match="'test_results' holds results of a segmenter"):
            look_at(name, *opts)
