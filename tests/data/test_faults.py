"""
Every fault that users' datasets have, made in one without a fault, and walked both ways: the checker
names it, and training and evaluation refuse it with one sentence. Or both take the dataset, and the
ground truth as prediction scores 100.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panopticapi.utils import id2rgb
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask

from oanet_d2 import add_oanet_config
from oanet_d2.data.check import check, check_datasets, format_report
from oanet_d2.data.images import read_segment_ids
from oanet_d2.evaluation import PanopticEvaluator, build_instance_evaluator
from oanet_d2.painting.formats import rle_runs
from tests.conftest import load_config, registered
from tests.data.conftest import SIZES, SKY, Dataset, make_mapper

# Refused before the first iteration; refused when the file is read; taken.
AT_START, WHEN_READ, TAKEN = "refused at the start", "refused when read", "taken"
NO_CATEGORY = 4


def train_on(name):
    """What training does with a dataset, as far as the model."""
    return [make_mapper()(d) for d in DatasetCatalog.get(name)]


def evaluate_on(name, folder):
    """The ground truth as prediction: PQ and AP."""
    evaluators = [PanopticEvaluator()]
    if MetadataCatalog.get(name).json_file:
        evaluators.append(build_instance_evaluator(name, str(folder), 100))
    evaluator = DatasetEvaluators(evaluators)
    evaluator.reset()
    instances = {d["image_id"]: d.get("annotations", []) for d in DatasetCatalog.get(name)}
    for d in (make_mapper(False)(d) for d in DatasetCatalog.get(name)):
        evaluator.process([d], [perfect_output(d, instances[d["image_id"]])])
    results = evaluator.evaluate()
    return [results[key][metric] for key, metric in SCORES if key in results]


SCORES = [("panoptic_seg", "PQ"), ("segm", "AP"), ("bbox", "AP")]


def perfect_output(d, annotations):
    ids = read_segment_ids(d["pan_seg_file_name"])
    panoptic_seg = torch.from_numpy(ids), [s for s in d["segments_info"] if not s["iscrowd"]]
    for s in d["segments_info"]:
        if s["iscrowd"]:
            panoptic_seg[0][panoptic_seg[0] == s["id"]] = 0
    size, annotations = ids.shape, [x for x in annotations if not x["iscrowd"]]
    masks = [
        polygons_to_bitmask([np.array(p, float) for p in x], *size)
        if isinstance(x, list)
        else coco_mask.decode(x).astype(bool)
        for x in (x["segmentation"] for x in annotations)
    ]
    instances = Instances(size)
    instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *size))
    instances.pred_boxes = Boxes([BoxMode.convert(x["bbox"], x["bbox_mode"], 0) for x in annotations])
    instances.pred_classes = torch.tensor([x["category_id"] for x in annotations], dtype=torch.int64)
    instances.scores = torch.ones(len(annotations))
    return {"panoptic_seg": panoptic_seg, "instances": instances}


def look_at(name):
    """What is done before a training or an evaluation."""
    cfg = get_cfg()
    add_oanet_config(cfg)
    check_datasets(cfg, [name])


def kinds_of(paths):
    return [p.kind for p in check(*paths)]


def sentence(function, *args):
    with pytest.raises(ValueError) as error:
        function(*args)
    return str(error.value)


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
        if how == "text":
            path.write_text("<html>404</html>")
        elif how == "cut":
            path.write_bytes(content[: len(content) - 30])
        elif how == "another size":
            Image.new("RGB", (size[0] + 1, size[1])).save(path)
        elif how == "P":
            Image.new("P", size).save(path, "PNG")
        elif how == "16 bits":
            pixels = np.full((size[1], size[0], 3), 700, dtype=np.uint16)
            path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())  # PIL cannot write it
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


def exif(orientation, turned):
    """The second image gets an EXIF orientation; "turned": its pixels, too, so that it looks as before."""

    def make(d):
        image = Image.open(d.images[1])
        if turned:
            image = image.transpose(Image.Transpose.ROTATE_90)
        info = Image.Exif()
        info[ExifTags.Base.Orientation] = orientation
        image.save(d.images[1], exif=info)
        return str(d.images[1])

    make.__name__ = f"EXIF orientation {orientation}" + " turned" * turned
    return make


def absent_id(d):
    d.panoptic["annotations"][1]["segments_info"].append({**d.segment(1, 0), "id": 5})
    return "pngs/1.png"


def bgr(d):
    Image.fromarray(id2rgb(d.ids(1))[:, :, ::-1].copy()).save(d.pngs[1])
    return "pngs/1.png"


MALFORMED, SEGMENT = "malformed entry", "panoptic annotations 1 segments_info 0"
CATEGORY, IMAGE, INSTANCE = "panoptic categories 1", "panoptic images 1", "instances annotations 1"
MASK = f"{INSTANCE} segmentation"
POLYGON = [1, 2, 3, 4, 5, 6]
FAULTS = [
    # the panoptic JSON
    (change(f"{CATEGORY} isthing"), MALFORMED, AT_START),
    (change(f"{CATEGORY} isthing", "yes"), MALFORMED, AT_START),
    (change(f"{CATEGORY} name"), MALFORMED, AT_START),
    (change(CATEGORY, "tree"), MALFORMED, AT_START),
    (double("panoptic categories 2", name="sea"), "duplicate id", AT_START),
    (change(f"{IMAGE} height"), MALFORMED, AT_START),
    (change(f"{IMAGE} width", -9), MALFORMED, AT_START),
    (double("panoptic images 1"), "duplicate id", AT_START),
    (change("panoptic annotations 1 file_name"), MALFORMED, AT_START),
    (change("panoptic annotations 1 file_name", ""), MALFORMED, AT_START),
    (change("panoptic annotations 1 file_name", "0.png"), "several annotations with one PNG", AT_START),
    (change("panoptic annotations 1 segments_info"), MALFORMED, AT_START),
    (double("panoptic annotations 1", image_id=9), "annotation of an unknown image", AT_START),
    (double("panoptic annotations 1", image_id="1"), "annotation of an unknown image", AT_START),
    (double("panoptic annotations 1"), "several annotations of one image", AT_START),
    (change(f"{SEGMENT} category_id"), MALFORMED, AT_START),
    (change(f"{SEGMENT} category_id", NO_CATEGORY), "unknown category id", AT_START),
    (double(SEGMENT), "duplicate id", AT_START),
    (double(SEGMENT, id=0), MALFORMED, AT_START),
    (double(SEGMENT, id=256**3), MALFORMED, AT_START),
    (change(f"{SEGMENT} area"), None, TAKEN),
    (change(f"{SEGMENT} area", "large"), "area differs from the PNG", TAKEN),
    (change(f"{SEGMENT} area", 7), "area differs from the PNG", TAKEN),
    (change(f"{SEGMENT} iscrowd"), None, TAKEN),
    (change(f"{SEGMENT} iscrowd", True), None, TAKEN),
    (change(f"{SEGMENT} iscrowd", "0"), MALFORMED, AT_START),
    (change(f"{SEGMENT} iscrowd", 2), MALFORMED, AT_START),
    (change("panoptic annotations 1 segments_info 1 iscrowd", 1), "stuff segment is a crowd", TAKEN),
    # image files
    (file("images", "missing"), "image unusable", AT_START),
    (file("images", "text"), "image unusable", AT_START),
    (file("images", "cut"), "image unusable", WHEN_READ),
    (file("images", "16 bits"), "image unusable", AT_START),
    (file("images", "floats"), "image unusable", AT_START),
    (file("images", "another size"), "image size differs from the JSON", AT_START),
    (exif(6, turned=True), None, TAKEN),
    (exif(6, turned=False), "image size differs from the JSON", AT_START),
    (exif(3, turned=False), "image has an EXIF orientation", AT_START),
    # panoptic PNGs
    (file("pngs", "missing"), "PNG unusable", AT_START),
    (file("pngs", "text"), "PNG unusable", AT_START),
    (file("pngs", "cut"), "PNG unusable", WHEN_READ),
    (file("pngs", "16 bits"), "PNG unusable", AT_START),
    (file("pngs", "P"), "PNG unusable", AT_START),
    (file("pngs", "another size"), "PNG size differs from the JSON", AT_START),
    (unlisted_ids, "PNG id not in segments_info", WHEN_READ),
    (absent_id, "segments_info id not in the PNG", WHEN_READ),
    (bgr, "PNG id not in segments_info", WHEN_READ),
    # the instances JSON
    (change("instances categories 1 name", "cat"), "categories contradict the panoptic JSON", TAKEN),
    (change("instances images 1 width", 13), "images contradict the panoptic JSON", TAKEN),
    (change("instances images 1"), "image only in the panoptic JSON", TAKEN),
    (double(INSTANCE, image_id=9), "instance of an unknown image", TAKEN),
    (change(f"{INSTANCE} category_id", NO_CATEGORY), "instance of no thing", AT_START),
    (change(f"{INSTANCE} category_id", SKY), "instance of no thing", AT_START),
    (change(f"{INSTANCE} id"), None, TAKEN),
    (change(f"{INSTANCE} area"), None, TAKEN),
    (change(f"{INSTANCE} iscrowd"), None, TAKEN),
    (change(f"{INSTANCE} iscrowd", 2), MALFORMED, AT_START),
    (change(f"{INSTANCE} bbox"), None, TAKEN),
    (change(f"{INSTANCE} bbox", [1, 2, 3]), None, TAKEN),
    (change(f"{INSTANCE} keypoints", []), None, TAKEN),
    (change(f"{INSTANCE} keypoints", [1, 2, 2, 3, 2, 0]), None, TAKEN),
    (change(f"{INSTANCE} keypoints", [[1, 2, 2]]), "malformed keypoints", TAKEN),
    (change(f"{INSTANCE} keypoints", [1, 2]), "malformed keypoints", TAKEN),
    (change(MASK), MALFORMED, AT_START),
    (change(MASK, []), MALFORMED, AT_START),
    (change(MASK, "RLE"), "malformed mask", AT_START),
    (change(MASK, [[1, 2, 3, 4], [0, 1, 4, 1, 4, 14, 0, 14]]), "malformed mask", TAKEN),
    (change(MASK, [[*POLYGON, 7]]), ["malformed mask", "instance without a pixel"], TAKEN),
    (change(MASK, [[100, 1, 104, 1, 104, 9]]), "instance without a pixel", TAKEN),
    (change(MASK, [[0.1, 0.2, 0.3, 0.2, 0.3, 0.4]]), "instance without a pixel", TAKEN),
    (change(MASK, [[1, 2, 3, 4, 5, "6"]]), "malformed mask", AT_START),
    (change(MASK, [[1, 2, 3, 4, 5, float("nan")]]), "malformed mask", AT_START),
    (change(f"{MASK} size", [9, 14]), "RLE size differs from the image", AT_START),
    (change("instances annotations 2 segmentation counts", [1, 2]), "malformed mask", AT_START),
    (change("instances annotations 2 segmentation counts", [-1, 1025]), "malformed mask", AT_START),
    (change(f"{MASK} counts", 5), "malformed mask", AT_START),
    (change(f"{MASK} counts", ""), "malformed mask", AT_START),
    (change(f"{MASK} counts", "h\u00e9\udc80"), "malformed mask", AT_START),
    (change(f"{MASK} counts", coco_mask.encode(np.ones((14, 8), "u1", "F"))["counts"].decode()),
     "malformed mask", AT_START),
    (change("instances annotations 2 segmentation counts", [100.5, 100.5, 823]),
     "malformed mask", AT_START),
    (change(MASK, [1, 2, 8, 2, 8, 9]), "malformed mask", AT_START),
    (change(MASK, [[[1, 2], [8, 2], [8, 9]]]), "malformed mask", AT_START),
    (change(MASK, [[1, 2, 8, 9, 1, 2]]), "instance without a pixel", TAKEN),
    (change(MASK, [[-20, 9, 9, -20, -20, -20]]), "instance without a pixel", TAKEN),
    (change(MASK, [[1, 1, 8, 1, 8, 1.2, 1.2, 1.2, 1.2, 8, 1, 8]]), "instance without a pixel", TAKEN),
    (change(MASK, [[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9]]), "malformed mask", AT_START),
    (change("panoptic categories 1 name", "person"), "duplicate name", AT_START),
]


@pytest.mark.parametrize("fault, kinds, outcome", FAULTS, ids=[x.__name__ for x, *_ in FAULTS])
def test_one_fault(dataset, tmp_path, fault, kinds, outcome):
    named = fault(dataset)
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    paths = dataset.paths()
    problems = check(*paths)
    assert [p.kind for p in problems[: len(kinds)]] == kinds, problems
    assert kinds or not problems
    assert not problems or named in problems[0].where or "pngs/1.png" in problems[0].where
    if "panoptic.json: categories" in named:
        assert named in sentence(lambda: registered("test_faults", *paths).__enter__())
        return
    with registered("test_faults", *paths) as name:
        if outcome == TAKEN:
            look_at(name)
            assert len(train_on(name)) == 3
            assert evaluate_on(name, tmp_path / "results") == pytest.approx([100, 100, 100])
            return
        refusals = [sentence(train_on, name), sentence(evaluate_on, name, tmp_path / "results")]
        if outcome == AT_START:
            refusals.append(sentence(look_at, name))
        assert len(set(refusals)) == 1
        assert problems[0].detail in refusals[0] and problems[0].where in refusals[0]


def test_no_fault(dataset, tmp_path):
    for paths in (dataset.paths(), dataset.paths()[:3]):
        assert kinds_of(paths) == []
        with registered("test_faults", *paths) as name:
            assert [len(x["instances"]) for x in train_on(name)] == [1, 1, 1]
            assert set(evaluate_on(name, tmp_path)) == {100}


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
    change(f"{INSTANCE} keypoints", [1, 2])(dataset)
    file("images", "missing")(dataset)
    file("pngs", "missing")(dataset)
    expected = ["malformed keypoints", "several annotations of one image"]
    expected += ["image unusable", "PNG unusable"]
    assert kinds_of(dataset.paths()) == expected


@pytest.mark.parametrize("field", ["image_id", "file_name"])
def test_what_two_entries_lack_they_do_not_share(dataset, field):
    for x in dataset.panoptic["annotations"][1:]:
        del x[field]
    assert kinds_of(dataset.paths())[:2] == [MALFORMED] * 2
    assert not [kind for kind in kinds_of(dataset.paths()) if kind.startswith("several")]


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
        with registered("test_faults", *paths) as name:
            train_on(name)


def test_image_ids_of_another_type_leave_no_instance(dataset):
    """ "1" for 1 in every annotation: training would go on without any instance."""
    for x in dataset.instances["annotations"]:
        x["image_id"] = str(x["image_id"])
    paths = dataset.paths()
    assert kinds_of(paths)[-1] == "instances of no image"
    with registered("test_faults", *paths) as name:
        assert "image_id" in sentence(look_at, name)


def test_image_ids_of_two_types(dataset):
    """NumPy makes strings of all of them, and COCOeval would find no truth for the numbers."""
    dataset.panoptic["images"][1]["id"] = dataset.panoptic["annotations"][1]["image_id"] = "one"
    assert "image ids of two types" in kinds_of(dataset.paths())


def test_the_box_of_a_polygon_that_leaves_the_image_is_its_pixels(dataset):
    change(MASK, [[-20, 0, 5, 7, -20, 14]])(dataset)
    dataset.instances["annotations"][1]["bbox"] = None
    paths = dataset.paths()
    assert kinds_of(paths) == []
    with registered("test_faults", *paths) as name:
        (x,) = DatasetCatalog.get(name)[1]["annotations"]
    mask = polygons_to_bitmask([np.array(p, float) for p in x["segmentation"]], 14, 9)
    assert x["bbox"] == list(cv2.boundingRect(mask.view(np.uint8)))


def test_runs_are_those_of_pycocotools():
    for seed in range(20):
        mask = np.random.default_rng(seed).random((9, 40)) < seed / 20
        counts = coco_mask.encode(np.asfortranarray(mask, "u1"))["counts"]
        flat = mask.ravel(order="F")
        ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
        for written in (counts, counts.decode()):
            assert rle_runs(written).tolist() == np.diff(ends, prepend=0).tolist()


def test_an_empty_dataset(dataset):
    dataset.panoptic["images"] = dataset.panoptic["annotations"] = []
    paths = dataset.paths()[:3]
    assert kinds_of(paths) == ["no annotated image"]
    with registered("test_faults", *paths) as name:
        assert paths[1] in sentence(look_at, name)


def test_what_the_config_makes_of_a_sound_dataset(dataset, caplog):
    """Nothing to learn from where empty images are left out; fewer detections than things."""
    dataset.instances["annotations"] = []
    with registered("test_faults", *dataset.paths()) as name:
        cfg = load_config("OcclusionScenes/oanet_R_18.yaml", "TEST.DETECTIONS_PER_IMAGE", 0)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        check_datasets(cfg, [name])
        assert "TEST.DETECTIONS_PER_IMAGE" in caplog.text
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
        assert "FILTER_EMPTY_ANNOTATIONS" in sentence(check_datasets, cfg, [name])


def test_an_address_instead_of_a_file(dataset):
    """As exporters write it. The folder of the images is local, so it is looked for there."""
    dataset.panoptic["images"][1]["file_name"] = "http://host/1.jpg"
    with registered("test_faults", *dataset.paths()) as name:
        assert "http://host/1.jpg" in sentence(look_at, name)


def test_what_is_behind_a_url_is_not_looked_at(dataset):
    paths = dataset.paths()
    with registered("test_faults", "https://host/images", *paths[1:]) as name:
        look_at(name)


def test_a_dataset_of_links_is_taken(dataset):
    """As on clusters, whose images lie in a common store."""
    for path in (*dataset.images, *dataset.pngs):
        target = dataset.root / f"store_{path.name}"
        path.rename(target)
        path.symlink_to(target)
    paths = dataset.paths()
    assert kinds_of(paths) == []
    with registered("test_faults", *paths) as name:
        assert len(train_on(name)) == 3


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
        with registered("test_junk", *paths) as name:
            train_on(name)
    except ValueError:
        assert problems
