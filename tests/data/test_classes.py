from operator import attrgetter

import pytest

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

from oanet_d2 import add_oanet_config, complete_config
from tests.conftest import load_config, registered
from tests.data.conftest import Dataset


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


def test_what_the_user_sets_stays():
    cfg = config("DATASETS.TRAIN", ("occlusion_scenes_train",), "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    complete_config(cfg)
    cfg.freeze()
    complete_config(cfg)  # nothing is left to do
    assert counts(cfg) == (8, 14)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("MODEL.ROI_HEADS.NUM_CLASSES", 80, "ROI_HEADS.NUM_CLASSES is 80.*8 thing.*must be 8"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7, "NUM_CLASSES is 7.*6 stuff.*must be 14"),
        ("MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "NUM_CLASSES is 14.*6 stuff.*must be 7"),
        ("DATASETS.TEST", ("coco_2017_val_oanet",), "thing class 1 of dataset 'coco.*'bicycle'"),
        ("DATASETS.TEST", ("my_typo",), "no dataset 'my_typo'.*DATASETS.PANOPTIC"),
        # Detectron2's own: of instances, panoptic in its two conventions, of Cityscapes
        ("DATASETS.TEST", ("coco_2017_val",), "'coco_2017_val'.*register_panoptic"),
        ("DATASETS.TEST", ("coco_2017_val_panoptic",), "_panoptic'.*register_panoptic"),
        ("DATASETS.TEST", ("coco_2017_val_panoptic_separated",), "_separated'.*register_panoptic"),
        ("DATASETS.TEST", ("cityscapes_fine_panoptic_val",), "cityscapes.*register_panoptic"),
        # As the first one, its classes look like ours, one more; a worker would fail at the first image.
        ("DATASETS.TRAIN", ("coco_2017_val_panoptic_separated",), "_separated.*register_panoptic"),
        ("MODEL.META_ARCHITECTURE", "SRMFromAnnotations", "DATASETS.TEST is .*occlusion_scenes_val"),
        ("DATASETS.TEST", ("occlusion_scenes_val",) * 2, "DATASETS.TEST .*once"),
    ],
)
def test_contradictions_name_both_sides(key, value, words):
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=words):
        complete_config(cfg)


def test_no_class_is_void():
    """Things and stuff together are more than 255 classes, or the ignore value is one of a few."""
    for value, expected in ((255, 255), (13, -1), (14, 14), (-1, -1), (0, -1)):
        cfg = config("DATASETS.TRAIN", ("occlusion_scenes_train",))
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = value
        complete_config(cfg)
        assert expected == cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE


def test_things_need_their_ids(tmp_path):
    with registered("set_no_ids", *Dataset(tmp_path).paths()):
        del MetadataCatalog.get("set_no_ids").thing_dataset_id_to_contiguous_id
        with pytest.raises(ValueError, match="'set_no_ids'.*register_panoptic"):
            complete_config(config("DATASETS.TRAIN", ("set_no_ids",)))


def test_a_dataset_without_things_has_a_class_that_is_never_detected(tmp_path):
    dataset = Dataset(tmp_path)
    dataset.panoptic["categories"] = dataset.panoptic["categories"][2:]
    with registered("set_stuff", *dataset.paths()):
        for supervision in ("things_and_stuff", "stuff"):
            cfg = config("DATASETS.TRAIN", ("set_stuff",))
            cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = supervision
            complete_config(cfg)
            assert counts(cfg) == (1, 2) and cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 1


def test_without_a_dataset_there_is_nothing_to_follow():
    cfg = config()
    complete_config(cfg)
    assert counts(cfg) == (0, 0)


def test_two_datasets_have_to_agree(tmp_path):
    """In number and order: the model would take one class for the other."""
    a, b, c = (Dataset(tmp_path / x) for x in "abc")
    b.panoptic["categories"].reverse()
    c.panoptic["categories"].append({"id": 5, "name": "sea", "isthing": 0})
    cfg = config("DATASETS.TRAIN", ("set_a",), "DATASETS.TEST", ("set_b",))
    with registered("set_a", *a.paths()), registered("set_b", *b.paths()):
        with pytest.raises(ValueError, match="thing class 0 of dataset 'set_b' is 'tie', .*'person'"):
            complete_config(cfg)
    with registered("set_a", *a.paths()), registered("set_b", *c.paths()):
        with pytest.raises(ValueError, match="stuff class 1 of dataset 'set_b' is 'sea', .*None"):
            complete_config(cfg)


@pytest.mark.parametrize(
    "key, wrong, right",
    [
        ("INPUT.FORMAT", ["BRG", "rgb", "CMYK"], ["BGR", "RGB", "YUV-BT.601", "L"]),
        ("INPUT.MASK_FORMAT", ["rle", ""], ["polygon", "bitmask"]),
        ("MODEL.DEVICE", ["gpu", "cpu:0", ""], ["cpu", "cuda", "cuda:1", "mps"]),
        ("DATASETS.TRAIN", [None, "occlusion_scenes_train"], [()]),
        ("INPUT.RANDOM_FLIP", ["both"], ["vertical", "none"]),
        ("INPUT.CROP.TYPE", ["random"], ["relative"]),
        ("INPUT.CROP.SIZE", [[1.5, 1.0], [0, 1]], [[0.1, 1.0], [1, 1]]),
        ("DATALOADER.SAMPLER_TRAIN", ["WeightedTrainingSampler"], ["RepeatFactorTrainingSampler"]),
        ("MODEL.LOAD_PROPOSALS", [True], [False]),
        ("MODEL.PROPOSAL_GENERATOR.NAME", ["PrecomputedProposals"], ["RPN"]),
    ],
)
def test_wrong_values_are_named_before_anything_is_read(key, wrong, right):
    """(Whether there is such a device, torch says.)"""
    on = "INPUT.CROP.ENABLED", True
    for value in right:
        complete_config(config(*on, key, value))
    for value in wrong:
        cfg, (section, _, name) = config(*on), key.rpartition(".")
        setattr(attrgetter(section)(cfg), name, value)
        with pytest.raises(ValueError, match=key):
            complete_config(cfg)
