"""OcclusionScenes: synthetic panoptic scenes in which the result depends on what lies on what."""

from .scene import CATEGORIES, Scene, Thing, draw_scene, scene_to_panoptic
from .writer import write_split

__all__ = ["CATEGORIES", "Scene", "Thing", "draw_scene", "scene_to_panoptic", "write_split"]
