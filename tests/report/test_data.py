"""
Whatever lies in the output folder, only whole data of this version is read.
"""

import contextlib
import copy
import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from oanet_d2.evaluation.report_data import content_name
from oanet_d2.report import ReportError, load_report, write_report
from oanet_d2.report.__main__ import main
from oanet_d2.report.data import evaluation_folders, read_picture
from tests.report.conftest import change_json, file_names, read_json


def json_path(folder):
    return folder / "report" / "evaluation.json"


def refused(folder, match):
    """The report is not made, and says why; one that is there stays."""
    (folder / "report.html").write_text("an earlier report")
    with pytest.raises(ReportError, match=match):
        write_report(str(folder))
    assert (folder / "report.html").read_text() == "an earlier report"
    assert not list(folder.glob("*.tmp"))


def test_whole_data_is_read(folder):
    assert load_report(str(folder)) == read_json(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(ReportError, match="There is no folder .*/missing"):
        evaluation_folders(str(tmp_path / "missing"))
    with pytest.raises(ReportError, match=r"There is no .*/report/evaluation.json. Evaluate with"):
        evaluation_folders(str(tmp_path))
    with pytest.raises(ReportError, match=r"There is no .*/report/evaluation.json. Evaluate with"):
        load_report(str(tmp_path))


def test_several_datasets_have_a_folder_each(folder):
    parent = folder.parent
    assert evaluation_folders(str(folder)) == [str(folder)]
    (parent / "another").mkdir()
    assert evaluation_folders(str(parent)) == [str(folder)]


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_half_a_json(folder, keep):
    text = json_path(folder).read_text()
    json_path(folder).write_text(text[:keep])
    refused(folder, "evaluation.json is not a whole JSON file")


@pytest.mark.parametrize(
    "text, match",
    [
        ("[]", "has the format None; this version reads 'oanet_d2 report, 1'"),
        ('{"orderings": {}}', "has the format None"),
        ('{"format": "oanet_d2 report, 0"}', "has the format 'oanet_d2 report, 0'"),
        ('{"format": "oanet_d2 report, 1"}', "'dataset'"),
        ("[" * 100_000, "not a whole JSON"),
        ('{"format": NaN}', "NaN"),
        ("\udce9", "not a whole JSON"),
    ],
)
def test_foreign_json(folder, text, match):
    json_path(folder).write_text(text, errors="surrogateescape")
    refused(folder, match)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c.pop("pairs"), r"it must be an object with 'pairs'"),
        (lambda c: c.update(images="8"), r"images is '8'; it must be int"),
        (lambda c: c.update(images=True), r"images is True; it must be int"),
        (lambda c: c.update(seconds=float("1e999")), r"Infinity"),
        (lambda c: c.update(seconds=10**400), r"seconds is 1000.*\.\.\.; it must be"),
        (lambda c: c["orderings"]["score"].pop("PQ_th"), r"orderings\['score'\] .*'PQ_th'"),
        (lambda c: c.update(compared=["score", "depth"]), r"compared is .*two of \['oracle'"),
        (lambda c: c["classes"][2].update(color=[1, 2, 300]), r"classes\[2\].color"),
        (lambda c: c["classes"][2]["counts"].pop("score"), r"classes\[2\].counts"),
        (lambda c: c["pairs"][1].update(front=99), r"pairs\[1\].front is 99; it must be one of"),
        (lambda c: c["pairs"][0].update(kind="odd"), r"pairs\[0\].kind is 'odd'"),
        (lambda c: c["cases"][0].update(width=0), r"cases\[0\].width is 0; it must be more than 0"),
        (lambda c: c["cases"][0].update(section="new"), r"cases\[0\].section is 'new'"),
        (lambda c: c["cases"][0].update(photo="../a.webp"), r"cases\[0\].photo is '../a.webp'"),
        (
            lambda c: c["cases"][0]["after"].update(file="/etc/passwd"),
            r"after.file is '/etc/passwd'",
        ),
        (lambda c: c["cases"][0].update(orders=["score"]), r"cases\[0\].orders is \['score'\]"),
        (lambda c: c["cases"][0]["pairs"].append({}), r"cases\[0\].pairs\[\d+\].*'front'"),
        (
            lambda c: c["cases"][0]["before"]["segments_info"][0].pop("instance_id"),
            r"before.segments_info\[0\].instance_id is None; it must be int",
        ),
        (
            lambda c: c["cases"][0]["before"]["segments_info"][0].update(category_id=77),
            r"before.segments_info\[0\].category_id is 77",
        ),
    ],
)
def test_what_is_wrong_is_named(folder, change, match):
    change_json(folder, change)
    refused(folder, match)


def pictures_of(folder):
    return [name for name in file_names(folder) if name.endswith((".png", ".webp"))]


def test_missing_picture(folder):
    for name in pictures_of(folder):
        (folder / "report" / name).unlink()
    refused(folder, r"Cannot read .*(png|webp): No such file")


def test_broken_pictures(folder):
    for name in pictures_of(folder):
        path = folder / "report" / name
        path.write_bytes(path.read_bytes()[:-1])
    refused(folder, r"(png|webp) is not what the evaluation wrote")


def put_picture(folder, content, key="photo"):
    """A file whose name fits its content, as the first case's photo or map."""
    name = content_name(content, "webp" if key == "photo" else "png")
    (folder / "report" / name).write_bytes(content)

    def change(c):
        if key == "photo":
            c["cases"][0]["photo"] = name
        else:
            c["cases"][0][key]["file"] = name

    change_json(folder, change)


@pytest.mark.parametrize("key", ["photo", "before"])
def test_no_picture(folder, key):
    put_picture(folder, b"<script>alert(1)</script>", key)
    refused(folder, "is not a (WEBP|PNG) picture")


def test_picture_of_another_size(folder, tmp_path):
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "x.png")
    put_picture(folder, (tmp_path / "x.png").read_bytes(), "after")
    refused(folder, r"is of size \(20, 10\); it must be \(96, 96\)")


def test_picture_of_another_format(folder, tmp_path):
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / "x.bmp")
    put_picture(folder, (tmp_path / "x.bmp").read_bytes())
    refused(folder, "is not a WEBP picture")


def test_half_a_picture(folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    put_picture(folder, (tmp_path / "x.png").read_bytes()[:9000], "ground_truth")
    refused(folder, "is not a PNG picture")


def test_no_other_file_is_read(folder):
    (folder / "secret").write_text("secret")
    with pytest.raises(ReportError):
        read_picture(str(folder), "../secret.png")


ODD = [None, True, -1, 0, 2**70, 1e308, "", "\x00", "é", [], {}, [[]], "a" * 10_000]


def places(value, path=()):
    """The paths of all values within a JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, x in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(x, (*path, key))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), odd=st.sampled_from(ODD), remove=st.booleans())
@example(seed=957485, odd="\x00", remove=False)  # the name of a class
def test_one_odd_value_is_refused_or_does_no_harm(folder, evaluated, seed, odd, remove):
    content = copy.deepcopy(read_json(evaluated))
    content["cases"] = content["cases"][:1]
    *parents, key = random.Random(seed).choice(list(places(content))[1:])
    target = content
    for parent in parents:
        target = target[parent]
    if remove:
        del target[key]
    else:
        target[key] = odd
    json_path(folder).write_text(json.dumps(content))
    with contextlib.suppress(ReportError):
        write_report(str(folder))


def test_command_line(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    (folder / "report.html").unlink()
    assert main([str(folder.parent)]) == 0  # of every dataset's folder in it
    assert (folder / "report.html").exists()
    assert main([str(folder / "report")]) == 1
    assert capsys.readouterr().err.startswith("error: There is no")
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    assert main([str(folder)]) == 1  # cannot be written
    assert "report.html" in capsys.readouterr().err
    assert not list(folder.glob("*.tmp"))
