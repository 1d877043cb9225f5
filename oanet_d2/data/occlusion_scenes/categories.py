"""The classes of OcclusionScenes."""

from typing import Any, Dict, List

_THINGS = [
    ("person", "person", (220, 20, 60)),
    ("tie", "worn", (255, 214, 0)),
    ("backpack", "worn", (255, 109, 65)),
    ("table", "furniture", (150, 90, 160)),
    ("cup", "on table", (255, 179, 240)),
    ("bottle", "on table", (0, 255, 130)),
    ("car", "vehicle", (20, 20, 150)),
    ("tree", "plant", (10, 110, 30)),
]
_STUFF = [
    ("sky", "background", (110, 180, 240)),
    ("mountain", "background", (128, 118, 130)),
    ("grass", "ground", (150, 250, 150)),
    ("road", "ground", (90, 70, 90)),
    ("sand", "ground", (235, 205, 150)),
    ("water", "ground", (40, 130, 190)),
]

CATEGORIES: List[Dict[str, Any]] = [
    {
        "id": k + 1,
        "name": name,
        "supercategory": supercategory,
        "isthing": int(k < len(_THINGS)),
        "color": list(color),
    }
    for k, (name, supercategory, color) in enumerate(_THINGS + _STUFF)
]
"""COCO panoptic categories: things first, then stuff; ids from 1 without gaps."""

ID_OF = {category["name"]: category["id"] for category in CATEGORIES}
"""Name of a class -> its id."""
