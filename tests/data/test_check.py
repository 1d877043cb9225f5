"""Every fault that `oanet_d2.data.check` looks for, made in a small dataset without one."""

import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as coco_mask

from detectron2.data import DatasetCatalog

from oanet_d2.data.check import Problem, Sample, check, format_report, main, run
from oanet_d2.data.check_annotations import rle_runs
from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import REPOSITORY, registered, scenes_paths

SIZES = [(12, 8), (9, 14), (32, 32)]  # width, height
PERSON, TIE, SKY = 1, 20, 300
NO_CATEGORY = 4
CATEGORIES = [
    {"id": PERSON, "name": "person", "isthing": 1},
    {"id": TIE, "name": "tie", "isthing": True},
    {"id": SKY, "name": "sky", "isthing": 0},
]


class Dataset:
    """
    Three images, each with a void row, a person (id 1000 + i) on the left and sky (id 70000 + i) on
    the right; the three persons' whole masks are a polygon, an RLE as a string, and one as a list.
    """

    def __init__(self, root):
        self.root = root
        self.images, self.pngs = [], []
        images, annotations, instances = [], [], []
        for folder in ("images", "pngs"):
            (root / folder).mkdir(parents=True)
        for i, (width, height) in enumerate(SIZES):
            self.images.append(root / "images" / f"{i}.jpg")
            self.pngs.append(root / "pngs" / f"{i}.png")
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images[i])
            segments = []
            for k, category in ((1000 + i, PERSON), (70000 + i, SKY)):
                area = int((self.ids(i) == k).sum())
                segments.append({"id": k, "category_id": category, "area": area, "iscrowd": 0})
            self.write_png(i, self.ids(i))
            images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
            annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
            mask = coco_mask.encode(np.asfortranarray(self.ids(i) == 1000 + i, dtype=np.uint8))
            mask = {"size": mask["size"], "counts": mask["counts"].decode()}
            masks = [[[0, 1, 5, 1, 5, 7.5]], mask, {**mask, "counts": rle_runs(mask["counts"])}]
            instance = {"id": 10 + i, "image_id": i, "category_id": PERSON, "bbox": [0, 1, 5, 6.5]}
            instance.update(area=32.5, iscrowd=0, segmentation=masks[i])
            instances.append(instance)
        self.panoptic = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        self.instances = {"images": images, "annotations": instances, "categories": CATEGORIES[:2]}
        # no two share an entry
        self.panoptic, self.instances = json.loads(json.dumps([self.panoptic, self.instances]))

    @staticmethod
    def ids(i):
        width, height = SIZES[i]
        ids = np.full((height, width), 70000 + i)
        ids[:, : width // 2] = 1000 + i
        ids[0] = 0
        return ids

    def write_png(self, i, ids, **kwargs):
        Image.fromarray(id2rgb(ids)).save(self.pngs[i], **kwargs)

    def segment(self, i, k):
        return self.panoptic["annotations"][i]["segments_info"][k]

    def paths(self):
        """Write the JSONs; what :func:`check` takes."""
        self.panoptic_json, self.instances_json = (
            self.root / "panoptic.json",
            self.root / "inst.json",
        )
        self.panoptic_json.write_text(json.dumps(self.panoptic))
        self.instances_json.write_text(json.dumps(self.instances))
        paths = [self.root / "images", self.panoptic_json, self.root / "pngs", self.instances_json]
        return list(map(str, paths))

    def check(self):
        return check(*self.paths(), workers=0, progress=False)


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


def kinds(problems):
    return dict(Counter(p.kind for p in problems))


def clean(*paths):
    return check(*map(str, paths), workers=0, progress=False) == []


# -------------------------------------------------------------------------------------------------
# Nothing wrong


def test_a_clean_dataset(dataset):
    assert clean(*dataset.paths()) and clean(*dataset.paths()[:3])


def test_occlusion_scenes_are_clean(tmp_path):
    write_split(tmp_path, "train", 3, image_size=64, seed=0, num_workers=0)
    assert clean(*scenes_paths(tmp_path, "train"))


def test_a_real_image_of_coco_is_clean():
    root = REPOSITORY.parent / "shared" / "data" / "coco_panoptic_sample"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    panoptic_json = root / "annotations" / "panoptic_val2017.json"
    assert clean(root / "val2017", panoptic_json, root / "panoptic_val2017")


def test_an_image_that_exif_rotates_has_its_rotated_size(dataset):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", SIZES[0][::-1]).save(dataset.images[0], exif=exif)
    assert dataset.check() == []
    Image.new("RGB", SIZES[0]).save(dataset.images[0], exif=exif)
    assert "image size differs from the JSON" in kinds(dataset.check())


@pytest.mark.parametrize(
    "mode, name", [("CMYK", "0.jpg"), ("L", "0.jpg"), ("P", "0.png"), ("LA", "0.png")]
)
def test_other_kinds_of_images(dataset, mode, name):
    Image.new(mode, SIZES[0]).save(dataset.root / "images" / name)
    dataset.panoptic["images"][0]["file_name"] = dataset.instances["images"][0]["file_name"] = name
    assert dataset.check() == []


# -------------------------------------------------------------------------------------------------
# One fault each: changes a clean dataset and returns what must be named by the problem


def category_twice(d):
    d.panoptic["categories"].append({"id": TIE, "name": "cat", "isthing": 1})
    d.instances["categories"].pop()  # whose name is now that of neither, or of both
    return "panoptic.json: categories[3]"


def category_thing_and_stuff(d):
    d.panoptic["categories"].append({"id": NO_CATEGORY, "name": "cat", "isthing": 1})
    d.panoptic["categories"].append({"id": NO_CATEGORY, "name": "sea", "isthing": 0})
    return "panoptic.json: categories[4]"


def category_without_isthing(d):
    del d.panoptic["categories"][1]["isthing"]
    return "panoptic.json: categories[1]"


def category_with_wrong_isthing(d):
    d.panoptic["categories"][1]["isthing"] = "yes"
    return "panoptic.json: categories[1]"


def category_without_name(d):
    del d.panoptic["categories"][1]["name"]
    return "panoptic.json: categories[1]"


def category_no_object(d):
    d.panoptic["categories"].append("tree")
    return "panoptic.json: categories[3]"


def image_id_twice(d):
    d.panoptic["images"].append(d.panoptic["images"][1])
    return "panoptic.json: images[3] (1.jpg)"


def image_without_height(d):
    del d.panoptic["images"][1]["height"]
    return "panoptic.json: images[1] (1.jpg)"


def image_of_negative_width(d):
    d.panoptic["images"][1]["width"] = -9
    return "panoptic.json: images[1] (1.jpg)"


def unannotated(d):
    for content in (d.panoptic, d.instances):
        content["images"].append({"id": "x", "file_name": "x.jpg", "height": 1, "width": 1})
    return "panoptic.json: images[3] (x.jpg)"


def unknown_image(d):
    d.panoptic["annotations"].append({"image_id": 9, "file_name": "2.png", "segments_info": []})
    d.panoptic["annotations"][3]["segments_info"] = d.panoptic["annotations"][2]["segments_info"]
    return "panoptic.json: annotations[3] (2.png)"


def annotated_twice(d):
    d.panoptic["annotations"].append(d.panoptic["annotations"][2])
    return "panoptic.json: annotations[3] (2.png)"


def image_outside(d):
    name = str(d.root / "images" / "0.jpg")
    d.panoptic["images"][0]["file_name"] = d.instances["images"][0]["file_name"] = name
    return "panoptic.json: annotations[0] (0.png)"


def png_outside(d):
    d.panoptic["annotations"][0]["file_name"] = "../pngs/0.png"
    return "panoptic.json: annotations[0] (../pngs/0.png)"


def image_through_a_link(d):
    d.images[0].rename(d.root / "0.jpg")
    d.images[0].symlink_to(d.root / "0.jpg")
    return "panoptic.json: annotations[0] (0.png)"


def annotation_without_file_name(d):
    del d.panoptic["annotations"][1]["file_name"]
    return "panoptic.json: annotations[1]"


def annotation_without_segments(d):
    del d.panoptic["annotations"][1]["segments_info"]
    return "panoptic.json: annotations[1] (1.png)"


def unknown_category(d):
    d.segment(1, 0)["category_id"] = NO_CATEGORY
    return "panoptic.json: annotations[1] (1.png) segments_info[0]"


def segment_twice(d):
    d.panoptic["annotations"][1]["segments_info"].append(d.segment(1, 0))
    return "panoptic.json: annotations[1] (1.png) segments_info[2]"


def segment_without_category(d):
    del d.segment(1, 0)["category_id"]
    return "panoptic.json: annotations[1] (1.png) segments_info[0]"


def segment_without(key):
    def change(d):
        del d.segment(1, 0)[key]
        return "panoptic.json: annotations[1] (1.png) segments_info[0]"

    change.__name__ = f"segment_without_{key}"
    return change


def instance_without(key):
    def change(d):
        del d.instances["annotations"][1][key]
        return "inst.json: annotations[1]"

    change.__name__ = f"instance_without_{key}"
    return change


def segment_of_id_zero(d):
    segment = {"id": 0, "category_id": SKY, "area": 1, "iscrowd": 0}
    d.panoptic["annotations"][1]["segments_info"].append(segment)
    return "panoptic.json: annotations[1] (1.png) segments_info[2]"


def segment_of_huge_id(d):
    segment = {"id": 256**3, "category_id": SKY, "area": 1, "iscrowd": 0}
    d.panoptic["annotations"][1]["segments_info"].append(segment)
    return "panoptic.json: annotations[1] (1.png) segments_info[2]"


def segment_of_area_zero(d):
    segment = {"id": 5, "category_id": SKY, "area": 0, "iscrowd": 0}
    d.panoptic["annotations"][1]["segments_info"].append(segment)
    return "panoptic.json: annotations[1] (1.png) segments_info[2]"


def segment_of_no_area(d):
    d.segment(1, 0)["area"] = "large"
    return "panoptic.json: annotations[1] (1.png) segments_info[0]"


def crowd_of_stuff(d):
    d.segment(0, 0)["iscrowd"] = 1  # a person: fine
    d.segment(1, 1)["iscrowd"] = 1
    return "panoptic.json: annotations[1] (1.png) segments_info[1]"


def no_image(d):
    d.images[1].unlink()
    return "images/1.jpg"


def pipe_for_an_image(d):
    d.images[1].unlink()
    os.mkfifo(d.images[1])
    return "images/1.jpg"


def image_cut_off(d):
    d.images[1].write_bytes(d.images[1].read_bytes()[:-30])
    return "images/1.jpg"


def image_that_is_text(d):
    d.images[1].write_text("<html>404</html>")
    return "images/1.jpg"


def image_of_a_bomb(d):
    """A header that says 60,000 x 60,000."""
    Image.new("L", SIZES[1]).save(d.images[1], "PNG")
    data = bytearray(d.images[1].read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    d.images[1].write_bytes(data)
    return "images/1.jpg"


def write_16_bits(path, size, shape=()):
    done, data = cv2.imencode(".png", np.full((*size[::-1], *shape), 700, dtype=np.uint16))
    path.write_bytes(data.tobytes())


def image_of_16_bits(d):
    write_16_bits(d.images[1], SIZES[1], (3,))
    return "images/1.jpg"


def gray_image_of_16_bits(d):
    write_16_bits(d.images[1], SIZES[1])
    return "images/1.jpg"


def image_of_floats(d):
    Image.new("F", SIZES[1]).save(d.images[1], "TIFF")
    return "images/1.jpg"


def image_size(d):
    for content in (d.panoptic, d.instances):
        content["images"][0]["width"] += 1
    return "images/0.jpg"


def no_png(d):
    d.pngs[1].unlink()
    return "pngs/1.png"


def png_cut_off(d):
    d.pngs[1].write_bytes(d.pngs[1].read_bytes()[:45])
    return "pngs/1.png"


def png_of_16_bits(d):
    write_16_bits(d.pngs[1], SIZES[1], (3,))
    return "pngs/1.png"


def png_of_gray(d):
    Image.fromarray(d.ids(1).astype(np.uint8)).save(d.pngs[1])
    return "pngs/1.png"


def png_of_a_palette(d):
    Image.fromarray(id2rgb(d.ids(1))).convert("P").save(d.pngs[1])
    return "pngs/1.png"


def png_that_is_a_jpeg(d):
    d.write_png(1, d.ids(1), format="JPEG")
    return "pngs/1.png"


def png_size(d):
    ids = np.pad(d.ids(1), ((0, 2), (0, 0)))  # two rows of void
    d.write_png(1, ids)
    return "pngs/1.png"


def png_with_more_ids(d):
    ids = d.ids(1)
    ids[0, :2] = [5, 6]
    d.write_png(1, ids)
    return "pngs/1.png"


def png_with_fewer_ids(d):
    segment = {"id": 5, "category_id": SKY, "area": 7, "iscrowd": 0}
    d.panoptic["annotations"][1]["segments_info"].append(segment)
    return "pngs/1.png"


def png_of_other_areas(d):
    ids = d.ids(1)
    ids[3, 0] = 70001
    d.write_png(1, ids)
    return "pngs/1.png"


def image_unknown_to_instances(d):
    del d.instances["images"][0], d.instances["annotations"][0]
    return "inst.json: images"


def image_unknown_to_panoptic(d):
    d.instances["images"].append({"id": "x", "file_name": "x.jpg", "height": 1, "width": 1})
    return "inst.json: images[3] (x.jpg)"


def images_that_differ(d):
    d.instances["images"][1].update(file_name="y.jpg", width=13, height=8)
    return "inst.json: images[1] (y.jpg)"


def categories_that_differ(d):
    d.instances["categories"][1]["name"] = "cat"
    return "inst.json: categories[1]"


def instance_of_unknown_image(d):
    d.instances["annotations"].append({**d.instances["annotations"][0], "id": 1, "image_id": 9})
    return "inst.json: annotations[3]"


def instance_of_unknown_category(d):
    d.instances["annotations"][1]["category_id"] = NO_CATEGORY
    return "inst.json: annotations[1] (1.jpg)"


def instance_of_stuff(d):
    d.instances["annotations"][1]["category_id"] = SKY
    return "inst.json: annotations[1] (1.jpg)"


def instance_twice(d):
    d.instances["annotations"].append(d.instances["annotations"][1])
    return "inst.json: annotations[3]"


def instance_without_box(d):
    del d.instances["annotations"][1]["bbox"]
    return "inst.json: annotations[1]"


def box_without_height(d):
    d.instances["annotations"][1]["bbox"] = [0, 1, 5, 0]
    return "inst.json: annotations[1] (1.jpg)"


def instance_without_mask(d):
    del d.instances["annotations"][1]["segmentation"]
    return "inst.json: annotations[1]"


def mask_as(value):
    def change(d):
        mask = d.instances["annotations"][1]["segmentation"]
        d.instances["annotations"][1]["segmentation"] = value(mask) if callable(value) else value
        return "inst.json: annotations[1]"

    return change


def as_rle(**kwargs):
    return mask_as(lambda mask: {**mask, **kwargs})


MALFORMED, NO_MASK = {"malformed entry": 1}, {"instance without a mask": 1}
BAD_MASK = {"malformed mask": 1}
FAULTS = [
    (category_twice, {"duplicate category id": 1}),
    (category_thing_and_stuff, {"category id is both thing and stuff": 1}),
    (category_without_isthing, {"category without isthing": 1}),
    (category_with_wrong_isthing, {"category without isthing": 1}),
    (category_without_name, MALFORMED),
    (category_no_object, MALFORMED),
    (image_id_twice, {"duplicate image id": 1}),
    (image_without_height, MALFORMED),
    (image_of_negative_width, MALFORMED),
    (unannotated, {"image without annotation": 1}),
    (unknown_image, {"annotation of an unknown image": 1}),
    (annotated_twice, {"several annotations of one image": 1}),
    (image_outside, {"file name leads outside its folder": 1}),
    (png_outside, {"file name leads outside its folder": 1}),
    (image_through_a_link, {"file name leads outside its folder": 1}),
    (annotation_without_file_name, MALFORMED),
    (annotation_without_segments, MALFORMED),
    (unknown_category, {"unknown category id": 1}),
    (segment_twice, {"duplicate segment id": 1}),
    (segment_without_category, MALFORMED),
    (segment_without("area"), MALFORMED),
    (segment_without("iscrowd"), MALFORMED),
    (segment_of_id_zero, {"segment id out of range": 1}),
    (segment_of_huge_id, {"segment id out of range": 1}),
    (segment_of_area_zero, {"empty segment": 1}),
    (segment_of_no_area, MALFORMED),
    (crowd_of_stuff, {"stuff segment is a crowd": 1}),
    (no_image, {"image missing": 1}),
    (pipe_for_an_image, {"image missing": 1}),
    (image_cut_off, {"image unreadable": 1}),
    (image_that_is_text, {"image unreadable": 1}),
    (image_of_a_bomb, {"image unreadable": 1}),
    (image_of_16_bits, {"image of more than 8 bits": 1}),
    (gray_image_of_16_bits, {"image of more than 8 bits": 1}),
    (image_of_floats, {"image of more than 8 bits": 1}),
    (image_size, {"image size differs from the JSON": 1}),
    (no_png, {"PNG missing": 1}),
    (png_cut_off, {"PNG unreadable": 1}),
    (png_of_16_bits, {"PNG of more than 8 bits": 1}),
    (png_of_gray, {"PNG is not RGB": 1}),
    (png_of_a_palette, {"PNG is not RGB": 1}),
    (png_that_is_a_jpeg, {"PNG is not RGB": 1}),
    (png_size, {"PNG size differs from the image": 1}),
    (png_with_more_ids, {"PNG id not in segments_info": 1}),
    (png_with_fewer_ids, {"segments_info id not in the PNG": 1}),
    (png_of_other_areas, {"area differs from the PNG": 1}),
    (image_unknown_to_instances, {"image only in the panoptic JSON": 1}),
    (image_unknown_to_panoptic, {"image only in the instances JSON": 1}),
    (images_that_differ, {"image differs from the panoptic JSON": 3}),
    (categories_that_differ, {"category differs from the panoptic JSON": 1}),
    (instance_of_unknown_image, {"annotation of an unknown image": 1}),
    (instance_of_unknown_category, {"unknown category id": 1}),
    (instance_of_stuff, {"instance of stuff": 1}),
    (instance_twice, {"duplicate instance id": 1}),
    (instance_without_box, MALFORMED),
    (instance_without("area"), MALFORMED),
    (instance_without("iscrowd"), MALFORMED),
    (box_without_height, {"box without extent": 1}),
    (instance_without_mask, NO_MASK),
    (mask_as([]), NO_MASK),
    (mask_as(None), NO_MASK),
    (mask_as({"size": [14, 9], "counts": [14 * 9]}), NO_MASK),
    (mask_as("RLE"), BAD_MASK),
    (mask_as([[1, 2, 3, 4]]), BAD_MASK),
    (mask_as([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6]]), BAD_MASK),
    (mask_as([[1, 2, 3, 4, 5, None]]), BAD_MASK),
    (mask_as([[1, 2, 3, 4, 5, float("nan")]]), BAD_MASK),
    (mask_as([[1, 2, 3, 4, 1e9, 0]]), BAD_MASK),
    (mask_as([[]]), BAD_MASK),
    (mask_as({"counts": [14 * 9]}), BAD_MASK),
    (as_rle(counts=[1, -1, 14 * 9]), BAD_MASK),
    (as_rle(counts=[1, 2]), BAD_MASK),
    (mask_as(lambda mask: {**mask, "counts": mask["counts"][:-1]}), BAD_MASK),
    (mask_as(lambda mask: {**mask, "counts": mask["counts"] + "9"}), BAD_MASK),
    (as_rle(size=[9, 14]), {"RLE size differs from the image": 1}),
]


@pytest.mark.parametrize("change, expected", FAULTS, ids=[change.__name__ for change, _ in FAULTS])
def test_one_fault(dataset, change, expected):
    named = change(dataset)
    problems = dataset.check()
    assert kinds(problems) == expected, problems
    assert all(named in p.where for p in problems), problems


def test_more_than_training_takes(dataset, monkeypatch):
    monkeypatch.setattr("oanet_d2.data.check_annotations.MAX_SEGMENTS", 2)
    assert dataset.check() == []
    dataset.panoptic["annotations"][1]["segments_info"].append({"id": 5, "category_id": SKY})
    instances = [{**dataset.instances["annotations"][0], "id": i} for i in (1, 2)]
    dataset.instances["annotations"] += instances
    found = kinds(dataset.check())
    assert found["too many segments"] == found["too many instances"] == 1


def test_warnings_of_pil_do_not_litter_the_report(dataset, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # the largest has 1024: a warning, no error
    assert dataset.check() == []
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert kinds(dataset.check()) == {"image unreadable": 1, "PNG unreadable": 1}


def test_faults_that_show_in_two_places(dataset):
    """A segment without its id: its pixels are nobody's."""
    del dataset.segment(1, 0)["id"]
    assert kinds(dataset.check()) == {"malformed entry": 1, "PNG id not in segments_info": 1}


def test_details_name_what_was_found_and_what_would_be_right(dataset):
    dataset.panoptic["categories"][0]["isthing"] = 7
    dataset.segment(0, 0)["id"] = -3
    png_of_other_areas(dataset)
    image_of_a_bomb(dataset)
    details = {p.kind: p.detail for p in dataset.check()}
    assert details["category without isthing"] == "'isthing' is 7; it must be 0 or 1"
    assert details["segment id out of range"].startswith("the id is -3; it must be 1 to 16777215")
    assert details["PNG id not in segments_info"] == "1000 (42 pixels)"
    assert "segment 1001 has 51 pixels, the JSON says 52" in details["area differs from the PNG"]
    assert "more than 178,956,970 pixels" in details["image unreadable"]
    dataset.write_png(2, np.arange(1, 1025).reshape(32, 32))
    problem = next(p for p in dataset.check() if p.where == str(dataset.pngs[2]))
    assert problem.detail == "1 (1 pixels), 2 (1 pixels), 3 (1 pixels) and 1020 more"


def test_faults_together_are_all_reported(dataset):
    changes = [category_without_name, annotated_twice, crowd_of_stuff, no_image, png_of_gray]
    changes += [box_without_height, instance_twice]
    expected = Counter()
    for change in changes:
        change(dataset)
        expected.update(dict(FAULTS)[change])
    expected["box without extent"] = 2  # of the instance that is there twice
    problems = dataset.check()
    assert kinds(problems) == expected
    first_file = [p.kind for p in problems].index("image missing")
    assert not any("json" in p.where for p in problems[first_file:])


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file"),
        ("{", "is not a JSON file"),
        ("[" * 100000, "nested too deeply"),
        ("\udcff", "is not a JSON file"),
        ("[]", "has no 'images'"),
        ('{"images": [], "annotations": []}', "has no 'categories'"),
        (
            '{"images": [], "annotations": {}, "categories": []}',
            "'annotations' is {}; it must be a list",
        ),
    ],
)
def test_annotation_files_that_cannot_be_used(dataset, text, words):
    """Without the panoptic JSON nothing else is checked; without the other one, the rest is."""
    paths = dataset.paths()
    no_image(dataset)
    for path, others in ((paths[3], {"image missing": 1}), (paths[1], {})):
        Path(path).unlink()
        if text is not None:
            Path(path).write_bytes(text.encode(errors="surrogateescape"))
        used = paths if path == paths[3] else paths[:3]
        problems = check(*used, workers=0, progress=False)
        assert kinds(problems) == {"annotation file unusable": 1, **others}
        assert problems[0].where == path and words in problems[0].detail
    assert kinds(check(*paths, workers=0, progress=False)) == {"annotation file unusable": 2}


def test_what_one_sample_raises_is_its_own_problem(dataset, monkeypatch):
    def cannot(color):
        raise MemoryError("no memory left") if color.shape[0] == SIZES[1][1] else ValueError("odd")

    monkeypatch.setattr("oanet_d2.data.check.rgb2id", cannot)
    problems = dataset.check()
    assert kinds(problems) == {"could not be checked": 3}
    assert "pngs/1.png" in problems[1].where and "images/1.jpg" in problems[1].where
    assert "MemoryError('no memory left')" in problems[1].detail


# -------------------------------------------------------------------------------------------------
# Anything at all


def nodes(value, path=()):
    """The paths to everything in a JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(child, (*path, key))


NAMES = st.sampled_from(["\ud800", "a\0b", "/etc/hostname", "../x", "..", ".", "a\nb", "é" * 300])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | NAMES
KEYS = st.sampled_from(["id", "image_id", "file_name", "size", "counts", "isthing", "area", "bbox"])
JUNK = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=7) | st.dictionaries(KEYS, x, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory):
    return Dataset(tmp_path_factory.mktemp("junk") / "data")


@settings(max_examples=50, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_junk_does_not_stop_the_check(shared_dataset, data):
    paths = shared_dataset.paths()
    which = data.draw(st.sampled_from(["panoptic", "instances"]))
    content = {"root": json.loads(json.dumps(getattr(shared_dataset, which)))}
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(list(nodes(content))[1:]))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = data.draw(JUNK)
    Path(paths[1 if which == "panoptic" else 3]).write_text(json.dumps(content["root"]))
    problems = check(*paths, workers=0, progress=False)
    assert "could not be checked" not in kinds(problems)
    report = format_report(problems, 3, examples=1000)
    assert all(line.isprintable() for line in report.split("\n"))
    assert len([line for line in report.split("\n") if line.startswith("    ")]) == len(problems)


@settings(max_examples=50, database=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=200), st.integers(1, 4000))
def test_rle_runs_are_those_of_the_mask(bits, scale):
    mask = np.repeat(np.array(bits, dtype=np.uint8), scale)[:, None]
    ends = np.flatnonzero(np.diff(mask[:, 0], prepend=0, append=2))
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert rle_runs(counts) == np.diff(ends, prepend=0).tolist()


# -------------------------------------------------------------------------------------------------
# Report and command line


def test_report():
    problems = [Problem("PNG missing", f"{i}.png", "there is no such file") for i in range(4)]
    problems.insert(1, Problem("image missing", "a\nb.jpg", "there is no such file"))
    assert format_report(problems, 9, 2).split("\n") == [
        "Samples: 9. Problems: 5, of 2 kinds.",
        "",
        "PNG missing: 4",
        "    0.png: there is no such file",
        "    1.png: there is no such file",
        "    ... and 2 more",
        "",
        "image missing: 1",
        r"    a\nb.jpg: there is no such file",
    ]
    assert format_report([], 9) == "Samples: 9. Problems: 0, of 0 kinds."


def test_exit_status(dataset, capsys):
    paths = dataset.paths()
    assert main(paths) == 0 and main(paths[:3]) == 0
    assert capsys.readouterr().out == "Samples: 3. Problems: 0, of 0 kinds.\n" * 2
    no_image(dataset)
    no_png(dataset)
    assert main([*paths, "--examples", "0"]) == 1
    assert capsys.readouterr().out.split("\n")[2:] == ["image missing: 1", "", "PNG missing: 1", ""]
    assert main([paths[0], str(dataset.root / "none.json"), paths[2]]) == 1
    assert "annotation file unusable: 1" in capsys.readouterr().out
    for arguments in ([], paths[:2], [*paths, "x"], [*paths, "--workers", "many"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2


def test_registered_datasets(dataset, capsys):
    """With their instances JSON, if they have one."""
    paths = dataset.paths()
    box_without_height(dataset)
    dataset.paths()
    for used, status in ((paths, 1), (paths[:3], 0)):
        with registered("test_check_train", *used) as name:
            assert main([name]) == status
    assert "box without extent: 1" in capsys.readouterr().out
    assert main(["test_check_train"]) == 2
    error = capsys.readouterr().err
    assert "error: 'test_check_train' is not registered" in error
    assert "coco_2017_val_oanet" in error and "occlusion_scenes_train" in error
    assert "cityscapes_fine_panoptic_val_oanet" in error


def test_datasets_of_a_yaml(dataset, tmp_path, capsys):
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    files = dict(zip(keys, dataset.paths()))
    path = tmp_path / "config.yaml"
    main_with_config = ["test_check_yaml", "--config-file", str(path)]

    def write(files):
        path.write_text(yaml.safe_dump({"DATASETS": {"PANOPTIC": {"test_check_yaml": files}}}))

    write(files)
    assert main(main_with_config) == 0
    write({**files, "INSTANCES_JSON": ""})
    assert main(main_with_config) == 0
    write({k: v for k, v in files.items() if k != "PANOPTIC_ROOT"})
    assert main(main_with_config) == 2
    assert "test_check_yaml.PANOPTIC_ROOT is not set" in capsys.readouterr().err
    write(5)
    assert main(main_with_config) == 2
    assert "test_check_yaml is 5; it must hold IMAGE_ROOT" in capsys.readouterr().err
    path.write_text("MODEL: {NO_SUCH_KEY: 1}")
    assert main(main_with_config) == 2
    assert "NO_SUCH_KEY" in capsys.readouterr().err
    path.unlink()
    assert main(main_with_config) == 2

    # what training refuses to register is reported like everything else
    category_twice(dataset)
    dataset.paths()
    write(files)
    assert main(main_with_config) == 1
    assert "duplicate category id: 1" in capsys.readouterr().out
    assert "test_check_yaml" not in DatasetCatalog


def test_as_a_command_with_worker_processes(dataset, subprocess_env):
    for change in (no_image, png_size, annotated_twice):
        change(dataset)
    paths = dataset.paths()
    command = [sys.executable, "-m", "oanet_d2.data.check", *paths, "--workers", "2"]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=120)
    problems = check(*paths, workers=0, progress=False)
    assert kinds(problems) == {
        "image missing": 1,
        "PNG size differs from the image": 1,
        "several annotations of one image": 1,
    }
    assert done.stdout == format_report(problems, 4) + "\n", done.stderr
    assert done.returncode == 1 and "RuntimeWarning" not in done.stderr


def test_a_worker_that_dies_is_the_problem_of_its_sample(tmp_path, monkeypatch):
    code = (
        "import os\ndef dies(sample): return os._exit(1) if sample.png == '3' else [sample.png]\n"
    )
    (tmp_path / "test_check_worker.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)  # of the workers, too
    monkeypatch.setattr("oanet_d2.data.check.CHUNK", 2)
    samples = [Sample("i", str(k), None, None) for k in range(7)]
    results = list(run(import_module("test_check_worker").dies, samples, workers=2))
    assert results[3] == [Problem("could not be checked", "3, i", "the process that read it died")]
    assert results[:3] + results[4:] == [[str(k)] for k in range(7) if k != 3]
