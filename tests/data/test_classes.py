import json

import pytest

from detectron2.config import get_cfg

from oanet_d2 import add_oanet_config, complete_config
from oanet_d2.data import check_classes
from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import load_config, registered, scenes_paths


def config(*opts):
    cfg = get_cfg()
    add_oanet_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def counts(cfg):
    return cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES


@pytest.mark.parametrize(
    "dataset, supervision, expected",
    [
        ("occlusion_scenes_train", "things_and_stuff", (8, 14)),
        ("occlusion_scenes_train_visible", "stuff", (8, 7)),
        ("coco_2017_train_oanet", "things_and_stuff", (80, 133)),
        ("coco_2017_train_oanet", "stuff", (80, 54)),
        ("cityscapes_fine_panoptic_train_oanet", "things_and_stuff", (8, 19)),
        ("cityscapes_fine_panoptic_val_oanet", "stuff", (8, 12)),
    ],
)
def test_counts_follow_the_dataset(dataset, supervision, expected):
    """COCO has 80 things and 53 stuff classes, Cityscapes 8 and 11."""
    for split in ("TRAIN", "TEST"):
        cfg = config(f"DATASETS.{split}", (dataset,))
        cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = supervision
        complete_config(cfg)
        assert counts(cfg) == expected


def test_what_the_user_sets_stays_and_is_checked():
    cfg = config("DATASETS.TRAIN", ("occlusion_scenes_train",), "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    complete_config(cfg)
    assert counts(cfg) == (8, 14)
    cfg = config("DATASETS.TRAIN", ("occlusion_scenes_train",), "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    with pytest.raises(ValueError, match="ROI_HEADS.NUM_CLASSES is 80.*8 thing.*must be 8"):
        complete_config(cfg)


def test_contradictions_name_both_numbers():
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    check_classes(cfg)
    for key, value, words in [
        ("MODEL.ROI_HEADS.NUM_CLASSES", 80, ["is 80", "8 thing", "must be 8"]),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7, ["is 7", "6 stuff", "must be 14"]),
        ("MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", ["is 14", "6 stuff", "must be 7"]),
        ("DATASETS.TEST", ("coco_2017_val",), ["coco_2017_val", "register_panoptic"]),
        ("DATASETS.TEST", ("coco_2017_val_oanet",), ["is 8", "80 thing", "must be 80"]),
        ("DATASETS.TEST", ("cityscapes_fine_panoptic_val",), ["register_panoptic"]),
        ("DATASETS.TEST", ("my_typo",), ["no dataset 'my_typo'", "DATASETS.PANOPTIC"]),
    ]:
        wrong = cfg.clone()
        wrong.merge_from_list([key, value])
        with pytest.raises(ValueError) as error:
            check_classes(wrong)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_without_a_dataset_there_is_nothing_to_follow():
    cfg = config()
    complete_config(cfg)
    assert counts(cfg) == (0, 0)


def test_two_datasets_of_other_classes(tmp_path):
    """Counts follow the first; the second has to agree."""
    write_split(tmp_path, "train", 1, image_size=64, seed=0, num_workers=0)
    with registered("test_classes_scenes", *scenes_paths(tmp_path, "train")) as name:
        cfg = config("DATASETS.TRAIN", (name,), "DATASETS.TEST", ("coco_2017_val_oanet",))
        words = f"is 8, as dataset '{name}' needs it, but dataset 'coco_2017_val_oanet' has 80 thing"
        with pytest.raises(ValueError, match=words):
            complete_config(cfg)


def test_two_datasets_of_classes_in_another_order(tmp_path):
    """As many, but the model would take one for the other."""
    write_split(tmp_path, "train", 1, image_size=64, seed=0, num_workers=0)
    images, panoptic, pngs, _ = scenes_paths(tmp_path, "train")
    content = json.loads(panoptic.read_text())
    names = [c["name"] for c in content["categories"] if c["isthing"]]
    content["categories"].reverse()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    cfg = config("DATASETS.TRAIN", ("order_a",), "DATASETS.TEST", ("order_b",))
    with registered("order_a", images, panoptic, pngs), registered("order_b", images, other, pngs):
        words = rf"thing_classes\[0\] of dataset 'order_b' is '{names[-1]}', of 'order_a' it is "
        with pytest.raises(ValueError, match=words + f"'{names[0]}'"):
            complete_config(cfg)
