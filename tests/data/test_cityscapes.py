import json

import numpy as np
import pytest
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.check import main
from oanet_d2.data.cityscapes import HEIGHT, WIDTH, load_cityscapes, register_cityscapes

# As cityscapesscripts' createPanopticImgs writes them: stuff segments are named by their label's
# id, things by 1000 * label + number; a group of things is a crowd of the label's own id.
ROAD, SKY, PERSON, CAR = 7, 23, 24, 26
SEGMENTS = [(ROAD, ROAD, 0), (SKY, SKY, 0), (1000 * PERSON, PERSON, 0), (CAR, CAR, 1)]


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """One image of Cityscapes, in its layout."""
    root = tmp_path_factory.mktemp("cityscapes")
    stem = "aachen_000000_000019"
    images, labels = root / "leftImg8bit/train/aachen", root / "gtFine/train/aachen"
    panoptic = root / "gtFine/cityscapes_panoptic_train"
    for folder in (images, labels, panoptic):
        folder.mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 90, 200)).save(images / f"{stem}_leftImg8bit.png")
    Image.new("L", (WIDTH, HEIGHT)).save(labels / f"{stem}_gtFine_labelTrainIds.png")
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    rows = np.array_split(np.arange(HEIGHT), len(SEGMENTS) + 1)  # the last stays void
    for (segment_id, _, _), at in zip(SEGMENTS, rows):
        ids[at] = segment_id
    Image.fromarray(id2rgb(ids)).save(panoptic / f"{stem}_gtFine_panoptic.png")
    annotation = {
        "image_id": stem,
        "file_name": f"{stem}_gtFine_panoptic.png",
        "segments_info": [
            {"id": i, "category_id": c, "area": len(at) * WIDTH, "iscrowd": crowd}
            for (i, c, crowd), at in zip(SEGMENTS, rows)
        ],
    }
    json_file = root / "gtFine/cityscapes_panoptic_train.json"
    image = {"id": stem, "width": WIDTH, "height": HEIGHT}
    image["file_name"] = f"{stem}_gtFine_leftImg8bit.png"  # which is no file's name
    categories = [
        {"id": c, "name": str(c), "isthing": int(c in (PERSON, CAR))} for _, c, _ in SEGMENTS
    ]
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    json_file.write_text(json.dumps(content))
    return images.parent, panoptic, json_file


def test_segments_are_things_or_stuff(cityscapes):
    (loaded,) = load_cityscapes(*map(str, cityscapes))
    found = [(s["isthing"], s["category_id"], s["iscrowd"]) for s in loaded["segments_info"]]
    # of Detectron2's list: road is the first stuff class, sky the eleventh; person the first
    # thing, car the third
    assert found == [(False, 1, 0), (False, 11, 0), (True, 0, 0), (True, 2, 1)]


def test_the_mapper_takes_it(cityscapes):
    (loaded,) = load_cityscapes(*map(str, cityscapes))
    mapper = PanopticDatasetMapper(
        is_train=True,
        augmentations=[],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        num_things=8,
        stuff_only=False,
        ignore_value=255,
    )
    mapped = mapper(loaded)
    assert mapped["image"].shape == (3, HEIGHT, WIDTH)
    assert torch.unique(mapped["sem_seg"]).tolist() == [0, 2, 8, 18, 255]
    assert mapped["instances"].gt_classes.tolist() == [0]  # the crowd is no instance
    assert mapped["instances"].gt_masks.tensor.sum().item() == WIDTH * len(
        np.array_split(np.arange(HEIGHT), 5)[2]
    )


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
    assert set(ours.thing_dataset_id_to_contiguous_id.values()) == set(range(8))
    assert set(ours.stuff_dataset_id_to_contiguous_id.values()) == set(range(1, 12))


def test_missing_files_say_what_makes_them(tmp_path):
    with pytest.raises(ValueError, match="createPanopticImgs.py"):
        load_cityscapes("x", "y", str(tmp_path / "none.json"))


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "link.png"])
def test_names_that_lead_outside_are_refused(cityscapes, tmp_path, name):
    images, panoptic, json_file = cityscapes
    content = json.loads(json_file.read_text())
    link = panoptic / "link.png"
    link.symlink_to("/etc/hosts")
    # Detectron2 asks whether the first one is there.
    content["annotations"].append({**content["annotations"][0], "file_name": name})
    (tmp_path / "x.json").write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match="x.json: .*(leads out of|is a symbolic link)"):
            load_cityscapes(str(images), str(panoptic), str(tmp_path / "x.json"))
    finally:
        link.unlink()


def test_registered_once_under_clear_names():
    assert {f"cityscapes_fine_panoptic_{s}_oanet" for s in ("train", "val")} <= set(DatasetCatalog)
    with pytest.raises(AssertionError, match="already registered"):
        register_cityscapes("elsewhere")


def test_the_checker_takes_it(cityscapes, monkeypatch, capsys):
    name = "cityscapes_fine_panoptic_train_oanet"
    for field, path in zip(("image_root", "panoptic_root", "panoptic_json"), cityscapes):
        monkeypatch.setitem(MetadataCatalog.get(name).__dict__, field, str(path))
    assert main([name, "--workers", "0"]) == 0, capsys.readouterr().out
    monkeypatch.setitem(MetadataCatalog.get(name).__dict__, "image_root", str(cityscapes[1]))
    assert main([name, "--workers", "0"]) == 1
    found = capsys.readouterr().out
    assert "Problems: 1, of 1 kinds" in found and "image missing: 1" in found
    assert "aachen/aachen_000000_000019_leftImg8bit.png" in found
