"""
One scene of OcclusionScenes: what is in it, what lies on what, and what is visible.

A tie or a backpack lies on a person, a cup or a bottle on a table: inside the silhouette of its carrier,
so it is lost if the carrier is painted last. Things on the ground overlap too. The one that stands lower
in the image is nearer, and chance decides its class. Lengths are shares of the image's side until
`rasterise`, so a seed gives the same scene in every image size, but for things too small to be seen.
"""

from typing import NamedTuple

import cv2
import numpy as np

from . import shapes
from .drawing import Drawing, Point, Rng, Sprite, colour_near, rasterise, value_noise

_CLASSES = [  # name, supercategory, isthing, colour
    ("person", "person", 1, (220, 20, 60)),
    ("tie", "worn", 1, (255, 214, 0)),
    ("backpack", "worn", 1, (255, 109, 65)),
    ("table", "furniture", 1, (150, 90, 160)),
    ("cup", "on table", 1, (255, 179, 240)),
    ("bottle", "on table", 1, (0, 255, 130)),
    ("car", "vehicle", 1, (20, 20, 150)),
    ("tree", "plant", 1, (10, 110, 30)),
    ("sky", "background", 0, (110, 180, 240)),
    ("mountain", "background", 0, (128, 118, 130)),
    ("grass", "ground", 0, (150, 250, 150)),
    ("road", "ground", 0, (90, 70, 90)),
    ("sand", "ground", 0, (235, 205, 150)),
    ("water", "ground", 0, (40, 130, 190)),
]
# COCO panoptic categories: things first, then stuff; ids from 1 without gaps.
CATEGORIES: list[dict] = [
    {"id": k, "name": name, "supercategory": group, "isthing": isthing, "color": list(color)}
    for k, (name, group, isthing, color) in enumerate(_CLASSES, 1)
]
ID_OF: dict[str, int] = {category["name"]: category["id"] for category in CATEGORIES}

# A thing is left out if less of its silhouette or of the image is visible.
LEAST_VISIBLE_SHARE, LEAST_VISIBLE_AREA = 0.4, 40 / 256**2
LEAST_VISIBLE_STUFF = 0.005  # share of the image; stuff that shows less becomes its neighbour
LEAST_INSIDE = 0.35  # share of a carried thing's box that is inside the image, or it is left out
NEAREST_GROUND = 1.1  # y, below the image, so the image cuts off some things
ON_GROUND = {"person": 0.42, "table": 0.28, "car": 0.16, "tree": 0.14}  # what stands there, how often
STUFF_COLOURS = {
    "sky": [(140, 190, 235), (190, 205, 220), (235, 200, 170), (110, 150, 210)],
    "mountain": [(120, 120, 135), (110, 125, 105), (150, 130, 115), (95, 105, 130)],
    "grass": [(110, 150, 70), (150, 165, 80), (80, 125, 65), (165, 160, 95)],
    "road": [(120, 120, 124), (150, 142, 134), (95, 95, 104), (168, 160, 150)],
    "sand": [(220, 200, 150), (200, 178, 135), (228, 214, 185), (190, 160, 110)],
    "water": [(80, 130, 165), (90, 150, 150), (120, 150, 175), (70, 110, 130)],
}


class Thing(NamedTuple):
    category_id: int
    mask: np.ndarray  # (H, W) bool: the silhouette inside the image, also where it is hidden


class Scene(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8 RGB
    things: list[Thing]  # from back to front
    stuff: np.ndarray  # (H, W) int32 category ids of the stuff in every pixel, behind the things too


def draw_scene(seed: int | np.random.SeedSequence | Rng, image_size: int) -> Scene:
    """
    Draw one scene. It has at least one thing, and at least 40 % of every thing is visible.

    Args:
        seed: as `numpy.random.default_rng` takes it. The same seed gives the same scene.
        image_size: height and width in pixels, at least 64.
    """
    rng = np.random.default_rng(seed)
    horizon = rng.uniform(0.24, 0.44)
    light = (rng.uniform(-0.4, 0.4), rng.uniform(-0.25, 0.05))
    stuff = _lay_out_stuff(rng, horizon, image_size)
    visible = _visible(_compose(rng, horizon), light, image_size)
    things = [Thing(ID_OF[thing.name], sprite.mask) for thing, sprite in visible]
    stuff = merge_small(stuff, np.any([mask for _, mask in things], axis=0))
    canvas = _paint_stuff(rng, stuff, horizon)
    for thing, sprite in visible:
        if thing.carrier is None:
            _cast_shadow(canvas, thing)
        canvas[sprite.window] += sprite.alpha[..., None] * (sprite.colour - canvas[sprite.window])
    return Scene(_photograph(rng, canvas), things, stuff)


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
        colour = np.array(CATEGORIES[category_id - 1]["color"])
        while (number := int(colour @ (1, 256, 65536))) in segments:
            colour = (colour + (37, 23, 53)) % 256
        ids[mask] = number
        segment: dict = {"id": number, "category_id": category_id, "iscrowd": 0}
        segment |= {"bbox": list(cv2.boundingRect(mask.astype(np.uint8))), "area": int(mask.sum())}
        segments[number] = segment
    return ids, list(segments.values())


def _compose(rng: Rng, horizon: float) -> list[Drawing]:
    """Place things from back to front. Most stand beside, before or behind another one."""
    things: list[Drawing] = []
    for _ in range(1 + rng.binomial(3, 0.6)):
        on_ground = [thing for thing in things if thing.carrier is None]
        partner = on_ground[rng.integers(len(on_ground))] if on_ground and rng.random() < 0.85 else None
        if partner and rng.random() < 0.25:
            name = partner.name
        else:
            name = str(rng.choice(list(ON_GROUND), p=list(ON_GROUND.values())))
        thing = _draw(rng, name)
        _place(rng, thing, partner, horizon)
        things += [thing, *_carried(rng, thing)]
    return sorted(things, key=lambda thing: (thing.carrier or thing).y)


def _draw(rng: Rng, name: str, carrier: Drawing | None = None, at: Point = (0, 0)) -> Drawing:
    """Draw a thing. A carried one is placed `at` this point of its carrier, in drawing units."""
    thing = Drawing(name, carrier)
    getattr(shapes, name)(rng, thing, *([carrier] if carrier else []))
    if name not in ("backpack", "tie") and rng.random() < 0.5:
        thing.resize(1, side=-1)
    if carrier:
        thing.x, thing.y = carrier.x + at[0] * carrier.scale, carrier.y + at[1] * carrier.scale
        thing.scale = carrier.scale
    return thing


def _place(rng: Rng, thing: Drawing, partner: Drawing | None, horizon: float) -> None:
    """Put a thing on the ground. It overlaps `partner`, before or behind it equally often."""
    farthest = max(horizon + 0.24, 0.56)
    own_left, own_top, own_right, _ = thing.box()
    if partner is None:
        thing.x, thing.y = rng.uniform(0.15, 0.85), rng.uniform(farthest, NEAREST_GROUND)
    else:
        left, top, right, bottom = partner.box()
        in_front = rng.random() < 0.5
        # A share of the height of the one in front, so that all classes cover one another equally.
        height = -own_top * partner.scale if in_front else bottom - top
        depth = min(rng.uniform(0.1, 0.6) * height, 0.16) * (1 if in_front else -1)
        y = partner.y + (depth if farthest <= partner.y + depth <= NEAREST_GROUND else -depth)
        thing.y = float(np.clip(y, farthest, NEAREST_GROUND))
    thing.scale = 0.7 + 0.4 * (thing.y - horizon) / (NEAREST_GROUND - horizon)
    if partner is None:
        return
    width = (own_right - own_left) * thing.scale
    # A share of the narrower one, so that a person behind a tree stays visible.
    overlap = min(width, right - left) * rng.uniform(0.15, 0.7)
    side = rng.choice([-1, 1]) if 0.25 < partner.x < 0.75 else np.sign(0.5 - partner.x)
    middle = (left + right) / 2 + side * ((width + right - left) / 2 - overlap)
    thing.x = float(np.clip(middle - (own_left + own_right) / 2 * thing.scale, 0.06, 0.94))


def _carried(rng: Rng, carrier: Drawing) -> list[Drawing]:
    anchors, carried = carrier.anchors, []
    for anchor, name in (("back", "backpack"), ("neck", "tie")):
        if anchor in anchors and rng.random() < 0.9:
            carried.append(_draw(rng, name, carrier, anchors[anchor]))
    if carrier.name == "table":
        (left, far), (right, near) = anchors["far_left"], anchors["near_right"]
        slots = rng.permutation(3)[: rng.choice(4, p=[0.05, 0.3, 0.35, 0.3])]
        for down, slot in sorted((rng.uniform(0.45, 1.0), slot) for slot in slots):
            across = (slot + rng.uniform(0.2, 0.8)) / 3
            at = left + across * (right - left), far + down * (near - far)
            carried.append(_draw(rng, "cup" if rng.random() < 0.5 else "bottle", carrier, at))
    return carried


def _visible(things: list[Drawing], light: Point, size: int) -> list[tuple[Drawing, Sprite]]:
    """Rasterise. Leave out the least visible thing with what it carries, until all are visible enough."""
    kept = []
    for thing in things:
        left, top, right, bottom = thing.box()
        inside = np.prod(np.clip([right, bottom], 0, 1) - np.clip([left, top], 0, 1))
        enough = thing.carrier is None or inside / ((right - left) * (bottom - top)) >= LEAST_INSIDE
        if enough and (sprite := rasterise(thing, size, light)):
            kept.append((thing, sprite))
    while len(kept) > 1:
        topmost = np.max([k * sprite.mask for k, (_, sprite) in enumerate(kept, 1)], axis=0)
        visible = np.bincount(topmost.ravel(), minlength=len(kept) + 1)[1:]
        shares = visible / [sprite.mask.sum() for _, sprite in kept]
        shares[visible < LEAST_VISIBLE_AREA * size**2] = 0
        if shares.min() >= LEAST_VISIBLE_SHARE:
            break
        worst = kept[np.argmin(shares)]
        kept = [one for one in kept if worst[0] not in (one[0], one[0].carrier)] or [worst]
    return kept


def _cast_shadow(canvas: np.ndarray, thing: Drawing) -> None:
    size = len(canvas)
    left, _, right, _ = thing.box() * size
    x, y, half = (left + right) / 2, thing.y * size, 0.55 * (right - left)
    if thing.name in ("person", "tree"):  # wide above the ground, narrow on it
        x, half = thing.x * size, min(half, 0.165 * thing.scale * size)
    low = max(0.2 * half, 1.0)
    rows = slice(max(int(y - 2 * low), 0), min(int(y + 2 * low) + 1, size))
    columns = slice(max(int(x - 1.5 * half), 0), min(int(x + 1.5 * half) + 1, size))
    down, across = (axis.astype(np.float32) for axis in np.ogrid[rows, columns])
    distance = ((across - x) / half) ** 2 + ((down - y) / low) ** 2
    canvas[rows, columns] *= (1 - 0.5 * np.exp(-1.5 * distance))[..., None]


def _photograph(rng: Rng, canvas: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8: tint, exposure, blur and noise of a camera."""
    size = len(canvas)
    exposure = (rng.normal(1.0, 0.035, 3) * rng.uniform(0.82, 1.12)).astype(np.float32)
    slope = np.linspace(-0.5, 0.5, size, dtype=np.float32) * float(rng.uniform(-0.25, 0.25))
    image: np.ndarray = canvas * (exposure * (1 + slope[None, :, None]))
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7) * max(size / 256, 0.5))
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * float(rng.uniform(1, 5))
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def _lay_out_stuff(rng: Rng, horizon: float, size: int) -> np.ndarray:
    """Return (size, size) int32 category ids, as if no thing stood in the scene."""
    rows = np.arange(size, dtype=np.float32)[:, None]
    columns = np.arange(size, dtype=np.float32)[None, :] / size

    def wave(level: float, height: float, bumps: int) -> np.ndarray:
        line = value_noise(rng, (1, size), (2, bumps))[0]
        return (level + height * (2 * line - 1)) * size

    stuff = np.full((size, size), ID_OF["sky"], dtype=np.int32)
    if rng.random() < 0.7:
        mountain = rows >= wave(horizon * rng.uniform(0.4, 0.7), 0.14, rng.integers(4, 9))
        stuff[mountain] = ID_OF["mountain"]
    edge = wave(horizon, 0.012, rng.integers(3, 9))
    ground = rows >= edge
    first, second, third = rng.permutation(["grass", "road", "sand"])
    stuff[ground] = ID_OF[first]
    if rng.random() < 0.35:
        shore = edge + wave(rng.uniform(0.07, 0.16), 0.02, rng.integers(3, 7))
        stuff[ground & (rows < shore)] = ID_OF["water"]
    if rng.random() < 0.45:  # a winding path
        nearness = np.clip((rows - edge) / (size * (1 - horizon)), 0, 1)  # 0 at the horizon
        near, far = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.7)
        middle = far + (near - far) * nearness + 0.1 * np.sin(nearness * rng.uniform(0, 3.5))
        ragged = 0.012 * value_noise(rng, (size, 1), (9, 2))
        path = np.abs(columns - middle) < 0.008 + rng.uniform(0.1, 0.2) * nearness + ragged
        stuff[ground & path] = ID_OF[second]
    if rng.random() < 0.5:
        stuff[rows >= wave(rng.uniform(0.72, 0.9), 0.08, rng.integers(3, 7))] = ID_OF[third]
    if rng.random() < 0.5:  # a patch
        y, x, half = rng.uniform(horizon + 0.2, 0.95), rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.28)
        ragged = 0.8 + 0.6 * value_noise(rng, (size, size), (6, 6))
        patch = ((columns - x) / half) ** 2 + ((rows / size - y) / (0.4 * half)) ** 2 < ragged
        stuff[ground & patch] = ID_OF[rng.choice([second, third, "water"])]
    return stuff


def merge_small(stuff: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Replace each class that is hardly visible by the nearest other class, unless all are."""
    visible = np.bincount(stuff[~covered], minlength=len(CATEGORIES) + 1)
    keep = (visible >= LEAST_VISIBLE_STUFF * stuff.size)[stuff]
    if keep.all() or not keep.any():
        return stuff
    gaps, nearest = (~keep).astype(np.uint8), cv2.DIST_LABEL_PIXEL
    _, label = cv2.distanceTransformWithLabels(gaps, cv2.DIST_L2, 3, labelType=nearest)
    class_of_label = np.zeros(label.max() + 1, dtype=np.int32)
    class_of_label[label[keep]] = stuff[keep]
    return class_of_label[label]


def _paint_stuff(rng: Rng, stuff: np.ndarray, horizon: float) -> np.ndarray:
    """Return (H, W, 3) float32 RGB, 0 to 255: the (H, W) category ids `stuff` in random textures."""
    canvas = np.zeros((*stuff.shape, 3), dtype=np.float32)
    down = np.linspace(0, 1, len(stuff), dtype=np.float32)[:, None]

    def noise(rows: int, columns: int) -> np.ndarray:
        return value_noise(rng, stuff.shape, (rows, columns)) - 0.5

    tones = {  # (H, W) around 1, a factor for the colour of the class
        "sky": lambda: 0.86 + 0.17 * down / horizon
        + 0.3 * np.clip(noise(9, 4) + 0.3 * noise(20, 10), 0, 1),
        "mountain": lambda: 1 + 0.45 * noise(10, 14) + 0.25 * noise(30, 34) - 0.2 * (down - horizon),
        "grass": lambda: 1 + 0.5 * noise(48, 96) + 0.3 * noise(6, 6),
        "road": lambda: 1 + 0.22 * noise(100, 100) + 0.14 * noise(8, 3),
        "sand": lambda: 1
        + 0.09 * np.sin(260 * down * (1.3 - 0.6 * down) + 14 * noise(5, 4)) + 0.12 * noise(90, 90),
        "water": lambda: 1 + 0.5 * noise(60, 9) + 0.25 * noise(110, 26),
    }
    for name, tone in tones.items():
        here = stuff == ID_OF[name]
        if here.any():
            canvas[here] = colour_near(rng, STUFF_COLOURS[name], 8) * tone()[here, None]
    return canvas
