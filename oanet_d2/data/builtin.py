"""
Datasets registered when `oanet_d2` is imported. Their files are looked for under
`$DETECTRON2_DATASETS` (default: `./datasets`), as those of Detectron2's own datasets.
"""

import os
from typing import Dict, List

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.colormap import colormap

from .cityscapes import register_cityscapes
from .occlusion_scenes import CATEGORIES as OCCLUSION_SCENES_CATEGORIES
from .register import register_panoptic


def _categories(things: str, stuff: str) -> List[Dict]:
    names, colors = [*things.split(), stuff], colormap(rgb=True).astype(int).tolist()
    return [
        {"id": k, "name": name, "isthing": int(name != stuff), "color": colors[k - 1]}
        for k, name in enumerate(names, 1)
    ]


# Made by datasets/prepare_street_fashion.py and datasets/prepare_facades.py.
STREET_FASHION_CATEGORIES = _categories(
    "person hair glasses bag hat belt tie scarf watch jewellery gloves footwear outerwear suit dress "
    "top trousers shorts skirt hosiery",
    "background",
)
FACADES_CATEGORIES = _categories(
    "facade shop window balcony-fence non-building-infrastructure vegetation fence "
    "traffic-infrastructure car",
    "street",
)


def dataset_root(name: str) -> str:
    """
    The folder of a dataset.
    """
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), name)


def register_builtin() -> None:
    """
    Register `coco_2017_{train,val}_oanet`, `cityscapes_fine_panoptic_{train,val}_oanet`,
    `street_fashion_{train,val}`, `facades_{train,val}`, `occlusion_scenes_{train,val}`, and
    `occlusion_scenes_{train,val}_visible`: the same scenes with instance masks that are cut to what
    is visible, as in many real datasets.
    """
    register_cityscapes(dataset_root("cityscapes"))
    coco, scenes = dataset_root("coco"), dataset_root("occlusion_scenes")
    photographs = {"street_fashion": STREET_FASHION_CATEGORIES, "facades": FACADES_CATEGORIES}
    for split in ("train", "val"):
        register_panoptic(
            f"coco_2017_{split}_oanet",
            os.path.join(coco, f"{split}2017"),
            os.path.join(coco, "annotations", f"panoptic_{split}2017.json"),
            os.path.join(coco, f"panoptic_{split}2017"),
            os.path.join(coco, "annotations", f"instances_{split}2017.json"),
            categories=COCO_CATEGORIES,
        )
        for dataset, categories in photographs.items():
            root = dataset_root(dataset)
            register_panoptic(
                f"{dataset}_{split}",
                os.path.join(root, "images", split),
                os.path.join(root, f"panoptic_{split}.json"),
                os.path.join(root, f"panoptic_{split}"),
                os.path.join(root, f"instances_{split}.json"),
                categories=categories,
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
