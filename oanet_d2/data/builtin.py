"""
Datasets registered when `oanet_d2` is imported. Their files are looked for under
`$DETECTRON2_DATASETS` (default: `./datasets`), as those of Detectron2's own datasets.
"""

import os

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from .cityscapes import register_cityscapes
from .occlusion_scenes import CATEGORIES as OCCLUSION_SCENES_CATEGORIES
from .register import register_panoptic


def occlusion_scenes_root() -> str:
    """
    The folder of OcclusionScenes.
    """
    return os.path.join(_root(), "occlusion_scenes")


def _root() -> str:
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_builtin() -> None:
    """
    Register `coco_2017_{train,val}_oanet`, `cityscapes_fine_panoptic_{train,val}_oanet`,
    `occlusion_scenes_{train,val}`, and `occlusion_scenes_{train,val}_visible`: the same scenes with
    instance masks that are cut to what is visible, as in many real datasets.
    """
    register_cityscapes(os.path.join(_root(), "cityscapes"))
    coco, scenes = os.path.join(_root(), "coco"), occlusion_scenes_root()
    for split in ("train", "val"):
        register_panoptic(
            f"coco_2017_{split}_oanet",
            os.path.join(coco, f"{split}2017"),
            os.path.join(coco, "annotations", f"panoptic_{split}2017.json"),
            os.path.join(coco, f"panoptic_{split}2017"),
            os.path.join(coco, "annotations", f"instances_{split}2017.json"),
            categories=COCO_CATEGORIES,
        )
        annotations = os.path.join(scenes, "annotations")
        silhouettes = os.path.join(annotations, f"instances_{split}.json")
        for name, instances_json in (("", silhouettes), ("_visible", None)):
            register_panoptic(
                f"occlusion_scenes_{split}{name}",
                os.path.join(scenes, split),
                os.path.join(annotations, f"panoptic_{split}.json"),
                os.path.join(scenes, f"panoptic_{split}"),
                instances_json,
                categories=OCCLUSION_SCENES_CATEGORIES,
            )


register_builtin()
