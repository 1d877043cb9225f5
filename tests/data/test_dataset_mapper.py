import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from panopticapi.utils import id2rgb
from PIL import Image

import detectron2.data.transforms as T
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import detection_utils as utils
from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.structures import BitMasks, BoxMode, PolygonMasks

from oanet_d2.data.dataset_mapper import (
    PanopticDatasetMapper,
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
    args.update(use_instance_mask=True, instance_mask_format="bitmask")
    return PanopticDatasetMapper(is_train, augmentations=list(augmentations), **{**args, **kwargs})


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
    ids = ids.repeat(rng.integers(1, 4), axis=1).astype(rng.choice(["int32", "uint32", "int64"]))
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
    Image.fromarray(id2rgb(np.full((HEIGHT, WIDTH), 11))).save(coco_folder / "panoptic" / "a.png")
    (coco_folder / "panoptic.json").write_text(json.dumps(panoptic))
    paths = [coco_folder / x for x in ("images", "panoptic.json", "panoptic")]
    with registered(f"test_{request.node.name}", *paths) as name:
        sample = make_mapper()(DatasetCatalog.get(name)[0])
    assert len(sample["instances"]) == 0
    candidates = gt_candidates(sample["instances"], 4, (HEIGHT // 4, WIDTH // 4))
    assert candidates.masks.shape == (0, HEIGHT // 4, WIDTH // 4)
    assert candidates.boxes.shape == (0, 4)


def test_from_config():
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    mapper = PanopticDatasetMapper(cfg, is_train=True)
    assert (mapper.num_things, mapper.stuff_only, mapper.ignore_value) == (8, False, 255)
    assert mapper.instance_mask_format == "bitmask" and mapper.read_image
    cfg.INPUT.READ_IMAGE = False
    assert not PanopticDatasetMapper(cfg, is_train=True).read_image


# ------------------------------------------------------------------------------- random scenes


@st.composite
def scenes(draw):
    """
    Rectangles painted over each other, at most 7.

    Returns:
        size, and for each its id, what it is and its XYXY box; the last lies on top.
    """
    height, width = draw(st.integers(6, 30)), draw(st.integers(6, 30))
    ids = draw(st.lists(st.integers(1, 2**24 - 1), max_size=7, unique=True))
    rectangles = []
    for i in ids:
        kind = draw(st.sampled_from(["thing", "thing", "crowd", "stuff"]))
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
        rectangles.append((i, kind, (x0, y0, x1, y1)))
    return (height, width), rectangles


crops = st.sampled_from(
    [
        ("relative", (0.5, 0.8)),
        ("relative_range", (0.3, 0.3)),
        ("absolute", (5, 9)),
        ("absolute_range", (4, 12)),
    ]
)


@st.composite
def augmentations(draw, resize):
    """Flips, a crop and, if wanted, a resize that samples the image as it samples the map."""
    some = [T.RandomFlip(1.0), T.RandomFlip(1.0, horizontal=False, vertical=True)]
    some.append(T.RandomCrop(*draw(crops)))
    if resize:
        shape = draw(st.integers(6, 60)), draw(st.integers(6, 60))
        some.append(T.Resize(shape, Image.NEAREST))
    return draw(st.lists(st.sampled_from(some), unique_by=id))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scene")


def write_scene(folder, size, rectangles, masks):
    """
    Thing k is of class k, counted from 0; stuff k of class 1 + k. In the image, red is k + 1 for
    the one on top, and bit k of green is set wherever rectangle k is, seen or hidden.

    Args:
        masks: what "annotations" hold: "polygon", "rle", or None for no annotations.

    Returns:
        dataset dict.
    """
    ids = np.zeros(size, dtype=np.uint32)
    image = np.zeros((*size, 3), dtype=np.uint8)
    segments, annotations = [], []
    for k, (i, kind, (x0, y0, x1, y1)) in enumerate(rectangles):
        ids[y0:y1, x0:x1] = i
        image[y0:y1, x0:x1, 0] = k + 1
        image[y0:y1, x0:x1, 1] |= 1 << k
        isthing, iscrowd = kind != "stuff", int(kind == "crowd")
        segment = {"id": i, "category_id": k if isthing else 1 + k, "isthing": isthing}
        segments.append({**segment, "iscrowd": iscrowd})
        if isthing:
            segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            if masks == "rle" or iscrowd:
                silhouette = (image[:, :, 1] >> k) & 1
                segmentation = mask_util.encode(np.asfortranarray(silhouette))
            annotation = {"bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
            annotation.update(category_id=k, iscrowd=iscrowd, segmentation=segmentation)
            annotations.append(annotation)
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(id2rgb(ids)).save(folder / "panoptic.png")
    d = {"file_name": str(folder / "image.png"), "height": size[0], "width": size[1]}
    d.update(pan_seg_file_name=str(folder / "panoptic.png"), segments_info=segments)
    return d if masks is None else {**d, "annotations": annotations}


@given(st.data(), st.sampled_from([None, "polygon", "rle"]), st.booleans(), st.booleans())
def test_every_scene_stays_aligned(folder, data, masks, stuff_only, recompute_boxes):
    """The image says what is where: its colours are the segments, after every augmentation."""
    size, rectangles = data.draw(scenes())
    d = write_scene(folder, size, rectangles, masks)
    # Polygons are only as exact as the others if they stay on whole pixels.
    mapper = make_mapper(
        augmentations=data.draw(augmentations(resize=masks != "polygon")),
        num_things=7,
        stuff_only=stuff_only,
        recompute_boxes=recompute_boxes,
    )
    np.random.seed(data.draw(st.integers(0, 2**32 - 1)))
    sample = mapper(d)

    index, _ = sample["panoptic_seg"]
    _, silhouettes, painted = sample["image"]
    assert torch.equal(index, painted.long())
    category, labels, expected = torch.full_like(index, 255), torch.full_like(index, 255), {}
    for k, (_, kind, _) in enumerate(rectangles):
        category[painted == k + 1] = k if kind != "stuff" else 7 + k
        labels[painted == k + 1] = 0 if kind != "stuff" else 1 + k
        mask = painted == k + 1 if masks is None else (silhouettes >> k) & 1 == 1
        if kind == "thing" and mask.any():
            expected[k] = mask
    assert torch.equal(sample["panoptic_category"], category)
    assert torch.equal(sample["sem_seg"], labels if stuff_only else category)

    instances = sample["instances"]
    assert instances.image_size == index.shape
    assert instances.gt_classes.tolist() == list(expected)
    assert instances.gt_masks.tensor.shape == (len(expected), *index.shape)
    tight = instances.gt_masks.get_bounding_boxes().tensor
    boxes = instances.gt_boxes.tensor
    for mask, truth in zip(instances.gt_masks.tensor, expected.values()):
        assert torch.equal(mask, truth)
    if recompute_boxes:
        assert torch.equal(boxes, tight)
    else:  # the centres of all pixels are inside, and the box is inside the image
        assert (boxes[:, :2] <= tight[:, :2] + 0.501).all() and (boxes >= 0).all()
        assert (boxes[:, 2:] >= tight[:, 2:] - 0.501).all()
        assert (boxes <= torch.tensor(index.shape[::-1] * 2)).all()


def slow_annotations(d):
    """What the mapper makes of the PNG, in Detectron2's format, by pycocotools."""
    rgb = np.array(Image.open(d["pan_seg_file_name"]), dtype=int)
    ids = rgb[:, :, 0] + 256 * rgb[:, :, 1] + 65536 * rgb[:, :, 2]
    annotations = []
    for segment in d["segments_info"]:
        if segment["isthing"]:
            rle = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
            annotation = {"bbox": mask_util.toBbox(rle).tolist(), "segmentation": rle}
            annotation.update({k: segment[k] for k in ("category_id", "iscrowd")})
            annotations.append({**annotation, "bbox_mode": BoxMode.XYWH_ABS})
    return annotations


@given(scenes(), st.booleans(), crops, st.integers(0, 2**32 - 1))
def test_instances_from_the_png_are_those_of_detectron2(folder, scene, recompute, crop, seed):
    """As if the visible parts had been in an instances JSON, up to the last bit."""
    d = write_scene(folder, *scene, None)
    resize = T.ResizeShortestEdge((17, 45), 80, "range")
    mapper = make_mapper(
        augmentations=[T.RandomCrop(*crop), resize, T.RandomFlip()],
        num_things=7,
        recompute_boxes=recompute,
    )
    np.random.seed(seed)
    ours = mapper(d)["instances"]
    np.random.seed(seed)
    theirs = mapper({**d, "annotations": slow_annotations(d)})["instances"]
    assert ours.image_size == theirs.image_size
    assert list(ours.get_fields()) == list(theirs.get_fields())
    assert torch.equal(ours.gt_classes, theirs.gt_classes)
    for x, y in ((ours.gt_boxes, theirs.gt_boxes), (ours.gt_masks, theirs.gt_masks)):
        assert torch.equal(x.tensor, y.tensor) and x.tensor.dtype == y.tensor.dtype


def test_masks_from_the_png_are_bitmasks_beside_polygons(folder):
    scene = (12, 12), [(5, "thing", (2, 3, 9, 8)), (6, "crowd", (0, 0, 2, 2))]
    kwargs = {"num_things": 7, "instance_mask_format": "polygon"}
    (mask,) = make_mapper(**kwargs)(write_scene(folder, *scene, None))["instances"].gt_masks
    assert mask.sum() == 7 * 5 and mask[3:8, 2:9].all()
    masks = make_mapper(**kwargs)(write_scene(folder, *scene, "polygon"))["instances"].gt_masks
    assert isinstance(masks, PolygonMasks) and masks.area().tolist() == [7 * 5]


def test_integer_annotations_are_not_cut_off(folder):
    """Whole numbers in the JSON, fractions after a resize: 5 to 9 of 10 becomes 7.5 to 13.5 of 15."""
    d = write_scene(folder, (10, 10), [(5, "thing", (5, 0, 9, 10))], "polygon")
    resize = T.ResizeTransform(10, 10, 15, 15)
    mapper = make_mapper(augmentations=[resize], instance_mask_format="polygon", num_things=7)
    instances = mapper(d)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[7.5, 0, 13.5, 15]]
    assert instances.gt_masks.polygons[0][0].tolist() == [7.5, 0, 13.5, 0, 13.5, 15, 7.5, 15]


@pytest.mark.parametrize("masks", [None, "rle"])
def test_without_masks(folder, masks):
    """A detector that learns boxes alone."""
    scene = (12, 12), [(5, "thing", (2, 3, 9, 8)), (6, "thing", (2, 3, 4, 4))]
    instances = make_mapper(num_things=7, use_instance_mask=False)(
        write_scene(folder, *scene, masks)
    )["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}
    assert instances.gt_boxes.tensor.tolist() == [[2, 3, 9, 8], [2, 3, 4, 4]]


@pytest.mark.parametrize("crop", ["relative", "relative_range", "absolute", "absolute_range"])
@pytest.mark.parametrize("masks", [None, "polygon"])
@pytest.mark.parametrize("kind", ["thing", "crowd", "stuff", "void"])
def test_crops_of_the_config(folder, crop, masks, kind):
    """With and without anything to learn from. Detectron2 alone fails where all is a crowd."""
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml", "INPUT.CROP.ENABLED", "True")
    size = "(8, 12)" if crop.startswith("absolute") else "(0.5, 0.5)"
    cfg.merge_from_list(["INPUT.CROP.TYPE", crop, "INPUT.CROP.SIZE", size])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", "(20, 30)"])
    rectangles = [] if kind == "void" else [(70000, kind, (0, 0, 30, 18))]
    mapper = PanopticDatasetMapper(cfg, is_train=True)
    assert mapper.recompute_boxes
    sample = mapper(write_scene(folder, (18, 30), rectangles, masks))
    height, width = sample["image"].shape[1:]
    assert min(height, width) in (20, 30)
    assert sample["sem_seg"].shape == sample["panoptic_seg"][0].shape == (height, width)
    expected = {"thing": 0, "crowd": 0, "stuff": 8, "void": 255}
    assert (sample["panoptic_category"] == expected[kind]).all()
    instances = sample["instances"]
    assert isinstance(instances.gt_masks, BitMasks) and instances.gt_masks.tensor.all()
    boxes = [[0, 0, width, height]] if kind == "thing" else []
    assert instances.gt_boxes.tensor.tolist() == boxes
    assert instances.gt_masks.tensor.shape == (len(boxes), height, width)


# ------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("format", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize(
    "mode, suffix",
    [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png")],
)
def test_any_mode_is_read_as_detectron2_does(dataset, tmp_path, mode, suffix, format):
    (d,) = DatasetCatalog.get(dataset)
    colours = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    d["file_name"] = str(tmp_path / f"other.{suffix}")
    Image.fromarray(colours, "RGBA").convert("RGB").convert(mode).save(d["file_name"])
    assert Image.open(d["file_name"]).mode == mode
    expected = utils.read_image(d["file_name"], format)
    assert expected.std() > 0
    for is_train in (True, False):
        image = make_mapper(is_train, image_format=format)(d)["image"]
        assert torch.equal(image, torch.tensor(expected.transpose(2, 0, 1).copy()))


def test_the_camera_was_held_sideways(dataset):
    """Size and ground truth are those of the upright picture."""
    (d,) = DatasetCatalog.get(dataset)
    upright = Image.open(d["file_name"]).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees
    upright.transpose(Image.ROTATE_90).save(d["file_name"], exif=exif)
    assert Image.open(d["file_name"]).size == (HEIGHT, WIDTH)
    sample = make_mapper(image_format="RGB")(d)
    assert np.array_equal(sample["image"], np.array(upright).transpose(2, 0, 1))
    assert torch.equal(sample["image"][0] > 150, sample["panoptic_category"] == 1)  # the tie


def sixteen_bits(kind):
    """
    Returns:
        name of a file and an image for it, which PIL opens as another mode than "I;16" if that is
        what `kind` says.
    """
    values = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    grey = values[:, :, 0]
    return {
        "I;16": ("grey.png", Image.fromarray(grey)),
        "I": ("grey.tiff", Image.fromarray(grey.astype(np.int32))),
        "F": ("grey.tiff", Image.fromarray(grey.astype(np.float32))),
        "RGB": ("colour.png", values),
    }[kind]


@pytest.mark.parametrize("kind", ["I;16", "I", "F", "RGB"])
@pytest.mark.parametrize("key", ["file_name", "pan_seg_file_name"])
def test_more_than_8_bits_are_refused(dataset, tmp_path, kind, key):
    (d,) = DatasetCatalog.get(dataset)
    name, image = sixteen_bits(kind)
    d[key] = str(tmp_path / name)
    if kind == "RGB":
        assert cv2.imwrite(d[key], image)  # PIL cannot write it
    else:
        image.save(d[key])
    assert Image.open(d[key]).mode == kind
    message = f"{re.escape(d[key])}: more than 8 bits .*mode {kind}.*; convert it to 8 bits"
    for is_train in (True, False) if key == "file_name" else (True,):
        with pytest.raises(ValueError, match=message):
            make_mapper(is_train)(d)


def test_other_modes_of_a_panoptic_png(dataset):
    """A palette or an alpha channel changes no id."""
    (d,) = DatasetCatalog.get(dataset)
    expected = make_mapper()(d)["panoptic_seg"][0]
    rgb = Image.open(d["pan_seg_file_name"])
    alpha = Image.fromarray(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8))
    palette = rgb.quantize(16)
    assert np.array_equal(palette.convert("RGB"), rgb)
    for image in (palette, Image.merge("RGBA", (*rgb.split(), alpha))):
        image.save(d["pan_seg_file_name"])
        assert Image.open(d["pan_seg_file_name"]).mode == image.mode != "RGB"
        assert torch.equal(make_mapper()(d)["panoptic_seg"][0], expected)


# --------------------------------------------------------------------------- mistakes in a dataset


def test_an_image_of_another_size_is_refused(dataset, coco_folder):
    (d,) = DatasetCatalog.get(dataset)
    cv2.imwrite(str(coco_folder / "images" / "a.png"), np.zeros((10, 10, 3), np.uint8))
    for is_train in (True, False):
        with pytest.raises(utils.SizeMismatchError, match="images/a.png"):
            make_mapper(is_train)(d)


def test_a_panoptic_png_of_another_size_is_refused(dataset):
    (d,) = DatasetCatalog.get(dataset)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(d["pan_seg_file_name"])
    message = "panoptic/a.png: 32 x 25 pixels, .*images/a.png has 32 x 24.*oanet_d2.data.check"
    for read_image in (True, False):
        with pytest.raises(ValueError, match=message):
            make_mapper(read_image=read_image)(d)


@pytest.mark.parametrize("num_unlisted", [1, 5, 8])
def test_ids_that_segments_info_does_not_list_are_refused(dataset, num_unlisted):
    (d,) = DatasetCatalog.get(dataset)
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    ids[0, :num_unlisted] = 70001 + np.arange(num_unlisted)  # 70000 is the tie
    ids[1, :4] = 70000
    Image.fromarray(id2rgb(ids)).save(d["pan_seg_file_name"])
    first = ", ".join(str(70001 + k) for k in range(min(num_unlisted, 5)))
    more = " and 3 more" if num_unlisted == 8 else ""
    message = re.escape(f"[{first}]{more};") + ".*oanet_d2.data.check"
    with pytest.raises(ValueError, match=f"panoptic/a.png: .*{message}"):
        make_mapper()(d)


def test_listed_ids_may_be_absent(dataset):
    (d,) = DatasetCatalog.get(dataset)
    expected = make_mapper()(d)["panoptic_seg"][0]
    d["segments_info"].append({"id": 999, "category_id": 0, "isthing": True, "iscrowd": 0})
    del d["annotations"]
    sample = make_mapper()(d)
    assert torch.equal(sample["panoptic_seg"][0], expected)
    assert len(sample["panoptic_seg"][1]) == 6
    assert sample["instances"].gt_classes.tolist() == [0, 1]  # not a third, empty one


def break_file(path, how):
    content = Path(path).read_bytes()
    if how == "missing":
        Path(path).unlink()
    else:
        kept = len(content) * 2 // 3
        Path(path).write_bytes({"empty": b"", "text": b"moved", "cut": content[:kept]}[how])


@pytest.mark.parametrize(
    "how, reason",
    [
        ("missing", "No such file"),
        ("empty", "cannot identify"),
        ("text", "cannot identify"),
        ("cut", "truncated"),
    ],
)
@pytest.mark.parametrize("key", ["jpg", "png", "pan_seg_file_name"])
def test_a_broken_file_is_named(dataset, tmp_path, key, how, reason):
    (d,) = DatasetCatalog.get(dataset)
    if key != "pan_seg_file_name":
        noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        d["file_name"] = str(tmp_path / f"photo.{key}")
        Image.fromarray(noise).save(d["file_name"])
        key = "file_name"
    make_mapper()(d)
    break_file(d[key], how)
    for is_train in (True, False) if key == "file_name" else (True,):
        with pytest.raises(ValueError, match=f"^{re.escape(d[key])}: .*{reason}") as error:
            make_mapper(is_train)(d)
        assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"bbox": None}, "bbox"),
        ({"bbox": [1, 2, 3]}, "4"),
        ({"category_id": None}, "category_id"),
        ({"segmentation": None}, "no segmentation"),
        ({"segmentation": 5}, "segmentation"),
        ({"segmentation": [[1.0, 2.0, 3.0]]}, "reshape"),
        ({"segmentation": {"size": [5, 5], "counts": b"05"}}, "an RLE has 5 pixels; 5 x 5 are 25"),
        ({"segmentation": {"size": [5, 5], "counts": b"i0"}}, "Assertion"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_malformed_annotation_is_refused_with_its_image(dataset, changed, reason, which):
    (d,) = DatasetCatalog.get(dataset)
    make_mapper()(d)
    for key, value in changed.items():
        if value is None:
            del d["annotations"][which][key]
        else:
            d["annotations"][which][key] = value
    with pytest.raises(ValueError, match=f"annotations of .*images/a.png: .*{reason}"):
        make_mapper()(d)


@pytest.mark.parametrize("key", ["id", "category_id", "isthing"])
def test_a_malformed_segment_is_refused_with_its_file(dataset, key):
    (d,) = DatasetCatalog.get(dataset)
    del d["segments_info"][1][key]
    with pytest.raises(ValueError, match=f"(images|panoptic)/a.png: .*KeyError: '{key}'"):
        make_mapper()(d)


def test_a_data_loader_stops_at_a_broken_file(dataset, tmp_path):
    """The error of the worker arrives with the file's name; nothing hangs, nothing is skipped."""
    (d,) = DatasetCatalog.get(dataset)
    dicts = [{**d, "image_id": i} for i in range(3)]
    dicts[1]["file_name"] = shutil.copy(d["file_name"], tmp_path / "broken.png")
    break_file(dicts[1]["file_name"], "cut")
    loader = build_detection_train_loader(
        dicts, mapper=make_mapper(), total_batch_size=1, num_workers=1, timeout=60
    )
    with pytest.raises(ValueError, match=r"broken\.png: image file is truncated"):
        for _, batch in zip(range(len(dicts)), loader):  # every image once
            assert batch[0]["image_id"] != 1


@pytest.mark.parametrize("rle", [(0,), (1,), (0, 1)])
def test_one_rle_makes_bitmasks_of_all(dataset, rle):
    """With the format that COCO's configs ask for, Detectron2 would refuse the image."""
    (d,) = DatasetCatalog.get(dataset)
    polygons = make_mapper(instance_mask_format="polygon")(d)["instances"].gt_masks
    assert isinstance(polygons, PolygonMasks)
    for i in rle:
        rles = mask_util.frPyObjects(d["annotations"][i]["segmentation"], HEIGHT, WIDTH)
        d["annotations"][i]["segmentation"] = mask_util.merge(rles)
    masks = make_mapper(instance_mask_format="polygon")(d)["instances"].gt_masks
    expected = BitMasks.from_polygon_masks(polygons, HEIGHT, WIDTH)
    assert torch.equal(masks.tensor, expected.tensor)
