import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from oanet_d2 import complete_config, load_config, register_panoptic
from oanet_d2.data import register_from_config
from oanet_d2.data.register import KEYS, category_metadata
from oanet_d2.submission import categories_of
from tests.conftest import registered
from tests.data.conftest import PERSON, SKY

CATEGORIES = [
    {"id": 7, "name": "person", "isthing": 1, "color": [1, 2, 3]},
    {"id": 200, "name": "sky", "isthing": 0, "color": [4, 5, 6]},
    {"id": 3, "name": "tie", "isthing": 1, "color": [7, 8, 9]},
]


@pytest.fixture
def paths(dataset):
    return dataset.paths()


@pytest.fixture
def forget():
    yield
    if "my_train" in DatasetCatalog:
        DatasetCatalog.remove("my_train")
        MetadataCatalog.remove("my_train")


@pytest.mark.parametrize("color", [True, False])
def test_categories_and_back(color):
    """Detectron2's COCO classes, whose ids have gaps. Among things and among stuff the order stays."""
    for given in (COCO_CATEGORIES, CATEGORIES):
        keys = ["id", "name", "isthing", *["color"] * color]
        given = [{key: c[key] for key in keys} for c in given]
        found = categories_of(Metadata(**category_metadata(given, "x")))
        assert found == sorted(given, key=lambda c: -c["isthing"])


def test_metadata_by_hand():
    assert category_metadata(CATEGORIES, "x") == {
        "thing_classes": ["person", "tie"],
        "stuff_classes": ["things", "sky"],
        "thing_dataset_id_to_contiguous_id": {7: 0, 3: 1},
        "stuff_dataset_id_to_contiguous_id": {200: 1},
        "thing_colors": [[1, 2, 3], [7, 8, 9]],
        "stuff_colors": [[0, 0, 0], [4, 5, 6]],
    }
    for color in (None, "#ff0000", [1, 2], [0.1, 0.2, 0.3], [300, 0, 0]):
        without = [*CATEGORIES[:2], {**CATEGORIES[2], "color": color}]
        assert "thing_colors" not in category_metadata(without, "x")


def test_ids_of_numpy_are_numbers():
    categories = [{**x, "id": np.int64(x["id"])} for x in CATEGORIES]
    metadata = category_metadata(categories, "x")
    assert json.dumps([*metadata["thing_dataset_id_to_contiguous_id"]]) == "[7, 3]"


def test_dataset_dicts_by_hand(paths):
    with registered("my_train", *paths) as name:
        d = DatasetCatalog.get(name)[1]
    assert d.pop("annotations")
    assert d == {
        "file_name": f"{paths[0]}/1.jpg",
        "image_id": 1,
        "height": 14,
        "width": 9,
        "pan_seg_file_name": f"{paths[2]}/1.png",
        "segments_info": [
            {"id": 1001, "category_id": 0, "area": 52, "iscrowd": 0, "isthing": True},
            {"id": 70001, "category_id": 1, "area": 65, "iscrowd": 0, "isthing": False},
        ],
    }


def test_annotations_are_detectron2s(dataset):
    """Crowds and broken polygons, too. (An image has no annotations where Detectron2 has none.)"""
    first = dataset.instances["annotations"][0]
    polygons = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6.5]]
    crowd = dataset.instances["annotations"][1]["segmentation"]
    dataset.instances["annotations"] += [
        {**first, "id": 1, "segmentation": polygons},
        {**first, "id": 2, "segmentation": [[1, 2, 3, 4]]},
        {**first, "id": 3, "image_id": 1, "iscrowd": 1, "segmentation": crowd},
    ]
    paths = dataset.paths()
    with registered("my_train", *paths) as name:
        ours = {d["image_id"]: d["annotations"] for d in DatasetCatalog.get(name)}
    theirs = {d["image_id"]: d["annotations"] for d in load_coco_json(paths[3], paths[0])}
    for annotations in theirs.values():
        for annotation in annotations:
            annotation["category_id"] = {PERSON: 0}[annotation["category_id"]]
    boxes = [[a.pop("bbox") for x in side.values() for a in x] for side in (ours, theirs)]
    assert boxes[0][:2] == [[0, 1, 5, 6.5], [2, 3, 1, 1]]  # of the masks; the second is one pixel
    assert ours == theirs and [len(ours[i]) for i in range(3)] == [2, 2, 1]


def test_what_may_be_missing(dataset):
    for x in (dataset.segment(0, 0), dataset.segment(1, 1), dataset.instances["annotations"][2]):
        del x["iscrowd"], x["area"]
    with registered("my_train", *dataset.paths()) as name:
        dicts = DatasetCatalog.get(name)
    assert {s["iscrowd"] for d in dicts for s in d["segments_info"]} == {0}
    assert {a["iscrowd"] for d in dicts for a in d["annotations"]} == {0}


def test_an_image_without_instances_has_an_empty_list(dataset):
    del dataset.instances["annotations"][1]
    with registered("my_train", *dataset.paths()) as name:
        assert [len(d["annotations"]) for d in DatasetCatalog.get(name)] == [1, 0, 1]


def test_pathlib_paths(paths, forget):
    register_panoptic("my_train", *map(Path, paths))
    metadata = MetadataCatalog.get("my_train")
    assert [metadata.image_root, metadata.panoptic_json, metadata.panoptic_root] == paths[:3]
    assert metadata.json_file == paths[3]
    assert DatasetCatalog.get("my_train")[0]["file_name"] == f"{paths[0]}/0.jpg"


def test_wrong_categories_register_nothing(dataset, forget):
    del dataset.instances["categories"][0]["isthing"]
    dataset.panoptic["categories"].append({"id": SKY, "name": "sea", "isthing": 0})
    with pytest.raises(ValueError, match=r"panoptic.json: categories\[3\]: .*300"):
        register_panoptic("my_train", *dataset.paths())
    with pytest.raises(ValueError, match="instances.json: categories.*isthing"):
        register_panoptic("my_train", "images", dataset.paths()[3], "pngs")  # the other JSON
    assert "my_train" not in DatasetCatalog


# --------------------------------------------------------------------------- from a yaml


def read_config(tmp_path, datasets, *opts):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"DATASETS": {"PANOPTIC": datasets, "TRAIN": ["my_train"]}}))
    return load_config(path, opts)


@pytest.mark.parametrize("num_paths", [3, 4])
def test_from_a_yaml_alone(paths, tmp_path, forget, num_paths):
    """The same dataset as the call registers; twice is once."""
    cfg = read_config(tmp_path, {"my_train": dict(zip(KEYS[:num_paths], paths))})
    complete_config(cfg)
    before = cfg.dump()
    complete_config(cfg)
    assert cfg.dump() == before
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (2, 3)
    with registered("by_call", *paths[:num_paths]) as name:
        assert DatasetCatalog.get("my_train") == DatasetCatalog.get(name)
        ours, theirs = (MetadataCatalog.get(x).as_dict() for x in ("my_train", name))
        assert {**ours, "name": None} == {**theirs, "name": None}
    # what train_net.py writes into the output folder can be read again
    (tmp_path / "dump.yaml").write_text(before)
    assert load_config(tmp_path / "dump.yaml").DATASETS.PANOPTIC == cfg.DATASETS.PANOPTIC


def test_a_path_can_be_overridden(paths, tmp_path, forget):
    wrong = {**dict(zip(KEYS, paths)), "IMAGE_ROOT": "elsewhere"}
    key = "DATASETS.PANOPTIC.my_train.IMAGE_ROOT"
    register_from_config(read_config(tmp_path, {"my_train": wrong}, key, paths[0]))
    assert MetadataCatalog.get("my_train").image_root == paths[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"PANOPTIC_ROOT": ""}, "my_train.PANOPTIC_ROOT is None"),
        ({"IMAGE_ROOT": 5}, "my_train.IMAGE_ROOT is 5"),
        ({"IMAGES": "x"}, "my_train holds .*'IMAGES'"),
        ({"PANOPTIC_JSON": "nowhere.json"}, "nowhere.json: No such file"),
    ],
)
def test_wrong_entries_are_refused(paths, tmp_path, forget, change, words):
    cfg = read_config(tmp_path, {"my_train": {**dict(zip(KEYS, paths)), **change}})
    with pytest.raises(ValueError, match=words):
        register_from_config(cfg)
    assert "my_train" not in DatasetCatalog
    with pytest.raises(ValueError, match="my_train holds '/data'"):
        register_from_config(read_config(tmp_path, {"my_train": "/data"}))


def test_a_name_stands_for_one_dataset(paths, tmp_path, forget):
    register_from_config(read_config(tmp_path, {"my_train": dict(zip(KEYS, paths))}))
    with pytest.raises(ValueError, match="my_train: .* registered already"):
        register_from_config(read_config(tmp_path, {"my_train": dict(zip(KEYS[:3], paths))}))
