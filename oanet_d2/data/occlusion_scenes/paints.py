"""Colours and textures of OcclusionScenes. A colour is (3,) float32 RGB, 0 to 255."""

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np

RGB = tuple[int, int, int]
Colour = np.ndarray

PATTERNS = ("plain", "stripes", "checks", "dots", "blotches", "gradient")


@dataclass(frozen=True)
class Paint:
    """A texture of two colours. It covers the whole plane of a drawing, in drawing units."""

    pattern: str
    first: Colour
    second: Colour
    angle: float = 0.0  # radians
    period: float = 0.05  # length of one repetition
    seed: int = 0  # of the pattern "blotches"

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the colours at x (W,) and y (H,), float32: (H, W, 3), or (1, 1, 3) if plain."""
        if self.pattern == "plain":
            return self.first[None, None]
        # A Python float keeps the arrays float32. With a NumPy scalar, NumPy 2 would make them float64.
        turn, cos, sin = 2 * math.pi / self.period, math.cos(self.angle), math.sin(self.angle)
        along = turn * (cos * x[None, :] + sin * y[:, None])
        across = turn * (cos * y[:, None] - sin * x[None, :])
        if self.pattern == "stripes":
            mix = np.clip(0.5 + 2.5 * np.sin(along), 0, 1)
        elif self.pattern == "checks":
            mix = np.clip(0.5 + 4 * np.sin(along) * np.sin(across), 0, 1)
        elif self.pattern == "dots":
            mix = np.clip(4 * (np.cos(along) + np.cos(across) - 1.0), 0, 1)
        elif self.pattern == "blotches":
            bumps = value_noise(np.random.default_rng(self.seed), (len(y), len(x)), (7, 7))
            mix = np.clip(0.5 + 5 * (bumps - 0.5), 0, 1)
        else:  # gradient
            mix = np.linspace(0, 1, len(y), dtype=np.float32)[:, None].repeat(len(x), axis=1)
        return self.first + mix[..., None] * (self.second - self.first)


def plain(colour: Colour) -> Paint:
    return Paint("plain", colour, colour)


def any_paint(
    rng: np.random.Generator, colour: Colour, period: float, patterns: tuple[str, ...] = PATTERNS
) -> Paint:
    """Return a paint of `colour`: plain, or one of `patterns` with repetitions of about `period`."""
    pattern = "plain" if rng.random() < 0.6 else patterns[rng.integers(len(patterns))]
    if rng.random() < 0.8:
        bright = colour.mean() > 90
        second = toned(colour, rng.uniform(0.55, 0.75) if bright else rng.uniform(1.5, 2.0))
    else:
        second = any_colour(rng)
    angle = float(rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4]) + rng.normal(0, 0.06))
    period = float(period * rng.uniform(0.7, 1.4))
    return Paint(pattern, colour, second, angle, period, int(rng.integers(2**31)))


def any_colour(rng: np.random.Generator, saturation: float = 0.5) -> Colour:
    hue, value = rng.random(), rng.uniform(0.2, 0.95)
    saturation = np.clip(rng.normal(saturation, 0.25), 0.0, 0.95)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def colour_near(rng: np.random.Generator, colours: list[RGB], spread: float = 14) -> Colour:
    chosen = np.array(colours[rng.integers(len(colours))], dtype=np.float32)
    return np.clip(chosen + rng.normal(0, spread, 3), 5, 250).astype(np.float32)


def mostly(rng: np.random.Generator, colours: list[RGB]) -> Colour:
    """Return a colour near one of `colours` three times out of four, otherwise any colour."""
    return colour_near(rng, colours) if rng.random() < 0.75 else any_colour(rng)


def mostly_unlike(rng: np.random.Generator, colours: list[RGB], others: list[Colour]) -> Colour:
    """Draw five colours that are `mostly` near `colours`; return the one farthest from `others`."""
    candidates = [mostly(rng, colours) for _ in range(5)]
    return max(candidates, key=lambda c: min(float(np.abs(c - other).sum()) for other in others))


def toned(colour: Colour, factor: float) -> Colour:
    return np.clip(colour * factor, 0, 255).astype(np.float32)


def value_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Return a smooth random field, `shape` float32, about 0 to 1, with `cells` bumps down and across."""
    coarse = rng.random((max(cells[0], 2), max(cells[1], 2)), dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
