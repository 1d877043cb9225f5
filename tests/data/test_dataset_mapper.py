import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from panopticapi.utils import id2rgb

import detectron2.data.transforms as T
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator

from oanet_d2.data.dataset_mapper import (
    PanopticDatasetMapper,
    annotations_from_panoptic,
    index_segments,
    panoptic_categories,
)
from oanet_d2.modeling.candidates import gt_candidates
from tests.conftest import load_config, registered

# Category ids with gaps, things and stuff mixed, as in COCO.
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 7, "name": "grass", "isthing": 0, "color": [0, 200, 0]},
    {"id": 32, "name": "tie", "isthing": 1, "color": [0, 0, 142]},
    {"id": 92, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
]
HEIGHT, WIDTH = 24, 32


@pytest.fixture
def coco_folder(tmp_path):
    """
    One picture: a person (id 300) with a tie (id 70000) before grass and sky, a void column on the
    right, a crowd of persons (id 5) in the lower left corner.
    """
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    ids[:12, :28] = 11
    ids[12:, :28] = 12
    ids[4:20, 8:24] = 300
    ids[6:14, 14:18] = 70000
    ids[20:, :6] = 5
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    image[ids == 70000] = (10, 20, 200)
    (tmp_path / "images").mkdir()
    (tmp_path / "panoptic").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    cv2.imwrite(str(tmp_path / "panoptic" / "a.png"), id2rgb(ids)[:, :, ::-1])
    segments = [(11, 92, 0), (12, 7, 0), (300, 1, 0), (70000, 32, 0), (5, 1, 1)]
    images = [{"id": 42, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    panoptic = {
        "images": images,
        "categories": CATEGORIES,
        "annotations": [
            {
                "image_id": 42,
                "file_name": "a.png",
                "segments_info": [
                    {
                        "id": i,
                        "category_id": c,
                        "iscrowd": crowd,
                        "area": int((ids == i).sum()),
                        "bbox": [0, 0, WIDTH, HEIGHT],
                    }
                    for i, c, crowd in segments
                ],
            }
        ],
    }
    # the person's whole silhouette, under the tie too
    person = [8.0, 4.0, 24.0, 4.0, 24.0, 20.0, 8.0, 20.0]
    tie = [14.0, 6.0, 18.0, 6.0, 18.0, 14.0, 14.0, 14.0]
    boxes = {1: [8, 4, 16, 16], 32: [14, 6, 4, 8]}
    instances = {
        "images": images,
        "categories": [c for c in CATEGORIES if c["isthing"]],
        "annotations": [
            {
                "id": 1 + n,
                "image_id": 42,
                "category_id": c,
                "segmentation": [polygon],
                "bbox": boxes[c],
                "area": boxes[c][2] * boxes[c][3],
                "iscrowd": 0,
            }
            for n, (c, polygon) in enumerate([(1, person), (32, tie)])
        ],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic))
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return tmp_path


@pytest.fixture
def dataset(coco_folder, request):
    files = ("images", "panoptic.json", "panoptic", "instances.json")
    paths = [coco_folder / file for file in files]
    with registered(f"test_{request.node.name}", *paths) as name:
        yield name


def make_mapper(is_train=True, augmentations=(), **kwargs):
    args = {"num_things": 2, "stuff_only": False, "ignore_value": 255, "image_format": "BGR"}
    return PanopticDatasetMapper(
        is_train,
        augmentations=list(augmentations),
        use_instance_mask=True,
        instance_mask_format="bitmask",
        **{**args, **kwargs},
    )


def test_metadata_follows_the_json(dataset):
    metadata = MetadataCatalog.get(dataset)
    assert metadata.thing_classes == ["person", "tie"]
    assert metadata.stuff_classes == ["things", "grass", "sky"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 32: 1}
    assert metadata.stuff_dataset_id_to_contiguous_id == {7: 1, 92: 2}
    assert metadata.stuff_colors == [[0, 0, 0], [0, 200, 0], [70, 130, 180]]


def test_evaluator_accepts_the_dataset(dataset):
    """The ground truth as a prediction, in the model's format, scores 100."""
    (d,) = DatasetCatalog.get(dataset)
    sample = make_mapper(is_train=False)(d)
    assert set(sample["image"].shape) == {3, HEIGHT, WIDTH} and "annotations" not in sample
    seg = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    ids = {"sky": (slice(0, 12), slice(0, 28)), "grass": (slice(12, 24), slice(0, 28))}
    seg[ids["sky"]], seg[ids["grass"]] = 1, 2
    seg[4:20, 8:24] = 3
    seg[6:14, 14:18] = 4
    seg[20:, :6] = 0  # the crowd
    info = [
        {"id": 1, "isthing": False, "category_id": 2},
        {"id": 2, "isthing": False, "category_id": 1},
        {"id": 3, "isthing": True, "category_id": 0},
        {"id": 4, "isthing": True, "category_id": 1},
    ]
    evaluator = COCOPanopticEvaluator(dataset)
    evaluator.reset()
    evaluator.process([sample], [{"panoptic_seg": (seg, info)}])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100


def test_training_sample_by_hand(dataset):
    (d,) = DatasetCatalog.get(dataset)
    sample = make_mapper()(d)
    category = sample["panoptic_category"]
    assert category.dtype == torch.int64 and category.shape == (HEIGHT, WIDTH)
    at = {(0, 0): 3, (22, 10): 2, (5, 9): 0, (7, 15): 1, (0, 30): 255, (22, 0): 0}
    assert {yx: category[yx].item() for yx in at} == at
    assert torch.equal(sample["sem_seg"], category)
    # ids are counted from 1 in the order of the file: sky, grass, person, tie, crowd
    index, segments_info = sample["panoptic_seg"]
    assert index.dtype == torch.int64 and index.shape == (HEIGHT, WIDTH)
    at = {(0, 0): 1, (22, 10): 2, (5, 9): 3, (7, 15): 4, (0, 30): 0, (22, 0): 5}
    assert {yx: index[yx].item() for yx in at} == at
    assert [s["id"] for s in segments_info] == [1, 2, 3, 4, 5]
    assert [s["category_id"] for s in segments_info] == [2, 1, 0, 1, 0]  # contiguous
    assert [bool(s["isthing"]) for s in segments_info] == [False, False, True, True, True]
    assert [s["iscrowd"] for s in segments_info] == [0, 0, 0, 0, 1]
    assert "segments_info" not in sample and len(d["segments_info"]) == 5
    assert d["segments_info"][2]["id"] == 300  # the dataset itself is as it was
    # the masks are whole and overlap: the person's includes the pixels under the tie
    person, tie = sample["instances"].gt_masks.tensor
    assert sample["instances"].gt_classes.tolist() == [0, 1]
    assert person.sum() == 16 * 16 and tie.sum() == 4 * 8 and (person & tie).sum() == 4 * 8


def test_stuff_only_labels(dataset):
    (d,) = DatasetCatalog.get(dataset)
    labels = make_mapper(stuff_only=True)(d)["sem_seg"]
    at = {(0, 0): 2, (22, 10): 1, (5, 9): 0, (7, 15): 0, (0, 30): 255}
    assert {yx: labels[yx].item() for yx in at} == at


def test_without_an_instances_json_masks_are_the_visible_parts(coco_folder, request):
    paths = [coco_folder / x for x in ("images", "panoptic.json", "panoptic")]
    with registered(f"test_{request.node.name}", *paths) as name:
        instances = make_mapper()(DatasetCatalog.get(name)[0])["instances"]
        assert instances.gt_classes.tolist() == [0, 1]  # without the crowd
        person, tie = instances.gt_masks.tensor
        assert not (person & tie).any() and person.sum() == 16 * 16 - 4 * 8
        assert instances.gt_boxes.tensor.tolist() == [[8, 4, 24, 20], [14, 6, 18, 14]]


def test_annotations_from_panoptic_keep_the_crowd_flag():
    ids = np.array([[1, 1, 2], [3, 3, 0]])
    segments = [
        {"id": 1, "category_id": 4, "isthing": True, "iscrowd": 1},
        {"id": 2, "category_id": 1, "isthing": True},
        {"id": 3, "category_id": 1, "isthing": False},
    ]
    annotations = annotations_from_panoptic(ids, segments)
    assert [(a["category_id"], a["iscrowd"], a["bbox"]) for a in annotations] == [
        (4, 1, [0, 0, 2, 1]),
        (1, 0, [2, 0, 1, 1]),
    ]


def test_augmentations_keep_everything_aligned(dataset):
    """After a flip, a crop and a resize, masks, map and picture still show the tie in one place."""
    (d,) = DatasetCatalog.get(dataset)
    augmentations = [
        T.RandomFlip(prob=1.0),
        T.CropTransform(2, 2, 28, 20),
        T.ResizeTransform(20, 28, 40, 56),
    ]
    sample = make_mapper(augmentations=augmentations)(d)
    tie_in_map = sample["panoptic_category"] == 1
    tie_in_mask = sample["instances"].gt_masks.tensor[1]
    tie_in_image = sample["image"][2] > 150  # red, BGR
    assert tie_in_map.shape == (40, 56) and tie_in_map.sum() == 2 * 2 * 4 * 8
    assert torch.equal(tie_in_map, sample["panoptic_seg"][0] == 4)
    assert torch.equal(tie_in_map, tie_in_mask)
    # interpolated in the picture: one pixel of rim
    assert (tie_in_map ^ tie_in_image).sum() <= 2 * (8 + 16) + 4
    x = WIDTH - 18 - 2  # mirrored, then cropped
    assert sample["instances"].gt_boxes.tensor[1].tolist() == [2 * x, 8, 2 * (x + 4), 24]


@given(st.integers(0, 2**31 - 1), st.integers(1, 300), st.integers(0, 300))
def test_category_map_against_a_plain_loop(seed, num_things, num_stuff):
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 1, 256, 65536, 999, 77], size=(5, 6))
    segments = []
    for i in (1, 256, 65536, 999):  # 0 and 77 are not described: void
        isthing = bool(rng.integers(2)) or num_stuff == 0
        category = rng.integers(num_things) if isthing else 1 + rng.integers(num_stuff)
        segments.append({"id": i, "category_id": int(category), "isthing": isthing})
    index = torch.from_numpy(index_segments(ids, segments)).long()
    result = panoptic_categories(segments, num_things, 1000)[index]
    for y, x in np.ndindex(*ids.shape):
        expected = 1000
        for s in segments:
            if s["id"] == ids[y, x]:
                offset = 0 if s["isthing"] else num_things - 1
                expected = s["category_id"] + offset
        assert result[y, x] == expected


@pytest.mark.parametrize("num_segments", [1, 255, 256, 300])
def test_segments_keep_their_numbers_through_augmentations(num_segments):
    """Ids up to 24 bits, positions beyond a byte: enlarged and flipped, none is mixed up."""
    rng = np.random.default_rng(0)
    ids = rng.choice(2**24, size=num_segments + 1, replace=False)
    layout = rng.permutation(np.arange(num_segments + 1).repeat(2)).reshape(2, -1)
    segments = [{"id": i} for i in ids[1:].tolist()]  # ids[0] is not described: void
    index = index_segments(ids[layout], segments)
    assert np.array_equal(index, layout)
    transforms = T.TransformList(
        [
            T.ResizeTransform(2, num_segments + 1, 6, 3 * (num_segments + 1)),
            T.HFlipTransform(3 * (num_segments + 1)),
        ]
    )
    enlarged = transforms.apply_segmentation(index)
    assert np.array_equal(enlarged, layout.repeat(3, axis=0).repeat(3, axis=1)[:, ::-1])


def test_without_images_the_labels_are_the_same(dataset, coco_folder):
    """No image is opened (there is none), and nothing else changes."""
    (d,) = DatasetCatalog.get(dataset)
    augmentations = [T.RandomFlip(prob=1.0), T.ResizeTransform(HEIGHT, WIDTH, 36, 48)]
    expected = make_mapper(augmentations=augmentations)(d)
    (coco_folder / "images" / "a.png").unlink()
    sample = make_mapper(augmentations=augmentations, read_image=False)(d)
    assert set(expected) - set(sample) == {"image"} and set(sample) <= set(expected)
    for name in ("panoptic_category", "sem_seg"):
        assert torch.equal(sample[name], expected[name])
    assert torch.equal(sample["panoptic_seg"][0], expected["panoptic_seg"][0])
    assert sample["panoptic_seg"][1] == expected["panoptic_seg"][1]
    ours, theirs = sample["instances"], expected["instances"]
    assert ours.image_size == theirs.image_size == (36, 48)
    assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)
    assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    assert torch.equal(ours.gt_classes, theirs.gt_classes)
    # ... and it did flip: the void column is on the left now
    assert (sample["panoptic_category"][0, :6] == 255).all()


def test_an_image_without_things_has_no_instances_but_their_fields(coco_folder, request):
    panoptic = json.loads((coco_folder / "panoptic.json").read_text())
    annotation = panoptic["annotations"][0]
    annotation["segments_info"] = annotation["segments_info"][:2]
    (coco_folder / "panoptic.json").write_text(json.dumps(panoptic))
    paths = [coco_folder / x for x in ("images", "panoptic.json", "panoptic")]
    with registered(f"test_{request.node.name}", *paths) as name:
        sample = make_mapper()(DatasetCatalog.get(name)[0])
    assert len(sample["instances"]) == 0
    candidates = gt_candidates(sample["instances"], 4, (HEIGHT // 4, WIDTH // 4))
    assert candidates.masks.shape == (0, HEIGHT // 4, WIDTH // 4)
    assert candidates.boxes.shape == (0, 4)


def test_wrong_size_is_refused(dataset, coco_folder):
    (d,) = DatasetCatalog.get(dataset)
    cv2.imwrite(str(coco_folder / "images" / "a.png"), np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(Exception, match="a.png"):
        make_mapper()(d)


def test_from_config():
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    mapper = PanopticDatasetMapper(cfg, is_train=True)
    assert (mapper.num_things, mapper.stuff_only, mapper.ignore_value) == (8, False, 255)
    assert mapper.instance_mask_format == "bitmask" and mapper.read_image
    cfg.INPUT.READ_IMAGE = False
    assert not PanopticDatasetMapper(cfg, is_train=True).read_image
