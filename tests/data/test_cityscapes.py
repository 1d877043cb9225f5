import json

import numpy as np
import pytest
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2.data import cityscapes
from oanet_d2.data.check import main
from oanet_d2.data.register import register_panoptic
from tests.data.conftest import make_mapper

# As cityscapesscripts' createPanopticImgs writes them: stuff segments have their label's id, things
# 1000 * label + number, and a group of things is a crowd with the label's id.
ROAD, SKY, PERSON, CAR = 7, 23, 24, 26
SEGMENTS = [(ROAD, ROAD, 0), (SKY, SKY, 0), (1000 * PERSON, PERSON, 0), (CAR, CAR, 1)]
HEIGHT, WIDTH = 100, 200  # of any size


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """One image in the layout of Cityscapes, registered under another name."""
    stem = "aachen_000000_000019"
    images = tmp_path / "leftImg8bit/train/aachen"
    panoptic = tmp_path / "gtFine/cityscapes_panoptic_train"
    images.mkdir(parents=True)
    panoptic.mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 90, 200)).save(images / f"{stem}_leftImg8bit.png")
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    for k, (segment_id, _, _) in enumerate(SEGMENTS):
        ids[20 * k : 20 * k + 20] = segment_id  # the last rows stay void
    Image.fromarray(id2rgb(ids)).save(panoptic / f"{stem}_gtFine_panoptic.png")
    segments = [
        {"id": i, "category_id": c, "area": 20 * WIDTH, "iscrowd": crowd} for i, c, crowd in SEGMENTS
    ]
    annotation = {"image_id": stem, "file_name": f"{stem}_gtFine_panoptic.png"}
    annotation["segments_info"] = segments
    image = {"id": stem, "width": WIDTH, "height": HEIGHT}
    image["file_name"] = f"{stem}_gtFine_leftImg8bit.png"  # which is no file's name
    content = {"images": [image], "annotations": [annotation], "categories": []}
    (tmp_path / "gtFine/cityscapes_panoptic_train.json").write_text(json.dumps(content))
    names = []

    def register(name, *args, **kwargs):
        names.append(f"test_{name}")
        register_panoptic(names[-1], *args, **kwargs)

    monkeypatch.setattr(cityscapes, "register_panoptic", register)
    cityscapes.register_cityscapes(str(tmp_path))
    yield names[0]
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_loader_and_mapper(dataset):
    (loaded,) = DatasetCatalog.get(dataset)
    found = [(s["isthing"], s["category_id"], s["iscrowd"]) for s in loaded["segments_info"]]
    # of Detectron2's list: road is the first stuff class, sky the eleventh; person the first thing,
    # car the third
    assert found == [(False, 1, 0), (False, 11, 0), (True, 0, 0), (True, 2, 1)]
    mapped = make_mapper(num_things=8)(loaded)
    assert mapped["image"].shape == (3, HEIGHT, WIDTH)
    assert torch.unique(mapped["sem_seg"]).tolist() == [0, 2, 8, 18, 255]
    assert mapped["instances"].gt_classes.tolist() == [0]  # the crowd is no instance
    assert mapped["instances"].gt_masks.tensor[0, 40:60].all()


def test_the_checker_takes_it(dataset, capsys):
    assert main([dataset]) == 0
    (loaded,) = DatasetCatalog.get(dataset)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(loaded["file_name"])
    assert main([dataset]) == 1
    assert "aachen/aachen_000000_000019_leftImg8bit.png" in capsys.readouterr().out


def test_metadata_agrees_with_detectron2s():
    ours = MetadataCatalog.get("cityscapes_fine_panoptic_val_oanet")
    theirs = MetadataCatalog.get("cityscapes_fine_panoptic_val")
    assert ours.panoptic_json.split("cityscapes/")[1] == theirs.panoptic_json.split("cityscapes/")[1]
    names = theirs.thing_classes
    assert ours.thing_classes + ours.stuff_classes[1:] == names[11:] + names[:11]
    for kind in ("thing", "stuff"):
        ids = f"{kind}_dataset_id_to_contiguous_id"
        classes = getattr(ours, f"{kind}_classes")
        for dataset_id, train_id in getattr(theirs, ids).items():
            assert classes[getattr(ours, ids)[dataset_id]] == names[train_id]
