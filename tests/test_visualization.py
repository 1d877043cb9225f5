import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import MetadataCatalog

from oanet_d2.visualization import (
    GAP,
    MARK,
    PANEL_SIDE,
    TITLE_HEIGHT,
    OrderPictures,
    changed_pixels,
    draw_side_by_side,
)

METADATA = MetadataCatalog.get("occlusion_scenes_val")


def thing(i, category, instance):
    return {"id": i, "category_id": category, "isthing": True, "instance_id": instance}


def stuff(i, category):
    return {"id": i, "category_id": category, "isthing": False}


def test_changed_pixels_by_hand():
    before = np.array([[1, 2, 2, 3]]), [thing(1, 4, 0), thing(2, 5, 1), stuff(3, 4)]
    # The same instances under other ids.
    after = np.array([[2, 2, 3, 4]]), [thing(2, 4, 0), thing(3, 5, 1), stuff(4, 4)]
    assert changed_pixels(before, after).tolist() == [[False, True, False, False]]


def squares(on_top):
    """Two overlapping squares over sky in 48 x 48 pixels. They share [18, 30) in both directions."""
    ids = torch.full((48, 48), 3, dtype=torch.int32)
    for i in (3 - on_top, on_top):
        part = slice(6, 30) if i == 1 else slice(18, 42)
        ids[part, part] = i
    return ids, [thing(1, 0, 0), thing(2, 1, 1), stuff(3, 1)]


def test_side_by_side():
    image = np.zeros((48, 48, 3), np.uint8)
    before, after = squares(1), squares(2)
    changed = changed_pixels(before, after)
    assert changed.sum() == 12 * 12 and changed[18:30, 18:30].all()
    results = {"ground truth": after, "score": before, "srm_pairs": after}
    picture = draw_side_by_side(image, results, METADATA, changed)
    assert picture.shape == (PANEL_SIDE + TITLE_HEIGHT, 4 * PANEL_SIDE + 3 * GAP, 3)
    starts = [k * (PANEL_SIDE + GAP) for k in range(4)]
    panels = [picture[TITLE_HEIGHT:, x : x + PANEL_SIDE] for x in starts]
    assert (panels[0] == 0).all() and (panels[1] == panels[3]).all()
    for panel in panels[1:]:  # outlined where the squares overlap, and nowhere else
        rows, columns = np.nonzero((panel == MARK).all(axis=2))
        for x in (rows, columns):
            assert 175 <= x.min() <= 183 and 296 <= x.max() <= 304
    # In the overlap a panel shows the color of the square that lies on top.
    middle, first, second = (210, 210), (120, 120), (350, 350)
    assert np.abs(panels[2][middle].astype(int) - panels[2][first]).max() < 8
    assert np.abs(panels[3][middle].astype(int) - panels[3][second]).max() < 8
    assert np.abs(panels[2][middle].astype(int) - panels[3][middle]).max() > 30


@pytest.mark.parametrize("size", [(500, 2), (2, 500), (2000, 1), (1, 2000), (1, 1), (2000, 2)])
def test_narrow_pictures(size):
    image = np.full((*size, 3), 90, np.uint8)
    ids = np.ones(size, np.int32)
    ids[size[0] // 2 :, size[1] // 2 :] = 2
    result = ids, [thing(1, 0, 0), stuff(2, 1)]
    nothing = np.zeros(size, np.int32), []
    picture = draw_side_by_side(
        image, {"score": nothing, "oracle": result}, METADATA, changed_pixels(nothing, result)
    )
    height = max(1, round(size[0] * PANEL_SIDE / max(size)))
    assert picture.shape[0] == height + TITLE_HEIGHT
    assert (picture[TITLE_HEIGHT:] == MARK).all(axis=2).any()


def write_images(folder, count):
    """Dataset dicts of images of 8 x 8 that show one thing."""
    dicts = []
    for i in range(count):
        names = folder / f"image{i}.png", folder / f"truth{i}.png"
        Image.new("RGB", (8, 8)).save(names[0])
        Image.new("RGB", (8, 8), (1, 0, 0)).save(names[1])
        image, truth = map(str, names)
        segments = [{**thing(1, 0, 0), "iscrowd": 0}]
        dicts.append({"image_id": i, "file_name": image, "pan_seg_file_name": truth})
        dicts[-1]["segments_info"] = segments
    return dicts


def add(pictures, input, pixels):
    """`oracle` has this many pixels right, `score` none."""
    gt_ids = np.ones((8, 8), np.int32)
    ids = torch.zeros(64, dtype=torch.int32)
    ids[:pixels] = 1
    oracle = ids.reshape(8, 8), [thing(1, 0, 0)]
    nothing = torch.zeros(8, 8, dtype=torch.int32), []
    pictures.add(input, gt_ids, {"score": nothing, "oracle": oracle})


@pytest.fixture
def pictures(tmp_path):
    folder = str(tmp_path / "pictures")
    return OrderPictures("occlusion_scenes_val", folder, 2, ("score", "oracle"))


def test_the_greatest_gains_are_kept(pictures, tmp_path):
    inputs = write_images(tmp_path, 4)
    for input, pixels in zip(inputs, (5, 20, 0, 9)):
        add(pictures, input, pixels)
    paths = pictures.save()
    assert [x.rsplit("/", 1)[1] for x in paths] == ["01_image1.png", "02_image3.png"]
    with Image.open(paths[0]) as picture:
        assert picture.size == (4 * PANEL_SIDE + 3 * GAP, PANEL_SIDE + TITLE_HEIGHT)


def test_equal_gains_of_one_image(pictures, tmp_path):
    (input,) = write_images(tmp_path, 1)
    for _ in range(4):
        add(pictures, input, 7)
    assert len(pictures.save()) == 2


def test_only_its_own_pictures_are_replaced(pictures, tmp_path):
    inputs = write_images(tmp_path, 3)
    add(pictures, inputs[0], 5)
    add(pictures, inputs[1], 9)
    pictures.save()
    for name in ("holiday.png", "01_holiday.png", "notes.txt"):
        (tmp_path / "pictures" / name).write_text("somebody's")
    pictures.reset()
    add(pictures, inputs[2], 5)
    pictures.save()
    names = sorted(x.name for x in (tmp_path / "pictures").iterdir())
    others = ["01_holiday.png", "holiday.png", "notes.txt"]
    assert [x for x in names if x != "written.txt"] == sorted(["01_image2.png", *others])
    assert all((tmp_path / "pictures" / x).read_text() == "somebody's" for x in others)
