"""The documentation names only what exists, and its examples run."""

import functools
import importlib.util
import re
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Dict

import numpy as np
import pytest
import torch
import torchvision

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Instances

from oanet_d2 import complete_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.cli import COMMANDS
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.lazy import load_lazy_config, yaml_keys
from oanet_d2.modeling.oanet import FusionInputs
from oanet_d2.painting import RANKING_RULE_REGISTRY, BoxedMasks, OrderInputs
from oanet_d2.painting.learned import LearnedOrder
from oanet_d2.painting.pairs import GEOMETRY_NUMBERS, PairNetwork
from oanet_d2.submission import categories_of
from tests import conftest
from tests.conftest import CONFIGS, REPOSITORY, box_mask
from tests.onnx_models import instances, write_model


def examples(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPOSITORY / page).read_text(), re.M | re.S)


def test_links_and_config_keys_and_options_exist():
    cfg = load_config(CONFIGS / "Base-OANet.yaml")
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        text = page.read_text().replace("\\\n", " ")
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page}: {target}"
        for key in re.findall(r"\b((?:MODEL|INPUT|SOLVER|TEST|DATASETS)(?:\.[A-Z0-9_]+)+)\b", text):
            assert functools.reduce(getattr, key.split("."), cfg) is not None, key
        for name, rest in re.findall(r"\bpython ([\w/]+\.py)([^`\n]*)", text):
            source = (REPOSITORY / name).read_text() + default_argument_parser().format_help()
            for option in re.findall(r" (--[a-z-]+)", rest):
                assert option in source, f"{name} {option}"
        for name, rest in re.findall(r"\boanet-d2 ([a-z]+)([^`\n]*)", text):
            module = find_spec(COMMANDS[name][0].split(":")[0])
            source = Path(module.origin).read_text() + default_argument_parser().format_help()
            for option in re.findall(r" (--[a-z-]+)", rest):
                assert option in source, f"{name} {option}"


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "my_config.yaml").write_text(*examples("README.md", "yaml"))
    assert set(load_config("my_config.yaml").DATASETS.PANOPTIC) == {"my_train", "my_val"}
    cfg = conftest.load_config("OcclusionScenes/oanet_lite0.yaml")
    categories = categories_of(MetadataCatalog.get("occlusion_scenes_val"))
    checkpointer = OANetCheckpointer(build_model(cfg), "output/occlusion_scenes")
    checkpointer.save_safetensors("model_final", cfg.dump(), categories)
    write_split(tmp_path / "datasets/occlusion_scenes", "val", 1, image_size=64, num_workers=0)
    picture = next((tmp_path / "datasets/occlusion_scenes/val").glob("*.jpg"))
    (tmp_path / "picture.jpg").write_bytes(picture.read_bytes())
    write_model(tmp_path / "model.onnx", instances([(0, 0, 30, 30)], [0]))
    for example in [*examples("README.md"), *examples("docs/deploy.md")]:
        if "openvino" not in example or importlib.util.find_spec("openvino"):
            exec(example, {})


def test_an_order_for_any_segmenter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    _, text = examples("docs/training.md", "yaml")
    (tmp_path / "my_order.yaml").write_text(text)
    folder = tmp_path / load_config("my_order.yaml").OUTPUT_DIR
    network = PairNetwork(2, GEOMETRY_NUMBERS, 0)
    LearnedOrder(network, ["person", "tie"], 4, 256, 384).save(folder / "model_final.safetensors")
    _, _, example, _ = examples("docs/training.md")
    found: Dict = {}
    exec(example, found)
    assert sorted(found["order"].tolist()) == [0, 1]


def test_large_scale_jittering(train_cfg):
    *_, example = examples("docs/training.md")
    exec(example, found := {})
    np.random.seed(0)
    loader, padded = found["JitteringTrainer"].build_train_loader(train_cfg), []
    for x in chain(*islice(loader, 3)):
        assert x["image"].shape == (3, 1024, 1024) and x["instances"].image_size == (1024, 1024)
        padded.append(x["panoptic_category"][(x["image"] == 128).all(dim=0)])
    assert (torch.cat(padded) == -1).float().mean() > 0.99


def test_a_builder_of_a_backbone():
    exec(examples("docs/training.md")[1], {})
    opts = ["MODEL.BACKBONE.NAME", "build_swin_t_fpn", "MODEL.FPN.OUT_CHANNELS", 8]
    backbone = build_backbone(load_config(CONFIGS / "Base-OANet.yaml", opts))
    assert backbone.output_shape()["p2"] == ShapeSpec(channels=8, stride=4)


@pytest.fixture
def my_folder(tmp_path, monkeypatch):
    """Examples run here, and register `my_train` and `my_val`. Other tests do, too."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_train", "my_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_config_in_python(my_folder):
    for split in ("train", "val"):
        write_split(my_folder / "my", split, 1, image_size=64, num_workers=0)
        (my_folder / f"my/annotations/panoptic_{split}.json").rename(my_folder / f"my/{split}.json")
    example, *_ = examples("docs/training.md")
    (my_folder / "my_config.py").write_text(example)
    complete_config(yaml_keys(load_lazy_config("my_config.py")))  # it has the classes of the datasets


def test_a_panoptic_fpn_becomes_an_oanet(my_folder, train_cfg):
    supervision = ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7]
    train_cfg.merge_from_list([*supervision, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", "output"])
    theirs = conftest.panoptic_fpn_cfg(train_cfg)
    (my_folder / "panoptic_fpn.yaml").write_text(theirs.dump())
    network = build_model(theirs).state_dict()
    torch.save({"model": network}, "panoptic_fpn.pth")
    for split in ("train", "val"):
        write_split(my_folder / "my", split, 2, image_size=64, num_workers=0)
    (my_folder / "oanet.yaml").write_text(*examples("docs/migration.md", "yaml"))
    (my_folder / "output/oanet").mkdir(parents=True)
    exec("\n".join(examples("docs/migration.md")), scope := {})
    trained = scope["trainer"].model.state_dict()
    assert all(torch.equal(trained[name], network[name]) for name in network)


def test_anyones_masks(monkeypatch):
    detection = torchvision.models.detection
    small = functools.partial(detection.maskrcnn_resnet50_fpn, min_size=64)  # instead of 800
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", small)
    by_hand, of_torchvision, supervision = examples("docs/anyones_masks.md")
    exec(by_hand, scope := {})
    expected = [307200 - 60000, 4000, 56000]
    assert np.bincount(scope["result"].panoptic_seg.ravel()).tolist() == expected
    exec(of_torchvision, scope)
    assert scope["result"].panoptic_seg.shape == (240, 320)
    if importlib.util.find_spec("supervision"):
        exec(supervision, scope)
        assert np.bincount(scope["result"].panoptic_seg.ravel()).tolist() == expected


def test_extensions(tiny_cfg, monkeypatch):
    monkeypatch.setattr(RANKING_RULE_REGISTRY, "_obj_map", dict(RANKING_RULE_REGISTRY))
    exec("\n".join(examples("CONTRIBUTING.md")), {})
    # All 64 pixels of the first are visible, 16 of the second, and 15 of the third, a crumb.
    masks = torch.stack([box_mask(0, 0, 8, 8), box_mask(0, 8, 8, 10), box_mask(8, 0, 11, 5)])
    inputs = OrderInputs(torch.tensor([0.9, 0.8, 0.7]), torch.arange(3), masks)
    assert inputs.order("smallest_first").tolist() == [2, 1, 0]
    tiny_cfg.MODEL.META_ARCHITECTURE = "OANetWithoutCrumbs"
    instances = Instances((10, 12), scores=inputs.scores, pred_classes=inputs.classes)
    free, boxed = torch.zeros(10, 12, dtype=torch.int64), BoxedMasks.from_masks(masks)
    given = FusionInputs(boxed, instances, free, inputs)
    seg, segments = build_model(tiny_cfg).combine(given, torch.arange(3))
    assert torch.equal(seg, masks[0] * 1 + masks[1] * 2) and [s["id"] for s in segments] == [1, 2]
