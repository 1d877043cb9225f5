import json

import pytest
import yaml

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2 import add_oanet_config, complete_config, register_panoptic
from oanet_d2.data import register_from_config
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.data.register import category_metadata, require_files
from tests.conftest import registered, scenes_paths


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "train", 2, image_size=64, seed=0, num_workers=0)
    return [str(x) for x in scenes_paths(root, "train")]


def read_config(tmp_path, datasets, opts=()):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"DATASETS": {"PANOPTIC": datasets, "TRAIN": ["my_train"]}}))
    cfg = get_cfg()
    add_oanet_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(list(opts))
    return cfg


def entry(paths):
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    return dict(zip(keys, paths))


@pytest.fixture
def forget():
    yield
    if "my_train" in DatasetCatalog:
        DatasetCatalog.remove("my_train")
        MetadataCatalog.remove("my_train")


@pytest.mark.parametrize("num_paths", [3, 4])
def test_from_a_yaml_alone(scenes, tmp_path, forget, num_paths):
    """The same dataset as the call registers; twice is once."""
    cfg = read_config(tmp_path, {"my_train": entry(scenes[:num_paths])})
    complete_config(cfg)
    complete_config(cfg)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (8, 14)
    with registered("by_call", *scenes[:num_paths]) as name:
        assert DatasetCatalog.get("my_train") == DatasetCatalog.get(name)
        ours, theirs = (MetadataCatalog.get(x).as_dict() for x in ("my_train", name))
        assert {**ours, "name": None} == {**theirs, "name": None}
    # what train_net.py writes into the output folder can be read again
    again = get_cfg()
    add_oanet_config(again)
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    again.merge_from_file(str(tmp_path / "dump.yaml"))
    assert again.DATASETS.PANOPTIC == cfg.DATASETS.PANOPTIC


def test_a_path_can_be_overridden(scenes, tmp_path, forget):
    wrong = {**entry(scenes), "IMAGE_ROOT": "elsewhere"}
    key = "DATASETS.PANOPTIC.my_train.IMAGE_ROOT"
    register_from_config(read_config(tmp_path, {"my_train": wrong}, [key, scenes[0]]))
    assert MetadataCatalog.get("my_train").image_root == scenes[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"PANOPTIC_ROOT": ""}, "my_train.PANOPTIC_ROOT is not set"),
        ({"IMAGES": "x"}, r"holds \['IMAGES'\]; it may hold IMAGE_ROOT"),
        ({"PANOPTIC_JSON": "nowhere.json"}, "Cannot read the annotations nowhere.json"),
    ],
)
def test_wrong_entries_are_refused(scenes, tmp_path, forget, change, words):
    cfg = read_config(tmp_path, {"my_train": {**entry(scenes), **change}})
    with pytest.raises(ValueError, match=words):
        register_from_config(cfg)
    assert "my_train" not in DatasetCatalog


def test_entries_that_are_no_mapping(tmp_path):
    with pytest.raises(ValueError, match="my_train is '/data'; it must hold IMAGE_ROOT"):
        register_from_config(read_config(tmp_path, {"my_train": "/data"}))


def test_a_name_stands_for_one_dataset(scenes, tmp_path, forget):
    register_from_config(read_config(tmp_path, {"my_train": entry(scenes)}))
    with pytest.raises(ValueError, match="'my_train' from other files is registered already"):
        register_from_config(read_config(tmp_path, {"my_train": entry(scenes[:3])}))


CATEGORIES = [
    {"id": 7, "name": "person", "isthing": 1, "color": [1, 2, 3]},
    {"id": 200, "name": "sky", "isthing": 0, "color": [4, 5, 6]},
    {"id": 3, "name": "tie", "isthing": 1, "color": [7, 8, 9]},
]


def test_metadata_by_hand():
    assert category_metadata(CATEGORIES, "x") == {
        "thing_classes": ["person", "tie"],
        "stuff_classes": ["things", "sky"],
        "thing_dataset_id_to_contiguous_id": {7: 0, 3: 1},
        "stuff_dataset_id_to_contiguous_id": {200: 1},
        "thing_colors": [[1, 2, 3], [7, 8, 9]],
        "stuff_colors": [[0, 0, 0], [4, 5, 6]],
    }
    without = [{k: v for k, v in c.items() if k != "color"} for c in CATEGORIES]
    assert "thing_colors" not in category_metadata(without, "x")


def test_categories_that_contradict_each_other():
    with pytest.raises(ValueError, match="x: two categories have the id 7"):
        category_metadata([*CATEGORIES, {"id": 7, "name": "cat", "isthing": 0}], "x")
    with pytest.raises(ValueError, match="has no 'isthing'.*1 for things"):
        category_metadata([{"id": 1, "name": "cat"}], "x")


def write_json(path, annotations):
    path.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations))
    return str(path)


@pytest.mark.parametrize(
    "annotations, words",
    [
        ("{", "is not a JSON file"),
        ([], "has no 'categories'"),
        ({"images": [], "annotations": []}, "has no 'categories'"),
    ],
)
def test_what_is_no_panoptic_annotation(tmp_path, annotations, words):
    path = write_json(tmp_path / "panoptic.json", annotations)
    with pytest.raises(ValueError, match=words):
        register_panoptic("my_train", "images", path, "pngs")
    assert "my_train" not in DatasetCatalog


@pytest.mark.parametrize(
    "segments, image_id, words",
    [
        ([{"id": 1, "category_id": 9}], 1, "segment 1 is of category 9, which is not among"),
        ([], 2, "a.png annotates the image 2, which is not among"),
    ],
)
def test_annotations_that_contradict_each_other(tmp_path, forget, segments, image_id, words):
    annotation = {"image_id": image_id, "file_name": "a.png", "segments_info": segments}
    image = {"id": 1, "file_name": "a.jpg", "height": 4, "width": 4}
    path = write_json(
        tmp_path / "panoptic.json",
        {"images": [image], "annotations": [annotation], "categories": CATEGORIES},
    )
    register_panoptic("my_train", "images", path, "pngs")
    with pytest.raises(ValueError, match=words):
        DatasetCatalog.get("my_train")


def test_instances_of_stuff_are_refused(scenes, tmp_path, forget):
    with open(scenes[3]) as f:
        instances = json.load(f)
    instances["annotations"][0]["category_id"] = 10**6
    path = write_json(tmp_path / "instances.json", instances)
    register_panoptic("my_train", *scenes[:3], path)
    with pytest.raises(ValueError, match="instances.json: an instance is of category 1000000"):
        DatasetCatalog.get("my_train")


@pytest.mark.parametrize(
    "file, key, words",
    [
        ("panoptic", "segments_info", r"annotations\[0\]: KeyError: 'segments_info'"),
        ("panoptic", "file_name", r"annotations\[0\]: KeyError: 'file_name'"),
        ("instances", "category_id", "KeyError: 'category_id'"),
        ("instances", "id", "KeyError: 'id'"),
    ],
)
def test_malformed_annotations_are_refused_with_their_file(
    scenes, tmp_path, forget, file, key, words
):
    paths = list(scenes)
    which = ("images", "panoptic", "pngs", "instances").index(file)
    with open(scenes[which]) as f:
        content = json.load(f)
    del content["annotations"][0][key]
    paths[which] = write_json(tmp_path / f"{file}.json", content)
    register_panoptic("my_train", *paths)
    with pytest.raises(ValueError, match=f"{file}.json: {words}"):
        DatasetCatalog.get("my_train")


@pytest.mark.parametrize("which", [1, 2])
def test_another_file_in_place_of_the_instances_json(scenes, forget, which):
    """The panoptic JSON, a folder."""
    register_panoptic("my_train", *scenes[:3], scenes[which])
    with pytest.raises(ValueError, match=scenes[which]):
        DatasetCatalog.get("my_train")


def test_files_that_are_not_there(scenes, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    for i, key in enumerate(keys):
        paths = [elsewhere if k == i else path for k, path in enumerate(scenes)]
        with registered("my_train", *paths[:1], scenes[1], *paths[2:]):
            if i == 1:  # which is read when it is registered
                del MetadataCatalog.get("my_train").panoptic_json
                MetadataCatalog.get("my_train").panoptic_json = elsewhere
            with pytest.raises(ValueError, match=f"'my_train': its {key} {elsewhere} does not"):
                require_files("my_train")
            if i == 0:
                require_files("my_train", images=False)
    for paths in (scenes, scenes[:3], [f"https://host/{elsewhere}", *scenes[1:]]):
        with registered("my_train", *paths):
            require_files("my_train")
