"""The documentation names only what exists, and its examples run."""

import re
from pathlib import Path

import torch

from detectron2.engine import defaults
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Instances

from oanet_d2 import load_config
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.modeling.oanet import FusionInputs
from oanet_d2.painting import RANKING_RULE_REGISTRY, BoxedMasks, OrderInputs
from tests import conftest
from tests.conftest import REPOSITORY, box_mask, panoptic_fpn_cfg

DOCS = REPOSITORY / "docs"
README, CONTRIBUTING, *_ = PAGES = [REPOSITORY / x for x in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted(DOCS.glob("*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)


def examples(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page, index):
    scope = {}
    exec(examples(page, "python")[index], scope)
    return scope


def test_links_lead_somewhere_and_files_are_linked():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
    for file in [*DOCS.glob("*.md"), *DOCS.glob("pictures/**/*.*")]:
        assert file.name in TEXT, f"no page links to {file}"


def test_config_keys_exist():
    for key in re.findall(r"\b((?:MODEL|INPUT|SOLVER|TEST|DATASETS)(?:\.[A-Z0-9_]+)+)\b", TEXT):
        node = load_config(REPOSITORY / "configs/Base-OANet.yaml")
        for name in key.split("."):
            assert name in node, key
            node = node[name]


def test_commands_and_their_options_exist():
    text, makefile = TEXT.replace("\\\n", " "), (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:`|^ {4})make (?:[A-Z].*=\S* )?([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for name, rest in re.findall(r"\bpython (?:-m )?([\w./]+)([^`\n]*)", text):
        path = REPOSITORY / re.sub(r"\.(?!py$)", "/", name)
        places = [path, path.with_suffix(".py"), path / "__main__.py"]
        source = next(x for x in places if x.is_file()).read_text()
        source += Path(defaults.__file__).read_text() * ("default_argument_parser" in source)
        for option in re.findall(r" (--[a-z-]+)", rest):
            assert f'"{option}"' in source, f"{name} {option}"


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(conftest.CONFIGS)
    (tmp_path / "my_config.yaml").write_text(*examples(README, "yaml"))
    assert set(load_config("my_config.yaml").DATASETS.PANOPTIC) == {"my_train", "my_val"}
    model = build_model(conftest.load_config("OcclusionScenes/oanet_R_18.yaml"))
    (tmp_path / "output/occlusion_scenes").mkdir(parents=True)
    torch.save({"model": model.state_dict()}, "output/occlusion_scenes/model_final.pth")
    write_split(tmp_path / "datasets/occlusion_scenes", "val", 1, image_size=64, num_workers=0)
    assert run(README, 0)["result"].panoptic_seg.shape == (64, 64)
    assert (tmp_path / "segmented.png").exists()


def test_a_panoptic_fpn_becomes_an_oanet(tmp_path, monkeypatch, train_cfg):
    monkeypatch.chdir(tmp_path)
    supervision = ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7]
    train_cfg.merge_from_list([*supervision, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", "output"])
    theirs = panoptic_fpn_cfg(train_cfg)
    (tmp_path / "panoptic_fpn.yaml").write_text(theirs.dump())
    network = build_model(theirs).state_dict()
    torch.save({"model": network}, "panoptic_fpn.pth")
    for split in ("train", "val"):
        write_split(tmp_path / "my", split, 2, image_size=64, num_workers=0)
    (tmp_path / "oanet.yaml").write_text(*examples(DOCS / "migration.md", "yaml"))
    (tmp_path / "output/oanet").mkdir(parents=True)
    run(DOCS / "migration.md", 0)
    trained = run(DOCS / "migration.md", 1)["trainer"].model.state_dict()
    assert all(torch.equal(trained[name], network[name]) for name in network)


def test_extensions(tiny_cfg, monkeypatch):
    for registry in (RANKING_RULE_REGISTRY, META_ARCH_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    _, combiner, alone = (run(CONTRIBUTING, i) for i in range(3))
    # All 64 pixels of the first are visible, 16 of the second, and 15 of the third, a crumb.
    masks = torch.stack([box_mask(0, 0, 8, 8), box_mask(0, 8, 8, 10), box_mask(8, 0, 11, 5)])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.arange(3)
    order_inputs = OrderInputs(scores, classes, masks)
    assert order_inputs.order("smallest_first").tolist() == [2, 1, 0]
    tiny_cfg.MODEL.META_ARCHITECTURE = "OANetWithoutCrumbs"
    model = build_model(tiny_cfg)
    assert isinstance(model, combiner["OANetWithoutCrumbs"])
    instances = Instances((10, 12), scores=scores, pred_classes=classes)
    free = torch.zeros(10, 12, dtype=torch.int64)
    inputs = FusionInputs(BoxedMasks.from_masks(masks), instances, free, order_inputs)
    seg, segments = model.combine(inputs, torch.arange(3))
    assert torch.equal(seg, masks[0] * 1 + masks[1] * 2) and [s["id"] for s in segments] == [1, 2]
    areas = [(alone["panoptic_seg"] == s["id"]).sum().item() for s in alone["segments_info"]]
    assert areas == [50**2, 200**2 - 50**2, 480 * 640 - 200**2]
