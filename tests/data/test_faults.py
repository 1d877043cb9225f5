"""
Every fault that users' datasets have, made in one without a fault, and walked both ways: the checker
names it, and training (loader and mapper) refuses it, or takes the dataset if it can.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detectron2.data import DatasetCatalog

from oanet_d2.data.check import check, format_report
from tests.conftest import registered
from tests.data.conftest import SIZES, SKY, Dataset, make_mapper

REFUSED, TAKEN = "refused", "taken"
NO_CATEGORY = 4


def train_on(paths):
    """What training does with a dataset, as far as the model."""
    with registered("test_faults", *paths) as name:
        dicts = DatasetCatalog.get(name)
    return [make_mapper()(d) for d in dicts]


def kinds_of(paths):
    return [p.kind for p in check(*paths)]


# Each changes the dataset d and returns what a message must name.


def change(path, value=None):
    """
    Set, or delete (None), a value in a JSON. The path is written as Python would:
    "panoptic annotations 1 segments_info 0 area".
    """
    *keys, last = (int(x) if x.isdigit() else x for x in path.split())

    def make(d):
        node = getattr(d, keys[0])
        for key in keys[1:]:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value
        return f"{keys[0]}.json: {keys[1]}"

    make.__name__ = f"{path} {'deleted' if value is None else value}".replace(" ", "-")
    return make


def double(path, **changed):
    """Append an entry of a list again, with some other values."""
    *keys, index = (int(x) if x.isdigit() else x for x in path.split())

    def make(d):
        node = getattr(d, keys[0])
        for key in keys[1:]:
            node = node[key]
        node.append({**node[index], **changed})
        return f"{keys[0]}.json: {keys[1]}"

    make.__name__ = f"{path} twice {changed}".replace(" ", "-")
    return make


def file(which, how):
    """Change the file of the second image or PNG."""

    def make(d):
        path = getattr(d, which)[1]
        size, content = SIZES[1], path.read_bytes()
        path.unlink()
        if how == "empty":
            path.write_bytes(b"")
        elif how == "text":
            path.write_text("<html>404</html>")
        elif how == "cut":
            path.write_bytes(content[: len(content) - 30])
        elif how == "another size":
            Image.new("RGB", (size[0] + 1, size[1])).save(path)
        elif how in ("L", "P"):
            Image.new(how, size).save(path, "PNG")
        elif how == "jpeg":
            Image.new("RGB", size).save(path, "JPEG")
        elif how == "16 bits":
            pixels = np.full((size[1], size[0], 3), 700, dtype=np.uint16)
            path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())  # PIL cannot write it
        elif how == "16 bits gray":
            Image.new("I;16", size).save(path, "PNG")
        elif how == "floats":
            Image.new("F", size).save(path, "TIFF")
        return str(path)

    make.__name__ = f"{which} {how}".replace(" ", "-")
    return make


def unlisted_ids(d):
    ids = d.ids(1)
    ids[0, :2] = [5, 6]
    d.write_png(1, ids)
    return "pngs/1.png"


MALFORMED, SEGMENT = "malformed entry", "panoptic annotations 1 segments_info 0"
CATEGORY, IMAGE, INSTANCE = "panoptic categories 1", "panoptic images 1", "instances annotations 1"
MASK = f"{INSTANCE} segmentation"
POLYGON = [1, 2, 3, 4, 5, 6]
FAULTS = [
    # the panoptic JSON
    (change(f"{CATEGORY} isthing"), MALFORMED, REFUSED),
    (change(f"{CATEGORY} isthing", "yes"), MALFORMED, REFUSED),
    (change(f"{CATEGORY} name"), MALFORMED, REFUSED),
    (change(CATEGORY, "tree"), MALFORMED, REFUSED),
    (double("panoptic categories 2", name="sea"), "duplicate id", REFUSED),
    (change(f"{IMAGE} height"), MALFORMED, REFUSED),
    (change(f"{IMAGE} width", -9), MALFORMED, REFUSED),
    (double("panoptic images 1"), "duplicate id", REFUSED),
    (change("panoptic annotations 1 file_name"), MALFORMED, REFUSED),
    (change("panoptic annotations 1 file_name", ""), MALFORMED, REFUSED),
    (change("panoptic annotations 1 segments_info"), MALFORMED, REFUSED),
    (double("panoptic annotations 1", image_id=9), "annotation of an unknown image", REFUSED),
    (double("panoptic annotations 1", image_id="1"), "annotation of an unknown image", REFUSED),
    (double("panoptic annotations 1"), "several annotations of one image", REFUSED),
    (change(f"{SEGMENT} category_id"), MALFORMED, REFUSED),
    (change(f"{SEGMENT} category_id", NO_CATEGORY), "unknown category id", REFUSED),
    (double(SEGMENT), "duplicate id", REFUSED),
    (double(SEGMENT, id=0), MALFORMED, REFUSED),
    (double(SEGMENT, id=256**3), MALFORMED, REFUSED),
    (change(f"{SEGMENT} area"), MALFORMED, TAKEN),
    (change(f"{SEGMENT} area", "large"), MALFORMED, REFUSED),
    (change(f"{SEGMENT} iscrowd"), MALFORMED, TAKEN),
    (change(f"{SEGMENT} iscrowd", "0"), MALFORMED, REFUSED),
    (change(f"{SEGMENT} iscrowd", 2), MALFORMED, REFUSED),
    (change("panoptic annotations 1 segments_info 1 iscrowd", 1), "stuff segment is a crowd", TAKEN),
    # image files
    (file("images", "missing"), "image missing", REFUSED),
    (file("images", "empty"), "image unusable", REFUSED),
    (file("images", "text"), "image unusable", REFUSED),
    (file("images", "cut"), "image unusable", REFUSED),
    (file("images", "16 bits"), "image unusable", REFUSED),
    (file("images", "16 bits gray"), "image unusable", REFUSED),
    (file("images", "floats"), "image unusable", REFUSED),
    (file("images", "another size"), "image size differs from the JSON", REFUSED),
    # panoptic PNGs
    (file("pngs", "missing"), "PNG missing", REFUSED),
    (file("pngs", "text"), "PNG unusable", REFUSED),
    (file("pngs", "cut"), "PNG unusable", REFUSED),
    (file("pngs", "16 bits"), "PNG unusable", REFUSED),
    (file("pngs", "L"), "PNG unusable", REFUSED),
    (file("pngs", "P"), "PNG unusable", REFUSED),
    (file("pngs", "jpeg"), "PNG unusable", REFUSED),
    (file("pngs", "another size"), "PNG size differs from the image", REFUSED),
    (unlisted_ids, "PNG id not in segments_info", REFUSED),
    (double(SEGMENT, id=5), "segments_info id not in the PNG", TAKEN),
    (change(f"{SEGMENT} area", 7), "area differs from the PNG", TAKEN),
    # the instances JSON
    (change("instances categories 1 name", "cat"), "categories contradict the panoptic JSON", TAKEN),
    (change("instances images 1 width", 13), "images contradict the panoptic JSON", TAKEN),
    (change("instances images 1"), "image only in the panoptic JSON", TAKEN),
    (double(INSTANCE, id=1, image_id=9), "instance of an unknown image", TAKEN),
    (change(f"{INSTANCE} category_id", NO_CATEGORY), "instance of no thing", REFUSED),
    (change(f"{INSTANCE} category_id", SKY), "instance of no thing", REFUSED),
    (double(INSTANCE), "duplicate id", REFUSED),
    (change(f"{INSTANCE} bbox"), MALFORMED, REFUSED),
    (change(f"{INSTANCE} bbox", [1, 2, 3]), MALFORMED, REFUSED),
    (change(f"{INSTANCE} bbox", [1, 2, 3, float("nan")]), MALFORMED, REFUSED),
    (change(f"{INSTANCE} bbox", [0, 1, 5, 0]), "box without extent", TAKEN),
    (change(f"{INSTANCE} area"), MALFORMED, TAKEN),
    (change(f"{INSTANCE} iscrowd"), MALFORMED, TAKEN),
    (change(MASK), MALFORMED, REFUSED),
    (change(MASK, []), MALFORMED, REFUSED),
    (change(MASK, "RLE"), "malformed mask", REFUSED),
    (change(MASK, [[1, 2, 3, 4], POLYGON]), "malformed mask", TAKEN),
    (change(MASK, [[*POLYGON, 7]]), "malformed mask", TAKEN),
    (change(MASK, [[1, 2, 3, 4, 5, "6"]]), "malformed mask", REFUSED),
    (change(MASK, [[1, 2, 3, 4, 5, float("nan")]]), "malformed mask", REFUSED),
    (change(f"{MASK} size", [9, 14]), "RLE size differs from the image", REFUSED),
    (change(f"{MASK} counts", [1, 2]), "malformed mask", REFUSED),
    (change(f"{MASK} counts", [-1, 14 * 9 + 1]), "malformed mask", REFUSED),
    (change(f"{MASK} counts", 5), "malformed mask", REFUSED),
]


@pytest.mark.parametrize("fault, kind, training", FAULTS, ids=[x.__name__ for x, *_ in FAULTS])
def test_one_fault(dataset, fault, kind, training):
    named = fault(dataset)
    paths = dataset.paths()
    problems = check(*paths)
    assert [p.kind for p in problems] == [kind], problems
    assert named in problems[0].where or "pngs/1.png" in problems[0].where
    if training == TAKEN:
        assert len(train_on(paths)) == 3
    else:
        with pytest.raises(ValueError) as error:
            train_on(paths)
        assert named in str(error.value) or "images/1.jpg" in str(error.value)


def test_no_fault(dataset):
    assert kinds_of(dataset.paths()) == kinds_of(dataset.paths()[:3]) == []
    assert [len(x["instances"]) for x in train_on(dataset.paths())] == [1, 1, 1]


def test_what_a_problem_says(dataset):
    dataset.segment(1, 0)["id"] = -3
    unlisted_ids(dataset)
    first, second = check(*dataset.paths())
    assert first.where.endswith("panoptic.json: annotations[1] (1.png) segments_info[0]")
    assert first.detail == "'id' is -3; it must be 1 to 16777215 (0 is void)"
    assert "[5, 6, 1001]" in second.detail


def test_faults_together_are_all_found(dataset):
    """First those in the JSONs, then those in the files."""
    double("panoptic annotations 1")(dataset)
    change(f"{INSTANCE} bbox", [0, 1, 5, 0])(dataset)
    file("images", "missing")(dataset)
    file("pngs", "missing")(dataset)
    expected = ["box without extent", "several annotations of one image"]
    expected += ["image missing", "PNG missing"]
    assert kinds_of(dataset.paths()) == expected


@pytest.mark.parametrize("which", [1, 3])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[" * 10**5, b"[]", b'{"images": []}', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0"],
    ids=["missing", "empty", "cut", "deep", "list", "lacking", "BOM", "UTF-16"],
)
def test_annotation_files_that_cannot_be_used(dataset, which, content):
    paths = dataset.paths()
    Path(paths[which]).unlink()
    if content is not None:
        Path(paths[which]).write_bytes(content)
    problems = check(*paths)
    assert [(p.kind, p.where) for p in problems] == [("annotation file unusable", paths[which])]
    with pytest.raises(ValueError, match=paths[which]):
        train_on(paths)


def test_image_ids_of_another_type_leave_no_instance(dataset):
    """"1" for 1 in every annotation: training would go on without any instance."""
    for x in dataset.instances["annotations"]:
        x["image_id"] = str(x["image_id"])
    paths = dataset.paths()
    assert kinds_of(paths)[-1] == "instances of no image"
    with pytest.raises(ValueError, match="instances.json: annotations: .*image_id"):
        train_on(paths)


def test_a_dataset_of_links_is_taken(dataset):
    """As on clusters, whose images lie in a common store."""
    for path in (*dataset.images, *dataset.pngs):
        target = dataset.root / f"store_{path.name}"
        path.rename(target)
        path.symlink_to(target)
    assert kinds_of(dataset.paths()) == [] and len(train_on(dataset.paths())) == 3


# -------------------------------------------------------------------------------------------------


def nodes(value, path=()):
    """The paths to everything in a JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(child, (*path, key))


NAMES = st.sampled_from(["\ud800", "a\0b", "/etc/hostname", "..", "a\nb", "é" * 300])
NUMBERS = st.sampled_from([2**31, 2**64, 10**400, 1e308]) | st.integers() | st.floats()
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | NAMES,
    lambda x: st.lists(x, max_size=7)
    | st.dictionaries(st.sampled_from(["id", "size", "counts"]), x, max_size=3),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory):
    return Dataset(tmp_path_factory.mktemp("junk") / "data")


@pytest.mark.filterwarnings("ignore")  # what PIL warns of
@settings(max_examples=80, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_junk(shared_dataset, data):
    """Whatever a JSON holds: the check ends, and finds what training refuses with a ValueError."""
    paths = shared_dataset.paths()
    which = data.draw(st.sampled_from(["panoptic", "instances"]))
    content = json.loads(json.dumps(getattr(shared_dataset, which)))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, key = data.draw(st.sampled_from(list(nodes(content))[1:]))
        parent = content
        for step in parents:
            parent = parent[step]
        parent[key] = data.draw(JUNK)
    Path(paths[1 if which == "panoptic" else 3]).write_text(json.dumps(content))
    problems = check(*paths)
    lines = format_report(problems, 3, examples=1000).split("\n")
    assert all(line.isprintable() for line in lines)
    try:
        train_on(paths)
    except ValueError:
        assert problems
