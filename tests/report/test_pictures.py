import base64
import io

import numpy as np
import pytest
from panopticapi.utils import rgb2id
from PIL import Image

from detectron2.data import detection_utils as utils

from oanet_d2.report import load_report
from oanet_d2.report.pictures import EDGE, FILL, LABEL_SHARE, case_pictures, draw_layer, labels
from oanet_d2.visualization import MARK
from tests.conftest import thing
from tests.report.conftest import IMAGE_SIZE

RED, GREEN, BLUE = [200, 0, 0], [0, 200, 0], [0, 0, 200]
CLASSES = {
    (True, 0): {"name": "person", "color": RED},
    (True, 1): {"name": "tie", "color": GREEN},
    (False, 1): {"name": "sky", "color": BLUE},
}


def scene():
    """48 x 24: sky on the left half, a person in it, a tie on the person; void on the right."""
    ids = np.zeros((24, 48), dtype=np.int64)
    ids[:, :24] = 3
    ids[4:24, 6:18] = 1
    ids[10:14, 10:14] = 2
    return ids, [thing(1, 0), thing(2, 1), {"id": 3, "category_id": 1, "isthing": False}]


def test_layer_shows_each_segment_in_its_color():
    layer = draw_layer(scene(), CLASSES)
    assert layer.shape == (240, 480, 4)
    at = {"sky": (20, 30), "person": (200, 100), "tie": (120, 120), "void": (120, 400)}
    assert layer[at["sky"]].tolist() == [*BLUE, FILL]
    assert layer[at["person"]].tolist() == [*RED, FILL]
    assert layer[at["tie"]].tolist() == [*GREEN, FILL]
    assert layer[at["void"]].tolist() == [0, 0, 0, 0]
    # every pixel is one of these or an edge, and what is inside belongs to its segment
    owner = np.kron(scene()[0], np.ones((10, 10)))
    edge = (layer == EDGE).all(-1)
    assert 0.005 < edge.mean() < 0.02
    for i, color in ((1, RED), (2, GREEN), (3, BLUE)):
        shown = (layer == [*color, FILL]).all(-1)
        assert (shown[owner == i] | edge[owner == i]).mean() > 0.98  # corners are rounded
        assert shown[owner != i].mean() < 0.01
    # an instance's whole silhouette has an edge, also inside, where another lies on it
    assert edge[95:105, 110:130].any() and edge[35:45, 70:170].any()


def test_what_changed_is_outlined():
    changed = np.zeros((24, 48), dtype=bool)
    changed[10:14, 30:40] = True
    layer = draw_layer(scene(), CLASSES, changed)
    marked = (layer == (*MARK, 255)).all(-1)
    rows, columns = np.nonzero(marked)
    assert 96 <= rows.min() <= 104 and 136 <= rows.max() <= 144
    assert 296 <= columns.min() <= 304 and 396 <= columns.max() <= 404
    assert not marked[110:130, 310:390].any()  # the outline, not the inside
    assert not (draw_layer(scene(), CLASSES) == (*MARK, 255)).all(-1).any()


def test_large_and_narrow_pictures():
    ids = np.zeros((960, 4), dtype=np.int64)
    assert draw_layer((ids, []), CLASSES).shape == (480, 2, 4)
    assert draw_layer((ids[:, :1], []), CLASSES).shape == (480, 1, 4)


def test_labels_stand_in_their_segments():
    ids, segments = scene()
    found = {x.text: x for x in labels((ids, segments), CLASSES)}
    assert list(found) == ["person", "tie", "sky"]
    for name, i in (("person", 1), ("tie", 2), ("sky", 3)):
        x, y = found[name].x / 100 * 48, found[name].y / 100 * 24
        assert ids[int(y), int(x)] == i
    # the middle of the tie, as far as there is one
    assert found["tie"].x / 100 * 48 == pytest.approx(12, abs=1)
    assert found["tie"].y / 100 * 24 == pytest.approx(12, abs=1)
    assert found["tie"].isthing and not found["sky"].isthing


def test_small_segments_have_no_label():
    ids = np.zeros((100, 100), dtype=np.int64)
    ids.flat[: int(LABEL_SHARE * 10_000) - 1] = 1
    assert labels((ids, [thing(1, 0)]), CLASSES) == []
    ids.flat[: int(LABEL_SHARE * 10_000)] = 1
    assert [x.text for x in labels((ids, [thing(1, 0)]), CLASSES)] == ["person"]


def decode(uri):
    head, content = uri.split(",", 1)
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_pictures_of_a_case(evaluated):
    report = load_report(str(evaluated))
    classes = {(c["isthing"], c["category_id"]): c for c in report["classes"]}
    for case in report["cases"][:2]:
        pictures = case_pictures(str(evaluated), case, classes)
        assert decode(pictures["photo"]).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        layers = {}
        for key in ("before", "after", "ground_truth"):
            layers[key] = decode(pictures[key].uri)
            assert layers[key].shape == (480, 480, 4)
            path = evaluated / "report" / case[key]["file"]
            ids = np.kron(rgb2id(utils.read_image(str(path), "RGB")), np.ones((5, 5)))
            right = total = 0
            for s in case[key]["segments_info"]:
                color = classes[s["isthing"], s["category_id"]]["color"]
                inside = layers[key][ids == s["id"]]
                # lossless: the very color, but for edges
                right += (inside == [*color, FILL]).all(-1).sum()
                total += len(inside)
            assert right > 0.85 * total > 0
        assert (layers["before"] != layers["after"]).any()
        for key, marked in (("before", True), ("after", True), ("ground_truth", False)):
            assert (layers[key] == (*MARK, 255)).all(-1).any() == marked
