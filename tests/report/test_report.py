import html
import io
import json
import re
from base64 import b64decode
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog

from oanet_d2.painting.metrics import KINDS, METRICS
from oanet_d2.report import ReportRecorder, write_report
from oanet_d2.visualization import TITLE_HEIGHT
from tests.conftest import thing
from tests.report.conftest import HOSTILE, NUM_IMAGES, evaluate, make_hostile, read_json


def picture(case, name):
    kind, content = case["pictures"][name].split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(b64decode(content))).convert("RGB")).astype(int)


KEY = 0, 1, "different class"


def add(report, path, size):
    """A thing lies on another one. By "score" the one behind is painted over it."""
    Image.new("RGB", size[::-1]).save(path)
    place = torch.arange(size[0] * size[1]).reshape(size) / (size[0] * size[1])
    segments = [thing(1, 0, instance_id=0), thing(2, 1, instance_id=1)]
    after, before = (torch.where(place < x, 1, 2).int() for x in (0.5, 0.25))
    report.add(
        {"file_name": str(path), "segments_info": segments},
        after.numpy(),
        [{"key": KEY, "pixels": after.numel() // 4, "right": ["srm_pairs"]}],
        {"score": (before, segments), "srm_pairs": (after, segments)},
        {"score": int((before == after).sum()), "srm_pairs": after.numel()},
    )


@pytest.mark.parametrize("size", [(1, 500), (50, 2), (900, 12)])
def test_one_overlap_by_hand(scenes, tmp_path, size):
    """In three images, more than are kept. Equal gains are in the order of their names."""
    orders = "score", "srm_pairs"
    report = ReportRecorder(scenes, str(tmp_path), 2, orders)
    for name in "cab":
        add(report, tmp_path / f"{name}.png", size)
    metrics = {f"panoptic_seg/{x}": dict.fromkeys(METRICS, 50.0) for x in orders}
    counts = Counter({((True, 0), "tp"): 1, ((True, 0), "iou"): 0.75})
    overlaps, right = Counter({KEY: 3}), Counter({(KEY, "srm_pairs"): 3})
    report.save({"evaluation": {}, **metrics}, dict.fromkeys(orders, counts), overlaps, right)
    content = read_json(tmp_path)
    front, behind = report.metadata.thing_classes[:2]
    pair = {"front": front, "behind": behind, "kind": "different class"}
    class_row = {"name": front, "isthing": True, "segments": 1, "pq": dict.fromkeys(orders, 75)}
    assert content["classes"] == [class_row]
    right = {"score": 0, "srm_pairs": 3}
    assert content["overlaps"] == [{**pair, "number": 3, "right": right}]
    assert content["outcomes"] == {"better": 3, "worse": 0, "same": 0}
    assert (tmp_path / "pictures" / "written.txt").read_text() == "01_a.png\n02_b.png"
    changed = size[0] * size[1] / 4
    assert [case["pixels"] for case in content["cases"]["won"]] == [changed, changed]
    case = content["cases"]["won"][0]
    assert case["pairs"] == [{**pair, "pixels": changed, "right": ["srm_pairs"]}]
    height, width = (round(480 * x / max(size)) or 1 for x in size)
    assert all(picture(case, name).shape == (height, width, 3) for name in case["pictures"])
    with Image.open(tmp_path / "pictures" / "01_a.png") as png:
        assert png.height == height + TITLE_HEIGHT


def test_outcomes_and_cases(scenes, folder):
    """The order is right in all images but the last three."""
    content = read_json(folder)
    outcomes = content["outcomes"]
    assert 1 <= outcomes["worse"] <= 3 and sum(outcomes.values()) == NUM_IMAGES
    assert content["orderings"]["oracle"]["closure"] == 1
    names = [d["file_name"].rsplit("/", 1)[1] for d in DatasetCatalog.get(scenes)]
    for section, among in (("lost", names[-3:]), ("won", names[:-3]), ("still_wrong", names[-3:])):
        cases = content["cases"][section]
        assert len(cases) == 2 and {case["file_name"] for case in cases} <= set(among)
        assert cases[0]["pixels"] >= cases[1]["pixels"] > 0
        for pair in (pair for case in cases for pair in case["pairs"]):
            assert len(set(pair["right"]) & set(cases[0]["orders"])) == 1
    assert cases[0]["orders"] == ["srm_pairs", "oracle"]
    differs = np.abs(picture(cases[0], "before") - picture(cases[0], "after")).max(axis=2) > 40
    assert differs.mean() > cases[0]["share"] / 2


def test_an_evaluation_replaces_only_what_an_earlier_one_wrote(scenes, folder):
    assert len([*folder.glob("pictures*/*.png")]) == 4
    others = {folder / "report" / "mine.png", folder / "pictures" / "01_holiday.png"}
    for path in others:
        path.touch()
    evaluate(scenes, folder, max_cases=0)
    assert {*folder.rglob("*.png")} == others
    assert read_json(folder)["cases"] == {"lost": [], "won": [], "still_wrong": []}
    write_report(str(folder))


def page_of(folder):
    with open(write_report(str(folder)), encoding="utf-8") as f:
        return f.read()


def texts(page, tag):
    found = re.findall(rf"<{tag}[ >].*?</{tag}>", page, re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]*>", " ", x)).split()) for x in found]


def test_the_page_shows_what_was_evaluated_and_needs_nothing_else(folder):
    content, page = read_json(folder), page_of(folder)
    rows = texts(page, "tr")
    for order, x in content["orderings"].items():
        (row,) = (r for r in rows if r.startswith(order) and r.count(".") == 9)
        assert f"{x['PQ']:.1f}" in row and f"{100 * x['closure']:.0f} %" in row
    for c in content["classes"]:
        (row,) = (r for r in rows if re.match(rf"{c['name']} (stuff )?[+−0]", r))
        assert f"{c['pq']['srm_pairs']:.1f}" in row and row.endswith(str(c["segments"]))
    found = (re.match(r"\w+ ([+−][\d.]+)", r) for r in rows)
    gains = [float(x[1].replace("−", "-")) for x in found if x]
    assert len(gains) > 3 and gains == sorted(gains, reverse=True)
    for x in content["overlaps"]:
        of_pair = f"{x['right']['score']} of {x['number']}"
        assert any(r.startswith(x["front"]) and x["behind"] in r and of_pair in r for r in rows)
    kinds = [x["kind"] for x in content["overlaps"] for _ in range(x["number"])]
    numbers = [len(kinds), *map(kinds.count, KINDS)]
    assert f"overlaps {' '.join(map(str, numbers))}" in rows
    assert len(texts(page, "article")) == 6 and f"{NUM_IMAGES} images" in texts(page, "p")[0]
    assert not re.search(r'https?:|url\(|(src|href)="(?!data:)', page)


def test_text_of_the_data_is_only_text(folder):
    tags = re.findall(r"<\w+", page_of(folder))
    make_hostile(folder)
    page = page_of(folder)
    assert re.findall(r"<\w+", page) == tags
    assert HOSTILE in texts(page, "h1")[0]


def test_without_oracle_overlaps_or_stuff(folder):
    content = read_json(folder)
    del content["orderings"]["oracle"], content["cases"]["still_wrong"]
    content["overlaps"] = []
    for metrics in content["orderings"].values():
        metrics.update(closure=None, PQ_st=None, SQ_st=None, RQ_st=None)
    for c in content["classes"]:
        c["pq"]["score"] = None
    (folder / "report" / "evaluation.json").write_text(json.dumps(content))
    row = next(r for r in texts(page_of(folder), "tr") if r.startswith("srm_pairs"))
    assert row.endswith("– – –")
