"""
One scene of OcclusionScenes: what is in it, what lies on what, and what is visible.

A tie or a backpack lies on a person, a cup or a bottle on a table: inside the silhouette of its carrier,
so it is lost if the carrier is painted last. Things on the ground overlap too. The one that stands lower
in the image is nearer, and chance decides its class. What is worn moves with its carrier: a
car in front of a person covers the tie.

Lengths are shares of the image's side until `rasterise`, so a seed gives the same scene in every image
size, except for things that are too small to be seen in one of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from . import shapes, stuff
from .categories import CATEGORIES, ID_OF
from .drawing import Drawing, Point, Sprite, rasterise

SMALLEST_IMAGE = 64
# A thing is left out if less than this is visible: share of its silhouette, share of the image.
LEAST_VISIBLE_SHARE, LEAST_VISIBLE_AREA = 0.4, 40 / 256**2
# A carried thing is left out if less than this share of its box is inside the image.
LEAST_INSIDE = 0.35
# y of the nearest ground. It is below the image, so the image cuts off some things.
NEAREST_GROUND = 1.1
# What stands on the ground: how it is drawn, and how often.
ON_GROUND = {
    "person": (shapes.person, 0.42),
    "table": (shapes.table, 0.28),
    "car": (shapes.car, 0.16),
    "tree": (shapes.tree, 0.14),
}


class Thing(NamedTuple):
    category_id: int
    mask: np.ndarray  # (H, W) bool: the silhouette inside the image, also where it is hidden


@dataclass
class Scene:
    image: np.ndarray  # (H, W, 3) uint8 RGB
    things: list[Thing]  # from back to front
    stuff: np.ndarray  # (H, W) int32 category ids of the stuff in every pixel, behind the things too


@dataclass(eq=False)
class _Placed:
    """A drawing whose origin is at (x, y)."""

    name: str
    drawing: Drawing
    x: float
    y: float
    scale: float
    carrier: "_Placed | None" = None

    def box(self) -> np.ndarray:
        """(4,): left, top, right, bottom."""
        return np.array(self.drawing.extent()) * self.scale + (self.x, self.y, self.x, self.y)

    def carry(self, name: str, drawing: Drawing, at: Point) -> "_Placed":
        x, y = self.x + at[0] * self.scale, self.y + at[1] * self.scale
        return _Placed(name, drawing, x, y, self.scale, carrier=self)


def draw_scene(seed: int | np.random.SeedSequence | np.random.Generator, image_size: int) -> Scene:
    """
    Draw one scene. It has at least one thing, and at least 40 % of every thing is visible.

    Args:
        seed: as `numpy.random.default_rng` takes it. The same seed gives the same scene.
        image_size: height and width in pixels, at least 64.

    Raises:
        ValueError: `image_size` is less than 64.
    """
    if image_size < SMALLEST_IMAGE:
        raise ValueError(f"image_size is {image_size}; it must be at least {SMALLEST_IMAGE}")
    rng = np.random.default_rng(seed)
    horizon = rng.uniform(0.24, 0.44)
    light = (rng.uniform(-0.4, 0.4), rng.uniform(-0.25, 0.05))
    stuff_map = stuff.lay_out(rng, horizon, image_size)
    visible = _rasterise_visible(_compose(rng, horizon), light, image_size)

    things = []
    for placed, sprite in visible:
        mask = np.zeros((image_size, image_size), dtype=bool)
        mask[sprite.window] = sprite.inside
        things.append(Thing(ID_OF[placed.name], mask))
    stuff_map = stuff.merge_small(stuff_map, np.any([thing.mask for thing in things], axis=0))

    canvas = stuff.paint(rng, stuff_map, horizon)
    for placed, sprite in visible:
        if placed.carrier is None:
            _cast_shadow(canvas, placed)
        canvas[sprite.window] += sprite.alpha[..., None] * (sprite.colour - canvas[sprite.window])
    return Scene(_photograph(rng, canvas), things, stuff_map)


def scene_to_panoptic(scene: Scene) -> tuple[np.ndarray, list[dict]]:
    """
    Annotate what is visible: in every pixel the topmost thing, otherwise the stuff.

    Returns:
        ids: (H, W) int32 segment ids. No pixel is void.
        segments_info: COCO panoptic dicts: the things in the order of `scene.things`, then the
            visible stuff.
    """
    topmost = np.zeros(scene.stuff.shape, dtype=np.int32)
    for k, thing in enumerate(scene.things, 1):
        topmost[thing.mask] = k
    free = topmost == 0
    regions = [(thing.category_id, topmost == k) for k, thing in enumerate(scene.things, 1)]
    regions += [(int(k), free & (scene.stuff == k)) for k in np.unique(scene.stuff[free])]

    ids = np.zeros_like(topmost)
    segments: dict[int, dict] = {}
    for category_id, mask in regions:
        # Ids resemble the colour of the class, so that a PNG of ids looks like a picture.
        red, green, blue = CATEGORIES[category_id - 1]["color"]
        number = 0
        while number == 0 or number in segments:
            number = red + 256 * green + 65536 * blue
            red, green, blue = (red + 37) % 256, (green + 23) % 256, (blue + 53) % 256
        ids[mask] = number
        segment = {"id": number, "category_id": category_id, "iscrowd": 0}
        segments[number] = {**segment, "bbox": bounding_box(mask), "area": int(mask.sum())}
    return ids, list(segments.values())


def bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of (H, W) bool `mask`."""
    return list(cv2.boundingRect(mask.astype(np.uint8)))


def _compose(rng: np.random.Generator, horizon: float) -> list[_Placed]:
    """Place things from back to front. Most stand beside, before or behind another one."""
    groups: list[list[_Placed]] = []
    farthest = max(horizon + 0.24, 0.56)
    for _ in range(1 + rng.binomial(3, 0.6)):
        partner = groups[rng.integers(len(groups))][0] if groups and rng.random() < 0.85 else None
        if partner and rng.random() < 0.25:
            name = partner.name
        else:
            name = str(rng.choice(list(ON_GROUND), p=[share for _, share in ON_GROUND.values()]))
        drawing = _or_mirrored(rng, ON_GROUND[name][0](rng))
        if partner:
            x, y = _place_beside(rng, partner, drawing, horizon, farthest)
        else:
            x, y = rng.uniform(0.15, 0.85), rng.uniform(farthest, NEAREST_GROUND)
        carrier = _Placed(name, drawing, x, y, _scale_at(y, horizon))
        groups.append([carrier, *_carried(rng, carrier)])
    groups.sort(key=lambda group: group[0].y)
    return [placed for group in groups for placed in group]


def _or_mirrored(rng: np.random.Generator, drawing: Drawing) -> Drawing:
    return drawing.stretched(-1, 1) if rng.random() < 0.5 else drawing


def _scale_at(y: float, horizon: float) -> float:
    return 0.7 + 0.4 * (y - horizon) / (NEAREST_GROUND - horizon)


def _place_beside(
    rng: np.random.Generator, partner: _Placed, drawing: Drawing, horizon: float, farthest: float
) -> Point:
    """Choose (x, y) so that `drawing` overlaps `partner`, before or behind it equally often."""
    own_left, own_top, own_right, _ = drawing.extent()
    left, top, right, bottom = partner.box()
    in_front = rng.random() < 0.5
    # A share of the height of the one in front: a car covers as much of a person as a person of a car.
    height = -own_top * partner.scale if in_front else bottom - top
    depth = min(rng.uniform(0.1, 0.6) * height, 0.16) * (1 if in_front else -1)
    y = partner.y + depth
    if not farthest <= y <= NEAREST_GROUND:
        y = partner.y - depth
    y = float(np.clip(y, farthest, NEAREST_GROUND))

    scale = _scale_at(y, horizon)
    width = (own_right - own_left) * scale
    # A share of the narrower one, so that a person behind a tree stays visible.
    overlap = min(width, right - left) * rng.uniform(0.15, 0.7)
    side = rng.choice([-1, 1]) if 0.25 < partner.x < 0.75 else np.sign(0.5 - partner.x)
    middle = (left + right) / 2 + side * ((width + right - left) / 2 - overlap)
    return float(np.clip(middle - (own_left + own_right) / 2 * scale, 0.06, 0.94)), y


def _carried(rng: np.random.Generator, carrier: _Placed) -> list[_Placed]:
    anchors, carried = carrier.drawing.anchors, []
    if "back" in anchors and rng.random() < 0.9:
        backpack = shapes.backpack(rng, carrier.drawing)
        carried.append(carrier.carry("backpack", backpack, anchors["back"]))
    if "neck" in anchors and rng.random() < 0.9:
        carried.append(carrier.carry("tie", shapes.tie(rng, carrier.drawing), anchors["neck"]))
    if carrier.name == "table":
        (left, far), (right, near) = anchors["far_left"], anchors["near_right"]
        slots = rng.permutation(3)[: rng.choice(4, p=[0.05, 0.3, 0.35, 0.3])]
        for down, slot in sorted((rng.uniform(0.45, 1.0), slot) for slot in slots):
            across = (slot + rng.uniform(0.2, 0.8)) / 3
            at = left + across * (right - left), far + down * (near - far)
            name, draw = ("cup", shapes.cup) if rng.random() < 0.5 else ("bottle", shapes.bottle)
            carried.append(carrier.carry(name, _or_mirrored(rng, draw(rng, carrier.drawing)), at))
    return carried


def _rasterise_visible(
    everything: list[_Placed], light: Point, size: int
) -> list[tuple[_Placed, Sprite]]:
    """
    Rasterise the things and leave out what is hardly visible: the least visible thing first, because
    without it others are more visible, and what it carries with it, so that no tie hangs in the air.
    """
    kept = []
    for placed in everything:
        left, top, right, bottom = placed.box()
        inside = np.prod(np.clip([right, bottom], 0, 1) - np.clip([left, top], 0, 1))
        if placed.carrier is None or inside / ((right - left) * (bottom - top)) >= LEAST_INSIDE:
            origin = (placed.x * size, placed.y * size)
            sprite = rasterise(placed.drawing, placed.scale * size, origin, size, light)
            if sprite is not None:
                kept.append((placed, sprite))
    while len(kept) > 1:
        topmost = np.zeros((size, size), dtype=np.uint8)
        for k, (_, sprite) in enumerate(kept, 1):
            topmost[sprite.window][sprite.inside] = k
        visible = np.bincount(topmost.ravel(), minlength=len(kept) + 1)[1:]
        shares = visible / [sprite.inside.sum() for _, sprite in kept]
        shares[visible < LEAST_VISIBLE_AREA * size**2] = 0
        worst, sprite = kept[np.argmin(shares)]
        if shares.min() >= LEAST_VISIBLE_SHARE:
            break
        others = [entry for entry in kept if worst not in (entry[0], entry[0].carrier)]
        kept = others or [(worst, sprite)]
    return kept


def _cast_shadow(canvas: np.ndarray, placed: _Placed) -> None:
    size = len(canvas)
    left, _, right, _ = placed.box() * size
    x, y, half = (left + right) / 2, placed.y * size, 0.55 * (right - left)
    if placed.name in ("person", "tree"):  # wide above the ground, narrow on it
        x, half = placed.x * size, min(half, 0.165 * placed.scale * size)
    low = max(0.2 * half, 1.0)
    rows = slice(max(int(y - 2 * low), 0), min(int(y + 2 * low) + 1, size))
    columns = slice(max(int(x - 1.5 * half), 0), min(int(x + 1.5 * half) + 1, size))
    down, across = (axis.astype(np.float32) for axis in np.ogrid[rows, columns])
    distance = ((across - x) / half) ** 2 + ((down - y) / low) ** 2
    canvas[rows, columns] *= (1 - 0.5 * np.exp(-1.5 * distance))[..., None]


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8: tint, exposure, blur and noise of a camera."""
    size = len(canvas)
    exposure = (rng.normal(1.0, 0.035, 3) * rng.uniform(0.82, 1.12)).astype(np.float32)
    slope = np.linspace(-0.5, 0.5, size, dtype=np.float32) * float(rng.uniform(-0.25, 0.25))
    image: np.ndarray = canvas * (exposure * (1 + slope[None, :, None]))
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7) * max(size / 256, 0.5))
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * float(rng.uniform(1, 5))
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)
