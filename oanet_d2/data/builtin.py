"""
Datasets registered when `oanet_d2` is imported. Their files are looked for under
`$DETECTRON2_DATASETS` (default: `./datasets`), as those of Detectron2's own datasets.
"""

import os
from typing import Any, Dict, List

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES
from detectron2.utils.colormap import colormap

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

# Folder, and in it the files of the split {}, as register_panoptic takes them. Those of Cityscapes lie
# where Detectron2's documentation wants them; `cityscapesscripts` makes the panoptic ones.
_COCO = "{}2017", "annotations/panoptic_{}2017.json", "panoptic_{}2017", "annotations/instances_{}2017.json"
_CITYSCAPES = "leftImg8bit/{}", "gtFine/cityscapes_panoptic_{}.json", "gtFine/cityscapes_panoptic_{}"
_PHOTOGRAPHS = "images/{}", "panoptic_{}.json", "panoptic_{}", "instances_{}.json"
_SCENES = "{}", "annotations/panoptic_{}.json", "panoptic_{}", "annotations/instances_{}.json"
_DATASETS = {
    "coco_2017_{}_oanet": ("coco", COCO_CATEGORIES, _COCO),
    "cityscapes_fine_panoptic_{}_oanet": ("cityscapes", CITYSCAPES_CATEGORIES, _CITYSCAPES),
    "street_fashion_{}": ("street_fashion", STREET_FASHION_CATEGORIES, _PHOTOGRAPHS),
    "facades_{}": ("facades", FACADES_CATEGORIES, _PHOTOGRAPHS),
    "occlusion_scenes_{}": ("occlusion_scenes", OCCLUSION_SCENES_CATEGORIES, _SCENES),
    "occlusion_scenes_{}_visible": ("occlusion_scenes", OCCLUSION_SCENES_CATEGORIES, _SCENES[:3]),
}


def dataset_root(name: str) -> str:
    """The folder of a dataset."""
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), name)


def register_builtin() -> None:
    """
    Register `coco_2017_{train,val}_oanet`, `cityscapes_fine_panoptic_{train,val}_oanet`,
    `street_fashion_{train,val}`, `facades_{train,val}`, `occlusion_scenes_{train,val}`, and
    `occlusion_scenes_{train,val}_visible`: the same scenes with instance masks that are cut to what
    is visible, as in many real datasets. (Cityscapes has no others.)
    """
    for name, (folder, categories, files) in _DATASETS.items():
        options: Dict[str, Any] = {"categories": categories}
        if folder == "cityscapes":
            options["image_name"] = _cityscapes_image
        for split in ("train", "val"):
            paths: List[Any] = [os.path.join(dataset_root(folder), x.format(split)) for x in files]
            register_panoptic(name.format(split), *paths, **options)


def _cityscapes_image(image: Dict) -> str:
    """Such as `aachen/aachen_000000_000019_leftImg8bit.png`. (The JSON names no city's folder.)"""
    city = str(image["id"]).split("_")[0]
    return f"{city}/{image['id']}_leftImg8bit.png"


register_builtin()
