import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from oanet_d2 import PanopticPredictor, PanopticResult, load_config
from oanet_d2.checkpoint import CheckpointError, read_description
from oanet_d2.modeling import OANetWithTTA
from tests.conftest import scenes_paths
from tests.demo.conftest import owners


@pytest.fixture(scope="module")
def predictor(config_file):
    return PanopticPredictor.from_config(config_file)


@pytest.fixture(scope="module")
def bgr(pictures):
    return cv2.imread(str(pictures[0]))


def test_equals_detectron2s_predictor(predictor, pictures, bgr):
    expected, expected_info = DefaultPredictor(predictor.cfg)(bgr)["panoptic_seg"]
    for image in (pictures[0], bgr):
        result = predictor(image)
        assert (result.image == bgr).all() and result.panoptic_seg.dtype == torch.int32
        assert torch.equal(result.panoptic_seg, expected)
        without = [{k: s[k] for k in s if k != "category_name"} for s in result.segments_info]
        assert without == expected_info and len(without) > 1
        assert set(result.predictions) == {"instances", "panoptic_seg"}
    metadata = MetadataCatalog.get("occlusion_scenes_val")
    for s in result.segments_info:
        names = metadata.thing_classes if s["isthing"] else metadata.stuff_classes
        assert s["category_name"] == names[s["category_id"]]


def test_a_network_that_wants_rgb(config_file, predictor, bgr):
    rgb = PanopticPredictor.from_config(config_file, opts=["INPUT.FORMAT", "RGB"])
    assert torch.equal(rgb(bgr[:, :, ::-1]).panoptic_seg, predictor(bgr).panoptic_seg)


def test_follows_test_aug(config_file, predictor, pictures, bgr):
    """One image at the test scale is no real augmentation; with others it is OANetWithTTA's result."""
    opts = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False]
    once = PanopticPredictor.from_config(config_file, opts=opts)
    assert torch.equal(once(bgr).panoptic_seg, predictor(bgr).panoptic_seg)
    opts[3:] = (48, 64), "TEST.AUG.FLIP", True
    augmented = PanopticPredictor.from_config(config_file, opts=opts)
    from_file = [{"file_name": str(pictures[0])}]
    expected, info = OANetWithTTA(augmented.cfg, augmented.model)(from_file)[0]["panoptic_seg"]
    for result in (augmented(pictures[0]), *augmented.in_orders(bgr, ["srm_pairs"]).values()):
        assert torch.equal(result.panoptic_seg, expected) and len(result.segments_info) == len(info)
    assert not torch.equal(expected, predictor(bgr).panoptic_seg)


def test_orders_of_the_same_predictions(predictor, bgr):
    results = predictor.in_orders(bgr, ["score", predictor.model.order])
    score, learned = (owners(*x.panoptic) for x in results.values())
    assert (learned == owners(*predictor(bgr).panoptic)).all() and (score != learned).any()


def test_eight_threads_give_what_one_gives(predictor, pictures):
    sizes = [(64, 64), (40, 90), (90, 40), (33, 64)]
    images = [cv2.resize(cv2.imread(str(p)), size) for p in pictures for size in sizes]

    def segment(i):
        if i % 2:
            return owners(*predictor(images[i]).panoptic)
        results = predictor.in_orders(images[i], ["score", "srm_pairs"])
        return np.stack([owners(*x.panoptic) for x in results.values()])

    tasks = list(range(len(images))) * 2
    alone = [segment(i) for i in tasks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(segment, tasks))
    assert all((a == b).all() for a, b in zip(alone, together))
    assert sum((a[0] != a[1]).any() for a in alone[::2]) > 2  # the orders do differ


@pytest.fixture
def own_dataset(config_file, scenes, tmp_path):
    """A config with two datasets. Of these only the panoptic JSON of own_val exists."""
    # It takes a while to read: all want to register the dataset meanwhile.
    content = json.loads(scenes_paths(scenes, "val")[1].read_text())
    (tmp_path / "large.json").write_text(json.dumps({**content, "info": list(range(300_000))}))
    files = {"IMAGE_ROOT": "no", "PANOPTIC_JSON": "no.json", "PANOPTIC_ROOT": "no"}
    own_val = {**files, "PANOPTIC_JSON": str(tmp_path / "large.json")}
    datasets = {"PANOPTIC": {"own_train": files, "own_val": own_val}}
    datasets.update(TRAIN=["own_train"], TEST=["own_val"])
    (tmp_path / "own.yaml").write_text(f"{{_BASE_: {config_file}, DATASETS: {datasets}}}")
    yield tmp_path / "own.yaml"
    DatasetCatalog.remove("own_val")
    MetadataCatalog.remove("own_val")


def test_predictors_built_at_once_from_a_panoptic_json(own_dataset, bgr):
    together = threading.Barrier(4)

    def build(_):
        together.wait()
        return PanopticPredictor.from_config(own_dataset)

    with ThreadPoolExecutor(4) as pool:
        first, *others = (predictor(bgr) for predictor in pool.map(build, range(4)))
    for result in others:
        assert torch.equal(result.panoptic_seg, first.panoptic_seg)
    assert first.metadata.name == "own_val" and "own_train" not in DatasetCatalog


def test_a_file_with_its_config_and_classes(weights_file, predictor, bgr):
    """It needs nothing else: no yaml, no dataset, none of the paths that a training knew."""
    alone = PanopticPredictor.from_file(weights_file)
    a, b = alone(bgr), predictor(bgr)
    assert torch.equal(a.panoptic_seg, b.panoptic_seg) and a.segments_info == b.segments_info
    assert a.draw().get_image().shape == b.draw().get_image().shape
    expected = MetadataCatalog.get("occlusion_scenes_val").as_dict()
    found = {key: x for key, x in alone.metadata.as_dict().items() if key != "name"}
    assert found == {key: expected[key] for key in found} and "stuff_colors" in found
    assert "unknown_here" not in DatasetCatalog and "unknown_here" not in MetadataCatalog
    changed = PanopticPredictor.from_file(weights_file, ["MODEL.OANET.ORDER", "score"])
    score, _ = predictor.in_orders(bgr, ["score", "srm_pairs"]).values()
    assert torch.equal(changed(bgr).panoptic_seg, score.panoptic_seg)


def test_a_file_beside_a_config(config_file, weights_file, predictor, bgr):
    other = PanopticPredictor.from_config(config_file, weights_file)
    assert torch.equal(other(bgr).panoptic_seg, predictor(bgr).panoptic_seg)


@pytest.mark.parametrize(
    "config, words",
    [
        ("MODEL: {FROM_THE_FUTURE: 1}", "another version: .*MODEL.FROM_THE_FUTURE"),
        ("MODEL: {MASK_ON: 'often'}", "another version: .*MODEL.MASK_ON"),
        ("A: !!python/object/apply:os.mkdir ['made']", "os.mkdir"),
        ("_BASE_: tiny.yaml", "_BASE_"),
        ("no config", "another version: "),
    ],
)
def test_a_config_in_a_file_that_cannot_be_used(weights_file, tmp_path, monkeypatch, config, words):
    monkeypatch.chdir(tmp_path)
    state = safetensors.torch.load_file(weights_file)
    safetensors.torch.save_file(state, "a.safetensors", {"config": config, "categories": "[]"})
    with pytest.raises(ValueError, match=f"(?s)a.safetensors.*{words}"):
        PanopticPredictor.from_file("a.safetensors")
    assert os.listdir() == ["a.safetensors"]


def test_files_without_a_config(config_file, weights_file, tmp_path):
    """A checkpoint of torch, a file of another program, and one that is cut."""
    data = weights_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for folder, name in ((config_file.parent, "tiny.pth"), (tmp_path, "other.safetensors")):
        with pytest.raises(CheckpointError, match=f"{name} has no config and classes.*yaml"):
            PanopticPredictor.from_file(folder / name)
    with pytest.raises(CheckpointError, match="cut.safetensors has no config and classes"):
        PanopticPredictor.from_file(tmp_path / "cut.safetensors")


def test_a_file_does_not_allow_itself_to_run_code(weights_file, config_file, tmp_path):
    config = load_config(config_file, ["MODEL.ALLOW_PICKLE", True]).dump()
    _, categories = read_description(str(weights_file))
    description = {"config": config, "categories": json.dumps(categories)}
    state = safetensors.torch.load_file(weights_file)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", description)
    assert not PanopticPredictor.from_file(tmp_path / "a.safetensors").cfg.MODEL.ALLOW_PICKLE


@pytest.mark.parametrize(
    "size, scale, expected",
    [((30, 60), None, (240, 480)), ((300, 600), None, (300, 600)), ((64, 32), 2, (128, 64))],
)
def test_drawings_of_a_picture_without_segments(bgr, size, scale, expected):
    image, nothing = cv2.resize(bgr, size[::-1]), torch.zeros(size, dtype=torch.int32)
    result = PanopticResult(image, nothing, [], MetadataCatalog.get("occlusion_scenes_val"))
    drawn = result.draw(scale).get_image()
    assert drawn.shape == (*expected, 3)
    assert size != expected or (drawn == image[:, :, ::-1]).mean() > 0.99


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \(8, 8, 4\)"),
        (np.zeros((8, 8, 3)), "float64"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_is_no_picture(predictor, image, words):
    with pytest.raises(ValueError, match=words):
        predictor(image)


def test_a_checkpoint_that_leaves_a_part_as_initialized(config_file, predictor, tmp_path):
    state = build_model(predictor.cfg).state_dict()
    part = {k: v for k, v in state.items() if not k.startswith("sem_seg_head.predictor")}
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"part.pth .* 2 tensors .*sem_seg_head.predictor"):
        PanopticPredictor.from_config(config_file, tmp_path / "part.pth")


@pytest.mark.parametrize(
    "key, value",
    [
        *[("MODEL.WEIGHTS", ""), ("MODEL.META_ARCHITECTURE", "PanopticFPN"), ("INPUT.FORMAT", "L")],
        ("MODEL.DEVICE", "xla"),  # of a package that is not there
    ],
)
def test_configs_that_cannot_be_used(config_file, key, value):
    with pytest.raises(ValueError, match=f"{key} is "):
        PanopticPredictor.from_config(config_file, opts=[key, value])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_predicts(config_file, predictor, bgr, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("oanet_d2"), "propagate", True)
    other = PanopticPredictor.from_config(config_file, opts=["MODEL.DEVICE", "cuda"])
    assert torch.equal(other(bgr).panoptic_seg, predictor(bgr).panoptic_seg)
    assert "MODEL.DEVICE is cuda" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_of_a_gpu_lie_on_the_cpu(config_file, bgr):
    predictor = PanopticPredictor.from_config(config_file, opts=["MODEL.DEVICE", "cuda"])
    for result in (predictor(bgr), *predictor.in_orders(bgr, ["score", "srm_pairs"]).values()):
        assert result.panoptic_seg.device.type == "cpu" and result.segments_info
