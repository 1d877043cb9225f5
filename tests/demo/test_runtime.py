"""What an exported model gives is what the network gives in PyTorch."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import detection_utils

from oanet_d2 import PanopticPredictor
from oanet_d2.runtime import OnnxPredictor
from tests.onnx_models import write_model


@torch.no_grad()
def outputs_for(predictor, image):
    """What the network finds in a picture, as an exported model gives it."""
    model = predictor.model
    given = image[:, :, ::-1] if predictor.cfg.INPUT.FORMAT == "RGB" else image
    resized = predictor.aug.get_transform(given).apply_image(given)
    x = {"image": torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))}
    x.update(zip(("height", "width"), image.shape))
    semantic = model.sem_seg_head.layers(model.backbone(model.preprocess_image([x]).tensor))
    (found,) = model.inference([x], do_postprocess=False)[0]
    inputs = model.inference([x], return_fusion_inputs=True)[0]["fusion_inputs"].order_inputs
    assert len(inputs.scores) == len(found)  # no box is empty
    painted = found.scores >= model.combine_instances_score_thresh
    outputs = {
        "boxes": found.pred_boxes.tensor[painted],
        "scores": found.scores[painted],
        "classes": found.pred_classes[painted],
        "masks": found.pred_masks[painted, 0],
        "semantic": model.sem_seg_head.stuff_scores(semantic)[0],
    }
    if model.order == "srm_pairs":
        outputs["margins"] = inputs.pair_margins[painted][:, painted]
    else:
        outputs["order"] = inputs[painted].order(model.order)
    return {name: x.numpy() for name, x in outputs.items()}


def export(predictor, image, path):
    """An ONNX file that gives for every picture of this size what the network gives for this one."""
    cfg, classes, model = predictor.cfg, predictor.metadata, predictor.model
    return write_model(
        path,
        outputs_for(predictor, image),
        input_format=cfg.INPUT.FORMAT,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        overlap_threshold=model.combine_overlap_thresh,
        stuff_area_thresh=model.combine_stuff_area_thresh,
        keep_things_free=model.keep_things_free,
        semantic_stride=model.sem_seg_head.common_stride,
        thing_classes=classes.thing_classes,
        stuff_classes=classes.stuff_classes,
        thing_colors=classes.thing_colors,
        stuff_colors=classes.stuff_colors,
        thing_ids=list(classes.thing_dataset_id_to_contiguous_id),
        stuff_ids=[0, *classes.stuff_dataset_id_to_contiguous_id],
    )


@pytest.fixture(scope="module", params=["srm_pairs", "smaller_first"])
def predictor(request, config_file):
    opts = ["MODEL.OANET.ORDER", request.param, "INPUT.MAX_SIZE_TEST", "100"]
    opts += ["MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "9"]
    return PanopticPredictor.from_config(config_file, opts=opts)


@pytest.mark.parametrize("size", [(64, 64), (90, 141), (300, 97), (33, 41), (40, 120)])
def test_equals_the_network_in_pytorch(predictor, pictures, tmp_path, size):
    image = cv2.resize(cv2.imread(str(pictures[0])), size[::-1])
    theirs, ours = predictor(image), OnnxPredictor(export(predictor, image, tmp_path / "a.onnx"))(image)
    assert ours.segments_info[0]["isthing"] and len(ours.segments_info) > 1
    assert (ours.panoptic_seg == theirs.panoptic_seg.numpy()).mean() >= 0.999
    for one, other in zip(ours.segments_info, theirs.segments_info, strict=True):
        assert one.pop("area", 0) == pytest.approx(other.pop("area", 0), abs=2, rel=0.001)
        assert one == other
    instances = theirs.predictions["instances"]
    painted = instances.scores >= predictor.model.combine_instances_score_thresh
    boxes = instances.pred_boxes.tensor[painted].numpy()
    np.testing.assert_allclose(ours.predictions["boxes"], boxes, rtol=1e-6)


def test_a_file_is_read_as_detectron2_reads_it(predictor, pictures, tmp_path):
    """It lies on its side, as EXIF says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(pictures[0]).resize((96, 64)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = detection_utils.read_image(str(tmp_path / "a.jpg"), "BGR")
    assert upright.shape == (96, 64, 3)
    path = export(predictor, upright, tmp_path / "a.onnx")
    assert (OnnxPredictor(path)(tmp_path / "a.jpg").image == upright).all()
