"""OcclusionScenes: synthetic panoptic scenes in which knowing what lies on what decides the result.

`draw_scene` draws one from a seed, `ensure_split` has a whole split on disk in the layout of COCO
panoptic; `python -m oanet_d2.data.occlusion_scenes` does so from the command line.
"""

from .categories import CATEGORIES
from .scene import Scene, Thing, draw_scene, scene_to_panoptic
from .writer import ensure_split, write_split

__all__ = [
    "CATEGORIES",
    "Scene",
    "Thing",
    "draw_scene",
    "ensure_split",
    "scene_to_panoptic",
    "write_split",
]
