"""
Broken input of all kinds: whatever comes in, what comes out is a result or a ValueError. The slow
tests take thousands of cases and print how many they were:

    pytest -m slow -s tests/test_fuzz.py
"""

import copy
import json
import resource
import signal
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as coco_mask

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2 import complete_config, load_config
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.check import Sample, check, check_sample
from oanet_d2.data.images import MAX_PIXELS, read_image
from oanet_d2.data.register import category_metadata, load_panoptic, read_annotations
from tests.conftest import CONFIGS

# PIL warns of much that it reads all the same.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [60, pytest.param(4000, marks=pytest.mark.slow)]
SECONDS = 60  # none takes a hundredth of it
GROWTH = 3 * 2**30  # bytes; MAX_PIXELS pixels are 0.7 GB, and are copied


@contextmanager
def watched(name, capsys):
    """Counts cases, and watches that none hangs or takes memory without bounds."""

    def hangs(*_):
        raise TimeoutError(f"no end after {SECONDS} s")

    counts = {"cases": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    previous = signal.signal(signal.SIGALRM, hangs)
    try:
        yield counts
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    with capsys.disabled():
        print(f"\n{name}: {counts['cases']} cases, {counts['refused']} refused, peak memory "
              f"{growth / 2**20:+.0f} MiB")
    assert growth < GROWTH
    assert 0 < counts["refused"] < counts["cases"]  # both ways are taken


def fuzz(num_cases, strategy, counts, function):
    """Calls `function` on `num_cases` values; only a ValueError may come out."""

    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=num_cases < 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value):
        counts["cases"] += 1
        signal.alarm(SECONDS)
        try:
            function(value)
        except ValueError:
            counts["refused"] += 1

    run()
    assert counts["cases"] >= num_cases


# ------------------------------------------------------------------------------------------- JSON

WIDTH, HEIGHT = 12, 8
NAMES = ["0.png", "../0.png", "/etc/passwd", "a/../../x", "a\0b", "", "\ud800", "link.png", "."]
NUMBERS = [0, -1, 1, 2, 255, 2**24, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")]
LEAVES = (
    st.sampled_from([None, True, *NAMES, *NUMBERS])
    | st.integers(-10, 300)
    | st.floats()
    | st.text(max_size=5)
)
KEYS = ["id", "name", "counts", "size", "segments_info", "x"]
VALUES = st.recursive(
    LEAVES,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(KEYS), x, max_size=3),
    max_leaves=6,
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "set", "delete", "double"]), VALUES),
    min_size=1,
    max_size=4,
)


def ids_of_image():
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    ids[:, :5], ids[4:, 2:9], ids[:3, 9:] = 1, 2, 70000
    return ids


def documents():
    """A panoptic and an instances JSON of two images."""
    categories = [{"id": i, "name": f"c{i}", "isthing": int(i < 3)} for i in (1, 2, 3)]
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (0, 1)]
    segments = [
        {"id": i, "category_id": c, "area": int((ids_of_image() == i).sum()), "iscrowd": 0}
        for i, c in ((1, 1), (2, 2), (70000, 3))
    ]
    annotations = [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in (0, 1)
    ]
    mask = coco_mask.encode(np.asfortranarray(ids_of_image() == 1, dtype=np.uint8))
    rle = {"size": [HEIGHT, WIDTH], "counts": mask["counts"].decode()}
    runs = {"size": [HEIGHT, WIDTH], "counts": [5, HEIGHT * WIDTH - 5]}
    instances = [
        {"id": k, "image_id": k % 2, "category_id": 1, "bbox": [0, 0, 5, 8], "iscrowd": 0,
         "segmentation": mask}
        for k, mask in enumerate([[[0, 1, 5, 1, 5, 7.5]], rle, runs])
    ]
    common = {"images": images, "categories": categories}
    return [
        {**common, "annotations": annotations},
        {"images": images, "categories": categories[:2], "annotations": instances},
    ]


def places(node, path=()):
    """Paths of all values in a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(document, changes):
    document = copy.deepcopy(json.loads(json.dumps(document)))
    for index, what, value in changes:
        found = list(places(document))
        if not found:
            break
        *path, key = found[index % len(found)]
        node = document
        for step in path:
            node = node[step]
        if what == "delete":
            del node[key]
        elif what == "double" and isinstance(node, list):
            node.append(node[key])
        else:
            node[key] = copy.deepcopy(value)
    return document


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "pngs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link.png").symlink_to("/etc/passwd")
    for i in (0, 1):
        Image.new("RGB", (WIDTH, HEIGHT), (9, 90, 200)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(id2rgb(ids_of_image())).save(tmp_path / "pngs" / f"{i}.png")
    return tmp_path


def mapper(is_train, mask_format):
    return PanopticDatasetMapper(
        is_train, augmentations=[], image_format="BGR", use_instance_mask=True,
        instance_mask_format=mask_format, num_things=2, stuff_only=False, ignore_value=255,
    )


def load_all(paths):
    """What training and evaluation do with a dataset."""
    image_root, panoptic_json, panoptic_root, instances_json = paths
    metadata = category_metadata(
        read_annotations(panoptic_json, "categories")["categories"], panoptic_json
    )
    ids = [metadata[f"{x}_dataset_id_to_contiguous_id"] for x in ("thing", "stuff")]
    for d in load_panoptic(image_root, panoptic_json, panoptic_root, instances_json, *ids):
        for key, root in (("file_name", image_root), ("pan_seg_file_name", panoptic_root)):
            assert Path(root).resolve() in [*Path(d[key]).resolve().parents, Path(d[key]).resolve()]
        for is_train in (True, False):
            for mask_format in ("polygon", "bitmask"):
                mapper(is_train, mask_format)(d)


@pytest.mark.parametrize("num_cases", CASES)
def test_annotations(folder, capsys, num_cases):
    """And what stops training, the check finds, too."""
    panoptic_json, instances_json = folder / "panoptic.json", folder / "instances.json"
    paths = [folder / "images", panoptic_json, folder / "pngs", instances_json]

    def run(case):
        which, has_instances, changes, cut = case
        texts = [json.dumps(x) for x in documents()]
        texts[which] = json.dumps(changed(documents()[which], changes))
        if cut is not None:
            at, junk = cut
            at %= len(texts[which])
            texts[which] = texts[which][:at] + junk + texts[which][at + len(junk):]
        for path, text in zip((panoptic_json, instances_json), texts):
            path.write_text(text, errors="surrogatepass")
        used = [str(p) for p in paths[: 3 + has_instances]]
        problems = check(*used, workers=0, progress=False)
        try:
            load_all((used + [None])[:4])
        except ValueError:
            assert problems
            raise

    junk = st.tuples(st.integers(0, 10**6), st.text(min_size=1, max_size=3))
    cases = st.tuples(st.sampled_from([0, 0, 1]), st.booleans(), CHANGES, st.none() | junk)
    with watched("annotations", capsys) as counts:
        fuzz(num_cases, cases, counts, run)


# ------------------------------------------------------------------------------------------ images


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIDES = st.sampled_from([0, 1, 12, 8, 9000, 60_000, 100_000, 2**31 - 1])
CHUNK_KINDS = st.sampled_from(
    [b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"IEND"]
)
PNGS = st.builds(
    lambda width, height, depth, color, interlaced, chunks: b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))
    + b"".join(chunk(kind, data) for kind, data in chunks),
    SIDES,
    SIDES,
    st.sampled_from([1, 2, 4, 8, 16, 7]),
    st.sampled_from([0, 2, 3, 4, 6, 1]),
    st.sampled_from([0, 1, 2]),
    st.lists(
        st.tuples(CHUNK_KINDS, st.binary(max_size=20) | st.binary(max_size=300).map(zlib.compress)),
        max_size=4,
    ),
)
STARTS = st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6 ",
     b"RIFF\xff\0\0\0WEBPVP8 ", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS", b"\0\0\1\0", b"icns"]
)


@pytest.fixture(scope="module")
def whole_images(tmp_path_factory):
    """The bytes of small images in every format."""
    folder, contents = tmp_path_factory.mktemp("whole"), []
    picture = Image.fromarray(id2rgb(ids_of_image()))
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        for mode in ("RGB", "L") if format != "GIF" else ("P",):
            picture.convert(mode).save(folder / "x", format)
            contents.append((folder / "x").read_bytes())
    return contents


def damaged(content, damages, kept):
    content = bytearray(content)
    for at, value in damages:
        content[at % len(content)] = value
    return bytes(content[: max(1, int(kept * len(content)))])


@pytest.mark.parametrize("num_cases", CASES)
def test_images(tmp_path, capsys, whole_images, num_cases):
    path = str(tmp_path / "x.png")
    areas = {1: None, 2: None, 70000: None}

    def run(content):
        (tmp_path / "x.png").write_bytes(content)
        assert isinstance(check_sample(Sample(path, path, (WIDTH, HEIGHT), areas)), list)
        for format in ("BGR", "RGBA"):
            image = read_image(path, format)
            assert image.dtype == np.uint8 and 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS

    damages = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)
    kept = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1])
    cases = (
        st.builds(damaged, st.sampled_from(whole_images), damages, kept)
        | PNGS
        | st.builds(bytes.__add__, STARTS, st.binary(max_size=200))
    )
    with watched("images", capsys) as counts:
        fuzz(num_cases, cases, counts, run)


# ------------------------------------------------------------------------------------------ configs

TAGS = ["!!python/object/apply:os.abort []", "!!python/name:os.abort ", "!!binary x", "!!set {a}"]
TEXTS = [*TAGS, "&a [*a]", "&b {x: *b}", "*c", "<<: *a", "_BASE_: config.yaml", "? [a]", "- - -",
         "2001-99-99", "1:99:99", "0x", ".nan", "~", "\t", "---\n", "%YAML 9.9\n", "{", "]", "\0"]
OPTS = ["SEED", "MODEL", "MODEL.WEIGHTS", "DATASETS.PANOPTIC", "DATASETS.TRAIN", "_BASE_", "NO.KEY",
        "DATASETS.PANOPTIC.mine.IMAGE_ROOT", "", ".", "MODEL.ROI_HEADS.NUM_CLASSES"]


@pytest.mark.parametrize("num_cases", CASES)
def test_configs(tmp_path, capsys, num_cases):
    path = tmp_path / "config.yaml"
    dataset = {"IMAGE_ROOT": "x", "PANOPTIC_JSON": "none.json", "PANOPTIC_ROOT": "y"}
    whole = yaml.safe_load((CONFIGS / "Base-OANet.yaml").read_text())
    whole.update(VERSION=2)

    def run(case):
        datasets, changes, (at, text), opts, is_inserted = case
        names = {"TRAIN": [*datasets], "TEST": [], "PANOPTIC": datasets}
        content = yaml.safe_dump(changed({**whole, "DATASETS": names}, changes), allow_unicode=True)
        if is_inserted:
            at %= len(content)
            content = content[:at] + text + content[at:]
        path.write_text(content, errors="surrogatepass")
        known = set(DatasetCatalog)
        try:
            cfg = load_config(path, [x for pair in opts for x in pair])
            complete_config(cfg)
        finally:
            for name in set(DatasetCatalog) - known:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)

    text = st.sampled_from(TEXTS) | st.text(max_size=5)
    opts = st.lists(st.tuples(st.sampled_from(OPTS), text | VALUES), max_size=2)
    datasets = st.sampled_from([{}, {}, {"mine": dataset}])
    inserted = st.tuples(st.integers(0, 10**6), text)
    cases = st.tuples(datasets, CHANGES | st.just([]), inserted, opts, st.booleans())
    with watched("configs", capsys) as counts:
        fuzz(num_cases, cases, counts, run)
