"""`oanet-d2 paint`, held against panopticapi's script and its evaluation."""

import contextlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from panopticapi.combine_semantic_and_instance_predictions import combine_to_panoptic_single_core
from panopticapi.evaluation import pq_compute_single_core
from PIL import Image

from oanet_d2 import paint as command
from oanet_d2.painting import paint
from oanet_d2.painting.learned import LearnedOrder
from oanet_d2.painting.pairs import GEOMETRY_NUMBERS, PairNetwork

from .painting.test_formats import KINDS, random_masks

SIZES = [(40, 57), (61, 33), (9, 80), (50, 50), (31, 64)]
CATEGORIES = [
    *({"id": i, "name": f"thing {i}", "isthing": 1, "color": [i, 99, 99]} for i in (3, 7, 12)),
    *({"id": i, "name": f"stuff {i}", "isthing": 0, "color": [99, i, 99]} for i in (40, 21)),
]


def image(i, name=None):
    height, width = SIZES[i]
    return {"id": 10 + i, "file_name": name or f"{i:03}.jpg", "height": height, "width": width}


@pytest.fixture
def inputs(tmp_path):
    """Results, annotations and stuff results; the last image but one has none of them."""
    folder, rng = tmp_path, np.random.default_rng(0)
    images = [image(0, "town/a.b/0.jpg"), *map(image, range(1, 5))]
    results, annotations, stuff = [], [], []
    for i, one in enumerate(images):
        size, count = (one["height"], one["width"]), 0 if i == 3 else 6
        segmentations = KINDS["text"](random_masks(i, count, size))
        for j, (x, score) in enumerate(zip(segmentations, rng.permutation(count) / 6 + 0.01)):
            entry = {"image_id": one["id"], "category_id": [3, 7, 12][j % 3], "segmentation": x}
            results.append({**entry, "score": float(score)})
            annotations.append({**entry, "id": len(annotations), "iscrowd": int(j == 5)})
        labels = rng.integers(0, 3, (size[0] // 8 + 1, size[1] // 8 + 1)).repeat(8, 0).repeat(8, 1)
        labels = labels[: size[0], : size[1]] * (count > 0)
        for label, category in ((1, 21), (2, 40)):
            (x,) = KINDS["text"]((labels == label)[None])
            stuff.append({"image_id": one["id"], "category_id": category, "segmentation": x})
    order = rng.permutation(len(results))
    write(folder / "results.json", [results[i] for i in order])  # of no image together
    write(folder / "stuff.json", stuff)
    write(folder / "images.json", {"info": {}, "images": images, "categories": CATEGORIES})
    header = {"images": images, "categories": CATEGORIES[:3]}
    write(folder / "annotations.json", {"annotations": annotations, **header})
    return folder


def write(path, content):
    path.write_text(json.dumps(content))


def run(folder, output, *options, instances="results.json"):
    files = ["--instances", folder / instances, "--output", folder / output]
    if instances == "results.json":
        files += ["--images", folder / "images.json"]
    assert command.main([*map(str, files), *map(str, options)]) == 0
    return json.loads((folder / f"{output}.json").read_text())


def refused(capsys, *args, **kwargs):
    with pytest.raises(SystemExit) as exit:
        run(*args, **kwargs)
    assert exit.value.code == 2
    return capsys.readouterr().err


def ids_of(folder, annotation):
    png = np.asarray(Image.open(folder / annotation["file_name"])).astype(int)
    assert png.ndim == 3
    return png @ (1, 256, 256**2)


def panopticapis(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(0, *args)


def quality(folder, truth, predicted):
    """PQ in percent, by panopticapi, of two JSONs in a folder."""
    jsons = [json.loads((folder / f"{x}.json").read_text()) for x in (truth, predicted)]
    entries = [{x["image_id"]: x for x in one["annotations"]} for one in jsons]
    pairs = [(entries[0][i], entries[1][i]) for i in entries[0]]
    categories = {c["id"]: c for c in jsons[1]["categories"]}
    stat = panopticapis(
        pq_compute_single_core, pairs, folder / truth, folder / predicted, categories
    )
    return 100 * stat.pq_average(categories, isthing=None)[0]["pq"]


def everything(folder, output):
    files = [folder / f"{output}.json", *sorted((folder / output).rglob("*.png"))]
    return [(x.relative_to(folder).as_posix().removeprefix(output), x.read_bytes()) for x in files]


def test_in_the_order_of_scores_it_is_panopticapis_script(inputs):
    semantic = ["--semantic", inputs / "stuff.json", "--stuff-area", 64]
    ours = run(inputs, "ours", "--order", "score", *semantic)
    images = {x["id"]: x for x in json.loads((inputs / "images.json").read_text())["images"]}
    assert ours["categories"] == CATEGORIES and ours["images"] == [*images.values()]
    results, stuff = (
        {i: [x for x in json.loads((inputs / name).read_text()) if x["image_id"] == i] for i in images}
        for name in ("results.json", "stuff.json")
    )
    for i, entries in results.items():
        confident = [x for x in entries if x["score"] >= 0.5]
        results[i] = sorted(confident, key=lambda x: -x["score"])
    (inputs / "theirs/town/a.b").mkdir(parents=True)
    how = str(inputs / "theirs"), 0.5, 64, {c["id"]: c for c in CATEGORIES}
    theirs = panopticapis(combine_to_panoptic_single_core, [*images], images, results, stuff, *how)
    assert len(theirs) == len(ours["annotations"]) == 5
    for a, b in zip(ours["annotations"], theirs):
        assert a["image_id"] == b["image_id"] and a["file_name"] == b["file_name"]
        ids = ids_of(inputs / "ours", a), ids_of(inputs / "theirs", b)
        category = {x["id"]: x["category_id"] for x in a["segments_info"]}
        same = {*zip(*(x.ravel().tolist() for x in ids))} - {(0, 0)}
        assert [len({x[k] for x in same}) for k in (0, 1)] == [len(same)] * 2  # one to one
        expected = {(x["category_id"], x["id"]) for x in b["segments_info"]}
        assert {(category[x], y) for x, y in same} == expected
        for x in a["segments_info"]:
            rows, columns = np.nonzero(ids[0] == x["id"])
            left, top = columns.min(), rows.min()
            assert x["area"] == len(rows) and x["iscrowd"] == 0
            assert x["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
    found = [x["category_id"] for a in ours["annotations"] for x in a["segments_info"]]
    assert sum(c in (21, 40) for c in found) > 3


def test_annotations_become_a_ground_truth(inputs):
    made = run(inputs, "truth", "--order", "smaller_first", instances="annotations.json")
    entries = json.loads((inputs / "annotations.json").read_text())["annotations"]
    for one, annotation in zip(made["images"], made["annotations"]):
        of_image = [x for x in entries if x["image_id"] == one["id"]]
        size = one["height"], one["width"]
        expected = paint(of_image, order="smaller_first", overlap_threshold=1, image_size=size)
        assert (ids_of(inputs / "truth", annotation) == expected.panoptic_seg).all()
        found = [(x["category_id"], x["iscrowd"]) for x in annotation["segments_info"]]
        assert found == [(x["category_id"], x.get("iscrowd", 0)) for x in expected.segments_info]
    assert sum(x["iscrowd"] for a in made["annotations"] for x in a["segments_info"]) > 0
    assert quality(inputs, "truth", "truth") == 100


def printed_table(capsys):
    lines = capsys.readouterr().out.splitlines()
    header, _, *rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line]
    return {row[0]: dict(zip(header, row)) for row in rows}


def test_the_table_of_orders_by_one_process_and_by_two(inputs, capsys):
    run(inputs, "truth", "--order", "lower_first", instances="annotations.json")
    everyone, options = ["--score-threshold", 0], ["--gt", inputs / "truth.json"]
    run(inputs, "smaller_first", "--order", "smaller_first", *everyone, *options)
    table = printed_table(capsys)
    run(inputs, "by_two", "--order", "smaller_first", *everyone, *options, "--processes", 2)
    assert printed_table(capsys) == table
    assert everything(inputs, "by_two") == everything(inputs, "smaller_first")
    assert [*table] == ["score", "smaller_first", "lower_first", "oracle"]
    assert float(table["oracle"]["closure"]) == 1 and float(table["score"]["closure"]) == 0
    assert float(table["oracle"]["order precision"]) > float(table["score"]["order precision"])
    for order in ("score", "lower_first"):
        run(inputs, order, "--order", order, *everyone)
    for order in ("score", "smaller_first", "lower_first"):
        pq = quality(inputs, "truth", order)
        assert float(table[order]["PQ"]) == pytest.approx(pq, abs=0.051)
    run(inputs, "again", "--order", "lower_first", *options, instances="annotations.json")
    assert [*printed_table(capsys)] == ["smaller_first", "lower_first", "oracle"]  # without scores


def test_a_truth_whose_png_has_other_ids(inputs, capsys):
    run(inputs, "truth", "--order", "lower_first", instances="annotations.json")
    png = sorted((inputs / "truth").rglob("*.png"))[0]
    pixels = np.array(Image.open(png))
    Image.fromarray(np.where(pixels > 0, pixels + 100, 0).astype(np.uint8)).save(png)
    options = ["--order", "score", "--gt", inputs / "truth.json"]
    assert re.search(r"shows the ids \[.*does not list", refused(capsys, inputs, "out", *options))


def test_a_learned_order(inputs, capsys):
    path = inputs / "order.safetensors"
    torch.manual_seed(0)
    names = ["thing 12", "another", "thing 3", "thing 7"]
    LearnedOrder(PairNetwork(4, GEOMETRY_NUMBERS, 0), names, 4, 32, 64).save(path)
    made = run(inputs, "out", "--order", path, "--score-threshold", 0)
    entries = json.loads((inputs / "results.json").read_text())
    things = {c["id"]: c["name"] for c in CATEGORIES}
    for one, annotation in zip(made["images"], made["annotations"]):
        of_image = [x for x in entries if x["image_id"] == one["id"]]
        size = one["height"], one["width"]
        expected = paint(of_image, order=path, class_names=things, image_size=size)
        assert (ids_of(inputs / "out", annotation) == expected.panoptic_seg).all()
    path = inputs / "of_fewer_classes.safetensors"
    LearnedOrder(PairNetwork(1, GEOMETRY_NUMBERS, 0), names[:1], 4, 32, 64).save(path)
    error = refused(capsys, inputs, "unknown", "--order", path)
    assert re.search(r"does not know \['thing [37]'", error)


def break_entry(inputs, image_id=12, **change):
    entries = json.loads((inputs / "results.json").read_text())
    broken = next(x for x in entries if x["image_id"] == image_id and x["score"] > 0.5)
    broken.update(change or {"segmentation": {**broken["segmentation"], "counts": "0`"}})
    write(inputs / "results.json", entries)
    return entries, broken


def test_an_interrupted_run_goes_on(inputs, capsys):
    run(inputs, "whole", "--order", "score")
    whole = (inputs / "results.json").read_bytes()
    break_entry(inputs)
    error = refused(capsys, inputs, "out", "--order", "score")
    assert "results.json, image 12" in error and "9 x 80" in error and "--skip-broken" in error
    assert not (inputs / "out.json").exists()
    unfinished = inputs / "out.unfinished"
    assert len(unfinished.read_text().splitlines()) == 1 + 2
    unfinished.write_text(unfinished.read_text()[:-9])  # the end of its last line was not written
    (inputs / "results.json").write_bytes(whole)
    error = refused(capsys, inputs, "out", "--order", "lower_first")
    assert "other options: {'order': 'score'}" in error
    before = (inputs / "out/town/a.b/0.png").stat().st_mtime_ns
    run(inputs, "out", "--order", "score")
    assert everything(inputs, "out") == everything(inputs, "whole")
    assert (inputs / "out/town/a.b/0.png").stat().st_mtime_ns == before
    assert not unfinished.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": {"size": [3, 3], "counts": [9]}},
        {"segmentation": []},
        {"category_id": 21},  # stuff
        {"category_id": [3]},
        {"score": float("nan")},
        {"score": "high"},
    ],
    ids=str,
)
def test_broken_instances(inputs, change, capsys, caplog):
    entries, broken = break_entry(inputs, **change)
    assert "results.json, image 12" in refused(capsys, inputs, "out", "--order", "score")
    run(inputs, "skipped", "--order", "score", "--skip-broken")
    assert caplog.text.count("It is left out") == 1 and "image 12" in caplog.text
    write(inputs / "results.json", [x for x in entries if x is not broken])
    run(inputs, "without", "--order", "score")
    run(inputs, "out", "--order", "score", "--skip-broken")  # it goes on
    for output in ("skipped", "out"):
        assert everything(inputs, output) == everything(inputs, "without")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"images": [image(0, "1.jpg"), image(1, "1.png")]}, "2 of the images.*1.png"),
        ({"images": [image(0), {**image(1), "id": 10}]}, "2 of the images.* id 10"),
        ({"images": [{**image(0), "height": None}]}, "'height'"),
        ({"images": [image(0, "../0.jpg")]}, "without '..'"),
        ({"images": [image(0, "/tmp/0.jpg")]}, "relative"),
        ({"images": [{**image(0), "id": "10"}]}, "image 1[0-9], .*images.json has not"),
        ({"images": []}, "no images"),
        ({"categories": CATEGORIES[:1] * 2}, "2 of the categories .* id 3"),
        ({"categories": [{"id": "3", "name": "x"}]}, "'id', int"),
    ],
)
def test_images_that_would_be_lost(inputs, change, words, capsys):
    header = {"images": [image(0), image(1)], "categories": CATEGORIES}
    write(inputs / "images.json", {**header, **change})
    assert re.search(words, refused(capsys, inputs, "out", "--order", "score"))
    assert not (inputs / "out").exists() and not (inputs / "out.unfinished").exists()


def test_options_that_cannot_be(inputs, capsys):
    assert "none of" in refused(capsys, inputs, "out", "--order", "largest")
    assert "nowhere" in refused(capsys, inputs, "out", "--order", inputs / "nowhere.safetensors")
    by_score = ["--order", "score"]
    assert "nowhere" in refused(capsys, inputs, "out", *by_score, "--gt", inputs / "nowhere.json")
    with pytest.raises(SystemExit):
        command.main(["--instances", str(inputs / "results.json"), "--output", "out", *by_score])
    assert "--images must name" in capsys.readouterr().err
    write(inputs / "stuff.json", [{"image_id": 10, "category_id": 5, "segmentation": None}])
    error = refused(capsys, inputs, "out", *by_score, "--semantic", inputs / "stuff.json")
    assert "stuff.json, image 10" in error and "5" in error
    run(inputs, "out", *by_score)  # nothing was painted with the other options


def test_nothing_is_replaced(inputs, capsys):
    run(inputs, "out", "--order", "score")
    before = everything(inputs, "out")
    assert "exists" in refused(capsys, inputs, "out", "--order", "lower_first")
    (inputs / "pictures").mkdir()
    (inputs / "pictures" / "001.png").write_text("an image")
    assert "exists" in refused(capsys, inputs, "pictures", "--order", "score")
    kept = (inputs / "annotations.json").read_bytes()
    options = {"instances": "annotations.json"}
    assert "exists" in refused(capsys, inputs, "annotations", "--order", "lower_first", **options)
    assert everything(inputs, "out") == before
    assert (inputs / "annotations.json").read_bytes() == kept


SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "detectron2", "fvcore", "cv2", "scipy"]))
from oanet_d2.paint import main
main(sys.argv[1:])
"""


def test_without_pytorch_detectron2_and_opencv(inputs, subprocess_env):
    run(inputs, "here", "--order", "smaller_first", "--semantic", inputs / "stuff.json")
    files = {x: inputs / f"{x}.json" for x in ("images", "results", "stuff")}
    args = ["--images", files["images"], "--instances", files["results"], "--semantic", files["stuff"]]
    args += ["--order", "smaller_first", "--output", inputs / "there"]
    command = [sys.executable, "-c", SCRIPT, *map(str, args)]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert everything(inputs, "here") == everything(inputs, "there")
