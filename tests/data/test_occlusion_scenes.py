"""OcclusionScenes: what is drawn, what is annotated, and that a split on disk is whole or not there."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import rgb2id
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from oanet_d2.data import occlusion_scenes
from oanet_d2.data.occlusion_scenes import (
    CATEGORIES,
    Scene,
    Thing,
    draw_scene,
    drawing,
    ensure_split,
    scene_to_panoptic,
    stuff,
    write_split,
    writer,
)
from oanet_d2.data.occlusion_scenes.__main__ import main

ID = {category["name"]: category["id"] for category in CATEGORIES}
STUFF_IDS = [category["id"] for category in CATEGORIES if not category["isthing"]]


# ---------------------------------------------------------------------------------------------------
# Scenes


@settings(max_examples=30, deadline=None, database=None)
@given(seed=st.integers(0, 2**64), image_size=st.integers(64, 200))
def test_every_scene_is_well_formed(seed, image_size):
    scene = draw_scene(seed, image_size)
    assert scene.image.shape == (image_size, image_size, 3) and scene.image.dtype == np.uint8
    assert scene.stuff.shape == (image_size, image_size)
    assert np.isin(scene.stuff, STUFF_IDS).all()
    assert len(scene.things) >= 1

    ids, segments = scene_to_panoptic(scene)
    assert sorted(segment["id"] for segment in segments) == sorted(set(np.unique(ids)))
    assert 0 not in ids
    for (category_id, mask), segment in zip(scene.things, segments):
        visible = ids == segment["id"]
        assert segment["category_id"] == category_id
        assert not (visible & ~mask).any()
        assert visible.sum() >= 0.4 * mask.sum()
    stuff_segments = [segment["category_id"] for segment in segments[len(scene.things) :]]
    assert set(stuff_segments) <= set(STUFF_IDS) and len(set(stuff_segments)) == len(stuff_segments)


@pytest.mark.parametrize("seed", range(5))
def test_panoptic_map_shows_the_topmost_silhouette(seed):
    scene = draw_scene(seed, 64)
    ids, segments = scene_to_panoptic(scene)
    category_of = {segment["id"]: segment["category_id"] for segment in segments}
    for y in range(64):
        for x in range(64):
            on_this_pixel = [k for k, thing in enumerate(scene.things) if thing.mask[y, x]]
            if on_this_pixel:
                assert ids[y, x] == segments[on_this_pixel[-1]]["id"]
            else:
                assert category_of[ids[y, x]] == scene.stuff[y, x]
    for segment in segments:
        rows, columns = np.nonzero(ids == segment["id"])
        left, top = columns.min(), rows.min()
        assert segment["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        assert segment["area"] == len(rows)


def test_panoptic_map_of_a_scene_made_by_hand():
    """Two persons, the nearer one over the farther one's right half, before sky and grass."""
    far, near = np.zeros((4, 6), dtype=bool), np.zeros((4, 6), dtype=bool)
    far[1:3, 0:4] = True
    near[1:4, 2:5] = True
    ground = np.full((4, 6), ID["sky"], dtype=np.int32)
    ground[2:] = ID["grass"]
    person = ID["person"]
    scene = Scene(np.zeros((4, 6, 3), dtype=np.uint8), [Thing(person, far), Thing(person, near)], ground)
    ids, segments = scene_to_panoptic(scene)
    first, second, sky, grass = (segment["id"] for segment in segments)
    assert len({first, second, sky, grass}) == 4
    expected = [
        [sky, sky, sky, sky, sky, sky],
        [first, first, second, second, second, sky],
        [first, first, second, second, second, grass],
        [grass, grass, second, second, second, grass],
    ]
    assert ids.tolist() == expected
    assert segments[0]["bbox"] == [0, 1, 2, 2] and segments[0]["area"] == 4


def test_same_seed_same_scene_and_another_seed_another():
    first, again, other = draw_scene(11, 96), draw_scene(11, 96), draw_scene(12, 96)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.stuff, again.stuff)
    assert [thing.category_id for thing in first.things] == [thing.category_id for thing in again.things]
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.things, again.things))
    assert not np.array_equal(first.image, other.image)


def test_a_seed_means_the_same_scene_in_every_size():
    same = 0
    for seed in range(10):
        small, large = draw_scene(seed, 96), draw_scene(seed, 192)
        if [t.category_id for t in small.things] == [t.category_id for t in large.things]:
            halved = [thing.mask[::2, ::2] for thing in large.things]
            overlap = [(a.mask & b).sum() / (a.mask | b).sum() for a, b in zip(small.things, halved)]
            same += min(overlap) > 0.7
    # Not all ten: what is barely visible in one size may be taken out in the other.
    assert same >= 8


@pytest.fixture(scope="module")
def many_scenes():
    return [draw_scene(seed, 96) for seed in range(80)]


def _overlapping(scene):
    """(back, front) categories of every two things whose silhouettes overlap."""
    return [
        (back.category_id, front.category_id)
        for k, back in enumerate(scene.things)
        for front in scene.things[k + 1 :]
        if (back.mask & front.mask).sum() >= 3
    ]


def test_most_scenes_have_two_overlaps_of_different_classes(many_scenes):
    counts = [sum(back != front for back, front in _overlapping(scene)) for scene in many_scenes]
    assert np.mean(np.array(counts) >= 2) > 0.75


def test_which_class_is_in_front_cannot_be_told_from_the_classes(many_scenes):
    pairs = [pair for scene in many_scenes for pair in _overlapping(scene)]
    others = [ID["car"], ID["table"], ID["tree"]]
    before = sum(pairs.count((other, ID["person"])) for other in others)
    behind = sum(pairs.count((ID["person"], other)) for other in others)
    assert before + behind > 50
    assert 0.35 < before / (before + behind) < 0.65


def test_ties_lie_on_persons_and_within_them(many_scenes):
    """Whoever paints the person last loses the tie: it is inside the silhouette of its wearer."""
    ties = 0
    for scene in many_scenes:
        for k, tie in enumerate(scene.things):
            if tie.category_id == ID["tie"]:
                persons = [t.mask for t in scene.things[:k] if t.category_id == ID["person"]]
                assert max((tie.mask & person).sum() for person in persons) > 0.95 * tie.mask.sum()
                ties += 1
    assert ties > 20


def test_every_class_occurs(many_scenes):
    seen = {t.category_id for scene in many_scenes for t in scene.things}
    seen |= {int(k) for scene in many_scenes for k in np.unique(scene.stuff)}
    assert seen == set(ID.values())


def test_silhouette_and_picture_lie_on_the_same_pixels():
    """A box of 20 x 10 pixels with its lower edge's middle at x = 30, y = 40."""
    red = np.float32([200, 20, 20])
    thing = drawing.Drawing()
    thing.add(drawing.box(-0.1, -0.1, 0.1, 0.0), drawing.plain(red))
    sprite = drawing.rasterise(thing, 100.0, (30.0, 40.0), 64, light=(0.0, 0.0))
    silhouette = sprite.silhouette(64)
    assert silhouette[30:40, 20:40].all()
    silhouette[29:41, 19:41] = False  # soft edges may add a pixel
    assert not silhouette.any()
    inside = sprite.colour[sprite.inside()]
    # Shading changes how bright the paint is, not its hue.
    assert np.allclose(inside / inside[:, :1], red / red[0], atol=1e-3)


def test_a_drawing_outside_the_image_has_no_sprite():
    thing = drawing.Drawing()
    thing.add(drawing.box(-0.1, -0.1, 0.1, 0.0), drawing.plain(np.float32([1, 1, 1])))
    assert drawing.rasterise(thing, 100.0, (-50.0, 40.0), 64, light=(0.0, 0.0)) is None


def test_stuff_of_a_few_pixels_goes_to_its_nearest_neighbour():
    stuff_map = np.full((40, 40), ID["sky"], dtype=np.int32)
    stuff_map[20:] = ID["sand"]
    stuff_map[19, :3] = ID["water"]
    stuff_map[30:, :] = ID["road"]
    covered = np.zeros((40, 40), dtype=bool)
    covered[30:, 1:] = True  # of the road 10 pixels stay visible: enough of it
    merged = stuff.merge_small(stuff_map, covered)
    assert not (merged == ID["water"]).any()
    assert np.isin(merged[19, :3], [ID["sky"], ID["sand"]]).all()
    assert np.array_equal(merged[:19], stuff_map[:19]) and np.array_equal(merged[20:], stuff_map[20:])


def test_an_image_too_small_is_refused():
    with pytest.raises(ValueError, match="image_size is 63; it must be at least 64"):
        draw_scene(0, 63)


def test_categories_have_ids_from_one_and_colours_of_their_own():
    assert [category["id"] for category in CATEGORIES] == list(range(1, len(CATEGORIES) + 1))
    assert len({tuple(category["color"]) for category in CATEGORIES}) == len(CATEGORIES)
    assert sum(category["isthing"] for category in CATEGORIES) >= 8 and len(STUFF_IDS) >= 4


# ---------------------------------------------------------------------------------------------------
# Files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """12 training and 4 validation images of 96 x 96."""
    folder = tmp_path_factory.mktemp("data") / "occlusion_scenes"
    write_split(folder, "train", 12, 96, seed=3, num_workers=0)
    write_split(folder, "val", 4, 96, seed=3, num_workers=0)
    return folder


def _contents(folder):
    """Relative path -> bytes, of every file but the locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def _annotations(root, kind, split):
    return json.loads((root / "annotations" / f"{kind}_{split}.json").read_text())


def test_worker_processes_write_the_same_bytes(root, tmp_path):
    write_split(tmp_path, "train", 12, 96, seed=3, num_workers=3)
    write_split(tmp_path, "val", 4, 96, seed=3, num_workers=1)
    assert _contents(tmp_path) == _contents(root)


def test_seed_split_and_number_of_images(root, tmp_path):
    """Other seeds and splits have other scenes; a longer split starts with the shorter one's."""
    write_split(tmp_path, "train", 13, 96, seed=3, num_workers=0)
    longer = {name: data for name, data in _contents(tmp_path).items() if name.endswith("jpg")}
    train = [(root / "train" / f"{k:012d}.jpg").read_bytes() for k in range(1, 13)]
    val = [path.read_bytes() for path in (root / "val").iterdir()]
    assert list(longer.values())[:12] == train
    assert not set(train) & set(val)
    write_split(tmp_path, "train", 12, 96, seed=4, num_workers=0)
    other_seed = [path.read_bytes() for path in (tmp_path / "train").iterdir()]
    assert len(other_seed) == 12 and not set(train) & set(other_seed)


@pytest.mark.parametrize("split, count", [("train", 12), ("val", 4)])
def test_pycocotools_reads_the_instances(root, split, count):
    coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
    assert len(coco.imgs) == count
    assert {category["id"] for category in coco.cats.values()} == set(ID.values()) - set(STUFF_IDS)
    assert len(coco.anns) >= count
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (96, 96)
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == coco_mask.toBbox(coco.annToRLE(annotation)).tolist()
        assert annotation["iscrowd"] == 0
    for image in coco.imgs.values():
        picture = cv2.imread(str(root / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3) == (96, 96, 3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_pngs_are_the_instances_painted_from_back_to_front(root, split):
    """Instances and thing segments correspond one to one, and the order of the file is the depth."""
    coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
    things = {category["id"] for category in CATEGORIES if category["isthing"]}
    for entry in _annotations(root, "panoptic", split)["annotations"]:
        png = root / f"panoptic_{split}" / entry["file_name"]
        ids = rgb2id(cv2.cvtColor(cv2.imread(str(png)), cv2.COLOR_BGR2RGB))
        segments = {segment["id"]: segment for segment in entry["segments_info"]}
        assert set(np.unique(ids)) == set(segments)
        for number, segment in segments.items():
            assert segment["area"] == (ids == number).sum()

        painted = np.zeros_like(ids)
        instances = coco.imgToAnns[entry["image_id"]]
        for instance in instances:
            painted[coco.annToMask(instance) == 1] = instance["panoptic_segment_id"]
        is_thing = {number: segment["category_id"] in things for number, segment in segments.items()}
        free = ~np.vectorize(is_thing.get)(ids)
        assert np.array_equal(np.where(free, 0, ids), painted)
        assert {i["panoptic_segment_id"]: i["category_id"] for i in instances} == {
            number: segment["category_id"] for number, segment in segments.items() if is_thing[number]
        }
        assert len(instances) == sum(is_thing.values())


def test_panopticapi_gives_the_ground_truth_a_pq_of_one(root):
    panoptic = _annotations(root, "panoptic", "train")
    folder = str(root / "panoptic_train")
    categories = {category["id"]: category for category in panoptic["categories"]}
    pairs = [(entry, entry) for entry in panoptic["annotations"]]
    quality, _ = pq_compute_single_core(0, pairs, folder, folder, categories).pq_average(categories, None)
    assert quality["pq"] == quality["rq"] == 1.0
    assert quality["n"] >= 10


def test_image_ids_of_the_splits_do_not_collide(root):
    splits = [_annotations(root, "panoptic", split) for split in ("train", "val")]
    ids = [image["id"] for split in splits for image in split["images"]]
    assert len(ids) == 16 == len(set(ids))


def test_info_holds_the_parameters(root):
    for kind in ("panoptic", "instances"):
        assert _annotations(root, kind, "val")["info"]["parameters"] == {
            "generator": "OcclusionScenes",
            "generator_version": writer.GENERATOR_VERSION,
            "split": "val",
            "num_images": 4,
            "image_size": 96,
            "seed": 3,
        }


# ---------------------------------------------------------------------------------------------------
# Whole or not there


def _is_complete(root, split="train"):
    return (root / "annotations" / f"panoptic_{split}.json").exists()


def test_a_complete_split_is_left_alone(tmp_path, monkeypatch):
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    monkeypatch.setattr(writer, "write_scene", None)  # would fail if called
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)


@pytest.mark.parametrize("change", [{"num_images": 4}, {"image_size": 65}, {"seed": 1}])
def test_a_split_of_other_parameters_is_refused(tmp_path, change):
    made = {"num_images": 3, "image_size": 64, "seed": 0}
    ensure_split(tmp_path, "train", **made, num_workers=0)
    before = _contents(tmp_path)
    with pytest.raises(ValueError) as refusal:
        ensure_split(tmp_path, "train", **{**made, **change}, num_workers=0)
    [(key, asked)] = change.items()
    found, wanted = str(refusal.value).split("asked for:")[:2]
    assert f"'{key}': {made[key]}" in found and f"'{key}': {asked}" in wanted
    assert "--overwrite" in str(refusal.value)
    assert _contents(tmp_path) == before


def test_a_split_of_another_generator_version_is_refused(tmp_path, monkeypatch):
    ensure_split(tmp_path, "train", 2, 64, num_workers=0)
    monkeypatch.setattr(writer, "GENERATOR_VERSION", writer.GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="generator_version"):
        ensure_split(tmp_path, "train", 2, 64, num_workers=0)


@pytest.mark.parametrize(
    "missing",
    ["train/000000000002.jpg", "panoptic_train/000000000001.png", "annotations/instances_train.json"],
)
def test_a_split_that_lacks_a_file_is_written_anew(tmp_path, missing):
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    whole = _contents(tmp_path)
    (tmp_path / missing).unlink()
    ensure_split(tmp_path, "train", 3, 64, num_workers=0)
    assert _contents(tmp_path) == whole


def test_an_error_midway_leaves_no_complete_split_and_the_next_call_repairs_it(tmp_path, monkeypatch):
    """Even where a complete split was there before."""
    write_split(tmp_path, "train", 5, 64, seed=1, num_workers=0)

    def disk_is_full_at_the_third(root, split, index, *rest):
        if index == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "000000000003.jpg")
        return write_scene(root, split, index, *rest)

    write_scene = writer.write_scene
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_scene", disk_is_full_at_the_third)
        with pytest.raises(OSError, match="No space left on device.*000000000003.jpg"):
            write_split(tmp_path, "train", 5, 64, seed=2, num_workers=0)
    assert not _is_complete(tmp_path)

    ensure_split(tmp_path, "train", 4, 64, seed=2, num_workers=0)
    write_split(tmp_path / "fresh", "train", 4, 64, seed=2, num_workers=0)
    fresh = _contents(tmp_path / "fresh")
    assert {k: v for k, v in _contents(tmp_path).items() if not k.startswith("fresh")} == fresh


def _in_another_process(code):
    """A process that runs `code`, in which `writer` is the module and torch is not imported."""
    folder = str(Path(occlusion_scenes.__file__).parent)
    prelude = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {folder!r})\n"
        f"from worker import load_package; sys.path.pop(0); writer = load_package(Path({folder!r}))\n"
    )
    command = [sys.executable, "-c", prelude + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_no_complete_split_and_the_next_call_repairs_it(tmp_path):
    code = f"writer.write_split({str(tmp_path)!r}, 'train', 100000, 64, num_workers=2)"
    process = _in_another_process(code)
    while len(list(tmp_path.glob("panoptic_train/*.png"))) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not _is_complete(tmp_path)

    ensure_split(tmp_path, "train", 2, 64, num_workers=0)
    assert sorted(_contents(tmp_path)) == [
        "annotations/instances_train.json",
        "annotations/panoptic_train.json",
        "panoptic_train/000000000001.png",
        "panoptic_train/000000000002.png",
        "train/000000000001.jpg",
        "train/000000000002.jpg",
    ]


def test_nobody_else_writes_while_a_worker_of_a_killed_run_lives(tmp_path):
    code = (
        "start = writer._start_worker\n"
        "def noted(*job):\n worker = start(*job); print(worker.pid, flush=True); return worker\n"
        "writer._start_worker = noted\n"
        f"writer.write_split({str(tmp_path)!r}, 'train', 100000, 64, num_workers=1)"
    )
    process = _in_another_process(code)
    worker = int(process.stdout.readline())
    os.kill(worker, signal.SIGSTOP)
    try:
        process.kill()
        process.wait()
        with open(tmp_path / ".train.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(worker, signal.SIGKILL)
    process.communicate()  # returns when the worker, which holds the other end of stderr, is gone
    ensure_split(tmp_path, "train", 2, 64, num_workers=0)
    assert _is_complete(tmp_path)


def test_of_several_processes_one_writes(tmp_path):
    code = (
        "written = []; write_scene = writer.write_scene\n"
        "writer.write_scene = lambda *job: written.append(job) or write_scene(*job)\n"
        f"writer.ensure_split({str(tmp_path)!r}, 'train', 40, 64, num_workers=0); print(len(written))"
    )
    processes = [_in_another_process(code) for _ in range(3)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert sorted(int(out) for out, _ in results) == [0, 0, 40]
    assert _is_complete(tmp_path)


def test_workers_do_not_import_torch():
    process = _in_another_process("print('torch' in sys.modules, 'detectron2' in sys.modules)")
    out, errors = process.communicate()
    assert out.split() == ["False", "False"], errors


def test_a_file_a_worker_cannot_write_is_named(tmp_path):
    """With a limit of 1,000 bytes a file, which the kernel enforces as it does a full disk."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: writer.write_split({str(tmp_path)!r}, 'train', 6, 96, num_workers=2)\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    out, errors = _in_another_process(code).communicate()
    assert out, errors
    number, file = out.split()
    assert int(number) == errno.EFBIG and Path(file).parent == tmp_path / "train", errors
    assert not _is_complete(tmp_path)


def test_a_json_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """The last file of all: with it missing, the split is not there."""

    def disk_is_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space left on device.*instances_train.json"):
        write_split(tmp_path, "train", 2, 64, num_workers=0)
    assert not _is_complete(tmp_path)


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="worker process of OcclusionScenes ended with exit status 1"):
        write_split(tmp_path, "train", 4, 64, num_workers=2)
    assert not _is_complete(tmp_path)


def test_files_of_others_are_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="train holds 1 files that .* holiday.jpg"):
        write_split(tmp_path, "train", 2, 64, num_workers=0)
    assert (tmp_path / "train" / "holiday.jpg").read_bytes() == b"mine"

    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "panoptic_val.json").write_text('{"info": {"description": "COCO 2017"}}')
    for write in (write_split, ensure_split):
        with pytest.raises(FileExistsError, match="panoptic_val.json is there but was not written by"):
            write(tmp_path, "val", 2, 64, num_workers=0)
    assert "COCO 2017" in (tmp_path / "annotations" / "panoptic_val.json").read_text()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"split": "test"}, "split is 'test'; it must be one of 'train', 'val'"),
        ({"num_images": 0}, "num_images is 0; it must be 1 to"),
        ({"image_size": 63}, "image_size is 63; it must be at least 64"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
    ],
)
def test_parameters_out_of_range_are_named(tmp_path, wrong, message):
    right = {"split": "train", "num_images": 2, "image_size": 64, "seed": 0, "num_workers": 0}
    with pytest.raises(ValueError, match=message):
        write_split(tmp_path, **{**right, **wrong})


# ---------------------------------------------------------------------------------------------------
# Command line


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = ["--val", "0", "--image-size", "64", "--workers", "0"]
    root = tmp_path / "occlusion_scenes"

    assert main(["--train", "2", *small]) == 0
    assert len(os.listdir(root / "train")) == 2 and not (root / "val").exists()

    assert main(["--train", "3", *small]) == 1
    assert "'num_images': 2" in capsys.readouterr().err
    assert len(os.listdir(root / "train")) == 2

    assert main(["--train", "3", "--overwrite", *small]) == 0
    assert len(os.listdir(root / "train")) == 3
