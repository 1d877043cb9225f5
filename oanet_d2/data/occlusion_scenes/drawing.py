"""
How things are drawn: painted polygons, and their way into pixels.

Polygons are (N, 2) float x, y in *drawing units*: 1.0 is one side of the image, for a thing on the
nearest ground. The origin is where the thing stands, or where its carrier holds it. y points down.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike

from .paints import Colour, Paint

Point = tuple[float, float]

SUBPIXEL_BITS = 4


@dataclass(eq=False)
class Drawing:
    """A thing as painted polygons. Later ones lie on top."""

    parts: list[tuple[np.ndarray, Paint]] = field(default_factory=list)
    # Where other things are worn or stand, and the colours they should differ from, to be visible.
    anchors: dict[str, Point] = field(default_factory=dict)
    own_colours: list[Colour] = field(default_factory=list)

    def add(self, polygon: ArrayLike, paint: Paint) -> None:
        self.parts.append((np.asarray(polygon, dtype=np.float64), paint))

    def extent(self) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom)."""
        points = np.concatenate([polygon for polygon, _ in self.parts])
        return (*points.min(axis=0), *points.max(axis=0))

    def stretched(self, x: float, y: float) -> "Drawing":
        """Return the same thing `x` times as wide and `y` times as tall. (-1, 1) mirrors it."""
        parts = [(polygon * (x, y), replace(p, period=p.period * y)) for polygon, p in self.parts]
        anchors = {name: (x * at[0], y * at[1]) for name, at in self.anchors.items()}
        return Drawing(parts, anchors, self.own_colours)


class Sprite(NamedTuple):
    """The pixels of one thing, in a window of the image."""

    window: tuple[slice, slice]  # rows, columns
    colour: np.ndarray  # (h, w, 3) float32 RGB, 0 to 255
    alpha: np.ndarray  # (h, w) float32, 0 to 1
    inside: np.ndarray  # (h, w) bool: the silhouette, where the thing covers half a pixel or more


def rasterise(
    drawing: Drawing, scale: float, origin: Point, image_size: int, light: Point
) -> Sprite | None:
    """
    Draw a thing with soft edges and shading. The result is None if nothing is inside the image.

    Args:
        scale: pixels per drawing unit.
        origin: (x, y) of the drawing's origin, pixels.
        light: (x, y), how much brighter the right and the lower end of the thing are, -1 to 1.
    """
    polygons = [polygon * scale + origin for polygon, _ in drawing.parts]
    points = np.concatenate(polygons)
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - 2, 0)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 3, image_size)
    if right - left < 2 or bottom - top < 2:
        return None
    x = ((np.arange(left, right) + 0.5 - origin[0]) / scale).astype(np.float32)
    y = ((np.arange(top, bottom) + 0.5 - origin[1]) / scale).astype(np.float32)
    colour = np.zeros((len(y), len(x), 3), dtype=np.float32)
    coverage = np.zeros((len(y), len(x)), dtype=np.uint8)
    for polygon, (_, paint) in zip(polygons, drawing.parts):
        polygon = polygon - (left, top)
        first = np.maximum(np.floor(polygon.min(axis=0)).astype(int) - 1, 0)
        last = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + 2, coverage.shape[::-1])
        if (last <= first).any():
            continue
        columns, rows = slice(first[0], last[0]), slice(first[1], last[1])
        mask = np.zeros((last - first)[::-1], dtype=np.uint8)
        # fillPoly's pixel centres are the whole numbers, ours are the halves.
        fixed = np.round((polygon - first - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(mask, [fixed], (255,), lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
        share = (mask.astype(np.float32) / 255)[..., None]
        colour[rows, columns] += share * (paint.at(x[columns], y[rows]) - colour[rows, columns])
        np.maximum(coverage[rows, columns], mask, out=coverage[rows, columns])
    alpha = coverage.astype(np.float32) / 255
    if not (alpha >= 0.5).any():
        return None
    across = np.linspace(-0.5, 0.5, len(x), dtype=np.float32)[None, :] * light[0]
    down = np.linspace(-0.5, 0.5, len(y), dtype=np.float32)[:, None] * light[1]
    # A dark edge separates two things of one colour, as the turn of a round surface does.
    blurred = cv2.GaussianBlur(alpha, (0, 0), max(0.012 * scale, 0.6), borderType=cv2.BORDER_REPLICATE)
    edge = 0.62 + 0.38 * np.clip(2 * blurred - 0.8, 0, 1)
    colour *= (edge * (1 + across + down))[..., None]
    return Sprite((slice(top, bottom), slice(left, right)), colour, alpha, alpha >= 0.5)


def ellipse(x: float, y: float, a: float, b: float, start: float = 0, end: float = 360) -> np.ndarray:
    """An ellipse with the half axes a and b, or its arc in degrees (0 is right, 90 is down)."""
    angle = np.radians(np.linspace(start, end, 28, endpoint=end - start < 360))
    return np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def symmetric(right_side: list[Point]) -> list[Point]:
    return right_side + [(-x, y) for x, y in reversed(right_side)]


def rounded(polygon: ArrayLike, times: int = 2) -> np.ndarray:
    """The closed polygon with its corners cut `times` times (Chaikin's algorithm)."""
    polygon = np.asarray(polygon, dtype=np.float64)
    for _ in range(times):
        following = np.roll(polygon, -1, axis=0)
        cut = [0.75 * polygon + 0.25 * following, 0.25 * polygon + 0.75 * following]
        polygon = np.stack(cut, axis=1).reshape(-1, 2)
    return polygon


def limb(start: Point, end: Point, start_radius: float, end_radius: float) -> np.ndarray:
    """A tapering bar with round ends, such as an arm."""
    heading = np.degrees(np.arctan2(end[1] - start[1], end[0] - start[0]))
    back = ellipse(*start, start_radius, start_radius, heading + 90, heading + 270)
    front = ellipse(*end, end_radius, end_radius, heading - 90, heading + 90)
    return np.concatenate([back, front])


def ring(x: float, y: float, a: float, b: float, width: float, start: float, end: float) -> np.ndarray:
    """An arc of an elliptic ring, such as the handle of a cup."""
    inner = ellipse(x, y, a - width, b - width, start, end)
    return np.concatenate([ellipse(x, y, a, b, start, end), inner[::-1]])
