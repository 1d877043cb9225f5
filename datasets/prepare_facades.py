"""
Building facades, as the datasets facades_train and facades_val:

    git clone https://github.com/a-hwang/building-facade-segmentation
    python datasets/prepare_facades.py --source building-facade-segmentation

The source (CC BY 4.0) has COCO polygons of whole, overlapping things, and does not say which one is in
front. So the order of the classes decides: a window lies on its facade, a balustrade on the window, a
car on all; of one class, the smaller one. Whether a tree stands in front of a window or balustrade
cannot be told, so where they meet is void.
"""

import json
from collections import defaultdict
from hashlib import md5
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from oanet_d2.data.builtin import FACADES_CATEGORIES, dataset_root
from oanet_d2.data.layers import Layers, prepare, shrink
from oanet_d2.data.load import as_rle

# From the back to the front. Things are in this order, too.
BOTTOM_UP = [c["name"] for c in sorted(FACADES_CATEGORIES, key=lambda c: c["isthing"])]
ID_OF = {c["name"]: c["id"] for c in FACADES_CATEGORIES}
LEAST_AREA = 6  # pixels; what is smaller is left out


def photographs(source: Path, val: bool) -> Iterator[Layers]:
    """Every fifth one is for validation, by chance."""
    for folder in ("train", "valid", "test"):
        coco = json.loads((source / folder / "_annotations.coco.json").read_text())
        names = {c["id"]: c["name"] for c in coco["categories"]}
        shown = defaultdict(list)
        for x in coco["annotations"]:
            shown[x["image_id"]].append((names[x["category_id"]], x["segmentation"]))
        for image in coco["images"]:
            # Parts of one photograph, such as IMG_1_scaled_0... and IMG_1_scaled_1..., go together.
            photograph = image["file_name"].split("_scaled_")[0].encode()
            if (int(md5(photograph, usedforsecurity=False).hexdigest(), 16) % 5 == 0) == val:
                path = source / folder / image["file_name"]
                moved = path.parent / "images" / path.name  # some of "valid"
                yield layers(path if path.exists() else moved, shown[image["id"]])


def layers(path: Path, shown: List[Tuple[str, Any]]) -> Layers:
    """
    Args:
        shown: name of the class, and COCO segmentation.
    """
    image = Image.open(path).convert("RGB")
    small = shrink(image)
    masks: Dict[str, List[np.ndarray]] = {name: [] for name in BOTTOM_UP}
    for name, segmentation in shown:
        rle = as_rle(segmentation, image.height, image.width)
        columns = mask_util.decode(rle).T  # the order of its bytes in memory
        mask = np.asarray(shrink(Image.fromarray(columns))).T > 0
        if mask.sum() >= LEAST_AREA:
            masks[name].append(mask)
    nothing = np.zeros(small.size[::-1], bool)
    union = {name: np.any([nothing, *x], axis=0) for name, x in masks.items()}
    masks["street"] = [union["street"]]
    return Layers(
        path.name,
        small,
        [(ID_OF[c], mask) for c in BOTTOM_UP for mask in sorted(masks[c], key=np.sum, reverse=True)],
        void=union["vegetation"] & (union["window"] | union["balcony-fence"]),
    )


if __name__ == "__main__":
    prepare(__doc__, dataset_root("facades"), FACADES_CATEGORIES, photographs)
