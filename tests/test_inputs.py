"""
The table of docs/inputs.md: every row is made to happen.
"""

import importlib.util
import os
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detectron2.data import DatasetCatalog

from oanet_d2 import complete_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data import PanopticDatasetMapper, files
from oanet_d2.data.cityscapes import load_cityscapes
from oanet_d2.data.images import read_image
from oanet_d2.data.occlusion_scenes import ensure_split
from oanet_d2.output_folder import check_output_folder
from oanet_d2.report import write_report
from oanet_d2.report.data import read_picture
from oanet_d2.visualization import OrderPictures
from tests.conftest import REPOSITORY, registered
from tests.data.test_check import PERSON, SKY, Dataset
from tests.data.test_images import png_header

CONFIG, OVERRIDE = "config file", "override on the command line"
PANOPTIC, INSTANCES, NAME = "panoptic JSON", "instances JSON", "file name in a JSON"
PNG, IMAGE, CHECKPOINT = "panoptic PNG", "image", "checkpoint (.pth, .pkl)"
SCENES = "folder of OcclusionScenes"
OUTPUT, REPORT, DEMO = "output folder", "evaluation, for the report", "pictures for the demo"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef")
)


def find_pictures(inputs):
    """The demo's function. Its folder is no package, so that `python demo/demo.py` works."""
    spec = importlib.util.spec_from_file_location("files", REPOSITORY / "demo" / "files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_pictures(inputs)


def rows():
    """(input, what is wrong) -> what is said, as the documentation has it."""
    table = {}
    for line in (REPOSITORY / "docs" / "inputs.md").read_text().splitlines():
        if line.startswith("| ") and line.count(" | ") == 2 and "`" in line.split(" | ")[2]:
            name, wrong, said = line.strip("| ").split(" | ")
            table[name, wrong] = said.strip(" `")
    return table


CASES = {}


def case(name, wrong):
    """Registers what makes a row happen, given a folder."""

    def register(function):
        CASES.setdefault((name, wrong), []).append(function)
        return function

    return register


@pytest.mark.parametrize("name, wrong", rows(), ids=lambda x: x.replace("`", ""))
def test_every_row(tmp_path, name, wrong):
    said = ".*".join(re.escape(part) for part in rows()[name, wrong].split("..."))
    for i, make in enumerate(CASES[name, wrong]):
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises((ValueError, FileExistsError), match=f"(?s){said}"):
            make(folder)


def test_the_table_has_a_row_for_every_case():
    assert set(CASES) == set(rows())


# ----------------------------------------------------------------------------------------- configs


def config(name, wrong, text, *opts):
    @case(name, wrong)
    def make(folder):
        (folder / "config.yaml").write_text(text)
        complete_config(load_config(folder / "config.yaml", opts))


@case(CONFIG, "is not there, or is a folder or a named pipe")
def no_config(folder):
    load_config(folder / "config.yaml")


@case(CONFIG, "is not there, or is a folder or a named pipe")
def config_is_a_folder(folder):
    load_config(folder)


@case(CONFIG, "is not there, or is a folder or a named pipe")
def config_is_a_pipe(folder):
    os.mkfifo(folder / "config.yaml")
    load_config(folder / "config.yaml")


TAG = "SEED: !!python/object/apply:os.system ['false']"
config(CONFIG, "is no yaml", "MODEL: [")
config(CONFIG, "holds a tag, such as `!!python/object/apply`", TAG)
config(CONFIG, "inherits from itself (`_BASE_`)", "_BASE_: config.yaml")
config(CONFIG, "has more than 256 KiB, its bases included", "SEED: 1 #" + "x" * 2**18)
config(CONFIG, "aliases that would grow beyond bounds", LAUGHS)
config(CONFIG, "a key that does not exist", "MODEL: {NO_KEY: 1}")
config(CONFIG, "a value of another type", "SEED: soon")
config(CONFIG, "wants proposals, which Detectron2 unpickles", "MODEL: {LOAD_PROPOSALS: True}")
DATASETS = "DATASETS: {PANOPTIC: {mine: {IMAGE_ROOT: x, PANOPTIC_JSON: y}}}"
config(CONFIG, "a dataset without a path", DATASETS)
config(CONFIG, "a dataset that is not registered", "DATASETS: {TRAIN: [none]}")
config(CONFIG, "datasets that are no list", "DATASETS: {TRAIN: null}")
config(OVERRIDE, "a key without a value", "SEED: 1", "SEED")
config(OVERRIDE, "a key that does not exist", "SEED: 1", "NO_KEY", "1")
config(OVERRIDE, "a value of another type", "SEED: 1", "SEED", "soon")


# ------------------------------------------------------------------------------------- annotations


def use(paths):
    """What training and evaluation do with a dataset."""
    with registered("mine", *paths) as name:
        dicts = DatasetCatalog.get(name)
    for is_train in (True, False):
        mapper = PanopticDatasetMapper(
            is_train, augmentations=[], image_format="BGR", use_instance_mask=True,
            instance_mask_format="bitmask", num_things=2, stuff_only=False, ignore_value=255,
        )
        for d in dicts:
            mapper(d)


def test_the_dataset_that_the_rows_break_is_whole(tmp_path):
    use(Dataset(tmp_path).paths())


def broken(name, wrong):
    """Registers a change of a dataset that has nothing wrong; it is used then."""

    def register(change):
        @case(name, wrong)
        def make(folder):
            dataset = Dataset(folder)
            change(dataset)
            use(dataset.paths())

        return change

    return register


def broken_text(name, wrong, text, which=1):
    @case(name, wrong)
    def make(folder):
        paths = Dataset(folder).paths()
        Path(paths[which]).write_text(text)
        use(paths)


@case(PANOPTIC, "is not there, or is a named pipe")
def no_panoptic_json(folder):
    paths = Dataset(folder).paths()
    os.remove(paths[1])
    use(paths)


broken_text(PANOPTIC, "is no JSON", '{"images": [')
broken_text(PANOPTIC, "is nested thousands deep", "[" * 10**5)
broken_text(PANOPTIC, "is of another format", '{"images": [], "annotations": []}')


@case(PANOPTIC, "has more than 2 GiB")
def large_json(folder):
    paths = Dataset(folder).paths()
    os.truncate(paths[1], files.MAX_JSON_BYTES + 1)  # takes no room on the disk
    use(paths)


@broken(PANOPTIC, "a category without `isthing`")
def no_isthing(d):
    del d.panoptic["categories"][1]["isthing"]


@broken(PANOPTIC, "two categories of one id")
def category_twice(d):
    d.panoptic["categories"].append({"id": PERSON, "name": "cat", "isthing": 1})


@broken(PANOPTIC, "an annotation of an image that is not listed")
def unknown_image(d):
    d.panoptic["annotations"][0]["image_id"] = 9


@broken(PANOPTIC, "a size that is none")
def size_is_none(d):
    d.panoptic["images"][0]["height"] = "8"


@broken(PANOPTIC, "an image of 100,000 x 100,000")
def huge_size(d):
    d.panoptic["images"][0].update(height=100_000, width=100_000)


@broken(PANOPTIC, "a million segments in one image")
def million_segments(d):
    d.panoptic["annotations"][0]["segments_info"] = [
        {"id": i, "category_id": SKY} for i in range(1, 1_000_001)
    ]


@broken(PANOPTIC, "a segment of an unknown category")
def unknown_category(d):
    d.segment(0, 0)["category_id"] = 4


@broken(PANOPTIC, "a segment id out of range")
def segment_id(d):
    d.segment(0, 0)["id"] = 256**3


@broken(PANOPTIC, "an entry that lacks what it must have")
def no_image_id(d):
    del d.panoptic["annotations"][0]["image_id"]


@broken(NAME, "is absolute, or has `..` in it")
def name_with_dots(d):
    d.panoptic["images"][0]["file_name"] = "../../etc/passwd"


@broken(NAME, "names a link out of the folder")
def name_of_a_link(d):
    d.images[0].unlink()
    d.images[0].symlink_to("/etc/passwd")


@broken(NAME, "is none")
def no_name(d):
    d.panoptic["annotations"][0]["file_name"] = ""


@case(INSTANCES, "is not there")
def no_instances_json(folder):
    paths = Dataset(folder).paths()
    os.remove(paths[3])
    use(paths)


for text in ("[]", '{"images": [{}]}', '{"images": [], "annotations": [5], "categories": []}'):
    broken_text(INSTANCES, "is of another format", text, which=3)


broken_text(INSTANCES, "is no JSON", "[", which=3)


@broken(INSTANCES, "an instance of stuff")
def instance_of_stuff(d):
    d.instances["annotations"][0]["category_id"] = SKY


@broken(INSTANCES, "a box that is none")
def box_of_three(d):
    d.instances["annotations"][0]["bbox"].pop()


@broken(INSTANCES, "a polygon far out of the image")
def far_polygon(d):
    d.instances["annotations"][0]["segmentation"] = [[0, 0, 1e9, 0, 1e9, 1e9]]


@broken(INSTANCES, "a polygon that winds beyond measure")
def winding_polygon(d):
    d.instances["annotations"][0]["segmentation"] = [[0, 0, 12, 8] * 500]


@broken(INSTANCES, "an RLE of another size")
def large_rle(d):
    d.instances["annotations"][1]["segmentation"]["size"] = [99999, 99999]


@broken(INSTANCES, "an RLE of too few pixels")
def short_rle(d):
    d.instances["annotations"][1]["segmentation"]["counts"] = "5"


# ------------------------------------------------------------------------------------------ images


def broken_files(name, paths):
    """Registers the rows that images and PNGs have in common."""

    @broken(name, "is not there, or is a named pipe")
    def gone(d):
        paths(d)[0].unlink()

    for content in (b"", b"<html>404</html>", EPS):

        @broken(name, "is no image, or one that is a program (EPS)")
        def another(d, content=content):
            paths(d)[0].write_bytes(content)

    @broken(name, "is cut short")
    def cut(d):
        paths(d)[0].write_bytes(paths(d)[0].read_bytes()[:-30])

    @broken(name, "has 100,000 x 100,000 pixels")
    def bomb(d):
        paths(d)[0].write_bytes(png_header(100_000, 100_000))

    @broken(name, "has 16 bits per channel")
    def sixteen_bits(d):
        _, data = cv2.imencode(".png", np.full((8, 12, 3), 700, dtype=np.uint16))
        paths(d)[0].write_bytes(data.tobytes())


broken_files(PNG, lambda d: d.pngs)
broken_files(IMAGE, lambda d: d.images)


@broken(PNG, "is of another size than the image")
def png_size(d):
    d.write_png(0, np.pad(d.ids(0), ((0, 0), (0, 1))))


@broken(PNG, "shows a segment that is not listed")
def unlisted(d):
    ids = d.ids(0)
    ids[0, 0] = 5
    d.write_png(0, ids)


@broken(IMAGE, "is of another size than the JSON says")
def image_size(d):
    Image.new("RGB", (13, 8)).save(d.images[0])


@pytest.mark.parametrize("which", ["images", "pngs", "panoptic_json", "instances_json"])
def test_named_pipes_are_not_opened(tmp_path, which):
    dataset = Dataset(tmp_path)
    paths = dataset.paths()
    path = getattr(dataset, which)
    path = path[0] if isinstance(path, list) else path
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: this is not a file"):
        use(paths)


# ------------------------------------------------------------------------------------- checkpoints


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


def load(path, content=None):
    if content is not None:
        torch.save(content, path)
    OANetCheckpointer(nn.Linear(2, 2)).load(str(path))


@case(CHECKPOINT, "is not there")
def no_checkpoint(folder):
    load(folder / "x.pth")


@case(CHECKPOINT, "is a folder")
def checkpoint_is_a_folder(folder):
    load(folder)


@case(CHECKPOINT, "is cut short or something else")
def checkpoint_is_text(folder):
    (folder / "x.pkl").write_text("<html>404</html>")
    load(folder / "x.pkl")


@case(CHECKPOINT, "holds code")
def checkpoint_with_code(folder):
    (folder / "x.pkl").write_bytes(pickle.dumps({"model": {"weight": Evil()}}))
    load(folder / "x.pkl")


@case(CHECKPOINT, "is of another model")
def another_model(folder):
    load(folder / "x.pth", {"model": {"other": torch.zeros(2)}})


# ---------------------------------------------------------------------------------------- datasets


@case(OUTPUT, "cannot be written, or made")
def output_is_a_file(folder):
    (folder / "out").write_text("")
    check_output_folder(str(folder / "out"))


@case(OUTPUT, "holds checkpoints of another config")
def output_of_another_seed(folder):
    torch.save({"model": {}}, folder / "model_final.pth")
    (folder / "config.yaml").write_text("SEED: 1")
    check_output_folder(str(folder), {"SEED": 2})


@case(OUTPUT, "holds checkpoints of an unknown config")
def output_of_unknown(folder):
    torch.save({"model": {}}, folder / "model_final.pth")
    check_output_folder(str(folder), {"SEED": 2})


def evaluation(wrong, text):
    @case(REPORT, wrong)
    def make(folder):
        if text is not None:
            (folder / "report").mkdir()
            (folder / "report" / "evaluation.json").write_text(text)
        write_report(str(folder))


evaluation("is not there", None)
evaluation("is cut short", '{"format": ')
evaluation("is of another version", '{"format": "x"}')


@case(REPORT, "a picture that is not there, or is a named pipe")
def report_without_picture(folder):
    read_picture(str(folder), "0.png")


@case(REPORT, "a picture that is not there, or is a named pipe")
def report_with_a_pipe(folder):
    (folder / "report").mkdir()
    os.mkfifo(folder / "report" / "0.png")
    read_picture(str(folder), "0.png")


@case(DEMO, "are not there")
def no_pictures(folder):
    find_pictures([str(folder / "*.jpg")])


@case(DEMO, "a folder without one")
def folder_without_picture(folder):
    find_pictures([str(folder)])


@case(DEMO, "one that cannot be read")
def picture_of_text(folder):
    (folder / "0.jpg").write_text("no picture")
    read_image(str(folder / "0.jpg"), "BGR")


@case(SCENES, "holds scenes of another seed or number")
def other_scenes(folder):
    ensure_split(folder, "val", 1, image_size=64, seed=0)
    ensure_split(folder, "val", 1, image_size=64, seed=1)


@case(SCENES, "holds somebody else's files")
def foreign_file(folder):
    (folder / "annotations").mkdir()
    (folder / "annotations" / "panoptic_val.json").write_text("{}")
    ensure_split(folder, "val", 1, image_size=64, seed=0)


@case("Cityscapes", "panoptic PNGs were not made")
def no_cityscapes(folder):
    load_cityscapes(str(folder), str(folder), str(folder / "cityscapes_panoptic_train.json"))


# --------------------------------------------------------------------------- files that are written


def test_pictures_stay_in_their_folder(tmp_path):
    """Whatever an image is called, and whatever links wait in the folder."""
    dataset = Dataset(tmp_path / "data")
    name = "sub/..jpg"
    (tmp_path / "data/images/sub").mkdir()
    dataset.images[0].rename(tmp_path / "data/images" / name)
    for content in (dataset.panoptic, dataset.instances):
        content["images"][0]["file_name"] = name
    folder, victim = tmp_path / "pictures", tmp_path / "victim.png"
    folder.mkdir()
    victim.write_text("untouched")
    (folder / "01_..png").symlink_to(victim)
    with registered("mine", *dataset.paths()) as name:
        d = DatasetCatalog.get(name)[0]
        ids = dataset.ids(0)
        segments = [
            {**s, "instance_id": 0} if s["isthing"] else dict(s) for s in d["segments_info"]
        ]
        nothing = torch.zeros(ids.shape, dtype=torch.int32), []
        truth = torch.tensor(ids), segments
        pictures = OrderPictures(name, str(folder), 1, ("score", "oracle"))
        pictures.add(d, ids, {"score": nothing, "oracle": truth})
        (path,) = pictures.save()
    assert os.listdir(folder) == [os.path.basename(path)]
    assert victim.read_text() == "untouched" and not os.path.islink(path)
