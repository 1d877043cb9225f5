import json

import numpy as np
import pytest
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.check import main
from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import load_config
from tests.data.conftest import make_mapper

# As cityscapesscripts' createPanopticImgs writes them: stuff segments have their label's id, things
# 1000 * label + number, and a group of things is a crowd with the label's id.
ROAD, SKY, PERSON, CAR = 7, 23, 24, 26
SEGMENTS = [(ROAD, ROAD, 0), (SKY, SKY, 0), (1000 * PERSON, PERSON, 0), (CAR, CAR, 1)]
HEIGHT, WIDTH = 100, 200  # of any size


def test_visible_scenes_have_masks_cut_to_what_is_visible(builtin_datasets):
    root, scenes = builtin_datasets / "occlusion_scenes", "test_occlusion_scenes_train"
    write_split(root, "train", 3, image_size=96, seed=0, num_workers=0)
    assert MetadataCatalog.get(scenes).json_file
    assert MetadataCatalog.get(scenes + "_visible").json_file is None
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    mapper = PanopticDatasetMapper(cfg, is_train=True, augmentations=[])
    whole, visible = (DatasetCatalog.get(scenes + end) for end in ("", "_visible"))
    assert len(visible) == 3
    overlaps = 0
    for with_silhouettes, d in zip(whole, visible):
        assert d["file_name"] == with_silhouettes["file_name"]
        sample = mapper(d)
        instances = sample["instances"]
        ids, segments = sample["panoptic_seg"]
        things = [s for s in segments if s["isthing"]]
        assert len(instances) == len(things) > 1
        for mask, c, segment in zip(instances.gt_masks.tensor, instances.gt_classes, things):
            assert torch.equal(mask, ids == segment["id"]) and c == segment["category_id"]
        assert instances.gt_masks.tensor.sum(0).max() == 1

        sample = mapper(with_silhouettes)
        assert torch.equal(sample["panoptic_seg"][0], ids) and sample["panoptic_seg"][1] == segments
        overlaps += (sample["instances"].gt_masks.tensor.sum(0) > 1).sum()
    assert overlaps > 0  # or there would be nothing to cut


@pytest.fixture
def cityscapes(builtin_datasets):
    """One image in the layout of Cityscapes."""
    stem = "aachen_000000_000019"
    images = builtin_datasets / "cityscapes/leftImg8bit/train/aachen"
    panoptic = builtin_datasets / "cityscapes/gtFine/cityscapes_panoptic_train"
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
    panoptic.with_suffix(".json").write_text(json.dumps(content))
    return "test_cityscapes_fine_panoptic_train_oanet"


def test_cityscapes_in_loader_and_mapper(cityscapes):
    (loaded,) = DatasetCatalog.get(cityscapes)
    found = [(s["isthing"], s["category_id"], s["iscrowd"]) for s in loaded["segments_info"]]
    # Of Detectron2's list: road is the first stuff class, sky the eleventh; person the first thing,
    # car the third
    assert found == [(False, 1, 0), (False, 11, 0), (True, 0, 0), (True, 2, 1)]
    mapped = make_mapper(num_things=8)(loaded)
    assert mapped["image"].shape == (3, HEIGHT, WIDTH)
    assert torch.unique(mapped["sem_seg"]).tolist() == [0, 2, 8, 18, 255]
    assert mapped["instances"].gt_classes.tolist() == [0]  # the crowd is no instance
    assert mapped["instances"].gt_masks.tensor[0, 40:60].all()


def test_the_checker_takes_cityscapes(cityscapes, capsys):
    assert main([cityscapes]) == 0
    (loaded,) = DatasetCatalog.get(cityscapes)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(loaded["file_name"])
    assert main([cityscapes]) == 1
    assert "aachen/aachen_000000_000019_leftImg8bit.png" in capsys.readouterr().out


def test_cityscapes_metadata_agrees_with_detectron2s():
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
