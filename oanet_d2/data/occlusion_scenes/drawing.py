"""
How things are drawn: painted polygons, and their way into pixels.

Polygons are (N, 2) float x, y in *drawing units*: 1.0 is one side of the image, for a thing on the
nearest ground. The origin is where the thing stands, or where its carrier holds it. x points right
and y points down.
"""

from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import ArrayLike

from .paints import Colour, Paint

Point = tuple[float, float]

SUBPIXEL_BITS = 4


@dataclass(eq=False)
class Drawing:
    """
    A thing as painted polygons; later ones lie on top.

    Args:
        anchors: points where other things are worn or stand.
        own_colours: a thing that lies on this one should differ from them, to be visible.
    """

    parts: list[tuple[np.ndarray, Paint]] = field(default_factory=list)
    anchors: dict[str, Point] = field(default_factory=dict)
    own_colours: list[Colour] = field(default_factory=list)

    def add(self, polygon: ArrayLike, paint: Paint) -> None:
        self.parts.append((np.asarray(polygon, dtype=np.float64), paint))

    def extent(self) -> tuple[float, float, float, float]:
        """
        Return (left, top, right, bottom).
        """
        points = np.concatenate([polygon for polygon, _ in self.parts])
        return (*points.min(axis=0), *points.max(axis=0))

    def stretched(self, x: float, y: float) -> "Drawing":
        """
        Return the same thing `x` times as wide and `y` times as tall. (-1, 1) mirrors it.
        """
        parts = [
            (polygon * (x, y), replace(paint, period=paint.period * y)) for polygon, paint in self.parts
        ]
        anchors = {name: (x * at[0], y * at[1]) for name, at in self.anchors.items()}
        return Drawing(parts, anchors, self.own_colours)


@dataclass(eq=False)
class Sprite:
    """
    The pixels of one thing.

    Args:
        window: rows and columns of the image, h x w pixels.
        colour: (h, w, 3) float32 RGB, 0 to 255.
        alpha: (h, w) float32, 0 to 1.
    """

    window: tuple[slice, slice]
    colour: np.ndarray
    alpha: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """
        (h, w) bool, the silhouette: pixels that the thing covers by half or more.
        """
        return self.alpha >= 0.5


def rasterise(
    drawing: Drawing, scale: float, origin: Point, image_size: int, light: Point
) -> Sprite | None:
    """
    Draw a thing with soft edges and shading.

    Args:
        scale: pixels per drawing unit.
        origin: (x, y) of the drawing's origin, pixels.
        light: (x, y), how much brighter the right and the lower end of the thing are, -1 to 1.

    Returns:
        the part of the thing inside the image, None if there is none.
    """
    polygons = [polygon * scale + origin for polygon, _ in drawing.parts]
    points = np.concatenate(polygons)
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - 2, 0)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 3, image_size)
    if right - left < 2 or bottom - top < 2:
        return None
    x = ((np.arange(left, right) + 0.5 - origin[0]) / scale).astype(np.float32)
    y = ((np.arange(top, bottom) + 0.5 - origin[1]) / scale).astype(np.float32)
    colour = np.zeros((bottom - top, right - left, 3), dtype=np.float32)
    coverage = np.zeros((bottom - top, right - left), dtype=np.uint8)
    for polygon, (_, paint) in zip(polygons, drawing.parts):
        polygon = polygon - (left, top)
        first = np.maximum(np.floor(polygon.min(axis=0)).astype(int) - 1, 0)
        last = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + 2, coverage.shape[::-1])
        if (last - first < 1).any():
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
    colour *= _shading(alpha, scale, light)[..., None]
    return Sprite((slice(top, bottom), slice(left, right)), colour, alpha)


def _shading(alpha: np.ndarray, scale: float, light: Point) -> np.ndarray:
    height, width = alpha.shape
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * light[0]
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32) * light[1]
    # A dark edge separates two things of one colour, as the turn of a round surface does.
    inside = cv2.GaussianBlur(alpha, (0, 0), max(0.012 * scale, 0.6), borderType=cv2.BORDER_REPLICATE)
    edge = 0.62 + 0.38 * np.clip(2 * inside - 0.8, 0, 1)
    return edge * (1 + across[None, :] + down[:, None])


def ellipse(x: float, y: float, a: float, b: float, start: float = 0, end: float = 360) -> np.ndarray:
    """
    An ellipse around (x, y), `2 * a` wide and `2 * b` tall, or its arc from `start` to `end` degrees
    (0 is right, 90 is down).
    """
    angle = np.radians(np.linspace(start, end, 28, endpoint=end - start < 360))
    return np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def symmetric(right_side: list[Point]) -> list[Point]:
    """
    A polygon that is its own mirror image, from the points of its right side.
    """
    return right_side + [(-x, y) for x, y in reversed(right_side)]


def rounded(polygon: ArrayLike, times: int = 2) -> np.ndarray:
    """
    The closed polygon with its corners cut `times` times (Chaikin's algorithm).
    """
    polygon = np.asarray(polygon, dtype=np.float64)
    for _ in range(times):
        following = np.roll(polygon, -1, axis=0)
        cut = [0.75 * polygon + 0.25 * following, 0.25 * polygon + 0.75 * following]
        polygon = np.stack(cut, axis=1).reshape(-1, 2)
    return polygon


def limb(start: Point, end: Point, start_radius: float, end_radius: float) -> np.ndarray:
    """
    A tapering bar with round ends, such as an arm.
    """
    (x0, y0), (x1, y1) = start, end
    heading = np.degrees(np.arctan2(y1 - y0, x1 - x0))
    back = ellipse(x0, y0, start_radius, start_radius, heading + 90, heading + 270)
    front = ellipse(x1, y1, end_radius, end_radius, heading - 90, heading + 90)
    return np.concatenate([back, front])


def ring(
    x: float, y: float, a: float, b: float, thickness: float, start: float, end: float
) -> np.ndarray:
    """
    An arc of an elliptic ring, `thickness` wide, such as the handle of a cup.
    """
    inner = ellipse(x, y, a - thickness, b - thickness, start, end)
    return np.concatenate([ellipse(x, y, a, b, start, end), inner[::-1]])
