"""OcclusionScenes: what is drawn and annotated, and that a split on disk is whole or not there."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import cv2
import numpy as np
import pytest
from panopticapi.utils import rgb2id
from pycocotools.coco import COCO

from oanet_d2.data.occlusion_scenes import CATEGORIES, draw_scene, scene_to_panoptic, writer
from oanet_d2.data.occlusion_scenes.writer import write_split

ID = {category["name"]: category["id"] for category in CATEGORIES}
THING_IDS = {category["id"] for category in CATEGORIES if category["isthing"]}
STUFF_IDS = set(ID.values()) - THING_IDS
PANOPTIC_JSON = "annotations/panoptic_train.json"


@pytest.mark.parametrize("seed, size", [(k, 64 + 5 * k) for k in range(25)])
def test_every_scene_is_well_formed_and_its_panoptic_map_shows_the_topmost_silhouette(seed, size):
    scene = draw_scene(seed, size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.stuff.shape == (size, size) and set(np.unique(scene.stuff)) <= STUFF_IDS
    ids, segments = scene_to_panoptic(scene)
    assert sorted(segment["id"] for segment in segments) == np.unique(ids).tolist()
    assert 0 not in ids and len(scene.things) >= 1
    expected = np.zeros_like(ids)
    for segment in segments[len(scene.things) :]:
        expected[scene.stuff == segment["category_id"]] = segment["id"]
    for thing, segment in zip(scene.things, segments):
        assert segment["category_id"] == thing.category_id
        assert segment["area"] >= 0.4 * thing.mask.sum()
        expected[thing.mask] = segment["id"]
    assert np.array_equal(ids, expected)
    for segment in segments:
        rows, columns = np.nonzero(ids == segment["id"])
        left, top = columns.min(), rows.min()
        assert segment["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        assert segment["area"] == len(rows)


def test_scenes_stay_those_on_the_disks_of_users():
    """Numbers of version 1. The exact bytes depend on OpenCV's version and on the CPU."""
    scene = draw_scene(0, 96)
    names = ["car", "person", "tie", "table", "cup", "cup", "cup"]
    assert [thing.category_id for thing in scene.things] == [ID[name] for name in names]
    areas = [mask.sum() for _, mask in scene.things]
    assert np.allclose(areas, [733, 1471, 140, 1079, 213, 186, 167], atol=3)
    assert np.allclose(np.bincount(scene.stuff.ravel())[9:], [2519, 887, 0, 5407, 0, 403], atol=10)
    assert np.allclose(scene.image.mean(axis=(0, 1)), [152.8, 142.1, 137.1], atol=0.5)


def test_every_class_occurs_and_classes_do_not_tell_which_one_is_in_front():
    scenes = [draw_scene(seed, 96) for seed in range(80)]
    segments = [segment for scene in scenes for segment in scene_to_panoptic(scene)[1]]
    assert {segment["category_id"] for segment in segments} == set(ID.values())
    pairs, wearers = [], {}
    for scene in scenes:
        for back, front in combinations(scene.things, 2):
            if (common := (back.mask & front.mask).sum()) >= 3:
                pairs.append((back.category_id, front.category_id))
                if pairs[-1] == (ID["person"], ID["tie"]):
                    wearers[id(front)] = max(wearers.get(id(front), 0), common / front.mask.sum())
    assert len(wearers) > 20 and min(wearers.values()) > 0.95  # a tie is inside a person
    others = [ID["car"], ID["table"], ID["tree"]]
    before = sum(pairs.count((other, ID["person"])) for other in others)
    behind = sum(pairs.count((ID["person"], other)) for other in others)
    assert before + behind > 50 and 0.35 < before / (before + behind) < 0.65


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """12 training and 4 validation images of 96 x 96."""
    folder = tmp_path_factory.mktemp("data") / "occlusion_scenes"
    write_split(folder, "train", 12, 96, seed=3, num_workers=0)
    write_split(folder, "val", 4, 96, seed=3, num_workers=0)
    return folder


def contents(folder):
    """Relative path -> bytes, of every file but the locks."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_bytes_depend_on_seed_and_split_not_on_workers_nor_on_the_number_of_images(root, tmp_path):
    write_split(tmp_path / "workers", "train", 12, 96, seed=3, num_workers=2)
    assert contents(tmp_path / "workers").items() <= contents(root).items()
    write_split(tmp_path / "longer", "train", 13, 96, seed=3, num_workers=0)
    write_split(tmp_path / "other", "train", 12, 96, seed=4, num_workers=0)
    folders = [root / "train", root / "val", tmp_path / "longer/train", tmp_path / "other/train"]
    train, val, longer, other = (list(contents(folder).values()) for folder in folders)
    assert longer[:12] == train
    assert len({*train, *val, *other}) == 12 + 4 + 12


@pytest.mark.parametrize("split, numbers", [("train", range(1, 13)), ("val", range(1000001, 1000005))])
def test_pngs_are_the_instances_painted_from_back_to_front(root, split, numbers):
    coco = COCO(str(root / f"annotations/instances_{split}.json"))
    assert set(coco.cats) == THING_IDS and list(coco.imgs) == list(numbers)
    panoptic = json.loads((root / f"annotations/panoptic_{split}.json").read_text())
    parameters = {"generator": "OcclusionScenes", "generator_version": 1, "split": split}
    parameters |= {"num_images": len(numbers), "image_size": 96, "seed": 3}
    assert panoptic["info"]["parameters"] == parameters and panoptic["categories"] == CATEGORIES
    for entry in panoptic["annotations"]:
        image = coco.imgs[entry["image_id"]]
        assert cv2.imread(str(root / split / image["file_name"])).shape == (96, 96, 3)
        png = cv2.imread(str(root / f"panoptic_{split}" / entry["file_name"]))
        ids = rgb2id(cv2.cvtColor(png, cv2.COLOR_BGR2RGB))
        segments = {segment["id"]: segment for segment in entry["segments_info"]}
        assert set(np.unique(ids)) == set(segments)
        painted = np.zeros_like(ids)
        for instance in coco.imgToAnns[entry["image_id"]]:
            mask = coco.annToMask(instance)
            assert instance["area"] == mask.sum() and instance["iscrowd"] == 0
            assert instance["bbox"] == list(cv2.boundingRect(mask))
            segment = segments.pop(instance["panoptic_segment_id"])
            assert segment["category_id"] == instance["category_id"]
            painted[mask == 1] = segment["id"]
        assert {segment["category_id"] for segment in segments.values()} <= STUFF_IDS
        assert np.array_equal(np.where(np.isin(ids, list(segments)), 0, ids), painted)


def test_of_several_that_ask_for_a_split_one_writes_it_and_it_stays(tmp_path, monkeypatch):
    written = []
    write = writer._write
    monkeypatch.setattr(writer, "_write", lambda *job: written.append(job) or write(*job))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: write_split(tmp_path, "train", 20, 64, num_workers=0), range(3)))
    assert len(written) == 1
    whole = contents(tmp_path)
    for key, asked in {"num_images": 4, "image_size": 65, "seed": 1}.items():
        with pytest.raises(ValueError, match=f"'{key}': {asked}"):
            write_split(tmp_path, "train", **{"num_images": 20, "image_size": 64, key: asked})
    assert contents(tmp_path) == whole


def test_a_full_disk_is_one_message_and_the_next_call_repairs_the_split(tmp_path):
    """With a limit to the size of a file, which the kernel enforces as it does a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large.*000000000001.jpg"):
            write_split(tmp_path, "train", 4, 64, num_workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / PANOPTIC_JSON).exists()
    write_split(tmp_path, "train", 4, 64, num_workers=0)
    assert len(contents(tmp_path)) == 4 + 4 + 2


def test_parameters_out_of_range_are_named(tmp_path):
    right = {"split": "train", "num_images": 2, "image_size": 64, "seed": 0, "num_workers": 0}
    for name, value in {"split": "test", "num_images": 0, "image_size": 63, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"{name} is .?{value}.?; it must be"):
            write_split(tmp_path, **{**right, name: value})
