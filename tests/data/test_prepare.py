import json
import runpy
import sys

import numpy as np
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.io import savemat

from oanet_d2.data.check import check
from tests.conftest import REPOSITORY


def prepare(monkeypatch, name, source):
    """By split and image: the class of every pixel ("": void); class and whole mask of every thing."""
    script, out, found = f"{REPOSITORY}/datasets/prepare_{name}.py", source / "out", {}
    monkeypatch.setattr(sys, "argv", [script, "--source", str(source), "--output", str(out)])
    runpy.run_path(script, run_name="__main__")
    for split in ("train", "val"):
        folder, instances = out / f"panoptic_{split}", out / f"instances_{split}.json"
        assert check(out / "images" / split, folder.with_suffix(".json"), folder, instances) == []
        coco, things = (json.loads(x.with_suffix(".json").read_text()) for x in (folder, instances))
        names = {c["id"]: c["name"] for c in coco["categories"]}
        for image in coco["annotations"]:
            ids = rgb2id(np.array(Image.open(folder / image["file_name"])))
            classes = np.full(ids.shape, "", dtype=object)
            for s in image["segments_info"]:
                classes[ids == s["id"]] = names[s["category_id"]]
            shown = [x for x in things["annotations"] if x["image_id"] == image["image_id"]]
            masks = [(names[x["category_id"]], coco_mask.decode(x["segmentation"])) for x in shown]
            found[split, image["file_name"]] = classes, masks
    return found


def test_street_fashion(tmp_path, monkeypatch):
    for folder in ("photos", "annotations/pixel-level"):
        (tmp_path / folder).mkdir(parents=True)
    listed = np.array([["null", "skin", "shoes", "boots", "purse", "coat", "tie"]], dtype=object)
    savemat(tmp_path / "label_list.mat", {"label_list": listed})
    labels = np.zeros((416, 208), np.uint8)
    labels[10:200, 50:150] = 5  # a coat
    labels[20:60, 90:110] = 1  # a face
    labels[70:100, 95:105] = 6  # a tie
    labels[120:140, 70:90] = 0  # a hole under the arm
    labels[150:190, 130:180] = 4  # a bag, partly before the coat
    labels[300:310, 60:80] = labels[300:310, 90:110] = 2  # two shoes
    labels[300:302, 160:165] = 3  # too small
    for k, x in enumerate((labels, labels.repeat(2, 0).repeat(2, 1), 0 * labels), 1):
        savemat(tmp_path / f"annotations/pixel-level/000{k}.mat", {"groundtruth": x})
        Image.fromarray(x).save(tmp_path / f"photos/000{k}.jpg")
    found = prepare(monkeypatch, "street_fashion", tmp_path)
    assert set(found) == {("val", "0001.png"), ("train", "0002.png")}  # 0003 shows nobody
    names = ["background", "person", "footwear", "", "bag", "outerwear", "tie"]
    expected = np.array(names, dtype=object)[labels]
    expected[120:140, 70:90] = "person"
    for classes, masks in found.values():
        assert (classes == expected).all()
        assert sorted(c for c, _ in masks) == sorted([*names[1:3], *names[4:], "footwear"])
        assert (dict(masks)["person"] == ~np.isin(expected, ["background", "bag"])).all()
        assert dict(masks)["footwear"].sum() == 200


def test_facades(tmp_path, monkeypatch):
    shown = [  # class; left, top, right, bottom
        *[("street", 0, 300, 200, 416), ("car", 200, 280, 300, 350), ("street", 200, 300, 416, 416)],
        *[("window", 60, 60, 80, 80), ("window", 50, 50, 100, 100), ("window", 10, 10, 12, 12)],
        *[("balcony-fence", 40, 90, 110, 120), ("vegetation", 90, 0, 130, 110), ("facade", 0, 0, 250, 310)],
    ]
    listed = ["facade", *sorted({c for c, *_ in shown})]  # the first one has no annotation
    coco = {"categories": [{"id": i, "name": c} for i, c in enumerate(listed)], "annotations": []}
    for c, *box in shown:
        x0, y0, x1, y1 = (2 * v for v in box)
        polygon = {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}
        coco["annotations"].append({"image_id": 0, "category_id": listed.index(c, 1), **polygon})
    for folder, name in ("train", "4_scaled_0"), ("valid/images", "2_scaled_0"), ("test", "4_scaled_1"):
        path = tmp_path / folder / f"{name}.rf.a.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (832, 832)).save(path)
        coco["images"] = [{"id": 0, "file_name": path.name}]
        (tmp_path / folder[:5] / "_annotations.coco.json").write_text(json.dumps(coco))
    found = prepare(monkeypatch, "facades", tmp_path)
    assert [f"{s} {f[:10]}" for s, f in found] == ["train 2_scaled_0", "val 4_scaled_0", "val 4_scaled_1"]
    expected = np.full((416, 416), "", dtype=object)
    for c in "street facade window balcony-fence vegetation car".split():
        for x0, y0, x1, y1 in [box for name, *box in shown if name == c and box[3] > 12]:
            expected[y0:y1, x0:x1] = c
    expected[50:110, 90:100] = expected[90:110, 90:110] = ""  # is the tree before or behind them?
    for classes, masks in found.values():
        assert (classes == expected).all()
        assert sorted(m.sum() for _, m in masks) == [400, 2100, 2500, 4400, 7000, 77500]
