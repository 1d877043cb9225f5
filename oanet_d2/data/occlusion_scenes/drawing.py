"""How things are drawn: paints, polygons in drawing units, and their way into pixels.

A thing is a `Drawing`: polygons painted over each other, in *drawing units*. The origin is where the
thing stands on the ground (or where it is fastened to its carrier), x points right, y points down, and
1.0 is one side of the image at the nearest point of the ground. A drawing knows nothing of pixels;
`rasterise` turns it into a `Sprite`, the pixels it covers in an image of a given size.
"""

import colorsys
import math
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import ArrayLike

Colour = np.ndarray
"""(3,) float32 RGB, 0 to 255."""


# ---------------------------------------------------------------------------------------------------
# Colours and paints


@dataclass(frozen=True)
class Paint:
    """A texture of two colours, defined over the whole plane of drawing units.

    pattern: one of `PATTERNS`. first, second: (3,) float32 RGB, 0 to 255. angle: radians.
    period: drawing units of one repetition. seed: of the random field of the pattern "blotches".
    """

    pattern: str
    first: Colour
    second: Colour
    angle: float = 0.0
    period: float = 0.05
    seed: int = 0


PATTERNS = ("plain", "stripes", "checks", "dots", "blotches", "gradient")


def any_colour(rng: np.random.Generator, vivid: float = 0.5) -> Colour:
    """A colour of any hue; `vivid` (0 to 1) is about how saturated it is."""
    hue, value = rng.random(), rng.uniform(0.2, 0.95)
    saturation = np.clip(rng.normal(vivid, 0.25), 0.0, 0.95)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def colour_near(
    rng: np.random.Generator, colours: list[tuple[int, int, int]], spread: float = 14
) -> Colour:
    """One of `colours` (RGB, 0 to 255), changed by about `spread`."""
    chosen = np.array(colours[rng.integers(len(colours))], dtype=np.float32)
    return np.clip(chosen + rng.normal(0, spread, 3), 5, 250).astype(np.float32)


def mostly(rng: np.random.Generator, colours: list[tuple[int, int, int]]) -> Colour:
    """Three times out of four one near `colours`, otherwise any colour."""
    return colour_near(rng, colours) if rng.random() < 0.75 else any_colour(rng)


def mostly_unlike(
    rng: np.random.Generator, colours: list[tuple[int, int, int]], others: list[Colour]
) -> Colour:
    """Of five colours that are `mostly` near `colours` the one farthest from all of `others`."""
    candidates = [mostly(rng, colours) for _ in range(5)]
    return max(candidates, key=lambda c: min(float(np.abs(c - other).sum()) for other in others))


def toned(colour: Colour, factor: float) -> Colour:
    """`colour` times `factor` (below 1: darker), within 0 to 255."""
    return np.clip(colour * factor, 0, 255).astype(np.float32)


def plain(colour: Colour) -> Paint:
    """A paint of one colour."""
    return Paint("plain", colour, colour)


def any_paint(
    rng: np.random.Generator, colour: Colour, period: float, patterns: tuple[str, ...] = PATTERNS
) -> Paint:
    """A paint of `colour`: plain, or one of `patterns` with repetitions of about `period`."""
    pattern = "plain" if rng.random() < 0.6 else patterns[rng.integers(len(patterns))]
    if rng.random() < 0.8:
        bright = colour.mean() > 90
        second = toned(colour, rng.uniform(0.55, 0.75) if bright else rng.uniform(1.5, 2.0))
    else:
        second = any_colour(rng)
    angle = float(rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4]) + rng.normal(0, 0.06))
    period = float(period * rng.uniform(0.7, 1.4))
    return Paint(pattern, colour, second, angle, period, int(rng.integers(2**31)))


def paint_pixels(paint: Paint, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The colours of a paint on a grid of points.

    Args:
        x: (W,) float32, drawing units. y: (H,) float32, drawing units. Both evenly spaced.
    Returns:
        (H, W, 3) float32 RGB, 0 to 255; or (1, 1, 3) where every point has the same colour.
    """
    if paint.pattern == "plain":
        return paint.first[None, None]
    mix = _pattern_mix(paint, x[None, :], y[:, None])[..., None]
    return paint.first + mix * (paint.second - paint.first)


def _pattern_mix(paint: Paint, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(H, W) float32: the share of the second colour, 0 to 1, at x (1, W) and y (H, 1)."""
    turn = 2 * np.pi / paint.period
    # Python's floats, not NumPy's, which would turn float32 into float64 in NumPy 2 but not in 1.
    cos, sin = math.cos(paint.angle), math.sin(paint.angle)
    along = turn * (cos * x + sin * y)
    across = turn * (cos * y - sin * x)
    if paint.pattern == "stripes":
        return np.clip(0.5 + 2.5 * np.sin(along), 0, 1)
    if paint.pattern == "checks":
        return np.clip(0.5 + 4 * np.sin(along) * np.sin(across), 0, 1)
    if paint.pattern == "dots":
        return np.clip(4 * (np.cos(along) + np.cos(across) - 1.0), 0, 1)
    if paint.pattern == "blotches":
        bumps = value_noise(np.random.default_rng(paint.seed), (y.shape[0], x.shape[1]), (7, 7))
        return np.clip(0.5 + 5 * (bumps - 0.5), 0, 1)
    if paint.pattern == "gradient":
        down = np.linspace(0, 1, len(y), dtype=np.float32)[:, None]
        return np.broadcast_to(down, (len(y), x.shape[1]))
    raise ValueError(f"pattern is {paint.pattern!r}; it must be one of {', '.join(PATTERNS)}")


def value_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """(H, W) = `shape` float32, about 0 to 1: a smooth random field, `cells` are its (rows, columns)."""
    coarse = rng.random((max(cells[0], 2), max(cells[1], 2)), dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


# ---------------------------------------------------------------------------------------------------
# Drawings and how they become pixels


@dataclass(frozen=True)
class Part:
    """One painted polygon: (N, 2) float x, y in drawing units."""

    polygon: np.ndarray
    paint: Paint


@dataclass
class Drawing:
    """A thing as polygons, painted in the order of the list; see the top of this file for the units.

    anchors: named points (x, y), drawing units, where other things are worn or stand.
    own_colours: those that a thing lying on this one should differ from, so that it can be seen.
    """

    parts: list[Part] = field(default_factory=list)
    anchors: dict[str, tuple[float, float]] = field(default_factory=dict)
    own_colours: list[Colour] = field(default_factory=list)

    def add(self, polygon: ArrayLike, paint: Paint) -> None:
        """Paints one more polygon on top."""
        self.parts.append(Part(np.asarray(polygon, dtype=np.float64), paint))

    def extent(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in drawing units."""
        points = np.concatenate([part.polygon for part in self.parts])
        return (*points.min(axis=0), *points.max(axis=0))

    def scaled(self, factor: float) -> "Drawing":
        """The same thing `factor` times as large, patterns and anchors too."""
        return Drawing(
            [
                Part(part.polygon * factor, replace(part.paint, period=part.paint.period * factor))
                for part in self.parts
            ],
            {name: (x * factor, y * factor) for name, (x, y) in self.anchors.items()},
            self.own_colours,
        )

    def mirrored(self) -> "Drawing":
        """The same thing seen in a mirror: x changes its sign."""
        flip = np.array([-1.0, 1.0])
        return Drawing(
            [Part(part.polygon * flip, part.paint) for part in self.parts],
            {name: (-x, y) for name, (x, y) in self.anchors.items()},
            self.own_colours,
        )


@dataclass(frozen=True)
class Sprite:
    """The pixels of one thing: a window of the image.

    top, left: of the window in the image. colour: (h, w, 3) float32 RGB. alpha: (h, w) float32 0 to 1.
    """

    top: int
    left: int
    colour: np.ndarray
    alpha: np.ndarray

    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the image that `colour` and `alpha` lie on."""
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def inside(self) -> np.ndarray:
        """(h, w) bool: the silhouette, within the window: where the thing covers half of a pixel."""
        return self.alpha >= 0.5

    def silhouette(self, image_size: int) -> np.ndarray:
        """(image_size, image_size) bool: the whole thing, clipped to the image."""
        mask = np.zeros((image_size, image_size), dtype=bool)
        mask[self.window()] = self.inside()
        return mask


SUBPIXEL_BITS = 4


def rasterise(
    drawing: Drawing,
    scale: float,
    foot: tuple[float, float],
    image_size: int,
    light: tuple[float, float],
) -> Sprite | None:
    """Draws a thing, with soft edges and shading.

    Args:
        scale: pixels per drawing unit. foot: (x, y) in pixels, where the drawing's origin lies.
        light: (x, y), how much brighter the right and the lower end of the thing are (-1 to 1).
    Returns:
        the part of the thing inside the image, or None where nothing of it is.
    """
    polygons = [part.polygon * scale + foot for part in drawing.parts]
    points = np.concatenate(polygons)
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - 2, 0)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 3, image_size)
    if right - left < 2 or bottom - top < 2:
        return None
    x = ((np.arange(left, right) + 0.5 - foot[0]) / scale).astype(np.float32)
    y = ((np.arange(top, bottom) + 0.5 - foot[1]) / scale).astype(np.float32)
    colour = np.zeros((bottom - top, right - left, 3), dtype=np.float32)
    coverage = np.zeros((bottom - top, right - left), dtype=np.uint8)
    for part, polygon in zip(drawing.parts, polygons):
        _paint_part(colour, coverage, part.paint, polygon - (left, top), x, y)
    alpha = coverage.astype(np.float32) / 255
    if not (alpha >= 0.5).any():
        return None
    colour *= _shading(alpha, scale, light)[..., None]
    return Sprite(int(top), int(left), colour, alpha)


def _paint_part(
    colour: np.ndarray,
    coverage: np.ndarray,
    paint: Paint,
    polygon: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Paints one polygon (pixels of the window) into `colour` and `coverage`, in place."""
    first = np.maximum(np.floor(polygon.min(axis=0)).astype(int) - 1, 0)
    last = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + 2, coverage.shape[::-1])
    if (last - first < 1).any():
        return
    rows, columns = slice(first[1], last[1]), slice(first[0], last[0])
    mask = np.zeros((last[1] - first[1], last[0] - first[0]), dtype=np.uint8)
    # fillPoly's pixel centres are the whole numbers, ours are the halves. Its soft edges reach about
    # half a pixel beyond the polygon; silhouette and picture both have them, so the two still agree.
    fixed = np.round((polygon - first - 0.5) * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(mask, [fixed], (255,), lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
    share = (mask.astype(np.float32) / 255)[..., None]
    window = colour[rows, columns]
    window += share * (paint_pixels(paint, x[columns], y[rows]) - window)
    np.maximum(coverage[rows, columns], mask, out=coverage[rows, columns])


def _shading(alpha: np.ndarray, scale: float, light: tuple[float, float]) -> np.ndarray:
    """(h, w) float32, about 0.5 to 1.3: lit from one side, toned towards the edge of the silhouette.

    The toned edge is what separates two things of one colour, as the turn of a round surface does.
    """
    height, width = alpha.shape
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * light[0]
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32) * light[1]
    inside = cv2.GaussianBlur(alpha, (0, 0), max(0.012 * scale, 0.6), borderType=cv2.BORDER_REPLICATE)
    edge = 0.62 + 0.38 * np.clip(2 * inside - 0.8, 0, 1)
    return edge * (1 + across[None, :] + down[:, None])


# ---------------------------------------------------------------------------------------------------
# Polygons


def ellipse(
    x: float, y: float, half_width: float, half_height: float, start: float = 0, end: float = 360
) -> np.ndarray:
    """(28, 2): an ellipse around (x, y), or its arc from `start` to `end` degrees (0 right, 90 down)."""
    angle = np.radians(np.linspace(start, end, 28, endpoint=end - start < 360))
    return np.stack([x + half_width * np.cos(angle), y + half_height * np.sin(angle)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """(4, 2): a rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)


def rounded(points: list[tuple[float, float]] | np.ndarray, times: int = 2) -> np.ndarray:
    """(N * 2**times, 2): the closed polygon (N, 2), its corners cut `times` times (Chaikin): softer."""
    polygon = np.asarray(points, dtype=np.float64)
    for _ in range(times):
        following = np.roll(polygon, -1, axis=0)
        cut = [0.75 * polygon + 0.25 * following, 0.25 * polygon + 0.75 * following]
        polygon = np.stack(cut, axis=1).reshape(-1, 2)
    return polygon


def limb(
    start: tuple[float, float], end: tuple[float, float], start_radius: float, end_radius: float
) -> np.ndarray:
    """(56, 2): a tapering bar with round ends, such as an arm."""
    (x0, y0), (x1, y1) = start, end
    heading = np.degrees(np.arctan2(y1 - y0, x1 - x0))
    back = ellipse(x0, y0, start_radius, start_radius, heading + 90, heading + 270)
    return np.concatenate([back, ellipse(x1, y1, end_radius, end_radius, heading - 90, heading + 90)])


def ring(
    x: float,
    y: float,
    half_width: float,
    half_height: float,
    thickness: float,
    start: float,
    end: float,
) -> np.ndarray:
    """(56, 2): an arc of a ring `thickness` wide, such as the handle of a cup."""
    outer = ellipse(x, y, half_width, half_height, start, end)
    inner = ellipse(x, y, half_width - thickness, half_height - thickness, start, end)
    return np.concatenate([outer, inner[::-1]])
