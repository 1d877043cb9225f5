"""Anyone's masks, against the same masks as arrays."""

import types

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from detectron2.structures import Boxes, Instances

from oanet_d2.painting import BoxedMasks, paint, read_detections
from oanet_d2.painting.formats import rle_runs

SIZE = (13, 17)
FIELDS = {"scores": [0.9, 0.8, 0.7], "classes": [2, 0, 1]}


def random_masks(seed=0, n=3, size=SIZE):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *size), bool)
    for mask in masks:
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        mask[y : y + rng.integers(1, size[0] + 1), x : x + rng.integers(1, size[1] + 1)] = True
        mask &= rng.random(size) < 0.8
    return masks


MASKS = random_masks()


def rle(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def text(compressed):
    return {**compressed, "counts": compressed["counts"].decode()}


def uncompressed(mask):
    flat = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": [*mask.shape], "counts": np.diff([0, *changes, flat.size]).tolist()}


def dense(detections):
    full = np.zeros((len(detections), *detections.image_size), bool)
    for i, one in enumerate(full):
        mask, region = detections.mask_of(i)
        assert mask.dtype == bool
        one[region] = mask
    return full


def same(detections, masks=MASKS, **fields):
    assert (dense(detections) == masks).all()
    for name, values in (fields or FIELDS).items():
        assert getattr(detections, name).tolist() == pytest.approx(values)


KINDS = {
    "bool": lambda masks: masks,
    "uint8": lambda masks: masks.astype(np.uint8),
    "zeros and ones, as Mask2Former's": lambda masks: torch.from_numpy(masks).float(),
    "tensor": lambda masks: torch.from_numpy(masks),
    "view": lambda masks: np.ascontiguousarray(masks.transpose(1, 2, 0)).transpose(2, 0, 1),
    "compressed": lambda masks: [rle(m) for m in masks],
    "text": lambda masks: [text(rle(m)) for m in masks],
    "uncompressed": lambda masks: [uncompressed(m) for m in masks],
    "mixed": lambda masks: [*map(rle, masks[:1]), *map(uncompressed, masks[1:])],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [SIZE, (1, 9), (9, 1), (300, 2)])
def test_masks_of_every_kind(kind, size):
    masks = random_masks(1, 6, size)
    masks[0], masks[1] = False, True  # none, all
    masks[2] = False
    masks[2, -1, -1] = True  # one pixel
    detections = read_detections(KINDS[kind](masks))
    assert detections.image_size == size and (dense(detections) == masks).all()
    for i, mask in enumerate(masks):  # nothing larger than the box
        rows, columns = detections.regions[i]
        box = mask_util.toBbox(rle(mask)).tolist()
        full_height = detections.regions[i][0] == slice(0, size[0])  # a run goes around the edge
        assert columns.stop - columns.start == box[2]
        assert rows.stop - rows.start == box[3] or full_height


def test_runs_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(40):
        size = tuple(rng.integers(1, 300, 2))
        pixels = size[0] * size[1]
        mask = np.repeat(rng.random(pixels) < 0.5, rng.integers(1, 4000))[:pixels].reshape(size)
        assert rle_runs(rle(mask)["counts"]).tolist() == uncompressed(mask)["counts"]


def test_polygons_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    size = (40, 61)
    polygons = [[(rng.random(2 * k) * 60).tolist() for k in ks] for ks in ([3], [7, 4], [3, 3, 5])]
    expected = [mask_util.merge(mask_util.frPyObjects(p, *size)) for p in polygons]
    detections = read_detections(polygons, image_size=size)
    assert (dense(detections) == np.stack([mask_util.decode(x) for x in expected])).all()
    line = read_detections([[[1, 1, 5, 5]]], image_size=size)  # two points have no area
    assert not dense(line).any()


def test_masks_in_boxes_are_those_of_boxed_masks():
    rng = np.random.default_rng(0)
    roi = rng.random((4, 28, 28)).astype(np.float32)
    corners = [[0, 0, 17, 13], [2.4, 3.2, 9.7, 12.9], [16.2, 0, 17, 0.6], [5, 5, 5, 9]]
    boxes = np.array(corners, np.float32)
    pasted = BoxedMasks.paste(torch.from_numpy(roi[:3]), torch.from_numpy(boxes[:3]), SIZE)
    found = dense(read_detections(roi, boxes=boxes, image_size=SIZE))
    for i in range(3):
        expected, region = pasted.array(i)
        assert (found[i][region] == expected).all() and found[i].sum() == expected.sum()
    assert not found[3].any()


def test_detectron2_instances():
    instances = Instances(SIZE, scores=torch.tensor(FIELDS["scores"]))
    instances.pred_classes = torch.tensor(FIELDS["classes"])
    instances.pred_masks = torch.from_numpy(MASKS)
    same(read_detections(instances))
    raw = torch.rand(3, 1, 14, 14)
    instances.pred_masks = raw
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9], [3, 2, 17, 13], [5.5, 1, 7, 11.2]]))
    expected = read_detections(raw[:, 0], boxes=instances.pred_boxes.tensor, image_size=SIZE)
    same(read_detections(instances), dense(expected), **FIELDS)
    assert len(read_detections(instances[:0])) == 0


def test_a_mask_rcnn_of_torchvision():
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    options = {"num_classes": 4, "min_size": 64, "box_score_thresh": 0, "box_detections_per_img": 7}
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).eval()
    with torch.no_grad():
        (output,) = model([torch.rand(3, 48, 60)])
    assert output["masks"].shape == (7, 1, 48, 60)
    fields = {"scores": output["scores"].tolist(), "classes": output["labels"].tolist()}
    same(read_detections(output), (output["masks"][:, 0] >= 0.5).numpy(), **fields)
    assert paint(output).panoptic_seg.shape == (48, 60)
    none = {name: x[:0] for name, x in output.items()}
    assert paint(none).segments_info == []


def ultralytics_results(polygons, conf, cls):
    """The shape of `ultralytics.engine.results.Results`; it needs a network of its own to be made."""
    return types.SimpleNamespace(
        masks=None if not polygons else types.SimpleNamespace(xy=polygons),
        boxes=types.SimpleNamespace(conf=torch.tensor(conf), cls=torch.tensor(cls)),
        orig_shape=SIZE,
        names={0: "person", 1: "tie"},
    )


def test_ultralytics_results():
    square = np.array([[2, 3], [8, 3], [8, 9], [2, 9]], np.float32)
    empty = np.zeros((0, 2), np.float32)  # as for a mask without a contour
    results = ultralytics_results([square, empty], [0.5, 0.75], [1.0, 0.0])
    detections = read_detections(results)
    expected = np.zeros((2, *SIZE), bool)
    expected[0, 3:9, 2:8] = True
    same(detections, expected, scores=[0.5, 0.75], classes=[1, 0])
    result = paint(results)
    assert [s["category_name"] for s in result.segments_info] == ["tie"]
    none = paint(ultralytics_results([], [], []))
    assert none.segments_info == [] and none.panoptic_seg.shape == SIZE


@pytest.mark.parametrize("kind", ["bool", "compressed", "uncompressed"])
def test_sam(kind):
    segmentations = KINDS[kind](MASKS)
    scored = zip(segmentations, [0.9, 0.8, 0.7])
    anns = [{"segmentation": m, "predicted_iou": s, "area": 1} for m, s in scored]
    same(read_detections(anns), scores=[0.9, 0.8, 0.7])
    assert read_detections(anns).classes is None
    assert read_detections([], image_size=SIZE).image_size == SIZE


def test_coco_annotations():
    annotations = [{"segmentation": rle(m), "category_id": c} for m, c in zip(MASKS, [5, 1, 5])]
    annotations[2]["iscrowd"] = 1  # the others do not say
    detections = read_detections(annotations)
    same(detections, classes=[5, 1, 5], crowds=[False, False, True])
    assert detections.scores is None


class Compact:
    """What supervision's CompactMask shows: NumPy can make an array of it."""

    shape = MASKS.shape

    def __array__(self, dtype=None, copy=None):
        return MASKS


@pytest.mark.parametrize("mask", [MASKS, Compact()])
def test_the_shape_of_supervision(mask):
    names = np.array(["tie", "person", "dog"])
    given = types.SimpleNamespace(
        xyxy=np.zeros((3, 4)),
        mask=mask,
        confidence=np.array(FIELDS["scores"]),
        class_id=np.array(FIELDS["classes"]),
        data={"class_name": names},
    )
    detections = read_detections(given)
    same(detections)
    assert detections.class_names == {2: "tie", 0: "person", 1: "dog"}
    given.mask = None
    with pytest.raises(ValueError, match="no masks"):
        read_detections(given)


GOOD = rle(MASKS[0])
ROI, BOX = np.full((1, 4, 4), 0.7), [[0, 0, 5, 5]]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"masks": MASKS, "image_size": (17, 13)}, "13, 17.*17, 13"),
        ({"masks": [GOOD, rle(MASKS[0].T)]}, "several sizes"),
        ({"masks": [{"segmentation": m} for m in (MASKS[0], MASKS[0].T)]}, "several sizes"),
        ({"masks": MASKS[0]}, r"\(N, H, W\)"),
        ({"masks": MASKS * 0.7}, "threshold"),
        ({"masks": np.where(MASKS, np.nan, 0)}, "float64"),
        ({"masks": MASKS, "scores": [0.5, np.nan, 1]}, "scores are .*nan"),
        ({"masks": MASKS, "scores": ["high", "low", "low"]}, "scores are .*high"),
        ({"masks": MASKS, "scores": [0.5, 1]}, r"scores have the shape \(2,\).* 3 masks"),
        ({"masks": MASKS, "classes": [0, 0.5, 1]}, "classes are .*integer"),
        # RLEs that do not fit, are no text of pycocotools, or hold no counts of pixels
        ({"masks": [{**GOOD, "size": [13, 18]}]}, "mask 0 do not add up to 13 x 18"),
        ({"masks": [{"size": [13, 17], "counts": "!§ä"}]}, "do not add up"),
        ({"masks": [{"size": [13, 17], "counts": b"\xff\x00!"}]}, "do not add up"),
        ({"masks": [{"size": [2, 2], "counts": [5, -1]}]}, "do not add up"),
        ({"masks": [{"size": [2, 2], "counts": [2**63 - 1, 2**63 - 1, 6]}]}, "do not add up"),
        ({"masks": [{"size": [2, 2], "counts": [[1, 2], 1]}]}, "do not add up"),
        ({"masks": [{"size": [2, 2]}]}, "'counts'"),
        ({"masks": [{"size": None, "counts": [4]}]}, "'counts'"),
        ({"masks": ["mask"], "image_size": SIZE}, "polygons of mask 0.*mask"),
        ({"masks": [None], "image_size": SIZE}, "polygons of mask 0.*None"),
        ({"masks": [[0, 0, 5, 0, 5, 5]], "image_size": SIZE}, "polygons of mask 0"),
        ({"masks": [[[0, 0, 5, 0, 5, 5]]]}, "image_size"),
        ({"masks": []}, "image_size"),
        ({"masks": ROI, "boxes": [[0, 0, 18, 5]], "image_size": SIZE}, "outside .* 17 x 13"),
        ({"masks": ROI, "boxes": [[0, 0, np.nan, 5]], "image_size": SIZE}, "outside"),
        ({"masks": ROI, "boxes": BOX * 2, "image_size": SIZE}, "2 boxes"),
        ({"masks": MASKS, "boxes": BOX * 3, "image_size": SIZE}, "need no boxes"),
        ({"masks": ROI * 9, "boxes": BOX, "image_size": SIZE}, "from 0 to 1"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        read_detections(**arguments)
