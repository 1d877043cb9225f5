import numpy as np
import pytest
import torch

from detectron2.data import MetadataCatalog

from oanet_d2.visualization import (
    GAP,
    MARK,
    PANEL_SIDE,
    TITLE_HEIGHT,
    changed_pixels,
    draw_panels,
    side_by_side,
)
from tests.conftest import thing

METADATA = MetadataCatalog.get("occlusion_scenes_val")


def squares(on_top):
    """Two overlapping squares over sky in 48 x 48 pixels. They share [18, 30) in both directions."""
    first, second = (4, 5) if on_top == 1 else (7, 6)  # ids differ from result to result
    ids = torch.full((48, 48), 3, dtype=torch.int32)
    for i in (3 - on_top, on_top):
        part = slice(6, 30) if i == 1 else slice(18, 42)
        ids[part, part] = first if i == 1 else second
    squares = [thing(first, 0, instance_id=0), thing(second, 1, instance_id=1)]
    return ids, [*squares, thing(3, 1, isthing=False)]


def test_side_by_side():
    image = np.zeros((48, 48, 3), np.uint8)
    before, after = squares(1), squares(2)
    changed = changed_pixels(before, after)
    assert changed.sum() == 12 * 12 and changed[18:30, 18:30].all()
    results = {"ground truth": after, "score": before, "srm_pairs": after}
    picture = side_by_side(draw_panels(image, results, METADATA, changed))
    assert picture.shape == (PANEL_SIDE + TITLE_HEIGHT, 4 * PANEL_SIDE + 3 * GAP, 3)
    panels = [picture[TITLE_HEIGHT:, k * (PANEL_SIDE + GAP) :][:, :PANEL_SIDE] for k in range(4)]
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
    result = ids, [thing(1, 0, instance_id=0), thing(2, 1, isthing=False)]
    nothing = np.zeros(size, np.int32), []
    changed = changed_pixels(nothing, result)
    results = {"score": nothing, "oracle": result}
    picture = side_by_side(draw_panels(image, results, METADATA, changed))
    height = max(1, round(size[0] * PANEL_SIDE / max(size)))
    assert picture.shape[0] == height + TITLE_HEIGHT
    assert (picture[TITLE_HEIGHT:] == MARK).all(axis=2).any()
