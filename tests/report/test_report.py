import io
import json
import re
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import Metadata, MetadataCatalog

from oanet_d2.data.images import read_segment_ids
from oanet_d2.painting.metrics import occluded_pairs
from oanet_d2.report import ReportError, ReportRecorder, write_report
from oanet_d2.report.__main__ import main
from oanet_d2.report.page import class_rows, kind_columns
from oanet_d2.report.pictures import SIDE, draw_segments, labels, resized, shrunk
from oanet_d2.visualization import MARK
from tests.conftest import thing
from tests.report.conftest import (
    HOSTILE,
    NUM_IMAGES,
    ORDERS,
    change_json,
    make_hostile,
    read_json,
)


def categories(panoptic):
    """For every pixel 1 + the thing class, minus the stuff class, or 0."""
    ids, segments_info = panoptic
    out = np.zeros(ids.shape, dtype=int)
    for s in segments_info:
        out[np.asarray(ids) == s["id"]] = (
            1 + s["category_id"] if s["isthing"] else -s["category_id"]
        )
    return out


@pytest.fixture(scope="module")
def images(evaluation):
    """
    For every image its truth, the results of two orders, the pairs as (front, behind, kind), and for
    each pair the orders that are right.
    """
    names, found = MetadataCatalog.get(evaluation.dataset_name).thing_classes, []
    for d in evaluation.inputs:
        inputs = evaluation.model(d)["fusion_inputs"]
        ids = torch.from_numpy(read_segment_ids(d["pan_seg_file_name"]))
        painted = inputs.instances.scores >= 0.5
        assert painted[:-1].all() and not painted[-1]  # so that indices stay as they are
        classes = inputs.instances.pred_classes[:-1]
        masks = inputs.masks.select(range(len(classes)))
        orders = {x: inputs.order_inputs.order(x) for x in ("score", "srm_pairs")}
        place = {name: order.tolist().index for name, order in orders.items()}
        pairs = [
            (
                (names[classes[p.front]], names[classes[p.behind]], p.kind),
                [x for x in place if place[x](p.front) < place[x](p.behind)],
            )
            for p in occluded_pairs(masks, classes, ids, d["segments_info"])
        ]
        results = {x: evaluation.model.combine(inputs, order) for x, order in orders.items()}
        found.append(((ids.numpy(), d["segments_info"]), results, pairs))
    return found


def test_overlaps_are_those_of_all_images(evaluated, images):
    number, right = Counter(), Counter()
    for _, _, pairs in images:
        number.update(pair for pair, _ in pairs)
        right.update((pair, order) for pair, orders in pairs for order in orders)
    rows = read_json(evaluated[0])["overlaps"]
    assert len(rows) == len(number) > 3
    for row in rows:
        pair = row["front"], row["behind"], row["kind"]
        assert row["number"] == number[pair]
        for order in ("score", "srm_pairs"):
            assert row["right"][order] == right[pair, order]
    assert [x["number"] for x in rows] == sorted(number.values(), reverse=True)


def test_outcomes_and_cases(evaluated, images):
    content = read_json(evaluated[0])
    gains = []
    for truth, results, _ in images:
        right = {x: int((categories(y) == categories(truth)).sum()) for x, y in results.items()}
        gains.append(right["srm_pairs"] - right["score"])
    outcomes = {"better": sum(g > 0 for g in gains), "worse": sum(g < 0 for g in gains)}
    assert content["outcomes"] == {**outcomes, "same": gains.count(0)}
    assert min(gains) < 0 < max(gains)
    lost, won = (sorted((s * g for g in gains if s * g > 0), reverse=True)[:2] for s in (-1, 1))
    assert [c["pixels"] for c in content["cases"]["lost"]] == lost
    assert [c["pixels"] for c in content["cases"]["won"]] == won
    for case in content["cases"]["still_wrong"]:
        assert case["orders"] == ["srm_pairs", "oracle"] and case["pixels"] > 0
        assert all(x["right"] == ["oracle"] or "srm_pairs" not in x["right"] for x in case["pairs"])


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


def test_ties_are_kept_in_the_order_of_their_names(evaluation, tmp_path):
    report = ReportRecorder(evaluation.dataset_name, str(tmp_path), 2, ("score", "srm_pairs"))
    d = evaluation.inputs[0]
    inputs = evaluation.model(d)["fusion_inputs"]
    order = inputs.order_inputs.order("score")
    result = evaluation.model.combine(inputs, order)
    for name in "cab":
        report.add(
            {**d, "file_name": name},
            read_segment_ids(d["pan_seg_file_name"]),
            inputs.masks,
            inputs.instances.pred_classes,
            {"score": order, "srm_pairs": order},
            {"score": result, "srm_pairs": result},
            {"score": 1, "srm_pairs": 5},
        )
    assert [case["file_name"] for case in report._cases["won"]] == ["a", "b"]


def test_an_evaluation_writes_one_file_and_deletes_none(evaluation, folder):
    for name in ("mine.png", "0123456789abcdef0123456789abcdef.png"):
        (folder / "report" / name).touch()
    evaluation(folder, max_cases=0)
    assert set(read_json(folder)["cases"]) == {"lost", "won", "still_wrong"}
    assert not any(read_json(folder)["cases"].values())
    assert len(list((folder / "report").iterdir())) == 3
    write_report(str(folder))


# The page


class Page(HTMLParser):
    """The elements of a page, each with its attributes and text. Fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
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


def page_of(folder):
    with open(write_report(str(folder)), encoding="utf-8") as f:
        return Page(f.read())


def test_the_page_shows_what_was_evaluated(folder):
    content, page = read_json(folder), page_of(folder)
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
    cases = [case for cases in content["cases"].values() for case in cases]
    assert len([e for e in page.elements if e["tag"] == "article"]) == len(cases) >= 5
    assert f"{NUM_IMAGES} images" in " ".join(page.texts("p"))


def test_the_page_needs_nothing_else(folder):
    page = page_of(folder)
    for element in page.elements:
        for key in ("src", "href"):
            assert element.get(key, "data:").startswith("data:")
    (script,) = (e for e in page.elements if e["tag"] == "script")
    assert "http" not in script["text"] and "url(" not in "".join(page.texts("style"))


def test_text_of_the_data_is_only_text(folder):
    tags = [e["tag"] for e in page_of(folder).elements]
    change_json(folder, make_hostile)
    page = page_of(folder)
    assert [e["tag"] for e in page.elements] == tags
    assert HOSTILE in page.texts("h1")[0]
    assert not any("onerror" in e for e in page.elements)


def test_without_oracle_overlaps_or_stuff(folder):
    def strip(content):
        del content["orderings"]["oracle"], content["cases"]["still_wrong"]
        content["overlaps"] = []
        for metrics in content["orderings"].values():
            metrics.update(closure=None, PQ_st=None, SQ_st=None, RQ_st=None)
        for c in content["classes"]:
            c["pq"] = {"score": None, "srm_pairs": c["pq"]["srm_pairs"]}

    change_json(folder, strip)
    row = next(r for r in page_of(folder).texts("tr") if r.startswith("srm_pairs"))
    assert row.endswith("–––")


def test_class_rows_and_kind_columns_by_hand():
    pq = ((90, 80), (10, 40), (None, 50), (70, 75))
    classes = [{"name": n, "pq": {"score": a, "mine": b}} for n, (a, b) in zip("abcd", pq)]
    overlaps = [
        {"kind": "same class", "number": 4, "right": {"score": 1, "mine": 3}},
        {"kind": "different class", "number": 6, "right": {"score": 2, "mine": 6}},
        {"kind": "same class", "number": 2, "right": {"score": 2, "mine": 0}},
    ]
    report = {"compared": ["score", "mine"], "classes": classes, "overlaps": overlaps}
    report["orderings"] = {"score": {}, "mine": {}}
    assert [(c["name"], c["gain"]) for c in class_rows(report)] == [
        ("b", 30),
        ("d", 5),
        ("a", -10),
        ("c", None),
    ]
    assert kind_columns(report) == [
        {"kind": "all", "number": 12, "right": {"score": 5, "mine": 9}},
        {"kind": "different class", "number": 6, "right": {"score": 2, "mine": 6}},
        {"kind": "same class", "number": 6, "right": {"score": 3, "mine": 3}},
    ]


@pytest.mark.parametrize("text", [None, '{"format": ', "[]", '{"format": "oanet_d2 report, 1"}'])
def test_another_file_is_one_clear_error(tmp_path, capsys, text):
    path = tmp_path / "report" / "evaluation.json"
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(ReportError, match=re.escape(str(path))):
        write_report(str(tmp_path))
    assert main([str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_command_line(folder, tmp_path, capsys):
    """It makes the same page again, and with several test sets one in each folder."""
    html = (write_report(str(folder)), (folder / "report.html").read_text())[1]
    (folder / "report.html").unlink()
    assert main([str(folder)]) == 0
    assert (folder / "report.html").read_text() == html
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == 2 * [str(folder / "report.html")]


# The pictures

COLORS = Metadata(thing_classes=["cat", "dog"], thing_colors=[(200, 0, 0), (0, 0, 200)])


def test_segments_are_drawn_in_their_colors():
    photo = resized(np.full((24, 48, 3), 100, dtype=np.uint8))
    assert photo.shape == (SIDE // 2, SIDE, 3)
    ids = np.zeros((24, 48), dtype=np.int32)
    ids[:, 10:20], ids[:, 30:40] = 5, 9
    drawn = draw_segments(photo, (ids, [thing(5, 1), thing(9, 0)]), COLORS, ids == 9)
    assert drawn[120, 150].tolist() == [40, 40, 160]  # 0.4 of the photo and 0.6 of the dog
    assert drawn[120, 350].tolist() == [160, 40, 40]
    assert drawn[120, 50].tolist() == [100, 100, 100]
    assert drawn[120, 100].tolist() == [255, 255, 255]
    assert (drawn[120, 295:305] == MARK).all(axis=1).any()


@pytest.mark.parametrize("size", [(5000, 3), (1, 700), (480, 480), (7, 9)])
def test_sizes(size):
    ids = np.arange(size[0] * size[1]).reshape(size)
    small = shrunk(ids)
    assert max(small.shape) == min(SIDE, max(size)) and min(small.shape) >= 1
    if max(size) <= SIDE:
        assert np.array_equal(small, ids)
    photo = resized(np.zeros((*size, 3), dtype=np.uint8))
    assert max(photo.shape) == SIDE and min(photo.shape[:2]) >= 1
    draw_segments(photo, (np.ones_like(small), [thing(1, 0)]), COLORS)


def test_labels_stand_in_their_segments():
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[:, 10:13] = ids[10:30, 10:30] = 7  # a strip and a square
    ids[0, 0] = 8  # too small for a label
    (label,) = labels((ids, [thing(7, 1), thing(8, 0)]), COLORS)
    assert label["text"] == "dog" and label["isthing"]
    assert 30 < label["x"] < 40 and 40 < label["y"] < 60


def test_pictures_of_a_case(evaluated):
    case = read_json(evaluated[0])["cases"]["won"][0]
    drawn = {}
    for name, uri in case["pictures"].items():
        kind, content = uri.split(",")
        assert kind == "data:image/webp;base64"
        drawn[name] = np.asarray(Image.open(io.BytesIO(b64decode(content))).convert("RGB"))
        assert drawn[name].shape == (SIDE, SIDE, 3)
    differs = np.abs(drawn["before"].astype(int) - drawn["after"]).max(axis=2) > 40
    assert differs.mean() > case["share"] / 2
    assert json.dumps(case).count("data:") == 4
