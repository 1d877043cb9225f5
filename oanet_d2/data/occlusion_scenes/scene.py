"""An OcclusionScene: what is in it, where it stands, what lies on what; and what of it is seen.

    draw_scene(seed, image_size) -> Scene          the image, whole silhouettes by depth, the stuff map
    scene_to_panoptic(scene)     -> ids, segments  who is visible, in the COCO panoptic format

Things overlap in three ways:

* worn or standing: a tie or a backpack on a person, a cup or a bottle on a table. It lies on its carrier,
  inside the carrier's silhouette, so whoever paints the carrier last loses it;
* one in front of the other: what stands lower in the image is nearer. Which class is nearer is a
  matter of chance, and what is worn goes with its carrier: a car in front of a person covers the tie;
* several of one class, one in front of the other.

Lengths are shares of the image's side (drawing units, see `drawing.py`) until `rasterise`, so a seed
gives the same scene in every image size, but for what is too small there to be seen.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from . import shapes, stuff
from .categories import CATEGORIES, ID_OF
from .drawing import Drawing, Sprite, rasterise

SMALLEST_IMAGE = 64
LEAST_VISIBLE_SHARE = 0.4
"""A thing of whose silhouette less is visible is taken out of the scene."""
LEAST_VISIBLE_AREA = 40 / 256**2
"""A thing of which less is visible is taken out; share of the image."""
LEAST_INSIDE = 0.35
"""A carried thing of whose bounding box less is inside the image is taken out."""


class Thing(NamedTuple):
    """A thing of a scene. mask: (H, W) bool, its whole silhouette, clipped to the image."""

    category_id: int
    mask: np.ndarray


@dataclass
class Scene:
    """A drawn scene.

    image: (H, W, 3) uint8 RGB.
    things: from back to front; where two overlap, the later one is visible.
    stuff: (H, W) int32, the category id of the stuff in every pixel, behind the things too.
    """

    image: np.ndarray
    things: list[Thing]
    stuff: np.ndarray


@dataclass
class _Placed:
    """A drawing of the class `name` at its place: foot (x, y), and scale of its drawing units."""

    name: str
    drawing: Drawing
    foot: tuple[float, float]
    scale: float

    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), shares of the image's side."""
        left, top, right, bottom = self.drawing.extent()
        (x, y), scale = self.foot, self.scale
        return x + left * scale, y + top * scale, x + right * scale, y + bottom * scale

    def carry(self, name: str, drawing: Drawing, at: tuple[float, float]) -> "_Placed":
        """Another drawing, fastened at the point `at` (drawing units) of this one."""
        x, y = self.foot[0] + at[0] * self.scale, self.foot[1] + at[1] * self.scale
        return _Placed(name, drawing, (x, y), self.scale)


@dataclass
class _Group:
    """What stands on the ground, and what it carries, from back to front."""

    carrier: _Placed
    carried: list[_Placed] = field(default_factory=list)


def draw_scene(seed: int | np.random.SeedSequence | np.random.Generator, image_size: int) -> Scene:
    """Draws one scene.

    Args:
        seed: whatever `numpy.random.default_rng` takes; the same seed gives the same scene.
        image_size: height and width in pixels, at least 64.
    Returns:
        a Scene with at least one thing, in which at least two fifths of every thing is visible.
    Raises:
        ValueError: image_size is less than 64.
    """
    if image_size < SMALLEST_IMAGE:
        raise ValueError(f"image_size is {image_size}; it must be at least {SMALLEST_IMAGE}")
    rng = np.random.default_rng(seed)
    horizon = rng.uniform(0.24, 0.44)
    light = (rng.uniform(-0.4, 0.4), rng.uniform(-0.25, 0.05))
    stuff_map = stuff.lay_out(rng, horizon, image_size)
    groups = sorted(_compose(rng, horizon), key=lambda group: group.carrier.foot[1])

    visible = _take_out_the_hidden(groups, light, image_size)
    things = [Thing(ID_OF[placed.name], sprite.silhouette(image_size)) for _, placed, sprite in visible]
    stuff_map = stuff.merge_small(stuff_map, np.any([thing.mask for thing in things], axis=0))

    canvas = stuff.paint(rng, stuff_map, horizon)
    for group, placed, sprite in visible:
        if placed is group.carrier:
            _cast_shadow(canvas, placed)
        window = canvas[sprite.window()]
        window += sprite.alpha[..., None] * (sprite.colour - window)
    return Scene(_photograph(rng, canvas), things, stuff_map)


# ---------------------------------------------------------------------------------------------------
# What stands where

NEAREST_GROUND = 1.1
"""y of the nearest ground a thing stands on: below the image, so that some things are cut off."""

_ON_GROUND = {
    "person": (shapes.person, 0.42),
    "table": (shapes.table, 0.28),
    "car": (shapes.car, 0.16),
    "tree": (shapes.tree, 0.14),
}
"""Class -> (how to draw one, its share of what stands on the ground)."""


def _compose(rng: np.random.Generator, horizon: float) -> list[_Group]:
    """Chooses the things of a scene and their places: most of them beside, before or behind another."""
    groups: list[_Group] = []
    farthest = max(horizon + 0.24, 0.56)
    for _ in range(1 + rng.binomial(3, 0.6)):
        partner = groups[rng.integers(len(groups))].carrier if groups and rng.random() < 0.85 else None
        if partner and rng.random() < 0.25:
            name = partner.name
        else:
            name = str(rng.choice(list(_ON_GROUND), p=[share for _, share in _ON_GROUND.values()]))
        drawing = _or_mirrored(rng, _ON_GROUND[name][0](rng))
        if partner:
            foot = _place_beside(rng, partner, drawing, horizon, farthest)
        else:
            foot = rng.uniform(0.15, 0.85), rng.uniform(farthest, NEAREST_GROUND)
        carrier = _Placed(name, drawing, foot, _scale_at(foot[1], horizon))
        groups.append({"person": _dressed, "table": _laid}.get(name, _bare)(rng, carrier))
    return groups


def _or_mirrored(rng: np.random.Generator, drawing: Drawing) -> Drawing:
    return drawing.mirrored() if rng.random() < 0.5 else drawing


def _scale_at(y: float, horizon: float) -> float:
    """How large things are whose foot is at height `y`: the nearer, the larger."""
    return 0.7 + 0.4 * (y - horizon) / (NEAREST_GROUND - horizon)


def _place_beside(
    rng: np.random.Generator, partner: _Placed, drawing: Drawing, horizon: float, farthest: float
) -> tuple[float, float]:
    """A foot (x, y) for `drawing` so that it overlaps `partner`, before or behind it equally often.

    Sideways the overlap is a share of the narrower of the two, so that a person behind a tree is
    still seen; in depth a share of the height of the one in front, so that a car before a person
    covers part of it as a person before a car does.
    """
    own_left, own_top, own_right, _ = drawing.extent()
    left, top, right, bottom = partner.box()
    in_front = rng.random() < 0.5
    height = -own_top * partner.scale if in_front else bottom - top
    depth = min(rng.uniform(0.1, 0.6) * height, 0.16) * (1 if in_front else -1)
    y = partner.foot[1] + depth
    if not farthest <= y <= NEAREST_GROUND:
        y = partner.foot[1] - depth
    y = float(np.clip(y, farthest, NEAREST_GROUND))

    scale = _scale_at(y, horizon)
    width = (own_right - own_left) * scale
    overlap = min(width, right - left) * rng.uniform(0.15, 0.7)
    x = partner.foot[0]
    side = rng.choice([-1, 1]) if 0.25 < x < 0.75 else np.sign(0.5 - x)
    middle = (left + right) / 2 + side * ((width + right - left) / 2 - overlap)
    return float(np.clip(middle - (own_left + own_right) / 2 * scale, 0.06, 0.94)), y


def _bare(rng: np.random.Generator, carrier: _Placed) -> _Group:
    """Nothing is carried."""
    return _Group(carrier)


def _dressed(rng: np.random.Generator, carrier: _Placed) -> _Group:
    """A person, mostly with a tie, or seen from behind with a backpack."""
    group, person = _Group(carrier), carrier.drawing
    if "back" in person.anchors and rng.random() < 0.9:
        backpack = shapes.backpack(rng, person)
        group.carried.append(carrier.carry("backpack", backpack, person.anchors["back"]))
    if "neck" in person.anchors and rng.random() < 0.9:
        group.carried.append(carrier.carry("tie", shapes.tie(rng, person), person.anchors["neck"]))
    return group


def _laid(rng: np.random.Generator, carrier: _Placed) -> _Group:
    """A table with up to three cups and bottles on it, the farther ones first."""
    group, table = _Group(carrier), carrier.drawing
    (left, far), (right, near) = table.anchors["top_left"], table.anchors["top_right"]
    slots = rng.permutation(3)[: rng.choice(4, p=[0.05, 0.3, 0.35, 0.3])]
    for down, slot in sorted((rng.uniform(0.45, 1.0), slot) for slot in slots):
        across = (slot + rng.uniform(0.2, 0.8)) / 3
        at = left + across * (right - left), far + down * (near - far)
        name, draw = ("cup", shapes.cup) if rng.random() < 0.5 else ("bottle", shapes.bottle)
        group.carried.append(carrier.carry(name, _or_mirrored(rng, draw(rng, table)), at))
    return group


# ---------------------------------------------------------------------------------------------------
# What is visible


def _take_out_the_hidden(
    groups: list[_Group], light: tuple[float, float], size: int
) -> list[tuple[_Group, _Placed, Sprite]]:
    """Rasterises the groups (back to front) and leaves out whatever is hardly visible.

    The least visible thing goes first, because without it others are more visible. With a carrier
    goes what it carries: no tie hangs in the air.
    """
    left = []
    for group in groups:
        for placed in (group.carrier, *group.carried):
            if placed is group.carrier or _share_inside(placed) >= LEAST_INSIDE:
                foot = placed.foot[0] * size, placed.foot[1] * size
                sprite = rasterise(placed.drawing, placed.scale * size, foot, size, light)
                if sprite is not None:
                    left.append((group, placed, sprite))
    while True:
        shares = _visible_shares([sprite for _, _, sprite in left], size)
        worst = int(np.argmin(shares))
        if shares[worst] >= LEAST_VISIBLE_SHARE:
            return left
        group, placed, _ = left[worst]
        if placed is not group.carrier:
            del left[worst]
        elif any(entry[0] is not group for entry in left):
            left = [entry for entry in left if entry[0] is not group]
        else:
            # The last group: its carrier without anything on it, so that one thing is there.
            left = [left[worst]]


def _share_inside(placed: _Placed) -> float:
    """The share of a thing's bounding box that is inside the image."""
    left, top, right, bottom = placed.box()
    inside = np.clip([left, top, right, bottom], 0, 1)
    return float((inside[2] - inside[0]) * (inside[3] - inside[1]) / ((right - left) * (bottom - top)))


def _visible_shares(sprites: list[Sprite], size: int) -> list[float]:
    """Of each sprite (back to front): visible pixels / its pixels; 0 where too few are visible."""
    topmost = np.zeros((size, size), dtype=np.uint8)
    for k, sprite in enumerate(sprites):
        topmost[sprite.window()][sprite.inside()] = k + 1
    visible = np.bincount(topmost.ravel(), minlength=len(sprites) + 1)[1:]
    shares = visible / [sprite.inside().sum() for sprite in sprites]
    return list(np.where(visible >= LEAST_VISIBLE_AREA * size**2, shares, 0.0))


def scene_to_panoptic(scene: Scene) -> tuple[np.ndarray, list[dict]]:
    """The panoptic annotation of a scene: in every pixel the topmost thing, or else the stuff.

    Returns:
        ids: (H, W) int32, the segment id in every pixel (no pixel is void), which a COCO PNG holds
            as R + 256 G + 65536 B.
        segments_info: COCO dicts (id, category_id, iscrowd, bbox as x y w h, area); first the things
            in the order of `scene.things`, one each, then the visible stuff classes.
    """
    topmost = np.zeros(scene.stuff.shape, dtype=np.int32)
    for k, thing in enumerate(scene.things):
        topmost[thing.mask] = k + 1
    free = topmost == 0
    stuff_ids = np.flatnonzero(np.bincount(scene.stuff[free], minlength=len(CATEGORIES) + 1))
    category_ids = [thing.category_id for thing in scene.things] + [int(k) for k in stuff_ids]
    for k, category_id in enumerate(stuff_ids):
        topmost[free & (scene.stuff == category_id)] = len(scene.things) + k + 1

    numbers = _segment_ids(category_ids)
    segments = []
    for k, (number, category_id) in enumerate(zip(numbers, category_ids)):
        mask = topmost == k + 1
        segments.append(
            {
                "id": number,
                "category_id": category_id,
                "iscrowd": 0,
                "bbox": bounding_box(mask),
                "area": int(mask.sum()),
            }
        )
    return np.array([0, *numbers], dtype=np.int32)[topmost], segments


def _segment_ids(category_ids: list[int]) -> list[int]:
    """For each segment an id of its own, which is as a colour related to the colour of its class."""
    ids: list[int] = []
    for category_id in category_ids:
        red, green, blue = CATEGORIES[category_id - 1]["color"]
        number = 0
        while number == 0 or number in ids:
            number = red + 256 * green + 65536 * blue
            red, green, blue = (red + 37) % 256, (green + 23) % 256, (blue + 53) % 256
        ids.append(number)
    return ids


def bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the True pixels of (H, W) bool `mask`, which has at least one."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


# ---------------------------------------------------------------------------------------------------
# The photograph


def _cast_shadow(canvas: np.ndarray, placed: _Placed) -> None:
    """Darkens `canvas` (H, W, 3) where a thing stands, in place; the shadow belongs to no segment."""
    size = len(canvas)
    left, _, right, _ = np.array(placed.box()) * size
    x, y = (left + right) / 2, placed.foot[1] * size
    half = 0.55 * (right - left)
    if placed.name in ("person", "tree"):
        # Wide above the ground, narrow on it.
        x, half = placed.foot[0] * size, min(half, 0.165 * placed.scale * size)
    low = max(0.2 * half, 1.0)
    rows = np.arange(max(int(y - 2 * low), 0), min(int(y + 2 * low) + 1, size), dtype=np.float32)
    wide = 1.5 * half
    columns = np.arange(max(int(x - wide), 0), min(int(x + wide) + 1, size), dtype=np.float32)
    if len(rows) and len(columns):
        distance = ((columns[None, :] - x) / half) ** 2 + ((rows[:, None] - y) / low) ** 2
        window = canvas[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        window *= (1 - 0.5 * np.exp(-1.5 * distance))[..., None]


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the painted scene as a camera sees it: tint, exposure, blur, sensor noise."""
    size = len(canvas)
    exposure = (rng.normal(1.0, 0.035, 3) * rng.uniform(0.82, 1.12)).astype(np.float32)
    slope = np.linspace(-0.5, 0.5, size, dtype=np.float32) * float(rng.uniform(-0.25, 0.25))
    image: np.ndarray = canvas * (exposure * (1 + slope[None, :, None]))
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7) * max(size / 256, 0.5))
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * float(rng.uniform(1, 5))
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)
