"""
What the things of OcclusionScenes look like: a function per class draws a random specimen into `thing`.

Classes have favourite colours, but share them and often take any colour: a model has to see the shape.
Some functions measure in a length of the thing, and bring that into drawing units at the end.
"""

import numpy as np
from numpy.typing import ArrayLike

from .drawing import Drawing, Paint, Point, Rng, any_colour, any_paint, colour_near, toned

SKINS = [(250, 215, 185), (232, 190, 150), (200, 150, 110), (150, 102, 70), (98, 66, 48)]
HAIRS = [(40, 30, 26), (80, 52, 34), (140, 95, 50), (205, 170, 100), (150, 150, 150), (150, 60, 35)]
WOODS = [(120, 82, 50), (160, 116, 74), (196, 156, 108), (86, 58, 40), (225, 220, 212)]
LEAVES = [(62, 112, 52), (96, 140, 60), (44, 84, 58), (180, 150, 50), (196, 104, 48), (168, 60, 50)]
SHIRTS = [(235, 235, 230), (170, 195, 225), (225, 190, 190), (150, 170, 150), (205, 195, 160)]
TROUSERS = [(45, 55, 85), (85, 85, 90), (95, 75, 60), (40, 40, 45), (110, 120, 100)]
TIES = [(185, 30, 45), (35, 45, 140), (205, 150, 30), (110, 25, 110), (20, 110, 90)]
BACKPACKS = [(230, 110, 30), (45, 140, 85), (95, 60, 150), (190, 40, 60), (40, 110, 180)]
CARS = [(200, 35, 35), (35, 85, 180), (235, 195, 45), (215, 215, 220), (60, 60, 66), (40, 140, 110)]
CUPS = [(240, 240, 235), (240, 150, 180), (95, 195, 210), (235, 205, 90), (200, 60, 50)]
BOTTLES = [(40, 110, 60), (110, 70, 30), (60, 120, 160), (190, 205, 210), (150, 30, 40)]
# x and y of elbow and hand: x as a multiple of the shoulder's, y below the shoulder.
ARMS = [(1.25, 0.17, 1.25, 0.33), (2.1, 0.16, 1.0, 0.28),
        (2.0, 0.02, 2.1, -0.16), (1.75, 0.13, 2.3, 0.25)]
# A saloon, a hatchback, a van: x of the cabin's corners from the back, in half lengths; height.
CABINS = [((-0.68, -0.4, 0.2, 0.52), 1.0), ((-0.95, -0.78, 0.2, 0.55), 1.0),
          ((-0.98, -0.96, 0.48, 0.76), 1.22)]
CUP_MODELS = [("mug", 1.0, 1.0), ("tea cup", 1.15, 0.8), ("goblet", 1.0, 1.25)]  # width, height


def mostly(rng: Rng, colours: list[tuple]) -> np.ndarray:
    """Return a colour near one of `colours` three times out of four, otherwise any colour."""
    return colour_near(rng, colours) if rng.random() < 0.75 else any_colour(rng)


def mostly_unlike(rng: Rng, colours: list[tuple], others: list[np.ndarray]) -> np.ndarray:
    """Draw five colours that are `mostly` near `colours`; return the one farthest from `others`."""
    candidates = [mostly(rng, colours) for _ in range(5)]
    return max(candidates, key=lambda c: min(float(np.abs(c - other).sum()) for other in others))


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
    points = np.asarray(polygon, dtype=np.float64)
    for _ in range(times):
        following = np.roll(points, -1, axis=0)
        cut = [0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following]
        points = np.stack(cut, axis=1).reshape(-1, 2)
    return points


def limb(start: Point, end: Point, start_radius: float, end_radius: float) -> np.ndarray:
    """A tapering bar with round ends, such as an arm."""
    heading = np.degrees(np.arctan2(end[1] - start[1], end[0] - start[0]))
    back = ellipse(*start, start_radius, start_radius, heading + 90, heading + 270)
    return np.concatenate([back, ellipse(*end, end_radius, end_radius, heading - 90, heading + 90)])


def ring(x: float, y: float, a: float, b: float, width: float, start: float, end: float) -> np.ndarray:
    """An arc of an elliptic ring, such as the handle of a cup."""
    inner = ellipse(x, y, a - width, b - width, start, end)
    return np.concatenate([ellipse(x, y, a, b, start, end), inner[::-1]])


def person(rng: Rng, thing: Drawing) -> None:
    """A person from the front (anchor "neck") or from behind ("back"), measured in its height."""
    from_behind, build = rng.random() < 0.35, rng.uniform(0.88, 1.16)
    shoulder, shoulder_y, hip, hip_y = 0.135 * build, -0.8, 0.1 * build, -0.47
    skin = colour_near(rng, SKINS, 8)
    shirt = any_paint(rng, mostly(rng, SHIRTS), 0.075, ("stripes", "checks", "gradient", "dots"))
    # Legs in trousers or a skirt, and shoes.
    cloth = any_paint(rng, mostly(rng, TROUSERS), 0.06, ("plain", "gradient", "checks"))
    shoe = any_colour(rng, 0.3)
    stance, skirt = rng.choice([0.35, 0.6, 1.0, 1.5]), rng.random() < 0.25
    for side in (-1, 1):
        foot = side * hip * stance * rng.uniform(0.7, 1.1)
        thing.add(limb((foot, -0.012), (foot + side * 0.025, -0.008), 0.026, 0.02), shoe)
        thing.add(limb((side * hip * 0.52, hip_y), (foot, -0.035), 0.062, 0.034), skin if skirt else cloth)
    if skirt:
        hem = hip_y * rng.uniform(0.2, 0.45)
        thing.add([(-hip, hip_y), (hip, hip_y), (hip * 1.6, hem), (-hip * 1.6, hem)], cloth)
    # Trunk and arms.
    trunk = [(0.4 * shoulder, -0.83), (shoulder, -0.79), (0.93 * shoulder, -0.62), (1.04 * hip, -0.44)]
    thing.add(rounded(symmetric(trunk), 1), shirt)
    sleeve = shirt.first if rng.random() < 0.7 else skin
    for x in (-0.9 * shoulder, 0.9 * shoulder):
        elbow_x, elbow_y, hand_x, hand_y = ARMS[rng.choice(4, p=[0.5, 0.15, 0.15, 0.2])]
        elbow, hand = (x * elbow_x, shoulder_y + elbow_y), (x * hand_x, shoulder_y + hand_y)
        thing.add(limb(elbow, hand, 0.026, 0.024), skin if rng.random() < 0.4 else sleeve)
        thing.add(limb((x, shoulder_y + 0.035), elbow, 0.036, 0.03), sleeve)
        thing.add(ellipse(*hand, 0.028, 0.028), skin)
    # Neck and head, from the front with a face.
    thing.add(box(-0.03, -0.865, 0.03, -0.805), toned(skin, 0.85))
    hair = colour_near(rng, HAIRS, 8)
    y, half, tall = -0.905, 0.066, 0.083
    if rng.random() < 0.4:
        top, tips = y - tall, y + rng.uniform(0.05, 0.13)
        thing.add(rounded([(-0.08, top), (0.08, top), (0.086, tips), (-0.086, tips)]), hair)
    thing.add(ellipse(0, y, half, tall), hair if from_behind else skin)
    if not from_behind:
        thing.add(ellipse(0, y - 0.01, half * 1.08, tall * 1.05, 180, 360), hair)
        thing.add(ellipse(0, y + 0.012, half * 0.86, tall * 0.72), skin)
        thing.add(ellipse(-0.026, y + 0.002, 0.008, 0.01), toned(hair, 0.4))
        thing.add(ellipse(0.026, y + 0.002, 0.008, 0.01), toned(hair, 0.4))
        thing.add(ellipse(0, y + 0.038, 0.02, 0.007), toned(skin, 0.6))
    thing.anchors = {"shoulder": (shoulder, shoulder_y), "waist": (0.0, hip_y)}
    thing.anchors["back" if from_behind else "neck"] = (0.0, -0.635 if from_behind else -0.812)
    thing.own_colours = [shirt.first, shirt.second]
    thing.resize(rng.uniform(0.6, 0.76))


def table(rng: Rng, thing: Drawing) -> None:
    """A table, seen a little from above. Things stand between the anchors "far_left" and "near_right"."""
    half = rng.uniform(0.22, 0.3)
    height, depth = rng.uniform(0.3, 0.36), rng.uniform(0.15, 0.2)
    far, near = -height, -height + depth
    round_top, cloth = rng.random() < 0.35, rng.random() < 0.3
    colour = mostly(rng, WOODS)
    top = any_paint(rng, colour, 0.09, ("stripes", "checks", "blotches", "gradient"))
    hang = rng.uniform(0.08, 0.12) if cloth else 0.028
    spread = half * (0.55 if round_top else 0.9)
    for x in (-spread * 0.82, spread * 0.82):
        thing.add(box(x - 0.014, near, x + 0.014, -0.06), toned(colour, 0.5))
    for x in (-spread, spread):
        thing.add(box(x - 0.019, near, x + 0.019, 0), toned(colour, 0.65))
    if round_top:
        middle = (near + far) / 2
        upper = ellipse(0, middle, half, depth / 2, 180, 360)
        lower = ellipse(0, middle + hang, half, depth / 2, 0, 180)
        thing.add(np.concatenate([upper, lower]), toned(colour, 0.75))
        thing.add(ellipse(0, middle, half, depth / 2), top)
    else:
        narrow = half * rng.uniform(0.78, 0.92)
        wave = 0.012 if cloth else 0.0
        hem = [(x, near + hang + wave * (-1) ** k) for k, x in enumerate(np.linspace(half, -half, 9))]
        thing.add([(-half, near), (half, near), *hem], toned(colour, 0.75))
        thing.add([(-narrow, far), (narrow, far), (half, near), (-half, near)], top)
    reach = half * (0.62 if round_top else 0.8)
    thing.anchors["far_left"] = (-reach, near - 0.6 * depth)
    thing.anchors["near_right"] = (reach, near - 0.12 * depth)
    thing.own_colours = [top.first, top.second]


def car(rng: Rng, thing: Drawing) -> None:
    """A car from the side, its front to the right."""
    half, roof = rng.uniform(0.28, 0.34), rng.uniform(0.22, 0.26)
    colour = mostly(rng, CARS)
    paint = any_paint(rng, colour, 0.16, ("gradient", "stripes", "blotches"))
    belt, wheel = -0.58 * roof, 0.058
    corners, raised = CABINS[rng.integers(3)]
    roof *= raised
    cabin = np.stack([half * np.array(corners), np.array([belt, -roof, -roof, belt])], axis=1)
    thing.add(cabin, paint)
    bonnet = [(-half, belt), (half * 0.6, belt), (half * 0.98, belt * 0.82)]
    thing.add(rounded([*bonnet, (half, -wheel * 0.75), (-half, -wheel * 0.75)], 1), paint)
    middle = cabin.mean(axis=0)
    back_low, back_high, front_high, front_low = middle + (cabin - middle) * (0.84, 0.72)
    post = (back_low[0] + front_low[0]) / 2 + rng.uniform(-0.03, 0.03)
    glass = colour_near(rng, [(150, 185, 205), (70, 84, 96), (205, 220, 228)], 10)
    thing.add([back_low, back_high, (post - 0.009, back_high[1]), (post - 0.009, back_low[1])], glass)
    thing.add([(post + 0.009, front_low[1]), (post + 0.009, front_high[1]), front_high, front_low], glass)
    thing.add(ellipse(half * 0.92, belt * 0.62, 0.018, 0.016), (250, 240, 190))
    thing.add(box(-half * 0.99, belt * 0.72, -half * 0.92, belt * 0.5), (190, 40, 35))
    thing.add(box(post - 0.05, belt * 0.88, post - 0.015, belt * 0.82), toned(colour, 0.5))
    hub = colour_near(rng, [(60, 62, 66), (130, 134, 140), (190, 192, 196)], 10)
    for x in (-half * 0.6, half * 0.62):
        thing.add(ellipse(x, -wheel, wheel, wheel), (25, 22, 22))
        thing.add(ellipse(x, -wheel, wheel * 0.52, wheel * 0.52), hub)


def tree(rng: Rng, thing: Drawing) -> None:
    """A conifer of three or four tiers, or a broad-leaved tree whose crown is several clumps."""
    height = rng.uniform(0.72, 1.0)
    bark = toned(colour_near(rng, WOODS[:4]), 0.8)
    leaf = mostly(rng, LEAVES)
    trunk = rng.uniform(0.028, 0.042)
    if rng.random() < 0.4:
        thing.add([(-trunk, 0), (trunk, 0), (trunk * 0.7, -0.3), (-trunk * 0.7, -0.3)], bark)
        spread, tiers, crown = rng.uniform(0.17, 0.23), int(rng.integers(3, 5)), height - 0.2
        for k in range(tiers):
            bottom, reach = -0.2 - crown * 0.8 * k / tiers, spread * (1 - 0.72 * k / tiers)
            hem = [(x, bottom - 0.02 * (j % 2)) for j, x in enumerate(np.linspace(reach, -reach, 9))]
            needles = any_paint(rng, toned(leaf, rng.uniform(0.85, 1.1)), 0.06, ("blotches", "gradient"))
            thing.add([(0, bottom - 0.36 * crown), *hem], needles)
        return
    thing.add(symmetric([(trunk * 1.4, 0), (trunk, -0.2), (trunk * 0.7, -0.6 * height)]), bark)
    middle, reach = -0.68 * height, rng.uniform(0.15, 0.2)
    clumps = [(0.0, middle, reach)]
    for angle in np.linspace(0, 2 * np.pi, 7, endpoint=False) + rng.uniform(0, 1):
        x, y = 0.8 * reach * np.cos(angle), middle + 0.23 * height * np.sin(angle)
        clumps.append((x, y, reach * rng.uniform(0.5, 0.75)))
    for x, y, radius in clumps:
        tone = toned(leaf, rng.uniform(0.82, 1.15))
        paint = Paint("blotches", tone, toned(tone, 0.75), seed=int(rng.integers(2**31)))
        thing.add(ellipse(x, y, radius, 0.95 * radius), paint)


def tie(rng: Rng, thing: Drawing, carrier: Drawing) -> None:
    """A tie, measured in the distance from the neck (the origin) to the waist."""
    colour = mostly(rng, TIES)
    paint = any_paint(rng, colour, 0.16, ("stripes", "dots", "checks"))
    length, half = rng.uniform(0.84, 1.02), rng.uniform(0.115, 0.145)
    sway = rng.uniform(-0.25, 0.25) * half
    tip = [(half + sway, length * 0.84), (sway, length), (-half + sway, length * 0.84)]
    thing.add([(-half * 0.55, 0.1), (half * 0.55, 0.1), *tip], paint)
    top, bottom = half * 0.85, half * 0.5
    thing.add([(-top, -0.02), (top, -0.02), (bottom, 0.15), (-bottom, 0.15)], toned(colour, 0.8))
    thing.resize(carrier.anchors["waist"][1] - carrier.anchors["neck"][1])


def backpack(rng: Rng, thing: Drawing, carrier: Drawing) -> None:
    """A backpack around the middle of the back, measured in half the width of the shoulders."""
    colour = mostly_unlike(rng, BACKPACKS, carrier.own_colours)
    paint = any_paint(rng, colour, 0.5, ("gradient", "checks", "blotches", "stripes"))
    half = rng.uniform(0.66, 0.8)
    tall = half * rng.uniform(1.05, 1.35)
    thing.add(ring(0, -tall * 0.95, 0.3, 0.3, 0.12, 180, 360), toned(colour, 0.6))
    side = [(half * 0.9, -tall), (half * 1.05, tall * 0.2), (half, tall)]
    thing.add(rounded(symmetric(side)), paint)
    thing.add(rounded(box(-half * 0.66, tall * 0.08, half * 0.66, tall * 0.8), 1), toned(colour, 0.72))
    thing.add(box(-half * 0.78, -tall * 0.22, half * 0.78, -tall * 0.12), toned(colour, 0.5))
    thing.resize(abs(carrier.anchors["shoulder"][0]))


def cup(rng: Rng, thing: Drawing, carrier: Drawing) -> None:
    """A mug, a tea cup or a goblet."""
    colour = mostly_unlike(rng, CUPS, carrier.own_colours)
    paint = any_paint(rng, colour, 0.04, ("stripes", "dots", "checks", "gradient"))
    shade = toned(colour, 0.85)
    half, tall = rng.uniform(0.058, 0.074), rng.uniform(0.115, 0.15)
    model, wide, high = CUP_MODELS[rng.choice(3, p=[0.45, 0.3, 0.25])]
    half, tall, rim = half * wide, tall * high, half * wide * 0.28
    if model == "mug":
        thing.add(ring(half * 0.95, -tall * 0.52, half * 0.75, tall * 0.33, half * 0.24, -95, 95), shade)
        base = ellipse(0, -rim * 0.7, half * 0.92, rim * 0.7, 0, 180)
        thing.add(np.concatenate([[(-half, -tall), (half, -tall)], base]), paint)
    elif model == "tea cup":
        thing.add(ring(half * 0.8, -tall * 0.62, half * 0.7, tall * 0.3, half * 0.2, -95, 95), shade)
        bowl = [(half, -tall), (half * 0.95, -tall * 0.5), (half * 0.45, 0)]
        thing.add(rounded(symmetric(bowl), 1), paint)
    else:
        thing.add(ellipse(0, -rim * 0.6, half * 0.75, rim * 0.6), shade)
        thing.add(box(-half * 0.22, -tall * 0.55, half * 0.22, -rim * 0.5), shade)
        bowl = [(half, -tall), (half * 0.85, -tall * 0.5), (0.01, -tall * 0.36)]
        thing.add(rounded(symmetric(bowl), 1), paint)
    thing.add(ellipse(0, -tall, half, rim), toned(colour, 1.1))
    thing.add(ellipse(0, -tall, half * 0.8, rim * 0.7), toned(colour, 0.5))


def bottle(rng: Rng, thing: Drawing, carrier: Drawing) -> None:
    """A bottle with a label and a cap."""
    colour = mostly_unlike(rng, BOTTLES, carrier.own_colours)
    half, tall = rng.uniform(0.036, 0.046), rng.uniform(0.16, 0.2)
    neck, slope = half * rng.uniform(0.36, 0.5), rng.uniform(0.5, 0.62)
    heights = np.array([1, slope + 0.16, slope + 0.04, slope - 0.06])
    side = np.stack([[neck, neck, half * 0.85, half], -tall * heights], axis=1)
    base = ellipse(0, -half * 0.22, half, half * 0.22, 0, 180)
    outline = np.concatenate([side, base, side[::-1] * (-1, 1)])
    thing.add(outline, any_paint(rng, colour, 0.06, ("gradient", "plain", "stripes")))
    patterns = ("plain", "stripes", "checks", "dots", "blotches", "gradient")
    label = any_paint(rng, mostly_unlike(rng, CUPS, [colour]), 0.03, patterns)
    thing.add(box(-half, -tall * (slope - 0.12), half, -tall * 0.14), label)
    cap = mostly_unlike(rng, CUPS, [colour])
    thing.add(box(-neck * 1.15, -tall * 1.02, neck * 1.15, -tall * 0.92), cap)
