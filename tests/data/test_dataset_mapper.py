import random
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from panopticapi.utils import id2rgb
from PIL import Image

import detectron2.data.transforms as T
from detectron2.data import DatasetMapper
from detectron2.structures import BitMasks, BoxMode, PolygonMasks

from oanet_d2.data import PanopticDatasetMapper
from tests.conftest import load_config
from tests.data.conftest import make_mapper


def write_scene(folder, size, rectangles, masks):
    """
    Rectangles painted over each other: (id, "thing" or "crowd" or "stuff", XYXY box). Thing k is of
    class k, counted from 0; stuff k of class 1 + k. In the image, red is k + 1 for the one on top,
    and bit k of green is set wherever rectangle k is, seen or hidden.

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


# A person with a tie, before grass; a crowd in the lower left corner, a void column on the right.
PORTRAIT = (24, 32), [
    (12, "stuff", (0, 0, 28, 24)),
    (300, "thing", (8, 4, 24, 20)),
    (70000, "thing", (14, 6, 18, 14)),
    (5, "crowd", (0, 20, 6, 24)),
]


@pytest.fixture
def portrait(tmp_path):
    return write_scene(tmp_path, *PORTRAIT, "polygon")


def test_training_input_by_hand(portrait):
    sample = make_mapper(num_things=4)(portrait)
    category = sample["panoptic_category"]
    index, segments_info = sample["panoptic_seg"]
    for labels in (category, index, sample["sem_seg"]):
        assert labels.dtype == torch.int64 and labels.shape == (24, 32)
    at = [(0, 0), (5, 9), (7, 15), (22, 0), (0, 30)]  # grass, person, tie, crowd, void
    assert [category[yx].item() for yx in at] == [4, 1, 2, 3, -1]
    assert [sample["sem_seg"][yx].item() for yx in at] == [4, 1, 2, 3, 255]
    assert [index[yx].item() for yx in at] == [1, 2, 3, 4, 0]
    assert [s["id"] for s in segments_info] == [1, 2, 3, 4]
    assert [s["category_id"] for s in segments_info] == [1, 1, 2, 3]
    assert [s["iscrowd"] for s in segments_info] == [0, 0, 0, 1]
    assert portrait["segments_info"][1]["id"] == 300  # the dataset itself is as it was
    person, tie = sample["instances"].gt_masks.tensor  # whole masks, without the crowd's
    assert sample["instances"].gt_classes.tolist() == [1, 2]
    assert person.sum() == 16 * 16 and tie.sum() == 4 * 8 and (person & tie).sum() == 4 * 8


def test_inference_input(portrait):
    sample = make_mapper(is_train=False)(portrait)
    assert "annotations" not in sample and sample["segments_info"] == portrait["segments_info"]
    assert sample["image"].shape == (3, 24, 32)
    Image.new("P", (32, 24)).save(portrait["pan_seg_file_name"])  # evaluators would misread it
    with pytest.raises(ValueError, match="panoptic.png"):
        make_mapper(is_train=False)(portrait)


@pytest.mark.parametrize("ignore_value", [255, -1, 254, 1000])
@pytest.mark.parametrize("stuff_only", [False, True])
def test_void_is_the_ignore_value_for_the_semantic_head_alone(portrait, ignore_value, stuff_only):
    sample = make_mapper(ignore_value=ignore_value, stuff_only=stuff_only)(portrait)
    void = sample["panoptic_seg"][0] == 0
    assert void.sum() == 24 * 4
    assert torch.equal(sample["sem_seg"] == ignore_value, void)
    assert torch.equal(sample["panoptic_category"] == -1, void)


@pytest.mark.parametrize("stuff_only, expected", [(True, [0, 0, 2]), (False, [255, 299, 301])])
def test_class_255_is_not_void(tmp_path, stuff_only, expected):
    """300 things and 2 stuff classes."""
    kinds = ["thing", "thing", "stuff"]
    boxes = [(i, kind, (3 * i, 0, 3 * i + 3, 6)) for i, kind in enumerate(kinds, start=1)]
    d = write_scene(tmp_path, (6, 12), boxes, None)
    for segment, category in zip(d["segments_info"], (255, 299, 2)):
        segment["category_id"] = category
    ignore_value = 255 if stuff_only else -1  # which must be no class of the head
    sample = make_mapper(num_things=300, stuff_only=stuff_only, ignore_value=ignore_value)(d)
    assert sample["panoptic_category"][0, 3::3].tolist() == [255, 299, 301]
    assert sample["sem_seg"][0, ::3].tolist() == [ignore_value, *expected]


# --------------------------------------------------------------------------- augmentations


@st.composite
def scenes(draw):
    """Size, and at most 7 rectangles for :func:`write_scene`, none of them quite hidden."""
    height, width = draw(st.integers(6, 30)), draw(st.integers(6, 30))
    ids = draw(st.lists(st.integers(1, 2**24 - 1), max_size=7, unique=True))
    rectangles = []
    for i in ids:
        kind = draw(st.sampled_from(["thing", "thing", "crowd", "stuff"]))
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
        rectangles.append((i, kind, (x0, y0, x1, y1)))
    owners = np.full((height, width), -1)
    for k, (_, _, (x0, y0, x1, y1)) in enumerate(rectangles):
        owners[y0:y1, x0:x1] = k
    return (height, width), [r for k, r in enumerate(rectangles) if (owners == k).any()]


CROPS = [("relative", (0.5, 0.8)), ("relative_range", (0.3, 0.3)), ("absolute", (5, 9))]
crops = st.sampled_from([*CROPS, ("absolute_range", (4, 12))])


@st.composite
def augmentations(draw, resize):
    """
    Flips, crops, padding and, if wanted, a resize that samples the image as it samples the map.
    (Where an image is padded it is 0, as where nothing was drawn.)
    """
    shape = draw(st.integers(6, 60)), draw(st.integers(6, 60))
    some = [T.RandomFlip(1.0), T.RandomFlip(1.0, horizontal=False, vertical=True)]
    some += [T.RandomCrop(*draw(crops)), T.FixedSizeCrop(shape, pad_value=0)]
    if resize:
        scale = T.ResizeScale(0.5, 2.0, *shape, Image.NEAREST)
        some.append(draw(st.sampled_from([T.Resize(shape, Image.NEAREST), scale])))
    return draw(st.lists(st.sampled_from(some), unique_by=id))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scene")


@given(st.data(), st.sampled_from([None, "polygon", "rle"]), st.booleans())
def test_every_scene_stays_aligned(folder, data, masks, stuff_only):
    """The image says what is where: its colours are the segments, after every augmentation."""
    size, rectangles = data.draw(scenes())
    d = write_scene(folder, size, rectangles, masks)
    # Polygons are only as exact as the others if they stay on whole pixels.
    mapper = make_mapper(
        augmentations=data.draw(augmentations(resize=masks != "polygon")),
        stuff_only=stuff_only,
    )
    np.random.seed(data.draw(st.integers(0, 2**32 - 1)))
    sample = mapper(d)

    index, _ = sample["panoptic_seg"]
    painted, silhouettes, _ = sample["image"]
    assert torch.equal(index, painted.long())
    category, labels, expected = torch.full_like(index, -1), torch.full_like(index, 255), {}
    for k, (_, kind, _) in enumerate(rectangles):
        category[painted == k + 1] = k if kind != "stuff" else 7 + k
        labels[painted == k + 1] = 0 if kind != "stuff" else 1 + k
        mask = painted == k + 1 if masks is None else (silhouettes >> k) & 1 == 1
        if kind == "thing" and mask.any():
            expected[k] = mask
    assert torch.equal(sample["panoptic_category"], category)
    expected_labels = category.where(category >= 0, torch.tensor(255))
    assert torch.equal(sample["sem_seg"], labels if stuff_only else expected_labels)

    instances = sample["instances"]
    assert instances.image_size == index.shape
    assert instances.gt_classes.tolist() == list(expected)
    assert instances.gt_masks.tensor.shape == (len(expected), *index.shape)
    for mask, truth in zip(instances.gt_masks.tensor, expected.values()):
        assert torch.equal(mask, truth)
    boxes = instances.gt_masks.get_bounding_boxes().tensor
    assert torch.equal(instances.gt_boxes.tensor, boxes)


@pytest.mark.parametrize("n", [1, 253, 254, 255, 256, 300])
def test_padding_is_void_for_any_number_of_segments(tmp_path, n):
    """A row of n things, enlarged, cropped and padded as in Detectron2's large-scale jittering."""
    ids = np.random.default_rng(0).choice(np.arange(1, 2**24), n, replace=False)
    Image.fromarray(id2rgb(ids[None].repeat(2, axis=0))).save(tmp_path / "panoptic.png")
    Image.new("RGB", (n, 2)).save(tmp_path / "image.png")
    d = {"file_name": str(tmp_path / "image.png"), "height": 2, "width": n}
    d["pan_seg_file_name"] = str(tmp_path / "panoptic.png")
    d["segments_info"] = [
        {"id": i, "category_id": k % 7, "isthing": True} for k, i in enumerate(ids.tolist())
    ]
    jitter = [T.ResizeScale(3.0, 3.0, 2, n), T.FixedSizeCrop((9, 3 * n + 5)), T.RandomFlip(1.0)]
    sample = make_mapper(augmentations=jitter)(d)
    truth = np.zeros((9, 3 * n + 5), dtype=np.int64)
    truth[:6, 5:] = np.arange(n, 0, -1).repeat(3)
    assert np.array_equal(sample["panoptic_seg"][0], truth)
    assert torch.equal(sample["panoptic_category"] < 0, torch.from_numpy(truth == 0))
    masks = sample["instances"].gt_masks.tensor
    assert masks.shape[0] == n
    assert np.array_equal((masks * torch.arange(1, n + 1)[:, None, None]).sum(0), truth)


def crop_of(type, *size):
    return ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", type, "INPUT.CROP.SIZE", size]


LSJ = [T.ResizeScale(0.3, 2.0, 40, 50), T.FixedSizeCrop((40, 50))]  # large-scale jittering


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize(
    "opts, augmentations",
    [
        ([], {}),
        ([], {"augmentations": LSJ}),
        *[(crop_of(*x), {}) for x in (("relative", 0.5, 0.8), ("relative_range", 0.3, 0.3))],
        *[(crop_of(*x), {}) for x in (("absolute", 30, 9), ("absolute_range", 4, 30))],
        (["INPUT.RANDOM_FLIP", "vertical"], {}),
        (["INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], {}),
    ],
)
def test_options_do_what_they_do_in_detectron2(tmp_path, opts, augmentations, mask_format):
    """Two images of unequal sizes, and a map of labels, which Detectron2's mapper augments as well."""
    things = [(8, "stuff", (0, 0, 12, 24)), (5, "thing", (5, 9, 17, 20)), (9, "thing", (1, 2, 10, 14))]
    common = ["DATASETS.TRAIN", (), "INPUT.MIN_SIZE_TRAIN", (20, 40), "INPUT.MASK_FORMAT", mask_format]
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml", *common, *opts)
    ours = PanopticDatasetMapper(cfg, True, num_things=3, **augmentations)
    theirs = DatasetMapper(cfg, True, **augmentations)
    shapes = set()
    for seed, size in enumerate([(24, 32), (31, 20)] * 3):
        d = write_scene(tmp_path, size, things, "polygon")
        for x in d["annotations"]:  # Detectron2 would cut off fractions
            x["segmentation"] = [list(map(float, x["segmentation"][0]))]
        painted = Image.open(d["file_name"]).split()[0]
        painted.save(tmp_path / "labels.png")
        np.random.seed(seed)
        expected = theirs({**d, "sem_seg_file_name": str(tmp_path / "labels.png")})
        np.random.seed(seed)
        sample = ours(d)
        assert torch.equal(sample["image"], expected["image"])
        labels = expected["sem_seg"].masked_fill(expected["sem_seg"] == 255, 0)  # padding
        assert torch.equal(sample["panoptic_seg"][0], labels)
        instances, of_both = sample["instances"], []
        assert instances.gt_classes.tolist() == expected["instances"].gt_classes.tolist()
        for x in (instances, expected["instances"]):
            masks = x.gt_masks if len(x) else BitMasks(torch.zeros(0, *x.image_size))
            if isinstance(masks, PolygonMasks):
                masks = BitMasks.from_polygon_masks(masks, *x.image_size)
            of_both.append(masks.tensor.bool())
        assert torch.equal(*of_both)
        shapes.add(sample["image"].shape)
    assert len(shapes) > 1 or augmentations


def test_a_crop_that_no_segment_fills(tmp_path):
    """Of the crops of a quarter, most would lie in one half of the image."""
    halves = [(7, "thing", (0, 0, 60, 60)), (9, "stuff", (60, 0, 120, 60))]
    d = write_scene(tmp_path, (60, 120), halves, None)
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml", *crop_of("relative", 0.25, 0.25))
    found = []
    for most in (1.0, 0.8):
        cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = most
        mapper, largest = PanopticDatasetMapper(cfg, True, num_things=2), []
        for seed in range(20):
            np.random.seed(seed)
            _, counts = mapper(d)["panoptic_seg"][0].unique(return_counts=True)
            largest.append((counts.max() / counts.sum()).item())
        found.append(sum(x < 0.83 for x in largest))  # the image is resized after the crop
    assert found[0] < 8 < 12 < found[1]


def test_colors_change_and_labels_do_not(tmp_path):
    d = write_scene(tmp_path, (40, 60), [(7, "thing", (0, 0, 30, 40)), (9, "stuff", (30, 0, 60, 40))], None)
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml", "INPUT.RANDOM_FLIP", "none")
    cfg.INPUT.MIN_SIZE_TRAIN, samples = (40,), []
    for cfg.INPUT.COLOR_AUG_SSD in (False, True):
        random.seed(0)
        samples.append(PanopticDatasetMapper(cfg, True, num_things=2)(d))
    plain, colored = samples
    assert plain["image"].shape == colored["image"].shape
    assert (plain["image"] != colored["image"]).float().mean() > 0.5
    assert torch.equal(plain["sem_seg"], colored["sem_seg"])


def test_an_image_that_vanishes_when_it_is_resized_is_named(tmp_path):
    d = write_scene(tmp_path, (1, 500), [(5, "stuff", (0, 0, 500, 1))], None)
    for is_train in (True, False):
        with pytest.raises(ValueError, match="image.png.* 500 x 1 pixels"):
            make_mapper(is_train, [T.ResizeShortestEdge(96, 128)])(d)


# --------------------------------------------------------------------------- kinds of masks


def test_polygons_that_leave_the_padded_image_stay_polygons(folder):
    d = write_scene(folder, (10, 10), [(5, "thing", (2, 3, 9, 8))], "polygon")
    crop = [T.FixedSizeCrop((6, 14))]
    sample = make_mapper(True, crop, instance_mask_format="polygon")(d)
    instances = sample["instances"]
    masks = BitMasks.from_polygon_masks(instances.gt_masks, 6, 14)
    assert torch.equal(masks.tensor[0], sample["panoptic_seg"][0] == 1)
    assert torch.equal(instances.gt_boxes.tensor, masks.get_bounding_boxes().tensor)


@pytest.mark.parametrize("rle", [(0,), (1,), (0, 1)])
def test_one_rle_makes_bitmasks_of_all(portrait, rle):
    """With the format that COCO's configs ask for, Detectron2 would refuse the image."""
    mapper = make_mapper(instance_mask_format="polygon")
    polygons = mapper(portrait)["instances"].gt_masks
    assert isinstance(polygons, PolygonMasks)
    for i in rle:
        rles = mask_util.frPyObjects(portrait["annotations"][i]["segmentation"], 24, 32)
        portrait["annotations"][i]["segmentation"] = mask_util.merge(rles)
    masks = mapper(portrait)["instances"].gt_masks
    assert torch.equal(masks.tensor, BitMasks.from_polygon_masks(polygons, 24, 32).tensor)


def test_integer_annotations_are_not_cut_off(folder):
    """Whole numbers in the JSON, fractions after a resize: 5 to 9 of 10 becomes 7.5 to 13.5 of 15."""
    d = write_scene(folder, (10, 10), [(5, "thing", (5, 0, 9, 10))], "polygon")
    resize = T.ResizeTransform(10, 10, 15, 15)
    instances = make_mapper(augmentations=[resize], instance_mask_format="polygon")(d)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[7.5, 0, 13.5, 15]]
    assert instances.gt_masks.polygons[0][0].tolist() == [7.5, 0, 13.5, 0, 13.5, 15, 7.5, 15]


# --------------------------------------------------------------------------- images


def test_the_camera_was_held_sideways(portrait):
    """Size and ground truth are those of the upright picture."""
    upright = Image.open(portrait["file_name"]).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees
    upright.transpose(Image.ROTATE_90).save(portrait["file_name"], exif=exif)
    assert Image.open(portrait["file_name"]).size == (24, 32)
    sample = make_mapper()(portrait)
    assert np.array_equal(sample["image"], np.array(upright).transpose(2, 0, 1))
    assert torch.equal(sample["image"][0].long(), sample["panoptic_seg"][0])


@pytest.mark.parametrize(
    "changed",
    [{"bbox": None}, {"bbox": [1, 2, 3]}, {"category_id": None}, {"segmentation": None},
     {"segmentation": 5}, {"segmentation": [[1.0, 2.0, 3.0]]},
     {"segmentation": {"size": [5, 5], "counts": b"0zzzz9"}}],
)
def test_a_malformed_annotation_is_refused_with_its_image(portrait, changed):
    """Also one that did not come through our loader."""
    ((key, value),) = changed.items()
    portrait["annotations"][1].pop(key)
    if value is not None:
        portrait["annotations"][1][key] = value
    with pytest.raises(ValueError, match=re.escape(portrait["file_name"])):
        make_mapper()(portrait)
