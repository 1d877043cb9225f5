import json

import numpy as np
import pytest
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as coco_mask

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2 import register_panoptic
from oanet_d2.data import PanopticDatasetMapper, builtin

SIZES = [(12, 8), (9, 14), (32, 32)]  # width, height
PERSON, TIE, SKY = 1, 20, 300
CATEGORIES = [
    {"id": PERSON, "name": "person", "isthing": 1},
    {"id": TIE, "name": "tie", "isthing": True},
    {"id": SKY, "name": "sky", "isthing": 0},
]


def make_mapper(is_train=True, augmentations=(), **kwargs):
    args = {"num_things": 7, "stuff_only": False, "ignore_value": 255, "image_format": "RGB"}
    args.update(use_instance_mask=True, instance_mask_format="bitmask")
    return PanopticDatasetMapper(is_train, augmentations=list(augmentations), **{**args, **kwargs})


class Dataset:
    """
    Three images without a fault. Each has a void row, a person (id 1000 + i) on the left and sky (id
    70000 + i) on the right. The persons' whole masks are polygons, an RLE as a string, and one as a
    list of runs.
    """

    def __init__(self, root):
        self.root, self.images, self.pngs = root, [], []
        images, annotations, instances = [], [], []
        for folder in ("images", "pngs"):
            (root / folder).mkdir(parents=True)
        for i, (width, height) in enumerate(SIZES):
            self.images.append(root / "images" / f"{i}.jpg")
            self.pngs.append(root / "pngs" / f"{i}.png")
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images[i])
            self.write_png(i, self.ids(i))
            segments = [
                {"id": k, "category_id": c, "area": int((self.ids(i) == k).sum()), "iscrowd": 0}
                for k, c in ((1000 + i, PERSON), (70000 + i, SKY))
            ]
            images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
            annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
            person = self.ids(i) == 1000 + i
            rle = coco_mask.encode(np.asfortranarray(person, dtype=np.uint8))
            rle = {"size": rle["size"], "counts": rle["counts"].decode()}
            flat = person.ravel(order="F")
            ends = np.flatnonzero(np.diff(flat.astype(int), prepend=0, append=2))
            runs = {"size": [height, width], "counts": np.diff(ends, prepend=0).tolist()}
            mask = [[[0, 1, 5, 1, 5, 7.5]], rle, runs][i]
            bbox = [[0, 1, 5, 6.5], [0, 1, 4, 13], [0, 1, 16, 31]][i]
            instance = {"id": 10 + i, "image_id": i, "category_id": PERSON, "bbox": bbox}
            instances.append({**instance, "area": 32.5, "iscrowd": 0, "segmentation": mask})
        self.panoptic = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        self.instances = {"images": images, "annotations": instances, "categories": CATEGORIES[:2]}
        # no two share an entry
        self.panoptic, self.instances = json.loads(json.dumps([self.panoptic, self.instances]))

    @staticmethod
    def ids(i):
        width, height = SIZES[i]
        ids = np.full((height, width), 70000 + i)
        ids[:, : width // 2] = 1000 + i
        ids[0] = 0
        return ids

    def write_png(self, i, ids, **kwargs):
        Image.fromarray(id2rgb(ids)).save(self.pngs[i], **kwargs)

    def segment(self, i, k):
        return self.panoptic["annotations"][i]["segments_info"][k]

    def paths(self):
        """
        Write the JSONs.

        Returns:
            what `register_panoptic` takes.
        """
        paths = self.root / "panoptic.json", self.root / "instances.json"
        for path, content in zip(paths, (self.panoptic, self.instances)):
            path.write_text(json.dumps(content))
        return [str(self.root / "images"), str(paths[0]), str(self.root / "pngs"), str(paths[1])]


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


@pytest.fixture
def builtin_datasets(tmp_path, monkeypatch):
    """What `register_builtin` registers, as "test_" and its name, with the files in `tmp_path`."""
    names = []

    def register(name, *args, **kwargs):
        names.append(f"test_{name}")
        register_panoptic(names[-1], *args, **kwargs)

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(builtin, "register_panoptic", register)
    builtin.register_builtin()
    yield tmp_path
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
