"""The classes of OcclusionScenes."""

from typing import Any

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
CATEGORIES: list[dict[str, Any]] = [
    {"id": k, "name": name, "supercategory": group, "isthing": isthing, "color": list(color)}
    for k, (name, group, isthing, color) in enumerate(_CLASSES, 1)
]
ID_OF: dict[str, int] = {category["name"]: category["id"] for category in CATEGORIES}
