"""
How things of OcclusionScenes are drawn: paints, painted polygons, and their way into pixels.

Polygons are (N, 2) float x, y in *drawing units*: 1.0 is one side of the image, for a thing on the
nearest ground. The origin is where the thing stands, or where its carrier holds it. y points down.
A colour is (3,) float32 RGB, 0 to 255.
"""

import colorsys
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike

Rng = np.random.Generator
Point = tuple[float, float]


@dataclass(frozen=True)
class Paint:
    """A texture of two colours. It covers the whole plane of a drawing, in drawing units."""

    pattern: str
    first: np.ndarray
    second: np.ndarray
    angle: float = 0.0  # radians
    period: float = 0.05  # length of one repetition
    seed: int = 0  # of the pattern "blotches"

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the colours at x (W,) and y (H,), float32, which broadcast to (H, W, 3)."""
        if self.pattern == "plain":
            return self.first
        # A Python float keeps the arrays float32. With a NumPy scalar, NumPy 2 would make them float64.
        turn, cos, sin = 2 * math.pi / self.period, math.cos(self.angle), math.sin(self.angle)
        along = turn * (cos * x[None, :] + sin * y[:, None])
        across = turn * (cos * y[:, None] - sin * x[None, :])
        if self.pattern == "stripes":
            mix = 0.5 + 2.5 * np.sin(along)
        elif self.pattern == "checks":
            mix = 0.5 + 4 * np.sin(along) * np.sin(across)
        elif self.pattern == "dots":
            mix = 4 * (np.cos(along) + np.cos(across) - 1.0)
        elif self.pattern == "blotches":
            bumps = value_noise(np.random.default_rng(self.seed), (len(y), len(x)), (7, 7))
            mix = 0.5 + 5 * (bumps - 0.5)
        else:  # gradient
            mix = np.linspace(0, 1, len(y), dtype=np.float32)[:, None]
        return self.first + np.clip(mix, 0, 1)[..., None] * (self.second - self.first)


def any_paint(rng: Rng, colour: np.ndarray, period: float, patterns: tuple[str, ...]) -> Paint:
    """Return a paint of `colour`: plain, or one of `patterns` with repetitions of about `period`."""
    pattern = "plain" if rng.random() < 0.6 else patterns[rng.integers(len(patterns))]
    if rng.random() < 0.8:
        second = toned(colour, rng.uniform(*((0.55, 0.75) if colour.mean() > 90 else (1.5, 2.0))))
    else:
        second = any_colour(rng)
    angle = float(rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4]) + rng.normal(0, 0.06))
    period = float(period * rng.uniform(0.7, 1.4))
    return Paint(pattern, colour, second, angle, period, int(rng.integers(2**31)))


def any_colour(rng: Rng, saturation: float = 0.5) -> np.ndarray:
    hue, value = rng.random(), rng.uniform(0.2, 0.95)
    saturation = np.clip(rng.normal(saturation, 0.25), 0.0, 0.95)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def colour_near(rng: Rng, colours: list[tuple], spread: float = 14) -> np.ndarray:
    chosen = np.array(colours[rng.integers(len(colours))], dtype=np.float32)
    return np.clip(chosen + rng.normal(0, spread, 3), 5, 250).astype(np.float32)


def toned(colour: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(colour * factor, 0, 255).astype(np.float32)


def value_noise(rng: Rng, shape: tuple[int, ...], cells: tuple[int, int]) -> np.ndarray:
    """Return a smooth random field, `shape` float32, about 0 to 1, with `cells` bumps down and across."""
    return cv2.resize(rng.random(cells, dtype=np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)


@dataclass(eq=False)
class Drawing:
    """A thing as painted polygons, and its place in the image."""

    name: str
    carrier: "Drawing | None" = None  # what wears or carries it
    parts: list[tuple[np.ndarray, Paint]] = field(default_factory=list)  # later ones lie on top
    # Where other things are worn or stand, and the colours they should differ from, to be visible.
    anchors: dict[str, Point] = field(default_factory=dict)
    own_colours: list[np.ndarray] = field(default_factory=list)
    # Where the origin is, and the length of a drawing unit: shares of the image's side.
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0

    def add(self, polygon: ArrayLike, paint: Paint | ArrayLike) -> None:
        """Add a polygon in a paint or in one colour."""
        if not isinstance(paint, Paint):
            colour = np.asarray(paint, dtype=np.float32)
            paint = Paint("plain", colour, colour)
        self.parts.append((np.asarray(polygon, dtype=np.float64), paint))

    def resize(self, factor: float, side: int = 1) -> None:
        """Multiply all lengths by `factor`. With `side` -1 right becomes left."""
        stretch = np.array([side * factor, factor])
        self.parts = [(at * stretch, replace(p, period=p.period * factor)) for at, p in self.parts]
        self.anchors = {name: (x * stretch[0], y * factor) for name, (x, y) in self.anchors.items()}

    def box(self) -> np.ndarray:
        """(4,): left, top, right, bottom in the image."""
        points = np.concatenate([polygon for polygon, _ in self.parts]) * self.scale + (self.x, self.y)
        return np.concatenate([points.min(axis=0), points.max(axis=0)])


class Sprite(NamedTuple):
    """The pixels of one thing, in a window of the image."""

    window: tuple[slice, slice]  # rows, columns
    colour: np.ndarray  # (h, w, 3) float32 RGB, 0 to 255
    alpha: np.ndarray  # (h, w) float32, 0 to 1
    mask: np.ndarray  # (size, size) bool: the silhouette, where the thing covers half a pixel or more


def rasterise(thing: Drawing, size: int, light: Point) -> Sprite | None:
    """
    Draw a thing with soft edges and shading. The result is None if nothing is inside the image.

    Args:
        size: height and width of the image, pixels.
        light: (x, y), how much brighter the right and the lower end of the thing are, -1 to 1.
    """
    scale, origin = thing.scale * size, (thing.x * size, thing.y * size)
    polygons = [polygon * scale + origin for polygon, _ in thing.parts]
    points = np.concatenate(polygons)
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - 2, 0)
    right, bottom = np.clip(np.ceil(points.max(axis=0)).astype(int) + 3, 0, size)
    x = ((np.arange(left, right) + 0.5 - origin[0]) / scale).astype(np.float32)
    y = ((np.arange(top, bottom) + 0.5 - origin[1]) / scale).astype(np.float32)
    colour = np.zeros((len(y), len(x), 3), dtype=np.float32)
    coverage = np.zeros((len(y), len(x)), dtype=np.uint8)
    for polygon, (_, paint) in zip(polygons, thing.parts):
        polygon = polygon - (left, top)
        x0, y0 = np.maximum(np.floor(polygon.min(axis=0)).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + 2, (len(x), len(y)))
        if x1 <= x0 or y1 <= y0:
            continue
        mask = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
        # fillPoly takes sixteenths of pixels. Its pixel centres are the whole numbers, ours the halves.
        fixed = np.round((polygon - (x0, y0) - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(mask, [fixed], (255,), lineType=cv2.LINE_AA, shift=4)
        share = (mask.astype(np.float32) / 255)[..., None]
        part = slice(y0, y1), slice(x0, x1)
        colour[part] += share * (paint.at(x[x0:x1], y[y0:y1]) - colour[part])
        np.maximum(coverage[part], mask, out=coverage[part])
    alpha = coverage.astype(np.float32) / 255
    window, mask = (slice(top, bottom), slice(left, right)), np.zeros((size, size), dtype=bool)
    mask[window] = alpha >= 0.5
    if not mask.any():
        return None
    across = np.linspace(-0.5, 0.5, len(x), dtype=np.float32)[None, :] * light[0]
    down = np.linspace(-0.5, 0.5, len(y), dtype=np.float32)[:, None] * light[1]
    # A dark edge separates two things of one colour, as the turn of a round surface does.
    blurred = cv2.GaussianBlur(alpha, (0, 0), max(0.012 * scale, 0.6), borderType=cv2.BORDER_REPLICATE)
    edge = 0.62 + 0.38 * np.clip(2 * blurred - 0.8, 0, 1)
    colour *= (edge * (1 + across + down))[..., None]
    return Sprite(window, colour, alpha, mask)
