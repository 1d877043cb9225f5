from functools import partial
from graphlib import TopologicalSorter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detectron2.structures import BitMasks, Instances, PolygonMasks

from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.copy_paste import cut_out, paste
from oanet_d2.data.training_stream import build_train_loader
from tests.data.conftest import make_mapper
from tests.data.test_dataset_mapper import augmentations, scenes, write_scene

BLUE = 200  # of a source's pixels; images of `write_scene` have no blue


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("source")


def write_source(folder, size, rectangles, masks):
    Image.new("RGB", size[::-1], (0, 0, BLUE)).save(folder / "blue.png")
    d = write_scene(folder, size, rectangles, masks)
    return {**d, "file_name": str(folder / "blue.png")}


def mapped(seed, mapper, *args):
    np.random.seed(seed)
    return mapper(*args)


def tensors(sample):
    instances, maps = sample["instances"], (sample["panoptic_category"], sample["sem_seg"])
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    found = sample["panoptic_seg"][0], *maps, instances.gt_boxes.tensor, instances.gt_classes
    return [*found, masks.tensor]


def paint(ids, masks, segments):
    """Paint whole masks so that whoever is seen on another comes later; a cycle is an error."""
    below = {i: [] for i in segments}
    for mask, i in zip(masks, segments):
        for upper in set(ids[mask].tolist()) & set(segments) - {i}:
            below[upper].append(i)
    painted, mask_of = ids.clone(), dict(zip(segments, masks))
    for i in TopologicalSorter(below).static_order():
        painted[mask_of[i]] = i
    return painted


@given(st.data(), *[st.sampled_from([None, "polygon", "rle"])] * 2, st.booleans())
def test_whole_masks_paint_the_panoptic_map(folders, data, masks, source_masks, stuff_only):
    """For every pair of scenes, after every augmentation, with masks of every kind."""
    size, rectangles = data.draw(scenes())
    d = write_scene(folders[0], size, rectangles, masks)
    source = write_source(folders[1], *data.draw(scenes()), source_masks)
    if masks is None and data.draw(st.booleans()):
        for segment in [*d["segments_info"], *source["segments_info"]]:
            segment["category_id"] = 1  # all of one class
    steps = data.draw(augmentations(resize=masks != "polygon"))
    make = partial(make_mapper, True, steps, stuff_only=stuff_only)
    make = partial(make, instance_mask_format="polygon" if masks == "polygon" else "bitmask")
    seed = data.draw(st.integers(0, 2**32 - 1))
    plain, sample = mapped(seed, make(), d), mapped(seed, make(copy_paste=1.0), d, [source])
    assert all(map(torch.equal, tensors(plain), tensors(mapped(seed, make(), d, [source]))))
    blind = mapped(seed, make(copy_paste=1.0, read_image=False), d, [source])
    assert "image" not in blind and blind["panoptic_seg"][1] == sample["panoptic_seg"][1]
    for x, y, z in zip(tensors(plain), tensors(sample), tensors(blind)):
        assert torch.equal(y, z) and x.dtype == y.dtype and x.shape[1:] == y.shape[1:]

    # The image says what was pasted where, and nothing else has changed.
    before, (ids, segments) = plain["panoptic_seg"][0], sample["panoptic_seg"]
    pasted = sample["image"][2] == BLUE
    assert torch.equal(sample["image"][:, ~pasted], plain["image"][:, ~pasted])
    assert torch.equal(ids[~pasted], before[~pasted]) and (ids[pasted] > len(rectangles)).all()
    if not pasted.any():
        assert segments == plain["panoptic_seg"][1]
        return
    assert [s["id"] for s in segments] == [i for i in ids.unique().tolist() if i > 0]
    of_segment = {0: (-1, 255)}
    for s in segments:
        isthing, c = s["isthing"], s["category_id"]
        of_segment[s["id"]] = (c if isthing else c + 6), (0 if isthing else c)
    category, labels = torch.tensor([of_segment[i] for i in ids.flatten().tolist()]).T
    assert torch.equal(sample["panoptic_category"].flatten(), category)
    assert not stuff_only or torch.equal(sample["sem_seg"].flatten(), labels)

    # Instances keep their whole masks, or go with their segments.
    visible = set(before.unique().tolist())
    own = [i for i, (_, kind, _) in enumerate(rectangles, 1) if kind == "thing" and i in visible]
    if masks is not None:
        own = (plain["instances"].gt_classes + 1).tolist()  # the hidden ones, too
    new = [s for s in segments if s["id"] > len(rectangles)]
    assert all(s["isthing"] and not s["iscrowd"] for s in new)
    kept = [k for k, i in enumerate(own) if i not in visible or (ids == i).any()]
    boxes, classes, whole = tensors(sample)[3:]
    assert torch.equal(whole[: len(kept)], tensors(plain)[5][kept])
    assert torch.equal(classes[: len(kept)], plain["instances"].gt_classes[kept])
    assert classes[len(kept) :].tolist() == [s["category_id"] for s in new]
    assert torch.equal(boxes, BitMasks(whole).get_bounding_boxes().tensor)

    # Where crowds and stuff lay over a whole mask before, instances alone do not paint the map.
    seen = [k for k in kept if own[k] in visible]
    of_things = torch.isin(before, torch.tensor([own[k] for k in seen]))
    unclear = tensors(plain)[5].any(0) & ~of_things & ~pasted
    chosen = [n for n, k in enumerate(kept) if own[k] in visible] + [*range(len(kept), len(whole))]
    painted = paint(ids, whole[chosen], [own[k] for k in seen] + [s["id"] for s in new])
    assert torch.equal(painted[~unclear], ids[~unclear])


@pytest.mark.parametrize("masks", [None, "rle"])
def test_both_ways_round(folders, masks):
    """A square near a square of its class: in front of it, or behind it and before the stuff."""
    scene = (40, 50), [(1, "stuff", (0, 0, 50, 40)), (2, "thing", (15, 10, 35, 30))]
    d, source = (write_scene(folder, *scene, masks) for folder in folders)
    ways = set()
    for seed in range(40):
        sample = mapped(seed, make_mapper(copy_paste=1.0), d, [source])
        ids, whole = sample["panoptic_seg"][0], sample["instances"].gt_masks.tensor
        if len(whole) == 2:  # or it hides the other, or would be hidden
            own, new = whole
            ways.add(tuple(ids[own & new].unique().tolist()))
            assert own.sum() == 20 * 20
            assert (ids[new & ~own] == 3).all() and (ids[own & ~new] == 2).all()
    assert {(2,), (3,)} <= ways <= {(), (2,), (3,)}


COVERED = [(3, "thing", (5, 5, 20, 20)), (4, "stuff", (5, 5, 20, 12))]
CROWD = [(3, "crowd", (5, 5, 20, 20))]


@pytest.mark.parametrize(
    "rectangles, masks, expected",
    [([], None, []), (CROWD, None, []), (CROWD, "rle", []), (COVERED, None, [0]),
     (COVERED, "polygon", []),
     ([*COVERED, (5, "thing", (22, 22, 25, 25))], "rle", [2]),
     ([*COVERED, (5, "thing", (5, 12, 20, 17))], "polygon", [2]),
     ([(2, "thing", (5, 12, 20, 20)), *COVERED], "rle", [])],
)  # fmt: skip
def test_crowds_and_what_is_covered_are_not_pasted(folders, rectangles, masks, expected):
    source = write_source(folders[1], (30, 30), rectangles, masks)
    for seed in range(5):
        found = mapped(seed, cut_out, source, (20, 20), "RGB")
        assert [x.category_id for x in found] == expected
    for x in source["segments_info"] + source.get("annotations", []):
        x["category_id"] = 0
    assert not expected or len(cut_out(source, (20, 20), None)) == len(expected)


def test_pixels_belong_to_their_mask(folders):
    """A triangle stays one, scaled and flipped, and shows no pixel from beside it."""
    source = write_scene(folders[1], (64, 64), [(9, "thing", (0, 0, 1, 1))], None)
    ids = np.tril(np.full((64, 64), 9)).astype(np.uint8)
    Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], axis=2)).save(source["pan_seg_file_name"])
    Image.fromarray(np.stack([ids * 20] * 3, axis=2)).save(source["file_name"])
    cutouts = [mapped(seed, cut_out, source, (100, 128), "RGB")[0] for seed in range(20)]
    for mask, pixels, _ in cutouts:
        assert 0.45 < mask.mean() < 0.6 and pixels[mask].mean() > 170 > 40 > pixels[~mask].mean()
    assert {bool(x.mask[0, 0]) for x in cutouts} == {True, False}
    sides = [x.mask.shape[0] for x in cutouts]
    assert min(sides) < 60 and max(sides) == 0.7 * 100


def test_unequal_sizes_and_an_image_without_instances(folders):
    d = write_scene(folders[0], (9, 64), [(7, "crowd", (0, 0, 30, 9))], "rle")
    source = write_source(folders[1], (64, 21), [(5, "thing", (3, 2, 18, 60))], "polygon")
    sample = mapped(0, make_mapper(copy_paste=1.0), d, [source])
    (whole,) = sample["instances"].gt_masks.tensor
    assert torch.equal(whole, sample["panoptic_seg"][0] == 2)
    assert torch.equal(whole, sample["image"][2] == BLUE) and whole.shape == (9, 64)
    Image.new("RGB", (64, 21)).save(source["file_name"])
    with pytest.raises(ValueError, match=r"blue\.png.*64 x 21"):
        mapped(0, make_mapper(copy_paste=1.0), d, [source])


coordinates = st.floats(-8, 38, allow_nan=False, width=32)
polygon = st.lists(coordinates, min_size=6, max_size=12).map(lambda x: x[: len(x) // 2 * 2])


@given(st.lists(polygon, min_size=1, max_size=3))
def test_polygons_become_detectron2s_bitmasks(polygons):
    """Also those that leave the image."""
    masks, classes = PolygonMasks([polygons]), torch.tensor([0])
    boxes = masks.get_bounding_boxes()
    instances = Instances((20, 30), gt_masks=masks, gt_boxes=boxes, gt_classes=classes)
    sample = {"instances": instances, "segments_info": []}
    paste([(np.ones((1, 1), bool), None, 3)], sample, np.zeros((20, 30), dtype=np.int64))
    expected = BitMasks.from_polygon_masks(masks, 20, 30).tensor
    assert torch.equal(sample["instances"].gt_masks.tensor[:1], expected)


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_pastes_depend_on_the_place_alone(train_cfg, sampler):
    """A resumed training sees the same ones; without images they are the same, too."""
    train_cfg.INPUT.COPY_PASTE, train_cfg.DATALOADER.SAMPLER_TRAIN = 0.5, sampler
    found = []
    for architecture, first in (("OANet", 0), ("OANet", 4), ("SRMFromAnnotations", 4)):
        train_cfg.MODEL.META_ARCHITECTURE, train_cfg.DATALOADER.NUM_WORKERS = architecture, first // 2
        loader = build_train_loader(train_cfg, PanopticDatasetMapper(train_cfg, is_train=True))
        loader.dataset.seed, loader.dataset.first_batch = 7, first
        found.append([x for batch in islice(loader, 8 - first) for x in batch])
    for whole, resumed, blind in zip(found[0][8:], *found[1:]):
        assert torch.equal(whole["image"], resumed["image"]) and "image" not in blind
        assert all(map(torch.equal, tensors(whole), tensors(resumed)))
        assert all(map(torch.equal, tensors(whole), tensors(blind)))
    before = {x["image_id"]: len(x["annotations"]) for x in loader.dataset.samples._dataset}
    assert 0 < sum(len(x["instances"]) > before[x["image_id"]] for x in found[0]) < 16
