"""
People in the street and what they wear, as the datasets street_fashion_train and street_fashion_val:

    git clone https://github.com/bearpaw/clothing-co-parsing
    python datasets/prepare_street_fashion.py --source clothing-co-parsing

The source (Apache-2.0; Yang et al., Clothing Co-Parsing, CVPR 2014) labels each pixel with what is
visible there. So everything that is worn is whole, but for the person: its whole mask is skin and all
that is worn, without bags and with the holes filled.
"""

from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat

from oanet_d2.data.builtin import STREET_FASHION_CATEGORIES, dataset_root
from oanet_d2.data.layers import Layers, prepare, shrink

# The labels of the source that a class is made from, where they are not its name alone.
LABELS = {
    "background": "null",
    "person": "skin",
    "glasses": "glasses sunglasses",
    "bag": "bag purse wallet",
    "jewellery": "accessories bracelet earrings necklace ring",
    "footwear": "boots clogs flats heels loafers pumps sandals shoes sneakers wedges",
    "outerwear": "blazer cape coat jacket vest",
    "dress": "bodysuit dress romper",
    "top": "blouse bra cardigan hoodie intimate jumper shirt sweater sweatshirt swimwear t-shirt top",
    "trousers": "jeans leggings panties pants",
    "hosiery": "socks stockings tights",
}
ID_OF = {c["name"]: c["id"] for c in STREET_FASHION_CATEGORIES}
SINGLE = {"bag", "footwear", "gloves", "hosiery", "jewellery"}  # each connected piece is one thing
LEAST_AREA = 12  # pixels; what is smaller becomes void


def layers(source: Path, number: str, classes: np.ndarray) -> Layers:
    """
    Args:
        classes: category id of each label.
    """
    labels = loadmat(source / "annotations" / "pixel-level" / f"{number}.mat")["groundtruth"]
    image = shrink(Image.open(source / "photos" / f"{number}.jpg").convert("RGB"))
    shown = classes[np.asarray(shrink(Image.fromarray(labels)))]
    background, person, bag = (ID_OF[name] for name in ("background", "person", "bag"))
    whole_person = ndimage.binary_fill_holes(~np.isin(shown, [background, bag]))
    masks, void = [(background, shown == background), (person, whole_person)], whole_person & False
    for name in [x for x in ID_OF if x not in ("background", "person")]:
        mask = shown == ID_OF[name]
        pieces, count = ndimage.label(mask, np.ones((3, 3))) if name in SINGLE else (mask, 1)
        for k in range(1, count + 1):
            piece = pieces == k
            if piece.sum() >= LEAST_AREA:
                masks.append((ID_OF[name], piece))
            else:
                void |= piece
    return Layers(f"{number}.jpg", image, masks, void)


def photographs(source: Path, val: bool) -> Iterator[Layers]:
    """Every fifth one is for validation."""
    names = loadmat(source / "label_list.mat")["label_list"][0]
    class_of = {label: name for name, x in LABELS.items() for label in x.split()}
    classes = np.array([ID_OF[class_of.get(str(x[0]), str(x[0]))] for x in names])
    for path in sorted((source / "annotations" / "pixel-level").glob("*.mat")):
        if (int(path.stem) % 5 == 1) == val:
            photograph = layers(source, path.stem, classes)
            if photograph.masks[1][1].any():  # a person; one file labels nothing
                yield photograph


if __name__ == "__main__":
    prepare(__doc__, dataset_root("street_fashion"), STREET_FASHION_CATEGORIES, photographs)
