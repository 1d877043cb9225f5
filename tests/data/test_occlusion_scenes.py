"""OcclusionScenes: what is drawn and annotated, and that a split on disk is whole or not there."""

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panopticapi.utils import rgb2id
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from oanet_d2.data.occlusion_scenes import (
    CATEGORIES,
    draw_scene,
    drawing,
    ensure_split,
    paints,
    scene_to_panoptic,
    stuff,
    write_split,
    writer,
)
from oanet_d2.data.occlusion_scenes.__main__ import main

ID = {category["name"]: category["id"] for category in CATEGORIES}
THING_IDS = {category["id"] for category in CATEGORIES if category["isthing"]}
STUFF_IDS = set(ID.values()) - THING_IDS
INSTANCES_JSON, PANOPTIC_JSON = (f"annotations/{k}_train.json" for k in ("instances", "panoptic"))


@settings(max_examples=25, database=None)
@given(seed=st.integers(0, 2**64), image_size=st.integers(64, 200))
def test_every_scene_is_well_formed(seed, image_size):
    scene = draw_scene(seed, image_size)
    assert scene.image.shape == (image_size, image_size, 3) and scene.image.dtype == np.uint8
    assert scene.stuff.shape == (image_size, image_size) and set(np.unique(scene.stuff)) <= STUFF_IDS

    ids, segments = scene_to_panoptic(scene)
    assert sorted(segment["id"] for segment in segments) == np.unique(ids).tolist()
    assert 0 not in ids
    things, rest = segments[: len(scene.things)], segments[len(scene.things) :]
    assert [segment["category_id"] for segment in things] == [thing.category_id for thing in scene.things]
    assert len(things) >= 1
    for thing, segment in zip(scene.things, things):
        visible = ids == segment["id"]
        assert not (visible & ~thing.mask).any()
        assert visible.sum() >= 0.4 * thing.mask.sum()
    stuff_ids = [segment["category_id"] for segment in rest]
    assert set(stuff_ids) <= STUFF_IDS and len(set(stuff_ids)) == len(stuff_ids)


@pytest.mark.parametrize("seed", range(3))
def test_the_panoptic_map_shows_the_topmost_silhouette(seed):
    scene = draw_scene(seed, 64)
    ids, segments = scene_to_panoptic(scene)
    category_of = {segment["id"]: segment["category_id"] for segment in segments}
    for y, x in np.ndindex(64, 64):
        here = [k for k, thing in enumerate(scene.things) if thing.mask[y, x]]
        if here:
            assert ids[y, x] == segments[here[-1]]["id"]
        else:
            assert category_of[ids[y, x]] == scene.stuff[y, x]
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
    areas = [thing.mask.sum() for thing in scene.things]
    assert np.allclose(areas, [733, 1471, 140, 1079, 213, 186, 167], atol=3)
    assert np.allclose(np.bincount(scene.stuff.ravel())[9:], [2519, 887, 0, 5407, 0, 403], atol=10)
    assert np.allclose(scene.image.mean(axis=(0, 1)), [152.8, 142.1, 137.1], atol=0.5)


@pytest.fixture(scope="module")
def many_scenes():
    return [draw_scene(seed, 96) for seed in range(80)]


def overlapping(scene):
    """(back, front) category ids of every two things whose silhouettes overlap."""
    return [
        (back.category_id, front.category_id)
        for k, back in enumerate(scene.things)
        for front in scene.things[k + 1 :]
        if (back.mask & front.mask).sum() >= 3
    ]


def test_classes_overlap_and_do_not_tell_which_one_is_in_front(many_scenes):
    counts = np.array([sum(a != b for a, b in overlapping(scene)) for scene in many_scenes])
    assert np.mean(counts >= 2) > 0.75
    pairs = [pair for scene in many_scenes for pair in overlapping(scene)]
    others = [ID["car"], ID["table"], ID["tree"]]
    before = sum(pairs.count((other, ID["person"])) for other in others)
    behind = sum(pairs.count((ID["person"], other)) for other in others)
    assert before + behind > 50
    assert 0.35 < before / (before + behind) < 0.65


def test_a_tie_is_inside_the_silhouette_of_its_wearer(many_scenes):
    ties = 0
    for scene in many_scenes:
        for k, tie in enumerate(scene.things):
            if tie.category_id == ID["tie"]:
                persons = [t.mask for t in scene.things[:k] if t.category_id == ID["person"]]
                assert max((tie.mask & person).sum() for person in persons) > 0.95 * tie.mask.sum()
                ties += 1
    assert ties > 20


def test_every_class_occurs(many_scenes):
    segments = [segment for scene in many_scenes for segment in scene_to_panoptic(scene)[1]]
    assert {segment["category_id"] for segment in segments} == set(ID.values())


def test_silhouette_and_picture_lie_on_the_same_pixels():
    """A box of 20 x 10 pixels with its lower edge's middle at x = 30, y = 40."""
    red = np.float32([200, 20, 20])
    thing = drawing.Drawing()
    thing.add(drawing.box(-0.1, -0.1, 0.1, 0.0), paints.plain(red))
    sprite = drawing.rasterise(thing, 100.0, (30.0, 40.0), 64, light=(0.0, 0.0))
    silhouette = np.zeros((64, 64), dtype=bool)
    silhouette[sprite.window] = sprite.inside
    assert silhouette[30:40, 20:40].all()
    silhouette[29:41, 19:41] = False  # soft edges may add a pixel
    assert not silhouette.any()
    # Shading changes the brightness of the paint, not its hue.
    inside = sprite.colour[sprite.inside]
    assert np.allclose(inside / inside[:, :1], red / red[0], atol=1e-3)
    assert drawing.rasterise(thing, 100.0, (-50.0, 40.0), 64, light=(0.0, 0.0)) is None


def test_stuff_of_a_few_pixels_goes_to_its_nearest_neighbour():
    stuff_map = np.full((40, 40), ID["sky"], dtype=np.int32)
    stuff_map[20:] = ID["sand"]
    stuff_map[19, :3] = ID["water"]
    stuff_map[30:, :] = ID["road"]
    covered = np.zeros((40, 40), dtype=bool)
    covered[30:, 1:] = True  # 10 visible pixels of the road are enough
    merged = stuff.merge_small(stuff_map, covered)
    assert np.isin(merged[19, :3], [ID["sky"], ID["sand"]]).all()
    assert np.array_equal(merged[:19], stuff_map[:19]) and np.array_equal(merged[20:], stuff_map[20:])


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


def annotations(root, kind, split):
    return json.loads((root / "annotations" / f"{kind}_{split}.json").read_text())


def test_worker_processes_write_the_same_bytes(root, tmp_path):
    write_split(tmp_path, "train", 12, 96, seed=3, num_workers=2)
    assert contents(tmp_path).items() <= contents(root).items()


def test_seed_split_and_number_of_images(root, tmp_path):
    """Other seeds and splits have other scenes. A longer split begins with the scenes of a shorter one."""
    write_split(tmp_path / "longer", "train", 13, 96, seed=3, num_workers=0)
    write_split(tmp_path / "other", "train", 12, 96, seed=4, num_workers=0)
    folders = [root / "train", root / "val", tmp_path / "longer" / "train", tmp_path / "other" / "train"]
    train, val, longer, other = (list(contents(folder).values()) for folder in folders)
    assert longer[:12] == train
    assert len({*train, *val, *other}) == 12 + 4 + 12


@pytest.mark.parametrize("split, count", [("train", 12), ("val", 4)])
def test_pngs_are_the_instances_painted_from_back_to_front(root, split, count):
    coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
    assert set(coco.cats) == THING_IDS and len(coco.imgs) == count
    for entry in annotations(root, "panoptic", split)["annotations"]:
        image = coco.imgs[entry["image_id"]]
        picture = cv2.imread(str(root / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3) == (96, 96, 3)
        png = cv2.imread(str(root / f"panoptic_{split}" / entry["file_name"]))
        ids = rgb2id(cv2.cvtColor(png, cv2.COLOR_BGR2RGB))
        segments = {segment["id"]: segment for segment in entry["segments_info"]}
        areas = {number: segment["area"] for number, segment in segments.items()}
        assert dict(zip(*np.unique(ids, return_counts=True))) == areas

        painted = np.zeros_like(ids)
        for instance in coco.imgToAnns[entry["image_id"]]:
            mask = coco.annToMask(instance)
            assert instance["area"] == mask.sum() and instance["iscrowd"] == 0
            assert instance["bbox"] == coco_mask.toBbox(coco.annToRLE(instance)).tolist()
            segment = segments.pop(instance["panoptic_segment_id"])
            assert segment["category_id"] == instance["category_id"]
            painted[mask == 1] = segment["id"]
        assert {segment["category_id"] for segment in segments.values()} <= STUFF_IDS
        assert np.array_equal(np.where(np.isin(ids, list(segments)), 0, ids), painted)


def test_image_ids_differ_and_info_holds_the_parameters(root):
    splits = [annotations(root, "panoptic", split) for split in ("train", "val")]
    ids = [image["id"] for split in splits for image in split["images"]]
    assert len(ids) == 16 == len(set(ids))
    expected = {"generator": "OcclusionScenes", "generator_version": 1, "split": "val"}
    expected |= {"num_images": 4, "image_size": 96, "seed": 3}
    for kind in ("panoptic", "instances"):
        assert annotations(root, kind, "val")["info"]["parameters"] == expected


def test_a_complete_split_stays_as_it_is(tmp_path, monkeypatch):
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    before = contents(tmp_path)
    monkeypatch.setattr(writer, "_write", None)  # a call would fail
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    for change in ({"num_images": 4}, {"image_size": 65}, {"seed": 1}):
        [(key, asked)] = change.items()
        with pytest.raises(ValueError, match=f"'{key}': {asked}"):
            ensure_split(tmp_path, "train", **{"num_images": 3, "image_size": 64, **change})
    monkeypatch.setattr(writer, "GENERATOR_VERSION", 2)
    with pytest.raises(ValueError, match="'generator_version': 2"):
        ensure_split(tmp_path, "train", 3, 64)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "missing", ["train/000000000002.jpg", "panoptic_train/000000000001.png", INSTANCES_JSON]
)
def test_a_split_that_lacks_a_file_is_written_again(tmp_path, missing):
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    whole = contents(tmp_path)
    (tmp_path / missing).unlink()
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    assert contents(tmp_path) == whole


def test_a_full_disk_is_one_message_and_the_next_call_repairs_the_split(tmp_path):
    """With a limit to the size of a file, which the kernel enforces as it does a full disk."""
    write_split(tmp_path / "fresh", "train", 4, 64, seed=2, num_workers=0)
    write_split(tmp_path / "full", "train", 5, 64, seed=1, num_workers=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large.*000000000001.jpg"):
            write_split(tmp_path / "full", "train", 4, 64, seed=2, num_workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "full" / PANOPTIC_JSON).exists()
    ensure_split(tmp_path / "full", "train", 4, 64, seed=2, num_workers=0)
    assert contents(tmp_path / "full") == contents(tmp_path / "fresh")


def test_a_writer_that_is_killed_leaves_no_lock_no_workers_and_no_complete_split(tmp_path):
    code = "import sys; from oanet_d2.data.occlusion_scenes import write_split; "
    code += "write_split(sys.argv[1], 'train', 5000, 64, num_workers=2)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    while len(list(tmp_path.glob("panoptic_train/*.png"))) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ensure_split, tmp_path, "train", 2, 64, num_workers=0)
        time.sleep(0.5)
        assert not waiting.done()
        process.kill()
        waiting.result()
    process.communicate(timeout=300)  # returns when the workers, too, have closed stdout
    assert len(contents(tmp_path)) == 2 + 2 + 2


def test_of_several_that_ask_for_a_split_one_writes_it(tmp_path, monkeypatch):
    written = []
    write = writer._write
    monkeypatch.setattr(writer, "_write", lambda *job: written.append(job) or write(*job))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: ensure_split(tmp_path, "train", 20, 64, num_workers=0), range(3)))
    assert len(written) == 1


def test_the_package_imports_without_fcntl():
    """As on Windows. portalocker, which knows Windows, is imported first."""
    code = "import portalocker, tensorboard, detectron2, torch, sys; sys.modules['fcntl'] = None\n"
    code += "import oanet_d2.data.occlusion_scenes"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["train/holiday.jpg", "train/000000000001.jpg", PANOPTIC_JSON])
def test_files_of_others_are_not_touched(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text('{"info": {"description": "COCO 2017"}}')
    for write in (write_split, ensure_split):
        with pytest.raises(FileExistsError, match=name):
            write(tmp_path, "train", 2, 64, num_workers=0)
    assert list(contents(tmp_path)) == [name] and "COCO 2017" in file.read_text()

    file.unlink()
    write_split(tmp_path, "train", 3, 64, num_workers=0)
    (tmp_path / "train" / "notes.txt").write_text("mine")
    write_split(tmp_path, "train", 2, 64, num_workers=0)
    names = {"000000000001.jpg", "000000000002.jpg", "notes.txt"}
    assert {path.name for path in (tmp_path / "train").iterdir()} == names


@pytest.mark.parametrize(
    "name, value, least",
    [("split", "test", "train"), ("num_images", 0, 1), ("image_size", 63, 64), ("seed", -1, 0),
     ("num_workers", -1, 0)],
)
def test_parameters_out_of_range_are_named(tmp_path, name, value, least):
    right = {"split": "train", "num_images": 2, "image_size": 64, "seed": 0, "num_workers": 0}
    with pytest.raises(ValueError, match=f"{name} is .?{value}.?; it must be .*{least}"):
        write_split(tmp_path, **{**right, name: value})


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = ["--val", "0", "--image-size", "64", "--workers", "0"]
    root = tmp_path / "occlusion_scenes"
    assert main(["--train", "2", *small]) == 0
    assert len(os.listdir(root / "train")) == 2 and not (root / "val").exists()
    assert main(["--train", "3", *small]) == 1
    assert "'num_images': 2" in capsys.readouterr().err
    assert main(["--train", "3", "--overwrite", *small]) == 0
    assert len(os.listdir(root / "train")) == 3
