"""
What an evaluation leaves for the report, against slower ways to the same numbers.
"""

import os
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from panopticapi.utils import rgb2id
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils

from oanet_d2.evaluation import report_data
from oanet_d2.evaluation.oracle import oracle_order
from oanet_d2.evaluation.pair_accuracy import pair_decisions
from oanet_d2.evaluation.report_data import SIDE, shrunk_size
from oanet_d2.modeling.semantic_labels import semantic_labels
from oanet_d2.report import load_report
from oanet_d2.report.tables import panoptic_quality
from oanet_d2.visualization import pixel_gain
from tests.report.conftest import NUM_IMAGES, ORDERS, file_names, gt_ids_of, read_json


@pytest.fixture(scope="module")
def content(evaluated):
    return read_json(evaluated)


@pytest.fixture(scope="module")
def expected(evaluation):
    """For every image: its input, and for every order the panoptic result and the decisions."""
    model, images = evaluation.model, []
    for i, d in enumerate(evaluation.inputs):
        output = model(d, wrong=i >= NUM_IMAGES - 3)
        instances, ids = output["instances"], gt_ids_of(d)
        masks = instances.pred_masks & (instances.scores >= 0.5)[:, None, None]
        oracle = oracle_order(
            masks, instances.scores, instances.pred_classes, ids, d["segments_info"]
        )
        evidence = output["ranking_evidence"]
        orders = {"score": evidence.order("score"), "srm_pairs": evidence.order("srm_pairs")}
        orders["oracle"] = oracle
        semantic = semantic_labels(output["sem_seg"], True)
        results, decisions = {}, {}
        for name, order in orders.items():
            results[name] = model.combine(instances.pred_masks, instances, semantic, order)
            decisions[name] = pair_decisions(
                masks, instances.pred_classes, order, ids, d["segments_info"]
            )
        images.append((d, ids, results, decisions))
    return images


def gain(image, before, after):
    d, ids, results, _ = image
    return pixel_gain((ids, d["segments_info"]), results[before], results[after])


def test_class_counts_average_to_panopticapis_metrics(content):
    for order, metrics in content["orderings"].items():
        for suffix, kinds in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
            pq = [
                panoptic_quality(c["counts"][order])
                for c in content["classes"]
                if c["isthing"] in kinds
            ]
            assert np.mean([x for x in pq if x is not None]) == pytest.approx(
                metrics["PQ" + suffix]
            )


def test_class_counts_are_of_the_right_class(content, evaluation):
    """tp + fn is the number of segments in the ground truth, whatever the order."""
    segments = Counter(
        (s["isthing"], s["category_id"]) for d in evaluation.inputs for s in d["segments_info"]
    )
    metadata = MetadataCatalog.get(evaluation.dataset_name)
    assert len(content["classes"]) == 8 + 6
    for c in content["classes"]:
        names = metadata.thing_classes if c["isthing"] else metadata.stuff_classes
        assert c["name"] == names[c["category_id"]]
        for counts in c["counts"].values():
            assert counts["tp"] + counts["fn"] == segments[c["isthing"], c["category_id"]]


def test_pairs_are_those_of_all_images(content, expected):
    overlaps, right = Counter(), Counter()
    for _, _, _, decisions in expected:
        for order in ORDERS:
            for d in decisions[order]:
                overlaps[d.front, d.behind, d.kind] += order == "score"
                right[d.front, d.behind, d.kind, order] += d.right
    assert len(content["pairs"]) == len(overlaps) > 3
    for p in content["pairs"]:
        key = p["front"], p["behind"], p["kind"]
        assert p["overlaps"] == overlaps[key]
        assert p["right"] == {order: right[(*key, order)] for order in ORDERS}


def test_outcomes_and_cases(content, expected):
    gains = [gain(image, "score", "srm_pairs") for image in expected]
    assert content["outcomes"] == {
        "better": sum(g > 0 for g in gains),
        "worse": sum(g < 0 for g in gains),
        "same": sum(g == 0 for g in gains),
    }
    assert min(gains) < 0 < max(gains)
    left = [gain(image, "srm_pairs", "oracle") for image in expected]
    for section, expected_pixels in (
        ("won", sorted((g for g in gains if g > 0), reverse=True)[:3]),
        ("lost", sorted(g for g in gains if g < 0)[:3]),
        ("still_wrong", sorted((g for g in left if g > 0), reverse=True)[:3]),
    ):
        found = [c["pixels"] for c in content["cases"] if c["section"] == section]
        assert found == expected_pixels and found


def test_cases_hold_the_pictures_and_results(content, expected, evaluated):
    by_id = {image[0]["image_id"]: image for image in expected}
    for case in content["cases"]:
        d, ids, results, decisions = by_id[case["image_id"]]
        assert case["file_name"] == os.path.basename(d["file_name"])
        shown = dict(zip(("before", "after"), (results[order] for order in case["orders"])))
        shown["ground_truth"] = ids, d["segments_info"]
        owners = {}
        for key, (panoptic_seg, segments_info) in shown.items():
            path = evaluated / "report" / case[key]["file"]
            saved = rgb2id(utils.read_image(str(path), "RGB"))
            assert np.array_equal(saved, np.asarray(panoptic_seg))
            fields = ("id", "category_id", "isthing")
            wanted = [{k: s[k] for k in fields} for s in segments_info]
            assert [{k: s[k] for k in fields} for s in case[key]["segments_info"]] == wanted
            owners[key] = {
                (s["category_id"], s.get("instance_id")): frozenset(
                    np.flatnonzero(np.asarray(panoptic_seg) == s["id"]).tolist()
                )
                for s in segments_info
                if s["isthing"]
            }
        changed = {
            c
            for c, i in {*owners["before"], *owners["after"]}
            if owners["before"].get((c, i)) != owners["after"].get((c, i))
        }
        assert case["classes"] == sorted(changed)
        assert [p["pixels"] for p in case["pairs"]] == [x.pixels for x in decisions["score"]]
        for order in ORDERS:
            assert [p["right"][order] for p in case["pairs"]] == [x.right for x in decisions[order]]
        photo = Image.open(evaluated / "report" / case["photo"])
        assert photo.format == "WEBP" and photo.size == (case["width"], case["height"])
        image = utils.read_image(d["file_name"], "RGB").astype(int)
        assert np.abs(np.asarray(photo).astype(int) - image).mean() < 12


def test_two_processes_are_as_one(evaluation, evaluated, tmp_path):
    """What each of two processes gathered, put together as `comm.gather` does."""
    parts = [evaluation.recorder(tmp_path) for _ in range(2)]
    for rank, part in enumerate(parts):
        evaluation.evaluator(part, images=range(rank, NUM_IMAGES, 2))
    gathered = []
    with (
        mock.patch.object(report_data.comm, "gather", side_effect=gathered.append),
        mock.patch.object(report_data.comm, "is_main_process", return_value=False),
    ):
        for part in parts:
            part.save(0, 0.0, {}, {})
    assert not (tmp_path / "report").exists()  # the main process writes, nobody else
    one = read_json(evaluated)
    counts = {
        order: {i: c["counts"][order] for i, c in zip(ids_of(evaluation), one["classes"])}
        for order in ORDERS
    }
    with mock.patch.object(report_data.comm, "gather", return_value=gathered):
        parts[0].save(one["images"], one["seconds"], one["orderings"], counts)
    assert read_json(tmp_path) == one
    assert file_names(tmp_path) == file_names(evaluated)


def ids_of(evaluation):
    m = MetadataCatalog.get(evaluation.dataset_name)
    return [*m.thing_dataset_id_to_contiguous_id, *m.stuff_dataset_id_to_contiguous_id]


def test_a_later_evaluation_replaces_an_earlier_one(evaluation, folder):
    before = file_names(folder)
    (folder / "report" / "notes.txt").write_text("mine")
    evaluation.evaluator(evaluation.recorder(folder, max_cases=1)).evaluate()
    content = read_json(folder)
    assert len(content["cases"]) == 3
    named = {case["photo"] for case in content["cases"]}
    named |= {c[k]["file"] for c in content["cases"] for k in ("ground_truth", "before", "after")}
    assert set(file_names(folder)) == {*named, "evaluation.json", "notes.txt"}
    assert named < set(before)  # the same images are files of the same name


def test_an_interrupted_evaluation_leaves_the_earlier_one_whole(evaluation, folder):
    before = read_json(folder)
    replace = os.replace

    def break_at_the_end(source, target):
        if target.endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    evaluator = evaluation.evaluator(evaluation.recorder(folder, max_cases=2), images=range(3))
    with mock.patch("os.replace", break_at_the_end), pytest.raises(KeyboardInterrupt):
        evaluator.report.save(3, 1.0, before["orderings"], {})
    assert read_json(folder) == before
    load_report(str(folder))
    for case in before["cases"]:
        assert (folder / "report" / case["photo"]).exists()


def test_no_cases_are_asked_for(evaluation, tmp_path):
    evaluation.evaluator(evaluation.recorder(tmp_path, max_cases=0)).evaluate()
    assert read_json(tmp_path)["cases"] == []
    assert file_names(tmp_path) == ["evaluation.json"]


def test_colors_are_made_up_where_a_dataset_has_none(evaluation, tmp_path):
    recorder = evaluation.recorder(tmp_path)
    colorless = MetadataCatalog.get(evaluation.dataset_name).as_dict()
    colorless = {k: v for k, v in colorless.items() if not k.endswith("_colors")}
    recorder.metadata = type(recorder.metadata)(**colorless)
    evaluation.evaluator(recorder).evaluate()
    colors = [tuple(c["color"]) for c in read_json(tmp_path)["classes"]]
    assert len(set(colors)) == len(colors)  # no two alike


@pytest.mark.parametrize(
    "size, shrunk",
    [
        ((96, 96), (96, 96)),
        ((480, 480), (480, 480)),
        ((640, 480), (480, 360)),
        ((5000, 3), (480, 1)),
    ],
)
def test_large_images_are_shrunk(size, shrunk):
    assert SIDE == 480
    assert shrunk_size(*size) == shrunk


def test_order_of_some_by_hand():
    order = torch.tensor([3, 0, 4, 1, 2])
    chosen = torch.tensor([True, False, True, True, False])  # 0, 2, 3 become 0, 1, 2
    assert report_data._order_of_some(order, chosen).tolist() == [2, 0, 1]


def test_images_of_one_name_are_told_apart(evaluation, tmp_path):
    recorder = evaluation.recorder(tmp_path)
    root = recorder.metadata.image_root
    assert recorder._shown_name(f"{root}/a/1.jpg") == os.path.join("a", "1.jpg")
    assert recorder._shown_name(f"{root}/1.jpg") == "1.jpg"
    assert recorder._shown_name("/elsewhere/b/1.jpg") == "1.jpg"
