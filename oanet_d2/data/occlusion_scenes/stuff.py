"""The stuff of a scene: where sky, background and ground are, and their textures."""

import cv2
import numpy as np

from .categories import CATEGORIES, ID_OF
from .paints import colour_near, value_noise

# Stuff becomes its neighbour if less than this share of the image is visible.
LEAST_VISIBLE_AREA = 0.005

COLOURS = {
    "sky": [(140, 190, 235), (190, 205, 220), (235, 200, 170), (110, 150, 210)],
    "mountain": [(120, 120, 135), (110, 125, 105), (150, 130, 115), (95, 105, 130)],
    "grass": [(110, 150, 70), (150, 165, 80), (80, 125, 65), (165, 160, 95)],
    "road": [(120, 120, 124), (150, 142, 134), (95, 95, 104), (168, 160, 150)],
    "sand": [(220, 200, 150), (200, 178, 135), (228, 214, 185), (190, 160, 110)],
    "water": [(80, 130, 165), (90, 150, 150), (120, 150, 175), (70, 110, 130)],
}


def lay_out(rng: np.random.Generator, horizon: float, size: int) -> np.ndarray:
    """Return (size, size) int32 category ids, as if no thing stood in the scene."""
    rows = np.arange(size, dtype=np.float32)[:, None]
    columns = np.arange(size, dtype=np.float32)[None, :] / size
    stuff = np.full((size, size), ID_OF["sky"], dtype=np.int32)

    if rng.random() < 0.7:
        top = horizon * rng.uniform(0.4, 0.7)
        stuff[rows >= _wave(rng, size, top, 0.14, rng.integers(4, 9))] = ID_OF["mountain"]

    edge = _wave(rng, size, horizon, 0.012, rng.integers(3, 9))
    ground = rows >= edge
    first, second, third = rng.permutation(["grass", "road", "sand"])
    stuff[ground] = ID_OF[first]
    if rng.random() < 0.35:
        shore = edge + _wave(rng, size, rng.uniform(0.07, 0.16), 0.02, rng.integers(3, 7))
        stuff[ground & (rows < shore)] = ID_OF["water"]
    if rng.random() < 0.45:
        stuff[ground & _path(rng, (rows - edge) / (size * (1 - horizon)), columns)] = ID_OF[second]
    if rng.random() < 0.5:
        stuff[rows >= _wave(rng, size, rng.uniform(0.72, 0.9), 0.08, rng.integers(3, 7))] = ID_OF[third]
    if rng.random() < 0.5:
        patch = _patch(rng, rows / size, columns, rng.uniform(horizon + 0.2, 0.95))
        stuff[ground & patch] = ID_OF[rng.choice([second, third, "water"])]
    return stuff


def _wave(rng: np.random.Generator, size: int, level: float, height: float, bumps: int) -> np.ndarray:
    line = value_noise(rng, (1, size), (1, bumps))[0]
    return (level + height * (2 * line - 1)) * size


def _path(rng: np.random.Generator, nearness: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a winding path. `nearness` (H, W) is 0 at the horizon and 1 at the lower edge."""
    nearness = np.clip(nearness, 0, 1)
    near, far = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.7)
    middle = far + (near - far) * nearness + 0.1 * np.sin(nearness * rng.uniform(0, 3.5))
    ragged = 0.012 * value_noise(rng, (nearness.shape[0], 1), (9, 1))
    return np.abs(columns - middle) < 0.008 + rng.uniform(0.1, 0.2) * nearness + ragged


def _patch(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray, y: float) -> np.ndarray:
    x, half = rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.28)
    ragged = 0.8 + 0.6 * value_noise(rng, (rows.shape[0], columns.shape[1]), (6, 6))
    return ((columns - x) / half) ** 2 + ((rows - y) / (0.4 * half)) ** 2 < ragged


def merge_small(stuff: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Replace each class that is hardly visible by the nearest other class, unless all are."""
    visible = np.bincount(stuff[~covered], minlength=len(CATEGORIES) + 1)
    keep = (visible >= LEAST_VISIBLE_AREA * stuff.size)[stuff]
    if keep.all() or not keep.any():
        return stuff
    _, label = cv2.distanceTransformWithLabels(
        (~keep).astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
    )
    class_of_label = np.zeros(label.max() + 1, dtype=np.int32)
    class_of_label[label[keep]] = stuff[keep]
    return class_of_label[label]


def paint(rng: np.random.Generator, stuff: np.ndarray, horizon: float) -> np.ndarray:
    """Return (H, W, 3) float32 RGB, 0 to 255: the (H, W) category ids `stuff` in random textures."""
    tone = np.ones(stuff.shape, dtype=np.float32)
    palette = np.zeros((len(CATEGORIES) + 1, 3), dtype=np.float32)
    for name, colours in COLOURS.items():
        here = stuff == ID_OF[name]
        if here.any():
            palette[ID_OF[name]] = colour_near(rng, colours, 8)
            np.copyto(tone, _tone(rng, name, len(stuff), horizon), where=here)
    return palette[stuff] * tone[..., None]


def _tone(rng: np.random.Generator, name: str, size: int, horizon: float) -> np.ndarray:
    """Return (size, size) float32 around 1, a factor for the colour of the class."""
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None]

    def noise(rows: int, columns: int) -> np.ndarray:
        return value_noise(rng, (size, size), (rows, columns)) - 0.5

    if name == "sky":
        return 0.86 + 0.17 * down / horizon + 0.3 * np.clip(noise(9, 4) + 0.3 * noise(20, 10), 0, 1)
    if name == "mountain":
        return 1 + 0.45 * noise(10, 14) + 0.25 * noise(30, 34) - 0.2 * (down - horizon)
    if name == "grass":
        return 1 + 0.5 * noise(48, 96) + 0.3 * noise(6, 6)
    if name == "road":
        return 1 + 0.22 * noise(100, 100) + 0.14 * noise(8, 3)
    if name == "sand":
        ripples = np.sin(260 * down * (1.3 - 0.6 * down) + 14 * noise(5, 4))
        return 1 + 0.09 * ripples + 0.12 * noise(90, 90)
    return 1 + 0.5 * noise(60, 9) + 0.25 * noise(110, 26)  # water
