import logging

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs

from oanet_d2 import PanopticPredictor, PanopticResult
from oanet_d2.checkpoint import CheckpointError
from tests.conftest import scenes_paths
from tests.demo.conftest import owners


@pytest.fixture(scope="module")
def predictor(config_file):
    return PanopticPredictor.from_config(config_file)


@pytest.fixture(scope="module")
def bgr(pictures):
    return cv2.imread(str(pictures[0]))


def test_gives_what_detectron2_gives(predictor, pictures, bgr):
    expected = DefaultPredictor(predictor.cfg)(bgr)
    result = predictor(pictures[0])
    assert torch.equal(result.panoptic_seg, expected["panoptic_seg"][0])
    assert result.panoptic_seg.shape == bgr.shape[:2] and result.panoptic_seg.dtype == torch.int32
    without = [{k: s[k] for k in s if k != "category_name"} for s in result.segments_info]
    assert without == expected["panoptic_seg"][1] and len(without) > 1
    # Only what is asked for is made.
    assert not result.predictions["instances"].has("pred_masks")
    assert set(result.predictions) == {"instances", "panoptic_seg"}


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_paths_and_arrays(predictor, bgr, tmp_path, suffix):
    path = str(tmp_path / f"picture{suffix}")
    cv2.imwrite(path, bgr)
    from_path, from_array = predictor(path), predictor(bgr)
    assert (from_path.image == bgr).all()
    assert torch.equal(from_path.panoptic_seg, from_array.panoptic_seg)
    assert from_path.segments_info == from_array.segments_info


def test_gray_and_transparent_pictures(predictor, bgr, tmp_path):
    gray = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert (predictor(tmp_path / "gray.png").image == gray[:, :, None]).all()
    Image.fromarray(bgr[:, :, ::-1]).convert("RGBA").save(tmp_path / "rgba.png")
    assert (predictor(tmp_path / "rgba.png").image == bgr).all()


def test_a_network_that_wants_rgb(config_file, predictor, bgr):
    rgb = PanopticPredictor.from_config(config_file, opts=["INPUT.FORMAT", "RGB"])
    swapped = np.ascontiguousarray(bgr[:, :, ::-1])
    assert torch.equal(rgb(swapped).panoptic_seg, predictor(bgr).panoptic_seg)


def test_names_of_classes(predictor, bgr):
    metadata = MetadataCatalog.get("occlusion_scenes_val")
    segments = predictor(bgr).segments_info
    for s in segments:
        names = metadata.thing_classes if s["isthing"] else metadata.stuff_classes
        assert s["category_name"] == names[s["category_id"]]
    assert {s["isthing"] for s in segments} == {True, False}


def test_a_dataset_of_the_config(config_file, scenes, bgr, tmp_path):
    """Its panoptic JSON is all that there must be; training's files need not be there."""
    panoptic = str(scenes_paths(scenes, "val")[1])

    def described(panoptic_json):
        files = {"IMAGE_ROOT": "no", "PANOPTIC_JSON": panoptic_json, "PANOPTIC_ROOT": "no"}
        missing = {**files, "PANOPTIC_JSON": "no/train.json"}
        return f"{{'test_api_train': {missing}, 'test_api_val': {files}}}"

    lines = 'DATASETS:\n  PANOPTIC: {}\n  TRAIN: ["test_api_train"]\n  TEST: ["test_api_val"]\n'
    path = tmp_path / "own.yaml"
    path.write_text(f'_BASE_: "{config_file}"\n' + lines.format(described(panoptic)))
    try:
        result = PanopticPredictor.from_config(path)(bgr)
        assert result.metadata.name == "test_api_val"
        names = {*result.metadata.thing_classes, *result.metadata.stuff_classes}
        assert {s["category_name"] for s in result.segments_info} <= names
        assert "test_api_train" not in DatasetCatalog
    finally:
        DatasetCatalog.remove("test_api_val")
        MetadataCatalog.remove("test_api_val")
    path.write_text(f'_BASE_: "{config_file}"\n' + lines.format(described("no/val.json")))
    with pytest.raises(ValueError, match="Cannot read the annotations no/val.json"):
        PanopticPredictor.from_config(path)


def test_orders_of_the_same_predictions(predictor, bgr):
    alone, model = predictor(bgr), predictor.model
    results = predictor.in_orders(bgr, ["score", "srm_pairs"])
    painted = {k: owners(x.panoptic_seg, x.segments_info) for k, x in results.items()}
    ranked = owners(alone.panoptic_seg, alone.segments_info)
    assert (painted["srm_pairs"] == ranked).mean() > 0.999  # labels may differ by rounding
    predictions = results["score"].predictions
    expected = combine_semantic_and_instance_outputs(
        predictions["instances"],
        predictions["sem_seg"].argmax(dim=0),
        model.combine_overlap_thresh,
        model.combine_stuff_area_thresh,
        model.combine_instances_score_thresh,
    )
    assert (painted["score"] == owners(*expected)).all()
    assert (painted["score"] != painted["srm_pairs"]).any()
    # The next result has no more than it is asked for.
    assert not predictor(bgr).predictions["instances"].has("pred_masks")


def test_outputs_can_be_asked_for(config_file, bgr):
    opts = ["MODEL.OANET.OUTPUTS", ("pred_masks",), "MODEL.OANET.ORDER", "srm_mean"]
    predictor = PanopticPredictor.from_config(config_file, opts=opts)
    result = predictor(bgr)
    instances = result.predictions["instances"]
    assert instances.pred_masks.shape == (len(instances), *bgr.shape[:2])
    assert "sem_seg" not in result.predictions and predictor.model.order == "srm_mean"


@pytest.mark.parametrize(
    "size, scale, expected",
    [
        ((64, 64), None, (480, 480)),  # else the labels would hide it
        ((30, 60), None, (240, 480)),
        ((300, 600), None, (300, 600)),
        ((64, 64), 1, (64, 64)),
        ((64, 32), 2, (128, 64)),
    ],
)
def test_size_of_a_drawing(predictor, bgr, size, scale, expected):
    drawing = predictor(cv2.resize(bgr, size[::-1])).draw(scale)
    assert drawing.get_image().shape == (*expected, 3)


def test_a_drawing_can_be_saved(predictor, bgr, tmp_path):
    drawing = predictor(bgr).draw()
    drawing.save(str(tmp_path / "out.png"))
    saved = cv2.imread(str(tmp_path / "out.png"))
    assert (saved[:, :, ::-1] == drawing.get_image()).mean() > 0.99
    enlarged = cv2.resize(bgr, (480, 480))
    assert np.abs(saved.astype(int) - enlarged).mean() > 10


def test_a_picture_of_nothing(bgr):
    nothing = torch.zeros(bgr.shape[:2], dtype=torch.int32)
    result = PanopticResult(bgr, nothing, [], MetadataCatalog.get("occlusion_scenes_val"))
    assert (result.draw(scale=1).get_image() == bgr[:, :, ::-1]).mean() > 0.99


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((8, 8), np.uint8), r"array of uint8 and shape \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\); it must be uint8 of shape \(H, W, 3\)"),
        (np.zeros((8, 8, 3)), "array of float64"),
        (torch.zeros(8, 8, 3), "a path or a numpy array in BGR, not Tensor"),
        ("nowhere.jpg", "nowhere.jpg: .*No such file"),
    ],
)
def test_what_is_no_picture(predictor, image, words):
    with pytest.raises(ValueError, match=words):
        predictor(image)
    with pytest.raises(ValueError, match=words):
        predictor.in_orders(image, ["score"])


def test_a_checkpoint_that_lacks_something(config_file, predictor, tmp_path):
    """It would give what a part that never learned says."""
    state = build_model(predictor.cfg).state_dict()
    part = {k: v for k, v in state.items() if not k.startswith("srm_head.predictor")}
    torch.save({"model": part}, tmp_path / "part.pth")
    words = "part.pth .* 2 tensors .* such as srm_head.predictor"
    with pytest.raises(CheckpointError, match=words):
        PanopticPredictor.from_config(config_file, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        PanopticPredictor.from_config(config_file, "nowhere.pth")


def test_weights_come_before_the_config(config_file, predictor, bgr, tmp_path):
    state = predictor.model.state_dict()
    state = {k: v + 1 if k == "sem_seg_head.predictor.bias" else v for k, v in state.items()}
    state["sem_seg_head.predictor.bias"] = state["sem_seg_head.predictor.bias"].clone()
    state["sem_seg_head.predictor.bias"][9] += 1e6
    torch.save({"model": state}, tmp_path / "grey.pth")
    result = PanopticPredictor.from_config(config_file, str(tmp_path / "grey.pth"))(bgr)
    stuff = {s["category_name"] for s in result.segments_info if not s["isthing"]}
    assert stuff == {"mountain"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_does(config_file, bgr, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("oanet_d2"), "propagate", True)
    predictor = PanopticPredictor.from_config(config_file, opts=["MODEL.DEVICE", "cuda"])
    assert predictor(bgr).panoptic_seg.device.type == "cpu"
    assert "MODEL.DEVICE is cuda, but there is no GPU" in caplog.text


def test_a_yaml_that_runs_code_is_refused(config_file, tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(Exception, match="python/object/apply"):
        PanopticPredictor.from_config(path)
    assert not (tmp_path / "made").exists()
