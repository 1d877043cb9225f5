import io
import re
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from oanet_d2.painting import BoxedMasks
from oanet_d2.painting.metrics import METRICS
from oanet_d2.report import ReportError, ReportRecorder, write_report
from oanet_d2.report.__main__ import main
from oanet_d2.report.page import class_rows, kind_columns
from oanet_d2.visualization import TITLE_HEIGHT
from tests.conftest import thing
from tests.report.conftest import (
    HOSTILE,
    NUM_IMAGES,
    ORDERS,
    change_json,
    make_hostile,
    read_json,
)


def picture(case, name):
    kind, content = case["pictures"][name].split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(b64decode(content))).convert("RGB")).astype(int)


def add(report, path, size):
    """A thing lies on another one. By "score" the one behind is painted over it."""
    Image.new("RGB", size[::-1]).save(path)
    place = torch.arange(size[0] * size[1]).reshape(size) / (size[0] * size[1])
    masks = BoxedMasks.from_masks(torch.stack([place < 0.5, place >= 0.25]))
    segments = [thing(1, 0, instance_id=0), thing(2, 1, instance_id=1)]
    after, before = (torch.where(place < x, 1, 2).int() for x in (0.5, 0.25))
    report.add(
        {"file_name": str(path), "segments_info": segments},
        after.numpy(),
        masks,
        torch.tensor([0, 1]),
        {"score": torch.tensor([1, 0]), "srm_pairs": torch.tensor([0, 1])},
        {"score": (before, segments), "srm_pairs": (after, segments)},
        {"score": int((before == after).sum()), "srm_pairs": after.numel()},
    )


@pytest.mark.parametrize("size", [(1, 500), (50, 2), (900, 12)])
def test_one_overlap_by_hand(evaluation, tmp_path, size):
    """In three images, more than are kept. Equal gains are in the order of their names."""
    orders = "score", "srm_pairs"
    report = ReportRecorder(evaluation.dataset_name, str(tmp_path), 2, orders)
    for name in "cab":
        add(report, tmp_path / f"{name}.png", size)
    metrics = {f"panoptic_seg/{x}": dict.fromkeys(METRICS, 50.0) for x in orders}
    report.save({"evaluation": {}, **metrics}, {x: Counter() for x in orders})
    content = read_json(tmp_path)
    front, behind = report.metadata.thing_classes[:2]
    pair = {"front": front, "behind": behind, "kind": "different class"}
    right = {"score": 0, "srm_pairs": 3}
    assert content["overlaps"] == [{**pair, "number": 3, "right": right}]
    assert content["outcomes"] == {"better": 3, "worse": 0, "same": 0}
    assert (tmp_path / "pictures" / "written.txt").read_text() == "01_a.png\n02_b.png"
    changed = size[0] * size[1] / 4
    assert [case["pixels"] for case in content["cases"]["won"]] == [changed, changed]
    case = content["cases"]["won"][0]
    assert case["pairs"] == [{**pair, "pixels": changed, "right": ["srm_pairs"]}]
    height, width = (round(480 * x / max(size)) or 1 for x in size)
    for name in ("photo", "truth", "before", "after"):
        assert picture(case, name).shape == (height, width, 3)
    with Image.open(tmp_path / "pictures" / "01_a.png") as png:
        assert png.height == height + TITLE_HEIGHT


def test_outcomes_and_cases(evaluated, evaluation):
    """The order is right in all images but the last three."""
    folder, _ = evaluated
    content = read_json(folder)
    assert (
        1 <= content["outcomes"]["worse"] <= 3 and sum(content["outcomes"].values()) == NUM_IMAGES
    )
    names = [d["file_name"].rsplit("/", 1)[1] for d in evaluation.inputs]
    for section, among in (("lost", names[-3:]), ("won", names[:-3]), ("still_wrong", names[-3:])):
        cases = content["cases"][section]
        assert len(cases) == 2 and {case["file_name"] for case in cases} <= set(among)
        assert cases[0]["pixels"] >= cases[1]["pixels"] > 0
        for pair in (pair for case in cases for pair in case["pairs"]):
            assert len(set(pair["right"]) & set(cases[0]["orders"])) == 1
    assert cases[0]["orders"] == ["srm_pairs", "oracle"]
    differs = np.abs(picture(cases[0], "before") - picture(cases[0], "after")).max(axis=2) > 40
    assert differs.mean() > cases[0]["share"] / 2
    assert {x.name for x in folder.iterdir()} == {"report", "pictures", "pictures_still_wrong"}


def test_classes_average_to_the_metrics(evaluated):
    folder, results = evaluated
    content = read_json(folder)
    for order in ORDERS:
        for group, kinds in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
            pq = [c["pq"][order] for c in content["classes"] if c["isthing"] in kinds]
            expected = results[f"panoptic_seg/{order}"]["PQ" + group]
            assert np.mean([x for x in pq if x is not None]) == pytest.approx(expected)
            assert content["orderings"][order]["PQ" + group] == pytest.approx(expected)
    assert content["orderings"]["oracle"]["closure"] == 1


def test_an_evaluation_replaces_only_what_an_earlier_one_wrote(evaluation, folder):
    own = [*folder.glob("pictures*/*.png")]
    others = [folder / "report" / "mine.png", folder / "pictures" / "01_holiday.png"]
    for path in others:
        path.touch()
    assert len(own) == 4
    evaluation(folder, max_cases=0)
    assert {*folder.rglob("*.png")} == set(others)
    assert read_json(folder)["cases"] == {"lost": [], "won": [], "still_wrong": []}
    write_report(str(folder))


class Page(HTMLParser):
    """The elements of a page, each with its attributes and text. Fails where tags do not nest."""

    def __init__(self, folder):
        super().__init__()
        self.elements, self.open = [], []
        with open(write_report(str(folder)), encoding="utf-8") as f:
            self.feed(f.read())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def texts(self, tag):
        return [" ".join(e["text"].split()) for e in self.elements if e["tag"] == tag]


def test_the_page_shows_what_was_evaluated_and_needs_nothing_else(folder):
    content, page = read_json(folder), Page(folder)
    rows = page.texts("tr")
    for order, x in content["orderings"].items():
        (row,) = (r for r in rows if r.startswith(order) and r.count(".") == 9)
        assert f"{x['PQ']:.1f}" in row and f"{100 * x['closure']:.0f} %" in row
    for c in content["classes"]:
        (row,) = (r for r in rows if re.match(rf"{c['name']} (stuff )?[+−0]", r))
        assert f"{c['pq']['srm_pairs']:.1f}" in row and row.endswith(str(c["segments"]))
    for x in content["overlaps"]:
        of_pair = f"{x['right']['score']} of {x['number']}"
        assert any(r.startswith(x["front"]) and x["behind"] in r and of_pair in r for r in rows)
    assert len(page.texts("article")) == 6 and f"{NUM_IMAGES} images" in page.texts("p")[0]
    addresses = [e[key] for e in page.elements for key in ("src", "href") if key in e]
    assert all(x.startswith("data:") for x in addresses)
    assert not re.search(r"http|url\(", "".join(page.texts("script") + page.texts("style")))


def test_text_of_the_data_is_only_text(folder):
    tags = [e["tag"] for e in Page(folder).elements]
    change_json(folder, make_hostile)
    page = Page(folder)
    assert [e["tag"] for e in page.elements] == tags
    assert HOSTILE in page.texts("h1")[0] and not any("onerror" in e for e in page.elements)


def test_without_oracle_overlaps_or_stuff(folder):
    def strip(content):
        del content["orderings"]["oracle"], content["cases"]["still_wrong"]
        content["overlaps"] = []
        for metrics in content["orderings"].values():
            metrics.update(closure=None, PQ_st=None, SQ_st=None, RQ_st=None)
        for c in content["classes"]:
            c["pq"] = {"score": None, "srm_pairs": c["pq"]["srm_pairs"]}

    change_json(folder, strip)
    row = next(r for r in Page(folder).texts("tr") if r.startswith("srm_pairs"))
    assert row.endswith("–––")


def test_class_rows_and_kind_columns_by_hand():
    pq = ((90, 80), (10, 40), (None, 50), (70, 75))
    classes = [{"name": n, "pq": {"score": a, "mine": b}} for n, (a, b) in zip("abcd", pq)]
    counts = (("same class", 4, 1, 3), ("different class", 6, 2, 6), ("same class", 2, 2, 0))

    def row(kind, number, score, mine):
        return {"kind": kind, "number": number, "right": {"score": score, "mine": mine}}

    report = {"compared": ["score", "mine"], "classes": classes, "orderings": ["score", "mine"]}
    report["overlaps"] = [row(*x) for x in counts]
    gains = [("b", 30), ("d", 5), ("a", -10), ("c", None)]
    assert [(c["name"], c["gain"]) for c in class_rows(report)] == gains
    expected = (("all", 12, 5, 9), ("different class", 6, 2, 6), ("same class", 6, 3, 3))
    assert kind_columns(report) == [row(*x) for x in expected]


@pytest.mark.parametrize("text", [None, '{"format": "oanet_d2 report, 1"}'])
def test_another_file_is_one_clear_error(tmp_path, text):
    path = tmp_path / "report" / "evaluation.json"
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(ReportError, match=re.escape(str(path))):
        write_report(str(tmp_path))
    with pytest.raises(SystemExit, match=re.escape(str(path))):
        main([str(tmp_path)])


def test_command_line(folder, tmp_path, capsys):
    """It makes the same page again, and with several test sets one in each folder."""
    page = folder / "report.html"
    html = (write_report(str(folder)), page.read_text())[1]
    page.unlink()
    main([str(folder)])
    assert page.read_text() == html
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == 2 * [str(page)]
