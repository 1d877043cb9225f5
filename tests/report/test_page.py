"""
The page without a browser: what it says, that it needs nothing else, and that text stays text.
"""

import os
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from oanet_d2.report import load_report, write_report
from oanet_d2.report.page import render
from oanet_d2.report.tables import class_rows, pair_rows
from tests.report.conftest import ORDERS, change_json, read_json

VOID = {"meta", "link", "img", "input", "br"}
HOSTILE = '"><script>document.title="broken"</script><img src=x onerror="alert(1)">\'{{7*7}}$x$'


class Page(HTMLParser):
    """Elements with their attributes and text; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = {k: v or "" for k, v in attributes}
        element = {"tag": tag, "attributes": attributes, "text": "", "inside": list(self.open)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(
            {"tag": tag, "attributes": dict(attributes), "text": "", "inside": list(self.open)}
        )

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        found = [e for e in self.elements if e["tag"] == tag]
        return [e for e in found if attributes.items() <= e["attributes"].items()]

    def rows(self, section):
        """The texts of the cells of all rows in the section of that id."""
        found = []
        for row in self.all("tr"):
            if any(e["attributes"].get("id") == section for e in row["inside"]):
                cells = [
                    e for e in self.elements if row in e["inside"] and e["tag"] in ("th", "td")
                ]
                found.append([" ".join(e["text"].split()) for e in cells])
        return found


@pytest.fixture(scope="module")
def html(evaluated):
    return render(str(evaluated))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_tables_say_what_was_evaluated(page, evaluated):
    report = load_report(str(evaluated))
    orders = {row[0]: row[1:] for row in page.rows("orders")[1:]}
    assert list(orders) == list(ORDERS)
    for order, metrics in report["orderings"].items():
        assert orders[order][1:] == [f"{x:.1f}" for x in metrics.values()]
    assert orders["score"][0] == "0 %" and orders["oracle"][0] == "100 %"
    classes = page.rows("classes")[1:]
    assert [row[0].removesuffix(" stuff") for row in classes] == [
        c["name"] for c in class_rows(report)
    ]
    gains = [float(row[1].replace("\N{MINUS SIGN}", "-")) for row in classes]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0
    overlaps = page.rows("overlaps")
    for pair in pair_rows(report, false_positives=False):
        (row,) = [r for r in overlaps if r[0] == f"{pair['front']} over {pair['behind']}"]
        for cell, order in zip(row[1:], ("score", "srm_pairs")):
            assert cell.startswith(f"{pair['right'][order]} of {pair['overlaps']} ")
    false = {f"{p['front']} over a false {p['behind']}" for p in pair_rows(report, True)}
    assert false and false <= {row[0] for row in overlaps}


def test_gallery_holds_all_cases_the_worst_first(page, evaluated):
    cases = page.all("article")
    report = read_json(evaluated)
    assert [c["attributes"]["data-section"] for c in cases] == [
        c["section"] for c in report["cases"]
    ]
    assert cases[0]["attributes"]["data-section"] == "lost"
    for article, case in zip(cases, report["cases"]):
        assert case["file_name"] in article["text"]
        assert f"{abs(case['pixels'])} pixels" in article["text"]
        assert article["attributes"]["data-classes"].split() == [str(c) for c in case["classes"]]
    counted = Counter(c for case in report["cases"] for c in set(case["classes"]))
    names = {c["category_id"]: c["name"] for c in report["classes"] if c["isthing"]}
    options = {o["text"] for o in page.all("option")}
    assert options == {"any", *(f"{names[c]} ({n})" for c, n in counted.items())}


def test_it_needs_nothing_else(html, page):
    for element in page.elements:
        for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = element["attributes"].get(key, "#")
            assert value.startswith(("#", "data:")), (element["tag"], value[:60])
        assert element["tag"] not in ("iframe", "object", "embed", "base")
        assert not any(key.startswith("on") for key in element["attributes"])
    urls = re.findall(r"url\(\s*['\"]?(.{5})", html)
    assert set(urls) <= {"data:", *(u for u in urls if u.startswith("#"))}
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|eval\(", html)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["attributes"]["content"].startswith("default-src 'none'; img-src data:;")


def test_it_is_accessible(page):
    ids = [e["attributes"]["id"] for e in page.elements if "id" in e["attributes"]]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        for key in ("aria-labelledby", "aria-describedby", "for"):
            for reference in element["attributes"].get(key, "").split():
                assert reference in ids
        href = element["attributes"].get("href", "")
        assert not href.startswith("#") or href == "#" or href[1:] in ids
    assert page.all("html")[0]["attributes"]["lang"] == "en"
    assert len(page.all("h1")) == 1 and len(page.all("main")) == 1
    alts = [e["attributes"]["alt"] for e in page.all("img")]
    assert all(alts) and len(alts) == 3 * len(page.all("article"))
    for control in [*page.all("input"), *page.all("select")]:
        labelled = any(e["tag"] == "label" for e in control["inside"])
        assert labelled or control["attributes"]["aria-label"]
    for table in page.all("table"):
        has_caption = any(table in e["inside"] for e in page.all("caption"))
        assert has_caption or table["attributes"]["aria-labelledby"]
    assert all(e["attributes"].get("scope") in ("row", "col") for e in page.all("th"))
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_text_of_the_data_is_only_text(folder):
    def rename(content):
        content["dataset"] = HOSTILE
        for i, c in enumerate(content["classes"]):
            c["name"] = HOSTILE + str(i)
        for case in content["cases"]:
            case["file_name"] = HOSTILE
        for part in (content["orderings"], *(c["counts"] for c in content["classes"])):
            part[HOSTILE] = part["score"]
        for pair in [*content["pairs"], *(p for c in content["cases"] for p in c["pairs"])]:
            pair["right"][HOSTILE] = pair["right"]["score"]

    plain = Page(render(str(folder)))
    change_json(folder, rename)
    page = Page(render(str(folder)))

    def kinds(page):
        return {(e["tag"], *sorted(e["attributes"])) for e in page.elements}

    assert kinds(page) <= kinds(plain)
    assert len(page.all("script")) == 1
    assert HOSTILE in page.all("h1")[0]["text"]
    assert HOSTILE + "0" in page.all("body")[0]["text"]
    assert "49" not in page.all("h1")[0]["text"]  # nor a template


def test_the_same_evaluation_gives_the_same_page(html, evaluated):
    assert render(str(evaluated)) == html


def test_a_report_is_replaced_as_a_whole(folder, html, monkeypatch):
    path = folder / "report.html"
    path.write_text("an earlier report")
    replaced = []
    replace = os.replace

    def check_and_replace(source, target):
        assert path.read_text() == "an earlier report"
        replaced.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", check_and_replace)
    assert write_report(str(folder)) == str(path) == replaced[0]
    assert path.read_text(encoding="utf-8") == html
    assert sorted(os.listdir(folder)) == ["report", "report.html"]


def test_without_oracle_pairs_and_cases(folder):
    def take_away(content):
        for part in (content["orderings"], *(c["counts"] for c in content["classes"])):
            del part["oracle"]
        content.update(cases=[], pairs=[])

    change_json(folder, take_away)
    page = Page(render(str(folder)))
    text = page.all("body")[0]["text"]
    assert "No two painted instances overlap." in text and "TEST.ORDER_PICTURES" in text
    assert {row[1] for row in page.rows("orders")[1:]} == {"\N{EN DASH}"}
    assert "oracle" not in page.all("section", id="classes")[0]["text"]


def test_many_classes_and_pairs(folder):
    def multiply(content):
        thing = next(c for c in content["classes"] if c["isthing"])
        content["classes"] += [
            {**thing, "category_id": 100 + i, "name": f"class {i}"} for i in range(200)
        ]
        content["pairs"] += [
            {**content["pairs"][0], "front": 100 + i, "behind": 299 - i} for i in range(100)
        ]

    change_json(folder, multiply)
    page = Page(render(str(folder)))
    assert "picture shows the 40 classes that change most" in page.all("body")[0]["text"]
    open_rows = [
        row
        for row in page.all("tr")
        if any(e["attributes"].get("id") == "overlaps" for e in row["inside"])
        and not any(e["tag"] == "details" for e in row["inside"])
    ]
    assert len(open_rows) == 1 + len(ORDERS) + 1 + 1 + 15  # the rest unfolds
    assert sum(row[0].startswith("class ") for row in page.rows("overlaps")) == 100
